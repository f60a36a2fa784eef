"""Swish (opset 24) and Mish (opset 18).

y = x * Sigmoid(a * x)              ->    y = Swish(x), alpha a
y = x * Tanh(Softplus(x))           ->    y = Mish(x)
"""

from __future__ import annotations

from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.passes.simplify.fusions.fusion import Fusion, elementwise
from onnxopt.pattern import Match, Op, Product, Value

_X = Value("x")


def _swish(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    return elementwise(graph, node, found, "Swish", {"alpha": found.number("alpha")})


def _mish(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    return elementwise(graph, node, found, "Mish")


_SLOPE = Product(None, _X, name="alpha")

SWISH = Fusion("Swish", 24, (Op("Mul", Op("Sigmoid", _SLOPE), _X),), _swish)
MISH = Fusion("Mish", 18, (Op("Mul", Op("Tanh", Op("Softplus", _X)), _X),), _mish)
