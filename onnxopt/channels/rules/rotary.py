"""RotaryEmbedding: pairs of dims of each head, turned by angles of two tables.

    x1, x2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos

Pairs go together, and with their columns of the tables, from all heads. Where only the
first dims are turned, as many as an attribute says, those stay and the others may go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, Mask
from onnxopt.channels.groups import Ints, Link, Restriction, Slot
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules import attention_forms as forms
from onnxopt.channels.rules import views
from onnxopt.channels.rules.rule import Rule
from onnxopt.channels.rules.views import Part

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

WHOLE, TURNED = "heads", "pairs"


@dataclass(frozen=True)
class Turn:
    """`heads` of `dims`, of which the first 2 * `pairs` are turned.

    `parts`: what is turned, before and after; `tables`: the inputs with a column for
    each pair. `partner` [dims]: the other of the pair, or the dim itself.
    """

    heads: int
    dims: int
    pairs: int
    parts: tuple[Part, Part]
    tables: tuple[Part, ...]
    is_interleaved: bool

    @property
    def partner(self) -> Ints:
        """For each dim the other of its pair, or the dim itself."""
        every = np.arange(self.dims)
        half, is_turned = self.pairs, every < 2 * self.pairs
        other = every ^ 1 if self.is_interleaved else (every + half) % max(2 * half, 1)
        return np.where(is_turned, other, every)

    @property
    def pair(self) -> Ints:
        """[2 * pairs]: for each dim that is turned, its pair."""
        every = np.arange(2 * self.pairs)
        return every // 2 if self.is_interleaved else every % max(self.pairs, 1)


class Rotary(Rule):
    """`tables`: the inputs cos and sin."""

    drops_inputs = True
    tables: tuple[int, int]

    def turn(self, a: Analysis, node: NodeProto) -> Turn | str:
        """What it turns; a reason where that is not known."""
        widths = {a.size(node.input[index], -1) for index in self.tables}
        pairs = widths.pop()
        rank = a.rank(node.input[0])
        lies = forms.flat if rank == 3 else forms.apart
        given, made = lies(a, node, WHOLE, "in", 0), lies(a, node, WHOLE, "out", 0)
        if widths or pairs is None or given is None or made is None:
            return "the sizes of its heads are not known"
        written = attributes.get(node, "rotary_embedding_dim", 0)
        heads = attributes.get(node, "num_heads", 0)
        if not heads and len(given.dims) == 1 and not written:
            heads = given.dims[0] // max(2 * pairs, 1)
        sizes = forms.heads_and_dims(given, heads)
        if sizes is None or (written or sizes[1]) != 2 * pairs or 2 * pairs > sizes[1]:
            return "its heads do not fit its tables"
        columns = []
        for index in self.tables:
            last = (a.rank(node.input[index]) or 1) - 1
            columns.append(Part(TURNED, "in", index, (last,), (pairs,)))
        is_interleaved = bool(attributes.get(node, "interleaved", 0))
        return Turn(*sizes, pairs, (given, made), tuple(columns), is_interleaved)

    # ---- facts and demand ----

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Zero where both of the pair are; what is not turned, as it is."""
        turn, rank = self.turn(a, node), a.rank(node.output[0])
        item = a.fact(node.input[0])
        if isinstance(turn, str) or rank is None or item is None:
            return [None]
        kinds, values = views.known(item, turn.parts[0], (turn.heads, turn.dims))
        others = kinds[:, turn.partner], values[:, turn.partner]
        is_zero = (values == 0) & (others[1] == 0)
        is_turned = np.arange(turn.dims) < 2 * turn.pairs
        lowest = np.minimum(kinds, others[0])
        moved = np.where((lowest == Kind.CONST) & ~is_zero, Kind.DYN, lowest)
        moved = np.where(moved == Kind.MAP, Kind.DYN, moved)
        # what is known not to be finite spoils no more than its pair
        found = np.where(is_turned, moved, kinds)
        return [views.fact_of((found, values), turn.parts[1], rank)]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Both of a pair, where one is needed."""
        wanted: list[Demand] = [None] * len(node.input)
        turn, rank = self.turn(a, node), a.rank(node.input[0])
        if isinstance(turn, str) or rank is None:
            return wanted
        need = views.needed(needs[0], turn.parts[1], (turn.heads, turn.dims))
        both = np.asarray(need | need[:, turn.partner])
        wanted[0] = views.demand_of([turn.parts[0]], {WHOLE: both}, rank)
        return wanted

    # ---- groups ----

    def link(self, link: Link) -> None:
        """Tie the slot to the heads; make those and what relates them to the tables."""
        turn = self.turn(link.analysis, link.node)
        if isinstance(turn, str):
            link.bar(turn)
            return
        port = link.side, link.index
        parts = (*turn.parts, *turn.tables)
        own = [part for part in parts if (part.side, part.index) == port]
        if not own or not set(link.axes) <= set(own[0].axes):
            link.bar("it mixes the positions along this axis")
            return
        is_new = not link.groups.has_view(link.node, WHOLE)
        whole = link.groups.view(link.node, WHOLE, (turn.heads, turn.dims))
        if is_new:
            self._relate(link, turn, whole)
        for part in turn.parts if is_new else own:
            if part.role == WHOLE:
                views.attach(link.groups, link.node, part, whole)

    def _relate(self, link: Link, turn: Turn, whole: Slot) -> None:
        groups, node = link.groups, link.node
        patch = _Heads(node, whole)
        groups.patch((id(node), "heads"), whole, patch)
        if 2 * turn.pairs < turn.dims:
            groups.whole.add(id(whole))
            why = f"{link.op} turns the first dims of each head"
            groups.restrictions.append((_turned(whole, 2 * turn.pairs), why))
            return
        pairs = groups.view(node, TURNED, (turn.heads, turn.pairs))
        every = np.arange(whole.size).reshape(whole.dims)
        columns = pairs.atoms.reshape(pairs.dims)[:, turn.pair]
        groups.tie(columns.reshape(-1), whole.start + every.reshape(-1))
        groups.whole |= {id(whole), id(pairs)}
        for part in turn.tables:
            table = views.slot_of(groups, node, part)
            if isinstance(table, str):
                groups.bar(pairs, table)
            else:
                groups.match(pairs, [1], table, table.axes)


class StandardRotary(Rotary):
    """Of the standard: X, cos, sin, positions."""

    tables = (1, 2)


class MicrosoftRotary(Rotary):
    """Of com.microsoft: X, positions, cos, sin."""

    tables = (2, 3)


class _Heads:
    """Writes down how many heads are left, where that is said."""

    def __init__(self, node: NodeProto, whole: Slot) -> None:
        self.node, self.whole = node, whole

    def __call__(self, removal: Removal) -> None:
        count = int(views.live_rows(self.whole, removal.removed)[0].sum())
        if count and attributes.get(self.node, "num_heads", 0):
            removal.edit.set_attribute(self.node, "num_heads", count)


def _turned(whole: Slot, count: int) -> Restriction:
    """Hold back the first `count` dims of heads that stay."""

    def check(removed: Mask) -> Ints:
        gone = whole.of(removed).reshape(whole.dims)
        lives = ~gone.all(axis=1, keepdims=True)
        held = gone & lives & (np.arange(whole.dims[1]) < count)
        return whole.atoms[held.reshape(-1)]

    return check
