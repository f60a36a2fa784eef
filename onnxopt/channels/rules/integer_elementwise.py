"""Operators of com.microsoft that work on codes: element by element, pools, Concat.

Each operand comes with a scale and a zero point. Results are computed on values in
float64; a result that is close to the middle of two codes counts as unknown, since
rounding before it could decide otherwise at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, Kinds, aligned, fact, join
from onnxopt.channels.groups import Link
from onnxopt.channels.rules.elementwise import Elementwise
from onnxopt.channels.rules.join import Concat
from onnxopt.channels.rules.quantize import TIE
from onnxopt.channels.rules.spatial import Pool
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


def values_of(a: Analysis, node: NodeProto, slot: int) -> Fact | None:
    """What the codes at `slot` stand for, by the scale and zero point behind it."""
    found, parameters = a.fact(node.input[slot]), _parameters(a, node, slot + 1)
    if found is None or parameters is None:
        return None
    scale, zero = parameters
    return fact(found.kinds, (found.values.astype(np.float64) - zero) * scale)


def codes_of(
    a: Analysis, node: NodeProto, slot: int, kinds: Kinds, values: Array
) -> Fact | None:
    """The codes of values, by the scale and zero point at `slot` and the one behind."""
    parameters, array = _parameters(a, node, slot), None
    if len(node.input) > slot + 1 and node.input[slot + 1]:
        array = a.graph.array(node.input[slot + 1])
    dtype = np.dtype(np.uint8) if array is None else array.dtype
    if parameters is None:
        return None
    scale, zero = parameters
    steps = values / scale
    near = np.abs(np.abs(steps % 1.0) - 0.5) < TIE
    limits = np.iinfo(dtype)
    codes = np.clip(np.rint(steps) + zero, limits.min, limits.max).astype(dtype)
    return fact(np.where((kinds == Kind.CONST) & near, Kind.MAP, kinds), codes)


def _parameters(a: Analysis, node: NodeProto, slot: int) -> tuple[float, int] | None:
    """Scale and zero point at `slot` and behind it: one each, else None."""
    scale = a.graph.array(node.input[slot])
    zero: Array | None = np.zeros((), np.uint8)
    if len(node.input) > slot + 1 and node.input[slot + 1]:
        zero = a.graph.array(node.input[slot + 1])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    return float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])


class QLinear(Elementwise):
    """QLinearAdd, QLinearSigmoid, QLinearLeakyRelu.

    As many operands as `operands` says, then the scale and zero point of the result.
    """

    def __init__(self, operands: int) -> None:
        self.operands = operands

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The operator on what the codes stand for."""
        rank = a.rank(node.output[0])
        facts = [values_of(a, node, 3 * place) for place in range(self.operands)]
        if rank is None or all(found is None for found in facts):
            return [None]
        if any(found is not None and found.kinds.ndim > rank for found in facts):
            return [None]
        made = self._made(node, facts, rank)
        return [None if made is None else codes_of(a, node, 3 * self.operands, *made)]

    def _made(
        self, node: NodeProto, facts: Sequence[Fact | None], rank: int
    ) -> tuple[Kinds, Array] | None:
        """Kinds and values of the result."""
        values = [np.zeros(()) if found is None else found.values for found in facts]
        first = aligned(values[0], max(rank, values[0].ndim))
        match node.op_type:
            case "QLinearAdd":
                made = first + values[1]
            case "QLinearMul":
                made = first * values[1]
            case "QLinearSigmoid":
                made = 1 / (1 + np.exp(-first))
            case "QLinearLeakyRelu":
                alpha = float(np.float32(attributes.get(node, "alpha", 0.01)))
                made = np.where(first >= 0, first, alpha * first)
            case _:
                return None
        return join(facts, rank), made

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Of the operands what is needed of the result; of scales, all."""
        wanted = list(super().backward(a, node, needs))
        operands = {3 * place for place in range(self.operands)}
        return [w if slot in operands else None for slot, w in enumerate(wanted)]


class QLinearProduct(QLinear):
    """QLinearMul: a zero decides."""

    drops_inputs = True

    def _made(
        self, node: NodeProto, facts: Sequence[Fact | None], rank: int
    ) -> tuple[Kinds, Array] | None:
        made = super()._made(node, facts, rank)
        if made is None:
            return None
        is_zero = np.zeros((1,) * rank, bool)
        for found in facts:
            if found is not None:
                is_zero = is_zero | aligned(found.is_zero, rank)
        kinds = np.asarray(np.where(is_zero, Kind.CONST, made[0]), np.uint8)
        return kinds, np.where(is_zero, 0.0, made[1])


class QLinearPool(Pool):
    """QLinearGlobalAveragePool and QLinearAveragePool: means of codes."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """A mean of equal values is that value; with padding, only of zeros."""
        given = values_of(a, node, 0)
        if given is None or given.kinds.ndim < 3 or self._is_last(node):
            return [None]
        flat = given.along(1, given.kinds.shape[1])
        kinds = flat.kinds
        if node.op_type != "QLinearGlobalAveragePool":
            is_other = flat.is_const & ~flat.is_zero
            kinds = np.asarray(np.where(is_other, Kind.MAP, kinds), np.uint8)
        return [codes_of(a, node, 3, kinds, flat.values)]

    def _is_last(self, node: NodeProto) -> bool:
        return bool(attributes.get(node, "channels_last", 0))

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """As for any pool; of scales, all."""
        if self._is_last(node):
            return [None] * len(node.input)
        first = super().backward(a, node, needs)[0]
        return [first, *[None] * (len(node.input) - 1)]

    def link(self, link: Link) -> None:
        """Channels on axis 1 go through."""
        if self._is_last(link.node):
            link.bar("its channels are last")
        elif link.side == "in" and link.index > 0:
            link.bar("it is a scale")
        else:
            super().link(link)


class QLinearConcat(Concat):
    """Scale and zero point of the result, then operands with theirs."""

    first, stride = 2, 3

    def facts(self, a: Analysis, node: NodeProto) -> list[Fact | None]:
        """What the codes of each operand stand for."""
        slots = range(self.first, len(node.input), self.stride)
        return [values_of(a, node, slot) for slot in slots]

    def result(self, a: Analysis, node: NodeProto, made: Fact | None) -> Fact | None:
        """In codes of the result."""
        return None if made is None else codes_of(a, node, 0, made.kinds, made.values)
