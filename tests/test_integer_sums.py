"""Folding into a layer that multiplies integers, where it would run in floats then."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto
from onnx.helper import make_node
from onnx.numpy_helper import from_array

from onnxopt import optimize
from onnxopt.manager import Context
from onnxopt.quantization.kernels import integer_kernels
from onnxopt.target import target
from tests import support
from tests.quantized_layers import Maker

PASSES = "fold-batch-norm,fold-scale,implied-clip,qdq-bias,dead-code"


def layer(op: str = "MatMul", opset: int = 17, bias: float | None = None) -> Maker:
    """x of uint8 codes times w of int8 codes: t. The bias, of codes, has this scale."""
    made = Maker(opset)
    inputs = [made.quantized("x", 0.25, np.uint8(3))]
    codes = np.arange(-32, 32, dtype=np.int8).reshape(4, 16)
    inputs.append(made.dequantized("w", codes, np.array(0.5, np.float32), np.int8(0)))
    if bias is not None:
        numbers, step = np.arange(16, dtype=np.int32), np.array(bias, np.float32)
        inputs.append(made.dequantized("b", numbers, step, np.int32(0)))
    made.node(op, inputs, "t")
    return made


def scaled(made: Maker) -> str:
    return made.node("Mul", ["t", made.constant("f", np.float32(0.5))], "u")


def normed(made: Maker, value: str = "t") -> str:
    ones = np.linspace(0.5, 2, 16).astype(np.float32)
    names = [made.constant(name, ones) for name in ("gamma", "beta", "mean", "var")]
    return made.node("BatchNormalization", [value, *names], "v")


def quantized(made: Maker, value: str) -> ModelProto:
    return made.model([2, 4], [made.quantized(value, 0.1, np.asarray(np.uint8(0)))])


def folded(proto: ModelProto, name: str, passes: str = PASSES) -> ModelProto:
    with Context(target=target(name)).evaluator as evaluator:
        context = Context(target=target(name), evaluator=evaluator)
        return support.final(support.run_passes(proto, passes, context))


def kept_integer(proto: ModelProto) -> bool:
    """Whether nothing is folded for the CPU, and integers are multiplied only so."""
    made, other = folded(proto, "ort-cpu-x86"), folded(proto, "onnx")
    runs = [integer_kernels(model).layers[0].runs for model in (proto, made, other)]
    assert runs[:2] == ["integer", "integer"]
    assert (len(made.graph.node) > len(other.graph.node)) == (runs[2] == "float")
    return runs[2] == "float"


@pytest.mark.parametrize("clamp", ["Relu", "Clip"])
def test_clamp_behind_a_scale(clamp: str) -> None:
    made = layer()
    bounds = [made.constant("low", np.float32(0)), made.constant("high", np.float32(6))]
    clamped = made.node(clamp, [scaled(made), *bounds[: 2 * (clamp == "Clip")]], "c")
    assert kept_integer(made.model([2, 4], [made.node("Tanh", [clamped], "y")]))


def test_clamp_that_the_quantizer_implies() -> None:
    made = layer()
    assert not kept_integer(quantized(made, made.node("Relu", [scaled(made)], "c")))


@pytest.mark.parametrize("shared", [False, True])
def test_quantizer_to_codes_that_others_read(shared: bool) -> None:
    made = layer()
    value = made.quantized(scaled(made), 0.1, np.asarray(np.int8(0)))
    outputs = [value, made.node("Tanh", [value], "y")]
    assert kept_integer(made.model([2, 4], outputs[1 - shared :])) == shared


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_bias_without_a_quantizer(op: str) -> None:
    made = layer(op, bias=None if op == "MatMul" else 0.125)
    assert kept_integer(made.model([2, 4], [made.node("Tanh", [normed(made)], "y")]))


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_bias_with_a_quantizer(op: str) -> None:
    made = layer(op, bias=None if op == "MatMul" else 0.125)
    assert not kept_integer(quantized(made, normed(made)))


def test_bias_behind_a_scale() -> None:
    made = layer()
    total = normed(made, scaled(made))
    assert kept_integer(made.model([2, 4], [made.node("Tanh", [total], "y")]))


def test_scale_alone() -> None:
    made = layer()
    assert not kept_integer(made.model([2, 4], [made.node("Tanh", [scaled(made)], "y")]))


@pytest.mark.parametrize("name", ["onnx", "tensorrt"])
@pytest.mark.parametrize("opset", [10, 11])
def test_bias_of_floats_can_be_loaded(opset: int, name: str) -> None:
    """Below opset 11 there is no Round, by which ONNX Runtime rounds it."""
    proto = quantized(layer("Gemm", opset, bias=0.2), "t")
    made = folded(proto, name)
    assert (len(made.graph.node) < len(proto.graph.node)) == (opset > 10)
    ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("is_fake", [False, True])
def test_weight_alone_behind_a_transpose(is_fake: bool) -> None:
    """It is transposed in the file, so that no Gemm has to do it."""
    made, codes = Maker(), np.arange(-64, 64, dtype=np.int8).reshape(4, 32)
    scale, zero = np.linspace(0.1, 0.2, 4, dtype=np.float32), np.zeros(4, np.int8)
    made.dequantized("w", codes, scale, zero, 0)
    if is_fake:
        made.weights[0].CopyFrom(from_array(codes.astype(np.float32) / 9, "floats"))
        node = make_node("QuantizeLinear", ["floats", "w_s", "w_z"], ["w_q"], axis=0)
        made.nodes.insert(0, node)
    made.node("Transpose", ["w"], "turned", perm=[1, 0])
    product = made.node("MatMul", ["x", "turned"], "t")
    bias = made.constant("b", np.ones(4, np.float32))
    proto = made.model([2, 32], [made.node("Add", [product, bias], "y")])
    left = optimize(proto, target="ort-cpu", validate=False).model
    assert [node.op_type for node in left.graph.node] == ["DequantizeLinear", "Gemm"]
    assert integer_kernels(left).layers[0].runs == "weights"


@pytest.mark.parametrize("shared", [False, True])
def test_int8_codes_that_would_be_shared(shared: bool) -> None:
    made = layer("MatMul")
    first = made.quantized("t", 0.1, np.asarray(np.int8(0)))
    again = made.quantized(first, 0.1, np.asarray(np.int8(0)))
    outputs = [f"{first}_q", again][1 - shared :]
    proto = made.model([2, 4], outputs)
    for value in proto.graph.output:
        kind = TensorProto.INT8 if value.name.endswith("_q") else TensorProto.FLOAT
        value.type.tensor_type.elem_type = kind
    left = folded(proto, "ort-cpu-x86", "requantize,dead-code")
    assert (len(left.graph.node) < len(proto.graph.node)) == (not shared)
    assert integer_kernels(left).layers[0].runs == "integer"
