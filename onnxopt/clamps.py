"""Clamps: Relu, Clip, and Min and Max with a scalar constant, in float32.

A bound that Clip lacks is the largest finite number (infinity does not pass ONNX
Runtime's), while Relu, Min and Max let infinity through: bounds are kept apart by that.
All hand NaN on.
"""

from __future__ import annotations

import math

import msgspec
from onnx import NodeProto, TensorProto

from onnxopt.graph import GraphView
from onnxopt.operands import clip_bounds
from onnxopt.pattern import LARGEST, Constant, Match, Op, Value, match

CLAMPS = ("Relu", "Clip", "Max", "Min")


class Clamp(msgspec.Struct, frozen=True):
    """min(max(value, low), high), with low <= high."""

    value: str
    low: float
    high: float

    def then(self, other: Clamp) -> Clamp:
        """This clamp and `other` behind it as one."""
        return Clamp(self.value, other.of(self.low), other.of(self.high))

    def of(self, number: float) -> float:
        """The number, clamped."""
        return min(max(number, self.low), self.high)

    def covers(self, other: Clamp) -> bool:
        """Whether it changes nothing behind `other`."""
        return self.low <= other.low and self.high >= other.high


_X = Value("x")
_WITH_SCALAR = {kind: Op(kind, Constant(name="bound"), _X) for kind in ("Max", "Min")}


def clamp_of(graph: GraphView, node: NodeProto) -> Clamp | None:
    """What a node, one of CLAMPS, clamps; None where it may be no clamp of float32."""
    if graph.dtype(node.output[0]) != TensorProto.FLOAT:
        return None
    if node.op_type == "Relu":
        return Clamp(node.input[0], 0.0, math.inf)
    if node.op_type == "Clip":
        bounds = clip_bounds(graph, node)
        if bounds is None:
            return None
        low, high = bounds
        value = node.input[0]
        low = -LARGEST if low is None else float(low)
        high = LARGEST if high is None else float(high)
    else:
        found = match(graph, node, _WITH_SCALAR[node.op_type])
        if not isinstance(found, Match) or not found.keeps_shape("x"):
            return None
        value, bound = found["x"], found.number("bound")
        low, high = (bound, math.inf) if node.op_type == "Max" else (-math.inf, bound)
    proper = low <= high and low < math.inf and high > -math.inf
    return Clamp(value, low, high) if proper else None
