"""Reductions that do in one step what others do in two.

y = ReduceSum(x * x)                ->    y = ReduceSumSquare(x)
y = Sqrt(ReduceSumSquare(x))        ->    y = ReduceL2(x)
y = ReduceSum(x) / n                ->    y = ReduceMean(x), of n elements each
"""

from __future__ import annotations

import math
from typing import Any

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.operands import reduced_axes, takes_axes_input
from onnxopt.passes.simplify.fusions.fusion import Fusion, check_float32, check_shape
from onnxopt.pattern import Constant, Either, Match, Op, Value, is_near

_X = Value("x")


def keeps_dims(graph: GraphView, node: NodeProto, found: Match) -> str | None:
    """A check: the reduction leaves a 1 in place of what it reduces."""
    return None if attributes.get(node, "keepdims", 1) else "it drops its axes"


def _reduce(
    graph: GraphView, node: NodeProto, found: Match, op_type: str, old: NodeProto
) -> Edit:
    """Let `op_type` reduce x over the axes of the reduction `old`."""
    check_float32(graph, found["x"])
    check_shape(found, "reduced" if "reduced" in found else "x")
    axes = reduced_axes(graph, old)
    if axes is None and not _is_over_all(graph, old):
        raise DeclinedError("its axes are not constant")
    inputs = [found["x"]]
    settings: dict[str, Any] = {"keepdims": attributes.get(old, "keepdims", 1)}
    edit = Edit(graph, node)
    if axes is not None and takes_axes_input(op_type, graph.opset()):
        inputs.append(old.input[1])
    elif axes is not None:
        settings["axes"] = axes
    edit.rewrite(op_type, inputs, settings)
    return edit


def _is_over_all(graph: GraphView, node: NodeProto) -> bool:
    """Whether a reduction is over all axes since it names none."""
    if attributes.find(node, "axes") or (len(node.input) > 1 and node.input[1]):
        return False
    return not attributes.get(node, "noop_with_empty_axes", 0)


def _sum_square(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    return _reduce(graph, node, found, "ReduceSumSquare", node)


def _l2(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    return _reduce(graph, node, found, "ReduceL2", found.maker("reduced"))


def _mean(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    total = found.maker("reduced")
    shape, axes = graph.shape(found["x"]), reduced_axes(graph, total)
    if shape is None or (axes is None and not _is_over_all(graph, total)):
        raise DeclinedError("how many elements it sums is not known")
    size = _size(shape, axes)
    if size is None:
        raise DeclinedError("how many elements it sums is not known")
    divisor = found.number("count")
    divisor = divisor if node.op_type == "Div" else 1 / (divisor or math.nan)
    if not size or not is_near(divisor, size):
        raise DeclinedError(f"it sums {size} elements and divides by {divisor:.9g}")
    return _reduce(graph, node, found, "ReduceMean", total)


def _size(shape: tuple[int | str | None, ...], axes: list[int] | None) -> int | None:
    dims = shape if axes is None else [shape[axis] for axis in axes]
    known = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(known) if len(known) == len(dims) else None


_SQUARE = Either(Op("Mul", _X, _X), Op("Pow", _X, Constant(2.0)))
_SUM = Op("ReduceSum", _X, name="reduced")
_COUNT = Constant(name="count")

SUM_SQUARE = Fusion("ReduceSumSquare", 7, (Op("ReduceSum", _SQUARE),), _sum_square)
L2 = Fusion("ReduceL2", 7, (Op("Sqrt", Op("ReduceSumSquare", _X, name="reduced")),), _l2)
MEAN = Fusion("ReduceMean", 7, (Op("Div", _SUM, _COUNT), Op("Mul", _SUM, _COUNT)), _mean)
