"""Operators that only move or select elements, and so do the same to codes.

With D what DequantizeLinear does to each code and Q what QuantizeLinear does to each
value, op(D(q)) = D(op(q)) and Q(op(x)) = op(Q(x)) where every element of the result of
op is an element of its data, or a constant whose code is known (the 0 of Pad is the zero
point). MaxPool selects, too: D never falls from a code to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from onnx import NodeProto

from onnxopt import attributes, axes
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.quantization.parameters import EIGHT_BITS, SIXTEEN_BITS, Parameters
from onnxopt.weights import Array


class Carried(msgspec.Struct, frozen=True):
    """How an operator works on codes."""

    data: tuple[int, ...] = (0,)
    """The input slots that hold the codes; the others stay as they are."""
    axis: int | None = None
    """The axis of the scales in the result; None where there is one scale."""
    constants: dict[int, Array] = msgspec.field(default_factory=dict)
    """Constants for other slots, in place of those of floats."""


Rule = Callable[[GraphView, NodeProto, Parameters], Carried]


class _Carrier(msgspec.Struct, frozen=True):
    rule: Rule
    since: int = 10
    """Since which opset ONNX and ONNX Runtime have it for 8-bit codes."""
    wide: bool = True
    """Whether it takes 16-bit codes as well."""
    reshapes: bool = False
    """Whether it moves all elements and makes none: it can be done to a constant."""
    grows: bool = False
    """Whether its result can have more elements than its data."""


def operators() -> tuple[str, ...]:
    """The operators that can be carriers."""
    return tuple(_CARRIERS)


def is_carrier(graph: GraphView, node: NodeProto) -> bool:
    """Whether `node` is one of these operators, whatever its attributes."""
    return graph.op(node) in _CARRIERS


def reshapes(graph: GraphView, node: NodeProto) -> bool:
    """Whether the result of `node` has the elements of its data, each once."""
    return _CARRIERS[graph.op(node)].reshapes


def grows(graph: GraphView, node: NodeProto) -> bool:
    """Whether the result of `node` can have more elements than its data."""
    return _CARRIERS[graph.op(node)].grows


def takes(graph: GraphView, node: NodeProto, data_type: int) -> bool:
    """Whether ONNX and ONNX Runtime's CPU provider have `node` for codes of a type."""
    carrier = _CARRIERS[graph.op(node)]
    known = data_type in EIGHT_BITS or (carrier.wide and data_type in SIXTEEN_BITS)
    return known and graph.opset() >= carrier.since


def carried(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    """How `node` works on codes with the parameters `made` instead of on their values.

    Raises DeclinedError with the reason where it cannot.
    """
    if attributes.has_references(node):
        raise DeclinedError("the operator differs from call to call")
    if made.is_blocked:
        raise DeclinedError("the codes are in blocks, which would be torn")
    return _CARRIERS[graph.op(node)].rule(graph, node, made)


def _one_scale(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    if not made.is_per_tensor:
        raise DeclinedError(f"{node.op_type} moves codes from one scale to another")
    return Carried()


def _transpose(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    if made.is_per_tensor:
        return Carried()
    perm = axes.perm_of(graph, node)
    axis = None if perm is None else axes.normalize([made.axis], len(perm))
    if perm is None or axis is None:
        raise DeclinedError("the number of axes is not known")
    return Carried(axis=perm.index(axis[0]))


def _reshape(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    """The axis survives where the sizes before it have one product, and its own stays."""
    if made.is_per_tensor:
        return Carried()
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    if before is None or after is None:
        raise DeclinedError("the shape is not known, and scales follow an axis")
    old, new = _numbers(before), _numbers(after)
    if old is None or new is None:
        raise DeclinedError("the sizes are not known, and scales follow an axis")
    found = axes.normalize([made.axis], len(before))
    axis = None if found is None else _survivor(old, new, found[0])
    if axis is None:
        raise DeclinedError(f"the axis of the scales is lost from {before} to {after}")
    return Carried(axis=axis)


def _numbers(shape: Sequence[int | str | None]) -> list[int] | None:
    found = [dim for dim in shape if isinstance(dim, int)]
    return found if len(found) == len(shape) else None


def _survivor(before: list[int], after: list[int], axis: int) -> int | None:
    """The axis of `after` that holds what `axis` of `before` does."""
    outer = int(np.prod(before[:axis], dtype=np.int64))
    for place, size in enumerate(after):
        made = int(np.prod(after[:place], dtype=np.int64))
        if made == outer and size == before[axis]:
            return place
    return None


def _gather(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    """Scales along another axis than the one that indices are taken from."""
    if made.is_per_tensor:
        return Carried()
    shape, indices = graph.shape(node.input[0]), graph.shape(node.input[1])
    if shape is None or indices is None:
        raise DeclinedError("the number of axes is not known")
    both = (
        axes.normalize([made.axis], len(shape)),
        axes.normalize([attributes.get(node, "axis", 0)], len(shape)),
    )
    if both[0] is None or both[1] is None or both[0] == both[1]:
        raise DeclinedError("each index has a scale of its own")
    (axis,), (taken,) = both[0], both[1]
    return Carried(axis=axis if axis < taken else axis - 1 + len(indices))


def _max_pool(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    """No window may be all padding: that is the lowest number of the type."""
    if len(node.output) > 1:
        raise DeclinedError("MaxPool has indices only for floats")
    padded = any(attributes.get(node, "pads", ()))
    padded = padded or str(attributes.get(node, "auto_pad", "NOTSET")).startswith("SAME")
    dilated = any(step > 1 for step in attributes.get(node, "dilations", ()))
    if attributes.get(node, "ceil_mode", 0) or (padded and dilated):
        raise DeclinedError("a window of the MaxPool may be all padding")
    return _one_scale(graph, node, made)


def _concat(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    return msgspec.structs.replace(
        _one_scale(graph, node, made), data=tuple(range(len(node.input)))
    )


def _pad(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    """By 0, whose code is the zero point, or by elements of the data."""
    plain = _one_scale(graph, node, made)
    if attributes.get(node, "mode", "constant") != "constant":
        return plain
    if len(node.input) > 2 and node.input[2]:
        value = graph.array(node.input[2])
        if value is None or value.size != 1 or value.reshape(()) != 0:
            raise DeclinedError("it pads by something else than 0")
    return msgspec.structs.replace(plain, constants={2: made.zero_point.reshape(())})


def _resize(graph: GraphView, node: NodeProto, made: Parameters) -> Carried:
    """To the nearest element; beyond the borders there is none."""
    plain = _one_scale(graph, node, made)
    if attributes.get(node, "mode", "nearest") != "nearest":
        raise DeclinedError("Resize computes new values")
    beyond = attributes.get(node, "coordinate_transformation_mode", "")
    if beyond == "tf_crop_and_resize":
        raise DeclinedError("Resize may extrapolate")
    return plain


_CARRIERS: dict[str, _Carrier] = {
    "Concat": _Carrier(_concat),
    "DepthToSpace": _Carrier(_one_scale, since=11, wide=False),
    "Expand": _Carrier(_one_scale, grows=True),
    "Flatten": _Carrier(_reshape, reshapes=True),
    "Gather": _Carrier(_gather),
    "GatherElements": _Carrier(_one_scale, since=11),
    "GatherND": _Carrier(_one_scale, since=11),
    "MaxPool": _Carrier(_max_pool, since=12, wide=False),
    "Pad": _Carrier(_pad, since=11, wide=False, grows=True),
    "Reshape": _Carrier(_reshape, reshapes=True),
    "Resize": _Carrier(_resize, since=11, wide=False, grows=True),
    "Slice": _Carrier(_one_scale),
    "SpaceToDepth": _Carrier(_one_scale, wide=False),
    "Split": _Carrier(_one_scale),
    "Squeeze": _Carrier(_reshape, reshapes=True),
    "Tile": _Carrier(_one_scale, grows=True),
    "Transpose": _Carrier(_transpose, reshapes=True),
    "Unsqueeze": _Carrier(_reshape, reshapes=True),
}
