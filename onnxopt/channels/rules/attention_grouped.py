"""GroupQueryAttention of com.microsoft: keys for several queries, a cache, positions.

ONNX Runtime has it only where keys and values have equally many dims, a multiple of 8.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.facts import Mask
from onnxopt.channels.rules import attention_forms as forms
from onnxopt.channels.rules.attention import (
    KEYS,
    QUERIES,
    RESULT,
    VALUES,
    Attention,
    Form,
)
from onnxopt.channels.rules.views import Part, axes_of

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

PAST_KEY, PAST_VALUE, SCORES_BIAS, SINK = 3, 4, 10, 11
STEP = 8


class GroupQueryAttention(Attention):
    """Queries [batch, sequence, heads * dims], alone or with keys and values behind."""

    def form(self, a: Analysis, node: NodeProto) -> Form | str:
        """By num_heads and kv_num_heads."""
        heads = attributes.get(node, "num_heads", 0)
        keys = attributes.get(node, "kv_num_heads", 0)
        if keys <= 0 or heads <= 0 or heads % keys:
            return "its heads do not match"
        if forms.is_given(node, range(12, len(node.input))):
            return "its caches are quantized"
        parts = _given(a, node, heads, keys)
        if parts is None:
            return "the sizes of its heads are not known"
        dims, given = parts
        beside = forms.masks_beside(a, node, [(SCORES_BIAS, -3), (SINK, -1)], heads)
        if isinstance(beside, str):
            return beside
        cached = [(KEYS, keys, dims), (VALUES, keys, dims)]
        return Form(
            heads=heads,
            key_heads=keys,
            score_dims=dims,
            value_dims=dims,
            given=given,
            made=(
                Part(RESULT, "out", 0, (2,), (heads * dims,)),
                *forms.caches(node, "out", [(1, *cached[0]), (2, *cached[1])]),
                *forms.weights_made(node, 3, heads),
            ),
            before=forms.caches(
                node, "in", [(PAST_KEY, *cached[0]), (PAST_VALUE, *cached[1])]
            ),
            beside=beside,
            masks=True,  # by the lengths of sequences
            one_size=True,
            step=0 if _rotates(node) or dims % STEP else STEP,
            sizes=("num_heads", "kv_num_heads"),
        )

    def zeros(self, a: Analysis, node: NodeProto, form: Form, role: str) -> Mask:
        """Rotated dims are zero where the other of their pair is, too: none here."""
        if _rotates(node):
            return np.zeros(form.dims[role], bool)
        return super().zeros(a, node, form, role)


def _rotates(node: NodeProto) -> bool:
    return bool(attributes.get(node, "do_rotary", 0))


def _given(
    a: Analysis, node: NodeProto, heads: int, keys: int
) -> tuple[int, tuple[Part, ...]] | None:
    """How many dims a head has, and where Q, K and V lie; None where that is open."""
    name = node.input[0]
    sizes = axes_of(a, name, (2,)) if a.rank(name) == 3 else None
    if sizes is None:
        return None
    is_packed = not forms.is_given(node, (1,))
    dims, rest = divmod(sizes[0], heads + 2 * keys if is_packed else heads)
    if rest or is_packed != (not forms.is_given(node, (2,))):
        return None
    if is_packed:
        starts = ((QUERIES, 0), (KEYS, heads), (VALUES, heads + keys))
        return dims, tuple(
            Part(role, "in", 0, (2,), sizes, start * dims) for role, start in starts
        )
    found = [
        forms.flat(a, node, role, "in", index)
        for index, role in enumerate((QUERIES, KEYS, VALUES))
    ]
    parts = tuple(part for part in found if part is not None)
    wanted = [(heads * dims,), (keys * dims,), (keys * dims,)]
    return (dims, parts) if [part.dims for part in parts] == wanted else None
