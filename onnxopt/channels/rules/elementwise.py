"""Operators that work element by element: unary, arithmetic, comparisons, choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import compute, demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import (
    Fact,
    Kind,
    Kinds,
    Mask,
    aligned,
    computed,
    fact,
    join,
)
from onnxopt.channels.groups import Link, Side
from onnxopt.channels.rules.rule import Rule
from onnxopt.graph import Shape
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Elementwise(Rule):
    """Operands broadcast; the result is known where all operands are."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The operator itself, on what is known of its operands."""
        nothing: list[Fact | None] = [None] * len(node.output)
        rank = a.rank(node.output[0])
        names = [name for name in node.input if name]
        if rank is None or a.graph.opset() < 7:
            return nothing
        variable = [name for name in names if not a.is_constant(name)]
        if all(a.fact(name) is None for name in variable) and not self.absorbs(a, node):
            return nothing
        facts = [a.fact(name) if name else None for name in node.input]
        if any(item is not None and item.kinds.ndim > rank for item in facts):
            return nothing
        kinds = join([a.fact(name) for name in names], rank)
        if _jumps(a, node):
            kinds = _sure(node, kinds, [a.fact(name) for name in names])
        return [self.result(a, node, facts, kinds), *nothing[1:]]

    def absorbs(self, a: Analysis, node: NodeProto) -> bool:
        """Whether one operand alone can decide the result."""
        return False

    def result(
        self, a: Analysis, node: NodeProto, facts: Sequence[Fact | None], kinds: Kinds
    ) -> Fact | None:
        """The fact of the output; `kinds` is the lowest of the operands'."""
        if not (kinds == Kind.CONST).any():
            return fact(kinds, np.ones(kinds.shape, np.float32))
        values = self.values(a, node, facts)
        if values is None:
            return fact(np.minimum(kinds, Kind.MAP), np.ones(kinds.shape, np.float32))
        return computed(kinds, values)

    def values(
        self, a: Analysis, node: NodeProto, facts: Sequence[Fact | None]
    ) -> Array | None:
        """The output where the operands are known, anything elsewhere."""
        if node.op_type in ("Div", "Mod") and not a.is_float(node.output[0]):
            return None  # by zero, integers trap
        inputs = [None if item is None else item.values for item in facts]
        return compute.elementwise(a.evaluator, node, inputs, a.graph.opset())

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Of an operand, what is needed of the result."""
        return [demand.onto(needs[0], a.shape(name)) for name in node.input]

    def keeps_rows(self, link: Link) -> bool:
        """Every element is handed on by itself."""
        return True

    def link(self, link: Link) -> None:
        """Tie what broadcasts alike; an operand of size 1 serves every channel."""
        if link.groups.graph.opset() < 7:
            link.bar("it broadcasts by attribute")
            return
        if link.side == "out" and link.index > 0:
            link.bar("it has more than one output")
            return
        a = link.analysis
        total = a.rank(link.name("out", 0))
        mine = a.rank(link.name(link.side, link.index))
        if total is None or mine is None:
            link.bar("its rank is not known")
            return
        axes = [axis + total - mine for axis in link.axes]
        if self._waits(link, axes):
            return
        for side, index in link.ports():
            if side == "in" or index == 0:
                self._tie(link, side, index, axes, total)

    def _tie(
        self, link: Link, side: Side, index: int, axes: Sequence[int], total: int
    ) -> None:
        dims = link.analysis.shape(link.name(side, index))
        if dims is None:
            link.bar("its rank is not known")
            return
        own = {}
        for axis, place in zip(link.axes, axes, strict=True):
            there = place - (total - len(dims))
            is_there = there >= 0 and (dims[there] != 1 or link.slot.size == 1)
            if side == "out" or is_there:
                own[axis] = there
        if own and not (
            link.slot.size == 1 and link.analysis.is_constant(link.name(side, index))
        ):
            link.relate(side, index, own)

    def _waits(self, link: Link, axes: Sequence[int]) -> bool:
        """Whether to look again later: the result may have more axes than ours."""
        if link.side == "out" or sum(1 for name in link.node.input if name) < 2:
            return False
        a = link.analysis
        mine, whole = a.shape(link.slot.name), a.shape(link.name("out", 0))
        if mine is not None and whole is not None and not _grows(mine, whole):
            return False
        return link.covering("out", 0, axes) is None and link.groups.defer(link, late=1)


def _grows(mine: Shape, whole: Shape) -> bool:
    """Whether broadcasting makes an axis of known size where there was none."""
    padded = (1,) * (len(whole) - len(mine)) + tuple(mine)
    return any(
        isinstance(size, int) and size != 1 and own == 1
        for own, size in zip(padded, whole, strict=True)
    )


NEAR = 1e-3
"""Computed values this close to a jump count as unknown beyond it."""
_JUMPING = {"Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
_JUMPING |= {"Mod", "Round", "Sign"}


def _jumps(a: Analysis, node: NodeProto) -> bool:
    """Whether the least rounding of an operand can make another result."""
    is_cut = node.op_type == "Cast" and not a.is_float(node.output[0])
    return is_cut or node.op_type in _JUMPING


def _sure(node: NodeProto, kinds: Kinds, facts: Sequence[Fact | None]) -> Kinds:
    """Known only away from a jump, or where all that was computed is exactly zero."""
    rank, exact = kinds.ndim, np.ones((), bool)
    for item in facts:
        is_zero = np.zeros((), bool) if item is None else item.is_zero
        exact = np.asarray(exact & aligned(is_zero, rank))
    values = [
        aligned(item.values.astype(np.float64), rank)
        for item in facts
        if item is not None
    ]
    near = _near_jump(node.op_type, values) if values else np.ones((), bool)
    unsure = (kinds == Kind.CONST) & near & ~exact
    return np.asarray(np.where(unsure, Kind.MAP, kinds), np.uint8)


def _near_jump(op_type: str, values: Sequence[Array]) -> Mask:
    """Whether rounding could take a value to the other side."""
    first = values[0]
    match op_type:
        case "Ceil" | "Floor" | "Cast":
            return np.asarray(np.abs(first - np.rint(first)) < NEAR)
        case "Round":
            return np.asarray(np.abs(np.abs(first % 1.0) - 0.5) < NEAR)
        case "Sign":
            return np.asarray(np.abs(first) < NEAR)
    if len(values) < 2 or op_type == "Mod":
        return np.ones((), bool)
    gap = np.abs(first - values[1])
    return np.asarray(gap < NEAR * np.maximum(1.0, np.abs(first)))


class Product(Elementwise):
    """Mul: a zero decides, whatever the other operand is."""

    drops_inputs = True

    def absorbs(self, a: Analysis, node: NodeProto) -> bool:
        """See Elementwise."""
        facts = [a.fact(name) for name in node.input]
        return any(item is not None and item.is_zero.any() for item in facts)

    def result(
        self, a: Analysis, node: NodeProto, facts: Sequence[Fact | None], kinds: Kinds
    ) -> Fact | None:
        """Zero where an operand is and none is WILD."""
        rank, is_zero = kinds.ndim, np.zeros((), bool)
        for item in facts:
            if item is not None:
                is_zero = is_zero | aligned(item.is_zero, rank)
        made = super().result(a, node, facts, kinds)
        known = np.where(is_zero & (kinds != Kind.WILD), Kind.CONST, Kind.DYN)
        if not (known == Kind.CONST).any():
            return made
        first = next(item for item in facts if item is not None)
        if made is None:
            return fact(known, np.zeros(known.shape, first.values.dtype))
        kinds = np.where(known == Kind.CONST, Kind.CONST, made.kinds)
        values = np.where(known == Kind.CONST, 0, made.values).astype(first.values.dtype)
        return fact(kinds, values)

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """What another operand multiplies by zero is not needed."""
        rank = a.rank(node.output[0])
        if rank is None:
            return [None] * len(node.input)
        zeros = []
        for name in node.input:
            item = a.fact(name)
            is_zero = np.zeros((), bool) if item is None else item.is_zero
            zeros.append(aligned(is_zero, rank))
        # of two zeros, the one that stands first is the one that decides
        lives = [~zeros[1] | zeros[0], ~zeros[0]]
        return [
            demand.onto(_narrowed(needs[0], live), a.shape(name))
            for live, name in zip(lives, node.input, strict=True)
        ]


class Quotient(Elementwise):
    """Div: zero over what depends on the input is zero, since activations are finite."""

    def absorbs(self, a: Analysis, node: NodeProto) -> bool:
        """See Elementwise."""
        item = a.fact(node.input[0])
        return item is not None and bool(item.is_zero.any())

    def result(
        self, a: Analysis, node: NodeProto, facts: Sequence[Fact | None], kinds: Kinds
    ) -> Fact | None:
        """Zero where the dividend is, unless the divisor is known."""
        made, first = super().result(a, node, facts, kinds), facts[0]
        if first is None or not a.is_float(node.output[0]):
            return made
        over = join(facts[1:], kinds.ndim)
        is_zero = aligned(first.is_zero, kinds.ndim) & (over == Kind.DYN)
        if not is_zero.any():
            return made
        known = np.where(is_zero, Kind.CONST, Kind.DYN if made is None else made.kinds)
        values = np.zeros((), first.values.dtype) if made is None else made.values
        return fact(known, np.where(is_zero, np.zeros_like(values), values))


def _narrowed(need: Demand, live: Mask) -> Demand:
    if live.all():
        return need
    return live if need is None else np.asarray(need & live)


class Dropout(Elementwise):
    """Outside training it hands its input on; its further inputs are settings."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The input's fact, unless the node may run in training mode."""
        others: list[Fact | None] = [None] * (len(node.output) - 1)
        return [a.fact(node.input[0]) if is_idle(a, node) else None, *others]

    def link(self, link: Link) -> None:
        """As for a unary operator."""
        if is_idle(link.analysis, link.node):
            super().link(link)
        else:
            link.bar("it may run in training mode")


def is_idle(a: Analysis, node: NodeProto) -> bool:
    """Whether a Dropout is not in training mode, and its mask is not read."""
    if any(name and a.graph.is_used(name) for name in node.output[1:]):
        return False
    if a.graph.opset() < 7:
        return bool(attributes.get(node, "is_test", 0))
    if len(node.input) < 3 or not node.input[2]:
        return True
    training = a.graph.array(node.input[2])
    return training is not None and not bool(training)
