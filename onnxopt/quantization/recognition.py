"""Which QuantizeLinear and DequantizeLinear compute what a staircase is.

The types are chosen by the levels of the function: 256 are an 8-bit code, 65536 one of
16 bits, 16 one of 4 bits where the opset has it, and fewer (-127 to 127, 0 to 63...) an
8-bit code behind a Clip. What is chosen is proven, or declined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import msgspec
import numpy as np
from onnx import helper

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError, Floats
from onnxopt.quantization import parameters
from onnxopt.quantization.parameters import Parameters
from onnxopt.quantization.staircase import (
    Floats32,
    Quantizer,
    Step,
    ends,
    is_equal,
    nearly_equal,
)
from onnxopt.weights import Array

Proof = Callable[[Step, Quantizer], bool]

MOST = 65535
"""The levels of a code above its least one: of 16 bits."""
_WIDTHS = {255: 8, 65535: 16, 15: 4}
_SIGNED = {8: np.int8, 16: np.int16, 4: ml_dtypes.int4}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 4: ml_dtypes.uint4}


class UnboundedError(DeclinedError):
    """The function is no quantizer: it takes more values than 16 bits count."""


class Found(msgspec.Struct, frozen=True, eq=False):
    """The parameters of the two nodes, and the bounds of a Clip before them."""

    quantize: Parameters
    dequantize: Parameters
    bounds: tuple[float, float] | None = None

    def write(self, edit: Edit, value: str) -> None:
        """Let them make the outputs of the edit's own node from `value`."""
        if self.bounds is not None:
            value = _clip(edit, value, self.bounds)
        inputs, settings = parameters.operands(edit, value, self.quantize)
        (codes,) = edit.insert("QuantizeLinear", inputs, 1, settings)
        if self.dequantize is not self.quantize:
            inputs, settings = parameters.operands(edit, codes, self.dequantize)
        edit.rewrite("DequantizeLinear", [codes, *inputs[1:]], settings)


def _clip(edit: Edit, value: str, bounds: tuple[float, float]) -> str:
    if edit.graph.opset() < 11:
        pair = dict(zip(("min", "max"), bounds, strict=True))
        return edit.insert("Clip", [value], 1, pair)[0]
    names = [
        edit.add_weight(np.array(bound, np.float32), f"{value}_bound") for bound in bounds
    ]
    return edit.insert("Clip", [value, *names])[0]


def find(
    graph: GraphView,
    function: Step,
    divisors: Sequence[Floats32],
    factor: Floats32,
    axis: int | None,
    proof: Proof = is_equal,
) -> Found:
    """The nodes that compute `function`; raises DeclinedError.

    UnboundedError says that it is no quantizer at all. `divisors` are what the scale of
    QuantizeLinear may be, [channels, 1] or [1, 1], and `factor` what that of
    DequantizeLinear is; `axis` is that of the channels, if any.
    """
    channels = max(len(item) for item in (*divisors, factor))
    low, high = levels(function, factor, channels)
    is_near = False
    for divisor in divisors:
        for data_type, zero_point in _types(graph, low, high, axis):
            quantizer = _quantizer(divisor, factor, zero_point, data_type, low, high)
            if proof(function, quantizer):
                return _found(quantizer, data_type, axis)
            is_near |= proof is is_equal and nearly_equal(function, quantizer)
    if is_near:
        raise DeclinedError(
            "it rounds values next to a tie to its other side; near-fake-quant takes that"
        )
    raise DeclinedError("it is not what QuantizeLinear and DequantizeLinear compute")


def levels(function: Step, factor: Floats32, channels: int) -> tuple[Floats, Floats]:
    """The least and the largest multiple of `factor` that it makes, [channels, 1] each.

    Raises UnboundedError where there are more of them than 16 bits count.
    """
    extremes = ends(function, channels)
    if np.isnan(extremes).any():
        raise DeclinedError("what it makes of large values is not a number")
    with np.errstate(all="ignore"):
        low, high = (np.rint(end.astype(np.float64) / factor) for end in extremes)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UnboundedError("its values have no bounds")
    if (high - low > MOST).any():
        raise UnboundedError("it has more levels than 16 bits count")
    return low, high


def _types(
    graph: GraphView, low: Floats, high: Floats, axis: int | None
) -> list[tuple[np.dtype[np.generic], Floats]]:
    """The types that the codes may be of, each with zero points [channels, 1]."""
    spans = np.unique(high - low)
    if len(spans) != 1:
        raise DeclinedError("its channels have different numbers of levels")
    span = int(spans[0])
    if span < 1:
        raise DeclinedError("it has one level")
    found = []
    width = _WIDTHS.get(span)
    if width is not None:
        found.append(_type(width, low))
    reason = "" if width is None else _missing(graph, *found[0], axis)
    if reason:
        found.clear()
    if not found and span < 255:
        if axis is not None:
            raise DeclinedError(reason or f"no type has {span + 1} levels per channel")
        found.append(_inside(low, high))
        reason = _missing(graph, *found[0], axis)
    if not found or reason:
        raise DeclinedError(reason or f"no type has {span + 1} levels")
    return found


def _type(width: int, low: Floats) -> tuple[np.dtype[np.generic], Floats]:
    """The type whose range this is, symmetric where it can be."""
    least = -(2 ** (width - 1))
    if (low == least).all():
        return np.dtype(_SIGNED[width]), np.zeros_like(low)
    if (low > 0).any() or (low < 2 * least + 1).any():
        raise DeclinedError("zero is not one of its levels")
    return np.dtype(_UNSIGNED[width]), -low


def _inside(low: Floats, high: Floats) -> tuple[np.dtype[np.generic], Floats]:
    """An 8-bit type that holds a narrower range."""
    if (low >= -128).all() and (high <= 127).all() and (low < 0).any():
        return np.dtype(np.int8), np.zeros_like(low)
    if (low > 0).any() or (low < -255).any():
        raise DeclinedError("zero is not one of its levels")
    return np.dtype(np.uint8), -low


def _missing(
    graph: GraphView, data_type: np.dtype[np.generic], zero: Floats, axis: int | None
) -> str:
    """Why the model's opset has no such nodes; empty where it has."""
    flat = zero.reshape(-1) if axis is not None else zero.reshape(())
    made = Parameters(flat.astype(np.float32), flat.astype(data_type), axis or 0)
    return parameters.missing(graph, made) or ""


def _quantizer(
    divisor: Floats32,
    factor: Floats32,
    zero_point: Floats,
    data_type: np.dtype[np.generic],
    low: Floats,
    high: Floats,
) -> Quantizer:
    least, most = parameters.code_limits(int(helper.np_dtype_to_tensor_dtype(data_type)))
    bounds = None
    if (high - low < most - least).any():
        bounds = (float(divisor[0, 0]) * low[0, 0], float(divisor[0, 0]) * high[0, 0])
    zero = zero_point.astype(np.float32)
    return Quantizer(divisor, factor, zero, least, most, bounds)


def _found(
    quantizer: Quantizer, data_type: np.dtype[np.generic], axis: int | None
) -> Found:
    def made(scale: Floats32) -> Parameters:
        if axis is None:
            zero: Array = quantizer.zero_point.reshape(()).astype(data_type)
            return Parameters(scale.reshape(()), zero)
        count = max(len(quantizer.zero_point), len(scale))
        scales = np.broadcast_to(scale, (count, 1)).reshape(-1)
        zeros = np.broadcast_to(quantizer.zero_point, (count, 1)).reshape(-1)
        return Parameters(np.array(scales), zeros.astype(data_type), axis)

    quantize = made(quantizer.divisor)
    same = np.array_equal(quantizer.divisor, quantizer.factor)
    dequantize = quantize if same else made(quantizer.factor)
    return Found(quantize, dequantize, quantizer.bounds)
