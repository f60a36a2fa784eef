"""Models as quantizing frameworks export them, after the default recipe.

Weights are integers in the file, the numbers are those of the export, and ONNX Runtime
runs integer kernels where it has them.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import FunctionProto, ModelProto, TensorProto, parser

import onnxopt
from onnxopt.inspection.quantization import QuantizedWeight, quantization
from onnxopt.model import Model
from tests import support

MODELS = Path(__file__).parents[1] / "models"
FOLDER = MODELS / "quantized"
LOCAL_PATHS = (b"/tmp/", b"/root/", b"/home/", b"/usr/", b"site-packages", b".py")


class Export(NamedTuple):
    """What is to become of a file.

    `weights`: how many quantized weights it has, `floats`: whether the export stores them
    in float. `integer` and `left`: how many layers ONNX Runtime's CPU provider runs on
    integer weights and in float, where the file decides that (None: it does not).
    `exact`: whether no number changes at all. `freeze`: whether the exporter lists
    initializers as inputs, which only freezing makes constants.
    """

    name: str
    weights: int
    floats: bool = True
    integer: int | None = None
    left: int = 0
    exact: bool = True
    freeze: bool = False


EXPORTS = (
    Export("torch_legacy_conv_stored", 4, integer=4),
    Export("torch_legacy_conv_computed", 4, integer=4),
    Export("torch_legacy_conv_per_tensor", 4, integer=4),
    Export("torch_legacy_conv_decomposed", 4, integer=4),
    Export("torch_legacy_batch_norm", 3, integer=3, exact=False),
    Export("torch_legacy_transposed_conv", 3, integer=1, left=2),
    Export("torch_legacy_linear", 2, integer=2),
    Export("torch_legacy_linear_rank3", 2, integer=2),
    Export("torch_legacy_linear_decomposed", 2, integer=2),
    Export("torch_legacy_lstm", 3, integer=1),
    Export("torch_legacy_lstm_per_tensor", 3, integer=1),
    Export("torch_legacy_eager", 2, floats=False, integer=2),
    Export("torch_legacy_transformer", 12, integer=16),
    Export("torch_dynamo_conv_stored", 4, integer=4),
    Export("torch_dynamo_conv_computed", 4, integer=4),
    Export("torch_dynamo_conv_per_tensor", 4, integer=4),
    Export("torch_dynamo_conv_decomposed", 4, integer=4),
    Export("torch_dynamo_batch_norm", 3, integer=3, exact=False),
    Export("torch_dynamo_transposed_conv", 3, integer=1, left=2),
    Export("torch_dynamo_linear", 2, integer=2),
    Export("torch_dynamo_linear_rank3", 2, integer=2),
    Export("torch_dynamo_linear_decomposed", 1, integer=1),
    Export("torch_dynamo_int8_scaled_weight", 1, floats=False),
    Export("torch_dynamo_int8_zero_point", 1, floats=False),
    Export("torch_dynamo_int4_groups", 1, floats=False),
    Export("torchao_pt2e", 2, floats=False, integer=1, left=1),
    Export("ort_qdq", 4, floats=False, integer=4),
    Export("ort_qdq_opset21", 4, floats=False, integer=4),
    Export("ort_qdq_float_weights", 4, integer=4),
    Export("ort_qoperator", 4, floats=False, integer=4),
    Export("ort_dynamic", 4, floats=False, integer=4),
    Export("ort_int4_qdq", 2, floats=False, integer=2),
    Export("ort_int4_nbits", 2, floats=False, integer=2),
    Export("blocked_int4", 1, integer=1),
    Export("keras_fake_quant", 2, integer=2, exact=False),
    Export("keras_folded", 2, integer=2),
    Export("tflite_int8", 3, floats=False),
    Export("brevitas_qcdq", 3, floats=False, integer=2, left=1, freeze=True),
    Export("brevitas_qcdq_dynamo", 3, integer=2, left=1, freeze=True),
    Export("brevitas_qonnx", 3, integer=2, left=1, freeze=True),
    Export("brevitas_qonnx_int4", 3, integer=2, left=1, freeze=True),
)
SCALED_BEHIND = {"torch_dynamo_int8_scaled_result": 1, "torchao_int8_weights": 2}
"""Codes that a MatMul of float activations reads, with how many of them: behind a
DequantizeLinear, ONNX Runtime would round the activations to 8 bits."""
PROVEN = (
    "torch_legacy_conv_computed",
    "torch_dynamo_batch_norm",
    "torch_legacy_transformer",
    "torch_dynamo_int8_zero_point",
    "ort_qdq_float_weights",
)
"""Those that are also put to the verdict, which takes some seconds."""

SLACK = 1024
"""Bytes for scales, zero points and DequantizeLinear nodes that the export lacks."""

INTEGER_KERNELS = {
    *("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulNBits"),
    *("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"),
}
FLOAT_KERNELS = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "MatMul", "FusedMatMul"}

FUSED = [export for export in EXPORTS if export.integer is not None]

every = pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.name)


@functools.cache
def source_of(name: str) -> ModelProto:
    return onnx.load(FOLDER / f"{name}.onnx")


@functools.cache
def optimized(export: Export) -> ModelProto:
    made = onnxopt.optimize(
        source_of(export.name), validate=False, freeze_inputs=export.freeze
    )
    model: ModelProto = made.model
    onnx.checker.check_model(model, full_check=True)
    return model


@every
def test_every_weight_is_stored_in_integers(export: Export) -> None:
    made = optimized(export)
    weights = layer_weights(made)
    assert {weight.state for weight in weights} == {"integer"}
    assert len(weights) == export.weights
    assert large_floats(made) == []


def layer_weights(model: ModelProto) -> list[QuantizedWeight]:
    """Quantized weights, all of them integers, without biases, which are int32."""
    found = quantization(Model.open(model)).weights
    assert {weight.dtype for weight in found} <= {
        *("int8", "uint8", "int4", "uint4", "int32")
    }
    return [weight for weight in found if weight.dtype != "int32"]


def large_floats(model: ModelProto) -> list[str]:
    """Float initializers with the shape of a weight that are no scales."""
    scales = {
        node.input[slot]
        for node in model.graph.node
        for slot in {"DequantizeLinear": (1,), "MatMulNBits": (2,)}.get(node.op_type, ())
    }
    return [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE)
        and sum(dim > 1 for dim in tensor.dims) > 1
        and tensor.name not in scales
    ]


@every
def test_file_is_smaller_by_what_the_weights_lose(export: Export) -> None:
    made = optimized(export)
    numbers = sum(weight.bytes for weight in layer_weights(made))  # one byte each at most
    saved = 3 * numbers if export.floats else 0
    assert made.ByteSize() <= source_of(export.name).ByteSize() - saved + SLACK


@pytest.mark.parametrize("name", SCALED_BEHIND)
def test_codes_that_are_scaled_behind_a_layer_stay_codes(name: str) -> None:
    source = source_of(name)
    result = onnxopt.optimize(source, validate=False)
    stored = [t.data_type for t in result.model.graph.initializer if len(t.dims) == 2]
    assert stored == [TensorProto.INT8] * SCALED_BEHIND[name]
    assert result.model.ByteSize() <= source.ByteSize()
    reasons = [skip.reason for made in result.report.passes for skip in made.skipped]
    assert "its scale stands behind the layer that reads it" in reasons
    for feed in feeds_of(source):
        support.assert_same(support.run(source, feed), support.run(result.model, feed))


def test_transformer_is_at_most_27_hundredths_of_its_export() -> None:
    (export,) = (e for e in EXPORTS if e.name == "torch_legacy_transformer")
    assert optimized(export).ByteSize() <= 0.27 * source_of(export.name).ByteSize()


@every
def test_numbers_are_those_of_the_export(export: Export) -> None:
    source, made = with_quant(source_of(export.name)), optimized(export)
    for feed in feeds_of(source):
        expected, found = support.run(source, feed), support.run(made, feed)
        if export.exact:
            support.assert_same(expected, found)
        else:
            assert_rarely_a_step_off(expected[0], found[0])


def assert_rarely_a_step_off(expected: support.Array, found: support.Array) -> None:
    """Other rounding moves single activations by a step, and the mean by little."""
    largest = np.abs(expected).max()
    error = np.abs(expected - found)
    assert expected.shape == found.shape
    assert error.max() <= 0.02 * largest
    assert error.mean() <= 2e-3 * largest


def feeds_of(model: ModelProto) -> list[support.Feed]:
    """Batches of several sizes where that is free; the last ones saturate quantizers."""
    feeds = []
    for batch, size in ((2, 1.0), (1, 1.0), (3, 4.0)):
        rng = np.random.default_rng(batch)
        (value,) = support.own_inputs(model.graph)
        dims = [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
        feeds.append({value.name: np.float32(size) * rng.standard_normal(dims, "f")})
    return feeds


QUANT = """
<domain: "qonnx.custom_op.general", opset_import: ["" : 17]>
Quant <signed, narrow, rounding_mode> (x, scale, zero, bits) => (y) {
    s = Constant <value_int: int = @signed> ()
    n = Constant <value_int: int = @narrow> ()
    is_signed = CastLike (s, x)
    is_narrow = CastLike (n, x)
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    is_unsigned = Sub (one, is_signed)
    magnitude = Sub (bits, is_signed)
    span = Pow (two, magnitude)
    top = Sub (span, one)
    cut = Mul (is_narrow, is_unsigned)
    high = Sub (top, cut)
    minus = Neg (span)
    bottom = Mul (is_signed, minus)
    lift = Mul (is_narrow, is_signed)
    low = Add (bottom, lift)
    scaled = Div (x, scale)
    shifted = Add (scaled, zero)
    above = Max (shifted, low)
    within = Min (above, high)
    code = Round (within)
    level = Sub (code, zero)
    y = Mul (level, scale)
}
"""
"""QONNX's operator as its specification defines it, rounding to even."""


def with_quant(source: ModelProto) -> ModelProto:
    """The model with a body for the operator that ONNX Runtime does not know."""
    if not any(node.op_type == "Quant" for node in source.graph.node):
        return source
    model = ModelProto()
    model.CopyFrom(source)
    function: FunctionProto = parser.parse_function(QUANT)
    model.functions.append(function)
    return model


@pytest.mark.parametrize("export", FUSED, ids=lambda export: export.name)
def test_onnx_runtime_runs_integer_kernels(export: Export, tmp_path: Path) -> None:
    made = onnxopt.optimize(
        source_of(export.name),
        validate=False,
        freeze_inputs=export.freeze,
        target="ort-cpu",
    )
    kernels = kernels_of(made.model, tmp_path)
    counts = [
        sum(count for name, count in kernels.items() if name in kind)
        for kind in (INTEGER_KERNELS, FLOAT_KERNELS)
    ]
    assert counts == [export.integer, export.left], kernels


def kernels_of(model: ModelProto, folder: Path) -> Counter[str]:
    """The operators of ONNX Runtime's own optimized graph."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Counter(node.op_type for node in nodes)


@pytest.mark.parametrize("name", PROVEN)
def test_verdict(name: str) -> None:
    result = onnxopt.optimize(FOLDER / f"{name}.onnx")
    validation = result.report.validation
    assert validation is not None
    assert validation.status == "passed"


def test_every_file_is_looked_at() -> None:
    names = {path.stem for path in FOLDER.glob("*.onnx")}
    assert names == {export.name for export in EXPORTS} | set(SCALED_BEHIND)


def test_readme_lists_the_files_and_their_digests() -> None:
    text = (MODELS / "README.md").read_text("utf-8")
    listed = dict(re.findall(r"^([0-9a-f]{64})  quantized/(\S+)$", text, re.M))
    found = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name
        for path in FOLDER.glob("*.onnx")
    }
    assert listed == found
    rows = set(re.findall(r"^\| `(\w+)` \| \w", text, re.M))
    assert {Path(name).stem for name in found.values()} <= rows


def test_files_hold_nothing_of_the_exporting_machine() -> None:
    for path in FOLDER.glob("*.onnx"):
        data = path.read_bytes()
        assert [word for word in LOCAL_PATHS if word in data] == [], path.name


def test_files_are_small() -> None:
    sizes = {path.stem: path.stat().st_size for path in FOLDER.glob("*.onnx")}
    assert sizes.pop("torch_legacy_transformer") < 1_500_000
    assert max(sizes.values()) < 60_000
    assert sum(sizes.values()) < 1_000_000
