"""Quantizers and integer weights that exporters write out, against ONNX Runtime.

Custom operators, which it does not run, are compared with the formulas of their authors,
written here once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
    np_dtype_to_tensor_dtype,
)
from onnx.numpy_helper import from_array, to_array

from onnxopt.manager import Context
from onnxopt.model import Model
from onnxopt.passes import PIPELINES
from onnxopt.quantization.staircase import Quantizer, is_equal, nearly_equal
from tests import support
from tests.support import Array

WEIGHTS = "integer-weights{weight_only=true}"
LARGEST = float(np.finfo(np.float32).max)
Weights = dict[str, Array]


class Builder:
    """Nodes in a row, and their constants."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: Weights = {}
        self.domains: set[str] = set()

    def add(
        self, op_type: str, *inputs: str | Array, domain: str = "", **attrs: Any
    ) -> str:
        """A node of values and constants; returns the name of its output."""
        names = [
            item if isinstance(item, str) else self.constant(item) for item in inputs
        ]
        output = f"v{len(self.nodes)}"
        self.domains.add(domain)
        self.nodes.append(make_node(op_type, names, [output], domain=domain, **attrs))
        return output

    def constant(self, array: Array) -> str:
        """The name of a new initializer."""
        name = f"c{len(self.weights)}"
        self.weights[name] = array
        return name

    def model(
        self, output: str, dims: list[int | str], opset: int = 21, dtype: str = "float32"
    ) -> ModelProto:
        """x of `dims` to `output`, renamed y."""
        for node in self.nodes:
            node.output[:] = ["y" if name == output else name for name in node.output]
        kind = np_dtype_to_tensor_dtype(np.dtype(dtype))
        graph = make_graph(
            self.nodes,
            "g",
            [make_tensor_value_info("x", kind, dims)],
            [make_tensor_value_info("y", kind, None)],
            [from_array(array, name) for name, array in self.weights.items()],
        )
        imports = [make_opsetid("", opset)]
        imports += [make_opsetid(domain, 1) for domain in sorted(self.domains) if domain]
        return make_model(graph, opset_imports=imports, ir_version=10)


def f32(value: Any) -> Array:
    """An array of float32."""
    return np.array(value, np.float32)


def reasons(model: Model) -> list[str]:
    """Why something was declined."""
    return [skip.reason for skip in support.skips(model)]


def hard_values(scale: Array, zero_point: float = 0) -> Array:
    """Ties of all levels and their neighbours, tiny and huge values: [n, channels]."""
    steps = np.arange(-300, 301, dtype=np.float64) / 2
    ties = (steps[:, None] * scale.astype(np.float64).reshape(1, -1)).astype(np.float32)
    rows = [ties]
    for toward in (-np.inf, np.inf):
        near = ties
        for _ in range(3):
            near = np.nextafter(near, np.float32(toward))
            rows.append(near)
    shifted = (steps[:, None] - zero_point) * scale.astype(np.float64).reshape(1, -1)
    rows.append(shifted.astype(np.float32))
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e30, -1e30, LARGEST, -LARGEST, np.inf]
    special += [-np.inf, 2.0**31, -(2.0**31), 1e9]
    rows.append(np.repeat(f32(special)[:, None], ties.shape[1], axis=1))
    found = np.concatenate(rows)
    return np.where(np.isnan(found), np.float32(0), found)


# ---- fake quant: the orders in which exporters write it ----

Form = Callable[[Builder, str, Array, Array, float, float], str]


def torch_form(b: Builder, x: str, s: Array, z: Array, low: float, high: float) -> str:
    """Div, Round, Add, Clip, Sub, Mul."""
    v = b.add("Round", b.add("Div", x, s))
    v = b.add("Clip", b.add("Add", v, z), f32(low), f32(high))
    return b.add("Mul", b.add("Sub", v, z), s)


def learned_form(b: Builder, x: str, s: Array, z: Array, low: float, high: float) -> str:
    """LSQ: clipped before a straight-through estimator; no zero point."""
    v = b.add("Clip", b.add("Div", x, s), f32(low), f32(high))
    v = b.add("Add", b.add("Sub", b.add("Round", v), v), v)
    return b.add("Mul", v, s)


def clipped_first(b: Builder, x: str, s: Array, z: Array, low: float, high: float) -> str:
    """The bounds shifted, and the zero point left out."""
    v = b.add("Min", b.add("Max", b.add("Div", x, s), low - z), high - z)
    return b.add("Mul", s, b.add("Round", v))


def through_integers(
    b: Builder, x: str, s: Array, z: Array, low: float, high: float
) -> str:
    """The codes as int32 and back."""
    v = b.add("Add", z, b.add("Round", b.add("Div", x, s)))
    v = b.add("Clip", v, f32(low), f32(high))
    v = b.add("Cast", b.add("Cast", v, to=TensorProto.INT32), to=TensorProto.FLOAT)
    return b.add("Mul", b.add("Sub", v, z), s)


def clamp_of_x(b: Builder, x: str, s: Array, z: Array, low: float, high: float) -> str:
    """The bounds before the division, in x."""
    v = b.add("Max", x, ((low - z) * s).astype(np.float32))
    v = b.add("Min", v, ((high - z) * s).astype(np.float32))
    return b.add("Mul", b.add("Round", b.add("Div", v, s)), s)


EXACT: list[Form] = [
    torch_form,
    learned_form,
    clipped_first,
    through_integers,
    clamp_of_x,
]


def by_reciprocal(b: Builder, x: str, s: Array, z: Array, low: float, high: float) -> str:
    """x times 1 / s."""
    v = b.add("Round", b.add("Mul", x, (1 / s).astype(np.float32)))
    v = b.add("Clip", b.add("Add", v, z), f32(low), f32(high))
    return b.add("Mul", b.add("Sub", v, z), s)


def rounded_last(b: Builder, x: str, s: Array, z: Array, low: float, high: float) -> str:
    """Rounding behind the zero point."""
    v = b.add("Round", b.add("Add", b.add("Div", x, s), z))
    v = b.add("Clip", v, f32(low), f32(high))
    return b.add("Mul", b.add("Sub", v, z), s)


def half_up(b: Builder, x: str, s: Array, z: Array, low: float, high: float) -> str:
    """floor(x + 0.5)."""
    v = b.add("Floor", b.add("Add", b.add("Div", x, s), f32(0.5)))
    v = b.add("Clip", b.add("Add", v, z), f32(low), f32(high))
    return b.add("Mul", b.add("Sub", v, z), s)


NEAR: list[Form] = [by_reciprocal, rounded_last, half_up]
RANGES = {
    "int8": (-128, 127, 13),
    "uint8": (0, 255, 13),
    "narrow": (-127, 127, 13),
    "seven": (0, 127, 13),
    "int4": (-8, 7, 21),
    "uint4": (0, 15, 21),
    "int16": (-32768, 32767, 21),
}
SCALES = [0.1, 0.0123, 1.0, 2.0**-7, 1e-40, 1e-45, 3.7e5, 1e30]


def fake_quant(
    form: Form, scale: Array, zero: Array, kind: str, opset: int | None = None
) -> ModelProto:
    """A model of one quantizer of x, [n, channels] or [n, 1]."""
    low, high, since = RANGES[kind]
    b = Builder()
    channels = max(scale.size, 1)
    output = form(b, "x", scale, zero, low, high)
    return b.model(output, ["n", channels], opset or since)


def check_recognised(model: ModelProto, scale: Array, context: Context) -> Model:
    """Q and DQ alone, or with a Clip, and the same for every value that is hard."""
    result = support.run_passes(model, "fake-quant", context)
    ops = support.op_types(result)
    assert ops[-2:] == ["QuantizeLinear", "DequantizeLinear"], reasons(result)
    assert ops[:-2] in ([], ["Clip"])
    feed = {"x": hard_values(scale)}
    with np.errstate(invalid="ignore"):
        expected = support.run(model, feed)
    found = support.run(support.final(result), feed)
    support.assert_same(expected, found)
    return result


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("form", EXACT)
def test_exact_forms(form: Form, kind: str, context: Context) -> None:
    """Every order that rounds x / s before the zero point, with every sort of scale."""
    low, high, _ = RANGES[kind]
    is_plain = form is learned_form
    for scale in SCALES:
        if form is clamp_of_x and not 1e-30 < scale < 1e20:
            continue  # its bounds are no floats that divide to whole codes
        for zero in (0,) if is_plain else (0, low + 3, high):
            if not low <= zero <= high or scale * (high - low) > 1e37:
                continue
            if kind in ("narrow", "seven") and not scale > 1e-30:
                continue  # the bounds of the Clip, too
            model = fake_quant(form, f32(scale), f32(zero), kind)
            check_recognised(model, f32(scale), context)


@pytest.mark.parametrize("form", [torch_form, learned_form, through_integers])
def test_channels(form: Form, context: Context) -> None:
    """A scale, and a zero point, for each channel."""
    scale = f32([0.1, 0.2, 0.037, 1e-3])
    zero = f32(0) if form is learned_form else f32([0, 3, 200, 255])
    kind = "int8" if form is learned_form else "uint8"
    result = check_recognised(fake_quant(form, scale, zero, kind), scale, context)
    node = result.main.nodes(("QuantizeLinear",))[0]
    np.testing.assert_array_equal(result.main.array(node.input[1]), scale)


@pytest.mark.parametrize("form", NEAR)
def test_what_differs_next_to_ties_is_declined(form: Form, context: Context) -> None:
    """With a value that shows it; near-fake-quant takes it, and differs nowhere else."""
    zero = 3 if form is rounded_last else 0
    scale = f32(0.0123)
    model = fake_quant(form, scale, f32(zero), "uint8")
    declined = support.run_passes(model, "fake-quant", context)
    assert not declined.ledger.edits
    assert reasons(declined) == [
        "it rounds values next to a tie to its other side; near-fake-quant takes that"
    ]
    near = support.run_passes(model, "near-fake-quant", context)
    assert support.op_types(near) == ["QuantizeLinear", "DequantizeLinear"]
    x = hard_values(scale, zero)
    expected = support.run(model, {"x": x})[0]
    found = support.run(support.final(near), {"x": x})[0]
    differs = np.abs(expected - found) > 1e-6
    assert differs.any()
    ratio = x[differs].astype(np.float64) / scale.astype(np.float64)
    assert (np.abs(ratio - np.floor(ratio) - 0.5) < 1e-3).all()
    assert np.abs(expected - found).max() <= scale * 1.001


def test_offset_by_channel_under_one_scale_is_declined(context: Context) -> None:
    """What stands before a quantizer that is none by itself is no part of one, either."""
    b = Builder()
    moved = b.add("Add", "x", np.linspace(0, 1, 3, dtype=np.float32))
    value = b.add("Mul", moved, np.float32(1 / np.float32(0.03)))
    value = b.add("Round", b.add("Add", value, np.float32(128)))
    value = b.add("Clip", value, np.float32(0), np.float32(255))
    value = b.add("Sub", value, np.float32(128))
    model = b.model(b.add("Mul", value, np.float32(0.03)), [2, 3])
    declined = support.run_passes(model, "fake-quant", context)
    assert not declined.ledger.edits
    assert len(reasons(declined)) == 1


@pytest.mark.parametrize("scale", [2.0**-7, 0.25, 1.0, 4.0])
def test_reciprocals_of_powers_of_two_are_exact(scale: float, context: Context) -> None:
    """There x * (1 / s) is x / s."""
    for zero in (0, 7):
        model = fake_quant(by_reciprocal, f32(scale), f32(zero), "uint8")
        check_recognised(model, f32(scale), context)


def test_the_proof_decides_as_trying_does(context: Context) -> None:
    """Random forms: what fires is equal on hard values, what is declined is not."""
    random = Random(0)
    fired = 0
    for _ in range(150):
        form = random.choice([*EXACT, *NEAR])
        kind = random.choice(["int8", "uint8", "narrow", "seven"])
        low, high, _ = RANGES[kind]
        scale = f32(
            random.choice([random.uniform(1e-3, 10), 2.0 ** random.randint(-9, 3)])
        )
        zero = f32(0 if form is learned_form else random.randint(max(low, -100), high))
        model = fake_quant(form, scale, zero, kind)
        result = support.run_passes(model, "fake-quant", context)
        x = {"x": hard_values(scale, float(zero))}
        if result.ledger.edits:
            fired += 1
            support.assert_same(
                support.run(model, x), support.run(support.final(result), x)
            )
            continue
        near = support.run_passes(model, "near-fake-quant", context)
        assert near.ledger.edits, (form, scale, zero, kind, reasons(near))
        found = support.run(support.final(near), x)[0]
        assert (found != support.run(model, x)[0]).any(), (form, scale, zero, kind)
    assert 50 < fired < 150


def test_proof_against_all_floats_of_many_levels() -> None:
    """Every float32 of 64 levels: the proof's few points speak for them all."""
    scale = f32([[0.0123]])
    quantizer = Quantizer(scale, scale, f32([[0]]), 0, 255)
    first, last = (64 * scale).view(np.int32)[0, 0], (128 * scale).view(np.int32)[0, 0]
    values = np.arange(first, last, dtype=np.int32).view(np.float32)[None]

    def plain(x: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(np.clip(np.rint(x / scale), f32(0), f32(255)) * scale)

    def reciprocal(x: Array) -> Array:
        with np.errstate(over="ignore"):
            codes = np.rint(x * (f32(1) / scale))
        return np.asarray(np.clip(codes, f32(0), f32(255)) * scale)

    assert is_equal(plain, quantizer)
    assert np.array_equal(plain(values), quantizer(values))
    assert not is_equal(reciprocal, quantizer)
    assert nearly_equal(reciprocal, quantizer)
    differs = reciprocal(values) != quantizer(values)
    assert 0 < differs.sum() < 64


@pytest.mark.parametrize("change", ["level", "bound", "offset", "nan"])
def test_proof_sees(change: str) -> None:
    """One wrong level, a wrong bound, a shift of a single float, NaN at the end."""
    scale = f32([[0.1]])
    quantizer = Quantizer(scale, scale, f32([[0]]), -128, 127)

    def function(x: Array) -> Array:
        with np.errstate(over="ignore"):
            above = np.nextafter(x, f32(np.inf)) if change == "offset" else x
            v = np.rint(above / scale)
        if change == "level":
            v = np.where((v >= 40) & (v < 41), f32(39), v)
        v = np.clip(v, f32(-128), f32(126 if change == "bound" else 127))
        if change == "nan":
            v = np.where(x > 1e38, f32(np.nan), v)
        return np.asarray(v * scale, np.float32)

    assert not is_equal(function, quantizer)
    assert nearly_equal(function, quantizer) == (change == "offset")


# ---- weights ----

FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
STORED = ("int8", "uint8", "int4", "uint4", "int16", "uint16", *FLOAT8)


def stored_codes(rng: np.random.Generator, kind: str, dims: tuple[int, ...]) -> Array:
    """All sorts of codes, the ends of the range among them."""
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    if kind in FLOAT8:
        return (rng.standard_normal(dims) * 20).astype(dtype)
    info = ml_dtypes.iinfo(dtype)
    codes = rng.integers(int(info.min), int(info.max) + 1, dims)
    codes.flat[0], codes.flat[-1] = int(info.min), int(info.max)
    return codes.astype(dtype)


def spread(shape: tuple[int, ...], granularity: str) -> tuple[int, ...]:
    """The dims of scales of a weight [blocks, block, columns]."""
    return {
        "tensor": (),
        "one": (1, 1, 1),
        "column": (shape[2],),
        "columns": (1, 1, shape[2]),
        "block": (shape[0], 1, shape[2]),
    }[granularity]


def weight_model(
    rng: np.random.Generator, kind: str, granularity: str, dtype: str, moves: int
) -> ModelProto:
    """x times a weight that is written out, [8, 6] in the end, moved here and there."""
    b = Builder()
    shape = (2, 4, 6)
    codes = stored_codes(rng, kind, shape)
    to = np_dtype_to_tensor_dtype(np.dtype(dtype))
    dims = spread(shape, granularity)
    if moves & 1:
        codes = np.ascontiguousarray(np.moveaxis(codes, 0, 2))
        v = b.add("Transpose", b.constant(codes), perm=[2, 0, 1])
        v = b.add("Cast", v, to=to)
    else:
        v = b.add("Cast", b.constant(codes), to=to)
    if kind not in FLOAT8 and rng.random() < 0.7:
        whole = kind.startswith("u")
        zero = rng.integers(0, 9, dims if rng.random() < 0.7 else ()).astype("int8")
        zero = zero if whole else np.zeros_like(zero)
        v = b.add(
            "Sub", v, b.add("Cast", zero, to=to) if moves & 2 else zero.astype(dtype)
        )
    scale = rng.uniform(0.001, 0.1, dims).astype(dtype)
    v = b.add("Mul", scale, v) if moves & 4 else b.add("Mul", v, scale)
    v = b.add("Reshape", v, np.array([8, 6], np.int64))
    if moves & 8:
        v = b.add("Transpose", v, perm=[1, 0])
        v = b.add("Gemm", "x", v, transB=1)
    else:
        v = b.add("MatMul", "x", v)
    return b.model(v, ["n", 8], dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", STORED)
def test_stored_weights(kind: str, dtype: str, context: Context) -> None:
    """Every type of code, granularity, zero point and order."""
    rng = np.random.default_rng([len(kind), len(dtype)])
    if dtype == "float16" and "16" in kind:
        return  # such codes are no whole numbers of float16
    for granularity in ("tensor", "one", "column", "columns", "block"):
        for moves in range(16):
            model = weight_model(rng, kind, granularity, dtype, moves)
            result = support.run_passes(model, WEIGHTS + ",dead-code", context)
            assert not reasons(result), (granularity, moves)
            ops = support.op_types(result)
            assert "DequantizeLinear" in ops
            assert not {"Cast", "Mul", "Sub"} & set(ops)
            check_no_wider(model, result)
            check_weight(model, result)


def check_no_wider(source: ModelProto, result: Model) -> None:
    """The codes take no more bytes than they did."""
    largest = [
        max(len(tensor.raw_data) for tensor in proto.graph.initializer)
        for proto in (source, support.final(result))
    ]
    assert largest[1] <= largest[0]


def check_weight(source: ModelProto, result: Model) -> None:
    """The weights themselves are equal to the bit, in ONNX Runtime."""
    pair = []
    for proto in (source, support.final(result)):
        made = ModelProto()
        made.CopyFrom(proto)
        layer = made.graph.node[-1]
        assert layer.op_type in ("MatMul", "Gemm")
        del made.graph.node[-1]
        made.graph.node.append(make_node("Identity", [layer.input[1]], ["w"]))
        made.graph.output[0].name = "w"
        del made.graph.input[:]
        pair.append(support.run(made, {}))
    support.assert_same(*pair)


@pytest.mark.parametrize("seed", range(6))
def test_rounded_weights(seed: int, context: Context) -> None:
    """Fake-quantized constants: the codes give the values of the chain, to the bit."""
    rng = np.random.default_rng(seed)
    for form in (*EXACT, *NEAR):
        for kind in ("int8", "uint8", "narrow", "int4"):
            low, high, _ = RANGES[kind]
            b = Builder()
            dims = () if rng.random() < 0.4 else (5,)
            scale = rng.uniform(0.01, 0.1, dims).astype(np.float32)
            zero = f32(0) if form is learned_form else f32(rng.integers(low, high, dims))
            weight = (rng.standard_normal((8, 5)) * 2).astype(np.float32)
            v = form(b, b.constant(weight), scale, zero, low, high)
            model = b.model(b.add("MatMul", "x", v), ["n", 8], 13)
            result = support.run_passes(model, WEIGHTS, context)
            assert support.op_types(result) == ["DequantizeLinear", "MatMul"]
            tensors = support.final(result).graph.initializer
            assert {len(to_array(t).tobytes()) for t in tensors if len(t.dims) == 2} == {
                40
            }
            check_weight(model, result)


def test_packed_weights(context: Context) -> None:
    """Two codes in a byte, low or high first: int4, in no more bytes."""
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (6, 8)).astype(np.uint8)
    for first, axis in (("low", 2), ("high", 2), ("low", 1)):
        b = Builder()
        q = b.constant(packed)
        low = b.add("BitwiseAnd", q, np.array(15, np.uint8))
        high = b.add("BitShift", q, np.array(4, np.uint8), direction="RIGHT")
        pair = [low, high] if first == "low" else [high, low]
        parts = [b.add("Unsqueeze", v, np.array([axis])) for v in pair]
        v = b.add("Concat", *parts, axis=axis)
        v = b.add("Reshape", v, np.array([6, 4, 4]))
        v = b.add("Sub", b.add("Cast", v, to=1), f32(8))
        v = b.add("Mul", v, rng.uniform(0.01, 0.1, (6, 4, 1)).astype(np.float32))
        v = b.add("Transpose", b.add("Reshape", v, np.array([6, 16])), perm=[1, 0])
        model = b.model(b.add("MatMul", "x", v), ["n", 16])
        result = support.run_passes(model, WEIGHTS, context)
        assert support.op_types(result) == ["DequantizeLinear", "MatMul"]
        node = result.main.nodes()[0]
        codes = result.main.weight(node.input[0])
        assert codes is not None
        assert codes.data_type == TensorProto.INT4
        assert len(codes.raw_data) == packed.nbytes
        check_weight(model, result)


# ---- operators of other domains ----


def qonnx_quant(
    x: Array, s: Array, z: Array, bits: int, signed: bool, narrow: bool, mode: str
) -> Array:
    """The sample implementation in QONNX's documentation."""
    low = -(2 ** (bits - 1)) + narrow if signed else 0
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1 - narrow
    v = x / s + z
    v = np.where(v > high, np.float32(high), v)
    v = np.where(v < low, np.float32(low), v)
    v = {"ROUND": np.round, "CEIL": np.ceil, "FLOOR": np.floor}[mode](v)
    return np.asarray((v - z) * s, np.float32)


def converted(
    op_type: str,
    domain: str,
    inputs: list[Array],
    x: Array,
    context: Context,
    **attrs: Any,
) -> tuple[Model, Array | None]:
    """The model after custom-quantizers, and what it makes of x where it fired."""
    b = Builder()
    model = b.model(
        b.add(op_type, "x", *inputs, domain=domain, **attrs), ["n", x.shape[1]]
    )
    result = support.run_passes(model, "custom-quantizers", context)
    if not result.ledger.edits:
        return result, None
    return result, np.asarray(support.run(support.final(result), {"x": x})[0])


@pytest.mark.parametrize(
    "domain", ["qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general"]
)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("narrow", [0, 1])
def test_qonnx(
    domain: str, bits: int, signed: int, narrow: int, context: Context
) -> None:
    """Every width, sign and range; per tensor and per channel where no Clip is needed."""
    for scale in (f32(0.1), f32(2.0**-5), f32([[0.1, 0.2, 0.037]])):
        if scale.ndim and (bits not in (4, 8) or narrow):
            continue
        x = hard_values(np.broadcast_to(scale.reshape(-1), (3,)))
        operands = [scale, f32(0), f32(bits)]
        result, found = converted(
            "Quant", domain, operands, x, context, signed=signed, narrow=narrow
        )
        assert found is not None, reasons(result)
        with np.errstate(all="ignore"):
            expected = qonnx_quant(
                x, scale, f32(0), bits, bool(signed), bool(narrow), "ROUND"
            )
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["ROUND", "CEIL", "FLOOR"])
@pytest.mark.parametrize("zero", [0, 3, -3])
def test_qonnx_weights(mode: str, zero: int, context: Context) -> None:
    """Constants: any rounding and zero point, the values to the bit."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    scale = f32([[0.01, 0.02, 0.03]])
    b = Builder()
    names = [b.constant(weight), scale, f32(zero), f32(8)]
    domain = "qonnx.custom_op.general"
    v = b.add("Quant", *names, domain=domain, signed=1, rounding_mode=mode)
    model = b.model(b.add("MatMul", "x", v), ["n", 4])
    result = support.run_passes(model, "custom-quantizers", context)
    assert support.op_types(result) == ["DequantizeLinear", "MatMul"]
    found = made_weight(result)
    expected = qonnx_quant(weight, scale, f32(zero), 8, True, False, mode)
    np.testing.assert_array_equal(found, expected)


def made_weight(result: Model) -> Array:
    """The weight that the first node makes."""
    proto = support.final(result)
    del proto.graph.node[1:], proto.graph.input[:]
    proto.graph.output[0].name = proto.graph.node[0].output[0]
    return np.asarray(support.run(proto, {})[0])


def tensorflow_fake_quant(
    x: Array, low: Array, high: Array, bits: int, narrow: bool
) -> Array:
    """What TensorFlow documents, in float64: 0 is a level, and halves go up."""
    first, last = int(narrow), 2**bits - 1
    scale = (high.astype(np.float64) - low) / (last - first)
    zero = np.clip(np.floor(first - low / scale + 0.5), first, last)
    codes = np.clip(np.floor(x / scale + 0.5) + zero, first, last)
    return np.asarray((codes - zero) * scale)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("narrow", [0, 1])
def test_tensorflow(bits: int, narrow: int, context: Context) -> None:
    """By near-fake-quant: equal but next to ties; custom-quantizers says why not."""
    domain = "ai.onnx.converters.tensorflow"
    for low, high in ((-3.0, 5.0), (0.0, 6.0), (-1.0, 0.0), (-1.0, 1.2)):
        b = Builder()
        settings = {"num_bits": bits, "narrow_range": narrow}
        args = f32(low), f32(high)
        v = b.add("FakeQuantWithMinMaxVars", "x", *args, domain=domain, **settings)
        model = b.model(v, ["n", 1])
        exact = support.run_passes(model, "custom-quantizers", context)
        near = support.run_passes(model, "near-fake-quant", context)
        assert near.ledger.edits, reasons(near)
        if not exact.ledger.edits:
            assert "near-fake-quant takes that" in reasons(exact)[0]
        scale = (high - low) / (2**bits - 1 - narrow)
        x = hard_values(f32(scale))
        found = support.run(support.final(near), {"x": x})[0]
        with np.errstate(all="ignore"):
            expected = tensorflow_fake_quant(x, *args, bits, bool(narrow))
            ratio = x.astype(np.float64) / scale
            is_tie = np.abs(ratio - np.floor(ratio) - 0.5) < 2e-3
        is_tie |= ~np.isfinite(x)
        assert not is_tie.all()
        np.testing.assert_allclose(found[~is_tie], expected[~is_tie], 0, scale * 2e-3)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_tensorrt(kind: str, context: Context) -> None:
    """Saturated, rounded half to even, as these types are."""
    name = {"fp8": "TRT_FP8", "int4": "TRT_INT4"}[kind]
    dtype = {"fp8": ml_dtypes.float8_e4m3fn, "int4": ml_dtypes.int4}[kind]
    b = Builder()
    scale = f32(0.25)
    v = b.add(f"{name}QuantizeLinear", "x", scale, domain="trt")
    v = b.add(f"{name}DequantizeLinear", v, scale, domain="trt")
    model = b.model(v, ["n", 1])
    result = support.run_passes(model, "custom-quantizers", context)
    assert support.op_types(result) == ["QuantizeLinear", "DequantizeLinear"]
    x = hard_values(scale)
    x = x[np.isfinite(x).all(axis=1)]
    found = support.run(support.final(result), {"x": x})[0]
    with np.errstate(over="ignore"):
        ratio = np.clip(x / scale, *((-448, 448) if kind == "fp8" else (-8, 7)))
    ratio = ratio if kind == "fp8" else np.rint(ratio)
    np.testing.assert_array_equal(found, ratio.astype(dtype).astype(np.float32) * scale)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int4", "uint4"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_com_microsoft(kind: str, axis: int | None, context: Context) -> None:
    """The operators of ONNX Runtime's own domain, which it runs: equal to the bit."""
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    b = Builder()
    count = () if axis is None else ((5, 3)[axis],)
    scale = np.linspace(0.1, 0.5, 15).astype(np.float32)[: int(np.prod(count))]
    scale = scale.reshape(count)
    zero = (np.arange(scale.size) % 7).reshape(count).astype(dtype)
    names = b.constant(scale), b.constant(zero)
    attrs = {} if axis is None else {"axis": axis}
    v = b.add("QuantizeLinear", "x", *names, domain="com.microsoft", **attrs)
    v = b.add("DequantizeLinear", v, *names, domain="com.microsoft", **attrs)
    model = b.model(v, [5, 3])
    result = support.run_passes(model, "custom-quantizers", context)
    assert not reasons(result)
    assert all(node.domain == "" for node in result.main.nodes())
    for number in range(3):
        x = np.random.default_rng(number).standard_normal((5, 3)).astype(np.float32) * 20
        feed = {"x": x}
        support.assert_same(
            support.run(model, feed), support.run(support.final(result), feed)
        )


# ---- all of it ----


def layers(form: Form) -> Iterator[tuple[ModelProto, int]]:
    """Networks of two layers whose weights and activations are fake-quantized."""
    rng = np.random.default_rng(0)
    for kind in ("int8", "uint8"):
        low, high, _ = RANGES[kind]
        b = Builder()
        zero = f32(0 if kind == "int8" or form is learned_form else 100)
        v = form(b, "x", f32(0.02), zero, low, high)
        for index in range(2):
            weight = rng.standard_normal((16, 16)).astype(np.float32)
            scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
            w = form(b, b.constant(weight), scale, f32(0), -128, 127)
            v = b.add("MatMul", v, w)
            v = b.add("Add", v, rng.standard_normal(16).astype(np.float32))
            if index == 0:
                v = form(b, b.add("Relu", v), f32(0.05), zero, low, high)
        yield b.model(v, ["n", 16], 13), 2 * 256


@pytest.mark.parametrize("form", EXACT)
def test_default_pipeline(form: Form, context: Context) -> None:
    """Integer weights and quantized activations, and the same results."""
    for model, codes in layers(form):
        result = support.run_passes(model, ",".join(PIPELINES["default"]), context)
        final = support.final(result)
        ops = support.op_types(result)
        assert ops.count("QuantizeLinear") == 2
        assert ops.count("DequantizeLinear") == 4
        assert not {"Round", "Div"} & set(ops)
        sizes = {t.data_type: 0 for t in final.graph.initializer}
        for tensor in final.graph.initializer:
            sizes[tensor.data_type] += len(tensor.raw_data)
        assert sizes[TensorProto.INT8] >= codes
        assert sizes[TensorProto.FLOAT] < codes
        for number in range(3):
            x = np.random.default_rng(number).standard_normal((4, 16))
            feed = {"x": x.astype(np.float32)}
            expected, found = support.run(model, feed), support.run(final, feed)
            support.assert_same(expected, found, "equivalent")


@pytest.mark.parametrize("recipe", ["simplify", "default", "shrink"])
@pytest.mark.parametrize("opset", [10, 13, 17, 21])
def test_no_recipe_expands_integer_weights(
    recipe: str, opset: int, context: Context
) -> None:
    """In a large model too, where a little growth would be allowed."""
    rng = np.random.default_rng(0)
    for dims, scales in (((16, 16), (16,)), ((2, 8, 16), (2, 1, 16)), ((64, 32), ())):
        b = Builder()
        codes = stored_codes(rng, "int8", dims)
        v = b.add("Cast", b.constant(codes), to=1)
        v = b.add("Sub", v, f32(3))
        v = b.add("Mul", v, rng.uniform(0.01, 0.1, scales).astype(np.float32))
        v = b.add("Reshape", v, np.array([codes.size // dims[-1], dims[-1]]))
        rows = codes.size // dims[-1]
        model = b.model(b.add("MatMul", "x", v), ["n", rows], opset)
        model.ir_version = 5 if opset == 10 else 10
        pipeline = ",".join(PIPELINES[recipe])
        result = support.run_passes(model, pipeline, context, budget=1 << 30)
        for tensor in support.final(result).graph.initializer:
            elements = int(np.prod(tensor.dims))
            assert elements < 128 or tensor.data_type == TensorProto.INT8
        x = rng.standard_normal((2, rows)).astype(np.float32)
        support.assert_same(
            support.run(model, {"x": x}),
            support.run(support.final(result), {"x": x}),
            "equivalent",
        )


# ---- weights that exporters folded ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", EXACT)
def test_folded_weights(form: Form, transposed: bool, context: Context) -> None:
    """What `simplify` makes of a rounded weight becomes codes again."""
    rng = np.random.default_rng(0)
    for low, high, zero in ((-128, 127, 0), (-127, 127, 0), (-8, 7, 0), (0, 255, 97)):
        zero = 0 if form is learned_form else zero
        weight = rng.standard_normal((20, 40)).astype(np.float32)
        axis = 0 if transposed else 1
        scale = np.abs(weight).max(axis=1 - axis, keepdims=True) / max(high - zero, -low)
        b = Builder()
        v = form(b, b.constant(weight), scale.astype(np.float32), f32(zero), low, high)
        v = b.add("Gemm", "x", v, transB=1) if transposed else b.add("MatMul", "x", v)
        model = b.model(v, ["n", 40 if transposed else 20], 13)
        folded = support.final(support.run_passes(model, "fold-constants", context))
        assert len(folded.graph.node) == 1
        result = support.run_passes(folded, "grid-weights{weight_only=true}", context)
        assert support.op_types(result)[0] == "DequantizeLinear", (low, high)
        check_weight(folded, result)


def test_folded_blocks(context: Context) -> None:
    """4-bit codes in blocks of 16 inputs."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (12, 4, 16)).astype(np.float32)
    scale = rng.uniform(0.01, 0.1, (12, 4, 1)).astype(np.float32)
    weight = np.ascontiguousarray((codes * scale).reshape(12, 64).T)
    b = Builder()
    model = b.model(b.add("MatMul", "x", weight), ["n", 64])
    result = support.run_passes(model, "grid-weights{weight_only=true}", context)
    assert support.op_types(result) == ["DequantizeLinear", "MatMul"]
    stored = result.main.weight(result.main.nodes()[0].input[0])
    assert stored is not None
    assert stored.data_type == TensorProto.INT4
    check_weight(model, result)


@pytest.mark.parametrize("change", ["random", "last-digit", "few-values", "9-bits"])
def test_other_weights_stay(change: str, context: Context) -> None:
    """Random ones, one that is off by a last digit, signs, and codes of 9 bits."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-100, 101, (30, 40)).astype(np.float32)
    weight = codes * f32(0.0123)
    if change == "random":
        weight = rng.standard_normal((30, 40)).astype(np.float32)
    if change == "last-digit":
        weight[3, 7] = np.nextafter(f32(55 * 0.0123), f32(1))
    if change == "few-values":
        weight = np.sign(codes)
    if change == "9-bits":
        weight = rng.integers(-255, 256, (30, 40)).astype(np.float32) * f32(0.0123)
    b = Builder()
    model = b.model(b.add("MatMul", "x", weight), ["n", 30], 13)
    result = support.run_passes(model, "grid-weights{weight_only=true}", context)
    assert not result.ledger.edits
