"""fold-batch-norm: let a BatchNormalization beside a linear layer disappear into it.

    t = Conv(x, W, b)
    y = BatchNormalization(t, gamma, beta, mean, var)
                                ->    y = Conv(x, f * W, f * (b - mean) + beta)
                                      with f = gamma / sqrt(var + epsilon)

1. Conv, ConvTranspose, Gemm, and MatMul of rank 2 (which becomes a Gemm); f scales the
   output channels of the weight, whatever their axis and groups.
2. Before a layer, f scales its input channels, and the rest goes through the weight into
   the bias; only where no padding of the layer stands for values that are not shifted.
3. All parameters are constants, the value between the two has no other reader, and the
   BatchNormalization runs in inference mode with one output.
4. Computed in float64 and rounded once to the weight's dtype.
5. Of a weight that DequantizeLinear makes of codes, f scales the scales, and turns the
   codes where it is negative (`onnxopt.quantization.scaling` says how, and when not).
   For `ort-cpu` not where a layer leaves integer arithmetic for it
   (`onnxopt.quantization.integer_sums`).

Source: Jacob et al., Quantization and Training of Neural Networks, section 3.2
(https://arxiv.org/abs/1712.05877); the ONNX operator's formula.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.layer import Layer
from onnxopt.linear import LAYERS, DeclinedError, Floats, floats
from onnxopt.manager import Context, Pass
from onnxopt.quantization.integer_sums import check_stays_integer
from onnxopt.report import Guarantee
from onnxopt.target import Target


class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul beside it."""

    name: ClassVar[str] = "fold-batch-norm"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the nodes before and behind every BatchNormalization."""
        for norm in graph.visit(self, ("BatchNormalization",)):
            try:
                edit = _folded(graph, norm, context.target)
            except DeclinedError as declined:
                graph.skip(norm, str(declined))
            else:
                graph.apply(edit, "a linear layer can do its own scale and shift")


def _folded(graph: GraphView, norm: NodeProto, target: Target) -> Edit:
    _check_inference(graph, norm)
    before = graph.producer(norm.input[0])
    if before is None or graph.op(before) not in LAYERS:
        return _folded_behind(graph, norm)
    try:
        return _folded_before(graph, norm, before, target)
    except DeclinedError as declined:
        try:
            return _folded_behind(graph, norm)
        except DeclinedError:
            raise declined from None


def _folded_before(
    graph: GraphView, norm: NodeProto, before: NodeProto, target: Target
) -> Edit:
    """Into the layer whose output it reads."""
    layer = Layer.of(graph, before)
    if graph.only_use(norm.input[0]) is None:
        raise DeclinedError("the layer before it has other readers")
    if layer.rank != 2 and before.op_type == "MatMul":
        raise DeclinedError("the MatMul before it is not of rank 2")
    check_stays_integer(graph, before, norm, target)
    edit = Edit(graph, norm)
    factor, shift = _scale_and_shift(graph, norm)
    layer.scale_outputs(edit, factor, shift, may_move_zero=target.zero_points)
    edit.bypass(norm, {norm.output[0]: before.output[0]})
    return edit


def _folded_behind(graph: GraphView, norm: NodeProto) -> Edit:
    """Into the layer that reads its output."""
    use = graph.only_use(norm.output[0])
    if use is None or use.view is not graph or use.index != 0:
        raise DeclinedError(_nothing_beside(graph, norm))
    if graph.op(use.node) not in LAYERS:
        raise DeclinedError(_nothing_beside(graph, norm))
    layer = Layer.of(graph, use.node)
    if layer.rank != 2 and use.node.op_type == "MatMul":
        raise DeclinedError("the MatMul behind it is not of rank 2")
    edit = Edit(graph, norm)
    layer.scale_inputs(edit, *_scale_and_shift(graph, norm))
    edit.bypass(norm, {norm.output[0]: norm.input[0]})
    return edit


def _nothing_beside(graph: GraphView, norm: NodeProto) -> str:
    """Why there is no layer, where a quantizer hides it."""
    before = graph.producer(norm.input[0])
    if before is not None and graph.op(before) == "DequantizeLinear":
        return "what it reads is rounded to codes behind the layer"
    return "no linear layer stands beside it"


def _check_inference(graph: GraphView, norm: NodeProto) -> None:
    if any(name and graph.is_used(name) for name in norm.output[1:]):
        raise DeclinedError("its statistics are read")
    if attributes.get(norm, "training_mode", 0):
        raise DeclinedError("it runs in training mode")
    if graph.opset() < 14 and any(norm.output[1:]):
        raise DeclinedError("it runs in training mode")  # its outputs say so
    if graph.opset() < 7 and not attributes.get(norm, "is_test", 0):
        raise DeclinedError("it runs in training mode")
    if graph.opset() < 9 and not attributes.get(norm, "spatial", 1):
        raise DeclinedError("its parameters are per element (spatial=0)")


def _scale_and_shift(graph: GraphView, norm: NodeProto) -> tuple[Floats, Floats]:
    """y = factor * x + shift, per channel."""
    gamma, beta, mean, variance = (floats(graph, name) for name in norm.input[1:5])
    epsilon = float(np.float32(attributes.get(norm, "epsilon", 1e-5)))
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(variance + epsilon)
        shift = beta - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        raise DeclinedError("its scale or shift is not finite")
    return factor, shift
