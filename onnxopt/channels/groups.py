"""Channel groups: which channels of which values can only go together.

A slot is one axis of one value (or several, whose indices then are pairs), or of one
constant as one node reads it. Its indices are atoms, numbered through the whole scope;
ties say which atoms are one channel. Rules make them, node by node, from the outputs of
layers on outwards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxopt.channels.facts import Mask

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis
    from onnxopt.channels.removal import Removal

Ints = npt.NDArray[np.int64]
Side = Literal["in", "out"]
Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Slot:
    """`axes` (ascending) of a value, or of the constant that `reader` reads.

    `start` is its first atom; atoms run through `dims` in row-major order.
    """

    name: str
    axes: tuple[int, ...]
    dims: tuple[int, ...]
    start: int
    reader: tuple[NodeProto, int] | None = None

    @property
    def size(self) -> int:
        """How many atoms it has."""
        return math.prod(self.dims)

    @property
    def atoms(self) -> Ints:
        """Their numbers."""
        return np.arange(self.start, self.start + self.size)

    def of(self, array: npt.NDArray[np.bool_]) -> Mask:
        """The slot's part of an array over all atoms."""
        return array[self.start : self.start + self.size]


class Sink:
    """A node that mixes the channels of `slot`: where a removed one must be made up for.

    `free` [atoms]: may go as it is; `constant` [atoms]: may go once `compensate` has put
    `values` [atoms] into the node. Where `needs_carrier`, that takes one constant
    channel, not zero, that stays: one for each of `blocks` equal runs of atoms.
    """

    slot: Slot
    node: NodeProto
    free: Mask
    constant: Mask
    values: npt.NDArray[np.float64]
    needs_carrier = False
    blocks = 1

    def prefers_map(self, removed: Mask) -> bool:
        """Whether it would rather do without a carrier, if `removed` [atoms] go."""
        return False

    def to_hold(self, removed: Mask) -> Ints:
        """Atoms (of all) that have to stay if `removed` [atoms] were to go."""
        return np.zeros(0, np.int64)

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """Let the node do without the atoms `removed` [atoms], before they go."""
        raise NotImplementedError


Restriction = Callable[[Mask], Ints]
"""Given which atoms (of all) would go, those that have to stay after all."""

Patch = Callable[["Removal"], None]
"""What else changes once it is settled which atoms go."""


@dataclass
class Component:
    """Slots that are tied to one another, and what depends on them."""

    slots: list[Slot] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)


class Groups:
    """Every slot of a scope, with its ties, bars, sinks, restrictions and patches."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.graph = analysis.graph
        self.slots: dict[Key, Slot] = {}
        self.bars: list[tuple[Ints, str]] = []
        self.sinks: list[Sink] = []
        self.restrictions: list[tuple[Restriction, str]] = []
        self.size = 0
        # layer -> the constant that was added behind it, and its axis of channels
        self.shifts: dict[int, tuple[str, int]] = {}
        self._mixing: set[int] = set()
        self._constants: dict[str, Slot] = {}
        self._ties: list[tuple[Ints, Ints]] = []
        self._joins: list[tuple[Slot, Slot]] = []
        self._patches: dict[Key, tuple[Slot, Patch]] = {}
        self._by_value: dict[Key, list[Slot]] = {}
        self._queue: deque[Slot] = deque()
        self._deferred: list[tuple[Slot, NodeProto, Side, int]] = []
        self._is_last_call = False
        self._walk()
        self.labels = _labels(self.size, self._ties)

    def components(self) -> list[Component]:
        """The slots by component, in the order in which they were found."""
        slots = list(self.slots.values())
        place = {id(slot): index for index, slot in enumerate(slots)}
        starts = np.array([slot.start for slot in slots], np.int64)
        pairs = [(place[id(one)], place[id(two)]) for one, two in self._joins]
        for here, there in self._ties:
            first, second = np.searchsorted(starts, [here[0], there[0]], "right") - 1
            pairs.append((int(first), int(second)))
        ends = np.array(pairs, np.int64).reshape(-1, 2)
        labels = _labels(len(slots), [(ends[:, 0], ends[:, 1])])
        found: dict[int, Component] = {}
        for slot, label in zip(slots, labels.tolist(), strict=True):
            found.setdefault(label, Component()).slots.append(slot)
        for sink in self.sinks:
            found[int(labels[place[id(sink.slot)]])].sinks.append(sink)
        for slot, patch in self._patches.values():
            found[int(labels[place[id(slot)]])].patches.append(patch)
        return list(found.values())

    def slots_of(self, name: str) -> list[Slot]:
        """The slots of a value."""
        return self._by_value.get((name,), [])

    def drops_operand(self, node: NodeProto, slot: Slot) -> bool:
        """Whether `node` can do without an input of which all channels go."""
        return self.analysis.rule(node).drops_operand(self.analysis, node, slot)

    def after(self, node: NodeProto) -> list[Slot]:
        """The slots of the outputs of a node that hands channels on; none of a sink's."""
        if id(node) in self._mixing:
            return []
        return [slot for name in node.output for slot in self.slots_of(name)]

    # ---- what rules say, through their links ----

    def slot(
        self, node: NodeProto, side: Side, index: int, axes: tuple[int, ...]
    ) -> Slot | str:
        """The slot of an input or output (`axes` ascending); a reason where none."""
        name = (node.input if side == "in" else node.output)[index]
        dims: list[int] = []
        for axis in axes:
            size = self.analysis.size(name, axis)
            if size is None:
                return f"the size of axis {axis} of {name!r} is not known"
            dims.append(size)
        is_read = side == "in" and self.graph.weight(name) is not None
        place: Key = (id(node), index) if is_read else (name,)
        key = (*place, axes)
        if key not in self.slots:
            reader = (node, index) if is_read else None
            made = Slot(name, axes, tuple(dims), self.size, reader)
            self._add(key, place, made)
        return self.slots[key]

    def _add(self, key: Key, place: Key, slot: Slot) -> None:
        self.slots[key] = slot
        self.size += slot.size
        if slot.reader is not None:  # one edit, so that they can stay one constant
            shared = self._constants.setdefault(slot.name, slot)
            if shared is not slot:
                self._joins.append((slot, shared))
        for other in self._by_value.setdefault(place, []):
            if set(other.axes) & set(slot.axes):
                self._joins.append((slot, other))
                for one in (slot, other):
                    self.bar(one, f"{slot.name!r} has channels of two kinds")
        self._by_value[place].append(slot)
        self._queue.append(slot)

    def add_sink(self, sink: Sink) -> None:
        """Ask `sink` which of its slot's channels may go."""
        self.sinks.append(sink)
        self._mixing.add(id(sink.node))

    def bar(self, slot: Slot, reason: str) -> None:
        """Let every channel of a slot stay."""
        self.bars.append((slot.atoms, reason))

    def tie(self, here: Ints, there: Ints) -> None:
        """Pair by pair, these atoms are one channel."""
        if len(here):
            self._ties.append((here, there))

    def join(self, one: Slot, two: Slot) -> None:
        """Remove from both in one edit, although no channel of them is one."""
        self._joins.append((one, two))

    def defer(self, link: Link) -> bool:
        """Ask again when all layers have been seen; False where that has been done."""
        if not self._is_last_call:
            self._deferred.append((link.slot, link.node, link.side, link.index))
        return not self._is_last_call

    def patch(self, key: Key, slot: Slot, patch: Patch) -> None:
        """Run `patch` when something of the slot goes; once per `key`."""
        self._patches.setdefault(key, (slot, patch))

    # ---- walking ----

    def _walk(self) -> None:
        for node in self.graph.nodes():
            axis = self.analysis.rule(node).layer_axis
            rank = self.analysis.rank(node.output[0]) if axis is not None else None
            if axis is None or rank is None or self.analysis.is_constant(node.output[0]):
                continue
            if -rank <= axis < rank:
                self.slot(node, "out", 0, (axis % rank,))
                self._spread()
        has_asked_readers = False
        while self._deferred:
            waiting, self._deferred = self._deferred, []
            known = len(self.slots)
            for slot, node, side, index in waiting:
                self._link(slot, node, side, index)
                self._spread()
            if not self._deferred or len(self.slots) > known:
                continue
            if not has_asked_readers:
                has_asked_readers = True
                self._ask_readers()
                continue
            self._is_last_call = True  # none knows more: one has to
            self._link(*self._deferred.pop(0))
            self._is_last_call = False
            self._spread()

    def _ask_readers(self) -> None:
        """Let operators say which axis of what they read holds the channels."""
        for node in self.graph.nodes():
            axis = self.analysis.rule(node).data_axis
            rank = self.analysis.rank(node.input[0]) if axis is not None else None
            if axis is not None and rank and -rank <= axis < rank:
                self.slot(node, "in", 0, (axis % rank,))
                self._spread()

    def _spread(self) -> None:
        while self._queue:
            slot = self._queue.popleft()
            if slot.reader is None:
                self._visit(slot)

    def _visit(self, slot: Slot) -> None:
        graph, name = self.graph, slot.name
        maker = graph.producer(name)
        if maker is None:
            self.bar(slot, f"{name!r} comes from outside")
        else:
            index = list(maker.output).index(name)
            self._link(slot, maker, "out", index)
        if graph.is_output(name):
            self.bar(slot, f"{name!r} is an output of the graph")
        if graph.is_pinned(name):
            self.bar(slot, f"{name!r} is referred to by name")
        for use in graph.uses(name):
            if use.view is graph:
                self._link(slot, use.node, "in", use.index)
            else:
                self.bar(slot, f"an inner graph reads {name!r}")

    def _link(self, slot: Slot, node: NodeProto, side: Side, index: int) -> None:
        self.analysis.rule(node).link(Link(self, slot, node, side, index))


@dataclass(frozen=True)
class Link:
    """A slot that reaches `node` at input or output `index`: a rule is asked about it."""

    groups: Groups
    slot: Slot
    node: NodeProto
    side: Side
    index: int

    @property
    def analysis(self) -> Analysis:
        """The facts."""
        return self.groups.analysis

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.groups.graph.op(self.node)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the slot."""
        return self.slot.axes

    @property
    def opposite(self) -> Side:
        """The other side of the node."""
        return "in" if self.side == "out" else "out"

    def name(self, side: Side, index: int) -> str:
        """The value at an input or output of the node; "" where there is none."""
        names = self.node.input if side == "in" else self.node.output
        return names[index] if index < len(names) else ""

    def ports(self) -> Iterator[tuple[Side, int]]:
        """Every input and output that is there, the one of the slot left out."""
        sides: tuple[Side, Side] = ("in", "out")
        for side in sides:
            names = self.node.input if side == "in" else self.node.output
            for index, name in enumerate(names):
                if name and (side, index) != (self.side, self.index):
                    yield side, index

    def bar(self, reason: str) -> None:
        """Let every channel of the slot stay, for this reason."""
        label = self.groups.graph.label(self.node)
        self.groups.bar(self.slot, f"{reason} ({label})")

    def other(self, side: Side, index: int, axes: Sequence[int]) -> Slot | None:
        """Another slot of the node (`axes` ascending); None, and a bar, where none."""
        found = self.groups.slot(self.node, side, index, tuple(axes))
        if isinstance(found, str):
            self.bar(found)
            return None
        return found

    def tie(
        self,
        side: Side,
        index: int,
        axes: Sequence[int],
        here: Ints | None = None,
        there: Ints | None = None,
    ) -> Slot | None:
        """Tie the slot's atoms, in order, to those of another slot of the node.

        `axes` may come in another order than ascending: the slot's atoms run through
        them in the order given. `here` and `there` pick the atoms to pair.
        """
        found = self.other(side, index, sorted(axes))
        if found is None:
            return None
        order = np.arange(found.size)
        if list(axes) != sorted(axes):
            turn = np.argsort(np.argsort(axes)).tolist()
            order = order.reshape(found.dims).transpose(turn).reshape(-1)
        mine = np.arange(self.slot.size) if here is None else here
        theirs = order if there is None else order[there]
        if len(mine) != len(theirs):
            self.bar("its channels do not match those before it")
            return None
        self.groups.tie(self.slot.start + mine, found.start + theirs)
        return found

    def sink(self, sink: Sink) -> None:
        """Let `sink` say which atoms of the slot may go, and make up for them."""
        self.groups.add_sink(sink)

    def restrict(self, restriction: Restriction, reason: str) -> None:
        """Let `restriction` hold atoms back."""
        self.groups.restrictions.append((restriction, reason))

    def patch(self, patch: Patch, *more: object) -> None:
        """Run `patch` when something of the slot goes; once for the node and `more`."""
        self.groups.patch((id(self.node), *more), self.slot, patch)


def _labels(size: int, ties: Sequence[tuple[Ints, Ints]]) -> Ints:
    """Connected components: for each of `size` items the smallest one tied to it."""
    labels = np.arange(size)
    if not ties:
        return labels
    here = np.concatenate([pair[0] for pair in ties])
    there = np.concatenate([pair[1] for pair in ties])
    while True:
        one, two = labels[here], labels[there]
        if np.array_equal(one, two):
            return labels
        low = np.minimum(one, two)
        np.minimum.at(labels, one, low)
        np.minimum.at(labels, two, low)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]
