"""LSTM, GRU and RNN: features that go in, hidden units that come out.

A unit is zero at every step where its candidate is, and it starts from zero:

    LSTM  c = f * c + i * g(..), h = o * h(c)      GRU  h = (1 - z) * g(..) + z * h
    RNN   h = f(..)                                with g(0) = h(0) = f(0) = 0

whatever its gates do. Its candidate reads features by W and units by R, so which units
are zero is the largest set that agrees with itself. A unit is needed where something
depends on its outputs, or a unit that is needed reads it.

Both directions have the same number of units, but not the same ones: see `blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.facts import Fact, Kind, Mask, fact
from onnxopt.channels.groups import Ints, Link, Restriction, Side, Sink, Slot
from onnxopt.channels.removal import Removal, check_fits
from onnxopt.channels.rules.rule import Rule, Seed
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

X, W, R, B, INITIAL_H, INITIAL_C, PEEPHOLES = 0, 1, 2, 3, 5, 6, 7

_ZERO_AT_ZERO = {"elu", "leakyrelu", "relu", "scaledtanh", "softsign", "tanh"}
"""Activations with f(0) = 0, whatever their alpha and beta."""


Pair = tuple[int, int]


class Cell(NamedTuple):
    """What the operators differ in: gates in order, activations for each direction."""

    gates: int
    candidate: int
    activations: tuple[str, ...]
    zero_at_zero: tuple[int, ...]


CELLS = {
    "LSTM": Cell(4, 3, ("sigmoid", "tanh", "tanh"), (1, 2)),
    "GRU": Cell(3, 2, ("sigmoid", "tanh"), (1,)),
    "RNN": Cell(1, 0, ("tanh",), (0,)),
}


class Units(NamedTuple):
    """Of each direction and unit: [directions, units, ...].

    `zero`: it is zero at every step. `features` and `units`: which of them it reads
    (what a unit that is zero reads makes no difference).
    """

    zero: Mask
    features: Mask
    units: Mask


class Recurrent(Rule):
    """X [steps, batch, features], W [directions, gates * units, features], R, B."""

    drops_inputs = True

    # ---- what it is ----

    def _cell(self, node: NodeProto) -> Cell:
        return CELLS[node.op_type]

    def _axes(self, node: NodeProto) -> tuple[Pair, Pair]:
        """The axes of directions and units: of Y, and of a state."""
        if attributes.get(node, "layout", 0):
            return (2, 3), (1, 2)
        return (1, 3), (0, 2)

    def _ways(self, node: NodeProto) -> int:
        is_both = attributes.get(node, "direction", "forward") == "bidirectional"
        return 2 if is_both else 1

    def _own_axes(
        self, node: NodeProto, side: Side, index: int
    ) -> tuple[int, ...] | None:
        """The axes that count units, of an output or a state; None for other inputs."""
        ways = self._ways(node)
        whole, state = self._axes(node)
        if side == "out":
            axes = whole if index == 0 else state
        elif index in (INITIAL_H, INITIAL_C):
            axes = state
        else:
            return None
        return axes if ways > 1 else axes[1:]

    def units(self, a: Analysis, node: NodeProto) -> Units | None:
        """None where a weight is not constant, or they do not fit together."""
        key = ("units", id(node))
        if key not in a.kept:
            a.kept[key] = self._units(a, node)
        found: Units | None = a.kept[key]
        return found

    def _units(self, a: Analysis, node: NodeProto) -> Units | None:
        weight, recurrence = a.array(node.input[W]), a.array(node.input[R])
        bias = a.array(node.input[B]) if len(node.input) > B and node.input[B] else None
        if weight is None or recurrence is None or recurrence.ndim != 3:
            return None
        ways, _, hidden = recurrence.shape
        gates = self._cell(node).gates
        if weight.ndim != 3 or ways != self._ways(node):
            return None
        if recurrence.shape[1] != gates * hidden or weight.shape[:2] != (
            ways,
            gates * hidden,
        ):
            return None
        features = _by_gate(weight != 0, gates)
        units = _by_gate(recurrence != 0, gates)
        starts = self._starts_at_zero(a, node, ways, hidden)
        if len(node.input) > B and node.input[B]:
            if bias is None or bias.shape != (ways, 2 * gates * hidden):
                return None
            terms = _by_gate(bias.reshape(ways, 2, -1, 1).swapaxes(0, 1) != 0, gates)
            starts &= ~terms[..., self._cell(node).candidate, :, 0].any(axis=0)
        zero = self._zero(a, node, features, units, starts)
        alive = ~zero[:, :, None]
        return Units(zero, features.any(axis=1) & alive, units.any(axis=1) & alive)

    def _starts_at_zero(
        self, a: Analysis, node: NodeProto, ways: int, hidden: int
    ) -> Mask:
        """[directions, units]: whether a candidate of zero keeps it at zero."""
        found = np.zeros((ways, hidden), bool)
        found[self._keeps_zero(node, ways)] = True
        for index in (INITIAL_H, INITIAL_C):
            if len(node.input) > index and node.input[index]:
                given = a.fact(node.input[index])
                if given is None:
                    return np.zeros((ways, hidden), bool)
                axes = self._axes(node)[1]
                over = given.over(axes, (ways, hidden))
                found &= over.is_zero.reshape(ways, hidden)
        return found

    def _keeps_zero(self, node: NodeProto, ways: int) -> Mask:
        """For each direction whether its activations of a candidate keep a zero."""
        cell = self._cell(node)
        names = attributes.get(node, "activations", None) or cell.activations * ways
        if len(names) != len(cell.activations) * ways:
            return np.zeros(ways, bool)
        known = [_text(name).lower() in _ZERO_AT_ZERO for name in names]
        table = np.array(known).reshape(ways, -1)
        return np.asarray(table[:, list(cell.zero_at_zero)].all(axis=1))

    def _zero(
        self, a: Analysis, node: NodeProto, features: Mask, units: Mask, starts: Mask
    ) -> Mask:
        """The largest set of units that are zero if all of it is.

        `features`, `units`: [directions, gates, units, ...] that are read.
        """
        gate = self._cell(node).candidate
        given = a.fact(node.input[X])
        is_zero: Mask = np.zeros(features.shape[-1], bool)
        if given is not None:
            along = given.along(2, features.shape[-1])
            is_zero = along.is_zero.reshape(-1)
            if along.is_wild.any():
                return np.zeros(starts.shape, bool)
        zero = starts & ~features[:, gate][..., ~is_zero].any(axis=2)
        while True:
            reads_other = (units[:, gate] & ~zero[:, None, :]).any(axis=2)
            if not (zero & reads_other).any():
                return np.asarray(zero)
            zero = zero & ~reads_other

    # ---- facts and demand ----

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Which units are zero, in every output."""
        found = self.units(a, node)
        if found is None or not found.zero.any():
            return [None] * len(node.output)
        whole, state = self._axes(node)
        made = []
        for index in range(len(node.output)):
            axes, rank = (whole, 4) if index == 0 else (state, 3)
            shape = [1] * rank
            shape[axes[0]], shape[axes[1]] = found.zero.shape
            kinds = np.where(found.zero, Kind.CONST, Kind.DYN).reshape(shape)
            made.append(fact(kinds, np.zeros(shape, np.float32)))
        return made

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """The features that needed units read, and where those start from."""
        wanted: list[Demand] = [None] * len(node.input)
        found = self.units(a, node)
        if found is None:
            return wanted
        needed = self.needed(node, found, needs)
        features = _read_by(found.features, needed).any(axis=0)
        wanted[X] = demand.along(np.asarray(features), 2, 3)
        shape = [1] * 3
        axes = self._axes(node)[1]
        shape[axes[0]], shape[axes[1]] = needed.shape
        for index in (INITIAL_H, INITIAL_C):
            if index < len(node.input):
                wanted[index] = demand.merge(NOTHING, needed.reshape(shape))
        return wanted

    def needed(self, node: NodeProto, found: Units, needs: Sequence[Demand]) -> Mask:
        """[directions, units]: what something depends on, by itself or by others."""
        whole, state = self._axes(node)
        needed = np.zeros(found.zero.shape, bool)
        for index, need in enumerate(needs):
            axes = whole if index == 0 else state
            needed |= demand.over(need, axes, needed.shape).reshape(needed.shape)
        while True:
            more = np.asarray(needed | _read_by(found.units, needed))
            if (more == needed).all():
                return needed
            needed = more

    # ---- groups ----

    def seeds(self, a: Analysis, node: NodeProto) -> Sequence[Seed]:
        """Every output counts units."""
        if a.rank(node.input[X]) != 3:
            return []
        found = []
        for index, name in enumerate(node.output):
            axes = self._own_axes(node, "out", index)
            if name and axes is not None:
                found.append((index, axes))
        return found

    def keeps_rows(self, link: Link) -> bool:
        """Directions are apart."""
        return True

    def link(self, link: Link) -> None:
        """Features end here; units are tied through all that counts them."""
        a, node = link.analysis, link.node
        if (link.side, link.index) == ("in", X):
            self._link_features(link)
            return
        own = self._own_axes(node, link.side, link.index)
        if own is None:
            link.bar("it is one of its weights")
        elif link.axes != own:
            link.bar("it mixes the positions along this axis")
        elif self.units(a, node) is None or not _are_weights(a, node, (R, B, PEEPHOLES)):
            link.bar("its weights are not constant")
        else:
            self._link_units(link)

    def _link_features(self, link: Link) -> None:
        a, node = link.analysis, link.node
        found = self.units(a, node)
        if link.axes != (2,):
            link.bar("it mixes the positions along this axis")
        elif found is None:
            link.bar("its weights are not constant")
        elif link.tie("in", W, (2,)) is not None:
            needed = self.needed(node, found, [a.demand(name) for name in node.output])
            link.sink(FeatureSink(link, found, needed, self._cell(node).gates))

    def _link_units(self, link: Link) -> None:
        a, node, slot = link.analysis, link.node, link.slot
        found, cell = self.units(a, node), self._cell(node)
        assert found is not None
        for side, index in link.ports():
            axes = self._own_axes(node, side, index)
            if axes is not None and not _is_no_state(a, node, side, index):
                link.tie(side, index, axes)
        first = next(index for index, name in enumerate(node.output) if name)
        if (link.side, link.index) != ("out", first):
            return
        ways, hidden = found.zero.shape
        units = np.arange(slot.size).reshape(ways, 1, hidden)
        rows = np.broadcast_to(units, (ways, cell.gates, hidden)).reshape(-1)
        axes = (0, 1) if ways > 1 else (1,)
        link.tie("in", W, axes, here=rows, there=np.arange(len(rows)))
        needed = self.needed(node, found, [a.demand(name) for name in node.output])
        link.sink(UnitSink(link, found, needed))
        if ways > 1 and _has_lists(node):
            link.restrict(_both_stay(slot), "it lists activations for both directions")
        link.patch(UnitPatch(node, slot, cell.gates, self._axes(node)[1]))


def _are_weights(a: Analysis, node: NodeProto, slots: Sequence[int]) -> bool:
    """Whether the inputs that are there are initializers, which can be written."""
    names = [node.input[slot] for slot in slots if slot < len(node.input)]
    return all(a.graph.weight(name) is not None for name in names if name)


def _is_no_state(a: Analysis, node: NodeProto, side: Side, index: int) -> bool:
    """Whether it is an initial state of zeros: none is the same."""
    if side == "out" or index >= len(node.input) or not node.input[index]:
        return False
    given = a.fact(node.input[index])
    return given is not None and bool(given.is_zero.all())


def _has_lists(node: NodeProto) -> bool:
    names = ("activations", "activation_alpha", "activation_beta")
    return any(attributes.find(node, name) is not None for name in names)


def _both_stay(slot: Slot) -> Restriction:
    """Hold back a unit of a direction that would go as a whole."""

    def check(removed: Mask) -> Ints:
        gone = slot.of(removed).reshape(slot.dims)
        return slot.atoms.reshape(slot.dims)[gone.all(axis=1), 0]

    return check


class FeatureSink(Sink):
    """Features: zero ones go, unread ones, and constant ones into the bias of W."""

    def __init__(self, link: Link, found: Units, needed: Mask, gates: int) -> None:
        a, self.node, self.slot = link.analysis, link.node, link.slot
        self._gates = gates
        size = self.slot.size
        self.free = np.asarray(~_read_by(found.features, needed).any(axis=0))
        self.constant = np.zeros(size, bool)
        self.values = np.zeros(size)
        given = a.fact(self.node.input[X])
        if given is None:
            return
        along = given.along(2, size)
        is_const = along.is_const.reshape(-1)
        self.values = np.where(is_const, along.values.reshape(-1), 0).astype(float)
        self.free &= ~along.is_wild.reshape(-1)
        self.free |= is_const & (self.values == 0)
        has_bias = len(self.node.input) > B and self.node.input[B]
        if not has_bias or a.graph.weight(self.node.input[B]) is not None:
            self.constant = is_const

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """Add what the constants bring to the first half of the bias."""
        constants = np.flatnonzero(removed & self.constant & (self.values != 0))
        a = removal.groups.analysis
        a.forget_arrays()  # of the units some may be gone by now
        weight = a.array(self.node.input[W])
        assert weight is not None
        part = weight[..., constants].astype(np.float64)
        by = part @ self.values[constants]
        if not by.any():
            return
        made = np.concatenate([by, np.zeros_like(by)], axis=1)
        if removal.peek(self.node, B) is None:
            check_fits(made, weight.dtype)
            hint = f"{self.node.input[W]}_bias"
            removal.add_input(self.node, B, made.astype(weight.dtype), hint)
            return

        def change(array: Array) -> Array:
            moved = array.astype(np.float64) + made
            check_fits(moved, array.dtype)
            return np.asarray(moved.astype(array.dtype))

        removal.change(self.node, B, change)


class UnitSink(Sink):
    """Units: those that are zero go, and those that no other needed one reads."""

    def __init__(self, link: Link, found: Units, needed: Mask) -> None:
        self.node, self.slot = link.node, link.slot
        others = found.units & ~np.eye(found.zero.shape[1], dtype=bool)
        read = _read_by(others, needed)
        self.free = (found.zero | ~read).reshape(-1)
        self.constant = np.zeros(self.slot.size, bool)
        self.values = np.zeros(self.slot.size)

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """Nothing reads them, or what is read is zero."""


class UnitPatch:
    """Takes units out of R, B, the peepholes; drops initial states of zeros."""

    def __init__(
        self, node: NodeProto, slot: Slot, gates: int, state: tuple[int, int]
    ) -> None:
        self.node, self.slot, self.gates, self.state = node, slot, gates, state

    def __call__(self, removal: Removal) -> None:
        """Each gate of each direction that stays loses the same."""
        node, a = self.node, removal.groups.analysis
        kept = removal.kept(self.slot).reshape(-1, self.slot.dims[-1])
        if kept.all() or not kept.any():
            return
        lives = np.asarray(kept.any(axis=1))
        units = np.stack([np.flatnonzero(row) for row in kept[lives]])

        def of_gates(array: Array) -> Array:
            """[directions, n * units] for any n."""
            whole = array[lives].reshape(len(units), -1, kept.shape[1])
            taken = np.take_along_axis(whole, units[:, None, :], axis=2)
            return np.ascontiguousarray(taken).reshape(len(units), -1)

        def of_recurrence(array: Array) -> Array:
            whole = array[lives]
            rows = whole.reshape(len(units), self.gates, kept.shape[1], -1)
            rows = np.take_along_axis(rows, units[:, None, :, None], axis=2)
            made = np.take_along_axis(rows, units[:, None, None, :], axis=3)
            return np.ascontiguousarray(made).reshape(len(units), -1, units.shape[1])

        removal.change(node, R, of_recurrence)
        for index in (B, PEEPHOLES):
            if removal.peek(node, index) is not None:
                removal.change(node, index, of_gates)
        for index in (INITIAL_H, INITIAL_C):
            if _is_no_state(a, node, "in", index):
                removal.edit.set_input(node, index, "")
        removal.edit.set_attribute(node, "hidden_size", units.shape[1])
        if not lives.all():
            way = "forward" if lives[0] else "reverse"
            removal.edit.set_attribute(node, "direction", way)


def _by_gate(array: Mask, gates: int) -> Mask:
    """[..., gates * units, n] as [..., gates, units, n]."""
    *lead, rows, last = array.shape
    return array.reshape(*lead, gates, rows // gates, last)


def _read_by(reads: Mask, needed: Mask) -> Mask:
    """[directions, units or features]: what those that are needed read."""
    return np.asarray((reads & needed[:, :, None]).any(axis=1))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
