"""Gelu (opset 20), with the error function or approximated by tanh.

    y = x * 0.5 * (1 + Erf(x / sqrt(2)))
    y = x * 0.5 * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))
                                        ->    y = Gelu(x)

Products in any association.
"""

from __future__ import annotations

import math

from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.passes.simplify.fusions.fusion import Fusion, elementwise
from onnxopt.pattern import Constant, Either, Match, Op, Product, Value

_X = Value("x")
_ONE = Constant(1.0)
_CUBIC = 0.044715


def _erf(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    return elementwise(graph, node, found, "Gelu")


def _tanh(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    return elementwise(graph, node, found, "Gelu", {"approximate": "tanh"})


_HALF_ERF = Op("Add", Op("Erf", Product(math.sqrt(0.5), _X)), _ONE)

_SQUARE = Op("Pow", _X, Constant(2.0))
_CUBE = Either(
    Product(_CUBIC, Op("Pow", _X, Constant(3.0))),
    Product(_CUBIC, _SQUARE, _X),
    Product(_CUBIC, _X, _X, _X),
)
_QUADRATIC = Op("Add", Either(Product(_CUBIC, _SQUARE), Product(_CUBIC, _X, _X)), _ONE)
_ROOT = math.sqrt(2 / math.pi)
_INNER = Either(Product(_ROOT, Op("Add", _CUBE, _X)), Product(_ROOT, _QUADRATIC, _X))

GELU = Fusion("Gelu", 20, (Product(0.5, _HALF_ERF, _X),), _erf)
TANH_GELU = Fusion(
    "Gelu", 20, (Product(0.5, Op("Add", Op("Tanh", _INNER), _ONE), _X),), _tanh
)
