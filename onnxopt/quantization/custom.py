"""Quantizers of other domains, as the functions that their authors publish.

- QONNX and Brevitas: Quant (IntQuant), (round(clip(x / s + z)) - z) * s.
  https://github.com/fastmachinelearning/qonnx/tree/main/docs/qonnx-custom-ops
- TensorFlow: FakeQuantWithMinMaxArgs, -Vars and -VarsPerChannel, with the range nudged so
  that 0 is a level, and rounding to the upper of two.
  https://www.tensorflow.org/api_docs/python/tf/quantization/fake_quant_with_min_max_args

Both are of float32 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.quantization.staircase import Floats32, Step
from onnxopt.weights import Array

_QONNX = ("qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas")
_TENSORFLOW = ("ai.onnx.converters.tensorflow", "tensorflow", "tf")
_ONE_WAY = {
    "BipolarQuant": "it has two levels, neither of which is zero",
    "Trunc": "it drops digits of codes that it does not scale",
    "FloatQuant": "its codes are floats",
}
MAX_BITS = 16


class CustomQuantizer(msgspec.Struct, frozen=True, eq=False):
    """A function of the first input: `steps` on [channels, values], by one `scale`.

    `scale` is [channels, 1] or [1, 1], and `axis`, counted from behind, that of the
    channels; None where they all are alike.
    """

    steps: tuple[Step, ...]
    scale: Floats32
    axis: int | None


def operators() -> list[str]:
    """All that `read` reads, or knows a reason for, as GraphView.op names them."""
    names = [f"{domain}::{op}" for domain in _QONNX for op in (*_QUANT, *_ONE_WAY)]
    return names + [f"{domain}::{op}" for domain in _TENSORFLOW for op in _FAKE_QUANT]


def read(graph: GraphView, node: NodeProto) -> CustomQuantizer:
    """What `node`, one of `operators`, computes; raises DeclinedError."""
    if attributes.has_references(node):
        raise DeclinedError("its attributes differ from call to call")
    reason = _ONE_WAY.get(node.op_type)
    if reason is not None:
        raise DeclinedError(reason)
    return {**_QUANT, **_FAKE_QUANT}[node.op_type](graph, node)


def _operand(graph: GraphView, node: NodeProto, slot: int) -> Array:
    if slot >= len(node.input) or not node.input[slot]:
        raise DeclinedError(f"its input {slot} is absent")
    array = graph.array(node.input[slot])
    if array is None:
        raise DeclinedError(f"{node.input[slot]!r} is not a constant")
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all() or not array.size:
        raise DeclinedError(f"{node.input[slot]!r} is not finite")
    return array


def _axis(arrays: Sequence[Array]) -> int | None:
    """The axis, from behind, along which they vary."""
    found = {
        axis - array.ndim
        for array in arrays
        for axis, size in enumerate(array.shape)
        if size != 1
    }
    if len(found) > 1:
        raise DeclinedError("its parameters vary along several axes")
    return found.pop() if found else None


def _column(array: Array) -> Floats32:
    return np.asarray(array.reshape(-1, 1), np.float32)


# ---- QONNX ----


def _half_up(values: Floats32) -> Floats32:
    return np.copysign(np.floor(np.abs(values) + np.float32(0.5)), values)


def _half_down(values: Floats32) -> Floats32:
    return np.copysign(np.ceil(np.abs(values) - np.float32(0.5)), values)


def _up(values: Floats32) -> Floats32:
    return np.copysign(np.ceil(np.abs(values)), values)


_ROUNDINGS: dict[str, Step] = {
    "ROUND": np.rint,
    "HALF_EVEN": np.rint,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "UP": _up,
    "DOWN": np.trunc,
    "ROUND_TO_ZERO": np.trunc,
    "HALF_UP": _half_up,
    "HALF_DOWN": _half_down,
}


_SWITCHES = (("signed", 1), ("narrow", 0))


def _quant(graph: GraphView, node: NodeProto) -> CustomQuantizer:
    scale, zero, bits = (_operand(graph, node, slot) for slot in (1, 2, 3))
    if not (scale > 0).all():
        raise DeclinedError("its scale is not positive")
    mode = str(attributes.get(node, "rounding_mode", "ROUND")).upper()
    rounding = _ROUNDINGS.get(mode)
    if rounding is None:
        raise DeclinedError(f"its rounding mode {mode} is not known")
    width = _width(bits)
    signed, narrow = (bool(attributes.get(node, *item)) for item in _SWITCHES)
    low, high = _limits(width, signed, narrow)
    factor, shift = _column(scale), _column(zero)
    steps: tuple[Step, ...] = (
        lambda values: values / factor,
        lambda values: values + shift,
        lambda values: np.minimum(np.maximum(values, low), high),
        rounding,
        lambda values: values - shift,
        lambda values: values * factor,
    )
    return CustomQuantizer(steps, factor, _axis([scale, zero]))


def _width(bits: Array) -> int:
    if bits.size != 1 or bits.reshape(-1)[0] != int(bits.reshape(-1)[0]):
        raise DeclinedError("its bit width is not one whole number")
    width = int(bits.reshape(-1)[0])
    if not 2 <= width <= MAX_BITS:
        raise DeclinedError(f"no type of code has {width} bits")
    return width


def _limits(width: int, signed: bool, narrow: bool) -> tuple[np.float32, np.float32]:
    if signed:
        top = 2 ** (width - 1)
        return np.float32(narrow - top), np.float32(top - 1)
    return np.float32(0), np.float32(2**width - 1 - narrow)


_QUANT: dict[str, Callable[[GraphView, NodeProto], CustomQuantizer]] = {
    "Quant": _quant,
    "IntQuant": _quant,
}


# ---- TensorFlow ----


def _by_arguments(graph: GraphView, node: NodeProto) -> CustomQuantizer:
    ends = attributes.get(node, "min", -6.0), attributes.get(node, "max", 6.0)
    return _fake_quant(node, np.array(ends[0]), np.array(ends[1]))


def _by_values(graph: GraphView, node: NodeProto) -> CustomQuantizer:
    return _fake_quant(node, _operand(graph, node, 1), _operand(graph, node, 2))


def _fake_quant(node: NodeProto, low: Array, high: Array) -> CustomQuantizer:
    per_channel = node.op_type.endswith("PerChannel")
    if low.shape != high.shape or low.ndim != per_channel:
        raise DeclinedError("its range is not of the shape that it takes")
    least, most = _column(low), _column(high)
    if not ((least <= 0) & (most >= 0) & (least < most)).all():
        raise DeclinedError("its range does not contain zero")
    width = int(attributes.get(node, "num_bits", 8))
    if not 2 <= width <= MAX_BITS:
        raise DeclinedError(f"no type of code has {width} bits")
    first = np.float32(bool(attributes.get(node, "narrow_range", 0)))
    last = np.float32(2**width - 1)
    one, half = np.float32(1), np.float32(0.5)
    scale = (most - least) / (last - first)
    inverse = one / scale
    wanted = np.clip(first - least / scale, first, last)
    whole = np.floor(wanted)
    zero = whole + (wanted - whole >= half)  # which is exact, unlike floor(x + 0.5)
    bottom, top = (first - zero) * scale, (last - zero) * scale
    offset = np.floor(-bottom * inverse + half)
    steps: tuple[Step, ...] = (
        lambda values: np.maximum(np.minimum(values, top), bottom),
        lambda values: values - bottom,
        lambda values: values * inverse,
        lambda values: values - offset,
        lambda values: np.floor(values + half),
        lambda values: values * scale,
    )
    if not np.isfinite(inverse).all():
        raise DeclinedError("its scale has no reciprocal")
    return CustomQuantizer(steps, scale, -1 if per_channel else None)


_FAKE_QUANT: dict[str, Callable[[GraphView, NodeProto], CustomQuantizer]] = {
    "FakeQuantWithMinMaxArgs": _by_arguments,
    "FakeQuantWithMinMaxVars": _by_values,
    "FakeQuantWithMinMaxVarsPerChannel": _by_values,
}
