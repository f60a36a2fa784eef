"""Softmax, from the steps that keep it from overflowing.

    e = Exp(x - ReduceMax(x, axis))
    y = e / ReduceSum(e, axis)          ->    y = Softmax(x), of that axis

Without the maximum the steps overflow where Softmax does not: those stay. Before opset
13 Softmax is over all axes from its axis on, so that must be the last.
"""

from __future__ import annotations

from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.operands import reduced_axes
from onnxopt.passes.simplify.fusions.fusion import Fusion, check_float32
from onnxopt.passes.simplify.fusions.reductions import keeps_dims
from onnxopt.pattern import Match, Op, Value

_X = Value("x")


def _softmax(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    check_float32(graph, found["x"])
    shape = graph.shape(found["x"])
    if shape is None:
        raise DeclinedError("the rank of its input is not known")
    axes = [reduced_axes(graph, found.maker(name)) for name in ("max", "sum")]
    first, second = ([axis % len(shape) for axis in item or ()] for item in axes)
    if first != second or len(first) != 1:
        raise DeclinedError("maximum and sum are not over the same single axis")
    if graph.opset() < 13 and first[0] != len(shape) - 1:
        raise DeclinedError("before opset 13 Softmax is over all axes from its axis on")
    edit = Edit(graph, node)
    edit.rewrite("Softmax", [found["x"]], {"axis": first[0]})
    return edit


_MAX = Op("ReduceMax", _X, check=keeps_dims, name="max")
_EXP = Op("Exp", Op("Sub", _X, _MAX))
_SUM = Op("ReduceSum", _EXP, check=keeps_dims, name="sum")

SOFTMAX = Fusion(
    "Softmax",
    7,
    (Op("Div", _EXP, _SUM), Op("Mul", Op("Reciprocal", _SUM), _EXP)),
    _softmax,
    telling=4,
)
