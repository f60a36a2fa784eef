"""qdq-to-qoperator: operators on codes in place of operators between DQ and Q.

    a = DequantizeLinear(x, xs, xz)
    b = DequantizeLinear(w, ws, wz)        y = QLinearConv(x, xs, xz, w, ws, wz, ys, yz)
    c = Conv(a, b)                   ->
    y = QuantizeLinear(c, ys, yz)

1. Conv and MatMul; and where the target has ONNX Runtime's operators, or the model uses
   them, Add, Mul, Sigmoid, LeakyRelu, AveragePool, GlobalAveragePool, Concat, Softmax,
   Where and Gemm.
2. 8-bit codes with constant float32 scales, one for each value; weights also along the
   output channels, with equal zero points. The types that ONNX Runtime's kernels have.
3. A bias is DequantizeLinear of int32 at the scale xs ws, to the bit; of another one, or
   of floats, the rewrite is declined.
4. Softmax at a scale of 1/256, where ONNX Runtime's has no error of its own.
5. What the operator makes is read by QuantizeLinear alone. Conv and MatMul of what
   DynamicQuantizeLinear makes have no such reader: ConvInteger and MatMulInteger, times
   both scales.

Both forms round the same real number, computed with other roundings before: where it lies
midway between two codes, they can differ by one (`onnxopt.quantization.qoperators`). So
the pass is lossy: one code in 460,800 is more than validation takes for rounding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.parameters import (
    EIGHT_BITS,
    Parameters,
    integer_weight,
    parameters,
)
from onnxopt.quantization.qoperators import (
    BY_MEANING,
    MICROSOFT,
    QOperator,
    check_result,
    weight_axis,
)
from onnxopt.report import Guarantee

_INTEGER = {
    "Conv": ("ConvInteger", frozenset({TensorProto.UINT8})),
    "MatMul": ("MatMulInteger", EIGHT_BITS),
}
"""Products of integers, and the types of weights for which ONNX Runtime has kernels."""
_WITH_WEIGHT = ("Conv", "MatMul", "Gemm")
_PRODUCTS = (
    (TensorProto.UINT8, TensorProto.UINT8),
    (TensorProto.UINT8, TensorProto.INT8),
    (TensorProto.INT8, TensorProto.INT8),
)
"""The types of activations and weights that ONNX Runtime's kernels have."""


class QdqToQOperator(Pass):
    """Put operators on codes in the place of operators between DQ and Q."""

    name: ClassVar[str] = "qdq-to-qoperator"
    guarantee: ClassVar[Guarantee] = "lossy"

    def run(self, graph: GraphView, context: Context) -> None:
        """Operator by operator."""
        for node in graph.visit(self, tuple(BY_MEANING)):
            try:
                edit = _edit(graph, context, node)
            except DeclinedError as declined:
                graph.skip(node, str(declined))
                continue
            if edit is not None:
                graph.apply(edit, f"{node.op_type} of codes, as an operator on codes")


def _edit(graph: GraphView, context: Context, node: NodeProto) -> Edit | None:
    """What puts an operator on codes in its place; None where it is on values."""
    if not _all_dequantized(graph, node):
        return None
    source = _dynamic_source(graph, node)
    if source is not None:
        return _integer(graph, node, source)
    last = _quantizer(graph, node)
    if last is None:
        return None
    return _rewritten(graph, context, node, last, BY_MEANING[graph.op(node)])


def _quantizer(graph: GraphView, node: NodeProto) -> NodeProto | None:
    """The QuantizeLinear that alone reads what `node` makes."""
    use = graph.only_use(node.output[0])
    if use is None or use.view is not graph or use.index != 0:
        return None
    return use.node if graph.op(use.node) == "QuantizeLinear" else None


def _dequantizer(graph: GraphView, name: str) -> NodeProto | None:
    node = graph.producer(name)
    return node if node is not None and graph.op(node) == "DequantizeLinear" else None


def _all_dequantized(graph: GraphView, node: NodeProto) -> bool:
    """Whether the operands (a bias aside) come out of DequantizeLinear."""
    return all(_dequantizer(graph, name) for name in _operands(graph, node))


def _operands(graph: GraphView, node: NodeProto) -> list[str]:
    form = BY_MEANING[graph.op(node)]
    names = list(node.input[len(form.plain) :])
    return names if form.variadic else names[: len(form.operands)]


def _rewritten(
    graph: GraphView, context: Context, node: NodeProto, last: NodeProto, form: QOperator
) -> Edit:
    """The edit that puts the operator in the quantizer's place."""
    if attributes.has_references(node):
        raise DeclinedError("the operator differs from call to call")
    if form.domain and not _has_domain(graph, context, form.domain):
        raise DeclinedError(f"{form.op_type} is an operator of ONNX Runtime")
    made = parameters(graph, last)
    check_result(form.meaning, made.scale if made.is_per_tensor else None)
    sources = [_dequantizer(graph, name) for name in _operands(graph, node)]
    dequantizers = [source for source in sources if source is not None]
    read = [parameters(graph, source) for source in dequantizers]
    _check_types(graph, node, made, read)
    inputs: dict[int, str] = {
        slot: node.input[place] for place, slot in enumerate(form.plain)
    }
    edit = Edit(graph, last)
    slots = form.operands_of(form.operands[0][0] + 3 * len(dequantizers))
    for operand, source, found in zip(slots, dequantizers, read, strict=True):
        names = [*source.input, ""][:3]
        names[2] = names[2] or _zeros(edit, source, found)
        inputs.update(zip(operand, names, strict=True))
    if form.bias is not None and len(node.input) > 2 and node.input[2]:
        inputs[form.bias] = _bias(graph, node, read)
    assert form.result is not None
    names = [*last.input[1:], ""][:2]
    names[1] = names[1] or _zeros(edit, last, made)
    inputs.update(zip(form.result, names, strict=True))
    slots_in_order = [inputs.get(slot, "") for slot in range(max(inputs) + 1)]
    if form.domain and not graph.opset(form.domain):
        edit.import_domain(form.domain, 1)
    edit.rewrite(form.op_type, slots_in_order, _settings(graph, node), domain=form.domain)
    return edit


def _dynamic_source(graph: GraphView, node: NodeProto) -> NodeProto | None:
    """The DynamicQuantizeLinear whose codes a Conv or MatMul reads, if one does."""
    first = _dequantizer(graph, node.input[0])
    if first is None or graph.op(node) not in _INTEGER:
        return None
    source = graph.producer(first.input[0])
    if source is None or graph.op(source) != "DynamicQuantizeLinear":
        return None
    return source if list(first.input) == list(source.output) else None


def _integer(graph: GraphView, node: NodeProto, source: NodeProto) -> Edit:
    """ConvInteger or MatMulInteger, times both scales."""
    if attributes.has_references(node) or len(node.input) > 2:
        raise DeclinedError("it has a bias of floats, or differs from call to call")
    weight = integer_weight(graph, node.input[1])
    made = weight.parameters
    types = _INTEGER[graph.op(node)][1]
    if made.data_type not in types or made.scale.dtype != np.float32:
        raise DeclinedError("there is no kernel for its types of codes")
    _check_weight(graph, node, made)
    op_type = _INTEGER[graph.op(node)][0]
    codes, scale, zero = source.output
    edit = Edit(graph, node)
    inputs = [codes, weight.node.input[0], zero]
    if made.zero_point.any():
        point = made.zero_point.reshape(-1)[0]
        hint = f"{weight.node.input[0]}_zero_point"
        inputs.append(edit.add_weight(np.asarray(point), hint))
    product = edit.insert(op_type, inputs, 1, _settings(graph, node))
    floats = edit.insert("Cast", product, 1, {"to": TensorProto.FLOAT})
    factor = made.scale
    if factor.ndim and op_type == "ConvInteger":
        factor = factor.reshape(-1, *[1] * (len(weight.shape) - 2))
    name = weight.node.input[1]
    if factor.shape != graph.shape(name):
        name = edit.add_weight(factor, name)
    edit.rewrite("Mul", [*floats, *edit.insert("Mul", [scale, name])])
    return edit


def _has_domain(graph: GraphView, context: Context, domain: str) -> bool:
    if graph.opset(domain):
        return True
    # what a function imports is its own affair
    return domain in context.target.domains and domain == MICROSOFT


def _zeros(edit: Edit, node: NodeProto, made: Parameters) -> str:
    return edit.add_weight(made.zero_point, f"{node.output[0]}_zero_point")


def _check_types(
    graph: GraphView, node: NodeProto, made: Parameters, read: list[Parameters]
) -> None:
    """Raises DeclinedError where ONNX Runtime has no kernel."""
    first, meaning = read[0], graph.op(node)
    for item in (made, *read):
        if item.data_type not in EIGHT_BITS or item.scale.dtype != np.float32:
            raise DeclinedError("its codes are not 8 bits with float32 scales")
    if first.data_type != made.data_type:
        raise DeclinedError("it reads and makes codes of different types")
    weights = read[1:] if meaning in _WITH_WEIGHT else []
    for item in (made, first, *(read[1:] if not weights else ())):
        if not item.is_per_tensor or item.data_type != made.data_type:
            raise DeclinedError("its codes are not all of one type with one scale each")
    for item in weights:
        if (first.data_type, item.data_type) not in _PRODUCTS:
            raise DeclinedError("there is no kernel for its types of codes")
        _check_weight(graph, node, item)


def _check_weight(graph: GraphView, node: NodeProto, made: Parameters) -> None:
    if made.is_per_tensor:
        return
    shape = graph.shape(node.input[1])
    transposed = bool(attributes.get(node, "transB", 0))
    axis = None
    if shape is not None:
        axis = weight_axis(graph.op(node), transposed, len(shape))
    if made.is_blocked or shape is None or made.axis % len(shape) != axis:
        raise DeclinedError("its scales are not along the output channels")
    if len(set(made.zero_point.tolist())) > 1:
        raise DeclinedError("its zero points differ from channel to channel")
    if graph.op(node) == "MatMul" and len(shape) != 2:
        raise DeclinedError("its weight is not of rank 2")


def _bias(graph: GraphView, node: NodeProto, read: list[Parameters]) -> str:
    """The integers of the bias, where their scale is that of the products."""
    source = _dequantizer(graph, node.input[2])
    if source is None:
        raise DeclinedError("its bias is not made by DequantizeLinear of int32")
    made = parameters(graph, source)
    if len(graph.shape(source.input[0]) or ()) != 1:
        raise DeclinedError("its bias is not one for each output channel")
    alpha = np.float32(attributes.get(node, "alpha", 1.0))
    wanted = read[0].scale * read[1].scale * alpha
    fits = made.scale.size == wanted.size or made.scale.size == 1
    if made.data_type != TensorProto.INT32 or made.zero_point.any():
        raise DeclinedError("its bias is not made by DequantizeLinear of int32")
    if not fits or not (made.scale.reshape(-1) == wanted.reshape(-1)).all():
        raise DeclinedError("the scale of its bias is not that of the products")
    if attributes.get(node, "beta", 1.0) != 1.0:
        raise DeclinedError("its bias has a factor")
    return str(source.input[0])


def _settings(graph: GraphView, node: NodeProto) -> dict[str, Any]:
    """Its attributes; those of Softmax also say what it means."""
    settings = {item.name: attributes.value_of(item) for item in node.attribute}
    match graph.op(node):
        case "AveragePool" if any(step > 1 for step in settings.pop("dilations", ())):
            raise DeclinedError("its windows are dilated")
        case "Gemm":
            settings.pop("beta", None)
            if settings.get("transA", 0):
                raise DeclinedError("its first operand is transposed")
        case "Softmax":
            settings.setdefault("axis", -1 if graph.opset() >= 13 else 1)
            settings["opset"] = graph.opset()
    return settings
