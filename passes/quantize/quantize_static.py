"""quantize-static: int8 weights and activations, with ranges from the user's data.

    y = Relu(Conv(x, W, b))

    x' = DequantizeLinear(QuantizeLinear(x, s0, z0), s0, z0)
    w' = DequantizeLinear(codes of W, sw, 0)         sw: one scale per output channel
    b' = DequantizeLinear(codes of b, s0 * sw, 0)    int32
    t  = Relu(Conv(x', w', b'))
    y  = DequantizeLinear(QuantizeLinear(t, s1, z1), s1, z1)

1. Which values and weights: `onnxopt.quantization.plan`; what is left in float is
   reported with the reason.
2. Activations per tensor, in the target's type (ort-cpu-x86: uint8, zero point free;
   ort-cpu-arm and tensorrt: int8, symmetric for tensorrt), by the range that `activations`
   names: `mse`, `minmax`, `average`, `percentile` or `entropy`.
3. Weights symmetric, int8, per output channel, with the scale of least squared error
   (`weights: mse`) or of the largest magnitude (`minmax`).

Source: Jacob et al., Quantization and Training of Neural Networks
(https://arxiv.org/abs/1712.05877); Nagel et al., A White Paper on Neural Network
Quantization (https://arxiv.org/abs/2106.08295).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import numpy as np

from onnxopt.edit import Edit
from onnxopt.errors import UsageError
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.model import Model
from onnxopt.quantization import parameters
from onnxopt.quantization.linear import quantize
from onnxopt.quantization.parameters import Parameters
from onnxopt.quantization.plan import Exclusion, Layer, Plan, plan
from onnxopt.quantization.ranges import METHODS, Range
from onnxopt.quantization.weight_scales import symmetric_scales
from onnxopt.report import Guarantee
from onnxopt.save import stage
from onnxopt.weights import Array

LARGEST = 127
_LEAST_STEP = 1e-12


class QuantizeStatic(Pass):
    """Quantize the layers that a runtime has integer kernels for, and what they read."""

    name: ClassVar[str] = "quantize-static"
    guarantee: ClassVar[Guarantee] = "lossy"
    activations: Literal["mse", "minmax", "average", "percentile", "entropy"] = "mse"
    weights: Literal["mse", "minmax"] = "mse"
    exclude: tuple[str, ...] = ()

    def run_model(self, model: Model, context: Context) -> None:
        """The main graph alone: what is inside of a loop is not calibrated."""
        graph = model.main
        if context.calibration is None:
            raise UsageError("quantize-static needs data to calibrate with")
        made = plan(graph, Exclusion(self.exclude))
        for node, reason in made.skipped:
            graph.skip(node, reason)
        if not made.layers:
            return
        chosen = self._parameters(model, made, context)
        for layer in made.layers:
            given = chosen.get(made.root[layer.node.input[0]])
            if given is not None:
                _quantize_layer(graph, layer, given, self.weights)
        for name, root in made.root.items():
            if root in chosen:
                _quantize_value(graph, name, chosen[root])

    def _parameters(
        self, model: Model, made: Plan, context: Context
    ) -> dict[str, Parameters]:
        """Of each value that has its own: calibrated, or from the constant that it is."""
        graph = model.main
        names = list(dict.fromkeys(made.root.values()))
        computed = [name for name in names if graph.weight(name) is None]
        assert context.calibration is not None
        with TemporaryDirectory(prefix="onnxopt-") as folder:
            path = Path(folder) / "float.onnx"
            stage(model, path, hashes=False).commit()
            seen = context.calibration.run(path, computed)
        signed = context.target.activation == "int8"
        symmetric = context.target.name == "tensorrt"
        found: dict[str, Parameters] = {}
        for name in names:
            if name in seen:
                span = METHODS[self.activations](seen[name], 256, symmetric)
            else:
                array = graph.array(name)
                if array is None or not array.size:
                    continue
                span = Range(min(float(array.min()), 0.0), max(float(array.max()), 0.0))
            found[name] = asymmetric(span, signed=signed, symmetric=symmetric)
        return found


def asymmetric(span: Range, *, signed: bool, symmetric: bool) -> Parameters:
    """Per-tensor 8-bit parameters that span a range, with an exact code for zero."""
    dtype = np.int8 if signed else np.uint8
    limits = np.iinfo(dtype)
    if symmetric:
        step = max(span.high, -span.low) / LARGEST
        zero = 0
    else:
        step = (span.high - span.low) / (limits.max - limits.min)
        step = max(step, _LEAST_STEP)
        zero = int(np.clip(round(limits.min - span.low / step), limits.min, limits.max))
    scale = np.array(max(step, _LEAST_STEP), np.float32)
    return Parameters(scale, np.array(zero, dtype))


def _quantize_layer(
    graph: GraphView,
    layer: Layer,
    given: Parameters,
    method: Literal["mse", "minmax"],
) -> None:
    """Codes for its weight and its bias, each behind a DequantizeLinear."""
    node = layer.node
    assert layer.weight is not None
    weight = graph.array(node.input[layer.weight])
    assert weight is not None
    scales = symmetric_scales(weight, layer.axis, LARGEST, method)
    made = Parameters(scales, np.zeros(scales.shape, np.int8), layer.axis)
    edit = Edit(graph, node)
    codes = _codes(weight, made)
    edit.set_input(node, layer.weight, _dequantized(edit, node.input[1], codes, made))
    if layer.bias is not None:
        bias = graph.array(node.input[layer.bias])
        assert bias is not None
        step = (given.scale * scales).astype(np.float32)
        with np.errstate(over="ignore"):
            whole = np.rint(bias.astype(np.float64) / step)
        limits = np.iinfo(np.int32)
        if np.abs(whole).max(initial=0) < limits.max:
            zeros = np.zeros(step.shape, np.int32)
            parameters_ = Parameters(step, zeros, 0)
            name = node.input[layer.bias]
            codes = whole.astype(np.int32)
            edit.set_input(node, layer.bias, _dequantized(edit, name, codes, parameters_))
    graph.apply(edit, "its weight is quantized")


def _codes(weight: Array, made: Parameters) -> Array:
    """Within -127..127: the scale may cut the largest."""
    codes = quantize(weight.astype(np.float32), made.scale, made.zero_point, made.axis)
    assert codes is not None
    return np.asarray(np.maximum(codes, -LARGEST))


def _dequantized(edit: Edit, name: str, codes: Array, made: Parameters) -> str:
    """The values of `codes`, a new weight called after `name`."""
    stored = edit.add_weight(codes, f"{name}_quantized")
    return parameters.insert(edit, "DequantizeLinear", stored, made)


def _quantize_value(graph: GraphView, name: str, made: Parameters) -> None:
    """QuantizeLinear and DequantizeLinear between a value and all that read it."""
    uses = [use for use in graph.uses(name) if use.view is graph]
    if not uses:
        return
    edit = Edit(graph, uses[0].node)
    value = parameters.insert(edit, "QuantizeLinear", name, made)
    value = parameters.insert(edit, "DequantizeLinear", value, made)
    for use in uses:
        edit.set_input(use.node, use.index, value)
    graph.apply(edit, "a layer that is quantized reads or makes it")

