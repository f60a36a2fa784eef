"""dead-code: take out what no output depends on.

    y = Relu(x)                 y = Relu(x)
    u = Conv(x, W)        ->
    return y                    return y

Nodes without readers go, with the weights that only they read, and so do initializers
that nothing reads. A node of an unknown domain stays: it may have an effect. Inputs
and outputs of the graph always stay, and so does an initializer that is an input as
well, whose value the caller may replace (IR version 4 on).
"""

from __future__ import annotations

from typing import ClassVar

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee


class DeadCode(Pass):
    """Remove nodes and weights that no output depends on."""

    name: ClassVar[str] = "dead-code"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Last nodes first, so that one sweep takes a whole chain."""
        for node in reversed(list(graph.visit(self, references=True))):
            if graph.holds(node) and graph.is_removable(node):
                edit = Edit(graph, node)
                edit.erase(node)
                graph.apply(edit, "nothing depends on it")
        self._drop_weights(graph)

    def _drop_weights(self, graph: GraphView) -> None:
        for tensor in graph.initializers():
            if not graph.is_used(tensor.name) and graph.is_droppable(tensor.name):
                edit = Edit(graph, None)
                edit.drop_weight(tensor.name)
                graph.apply(edit, f"nothing reads {tensor.name}")
