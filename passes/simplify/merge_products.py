"""merge-products: one MatMul for several of one value with constant weights.

    q = MatMul(x, Wq) + bq            t = MatMul(x, [Wq Wk Wv]) + [bq bk bv]
    k = MatMul(x, Wk) + bk      ->    q, k, v = Split(t, axis = -1)
    v = MatMul(x, Wv) + bv

1. MatMul of the same value by constant matrices [K, N], of which nobody else reads.
2. An Add of a constant [N] behind each of them merges with the others, where all have one
   and nothing else reads the products.
3. Only where fewer nodes remain. From opset 13 on (Split by an input before it an
   attribute says the sizes).

Each column of a product is computed as before; ONNX Runtime may block the sums in another
way.
"""

from __future__ import annotations

import functools
from typing import ClassVar, NamedTuple

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.weights import Array

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


class _Product(NamedTuple):
    """A MatMul, its columns, and the Add of a constant behind it where there is one."""

    node: NodeProto
    columns: int
    add: NodeProto | None
    bias: str

    @property
    def output(self) -> str:
        """What its readers read."""
        return str((self.add or self.node).output[0])


class MergeProducts(Pass):
    """Multiply once what is multiplied by several constant matrices (Q, K and V)."""

    name: ClassVar[str] = "merge-products"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Group the products by what they multiply."""
        if graph.opset() < 13:
            return
        groups: dict[tuple[str, int, int], list[NodeProto]] = {}
        seen: set[int] = set()
        for node in graph.visit(self, ("MatMul",)):
            weight = graph.weight(node.input[1])
            if weight is None or weight.data_type not in _FLOATS:
                continue
            if len(weight.dims) != 2 or id(node) in seen:
                continue
            seen.add(id(node))
            key = (node.input[0], weight.dims[0], weight.data_type)
            groups.setdefault(key, []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                _merge(graph, nodes)


def _merge(graph: GraphView, nodes: list[NodeProto]) -> None:
    nodes = [n for n in nodes if graph.only_use_everywhere(n.input[1]) is not None]
    products = [_product(graph, node) for node in nodes]
    if any(product.add is None for product in products):
        products = [product._replace(add=None, bias="") for product in products]
    has_bias = bool(products) and products[0].add is not None
    if len(products) < (2 if has_bias else 3):
        return  # no fewer nodes
    first = functools.reduce(
        lambda one, other: one if graph.precedes(one, other) else other, nodes
    )
    edit = Edit(graph, first, max_growth=256)
    hint = f"{first.input[1]}_merged"
    whole = edit.add_weight(_side_by_side(graph, products), hint)
    (made,) = edit.insert("MatMul", [first.input[0], whole])
    if has_bias:
        biases = [graph.array(product.bias) for product in products]
        joined = np.concatenate([b for b in biases if b is not None])
        bias = edit.add_weight(joined, f"{products[0].bias}_merged")
        (made,) = edit.insert("Add", [made, bias])
    sizes = np.array([product.columns for product in products], dtype=np.int64)
    lengths = edit.add_weight(sizes, f"{made}_sizes")
    parts = edit.insert("Split", [made, lengths], len(products), {"axis": -1})
    for product, part in zip(products, parts, strict=True):
        if product.add is not None:
            edit.bypass(product.add, {product.output: part})
            edit.erase(product.node)
        else:
            edit.bypass(product.node, {product.output: part})
    graph.apply(edit, f"{len(products)} products of one value")


def _side_by_side(graph: GraphView, products: list[_Product]) -> Array:
    """The weights as one, of which no two are in memory beside it at a time."""
    first = graph.weight(products[0].node.input[1])
    assert first is not None, "the weights are constants"
    columns = sum(product.columns for product in products)
    dtype = helper.tensor_dtype_to_np_dtype(first.data_type)
    whole = np.empty((first.dims[0], columns), dtype)
    start = 0
    for product in products:
        end = start + product.columns
        whole[:, start:end] = graph.array(product.node.input[1])
        start = end
    return whole


def _product(graph: GraphView, node: NodeProto) -> _Product:
    weight = graph.weight(node.input[1])
    assert weight is not None, "the weights are constants"
    columns = int(weight.dims[1])
    use = graph.only_use(node.output[0])
    if use is None or use.view is not graph or graph.op(use.node) != "Add":
        return _Product(node, columns, None, "")
    bias = use.node.input[1 - use.index]
    tensor = graph.weight(bias)
    if tensor is None or list(tensor.dims) != [columns]:
        return _Product(node, columns, None, "")
    return _Product(node, columns, use.node, bias)
