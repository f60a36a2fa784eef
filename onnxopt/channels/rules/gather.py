"""Gather: by a constant, result index j is input index[j]; by what is computed, a table.

Of a table of embeddings the rows are left alone; its columns are channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.facts import Fact, Kind, Mask, fact
from onnxopt.channels.groups import Ints, Link, Slot
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Gather(Rule):
    """Along one axis, in the place of which come those of the indices."""

    drops_inputs = True

    def _axis(self, a: Analysis, node: NodeProto) -> tuple[int, int] | None:
        """The axis that is picked from, and how many come in its place."""
        rank, more = a.rank(node.input[0]), a.rank(node.input[1])
        if not rank or more is None:
            return None
        return attributes.get(node, "axis", 0) % rank, more

    def _picks(self, a: Analysis, node: NodeProto) -> Ints | None:
        """A constant list of indices, or one index (from 0 on); None elsewhere."""
        index = a.graph.array(node.input[1])
        size = a.size(node.input[0], attributes.get(node, "axis", 0))
        if index is None or index.ndim > 1 or not index.size or not size:
            return None
        found: Ints = index.astype(np.int64) % size
        return found

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The facts of what is picked; of all, where that is computed."""
        given, place = a.fact(node.input[0]), self._axis(a, node)
        if given is None or place is None:
            return [None]
        axis, more = place
        index = self._picks(a, node)
        if index is None:
            shared = given.across((axis,))
            # which row it is depends on the input
            kinds = np.where(shared.kinds == Kind.MAP, Kind.DYN, shared.kinds)
            every = np.zeros((1,) * more, np.int64)
            return [fact(kinds.take(every, axis), shared.values.take(every, axis))]
        index = index if given.kinds.shape[axis] > 1 else np.zeros_like(index)
        return [fact(given.kinds.take(index, axis), given.values.take(index, axis))]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Nothing of what is not picked, nor of columns that are not needed."""
        place, index = self._axis(a, node), self._picks(a, node)
        need = np.ones((), bool) if needs[0] is None else needs[0]
        rank = a.rank(node.output[0])
        if place is None or rank is None:
            return [None, None]
        axis, more = place
        need = need.reshape((1,) * (rank - need.ndim) + need.shape)
        if index is None:
            rows: Mask = np.asarray(need.any(axis=tuple(range(axis, axis + more))))
            return [demand.merge(NOTHING, np.expand_dims(rows, axis)), None]
        size = a.size(node.input[0], axis)
        assert size is not None
        part = need if index.ndim else np.expand_dims(need, axis)
        wide = np.broadcast_to(
            part, (*part.shape[:axis], index.size, *part.shape[axis + 1 :])
        )
        needed = np.zeros((*part.shape[:axis], size, *part.shape[axis + 1 :]), bool)
        for mine, picked in enumerate(index.reshape(-1).tolist()):
            needed.swapaxes(0, axis)[picked] |= wide.swapaxes(0, axis)[mine]
        return [demand.merge(NOTHING, needed), None]

    def keeps_rows(self, link: Link) -> bool:
        """Where it picks whole rows, or along another axis."""
        rank = link.analysis.rank(link.node.input[0]) or 1
        return attributes.get(link.node, "axis", 0) % rank not in link.axes[1:]

    def link(self, link: Link) -> None:
        """Tie by index; other axes as they are."""
        place = self._axis(link.analysis, link.node)
        if place is None or (link.side == "in" and link.index > 0):
            link.bar("what it picks is not known")
            return
        axis, more = place
        picked = set(range(axis, axis + more)) if link.side == "out" else {axis}
        shift = more - 1 if link.side == "in" else 1 - more
        behind = axis + more if link.side == "out" else axis + 1
        rest = {o: o + shift * (o >= behind) for o in link.axes if o not in picked}
        index = self._picks(link.analysis, link.node)
        if index is not None and index.ndim == 0:
            self._one(link, axis, int(index), rest)
        elif len(rest) == len(link.axes):
            if not _waits(link, rest):
                link.relate(link.opposite, 0, rest)
        elif index is None:
            link.bar("what it picks along this axis is not known")
        else:
            self._list(link, axis, index)

    def _list(self, link: Link, axis: int, index: Ints) -> None:
        """Result atom j along the axis is the input's atom index[j]."""
        a, place = link.analysis, link.axes.index(axis)
        dims = list(link.slot.dims)
        dims[place] = a.size(link.node.input[0], axis) or 0
        atoms = np.arange(math.prod(dims)).reshape(dims).take(index, place).reshape(-1)
        every = np.arange(len(atoms))
        if link.side == "in":
            link.tie("out", 0, link.axes, here=atoms, there=every)
            link.patch(_Renumber(link.node, link.slot, axis, index))
        else:
            link.tie("in", 0, link.axes, here=every, there=atoms)

    def _one(self, link: Link, axis: int, index: int, rest: dict[int, int]) -> None:
        """The result has the axes that are left, of one index of the input's."""
        a = link.analysis
        size = a.size(link.node.input[0], axis)
        if not rest or size is None:
            link.bar("it picks one index")
        elif link.side == "in":
            if axis not in link.axes:
                link.relate("out", 0, rest)
                return
            dims, place = link.slot.dims, link.axes.index(axis)
            atoms = np.arange(link.slot.size).reshape(dims).take(index, place).reshape(-1)
            link.tie("out", 0, sorted(rest.values()), here=atoms, there=_count(atoms))
            one = np.array(index)
            link.patch(_Renumber(link.node, link.slot, axis, one), link.axes)
        elif not _waits(link, rest):
            found = link.covering("in", 0, list(rest.values()))
            if found is not None and axis not in found.axes:
                link.relate("in", 0, rest)
                return
            axes = sorted({axis, *rest.values()})
            sizes = [a.size(link.node.input[0], o) or 0 for o in axes]
            every = np.arange(math.prod(sizes)).reshape(sizes)
            atoms = every.take(index, axes.index(axis)).reshape(-1)
            link.tie("in", 0, axes, here=_count(atoms), there=atoms)


def _count(atoms: Ints) -> Ints:
    return np.arange(len(atoms))


def _waits(link: Link, rest: dict[int, int]) -> bool:
    """Whether to look again later: the other side may have more axes than ours."""
    is_there = link.covering(link.opposite, 0, list(rest.values())) is not None
    return not is_there and link.groups.defer(link, late=1)


class _Renumber:
    """Drops what is gone from the list, and counts the rest anew."""

    def __init__(self, node: NodeProto, slot: Slot, axis: int, index: Ints) -> None:
        self.node, self.slot, self.axis, self.index = node, slot, axis, index

    def __call__(self, removal: Removal) -> None:
        kept = removal.kept_along(self.slot, self.axis)
        if kept.all():
            return
        place = np.cumsum(kept) - 1
        listed = self.index if self.index.ndim else self.index[None]
        index = place[listed[kept[listed]]]

        def change(array: Array) -> Array:
            return index.astype(array.dtype).reshape((-1,) if array.ndim else ())

        if len(index):
            removal.change(self.node, 1, change)
