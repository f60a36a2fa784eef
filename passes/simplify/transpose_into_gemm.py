"""transpose-into-gemm: a product of matrices reads its factors transposed by itself.

    t = Transpose(a)
    y = Gemm(t, b, c)           ->    y = Gemm <transA = 1> (a, b, c)

1. Either factor of a Gemm, or of a MatMul of rank 2 (which becomes a Gemm), from opset 11
   on: before, a Gemm has to add something.
2. Only Gemms, and MatMuls of that kind, read what is transposed, so that it goes.
3. Not a weight of codes that nothing else reads: `move-qdq` transposes these in the file,
   and ONNX Runtime runs a Gemm on integer weights alone only where it transposes none.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.passes.simplify.matmul_to_gemm import is_matrix_product
from onnxopt.report import Guarantee

_FLAGS = ("transA", "transB")


class TransposeIntoGemm(Pass):
    """Let Gemm, and MatMul of rank 2, transpose what they read."""

    name: ClassVar[str] = "transpose-into-gemm"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the factors of every product."""
        for node in graph.visit(self, ("Gemm", "MatMul")):
            edit = Edit(graph, node)
            for slot, flag in enumerate(_FLAGS):
                source = _transposed(graph, node.input[slot])
                if source is not None:
                    edit.set_input(node, slot, source)
                    flipped = 1 - int(bool(attributes.get(node, flag, 0)))
                    edit.set_attribute(node, flag, flipped or None)
            if edit.is_empty or not _is_gemm(graph, node):
                continue
            if node.op_type == "MatMul":
                edit.set_op_type(node, "Gemm")
            graph.apply(edit, "a Gemm transposes what it reads")


def _transposed(graph: GraphView, name: str) -> str | None:
    """What `name` is the transpose of, where nobody but Gemms wants it transposed."""
    node = graph.producer(name)
    if node is None or graph.op(node) != "Transpose" or attributes.has_references(node):
        return None
    if attributes.get(node, "perm", [1, 0]) != [1, 0] or graph.is_output(name):
        return None
    uses = graph.uses(name)
    if graph.is_pinned(name) or any(use.view is not graph for use in uses):
        return None
    is_factor = all(use.index < 2 and _is_gemm(graph, use.node) for use in uses)
    return node.input[0] if is_factor and not _is_of_codes(graph, node) else None


def _is_of_codes(graph: GraphView, node: NodeProto) -> bool:
    """Whether `node` alone reads, dequantized, codes that are constant or become so."""
    name = node.input[0]
    for op in ("DequantizeLinear", "QuantizeLinear"):
        maker = graph.producer(name)
        if maker is None or graph.op(maker) != op or graph.only_use(name) is None:
            return False
        name = maker.input[0]
        if graph.weight(name) is not None:
            return op != "DequantizeLinear" or graph.only_use_everywhere(name) is not None
    return False


def _is_gemm(graph: GraphView, node: NodeProto) -> bool:
    if attributes.has_references(node):
        return False
    if graph.op(node) == "MatMul":
        return graph.opset() >= 11 and is_matrix_product(graph, node)
    return graph.op(node) == "Gemm"
