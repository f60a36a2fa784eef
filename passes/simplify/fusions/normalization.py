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
4. Also x * f + (beta - mean * f) with f = gamma / Sqrt(...), as TensorFlow writes it.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.operands import reduced_axes
from onnxopt.passes.simplify.fusions.fusion import Fusion, check_float32, check_shape
from onnxopt.passes.simplify.fusions.reductions import keeps_dims
from onnxopt.pattern import Constant, Either, Match, Op, Pattern, Value

MAX_GROWTH = 4096
"""How many bytes of ones (scales that a model does not have) an operator is worth."""

_X = Value("x")


def _shifted(value: Pattern) -> Pattern:
    """The mean of the squares of `value`, plus epsilon."""
    square = Either(Op("Pow", value, Constant(2.0)), Op("Mul", value, value))
    variance = Op("ReduceMean", square, check=keeps_dims, name="variance")
    return Op("Add", variance, Constant(name="epsilon"))


def _root(value: Pattern) -> Pattern:
    return Either(Op("Sqrt", value), Op("Pow", value, Constant(0.5)))


def _inverse_root(value: Pattern) -> Pattern:
    root = _root(value)
    return Either(
        Op("Reciprocal", root),
        Op("Div", Constant(1.0), root),
        Op("Pow", value, Constant(-0.5)),
    )


def _normalized(value: Pattern) -> tuple[Pattern, ...]:
    """`value` over the root of the mean of its squares plus epsilon."""
    shifted = _shifted(value)
    return Op("Div", value, _root(shifted)), Op("Mul", _inverse_root(shifted), value)


def _layer_norm(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    _check_same_axes(graph, found)
    dims = _last_dims(graph, found)
    end, gamma = _behind(graph, node, "Mul", dims)
    end, beta = _behind(graph, end, "Add", dims)
    return _edit(graph, end, found, dims, [gamma, beta])


def _rms_norm(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    dims = _last_dims(graph, found)
    end, gamma = _behind(graph, node, "Mul", dims)
    return _edit(graph, end, found, dims, [gamma])


def _folded_layer_norm(graph: GraphView, node: NodeProto, found: Match) -> Edit:
    _check_same_axes(graph, found)
    dims, weights = _last_dims(graph, found), [found["gamma"], found["beta"]]
    if not all(_is_per_element(graph, w, dims, found["x"]) for w in weights):
        raise DeclinedError("its scale or shift is not one per element")
    return _edit(graph, node, found, dims, weights)


def _check_same_axes(graph: GraphView, found: Match) -> None:
    axes = [reduced_axes(graph, found.maker(name)) for name in ("mean", "variance")]
    if axes[0] != axes[1]:
        raise DeclinedError("mean and variance are over different axes")


def _last_dims(graph: GraphView, found: Match) -> list[int]:
    """The sizes of the axes that are normalized, which must be the last ones."""
    check_float32(graph, found["x"])
    check_shape(found, "x")
    axes, shape = reduced_axes(graph, found.maker("variance")), graph.shape(found["x"])
    if axes is None or shape is None:
        raise DeclinedError("its axes, or the rank of its input, are not known")
    rank = len(shape)
    places = sorted(axis % rank for axis in axes)
    if places != list(range(rank - len(places), rank)):
        raise DeclinedError("it does not normalize the last axes")
    dims = [dim for dim in shape[places[0] :] if isinstance(dim, int) and dim > 0]
    if len(dims) != len(places):
        raise DeclinedError("the sizes of the normalized axes are not known")
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
    is_one = _is_per_element(graph, weight, dims, node.output[0])
    return (use.node, weight) if is_one else (node, "")


def _is_per_element(graph: GraphView, weight: str, dims: list[int], value: str) -> bool:
    """Whether `weight` has the dims `dims`, with 1s before them if it is a constant."""
    shape, full = graph.shape(weight), graph.shape(value)
    if shape is None or full is None or len(shape) > len(full):
        return False
    rest, last = shape[: -len(dims)], shape[-len(dims) :]
    movable = not rest or graph.weight(weight) is not None
    return list(last) == dims and movable and set(rest) <= {1}


def _edit(
    graph: GraphView, end: NodeProto, found: Match, dims: list[int], weights: list[str]
) -> Edit:
    edit = Edit(graph, end, max_growth=MAX_GROWTH)
    if not weights[0]:
        if 4 * math.prod(dims) > MAX_GROWTH:
            raise DeclinedError("it has no scale, and one would take many ones")
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
_FACTOR = Op("Mul", _inverse_root(_shifted(_CENTRED)), Value("gamma"))
_SHIFT = Op("Sub", Value("beta"), Op("Mul", _FACTOR, _MEAN))
FOLDED_LAYER_NORM = Fusion(
    "LayerNormalization",
    17,
    (Op("Add", Op("Mul", _FACTOR, _X), _SHIFT),),
    _folded_layer_norm,
    telling=6,
)
RMS_NORM = Fusion("RMSNormalization", 23, _normalized(_X), _rms_norm, telling=4)
