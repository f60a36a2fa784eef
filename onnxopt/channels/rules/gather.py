"""Gather of channels by a constant list: result channel j is input channel index[j]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.facts import Fact, fact
from onnxopt.channels.groups import Ints, Link, Slot
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Gather(Rule):
    """Along one axis, which stays an axis; the others go through."""

    drops_inputs = True

    def _picks(self, a: Analysis, node: NodeProto) -> tuple[int, Ints] | None:
        """The axis and the indices (from 0 on); None where they are not known."""
        rank, index = a.rank(node.input[0]), a.graph.array(node.input[1])
        axis = attributes.get(node, "axis", 0)
        if rank is None or index is None or index.ndim != 1:
            return None
        size = a.size(node.input[0], axis)
        if size is None or not index.size:
            return None
        found: Ints = index.astype(np.int64) % size
        return axis % rank, found

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The facts of what is picked."""
        given, picks = a.fact(node.input[0]), self._picks(a, node)
        if given is None or picks is None:
            return [None]
        axis, index = picks
        if given.kinds.shape[axis] == 1:
            return [given]
        return [fact(given.kinds.take(index, axis), given.values.take(index, axis))]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Nothing of what is not picked."""
        picks, rank = self._picks(a, node), a.rank(node.input[0])
        size = None if picks is None else a.size(node.input[0], picks[0])
        if picks is None or size is None or rank is None:
            return [None, None]
        axis, index = picks
        needed = np.zeros(size, bool)
        needed[index[demand.channels(needs[0], axis, len(index))]] = True
        return [demand.merge(NOTHING, demand.along(needed, axis, rank)), None]

    def keeps_rows(self, link: Link) -> bool:
        """Where it picks whole rows, or along another axis."""
        rank = link.analysis.rank(link.node.input[0]) or 1
        return attributes.get(link.node, "axis", 0) % rank not in link.axes[1:]

    def link(self, link: Link) -> None:
        """Tie by index; other axes as they are."""
        picks = self._picks(link.analysis, link.node)
        if picks is None or (link.side == "in" and link.index > 0):
            link.bar("what it picks is not a constant list")
            return
        axis, index = picks
        if axis not in link.axes:
            link.tie(link.opposite, 0, link.axes)
        elif len(link.axes) > 1:
            link.bar("it picks along one of the axes")
        else:
            every = np.arange(len(index))
            if link.side == "in":
                link.tie("out", 0, (axis,), here=index, there=every)
                link.patch(_Renumber(link.node, link.slot, index))
            else:
                link.tie("in", 0, (axis,), here=every, there=index)


class _Renumber:
    """Drops what is gone from the list, and counts the rest anew."""

    def __init__(self, node: NodeProto, slot: Slot, index: Ints) -> None:
        self.node, self.slot, self.index = node, slot, index

    def __call__(self, removal: Removal) -> None:
        kept = removal.kept(self.slot)
        if kept.all():
            return
        place = np.cumsum(kept) - 1
        index = place[self.index[kept[self.index]]]

        def change(array: Array) -> Array:
            return index.astype(array.dtype)

        if len(index):
            removal.change(self.node, 1, change)
