"""Axes that a node sees in a value and the value does not have: heads of a flat axis.

    queries [batch, sequence, heads * dims], and num_heads, an attribute of the node

A view has them; its atoms are tied to those of the value. So what goes is settled by
heads and dims, whether values hold them in one axis or in two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt.channels import demand
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.facts import Fact, Kind, Kinds, Mask, fact
from onnxopt.channels.groups import Groups, Ints, Side, Slot
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


@dataclass(frozen=True)
class Part:
    """Where a view lies in the value at a port: in `axes` of these `dims`, from `start`.

    `role` names the view. The atoms of the view are a run of those of the axes.
    """

    role: str
    side: Side
    index: int
    axes: tuple[int, ...]
    dims: tuple[int, ...]
    start: int = 0

    def name(self, node: NodeProto) -> str:
        """The value at the port; "" where there is none."""
        names = node.input if self.side == "in" else node.output
        return names[self.index] if self.index < len(names) else ""

    def atoms(self, count: int, axes: Sequence[int]) -> Ints:
        """For each of `count` atoms of the view, that of a slot of some of the axes."""
        every = np.unravel_index(np.arange(self.start, self.start + count), self.dims)
        places = [self.axes.index(axis) for axis in axes]
        sizes = [self.dims[place] for place in places]
        found = np.ravel_multi_index([every[place] for place in places], sizes)
        return np.asarray(found, np.int64)


Known = tuple[Kinds, Array]
"""Kinds and values, in the dims of a view."""


def known(item: Fact | None, part: Part, dims: Sequence[int]) -> Known:
    """What a fact about the value says of each atom of a view of these dims."""
    if item is None:
        return np.full(dims, Kind.DYN, np.uint8), np.ones(dims)
    over = item.over(part.axes, part.dims)
    atoms = part.atoms(math.prod(dims), part.axes)
    kinds, values = over.kinds.reshape(-1)[atoms], over.values.reshape(-1)[atoms]
    return kinds.reshape(dims), values.reshape(dims).astype(np.float64)


def fact_of(found: Known, part: Part, rank: int) -> Fact | None:
    """The fact about a value, all of which is a view."""
    shape = _shape(part, rank)
    kinds, values = (np.asarray(array).reshape(shape) for array in found)
    return fact(kinds, values)


def needed(need: Demand, part: Part, dims: Sequence[int]) -> Mask:
    """What is needed of each atom of a view of these dims."""
    flat = demand.over(need, part.axes, part.dims)
    return flat[part.atoms(math.prod(dims), part.axes)].reshape(tuple(dims))


def demand_of(parts: Sequence[Part], wanted: Mapping[str, Mask], rank: int) -> Demand:
    """The demand on the value at the port of `parts`, all of which lie in the same axes.

    `wanted` [dims of the view] by role; of what is no part of a view, nothing.
    """
    first = parts[0]
    whole = np.zeros(math.prod(first.dims), bool)
    for part in parts:
        mask = wanted[part.role].reshape(-1)
        whole[part.atoms(mask.size, part.axes)] = mask
    return demand.merge(NOTHING, whole.reshape(_shape(first, rank)))


def _shape(part: Part, rank: int) -> list[int]:
    shape = [1] * rank
    for axis, size in zip(part.axes, part.dims, strict=True):
        shape[axis] = size
    return shape


def axes_of(a: Analysis, name: str, axes: Sequence[int]) -> tuple[int, ...] | None:
    """The sizes of axes of a value; None where one is not known."""
    sizes = [a.size(name, axis) for axis in axes]
    known = [size for size in sizes if size is not None]
    return tuple(known) if len(known) == len(sizes) else None


def attach(groups: Groups, node: NodeProto, part: Part, view: Slot) -> None:
    """Tie a view to the slot of the value that it lies in."""
    slot = slot_of(groups, node, part)
    if isinstance(slot, str):
        groups.bar(view, slot)
        return
    atoms = part.atoms(view.size, slot.axes)
    groups.tie(view.start + np.arange(view.size), slot.start + atoms)


def slot_of(groups: Groups, node: NodeProto, part: Part) -> Slot | str:
    """The slot of a part's axes, or of some of them where that is there by now."""
    for slot in groups.slots_at(node, part.side, part.index):
        if set(slot.axes) <= set(part.axes):
            return slot
    sized = zip(part.axes, part.dims, strict=True)
    axes = [axis for axis, size in sized if size != 1] or part.axes[:1]
    return groups.slot(node, part.side, part.index, tuple(axes))


def live_rows(view: Slot, removed: Mask) -> tuple[Mask, Mask]:
    """Of a view [heads, dims]: the heads that stay, the dims that go from all of them."""
    gone = view.of(removed).reshape(view.dims)
    lives = np.asarray(~gone.all(axis=1))
    return lives, np.asarray(gone[lives].all(axis=0))
