"""QuantizeLinear in NumPy against ONNX Runtime's kernel, to the bit."""

from __future__ import annotations

import numpy as np
import onnx.helper
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import ModelProto, TensorProto
from onnx.helper import make_node, make_tensor_value_info, np_dtype_to_tensor_dtype
from onnx.numpy_helper import to_array

from onnxopt.manager import Context
from onnxopt.quantization.quantize_linear import quantize
from tests import support
from tests.support import Array

CODES = ("int8", "uint8")


def quantizer(
    values: Array,
    scale: Array,
    zero_point: Array | None,
    opset: int = 13,
    **settings: int,
) -> ModelProto:
    """A model of one QuantizeLinear whose inputs are all fed."""
    arrays = {"values": values, "scale": scale}
    kind = int(settings.get("output_dtype", TensorProto.UINT8))
    if zero_point is not None:
        arrays["zero_point"] = zero_point
        kind = np_dtype_to_tensor_dtype(zero_point.dtype)
    infos = [
        make_tensor_value_info(name, np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in arrays.items()
    ]
    node = make_node("QuantizeLinear", list(arrays), ["codes"], **settings)
    output = make_tensor_value_info("codes", kind, values.shape)
    graph = onnx.helper.make_graph([node], "q", infos, [output])
    imports = [onnx.helper.make_opsetid("", opset)]
    model: ModelProto = onnx.helper.make_model(
        graph, opset_imports=imports, ir_version=10
    )
    return model


def runtime_codes(
    values: Array, scale: Array, zero_point: Array | None, axis: int = 1
) -> Array:
    """What ONNX Runtime computes."""
    feed = {"values": values, "scale": scale}
    if zero_point is not None:
        feed["zero_point"] = zero_point
    model = quantizer(values, scale, zero_point, axis=axis)
    return np.asarray(support.run(model, feed)[0])


def check(values: Array, scale: Array, zero_point: Array, axis: int = 1) -> None:
    """The function answers, and as the kernel does."""
    found = quantize(values, scale, zero_point, axis)
    assert found is not None
    support.assert_same([runtime_codes(values, scale, zero_point, axis)], [found])


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("zero_point", [-128, -3, 0, 1, 127, 128, 255])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 2.0**-20, 3.0])
def test_every_tie(dtype: str, zero_point: int, scale: float) -> None:
    """All halves around the whole range, and their neighbours among the floats."""
    if not np.iinfo(dtype).min <= zero_point <= np.iinfo(dtype).max:
        return
    halves = (np.arange(-1100, 1100, dtype=np.float32) / 2) * np.float32(scale)
    values = np.concatenate(
        [
            halves,
            np.nextafter(halves, np.float32(-1e9)),
            np.nextafter(halves, np.float32(1e9)),
        ]
    ).astype(np.float32)
    check(values, np.array(scale, np.float32), np.array(zero_point, dtype))


@pytest.mark.parametrize("dtype", CODES)
def test_limits(dtype: str) -> None:
    """Huge, tiny and denormal values and scales; ratios that overflow to infinity."""
    info = np.finfo(np.float32)
    pool = [0.0, 1.0, float(info.max), float(info.tiny), 1e-45, 1e-40, 3e38, 1e9, 2.0**31]
    values = np.array([*pool, *(-item for item in pool)], np.float32)
    for scale in (1e-45, 1e-40, float(info.tiny), 1e-8, 1.0, 1e30, float(info.max)):
        for zero_point in (0, 100):
            check(values, np.array(scale, np.float32), np.array(zero_point, dtype))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 1, 2), (2, 3, 2, 2), (0, 3), (1, 3)])
def test_every_axis(dtype: str, shape: tuple[int, ...]) -> None:
    """From either end, also where several axes are of one length."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(shape) * 30).astype(np.float32)
    for axis in range(-len(shape), len(shape)):
        count = shape[axis]
        scale = rng.uniform(0.05, 0.5, count).astype(np.float32)
        zero_point = rng.integers(0, 100, count).astype(dtype)
        if count:
            check(values, scale, zero_point, axis)


def test_scalars() -> None:
    """A scalar of values; a scale of one element against any axis."""
    one, zero = np.array(0.5, np.float32), np.array(3, np.uint8)
    check(np.array(1.3, np.float32), one, zero)
    check(np.ones((2, 3), np.float32), one.reshape(1), zero.reshape(1), axis=0)


def test_large_weights_go_in_slices() -> None:
    """More than one slice along the first axis, per tensor and per axis."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 1100, 1000)).astype(np.float32)
    zero_point = np.zeros(5, np.int8)
    check(values, np.linspace(0.01, 0.05, 5).astype(np.float32), zero_point, axis=0)
    middle = np.linspace(0.01, 0.05, 1100).astype(np.float32)
    check(values, middle, np.zeros(1100, np.int8), axis=1)
    check(values, np.array(0.02, np.float32), np.array(0, np.int8))


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCALES = st.floats(2.0**-149, float(np.float32(3.4e38)), width=32)
EXAMPLES = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def near_ties(draw: st.DrawFn) -> tuple[Array, Array, Array, int]:
    """Values that are mostly odd multiples of half their scale, give or take a bit."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = draw(st.sampled_from(CODES))
    count = () if draw(st.booleans()) else (shape[axis],)
    scale = draw(hnp.arrays(np.float32, count, elements=SCALES))
    limits = np.iinfo(dtype)
    codes = st.integers(int(limits.min), int(limits.max))
    zero_point = draw(hnp.arrays(dtype, count, elements=codes))
    wide = scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    halves = draw(hnp.arrays(np.float32, shape, elements=st.integers(-600, 600))) / 2
    with np.errstate(all="ignore"):
        values = (halves * (wide if count else scale)).astype(np.float32)
        nudge = draw(hnp.arrays(np.int8, shape, elements=st.integers(-1, 1)))
        values = np.nextafter(values, (values + nudge * np.inf).astype(np.float32))
    values = np.where(np.isfinite(values), values, np.float32(1))
    return values.astype(np.float32), scale, zero_point, axis


@settings(EXAMPLES, max_examples=200)
@given(near_ties())
def test_near_ties(case: tuple[Array, Array, Array, int]) -> None:
    """Any scale, any zero point, per tensor and per axis."""
    check(*case)


@settings(EXAMPLES, max_examples=200)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2), elements=FLOATS),
    SCALES,
    st.integers(-128, 127),
)
def test_any_floats(values: Array, scale: float, zero_point: int) -> None:
    """Whatever the ratio."""
    check(values, np.array(scale, np.float32), np.array(zero_point, np.int8))


@pytest.mark.slow
@settings(EXAMPLES, max_examples=20_000)
@given(near_ties())
def test_many_near_ties(case: tuple[Array, Array, Array, int]) -> None:
    """The same, much longer."""
    check(*case)


def test_what_it_does_not_vouch_for() -> None:
    """Then ONNX Runtime is asked: other dtypes, blocks, zero, negative, not finite."""
    values, one = np.ones((2, 2), np.float32), np.array(1, np.float32)
    zero = np.array(0, np.int8)
    assert quantize(values.astype(np.float16), one, zero, 0) is None
    assert quantize(values, one.astype(np.float16), zero, 0) is None
    assert quantize(values, one, zero.astype(np.int16), 0) is None
    assert quantize(values, one, zero.reshape(1), 0) is None
    assert (
        quantize(values, np.ones((1, 2), np.float32), np.zeros((1, 2), "int8"), 0) is None
    )
    assert quantize(values, np.ones(3, np.float32), np.zeros(3, "int8"), 0) is None
    assert quantize(values, np.ones(2, np.float32), np.zeros(2, "int8"), 2) is None
    for bad in (0.0, -1.0, np.nan, np.inf):
        assert quantize(values, np.array(bad, np.float32), zero, 0) is None
    for bad in (np.nan, np.inf):
        assert quantize(np.array([1, bad], np.float32), one, zero, 0) is None


NUMBERS = [-3e9, -129.0, -128.5, -2.5, -0.5, -0.0, 0.3, 0.5, 1.5, 127.5, 255.5, 4e4, 1e30]
SPECIAL = [np.nan, np.inf, -np.inf]
KINDS = {
    "int8": 10,
    "uint8": 10,
    "int16": 21,
    "uint16": 21,
    "int4": 21,
    "uint4": 21,
    "float8e4m3fn": 19,
    "float8e5m2": 19,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-20, 0.0, -0.5])
@pytest.mark.parametrize("source", ["float32", "float16"])
def test_pass_stores_the_codes_of_the_kernel(
    kind: str, scale: float, source: str, context: Context
) -> None:
    """The initializer that fold-qdq-weights makes, for every type of code."""
    if source == "float16" and KINDS[kind] < 19:
        return
    special = SPECIAL if scale > 0 and "float8" not in kind else []
    with np.errstate(over="ignore"):
        values = np.array(NUMBERS + special).astype(source)
    factor = np.array(scale).astype(source)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind.upper()))
    zero_point = np.array(0 if "float8" in kind or "16" in kind else 3).astype(dtype)
    model = quantizer(values, factor, zero_point, KINDS[kind])
    weights = zip(
        ("values", "scale", "zero_point"), (values, factor, zero_point), strict=True
    )
    del model.graph.input[:]
    for name, array in weights:
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model.graph.node.append(make_node("Cast", ["codes"], ["numbers"], to=1))
    model.graph.output[0].CopyFrom(make_tensor_value_info("numbers", 1, values.shape))
    folded = support.run_passes(model, "fold-qdq-weights", context)
    assert support.op_types(folded) == ["Cast"]
    assert not support.skips(folded)
    support.assert_same(support.run(model, {}), support.run(support.final(folded), {}))
    stored = to_array(support.find_tensor(support.final(folded), "codes"))
    support.assert_same(support.run(model, {}), [stored.astype(np.float32)])
