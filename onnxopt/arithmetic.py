"""Constant arithmetic in NumPy, with the semantics of each operator's version.

It serves the shape computations that exporters leave behind (Shape, Gather, Concat,
Slice...), and weights that are only moved or scaled (Transpose, Reshape, Mul...): a
session costs more than most of them. Only operations whose result is exact and the same
everywhere are here, those on floats being the ones that IEEE 754 rounds correctly; the
rest is ONNX Runtime's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxopt import attributes
from onnxopt.weights import Array

Inputs = Sequence[Array | None]
Rule = Callable[[NodeProto, Any, int], Array]
"""(node, inputs, opset) -> its output; raises Unsupported where it is not sure."""

MAX_ELEMENTS = 1024
_CASTABLE = {
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.BOOL,
}


class Unsupported(Exception):  # noqa: N818 - says "not by me", and another evaluator is asked
    """The table has no certain answer."""


_MOVES = {"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""What hands all elements of its first input on."""


def evaluate(
    node: NodeProto, inputs: Inputs, opset: int, most: int = MAX_ELEMENTS
) -> Array | None:
    """The value of the one output of `node`; None where this table does not know it.

    `inputs` are arrays in slot order, None for an absent optional input; no array may
    have more than `most` elements.
    """
    rule = _RULES.get(node.op_type)
    if rule is None or len(node.output) != 1:
        return None
    if any(array is not None and array.size > most for array in inputs):
        return None
    if not _are_computable(node, inputs):
        return None
    try:
        with np.errstate(all="ignore"):
            result = np.asarray(rule(node, inputs, opset))
    except (Unsupported, ValueError, IndexError, TypeError, AttributeError):
        return None  # ill-formed for NumPy: whoever runs the model will say why
    return result if result.size <= most else None


def _are_computable(node: NodeProto, inputs: Inputs) -> bool:
    """Numbers and truths that NumPy has itself; what only moves may be of any type."""
    kinds = "iufbV" if node.op_type in _MOVES else "iufb"
    return all(array is None or array.dtype.kind in kinds for array in inputs)


def move(node: NodeProto, inputs: Inputs, opset: int) -> Array | None:
    """What an operator that only moves elements makes of arrays of objects; or None."""
    if node.op_type not in ("Gather", "Slice"):
        return None
    rule = _RULES[node.op_type]
    try:
        # indices are numbers again
        rest = [None if item is None else item.astype(np.int64) for item in inputs[1:]]
        return np.asarray(rule(node, [inputs[0], *rest], opset), dtype=object)
    except (Unsupported, ValueError, IndexError, TypeError):
        return None


def _require(condition: bool) -> None:
    if not condition:
        raise Unsupported


def _binary(function: Callable[..., Any]) -> Rule:
    def rule(node: NodeProto, inputs: Any, opset: int) -> Array:
        _require(opset >= 7)  # older ones broadcast by attribute
        left, right = inputs
        _require(left.dtype == right.dtype)
        return np.asarray(function(left, right))

    return rule


def _arithmetic(function: Callable[..., Any]) -> Rule:
    binary = _binary(function)

    def rule(node: NodeProto, inputs: Any, opset: int) -> Array:
        return binary(node, inputs, opset).astype(inputs[0].dtype)

    return rule


def _div(node: NodeProto, inputs: Any, opset: int) -> Array:
    _require(opset >= 7)
    left, right = inputs
    if left.dtype.kind == "f":
        return np.asarray(left / right)
    _require_divisible(left, right)
    quotient = left // right  # rounds down, while the operator rounds towards zero
    is_below = (left % right != 0) & ((left < 0) != (right < 0))
    return np.asarray(quotient + is_below.astype(left.dtype))


def _require_divisible(left: Array, right: Array) -> None:
    """No division that the processor traps: by zero, or of the least integer by -1."""
    _require(left.dtype == right.dtype and bool(np.all(right != 0)))
    if left.dtype.kind == "i":
        overflows = (left == np.iinfo(left.dtype).min) & (right == -1)
        _require(not bool(np.any(overflows)))


def _mod(node: NodeProto, inputs: Any, opset: int) -> Array:
    left, right = inputs
    _require(left.dtype.kind in "iu")
    _require_divisible(left, right)
    modulo = np.fmod if attributes.get(node, "fmod", 0) else np.mod
    return np.asarray(modulo(left, right))


def _exact(function: Callable[..., Any]) -> Rule:
    """On the floats that IEEE 754 rounds correctly, and processors as it says."""

    def rule(node: NodeProto, inputs: Any, opset: int) -> Array:
        _require(inputs[0].dtype in (np.float32, np.float64))
        return np.asarray(function(inputs[0]), dtype=inputs[0].dtype)

    return rule


def _unary(function: Callable[..., Any]) -> Rule:
    def rule(node: NodeProto, inputs: Any, opset: int) -> Array:
        return np.asarray(function(inputs[0]))

    return rule


def _not(node: NodeProto, inputs: Any, opset: int) -> Array:
    return np.asarray(np.logical_not(inputs[0]))


def _cast(node: NodeProto, inputs: Any, opset: int) -> Array:
    kind = attributes.get(node, "to")
    _require(kind in _CASTABLE)
    array, dtype = inputs[0], helper.tensor_dtype_to_np_dtype(kind)
    if array.dtype.kind == "f" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        inside = np.isfinite(array) & (array >= limits.min) & (array < limits.max)
        _require(bool(np.all(inside)))  # outside, the result is the processor's
    return np.asarray(array.astype(dtype))


def _concat(node: NodeProto, inputs: Any, opset: int) -> Array:
    _require(all(array.dtype == inputs[0].dtype for array in inputs))
    return np.asarray(np.concatenate(inputs, axis=attributes.get(node, "axis", 1)))


def _gather(node: NodeProto, inputs: Any, opset: int) -> Array:
    return np.asarray(np.take(inputs[0], inputs[1], axis=attributes.get(node, "axis", 0)))


def _gather_nd(node: NodeProto, inputs: Any, opset: int) -> Array:
    data, indices = inputs
    _require(not attributes.get(node, "batch_dims", 0))
    return np.asarray(data[tuple(np.moveaxis(indices, -1, 0))])


def _axes(node: NodeProto, inputs: Any, slot: int = 1) -> tuple[int, ...] | None:
    """Axes from the attribute (old opsets) or from an input; None where not given."""
    axes = attributes.get(node, "axes")
    if axes is None and len(inputs) > slot and inputs[slot] is not None:
        axes = inputs[slot].tolist()
    return None if axes is None else tuple(int(axis) for axis in axes)


def _squeeze(node: NodeProto, inputs: Any, opset: int) -> Array:
    axes = _axes(node, inputs)
    _require(axes != ())  # does an empty list mean none of the axes, or all?
    return np.asarray(np.squeeze(inputs[0], axis=axes))


def _unsqueeze(node: NodeProto, inputs: Any, opset: int) -> Array:
    axes = _axes(node, inputs)
    _require(axes is not None)
    return np.expand_dims(inputs[0], axis=axes or ())


def _slice(node: NodeProto, inputs: Any, opset: int) -> Array:
    array = inputs[0]
    if opset < 10:
        starts, ends = attributes.get(node, "starts"), attributes.get(node, "ends")
        axes, steps = attributes.get(node, "axes"), None
    else:
        rest = [None if item is None else item.tolist() for item in inputs[1:]]
        starts, ends, axes, steps = rest + [None] * (4 - len(rest))
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index: list[slice] = [slice(None)] * array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # as the end of a step backwards, the largest integer means different things
        _require(step > 0 or end < 2**31 - 1)
        if step < 0:
            # what is before the first element counts as the first, as a start
            start = max(start, -array.shape[axis])
            end = None if end < -array.shape[axis] else end
        index[axis] = slice(start, end, step)
    return np.asarray(array[tuple(index)])


def _reshape(node: NodeProto, inputs: Any, opset: int) -> Array:
    array, dims = inputs[0], [int(dim) for dim in inputs[1]]
    if not attributes.get(node, "allowzero", 0):
        dims = [array.shape[i] if dim == 0 else dim for i, dim in enumerate(dims)]
    return np.reshape(array, dims)


def _shape(node: NodeProto, inputs: Any, opset: int) -> Array:
    start, end = attributes.get(node, "start", 0), attributes.get(node, "end")
    return np.array(inputs[0].shape[start:end], dtype=np.int64)


def _constant_of_shape(node: NodeProto, inputs: Any, opset: int) -> Array:
    dims = [int(dim) for dim in inputs[0]]
    _require(int(np.prod(dims, dtype=object)) <= MAX_ELEMENTS)
    value = attributes.get(node, "value")
    if value is None:
        return np.zeros(dims, np.float32)
    from onnx import numpy_helper

    return np.full(
        dims, numpy_helper.to_array(value).item(), numpy_helper.to_array(value).dtype
    )


def _range(node: NodeProto, inputs: Any, opset: int) -> Array:
    start, limit, delta = (array.item() for array in inputs)
    _require(inputs[0].dtype.kind == "i" and delta != 0)
    _require(abs(limit - start) // abs(delta) <= MAX_ELEMENTS)
    return np.arange(start, limit, delta, dtype=inputs[0].dtype)


def _expand(node: NodeProto, inputs: Any, opset: int) -> Array:
    array, dims = inputs[0], tuple(int(dim) for dim in inputs[1])
    return np.broadcast_to(array, np.broadcast_shapes(array.shape, dims))  # a view


def _where(node: NodeProto, inputs: Any, opset: int) -> Array:
    condition, left, right = inputs
    _require(left.dtype == right.dtype)
    return np.asarray(np.where(condition, left, right))


def _transpose(node: NodeProto, inputs: Any, opset: int) -> Array:
    return np.transpose(inputs[0], attributes.get(node, "perm"))


def _reduce(function: Callable[..., Any]) -> Rule:
    def rule(node: NodeProto, inputs: Any, opset: int) -> Array:
        array, axes = inputs[0], _axes(node, inputs)
        _require(array.dtype.kind in "iu")  # sums of floats depend on their order
        if not axes and attributes.get(node, "noop_with_empty_axes", 0):
            return np.asarray(array)
        keep = bool(attributes.get(node, "keepdims", 1))
        _require_no_overflow(node.op_type, array)
        result = np.asarray(function(array, axis=axes or None, keepdims=keep))
        return result.astype(array.dtype)

    return rule


def _require_no_overflow(op_type: str, array: Array) -> None:
    """ONNX Runtime's sums and products of integers saturate; the table's would wrap.

    It adds and multiplies int64 by way of doubles, which round from 2**53 on.
    """
    _require(array.size <= MAX_ELEMENTS)
    sizes = [abs(int(item)) for item in array.flat]
    most = {"ReduceSum": sum(sizes), "ReduceProd": math.prod(item or 1 for item in sizes)}
    _require(most.get(op_type, 0) <= min(np.iinfo(array.dtype).max, 1 << 53))


def _extreme(function: Callable[..., Any]) -> Rule:
    def rule(node: NodeProto, inputs: Any, opset: int) -> Array:
        result = inputs[0]
        for array in inputs[1:]:
            _require(array.dtype == result.dtype and array.dtype.kind in "iu")
            result = function(result, array)
        return np.asarray(result)

    return rule


def _flat_size(node: NodeProto, inputs: Any, opset: int) -> Array:
    return np.array(inputs[0].size, dtype=np.int64)


_RULES: dict[str, Rule] = {
    "Add": _arithmetic(np.add),
    "Sub": _arithmetic(np.subtract),
    "Mul": _arithmetic(np.multiply),
    "Div": _div,
    "Mod": _mod,
    "Equal": _binary(np.equal),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "And": _binary(np.logical_and),
    "Or": _binary(np.logical_or),
    "Not": _not,
    "Neg": _unary(np.negative),
    "Abs": _unary(np.abs),
    "Floor": _unary(np.floor),
    "Ceil": _unary(np.ceil),
    "Identity": _unary(np.asarray),
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Max": _extreme(np.maximum),
    "Min": _extreme(np.minimum),
    "Range": _range,
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reciprocal": _exact(lambda array: 1 / array),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _flat_size,
    "Slice": _slice,
    "Sqrt": _exact(np.sqrt),
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
