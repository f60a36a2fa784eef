"""fold-qdq-weights: store the integer weights that a fake-quantized export computes.

    q = QuantizeLinear(W, s, z)          q: int8 initializer
    w = DequantizeLinear(q, s, z)   ->   w = DequantizeLinear(q, s, z)
    y = Conv(x, w)                       y = Conv(x, w)

1. W, s and z are constants; per tensor, per axis or in blocks, any type that
   QuantizeLinear knows. Constant arithmetic on W before it (Transpose, Reshape, a mask's
   Mul) is folded by `fold-constants`, and so are scales that the graph computes.
2. The codes are those that ONNX Runtime computes, to the bit.
3. All QuantizeLinear nodes of one W go together; those with equal parameters share one
   initializer, so that tied weights are quantized once and stay tied.
4. DequantizeLinear stays: integer weights are never expanded to float.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.evaluate import EvaluationError, constant_model
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.quantization.quantize_linear import quantize
from onnxopt.report import Guarantee
from onnxopt.weights import Array


class FoldQdqWeights(Pass):
    """Replace QuantizeLinear of a constant by the integers that it computes."""

    name: ClassVar[str] = "fold-qdq-weights"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Weight by weight, with all the nodes that quantize it in this scope."""
        for node in graph.visit(self, ("QuantizeLinear",)):
            if not _is_constant(graph, node):
                continue
            edit = Edit(graph, node)
            try:
                for same in _groups(graph, node.input[0]):
                    _fold(graph, context, edit, same)
            except EvaluationError as error:
                graph.skip(node, f"its codes could not be computed: {error}")
            else:
                graph.apply(edit, "the codes of a constant are constant")


def _is_constant(graph: GraphView, node: NodeProto) -> bool:
    return all(graph.weight(name) is not None for name in node.input if name) and (
        graph.model.proto.ir_version >= 4 or not graph.is_output(node.output[0])
    )


def _groups(graph: GraphView, weight: str) -> Iterator[list[NodeProto]]:
    """The nodes here that quantize `weight`, those together that can be one value.

    Where one of them makes an output of the scope, it is the first: its name stays.
    """
    for same in _by_parameters(graph, weight):
        outputs = [node for node in same if graph.is_output(node.output[0])]
        others = [node for node in same if not graph.is_output(node.output[0])]
        yield [*outputs[:1], *others]
        yield from ([node] for node in outputs[1:])


def _by_parameters(graph: GraphView, weight: str) -> list[list[NodeProto]]:
    """The nodes here that quantize `weight`, those with equal results together."""
    groups: dict[tuple[object, ...], list[NodeProto]] = {}
    for use in graph.home_uses(weight):
        node = use.node
        if use.view is graph and use.index == 0 and graph.op(node) == "QuantizeLinear":
            if attributes.has_references(node) or not _is_constant(graph, node):
                continue
            settings = sorted(item.SerializeToString() for item in node.attribute)
            groups.setdefault((*node.input, *settings), []).append(node)
    return list(groups.values())


def _fold(graph: GraphView, context: Context, edit: Edit, same: list[NodeProto]) -> None:
    """The first node's output becomes an initializer, and the others' readers read it."""
    first, *twins = same
    codes = _codes(graph, context, first)
    name = first.output[0]
    for twin in twins:
        edit.bypass(twin, {twin.output[0]: name})
    edit.erase(first)
    edit.add_weight(codes, name, name=name)


def _codes(graph: GraphView, context: Context, node: NodeProto) -> Array:
    """What the node computes: in NumPy where that is exact, else by ONNX Runtime."""
    arrays = [graph.array(name) if name else None for name in node.input]
    values, scale = arrays[0], arrays[1]
    zero_point = arrays[2] if len(arrays) > 2 else None
    plain = not any(
        attributes.get(node, name, 0)
        for name in ("output_dtype", "block_size", "precision")
    )
    if plain and values is not None and scale is not None:
        if zero_point is None:
            zero_point = np.zeros(scale.shape, np.uint8)
        codes = quantize(values, scale, zero_point, attributes.get(node, "axis", 1))
        if codes is not None:
            return codes
    name = node.output[0]
    return context.evaluator.evaluate(constant_model(graph, [node], [name]))[name]
