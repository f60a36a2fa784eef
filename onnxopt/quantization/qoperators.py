"""Operators that read and make codes, and the operators on floats that they stand for.

    y = QLinearConv(x, xs, xz, w, ws, wz, ys, yz)
    y = Q(Conv(DQ(x, xs, xz), DQ(w, ws, wz)), ys, yz)

Both round the same real number to a code. The first sums integers and multiplies by
xs ws / ys, the second sums floats and divides by ys: what they round differs in the last
digits of a float, so where it lies midway between two codes they can take different ones.
"""

from __future__ import annotations

import msgspec

from onnxopt.linear import DeclinedError
from onnxopt.weights import Array

MICROSOFT = "com.microsoft"
Operand = tuple[int, int, int]
"""The slots of a value's codes, scale and zero point."""


class QOperator(msgspec.Struct, frozen=True):
    """Where an operator on codes has its operands, and which operator it is on floats."""

    op_type: str
    domain: str
    meaning: str
    """The operator on floats."""
    operands: tuple[Operand, ...]
    """In the order of the inputs on floats; of Concat those of the first value."""
    result: tuple[int, int] | None
    """The slots of the scale and zero point of what it makes; None: it makes floats."""
    bias: int | None = None
    """The slot of the bias."""
    plain: tuple[int, ...] = ()
    """Inputs before the operands that are no codes."""
    variadic: bool = False
    """Whether the operands repeat."""

    @property
    def key(self) -> str:
        """As `GraphView.op` names it."""
        return f"{self.domain}::{self.op_type}" if self.domain else self.op_type

    def operands_of(self, count: int) -> tuple[Operand, ...]:
        """The operands of a node with `count` inputs."""
        if not self.variadic:
            return self.operands
        first = self.operands[0]
        return tuple((slot, slot + 1, slot + 2) for slot in range(first[0], count - 2, 3))


_ONE: tuple[Operand, ...] = ((0, 1, 2),)
_TWO: tuple[Operand, ...] = ((0, 1, 2), (3, 4, 5))
_ALL = (
    QOperator("QLinearConv", "", "Conv", _TWO, (6, 7), bias=8),
    QOperator("QLinearMatMul", "", "MatMul", _TWO, (6, 7)),
    QOperator("QLinearAdd", MICROSOFT, "Add", _TWO, (6, 7)),
    QOperator("QLinearMul", MICROSOFT, "Mul", _TWO, (6, 7)),
    QOperator("QLinearSigmoid", MICROSOFT, "Sigmoid", _ONE, (3, 4)),
    QOperator("QLinearLeakyRelu", MICROSOFT, "LeakyRelu", _ONE, (3, 4)),
    QOperator("QLinearAveragePool", MICROSOFT, "AveragePool", _ONE, (3, 4)),
    QOperator("QLinearGlobalAveragePool", MICROSOFT, "GlobalAveragePool", _ONE, (3, 4)),
    QOperator("QLinearSoftmax", MICROSOFT, "Softmax", _ONE, (3, 4)),
    QOperator("QLinearConcat", MICROSOFT, "Concat", ((2, 3, 4),), (0, 1), variadic=True),
    QOperator(
        "QLinearWhere", MICROSOFT, "Where", ((1, 2, 3), (4, 5, 6)), (7, 8), plain=(0,)
    ),
    QOperator("QGemm", MICROSOFT, "Gemm", _TWO, (7, 8), bias=6),
)
_TO_FLOAT = (
    QOperator(
        "MatMulIntegerToFloat", MICROSOFT, "MatMul", ((0, 2, 4), (1, 3, 5)), None, bias=6
    ),
)
BY_KEY = {item.key: item for item in (*_ALL, *_TO_FLOAT)}
BY_MEANING = {item.meaning: item for item in _ALL}

ONLY_ON_CODES = frozenset({"channels_last", "opset"})
"""Attributes that the operators on floats do not have."""


def weight_axis(meaning: str, transposed: bool, rank: int) -> int | None:
    """The axis of the output channels of the second operand, along which it may have
    scales; None where it has one scale.
    """
    match meaning:
        case "Conv":
            return 0
        case "Gemm":
            return 0 if transposed else 1
        case "MatMul":
            return rank - 1
    return None


def check_result(meaning: str, scale: Array | None) -> None:
    """Raises DeclinedError where the two forms differ by more than rounding.

    QLinearSoftmax computes with whole numbers, with 1 / scale among them: right at the
    scale of 1/256 that quantizers give to probabilities; at others it takes the code
    below for up to a quarter of the elements (ONNX Runtime 1.32).
    """
    if meaning == "Softmax" and (scale is None or float(scale.reshape(())) != 1 / 256):
        raise DeclinedError("QLinearSoftmax is only right at a scale of 1/256")
