"""fold-batch-norm: let a BatchNormalization behind a linear layer disappear into it.

    t = Conv(x, W, b)
    y = BatchNormalization(t, gamma, beta, mean, var)
                                ->    y = Conv(x, f * W, f * (b - mean) + beta)
                                      with f = gamma / sqrt(var + epsilon)

1. Conv, ConvTranspose, Gemm, and MatMul of rank 2 (which becomes a Gemm); f scales the
   output channels of the weight, whatever their axis and groups.
2. All parameters are constants, the layer's output has no other reader, and the
   BatchNormalization runs in inference mode with one output.
3. Computed in float64 and rounded once to the weight's dtype.

Source: Jacob et al., Quantization and Training of Neural Networks, section 3.2
(https://arxiv.org/abs/1712.05877); the ONNX operator's formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.weights import Array

Floats = npt.NDArray[np.float64]
_FLOATS = ("float32", "float16", "bfloat16", "float64")


class _DeclinedError(Exception):
    """The rewrite does not apply; the text is the reason."""


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it."""

    name: ClassVar[str] = "fold-batch-norm"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the node before every BatchNormalization."""
        for norm in graph.visit(self, ("BatchNormalization",)):
            try:
                edit = _folded(graph, norm)
            except _DeclinedError as declined:
                graph.skip(norm, str(declined))
            else:
                graph.apply(edit, "a linear layer can do its own scale and shift")


def _folded(graph: GraphView, norm: NodeProto) -> Edit:
    _check_inference(graph, norm)
    layer = graph.producer(norm.input[0])
    fold = _LAYERS.get(graph.op(layer)) if layer is not None else None
    if layer is None or fold is None:
        raise _DeclinedError("no linear layer stands before it")
    if attributes.has_references(layer):
        raise _DeclinedError("the layer before it differs from call to call")
    if layer.op_type in ("Gemm", "MatMul") and graph.opset() < 7:
        raise _DeclinedError("Gemm broadcasts by attribute before opset 7")
    if graph.only_use(norm.input[0]) is None:
        raise _DeclinedError("the layer before it has other readers")
    factor, shift = _scale_and_shift(graph, norm)
    edit = Edit(graph, norm)
    fold(graph, edit, layer, factor, shift)
    edit.bypass(norm, {norm.output[0]: layer.output[0]})
    return edit


def _check_inference(graph: GraphView, norm: NodeProto) -> None:
    if any(name and graph.is_used(name) for name in norm.output[1:]):
        raise _DeclinedError("its statistics are read")
    if attributes.get(norm, "training_mode", 0):
        raise _DeclinedError("it runs in training mode")
    if graph.opset() < 14 and any(norm.output[1:]):
        raise _DeclinedError("it runs in training mode")  # its outputs say so
    if graph.opset() < 7 and not attributes.get(norm, "is_test", 0):
        raise _DeclinedError("it runs in training mode")
    if graph.opset() < 9 and not attributes.get(norm, "spatial", 1):
        raise _DeclinedError("its parameters are per element (spatial=0)")


def _weight(graph: GraphView, name: str) -> Array:
    array = graph.array(name)
    if array is None:
        raise _DeclinedError(f"{name!r} is not a constant")
    if str(array.dtype) not in _FLOATS:
        raise _DeclinedError(f"{name!r} is of type {array.dtype}")
    return array


def _constant(graph: GraphView, name: str) -> Floats:
    return _weight(graph, name).astype(np.float64)


def _scaled(weight: Array, factor: Floats) -> Array:
    """weight * factor in float64, rounded once; few elements at a time are that wide.

    `factor` has the rank of `weight` or broadcasts from the right: one per channel.
    """
    _check_precision(weight, factor)
    made = np.empty_like(weight)
    with np.errstate(all="ignore"):
        np.multiply(weight, factor, out=made, dtype=np.float64, casting="unsafe")
    return made


def _check_precision(weight: Array, factor: Floats) -> None:
    """Below the normal numbers of its type a channel would lose its last digits."""
    shape = (1,) * (weight.ndim - factor.ndim) + factor.shape
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    if not weight.size:
        return
    with np.errstate(all="ignore"):
        high = weight.max(axis=axes, keepdims=True).astype(np.float64)
        low = weight.min(axis=axes, keepdims=True).astype(np.float64)
        peak = np.maximum(high, -low) * np.abs(factor)
    if ((peak > 0) & (peak < _smallest_normal(weight.dtype))).any():
        raise _DeclinedError(f"a channel would lose its precision in {weight.dtype}")


def _smallest_normal(dtype: Any) -> float:
    finfo: Any = ml_dtypes.finfo
    return float(finfo(dtype).smallest_normal)


def _scale_and_shift(graph: GraphView, norm: NodeProto) -> tuple[Floats, Floats]:
    """y = factor * x + shift, per channel."""
    gamma, beta, mean, variance = (_constant(graph, name) for name in norm.input[1:5])
    epsilon = float(np.float32(attributes.get(norm, "epsilon", 1e-5)))
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(variance + epsilon)
        shift = beta - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        raise _DeclinedError("its scale or shift is not finite")
    return factor, shift


def _is_finite(array: Array) -> bool:
    """Without an array of truths beside it: NaN and infinity reach the extremes."""
    with np.errstate(all="ignore"):
        return not array.size or bool(np.isfinite([array.min(), array.max()]).all())


def _set_constant(
    graph: GraphView, edit: Edit, layer: NodeProto, slot: int, array: Array
) -> None:
    """Give input `slot` of the layer a new value, under its old name if it can."""
    if not _is_finite(array):
        raise _DeclinedError(f"a folded weight does not fit into {array.dtype}")
    name = layer.input[slot] if slot < len(layer.input) else ""
    if name and graph.only_use_everywhere(name) is not None:
        edit.set_weight(name, array)
    else:
        hint = name or f"{layer.input[1]}_bias"
        edit.set_input(layer, slot, edit.add_weight(array, hint))


def _bias(graph: GraphView, layer: NodeProto, channels: int) -> Floats:
    if len(layer.input) > 2 and layer.input[2]:
        return _constant(graph, layer.input[2])
    return np.zeros(channels)


def _fold_conv(
    graph: GraphView, edit: Edit, conv: NodeProto, factor: Floats, shift: Floats
) -> None:
    weight = _weight(graph, conv.input[1])
    _check_channels(weight.shape[0], factor)
    scaled = _scaled(weight, factor.reshape(-1, *[1] * (weight.ndim - 1)))
    _write(graph, edit, conv, scaled, _bias(graph, conv, len(factor)) * factor + shift)


def _fold_conv_transpose(
    graph: GraphView, edit: Edit, conv: NodeProto, factor: Floats, shift: Floats
) -> None:
    """The weight is [in, out / group, ...]; out channels run group by group."""
    weight, group = _weight(graph, conv.input[1]), attributes.get(conv, "group", 1)
    _check_channels(weight.shape[1] * group, factor)
    grouped = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    scaled = _scaled(grouped, factor.reshape(group, 1, -1, *[1] * (weight.ndim - 2)))
    bias = _bias(graph, conv, len(factor)) * factor + shift
    _write(graph, edit, conv, scaled.reshape(weight.shape), bias)


def _fold_gemm(
    graph: GraphView, edit: Edit, gemm: NodeProto, factor: Floats, shift: Floats
) -> None:
    weight = _weight(graph, gemm.input[1])
    transposed = attributes.get(gemm, "transB", 0)
    _check_channels(weight.shape[0 if transposed else 1], factor)
    bias = _bias(graph, gemm, len(factor)) * float(attributes.get(gemm, "beta", 1.0))
    if bias.size not in (1, len(factor)) or (bias.ndim and bias.shape[-1] != bias.size):
        raise _DeclinedError("the bias of the Gemm is not one per channel")
    bias = np.broadcast_to(bias.reshape(-1), factor.shape) * factor + shift
    scaled = _scaled(weight, factor[:, None] if transposed else factor)
    _write(graph, edit, gemm, scaled, bias)
    edit.set_attribute(gemm, "beta", None)


def _fold_matmul(
    graph: GraphView, edit: Edit, product: NodeProto, factor: Floats, shift: Floats
) -> None:
    shape = graph.shape(product.input[0])
    weight = _weight(graph, product.input[1])
    if shape is None or len(shape) != 2 or weight.ndim != 2:
        raise _DeclinedError("the MatMul before it is not of rank 2")
    _check_channels(weight.shape[1], factor)
    edit.set_op_type(product, "Gemm")
    _write(graph, edit, product, _scaled(weight, factor), shift)


def _check_channels(channels: int, factor: Floats) -> None:
    if channels != len(factor):
        raise _DeclinedError(f"{channels} channels before it, {len(factor)} in it")


def _write(
    graph: GraphView, edit: Edit, layer: NodeProto, weight: Array, bias: Floats
) -> None:
    _set_constant(graph, edit, layer, 1, weight)
    with np.errstate(over="ignore"):
        _set_constant(graph, edit, layer, 2, bias.astype(weight.dtype))


_LAYERS: dict[str, Callable[[GraphView, Edit, NodeProto, Floats, Floats], None]] = {
    "Conv": _fold_conv,
    "ConvTranspose": _fold_conv_transpose,
    "Gemm": _fold_gemm,
    "MatMul": _fold_matmul,
}
