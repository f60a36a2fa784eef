"""implied-clip: no Relu or Clip before a quantizer that saturates where these clamp.

    t = Conv(x, w)
    r = Relu(t)                            t = Conv(x, w)
    q = QuantizeLinear(r, s, -128)   ->    q = QuantizeLinear(t, s, -128)

Kernels of integers are chosen for a layer and the QuantizeLinear that reads it, and what
stands between them is in the way. (ONNX Runtime removes a Relu or Clip by itself, before
one QuantizeLinear of one scale.)

1. Relu, Clip (Relu6), and Min and Max with a scalar, in float32, that only
   QuantizeLinear nodes read, to 8-bit codes, per tensor, per axis or in blocks.
2. In each of these, the code of the lower bound is the least one, and that of the upper
   bound the largest. Quantizing is monotone (a quotient by a positive number, rounding,
   a sum, saturation), so what is beyond a bound has the same code as the bound.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxopt.clamps import CLAMPS, clamp_of
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.implied import check_implied
from onnxopt.report import Guarantee


class ImpliedClip(Pass):
    """Remove Relu and Clip before quantizers that saturate to the same codes."""

    name: ClassVar[str] = "implied-clip"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at every clamp that only quantizers read."""
        for node in graph.visit(self, CLAMPS):
            quantizers = _readers(graph, node.output[0])
            clamp = clamp_of(graph, node) if quantizers else None
            if clamp is None:
                continue
            try:
                for quantizer in quantizers:
                    check_implied(clamp, graph, quantizer)
            except DeclinedError as declined:
                graph.skip(node, str(declined))
                continue
            edit = Edit(graph, node)
            edit.bypass(node, {node.output[0]: clamp.value})
            graph.apply(edit, "quantizing saturates to the same codes")


def _readers(graph: GraphView, name: str) -> list[NodeProto]:
    """The quantizers that read a value; none where anything else does, too."""
    uses = graph.uses(name)
    if graph.is_output(name) or graph.is_pinned(name):
        return []
    for use in uses:
        if use.view is not graph or use.index != 0:
            return []
        if graph.op(use.node) != "QuantizeLinear":
            return []
    return [use.node for use in uses]
