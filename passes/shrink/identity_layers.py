"""Layers that hand their input on, found by their weights.

Conv 1x1, Gemm and MatMul by the identity; a depthwise Conv 1x1 by ones
BatchNormalization with scale 1 and shift 0, as float32 computes them
Relu of what is never negative
Conv 1x1 by a permutation (a Gather of channels)
"""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.analysis import Analysis
from onnxopt.channels.rules.normalization import is_training
from onnxopt.graph import Shape
from onnxopt.weights import Array

MAX_WEIGHT = 1 << 20
"""Larger weights (elements) are not read just to see whether they are an identity."""

_NOT_NEGATIVE = {"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus"}

_MOVES = {
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
"""Operators whose results are among the values of their input."""


def identity_layer(a: Analysis, node: NodeProto) -> str | None:
    """The input that `node` hands on; None where it may change it."""
    match a.graph.op(node):
        case "Conv" | "Gemm" | "MatMul":
            matrix = _matrix(a, node)
            if matrix is None or not _is_identity(matrix):
                return None
            return node.input[0] if _keeps_shape(a, node) else None
        case "BatchNormalization":
            return node.input[0] if _is_unit(a, node) else None
        case "Relu":
            return node.input[0] if _is_not_negative(a, node.input[0]) else None
    return None


def permutation(a: Analysis, node: NodeProto) -> Array | None:
    """For each output channel of a Conv the input channel that it is; int64 [outputs]."""
    if a.graph.op(node) != "Conv" or attributes.get(node, "group", 1) != 1:
        return None
    matrix = _matrix(a, node)
    if matrix is None or matrix.shape[0] != matrix.shape[1] or not _keeps_shape(a, node):
        return None
    ones = matrix == 1
    if not (((matrix == 0) | ones).all() and (ones.sum(0) == 1).all()):
        return None
    return ones.argmax(1).astype(np.int64) if (ones.sum(1) == 1).all() else None


def _matrix(a: Analysis, node: NodeProto) -> Array | None:
    """The weight [outputs, inputs] of a layer that works on each position alone.

    None where it has a bias that is not zero, strides, or another factor.
    """
    dims = a.shape(node.input[1])
    if not a.is_constant(node.input[1]) or not dims or _is_large(dims):
        return None
    if len(node.input) > 2 and node.input[2] and not _is_zero(a, node.input[2]):
        return None
    if a.graph.op(node) == "Conv":
        is_plain = all(size == 1 for size in dims[2:]) and _is_unpadded(node)
        if not is_plain or len(dims) < 3:
            return None
    elif len(dims) != 2 or any(
        attributes.get(node, name, value) != value
        for name, value in (("transA", 0), ("alpha", 1.0))
    ):
        return None
    array = a.array(node.input[1])
    if array is None or array.dtype.kind != "f":
        return None
    array = array.reshape(array.shape[:2])
    if a.graph.op(node) == "Conv" or attributes.get(node, "transB", 0):
        return array
    return array.T


def _is_large(dims: Shape) -> bool:
    sizes = [size for size in dims if isinstance(size, int)]
    return len(sizes) < len(dims) or math.prod(sizes) > MAX_WEIGHT


def _is_unpadded(node: NodeProto) -> bool:
    return not any(attributes.get(node, "pads", [0])) and all(
        stride == 1 for stride in attributes.get(node, "strides", [1])
    )


def _is_zero(a: Analysis, name: str) -> bool:
    array = a.graph.array(name)
    return array is not None and not np.any(array)


def _is_identity(matrix: Array) -> bool:
    """Of a depthwise Conv, one 1 for each channel; of others, ones on the diagonal."""
    if matrix.shape[1] == 1:
        return bool((matrix == 1).all())
    if matrix.shape[0] != matrix.shape[1]:
        return False
    return bool((matrix == np.eye(len(matrix), dtype=matrix.dtype)).all())


def _keeps_shape(a: Analysis, node: NodeProto) -> bool:
    return a.graph.same_shape(node.input[0], node.output[0])


def _is_unit(a: Analysis, node: NodeProto) -> bool:
    """As ONNX Runtime computes it: in float32, the scale first."""
    if is_training(a, node):
        return False
    arrays = []
    for name in node.input[1:5]:
        array = a.graph.array(name)
        if array is None or array.dtype != np.float32:
            return False
        arrays.append(array)
    gamma, beta, mean, variance = arrays
    epsilon = np.float32(attributes.get(node, "epsilon", 1e-5))
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + epsilon)
        shift = beta - mean * scale
    return bool((scale == 1).all() and (shift == 0).all())


def _is_not_negative(a: Analysis, name: str) -> bool:
    """Whether a Relu or its like has been here, or codes that begin at zero."""
    node = a.graph.producer(name)
    while node is not None and a.graph.op(node) in _MOVES:
        node = a.graph.producer(node.input[0])
    if node is None:
        return False
    if a.graph.op(node) == "DequantizeLinear":
        return _starts_at_zero(a, node)
    if not a.is_float(name):
        return False  # the magnitude of the least integer is negative
    if a.graph.op(node) == "Clip":
        low, high = (_bound(a, node, slot, key) for slot, key in ((1, "min"), (2, "max")))
        return low is not None and 0 <= low <= (np.inf if high is None else high)
    return a.graph.op(node) in _NOT_NEGATIVE


def _bound(a: Analysis, node: NodeProto, slot: int, key: str) -> float | None:
    """A bound of a Clip; None where it has none, NaN where that is not known."""
    if len(node.input) > slot and node.input[slot]:
        array = a.array(node.input[slot])
        return float("nan") if array is None or array.size != 1 else float(array.item())
    value = attributes.get(node, key)
    return None if value is None else float(value)


def _starts_at_zero(a: Analysis, node: NodeProto) -> bool:
    scale = a.graph.array(node.input[1])
    if len(node.input) < 3 or scale is None or not bool((scale > 0).all()):
        return False
    zero = a.graph.array(node.input[2])
    if zero is None or zero.dtype.kind not in "iu":
        return False
    return bool((zero == np.iinfo(zero.dtype).min).all())
