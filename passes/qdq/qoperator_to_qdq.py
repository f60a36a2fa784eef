"""qoperator-to-qdq: operators on codes as operators on floats between DQ and Q.

                                          a = DequantizeLinear(x, xs, xz)
    y = QLinearConv(x, xs, xz,            b = DequantizeLinear(w, ws, wz)
                    w, ws, wz,      ->    c = Conv(a, b)
                    ys, yz)               y = QuantizeLinear(c, ys, yz)

    i = ConvInteger(q, w, z, wz)          a = DequantizeLinear(q, s, z)
    f = Cast(i)                     ->    b = DequantizeLinear(w, ws, wz)
    y = Mul(f, Mul(s, ws))                y = Conv(a, b)

1. QLinearConv and QLinearMatMul; those of ONNX Runtime: Add, Mul, Sigmoid, LeakyRelu,
   AveragePool, GlobalAveragePool, Concat, Softmax, Where, QGemm, MatMulIntegerToFloat and
   DynamicQuantizeMatMul.
2. ConvInteger and MatMulInteger whose input is quantized by DynamicQuantizeLinear, and
   whose result is multiplied by its scale and a constant; a bias of integers goes behind.
3. Softmax at a scale of 1/256, where ONNX Runtime's has no error of its own.
4. A bias of integers has the scale xs ws: it becomes DequantizeLinear of itself.
5. Weights stay the integers that they are. Nodes are added, and the scales of biases.

Both forms round the same real number, computed with other roundings before: where it lies
midway between two codes, they can differ by one (`onnxopt.quantization.qoperators`). So
the pass is lossy: one code in 460,800 is more than validation takes for rounding.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec
import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.parameters import PER_AXIS_SINCE
from onnxopt.quantization.qoperators import (
    BY_KEY,
    ONLY_ON_CODES,
    Operand,
    QOperator,
    check_result,
    weight_axis,
)
from onnxopt.report import Guarantee
from onnxopt.weights import Array

_DYNAMIC = "com.microsoft::DynamicQuantizeMatMul"
_INTEGER = {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}


class QOperatorToQdq(Pass):
    """Write operators on codes as operators on floats between Q and DQ."""

    name: ClassVar[str] = "qoperator-to-qdq"
    guarantee: ClassVar[Guarantee] = "lossy"

    def run(self, graph: GraphView, context: Context) -> None:
        """Operator by operator."""
        for node in graph.visit(self, (*BY_KEY, *_INTEGER, _DYNAMIC)):
            try:
                if graph.op(node) in _INTEGER:
                    edit = _Integer(graph, node).edit()
                elif graph.op(node) == _DYNAMIC:
                    edit = _dynamic(graph, node)
                else:
                    edit = _rewritten(graph, node, BY_KEY[graph.op(node)])
            except DeclinedError as declined:
                graph.skip(node, str(declined))
            else:
                graph.apply(edit, f"{node.op_type} as operators with Q and DQ")


def _rewritten(graph: GraphView, node: NodeProto, form: QOperator) -> Edit:
    """The edit for an operator that makes codes."""
    if attributes.has_references(node):
        raise DeclinedError("the operator differs from call to call")
    if attributes.get(node, "channels_last", 0):
        raise DeclinedError("its channels are last")
    edit = Edit(graph, node)
    inputs = [node.input[slot] for slot in form.plain]
    for index, operand in enumerate(form.operands_of(len(node.input))):
        axis = _axis(graph, node, form, operand) if index == 1 else None
        inputs.append(_dequantize(graph, edit, node, operand, axis))
    if form.result is None:
        return _to_floats(edit, form, inputs)
    if form.bias is not None and _input(node, form.bias):
        inputs.append(_bias(graph, edit, node, form))
    if form.meaning == "Softmax" and (attributes.get(node, "opset", 0) >= 13) != (
        graph.opset() >= 13
    ):
        raise DeclinedError("its Softmax is of another opset")
    settings = _settings(node)
    if not _input(node, form.result[0]):
        edit.rewrite(form.meaning, inputs, settings)
        return edit
    scale, zero = (_input(node, slot) for slot in form.result)
    check_result(form.meaning, graph.array(scale))
    if not zero and graph.dtype(node.output[0]) != TensorProto.UINT8:
        raise DeclinedError("it has no zero point, which tells the type of its codes")
    made = edit.insert(form.meaning, inputs, 1, settings)
    edit.rewrite("QuantizeLinear", [*made, scale, *([zero] if zero else [])])
    return edit


def _to_floats(edit: Edit, form: QOperator, inputs: list[str]) -> Edit:
    """The end of one that makes floats, whose bias is of floats, too."""
    bias = "" if form.bias is None else _input(edit.node, form.bias)
    if bias:
        edit.rewrite("Add", [*edit.insert(form.meaning, inputs), bias])
    else:
        edit.rewrite(form.meaning, inputs)
    return edit


def _dynamic(graph: GraphView, node: NodeProto) -> Edit:
    """DynamicQuantizeMatMul: its weight is quantized, its input on the way."""
    form = BY_KEY["com.microsoft::MatMulIntegerToFloat"]
    weight = (1, 2, 3)
    edit = Edit(graph, node)
    made = edit.insert("DynamicQuantizeLinear", [node.input[0]], 3)
    first = edit.insert("DequantizeLinear", made)
    axis = _axis(graph, node, form, weight)
    inputs = [*first, _dequantize(graph, edit, node, weight, axis)]
    return _to_floats(edit, msgspec.structs.replace(form, bias=4), inputs)


def _settings(node: NodeProto) -> dict[str, Any]:
    return {
        item.name: attributes.value_of(item)
        for item in node.attribute
        if item.name not in ONLY_ON_CODES
    }


def _input(node: NodeProto, slot: int) -> str:
    """The name at a slot, empty where there is none."""
    return node.input[slot] if slot < len(node.input) else ""


def _axis(
    graph: GraphView, node: NodeProto, form: QOperator, operand: Operand
) -> int | None:
    """The axis of the scales of the second operand; None where it has one scale."""
    if _is_single(graph, node.input[operand[1]]):
        return None
    shape = graph.shape(node.input[operand[0]])
    transposed = bool(attributes.get(node, "transB", 0))
    axis = None if shape is None else weight_axis(form.meaning, transposed, len(shape))
    scales = graph.shape(node.input[operand[1]])
    if axis is None or shape is None or scales != (shape[axis],):
        raise DeclinedError("its scales are not one for each output channel")
    if graph.opset() < PER_AXIS_SINCE:
        raise DeclinedError(f"scales along an axis need opset {PER_AXIS_SINCE}")
    return axis


def _is_single(graph: GraphView, scale: str) -> bool:
    return graph.shape(scale) in ((), (1,))


def _dequantize(
    graph: GraphView, edit: Edit, node: NodeProto, operand: Operand, axis: int | None
) -> str:
    codes, scale, zero = (_input(node, slot) for slot in operand)
    if axis is None and not _is_single(graph, scale):
        raise DeclinedError(f"it may have several scales in {scale!r}")
    inputs = [codes, scale, *_zero_point(graph, edit, zero, scale, axis)]
    return edit.insert("DequantizeLinear", inputs, 1, {"axis": axis})[0]


def _zero_point(
    graph: GraphView, edit: Edit, zero: str, scale: str, axis: int | None
) -> list[str]:
    """The zero point in the shape of the scale; left out where it is 0 anyway."""
    if not zero:
        return []
    if axis is None or graph.shape(zero) == graph.shape(scale):
        return [zero]
    array, count = graph.array(zero), graph.shape(scale)
    if array is None or array.size != 1 or count is None:
        raise DeclinedError("its zero point is of another shape than its scales")
    if array.reshape(()) == 0:
        return []
    return [edit.add_weight(np.repeat(array.reshape(-1), int(count[0] or 0)), zero)]


def _bias(graph: GraphView, edit: Edit, node: NodeProto, form: QOperator) -> str:
    """DequantizeLinear of the bias, at the scale of the products (and alpha of Gemm)."""
    assert form.bias is not None
    name = _input(node, form.bias)
    first, second = form.operands
    scales = graph.array(node.input[first[1]]), graph.array(node.input[second[1]])
    if scales[0] is None or scales[1] is None:
        raise DeclinedError("the scale of its bias is not a constant")
    shape = graph.shape(name)
    scale = scales[0].reshape(()) * scales[1]
    scale = np.asarray(scale * np.float32(attributes.get(node, "alpha", 1.0)))
    scale = scale.astype(np.float32)
    if scale.size == 1:
        scale = scale.reshape(())
    elif shape != scale.shape:
        raise DeclinedError("its bias is not one for each output channel")
    made = edit.add_weight(scale, f"{name}_scale")
    axis = 0 if scale.ndim else None
    return edit.insert("DequantizeLinear", [name, made], 1, {"axis": axis})[0]


class _Integer(msgspec.Struct):
    """A product of integers, and how its result becomes floats."""

    graph: GraphView
    node: NodeProto

    def edit(self) -> Edit:
        """Conv or MatMul in place of the last node; raises DeclinedError."""
        graph, node = self.graph, self.node
        if attributes.has_references(node):
            raise DeclinedError("the operator differs from call to call")
        bias, cast = self._bias(node.output[0])
        if graph.op(cast) != "Cast" or attributes.get(cast, "to") != TensorProto.FLOAT:
            raise DeclinedError("its result is not cast to float32")
        last, factor = self._partner(cast.output[0], "Mul")
        source, constants = self._factors(factor)
        edit = Edit(graph, last)
        inputs = [
            edit.insert("DequantizeLinear", [node.input[0], *source.output[1:]])[0],
            self._weight(edit, constants),
        ]
        meaning = _INTEGER[graph.op(node)]
        settings = _settings(node)
        if not bias:
            edit.rewrite(meaning, inputs, settings)
            return edit
        made = edit.insert(meaning, inputs, 1, settings)
        moved = edit.insert("Cast", [bias], 1, {"to": TensorProto.FLOAT})
        edit.rewrite("Add", [*made, *edit.insert("Mul", [*moved, factor])])
        return edit

    def _reader(self, name: str) -> NodeProto:
        use = self.graph.only_use(name)
        if use is None or use.view is not self.graph:
            raise DeclinedError(f"its result {name!r} is not read by one node")
        return use.node

    def _bias(self, name: str) -> tuple[str, NodeProto]:
        """A sum with integers that comes first, if one does, and what comes then."""
        node = self._reader(name)
        if self.graph.op(node) != "Add":
            return "", node
        node, bias = self._partner(name, "Add")
        return bias, self._reader(node.output[0])

    def _partner(self, name: str, op_type: str) -> tuple[NodeProto, str]:
        """The operator that alone reads `name`, and its other operand."""
        node = self._reader(name)
        if self.graph.op(node) != op_type or len(node.input) != 2:
            raise DeclinedError(f"its result is not read by a {op_type}")
        other = node.input[1] if node.input[0] == name else node.input[0]
        return node, other

    def _factors(self, name: str) -> tuple[NodeProto, list[str]]:
        """The DynamicQuantizeLinear whose scale is a factor, and the other factors."""
        stack, leaves = [name], []
        while stack:
            leaf = stack.pop()
            maker = self.graph.producer(leaf)
            if maker is not None and self.graph.op(maker) == "Mul":
                stack += maker.input
            else:
                leaves.append(leaf)
        source = self.graph.producer(self.node.input[0])
        if source is None or self.graph.op(source) != "DynamicQuantizeLinear":
            raise DeclinedError("its input is not made by DynamicQuantizeLinear")
        quantized, scale, zero = source.output
        read = self.node.input[0], _input(self.node, 2)
        if read != (quantized, zero) or leaves.count(scale) != 1:
            raise DeclinedError("it does not read what belongs to its scale")
        leaves.remove(scale)
        return source, leaves

    def _weight(self, edit: Edit, factors: list[str]) -> str:
        """DequantizeLinear of the weight, by the constant among the factors."""
        graph, name = self.graph, self.node.input[1]
        shape = graph.shape(name)
        values = [graph.array(factor) for factor in factors]
        if graph.weight(name) is None or shape is None:
            raise DeclinedError("its weight is not a constant")
        if len(values) > 1 or any(value is None for value in values):
            raise DeclinedError("its result has other factors than two scales")
        found = values[0] if values else None
        scale = np.ones((), np.float32) if found is None else found
        axis = weight_axis(_INTEGER[graph.op(self.node)], False, len(shape))
        if scale.size == 1:
            axis, scale = None, scale.reshape(())
        elif axis is None or not self._is_per_channel(scale, int(shape[axis] or 0)):
            raise DeclinedError("its scales are not one for each output channel")
        elif graph.opset() < PER_AXIS_SINCE:
            raise DeclinedError(f"scales along an axis need opset {PER_AXIS_SINCE}")
        made = self._scale(edit, factors, scale)
        zero = self._zero_point(edit, axis, scale)
        inputs = [name, made, *zero]
        return edit.insert("DequantizeLinear", inputs, 1, {"axis": axis})[0]

    def _is_per_channel(self, scale: Array, channels: int) -> bool:
        """Whether it broadcasts along the channels of the result, and no other axis."""
        behind = 0
        if self.graph.op(self.node) == "ConvInteger":
            shape = self.graph.shape(self.node.input[1])
            behind = len(shape or ()) - 2
        place = scale.ndim - 1 - behind
        return place >= 0 and scale.shape[place] == channels == scale.size

    def _scale(self, edit: Edit, factors: list[str], scale: Array) -> str:
        """The constant itself where its shape is right."""
        if factors and self.graph.shape(factors[0]) == scale.reshape(-1).shape:
            return factors[0]
        if factors and not scale.ndim and self.graph.shape(factors[0]) == ():
            return factors[0]
        hint = factors[0] if factors else f"{self.node.input[1]}_scale"
        return edit.add_weight(scale.reshape(-1) if scale.ndim else scale, hint)

    def _zero_point(self, edit: Edit, axis: int | None, scale: Array) -> list[str]:
        """In the shape of the scale; left out where it is 0 anyway."""
        name = _input(self.node, 3)
        if not name:
            return []
        array = self.graph.array(name)
        if array is None:
            raise DeclinedError("the zero point of its weight is not a constant")
        if not array.any():
            return []
        if axis is None and array.size != 1:
            raise DeclinedError("its weight has more zero points than scales")
        if axis is not None and array.shape == (math.prod(scale.shape),):
            return [name]
        if array.size != 1:
            raise DeclinedError("its zero points are not one for each output channel")
        if axis is None:
            return [name]
        return [edit.add_weight(np.full(scale.size, array.reshape(())), name)]
