"""Scales and zero points: reading those of a node, comparing, and writing new nodes.

A QuantizeLinear and a DequantizeLinear have the same parameters, `Parameters` here, and
passes that move, make or remove such nodes see them through this module alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.weights import Array

LINEAR = ("QuantizeLinear", "DequantizeLinear")

_FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4)
_TWO_BITS = (TensorProto.INT2, TensorProto.UINT2)
SIXTEEN_BITS = frozenset({TensorProto.INT16, TensorProto.UINT16})
EIGHT_BITS = frozenset({TensorProto.INT8, TensorProto.UINT8})
_FLOAT8 = (
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
)
_FLOAT_CODES = (*_FLOAT8, TensorProto.FLOAT4E2M1)
_SINCE: dict[int, int] = {
    **dict.fromkeys(EIGHT_BITS, 10),
    TensorProto.INT32: 10,
    **dict.fromkeys(_FLOAT8, 19),
    **dict.fromkeys((*_FOUR_BITS, *SIXTEEN_BITS), 21),
    TensorProto.FLOAT4E2M1: 23,
    **dict.fromkeys(_TWO_BITS, 25),
}
"""Since which opset DequantizeLinear takes codes of a type (INT32: no zero point)."""

PER_AXIS_SINCE = 13
BLOCKED_SINCE = 21


class Parameters(msgspec.Struct, frozen=True, eq=False):
    """The constant scale and zero point of a QuantizeLinear or DequantizeLinear.

    `scale` and `zero_point` have the same shape: () per tensor, [channels] along `axis`,
    or the shape of the value with `axis` divided into blocks of `block_size`. The
    dtype of `zero_point` is that of the codes, `data_type` its number in ONNX; where the
    node has none it is zeros. `axis` is as the node has it (it may be negative).
    """

    scale: Array
    zero_point: Array
    axis: int = 1
    block_size: int = 0

    @property
    def data_type(self) -> int:
        """The type of the codes, a TensorProto.DataType."""
        return int(helper.np_dtype_to_tensor_dtype(self.zero_point.dtype))

    @property
    def is_per_tensor(self) -> bool:
        """Whether all elements share one scale."""
        return self.scale.ndim == 0

    @property
    def is_blocked(self) -> bool:
        """Whether the scale varies along `axis` in blocks, and along all other axes."""
        return self.block_size > 0

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest code; raises DeclinedError where codes are floats."""
        return code_limits(self.data_type)

    def equals(self, other: Parameters, rank: int | None = None) -> bool:
        """Whether the same codes mean the same values, to the bit.

        `rank`: that of the value, which tells axis -1 from the last one.
        """
        return (
            _same(self.scale, other.scale)
            and _same(self.zero_point, other.zero_point)
            and self.block_size == other.block_size
            and (self.is_per_tensor or self._axis(rank) == other._axis(rank))
        )

    def _axis(self, rank: int | None) -> int:
        return self.axis % rank if rank else self.axis

    def dequantized(self, codes: Array) -> Array:
        """The values of `codes` as DequantizeLinear computes them.

        (code - zero point) exactly, then one product in the type of the scale; codes that
        are floats have no zero point.
        """
        scale = self.spread(self.scale, codes.shape)
        if self.data_type in _FLOAT_CODES:
            return np.asarray(codes.astype(scale.dtype) * scale)
        zero = self.spread(self.zero_point.astype(np.int64), codes.shape)
        whole = codes.astype(np.int64) - zero
        return np.asarray(whole.astype(scale.dtype) * scale)

    def spread(self, numbers: Array, shape: Sequence[int]) -> Array:
        """A scale, zero point or the like, as it broadcasts to a value of `shape`."""
        if self.is_blocked:
            axis = self.axis % len(shape)
            wide = np.repeat(numbers, self.block_size, axis)
            return wide.take(np.arange(shape[axis]), axis)
        if numbers.ndim == 0:
            return numbers
        dims = [1] * len(shape)
        dims[self.axis] = -1
        return numbers.reshape(dims)


def code_limits(data_type: int) -> tuple[int, int]:
    """The least and the largest code of an integer type; raises DeclinedError."""
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    if data_type in _FLOAT_CODES:
        raise DeclinedError("its codes are floats")
    iinfo: Any = ml_dtypes.iinfo
    return int(iinfo(dtype).min), int(iinfo(dtype).max)


def is_int8_quantizer(graph: GraphView, node: NodeProto) -> bool:
    """Whether `node` makes int8 codes.

    On x86 ONNX Runtime runs int8 activations as uint8, which it makes of a QuantizeLinear
    with one DequantizeLinear right behind it: codes of several readers stay int8, and
    nothing there fuses.
    """
    is_quantizer = graph.op(node) == "QuantizeLinear"
    return is_quantizer and graph.dtype(node.output[0]) == TensorProto.INT8


def parameters(graph: GraphView, node: NodeProto) -> Parameters:
    """Those of `node`, a QuantizeLinear or DequantizeLinear.

    Raises DeclinedError where they are not constants, or what they mean is not certain:
    a scale that is not positive and finite, shapes that do not match.
    """
    if attributes.has_references(node):
        raise DeclinedError("its attributes differ from call to call")
    scale = graph.array(node.input[1])
    if scale is None:
        raise DeclinedError(f"scale {node.input[1]!r} is not a constant")
    return _checked(node, scale, _zero_point(graph, node, scale))


def are_alike(graph: GraphView, one: NodeProto, other: NodeProto) -> bool:
    """Whether two nodes of one operator make the same of the same value.

    False where their parameters are not known.
    """
    if _settings_of(one) != _settings_of(other):
        return False
    shape = graph.shape(one.input[0])
    rank = None if shape is None else len(shape)
    try:
        return parameters(graph, one).equals(parameters(graph, other), rank)
    except DeclinedError:
        return False


def _settings_of(node: NodeProto) -> list[bytes]:
    """Its attributes but for the axis, whose numbers from either end are the same."""
    return sorted(
        item.SerializeToString(deterministic=True)
        for item in node.attribute
        if item.name != "axis"
    )


def _checked(node: NodeProto, scale: Array, zero: Array) -> Parameters:
    if scale.size == 1 and scale.ndim <= 1 and scale.shape != zero.shape:
        scale, zero = scale.reshape(()), zero.reshape(())
    if scale.shape != zero.shape:
        raise DeclinedError("its scale and zero point differ in shape")
    block = int(attributes.get(node, "block_size", 0))
    if not block and scale.ndim > 1:
        raise DeclinedError(f"its scale is of rank {scale.ndim}")
    if not block and scale.size == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    numbers = scale.astype(np.float64)
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise DeclinedError("its scale is not positive and finite")
    return Parameters(scale, zero, int(attributes.get(node, "axis", 1)), block)


def symmetric(graph: GraphView, node: NodeProto, data_type: int) -> Parameters:
    """Those of `node` with codes of a type that the node itself does not say."""
    scale = graph.array(node.input[1])
    if scale is None:
        raise DeclinedError(f"scale {node.input[1]!r} is not a constant")
    zero = np.zeros(scale.shape, helper.tensor_dtype_to_np_dtype(data_type))
    return _checked(node, scale, zero)


def _zero_point(graph: GraphView, node: NodeProto, scale: Array) -> Array:
    """The zero point, which also names the type of the codes."""
    if len(node.input) > 2 and node.input[2]:
        zero = graph.array(node.input[2])
        if zero is None:
            raise DeclinedError(f"zero point {node.input[2]!r} is not a constant")
        return zero
    if node.op_type == "QuantizeLinear":
        kind = attributes.get(node, "output_dtype", 0) or TensorProto.UINT8
    else:
        found = graph.dtype(node.input[0])
        if found is None:
            raise DeclinedError("the type of its codes is not known")
        kind = found
    return np.zeros(scale.shape, helper.tensor_dtype_to_np_dtype(kind))


def missing(graph: GraphView, made: Parameters) -> str | None:
    """Why the model's opset has no DequantizeLinear with these parameters, or None."""
    needed = _SINCE.get(made.data_type)
    if needed is None:
        kind = TensorProto.DataType.Name(made.data_type).lower()
        return f"DequantizeLinear takes no {kind}"
    if made.scale.dtype != np.float32:
        needed = max(needed, 19)
    if not made.is_per_tensor:
        needed = max(needed, BLOCKED_SINCE if made.is_blocked else PER_AXIS_SINCE)
    if graph.opset() < needed:
        return f"it needs opset {needed}, and the model has {graph.opset()}"
    return None


def insert(
    edit: Edit, op_type: str, value: str, made: Parameters, outputs: int | list[str] = 1
) -> str:
    """Add a QuantizeLinear or DequantizeLinear of `value`; returns its output's name.

    `missing` is to be asked before.
    """
    inputs, attrs = operands(edit, value, made)
    return edit.insert(op_type, inputs, outputs, attrs)[0]


def operands(
    edit: Edit, value: str, made: Parameters
) -> tuple[list[str], dict[str, int | None]]:
    """Inputs and attributes of such a node; its constants are added by the edit."""
    scale = edit.add_weight(made.scale, f"{value}_scale")
    zero = edit.add_weight(made.zero_point, f"{value}_zero_point")
    return [value, scale, zero], settings(made)


def quantized_result(
    graph: GraphView, maker: NodeProto, value: str, made: Parameters
) -> Edit:
    """Quantize `value`, an output of `maker`, for all who read it; it keeps its name."""
    edit = Edit(graph, maker)
    plain = graph.fresh(f"{value}_float")
    edit.divert(maker, list(maker.output).index(value), plain)
    inputs, attrs = operands(edit, plain, made)
    codes = edit.insert("QuantizeLinear", inputs, 1, attrs)
    edit.insert("DequantizeLinear", [*codes, *inputs[1:]], [value], attrs)
    return edit


def settings(made: Parameters) -> dict[str, int | None]:
    """The attributes of such a node."""
    return {
        "axis": None if made.is_per_tensor else made.axis,
        "block_size": made.block_size or None,
    }


class IntegerWeight(msgspec.Struct, frozen=True, eq=False):
    """A constant of codes and the DequantizeLinear that reads it."""

    node: NodeProto
    codes: TensorProto
    parameters: Parameters

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes and of the values."""
        return tuple(self.codes.dims)


def integer_weight(graph: GraphView, name: str) -> IntegerWeight:
    """The weight whose values are `name`; raises DeclinedError with the reason."""
    node = graph.producer(name)
    if node is None or graph.op(node) != "DequantizeLinear":
        raise DeclinedError(f"{name!r} is not made by DequantizeLinear")
    codes = graph.weight(node.input[0])
    if codes is None:
        raise DeclinedError(f"{node.input[0]!r} is not a constant")
    made = parameters(graph, node)
    _check_fits(tuple(codes.dims), made)
    return IntegerWeight(node, codes, made)


def _check_fits(shape: tuple[int, ...], made: Parameters) -> None:
    """Whether the parameters fit a value of that shape."""
    if made.is_per_tensor:
        return
    rank = len(shape)
    if not -rank <= made.axis < rank:
        raise DeclinedError(f"axis {made.axis} is not one of a value of rank {rank}")
    wanted = list(shape)
    if made.is_blocked:
        wanted[made.axis] = math.ceil(shape[made.axis] / made.block_size)
        fits = list(made.scale.shape) == wanted
    else:
        fits = made.scale.size == shape[made.axis]
    if not fits:
        raise DeclinedError(f"its scale {made.scale.shape} does not fit shape {shape}")


def _same(first: Array, second: Array) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and first.tobytes() == second.tobytes()
    )
