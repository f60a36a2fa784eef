"""identity: take out nodes that hand their input on unchanged.

    t = Identity(x)
    y = Relu(t)           ->    y = Relu(x)

1. Identity, and Dropout outside training (its mask must be unread).
2. Where the output is one of the graph's, the producer of the input takes its name over;
   where there is none (it would join an input or a constant to an output), it stays.
3. A constant through Identity: the readers read the constant.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee


class RemoveIdentity(Pass):
    """Remove Identity, and Dropout outside training."""

    name: ClassVar[str] = "identity"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Bypass every node that is a no-op."""
        for node in graph.visit(self, ("Identity", "Dropout")):
            reason = _obstacle(graph, node) if node.op_type == "Dropout" else None
            if reason is not None:
                graph.skip(node, reason)
                continue
            edit = Edit(graph, node)
            edit.bypass(node, {node.output[0]: node.input[0]})
            graph.apply(edit, f"{node.op_type} hands its input on")


def _obstacle(graph: GraphView, node: NodeProto) -> str | None:
    """Why a Dropout is not a no-op; None where it is one."""
    if len(node.output) > 1 and node.output[1] and graph.is_used(node.output[1]):
        return "its mask is read"
    opset = graph.opset()
    if opset < 7:
        training = not attributes.get(node, "is_test", 0)
    elif opset >= 12 and len(node.input) > 2 and node.input[2]:
        mode = graph.array(node.input[2])
        training = mode is None or bool(mode)
    else:
        training = False
    return "it may run in training mode" if training else None
