"""What shape inference is trusted with, against what ONNX Runtime computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

import onnxopt
from onnxopt.model import Model
from onnxopt.symbolic import dim as sizes

Case = tuple[NodeProto, list[int], dict[str, Any]]
INT64_MAX = 2**63 - 1


def model_of(
    node: NodeProto, shape: list[int], weights: dict[str, Any], opset: int
) -> ModelProto:
    nodes = [node, helper.make_node("Shape", ["y"], ["s"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("s", TensorProto.INT64, [len(shape)])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in weights.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )


def pools() -> Iterator[Case]:
    sizes = ((1, 1, [0, 0]), (2, 2, [1, 1]), (3, 2, [0, 1]), (2, 3, [0, 0]))
    for op, (kernel, stride, pads), ceil, length in itertools.product(
        ("MaxPool", "AveragePool"), sizes, (0, 1), (5, 6, 7)
    ):
        attributes: dict[str, Any] = {"kernel_shape": [kernel], "strides": [stride]}
        node = helper.make_node(op, ["x"], ["y"], pads=pads, ceil_mode=ceil, **attributes)
        yield node, [1, 1, length], {}
    for pad, kernel, dilation in itertools.product(
        ("SAME_UPPER", "SAME_LOWER", "VALID"), (2, 3), (1, 2)
    ):
        attributes = {"kernel_shape": [kernel], "dilations": [dilation], "auto_pad": pad}
        yield helper.make_node("MaxPool", ["x"], ["y"], **attributes), [1, 1, 7], {}


def convolutions() -> Iterator[Case]:
    for pad, stride, extra in itertools.product(
        ("SAME_UPPER", "SAME_LOWER", "VALID"), (1, 2, 3), ({}, {"output_padding": [1]})
    ):
        weights = {"w": np.ones((1, 1, 3), np.float32)}
        attributes = {"auto_pad": pad, "strides": [stride]}
        names = ["x", "w"]
        yield helper.make_node("Conv", names, ["y"], **attributes), [1, 1, 8], weights
        node = helper.make_node("ConvTranspose", names, ["y"], **attributes, **extra)
        yield node, [1, 1, 5], weights


def transposed_convolutions() -> Iterator[Case]:
    settings: list[dict[str, Any]] = [
        {},
        {"strides": [2, 3]},
        {"strides": [2, 2], "output_padding": [1, 0]},
        {"pads": [1, 0, 0, 1], "strides": [2, 1]},
        {"dilations": [2, 1], "pads": [1, 1, 1, 1]},
        {"group": 2, "kernel_shape": [2, 3]},
        {"strides": [3, 3], "output_shape": [17, 18]},
        {"auto_pad": "SAME_UPPER", "strides": [3, 2]},
        {"auto_pad": "VALID", "strides": [3, 2]},
    ]
    weights = {"w": np.ones((4, 3, 2, 3), np.float32)}
    for attributes in settings:
        node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attributes)
        yield node, [2, 4, 5, 6], weights


def recurrences() -> Iterator[Case]:
    """Each output in turn is the one that is looked at."""
    for (op, gates, count), layout, (ways, direction), slot in itertools.product(
        (("LSTM", 4, 3), ("GRU", 3, 2), ("RNN", 1, 2)),
        (0, 1),
        ((1, "forward"), (1, "reverse"), (2, "bidirectional")),
        range(3),
    ):
        if slot >= count:
            continue
        weights = {
            "w": np.ones((ways, gates * 5, 3), np.float32),
            "r": np.ones((ways, gates * 5, 5), np.float32),
        }
        names = ["y" if index == slot else f"o{index}" for index in range(count)]
        attributes: dict[str, Any] = {"direction": direction, "hidden_size": 5}
        if layout:
            attributes["layout"] = layout
        yield helper.make_node(op, ["x", *"wr"], names, **attributes), [7, 2, 3], weights


def quantizers() -> Iterator[Case]:
    for slot in range(3):
        names = ["y" if index == slot else f"o{index}" for index in range(3)]
        yield helper.make_node("DynamicQuantizeLinear", ["x"], names), [3, 4], {}


def resizes() -> Iterator[Case]:
    for scale, length in itertools.product((0.1, 0.7, 1 / 3, 2.0, 0.5, 1.1), (7, 20, 33)):
        weights = {"r": np.zeros(0, np.float32), "k": np.float32([1, 1, scale])}
        node = helper.make_node("Resize", ["x", "r", "k"], ["y"], mode="nearest")
        yield node, [1, 1, length], weights


def resizes_of_some_axes() -> Iterator[Case]:
    """Named axes, one from the end; in opset 11 there are none."""
    for axes, is_sized in itertools.product(([2, 3], [-1, 2], [3], [1, 2]), (0, 1)):
        wanted = np.arange(6, 6 + len(axes)) if is_sized else np.float32([2, 0.5])
        weights = {"k": wanted[: len(axes)]}
        names = ["x", "", "", "k"] if is_sized else ["x", "", "k"]
        node = helper.make_node("Resize", names, ["y"], mode="nearest", axes=axes)
        yield node, [1, 4, 6, 8], weights


def slices() -> Iterator[Case]:
    for start, end, step in itertools.product(
        (0, -1, 5, -7, 100), (0, -1, 3, -7, 100, INT64_MAX, -INT64_MAX), (1, -1, 2, -2)
    ):
        weights = {"a": [start], "b": [end], "c": [0], "d": [step]}
        yield helper.make_node("Slice", ["x", *"abcd"], ["y"]), [5], weights


def casts() -> Iterator[Case]:
    for kind in (TensorProto.UINT8, TensorProto.BOOL, TensorProto.FLOAT16):
        yield helper.make_node("Cast", ["x"], ["y"], to=kind), [300, 2], {}


CASES = [
    *(*pools(), *convolutions(), *transposed_convolutions(), *recurrences()),
    *(*quantizers(), *resizes(), *resizes_of_some_axes(), *slices(), *casts()),
]


@pytest.mark.parametrize("opset", [11, 18])
def test_inferred_shapes_are_those_of_onnx_runtime(opset: int) -> None:
    compared = 0
    for node, shape, weights in CASES:
        model = model_of(node, shape, weights, opset)
        try:
            runner = session(model)
            (computed,) = runner.run(None, {"x": np.zeros(shape, np.float32)})
        except Exception:  # noqa: BLE001 - not legal, or no kernel, at this opset
            continue
        inferred = Model.open(model).main.shape("y")
        assert inferred is None or len(inferred) == len(computed)
        for dim, size in zip(inferred or (), computed, strict=inferred is not None):
            known = isinstance(dim, int)
            assert not known or dim == size, (str(node), shape, inferred, computed)
            compared += known
    assert compared > 200


def outputs(model: ModelProto, feed: dict[str, Any]) -> list[Any]:
    found: list[Any] = session(model).run(None, feed)
    return found


def test_a_default_that_is_fed_is_no_constant() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,3] x, int64[2] s) => (float[a,b] y, int64[2] d)
        <int64[2] s = {2, 3}> {
            r = Relu(x)
            t = Reshape(r, s)
            d = Shape(t)
            y = Neg(t)
        }"""
    )
    result = onnxopt.optimize(model, validate=False).model
    feed = {"x": np.ones((2, 3), np.float32), "s": np.array([3, 2])}
    for made, expected in zip(outputs(result, feed), outputs(model, feed), strict=True):
        assert np.array_equal(made, expected)


def test_the_value_of_a_shape_narrows_in_a_cast() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[300] x) => (float[n] y) {
            s = Shape(x)
            b = Cast<to = 2>(s)
            i = Cast<to = 7>(b)
            y = ConstantOfShape(i)
        }"""
    )
    result = onnxopt.optimize(model, validate=False).model
    (made,) = outputs(result, {"x": np.zeros(300, np.float32)})
    assert made.shape == (44,)


def test_a_declared_dim_below_zero_is_any_size() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n,3] x) => (int64[2] s) { r = Relu(x) s = Shape(r) }"""
    )
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    result = onnxopt.optimize(model, validate=False).model
    (made,) = outputs(result, {"x": np.zeros((2, 3), np.float32)})
    assert made.tolist() == [2, 3]


def read_batch(cast: str, literals: str) -> Model:
    """A Reshape to the batch size, read through `cast`, and literals."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[N,6,1,1] x) => (float[M,K] y)
    <int64[1] from = {{0}}, int64[1] to = {{1}},
    int64[{literals.count(",") + 1}] rest = {{{literals}}}> {{
        s = Shape (x)
        {cast}
        n = Slice (c, from, to)
        m = Cast <to = 7> (n)
        shape = Concat <axis = -1> (m, rest)
        r = Reshape (x, shape)
        y = Relu (r)
    }}"""
    return Model.open(onnx.parser.parse_model(text))


@pytest.mark.parametrize("cast", ["c = Cast <to = 6> (s)", "c = Identity (s)"])
def test_the_literals_of_a_computed_shape_are_known(cast: str) -> None:
    graph = read_batch(cast, "6").main
    assert (graph.shape("y") or ())[1:] == (6,)
    graph = read_batch(cast, "3, 2").main
    assert (graph.shape("y") or ())[1:] == (3, 2)
    assert not isinstance((graph.shape("y") or (0,))[0], int)


def test_the_one_size_that_is_left_is_known_by_the_number_of_elements() -> None:
    assert read_batch("c = Cast <to = 6> (s)", "-1").main.shape("y") == ("N", 6)
    assert read_batch("c = Cast <to = 7> (s)", "2, -1").main.shape("y") == ("N", 2, 3)


def test_a_size_that_inference_lost_leaves_it_open() -> None:
    graph = read_batch("c = Cast <to = 10> (s)", "-1").main
    assert len(graph.shape("y") or ()) == 2
    assert not isinstance((graph.shape("y") or (0, 0))[1], int)


@pytest.mark.parametrize("shape", ["0,1", "1,0,2", "0"])
def test_an_integer_constant_without_elements_has_its_dims(shape: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (int64[2,1,1] x) => (int64[?] y) <int64[{shape}] w = {{}}> {{ y = Abs (w) }}"""
    dims = tuple(int(dim) for dim in shape.split(","))
    assert Model.open(onnx.parser.parse_model(text)).main.shape("y") == dims


def test_type_that_the_operator_lacks() -> None:
    """It takes bfloat16 from opset 22 on: nothing is known, and nothing fails."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        main (bfloat16[1,4,4] x) => (bfloat16[1] y) { y = Det (x) }"""
    )
    assert Model.open(model).main.shape("y") is None


Sizes = dict[str, list[int]]
CORNERS: list[tuple[str, int, str, Sizes]] = [
    ("a pool without room", 17, "y = MaxPool<kernel_shape=[3], strides=[2]>(x)",
     {"x": [1, 1, 2]}),
    ("a slope of more dims", 17, "y = PRelu(x, z)", {"x": [3], "z": [2, 3]}),
    ("a slope of larger ones", 17, "y = PRelu(x, z)", {"x": [1, 1], "z": [1, 3]}),
    ("a part without rows", 17, "y = Concat<axis=0>(x, z)", {"x": [0, 2], "z": [3, 4]}),
    ("none has rows", 17, "y = Concat<axis=0>(x, z)", {"x": [0, 5], "z": [0, 3]}),
    ("a letter of 1 and 4", 17, """y = Einsum<equation="bij,bjk->bik">(x, z)""",
     {"x": [1, 2, 3], "z": [4, 3, 5]}),
]  # fmt: skip


@pytest.mark.parametrize("fixed", ["", "x", "z", "xz"])
@pytest.mark.parametrize("case", CORNERS, ids=lambda case: case[0])
def test_dims_hold_where_onnx_runtime_is_generous(
    case: tuple[str, int, str, Sizes], fixed: str
) -> None:
    _, opset, line, sizes = case
    symbols = {
        f"{n}{i}": size for n, dims in sizes.items() for i, size in enumerate(dims)
    }
    names = {
        name: [f"{name}{i}" for i in range(len(dims))] for name, dims in sizes.items()
    }
    told = {name: sizes[name] if name in fixed else names[name] for name in sizes}
    inputs = ", ".join(f"float[{','.join(map(str, told[n]))}] {n}" for n in sizes)
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g ({inputs}) => (float y) {{ {line} }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    feed = {name: np.zeros(dims, np.float32) for name, dims in sizes.items()}
    try:
        (made,) = outputs(model, feed)
    except Fail:
        pytest.skip("ONNX Runtime has seen it coming")
    shape = Model.open(model).main.shape("y")
    assert shape is None or len(shape) == made.ndim
    for dim, size in zip(shape or (), made.shape, strict=shape is not None):
        assert symbols.get(str(dim), dim if isinstance(dim, int) else size) == size


def test_a_part_that_is_cut_may_be_without_elements() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n,3] x) => (float[p,q] y) <int64[1] zero = {0}, int64[1] one = {1}> {
            s = Shape(x)
            d = Slice(s, zero, one)
            z = Slice(x, one, d)
            y = Concat<axis=1>(z, x)
        }"""
    )
    (made,) = outputs(model, {"x": np.zeros((1, 3), np.float32)})
    assert made.shape == (1, 6)
    assert Model.open(model).main.shape("y") == ("n", 6)


def test_a_size_of_a_pool_may_be_nothing() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,1,n] x) => (bool[1] e)
        <int64[1] two = {2}, int64[1] three = {3}, int64[1] none = {0}> {
            p = MaxPool<kernel_shape=[3], strides=[2]>(x)
            s = Shape(p)
            d = Slice(s, two, three)
            e = Equal(d, none)
        }"""
    )
    feed = {"x": np.zeros((1, 1, 1), np.float32)}
    assert outputs(onnxopt.optimize(model, validate=False).model, feed) == [True]


LOOP = """<ir_version: 8, opset_import: ["" : 17]>
    g (int64 trips, float[n,6] x) => (float y, int64 k)
    <int64[1] cut = {-1}, int64[1] one = {1}, int64[1] two = {2}> {
        y, k = Loop(trips, "")
        <body = b (int64[1] i, bool go) => (bool on, float q, int64 j) {
            on = Identity(go)
            s = Shape(x)
            d = Slice(s, one, two)
            t = Concat<axis=0>(d, cut)
            q = Reshape(x, t)
            j = Identity(i)
        }>
    }"""


@pytest.mark.parametrize("trips", [0, 2])
def test_a_loop_counts_as_it_declares_and_stacks_what_it_knows(trips: int) -> None:
    model = onnx.parser.parse_model(LOOP)
    for value in (*model.graph.output, *model.graph.node[0].attribute[0].g.output[1:]):
        value.type.tensor_type.ClearField("shape")
    feed = {"trips": np.array(trips), "x": np.zeros((2, 6), np.float32)}
    graph = Model.open(model).main
    for name, made in zip("yk", outputs(model, feed), strict=True):
        shape = graph.shape(name)
        assert shape is None or len(shape) == made.ndim
        for dim, size in zip(shape or (), made.shape, strict=shape is not None):
            assert not isinstance(dim, int) or dim == size


def test_integers_that_wrap_are_not_followed() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x) => (int32[1] y)
        <int32[1] many = {1000000000}> {
            s = Shape(x)
            t = Cast<to = 6>(s)
            y = Mul(t, many)
        }"""
    )
    fact = Model.open(model).main.fact("y")
    assert fact.value is None or list(fact.value) == [None]


def test_a_constant_without_elements_may_have_several_dims() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[0,1,2] x) => (int64[0,1,2] y) { y = Add(x, none) }"""
    )
    none = numpy_helper.from_array(np.zeros((0, 1, 2), np.int64), "none")
    model.graph.initializer.append(none)
    assert Model.open(model).main.fact("none").dims == (0, 1, 2)


@pytest.mark.parametrize(("op", "fits"), [("Div", False), ("Mod", False), ("Mul", True)])
def test_an_entry_of_a_shape_that_may_be_zero_copies(op: str, fits: bool) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n,m] x) => (float[p,q] y) <int64[1] five = {{5}}> {{
            s = Shape(x)
            d = {op}(s, five)
            y = Reshape(x, d)
        }}"""
    )
    shape = Model.open(model).main.shape("y")
    assert shape is not None
    assert (shape == ("5*n", "5*m")) == fits
    if op == "Div":
        (made,) = outputs(model, {"x": np.zeros((3, 4), np.float32)})
        assert made.shape == (3, 4)
        assert shape == ("y@0", "y@1")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("y = ConvTranspose<strides=[2,2]>(x, w)", 4),
        ("y = ConvTranspose(x, w)", 4),
        ('y = ConvTranspose<auto_pad="SAME_LOWER", strides=[2,2]>(x, w)', 4),
        ("y, h, c = LSTM<hidden_size=5>(v, a, b)", 4),
        ("o, h, y = LSTM<hidden_size=5>(v, a, b)", 3),
        ("q, s, z = DynamicQuantizeLinear(x) y = Cast<to=1>(q)", 4),
    ],
)
def test_sizes_that_are_symbols_keep_them(line: str, count: int) -> None:
    """By rules of ours: ONNX's own inference would make up names."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n,4,h,6] x, float[t,m,3] v) => (float y)
        {{ {line} }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for name, dims in (("w", (4, 3, 2, 3)), ("a", (1, 20, 3)), ("b", (1, 20, 5))):
        tensor = numpy_helper.from_array(np.ones(dims, np.float32), name)
        model.graph.initializer.append(tensor)
    shape = Model.open(model).main.shape("y")
    assert shape is not None
    assert len(shape) == count
    assert {"n", "m"} & set(shape)
    feed = {"x": np.zeros((2, 4, 5, 6)), "v": np.zeros((7, 2, 3))}
    (made,) = outputs(model, {name: feed[name].astype(np.float32) for name in feed})
    known = {"n": 2, "m": 2, "h": 5, "t": 7}
    for size, found in zip(shape, made.shape, strict=True):
        assert eval(str(size), {}, known) == found, shape


def test_sizes_made_of_themselves_twice_do_not_double() -> None:
    """As layer by layer a mask is cut to the length that the last one left."""
    size, mask = sizes.atom("n"), sizes.atom("m")
    for count in (16, 1000):
        for _ in range(count):
            size = sizes.function("bcast", sizes.function("min", mask, size), size)
        assert len(sizes.text(size)) < 2000
        assert sizes.at_one(size) == 1
        assert not sizes.may_vanish(size)
    other = sizes.function("bcast", sizes.function("min", mask, size), mask)
    assert other != sizes.function("bcast", sizes.function("min", mask, mask), mask)
    assert other == sizes.function("bcast", sizes.function("min", mask, size), mask)


def test_a_mask_cut_to_a_length_that_two_inputs_tell_has_that() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n] x, float[m] p, float[64] mask) => (float y)
        <int64[1] zero = {0}, int64[1] one = {1}> {
            q = Mul(x, p)
            s = Shape(q)
            cut = Slice(mask, zero, s)
            y = Add(cut, q)
        }"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    main = Model.open(model).main
    assert main.shape("cut") == ("min(64, bcast(m, n))",)
    assert main.shape("y") == main.shape("q") == ("bcast(m, n)",)
    for n, m in ((3, 3), (1, 3), (3, 1), (64, 1), (1, 1)):
        feed = {"x": np.ones(n), "p": np.ones(m), "mask": np.ones(64)}
        (made,) = outputs(model, {k: v.astype(np.float32) for k, v in feed.items()})
        assert made.shape == (max(n, m),)
