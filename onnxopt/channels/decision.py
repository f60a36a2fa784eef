"""Which atoms go: those that nothing bars, needs or holds back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from onnxopt.channels.facts import Mask
from onnxopt.channels.groups import Groups, Ints, Sink, Slot

_CARRIER = "one constant channel has to carry the others across the padding"
_LAST = "a value keeps at least one channel"


class Decision:
    """`removed` [atoms] go. For the others, `reason` says what keeps them."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self._labels = groups.labels
        self._stays: Mask = np.zeros(groups.size, bool)  # by class
        self._reason: npt.NDArray[np.int32] = np.full(groups.size, -1, np.int32)
        self._texts: list[str] = []
        for atoms, text in groups.bars:
            self._keep(atoms, text)
        for sink in groups.sinks:
            needed = ~(sink.free | sink.constant)
            label = groups.graph.label(sink.node)
            self._keep(sink.slot.atoms[needed], f"{label} depends on it")
        self._hold_back()
        self.removed: Mask = self._removed()

    def reason(self, atom: int) -> str | None:
        """What keeps an atom; None where it goes."""
        found = int(self._reason[self._labels[atom]])
        return None if found < 0 else self._texts[found]

    def _removed(self) -> Mask:
        return np.asarray(~self._stays[self._labels])

    def _keep(self, atoms: Ints, text: str) -> bool:
        """Let the classes of `atoms` stay; whether that changes anything."""
        labels = np.unique(self._labels[atoms])
        new = labels[~self._stays[labels]]
        if not len(new):
            return False
        self._texts.append(text)
        self._stays[new] = True
        self._reason[new] = len(self._texts) - 1
        return True

    def _hold_back(self) -> None:
        """Restrictions one after the other, until none holds anything back.

        Each only ever keeps more, so this ends.
        """
        checks: list[tuple[Callable[[Mask], Ints], str]] = [
            (lambda removed: self._carriers(removed), _CARRIER),
            *self.groups.restrictions,
        ]
        for sink in self.groups.sinks:
            if not sink.needs_carrier:
                checks.append((_held(sink), _CARRIER))
        for slot in self.groups.slots.values():
            if len(slot.axes) > 1:
                checks.append((_blocks(slot), f"{slot.name!r} loses whole blocks only"))
        last = self._lasting()
        while True:
            changed, removed = False, self._removed()
            for check, text in checks:
                if self._keep(check(removed), text):
                    changed, removed = True, self._removed()
            if not changed and not self._choose(last):
                return

    def _choose(self, last: Callable[[Mask], Ints]) -> bool:
        """Keep something where it is not settled what; whether there was such a place."""
        removed = self._removed()
        for check, text in self.groups.choices:
            if self._keep(check(removed), text):
                return True
        return self._keep(last(removed), _LAST)

    # ---- one constant channel stays where there is padding ----

    def _carriers(self, removed: Mask) -> Ints:
        """An atom for each sink that would lose constants and has none left to carry."""
        wanting = [
            (sink, eligible)
            for sink in self.groups.sinks
            if sink.needs_carrier
            for eligible in [_to_carry(sink, removed)]
            if eligible.any() and not sink.prefers_map(sink.slot.of(removed))
        ]
        score = np.zeros(len(self._labels), np.int64)
        for sink, eligible in wanting:
            np.add.at(score, self._labels[sink.slot.atoms[eligible]], 1)
        held: list[int] = []
        for sink, eligible in wanting:
            atoms = sink.slot.atoms[eligible]
            labels = self._labels[atoms]
            if np.isin(labels, self._labels[np.array(held, np.int64)]).any():
                continue  # the one held for another sink serves here, too
            sizes = np.abs(sink.values[eligible])
            held.append(int(atoms[np.lexsort((sizes, score[labels]))[-1]]))
        return np.array(held, np.int64)

    # ---- no value without channels ----

    def _lasting(self) -> Callable[[Mask], Ints]:
        slots = [
            slot
            for slot in self.groups.slots.values()
            if slot.reader is None and not vanishes(self.groups, slot, set())
        ]
        starts = np.array([slot.start for slot in slots], np.int64)

        def check(removed: Mask) -> Ints:
            gone = [slot.of(removed).all() for slot in slots]
            return starts[np.flatnonzero(gone)[:1]]

        return check


def _held(sink: Sink) -> Callable[[Mask], Ints]:
    return lambda removed: sink.to_hold(sink.slot.of(removed))


def _to_carry(sink: Sink, removed: Mask) -> Mask:
    """The constants that `sink` would lose, if none that it keeps can carry them."""
    gone = sink.slot.of(removed)
    carries = sink.constant & (sink.values != 0)
    if (carries & ~gone).any():
        return np.zeros(len(gone), bool)
    return np.asarray(carries & gone & ~sink.free)


def vanishes(groups: Groups, slot: Slot, seen: set[str]) -> bool:
    """Whether a value can go altogether: in the end only Concats read it."""
    graph = groups.graph
    if slot.name in seen or not graph.uses(slot.name):
        return False
    if graph.is_output(slot.name) or len(slot.axes) != 1:
        return False
    maker = graph.producer(slot.name)
    if maker is None or len(maker.output) != 1:
        return False
    for use in graph.uses(slot.name):
        if use.view is not graph:
            return False
        if groups.drops_operand(use.node, slot):
            continue
        after = groups.after(use.node)
        if not after or not all(vanishes(groups, o, seen | {slot.name}) for o in after):
            return False
    return True


def _blocks(slot: Slot) -> Callable[[Mask], Ints]:
    """Of a slot of several axes only whole slices may go: the rest stays."""

    def check(removed: Mask) -> Ints:
        gone = slot.of(removed).reshape(slot.dims)
        kept = np.ones(slot.dims, bool)
        for axis in range(gone.ndim):
            others = tuple(other for other in range(gone.ndim) if other != axis)
            kept &= ~gone.all(axis=others, keepdims=True)
        return slot.atoms[(gone & kept).reshape(-1)]

    return check
