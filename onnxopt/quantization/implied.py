"""Clamps that the saturation of a quantizer implies."""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.clamps import Clamp
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.quantization.parameters import Parameters, parameters
from onnxopt.quantization.quantize_linear import quantize


def check_implied(clamp: Clamp, graph: GraphView, quantizer: NodeProto) -> None:
    """Raise DeclinedError where a code would be another without the clamp before it."""
    made = parameters(graph, quantizer)
    if attributes.get(quantizer, "precision", 0):
        raise DeclinedError("the quantizer computes in a precision of its own")
    low, high = made.limits
    if not (math.isinf(clamp.low) or _is_code(clamp.low, made, low)):
        raise DeclinedError(f"the code of {clamp.low:.9g} is not the least one")
    if not (math.isinf(clamp.high) or _is_code(clamp.high, made, high)):
        raise DeclinedError(f"the code of {clamp.high:.9g} is not the largest one")


def _is_code(number: float, made: Parameters, code: int) -> bool:
    """Whether `number` is quantized to `code` by every scale."""
    scale, zero = made.scale.reshape(-1), made.zero_point.reshape(-1)
    codes = quantize(np.full(scale.shape, number, np.float32), scale, zero, 0)
    if codes is None:
        raise DeclinedError("its codes are not of 8 bits, or not of float32")
    return bool((codes == code).all())
