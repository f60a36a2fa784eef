"""cse: compute once what is computed twice (common subexpression elimination).

    a = Shape(x)                a = Shape(x)
    b = Shape(x)          ->    (readers of b read a)

1. Two nodes of one scope with the same operator, inputs and attributes.
2. Standard operators only, and none that is random or holds a subgraph.
3. The earlier one stays, with its names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from onnx import AttributeProto, NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


@dataclass(frozen=True)
class ShareCommonSubexpressions(Pass):
    """Let equal nodes be one."""

    name: ClassVar[str] = "cse"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Compare each node with the others that read its least read input."""
        for node in graph.visit(self):
            if not _is_comparable(graph, node):
                continue
            for twin in _twins(graph, node):
                first, second = (
                    (node, twin) if graph.precedes(node, twin) else (twin, node)
                )
                edit = Edit(graph, second)
                pairs = zip(second.output, first.output, strict=True)
                edit.bypass(second, {old: new for old, new in pairs if old})
                graph.apply(edit, f"{graph.label(first)} computes the same")
                if not graph.holds(node):
                    break


def _is_comparable(graph: GraphView, node: NodeProto) -> bool:
    if not any(node.input) or graph.op(node) != node.op_type or node.op_type in RANDOM:
        return False
    inner = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    return all(attribute.type not in inner for attribute in node.attribute)


def _twins(graph: GraphView, node: NodeProto) -> Iterator[NodeProto]:
    readers = min((graph.home_uses(name) for name in node.input if name), key=len)
    for use in readers:
        twin = use.node
        if twin is node or use.view is not graph or not graph.holds(twin):
            continue
        same = twin.op_type == node.op_type and list(twin.input) == list(node.input)
        if same and _is_comparable(graph, twin) and _settings(twin) == _settings(node):
            made = [bool(name) for name in twin.output]
            if made == [bool(name) for name in node.output]:
                yield twin


def _settings(node: NodeProto) -> list[bytes]:
    return sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
