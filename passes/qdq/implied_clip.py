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

import math
from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.clamps import CLAMPS, Clamp, clamp_of
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.linear import quantize
from onnxopt.quantization.parameters import Parameters, parameters
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
                    _check(clamp, graph, quantizer)
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


def _check(clamp: Clamp, graph: GraphView, quantizer: NodeProto) -> None:
    """Raise DeclinedError where a code would be another without the clamp."""
    made = parameters(graph, quantizer)
    if attributes.get(quantizer, "precision", 0):
        raise DeclinedError("the quantizer computes in a precision of its own")
    low, high = made.limits
    if not (math.isinf(clamp.low) or _is_code(clamp.low, made, low)):
        raise DeclinedError(f"the code of {clamp.low:.9g} is not the least one")
    if not (math.isinf(clamp.high) or _is_code(clamp.high, made, high)):
        raise DeclinedError(f"the code of {clamp.high:.9g} is not the largest one")


def _is_code(number: float, made: Parameters, code: int) -> bool:
    """Whether `number` is quantized to `code` by every scale."""
    scale, zero = made.scale.reshape(-1), made.zero_point.reshape(-1)
    codes = quantize(np.full(scale.shape, number, np.float32), scale, zero, 0)
    if codes is None:
        raise DeclinedError("its codes are not of 8 bits, or not of float32")
    return bool((codes == code).all())
