"""Products of codes: what integer kernels of a layer add up, and in which steps."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError, Layout
from onnxopt.quantization.coded_weight import CodedWeight
from onnxopt.quantization.parameters import Parameters, parameters
from onnxopt.weights import Array

INT32_LARGEST = float(2**31 - 1)
"""What such a kernel can add to a sum of products, in steps."""

INVISIBLE = 2.0**-26
"""A part of a float32 that is lost where it is added to it."""


_ROUND_SINCE = 11


def check_float_bias(graph: GraphView, node: NodeProto) -> None:
    """Raise DeclinedError where ONNX Runtime would refuse a bias of floats beside codes.

    At load it rounds such a bias, and the weight, by a Round that opset 10 does not have.
    """
    if graph.opset() < _ROUND_SINCE and dequantized_by(graph, node.input[0]) is not None:
        raise DeclinedError(
            f"ONNX Runtime loads no float bias beside codes below opset {_ROUND_SINCE}"
        )


def dequantized_by(graph: GraphView, name: str) -> Parameters | None:
    """The parameters, of one scale, by which DequantizeLinear makes `name`."""
    maker = graph.producer(name)
    if maker is None or graph.op(maker) != "DequantizeLinear":
        return None
    try:
        found = parameters(graph, maker)
    except DeclinedError:
        return None
    return found if found.is_per_tensor else None


def dequantized_peak(graph: GraphView, name: str) -> float:
    """The largest magnitude that a value made by DequantizeLinear can have."""
    found = dequantized_by(graph, name)
    if found is None:
        return float("inf")
    low, high = found.limits
    zero = int(found.zero_point)
    return float(found.scale) * max(high - zero, zero - low)


def product_scale(
    graph: GraphView, node: NodeProto, layout: Layout, weight: CodedWeight
) -> Array | None:
    """What one step of the sums of a layer stands for: one number, or one per output.

    That is scale of input * scale of weight, rounded as a product of floats. None where
    no kernel adds up codes: the input is not dequantized, the scales of the weight vary
    within an output.
    """
    given, own = dequantized_by(graph, node.input[0]), weight.coded.parameters
    if given is None or given.scale.dtype != own.scale.dtype or own.is_blocked:
        return None
    if node.op_type == "ConvTranspose" and layout.shape[0] > 1:
        return None
    if not own.is_per_tensor and own.axis % len(weight.dims) != layout.outputs - 1:
        return None
    with np.errstate(all="ignore"):
        return np.asarray(given.scale * own.scale)
