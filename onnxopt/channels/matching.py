"""Slots that share some of their axes only, as operands do that broadcast.

The heads of attention scores [B, H, S, S] are those of the queries [B, H, S, D]: a head
goes from both or from none, although an element of a query is no channel of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxopt.channels.facts import Mask

if TYPE_CHECKING:
    from onnxopt.channels.groups import Ints, Slot


class Share:
    """A slot as seen along those of its axes, `shared`, that another slot has as well."""

    def __init__(self, slot: Slot, shared: Sequence[int]) -> None:
        self.slot = slot
        places = [slot.axes.index(axis) for axis in shared]
        others = [place for place in range(len(slot.axes)) if place not in places]
        self.shared, self.dims = _index(slot, places)
        self.rest, _ = _index(slot, others)
        self._first = np.unique(self.shared, return_index=True)[1]

    @property
    def size(self) -> int:
        """How many shared indices there are."""
        return len(self._first)

    def left(self, removed: Mask) -> Mask:
        """For each shared index whether any atom of it stays."""
        kept = self.shared[~self.slot.of(removed)]
        return np.asarray(np.bincount(kept, minlength=self.size) > 0)

    def hold(self, removed: Mask, wanted: Mask) -> Ints:
        """Atoms that leave of each `wanted` shared index what stays at others.

        None where nothing stays anywhere: what is to stay is not known then.
        """
        kept_rest = np.unique(self.rest[~self.slot.of(removed)])
        if len(kept_rest) == 0 and self.rest.any():
            return self.slot.atoms[:0]
        chosen = wanted[self.shared]
        if self.rest.any():
            chosen &= np.isin(self.rest, kept_rest)
        return self.slot.atoms[chosen]

    def choose(self, wanted: Mask) -> Ints:
        """An atom of the first `wanted` shared index."""
        return self.slot.atoms[self._first[wanted][:1]]


def _index(slot: Slot, places: Sequence[int]) -> tuple[Ints, list[int]]:
    """For each atom its index along some of the axes, taken in the order given."""
    dims = [slot.dims[place] for place in places]
    if not dims:
        return np.zeros(slot.size, np.int64), dims
    every = np.unravel_index(np.arange(slot.size), slot.dims)
    return np.ravel_multi_index([every[place] for place in places], dims), dims


class Matching:
    """A restriction: each shared index stays in both slots or in none."""

    def __init__(self, one: Share, two: Share) -> None:
        self.one, self.two = one, two

    def __call__(self, removed: Mask) -> Ints:
        """The atoms that have to stay so that both keep the same indices."""
        here, there = self.one.left(removed), self.two.left(removed)
        if np.array_equal(here, there):
            return np.zeros(0, np.int64)
        held = [
            self.one.hold(removed, there & ~here),
            self.two.hold(removed, here & ~there),
        ]
        return np.concatenate(held)

    def choose(self, removed: Mask) -> Ints:
        """An atom that may stay for that, where nothing says which has to."""
        here, there = self.one.left(removed), self.two.left(removed)
        chosen = self.one.choose(there & ~here)
        return chosen if len(chosen) else self.two.choose(here & ~there)
