"""Channel groups: which channels of which values can only go together.

A slot is one axis of one value (or several, whose indices then are pairs), or of one
constant as one node reads it. Its indices are atoms, numbered through the whole scope;
ties say which atoms are one channel. Rules make them, node by node, from the outputs of
layers on outwards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Mask
from onnxopt.channels.matching import Matching, Share

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis
    from onnxopt.channels.removal import Removal

Ints = npt.NDArray[np.int64]
Side = Literal["in", "out"]
Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Slot:
    """`axes` (ascending) of a value, or of the constant that `reader` reads.

    `start` is its first atom; atoms run through `dims` in row-major order. A view is of
    no value: `name` says of what, and `axes` are counted by itself.
    """

    name: str
    axes: tuple[int, ...]
    dims: tuple[int, ...]
    start: int
    reader: tuple[NodeProto, int] | None = None
    is_view: bool = False

    @cached_property
    def size(self) -> int:
        """How many atoms it has."""
        return math.prod(self.dims)

    @property
    def atoms(self) -> Ints:
        """Their numbers."""
        return np.arange(self.start, self.start + self.size)

    def zeros(self, known: Fact | None) -> Mask:
        """[atoms]: where every element of the value, at this index, is zero."""
        if known is None:
            return np.zeros(self.size, bool)
        others = tuple(o for o in range(known.kinds.ndim) if o not in self.axes)
        return np.broadcast_to(known.is_zero.all(axis=others), self.dims).reshape(-1)

    def unread(self, need: Demand, over: Sequence[int] = ()) -> Mask:
        """[atoms]: where nothing is needed, at this index of all axes but `over`."""
        if need is None:
            return np.zeros(self.size, bool)
        rank = max(self.axes) + 1 if not need.ndim else need.ndim
        need = need.reshape(need.shape or (1,) * rank)
        need = np.asarray(need.any(axis=tuple(over), keepdims=True))
        others = tuple(o for o in range(rank) if o not in self.axes)
        return np.broadcast_to(~need.any(axis=others), self.dims).reshape(-1)

    def of(self, array: npt.NDArray[np.bool_]) -> Mask:
        """The slot's part of an array over all atoms."""
        return array[self.start : self.start + self.size]


Deferred = dict[Key, tuple[Slot, NodeProto, Side, int]]


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
        self.choices: list[tuple[Restriction, str]] = []  # when nothing else holds back
        self.size = 0
        # layer -> the constant that was added behind it, and its axis of channels
        self.shifts: dict[int, tuple[str, int]] = {}
        # slots of several axes of which only whole indices may go (by id)
        self.whole: set[int] = set()
        self._mixing: set[int] = set()
        self._constants: dict[str, Slot] = {}
        self._ties: list[tuple[Ints, Ints]] = []
        self._joins: list[tuple[Slot, Slot]] = []
        self._matched: set[Key] = set()
        self._patches: dict[Key, tuple[Slot, Patch]] = {}
        self._by_value: dict[Key, list[Slot]] = {}
        self._queue: deque[Slot] = deque()
        self._deferred: tuple[Deferred, ...] = ({}, {}, {})  # by how late
        self._waiting: dict[int, list[Key]] = {}  # node -> what is deferred there
        self._awake: deque[Key] = deque()
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
        place = self._place(node, side, index)
        is_read = place != (name,)
        key = (*place, axes)
        if key not in self.slots:
            reader = (node, index) if is_read else None
            made = Slot(name, axes, tuple(dims), self.size, reader)
            self._add(key, place, made)
        return self.slots[key]

    def _place(self, node: NodeProto, side: Side, index: int) -> Key:
        """What the slots of a port are found by: constants have some for each reader."""
        name = (node.input if side == "in" else node.output)[index]
        is_read = side == "in" and self.graph.weight(name) is not None
        return (id(node), index) if is_read else (name,)

    def slots_at(self, node: NodeProto, side: Side, index: int) -> list[Slot]:
        """The slots of an input or output that there are by now."""
        return self._by_value.get(self._place(node, side, index), [])

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
        if slot.reader is None:
            self._wake(slot.name)

    def _wake(self, name: str) -> None:
        """Ask again what is deferred at the nodes that make or read `name`."""
        maker = self.graph.producer(name)
        nodes = [use.node for use in self.graph.uses(name)]
        for node in nodes if maker is None else [maker, *nodes]:
            self._awake.extend(self._waiting.get(id(node), ()))

    def has_view(self, node: NodeProto, role: str) -> bool:
        """Whether a node has a view of this role by now."""
        return (id(node), role, "view") in self.slots

    def view(self, node: NodeProto, role: str, dims: Sequence[int]) -> Slot:
        """A slot of a node's own, with axes that no value has: heads of a flat axis.

        What it is a view of is up to the ties that the node's rule adds.
        """
        key = (id(node), role, "view")
        if key not in self.slots:
            name, axes = f"{role} of {self.graph.label(node)}", tuple(range(len(dims)))
            self.slots[key] = Slot(name, axes, tuple(dims), self.size, is_view=True)
            self.size += self.slots[key].size
        return self.slots[key]

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

    def match(
        self, one: Slot, axes: Sequence[int], two: Slot, others: Sequence[int]
    ) -> None:
        """Along `axes` of one slot, `others` of the other, both keep the same indices."""
        key = (id(one), id(two), frozenset(zip(axes, others, strict=True)))
        mirrored = (id(two), id(one), frozenset(zip(others, axes, strict=True)))
        if key in self._matched:
            return
        self._matched |= {key, mirrored}
        self.whole |= {id(one), id(two)}
        here, there = Share(one, axes), Share(two, others)
        if here.dims != there.dims:
            self.bar(one, "its channels do not match those beside it")
            self.bar(two, "its channels do not match those beside it")
            return
        reason = f"{one.name!r} and {two.name!r} keep the same indices"
        matching = Matching(here, there)
        self.restrictions.append((matching, reason))
        self.choices.append((matching.choose, reason))
        self._joins.append((one, two))

    def defer(self, link: Link, late: int = 0) -> bool:
        """Ask again when all layers have been seen, and when the node has more slots.

        False where there are no more to come. What is `late` (0, 1, 2) answers after
        the others: 1 where slots of more axes may come, 2 where those are likely.
        """
        if not self._is_last_call:
            key = (id(link.slot), id(link.node), link.side, link.index)
            asked = link.slot, link.node, link.side, link.index
            self._deferred[late][key] = asked
            self._waiting.setdefault(id(link.node), []).append(key)
        return not self._is_last_call

    def patch(self, key: Key, slot: Slot, patch: Patch) -> None:
        """Run `patch` when something of the slot goes; once per `key`."""
        self._patches.setdefault(key, (slot, patch))

    # ---- walking ----

    def _walk(self) -> None:
        for node in self.graph.nodes():
            for index, axes in self.analysis.rule(node).seeds(self.analysis, node):
                if not self.analysis.is_constant(node.output[index]):
                    self.slot(node, "out", index, axes)
                    self._spread()
        for waiting in self._deferred:
            self._awake.extend(waiting)
        is_seeded = False
        while left := next(filter(None, self._deferred), None):
            if not self._awake and not is_seeded:
                is_seeded = True
                self._seed_inputs()
            # where none is to be asked again, one has to answer as it is
            self._is_last_call = not self._awake
            key = self._awake.popleft() if self._awake else next(iter(left))
            found = (waiting.pop(key, None) for waiting in self._deferred)
            asked = next(filter(None, found), None)
            if asked is not None:
                self._waiting[id(asked[1])].remove(key)
                self._link(*asked)
                self._is_last_call = False
                self._spread()

    def _seed_inputs(self) -> None:
        """What layers read has channels where they say, whoever made it."""
        for node in self.graph.nodes():
            for index, axes in self.analysis.rule(node).sources(self.analysis, node):
                if not self.analysis.is_constant(node.input[index]):
                    self.slot(node, "in", index, axes)
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
        rule, link = self.analysis.rule(node), Link(self, slot, node, side, index)
        rule.link(link)
        if len(slot.axes) > 1 and not rule.keeps_rows(link):
            self.whole.add(id(slot))


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
        order = found.atoms
        if list(axes) != sorted(axes):
            turn = np.argsort(np.argsort(axes)).tolist()
            order = order.reshape(found.dims).transpose(turn).reshape(-1)
        mine = self.slot.atoms if here is None else self.slot.start + here
        theirs = order if there is None else order[there]
        if len(mine) != len(theirs):
            self.bar("its channels do not match those before it")
            return None
        self.groups.tie(mine, theirs)
        return found

    def covering(self, side: Side, index: int, axes: Sequence[int]) -> Slot | None:
        """A slot of another port that has all of `axes`, if there is one by now."""
        for slot in self.groups.slots_at(self.node, side, index):
            if set(slot.axes) >= set(axes):
                return slot
        return None

    def relate(self, side: Side, index: int, axes: Mapping[int, int]) -> Slot | None:
        """Relate the slot to one of another port, by the axes that they share.

        `axes`: for an axis of this slot the one of the other that runs along with it.
        Where neither has more axes than those, their atoms are tied; else no index
        of the shared axes goes from one of them alone.
        """
        wanted = sorted(axes.values())
        found = self.covering(side, index, wanted) or self.other(side, index, wanted)
        if found is None:
            return None
        if len(found.axes) == len(axes) == len(self.axes):
            return self.tie(side, index, [axes[axis] for axis in self.axes])
        self.groups.match(self.slot, list(axes), found, list(axes.values()))
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
