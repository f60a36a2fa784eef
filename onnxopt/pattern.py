"""Patterns: trees of operators that end at a node, and why one is not there.

    x = Value("x")
    mish = Op("Mul", Op("Tanh", Op("Softplus", x)), x)
    found = match(graph, node, mish)

gives a `Match` (`found["x"]` is the name of the value), or a `Failure` that says where
the comparison stopped. An element that stands at two places is the same value at both.
Operands of commutative operators come in either order; alternatives are tried in order,
and one that fitted is not taken back: put what is distinctive first.

All inner values are read inside of the match only, so that a rewrite of its end leaves
none of them behind. Constants are scalars (any rank: `Match.keeps_shape` sees to it that
they do not raise that of the result).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from itertools import permutations

import msgspec
import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.graph import GraphView

RELATIVE = 1e-6
"""How near a constant must be: several roundings of float32, and no shortened digits."""

LARGEST = float(np.finfo(np.float32).max)
_COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min"})


Check = Callable[[GraphView, NodeProto, "Match"], str | None]
"""What else an operator must satisfy: None, or the reason why it does not."""


class Value(msgspec.Struct, frozen=True, eq=False):
    """Any value, the same wherever this name stands."""

    name: str


class Constant(msgspec.Struct, frozen=True, eq=False):
    """A constant of one element: near `number`, or any, kept as `name`."""

    number: float | None = None
    name: str = ""


class Op:
    """The first output of a standard operator, whose first inputs are `operands`."""

    def __init__(
        self, op_type: str, *operands: Pattern, check: Check | None = None, name: str = ""
    ) -> None:
        self.op_type = op_type
        self.operands = operands
        self.check = check
        self.name = name


class Product:
    """A product of `factors` and constants that make `number`, in any association.

    A division by a constant counts as a factor.
    """

    def __init__(self, number: float | None, *factors: Pattern, name: str = "") -> None:
        self.number = number
        self.factors = factors
        self.name = name


class Either:
    """The first of several patterns that fits."""

    def __init__(self, *options: Pattern) -> None:
        self.options = options


Pattern = Value | Constant | Op | Product | Either


class Failure(msgspec.Struct, frozen=True):
    """Where a comparison stopped: after how many operators, at which value, and why."""

    depth: int
    reason: str


class Match:
    """What a pattern found: values and numbers by name, and its operators."""

    def __init__(self, graph: GraphView) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = []
        self.rank = 0  # the highest of the constants
        self.failure = Failure(-1, "")
        self._bound: dict[object, str] = {}
        self._numbers: dict[str, float] = {}

    def __getitem__(self, name: str) -> str:
        """The value that stands where the pattern has `name`."""
        return self._bound[name]

    def __contains__(self, name: str) -> bool:
        return name in self._bound

    def number(self, name: str) -> float:
        """The constant that the pattern calls `name`."""
        return self._numbers[name]

    def maker(self, name: str) -> NodeProto:
        """The operator of the pattern that is called `name`."""
        node = self.graph.producer(self._bound[name])
        assert node is not None
        return node

    def keeps_shape(self, name: str) -> bool:
        """Whether combining value `name` with the constants leaves its rank."""
        if not self.rank:
            return True
        shape = self.graph.shape(name)
        return shape is not None and len(shape) >= self.rank

    # ---- comparing ----

    def _fail(self, reason: str) -> bool:
        if len(self.nodes) > self.failure.depth:
            self.failure = Failure(len(self.nodes), reason)
        return False

    def _fits(self, pattern: Pattern, value: str) -> bool:
        if not value:
            return self._fail("an operand is absent")
        if isinstance(pattern, Constant):
            return self._constant(pattern, value)
        if isinstance(pattern, Either):
            return any(self._attempt([pair]) for pair in _pairs(pattern, value))
        key = pattern.name if isinstance(pattern, Value) else pattern
        if key in self._bound:
            same = self._bound[key] == value
            return same or self._fail(f"{value!r} is not {self._bound[key]!r}")
        if isinstance(pattern, Op) and not self._operator(pattern, value):
            return False
        if isinstance(pattern, Product) and not self._product(pattern, value):
            return False
        self._bound[key] = value
        if not isinstance(pattern, Value) and pattern.name:
            self._bound[pattern.name] = value
        return True

    def _attempt(self, pairs: Iterable[tuple[Pattern, str]]) -> bool:
        """Whether patterns fit values; where they do not, nothing of it is kept."""
        nodes, rank = len(self.nodes), self.rank
        bound, numbers = self._bound.copy(), self._numbers.copy()
        if all(self._fits(pattern, value) for pattern, value in pairs):
            return True
        del self.nodes[nodes:]
        self.rank, self._bound, self._numbers = rank, bound, numbers
        return False

    def _constant(self, pattern: Constant, value: str) -> bool:
        number = self._scalar(value)
        if number is None:
            return self._fail(f"{value!r} is not a scalar constant")
        if pattern.number is not None and not is_near(number, pattern.number):
            return self._fail(f"{value!r} is {number:.9g} and not {pattern.number:.9g}")
        if pattern.name:
            self._numbers[pattern.name] = number
        return True

    def _scalar(self, value: str) -> float | None:
        """The number that constant `value` holds; None where it is not one."""
        tensor = self.graph.weight(value)
        if tensor is None or math.prod(tensor.dims) != 1:
            return None
        array = self.graph.array(value)
        if array is None or array.dtype == object or array.dtype.kind not in "fiu":
            return None
        self.rank = max(self.rank, array.ndim)
        return float(array.reshape(-1)[0])

    def _operator(self, pattern: Op, value: str) -> bool:
        node = self.graph.producer(value)
        if node is None or self.graph.op(node) != pattern.op_type:
            made = "no operator" if node is None else node.op_type
            return self._fail(f"{value!r} comes from {made}, not {pattern.op_type}")
        if node.output[0] != value or attributes.has_references(node):
            return self._fail(f"{self.graph.label(node)} differs from call to call")
        if len(node.input) < len(pattern.operands):
            return self._fail(f"{self.graph.label(node)} has too few inputs")
        self.nodes.append(node)
        if not self._operands(pattern, node):
            return False
        reason = pattern.check(self.graph, node, self) if pattern.check else None
        return reason is None or self._fail(f"{self.graph.label(node)}: {reason}")

    def _operands(self, pattern: Op, node: NodeProto) -> bool:
        if pattern.op_type not in _COMMUTATIVE:
            pairs = zip(pattern.operands, node.input, strict=False)
            return all(self._fits(item, value) for item, value in pairs)
        if len(node.input) != len(pattern.operands):
            return self._fail(f"{self.graph.label(node)} has {len(node.input)} inputs")
        orders = permutations(node.input)
        return any(
            self._attempt(zip(pattern.operands, names, strict=True)) for names in orders
        )

    def _product(self, pattern: Product, value: str) -> bool:
        names, number = self._factors(value, len(pattern.factors))
        if len(names) != len(pattern.factors):
            return self._fail(f"{value!r} is not a product of {len(pattern.factors)}")
        if pattern.number is None:
            if not abs(number) <= LARGEST:
                return self._fail(f"the factor of {value!r} is {number:.9g}")
            self._numbers[pattern.name] = number
        elif not is_near(number, pattern.number):
            text = f"the factor of {value!r} is {number:.9g} and not {pattern.number:.9g}"
            return self._fail(text)
        orders = permutations(names)
        return any(
            self._attempt(zip(pattern.factors, order, strict=True)) for order in orders
        )

    def _factors(self, value: str, count: int) -> tuple[list[str], float]:
        """What a tree of Mul, and Div by constants, multiplies; constants as one."""
        names: list[str] = []
        number, queue = 1.0, [value]
        while queue and len(names) <= count:
            name = queue.pop()
            node = self._scaling(name, is_end=not self.nodes)
            if node is None:
                scalar = self._scalar(name)
                number *= 1.0 if scalar is None else scalar
                names += [name] if scalar is None else []
                continue
            self.nodes.append(node)
            if node.op_type == "Div":
                number /= self._scalar(node.input[1]) or math.nan
                queue.append(node.input[0])
            else:
                queue.extend(reversed(node.input))
        return names, number

    def _scaling(self, name: str, *, is_end: bool) -> NodeProto | None:
        """The Mul or Div by a constant that makes `name` for this product alone."""
        node = self.graph.producer(name)
        if node is None or not (is_end or self.graph.only_use(name)):
            return None
        op_type = self.graph.op(node)
        if op_type == "Mul" or (op_type == "Div" and self._scalar(node.input[1])):
            return node
        return None

    def _is_closed(self) -> bool:
        """Whether only operators of the match read its inner values."""
        end, own = self.nodes[0], {id(node) for node in self.nodes}
        for node in self.nodes:
            if node is end:
                continue
            for name in filter(None, node.output):
                outside = self.graph.is_output(name) or self.graph.is_pinned(name)
                if outside or any(id(u.node) not in own for u in self.graph.uses(name)):
                    return self._fail(f"{name!r} has other readers")
        return True


def match(graph: GraphView, node: NodeProto, pattern: Pattern) -> Match | Failure:
    """Compare `pattern` with what ends at the first output of `node`."""
    if isinstance(pattern, Op) and not _glance(graph, node, pattern):
        return NOTHING
    found = Match(graph)
    if found._fits(pattern, node.output[0]) and found._is_closed():
        return found
    return found.failure


NOTHING = Failure(0, "")


def _glance(graph: GraphView, node: NodeProto, pattern: Op) -> bool:
    """Whether the operators at the end, and right before it, may be the pattern's."""
    if node.op_type != pattern.op_type:
        return False
    slots: Collection[int] = range(len(node.input))
    for index, operand in enumerate(pattern.operands):
        if isinstance(operand, Op):
            near = slots if pattern.op_type in _COMMUTATIVE else (index,)
            if not any(_is_made_by(graph, node, slot, operand.op_type) for slot in near):
                return False
    return True


def _is_made_by(graph: GraphView, node: NodeProto, slot: int, op_type: str) -> bool:
    maker = graph.producer(node.input[slot]) if slot < len(node.input) else None
    return maker is not None and maker.op_type == op_type


def is_near(number: float, wanted: float) -> bool:
    """Whether a constant is `wanted` but for the rounding of float32."""
    return bool(np.isfinite(number)) and abs(number - wanted) <= RELATIVE * abs(wanted)


def _pairs(pattern: Either, value: str) -> Iterable[tuple[Pattern, str]]:
    return ((option, value) for option in pattern.options)
