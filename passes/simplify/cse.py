"""cse: compute once what is computed twice (common subexpression elimination).

    a = Shape(x)                a = Shape(x)
    b = Shape(x)          ->    (readers of b read a)

1. Two nodes of one scope with the same operator, inputs and attributes.
2. Standard operators only, and none that is random or holds a subgraph.
3. The earlier one stays, with its names.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import AttributeProto, NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.operators import RANDOM
from onnxopt.report import Guarantee


class ShareCommonSubexpressions(Pass):
    """Let equal nodes be one."""

    name: ClassVar[str] = "cse"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """In topological order, so that what reads twins becomes twins in turn."""
        changed = [node for node in graph.visit(self) if _is_comparable(graph, node)]
        if not changed:
            return
        firsts: dict[Key, NodeProto] = {}
        for node in graph.nodes():
            if attributes.has_references(node) or not _is_comparable(graph, node):
                continue
            first = firsts.setdefault(_key(node), node)
            if first is not node:
                _merge(graph, first, node)


Key = tuple[str, tuple[str, ...], tuple[bool, ...], tuple[bytes, ...]]


def _key(node: NodeProto) -> Key:
    """Nodes with equal keys compute equal outputs."""
    settings = sorted(
        item.SerializeToString(deterministic=True) for item in node.attribute
    )
    made = tuple(bool(name) for name in node.output)
    return node.op_type, tuple(node.input), made, tuple(settings)


def _merge(graph: GraphView, first: NodeProto, second: NodeProto) -> None:
    edit = Edit(graph, second)
    pairs = zip(second.output, first.output, strict=True)
    edit.bypass(second, {old: new for old, new in pairs if old})
    graph.apply(edit, f"{graph.label(first)} computes the same")


def _is_comparable(graph: GraphView, node: NodeProto) -> bool:
    if not any(node.input) or graph.op(node) != node.op_type or node.op_type in RANDOM:
        return False
    inner = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    return all(attribute.type not in inner for attribute in node.attribute)
