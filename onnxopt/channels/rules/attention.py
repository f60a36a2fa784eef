"""Fused attention: heads and their dims, whatever ports hold them.

    scores[h, i, j] = sum over d of Q[h, i, d] * K[h / group, j, d]
    result[h, i, e] = sum over j of softmax(scores)[h, i, j] * V[h / group, j, e]

As where it is written out, a head goes where its values are zero or its result is not
read, a d where it is zero in Q or in K, an e with its column of the result. What
the operators differ in, where these lie and which sizes are written down, is a Form.

What is masked throughout gives zero in ONNX Runtime, and not a mean of the values. So
values that are constant are handed on only where nothing masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.facts import Fact, Kind, Mask
from onnxopt.channels.groups import Ints, Link, Restriction, Sink, Slot
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules import views
from onnxopt.channels.rules.rule import Rule
from onnxopt.channels.rules.views import Known, Part
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

QUERIES, KEYS, VALUES, RESULT, HEADS = "queries", "keys", "values", "result", "heads"
"""Roles: [heads, dims] each, of keys and values [key heads, dims]; HEADS [heads]."""

GROUPED = "heads by group"
"""The same heads as [key heads, heads of each]."""
_READ = QUERIES, KEYS, VALUES
_CAUSAL = "is_causal", "unidirectional"


@dataclass(frozen=True)
class Form:
    """An attention: its heads, and where they lie.

    `given`: parts that make up Q, K and V; `added`: parts that are added to those, a
    bias; `before`: keys and values of earlier steps; `beside`: masks with heads of
    their own; `made`: outputs, of which the first is the result.
    `masks`: whether it may leave all keys of a query out. `has_mean`: whether rows of
    its weights sum to 1 otherwise. `one_size`: whether K and V have equally many dims,
    which stay a multiple of `step`, or all where that is 0. `sizes`: which attributes
    say how many heads there are, of queries and of keys; "" where none does.
    """

    heads: int
    key_heads: int
    score_dims: int
    value_dims: int
    given: tuple[Part, ...]
    made: tuple[Part, ...]
    added: tuple[Part, ...] = ()
    before: tuple[Part, ...] = ()
    beside: tuple[Part, ...] = ()
    masks: bool = False
    has_mean: bool = True
    one_size: bool = False
    step: int = 1
    sizes: tuple[str, str] = ("", "")
    dims: Mapping[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        """The dims of each view."""
        found = {
            QUERIES: (self.heads, self.score_dims),
            KEYS: (self.key_heads, self.score_dims),
            VALUES: (self.key_heads, self.value_dims),
            RESULT: (self.heads, self.value_dims),
            HEADS: (self.heads,),
            GROUPED: (self.key_heads, self.heads // self.key_heads),
        }
        object.__setattr__(self, "dims", found)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them."""
        return self.given + self.added + self.before + self.beside + self.made

    def spread(self, by_key: Array) -> Array:
        """[key heads, ...] as [heads, ...]."""
        return np.asarray(np.repeat(by_key, self.heads // self.key_heads, axis=0))

    def gathered(self, by_head: Mask) -> Mask:
        """[heads, ...] as [key heads, ...]: whether it is so for any of the group."""
        shape = (self.key_heads, -1, *by_head.shape[1:])
        return np.asarray(by_head.reshape(shape).any(axis=1))


class Attention(Rule):
    """What fused attentions share; subclasses say what Form a node has."""

    drops_inputs = True

    def form(self, a: Analysis, node: NodeProto) -> Form | str:
        """Where heads and dims lie; a reason where that is not known."""
        raise NotImplementedError

    def known_form(self, a: Analysis, node: NodeProto) -> Form | str:
        """The same, found once."""
        key = ("attention", id(node))
        if key not in a.kept:
            a.kept[key] = self.form(a, node)
        found: Form | str = a.kept[key]
        return found

    # ---- facts ----

    def known(self, a: Analysis, node: NodeProto, form: Form, role: str) -> Known:
        """What Q, K or V is, together with those of earlier steps."""
        kinds, values = self.projected(a, node, form, role)
        for part in form.added:
            if part.role == role and (name := part.name(node)):
                more = views.known(a.fact(name), part, form.dims[role])
                kinds, values = np.minimum(kinds, more[0]), values + more[1]
        for part in form.before:
            if part.role == role:
                more = views.known(a.fact(part.name(node)), part, form.dims[role])
                same = (more[1] == values) | (kinds < Kind.CONST)
                kinds = np.minimum(kinds, np.where(same, more[0], Kind.DYN))
        return kinds, values

    def projected(self, a: Analysis, node: NodeProto, form: Form, role: str) -> Known:
        """What Q, K or V is, as it is given."""
        part = next(part for part in form.given if part.role == role)
        return views.known(a.fact(part.name(node)), part, form.dims[role])

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Zero where values are, constant where they are and nothing masks."""
        nothing: list[Fact | None] = [None] * len(node.output)
        form, rank = self.known_form(a, node), a.rank(node.output[0])
        if isinstance(form, str) or rank is None or not a.is_float(node.output[0]):
            return nothing
        kinds, values = self.known(a, node, form, VALUES)
        others = [self.known(a, node, form, role)[0] for role in (QUERIES, KEYS)]
        steady = self._steady(a, node, form, (kinds, values))
        found = np.where(steady, Kind.CONST, Kind.DYN)
        if min(array.min() for array in (kinds, *others)) == Kind.WILD:
            found = np.full(found.shape, Kind.WILD)
        made = form.spread(found), form.spread(values)
        return [views.fact_of(made, form.made[0], rank), *nothing[1:]]

    def _steady(self, a: Analysis, node: NodeProto, form: Form, values: Known) -> Mask:
        """Where the result is what the values are, whatever the weights."""
        is_handed_on = (values[1] == 0) | self._averages(a, node, form)
        return np.asarray((values[0] == Kind.CONST) & is_handed_on)

    def _averages(self, a: Analysis, node: NodeProto, form: Form) -> bool:
        """Whether each result is a mean of values: there has to be one."""
        if form.masks or form.before or not form.has_mean:
            return False
        sizes = []
        for part in form.given[:3:2]:
            axis = 1 if len(part.axes) == 1 else 2
            sizes.append((a.shape(part.name(node)) or ())[axis : axis + 1])
        queries, values = sizes
        if not values or values[0] is None or values == queries:
            return bool(values) and values[0] is not None
        is_causal = any(attributes.get(node, name, 0) for name in _CAUSAL)
        return isinstance(values[0], int) and values[0] > 0 and not is_causal

    # ---- demand ----

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Of V what is needed of the result; of a head that is needed Q and K.

        Of two zeros, in Q and in K, that in Q is the one that decides.
        """
        wanted: list[Demand] = [None] * len(node.input)
        form = self.known_form(a, node)
        if isinstance(form, str):
            return wanted
        masks = self.wanted(a, node, form, needs)
        by_port: dict[int, list[Part]] = {}
        for part in form.given + form.added + form.before + form.beside:
            by_port.setdefault(part.index, []).append(part)
        for index, parts in by_port.items():
            rank = a.rank(node.input[index])
            if rank is not None:
                wanted[index] = views.demand_of(parts, masks, rank)
        return wanted

    def wanted(
        self, a: Analysis, node: NodeProto, form: Form, needs: Sequence[Demand]
    ) -> dict[str, Mask]:
        """By role what something depends on, in the dims of the view."""
        found = {
            role: np.zeros(form.dims[role], bool)
            for role in (QUERIES, KEYS, VALUES, RESULT, HEADS)
        }
        for part in form.made:
            need = needs[part.index]
            found[part.role] |= views.needed(need, part, form.dims[part.role])
        steady = self._steady(a, node, form, self.known(a, node, form, VALUES))
        reads = np.asarray(found[RESULT] & ~form.spread(steady))
        found[VALUES] |= form.gathered(found[RESULT])
        found[HEADS] |= reads.any(axis=1)
        zeros = {role: self.zeros(a, node, form, role) for role in (QUERIES, KEYS)}
        rows = found[HEADS][:, None]
        found[QUERIES] |= rows & (~form.spread(zeros[KEYS]) | zeros[QUERIES])
        found[KEYS] |= form.gathered(np.asarray(rows & ~zeros[QUERIES]))
        return found

    def zeros(self, a: Analysis, node: NodeProto, form: Form, role: str) -> Mask:
        """Where Q, K or V is zero, as far as that makes scores or results of zero."""
        kinds, values = self.known(a, node, form, role)
        return np.asarray((kinds == Kind.CONST) & (values == 0))

    # ---- groups ----

    def link(self, link: Link) -> None:
        """Tie the slot to the views that lie in it; make those and what relates them."""
        form = self.known_form(link.analysis, link.node)
        if isinstance(form, str):
            link.bar(form)
            return
        port = link.side, link.index
        own = [part for part in form.parts if (part.side, part.index) == port]
        if not own or not set(link.axes) <= set(own[0].axes):
            link.bar("it mixes the positions along this axis")
            return
        is_new = not link.groups.has_view(link.node, GROUPED)
        if is_new:
            self._relate(link, form)
        for part in form.parts if is_new else own:
            view = link.groups.view(link.node, part.role, form.dims[part.role])
            views.attach(link.groups, link.node, part, view)

    def _relate(self, link: Link, form: Form) -> None:
        groups, node = link.groups, link.node
        view = {role: groups.view(node, role, form.dims[role]) for role in form.dims}
        groups.tie(view[HEADS].atoms, view[GROUPED].atoms)
        for role in (QUERIES, RESULT):
            groups.match(view[role], [0], view[HEADS], [0])
        for role in (KEYS, VALUES):
            groups.match(view[role], [0], view[GROUPED], [0])
        groups.match(view[QUERIES], [1], view[KEYS], [1])
        groups.match(view[RESULT], [1], view[VALUES], [1])
        # heads are in order of groups: each may lose others, as long as equally many
        groups.whole.discard(id(view[GROUPED]))
        for role, free in self._free(link.analysis, node, form).items():
            groups.add_sink(_Dims(node, view[role], free))
        if not form.step:
            for role in (QUERIES, VALUES):
                why = f"{link.op} keeps the dims of its heads"
                groups.restrictions.append((_all_dims(view[role]), why))
        elif form.one_size:
            why = f"{link.op} has equally many dims of keys and of values"
            check = _equally_many(view[QUERIES], view[VALUES], form.step)
            groups.choices.append((check, why))
        patch = _Sizes(self, node, form, view)
        groups.patch((id(node), "sizes"), view[QUERIES], patch)

    def _free(self, a: Analysis, node: NodeProto, form: Form) -> dict[str, Mask]:
        """By role what adds nothing: to scores or results, or to those that matter."""
        needs = [a.demand(name) if name else NOTHING for name in node.output]
        wanted = self.wanted(a, node, form, needs)
        zeros = [self.zeros(a, node, form, role) for role in (QUERIES, KEYS)]
        wild = [self.known(a, node, form, role)[0] == Kind.WILD for role in _READ]
        unread = ~wanted[HEADS][:, None]
        queries = (zeros[0] | form.spread(zeros[1]) | unread) & ~wild[0]
        queries &= ~form.spread(wild[1])
        steady = self._steady(a, node, form, self.known(a, node, form, VALUES))
        return {
            QUERIES: queries,
            KEYS: ~form.gathered(~queries),
            VALUES: np.asarray((steady | ~wanted[VALUES]) & ~wild[2]),
        }

    def scales_by_size(self, node: NodeProto) -> bool:
        """Whether it multiplies scores by one over the root of the number of dims."""
        return not attributes.get(node, "scale", 0.0)

    def write(self, removal: Removal, node: NodeProto, left: Form) -> None:
        """Write down sizes of other than heads, which are those of `left` from now on."""


class _Dims(Sink):
    """A view, of which what is `free` [heads, dims] goes."""

    def __init__(self, node: NodeProto, view: Slot, free: Mask) -> None:
        self.slot, self.node, self.free = view, node, free.reshape(-1)
        self.constant = np.zeros(view.size, bool)
        self.values = np.zeros(view.size)

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """Terms that add nothing leave nothing to make up for.

        For values that are constant, the reader of the result makes up.
        """


class _Sizes:
    """Writes down how many heads are left, and the scale that dims of old gave."""

    def __init__(
        self, rule: Attention, node: NodeProto, form: Form, view: Mapping[str, Slot]
    ) -> None:
        self.rule, self.node, self.form, self.view = rule, node, form, view

    def __call__(self, removal: Removal) -> None:
        queries, keys, values = (
            views.live_rows(self.view[role], removal.removed)
            for role in (QUERIES, KEYS, VALUES)
        )
        form, node, edit = self.form, self.node, removal.edit
        if not queries[0].any():
            return
        left = Form(
            heads=int(queries[0].sum()),
            key_heads=int(keys[0].sum()),
            score_dims=int((~queries[1]).sum()),
            value_dims=int((~values[1]).sum()),
            given=form.given,
            made=form.made,
        )
        for name, count, old in zip(
            form.sizes,
            (left.heads, left.key_heads),
            (form.heads, form.key_heads),
            strict=True,
        ):
            if name and count != old:
                edit.set_attribute(node, name, count)
        if left.score_dims != form.score_dims and self.rule.scales_by_size(node):
            edit.set_attribute(node, "scale", 1 / math.sqrt(form.score_dims))
        self.rule.write(removal, node, left)


def _all_dims(view: Slot) -> Restriction:
    """Hold back what would go of a head that stays."""

    def check(removed: Mask) -> Ints:
        gone = view.of(removed).reshape(view.dims)
        lives = ~gone.all(axis=1, keepdims=True)
        return view.atoms[(gone & lives).reshape(-1)]

    return check


def _equally_many(one: Slot, two: Slot, step: int) -> Restriction:
    """Hold dims back so that both views lose equally many, and keep whole `step`s."""

    def check(removed: Mask) -> Ints:
        found = [(view, *views.live_rows(view, removed)) for view in (one, two)]
        if not all(lives.any() for _, lives, _ in found):
            return np.zeros(0, np.int64)
        size = one.dims[1]
        count = min(int(gone.sum()) for _, _, gone in found)
        while count and (size - count) % step:
            count -= 1
        held = []
        for view, lives, gone in found:
            surplus = np.flatnonzero(gone)[count:]
            atoms = view.atoms.reshape(view.dims)[lives]
            held.append(atoms[:, surplus].reshape(-1))
        return np.concatenate(held)

    return check
