"""qdq-bias and round-bias: the same floats, the right steps, and what is fused then."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from onnxopt.manager import Context
from onnxopt.model import Model
from onnxopt.passes import PIPELINES
from onnxopt.target import target
from tests import support
from tests.quantized_layers import KINDS, Kind, Maker, feeds, layer_of, maker_of, tensor
from tests.support import Array

WITH_BIAS = [name for name in KINDS if "matmul" not in name]
INTEGER = [name for name in WITH_BIAS if "transposed" not in name or "gemm" in name]
X_SCALE, Y_SCALE = 0.02, 0.05


def quantized_layer(
    kind: Kind, bias: str, *, output: bool = True, per_tensor: bool = False
) -> ModelProto:
    """A layer with quantizers around it; `bias`: floats, right, wrong, finer or none.

    The codes are small, so that no kernel saturates before its sums are whole.
    """
    made, rng = Maker(), np.random.default_rng(1)
    given_ = made.quantized("x", X_SCALE, np.array(128, np.uint8))
    codes = rng.integers(-30, 31, kind.weight).astype(np.int8)
    count = () if per_tensor else (kind.weight[kind.axis],)
    scale = rng.uniform(0.01, 0.03, count).astype(np.float32)
    inputs = [
        given_,
        made.dequantized("w", codes, scale, np.zeros(count, np.int8), kind.axis),
    ]
    step = np.float32(X_SCALE) * scale
    numbers = rng.integers(-900, 900, kind.outputs).astype(np.int32)
    if bias == "floats":
        inputs.append(made.constant("b", rng.standard_normal(kind.outputs).astype("f")))
    elif bias != "none":
        steps = {"right": step, "wrong": step * np.float32(3.1), "finer": step / 4}[bias]
        if bias == "finer":
            numbers *= 4
        zero = np.zeros(count, np.int32)
        inputs.append(made.dequantized("b", numbers, np.asarray(steps), zero, 0))
    attrs = {
        key: value for key, value in kind.attrs.items() if key not in ("alpha", "beta")
    }
    made.node(kind.op, inputs, "t", **attrs)
    if output:
        made.quantized("t", Y_SCALE, np.array(128, np.uint8))
    return made.model(kind.given, ["t_d" if output else "t"])


def repaired(proto: ModelProto, name: str, passes: str = "qdq-bias") -> Model:
    """What the pass makes of it for the target `name`."""
    with Context(target=target(name)).evaluator as evaluator:
        context = Context(target=target(name), evaluator=evaluator)
        return support.run_passes(proto, passes, context)


def optimized(
    proto: ModelProto, folder: Path
) -> tuple[ort.InferenceSession, Counter[str]]:
    """A session at full optimization, and the operators that it runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options)
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return session, Counter(node.op_type for node in nodes)


def largest_step(proto: ModelProto, made: ModelProto, kind: Kind, folder: Path) -> float:
    """How far the optimized `made` is from `proto` at ORT_DISABLE_ALL, at most."""
    session, _ = optimized(made, folder)
    return max(
        float(np.abs(session.run(None, feed)[0] - support.run(proto, feed)[0]).max())
        for feed in feeds(kind.given)
    )


def bias_of(proto: ModelProto, kind: Kind) -> str:
    """The name of the layer's bias."""
    return str(layer_of(proto, [kind.op]).input[2])


def check_bitwise(proto: ModelProto, made: ModelProto, kind: Kind) -> None:
    """The same floats before any optimization."""
    for feed in feeds(kind.given):
        support.assert_same(support.run(proto, feed), support.run(made, feed))


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("name", ["onnx", "ort-cpu-x86", "ort-cpu-arm", "ort-cuda"])
@pytest.mark.parametrize("kind", INTEGER)
def test_wrong_scale(kind: str, name: str, per_tensor: bool, tmp_path: Path) -> None:
    """Floats, bit-equal; ONNX Runtime rounds these to the right steps and fuses."""
    layer = KINDS[kind]
    proto = quantized_layer(layer, "wrong", per_tensor=per_tensor)
    made = support.final(repaired(proto, name))
    assert tensor(made, bias_of(made, layer)).dtype == np.float32
    check_bitwise(proto, made, layer)
    assert not repaired(made, name).ledger.edits
    _, ran = optimized(made, tmp_path)
    assert ran["QLinearConv"] + ran["QGemm"] == 1
    assert largest_step(proto, made, layer, tmp_path) <= Y_SCALE * 1.001


def test_what_a_wrong_scale_does_without_it(tmp_path: Path) -> None:
    """A Conv stays in float; a Gemm is fused, and far off."""
    conv, gemm = KINDS["conv"], KINDS["gemm"]
    _, ran = optimized(quantized_layer(conv, "wrong"), tmp_path)
    assert ran["Conv"] == 1
    proto = quantized_layer(gemm, "wrong")
    assert largest_step(proto, proto, gemm, tmp_path) > 3 * Y_SCALE


@pytest.mark.parametrize("kind", INTEGER)
def test_exact_codes(kind: str) -> None:
    """At a finer scale the codes are multiples: for ONNX Runtime's CPU, int32 again."""
    layer = KINDS[kind]
    proto = quantized_layer(layer, "finer")
    made = support.final(repaired(proto, "ort-cpu-x86"))
    node = maker_of(made, bias_of(made, layer))
    np.testing.assert_array_equal(tensor(made, node.input[0]) * 4, tensor(proto, "b_q"))
    expected = np.float32(X_SCALE) * tensor(proto, "w_s")
    np.testing.assert_array_equal(tensor(made, node.input[1]), expected)
    check_bitwise(proto, made, layer)
    as_floats = support.final(repaired(proto, "onnx"))
    assert tensor(as_floats, bias_of(as_floats, layer)).dtype == np.float32
    check_bitwise(proto, as_floats, layer)


@pytest.mark.parametrize("bias", ["right", "wrong"])
@pytest.mark.parametrize("kind", WITH_BIAS)
def test_tensorrt_wants_floats(kind: str, bias: str) -> None:
    """Whatever the scale, and the layer."""
    layer = KINDS[kind]
    proto = quantized_layer(layer, bias)
    made = support.final(repaired(proto, "tensorrt"))
    assert tensor(made, bias_of(made, layer)).dtype == np.float32
    check_bitwise(proto, made, layer)


@pytest.mark.parametrize("bias", ["right", "floats", "none"])
@pytest.mark.parametrize("kind", WITH_BIAS)
def test_what_stays(kind: str, bias: str) -> None:
    """Biases at the right scale, and of floats; these are exact codes by no chance."""
    proto = quantized_layer(KINDS[kind], bias)
    for name in ("onnx", "ort-cpu-x86"):
        assert not repaired(proto, name).ledger.edits


def test_transposed_convolution_keeps_its_codes() -> None:
    """ONNX Runtime runs it in float, and would round a bias of floats."""
    proto = quantized_layer(KINDS["transposed"], "wrong")
    assert not repaired(proto, "onnx").ledger.edits


@pytest.mark.parametrize("bias", ["floats", "wrong"])
@pytest.mark.parametrize("kind", INTEGER)
def test_rounded(kind: str, bias: str, tmp_path: Path) -> None:
    """On request each bias is int32, within half a step, and a Gemm alone is fused."""
    layer = KINDS[kind]
    proto = quantized_layer(layer, bias, output="gemm" not in kind)
    model = repaired(proto, "onnx", "round-bias")
    made = support.final(model)
    node = maker_of(made, bias_of(made, layer))
    codes, scale = (tensor(made, name) for name in node.input[:2])
    values = (
        tensor(proto, "b")
        if bias == "floats"
        else tensor(proto, "b_q") * tensor(proto, "b_s")
    )
    assert (np.abs(codes * scale.astype(np.float64) - values) <= scale * 0.5001).all()
    assert codes.dtype == np.int32
    _, ran = optimized(made, tmp_path)
    assert ran["QLinearConv"] + ran["QGemm"] == 1
    assert not repaired(made, "onnx", "round-bias").ledger.edits


def test_default_recipe_settles() -> None:
    """Nothing takes back what the pass does."""
    for bias in ("finer", "wrong", "right"):
        proto = quantized_layer(KINDS["gemm"], bias, output=False)
        passes = ",".join(PIPELINES["default"])
        made = support.final(repaired(proto, "ort-cpu-x86", passes))
        assert not repaired(made, "ort-cpu-x86", passes).ledger.edits
        check_bitwise(proto, made, KINDS["gemm"])
        codes = maker_of(made, layer_of(made, ["Gemm"]).input[1]).input[0]
        assert tensor(made, codes).dtype == np.int8


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.sampled_from(["conv", "depthwise", "grouped", "gemm", "gemm-transposed"]),
    st.sampled_from(["onnx", "ort-cpu-x86", "tensorrt"]),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6),
    st.sampled_from([1e-9, 1e-4, 0.02, 1.0, 1e6]),
)
def test_any_codes(kind: str, name: str, numbers: list[int], factor: float) -> None:
    """Bit-equal also where int32 exceeds the digits of a float, and where declined."""
    layer = KINDS[kind]
    proto = quantized_layer(layer, "wrong")
    codes = np.array(numbers[: layer.outputs], np.int32)
    scale: Array = tensor(proto, "b_s") * np.float32(factor)
    for key, array in (("b_q", codes), ("b_s", scale)):
        support.find_tensor(proto, key).CopyFrom(onnx.numpy_helper.from_array(array, key))
    made = support.final(repaired(proto, name))
    check_bitwise(proto, made, layer)
