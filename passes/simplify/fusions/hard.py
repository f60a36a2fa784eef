"""HardSigmoid and HardSwish (opset 14).

    y = Clip(x + 3, 0, 6) / 6           ->    y = HardSigmoid(x), alpha 1/6, beta 0.5
    y = Clip(a * x + b, 0, 1)           ->    y = HardSigmoid(x), alpha a, beta b
    y = x * Clip(x + 3, 0, 6) / 6       ->    y = HardSwish(x)
    y = x * HardSigmoid(x)              ->    y = HardSwish(x), of alpha 1/6, beta 0.5

Before opset 14 the third becomes x * HardSigmoid(x).
"""

from __future__ import annotations

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.operands import clip_bounds
from onnxopt.passes.simplify.fusions.fusion import (
    Fusion,
    check_float32,
    check_shape,
    elementwise,
)
from onnxopt.pattern import Check, Constant, Match, Op, Product, Value, is_near

_X = Value("x")
_SIXTH = {"alpha": 1 / 6, "beta": 0.5}


def _between(low: float, high: float) -> Check:
    def check(graph: GraphView, node: NodeProto, found: Match) -> str | None:
        bounds = clip_bounds(graph, node)
        return None if bounds == (low, high) else f"its bounds are {bounds}"

    return check


def _is_sixth(graph: GraphView, node: NodeProto, found: Match) -> str | None:
    alpha, beta = attributes.get(node, "alpha", 0.2), attributes.get(node, "beta", 0.5)
    return None if is_near(alpha, 1 / 6) and beta == 0.5 else "its slope is not 1/6"


def _hard_sigmoid(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    return elementwise(graph, node, found, "HardSigmoid", _SIXTH)


def _linear(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    settings = {"alpha": found.number("alpha"), "beta": found.number("beta")}
    return elementwise(graph, node, found, "HardSigmoid", settings)


def _hard_swish(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    if graph.opset() >= 14:
        return elementwise(graph, node, found, "HardSwish")
    check_float32(graph, found["x"])
    check_shape(found, "x")
    edit = Edit(graph, node)
    gate = edit.insert("HardSigmoid", [found["x"]], attrs=_SIXTH)
    edit.rewrite("Mul", [found["x"], *gate])
    return edit


_SHIFTED = Op("Add", _X, Constant(3.0))
_RELU6 = Op("Clip", _SHIFTED, check=_between(0, 6))
_LINE = Op("Add", Product(None, _X, name="alpha"), Constant(name="beta"))

HARD_SIGMOID = Fusion("HardSigmoid", 7, (Product(1 / 6, _RELU6),), _hard_sigmoid)
LINEAR_HARD_SIGMOID = Fusion(
    "HardSigmoid", 7, (Op("Clip", _LINE, check=_between(0, 1)),), _linear
)
CLIPPED_HARD_SWISH = Fusion("HardSwish", 7, (Product(1 / 6, _RELU6, _X),), _hard_swish)
HARD_SWISH = Fusion(
    "HardSwish", 14, (Op("Mul", Op("HardSigmoid", _X, check=_is_sixth), _X),), _hard_swish
)
