"""reshape-transpose: a Transpose between two Reshapes that undo one another.

    a = Reshape(x, [-1, 49, 32])        x: [n, 3, 49, 32]
    b = Transpose(a, [0, 2, 1])
    y = Reshape(b, [-1, 3, 32, 49])     ->    y = Transpose(x, [0, 1, 3, 2])

1. The first Reshape joins axes that stand side by side (or parts none); the second parts
   each of them, where the Transpose has moved it, into the same sizes.
2. Sizes that are no numbers count where they are sure to be equal.
3. Nothing else reads the values between, which go.

(The dynamo exporter writes attention so.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.symbolic.dim import Dim, product


class ReshapeTranspose(Pass):
    """Let Reshape, Transpose, Reshape be one Transpose where they only move axes."""

    name: ClassVar[str] = "reshape-transpose"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the last Reshape of each three."""
        for last in graph.visit(self, ("Reshape",)):
            middle = _before(graph, last, "Transpose")
            first = _before(graph, middle, "Reshape") if middle is not None else None
            if middle is None or first is None:
                continue
            perm = _permutation(graph, first, middle, last)
            if perm is not None:
                edit = Edit(graph, last)
                edit.rewrite("Transpose", [first.input[0]], {"perm": perm})
                graph.apply(edit, "the Reshapes around a Transpose undo one another")


def _before(graph: GraphView, node: NodeProto, op_type: str) -> NodeProto | None:
    """The node of a type that makes the first input, which nothing else reads."""
    maker = graph.producer(node.input[0])
    if maker is None or graph.op(maker) != op_type or attributes.has_references(maker):
        return None
    return maker if graph.only_use(node.input[0]) is not None else None


def _permutation(
    graph: GraphView, first: NodeProto, middle: NodeProto, last: NodeProto
) -> list[int] | None:
    """The one permutation of the axes of what is read that does what the three do."""
    start, joined = graph.fact(first.input[0]).dims, graph.fact(first.output[0]).dims
    end, order = graph.fact(last.output[0]).dims, attributes.get(middle, "perm")
    if start is None or joined is None or end is None or order is None:
        return None
    groups = _groups(start, joined)
    if groups is None or len(start) == len(joined):
        return None
    axes = [axis for place in order for axis in groups[place]]
    return axes if [start[axis] for axis in axes] == list(end) else None


def _groups(parts: Sequence[Dim], joined: Sequence[Dim]) -> list[list[int]] | None:
    """For each of the sizes `joined`, the axes of `parts` side by side that make it."""
    groups: list[list[int]] = []
    axis = 0
    for size in joined:
        group: list[int] = []
        while axis < len(parts) and (not group or _made(parts, group) != size):
            group.append(axis)
            axis += 1
        if not group or _made(parts, group) != size:
            return None
        groups.append(group)
    return groups if axis == len(parts) else None


def _made(parts: Sequence[Dim], group: Sequence[int]) -> Dim:
    return product(parts[axis] for axis in group)
