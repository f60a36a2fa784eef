"""matmul-to-gemm: a MatMul of rank 2 and the Add behind it are one Gemm.

    t = MatMul(a, b)
    y = Add(t, c)               ->    y = Gemm(a, b, c)

1. Both factors are of rank 2, and of a float type that Gemm has.
2. c broadcasts to the product, and does not broadcast it.
3. The product has no other reader. From opset 7 on: before, a Gemm broadcasts by
   attribute.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import FLOATS
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee


class MatMulToGemm(Pass):
    """Make a Gemm of a MatMul of rank 2 and an Add."""

    name: ClassVar[str] = "matmul-to-gemm"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the two values that every Add adds."""
        for node in graph.visit(self, ("Add",)):
            if graph.opset() < 7:
                return
            for slot in (0, 1):
                product = graph.producer(node.input[slot])
                if product is None or graph.op(product) != "MatMul":
                    continue
                if _is_gemm(graph, product, node.input[1 - slot]):
                    edit = Edit(graph, node)
                    edit.rewrite("Gemm", [*product.input, node.input[1 - slot]])
                    graph.apply(edit, "a Gemm multiplies and adds")
                    break


def _is_gemm(graph: GraphView, product: NodeProto, added: str) -> bool:
    """Whether the sum of the product and `added` is what a Gemm computes."""
    if graph.only_use(product.output[0]) is None:
        return False
    if not is_matrix_product(graph, product):
        return False
    return _broadcasts_to(graph, added, product.output[0])


def is_matrix_product(graph: GraphView, product: NodeProto) -> bool:
    """Whether a MatMul is of two matrices of floats: a Gemm, but for its name."""
    shapes = [graph.shape(name) for name in product.input]
    kind = graph.dtype(product.input[0])
    if kind not in FLOATS or (FLOATS[kind] == "bfloat16" and graph.opset() < 13):
        return False
    return all(shape is not None and len(shape) == 2 for shape in shapes)


def _broadcasts_to(graph: GraphView, name: str, other: str) -> bool:
    """Whether `name` surely takes the dims of `other`, which stay what they are."""
    dims, shape = graph.shape(name), graph.shape(other)
    if dims is None or shape is None or len(dims) > len(shape):
        return False
    if graph.same_shape(name, other):
        return True
    aligned = shape[len(shape) - len(dims) :]
    return all(
        dim == 1 or (isinstance(dim, int) and dim == size)
        for dim, size in zip(dims, aligned, strict=True)
    )
