"""MultiHeadAttention of com.microsoft: as many heads of keys as of queries, a bias.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.rules import attention_forms as forms
from onnxopt.channels.rules.attention import (
    KEYS,
    QUERIES,
    RESULT,
    VALUES,
    Attention,
    Form,
)
from onnxopt.channels.rules.views import Part

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

BIAS, PADDING, SCORES_BIAS, PAST_KEY, PAST_VALUE = 3, 4, 5, 6, 7
BUFFERS = (8, 9)


class MultiHeadAttention(Attention):
    """Queries [batch, sequence, heads * dims]; keys and values so or with heads apart."""

    def form(self, a: Analysis, node: NodeProto) -> Form | str:
        """By num_heads."""
        if not forms.is_given(node, (1,)) or not forms.is_given(node, (2,)):
            return "its queries, keys and values are packed"
        if forms.is_given(node, BUFFERS):
            return "its caches are buffers"
        first = forms.flat(a, node, QUERIES, "in", 0)
        lies = forms.flat if a.rank(node.input[1]) == 3 else forms.apart
        keys = lies(a, node, KEYS, "in", 1)
        values = lies(a, node, VALUES, "in", 2)
        if first is None or keys is None or values is None:
            return "the sizes of its heads are not known"
        heads = attributes.get(node, "num_heads", 0)
        sizes = [forms.heads_and_dims(part, heads) for part in (first, keys, values)]
        if None in sizes or len({size[0] for size in sizes if size}) != 1:
            return "its heads do not divide their axis"
        dims = [size[1] for size in sizes if size is not None]
        is_apart, has_past = len(keys.axes) == 2, forms.is_given(node, (6, 7))
        if dims[0] != dims[1] or (is_apart and forms.is_given(node, (BIAS,))):
            return "its heads do not match"
        beside = forms.masks_beside(a, node, [(SCORES_BIAS, -3)], heads)
        if isinstance(beside, str):
            return beside
        cached = [(KEYS, heads, dims[1]), (VALUES, heads, dims[2])]
        return Form(
            heads=heads,
            key_heads=heads,
            score_dims=dims[0],
            value_dims=dims[2],
            given=(first, keys, values),
            made=(
                Part(RESULT, "out", 0, (2,), (heads * dims[2],)),
                *forms.caches(node, "out", [(1, *cached[0]), (2, *cached[1])]),
                *forms.weights_made(node, 3, heads),
            ),
            added=bias_parts(node, BIAS, heads * dims[0], heads * dims[2]),
            before=forms.caches(
                node, "in", [(PAST_KEY, *cached[0]), (PAST_VALUE, *cached[1])]
            ),
            beside=beside,
            masks=forms.is_given(node, (PADDING, SCORES_BIAS)),
            one_size=is_apart or has_past,
            sizes=("num_heads", ""),
        )


def bias_parts(
    node: NodeProto, index: int, scores: int, values: int, axis: int = 0
) -> tuple[Part, ...]:
    """Queries, keys and values, side by side along one axis; none without the input."""
    if not forms.is_given(node, (index,)):
        return ()
    dims = (2 * scores + values,)
    starts = ((QUERIES, 0), (KEYS, scores), (VALUES, 2 * scores))
    return tuple(Part(role, "in", index, (axis,), dims, start) for role, start in starts)
