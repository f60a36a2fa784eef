"""DequantizeLinear and QuantizeLinear in a row: which codes come back, by trying them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array

from onnxopt.manager import Context
from tests import support
from tests.support import Array

SINCE = {
    "int8": 13,
    "uint8": 13,
    "int16": 21,
    "uint16": 21,
    "int4": 21,
    "uint4": 21,
    "float8e4m3fn": 19,
    "float8e5m2": 19,
}


def dtype_of(kind: str) -> Any:
    return helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind.upper()))


def every_code(kind: str) -> Array:
    """All of a type."""
    bits = 16 if "16" in kind else 4 if "int4" in kind else 8
    if "float8" in kind:
        return np.arange(256, dtype=np.uint8).view(dtype_of(kind))
    low = 0 if kind.startswith("u") else -(1 << (bits - 1))
    return np.arange(low, low + (1 << bits)).astype(dtype_of(kind))


def chain(kind: str, scale: Array, zero: Array, floats: int = 1) -> ModelProto:
    """x to codes, to values, to codes, to values; the codes are outputs as numbers."""
    number = TensorProto.DataType.Value(kind.upper())
    rows = scale.size
    codes = np.broadcast_to(every_code(kind), (rows, every_code(kind).size))
    axis = {"axis": 0} if scale.ndim else {}
    pair = ["s", "z"]
    nodes = [
        make_node("Identity", ["codes"], ["q"]),
        make_node("DequantizeLinear", ["q", *pair], ["a"], **axis),
        make_node("QuantizeLinear", ["a", *pair], ["r"], **axis),
        make_node("DequantizeLinear", ["r", *pair], ["y"], **axis),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [make_tensor_value_info("codes", number, codes.shape)],
        [make_tensor_value_info("y", floats, codes.shape)],
        [from_array(scale, "s"), from_array(zero, "z")],
    )
    imports = [helper.make_opsetid("", max(SINCE[kind], 21 if floats != 1 else 13))]
    made: ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return made


def comes_back(model: ModelProto, kind: str, scale: Array, zero: Array) -> bool:
    """Whether ONNX Runtime gives every code back."""
    codes = np.broadcast_to(every_code(kind), (scale.size, every_code(kind).size))
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.input[:], probe.graph.output[:], probe.graph.node[3:]
    probe.graph.initializer.append(from_array(codes, "codes"))
    del probe.graph.node[0]
    probe.graph.node[0].input[0] = "codes"
    for name in ("r", "codes"):
        probe.graph.node.append(make_node("Cast", [name], [f"{name}_number"], to=1))
        probe.graph.output.append(helper.make_empty_tensor_value_info(f"{name}_number"))
    back, sent = support.run(probe, {})
    return bool(((back == sent) | (np.isnan(back) & np.isnan(sent))).all())


def is_removed(model: ModelProto, context: Context) -> bool:
    made = support.run_passes(model, "requantize", context)
    removed = "QuantizeLinear" not in support.op_types(made)
    assert removed or support.skips(made)
    return removed


@pytest.mark.parametrize("kind", SINCE)
@pytest.mark.parametrize("scale", [0.1, 1.0, 3e-5, 1e-45, 3e-40, 2.5e36, 3e38])
def test_every_code(kind: str, scale: float, context: Context) -> None:
    """The pair goes where ONNX Runtime gives every code back, and only there."""
    factor = np.array(scale, np.float32)
    zero = np.array(0 if "float8" in kind else 3).astype(dtype_of(kind))
    model = chain(kind, factor, zero)
    assert is_removed(model, context) == comes_back(model, kind, factor, zero)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "int4"])
@pytest.mark.parametrize("scale", [0.1, 0.25, 300.0, 1e-7])
def test_half_precision(kind: str, scale: float, context: Context) -> None:
    """Scales of few digits: tried on all codes."""
    factor = np.array(scale, np.float16)
    zero = np.array(0).astype(dtype_of(kind))
    model = chain(kind, factor, zero, TensorProto.FLOAT16)
    assert is_removed(model, context) == comes_back(model, kind, factor, zero)


@pytest.mark.parametrize(
    ("kind", "scale", "removed"),
    [
        ("int4", 0.1, True),
        ("int8", 0.25, True),
        ("uint8", 0.25, True),
        ("uint8", 0.3, False),
        ("int16", 0.25, False),
        ("int8", 3e36, False),
    ],
)
def test_bfloat16(kind: str, scale: float, removed: bool, context: Context) -> None:
    """ONNX Runtime has no kernel: however a runtime rounds the ratio, it must hold."""
    factor = np.array(scale).astype(ml_dtypes.bfloat16)
    zero = np.array(0).astype(dtype_of(kind))
    model = chain(kind, factor, zero, TensorProto.BFLOAT16)
    assert is_removed(model, context) == removed


def test_one_bad_channel_keeps_the_pair(context: Context) -> None:
    """Along an axis, every channel counts; equal ones are tried once."""
    scale = np.full(700, 0.1, np.float32)
    zero = np.zeros(700, np.int16)
    assert is_removed(chain("int16", scale, zero), context)
    scale[699] = 1e35
    assert not is_removed(chain("int16", scale, zero), context)


POSITIVE = st.floats(2.0**-149, float(np.float32(3.4e38)), width=32)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(POSITIVE, st.sampled_from(["int8", "uint8"]), st.integers(0, 127))
def test_eight_bits_come_back_unless_they_overflow(
    context: Context, scale: float, kind: str, zero: int
) -> None:
    """For any scale: the argument of the docstring, against the kernels."""
    factor, point = np.array(scale, np.float32), np.array(zero, kind)
    model = chain(kind, factor, point)
    removed = is_removed(model, context)
    assert removed == comes_back(model, kind, factor, point)
    assert removed or scale * 255 > 3e38


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_long_chains(pairs: int, context: Context) -> None:
    """One pair stays, and the results are equal on several feeds."""
    lines = ["q0 = QuantizeLinear (x, s, z)"]
    for index in range(1, pairs):
        lines.append(f"a{index} = DequantizeLinear (q{index - 1}, s, z)")
        lines.append(f"q{index} = QuantizeLinear (a{index}, s, z)")
    lines.append(f"y = DequantizeLinear (q{pairs - 1}, s, z)")
    source = support.model_of(
        "main (float[N,9] x) => (float[N,9] y) <float s = {0.03}, uint8 z = {9}> {"
        + "\n".join(lines)
        + "}"
    )
    made = support.run_passes(source, "requantize", context)
    assert support.op_types(made) == ["QuantizeLinear", "DequantizeLinear"]
    for feed in support.feeds_of(source):
        support.assert_same(
            support.run(source, feed), support.run(support.final(made), feed)
        )
