"""How operators compute on permuted data: the same values, in another order of axes.

A value in the layout `perm` is stored so that Transpose by `perm` gives what the model
means. A rule says what has to change in a node for it to work on such inputs, and in
which layout its outputs come then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from onnx import NodeProto

from onnxopt import attributes, axes
from onnxopt.axes import Perm
from onnxopt.graph import GraphView
from onnxopt.weights import Array


class Moved(msgspec.Struct, frozen=True):
    """A node that works on another layout."""

    data: tuple[int, ...]
    """The input slots that hold permuted values; the others stay as they are."""
    output: Perm
    """The layout of the outputs."""
    broadcasts: bool = False
    """Whether the data slots are broadcast to one another."""
    attrs: dict[str, Any] = msgspec.field(default_factory=dict)
    constants: dict[int, Array] = msgspec.field(default_factory=dict)
    """New constants for these input slots."""


Rule = Callable[[GraphView, NodeProto, Perm], Moved | None]


def moved(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    """How `node` works where its data is in the layout `perm`; None where not known."""
    rule = _RULES.get(graph.op(node))
    if rule is None or attributes.has_references(node):
        return None
    return rule(graph, node, perm)


def is_movable(graph: GraphView, node: NodeProto) -> bool:
    """Whether some rule is about the operator of `node`."""
    return graph.op(node) in _RULES


def _unary(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    return Moved((0,), perm)


def _per_tensor(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    """Quantization by one scale."""
    shape = graph.shape(node.input[1])
    return Moved((0,), perm) if shape in ((), (1,)) else None


def _elementwise(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    if graph.opset() < 8:
        return None  # older ones broadcast by attribute, or not at all
    return Moved(tuple(range(len(node.input))), perm, broadcasts=True)


def _axis(node: NodeProto, perm: Perm, default: int | None) -> int | None:
    """The one axis of `node`, counted from the front, as the model means it."""
    axis = attributes.get(node, "axis", default)
    found = None if axis is None else axes.normalize([axis], len(perm))
    return found[0] if found else None


def _concat(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    axis = _axis(node, perm, 1 if graph.opset() < 4 else None)
    if axis is None:
        return None
    return Moved(tuple(range(len(node.input))), perm, attrs={"axis": perm[axis]})


def _split(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    axis = _axis(node, perm, 0)
    if axis is None or graph.opset() < 2:
        return None
    return Moved((0,), perm, attrs={"axis": perm[axis]})


def _arg(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    axis = _axis(node, perm, 0)
    if axis is None:
        return None
    keep = attributes.get(node, "keepdims", 1)
    output = perm if keep else axes.without(perm, [axis])
    return Moved((0,), output, attrs={"axis": perm[axis]})


def _softmax(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    """Before opset 13 all axes from the given one on are one."""
    last = len(perm) - 1
    axis = _axis(node, perm, -1 if graph.opset() >= 13 else 1)
    if axis is None or (graph.opset() < 13 and not axis == perm[axis] == last):
        return None
    return Moved((0,), perm, attrs={"axis": perm[axis]})


def _gather(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    axis, indices = _axis(node, perm, 0), graph.shape(node.input[1])
    if axis is None or indices is None or len(indices) > 1:
        return None
    output = perm if indices else axes.without(perm, [axis])
    return Moved((0,), output, attrs={"axis": perm[axis]})


def _with_axes(
    graph: GraphView, node: NodeProto, slot: int, found: list[int], output: Perm
) -> Moved:
    """`node` with other axes, wherever it has them."""
    if attributes.find(node, "axes") is not None:
        return Moved((0,), output, attrs={"axes": found})
    return Moved((0,), output, constants={slot: np.array(found, np.int64)})


def _given_axes(
    graph: GraphView, node: NodeProto, rank: int, slot: int = 1
) -> list[int] | None:
    """Axes that are given, constant and not empty."""
    found = axes.axes_of(graph, node, slot)
    return axes.normalize(found, rank) if found else None


def _reduce(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    found = _given_axes(graph, node, len(perm))
    if found is None:
        return None
    keep = attributes.get(node, "keepdims", 1)
    output = perm if keep else axes.without(perm, found)
    return _with_axes(graph, node, 1, _mapped(perm, found), output)


def _squeeze(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    found = _given_axes(graph, node, len(perm))
    if found is None:
        return None
    output = axes.without(perm, found)
    return _with_axes(graph, node, 1, _mapped(perm, found), output)


def _unsqueeze(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    """The new axes come where they would; the others move around them."""
    given = axes.axes_of(graph, node)
    rank = len(perm) + len(given or ())
    found = axes.normalize(given, rank) if given else None
    if found is None:
        return None
    places = [axis for axis in range(rank) if axis not in found]
    rest = iter(places[source] for source in perm)
    output = tuple(axis if axis in found else next(rest) for axis in range(rank))
    return Moved((0,), output)


def _slice(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    if graph.opset() < 10:
        given = attributes.get(node, "axes") or range(len(attributes.get(node, "starts")))
        found = axes.normalize(given, len(perm))
        return Moved((0,), perm, attrs={"axes": _mapped(perm, found)}) if found else None
    starts = graph.array(node.input[1])
    if len(node.input) > 3 and node.input[3]:
        array = graph.array(node.input[3])
    else:
        array = None if starts is None else np.arange(starts.size).astype(starts.dtype)
    found = None if array is None else axes.normalize(array.tolist(), len(perm))
    if array is None or not found:
        return None
    return Moved((0,), perm, constants={3: np.array(_mapped(perm, found), array.dtype)})


def _mapped(perm: Perm, found: list[int]) -> list[int]:
    return [perm[axis] for axis in found]


def _pad(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    rank = len(perm)
    if len(node.input) > 3 and node.input[3]:
        array = graph.array(node.input[3])
        found = None if array is None else axes.normalize(array.tolist(), rank)
        if array is None or not found:
            return None
        return Moved(
            (0,), perm, constants={3: np.array(_mapped(perm, found), array.dtype)}
        )
    pads = attributes.get(node, "pads") if graph.opset() < 11 else None
    if graph.opset() >= 11:
        array = graph.array(node.input[1])
        pads = None if array is None else array.tolist()
    if pads is None or len(pads) != 2 * rank:
        return None
    back = axes.inverse(perm)
    both = [*axes.permuted(pads[:rank], back), *axes.permuted(pads[rank:], back)]
    if graph.opset() < 11:
        return Moved((0,), perm, attrs={"pads": both})
    return Moved((0,), perm, constants={1: np.array(both, np.int64)})


def _tile(graph: GraphView, node: NodeProto, perm: Perm) -> Moved | None:
    """Tile and Expand: one number for each axis."""
    array = graph.array(node.input[1])
    if array is None or array.size != len(perm) or graph.opset() < 6:
        return None
    sizes = axes.permuted(array.tolist(), axes.inverse(perm))
    return Moved((0,), perm, constants={1: np.array(sizes, np.int64)})


_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu "
    "Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish "
    "Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign "
    "Sqrt Swish Tan Tanh ThresholdedRelu"
)
_ELEMENTWISE = (
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less "
    "LessOrEqual Max Mean Min Mod Mul Or Pow PRelu Sub Sum Where Xor"
)
_REDUCE = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
    "ReduceProd ReduceSum ReduceSumSquare"
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCE.split(), _reduce),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _per_tensor),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("Tile", "Expand"), _tile),
    "Concat": _concat,
    "Gather": _gather,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
