"""expand-broadcast: let operators that broadcast do what an Expand did for them.

    t = Expand(x, shape)
    y = Mul(t, z)           ->    y = Mul(x, z)        (z has the shape of y)

1. Each reader is an elementwise operator that broadcasts, and another of its inputs is
   sure to have the shape of its output. So that stays.
2. All readers can do without; else the Expand would be there still.
3. Not before Pow: ONNX Runtime computes it in another way for an exponent of one element.
"""

from __future__ import annotations

from typing import ClassVar

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView, Use
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

_READERS = frozenset(
    {
        "Add",
        "And",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Mul",
        "Or",
        "Sub",
        "Where",
        "Xor",
    }
)


class DropExpands(Pass):
    """Remove Expand before operators that broadcast."""

    name: ClassVar[str] = "expand-broadcast"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Ask all readers of each Expand."""
        if graph.opset() < 8:
            return  # operators broadcast by attribute before 7; Expand is of 8
        for node in graph.visit(self, ("Expand",)):
            name = node.output[0]
            uses = graph.uses(name)
            if not uses or graph.is_output(name) or graph.is_pinned(name):
                continue
            if all(_does_without(graph, use, name) for use in uses):
                edit = Edit(graph, node)
                edit.bypass(node, {name: node.input[0]})
                graph.apply(edit, "what reads it broadcasts")


def _does_without(graph: GraphView, use: Use, name: str) -> bool:
    """Whether the reader's output has the shape of another input than `name`."""
    node = use.node
    if use.view.op(node) not in _READERS or use.view is not graph:
        return False
    if attributes.has_references(node):
        return False
    others = [other for other in node.input if other != name]
    return any(graph.same_shape(other, node.output[0]) for other in others)
