"""near-fake-quant: what `fake-quant` and `custom-quantizers` decline for ties alone.

    v = Mul(x, 1 / s)
    r = Floor(Add(v, 0.5))           q = QuantizeLinear(x, s, z)
    c = Clip(Add(r, z), 0, 255) ->   y = DequantizeLinear(q, s, z)
    y = Mul(Sub(c, z), s)

1. Values within a thousandth of a step from a tie may go to its other side, and results
   may differ by a thousandth of a step. That is what separates x * (1 / s) from x / s,
   rounding behind the zero point from before it, and half up from half to even.
2. It is lossy, in no recipe, and to be judged by the user's budget.
"""

from __future__ import annotations

from typing import ClassVar

from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.passes.qdq.custom_quantizers import replace
from onnxopt.passes.qdq.fake_quant import rewrite
from onnxopt.quantization.chains import ROUNDING
from onnxopt.quantization.custom import operators
from onnxopt.quantization.staircase import nearly_equal
from onnxopt.report import Guarantee


class NearFakeQuant(Pass):
    """Replace quantizers that round values next to a tie otherwise."""

    name: ClassVar[str] = "near-fake-quant"
    guarantee: ClassVar[Guarantee] = "lossy"

    def run(self, graph: GraphView, context: Context) -> None:
        """Operators of other domains, and single steps around one that rounds."""
        for node in graph.visit(self, (*ROUNDING, *operators())):
            if node.op_type in ROUNDING:
                rewrite(graph, node, nearly_equal)
            else:
                replace(graph, node, nearly_equal)
