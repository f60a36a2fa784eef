"""Where other tools are wrong when they shrink a model, and what has to stay, and why.

Each model runs before and after in ONNX Runtime, as the file says it, on several finite
feeds; each test also says which channels went and which stayed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from onnx.numpy_helper import to_array

import onnxopt
from onnxopt.cli import cli
from onnxopt.graph import Shape
from onnxopt.manager import Context
from onnxopt.model import Model
from tests import support

PIPELINE = "dead-layers,zero-channels"
SIZES = (2, 1, 5)


@pytest.fixture
def shrink(context: Context) -> Callable[..., Model]:
    """Shrinks a model, verified node by node, and compares the numbers."""

    def call(source: ModelProto, pipeline: str = PIPELINE, **limits: int) -> Model:
        model = support.run_passes(source, pipeline, context, **limits)
        check_numbers(source, support.final(model))
        return model

    return call


def check_numbers(source: ModelProto, made: ModelProto) -> None:
    """Equal but for rounding, on feeds of several sizes that are finite."""
    assert interface(made) == interface(source)
    onnx.checker.check_model(made, full_check=True)
    for number, size in enumerate(SIZES):
        feed = finite_feed(source, number, size)
        expected = support.run(source, feed)
        support.assert_same(expected, support.run(made, feed), "equivalent")


def finite_feed(proto: ModelProto, number: int, size: int) -> support.Feed:
    """Ordinary values, other ones for each `number`; open dims are of `size`."""
    feed = {}
    for value in support.own_inputs(proto.graph):
        tensor = value.type.tensor_type
        dims = [dim.dim_value or size for dim in tensor.shape.dim]
        rng = np.random.default_rng([number, zlib.crc32(value.name.encode())])
        feed[value.name] = support.random_array(rng, tensor.elem_type, dims)
    return feed


def interface(proto: ModelProto) -> list[bytes]:
    values = [*support.own_inputs(proto.graph), *proto.graph.output]
    return [value.SerializeToString(deterministic=True) for value in values]


def dims(model: Model, name: str) -> list[int]:
    """The dims of initializer `name`."""
    return list(support.find_tensor(model.proto, name).dims)


def array(model: Model, name: str) -> support.Array:
    """The values of initializer `name`."""
    return to_array(support.find_tensor(support.final(model), name))


def weights(model: Model) -> set[str]:
    return {tensor.name for tensor in model.proto.graph.initializer}


def declared(proto: ModelProto) -> dict[str, Shape]:
    """What the model says of its inner values."""
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            for dim in value.type.tensor_type.shape.dim
        )
        for value in proto.graph.value_info
    }


def conv_pair(
    between: str, more: str = "", bias: str = "", opset: int = 17
) -> ModelProto:
    """Two layers, of whose channels in between (t, then p) the second has no weights.

    Its bias is zero, or `bias`; the layers are not padded.
    """
    source = support.model_of(
        f"""main (float[N,2,6,6] x) => (float[N,A,B,C] y)
        <float[3,2,1,1] W = {{1,2, 0,0, 3,-1}}, float[3] b = {{0.5,{bias or 0},-0.5}},
        float[2,3,3,3] V = {{}}, float[2] c = {{0.25,-1}}{more}> {{
           t = Conv (x, W, b)
           {between}
           y = Conv (p, V, c)
        }}""",
        opset,
    )
    support.randomize(source, "V")
    return source


def gone(model: Model) -> bool:
    """Whether a pair of `conv_pair` has lost the channel."""
    found = dims(model, "W")[0], dims(model, "V")[1]
    assert found in {(2, 2), (3, 3)}
    return found == (2, 2)


# ---- zeros that do not stay zero ----

LIFTED = {
    "sigmoid": ("p = Sigmoid (t)", ""),
    "exp": ("p = Exp (t)", ""),
    "softplus": ("p = Softplus (t)", ""),
    "cos": ("p = Cos (t)", ""),
    "clip": ("p = Clip (t, low, high)", ", float low = {1}, float high = {6}"),
    "add": ("p = Add (t, k)", ", float k = {2}"),
    "fake-quantizer": (
        """l = Clip (t, low, high)
           d = Div (l, s)
           r = Round (d)
           p = Mul (r, s)""",
        ", float low = {1}, float high = {6}, float s = {0.5}",
    ),
    "quantizer": (
        """q = QuantizeLinear (t, s, z)
           p = DequantizeLinear (q, s, k)""",
        ", float s = {0.5}, uint8 z = {3}, uint8 k = {1}",
    ),
    "quantizer-that-saturates": (
        """u = Sub (two, t)
           q = QuantizeLinear (u, s, z)
           p = DequantizeLinear (q, s, z)""",
        ", float s = {0.5}, uint8 z = {0}, float two = {2}",
    ),
}


@pytest.mark.parametrize("case", LIFTED)
@pytest.mark.parametrize("bias", ["", "1.3"])
def test_zero_filter_that_is_lifted(
    shrink: Callable[..., Model], case: str, bias: str
) -> None:
    """A zero that an activation makes something else of goes into the next bias."""
    between, more = LIFTED[case]
    source = conv_pair(between, more, bias)
    model = shrink(source)
    assert gone(model)
    assert not np.allclose(array(model, "c"), [0.25, -1])


def test_zero_filter_in_front_of_padding_with_two(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]]
) -> None:
    """A border of twos around zeros: no one number makes up for it."""
    pad = "p = Pad (t, pads, two)"
    more = ", int64[8] pads = {0,0,1,1,0,0,1,1}, float two = {2}"
    source = conv_pair(pad, more)
    model = shrink(source)
    assert model.ledger.edits == 0
    kept = reasons(source, "t")[1]
    assert kept is not None
    assert "depends on it" in kept


@pytest.mark.parametrize(("value", "bias"), [("0", ""), ("2", "2"), ("-1.5", "-1.5")])
def test_filter_in_front_of_padding_with_its_value(
    shrink: Callable[..., Model], value: str, bias: str
) -> None:
    """A border that goes on with the constant changes nothing."""
    more = f", int64[8] pads = {{0,0,1,1,0,0,1,1}}, float v = {{{value}}}"
    assert gone(shrink(conv_pair("p = Pad (t, pads, v)", more, bias)))


MVN = {
    "fused": "p = MeanVarianceNormalization <axes = [1]> (t)",
    "fused, over all": "p = MeanVarianceNormalization <axes = [0,1,2,3]> (t)",
    "in parts": """m = ReduceMean <axes = [1]> (t)
           d = Sub (t, m)
           q = Mul (d, d)
           v = ReduceMean <axes = [1]> (q)
           u = Add (v, e)
           s = Sqrt (u)
           p = Div (d, s)""",
}


@pytest.mark.parametrize("case", MVN)
def test_normalization_over_channels(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]], case: str
) -> None:
    """Mean and variance are over a number of channels, zero ones among them."""
    source = conv_pair(MVN[case], ", float e = {0.1}" if "parts" in case else "")
    model = shrink(source)
    assert model.ledger.edits == 0
    kept = reasons(source, "t")[1]
    assert kept is not None
    assert "MeanVarianceNormalization" in kept or "ReduceMean:v depends on it" in kept


def test_fused_normalization_over_the_image(shrink: Callable[..., Model]) -> None:
    """It leaves the channels apart, but rounds: nothing is taken for sure."""
    source = conv_pair("p = MeanVarianceNormalization <axes = [0,2,3]> (t)")
    assert not gone(shrink(source))


# ---- dead channels with a bias ----


@pytest.mark.parametrize("bias", ["0.7", "-3", "1e3"])
def test_bias_of_a_dead_channel_is_made_up_for(
    shrink: Callable[..., Model], bias: str
) -> None:
    """What the channel adds is in the next bias: c + bias * sum of its weights."""
    source = conv_pair("p = Identity (t)", bias=bias)
    model = shrink(source)
    assert gone(model)
    whole = to_array(support.find_tensor(source, "V")).astype(np.float64)
    added = float(bias) * whole[:, 1].sum(axis=(1, 2))
    expected = np.array([0.25, -1]) + added
    np.testing.assert_allclose(array(model, "c"), expected, rtol=1e-5)


@pytest.mark.parametrize("bias", ["0.7", "-3"])
def test_bias_of_a_dead_channel_through_a_relu(
    shrink: Callable[..., Model], bias: str
) -> None:
    model = shrink(conv_pair("p = Relu (t)", bias=bias))
    assert gone(model)
    unchanged = np.array_equal(array(model, "c"), np.array([0.25, -1], np.float32))
    assert unchanged == (float(bias) < 0)


def test_biases_in_front_of_padding(shrink: Callable[..., Model]) -> None:
    """Of four dead channels with other biases, one carries all, also at the border."""
    source = support.model_of(
        """main (float[N,2,5,5] x) => (float[N,3,5,5] y)
        <float[5,2,1,1] W = {1,2, 0,0, 0,0, 0,0, 0,0}, float[5] b = {1,0.5,2,-3,7},
        float[3,5,3,3] V = {}> {
           t = Conv (x, W, b)
           y = Conv <pads = [1,1,1,1]> (t, V)
        }"""
    )
    support.randomize(source, "V")
    model = shrink(source)
    assert dims(model, "W") == [2, 2, 1, 1]
    assert dims(model, "V") == [3, 2, 3, 3]


# ---- rows of a MatMul in front of what counts them ----

HEADS = {
    "mean over tokens": (
        """p = ReduceMean <axes = [1], keepdims = 0> (r)
           y = Gemm (p, V)""",
        3,
    ),
    "flatten": ("f = Flatten (r)\n y = Gemm (f, V)", 12),
    "reshape": ("f = Reshape (r, shape)\n y = Gemm (f, V)", 12),
    "transposed gemm": (
        """p = ReduceMax <axes = [1], keepdims = 0> (r)
           y = Gemm <transB = 1> (p, U)""",
        3,
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_rows_of_a_matmul(shrink: Callable[..., Model], case: str) -> None:
    """The head shrinks with the channels, whatever stands between."""
    nodes, rows = HEADS[case]
    source = support.model_of(
        f"""main (float[N,4,2] x) => (float[N,2] y)
        <float[2,3] W = {{1,0,2,3,0,4}}, float[3] b = {{1,2,3}},
        float[{rows},2] V = {{}}, float[2,3] U = {{1,2,3,4,5,6}},
        int64[2] shape = {{-1,12}}> {{
           t = MatMul (x, W)
           s = Add (t, b)
           r = Relu (s)
           {nodes}
        }}"""
    )
    support.randomize(source, "V")
    model = shrink(source, f"dead-code,{PIPELINE}")
    assert dims(model, "W") == [2, 2]
    assert dims(model, "b") == [2]
    if "U" in weights(model):
        assert dims(model, "U") == [2, 2]
    else:
        assert dims(model, "V") == [rows // 3 * 2, 2]


def test_constant_before_a_matmul_that_makes_an_output(
    shrink: Callable[..., Model],
) -> None:
    """An Add makes up for the constant; the output keeps its name."""
    source = support.model_of(
        """main (float[N,T,2] x) => (float[N,T,2] y)
        <float[2,3] W = {1,0,2,3,0,4}, float[3] b = {1,2,3},
        float[3,2] V = {1,2,3,4,5,6}> {
           t = MatMul (x, W)
           s = Add (t, b)
           y = MatMul (s, V)
        }"""
    )
    model = shrink(source)
    assert dims(model, "W") == [2, 2]
    assert dims(model, "V") == [2, 2]


# ---- symbolic sizes ----


def test_symbolic_sizes_stay_symbolic(shrink: Callable[..., Model]) -> None:
    """Neither the batch nor the image becomes 0, 1 or another symbol."""
    source = support.model_of(
        """main (float[batch,2,height,width] x) => (float[batch,2,height,width] y)
        <float[3,2,1,1] W = {1,2, 0,0, 3,-1}, float[2,3,1,1] V = {1,2,3,4,5,6},
        float[batch,3,height,width] t, float[batch,3,height,width] r> {
           t = Conv (x, W)
           r = Relu (t)
           y = Conv (r, V)
        }"""
    )
    model = shrink(source)
    assert dims(model, "W") == [2, 2, 1, 1]
    expected = ("batch", 2, "height", "width")
    assert declared(model.proto) == {"t": expected, "r": expected}


def test_symbolic_batch_in_a_shape(shrink: Callable[..., Model]) -> None:
    """A placeholder in the shape of a Reshape stays one."""
    source = support.model_of(
        """main (float[N,1,2,2] x) => (float[N,1] y)
        <float[2,1,1,1] W = {1,0}, int64[2] shape = {-1,8}, float[8,1] V = {}> {
           t = Conv (x, W)
           f = Reshape (t, shape)
           y = Gemm (f, V)
        }"""
    )
    support.randomize(source, "V")
    assert array(shrink(source), "shape").tolist() == [-1, 4]


@pytest.mark.parametrize("channels", [3, 2])
def test_squeeze_without_axes(shrink: Callable[..., Model], channels: int) -> None:
    """It takes out every axis of size one: the channels must not become one of them."""
    rows = ", ".join(["5", "3"][: channels - 1])
    source = support.model_of(
        f"""main (float[2,1,4,4] x) => (float[A,B] y)
        <float[{channels},1,1,1] W = {{{rows}, 0}}, float[{channels},2] V = {{}}> {{
           t = Conv (x, W)
           r = Sigmoid (t)
           p = GlobalAveragePool (r)
           s = Squeeze (p)
           y = Gemm (s, V)
        }}"""
    )
    support.randomize(source, "V")
    model = shrink(source)
    assert dims(model, "V")[0] == dims(model, "W")[0]
    assert channels == 2 or dims(model, "W")[0] == 2


# ---- norms that nothing has folded ----


@pytest.mark.parametrize("dead", ["filter", "scale"])
def test_norm_that_is_not_folded_is_no_obstacle(
    shrink: Callable[..., Model], dead: str
) -> None:
    """Its parameters go with the channel, its shift goes into the next bias."""
    row, gamma = ("0,0", "1") if dead == "filter" else ("5,6", "0")
    source = support.model_of(
        f"""main (float[N,2,4,4] x) => (float[N,1,4,4] y)
        <float[3,2,1,1] W = {{1,2, {row}, 3,-1}}, float[3] g = {{1,{gamma},2}},
        float[3] h = {{0,2,1}}, float[3] m = {{0,1,2}}, float[3] v = {{1,2,3}},
        float[1,3,1,1] V = {{1,2,3}}> {{
           t = Conv (x, W)
           n = BatchNormalization (t, g, h, m, v)
           r = Relu (n)
           y = Conv (r, V)
        }}"""
    )
    model = shrink(source)
    assert dims(model, "W") == [2, 2, 1, 1]
    assert [dims(model, name) for name in "ghmv"] == [[2]] * 4
    assert dims(model, "V") == [1, 2, 1, 1]
    assert "BatchNormalization" in support.op_types(model)


# ---- barriers, and why ----

BARRIERS = {
    "local response norm": ("p = LRN <size = 3> (t)", 17),
    "softmax": ("p = Softmax <axis = 1> (t)", 17),
    "log-softmax": ("p = LogSoftmax <axis = 1> (t)", 17),
    "layer norm": ("p = LayerNormalization <axis = 1> (t, w)", 17),
    "p-norm": ("p = LpNormalization <axis = 1> (t)", 17),
}


@pytest.mark.parametrize("case", BARRIERS)
def test_barrier_over_channels(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]], case: str
) -> None:
    """What mixes channels keeps all of them, and says that it does."""
    node, opset = BARRIERS[case]
    source = conv_pair(node, ", float[3,6,6] w = {}", opset=opset)
    support.randomize(source, "w")
    model = shrink(source)
    assert not gone(model)
    operator = node.split()[2]
    assert (reasons(source, "t")[1] or "").endswith(f"({operator}:p)")


def test_barrier_is_in_the_report(shrink: Callable[..., Model]) -> None:
    """A dead channel that has to stay is declined with a reason, as any rewrite is."""
    model = shrink(conv_pair("p = Softmax <axis = 1> (t)"))
    assert any("Softmax" in skip.reason for skip in support.skips(model))


# ---- what is not finite ----

WILD = {
    "logarithm of zero": "p = Log (t)",
    "one by zero": "p = Reciprocal (t)",
    "zero by zero": "p = Div (t, t)",
    "root of a negative": "m = Sub (t, one)\n p = Sqrt (m)",
    "zero times infinity": "l = Log (t)\n p = Mul (t, l)",
}


@pytest.mark.parametrize("case", WILD)
def test_channel_that_is_not_finite_stays(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]], case: str
) -> None:
    """It makes all that reads it infinite, or not a number."""
    source = conv_pair(WILD[case], ", float one = {1}")
    assert shrink(source).ledger.edits == 0
    assert reasons(source, "t")[1] is not None


@pytest.mark.parametrize("case", WILD)
def test_channel_that_is_not_finite_stays_where_no_weight_reads_it(
    shrink: Callable[..., Model], case: str
) -> None:
    """Zero times infinity is not a number either."""
    source = conv_pair(WILD[case], ", float one = {1}")
    weight = to_array(support.find_tensor(source, "V")).copy()
    weight[:, 1] = 0
    support.find_tensor(source, "V").CopyFrom(onnx.numpy_helper.from_array(weight, "V"))
    assert shrink(source).ledger.edits == 0


# ---- weights that layers share ----


def shared(first: str, second: str) -> ModelProto:
    """One filter bank W, read by two layers; the columns say what each may lose."""
    return support.model_of(
        f"""main (float[N,2,4,4] x, float[M,2,3,3] z)
        => (float[N,1,4,4] y, float[M,1,3,3] w)
        <float[3,2,1,1] W = {{1,2, 5,6, 3,-1}}, float[3] b = {{1,2,3}},
        float[1,3,1,1] U = {{{first}}}, float[1,3,1,1] V = {{{second}}}> {{
           t = Conv (x, W, b)
           y = Conv (t, U)
           u = Conv (z, W, b)
           w = Conv (u, V)
        }}"""
    )


def test_shared_weight_with_other_masks_is_cloned(shrink: Callable[..., Model]) -> None:
    model = shrink(shared("1,0,2", "0,3,4"))
    filters = {node.input[1] for node in model.main.nodes() if node.output[0] in "tu"}
    assert len(filters) == 2
    kept = {name: array(model, name).reshape(2, 2).tolist() for name in filters}
    assert sorted(kept.values()) == [[[1, 2], [3, -1]], [[5, 6], [3, -1]]]


def test_shared_weight_with_the_same_mask_stays_shared(
    shrink: Callable[..., Model],
) -> None:
    model = shrink(shared("1,0,2", "3,0,4"))
    layers = [node for node in model.main.nodes() if node.output[0] in "tu"]
    assert {node.input[1] for node in layers} == {"W"}
    assert {node.input[2] for node in layers} == {"b"}
    assert dims(model, "W") == [2, 2, 1, 1]
    assert weights(model) == {"W", "b", "U", "V"}


def test_shared_weight_that_another_layer_needs_whole(
    shrink: Callable[..., Model],
) -> None:
    model = shrink(shared("1,0,2", "3,5,4"))
    assert dims(model, "W") == [3, 2, 1, 1]
    assert dims(model, "U") == [1, 2, 1, 1]
    assert dims(model, "V") == [1, 3, 1, 1]


# ---- what is said of values ----


def test_declared_shapes_are_corrected(shrink: Callable[..., Model]) -> None:
    """Those of values that lost channels, and no others."""
    source = support.model_of(
        """main (float[1,2,4,4] x) => (float[1,2,4,4] y)
        <float[3,2,1,1] W = {1,2, 0,0, 3,-1}, float[2,3,1,1] V = {1,2,3,4,5,6},
        float[1,2,4,4] i, float[1,3,4,4] t, float[1,3,2,2] p, float[1,3,4,4] u> {
           i = Neg (x)
           t = Conv (i, W)
           p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t)
           u = Resize (p, , scales)
           y = Conv (u, V)
        }"""
    )
    source.graph.initializer.append(
        onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    )
    model = shrink(source)
    assert declared(model.proto) == {
        "i": (1, 2, 4, 4),
        "t": (1, 2, 4, 4),
        "p": (1, 2, 2, 2),
        "u": (1, 2, 4, 4),
    }


def test_inputs_and_outputs_keep_their_channels(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]]
) -> None:
    """A channel of an input that nothing reads, one of an output that is zero."""
    source = support.model_of(
        """main (float[N,2,2,2] x) => (float[N,3,2,2] y)
        <float[3,2,1,1] W = {1,0, 0,0, 2,0}> { y = Conv (x, W) }"""
    )
    assert shrink(source).ledger.edits == 0
    assert reasons(source, "y") == ["'y' is an output of the graph"] * 3
    before = support.model_of(
        """main (float[N,2,2,2] x) => (float[N,1,2,2] y)
        <float[2,1,1,1] D = {1,0}, float[1,2,1,1] W = {1,2}> {
           d = Conv <group = 2> (x, D)
           y = Conv (d, W)
        }"""
    )
    assert shrink(before).ledger.edits == 0
    assert reasons(before, "d") == ["'x' comes from outside"] * 2


def test_value_that_an_inner_graph_reads(
    shrink: Callable[..., Model], reasons: Callable[..., list[str | None]]
) -> None:
    source = support.model_of(
        """main (float[N,2] x, bool c) => (float[N,1] y, float[N,2] z)
        <float[2,2] W = {1,0,2,0}, float[2,1] V = {1,2}> {
           t = Gemm (x, W)
           y = Gemm (t, V)
           z = If (c) <
              then_branch = a1 () => (float[N,2] p) { p = Relu (t) },
              else_branch = b1 () => (float[N,2] q) { q = Neg (t) }
           >
        }"""
    )
    assert shrink(source).ledger.edits == 0
    assert reasons(source, "t")[1] == "an inner graph reads 't'"


# ---- limits ----


def test_growth_budget_is_kept(shrink: Callable[..., Model]) -> None:
    """Clones that would outgrow the budget are not made."""
    source = support.model_of(
        """main (float[N,600] x) => (float[N,1] y, float[N,600] z)
        <float[600,600] W = {}, float[600,1] V = {}> {
           t = Gemm (x, W)
           y = Gemm (t, V)
           z = Gemm (x, W)
        }"""
    )
    for name in ("W", "V"):
        support.randomize(source, name)
    column = to_array(support.find_tensor(source, "V")).copy()
    column[:2] = 0
    support.find_tensor(source, "V").CopyFrom(onnx.numpy_helper.from_array(column, "V"))
    model = shrink(source, budget=source.ByteSize())
    assert model.ledger.edits == 0
    assert [skip.node for skip in support.skips(model)] == ["Gemm:t"]
    assert "the model would grow by" in support.skips(model)[0].reason


def test_edits_can_be_limited(shrink: Callable[..., Model]) -> None:
    """Each prefix of the edits is right: a wrong one could be found by bisection."""
    source = support.model_of(
        """main (float[N,2,2,2] x) => (float[N,1,2,2] y, float[N,1,2,2] z)
        <float[3,2,1,1] W = {1,2, 0,0, 3,-1}, float[1,3,1,1] V = {1,2,3},
        float[3,2,1,1] A = {0,0, 1,2, 3,4}, float[1,3,1,1] B = {1,2,3}> {
           t = Conv (x, W)
           y = Conv (t, V)
           s = Conv (x, A)
           z = Conv (s, B)
        }"""
    )
    whole = shrink(source).ledger.edits
    assert whole == 2
    for limit in range(whole):
        assert shrink(source, limit=limit).ledger.edits == limit


# ---- from outside ----


def small() -> ModelProto:
    """A zero branch, a dead channel with a bias, and a layer that does nothing."""
    return support.model_of(
        """main (float[N,2,4,4] x) => (float[N,2,4,4] y)
        <float[3,2,1,1] W = {1,2, 0,0, 3,-1}, float[3] b = {0.5,2,-0.5},
        float[2,3,1,1] V = {1,2,3,4,5,6}, float[2,2,3,3] Z = {},
        float[2,2,1,1] I = {1,0,0,1}> {
           t = Conv (x, W, b)
           r = Relu (t)
           s = Conv (r, V)
           z = Conv <pads = [1,1,1,1]> (s, Z)
           a = Add (s, z)
           i = Conv (a, I)
           y = Tanh (i)
        }"""
    )


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    source = small()
    support.randomize(source, "Z")
    support.find_tensor(source, "Z").CopyFrom(
        onnx.numpy_helper.from_array(np.zeros((2, 2, 3, 3), np.float32), "Z")
    )
    path = tmp_path / "small.onnx"
    onnx.save(source, path)
    return path


def check_small(made: ModelProto, path: Path) -> None:
    check_numbers(onnx.load(path), made)
    assert [node.op_type for node in made.graph.node] == ["Conv", "Relu", "Conv", "Tanh"]
    sizes = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
    assert sizes["W"] == [2, 2, 1, 1]
    assert sizes["V"] == [2, 2, 1, 1]


def test_shrink_in_python(small_file: Path, tmp_path: Path) -> None:
    result = onnxopt.shrink(str(small_file))
    assert result.report.validation is not None
    assert result.report.validation.status == "passed"
    result.save(str(tmp_path / "made.onnx"))
    check_small(onnx.load(tmp_path / "made.onnx"), small_file)
    assert {report.name for report in result.report.passes} >= {
        "dead-layers",
        "zero-channels",
    }


def test_shrink_leaves_the_given_model_alone(small_file: Path) -> None:
    source = onnx.load(small_file)
    before = source.SerializeToString(deterministic=True)
    onnxopt.shrink(source)
    assert source.SerializeToString(deterministic=True) == before


def test_shrink_on_the_command_line(
    small_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made.onnx"
    with pytest.raises(SystemExit) as left:
        cli.main(["shrink", str(small_file), "-o", str(made)])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "zero-channels" in printed
    assert "validation: passed" in printed
    check_small(onnx.load(made), small_file)


def test_shrink_of_nothing_changes_nothing(tmp_path: Path) -> None:
    """Without dead channels the model stays as it is."""
    source = conv_pair("p = Relu (t)")
    support.randomize(source, "W")
    result = onnxopt.shrink(source)
    assert all(report.edits == 0 for report in result.report.passes)
