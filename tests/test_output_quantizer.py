"""add-output-quantizer: layers that lack nothing but a Q behind them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

import onnxopt
from onnxopt.data.inputs import Feed
from onnxopt.errors import ValidationError
from onnxopt.quantization.kernels import integer_kernels
from onnxopt.quantization.ranges import Range, affine
from tests import support
from tests.quantized_layer import Builder, conv, elementwise, product

PASS = "add-output-quantizer"


def feeds_of(model: ModelProto, count: int = 6) -> list[Feed]:
    random = np.random.default_rng(3)
    return [
        {
            value.name: random.normal(
                size=[dim.dim_value for dim in value.type.tensor_type.shape.dim]
            ).astype(np.float32)
            for value in model.graph.input
        }
        for _ in range(count)
    ]


def quantized(model: ModelProto, target: str = "ort-cpu-x86") -> ModelProto:
    result = onnxopt.optimize(model, passes=PASS, data=feeds_of(model), target=target)
    made: ModelProto = result.model
    return made


def reasons(model: ModelProto, **options: Any) -> list[str]:
    """Why the pass left what it left; nothing was changed."""
    result = onnxopt.optimize(model, passes=PASS, validate=False, **options)
    (entry,) = result.report.passes
    assert entry.edits == 0
    return [skip.reason for skip in entry.skipped]


LACKING = {
    "conv": conv(out=None),
    "conv and tanh": conv(between=["Tanh"], out=None),
    "add": elementwise("Add", inputs=2, out=None),
    "pool": elementwise("GlobalAveragePool", out=None),
    "gemm with float bias": product("Gemm", bias="float", out=None),
    "matmul and bias": product(add="float", out=None),
}


@pytest.mark.parametrize("case", LACKING)
def test_the_layer_runs_in_integers(case: str) -> None:
    model = LACKING[case]
    before = integer_kernels(model)
    made = quantized(model)
    after = integer_kernels(made)
    assert (before.fused, before.fusable) == (0, 1)
    assert after.fused == after.fusable == 1
    for feed in feeds_of(model, 2):
        (plain,), (rounded,) = support.run(model, feed), support.run(made, feed)
        half_a_step = 0.501 * _parameters(made)[0]
        assert 0 < np.max(np.abs(plain - rounded)) < half_a_step


def _parameters(made: ModelProto) -> tuple[float, int, int]:
    """Scale, zero point and type of the last Q."""
    node = [n for n in made.graph.node if n.op_type == "QuantizeLinear"][-1]
    arrays = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    zero = arrays[node.input[2]]
    kind = onnx.helper.np_dtype_to_tensor_dtype(zero.dtype)
    return float(arrays[node.input[1]]), int(zero), kind


def test_the_scale_spans_the_values_on_all_the_data() -> None:
    model = conv(out=None)
    values = [support.run(model, feed)[0] for feed in feeds_of(model)]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    scale, zero, kind = _parameters(quantized(model))
    assert scale == pytest.approx((high - low) / 255)
    assert zero == round(-low / scale)
    assert kind == TensorProto.UINT8


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("ort-cpu-arm", TensorProto.INT8),
        ("tensorrt", TensorProto.INT8),
        ("onnx", TensorProto.UINT8),
    ],
)
def test_the_target_says_which_codes(target: str, kind: int) -> None:
    _, zero, found = _parameters(quantized(conv(out=None), target))
    assert found == kind
    assert (zero == 0) == (target == "tensorrt")


def test_behind_a_relu_the_range_implies_it() -> None:
    model = conv(between=["Relu"], out=None)
    made = quantized(model)
    assert _parameters(made)[1] == 0
    found = integer_kernels(made)
    assert found.fused == found.fusable == 1
    assert [node.op_type for node in made.graph.node][-3:] == [
        "Relu",
        "QuantizeLinear",
        "DequantizeLinear",
    ]


def test_the_bias_of_a_product_comes_before_the_quantizer() -> None:
    made = quantized(product(add="float", between=["Relu"], out=None))
    (layer,) = integer_kernels(made).layers
    assert (layer.kernel, layer.runs) == ("QGemm", "integer")
    assert _parameters(made)[1] == 0


def test_a_result_with_several_readers_is_quantized_for_all() -> None:
    b = Builder()
    y = b.node("Conv", [b.qdq("x", "uint8"), b.weight([4, 4, 3, 3], axis=0)], "L")
    total = b.node("Add", [b.node("Tanh", [y]), b.node("Relu", [y])])
    made = quantized(b.model(total, x=[1, 4, 8, 8]))
    after = integer_kernels(made)
    assert after.fused == after.fusable >= 1
    assert [node.op_type for node in made.graph.node].count("QuantizeLinear") == 2


def test_without_data_it_declines() -> None:
    (reason,) = reasons(conv(out=None))
    assert reason == "no Q behind it, and no data (--data) to tell its range"


def test_a_target_without_quantized_activations_declines() -> None:
    model = conv(out=None)
    (reason,) = reasons(model, data=feeds_of(model), target="ort-cuda")
    assert reason == "target ort-cuda has no use for quantized activations"


def test_values_that_are_no_numbers_decline() -> None:
    model = conv(out=None)
    data = feeds_of(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and list(tensor.dims) == [4]:
            huge = np.full(4, 3e38, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(huge, tensor.name))
    (reason,) = reasons(model, data=data)
    assert reason == "its values on the data are not all finite"


@pytest.mark.parametrize(
    "model",
    [
        conv(),  # has its Q
        conv("", out=None),  # is not quantized
        conv(out=None, bias="wrong"),  # would stay float all the same
        conv("uint16", out=None, opset=21),
        conv(op="ConvTranspose", out=None),
        product(out=None),  # MatMulIntegerToFloat
        product("Gemm", bias="right", out=None),
        elementwise("Tanh", out=None),
    ],
)
def test_what_it_does_not_look_at(model: ModelProto) -> None:
    assert reasons(model, data=feeds_of(model)) == []


def test_it_is_judged_as_lossy() -> None:
    """By the user's budget."""
    model = conv(out=None)
    with pytest.raises(ValidationError):
        onnxopt.optimize(model, passes=PASS, data=feeds_of(model), min_sqnr=90.0)


def test_a_second_run_finds_nothing() -> None:
    made = quantized(conv(out=None))
    assert reasons(made, data=feeds_of(made)) == []


# ---- scales ----


@pytest.mark.parametrize(
    ("range_", "kind", "symmetric", "scale", "zero"),
    [
        (Range(-1, 3), TensorProto.UINT8, False, 4 / 255, 64),
        (Range(1, 3), TensorProto.UINT8, False, 3 / 255, 0),
        (Range(-3, -1), TensorProto.UINT8, False, 3 / 255, 255),
        (Range(0, 3), TensorProto.INT8, False, 3 / 255, -128),
        (Range(-1, 3), TensorProto.INT8, True, 3 / 127, 0),
        (Range(0, 0), TensorProto.UINT8, False, 1.0, 0),
        (Range(0, 1e-44), TensorProto.UINT8, False, 1.1754944e-38, 0),
    ],
)
def test_scales(
    range_: Range, kind: int, symmetric: bool, scale: float, zero: int
) -> None:
    made = affine(range_, kind, symmetric)
    assert float(made.scale) == pytest.approx(scale)
    assert (int(made.zero_point), made.data_type) == (zero, kind)
