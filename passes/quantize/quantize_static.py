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
   ort-cpu-arm and tensorrt: int8, symmetric for tensorrt), by the range that
   `activations` names: `mse`, `minmax`, `average`, `percentile` or `entropy`.
3. Weights symmetric, int8, per output channel, with the scale of least squared error
   (`weights: mse`) or of the largest magnitude (`minmax`); codes by GPTQ against what the
   layer reads (`rounding: gptq`), the mean of what is left in the bias, or to nearest.
4. 7 bits of weights (`reduce_range`) where the target's kernels would saturate with 8.
   Depthwise convolutions have a kernel that does not.

Source: Jacob et al., Quantization and Training of Neural Networks
(https://arxiv.org/abs/1712.05877); Nagel et al., A White Paper on Neural Network
Quantization (https://arxiv.org/abs/2106.08295).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.model import Model
from onnxopt.quantization import parameters
from onnxopt.quantization.calibration import Calibration, Seen
from onnxopt.quantization.moments import Moments, layer_moments
from onnxopt.quantization.parameters import Parameters
from onnxopt.quantization.plan import LAYERS, Exclusion, Layer, Plan, plan
from onnxopt.quantization.ranges import METHODS, Range, affine
from onnxopt.quantization.rounding import Rounded, rounded_weight
from onnxopt.report import Guarantee
from onnxopt.save import stage
from onnxopt.target import Target
from onnxopt.weights import Array

LARGEST = 127
REDUCED = 63
"""The largest codes: of 8 bits, and of 7, whose products two by two fit 16 bits."""
_REDUCED_NOTE = (
    "weights have 7 bits: without VNNI, ONNX Runtime's kernels add two products of uint8 "
    "and int8 in 16 bits, which saturates with 8"
)


class QuantizeStatic(Pass):
    """Quantize the layers that a runtime has integer kernels for, and what they read."""

    name: ClassVar[str] = "quantize-static"
    guarantee: ClassVar[Guarantee] = "lossy"
    activations: Literal["mse", "minmax", "average", "percentile", "entropy"] = "mse"
    weights: Literal["mse", "minmax"] = "mse"
    rounding: Literal["nearest", "gptq"] = "gptq"
    reduce_range: bool | None = None
    exclude: tuple[str, ...] = ()

    def run_model(self, model: Model, context: Context) -> None:
        """The main graph alone: what is inside of a loop is not calibrated."""
        graph = model.main
        refusal = _refusal(context)
        if refusal is not None:
            for node in graph.nodes(LAYERS):
                graph.skip(node, refusal)
            return
        assert context.calibration is not None
        made = plan(graph, Exclusion(self.exclude))
        for node, reason in made.skipped:
            graph.skip(node, reason)
        if not made.layers:
            return
        seen, moments = self._measured(model, made, context.calibration)
        chosen = self._parameters(graph, made, seen, context.target)
        reduced = self.reduce_range
        if reduced is None:
            reduced = context.target.adds_pairs
        if reduced:
            model.notes.append(_REDUCED_NOTE)
        for layer in made.layers:
            given = chosen[made.root[layer.node.input[0]]]
            found = moments.get(layer.node.output[0])
            depthwise = _is_depthwise(graph, layer.node)
            largest = REDUCED if reduced and not depthwise else LARGEST
            self._quantize_layer(graph, layer, given, found, largest, context.target)
        for name, root in made.root.items():
            _quantize_value(graph, name, chosen[root])

    def _measured(
        self, model: Model, made: Plan, calibration: Calibration
    ) -> tuple[Seen, dict[str, Moments]]:
        """What the values are on the data, and the moments of what layers read."""
        graph = model.main
        names = [name for name in made.roots if graph.weight(name) is None]
        with TemporaryDirectory(prefix="onnxopt-") as folder:
            path = Path(folder) / "float.onnx"
            stage(model, path, hashes=False).commit()
            seen = calibration.run(path, names)
            moments: dict[str, Moments] = {}
            if self.rounding == "gptq":
                nodes = [layer.node for layer in made.layers]
                moments = layer_moments(path, nodes, calibration)
        return seen, moments

    def _parameters(
        self, graph: GraphView, made: Plan, seen: Seen, target: Target
    ) -> dict[str, Parameters]:
        """Of each value that has its own: calibrated, or from the constant that it is."""
        kind = TensorProto.INT8 if target.activation == "int8" else TensorProto.UINT8
        symmetric = target.symmetric
        found: dict[str, Parameters] = {}
        for name in made.roots:
            if name in seen:
                span = METHODS[self.activations](seen[name], 256, symmetric)
            else:
                array = graph.array(name)
                assert array is not None
                low, high = (float(end(initial=0.0)) for end in (array.min, array.max))
                span = Range(low, high)
            found[name] = affine(span, kind, symmetric)
        return found

    def _quantize_layer(
        self,
        graph: GraphView,
        layer: Layer,
        given: Parameters,
        moments: Moments | None,
        largest: int,
        target: Target,
    ) -> None:
        """Codes for its weight and its bias, each behind a DequantizeLinear."""
        node = layer.node
        weight = graph.array(node.input[1])
        assert weight is not None
        made = rounded_weight(weight, layer.axis, largest, self.weights, moments)
        edit = Edit(graph, node)
        stored = _dequantized(edit, node.input[1], made.codes, made.parameters)
        edit.set_input(node, 1, stored)
        if node.op_type != "MatMul":
            _quantize_bias(graph, edit, node, given, made, target)
        graph.apply(edit, "its weight is quantized")


def _refusal(context: Context) -> str | None:
    """Why nothing can be quantized."""
    if context.calibration is None:
        return "no data (--data) to tell its ranges"
    if context.target.activation is None:
        return f"target {context.target.name} has no use for quantized activations"
    return None


def _is_depthwise(graph: GraphView, node: NodeProto) -> bool:
    """Whether a kernel of its own runs it, which does not add products in pairs."""
    weight = graph.weight(node.input[1])
    if weight is None or node.op_type != "Conv" or weight.dims[1] != 1:
        return False
    return bool(attributes.get(node, "group", 1) == weight.dims[0] > 1)


def _quantize_bias(
    graph: GraphView,
    edit: Edit,
    node: NodeProto,
    given: Parameters,
    made: Rounded,
    target: Target,
) -> None:
    """In int32 steps of input scale x weight scale, where these hold it; else in float.

    What the rounding of the weight shifts is taken out of it.
    """
    has_bias = len(node.input) > 2 and bool(node.input[2])
    name = node.input[2] if has_bias else f"{node.input[1]}_bias"
    bias = graph.array(name) if has_bias else None
    values = np.zeros(len(made.parameters.scale))
    if bias is not None:
        values = bias.astype(np.float64)
    if made.shift is not None:
        values = values + made.shift
    elif bias is None:
        return
    step = (given.scale * made.parameters.scale).astype(np.float32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        whole = np.rint(values / step)
    fits = (np.abs(whole) < np.iinfo(np.int32).max).all()
    if fits and not target.float_bias:
        held = Parameters(step, np.zeros(step.shape, np.int32), 0)
        stored = _dequantized(edit, name, whole.astype(np.int32), held)
    else:
        stored = edit.add_weight(values.astype(np.float32), name)
    edit.set_input(node, 2, stored)


def _dequantized(edit: Edit, name: str, codes: Array, made: Parameters) -> str:
    """The values of `codes`, a new weight called after `name`."""
    stored = edit.add_weight(codes, f"{name}_quantized")
    return parameters.insert(edit, "DequantizeLinear", stored, made)


def _quantize_value(graph: GraphView, name: str, made: Parameters) -> None:
    """QuantizeLinear and DequantizeLinear between a value and all that read it.

    What a node makes keeps its name behind them, so that an output is quantized, too.
    """
    why = "a layer that is quantized reads or makes it"
    maker = graph.producer(name)
    if maker is not None:
        graph.apply(parameters.quantized_result(graph, maker, name, made), why)
        return
    uses = [use for use in graph.uses(name) if use.view is graph]
    if not uses:
        return
    edit = Edit(graph, uses[0].node)
    value = parameters.insert(edit, "QuantizeLinear", name, made)
    value = parameters.insert(edit, "DequantizeLinear", value, made)
    for use in uses:
        edit.set_input(use.node, use.index, value)
    graph.apply(edit, why)
