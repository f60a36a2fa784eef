"""What a model costs: parameters and multiply-accumulates, counted from the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.graph import GraphView, constant_value
from onnxopt.model import Model
from onnxopt.symbolic.dim import at_one
from onnxopt.weights import elements

_QUANTIZED = {
    # operator: input slots that hold scales and zero points
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
}


def nodes(model: Model) -> int:
    """Nodes of all scopes."""
    return sum(len(view.proto.node) for view in model.views())


def constants(model: Model) -> Iterator[tuple[GraphView, str, TensorProto]]:
    """Every constant tensor: initializers and the values of Constant nodes."""
    for view in model.views():
        for tensor in view.initializers():
            yield view, tensor.name, tensor
        for node in view.proto.node:
            value = constant_value(node)
            if value is not None:
                yield view, node.output[0], value


def parameters(model: Model) -> int:
    """Elements of all constants, less scales and zero points."""
    return sum(
        elements(tensor)
        for view, name, tensor in constants(model)
        if not _is_quantization_parameter(view, name)
    )


def _is_quantization_parameter(view: GraphView, name: str) -> bool:
    uses = view.uses(name)
    return bool(uses) and all(
        use.index in _QUANTIZED.get(use.node.op_type, ()) for use in uses
    )


def macs(model: Model) -> int | None:
    """Multiply-accumulates of one run, every symbolic dim at 1.

    Convolutions and matrix products of the main graph and its subgraphs, each counted
    once; None where a shape that it needs is unknown.
    """
    found = list(_counts(model))
    return None if None in found else sum(filter(None, found))


def known_macs(model: Model) -> int:
    """The same, at least: nodes of unknown shapes, and functions, count nothing."""
    return sum(filter(None, _counts(model)))


def _counts(model: Model) -> Iterator[int | None]:
    """A count per counted node; None where a shape is unknown, or open in a function."""
    for view in model.views():
        for node in view.proto.node:
            count = _COUNTED.get(view.op(node))
            if count:
                yield None if view.is_function else count(view, node)


def _dims(view: GraphView, name: str) -> list[int] | None:
    dims = view.fact(name).dims
    return None if dims is None else [max(at_one(size), 0) for size in dims]


def _conv(weight: int) -> Callable[[GraphView, NodeProto], int | None]:
    def count(view: GraphView, node: NodeProto) -> int | None:
        out, kernel = _dims(view, node.output[0]), _dims(view, node.input[weight])
        if out is None or kernel is None:
            return None
        return math.prod(out) * math.prod(kernel[1:])

    return count


def _conv_transpose(view: GraphView, node: NodeProto) -> int | None:
    given, kernel = _dims(view, node.input[0]), _dims(view, node.input[1])
    if given is None or kernel is None:
        return None
    return math.prod(given) * math.prod(kernel[1:])


def _matmul(left: int) -> Callable[[GraphView, NodeProto], int | None]:
    def count(view: GraphView, node: NodeProto) -> int | None:
        out, operand = _dims(view, node.output[0]), _dims(view, node.input[left])
        if out is None or not operand:
            return None
        return math.prod(out) * operand[-1]

    return count


def _gemm(view: GraphView, node: NodeProto) -> int | None:
    out, operand = _dims(view, node.output[0]), _dims(view, node.input[0])
    if out is None or operand is None or len(operand) != 2:
        return None
    return math.prod(out) * operand[0 if attributes.get(node, "transA", 0) else 1]


_COUNTED: dict[str, Callable[[GraphView, NodeProto], int | None]] = {
    "Conv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul(0),
    "MatMulInteger": _matmul(0),
    "QLinearMatMul": _matmul(0),
    "Gemm": _gemm,
}
