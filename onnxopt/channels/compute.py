"""What operators make of known values: in NumPy where that is exact, else by ORT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from onnxopt import attributes
from onnxopt.evaluate import EvaluationError, Evaluator
from onnxopt.quantization.quantize_linear import quantize
from onnxopt.weights import Array

Inputs = Sequence[Array | None]


def elementwise(
    evaluator: Evaluator, node: NodeProto, inputs: Inputs, opset: int
) -> Array | None:
    """The first output of `node` on these inputs; None where it could not be computed.

    `inputs` are in slot order, None for an absent one.
    """
    function = _EXACT.get(node.op_type)
    if function is not None and _is_plain(inputs):
        with np.errstate(all="ignore"):
            return np.asarray(function(node, *inputs))
    return evaluated(evaluator, node, inputs, opset)


def evaluated(
    evaluator: Evaluator, node: NodeProto, inputs: Inputs, opset: int
) -> Array | None:
    """The same by ONNX Runtime, the kernel that computes it at run time."""
    model = ModelProto(ir_version=8)
    model.opset_import.append(helper.make_opsetid("", opset))
    if node.domain not in ("", "ai.onnx"):
        model.opset_import.append(helper.make_opsetid(node.domain, 1))
    model.graph.name = "facts"
    copy = model.graph.node.add()
    copy.CopyFrom(node)
    for index, array in enumerate(inputs):
        if array is not None:
            copy.input[index] = f"in{index}"
            model.graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(array), f"in{index}")
            )
    del copy.output[1:]
    copy.output[0] = "out"
    model.graph.output.append(ValueInfoProto(name="out"))
    try:
        return evaluator.evaluate(model)["out"]
    except EvaluationError:
        return None


def _is_plain(inputs: Inputs) -> bool:
    """Whether NumPy's arithmetic on them is that of the operator: float32, or double."""
    kinds = {array.dtype for array in inputs if array is not None}
    return len(kinds) == 1 and kinds.pop() in (np.float32, np.float64)


def _clip(node: NodeProto, x: Array, low: Any = None, high: Any = None) -> Array:
    low = attributes.get(node, "min") if low is None else low
    high = attributes.get(node, "max") if high is None else high
    if low is not None:
        x = np.maximum(x, x.dtype.type(low))
    return x if high is None else np.minimum(x, x.dtype.type(high))


def _leaky(node: NodeProto, x: Array) -> Array:
    alpha = x.dtype.type(attributes.get(node, "alpha", 0.01))
    return np.where(x >= 0, x, alpha * x)


# Operators whose result in NumPy is that of every kernel, to the bit.
_EXACT: dict[str, Callable[..., Any]] = {
    "Abs": lambda node, x: np.abs(x),
    "Add": lambda node, x, y: x + y,
    "Clip": _clip,
    "Identity": lambda node, x: x,
    "LeakyRelu": _leaky,
    "Mul": lambda node, x, y: x * y,
    "Neg": lambda node, x: -x,
    "PRelu": lambda node, x, slope: np.where(x >= 0, x, slope * x),
    "Relu": lambda node, x: np.maximum(x, x.dtype.type(0)),
    "Sub": lambda node, x, y: x - y,
}


def dequantized(node: NodeProto, inputs: Inputs) -> Array | None:
    """DequantizeLinear of 8, 16 or 32-bit integers; None where that is left to ORT."""
    codes, scale = inputs[0], inputs[1]
    zero = inputs[2] if len(inputs) > 2 else None
    if codes is None or scale is None or codes.dtype.kind not in "iu":
        return None
    if scale.dtype != np.float32 or scale.ndim > 1 or attributes.get(node, "block_size"):
        return None
    if attributes.get(node, "output_dtype"):
        return None
    shape = [1] * codes.ndim
    if scale.size > 1:
        shape[attributes.get(node, "axis", 1)] = -1
    whole = codes.astype(np.int64)
    if zero is not None:
        whole -= zero.astype(np.int64).reshape(shape)
    return np.asarray(whole.astype(np.float32) * scale.reshape(shape))


def quantized(node: NodeProto, inputs: Inputs) -> Array | None:
    """QuantizeLinear where NumPy's codes are those of ONNX Runtime, else None."""
    values, scale = inputs[0], inputs[1]
    zero = inputs[2] if len(inputs) > 2 else None
    if values is None or scale is None or attributes.get(node, "output_dtype"):
        return None
    if zero is None:
        zero = np.zeros(scale.shape, np.uint8)
    return quantize(values, scale, zero, attributes.get(node, "axis", 1))
