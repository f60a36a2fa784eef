"""implied-clip: the codes are those with the clamp, for every float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto

from onnxopt.manager import Context
from tests import support
from tests.quantized_layers import KINDS, Maker, feeds
from tests.support import Array
from tests.test_qdq_bias import optimized

SPECIAL = [np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45, -1e-45, 6.0]


def clamped(
    op: str, bounds: list[float | None], scale: Array, zero: Array, axis: int = 0
) -> ModelProto:
    """x, a clamp and a quantizer of it along the first axis."""
    made = Maker()
    names = ["x"]
    for number, name in zip(bounds, ("low", "high"), strict=False):
        names.append("" if number is None else made.constant(name, np.float32(number)))
    made.node(op, names, "r")
    names = ["r", made.constant("s", scale), made.constant("z", zero)]
    made.node("QuantizeLinear", names, "q", axis=axis)
    kind = TensorProto.INT8 if zero.dtype == np.int8 else TensorProto.UINT8
    return made.model([scale.size if scale.ndim else 3, None], ["q"], kind)


def values(rows: int) -> Array:
    """Special values, the neighbours of bounds, and a dense range, for each row."""
    near = np.array([0, 6, 255, 127.5], np.float32)
    dense = np.linspace(-8, 8, 4001).astype(np.float32)
    row = np.concatenate(
        [np.array(SPECIAL, np.float32), np.nextafter(near, np.float32(-1e9)), near, dense]
    )
    return np.tile(row, (rows, 1))


def check(proto: ModelProto, context: Context, *, fires: bool) -> None:
    """The clamp goes or not; the codes stay, NaN included."""
    model = support.run_passes(proto, "implied-clip", context)
    assert bool(model.ledger.edits) == fires
    made = support.final(model)
    if fires:
        assert [node.op_type for node in made.graph.node] == ["QuantizeLinear"]
        rows = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        for factor in (1, 1e-3, 1e5):
            with np.errstate(over="ignore"):
                feed = {"x": values(rows) * np.float32(factor)}
            support.assert_same(support.run(proto, feed), support.run(made, feed))


CLAMPS: dict[str, tuple[str, list[float | None]]] = {
    "relu": ("Relu", []),
    "relu6": ("Clip", [0.0, 6.0]),
    "no-upper-bound": ("Clip", [0.0, None]),
    "no-bound": ("Clip", []),
    "max": ("Max", [0.0]),
}


@pytest.mark.parametrize("zero", [-128, 0, 3])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("name", CLAMPS)
def test_zero_point(name: str, dtype: str, zero: int, context: Context) -> None:
    """Zero is the least code, or the clamp stays."""
    least = np.iinfo(dtype).min
    if zero < least:
        return
    op, bounds = CLAMPS[name]
    scale = np.array(6 / 255, np.float32)
    fires = zero == least or name == "no-bound"
    check(clamped(op, bounds, scale, np.array(zero, dtype)), context, fires=fires)


@pytest.mark.parametrize(
    ("scale", "fires"),
    [
        (6 / 255, True),
        (6 / 254.6, True),
        (6 / 254.4, False),
        (6 / 256, True),
        (6 / 200, False),
        (1e-30, True),
    ],
)
def test_upper_bound(scale: float, fires: bool, context: Context) -> None:
    """The code of 6 is the largest by rounding, or the clamp stays."""
    op, bounds = CLAMPS["relu6"]
    proto = clamped(op, bounds, np.array(scale, np.float32), np.array(0, np.uint8))
    check(proto, context, fires=fires)


def test_per_axis(context: Context) -> None:
    """Every channel has to saturate."""
    op, bounds = CLAMPS["relu6"]
    scale, zero = np.array([0.01, 0.02, 6 / 255], np.float32), np.zeros(3, np.uint8)
    check(clamped(op, bounds, scale, zero), context, fires=True)
    scale[1] = 0.03
    check(clamped(op, bounds, scale, zero), context, fires=False)
    zero[2], scale[1] = 1, 0.02
    check(clamped(op, bounds, scale, zero), context, fires=False)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.floats(-50, 50, width=32),
    st.floats(0, 50, width=32),
    st.floats(2.0**-140, 2.0**100, width=32),
    st.integers(-128, 127),
)
def test_any_clamp(low: float, width: float, scale: float, zero: int) -> None:
    """Whatever it does, the codes stay."""
    high = float(np.float32(low + width))
    proto = clamped(
        "Clip", [low, high], np.array(scale, np.float32), np.array(zero, np.int8)
    )
    with Context().evaluator as evaluator:
        made = support.final(
            support.run_passes(proto, "implied-clip", Context(evaluator=evaluator))
        )
    for factor in (1.0, scale, 100 * scale):
        with np.errstate(over="ignore"):
            feed = {"x": values(3) * np.float32(factor)}
        support.assert_same(support.run(proto, feed), support.run(made, feed))


@pytest.mark.parametrize("name", ["relu", "relu6"])
@pytest.mark.parametrize("kind", ["conv", "depthwise", "gemm"])
def test_layer_is_fused_without_it(
    kind: str, name: str, context: Context, tmp_path: Path
) -> None:
    """It runs on integers, and its codes before that are the same."""
    layer, (op, bounds) = KINDS[kind], CLAMPS[name]
    made, rng = Maker(), np.random.default_rng(0)
    given_ = made.quantized("x", 0.02, np.array(128, np.uint8))
    codes = rng.integers(-30, 31, layer.weight).astype(np.int8)
    scale, zero = np.array(0.02, np.float32), np.array(0, np.int8)
    made.node(
        layer.op, [given_, made.dequantized("w", codes, scale, zero)], "t", **layer.attrs
    )
    names = [
        made.constant(bound, np.float32(number))
        for bound, number in zip(("low", "high"), bounds, strict=False)
    ]
    made.node(op, ["t", *names], "r")
    made.quantized("r", 6 / 255, np.array(0, np.uint8))
    proto = made.model(layer.given, ["r_d"])
    model = support.final(support.run_passes(proto, "implied-clip", context))
    _, after = optimized(model, tmp_path)
    assert [n.op_type for n in model.graph.node if n.op_type in ("Relu", "Clip")] == []
    assert after["QLinearConv"] + after["QGemm"] == 1
    for feed in feeds(layer.given):
        support.assert_same(support.run(proto, feed), support.run(model, feed))
