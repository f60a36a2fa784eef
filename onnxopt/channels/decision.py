"""Which atoms go: those that nothing bars, needs or holds back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from onnxopt.channels import blocks
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
        self._going: Mask = np.ones(groups.size, bool)  # by atom
        self._members = _Members(self._labels)
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

    def reasons(self, atoms: Ints) -> dict[str, int]:
        """What keeps those of `atoms` that stay, with how many of them it keeps."""
        found, counts = np.unique(self._reason[self._labels[atoms]], return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        made: dict[str, int] = {}
        for index, count in pairs:
            if index >= 0:
                text = self._texts[index]
                made[text] = made.get(text, 0) + count
        return made

    def _removed(self) -> Mask:
        return self._going

    def _keep(self, atoms: Ints, text: str) -> bool:
        """Let the classes of `atoms` stay; whether that changes anything."""
        labels = np.unique(self._labels[atoms])
        new = labels[~self._stays[labels]]
        if not len(new):
            return False
        self._texts.append(text)
        self._stays[new] = True
        self._going[self._members.of(new)] = False
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
        for slot in sorted(self.groups.slots.values(), key=_is_constant):
            if len(slot.axes) > 1:
                checks.append(_blocks(self.groups, slot))
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
        """An atom for each sink that would lose constants and has none left to carry.

        One for each of its blocks that would.
        """
        wanting = [
            (sink, eligible)
            for sink in self.groups.sinks
            if sink.needs_carrier and not sink.prefers_map(sink.slot.of(removed))
            for eligible in _to_carry(sink, removed)
        ]
        score = np.zeros(len(self._labels), np.int64)
        for sink, eligible in wanting:
            np.add.at(score, self._labels[sink.slot.atoms[eligible]], 1)
        held: list[int] = []
        is_held = np.zeros(len(self._labels), bool)  # by class
        for sink, eligible in wanting:
            atoms = sink.slot.atoms[eligible]
            labels = self._labels[atoms]
            if is_held[labels].any():
                continue  # the one held for another sink serves here, too
            sizes = np.abs(sink.values[eligible])
            held.append(int(atoms[np.lexsort((sizes, score[labels]))[-1]]))
            is_held[self._labels[held[-1]]] = True
        return np.array(held, np.int64)

    # ---- no value without channels ----

    def _lasting(self) -> Callable[[Mask], Ints]:
        vanishing = _vanishing(self.groups)
        slots = [
            slot
            for slot in self.groups.slots.values()
            if slot.reader is None and slot.size and id(slot) not in vanishing
        ]
        starts = np.array([slot.start for slot in slots], np.int64)

        def check(removed: Mask) -> Ints:
            gone = [slot.of(removed).all() for slot in slots]
            return starts[np.flatnonzero(gone)[:1]]

        return check


class _Members:
    """The atoms of each class, found without looking at all atoms."""

    def __init__(self, labels: Ints) -> None:
        self._order = np.argsort(labels, kind="stable")
        self._ends = np.cumsum(np.bincount(labels, minlength=len(labels)))

    def of(self, labels: Ints) -> Ints:
        """All atoms of these classes."""
        starts = self._ends[labels - 1] * (labels > 0)
        parts = zip(starts.tolist(), self._ends[labels].tolist(), strict=True)
        return np.concatenate([self._order[start:end] for start, end in parts])


def _held(sink: Sink) -> Callable[[Mask], Ints]:
    return lambda removed: sink.to_hold(sink.slot.of(removed))


def _to_carry(sink: Sink, removed: Mask) -> Iterator[Mask]:
    """What a block of `sink` would lose of constants, if none that it keeps carries."""
    gone = sink.slot.of(removed)
    carries = sink.constant & (sink.values != 0)
    wanted = carries & gone & ~sink.free
    kept = (carries & ~gone).reshape(sink.blocks, -1).any(axis=1)
    block = np.repeat(np.arange(sink.blocks), len(gone) // sink.blocks)
    for place in np.unique(block[wanted & ~kept[block]]):
        yield np.asarray(wanted & (block == place))


def _vanishing(groups: Groups) -> set[int]:
    """The slots (by id) of values that can go altogether: only Concats read them.

    The last nodes come first, since what becomes of a value is up to those behind it.
    """
    found: set[int] = set()
    for node in reversed(groups.graph.nodes()):
        if len(node.output) == 1:
            for slot in groups.slots_of(node.output[0]):
                if _vanishes(groups, slot, found):
                    found.add(id(slot))
    return found


def _vanishes(groups: Groups, slot: Slot, known: set[int]) -> bool:
    graph = groups.graph
    uses = graph.uses(slot.name)
    if not uses or graph.is_output(slot.name) or len(slot.axes) != 1:
        return False
    for use in uses:
        if use.view is not graph:
            return False
        if groups.drops_operand(use.node, slot):
            continue
        after = groups.after(use.node)
        if not after or not all(id(other) in known for other in after):
            return False
    return True


def _is_constant(slot: Slot) -> bool:
    """Constants come last: values know better what goes together."""
    return slot.reader is not None


def _blocks(groups: Groups, slot: Slot) -> tuple[Callable[[Mask], Ints], str]:
    """Of a slot of several axes what may not go, since the rest would be no array."""
    if len(slot.axes) == 2 and id(slot) not in groups.whole:
        outside, text = blocks.outside_of_rows, "loses equally much of each row"
    else:
        outside, text = blocks.outside_of_indices, "loses whole blocks only"

    def check(removed: Mask) -> Ints:
        gone = slot.of(removed).reshape(slot.dims)
        return slot.atoms[outside(gone).reshape(-1)]

    return check, f"{slot.name!r} {text}"
