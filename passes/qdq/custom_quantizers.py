"""custom-quantizers: standard QuantizeLinear and DequantizeLinear for those of others.

    y = qonnx.custom_op.general.Quant(x, s, z, 8)
                                ->   q = QuantizeLinear(x, s, z)
                                     y = DequantizeLinear(q, s, z)

1. QuantizeLinear and DequantizeLinear of com.microsoft and of TensorRT ("trt"), with its
   TRT_FP8- and TRT_INT4- forms: the standard ones, where the opset has the type.
2. Quant (IntQuant) of QONNX and Brevitas, TensorFlow's FakeQuantWithMinMax...: where the
   result is the same for every finite float32, by the formula that their authors publish
   (`onnxopt.quantization.custom`); `fake-quant` says how that is proven, and which types
   there are. TensorFlow rounds half up, and a zero point that is not 0 moves ties:
   `near-fake-quant` takes what is right next to a tie as equal.
3. Of a constant, codes and DequantizeLinear: any rounding, since the values are compared.
4. Parameters are constants.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization import parameters
from onnxopt.quantization.codes import coded, layout_of
from onnxopt.quantization.custom import CustomQuantizer, operators, read
from onnxopt.quantization.parameters import LINEAR, Parameters
from onnxopt.quantization.recognition import Proof, UnboundedError, find
from onnxopt.quantization.staircase import composed, is_equal
from onnxopt.report import Guarantee
from onnxopt.weights import Array

_TRT = {
    "TRT_FP8QuantizeLinear": ("QuantizeLinear", TensorProto.FLOAT8E4M3FN),
    "TRT_FP8DequantizeLinear": ("DequantizeLinear", TensorProto.FLOAT8E4M3FN),
    "TRT_INT4QuantizeLinear": ("QuantizeLinear", TensorProto.INT4),
    "TRT_INT4DequantizeLinear": ("DequantizeLinear", TensorProto.INT4),
}
_TRT_OTHERS = (
    "TRT_FP4DynamicQuantize",
    "TRT_FP4QDQ",
    "TRT_MXFP8DequantizeLinear",
    "TRT_MXFP8DynamicQuantize",
    "TRT_MXFP8QuantizeLinear",
)
_STANDARD = [
    *(f"{domain}::{op}" for domain in ("com.microsoft", "trt") for op in LINEAR),
    *(f"trt::{op}" for op in (*_TRT, *_TRT_OTHERS)),
]


class CustomQuantizers(Pass):
    """Write the quantizers of other domains with standard operators."""

    name: ClassVar[str] = "custom-quantizers"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Node by node: what makes codes comes before what reads them."""
        for node in graph.visit(self, (*_STANDARD, *operators())):
            replace(graph, node, is_equal)


def replace(graph: GraphView, node: NodeProto, proof: Proof) -> None:
    """Write `node`, or say why not."""
    edit = Edit(graph, node)
    try:
        if graph.op(node) in _STANDARD:
            _rename(graph, edit, node)
        else:
            _write(graph, edit, node, proof)
    except (UnboundedError, DeclinedError) as declined:
        graph.skip(node, str(declined))
        return
    graph.apply(edit, "standard operators compute the same")


# ---- the standard operators under other names ----


def _rename(graph: GraphView, edit: Edit, node: NodeProto) -> None:
    if node.op_type in _TRT_OTHERS:
        raise DeclinedError("its scales are computed, or are powers of two of 8 bits")
    op_type, data_type = _TRT.get(node.op_type, (node.op_type, None))
    if data_type is None:
        made = parameters.parameters(graph, node)
    else:
        made = _of_tensorrt(graph, node, data_type)
    _check_codes(graph, node, op_type, made)
    reason = parameters.missing(graph, made)
    if reason:
        raise DeclinedError(reason)
    inputs = list(node.input)
    if data_type is not None and len(inputs) == 2:
        inputs.append(edit.add_weight(made.zero_point, f"{node.input[1]}_zero_point"))
    edit.rewrite(op_type, inputs, parameters.settings(made))


def _of_tensorrt(graph: GraphView, node: NodeProto, data_type: int) -> Parameters:
    """Without a zero point its type is that of the operator's name."""
    if len(node.input) > 2 and node.input[2]:
        return parameters.parameters(graph, node)
    return parameters.symmetric(graph, node, data_type)


def _check_codes(
    graph: GraphView, node: NodeProto, op_type: str, made: Parameters
) -> None:
    """Whether codes are stored, or read, as codes of the type that the standard has."""
    if op_type == "DequantizeLinear":
        found = graph.dtype(node.input[0])
        if found is None:
            raise DeclinedError("the type of its codes is not known")
        if found != made.data_type:
            kind = TensorProto.DataType.Name(found).lower()
            raise DeclinedError(f"its codes are stored as {kind}")
        return
    for use in graph.uses(node.output[0]) if node.domain == "trt" else ():
        if not use.node.op_type.endswith("DequantizeLinear"):
            raise DeclinedError("its codes have other readers")


# ---- quantizers by formula ----


def _write(graph: GraphView, edit: Edit, node: NodeProto, proof: Proof) -> None:
    quantizer = read(graph, node)
    axis = _front(graph, node.input[0], quantizer)
    array = graph.array(node.input[0])
    if array is not None:
        _write_constant(graph, edit, array, quantizer)
        return
    if graph.dtype(node.input[0]) not in (TensorProto.FLOAT, None):
        raise DeclinedError("it is of float32")
    scale = quantizer.scale
    found = find(graph, composed(quantizer.steps), [scale], scale, axis, proof)
    found.write(edit, node.input[0])


def _front(graph: GraphView, value: str, quantizer: CustomQuantizer) -> int | None:
    """The axis of the channels, counted from the front where the rank is known."""
    shape = graph.shape(value)
    if quantizer.axis is None or shape is None:
        return quantizer.axis
    axis = quantizer.axis + len(shape)
    if axis < 0 or shape[axis] != max(len(quantizer.scale), 1):
        raise DeclinedError("its parameters may broadcast its input")
    return axis


def _write_constant(
    graph: GraphView, edit: Edit, array: Array, quantizer: CustomQuantizer
) -> None:
    if array.dtype != np.float32 or not np.isfinite(array).all() or array.size < 1:
        raise DeclinedError("its values are not finite numbers of float32")
    axis = 0 if quantizer.axis is None else quantizer.axis
    turned = np.moveaxis(array.reshape(array.shape or (1,)), axis, 0)
    rows = turned.reshape(-1, 1).T if quantizer.axis is None else turned
    flat = composed(quantizer.steps)(rows.reshape(len(rows), -1))
    values = np.moveaxis(flat.reshape(turned.shape), 0, axis).reshape(array.shape)
    grid = [1] * array.ndim
    if quantizer.axis is not None:
        grid[quantizer.axis] = len(quantizer.scale)
    scale = quantizer.scale.reshape(grid)
    weight = coded(graph, np.rint(values / scale), layout_of(values, scale))
    if not np.array_equal(weight.values(), values):
        raise DeclinedError("its values are not whole multiples of its scale")
    weight.write(edit)
