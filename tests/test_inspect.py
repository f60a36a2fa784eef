"""What `inspect` says of a model, against NumPy and by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.inspection.survey import Channels, Inspection, inspect, zeros
from onnxopt.weights import WeightStore

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "f" : 1]>\n'


def look(text: str, **weights: Any) -> Inspection:
    """What is found in the graph of `text`, with arrays as further initializers."""
    return inspect(build(text, **weights))


def build(text: str, **weights: Any) -> ModelProto:
    model = onnx.parser.parse_model(HEAD + text)
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def only(found: Inspection) -> Channels:
    (channels,) = found.channels
    return channels


# ---- counting zeros ----


class Pieces(WeightStore):
    """A store that hands out payloads in pieces of `size` bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def chunks(self, tensor: TensorProto) -> Any:
        data = b"".join(super().chunks(tensor))
        return (data[i : i + self.size] for i in range(0, len(data), self.size))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 9),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_zeros_of_every_axis(dims: list[int], step: int, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    array = np.where(random.random(dims) < share, random.standard_normal(dims), -0.0)
    tensor = numpy_helper.from_array(array.astype(np.float32), "w")
    found = zeros.count(Pieces(4 * step), tensor, range(len(dims)))
    assert found is not None
    assert found.elements == array.size
    assert found.zeros == int((array == 0).sum())
    for axis in range(len(dims)):
        others = tuple(i for i in range(len(dims)) if i != axis)
        np.testing.assert_array_equal(found.channels[axis], (array == 0).all(others))


@pytest.mark.parametrize(
    "name",
    [
        *("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2"),
        *("FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "FLOAT4E2M1", "INT4", "UINT4", "INT8"),
        *("UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64", "BOOL"),
        "COMPLEX64",
    ],
)
def test_zeros_of_every_dtype(name: str) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(name))
    values = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]])
    tensor = numpy_helper.from_array(values.astype(dtype), "w")
    found = zeros.count(WeightStore(), tensor, (0, 1))
    assert found is not None
    assert (found.elements, found.zeros) == (15, 10)
    assert found.channels[0].tolist() == [False, False, True, False, False]
    assert found.channels[1].tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "FLOAT8E5M2"])
def test_negative_zero_is_zero_and_nan_is_not(name: str) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(name))
    values = np.array([0.0, -0.0, np.nan, -np.inf]).astype(dtype)
    found = zeros.count(WeightStore(), numpy_helper.from_array(values, "w"))
    assert found is not None
    assert found.zeros == 2


def test_what_has_no_zero_is_not_counted() -> None:
    strings = numpy_helper.from_array(np.array(["a", ""], object), "s")
    assert zeros.count(WeightStore(), strings) is None
    empty = numpy_helper.from_array(np.zeros((0, 3), np.float32), "e")
    assert zeros.count(WeightStore(), empty, (0, 1)) == zeros.Zeros(0, 0, {})


# ---- channels of layers ----


def holed(dims: tuple[int, ...], *holes: tuple[int, int]) -> Any:
    """Ones, with zeros at each (axis, index)."""
    array = np.ones(dims, np.float32)
    for axis, index in holes:
        array[(slice(None),) * axis + (index,)] = 0
    return array


LAYERS = {
    # a layer: its text, the dims of W, the axes of output and input channels
    "Conv": ("Conv(x, W)", (5, 4, 1, 1), 0, 1),
    "ConvTranspose": ("ConvTranspose(x, W)", (4, 5, 1, 1), 1, 0),
    "Gemm": ("Gemm(x, W)", (4, 5), 1, 0),
    "Gemm, transposed": ("Gemm<transB = 1>(x, W)", (5, 4), 0, 1),
    "MatMul": ("MatMul(x, W)", (4, 5), 1, 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_channels_of_layers(name: str) -> None:
    call, dims, outputs, inputs = LAYERS[name]
    weight = holed(dims, (outputs, 0), (outputs, 3), (inputs, 2))
    found = look(f"g (float[4] x) => (float[n] y) {{ y = {call} }}", W=weight)
    channels = only(found)
    assert (channels.outputs, channels.zero_outputs) == (5, 2)
    assert (channels.inputs, channels.zero_inputs) == (4, 1)
    assert channels.weight == "W"
    assert found.sparsity.zeros == int((weight == 0).sum())
    assert found.sparsity.fraction == round(float((weight == 0).mean()), 6)


def test_input_channels_of_a_grouped_convolution_are_not_told() -> None:
    text = "g (float[1,4,8,8] x) => (float[n] y) { y = Conv<group = 4>(x, W) }"
    channels = only(look(text, W=holed((4, 1, 3, 3), (0, 1))))
    assert (channels.outputs, channels.zero_outputs) == (4, 1)
    assert (channels.inputs, channels.zero_inputs) == (None, None)


def test_a_batch_of_matrices_has_no_channels() -> None:
    text = "g (float[2,3,4] x) => (float[n] y) { y = MatMul(x, W) }"
    channels = only(look(text, W=holed((2, 4, 5))))
    assert (channels.outputs, channels.inputs) == (None, None)


def test_transposed_weights_keep_their_axes() -> None:
    text = """g (float[n,3] x) => (float[n] y) {
        t = Transpose(W) c = Cast<to = 1>(t) i = Identity(c) y = MatMul(x, i) }"""
    channels = only(look(text, W=holed((6, 3), (0, 1), (0, 2), (1, 0))))
    assert (channels.outputs, channels.zero_outputs) == (6, 2)
    assert (channels.inputs, channels.zero_inputs) == (3, 1)


def test_permuted_twice() -> None:
    text = """g (float[1,3,8,8] x) => (float[n] y) {
        a = Transpose<perm = [1, 2, 3, 0]>(W) b = Transpose<perm = [1, 3, 0, 2]>(a)
        y = Conv(x, b) }"""
    weight = np.ones((3, 1, 6, 1), np.float32)
    # a[i,j,k,l] = W[l,i,j,k], b[i,j,k,l] = a[k,i,l,j] = W[j,k,i,l]
    weight[:, :, 4] = 0
    weight[2] = 0
    channels = only(look(text, W=weight))
    assert (channels.outputs, channels.zero_outputs) == (6, 1)
    assert (channels.inputs, channels.zero_inputs) == (3, 1)


@pytest.mark.parametrize(
    ("zero", "expected"), [([7], 1), ([7, 7, 7], 1), ([7, 0, 7], None)]
)
def test_a_quantized_weight_is_zero_at_its_zero_point(
    zero: list[int], expected: int | None
) -> None:
    weight = np.arange(12, dtype=np.uint8).reshape(3, 4)
    weight[1] = 7
    point = np.array(zero if len(zero) > 1 else zero[0], np.uint8)
    scale = np.ones(point.shape, np.float32)
    text = """g (float[n,4] x) => (float[n] y) {
        w = DequantizeLinear<axis = 0>(W, s, z) y = Gemm<transB = 1>(x, w) }"""
    found = look(text, W=weight, s=scale, z=point)
    assert only(found).zero_outputs == expected
    stored = next(item for item in found.weights if item.name == "W")
    assert (stored.zeros is None) == (expected is None)


def test_integer_layers() -> None:
    text = """g (uint8[n,4] x) => (int32[n] y) {
        y = MatMulInteger(x, W, zero, z) }"""
    weight = np.full((4, 5), 3, np.uint8)
    weight[0] = 9
    found = look(text, W=weight, zero=np.array(0, np.uint8), z=np.array(3, np.uint8))
    assert only(found).zero_inputs == 3
    assert only(found).zero_outputs == 0


def test_a_tied_weight_is_counted_once() -> None:
    text = """g (float[n,4] x) => (float[n] y) {
        a = MatMul(x, W) y = Gemm<transB = 1>(a, W) }"""
    found = look(text, W=holed((4, 4), (0, 1)))
    assert found.sparsity.elements == 16
    assert [c.zero_outputs for c in found.channels] == [0, 1]
    assert [c.zero_inputs for c in found.channels] == [1, 0]


def test_a_weight_that_an_inner_scope_reads() -> None:
    text = """g (bool flag, float[n,4] x) => (float[n] y) {
        y = If(flag) <
            then_branch = t () => (float[n] a) { a = MatMul(x, W) },
            else_branch = e () => (float[n] b) { b = Neg(x) }> }"""
    found = look(text, W=holed((4, 5), (1, 2)))
    assert only(found).zero_outputs == 1
    assert "then_branch" in only(found).scope
    assert len(found.ops) == 3


def test_a_default_that_the_caller_may_replace_is_no_weight() -> None:
    text = """g (float[n,4] x, float[4,5] W) => (float[n] y) { y = MatMul(x, W) }"""
    found = look(text, W=holed((4, 5), (1, 2)))
    assert found.channels == []
    assert [weight.zeros for weight in found.weights] == [4]


# ---- quantization ----

FAKE = """g (float[n,4] x) => (float[n] y) {
    m = Mul(W, mask) q = QuantizeLinear<axis = 0>(m, s, z)
    w = DequantizeLinear<axis = 0>(q, s, z)
    xq = QuantizeLinear(x, t) xd = DequantizeLinear(xq, t)
    y = Gemm<transB = 1>(xd, w) }"""


def test_fake_quantized_weights_are_told_from_integer_ones() -> None:
    arrays = {
        "W": np.ones((5, 4), np.float32),
        "mask": np.ones((5, 1), np.float32),
        "s": np.ones(5, np.float32),
        "z": np.zeros(5, np.int8),
        "t": np.array(1, np.float32),
    }
    state = look(FAKE, **arrays).quantization
    (weight,) = state.weights
    assert (weight.name, weight.state, weight.dtype) == ("W", "fake", "float32")
    assert (weight.granularity, weight.bytes) == ("per-channel", 80)
    assert state.activations == 1
    assert state.operators == {"DequantizeLinear": 2, "QuantizeLinear": 2}


@pytest.mark.parametrize(
    ("scale", "axis", "expected"),
    [
        (np.ones((), np.float32), "", "per-tensor"),
        (np.ones(1, np.float32), "", "per-tensor"),
        (np.ones(6, np.float32), "<axis = 0>", "per-channel"),
        (np.ones((3, 4), np.float32), "<axis = 0, block_size = 2>", "blocked"),
    ],
)
def test_granularity(scale: Any, axis: str, expected: str) -> None:
    text = f"""g (float[n,4] x) => (float[n] y) {{
        w = DequantizeLinear{axis}(W, s) y = Gemm<transB = 1>(x, w) }}"""
    (weight,) = look(text, W=np.ones((6, 4), np.int8), s=scale).quantization.weights
    assert (weight.state, weight.dtype) == ("integer", "int8")
    assert weight.granularity == expected


def test_weights_of_quantized_operators() -> None:
    text = """g (uint8[n,4] a, float[n,32] x) => (uint8[n] y, float[n] b, float[n] d) {
        y = QLinearMatMul(a, s, z, W, s, z, s, z)
        d = com.microsoft.DynamicQuantizeMatMul (x, D, s, z)
        b = com.microsoft.MatMulNBits
            <K = 32, N = 8, bits = 4, block_size = 16>(x, B, c) }"""
    found = look(
        text,
        W=np.ones((4, 5), np.uint8),
        s=np.array(1, np.float32),
        z=np.array(0, np.uint8),
        B=np.ones((8, 2, 8), np.uint8),
        D=np.ones((32, 8), np.uint8),
        c=np.ones(16, np.float32),
    )
    weights = {weight.name: weight for weight in found.quantization.weights}
    assert weights["W"].granularity == "per-tensor"
    assert weights["B"].granularity == "blocked"
    assert weights["D"].granularity == "per-tensor"
    assert {weight.state for weight in weights.values()} == {"integer"}
    assert "com.microsoft::MatMulNBits" in found.quantization.operators


def test_a_scale_that_is_computed_from_the_weight() -> None:
    """As torch's legacy exporter writes it: Abs, ReduceMax and Div inside the graph."""
    text = """g (float[n,4] x) => (float[n] y) {
        a = Abs(W) m = ReduceMax<keepdims = 0>(a) s = Div(m, c)
        q = QuantizeLinear(W, s, z) w = DequantizeLinear(q, s, z)
        y = Gemm<transB = 1>(x, w) }"""
    found = look(
        text,
        W=np.ones((5, 4), np.float32),
        c=np.array(127, np.float32),
        z=np.array(0, np.int8),
    )
    assert [w.granularity for w in found.quantization.weights] == ["per-tensor"]


def test_a_long_expression_of_constants_ends() -> None:
    """Each value is looked at once, or this would take 2^60 steps."""
    steps = "".join(f"a{i + 1} = Add(a{i}, a{i}) " for i in range(60))
    text = f"""g (float[n,4] x) => (uint8[n] q) {{
        {steps} q = QuantizeLinear(a60, s) }}"""
    arrays = {"a0": np.ones(4, np.float32), "s": np.array(1, np.float32)}
    assert len(look(text, **arrays).quantization.weights) == 1


# ---- the rest ----


def test_facts_of_the_model() -> None:
    model = build(
        """g (float[n,4] x, seq(float[n]) many) => (float[n] y, seq(float[n]) z) {
            y = MatMul(x, W) z = f.same(many) }
        <domain: "f", opset_import: ["" : 21]>
        same (a) => (b) { b = Identity(a) }""",
        W=np.ones((4, 5), np.float32),
    )
    model.producer_name, model.producer_version = "maker", "1.2"
    model.metadata_props.add(key="k", value="v")
    found = inspect(model)
    assert (found.ir_version, found.producer) == (10, "maker 1.2")
    assert found.metadata == {"k": "v"}
    assert found.functions == ["f::same"]
    assert found.ops == {
        "main": {"MatMul": 1, "f::same()": 1},
        "function f::same": {"Identity": 1},
    }
    assert [(v.name, v.type, v.shape) for v in found.inputs] == [
        ("x", "float32", ["n", 4]),
        ("many", "sequence(float32)", None),
    ]
    assert found.storage["float32"].bytes == 80
    assert (found.nodes, found.parameters) == (3, 20)
    assert found.opset == {"ai.onnx": 21, "com.microsoft": 1, "f": 1}


def test_it_is_json_and_leaves_the_model_alone() -> None:
    model = build(
        "g (float[n,4] x) => (float[n] y) { y = MatMul(x, W) }",
        W=np.ones((4, 5), np.float32),
    )
    before = model.SerializeToString(deterministic=True)
    found = inspect(model)
    assert model.SerializeToString(deterministic=True) == before
    assert msgspec.json.decode(msgspec.json.encode(found), type=Inspection) == found


def test_unsorted_nodes_leave_a_note() -> None:
    text = "g (float[n] x) => (float[n] y) { y = Relu(a) a = Neg(x) }"
    assert any("not sorted" in note for note in look(text).notes)


def external(folder: Path, rows: int, columns: int) -> Path:
    """A MatMul whose weight is a file of zeros, one large hole that takes no room."""
    weight = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[rows, columns])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", "0")):
        weight.external_data.add(key=key, value=value)
    model = build("g (float[n] x) => (float[n] y) { y = MatMul(x, W) }")
    model.graph.initializer.append(weight)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with open(folder / "w.data", "wb") as file:
        file.truncate(4 * rows * columns)
    return path


def test_external_data_is_read(tmp_path: Path) -> None:
    found = inspect(external(tmp_path, 8, 5))
    assert found.external_data == {"w.data": 160}
    assert found.bytes.data == 160
    assert found.sparsity.zeros == 40
    assert (only(found).zero_outputs, only(found).zero_inputs) == (5, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_streamed(tmp_path: Path) -> None:
    """512 MiB of weights are looked at in less than 200 MiB."""
    path = external(tmp_path, 8192, 16384)
    code = (
        "import re, sys\n"
        "from onnxopt.inspection import inspect\n"
        "assert inspect(sys.argv[1]).sparsity.fraction == 1\n"
        "state = open('/proc/self/status').read()\n"  # ru_maxrss starts with the parent's
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', state)[1])\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(peak) < 200 * 1024
