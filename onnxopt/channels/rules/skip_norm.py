"""Norms that are fused with the sum before them, of com.microsoft.

    SkipLayerNormalization            input, skip, scale, shift, bias
    SkipSimplifiedLayerNormalization  input, skip, scale, bias; no mean is taken off

Their last output is the sum.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, aligned, computed, fact, join
from onnxopt.channels.groups import Link
from onnxopt.channels.rules.layer_norm import LayerNormalization, RMSNormalization
from onnxopt.channels.rules.rule import Rule

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

SKIP, SUM = 1, 3


class SkipLayerNormalization(LayerNormalization):
    """LayerNormalization of input + skip + bias."""

    scale_slot, shift_slot, bias_slot = 2, 3, 4
    addends = (0, SKIP)
    sum_slot = SUM

    def axis(self, a: Analysis, node: NodeProto) -> int | None:
        """The last one."""
        rank = a.rank(node.input[0])
        return rank - 1 if rank else None

    def _terms(self, node: NodeProto) -> list[str]:
        slots = [slot for slot in (0, SKIP, self.bias_slot) if slot < len(node.input)]
        return [node.input[slot] for slot in slots if node.input[slot]]

    def given(self, a: Analysis, node: NodeProto) -> Fact | None:
        """The sum."""
        rank, facts = a.rank(node.input[0]), [a.fact(name) for name in self._terms(node)]
        known = [item for item in facts if item is not None]
        if rank is None or len(known) < len(facts):
            return None
        if any(item.kinds.ndim > rank for item in known):
            return None
        total = np.zeros((1,) * rank, known[0].values.dtype)
        with np.errstate(all="ignore"):
            for item in known:
                total = total + aligned(item.values, rank)
        return computed(join(known, rank), total)

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """A scale of zero leaves the shift; the sum is one."""
        found = list(super().forward(a, node))
        if len(found) > SUM and node.output[SUM]:
            found[SUM] = self.given(a, node)
        return found

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """All that is normalized together, and what is needed of the sum."""
        wanted: list[Demand] = [None] * len(node.input)
        rank = a.rank(node.input[0])
        if rank is None or any(need is None or need.any() for need in needs[1:SUM]):
            return wanted
        need = needs[0]
        if need is not None and need.ndim:
            need = np.asarray(need.any(axis=-1, keepdims=True))
        if len(needs) > SUM:
            need = demand.merge(need, needs[SUM])
        for slot in self.addends:
            wanted[slot] = demand.onto(need, a.shape(node.input[slot]))
        return wanted

    def link(self, link: Link) -> None:
        """Operands of one shape have the same channels."""
        a, node = link.analysis, link.node
        ranks = {a.rank(node.input[slot]) for slot in self.addends}
        if len(ranks) > 1:
            link.bar("it broadcasts")
        else:
            super().link(link)


class SkipRMSNormalization(SkipLayerNormalization, RMSNormalization):
    """RMSNormalization of input + skip + bias."""

    shift_slot, bias_slot = -1, 3


class EmbedLayerNormalization(Rule):
    """LayerNormalization of a sum of rows of tables, which all keep their columns."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """A scale of zero leaves the shift."""
        nothing: list[Fact | None] = [None] * len(node.output)
        scale, shift = (a.array(node.input[index]) for index in (5, 6))
        if scale is None or shift is None or scale.shape != shift.shape:
            return nothing
        kinds = np.where(scale == 0, Kind.CONST, Kind.DYN).reshape(1, 1, -1)
        return [fact(kinds, shift.reshape(1, 1, -1)), *nothing[1:]]

    def link(self, link: Link) -> None:
        """No channel can go: zero or not, it moves the mean."""
        link.bar(f"{link.op} mixes the channels")
