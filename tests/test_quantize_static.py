"""Static int8 after training: layout, accuracy, what stays float and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto

from onnxopt.data.inputs import Feed, Feeds
from onnxopt.manager import Context, PassManager
from onnxopt.model import Model
from onnxopt.passes import PIPELINES
from onnxopt.passes.quantize.quantize_static import LARGEST, REDUCED
from onnxopt.quantization.calibration import Calibration
from onnxopt.quantization.plan import Exclusion, plan
from onnxopt.recipe import make_pass, parse_pipeline
from onnxopt.target import TARGETS, Target
from tests.support import Array, final, model_of, run, skips

MODELS = Path(__file__).parents[1] / "models"
SIMPLIFY = ",".join(PIPELINES["simplify"])


def images(count: int, start: int = 0) -> list[Feed]:
    with np.load(MODELS / "data" / "fashion_calib.npz") as file:
        return [{"image": file["image"][i : i + 1]} for i in range(start, start + count)]


def quantized(
    source: Model | ModelProto,
    feeds: list[Feed],
    settings: dict[str, Any] | None = None,
    target: Target = TARGETS["ort-cpu-x86"],
) -> Model:
    model = source if isinstance(source, Model) else Model.open(source)
    calibration = Calibration(Feeds(lambda: iter(feeds), "test"))
    context = Context(target, calibration=calibration)
    passes = [*parse_pipeline(SIMPLIFY), make_pass("quantize-static", settings)]
    with context.evaluator:
        PassManager(passes, verify_each=True).run(model, context)
    onnx.checker.check_model(final(model), full_check=True)
    return model


def outputs(model: ModelProto, feeds: list[Feed]) -> Array:
    return np.concatenate([run(model, feed)[0] for feed in feeds])


def sqnr(expected: Array, found: Array) -> float:
    noise = ((expected - found).astype(np.float64) ** 2).sum()
    return float(10 * np.log10((expected.astype(np.float64) ** 2).sum() / noise))


@pytest.fixture(scope="module")
def reference() -> Array:
    return outputs(onnx.load(MODELS / "fashion_float.onnx"), images(16, 100))


@pytest.mark.parametrize("target", ["ort-cpu-x86", "ort-cpu-arm", "tensorrt"])
def test_a_trained_network_keeps_what_it_computes(reference: Array, target: str) -> None:
    model = quantized(
        Model.open(MODELS / "fashion_float.onnx"), images(12), target=TARGETS[target]
    )
    made = final(model)
    # symmetric codes of what is never negative have half of the levels: 6 dB
    least = 30 if target == "tensorrt" else 36
    assert sqnr(reference, outputs(made, images(16, 100))) > least
    kinds = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    acts = [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
    wanted = TensorProto.UINT8 if target == "ort-cpu-x86" else TensorProto.INT8
    assert {kinds[node.input[2]] for node in acts} == {wanted}
    floats = [
        tensor.name
        for tensor in made.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) > 512
    ]
    assert floats == []
    if target == "tensorrt":
        zeros = {t.name: t for t in made.graph.initializer}
        assert all(
            not onnx.numpy_helper.to_array(zeros[node.input[2]]).any() for node in acts
        )


def test_what_is_known_of_the_inputs_makes_it_better(reference: Array) -> None:
    found = {}
    for rounding in ("nearest", "gptq"):
        model = quantized(
            Model.open(MODELS / "fashion_float.onnx"),
            images(12),
            {"rounding": rounding, "reduce_range": True},
        )
        found[rounding] = sqnr(reference, outputs(final(model), images(16, 100)))
    assert found["gptq"] > found["nearest"] + 2


def test_seven_bits_where_the_kernels_add_in_pairs() -> None:
    target = Target("ort-cpu-x86", adds_pairs=True)
    model = quantized(Model.open(MODELS / "fashion_float.onnx"), images(4), target=target)
    assert any("7 bits" in note for note in model.notes)
    made = final(model)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    makers = {node.output[0]: node for node in made.graph.node}
    most = {True: 0, False: 0}
    for node in made.graph.node:
        if node.op_type == "Conv":
            codes = weights[makers[node.input[1]].input[0]]
            depthwise = codes.shape[1] == 1 and codes.shape[0] > 1
            depthwise &= any(a.name == "group" and a.i > 1 for a in node.attribute)
            most[bool(depthwise)] = max(most[bool(depthwise)], int(np.abs(codes).max()))
    assert most == {True: LARGEST, False: REDUCED}


def kernels(model: ModelProto, folder: Path) -> Counter[str]:
    """The operators of the optimized session."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = onnx.load(folder / "optimized.onnx")
    return Counter(node.op_type for node in found.graph.node)


def test_every_layer_runs_on_integers(tmp_path: Path) -> None:
    source = Model.open(MODELS / "fashion_float.onnx")
    model = quantized(source, images(4))
    found = kernels(final(model), tmp_path)
    assert found["QLinearConv"] == 19
    assert found["QGemm"] == 1
    assert found["QLinearAdd"] == 8
    assert not {"Conv", "Gemm", "FusedConv", "Add", "Relu"} & set(found)


# ---- what is quantized, and what is not ----


def random_feeds(shape: tuple[int, ...], count: int = 4) -> list[Feed]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def conv_net(body: str) -> ModelProto:
    """A network over x [1, 4, 8, 8] with filters w, v [4, 4, 3, 3]."""
    made = model_of(f"agraph (float[1, 4, 8, 8] x) => (float[N, M, H, W] y) {{ {body} }}")
    random = np.random.default_rng(1)
    for name in ("w", "v"):
        array = (random.standard_normal((4, 4, 3, 3)) / 6).astype(np.float32)
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return made


PAD = "<pads=[1,1,1,1]>"


def quantized_values(model: Model) -> set[str]:
    """By their names before, which are those behind the DequantizeLinear now."""
    quantizers = model.main.nodes(("QuantizeLinear",))
    return {node.input[0].removesuffix("_float") for node in quantizers}


def test_a_residual_sum_runs_on_codes() -> None:
    source = conv_net(
        f"a = Conv{PAD}(x, w) b = Relu(a) c = Conv{PAD}(b, v) s = Add(c, b)"
        f" r = Relu(s) y = Conv{PAD}(r, w)"
    )
    model = quantized(source, random_feeds((1, 4, 8, 8)))
    assert quantized_values(model) == {"x", "b", "c", "r", "y"}


def test_what_only_moves_shares_its_parameters() -> None:
    source = conv_net(
        f"a = Conv{PAD}(x, w) m = MaxPool<kernel_shape=[2,2]>(a) y = Conv{PAD}(m, v)"
    )
    model = quantized(source, random_feeds((1, 4, 8, 8)))
    assert quantized_values(model) == {"x", "a", "m", "y"}
    scales = {
        node.input[0]: model.main.array(node.input[1])
        for node in model.main.nodes(("QuantizeLinear",))
    }
    assert scales["a_float"] == scales["m_float"]


def test_nothing_is_quantized_for_its_own_sake() -> None:
    source = conv_net(f"t = Tanh(x) e = Exp(t) a = Conv{PAD}(e, w) y = Tanh(a)")
    model = quantized(source, random_feeds((1, 4, 8, 8)))
    assert quantized_values(model) == {"e", "a"}


@pytest.mark.parametrize(
    "pattern", ["type:Conv", "re:con.*", "conv", "y", "re:[xy]"], ids=str
)
def test_layers_are_excluded_by_name_type_and_expression(pattern: str) -> None:
    source = conv_net(f"y = Conv{PAD}(x, w)")
    source.graph.node[0].name = "conv"
    model = quantized(source, random_feeds((1, 4, 8, 8)), {"exclude": [pattern]})
    assert [(skip.node, skip.reason) for skip in skips(model)][-1] == (
        "conv",
        "it is excluded",
    )
    assert not model.main.nodes(("QuantizeLinear",))


def test_what_is_not_excluded_is_quantized() -> None:
    source = conv_net(f"a = Conv{PAD}(x, w) y = Conv{PAD}(a, v)")
    source.graph.node[0].name = "first"
    graph = Model.open(source).main
    assert len(plan(graph, Exclusion(("first", "type:MatMul"))).layers) == 1
    assert len(plan(graph, Exclusion(("re:fir",))).layers) == 2


GEMMS: dict[str, tuple[dict[str, Any], str]] = {
    "transposed": ({"transA": 1}, "its input is transposed"),
    "alpha": ({"alpha": 2.0}, "its alpha or beta is not 1"),
    "beta": ({"beta": 0.5}, "its alpha or beta is not 1"),
}


@pytest.mark.parametrize("name", GEMMS)
def test_a_gemm_without_a_kernel_stays_float(name: str) -> None:
    attrs, reason = GEMMS[name]
    random = np.random.default_rng(0)
    node = onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], **attrs)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [4, 4])],
        [onnx.helper.make_tensor_value_info("y", 1, [4, 4])],
        [
            onnx.numpy_helper.from_array(random.random((4, 4), np.float32), "w"),
            onnx.numpy_helper.from_array(random.random(4, np.float32), "b"),
        ],
    )
    source = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    model = Model.open(source)
    assert [why for _, why in plan(model.main).skipped] == [reason]


@pytest.mark.parametrize("seed", range(3))
def test_a_bias_too_large_for_its_steps_stays_float(seed: int) -> None:
    source = conv_net(f"y = Conv{PAD}(x, w, b)")
    bias = np.array([1e9, 0, -1, 3], np.float32)
    source.graph.initializer.append(onnx.numpy_helper.from_array(bias, "b"))
    feeds = random_feeds((1, 4, 8, 8))
    model = quantized(source, feeds)
    conv = model.main.nodes(("Conv",))[0]
    kept = model.main.array(conv.input[2])
    assert kept is not None
    np.testing.assert_allclose(kept, bias, rtol=1e-6, atol=0.1)


def test_without_data_it_says_so() -> None:
    source = conv_net(f"y = Conv{PAD}(x, w)")
    model = Model.open(source)
    PassManager(parse_pipeline("quantize-static")).run(model, Context())
    assert [skip.reason for skip in skips(model)] == [
        "no data (--data) to tell its ranges"
    ]


def test_a_target_without_integer_kernels_is_left_alone() -> None:
    source = conv_net(f"y = Conv{PAD}(x, w)")
    model = quantized(source, random_feeds((1, 4, 8, 8)), target=TARGETS["ort-cuda"])
    assert not model.main.nodes(("QuantizeLinear",))
    assert "no use for" in skips(model)[-1].reason
