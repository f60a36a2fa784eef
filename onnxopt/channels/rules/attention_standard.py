"""Attention of the standard: [batch, sequence, heads * dims] or [batch, heads, ...]."""

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

MASK, PAST_KEY, PAST_VALUE, LENGTHS = 3, 4, 5, 6
WINDOWS = ("left_window_size", "right_window_size")


class StandardAttention(Attention):
    """Queries and keys may have another number of heads, values another of dims."""

    def form(self, a: Analysis, node: NodeProto) -> Form | str:
        """By attributes where heads and dims share an axis."""
        given = [
            self._part(a, node, *pair) for pair in enumerate((QUERIES, KEYS, VALUES))
        ]
        parts = tuple(part for part in given if part is not None)
        if len(parts) < 3:
            return "the sizes of its heads are not known"
        is_flat = len(parts[0].axes) == 1
        counts = (_count(node, "q_num_heads"), *[_count(node, "kv_num_heads")] * 2)
        sizes = [
            forms.heads_and_dims(part, count)
            for part, count in zip(parts, counts, strict=True)
        ]
        queries, keys, values = sizes
        if queries is None or keys is None or values is None:
            return "its heads do not divide their axis"
        if queries[1] != keys[1] or keys[0] != values[0] or queries[0] % keys[0]:
            return "its heads do not match"
        beside = forms.masks_beside(a, node, [(MASK, -3)], queries[0])
        if isinstance(beside, str):
            return beside
        heads, wide = queries[0], queries[0] * values[1]
        axes, dims = ((2,), (wide,)) if is_flat else ((1, 3), (heads, values[1]))
        cached = [(KEYS, *keys), (VALUES, *values)]
        return Form(
            heads=heads,
            key_heads=keys[0],
            score_dims=keys[1],
            value_dims=values[1],
            given=parts,
            made=(
                Part(RESULT, "out", 0, axes, dims),
                *forms.caches(node, "out", [(1, *cached[0]), (2, *cached[1])]),
                *forms.weights_made(node, 3, heads),
            ),
            before=forms.caches(
                node, "in", [(PAST_KEY, *cached[0]), (PAST_VALUE, *cached[1])]
            ),
            beside=beside,
            masks=_masks(node),
            sizes=("q_num_heads", "kv_num_heads") if is_flat else ("", ""),
        )

    def scales_by_size(self, node: NodeProto) -> bool:
        """Where nothing is said; zero is a scale."""
        return attributes.find(node, "scale") is None

    def _part(self, a: Analysis, node: NodeProto, index: int, role: str) -> Part | None:
        rank = a.rank(node.input[index])
        if rank != a.rank(node.input[0]) or rank != a.rank(node.output[0]):
            return None
        lies = forms.flat if rank == 3 else forms.apart
        return lies(a, node, role, "in", index)


def _count(node: NodeProto, name: str) -> int:
    found: int = attributes.get(node, name, 0)
    return found


def _masks(node: NodeProto) -> bool:
    """Whether some query may have no key; causal ones have the first."""
    has_window = any(attributes.get(node, name, -1) >= 0 for name in WINDOWS)
    return has_window or forms.is_given(node, (MASK, LENGTHS))
