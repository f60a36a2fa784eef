"""fold-batch-norm and fold-scale where the weight is one of codes: scales and codes."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto
from onnx.numpy_helper import from_array, to_array

from onnxopt.linear import DeclinedError
from onnxopt.manager import Context
from onnxopt.model import Model
from onnxopt.quantization.parameters import Parameters
from onnxopt.quantization.scaling import scaled
from onnxopt.target import target
from tests import support
from tests.quantized_layers import KINDS, Kind, Maker, feeds, layer_of, maker_of, tensor
from tests.support import Array

PASSES = "fold-batch-norm,fold-scale"
TYPES: dict[str, tuple[Any, int, int, int]] = {
    "int8": (np.int8, -127, 127, 0),
    "uint8": (np.uint8, 20, 230, 125),
    "int4": (ml_dtypes.int4, -7, 7, 0),
}
FACTORS = {
    "one": [2.5] * 6,
    "positive": [0.5, 2.0, 3.7, 1.0, 0.01, 11.0],
    "negative": [0.5, -2.0, -3.7, -1.0, 1.0, 8.0],
    "zero": [0.0, -2.0, 0.0, 0.3, 1.0, 0.0],
    "sign": [-1.0, 1.0, -1.0, -1.0, 1.0, 1.0],
}
SHIFTS = np.array([0.25, -1.0, 0.0, 3.0, 1.0, -0.5])


class Case(msgspec.Struct, frozen=True):
    """A layer with a weight of codes, and what follows it."""

    kind: Kind
    codes: str = "int8"
    scales: str = "channel"
    bias: str = "float"
    opset: int = 17

    def layer(self) -> Maker:
        """Input x, weight w, output t."""
        kind, rng = self.kind, np.random.default_rng(3)
        made = Maker(21 if self.codes == "int4" else self.opset)
        dtype, low, high, zero = TYPES[self.codes]
        codes = rng.integers(low, high + 1, kind.weight).astype(dtype)
        axis = {"channel": kind.axis, "other": 1 - kind.axis, "tensor": 0}[self.scales]
        count = () if self.scales == "tensor" else (kind.weight[axis],)
        scale = rng.uniform(0.01, 0.05, count).astype(np.float32)
        weight = made.dequantized("w", codes, scale, np.full(count, zero, dtype), axis)
        inputs = ["x", weight]
        if self.bias == "float":
            numbers = rng.standard_normal(kind.outputs).astype(np.float32)
            inputs.append(made.constant("b", numbers))
        elif self.bias == "codes":
            numbers = rng.integers(-900, 900, kind.outputs).astype(np.int32)
            steps = np.full(kind.outputs, 0.001, np.float32)
            nothing = np.zeros(kind.outputs, np.int32)
            inputs.append(made.dequantized("b", numbers, steps, nothing, 0))
        made.node(kind.op, inputs, "t", **kind.attrs)
        return made

    def before_norm(self, factor: Array, shift: Array) -> ModelProto:
        """A BatchNormalization behind it."""
        made, count = self.layer(), self.kind.outputs
        names = [
            made.constant("gamma", factor[:count].astype(np.float32)),
            made.constant("beta", shift[:count].astype(np.float32)),
            made.constant("mean", np.linspace(-1, 1, count).astype(np.float32)),
            made.constant("var", np.full(count, 1 - 1e-5, np.float32)),
        ]
        made.node("BatchNormalization", ["t", *names], "y")
        return made.model(self.kind.given, ["y"])

    def before_arithmetic(self, op: str, numbers: Array) -> ModelProto:
        """A Mul, Div or Add with a constant behind it."""
        made = self.layer()
        constant = self.kind.along_outputs(
            numbers if numbers.ndim == 0 else numbers.tolist()
        )
        made.node(op, ["t", made.constant("c", constant)], "y")
        return made.model(self.kind.given, ["y"])


def folded(proto: ModelProto, name: str = "onnx", passes: str = PASSES) -> Model:
    """What the passes make of it for the target `name`."""
    with Context(target=target(name)).evaluator as evaluator:
        return support.run_passes(
            proto, passes, Context(target=target(name), evaluator=evaluator)
        )


def check(proto: ModelProto, case: Case, name: str = "onnx") -> ModelProto:
    """One layer is left; its values, the codes' type and the outputs are as they were."""
    model = folded(proto, name)
    made = support.final(model)
    assert set(support.op_types(model)) <= {"DequantizeLinear", case.kind.op, "Gemm"}, (
        support.skips(model)
    )
    layer = layer_of(made, ["Conv", "ConvTranspose", "Gemm", "MatMul"])
    assert (
        tensor(made, maker_of(made, layer.input[1]).input[0]).dtype
        == (TYPES[case.codes][0])
    )
    for feed in feeds(case.kind.given):
        support.assert_same(
            support.run(proto, feed), support.run(made, feed), "equivalent"
        )
    assert len(made.SerializeToString()) <= len(proto.SerializeToString()) + 64
    again = folded(made, name)
    assert not again.ledger.edits
    return made


def weight_node(made: ModelProto) -> NodeProto:
    """The DequantizeLinear of the layer's weight."""
    return maker_of(made, layer_of(made, list({k.op for k in KINDS.values()})).input[1])


@pytest.mark.parametrize("bias", ["none", "float", "codes"])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("scales", ["tensor", "channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm(kind: str, scales: str, factor: str, bias: str) -> None:
    """Every layer, granularity and sign, with each kind of bias."""
    case = Case(KINDS[kind], "int8", scales, "none" if "matmul" in kind else bias)
    proto = case.before_norm(np.array(FACTORS[factor]), SHIFTS)
    made = check(proto, case)
    old = tensor(proto, "w_q").astype(np.int64)
    count, axis = case.kind.outputs, case.kind.axis
    sign = np.sign(np.array(FACTORS[factor])[:count])
    dims = [count if i == axis else 1 for i in range(old.ndim)]
    found = tensor(made, weight_node(made).input[0]).astype(np.int64)
    np.testing.assert_array_equal(found, old * sign.reshape(dims).astype(np.int64))


@pytest.mark.parametrize("codes", TYPES)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("op", ["Mul", "Div"])
@pytest.mark.parametrize("kind", ["conv", "depthwise", "transposed", "gemm-transposed"])
def test_factor(kind: str, op: str, factor: str, codes: str) -> None:
    """Codes of every type, zero points of all kinds."""
    case = Case(KINDS[kind], codes)
    numbers = np.array(FACTORS[factor])[: case.kind.outputs]
    if op == "Div" and (numbers == 0).any():
        return
    check(case.before_arithmetic(op, numbers), case)


@pytest.mark.parametrize("scales", ["tensor", "channel", "other"])
@pytest.mark.parametrize("number", [3.0, -0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_scalar(kind: str, number: float, scales: str) -> None:
    """A scalar scales whatever scales there are; one for all stays one for all."""
    case = Case(KINDS[kind], "uint8", scales, "none" if "matmul" in kind else "codes")
    made = check(case.before_arithmetic("Mul", np.array(number)), case)
    old = case.before_arithmetic("Mul", np.array(number))
    assert tensor(made, weight_node(made).input[1]).size == tensor(old, "w_s").size


@pytest.mark.parametrize("kind", [name for name in KINDS if "matmul" not in name])
def test_shift(kind: str) -> None:
    """An Add goes into the bias, and the weight stays as it is, to the bit."""
    case = Case(KINDS[kind], "int8", "channel", "codes")
    proto = case.before_arithmetic("Add", SHIFTS[: case.kind.outputs])
    made = check(proto, case)
    for name in ("w_q", "w_s"):
        np.testing.assert_array_equal(tensor(made, name), tensor(proto, name))


def test_bias_of_codes_stays_one_where_nothing_is_added() -> None:
    """An integer kernel that needs an int32 bias keeps it."""
    case = Case(KINDS["gemm"], "int8", "channel", "codes")
    made = check(case.before_arithmetic("Mul", np.array([0.5, -2, 0, 3])), case)
    bias = maker_of(made, layer_of(made, ["Gemm"]).input[2])
    old = tensor(case.before_arithmetic("Mul", np.array(1.0)), "b_q")
    np.testing.assert_array_equal(tensor(made, bias.input[0]), old * [1, -1, 0, 1])


# ---- axes ----


@pytest.mark.parametrize("kind", [name for name in KINDS if "square" in name])
def test_axis_where_both_have_one_size(kind: str) -> None:
    """One scale becomes one per output, never one per input of as many."""
    case = Case(KINDS[kind], "int8", "tensor", "none")
    made = check(case.before_norm(np.array(FACTORS["positive"]), SHIFTS * 0), case)
    found = {item.name: item.i for item in weight_node(made).attribute}
    assert found == {"axis": case.kind.axis}


def test_runtime_takes_a_wrong_axis() -> None:
    """Why that matters: ONNX Runtime fuses, and multiplies by the scales of others."""
    kind = KINDS["conv-square"]
    made = Maker()
    given = made.quantized("x", 0.02, np.array(128, np.uint8))
    codes = np.random.default_rng(0).integers(-30, 31, kind.weight).astype(np.int8)
    scale, zero = np.array([0.002, 0.01, 0.05, 0.2], np.float32), np.zeros(4, np.int8)
    weight = made.dequantized("w", codes, scale, zero, 1 - kind.axis)
    made.node(kind.op, [given, weight], "t")
    made.quantized("t", 0.2, np.array(128, np.uint8))
    proto = made.model(kind.given, ["t_d"])
    (feed,) = feeds(kind.given, 1)
    session = ort.InferenceSession(proto.SerializeToString())
    off = np.abs(session.run(None, feed)[0] - support.run(proto, feed)[0]).max()
    assert off > 20 * 0.2


@pytest.mark.parametrize("kind", ["conv-square", "gemm-square", "transposed-square"])
def test_scales_along_the_inputs(kind: str) -> None:
    """They cannot take one factor per output."""
    case = Case(KINDS[kind], "int8", "other", "float")
    proto = case.before_norm(np.array(FACTORS["positive"]), SHIFTS)
    model = folded(proto)
    assert not model.ledger.edits
    (skip,) = support.skips(model)
    assert skip.reason == "its scales do not run along the axis of the factors"


def test_groups_of_a_transposed_convolution() -> None:
    """Their outputs are no axis of the weight, but for depthwise ones."""
    grouped = Kind("ConvTranspose", (1, 4, 4, 4), (4, 2, 2, 2), 1, 4, {"group": 2})
    case = Case(grouped, "int8", "tensor", "float")
    proto = case.before_norm(np.array(FACTORS["positive"]), SHIFTS)
    model = folded(proto)
    assert [skip.reason for skip in support.skips(model)] == [
        "its scales do not run along the axis of the factors"
    ]
    check(case.before_norm(np.array([2.0, 3.0, 2.0, 3.0]), SHIFTS), case)
    check(case.before_norm(np.array([2.0, -2.0, -2.0, 0.0]), SHIFTS), case)
    alone = Kind("ConvTranspose", (1, 4, 4, 4), (4, 1, 2, 2), 0, 4, {"group": 4})
    depthwise = Case(alone, "int8", "tensor", "float")
    check(depthwise.before_norm(np.array(FACTORS["negative"]), SHIFTS), depthwise)


def test_before_a_layer() -> None:
    """Inputs are scaled where the scales run along them, and not elsewhere."""
    for scales, fires in (("other", True), ("tensor", True), ("channel", False)):
        case = Case(KINDS["gemm-transposed"], "int8", scales, "float")
        made = case.layer()
        names = [
            made.constant("gamma", np.array([1, 2, -3, 0.5], np.float32)),
            made.constant("beta", np.array([1, 2, 3, 4], np.float32)),
            made.constant("mean", np.zeros(4, np.float32)),
            made.constant("var", np.ones(4, np.float32)),
        ]
        made.nodes[-1].input[0] = "n"
        made.node("BatchNormalization", ["x", *names], "n")
        made.nodes.insert(0, made.nodes.pop())
        proto = made.model(case.kind.given, ["t"])
        if fires:
            check(proto, case)
        else:
            (skip,) = support.skips(folded(proto))
            assert skip.reason == "its scales do not run along the axis of the factors"


def float8(made: Maker, name: str, dims: tuple[int, ...]) -> str:
    """A constant of codes that are floats, of which few are whole numbers."""
    codes = np.random.default_rng(5).standard_normal(dims).astype(ml_dtypes.float8_e4m3fn)
    return made.dequantized(name, codes, np.array(0.5, np.float32), codes.dtype.type(0))


@pytest.mark.parametrize("is_weight", [True, False])
def test_codes_that_are_floats(is_weight: bool) -> None:
    """A bias of them is scaled, and a weight of them answers to a shift, as they are."""
    made = Maker(19)
    kind = KINDS["gemm"]
    count = kind.weight[0] if is_weight else kind.outputs
    names = [
        made.constant("gamma", np.full(count, 1 if is_weight else 2, np.float32)),
        made.constant("beta", SHIFTS[:count].astype(np.float32)),
        made.constant("mean", np.zeros(count, np.float32)),
        made.constant("var", np.ones(count, np.float32)),
    ]
    if is_weight:
        made.node("BatchNormalization", ["x", *names], "n", epsilon=0.0)
        made.node("Gemm", ["n", float8(made, "w", kind.weight)], "y")
    else:
        numbers = np.random.default_rng(6).standard_normal(kind.weight)
        weight = made.constant("w", numbers.astype(np.float32))
        bias = float8(made, "b", (kind.outputs,))
        made.node("Gemm", ["x", weight, bias], "t")
        made.node("BatchNormalization", ["t", *names], "y")
    proto = made.model(kind.given, ["y"])
    model = folded(proto)
    assert support.op_types(model)[-1] == "Gemm"
    for feed in feeds(kind.given):
        expected = support.run(proto, feed)
        found = support.run(support.final(model), feed)
        support.assert_same(expected, found, "equivalent")


@pytest.mark.parametrize("transposed", [0, 1])
def test_blocks(transposed: int) -> None:
    """Blocks of int4 along the inputs: each scale of an output is scaled."""
    made, rng = Maker(21), np.random.default_rng(0)
    codes = rng.integers(-7, 8, (32, 4)).astype(ml_dtypes.int4)
    scale = rng.uniform(0.01, 0.1, (2, 4)).astype(np.float32)
    zero = np.zeros((2, 4), ml_dtypes.int4)
    if transposed:
        codes, scale, zero = codes.T.copy(), scale.T.copy(), zero.T.copy()
    names = [
        made.constant(name, array)
        for name, array in (("w_q", codes), ("w_s", scale), ("w_z", zero))
    ]
    made.node("DequantizeLinear", names, "w", axis=transposed, block_size=16)
    made.node("Gemm", ["x", "w"], "t", transB=transposed)
    factor = made.constant("c", np.array([2, -0.5, 0, 1], np.float32))
    made.node("Mul", ["t", factor], "y")
    kind = Kind("Gemm", (3, 32), (32, 4), 1, 4)
    found = check(made.model(kind.given, ["y"]), Case(kind, "int4"))
    assert tensor(found, "w_s").shape == scale.shape


def test_shapes_of_one_scale() -> None:
    """A vector of one stays one, as its zero point does."""
    case = Case(KINDS["conv"], "uint8", "tensor")
    proto = case.before_arithmetic("Mul", np.array(-3.0))
    for name in ("w_s", "w_z"):
        found = support.find_tensor(proto, name)
        found.CopyFrom(from_array(to_array(found).reshape(1), name))
    made = check(proto, case)
    shapes = [tensor(made, name).shape for name in weight_node(made).input[1:]]
    assert shapes == [(1,), (1,)]


# ---- codes without a mirror ----


def lowest(case: Case, factor: Array) -> ModelProto:
    """A model one of whose codes is -128, in channel 1."""
    proto = case.before_norm(factor, SHIFTS)
    codes = tensor(proto, "w_q").copy()
    codes[(1,) + (0,) * (codes.ndim - 1)] = -128
    support.find_tensor(proto, "w_q").CopyFrom(from_array(codes, "w_q"))
    return proto


def test_code_without_a_mirror() -> None:
    """-128 has none about 0; the zero point moves only for runtimes that can do it."""
    case = Case(KINDS["conv"])
    proto = lowest(case, np.array(FACTORS["negative"]))
    for name in ("onnx", "tensorrt", "ort-cuda"):
        model = folded(proto, name)
        assert not model.ledger.edits
        assert "no mirror" in support.skips(model)[0].reason
    made = check(proto, case, "ort-cpu-x86")
    node = weight_node(made)
    np.testing.assert_array_equal(tensor(made, node.input[2]), [0, -1, 0, 0])
    old, new = tensor(proto, "w_q"), tensor(made, node.input[0])
    np.testing.assert_array_equal(new[1], -1 - old[1])
    np.testing.assert_array_equal(new[2], -old[2])
    check(lowest(case, np.array(FACTORS["positive"])), case)


def test_code_without_a_mirror_under_one_scale() -> None:
    """Then there is one per channel for the sake of the zero point."""
    case = Case(KINDS["conv"], "int8", "tensor")
    made = check(lowest(case, np.array([1.0, -1.0, 1.0, 1.0])), case, "ort-cpu-x86")
    assert tensor(made, weight_node(made).input[1]).shape == (4,)
    all_turned = lowest(case, -np.ones(6))
    made = check(all_turned, case, "ort-cpu-x86")
    assert tensor(made, weight_node(made).input[1]).shape == ()
    assert tensor(made, weight_node(made).input[2]) == -1


# ---- what is declined ----


def reason(proto: ModelProto, name: str = "onnx") -> str:
    """Why nothing was folded."""
    model = folded(proto, name)
    assert not model.ledger.edits
    return support.skips(model)[0].reason


def test_per_channel_needs_opset_13() -> None:
    """Before, DequantizeLinear has one scale."""
    case = Case(KINDS["conv"], "int8", "tensor", opset=12)
    proto = case.before_norm(np.array(FACTORS["positive"]), SHIFTS)
    assert reason(proto) == "it needs opset 13, and the model has 12"
    check(case.before_norm(np.array(FACTORS["one"]), SHIFTS), case)


@pytest.mark.parametrize("number", [1e-38, 1e-44, 3e38])
def test_scales_out_of_range(number: float) -> None:
    """A scale that is not a normal number, or a weight that is not finite."""
    case = Case(KINDS["conv"])
    text = reason(case.before_arithmetic("Mul", np.array([1, number, 1, 1])))
    assert text.startswith(("a scale would lose its precision", "a weight would not fit"))


def test_codes_that_others_read() -> None:
    """Tied codes stay tied where only the scale changes, and are not copied."""
    case = Case(KINDS["conv"], bias="none")
    for factor, fires in ((np.array(FACTORS["positive"]), True), (-np.ones(6), False)):
        made = case.layer()
        for name, numbers in (("gamma", factor), ("beta", SHIFTS), ("mean", SHIFTS)):
            made.constant(name, numbers[:4].astype(np.float32))
        made.constant("var", np.ones(4, np.float32))
        made.node("BatchNormalization", ["t", "gamma", "beta", "mean", "var"], "y")
        made.node("Conv", ["x", "w"], "z", **case.kind.attrs)
        proto = made.model(case.kind.given, ["y", "z"])
        model = folded(proto)
        assert bool(model.ledger.edits) == fires
        if not fires:
            assert "others read the codes" in support.skips(model)[0].reason
            continue
        result = support.final(model)
        codes = {n.input[0] for n in result.graph.node if n.op_type == "DequantizeLinear"}
        assert codes == {"w_q"}
        for feed in feeds(case.kind.given):
            support.assert_same(
                support.run(proto, feed), support.run(result, feed), "equivalent"
            )


def test_rounding_between() -> None:
    """Codes of the output stand between the layer and the BatchNormalization."""
    case = Case(KINDS["conv"])
    made = case.layer()
    given = made.quantized("t", 0.05, np.array(128, np.uint8))
    for name in ("gamma", "beta", "mean", "var"):
        made.constant(name, np.array([1, 2, 3, 4], np.float32))
    made.node("BatchNormalization", [given, "gamma", "beta", "mean", "var"], "y")
    text = reason(made.model(case.kind.given, ["y"]))
    assert text == "what it reads is rounded to codes behind the layer"


# ---- integer kernels and tiny factors ----


def integer_layer(factor: Array, shift: Array) -> ModelProto:
    """Conv and BatchNormalization between quantizers."""
    case = Case(KINDS["conv"], bias="none")
    made = Maker()
    given = made.quantized("x", 0.02, np.array(128, np.uint8))
    layer = case.layer()
    for weight in layer.weights:
        if weight.name == "w_q":  # small, so that no kernel saturates halfway
            small = (tensor_of(weight) // 8).astype(np.int8)
            weight.CopyFrom(from_array(small, "w_q"))
    made.weights += layer.weights
    made.nodes += layer.nodes
    made.nodes[-1].input[0] = given
    for name, numbers in (("gamma", factor), ("beta", shift)):
        made.constant(name, numbers.astype(np.float32))
    made.constant("mean", np.zeros(4, np.float32))
    made.constant("var", np.ones(4, np.float32))
    made.node("BatchNormalization", ["t", "gamma", "beta", "mean", "var"], "y")
    made.quantized("y", 0.05, np.array(128, np.uint8))
    return made.model(case.kind.given, ["y_d"])


def tensor_of(weight: Any) -> Array:
    """The array of an initializer."""
    return np.asarray(to_array(weight))


@pytest.mark.parametrize("tiny", [1e-4, 1e-12, 1e-30])
def test_dead_channel_under_an_integer_kernel(tiny: float) -> None:
    """The bias does not saturate where gamma is next to nothing."""
    proto = integer_layer(
        np.array([1.0, tiny, -2.0, 0.5]), np.array([0.0, 3.0, 1.0, -1.0])
    )
    made = support.final(folded(proto))
    assert "BatchNormalization" not in [node.op_type for node in made.graph.node]
    session = ort.InferenceSession(made.SerializeToString())
    for feed in feeds((2, 3, 5, 5)):
        expected = support.run(proto, feed)[0]
        off = np.abs(session.run(None, feed)[0] - expected).max()
        assert off <= 0.0501, "one step of the output"


def test_channel_that_is_nearly_dead() -> None:
    """Seen in the output, and too small beside its bias for int32."""
    proto = integer_layer(
        np.array([1.0, 1e-8, -2.0, 0.5]), np.array([0.0, 3.0, 1.0, -1.0])
    )
    assert reason(proto) == "the bias of a channel does not fit int32 at its scale"


# ---- the arithmetic alone ----


@st.composite
def weights(draw: st.DrawFn) -> tuple[Parameters, Array, Array]:
    """Codes, their parameters of any granularity, and factors along one axis."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=3)))
    dtype = draw(st.sampled_from([np.int8, np.uint8, np.int16, np.int32]))
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    codes = rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    block = draw(st.sampled_from([0, 0, 0, 1, 2, 3]))
    dims: tuple[int, ...] = draw(st.sampled_from([(), (shape[axis],)]))
    if block:
        sizes = list(shape)
        sizes[axis] = -(-shape[axis] // block)
        dims = tuple(sizes)
    scale = rng.uniform(1e-3, 1, dims).astype(np.float32)
    zero = rng.integers(limits.min, limits.max + 1, dims).astype(dtype)
    if draw(st.booleans()) or dtype == np.int32:
        zero = np.zeros_like(zero)
    made = Parameters(scale, zero, axis, block)
    along = draw(st.integers(0, len(shape) - 1))
    pool = [0.0, 1.0, -1.0, 2.5, -0.3]
    numbers = rng.choice(pool, shape[along])
    if draw(st.booleans()):
        numbers[:] = numbers[0]
    sizes = [1] * len(shape)
    sizes[along] = -1
    return made, codes, numbers.reshape(sizes)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=600,
    suppress_health_check=list(HealthCheck),
)
@given(weights(), st.booleans())
def test_any_weight(case: tuple[Parameters, Array, Array], may_move: bool) -> None:
    """Each product is exact but for the rounding of the scale, or it is declined."""
    given_, codes, factor = case
    try:
        made, new = scaled(
            given_, codes.shape, factor, lambda: codes, may_move_zero=may_move
        )
    except DeclinedError:
        return
    new = codes if new is None else new
    assert new.dtype == codes.dtype
    assert made.zero_point.shape == made.scale.shape
    assert made.zero_point.dtype == codes.dtype

    def values(p: Parameters, q: Array) -> Array:
        zero = p.spread(p.zero_point.astype(np.int64), q.shape)
        return (q.astype(np.int64) - zero) * p.spread(p.scale.astype(np.float64), q.shape)

    np.testing.assert_allclose(
        values(made, new), values(given_, codes) * factor, rtol=1e-7, atol=0
    )
    if not may_move:
        units = np.broadcast_to(given_.zero_point, made.zero_point.shape)
        np.testing.assert_array_equal(made.zero_point, units)


def test_most_weights_are_scaled() -> None:
    """What is not declined: scales of the same axis, signs where codes have mirrors."""
    codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    for factor, block in itertools.product(
        ([1.0, -2.0, 0.0], [0.5, 3.0, 1.0]), (2, 3, 4)
    ):
        blocks = -(-4 // block)
        given_ = Parameters(
            np.full((3, blocks), 0.1, np.float32),
            np.zeros((3, blocks), np.int8),
            1,
            block,
        )
        rows = np.array(factor).reshape(3, 1)
        made, _ = scaled(given_, codes.shape, rows, lambda: codes)
        assert made.is_blocked
        with pytest.raises(DeclinedError):
            scaled(given_, codes.shape, np.array([[1.0, 2, 3, 4]]), lambda: codes)
        even = np.repeat([[1.0, 2.0, 4.0]], block, 1)[:, :4]
        made, _ = scaled(given_, codes.shape, even, lambda: codes)
        assert made.scale[0, -1] == np.float32(0.1) * [1, 2, 4][blocks - 1]
