"""`inspect --quantization`: what ONNX Runtime really runs, and why not integers.

Each fact of docs/quantization.md is a model here: the kernel is read back from ONNX
Runtime, the reason is found in the graph alone, and both must fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

import onnxopt
from onnxopt.cli import cli
from onnxopt.quantization.kernels import Kernels, LayerKernel, integer_kernels
from tests import support
from tests.quantized_layer import Builder, conv, elementwise, product

MODELS = Path(__file__).resolve().parent.parent / "models"


def the_layer(model: ModelProto) -> LayerKernel:
    """The layer `L`."""
    found = integer_kernels(model)
    assert found.status == "read", found.reason
    (layer,) = [layer for layer in found.layers if layer.node == "L"]
    return layer


FUSED: dict[str, tuple[ModelProto, str]] = {
    "conv": (conv(), "QLinearConv"),
    "conv per tensor": (conv(axis=None), "QLinearConv"),
    "conv int8": (conv("int8"), "QLinearConv"),
    "conv int8 to uint8": (conv("int8", out="uint8"), "QLinearConv"),
    "conv uint8 weight": (conv(weight="uint8", zero=128), "QLinearConv"),
    "conv weight zero point": (conv(zero=3), "QLinearConv"),
    "conv depthwise": (conv(group=4), "QLinearConv"),
    "conv int32 bias": (conv(bias="right"), "QLinearConv"),
    "conv float bias": (conv(bias="float"), "QLinearConv"),
    "conv Relu implied": (conv(between=["Relu"], out_zero=0), "QLinearConv"),
    "conv Clip implied": (conv(between=[(0, 12.75)], out_zero=0), "QLinearConv"),
    "conv opset 10": (conv(axis=None, opset=10), "QLinearConv"),
    "matmul": (product(), "QLinearMatMul"),
    "matmul per channel": (product(axis=1), "QLinearMatMul"),
    "matmul int8": (product(act="int8"), "QLinearMatMul"),
    "matmul transposed": (
        product(shape=(8, 32), axis=0, transposed=True),
        "QLinearMatMul",
    ),
    "matmul no Q": (product(out=None), "MatMulIntegerToFloat"),
    "matmul Tanh": (product(between=["Tanh"]), "MatMulIntegerToFloat"),
    "matmul Relu": (product(between=["Relu"], out=None), "MatMulIntegerToFloat"),
    "matmul Relu implied": (product(between=["Relu"], out_zero=0), "QLinearMatMul"),
    "matmul add": (product(add="float"), "QGemm"),
    "matmul add int32 no Q": (product(add="right", out=None), "QGemm"),
    "gemm": (product("Gemm", axis=1), "QGemm"),
    "gemm int32 no Q": (product("Gemm", bias="right", out=None), "QGemm"),
    "gemm float bias": (product("Gemm", bias="float"), "QGemm"),
    "gemm transB": (product("Gemm", shape=(8, 32), axis=0, transB=1), "QGemm"),
    "gemm alpha": (product("Gemm", alpha=2.0), "QGemm"),
    "two activations": (elementwise("MatMul", inputs=2), "QLinearMatMul"),
    "Add": (elementwise("Add", inputs=2), "QLinearAdd"),
    "Mul": (elementwise("Mul", inputs=2), "QLinearMul"),
    "AveragePool": (
        elementwise("AveragePool", kernel_shape=[2, 2]),
        "QLinearAveragePool",
    ),
    "GlobalAveragePool": (elementwise("GlobalAveragePool"), "QLinearGlobalAveragePool"),
    "Sigmoid": (elementwise("Sigmoid"), "QLinearSigmoid"),
    "Softmax": (elementwise("Softmax"), "QLinearSoftmax"),
    "LeakyRelu": (elementwise("LeakyRelu"), "QLinearLeakyRelu"),
}
WEIGHTS_ONLY = {
    "per tensor": product(act=""),
    "per channel": product(act="", axis=1),
    "int4": product(act="", weight="int4", axis=0, block=16),
    "int8 blocks": product(act="", weight="int8", axis=0, block=32),
    "uint4 gemm with bias": product(
        "Gemm", act="", weight="uint4", axis=0, block=16, bias="float"
    ),
    "uint16 activations": product(act="uint16"),
}
FLOAT: dict[str, tuple[ModelProto, str, bool]] = {
    "no output Q": (conv(out=None), "its result is an output of the graph, too", True),
    "output Q elsewhere": (
        conv(between=["Tanh"], out=None),
        "no Q behind it (Tanh:tanh4_0 reads its result)",
        True,
    ),
    "bias scale": (
        conv(bias="wrong"),
        "the scale of its bias is not x_scale * w_scale",
        True,
    ),
    "bias int8": (
        conv(axis=None, bias="int8"),
        "its bias is int8: int32 or float32 fuse",
        True,
    ),
    "Relu": (
        conv(between=["Relu"]),
        "Relu:relu4_0 stands before the Q, whose range does not imply it",
        True,
    ),
    "Clip": (
        conv(between=[(0, 6)], out_zero=0),
        "Clip:clip4_0 stands before the Q, whose range does not imply it",
        True,
    ),
    "HardSwish": (
        conv(between=["HardSwish"]),
        "HardSwish:hardswish4_0 stands between it and the Q",
        True,
    ),
    "uint16": (
        conv("uint16", opset=21),
        "its activations are uint16: integer kernels take 8 bits",
        False,
    ),
    "uint8 to uint16": (
        conv(out="uint16", opset=21),
        "its result becomes uint16: integer kernels give 8 bits",
        False,
    ),
    "int4 weight": (
        conv(weight="int4", opset=21),
        "its weight is int4: with quantized activations only 8 bits fuse",
        False,
    ),
    "weight alone": (conv("", out=None), "its activations are not quantized", False),
    "ConvTranspose": (
        conv(op="ConvTranspose"),
        "ONNX Runtime has no integer kernel for ConvTranspose with Q and DQ",
        False,
    ),
    "matmul inputs axis": (
        product(axis=0),
        "the scales of its weight vary along axis 0, not along its output channels",
        True,
    ),
    "matmul rank 3": (
        product(shape=(2, 32, 8), axis=2),
        "its weight has rank 3 or more, and scales per channel",
        True,
    ),
    "matmul blocks": (
        product(axis=0, block=16),
        "its weight is quantized in blocks: with quantized activations none fuse",
        True,
    ),
    "matmul add float no Q": (
        product(add="float", out=None),
        "it becomes a Gemm with the float bias of Add, and no Q is behind that",
        True,
    ),
    "gemm float bias no Q": (
        product("Gemm", bias="float", out=None),
        "its bias is float, and no Q is behind it",
        True,
    ),
    "gemm inputs axis": (
        product("Gemm", shape=(8, 32), axis=1, transB=1),
        "the scales of its weight vary along axis 1, not along its output channels",
        True,
    ),
    "matmul Relu": (
        product(between=["Relu"]),
        "Relu:relu4_0 stands before the Q, whose range does not imply it",
        True,
    ),
    "gemm Relu": (
        product("Gemm", between=["Relu"]),
        "Relu:relu4_0 stands before the Q, whose range does not imply it",
        True,
    ),
    "gemm beta": (product("Gemm", bias="right", beta=0.5), "its beta is not 1", True),
    "weight only, inputs axis": (
        product(act="", axis=0),
        "its scales vary along the inputs (axis 0)",
        True,
    ),
    "weight only, blocks of 8": (
        product(act="", weight="int4", axis=0, block=8),
        "its blocks of 8 are no power of two from 16 on",
        True,
    ),
    "weight only, blocks of outputs": (
        product(act="", shape=(32, 32), weight="int4", axis=1, block=16),
        "its blocks do not run along the inputs (axis 0)",
        True,
    ),
    "weight only, transB": (
        product("Gemm", act="", shape=(8, 32), axis=0, transB=1),
        "its integer weight alone fuses where nothing is transposed",
        True,
    ),
    "weight only, Q behind": (
        product(act="", out="uint8"),
        "Q behind it, and no Q and DQ before its other operand",
        True,
    ),
    "Add, no Q": (
        elementwise("Add", inputs=2, out=None),
        "its result is an output of the graph, too",
        True,
    ),
    "Add, constant": (
        elementwise("Add", constants=[np.ones(8, np.float32)]),
        "its operand 'c2' is a float constant",
        False,
    ),
    **{
        op: (
            elementwise(op, inputs=2 if op in ("Sub", "Div") else 1, opset=20),
            f"ONNX Runtime has no integer kernel for {op} with Q and DQ",
            False,
        )
        for op in (
            "Sub",
            "Div",
            "Relu",
            "HardSigmoid",
            "HardSwish",
            "Tanh",
            "Gelu",
            "Erf",
        )
    },
}


@pytest.mark.parametrize("case", FUSED)
def test_onnx_runtime_fuses(case: str) -> None:
    model, kernel = FUSED[case]
    layer = the_layer(model)
    assert (layer.kernel, layer.runs) == (kernel, "integer")
    assert (layer.fusable, layer.reason) == (True, None)


@pytest.mark.parametrize("case", WEIGHTS_ONLY)
def test_onnx_runtime_keeps_integer_weights(case: str) -> None:
    layer = the_layer(WEIGHTS_ONLY[case])
    assert (layer.kernel, layer.runs, layer.fusable) == ("MatMulNBits", "weights", True)


@pytest.mark.parametrize("case", FLOAT)
def test_onnx_runtime_does_not_fuse(case: str) -> None:
    model, reason, fusable = FLOAT[case]
    layer = the_layer(model)
    assert layer.runs == "float"
    assert (layer.reason, layer.fusable) == (reason, fusable)


def test_a_result_that_others_read_too_is_not_fused() -> None:
    model = conv()
    (layer,) = [node for node in model.graph.node if node.name == "L"]
    extra = helper.make_tensor_value_info(layer.output[0], onnx.TensorProto.FLOAT, None)
    model.graph.output.append(extra)
    assert the_layer(model).reason == "its result is an output of the graph, too"


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_product_that_a_quantizer_and_others_read_is_not_fused(op: str) -> None:
    b = Builder()
    y = b.node(op, [b.qdq("x", "uint8"), b.weight([8, 4])], "L")
    total = b.node("Add", [b.qdq(y, "uint8"), b.node("Tanh", [y])])
    layer = the_layer(b.model(total, x=[2, 8]))
    assert layer.reason == "its result is read by several nodes, and not by one Q"


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_int8_codes_with_several_readers_are_not_fused(dtype: str) -> None:
    """A residual connection: neither what makes them nor what reads them."""
    b = Builder()
    first = b.node("Conv", [b.qdq("x", dtype), b.weight([4, 4, 1, 1], axis=0)], "first")
    shared = b.qdq(first, dtype)
    second = b.node("Conv", [shared, b.weight([4, 4, 1, 1], axis=0)], "second")
    total = b.node("Add", [shared, b.qdq(second, dtype)], "total")
    found = integer_kernels(b.model(b.qdq(total, dtype), x=[1, 4, 8, 8]))
    assert [layer.runs == "integer" for layer in found.layers] == [dtype == "uint8"] * 3
    told = f"the int8 codes of {shared!r} have several readers: uint8 would fuse"
    assert {layer.reason for layer in found.layers} == (
        {told} if dtype == "int8" else {None}
    )


def test_several_dequantizers_of_one_int8_value_are_several_readers() -> None:
    b = Builder()
    first = b.qdq("x", "int8")
    second = b.node("DequantizeLinear", list(b.nodes[-1].input))
    layers = [b.node("Conv", [x, b.weight([4, 4, 1, 1])]) for x in (first, second)]
    total = b.node("Add", [b.qdq(y, "int8") for y in layers])
    found = integer_kernels(b.model(total, x=[1, 4, 8, 8]))
    told = [layer.reason for layer in found.layers if layer.op == "Conv"]
    assert told == [
        f"the int8 codes of {x!r} have several readers: uint8 would fuse"
        for x in (first, second)
    ]


def test_scales_of_half_precision_are_not_fused() -> None:
    half = np.float16
    b = Builder(21)
    x = b.node("Cast", ["x"], to=onnx.TensorProto.FLOAT16)
    pair = [b.constant(half(0.05)), b.constant(np.uint8(128))]
    x = b.node("DequantizeLinear", [b.node("QuantizeLinear", [x, *pair]), *pair])
    codes = [np.ones((8, 8), np.int8), half(0.01), np.int8(0)]
    w = b.node("DequantizeLinear", [b.constant(np.asarray(c)) for c in codes])
    y = b.node("MatMul", [x, w], "L")
    y = b.node("DequantizeLinear", [b.node("QuantizeLinear", [y, *pair]), *pair])
    layer = the_layer(b.model(b.node("Cast", [y], to=1), x=[2, 8]))
    assert layer.reason == "its scales are float16: integer kernels take float32"


# ---- fused, and wrong or slow ----


def _difference(model: ModelProto) -> float:
    """The most by which all of ONNX Runtime's optimizations change the output."""
    feed = {
        value.name: np.random.default_rng(1)
        .normal(size=[dim.dim_value for dim in value.type.tensor_type.shape.dim])
        .astype(np.float32)
        for value in model.graph.input
    }
    plain, optimized = (support.run(model, feed, level)[0] for level in (False, True))
    return float(np.max(np.abs(plain - optimized)))


def _with_varying_scales(model: ModelProto) -> ModelProto:
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim == 1:
            spread = np.linspace(0.002, 0.02, array.size).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(spread, tensor.name))
    return model


WRONG = {
    "conv axis": (
        lambda: _with_varying_scales(conv(axis=1)),
        "WRONG RESULTS: the scales of its weight vary along axis 1, and ONNX Runtime "
        "takes them for those of the output channels",
    ),
    "gemm axis": (
        lambda: _with_varying_scales(product("Gemm", shape=(32, 32), axis=0)),
        "WRONG RESULTS: the scales of its weight vary along axis 0, and ONNX Runtime "
        "takes them for those of the output channels",
    ),
    "gemm bias": (
        lambda: product("Gemm", bias="wrong"),
        "WRONG RESULTS: ONNX Runtime reads its int32 bias at x_scale * w_scale, which is "
        "not the bias's scale",
    ),
    "matmul add": (
        lambda: product(add="wrong"),
        "WRONG RESULTS: ONNX Runtime reads its int32 bias at x_scale * w_scale, which is "
        "not the bias's scale",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_onnx_runtime_fuses_wrongly_is_said(case: str) -> None:
    make, note = WRONG[case]
    model = make()
    layer = the_layer(model)
    assert layer.runs == "integer"
    assert note in layer.notes
    assert _difference(model) > 0.1  # two steps of the output's codes


def test_what_is_slow_is_said() -> None:
    assert the_layer(conv()).notes == []
    assert "uint8 weights are slower than int8" in the_layer(conv(weight="uint8")).notes
    told = "a zero point of weights that is not 0 takes time"
    assert told in the_layer(conv(zero=3)).notes


def test_activations_per_channel_are_fused_and_fail() -> None:
    b = Builder()
    pair = [b.constant(np.full(4, 0.05, np.float32)), b.constant(np.zeros(4, np.uint8))]
    codes = b.node("QuantizeLinear", ["x", *pair], axis=1)
    x = b.node("DequantizeLinear", [codes, *pair], axis=1)
    y = b.node("Conv", [x, b.weight([4, 4, 3, 3], axis=0)], "L", pads=[1] * 4)
    model = b.model(b.qdq(y, "uint8"), x=[1, 4, 8, 8])
    (note,) = the_layer(model).notes
    assert note == "FAILS: the kernel takes no scale per channel for activations"
    feed = {"x": np.ones((1, 4, 8, 8), np.float32)}
    with pytest.raises(Exception, match="QLinearConv"):
        support.run(model, feed, True)


# ---- descriptions ----


def test_how_a_layer_is_quantized() -> None:
    layer = the_layer(conv("int8", weight="uint8", axis=None, zero=128, out="uint8"))
    weight, activation = layer.weight, layer.activation
    assert weight is not None
    assert (weight.state, weight.dtype, weight.granularity) == (
        "integer",
        "uint8",
        "per-tensor",
    )
    assert (weight.scheme, weight.zero_point) == ("symmetric", 128)
    assert (activation.mode, activation.dtype) == ("static", "int8")
    assert activation.scheme == "symmetric"
    assert layer.output == "uint8"


def test_a_weight_that_arithmetic_makes_float_is_no_integer_weight() -> None:
    b = Builder()
    w = b.node("Cast", [b.constant(np.ones((8, 4), np.int8))], to=1)
    w = b.node("Mul", [w, b.constant(np.float32(0.01))])
    layer = the_layer(b.model(b.node("MatMul", ["x", w], "L"), x=[2, 8]))
    assert layer.runs == "float"
    assert (layer.reason or "").startswith("its int8 weight becomes float by arithmetic")


def test_dynamic_quantization() -> None:
    b = Builder()
    b.node("DynamicQuantizeLinear", ["x"], outputs=3)
    codes, scale, zero = b.nodes[-1].output
    w = b.constant(np.ones((8, 4), np.int8))
    y = b.node("MatMulInteger", [codes, w, zero, b.constant(np.int8(0))], "L")
    y = b.node("Cast", [y], to=1)
    factor = b.node("Mul", [scale, b.constant(np.float32(0.01))])
    layer = the_layer(b.model(b.node("Mul", [y, factor]), x=[2, 8]))
    assert (layer.kernel, layer.runs) == ("DynamicQuantizeMatMul", "integer")
    assert layer.activation.mode == "dynamic"
    assert layer.weight is not None
    assert layer.weight.scheme == "symmetric"


def test_lstm_reads_floats() -> None:
    b = Builder()
    weights = [b.weight([1, 32, size]) for size in (6, 8)]
    inputs = [b.qdq("x", "uint8"), *weights]
    y = b.node("LSTM", inputs, "L", outputs=3, hidden_size=8)
    layer = the_layer(b.model(y, x=[3, 2, 6]))
    assert (layer.runs, layer.fusable) == ("float", False)
    assert layer.reason == "ONNX Runtime has no integer kernel for LSTM with Q and DQ"


def test_float_layers_in_another_layout_are_found() -> None:
    """ONNX Runtime renames what it puts into blocks of channels."""
    b = Builder()
    w = b.constant(np.ones((16, 16, 3, 3), np.float32))
    y = b.node("Relu", [b.node("Conv", ["x", w], "L")])
    layer = the_layer(b.model(y, x=[1, 16, 8, 8]))
    assert (layer.kernel, layer.runs) == ("Conv", "float")
    assert layer.reason == "it is not quantized"


def test_layers_of_subgraphs_are_found() -> None:
    model = support.model_of(
        """main (float[1,4,8,8] x, bool c) => (float[1,4,8,8] y) {
          y = If (c) <then_branch = t () => (float[1,4,8,8] a)
            <int8[4,4,1,1] W = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16},
             float s = {0.05}, uint8 z = {128}, float[4] ws = {0.01,0.02,0.03,0.04},
             int8[4] wz = {0,0,0,0}> {
              q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)
              w = DequantizeLinear <axis = 0> (W, ws, wz)
              [L] r = Conv (d, w)
              p = QuantizeLinear (r, s, z) a = DequantizeLinear (p, s, z)
          }, else_branch = e () => (float[1,4,8,8] b) { b = Identity (x) }>
        }"""
    )
    layer = the_layer(model)
    assert (layer.kernel, layer.runs) == ("QLinearConv", "integer")
    assert layer.scope != "main"


# ---- whole models, the command line ----


@pytest.mark.parametrize("name", ["fashion_qat_legacy", "fashion_qat_dynamo"])
def test_every_fusable_layer_of_our_models_runs_in_integers(name: str) -> None:
    found = integer_kernels(MODELS / f"{name}.onnx")
    assert found.fused == found.fusable >= 28
    kept = [layer for layer in found.layers if layer.weight is not None]
    assert all(layer.weight and layer.weight.state == "fake" for layer in kept)
    assert all(layer.runs == "integer" for layer in kept)


def test_the_model_is_not_changed() -> None:
    model = conv()
    before = model.SerializeToString()
    integer_kernels(model)
    assert model.SerializeToString() == before


def test_an_absent_provider_is_not_run() -> None:
    found = integer_kernels(conv(), "qnn")
    assert (found.status, found.layers) == ("not_run", [])
    assert "QNNExecutionProvider" in (found.reason or "")


def test_a_model_that_onnx_runtime_refuses_is_not_run() -> None:
    model = support.model_of("main (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.graph.node[0].op_type = "Frobnicate"
    found = integer_kernels(model)
    assert found.status == "not_run"
    assert "Frobnicate" in (found.reason or "")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(conv(), path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", str(path), "--quantization", "--json", "-"])
    assert exit_.value.code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    (kernels,) = found["quantization"]["kernels"]
    assert (kernels["provider"], kernels["status"]) == ("CPUExecutionProvider", "read")
    assert (kernels["integer"], kernels["fusable"], kernels["fused"]) == (1, 1, 1)
    (layer,) = kernels["layers"]
    assert layer["node"] == "L"
    assert layer["weight"]["granularity"] == "per-channel"
    assert layer["kernel"] == "QLinearConv"


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(conv(out=None), path)
    asked = ["inspect", str(path), "--quantization", "--provider", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*asked, "--provider", "qnn"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "0 of 1 layers run in integers; of 1 that can, 0 do" in shown
    assert "its result is an output of the graph, too" in shown
    assert "QNNExecutionProvider: not run: " in shown


def test_inspect_asks_no_onnx_runtime_unless_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> Kernels:
        raise AssertionError("ONNX Runtime was asked")

    monkeypatch.setattr("onnxopt.inspection.survey.integer_kernels", refuse)
    assert onnxopt.inspect(conv()).quantization.kernels == []
