"""Expand and Tile: copies along axes; an axis that had one element has copies of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, aligned, fact
from onnxopt.channels.groups import Link, Slot
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.layout import correct_shape
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Expand(Rule):
    """Broadcasts to a shape: key heads are copied for each query head of their group."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The fact, with the axes that are new."""
        given, rank = a.fact(node.input[0]), a.rank(node.output[0])
        if given is None or rank is None or self._axes(a, node) is None:
            return [None]
        return [fact(aligned(given.kinds, rank), aligned(given.values, rank))]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """An element of which any copy is needed."""
        wanted: list[Demand] = [None] * len(node.input)
        if self._axes(a, node) is not None:
            wanted[0] = demand.onto(needs[0], a.shape(node.input[0]))
        return wanted

    def _axes(self, a: Analysis, node: NodeProto) -> dict[int, int] | None:
        """For each input axis that keeps its size the axis of the result.

        None where an axis might be either copied or kept.
        """
        before, after = a.shape(node.input[0]), a.shape(node.output[0])
        if before is None or after is None:
            return None
        shift = len(after) - len(before)
        return {
            axis: axis + shift
            for axis, size in enumerate(before)
            if size == after[axis + shift] and size is not None
        }

    def link(self, link: Link) -> None:
        """Axes that keep their size go through; the shape that is written follows."""
        axes = self._axes(link.analysis, link.node)
        if axes is None or (link.side == "in" and link.index > 0):
            link.bar("how it broadcasts is not known")
            return
        if link.side == "out":
            axes = {there: here for here, there in axes.items()}
        own = {axis: axes[axis] for axis in link.axes if axis in axes}
        if link.side == "in" and len(own) < len(link.axes):
            link.bar("it copies this axis")
        elif not own:
            self.correct(link)
        elif link.side == "out" or not self._waits(link, own):
            if link.side == "in":
                self._open_copies(link, list(axes.values()), list(own.values()))
            link.relate(link.opposite, 0, own)
            self.correct(link)

    def _open_copies(self, link: Link, kept: list[int], own: list[int]) -> None:
        """Where a Reshape merges the copies with the channels, let them be told apart."""
        a, name = link.analysis, link.name("out", 0)
        use = a.graph.only_use(name)
        if use is None or a.graph.op(use.node) != "Reshape":
            return
        dims = a.shape(name) or ()
        copies = [
            axis
            for axis, size in enumerate(dims)
            if axis not in kept and isinstance(size, int) and size > 1
        ]
        if copies and link.covering("out", 0, own) is None:
            link.groups.slot(link.node, "out", 0, tuple(sorted([*own, *copies])))

    def _waits(self, link: Link, own: dict[int, int]) -> bool:
        """Whether to look again later: the result may have more axes than the input."""
        is_there = link.covering("out", 0, list(own.values())) is not None
        return not is_there and link.groups.defer(link, late=1)

    def correct(self, link: Link) -> None:
        """Let what is written of the sizes of the result follow."""
        correct_shape(link)


class Tile(Expand):
    """Repeats; axes that it repeats can lose indices only if there was one to repeat."""

    def _axes(self, a: Analysis, node: NodeProto) -> dict[int, int] | None:
        repeats, dims = a.graph.array(node.input[1]), a.shape(node.input[0])
        if repeats is None or dims is None or a.graph.opset() < 6:
            return None
        counts = repeats.reshape(-1).tolist()
        for count, size in zip(counts, dims, strict=True):
            if count < 1 or (count > 1 and size != 1):
                return None
        return {axis: axis for axis, count in enumerate(counts) if count == 1}

    def correct(self, link: Link) -> None:
        """An axis of which copies go is repeated fewer times."""
        for slot in link.groups.slots_of(link.node.output[0]):
            key = (id(link.node), slot.axes)
            link.groups.patch(key, slot, _Repeats(link.node, slot))


class _Repeats:
    """Writes how often each axis is repeated."""

    def __init__(self, node: NodeProto, slot: Slot) -> None:
        self.node, self.slot = node, slot

    def __call__(self, removal: Removal) -> None:
        sizes = {a: int(removal.kept_along(self.slot, a).sum()) for a in self.slot.axes}

        def change(array: Array) -> Array:
            made = array.copy()
            for axis, size in sizes.items():
                if made[axis] > 1:
                    made[axis] = size
            return np.asarray(made)

        if not removal.kept(self.slot).all():
            removal.change(self.node, 1, change)
