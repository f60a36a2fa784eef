"""LayerNormalization (opset 17) and RMSNormalization (opset 23).

    d = x - ReduceMean(x)
    n = d / Sqrt(ReduceMean(d ** 2) + epsilon)
    y = n * gamma + beta                ->    y = LayerNormalization(x, gamma, beta)

    n = x / Sqrt(ReduceMean(x ** 2) + epsilon)
    y = n * gamma                       ->    y = RMSNormalization(x, gamma)

1. The means are over the last axes, whose sizes are known; gamma and beta have just
   these dims (a constant may have 1s before them).
2. Without gamma, the operator gets ones, where these are few.
3. A product with the reciprocal is a division, a power of 0.5 a root.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.operands import reduced_axes
from onnxopt.passes.simplify.fusions.fusion import Fusion, check_float32, check_shape
from onnxopt.passes.simplify.fusions.reductions import keeps_dims
from onnxopt.pattern import Constant, Declined, Either, Match, Op, Pattern, Value

MAX_GROWTH = 4096
"""How many bytes of ones (scales that a model does not have) an operator is worth."""

_X = Value("x")


def _normalized(value: Pattern) -> tuple[Pattern, ...]:
    """`value` over the root of the mean of its squares plus epsilon."""
    square = Either(Op("Pow", value, Constant(2.0)), Op("Mul", value, value))
    variance = Op("ReduceMean", square, check=keeps_dims, name="variance")
    shifted = Op("Add", variance, Constant(name="epsilon"))
    root = Either(Op("Sqrt", shifted), Op("Pow", shifted, Constant(0.5)))
    inverse = Either(
        Op("Reciprocal", root),
        Op("Div", Constant(1.0), root),
        Op("Pow", shifted, Constant(-0.5)),
    )
    return Op("Div", value, root), Op("Mul", inverse, value)


def _layer_norm(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    axes = reduced_axes(graph, found.maker("mean"))
    if axes != reduced_axes(graph, found.maker("variance")):
        raise Declined("mean and variance are over different axes")
    dims = _last_dims(graph, found)
    end, gamma = _behind(graph, node, "Mul", dims)
    end, beta = _behind(graph, end, "Add", dims)
    return _edit(graph, end, found, dims, [gamma, beta])


def _rms_norm(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    dims = _last_dims(graph, found)
    end, gamma = _behind(graph, node, "Mul", dims)
    return _edit(graph, end, found, dims, [gamma])


def _last_dims(graph: GraphView, found: Match) -> list[int]:
    """The sizes of the axes that are normalized, which must be the last ones."""
    check_float32(graph, found["x"])
    check_shape(found, "x")
    axes, shape = reduced_axes(graph, found.maker("variance")), graph.shape(found["x"])
    if axes is None or shape is None:
        raise Declined("its axes, or the rank of its input, are not known")
    rank = len(shape)
    places = sorted(axis % rank for axis in axes)
    if places != list(range(rank - len(places), rank)):
        raise Declined("it does not normalize the last axes")
    dims = [dim for dim in shape[places[0] :] if isinstance(dim, int) and dim > 0]
    if len(dims) != len(places):
        raise Declined("the sizes of the normalized axes are not known")
    return dims


def _behind(
    graph: GraphView, node: NodeProto, op_type: str, dims: list[int]
) -> tuple[NodeProto, str]:
    """The `op_type` of what `node` makes and a weight per element, and that weight.

    `node` itself, and no weight, where none follows.
    """
    use = graph.only_use(node.output[0])
    if use is None or use.view is not graph or graph.op(use.node) != op_type:
        return node, ""
    weight = use.node.input[1 - use.index]
    shape = graph.shape(weight)
    if shape is None or list(shape[-len(dims) :]) != dims:
        return node, ""
    extra = shape[: -len(dims)]
    full = graph.shape(node.output[0])
    if extra and (graph.weight(weight) is None or set(extra) != {1}):
        return node, ""
    if full is None or len(shape) > len(full):
        return node, ""
    return use.node, weight


def _edit(
    graph: GraphView, end: NodeProto, found: Match, dims: list[int], weights: list[str]
) -> Edit:
    edit = Edit(graph, end, max_growth=MAX_GROWTH)
    if not weights[0]:
        if 4 * math.prod(dims) > MAX_GROWTH:
            raise Declined("it has no scale, and one would take many ones")
        weights[0] = edit.add_weight(np.ones(dims, np.float32), f"{end.output[0]}_scale")
    for index, name in enumerate(weights):
        shape = graph.shape(name) if name else None
        if shape is not None and len(shape) > len(dims):
            array = graph.array(name)
            assert array is not None
            weights[index] = edit.add_weight(array.reshape(dims), name)
    op_type = "LayerNormalization" if len(weights) == 2 else "RMSNormalization"
    settings = {"axis": -len(dims), "epsilon": found.number("epsilon")}
    inputs = weights if weights[-1] else weights[:-1]
    edit.rewrite(op_type, [found["x"], *inputs], settings)
    return edit


_MEAN = Op("ReduceMean", _X, check=keeps_dims, name="mean")
_CENTRED = Op("Sub", _X, _MEAN)

LAYER_NORM = Fusion(
    "LayerNormalization", 17, _normalized(_CENTRED), _layer_norm, telling=5
)
RMS_NORM = Fusion("RMSNormalization", 23, _normalized(_X), _rms_norm, telling=4)
