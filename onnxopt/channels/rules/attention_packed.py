"""Attention of com.microsoft: a layer that makes Q, K and V of one input, and attends.

    x [batch, sequence, features], weight [features, 2 * scores + values], bias

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, Mask
from onnxopt.channels.groups import Link
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules import attention_forms as forms
from onnxopt.channels.rules.attention import RESULT, Attention, Form
from onnxopt.channels.rules.attention_multi_head import bias_parts
from onnxopt.channels.rules.layer import Layer
from onnxopt.channels.rules.matrix import Geometry
from onnxopt.channels.rules.rule import Seed
from onnxopt.channels.rules.views import Known, Part, axes_of

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

WEIGHT, BIAS, MASK, PAST, SCORES_BIAS, LENGTH = 1, 2, 3, 4, 5, 6


class PackedLayer(Layer):
    """The layer in it: features in, Q, K and V side by side."""

    def __init__(self, attention: PackedAttention) -> None:
        self.attention = attention

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """Where the attention is one that is known."""
        form = self.attention.known_form(a, node)
        return None if isinstance(form, str) else Geometry(2, 2, outputs=1, inputs=0)

    def can_shift(self, a: Analysis, node: NodeProto, g: Geometry) -> bool:
        """Into a bias that is there."""
        name = self._bias_name(node)
        return bool(name) and a.graph.weight(name) is not None

    def live(
        self, a: Analysis, node: NodeProto, g: Geometry, need: Demand
    ) -> Mask | None:
        """The features that needed parts of Q, K and V read."""
        form, matrix = self.attention.known_form(a, node), self.matrix(a, node, g)
        if isinstance(form, str) or matrix.rows is None:
            return None
        wanted = self.attention.wanted(a, node, form, [need])
        parts = [wanted[part.role].reshape(-1) for part in form.given]
        return matrix.live(np.concatenate(parts))

    def made(self, a: Analysis, node: NodeProto, g: Geometry) -> Known | None:
        """What Q, K and V are, side by side; None where nothing is known."""
        key = ("made", id(node))
        if key not in a.kept:
            a.kept[key] = self._made(a, node, g)
        found: Known | None = a.kept[key]
        return found

    def _made(self, a: Analysis, node: NodeProto, g: Geometry) -> Known | None:
        matrix = self.matrix(a, node, g)
        bias = None if matrix.rows is None else self.bias(a, node, len(matrix.rows))
        if matrix.rows is None or bias is None:
            return None
        mixed = self._mixed(a, node, self.given(a, node), matrix, matrix.rows, g)
        return None if mixed is None else (mixed[0], mixed[1] + bias)


class PackedAttention(Attention):
    """It is the maker of its heads, and reads features."""

    layer_axis = 2

    def __init__(self) -> None:
        self.layer = PackedLayer(self)

    def form(self, a: Analysis, node: NodeProto) -> Form | str:
        """By num_heads and qkv_hidden_sizes."""
        weight = node.input[WEIGHT]
        sizes = axes_of(a, weight, (1,)) if a.rank(weight) == 2 else None
        heads = attributes.get(node, "num_heads", 0)
        if sizes is None or a.graph.weight(weight) is None or heads <= 0:
            return "its weight is not constant"
        if forms.is_given(node, (PAST, LENGTH)) or forms.is_made(node, (1,)):
            return "its cache holds keys and values in one"
        if attributes.get(node, "do_rotary", 0):
            return "it rotates dims in pairs"
        widths = attributes.get(node, "qkv_hidden_sizes") or [sizes[0] // 3] * 3
        if len(widths) != 3 or sum(widths) != sizes[0] or widths[0] != widths[1]:
            return "its heads do not match"
        if any(width % heads for width in widths) or not min(widths):
            return "its heads do not divide their axis"
        beside = forms.masks_beside(a, node, [(SCORES_BIAS, -3)], heads)
        if isinstance(beside, str):
            return beside
        scores, values = widths[0], widths[2]
        return Form(
            heads=heads,
            key_heads=heads,
            score_dims=scores // heads,
            value_dims=values // heads,
            given=bias_parts(node, WEIGHT, scores, values, axis=1),
            made=(Part(RESULT, "out", 0, (2,), (values,)),),
            added=bias_parts(node, BIAS, scores, values),
            beside=beside,
            masks=forms.is_given(node, (MASK, SCORES_BIAS)),
            sizes=("num_heads", ""),
        )

    def known(self, a: Analysis, node: NodeProto, form: Form, role: str) -> Known:
        """By the layer: its bias is in it."""
        dims = form.dims[role]
        g = self.layer.geometry(a, node)
        found = self.layer.made(a, node, g) if g is not None else None
        if found is None:
            return np.full(dims, Kind.DYN, np.uint8), np.ones(dims)
        part = next(part for part in form.given if part.role == role)
        atoms = part.atoms(int(np.prod(dims)), part.axes)
        return found[0][atoms].reshape(dims), found[1][atoms].reshape(dims)

    def _averages(self, a: Analysis, node: NodeProto, form: Form) -> bool:
        return not form.masks  # the sequence of keys is that of queries

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Nothing of what is not as it is taken to be."""
        if a.rank(node.input[0]) != 3:
            return [None] * len(node.output)
        return super().forward(a, node)

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Of the weight what makes needed parts; of the input what those read."""
        wanted = list(super().backward(a, node, needs))
        g = self.layer.geometry(a, node)
        live = self.layer.live(a, node, g, needs[0]) if g is not None else None
        if live is not None and a.rank(node.input[0]) == 3:
            wanted[0] = demand.along(live, 2, 3)
        return wanted

    def sources(self, a: Analysis, node: NodeProto) -> Sequence[Seed]:
        """The features."""
        return self.layer.sources(a, node) if a.rank(node.input[0]) == 3 else []

    def link(self, link: Link) -> None:
        """Features end here; the rest is attention."""
        form = self.known_form(link.analysis, link.node)
        if not isinstance(form, str) and (link.side, link.index) == ("in", 0):
            self.layer.link(link)
        else:
            super().link(link)

    def write(self, removal: Removal, node: NodeProto, left: Form) -> None:
        """How wide Q, K and V are, where that is said or no longer the same."""
        scores, values = left.heads * left.score_dims, left.heads * left.value_dims
        is_said = attributes.find(node, "qkv_hidden_sizes") is not None
        if is_said or scores != values:
            sizes = [scores, scores, values]
            removal.edit.set_attribute(node, "qkv_hidden_sizes", sizes)
