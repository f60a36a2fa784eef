"""qdq-bias, round-bias: biases that integer kernels can add.

    b = DequantizeLinear(q, s)    s is not s_x * s_w
    y = Conv(x, w, b)             x, w: DequantizeLinear     ->    y = Conv(x, w, b')

The sums of an integer kernel are in steps of s_x * s_w, and so must be the bias. ONNX
Runtime leaves a Conv with another scale in float, and adds the codes of a Gemm as if they
had the right one. It rounds a bias of floats by itself (of a Gemm only where
QuantizeLinear reads it).

1. A bias of codes at another scale becomes one of floats, bit-equal to what
   DequantizeLinear computes. For `ort-cpu` it becomes int32 at s_x * s_w where that
   stands for the same floats, to the bit, and so does a Gemm's bias of floats.
2. For `tensorrt` each bias of codes becomes one of floats.
3. `round-bias` rounds: every constant bias beside codes becomes int32 at s_x * s_w.
4. Nothing is done where int32 would not hold the bias at that scale. ConvTranspose, which
   has no integer kernel in ONNX Runtime, keeps its bias but for `tensorrt`. No bias
   becomes one of floats below opset 11: ONNX Runtime would not load the model.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec
import numpy as np
from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.layer import Layer
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.coded_weight import CodedWeight, dequantized_constant
from onnxopt.quantization.parameters import (
    Parameters,
    insert,
    integer_weight,
    missing,
)
from onnxopt.quantization.product import INT32_LARGEST, check_float_bias, product_scale
from onnxopt.report import Guarantee
from onnxopt.weights import Array

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_NEAR = 1e-6
"""How far a scale may be off, relatively: roundings of a product of two floats."""


class QdqBias(Pass):
    """Store biases of quantized layers as runtimes add them, to the bit."""

    name: ClassVar[str] = "qdq-bias"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the bias of every layer."""
        target = context.target
        for node in graph.visit(self, _LAYERS):
            bias = _Bias.of(graph, node)
            if bias is None:
                continue
            try:
                if target.float_bias:
                    edit = bias.as_floats() if bias.is_coded else None
                elif node.op_type == "ConvTranspose":
                    continue
                else:
                    edit = bias.repaired(prefers_codes=target.zero_points)
            except DeclinedError as declined:
                graph.skip(node, str(declined))
                continue
            if edit is not None:
                graph.apply(edit, "integer kernels add biases in their own steps")


class RoundBias(Pass):
    """Round biases of quantized layers to int32, as integer kernels add them."""

    name: ClassVar[str] = "round-bias"
    guarantee: ClassVar[Guarantee] = "lossy"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the bias of every layer."""
        for node in graph.visit(self, _LAYERS):
            bias = _Bias.of(graph, node)
            if bias is None or bias.step is None or bias.has_step:
                continue
            try:
                edit = bias.as_codes(bias.codes(bias.step))
            except DeclinedError as declined:
                graph.skip(node, str(declined))
            else:
                graph.apply(edit, "rounded to what integer kernels add")


class _Bias(msgspec.Struct, frozen=True):
    """The constant bias of a layer, one per channel, whose weight is one of codes.

    `step` is what a sum of codes counts, None where no kernel does that; `given` are the
    parameters of the bias itself, None where it is one of floats.
    """

    graph: GraphView
    node: NodeProto
    values: Array
    step: Array | None
    given: Parameters | None

    @classmethod
    def of(cls, graph: GraphView, node: NodeProto) -> _Bias | None:
        """None where there is no such bias."""
        name = node.input[2] if len(node.input) > 2 else ""
        if not name:
            return None
        try:
            layer = Layer.of(graph, node)
            if not isinstance(layer.weight, CodedWeight):
                return None
            values, given = graph.array(name), None
            if values is None:
                values = dequantized_constant(graph, name)
                given = integer_weight(graph, name).parameters
        except DeclinedError:
            return None
        step = product_scale(graph, node, layer.layout, layer.weight)
        if values.shape != (layer.outputs,) or values.dtype != np.float32:
            return None
        return cls(graph, node, values, step, given)

    @property
    def is_coded(self) -> bool:
        """Whether DequantizeLinear makes it."""
        return self.given is not None

    @property
    def has_step(self) -> bool:
        """Whether its codes count what the sums count."""
        if self.given is None or self.step is None:
            return False
        ratio = self.given.scale.astype(np.float64) / self.step
        return bool((np.abs(ratio - 1) <= _NEAR).all())

    def repaired(self, *, prefers_codes: bool) -> Edit | None:
        """In steps where these are exact, else in floats; None where it may stay."""
        if self.step is None or self.has_step:
            return None
        if not self.is_coded and not (prefers_codes and self.node.op_type == "Gemm"):
            return None
        codes = self.codes(self.step)
        if prefers_codes and _stands_for(codes, self.step, self.values):
            return self.as_codes(codes)
        return self.as_floats() if self.is_coded else None

    def codes(self, step: Array) -> Array:
        """The nearest codes; raises DeclinedError where int32 does not hold them."""
        with np.errstate(all="ignore"):
            ratio = np.rint(self.values.astype(np.float64) / step)
        if not (np.abs(ratio) < INT32_LARGEST).all():
            raise DeclinedError("the bias of a channel does not fit int32 at its scale")
        return ratio.astype(np.int32)

    def as_codes(self, codes: Array) -> Edit:
        """Let it be codes that count steps."""
        assert self.step is not None
        made = Parameters(self.step, np.zeros(self.step.shape, np.int32), 0)
        reason = missing(self.graph, made)
        if reason is not None:
            raise DeclinedError(reason)
        edit = Edit(self.graph, self.node)
        name = edit.add_weight(codes, f"{self.node.input[2]}_quantized")
        edit.set_input(self.node, 2, insert(edit, "DequantizeLinear", name, made))
        return edit

    def as_floats(self) -> Edit:
        """Let it be what DequantizeLinear computes."""
        check_float_bias(self.graph, self.node)
        edit = Edit(self.graph, self.node)
        edit.set_input(self.node, 2, edit.add_weight(self.values, self.node.input[2]))
        return edit


def _stands_for(codes: Array, step: Array, values: Array) -> bool:
    """Whether DequantizeLinear makes exactly these values of the codes."""
    made = Parameters(step, np.zeros(step.shape, np.int32), 0)
    return bool((made.dequantized(codes) == values).all())
