"""The NumPy table of constant arithmetic against ONNX Runtime, operator by operator.

Where ONNX Runtime has no kernel for a type, onnx.reference is asked instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.helper
import pytest
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node, np_dtype_to_tensor_dtype
from onnx.reference import ReferenceEvaluator

from onnxopt import arithmetic
from tests import support
from tests.support import Array

I64, F32 = TensorProto.INT64, TensorProto.FLOAT
DTYPES = ("int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
SHAPES = [((), ()), ((3,), ()), ((2, 3), (3,)), ((2, 1), (1, 3)), ((0, 3), (3,))]


def expected(node: NodeProto, inputs: Sequence[Array | None], opset: int) -> Array:
    """What ONNX Runtime computes, or onnx.reference where it has no kernel."""
    model = ModelProto(ir_version=4 if opset < 9 else 8)
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    model.graph.name = "one"
    model.graph.node.append(node)
    feed = {}
    for name, array in zip(node.input, inputs, strict=True):
        if array is not None:
            feed[name] = array
            kind = np_dtype_to_tensor_dtype(array.dtype)
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(name, kind, array.shape)
            )
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    try:
        return np.asarray(support.run(model, feed)[0])
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error) and "INVALID_GRAPH" not in str(error):
            raise
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(model).run(None, feed)[0])


def node_of(op_type: str, inputs: Sequence[Any], **attributes: Any) -> NodeProto:
    """A node that reads `inputs`: those that are None are absent."""
    names = ["" if item is None else f"in{i}" for i, item in enumerate(inputs)]
    return make_node(op_type, names, ["out"], **attributes)


def check(
    op_type: str, inputs: Sequence[Any], opset: int = 17, **attributes: Any
) -> None:
    """The table answers, and as ONNX Runtime does: value, dtype and shape."""
    arrays = [None if item is None else np.asarray(item) for item in inputs]
    node = node_of(op_type, arrays, **attributes)
    found = arithmetic.evaluate(node, arrays, opset)
    assert found is not None, "the table does not answer"
    support.assert_same([expected(node, arrays, opset)], [found])


def declines(
    op_type: str, inputs: Sequence[Any], opset: int = 17, **attributes: Any
) -> None:
    """The table leaves it to another evaluator."""
    arrays = [None if item is None else np.asarray(item) for item in inputs]
    assert (
        arithmetic.evaluate(node_of(op_type, arrays, **attributes), arrays, opset) is None
    )


def ints(*values: int) -> Array:
    """A vector of int64."""
    return np.array(values, np.int64)


def samples(dtype: str, shape: Sequence[int], seed: int = 0) -> Array:
    """Values of a dtype among which its limits, zeros and small ones are."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        pool = [0.0, -0.0, 1.5, -2.5, 0.1, 3.0, np.inf, -np.inf, np.nan, 6e4]
    else:
        limits = np.iinfo(kind)
        pool = [limits.min, limits.max, 0, 1, 2, 3, 7, limits.max - 1]
        pool += [] if kind.kind == "u" else [-1, -2, -3, -7]
    return rng.choice(np.array(pool, kind), shape).astype(kind)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic(op_type: str, dtype: str) -> None:
    """Wrapping, broadcasting, infinities, division towards zero."""
    for seed, (left, right) in enumerate(SHAPES * 4):
        a, b = samples(dtype, left, seed), samples(dtype, right, 100 + seed)
        if op_type == "Div" and np.dtype(dtype).kind in "iu":
            b[...] = np.where((b == 0) | (b.astype(np.float64) == -1), 2, b)
        check(op_type, [a, b])
    check(op_type, [a, b], opset=7) if dtype in ("int32", "int64") else None


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_integers_divide_towards_zero(dtype: str) -> None:
    """Every pair of signs, and the limits, which have no absolute value."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    pool = [low, low + 1, -8, -7, -1, 0, 1, 7, 8, high]
    pairs = [
        (a, b) for a, b in itertools.product(pool, pool) if b and (a, b) != (low, -1)
    ]
    left, right = np.array(pairs, dtype).T
    check("Div", [left, right])
    check("Mod", [left, right])
    check("Mod", [left, right], fmod=1)


@pytest.mark.parametrize("op_type", ["Div", "Mod"])
def test_division_that_traps(op_type: str) -> None:
    """By zero, and of the least integer by -1: the processor's business."""
    declines(op_type, [ints(1, 2), ints(1, 0)])
    declines(op_type, [ints(-(2**63)), ints(-1)])
    declines(op_type, [np.array([-(2**31)], np.int32), np.array([-1], np.int32)])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_mod(dtype: str) -> None:
    """The sign of the divisor, or of the dividend with fmod."""
    for seed, (left, right) in enumerate(SHAPES):
        a, b = samples(dtype, left, seed), samples(dtype, right, 100 + seed)
        b[...] = np.where((b == 0) | (b.astype(np.float64) == -1), 2, b)
        check("Mod", [a, b])
        check("Mod", [a, b], fmod=1)
    declines("Mod", [np.float32(3), np.float32(2)], fmod=1)


@pytest.mark.parametrize("op_type", ["Equal", "Less", "Greater"])
@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_comparisons(op_type: str, dtype: str) -> None:
    """NaN and the two zeros included."""
    if dtype == "bool":
        if op_type == "Equal":
            check(op_type, [[True, False], [True, True]])
        return
    for seed, (left, right) in enumerate(SHAPES):
        check(op_type, [samples(dtype, left, seed), samples(dtype, right, 50 + seed)])
        if op_type != "Equal" and not dtype.startswith("float16"):
            pair = [samples(dtype, left, seed), samples(dtype, right, 50 + seed)]
            check(f"{op_type}OrEqual", pair)


@pytest.mark.parametrize("op_type", ["And", "Or"])
def test_logic(op_type: str) -> None:
    """All four pairs, and broadcasting."""
    check(op_type, [[True, True, False, False], [True, False, True, False]])
    check(op_type, [[[True], [False]], [True, False, True]])
    check(op_type, [True, False])
    check("Not", [[True, False]])


def test_old_broadcasting_is_left_alone() -> None:
    """Before opset 7 an attribute said how to broadcast."""
    for op_type in ("Add", "Sub", "Mul", "Div"):
        declines(op_type, [np.ones((2, 3), np.float32), np.ones(2, np.float32)], opset=6)
    for op_type in ("And", "Or"):
        declines(op_type, [[True], [True]], opset=6)


@pytest.mark.parametrize("op_type", ["Neg", "Abs", "Floor", "Ceil"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unary(op_type: str, dtype: str) -> None:
    """Where the operator takes the type; the least integer has no opposite."""
    floats = dtype.startswith("float")
    if (op_type in ("Floor", "Ceil") and not floats) or (op_type, dtype) == (
        "Neg",
        "uint8",
    ):
        return
    for shape in ((), (5,), (2, 3), (0,)):
        check(op_type, [samples(dtype, shape)])


@pytest.mark.parametrize("source", [*DTYPES, "bool"])
@pytest.mark.parametrize("target", [*DTYPES, "bool", "uint16", "bfloat16"])
def test_cast(source: str, target: str) -> None:
    """Wrapping between integers; floats that fit; nothing that the processor decides."""
    kind = TensorProto.DataType.Value(
        {"float32": "FLOAT", "float64": "DOUBLE"}.get(target, target.upper())
    )
    floats, whole = source.startswith("float"), target.startswith(("int", "uint"))
    values = (
        np.array([True, False])
        if source == "bool"
        else np.array([0.0, 1.9, 100.5, 3.0], source)
        if floats and whole
        else samples(source, (24,))
    )
    if kind in (TensorProto.FLOAT16, TensorProto.UINT16, TensorProto.BFLOAT16):
        declines("Cast", [values], to=kind)
        return
    check("Cast", [values], to=kind)
    check("Cast", [values.reshape(-1)[0]], to=kind)
    if floats and whole:
        for outside in (np.nan, np.inf, -np.inf):
            declines("Cast", [np.array([1.0, outside], source)], to=kind)
        if kind != TensorProto.INT64 and source != "float16":
            declines(
                "Cast", [np.array([3e9 if "32" in target else 4e4], source)], to=kind
            )


def test_float_limits_of_a_cast() -> None:
    """2^63 is a float, and the first that does not fit; -2^63 is the last that does."""
    declines("Cast", [np.float32(2.0**63)], to=I64)
    check("Cast", [np.float64(-(2.0**63))], to=I64)
    declines("Cast", [np.float64(np.nextafter(-(2.0**63), -np.inf))], to=I64)
    check("Cast", [np.float64(2.0**62)], to=I64)
    check("Cast", [np.float32(-(2.0**62))], to=I64)


def test_concat() -> None:
    """Negative axes, empty pieces, attribute values."""
    check("Concat", [ints(1, 2), ints(3)], axis=0)
    check("Concat", [ints(), ints(3), ints()], axis=0)
    check("Concat", [ints(1, 2)], axis=-1)
    left, right = np.ones((2, 3), np.float32), np.zeros((2, 1), np.float32)
    check("Concat", [left, right], axis=1)
    check("Concat", [left, right], axis=-1)
    declines("Concat", [left, right], axis=0)
    declines("Concat", [ints(1), np.ones(1, np.int32)], axis=0)


def test_gather() -> None:
    """Scalar, negative and repeated indices on every axis."""
    data = np.arange(12, dtype=np.int64).reshape(3, 4)
    for axis in (0, 1, -1, -2):
        check("Gather", [data, ints(2, 0, -1, 0)], axis=axis)
        check("Gather", [data, np.int64(-2)], axis=axis)
        check("Gather", [data, np.array([[0, 1], [2, 0]], np.int32)], axis=axis)
    check("Gather", [data, ints()], axis=0)
    check("Gather", [data, ints(1)])
    for index in (4, -5, 2**40):
        declines("Gather", [ints(1, 2, 3), ints(index)], axis=0)


def test_squeeze() -> None:
    """Axes by attribute and by input, none at all, and an empty list of them."""
    data = np.ones((1, 3, 1), np.float32)
    check("Squeeze", [data])
    check("Squeeze", [data], opset=11)
    check("Squeeze", [data], opset=11, axes=[0])
    check("Squeeze", [data], opset=11, axes=[-1, 0])
    for axes in ([0], [2], [-1], [0, 2]):
        check("Squeeze", [data, ints(*axes)])
    declines("Squeeze", [data, ints(1)])
    declines("Squeeze", [data, ints()])


def test_unsqueeze() -> None:
    """The axes count in the result."""
    data = np.arange(6, dtype=np.int64).reshape(2, 3)
    for axes in ([0], [1], [2], [-1], [0, 3], [3, 0], [-1, -4]):
        check("Unsqueeze", [data, ints(*axes)])
    check("Unsqueeze", [np.int64(4), ints(0)])
    for axes in ([0], [2], [0, 3]):
        check("Unsqueeze", [data], opset=11, axes=axes)
    declines("Unsqueeze", [data, ints(0, 0)])
    declines("Unsqueeze", [data, ints(5)])


LOW, HIGH = -(2**63), 2**63 - 1
BOUNDS = (LOW, -100, -7, -6, -5, -1, 0, 1, 4, 5, 6, 100, 2**31 - 1, HIGH)


@pytest.mark.parametrize("step", [1, 2, 3, -1, -2, -7])
def test_slice_bounds(step: int) -> None:
    """Every start and end around the limits: the table is right or does not answer."""
    data = np.arange(6, dtype=np.int64)
    answers = 0
    for start, end in itertools.product(BOUNDS, BOUNDS):
        arrays = [data, ints(start), ints(end), ints(0), ints(step)]
        node = node_of("Slice", arrays)
        found = arithmetic.evaluate(node, arrays, 17)
        if found is not None:
            answers += 1
            support.assert_same([expected(node, arrays, 17)], [found])
    assert answers > (100 if step > 0 else 20)


def test_slice() -> None:
    """Attributes, absent inputs, several and negative axes."""
    data = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    check("Slice", [data], opset=9, starts=[1, 0], ends=[2, 2], axes=[2, 0])
    check("Slice", [data], opset=9, starts=[0, 1], ends=[1, 9])
    check("Slice", [data, ints(0, 1), ints(1, 9)])
    check("Slice", [data, ints(1), ints(3), ints(-1)])
    check("Slice", [data, ints(3), ints(0), ints(-1), ints(-2)])
    check("Slice", [data, ints(1), ints(3), None, ints(1)])
    check("Slice", [data, np.array([1], np.int32), np.array([9], np.int32)])
    check("Slice", [data, ints(1), ints(1), ints(2)])
    declines("Slice", [data, ints(0), ints(2), ints(0), ints(0)])
    declines("Slice", [data, ints(0, 1), ints(2)])


def test_reshape() -> None:
    """0 copies a dim, or means 0 with allowzero; -1 is what remains."""
    data = np.arange(12, dtype=np.int64).reshape(3, 4)
    for dims in ([12], [-1], [4, 3], [0, -1], [0, 0], [2, -1, 2], [0, 2, 2]):
        check("Reshape", [data, ints(*dims)])
    check("Reshape", [ints(5), ints()])
    check("Reshape", [np.zeros((0, 3), np.int64), ints(3, 0)], allowzero=1)
    check("Reshape", [np.zeros((0, 3), np.int64), ints(0, 3)])
    declines("Reshape", [data, ints(5, 5)])
    declines("Reshape", [data, ints(3, 4, 0)])
    declines("Reshape", [data], opset=4, shape=[12])


def test_shape_and_size() -> None:
    """start and end count from either side and are clamped."""
    data = np.zeros((2, 3, 4), np.float32)
    check("Shape", [data])
    check("Shape", [np.float32(1)])
    for start, end in itertools.product((-9, -2, 0, 1, 3, 9), (-9, -1, 0, 2, 9)):
        check("Shape", [data], start=start, end=end)
    check("Shape", [data], start=-1)
    check("Size", [data])
    check("Size", [np.zeros((0, 3), np.float32)])


def test_constant_of_shape() -> None:
    """Every type of value; none means zeros of float32."""
    check("ConstantOfShape", [ints(2, 3)])
    check("ConstantOfShape", [ints()])
    check("ConstantOfShape", [ints(0, 2)])
    for dtype in ("int8", "int64", "float16", "float64", "bool", "uint8"):
        value = numpy_helper.from_array(np.array([1], dtype))
        check("ConstantOfShape", [ints(2)], value=value)
    declines("ConstantOfShape", [ints(1 << 20, 1 << 20)])
    declines("ConstantOfShape", [ints(-1)])


def test_range() -> None:
    """Up, down and empty; floats are not for this table."""
    for start, limit, delta in ((0, 5, 1), (5, 0, -2), (0, 5, -1), (3, 3, 1), (-4, 5, 3)):
        check("Range", [np.int64(start), np.int64(limit), np.int64(delta)])
        check("Range", [np.int32(start), np.int32(limit), np.int32(delta)])
    declines("Range", [np.float32(0), np.float32(1), np.float32(0.1)])
    declines("Range", [np.int64(0), np.int64(1 << 40), np.int64(1)])
    declines("Range", [np.int64(0), np.int64(5), np.int64(0)])


def test_expand() -> None:
    """Broadcasting goes both ways."""
    data = np.arange(3, dtype=np.int64)
    check("Expand", [data, ints(2, 3)])
    check("Expand", [data, ints(1)])
    check("Expand", [data.reshape(3, 1), ints(1, 2)])
    check("Expand", [np.int64(7), ints(2, 0)])
    check("Expand", [np.int64(7), ints()])
    declines("Expand", [data, ints(4)])
    declines("Expand", [data, ints(1 << 20, 3)])


def test_where() -> None:
    """All three broadcast."""
    condition = np.array([[True], [False]])
    check("Where", [condition, ints(1, 2, 3), np.int64(0)])
    check("Where", [True, np.float32(1), np.float32(np.nan)])
    check("Where", [condition, np.uint8(3), np.uint8(4)])


def test_transpose() -> None:
    """Without perm the dims are reversed."""
    data = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    check("Transpose", [data])
    check("Transpose", [data], perm=[1, 0, 2])
    check("Transpose", [np.int64(3)])
    declines("Transpose", [data], perm=[0, 1])


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduce(op_type: str, dtype: str, keepdims: int) -> None:
    """Axes by attribute or by input; no axes mean all of them, or none."""
    data = np.arange(-9, 15, dtype=dtype).reshape(2, 3, 4)
    if op_type == "ReduceProd":
        data = data % 2 + 1
    own = 13 if op_type == "ReduceSum" else 18  # from there on axes are an input
    for axes in ([0], [1, 2], [-1], [0, 1, 2]):
        check(op_type, [data, ints(*axes)], keepdims=keepdims, opset=own)
        check(op_type, [data], axes=axes, keepdims=keepdims, opset=12)
    for absent in ([data], [data, None], [data, ints()]):
        check(op_type, absent, keepdims=keepdims, opset=own)
        check(op_type, absent, keepdims=keepdims, opset=own, noop_with_empty_axes=1)
    check(op_type, [data], keepdims=keepdims, opset=12)
    declines(op_type, [data.astype(np.float32)], opset=own)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_reduce_that_overflows(dtype: str) -> None:
    """ONNX Runtime saturates there; the table does not answer."""
    high = np.iinfo(dtype).max
    declines("ReduceSum", [np.array([high, 1], dtype)], opset=13)
    declines("ReduceSum", [np.array([high, 1, -high], dtype)], opset=13)
    declines("ReduceProd", [np.array([high // 2, 3], dtype)], opset=13)
    most = min(high, 1 << 53)
    check("ReduceProd", [np.array([most // 2, 2, 0], dtype)], opset=13)
    check("ReduceSum", [np.array([most - 1, 1], dtype)], opset=13)


def test_reduce_of_nothing() -> None:
    """An empty sum is 0, an empty product 1; an empty maximum is not for this table."""
    empty = np.zeros((2, 0), np.int64)
    check("ReduceSum", [empty, ints(1)])
    check("ReduceProd", [empty], axes=[1], opset=13)
    declines("ReduceMax", [empty], axes=[1], opset=13)


@pytest.mark.parametrize("op_type", ["Max", "Min"])
def test_extremes(op_type: str) -> None:
    """Any number of integers, broadcast; floats (NaN) are not for this table."""
    check(op_type, [ints(1, 5), ints(4, 2)])
    check(op_type, [ints(3)])
    check(op_type, [ints(1, 5), np.int64(3), np.array([[2], [9]], np.int64)])
    declines(op_type, [np.float32(1), np.float32(2)])


def test_what_the_table_leaves_alone() -> None:
    """Unknown operators, several outputs, large inputs, strings."""
    declines("Exp", [np.float32(4)])
    declines("Neg", [np.ones(arithmetic.MAX_ELEMENTS + 1, np.float32)])
    declines("Identity", [np.array(["a"], object)])
    two = make_node("Squeeze", ["in0"], ["a", "b"])
    assert arithmetic.evaluate(two, [np.ones(1, np.float32)], 17) is None
    assert (
        arithmetic.evaluate(make_node("Add", ["", "a"], ["b"]), [None, ints(1)], 17)
        is None
    )


@pytest.mark.parametrize("op_type", ["ReduceSum", "ReduceProd"])
def test_reduce_of_what_doubles_round(op_type: str) -> None:
    """ONNX Runtime reduces int64 by way of doubles; the table does not answer."""
    array = np.array([(1 << 53) + 1, 1])
    node = make_node(op_type, ["a"], ["b"])
    found = arithmetic.evaluate(node, [array], 11)
    assert found is None or np.array_equal(found, expected(node, [array], 11))
