"""fuse-operators: one operator for the several that an exporter wrote in its place.

    e = Erf(x / 1.4142135)
    y = x * 0.5 * (e + 1)       ->    y = Gelu(x)

1. The operators are in `fusions`, each from the opset on that has it.
2. In float32; elsewhere the steps round and overflow on their own.
3. Constants are what the operator's definition says, to a few roundings of float32;
   epsilon and the like are where the operator adds them.
4. Only the pattern reads the values inside of it.

In the last steps below overflow (an intermediate product beyond 3.4e38) the operator
may be finite where the steps are not.
"""

from __future__ import annotations

import functools
from typing import ClassVar

from onnx import NodeProto

from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.passes.simplify.fusions import FUSIONS
from onnxopt.passes.simplify.fusions.fusion import Fusion
from onnxopt.pattern import Failure, match
from onnxopt.report import Guarantee


class FuseOperators(Pass):
    """Put LayerNormalization, Gelu, Softmax... in the place of their single steps."""

    name: ClassVar[str] = "fuse-operators"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Compare every node that a pattern may end in."""
        if graph.opset() < 7:
            return  # operators broadcast by attribute
        table = _by_end(graph.opset())
        for node in graph.visit(self, table):
            any(_fuse(graph, node, fusion) for fusion in table[node.op_type])


@functools.cache
def _by_end(opset: int) -> dict[str, list[Fusion]]:
    """The fusions for `opset`, by the operators that their patterns end in."""
    table: dict[str, list[Fusion]] = {}
    for fusion in FUSIONS:
        if opset >= fusion.since:
            for end in fusion.ends():
                table.setdefault(end, []).append(fusion)
    return table


def _fuse(graph: GraphView, node: NodeProto, fusion: Fusion) -> bool:
    nearest = Failure(0, "")
    for pattern in fusion.patterns:
        found = match(graph, node, pattern)
        if isinstance(found, Failure):
            nearest = max(nearest, found, key=lambda failure: failure.depth)
            continue
        try:
            edit = fusion.build(graph, node, found)
        except DeclinedError as declined:
            graph.skip(node, f"no {fusion.op_type}: {declined}")
            return False
        return graph.apply(edit, f"these operators are one {fusion.op_type}")
    if nearest.depth >= fusion.telling:
        graph.skip(node, f"no {fusion.op_type}: {nearest.reason}")
    return False
