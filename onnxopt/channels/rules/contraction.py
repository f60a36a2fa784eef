"""MatMul of two computed values, as in attention: scores Q K', context P V.

    out[..., m, n] = sum over k of one[..., m, k] * two[..., k, n]

A k goes where either operand is zero, from both. Axes in front are shared by all three:
a head goes from the scores where it goes from the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import MAX_ELEMENTS, Fact, Kind, Mask, fact, join
from onnxopt.channels.groups import Link, Side, Sink
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.rule import Rule
from onnxopt.channels.rules.softmax import has_rows_of_sum_one

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

Port = tuple[Side, int]
Label = int | str
"""What an axis runs along: a place among the axes in front, "m", "k" or "n"."""

PORTS: tuple[Port, ...] = (("in", 0), ("in", 1), ("out", 0))


class Contraction(Rule):
    """A product of stacks of matrices."""

    drops_inputs = True

    # ---- facts ----

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Zero where each term is; rows that sum to 1 hand a constant column on."""
        facts = [a.fact(name) for name in node.input]
        ranks = [a.rank(name) for name in node.input]
        if facts == [None, None] or None in ranks or min(r or 0 for r in ranks) < 2:
            return [None]
        rank = max(r or 0 for r in ranks)
        lowest = join([_whole(item) for item in facts], rank)
        if lowest.min() == Kind.WILD:
            return [fact(np.full((1,) * rank, Kind.WILD), np.ones((1,) * rank))]
        first = next(item for item in facts if item is not None)
        live = _product(~_zeros(facts[0]), ~_zeros(facts[1]))
        if live is None:
            return [None]
        kinds = np.where(live, np.minimum(lowest, Kind.MAP), Kind.CONST)
        values = np.zeros((1,) * rank, first.values.dtype)
        steady = facts[1]
        if steady is not None and self._averages(a, node, steady):
            is_const = live & steady.is_const
            kinds = np.where(is_const, Kind.CONST, kinds)
            values = np.where(is_const, steady.values, values)
        return [fact(kinds, values)]

    def _averages(self, a: Analysis, node: NodeProto, two: Fact) -> bool:
        """Whether each result is a weighted mean of equal elements.

        There has to be one: either the number of terms is known, or it is that of rows.
        """
        if two.kinds.shape[-2] != 1 or not has_rows_of_sum_one(a, node.input[0]):
            return False
        one, other = (a.shape(name) or (None, None) for name in node.input)
        return any(
            terms == one[-2] if isinstance(terms, str) else bool(terms)
            for terms in (one[-1], other[-2])
        )

    # ---- demand ----

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """An element is needed where something needed has it times what is not zero.

        Of two zeros the first operand's is the one that decides.
        """
        ranks = [a.rank(name) for name in node.input]
        if None in ranks or min(r or 0 for r in ranks) < 2:
            return [None, None]
        need = np.ones((1, 1), bool) if needs[0] is None else np.atleast_2d(needs[0])
        one, two = (a.fact(name) for name in node.input)
        deaf = _zeros(two)
        if two is not None and self._averages(a, node, two):
            deaf = np.asarray(deaf | two.is_const)  # whatever the weights are
        rows = np.asarray(need.any(axis=-1, keepdims=True) & _zeros(one))
        first = _product(need, ~deaf.swapaxes(-1, -2))
        second = _product(~_zeros(one).swapaxes(-1, -2), need)
        wanted: list[Demand] = [None, None]
        if first is not None:
            wanted[0] = demand.onto(np.asarray(first | rows), a.shape(node.input[0]))
        if second is not None:
            wanted[1] = demand.onto(second, a.shape(node.input[1]))
        return [demand.merge(demand.NOTHING, item) for item in wanted]

    # ---- groups ----

    def link(self, link: Link) -> None:
        """Relate the slot to those of the other ports, by what their axes run along."""
        labels = _labels(link.analysis, link.node)
        if labels is None:
            link.bar("its ranks are not known")
            return
        mine = labels[link.side, link.index]
        own = {mine[axis]: axis for axis in link.axes}
        if None in own or len(own) > len(link.axes):
            link.bar("it broadcasts along this axis")
            return
        if "k" in own and ("m" in own or "n" in own):
            link.bar("it sums over one of these axes, and not over another")
            return
        for port in PORTS:
            if port == (link.side, link.index):
                continue
            theirs = labels[port]
            shared = {label: axis for label, axis in own.items() if label in theirs}
            axes = {axis: theirs.index(label) for label, axis in shared.items()}
            if axes and not self._waits(link, port, own, axes):
                link.relate(*port, axes)
        if "k" in own and self._tells(link):
            link.sink(_Terms(link, [mine.index(label) for label in own]))

    def _waits(
        self, link: Link, port: Port, own: dict[Label | None, int], axes: dict[int, int]
    ) -> bool:
        """Whether to look again later: the other port may have more axes than ours."""
        if any(isinstance(label, str) for label in own):
            return False
        is_there = link.covering(*port, list(axes.values())) is not None
        return not is_there and link.groups.defer(link, late=2)

    def _tells(self, link: Link) -> bool:
        """Whether this slot is the one that is asked about the terms of the sum."""
        first = link.groups.graph.weight(link.node.input[0])
        return link.side == "in" and link.index == (0 if first is None else 1)


class _Terms(Sink):
    """The terms of the sum: those go of which a factor is zero, or that nothing needs."""

    def __init__(self, link: Link, axes: Sequence[int]) -> None:
        a, node, slot = link.analysis, link.node, link.slot
        self.slot, self.node = slot, node
        self.constant = np.zeros(slot.size, bool)
        self.values = np.zeros(slot.size)
        self.free = self._free(a, link)

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """Terms that add nothing leave nothing to make up for."""

    def _free(self, a: Analysis, link: Link) -> Mask:
        """For each atom whether its terms add nothing, all over the other axes."""
        node, slot = self.node, self.slot
        one, two = (a.fact(name) for name in node.input)
        first = _zeros(one).all(axis=-2)
        second = _zeros(two).all(axis=-1)
        need = a.demand(node.output[0])
        need = np.ones((1, 1), bool) if need is None else np.atleast_2d(need)
        unread = ~np.asarray(need.any(axis=(-1, -2), keepdims=True))[..., 0]
        wild = _wild(one).any(axis=-2), _wild(two).any(axis=-1)
        free = np.asarray((first | second | unread) & ~wild[0] & ~wild[1])
        rank = a.rank(link.name(link.side, link.index)) or 0
        # [..., k], in front of which there may be more axes than the operand has
        while free.ndim > rank - 1:
            free = np.asarray(free.all(axis=0))
        free = free.reshape((1,) * (rank - 1 - free.ndim) + free.shape)
        free = np.expand_dims(free, -2 if link.index == 0 else -1)
        others = tuple(axis for axis in range(rank) if axis not in slot.axes)
        return np.broadcast_to(free.all(axis=others), slot.dims).reshape(-1)


def _labels(a: Analysis, node: NodeProto) -> dict[Port, list[Label | None]] | None:
    """What each axis of each port runs along; None for one that broadcasts."""
    dims = [a.shape(name) for name in (*node.input, node.output[0])]
    one, two, out = dims
    if one is None or two is None or out is None or min(len(one), len(two)) < 2:
        return None
    found: dict[Port, list[Label | None]] = {}
    shapes = (one, two, out)
    for port, shape, inner in zip(PORTS, shapes, ("mk", "kn", "mn"), strict=True):
        shift = len(out) - len(shape)
        # a size that is not known may be all of it: what has no size bars the rest
        before: list[Label | None] = [
            None if size == 1 != out[axis + shift] else axis + shift
            for axis, size in enumerate(shape[:-2])
        ]
        found[port] = [*before, *inner]
    return found


def _whole(item: Fact | None) -> Fact | None:
    """One element for all: the lowest kind, of no value."""
    if item is None:
        return None
    kinds = item.kinds.min(keepdims=True)
    return Fact(kinds, np.ones(kinds.shape, item.values.dtype))


def _zeros(item: Fact | None) -> Mask:
    return np.zeros((1, 1), bool) if item is None else item.is_zero


def _wild(item: Fact | None) -> Mask:
    return np.zeros((1, 1), bool) if item is None else item.is_wild


def _product(one: Mask, two: Mask) -> Mask | None:
    """Whether any term of each sum is true; None where that is too large."""
    inner = max(one.shape[-1], two.shape[-2])
    one = np.broadcast_to(one, (*one.shape[:-1], inner))
    two = np.broadcast_to(two, (*two.shape[:-2], inner, two.shape[-1]))
    front = np.broadcast_shapes(one.shape[:-2], two.shape[:-2])
    if np.prod([*front, one.shape[-2], two.shape[-1]], dtype=float) > MAX_ELEMENTS:
        return None
    return np.asarray(one.astype(np.float32) @ two.astype(np.float32) > 0)
