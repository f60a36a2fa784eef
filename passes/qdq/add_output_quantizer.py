"""add-output-quantizer: let layers fuse that lack nothing but a Q behind them.

    x = DequantizeLinear(q, s, z)         x = DequantizeLinear(q, s, z)
    y = Conv(x, w)                        t = Conv(x, w)
    u = Tanh(y)                     ->    c = QuantizeLinear(t, s', z')
                                          y = DequantizeLinear(c, s', z')
                                          u = Tanh(y)

ONNX Runtime runs Conv, Add, Mul, AveragePool, Sigmoid... and a Gemm with a float bias in
integers only where their result is quantized as well. Lossy, on request, and with data
(`--data`) only: s' and z' come from the least and the largest value of y on it.

1. All that the layer reads is quantized, in 8 bits and such that the layer would fuse.
2. Where only a Relu or Clip reads the result, the Q stands behind that: its range then
   implies the Relu. Likewise behind an Add of a constant to a MatMul: that is its bias.
3. The codes are those of the target: uint8 on x86, int8 on ARM, symmetric for TensorRT.
4. Values of inner scopes are not seen: layers there stay as they are.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import TensorProto

from onnxopt.errors import ProviderError, WorkerError
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.quantization.calibration import Calibration
from onnxopt.quantization.layers import Site, site
from onnxopt.quantization.parameters import Parameters, quantized_result
from onnxopt.quantization.ranges import affine, min_max
from onnxopt.quantization.reasons import STATIC_KERNELS, lacks_output
from onnxopt.report import Guarantee
from onnxopt.target import Target

_CODES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}
_LARGEST = 1e30
"""A range beyond this is that of a mask, not of values."""


class AddOutputQuantizer(Pass):
    """Quantize the results of layers that would run in integers then."""

    name: ClassVar[str] = "add-output-quantizer"
    guarantee: ClassVar[Guarantee] = "lossy"

    def run(self, graph: GraphView, context: Context) -> None:
        """All layers of a scope at once: the data is run through the model once."""
        nodes = graph.nodes(tuple(STATIC_KERNELS))
        sites = [found for node in nodes if (found := site(graph, node))]
        sites = [found for found in sites if lacks_output(found)]
        if not sites:
            return
        refusal = _refusal(graph, context)
        if refusal is not None:
            _skip(graph, sites, refusal)
            return
        assert context.calibration is not None
        _quantize(graph, sites, context.calibration, context.target)


def _refusal(graph: GraphView, context: Context) -> str | None:
    """Why nothing here can be quantized."""
    if context.target.activation is None:
        return f"target {context.target.name} has no use for quantized activations"
    if graph.parent is not None or graph.is_function:
        return "its values are not seen from outside of its scope"
    if context.calibration is None:
        return "no Q behind it, and no data (--data) to tell its range"
    return None


def _skip(graph: GraphView, sites: list[Site], reason: str) -> None:
    for found in sites:
        graph.skip(found.node, reason)


def _quantize(
    graph: GraphView, sites: list[Site], calibration: Calibration, target: Target
) -> None:
    values = [_value(found) for found in sites]
    try:
        seen = calibration.of_model(graph.model, list(dict.fromkeys(values)))
    except (WorkerError, ProviderError) as error:
        _skip(graph, sites, f"its range could not be measured: {error}")
        return
    codes = _CODES[target.activation or "uint8"]
    for found, value in zip(sites, values, strict=True):
        range_ = min_max(seen[value]) if value in seen else None
        if range_ is None or seen[value].not_finite or not range_.is_finite:
            graph.skip(found.node, "its values on the data are not all finite")
        elif max(-range_.low, range_.high) > _LARGEST:
            graph.skip(found.node, f"its values reach {range_.low:g} to {range_.high:g}")
        else:
            made = affine(range_, codes, target.symmetric)
            _insert(graph, value, made)


def _value(found: Site) -> str:
    """The value to quantize: what the layer fuses with comes before the Q."""
    graph, name = found.view, found.node.output[0]
    for ops in (("Add",) if found.layer.op == "MatMul" else (), ("Relu", "Clip")):
        only = graph.only_use(name)
        if only is None or graph.op(only.node) not in ops:
            continue
        if "Add" in ops and graph.weight(only.node.input[1 - only.index]) is None:
            break
        name = only.node.output[0]
    return str(name)


def _insert(graph: GraphView, value: str, made: Parameters) -> None:
    """Quantize `value` for all who read it; the result keeps its name."""
    maker = graph.producer(value)
    assert maker is not None
    edit = quantized_result(graph, maker, value, made)
    graph.apply(edit, "a layer whose result is quantized runs in integers")
