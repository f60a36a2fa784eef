"""Operators that join and part channels: Concat, Split, Slice."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.facts import DYNAMIC, Fact, Kind, Mask, aligned, fact, join
from onnxopt.channels.groups import Groups, Ints, Link, Slot
from onnxopt.channels.removal import Change, Removal
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


def _ends(sizes: Sequence[int]) -> list[tuple[int, int]]:
    stops = np.cumsum([0, *sizes]).tolist()
    return list(itertools.pairwise(stops))


def _axis(a: Analysis, node: NodeProto, name: str, default: int) -> int | None:
    rank, axis = a.rank(name), attributes.get(node, "axis", default)
    return axis % rank if rank and -rank <= axis < rank else None


def _count(atoms: Ints) -> Ints:
    return np.arange(len(atoms))


def inside(dims: Sequence[int], place: int, low: int, high: int) -> Ints:
    """The atoms of a slot of `dims` that lie in a range of one of its axes, in order."""
    every = np.arange(math.prod(dims)).reshape(dims)
    return every.take(range(low, high), axis=place).reshape(-1)


class Concat(Rule):
    """Channels side by side; an operand of which all go is left out.

    Operands stand from input `first` on, each with `stride` - 1 parameters behind it.
    """

    first, stride = 0, 1

    def _operands(self, node: NodeProto) -> list[str]:
        return list(node.input[self.first :: self.stride])

    def facts(self, a: Analysis, node: NodeProto) -> list[Fact | None]:
        """What is known of each operand."""
        return [a.fact(name) for name in self._operands(node)]

    def result(self, a: Analysis, node: NodeProto, made: Fact | None) -> Fact | None:
        """The fact of the output, from the operands' side by side."""
        return made

    def _parts(
        self, a: Analysis, node: NodeProto, axis: int
    ) -> list[tuple[int, int]] | None:
        """Where each operand lies in the result."""
        sizes = [a.size(name, axis) for name in self._operands(node)]
        known = [size for size in sizes if size is not None]
        return _ends(known) if len(known) == len(sizes) else None

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The operands' facts side by side."""
        facts = self.facts(a, node)
        first = next((item for item in facts if item is not None), None)
        axis = _axis(a, node, node.output[0], 1)
        if first is None or axis is None:
            return [None]
        rank, parts = first.kinds.ndim, self._parts(a, node, axis)
        if parts is None:
            return [self.result(a, node, _alike(facts, axis, rank))]
        kinds = [DYNAMIC if item is None else item.kinds for item in facts]
        values = [
            np.ones((), first.values.dtype) if item is None else item.values
            for item in facts
        ]
        made = fact(_joined(kinds, parts, axis, rank), _joined(values, parts, axis, rank))
        return [self.result(a, node, made)]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """To each operand its part."""
        wanted: list[Demand] = [None] * len(node.input)
        axis, need = _axis(a, node, node.output[0], 1), needs[0]
        if axis is None or need is None or not need.ndim:
            return wanted
        parts = self._parts(a, node, axis)
        if parts is None and need.shape[axis] != 1:
            return wanted
        for place in range(len(self._operands(node))):
            whole = need.shape[axis] == 1
            made = need if whole or parts is None else _part(need, axis, *parts[place])
            wanted[self.first + place * self.stride] = made
        return wanted

    def keeps_rows(self, link: Link) -> bool:
        """Where it joins rows, or along another axis."""
        axis = _axis(link.analysis, link.node, link.node.output[0], 1)
        return axis is not None and axis not in link.axes[1:]

    def link(self, link: Link) -> None:
        """On the axis of the Concat an operand is a part of the result."""
        a, node = link.analysis, link.node
        axis = _axis(a, node, node.output[0], 1)
        parts = self._parts(a, node, axis) if axis is not None else None
        if link.side == "in" and not self._is_operand(link.index):
            link.bar("it is a scale")
        elif axis is not None and axis not in link.axes:
            for side, index in link.ports():
                if side == "out" or self._is_operand(index):
                    link.tie(side, index, link.axes)
        elif axis is None or parts is None:
            link.bar("the sizes of its operands are not known")
        else:
            self._tie_parts(link, axis, parts)

    def _is_operand(self, index: int) -> bool:
        return index >= self.first and (index - self.first) % self.stride == 0

    def _tie_parts(self, link: Link, axis: int, parts: Sequence[tuple[int, int]]) -> None:
        node, place = link.node, link.axes.index(axis)
        if link.side == "in":
            dims = list(link.slot.dims)
            dims[place] = parts[-1][1]
            part = parts[(link.index - self.first) // self.stride]
            link.tie("out", 0, link.axes, there=inside(dims, place, *part))
            return
        slots: list[Slot | None] = []
        for number, part in enumerate(parts):
            here = inside(link.slot.dims, place, *part)
            index = self.first + number * self.stride
            slots.append(link.tie("in", index, link.axes, here, _count(here)))
        link.patch(lambda removal: self._leave_out(removal, node, slots))

    def _leave_out(
        self, removal: Removal, node: NodeProto, slots: Sequence[Slot | None]
    ) -> None:
        stays = list(node.input[: self.first])
        for place, slot in enumerate(slots):
            if slot is None or removal.kept(slot).any():
                index = self.first + place * self.stride
                stays += node.input[index : index + self.stride]
        if len(stays) < len(node.input):
            removal.edit.set_inputs(node, stays)

    def drops_operand(self, a: Analysis, node: NodeProto, slot: Slot) -> bool:
        """Whether an operand without channels can be left out."""
        return slot.axes == (_axis(a, node, node.output[0], 1),)


def _alike(facts: Sequence[Fact | None], axis: int, rank: int) -> Fact | None:
    """What holds of all operands, of which none differs along the axis."""
    known = [item for item in facts if item is not None]
    if len(known) < len(facts) or any(item.kinds.shape[axis] != 1 for item in known):
        return None
    kinds, values = join(known, rank), known[0].values
    same: Mask = functools.reduce(
        np.logical_and, [np.asarray(item.values == values) for item in known]
    )
    return fact(np.where((kinds == Kind.CONST) & ~same, Kind.MAP, kinds), values)


def _joined(
    arrays: Sequence[Array], parts: Sequence[tuple[int, int]], axis: int, rank: int
) -> Array:
    made = [aligned(array, rank) for array in arrays]
    shape = list(np.broadcast_shapes(*(_without(array.shape, axis) for array in made)))
    spread = []
    for array, (start, stop) in zip(made, parts, strict=True):
        shape[axis] = stop - start
        spread.append(np.broadcast_to(array, shape))
    return np.concatenate(spread, axis)


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return tuple(1 if place == axis else size for place, size in enumerate(shape))


def _part(array: Array, axis: int, start: int, stop: int) -> Array:
    if array.shape[axis] == 1:
        return array
    return array[(slice(None),) * axis + (slice(start, stop),)]


class Split(Rule):
    """Channels apart; the sizes are written down, or become so."""

    drops_inputs = True

    def _parts(
        self, a: Analysis, node: NodeProto, axis: int
    ) -> list[tuple[int, int]] | None:
        """Where each output lies in the input."""
        sizes = [a.size(name, axis) if name else None for name in node.output]
        known = [size for size in sizes if size is not None]
        return _ends(known) if len(known) == len(sizes) else None

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Its part of the fact for each output."""
        given, axis = a.fact(node.input[0]), _axis(a, node, node.input[0], 0)
        parts = self._parts(a, node, axis) if axis is not None else None
        if given is None or axis is None or parts is None:
            return [None] * len(node.output)
        return [
            fact(_part(given.kinds, axis, *part), _part(given.values, axis, *part))
            for part in parts
        ]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """The outputs' demands side by side; an unread one needs nothing."""
        wanted: list[Demand] = [None] * len(node.input)
        axis, rank = _axis(a, node, node.input[0], 0), a.rank(node.input[0])
        parts = self._parts(a, node, axis) if axis is not None else None
        if axis is None or parts is None or rank is None:
            return wanted
        arrays = [np.ones((), bool) if need is None else need for need in needs]
        joined = _joined(arrays, parts, axis, rank)
        wanted[0] = demand.merge(NOTHING, joined)
        return wanted

    def keeps_rows(self, link: Link) -> bool:
        """Where it parts rows, or along another axis."""
        axis = _axis(link.analysis, link.node, link.node.input[0], 0)
        return axis is not None and axis not in link.axes[1:]

    def link(self, link: Link) -> None:
        """On the axis of the Split an output is a part of the input."""
        a, node = link.analysis, link.node
        axis = _axis(a, node, node.input[0], 0)
        parts = self._parts(a, node, axis) if axis is not None else None
        if axis is None or parts is None or (link.side == "in" and link.index > 0):
            link.bar("the sizes of its parts are not known")
        elif axis not in link.axes:
            for side, index in link.ports():
                if side == "out" or index == 0:
                    link.tie(side, index, link.axes)
        elif link.side == "out":
            self._tie_part(link, axis, parts)
        else:
            slots, place = [], link.axes.index(axis)
            for index, part in enumerate(parts):
                here = inside(link.slot.dims, place, *part)
                slots.append(link.tie("out", index, link.axes, here, _count(here)))
            if None not in slots:
                sizes = _Sizes(node, axis, [slot for slot in slots if slot is not None])
                link.patch(sizes, link.axes)

    def _tie_part(self, link: Link, axis: int, parts: Sequence[tuple[int, int]]) -> None:
        place, dims = link.axes.index(axis), list(link.slot.dims)
        dims[place] = parts[-1][1]
        there = inside(dims, place, *parts[link.index])
        link.tie("in", 0, link.axes, there=there)


class _Sizes:
    """Writes down how many channels each part of a Split keeps."""

    def __init__(self, node: NodeProto, axis: int, slots: Sequence[Slot]) -> None:
        self.node, self.axis, self.slots = node, axis, slots

    def __call__(self, removal: Removal) -> None:
        kept = [removal.kept_along(slot, self.axis) for slot in self.slots]
        sizes = [int(part.sum()) for part in kept]
        node, graph = self.node, removal.graph
        if graph.opset() < 13:
            removal.edit.set_attribute(node, "split", sizes)
            return
        if attributes.find(node, "num_outputs") is not None:
            removal.edit.set_attribute(node, "num_outputs", None)
        array = np.array(sizes, np.int64)
        if len(node.input) > 1 and node.input[1]:
            if graph.weight(node.input[1]) is None:
                removal.edit.set_input(node, 1, removal.edit.add_weight(array, "split"))
            else:
                removal.change(node, 1, lambda _: array)
        else:
            removal.add_input(node, 1, array, f"{node.output[0]}_split")


class Slice(Rule):
    """A range of each axis; ranges of channels are corrected.

    With a step of 2, channels go in pairs, those from 2 n on: what is left of a value is
    then parted as before.
    """

    drops_inputs = True

    def ranges(self, a: Analysis, node: NodeProto) -> dict[int, range | None] | None:
        """By axis, the range that is kept of it; None where that is not known.

        So it is for axes of unknown size, and those that are taken backwards.
        """
        shape = a.shape(node.input[0])
        given = _slice_inputs(a, node)
        if shape is None or given is None:
            return None
        found: dict[int, range | None] = {}
        for start, end, axis, step in zip(*given, strict=True):
            axis %= len(shape)
            size, found[axis] = shape[axis], None
            is_known = start is not None and end is not None and step is not None
            if isinstance(size, int) and is_known and step is not None and step > 0:
                low, high, _ = slice(start, end, step).indices(size)
                found[axis] = range(low, max(low, high), step)
        return found

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The range of the fact."""
        given, ranges = a.fact(node.input[0]), self.ranges(a, node)
        if given is None or ranges is None:
            return [None]
        kinds, values = given.kinds, given.values
        if None in ranges.values():  # it may depend on the input
            kinds = np.where(kinds == Kind.MAP, Kind.DYN, kinds)
        for axis, span in ranges.items():
            if kinds.shape[axis] > 1:
                if span is None:
                    return [None]
                kinds, values = kinds.take(span, axis), values.take(span, axis)
        return [fact(kinds, values)] if kinds.size else [None]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Nothing outside of the range."""
        wanted: list[Demand] = [None] * len(node.input)
        ranges, rank = self.ranges(a, node), a.rank(node.input[0])
        if ranges is None or rank is None:
            return wanted
        given: Mask = np.ones((), bool) if needs[0] is None else needs[0]
        need: Mask = aligned(given, rank)
        for axis, span in ranges.items():
            size = a.size(node.input[0], axis)
            if span is None or size is None:
                need = np.asarray(need.any(axis=axis, keepdims=True))
                continue
            shape = list(need.shape)
            shape[axis] = size
            whole = np.zeros(shape, bool)
            whole[(slice(None),) * axis + (_slice(span),)] = need
            need = whole
        wanted[0] = demand.merge(NOTHING, need)
        return wanted

    def keeps_rows(self, link: Link) -> bool:
        """Where it takes rows, or ranges of other axes."""
        ranges = self.ranges(link.analysis, link.node)
        return ranges is not None and not set(ranges) & set(link.axes[1:])

    def link(self, link: Link) -> None:
        """Outside of its range an index has no counterpart."""
        a, node = link.analysis, link.node
        ranges = self.ranges(a, node)
        if ranges is None or (link.side == "in" and link.index > 0):
            link.bar("its range is not known")
            return
        hit = [axis for axis in link.axes if axis in ranges]
        spans = {axis: span for axis in hit if (span := ranges[axis]) is not None}
        if not hit:
            link.tie(link.opposite, 0, link.axes)
        elif len(spans) < len(hit):
            link.bar("it cuts this axis")
        elif not self._is_written(a, node):
            link.bar("its range is computed")
        else:
            self._tie_range(link, spans)

    def _is_written(self, a: Analysis, node: NodeProto) -> bool:
        """Whether its range is constant as it stands."""
        return all(a.graph.weight(name) is not None for name in node.input[1:3])

    def _tie_range(self, link: Link, spans: Mapping[int, range]) -> None:
        a, node = link.analysis, link.node
        dims = [a.size(node.input[0], axis) or 0 for axis in link.axes]
        every = np.arange(math.prod(dims)).reshape(dims)
        for axis, span in spans.items():
            every = every.take(span, axis=link.axes.index(axis))
        atoms = every.reshape(-1)
        if link.side == "in":
            tied = link.tie("out", 0, link.axes, atoms, _count(atoms))
            whole = link.slot
        else:
            tied = link.tie("in", 0, link.axes, _count(atoms), atoms)
            whole = tied or link.slot
        if tied is not None:
            for axis, span in spans.items():
                _tie_steps(link.groups, whole, axis, span.step)
            link.patch(_Range(node, whole, spans), link.axes)


def _slice(span: range) -> slice:
    return slice(span.start, span.stop, span.step)


def _tie_steps(groups: Groups, slot: Slot, axis: int, step: int) -> None:
    """Tie the indices of an axis from a multiple of `step` on to the next."""
    place = slot.axes.index(axis)
    index = np.unravel_index(np.arange(slot.size), slot.dims)
    first = list(index)
    first[place] = index[place] // step * step
    if step > 1:
        groups.tie(slot.atoms, slot.start + np.ravel_multi_index(first, slot.dims))


SliceInputs = tuple[list[int | None], list[int | None], list[int], list[int | None]]


def _slice_inputs(a: Analysis, node: NodeProto) -> SliceInputs | None:
    """Starts, ends, axes and steps, None for what is computed; None without the axes."""
    if a.graph.opset() < 10:
        starts, ends = attributes.get(node, "starts"), attributes.get(node, "ends")
        axes = attributes.get(node, "axes") or list(range(len(starts)))
        return starts, ends, axes, [1] * len(starts)
    names = [*node.input[1:], "", ""]
    starts, ends = _integers(a, names[0]), _integers(a, names[1])
    if starts is None or ends is None or len(starts) != len(ends):
        return None
    count = len(starts)
    steps = _integers(a, names[3]) if names[3] else [1 for _ in range(count)]
    axes = _integers(a, names[2]) if names[2] else [*range(count)]
    if steps is None or axes is None or {len(axes), len(steps)} != {count}:
        return None
    known = [axis for axis in axes if axis is not None]
    return (starts, ends, known, list(steps)) if len(known) == count else None


def _integers(a: Analysis, name: str) -> list[int | None] | None:
    """The elements of a vector, None for one that is not known; None without its size."""
    array = a.array(name)
    if array is not None:
        return [int(item) for item in array.reshape(-1).tolist()]
    size = a.size(name, 0)
    return None if size is None else [None] * size


class _Range:
    """Corrects where a Slice of channels starts and ends."""

    def __init__(self, node: NodeProto, slot: Slot, spans: Mapping[int, range]) -> None:
        self.node, self.slot, self.spans = node, slot, spans

    def __call__(self, removal: Removal) -> None:
        graph, node = removal.graph, self.node
        given = _slice_inputs(removal.groups.analysis, node)
        assert given is not None
        rank = len(graph.shape(node.input[0]) or ())
        axes = [axis % rank for axis in given[2]]
        starts, ends = list(given[0]), list(given[1])
        for axis, span in self.spans.items():
            kept = removal.kept_along(self.slot, axis)
            if not kept.all():
                place, count = axes.index(axis), int(kept[_slice(span)].sum())
                # what is left before it is whole steps, and the rest of one
                start = int(kept[: span.start // span.step * span.step].sum())
                start += span.start % span.step
                starts[place] = start
                ends[place] = start + max((count - 1) * span.step + 1, 0)
        for index, name, values in ((1, "starts", starts), (2, "ends", ends)):
            if list(given[index - 1]) == values:
                continue
            if graph.opset() < 10:
                removal.edit.set_attribute(node, name, values)
            else:
                removal.change(node, index, _becomes(values))


def _becomes(values: Sequence[int | None]) -> Change:
    return lambda array: np.asarray(values, array.dtype).reshape(array.shape)
