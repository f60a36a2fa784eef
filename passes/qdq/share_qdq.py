"""share-qdq: quantize once what is quantized twice in the same way.

    q = QuantizeLinear(x, s, z)
    r = QuantizeLinear(x, t, u)     ->    (readers of r read q)

1. QuantizeLinear, or DequantizeLinear, of one value; scales and zero points are constants
   that are equal by value and type, whatever their names.
2. Axes that are counted from either end are the same where the rank is known.
3. int8 activations are quantized as often as they were, but for `ort-cpu-arm`: on x86
   ONNX Runtime runs nothing on integers where codes of int8 have several readers.
4. The earlier node stays. (`cse` does it where the names are the same.)
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.quantization.parameters import LINEAR, are_alike, is_int8_quantizer
from onnxopt.report import Guarantee


class ShareQdq(Pass):
    """Let nodes that quantize a value alike be one."""

    name: ClassVar[str] = "share-qdq"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Node by node, with those that read the same value."""
        for node in graph.visit(self, LINEAR):
            if context.target.keeps_int8_pairs and is_int8_quantizer(graph, node):
                continue
            for twin in _twins(graph, node):
                ahead = graph.precedes(node, twin)
                first, second = (node, twin) if ahead else (twin, node)
                edit = Edit(graph, second)
                edit.bypass(second, {second.output[0]: first.output[0]})
                graph.apply(edit, f"{graph.label(first)} computes the same")
                if second is node:
                    break


def _twins(graph: GraphView, node: NodeProto) -> list[NodeProto]:
    """The other nodes of this scope that do the same to the same value."""
    others = [
        use.node
        for use in graph.home_uses(node.input[0])
        if use.view is graph and use.index == 0 and use.node is not node
    ]
    return [
        other
        for other in others
        if graph.op(other) == graph.op(node) and are_alike(graph, node, other)
    ]
