"""What other tools get wrong, and what a simplifier must never do: each by name.

`simplified` checks of every model here that the result is valid, in topological order
in every scope, no larger than it may be, of the same interface, equal in numbers on
several feeds, and that simplifying it again changes nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import pytest
from onnx import ModelProto, TensorProto, helper
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array

import onnxopt
from tests import support
from tests.simplified import interface, nodes, ops, simplified
from tests.support import model_of

RNG = np.random.default_rng(0)


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def with_weights(model: ModelProto, **values: Any) -> ModelProto:
    """The model with more initializers: arrays, or tensors."""
    for name, value in values.items():
        tensor = value if isinstance(value, TensorProto) else from_array(value)
        model.graph.initializer.add().CopyFrom(tensor)
        model.graph.initializer[-1].name = name
    return model


def normal(*dims: int) -> np.ndarray:
    return RNG.standard_normal(dims).astype(np.float32)


# ---- bfloat16 ----

HALVES = np.array(
    [1.5, 2.75, -0.3, 100.7, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.inf, np.nan, -0.0],
    dtype=np.float32,
)
"""Values that bfloat16 rounds: ties to even both ways, overflow, fractions."""


def test_a_cast_to_bfloat16_is_no_cut_to_integers() -> None:
    source = model_of("""
        agraph (float[N,10] x) => (float[N,10] y) {
            h = Cast <to = 16> (w)
            back = Cast <to = 1> (h)
            y = Add (x, back)
        }""")
    made = simplified(with_weights(source, w=HALVES), guarantee="bitwise")
    assert ops(made) == ["Add"]
    (tensor,) = made.graph.initializer
    expected = HALVES.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(to_array(tensor), expected)


def test_a_bfloat16_output_holds_rounded_values() -> None:
    source = model_of("""
        agraph (float[N] x) => (bfloat16[10] y, float[N] z) {
            y = Cast <to = 16> (w)
            z = Neg (x)
        }""")
    made = simplified(with_weights(source, w=HALVES), runs=False)
    assert ops(made) == ["Neg"]
    found = to_array(initializers(made)["y"]).astype(np.float32)
    np.testing.assert_array_equal(
        found, HALVES.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


# ---- what the model's own opset lacks ----

ZERO_SIZES = {
    "an-empty-tensor": "agraph (float[0,3] x) => (float[3,0] y)"
    "<int64[2] s = {3, 0}, int64[1] f = {-1}>"
    "{ t = Reshape (x, f) u = Transpose <perm = [1, 0]> (x) y = Relu (u) }",
    "dims-copied-by-0": "agraph (float[N,3,4] x) => (float[N,12] y)"
    "<int64[4] s = {0, 0, 2, 2}, int64[2] f = {0, -1}>"
    "{ t = Reshape (x, s) y = Reshape (t, f) }",
    "a-shape-from-shapes": "agraph (float[N,M,4] x) => (float[N,M,2,2] y)"
    "<int64[1] a = {0}, int64[1] b = {1}, int64[1] two = {2}>"
    "{ s = Shape (x) n = Gather (s, a) m = Gather (s, b)"
    "  c = Concat <axis = 0> (n, m, two, two) y = Reshape (x, c) }",
    "flattened-and-squeezed": "agraph (float[N,1,0] x) => (float[?,?] y)"
    "{ t = Squeeze <axes = [1]> (x) u = Unsqueeze <axes = [0]> (t)"
    "  y = Flatten <axis = 1> (u) }",
}


@pytest.mark.parametrize("name", ZERO_SIZES)
@pytest.mark.parametrize("opset", [7, 9, 12])
def test_no_allowzero_before_opset_14(name: str, opset: int) -> None:
    source = model_of(ZERO_SIZES[name], opset=opset)
    made = simplified(source, guarantee="bitwise")
    assert not [
        a for node in nodes(made) for a in node.attribute if a.name == "allowzero"
    ]


LAYER_NORM = """
    agraph (float[N,3,8] x) => (float[N,3,8] y)
    <float two = {2}, float e = {0.00001}, float[8] g = {1,2,3,4,5,6,7,8}>
    {
        m = ReduceMean <axes = [-1]> (x)
        d = Sub (x, m)
        q = Pow (d, two)
        v = ReduceMean <axes = [-1]> (q)
        f = Add (v, e)
        s = Sqrt (f)
        n = Div (d, s)
        y = Mul (n, g)
    }"""
GELU = """
    agraph (float[N,4] x) => (float[N,4] y)
    <float r = {1.4142135}, float one = {1}, float h = {0.5}>
    {
        u = Div (x, r)
        e = Erf (u)
        p = Add (e, one)
        m = Mul (x, p)
        y = Mul (m, h)
    }"""
HARD_SWISH = """
    agraph (float[N,4] x) => (float[N,4] y)
    <float three = {3}, float lo = {0}, float hi = {6}>
    {
        a = Add (x, three)
        c = Clip (a, lo, hi)
        m = Mul (x, c)
        y = Div (m, hi)
    }"""
RMS_NORM = """
    agraph (float[N,3,8] x) => (float[N,3,8] y)
    <float two = {2}, float e = {0.00001}, float[8] g = {1,2,3,4,5,6,7,8},
     int64[1] last = {-1}>
    {
        q = Pow (x, two)
        v = ReduceMean <keepdims = 1> (q, last)
        f = Add (v, e)
        s = Sqrt (f)
        n = Div (x, s)
        y = Mul (n, g)
    }"""
SWISH = "agraph (float[N,4] x) => (float[N,4] y) { s = Sigmoid (x) y = Mul (x, s) }"
YOUNG = {
    "LayerNormalization": (LAYER_NORM, [9, 12, 16], [17]),
    "Gelu": (GELU, [12, 17, 19], [20]),
    "HardSwish": (HARD_SWISH, [12, 13], [14]),
    "RMSNormalization": (RMS_NORM, [18, 22], [23]),
    "Swish": (SWISH, [13, 17, 23], [24]),
}
"""Operators: their single steps, opsets that lack them, and the first that has them."""


@pytest.mark.parametrize("op_type", YOUNG)
def test_no_operator_that_the_opset_lacks(op_type: str) -> None:
    """As LayerNormalization of opset 17 in a model of opset 12."""
    body, without, having = YOUNG[op_type]
    for opset in without:
        feeds = support.feeds_of(model_of(body), (2,))
        made = simplified(model_of(body, opset=opset), feeds=feeds)
        assert op_type not in ops(made)
        assert made.opset_import[0].version == opset
    for opset in having:
        source = model_of(body, opset=opset, ir=10)
        assert op_type in ops(simplified(source, runs=False))


# ---- control flow ----

NESTED = """
    agraph (float[N,2,3] x, bool c, bool d) => (float[?,?,?] y)
    <int64[3] s = {0, 3, 2}, int64[2] flat = {0, 6}, float one = {1}>
    {
        p = Transpose <perm = [0, 2, 1]> (x)
        y = If (c) <
            then_branch = then1 () => (float[?,?,?] t) {
                a = Relu (p)
                t = If (d) <
                    then_branch = then2 () => (float[?,?,?] u) {
                        k = Constant <value = float[2] {2, 3}> ()
                        b = Transpose <perm = [0, 2, 1]> (a)
                        e = Transpose <perm = [0, 2, 1]> (b)
                        f = Div (e, one)
                        g = Mul (f, k)
                        h = Reshape (g, flat)
                        u = Reshape (h, s)
                    },
                    else_branch = else2 () => (float[?,?,?] w) {
                        z = Shape (a)
                        i = Expand (one, z)
                        j = Add (a, i)
                        l = Add (a, i)
                        w = Mul (j, l)
                    }
                >
            },
            else_branch = else1 () => (float[?,?,?] o) {
                q = Identity (p)
                yes = Constant <value = bool {1}> ()
                o = If (yes) <
                    then_branch = then3 () => (float[?,?,?] u) {
                        h = Sigmoid (q)
                        u = Mul (h, q)
                    },
                    else_branch = else3 () => (float[?,?,?] w) { w = Neg (q) }
                >
            }
        >
    }"""


def branch_feeds(*sizes: int) -> list[dict[str, Any]]:
    """Every pair of conditions."""
    made = []
    for size in sizes:
        for c in (False, True):
            for d in (False, True):
                x = normal(size, 2, 3)
                made.append({"x": x, "c": np.array(c), "d": np.array(d)})
    return made


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_nodes_in_nested_branches_stay_in_order(opset: int) -> None:
    made = simplified(model_of(NESTED, opset=opset), feeds=branch_feeds(2, 1))
    assert ops(made).count("If") == 2
    assert len(nodes(made)) < len(nodes(model_of(NESTED)))


CONSTANT_IF = """
    y = If (yes) <
        then_branch = yes_branch () => (float[N,3] t) { p = Abs (x) t = Neg (p) },
        else_branch = no_branch () => (float[N,3] e) { e = Exp (x) }
    >"""
COMPUTED_CONDITION = """
    s = Shape (x)
    n = Gather (s, one)
    yes = Equal (n, three)"""


@pytest.mark.parametrize("where", ["main", "if", "loop", "function"])
@pytest.mark.parametrize("condition", ["told", "computed"])
def test_a_constant_if_in_any_scope_is_inlined(where: str, condition: str) -> None:
    known = "" if condition == "computed" else "bool yes = {1}, "
    body = (COMPUTED_CONDITION if condition == "computed" else "") + CONSTANT_IF
    weights = f"<{known}int64 one = {{1}}, int64 three = {{3}}>"
    source = model_of(f"agraph (float[N,3] x) => (float[N,3] y) {weights} {{ {body} }}")
    wrap = {
        "if": support.in_branches,
        "loop": support.in_loop,
        "function": support.in_function,
    }
    made = simplified(wrap[where](source) if where in wrap else source)
    if where == "function" and condition == "computed":
        return  # no shapes are known there
    assert ops(made).count("If") == (where == "if")
    for function in made.functions:
        assert [node.op_type for node in function.node] == ["Abs", "Neg"]


def test_a_constant_if_in_a_branch_in_a_branch_is_inlined() -> None:
    source = model_of(f"""
        agraph (float[N,3] x, bool c) => (float[N,3] z) <bool yes = {{1}}> {{
            z = If (c) <
                then_branch = b1 () => (float[N,3] t1) {{
                    t1 = If (yes) <
                        then_branch = b2 () => (float[N,3] y) {{ {CONSTANT_IF} }},
                        else_branch = b3 () => (float[N,3] y3) {{ y3 = Exp (x) }}
                    >
                }},
                else_branch = b4 () => (float[N,3] y4) {{ y4 = Sin (x) }}
            >
        }}""")
    made = simplified(source)
    assert ops(made) == ["Abs", "If", "Neg", "Sin"]


# ---- what is random ----

RANDOM = {
    "RandomNormal": "r = RandomNormal <shape = [4], seed = 1.0> ()",
    "RandomUniform": "r = RandomUniform <shape = [4], seed = 1.0> ()",
    "RandomNormalLike": "r = RandomNormalLike <dtype = 1, seed = 1.0> (w)",
    "RandomUniformLike": "r = RandomUniformLike <dtype = 1, seed = 1.0> (w)",
    "Multinomial": "m = Multinomial <sample_size = 4, seed = 1.0> (row)"
    " f = Cast <to = 1> (m) r = Squeeze (f, zero)",
    "Bernoulli": "r = Bernoulli <seed = 1.0> (p)",
    "Dropout": "r = Dropout <seed = 1> (w, half, yes)",
}
RANDOM_WEIGHTS = """
    float[4] w = {1, 2, 3, 4}, float[4] p = {0.5, 0.5, 0.25, 0.75},
    float[1,4] row = {1, 2, 3, 4}, int64[1] zero = {0}, float half = {0.5}, bool yes = {1}
    """


@pytest.mark.parametrize("where", ["main", "if", "loop", "function"])
@pytest.mark.parametrize("op_type", RANDOM)
def test_nothing_random_is_folded(op_type: str, where: str) -> None:
    source = model_of(f"""
        agraph (float[N,4] x) => (float[N,4] y) <{RANDOM_WEIGHTS}> {{
            {RANDOM[op_type]}
            y = Add (x, r)
        }}""")
    wrap = {"if": support.in_branches, "loop": support.in_loop}
    if where in wrap:
        source = wrap[where](source)
    elif where == "function":
        source = support.in_function(source)
    made = simplified(source, runs=False)
    count = {"if": 2}.get(where, 1)
    found = [*nodes(made), *(n for f in made.functions for n in f.node)]
    drawn = [node for node in found if node.op_type == op_type]
    assert len(drawn) == count
    assert all(a.name != "seed" or a.f or a.i for node in drawn for a in node.attribute)
    assert all(any(a.name == "seed" for a in node.attribute) for node in drawn)


@pytest.mark.parametrize("op_type", RANDOM)
def test_two_draws_stay_two(op_type: str) -> None:
    """Without a seed, equal nodes draw different numbers."""
    draw = RANDOM[op_type].replace(", seed = 1.0", "").replace("seed = 1.0", "")
    draw = draw.replace("<>", "").replace("<seed = 1>", "")
    again = re.sub(r"\b([rmf])\b", r"\g<1>2", draw)
    source = model_of(f"""
        agraph (float[N,4] x) => (float[N,4] y) <{RANDOM_WEIGHTS}> {{
            {draw}
            {again}
            s = Sub (r, r2)
            y = Add (x, s)
        }}""")
    assert ops(simplified(source, runs=False)).count(op_type) == 2


def test_a_random_node_in_a_known_branch_is_moved_and_not_folded() -> None:
    source = model_of("""
        agraph (float[N,4] x) => (float[N,4] y) <bool yes = {1}> {
            r = If (yes) <
                then_branch = b1 () => (float[4] t) { t = RandomNormal <shape = [4]> () },
                else_branch = b2 () => (float[4] e) { e = RandomUniform <shape = [4]> () }
            >
            y = Add (x, r)
        }""")
    assert ops(simplified(source, runs=False)) == ["Add", "RandomNormal"]


def test_a_loop_of_few_rounds_draws_anew_in_each() -> None:
    source = model_of("""
        agraph (float[4] x) => (float[4] y) <int64 two = {2}, bool yes = {1}> {
            y = Loop (two, yes, x) <
                body = b (int64 i, bool go, float[4] v) => (bool on, float[4] w) {
                    on = Identity (go)
                    r = RandomNormal <shape = [4]> ()
                    w = Add (v, r)
                }
            >
        }""")
    made = simplified(source, runs=False)
    assert ops(made).count("RandomNormal") == (1 if "Loop" in ops(made) else 2)


def test_dropout_in_training_mode_stays_and_otherwise_goes() -> None:
    body = """
        agraph (float[N,4] x{more}) => (float[N,4] y) <float half = {{0.5}}{weight}> {{
            r = Dropout (x, half{mode})
            y = Relu (r)
        }}"""
    stays = [
        {"more": "", "weight": ", bool mode = {1}", "mode": ", mode"},
        {"more": ", bool mode", "weight": "", "mode": ", mode"},
    ]
    for parts in stays:
        made = simplified(model_of(body.format(**parts)), runs=False)
        assert ops(made) == ["Dropout", "Relu"]
    goes = [
        {"more": "", "weight": ", bool mode = {0}", "mode": ", mode"},
        {"more": "", "weight": "", "mode": ""},
    ]
    for parts in goes:
        assert ops(simplified(model_of(body.format(**parts)))) == ["Relu"]


def test_the_mask_of_a_dropout_that_is_read() -> None:
    source = model_of("""
        agraph (float[N,4] x) => (float[N,4] y, bool[N,4] m) { y, m = Dropout (x) }""")
    simplified(source)


# ---- types that tools forget ----


def test_string_initializers() -> None:
    source = model_of(
        """
        agraph (int64[N] i, string[M] s) => (string[N,1] a, bool[M] b, string[3] c,
                                             string[5] d) {
            flat = Reshape (table, all)
            turned = Concat <axis = 0> (flat, more)
            g = Gather (turned, i)
            a = Unsqueeze (g, one)
            copy = Identity (key)
            b = Equal (s, copy)
            b2 = Equal (s, twin)
            c = Gather (flat, first)
            d = Concat <axis = 0> (c, more)
        }""",
        opset=19,
        ir=9,
    )
    words = np.array([["a", "", "größe"], ["d", "e\n", "f"]], dtype=object)
    source = with_weights(
        source,
        table=words,
        more=np.array(["x", "y"], dtype=object),
        all=np.array([-1]),
        one=np.array([1]),
        key=np.array(["key"], dtype=object),
        twin=np.array(["key"], dtype=object),
        first=np.array([2, 0, 1]),
    )
    feeds = [
        {"i": np.array([0, 2, 5]), "s": np.array(["key", "no"], dtype=object)},
        {"i": np.array([4]), "s": np.array(["größe"], dtype=object)},
    ]
    made = simplified(source, feeds=feeds, guarantee="bitwise")
    assert len(nodes(made)) < len(nodes(source))


def test_strings_that_are_no_utf8_stay_as_they_are() -> None:
    """onnx's own reader replaces such bytes."""
    source = model_of("""
        agraph (int64[N] i) => (string[N] a) {
            copy = Identity (table)
            t = Reshape (copy, all)
            a = Gather (t, i)
        }""")
    strings = helper.make_tensor("t", TensorProto.STRING, [2], [b"\xff\xfe", b"y"])
    made = simplified(with_weights(source, table=strings, all=np.array([-1])), runs=False)
    (tensor,) = (t for t in made.graph.initializer if t.data_type == TensorProto.STRING)
    assert list(tensor.string_data) == [b"\xff\xfe", b"y"]


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
def test_4_bit_initializers(kind: str) -> None:
    """They are read, moved, shared, and never made wide."""
    source = model_of(
        """
        agraph (float[N,6] x) => (float[N,5] y, float[N,5] z)
        <float s = {0.5}, float[5] b = {1, 2, 3, 4, 5}> {
            f = DequantizeLinear (w, s)
            m = MatMul (x, f)
            y = Add (m, b)
            g = DequantizeLinear (twin, s)
            h = Identity (g)
            z = MatMul (x, h)
        }""",
        opset=21,
        ir=10,
    )
    low = -8 if kind == "INT4" else 0
    values = RNG.integers(low, low + 16, 30).tolist()
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [6, 5], values)
    made = simplified(with_weights(source, w=tensor, twin=tensor))
    four = [t for t in made.graph.initializer if len(t.dims) == 2]
    assert {t.data_type for t in four} == {tensor.data_type}
    assert "DequantizeLinear" in ops(made)
    for found in four:
        np.testing.assert_array_equal(to_array(found), to_array(tensor))


@pytest.mark.parametrize(
    "kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT4E2M1", "INT2", "UINT2"]
)
@pytest.mark.parametrize("op_type", ["Transpose", "Reshape", "Identity", "Cast"])
def test_narrow_initializers_behind_anything(kind: str, op_type: str) -> None:
    """Also where ONNX Runtime has no kernel for them."""
    if not hasattr(TensorProto, kind):
        pytest.skip(f"this onnx has no {kind}")
    step = {
        "Transpose": "v = Transpose <perm = [1, 0]> (w)",
        "Reshape": "v = Reshape (w, s)",
        "Identity": "v = Identity (w)",
        "Cast": "f = Cast <to = 1> (w)",
    }[op_type]
    last = "" if op_type == "Cast" else "f = Cast <to = 1> (v)"
    source = model_of(
        f"""
        agraph (float[N,1,1] x) => (float[?,?,?] y) <int64[2] s = {{5, 6}}> {{
            {step}
            {last}
            y = Mul (x, f)
        }}""",
        opset=25 if kind in ("INT2", "UINT2") else 23,
        ir=13 if kind in ("INT2", "UINT2") else 11,
    )
    values = RNG.integers(0, 2, 1200)
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [30, 40], values)
    source.graph.initializer[0].CopyFrom(from_array(np.array([40, 30]), "s"))
    made = simplified(with_weights(source, w=tensor), runs=False)
    assert "Cast" in ops(made)
    narrow = [t for t in made.graph.initializer if len(t.dims) == 2]
    assert [t.data_type for t in narrow] == [tensor.data_type]


# ---- the interface ----


def test_unused_inputs_stay() -> None:
    source = model_of("""
        agraph (float[N] a, int64[2,M] unused, float[N] x, bool never) => (float[N] y) {
            i = Identity (x)
            z = Mul (unused, unused)
            y = Relu (i)
        }""")
    made = simplified(source)
    assert [value.name for value in made.graph.input] == ["a", "unused", "x", "never"]
    assert ops(made) == ["Relu"]


def test_an_input_that_a_fold_leaves_unread_stays() -> None:
    source = model_of("""
        agraph (float[2,3] shaped, float[N] x) => (float[N,6] y) {
            s = Size (shaped)
            k = Cast <to = 1> (s)
            w = Expand (k, six)
            e = Unsqueeze (x, one)
            y = Add (e, w)
        }""")
    made = simplified(with_weights(source, six=np.array([6]), one=np.array([1])))
    assert [value.name for value in made.graph.input] == ["shaped", "x"]
    assert not any("shaped" in node.input for node in nodes(made))


INTERFACES = {
    "outputs-that-are-inputs": "agraph (float[N] x, float[N] z) =>"
    "(float[N] y, float[N] x) { i = Identity (z) y = Relu (i) }",
    "identity-of-an-input": "agraph (float[N] x) => (float[N] y, float[N] z)"
    "{ y = Identity (x) z = Identity (x) }",
    "the-same-value-twice": "agraph (float[N] x) => (float[N] y, float[N] z, float[N] u)"
    "{ y = Relu (x) z = Relu (x) i = Relu (x) u = Identity (i) }",
    "constants": "agraph (float[N] x) => (float[2] k, float[3] m, float[N] y, float[2] w)"
    "<float[2] w = {1, 2}, int64[1] three = {3}>"
    "{ k = Constant <value = float[2] {3, 4}> () m = ConstantOfShape (three)"
    "  y = Neg (x) }",
    "computed-constants": "agraph (float[N] x) => (float[2] k, float[2] m, float[N] y)"
    "<float[2] w = {1, 2}>"
    "{ k = Add (w, w) m = Identity (w) n = Mul (w, w) o = ReduceSum (n) y = Mul (x, o) }",
    "inner-values": "agraph (float[N,3] x) => (float[3,N] t, float[N,3] y, float[N,3] r)"
    "{ r = Relu (x) t = Transpose <perm = [1, 0]> (r)"
    "  y = Transpose <perm = [1, 0]> (t) }",
    "of-several-types": "agraph (float16[N] h, int32[N] i, bool[N] b, double[N] d) =>"
    "(double[N] o, bool[N] b2, int32[N] i2, float16[N] h2)"
    "{ h2 = Cast <to = 10> (h) i2 = Identity (i) nb = Not (b) b2 = Not (nb)"
    "  c = Cast <to = 11> (d) o = Neg (c) }",
}


@pytest.mark.parametrize("name", INTERFACES)
def test_the_interface_stays_exactly(name: str) -> None:
    simplified(model_of(INTERFACES[name]), guarantee="bitwise")


NOT_MADE = ("outputs-that-are-inputs", "constants")
"""Where an output is an input or an initializer, as it cannot be in a branch."""


@pytest.mark.parametrize("where", ["if", "loop"])
@pytest.mark.parametrize("name", sorted(INTERFACES.keys() - set(NOT_MADE)))
def test_the_interface_of_inner_scopes_stays_exactly(name: str, where: str) -> None:
    wrap = {"if": support.in_branches, "loop": support.in_loop}
    simplified(wrap[where](model_of(INTERFACES[name])), guarantee="bitwise")


def test_an_output_listed_twice_stays_twice() -> None:
    """Not valid for the checker, but ONNX Runtime may load it."""
    source = model_of("""
        agraph (float[N] x) => (float[N] y, float[N] y) { i = Identity (x) y = Relu (i) }
        """)
    result = onnxopt.simplify(source, validate=False)
    assert interface(result.model) == interface(source)


# ---- initializers that are inputs ----

OLD = """
    agraph (float[N,4] x, float[4,4] w, float[4] b, float[4] unread, int64[1] axes)
        => (float[N,4] y, float[N,1,4] z) {
        t = Transpose <perm = [1, 0]> (w)
        s = Mul (b, b)
        m = MatMul (x, t)
        y = Add (m, s)
        k = Constant <value = float[4] {1, 2, 3, 4}> ()
        u = Mul (x, k)
        v = Add (u, s)
        z = Unsqueeze <axes = [1]> (v)
    }"""


def old_model(ir: int, opset: int = 8) -> ModelProto:
    return with_weights(
        model_of(OLD, opset=opset, ir=ir),
        w=normal(4, 4),
        b=normal(4),
        unread=normal(4),
        axes=np.array([1]),
    )


def test_an_ir_3_model_requires_no_new_inputs() -> None:
    source = old_model(ir=3)
    made = simplified(source, feeds=[{"x": normal(n, 4)} for n in (2, 1, 3)])
    listed = {value.name: value for value in made.graph.input}
    for name, tensor in initializers(made).items():
        declared = listed[name].type.tensor_type
        assert declared.elem_type == tensor.data_type
        assert [dim.dim_value for dim in declared.shape.dim] == list(tensor.dims)
    assert set(listed) == {"x", *initializers(made)}
    assert made.ir_version == 3
    assert "Transpose" not in ops(made)
    assert len(nodes(made)) < len(nodes(source))


@pytest.mark.parametrize("ir", [4, 8])
def test_what_can_be_overridden_is_not_folded(ir: int) -> None:
    """From IR 4 on: the caller may feed it."""
    source = old_model(ir=ir)
    feeds = [
        {"x": normal(2, 4)},
        {"x": normal(1, 4), "w": normal(4, 4)},
        {"x": normal(3, 4), "b": normal(4)},
        {"x": normal(3, 4), "b": normal(4), "w": normal(4, 4), "unread": normal(4)},
    ]
    made = simplified(source, feeds=feeds)
    assert [v.name for v in made.graph.input] == [v.name for v in source.graph.input]
    assert {"w", "b", "unread", "axes"} <= set(initializers(made))


@pytest.mark.parametrize("ir", [4, 8])
def test_frozen_inputs_are_folded(ir: int) -> None:
    source = old_model(ir=ir)
    feeds = [{"x": normal(n, 4)} for n in (2, 1, 3)]
    made = simplified(source, feeds=feeds, freeze_inputs=True)
    assert [value.name for value in made.graph.input] == ["x"]
    assert "Transpose" not in ops(made)
    assert ops(made).count("Mul") == 1


# ---- shapes that are told wrongly ----

PROMISES = {
    "two-inputs": (
        "agraph (float[N,3] a, float[N,3] b) => (float[?,?] y)"
        "<int64[1] zero = {0}, int64[1] three = {3}>"
        "{ s = Shape (a) n = Gather (s, zero) c = Concat <axis = 0> (n, three)"
        "  k = ConstantOfShape (c) u = Shape (b) v = Gather (u, zero)"
        "  w = Concat <axis = 0> (v, three) l = ConstantOfShape (w)"
        "  p = Concat <axis = 0> (a, k) q = Concat <axis = 0> (b, l)"
        "  y = Concat <axis = 0> (p, q) }"
    ),
    "a-size-that-is-handed-out": (
        "agraph (float[N,3] a, float[N,3] b) => (int64[1] n, int64[1] m, bool[1] e)"
        "<int64[1] zero = {0}>"
        "{ s = Shape (a) n = Gather (s, zero) u = Shape (b) m = Gather (u, zero)"
        "  e = Equal (n, m) }"
    ),
    "an-expand-to-the-other": (
        "agraph (float[N,3] a, float[N,3] b) => (float[?,?] y)"
        "{ s = Shape (a) y = Expand (b, s) }"
    ),
    "a-slice-to-the-other": (
        "agraph (float[N,3] a, float[N,3] b) => (float[?,?] y)"
        "<int64[1] zero = {0}>"
        "{ s = Shape (a) n = Gather (s, zero) y = Slice (b, zero, n, zero) }"
    ),
    "a-reshape-to-the-other": (
        "agraph (float[N,4] a, float[N,4] b) => (float[?,?] y)"
        "<int64[1] zero = {0}, int64[1] rest = {-1}>"
        "{ s = Shape (a) n = Gather (s, zero) c = Concat <axis = 0> (n, rest)"
        "  y = Reshape (b, c) }"
    ),
    "a-condition": (
        "agraph (float[N,3] a, float[N,3] b) => (float[?,?] y)"
        "<int64 zero = {0}>"
        "{ s = Shape (a) n = Gather (s, zero) u = Shape (b) m = Gather (u, zero)"
        "  c = Equal (n, m)"
        "  y = If (c) <then_branch = t () => (float[?,?] p) { p = Relu (a) },"
        "              else_branch = e () => (float[?,?] q) { q = Neg (b) }> }"
    ),
}


@pytest.mark.parametrize("name", PROMISES)
def test_inputs_that_share_a_symbol_may_differ_in_size(name: str) -> None:
    """ONNX Runtime runs them, so nothing may rest on the promise."""
    source = model_of(PROMISES[name])
    wide = source.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    sizes = [(2, 2), (2, 1), (1, 1), (1, 2), (4, 2)]
    if name == "an-expand-to-the-other":
        sizes.pop()
    feeds = [{"a": normal(n, wide), "b": normal(m, wide)} for n, m in sizes]
    simplified(source, feeds=feeds, guarantee="bitwise")


WRONG = {
    "a-symbol-for-another": ("v", ["N", 3]),
    "a-number": ("v", [7, 3]),
    "a-rank": ("v", [3]),
    "a-shape-of-size-1": ("v", [1, 1]),
}
CONFUSED = """
    agraph (float[N,3] x) => (float[?,?] y, int64[2] z, float[?,?] u)
    <int64[1] zero = {0}, int64[1] three = {3}, int64[2] ones = {1, 1}> {
        v = Concat <axis = 0> (x, x)
        s = Shape (v)
        n = Gather (s, zero)
        c = Concat <axis = 0> (n, three)
        k = ConstantOfShape <value = float[1] {1}> (c)
        y = Add (v, k)
        t = Shape (x)
        z = Mul (s, t)
        e = Expand (v, ones)
        r = Reshape (e, c)
        u = Relu (r)
    }"""


@pytest.mark.parametrize("where", ["main", "if"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declared_shape_is_not_believed(name: str, where: str) -> None:
    """A value propagated through it would change the output, and no checker objects."""
    source = model_of(CONFUSED)
    value, dims = WRONG[name]
    declared = make_tensor_value_info(value, TensorProto.FLOAT, dims)
    source.graph.value_info.append(declared)
    if where == "if":
        source = support.in_branches(source)
    runs = (name, where) != ("a-number", "if")  # ONNX Runtime believes it and fails
    simplified(source, guarantee="bitwise", runs=runs)


@pytest.mark.parametrize("dims", [[1, 3], ["N", 3], [9, 3], [5], ["N", "M", 3, 1]])
def test_a_wrong_declared_output_is_not_believed_and_stays(dims: list[Any]) -> None:
    source = model_of("""
        agraph (float[N,3] x) => (float[A,B] y, int64[2] s) <int64[2] ones = {1, 1}> {
            v = Concat <axis = 0> (x, x)
            e = Expand (v, ones)
            y = Relu (e)
            s = Shape (y)
        }""")
    wrong = make_tensor_value_info("y", TensorProto.FLOAT, dims)
    source.graph.output[0].CopyFrom(wrong)
    made = simplified(source, guarantee="bitwise")
    assert made.graph.output[0] == wrong


def test_a_wrong_declared_dtype_is_not_believed() -> None:
    source = model_of("""
        agraph (float[N,3] x) => (float[N,3] y) {
            v = Relu (x)
            c = Cast <to = 1> (v)
            d = Cast <to = 10> (c)
            y = Cast <to = 1> (d)
        }""")
    source.graph.value_info.append(make_tensor_value_info("v", TensorProto.FLOAT, [1]))
    source.graph.value_info.append(make_tensor_value_info("c", TensorProto.FLOAT, []))
    made = simplified(source, guarantee="bitwise")
    assert ops(made) == ["Cast", "Cast", "Relu"]


# ---- quantized weights ----

EXPANDED = {
    "int8-dequantized": "f = DequantizeLinear (w, s)",
    "int8-per-channel": "f = DequantizeLinear <axis = 1> (w, many)",
    "int8-behind-cast-mul": "c = Cast <to = 1> (w) f = Mul (c, s)",
    "int8-behind-cast-sub-mul": "c = Cast <to = 1> (w) d = Sub (c, s) f = Mul (d, many)",
    "int8-behind-identity": "i = Identity (w) f = DequantizeLinear (i, s)",
    "int8-transposed": "d = DequantizeLinear (w, s) f = Transpose <perm = [1, 0]> (d)",
    "int8-reshaped": "d = DequantizeLinear (w, s) f = Reshape (d, shape)",
    "float16-behind-cast": "f = Cast <to = 1> (h)",
}


@pytest.mark.parametrize("size", [64, 768])
@pytest.mark.parametrize("name", EXPANDED)
def test_quantized_weights_stay_narrow(name: str, size: int, tmp_path: Path) -> None:
    """A DQ-MatMul stays one: ONNX Runtime's offline optimizer makes it MatMulNBits."""
    source = with_weights(
        model_of(f"""
        agraph (float[N,{size}] x) => (float[N,{size}] y) <float s = {{0.5}}> {{
            {EXPANDED[name]}
            y = MatMul (x, f)
        }}"""),
        w=RNG.integers(-127, 128, (size, size)).astype(np.int8),
        h=RNG.standard_normal((size, size)).astype(np.float16),
        many=np.abs(normal(size)) + 0.1,
        shape=np.array([size, size]),
    )
    unread = "h" if "int8" in name else "w"
    kept = [t for t in source.graph.initializer if t.name != unread]
    del source.graph.initializer[:]
    source.graph.initializer.extend(kept)
    feeds = [{"x": normal(n, size)} for n in (2, 1)]
    made = simplified(source, feeds=feeds)
    assert {"MatMul", "Gemm"} & set(ops(made))
    assert {"DequantizeLinear", "Cast"} & set(ops(made))
    matrices = [t for t in made.graph.initializer if len(t.dims) == 2]
    assert {t.data_type for t in matrices} <= {TensorProto.INT8, TensorProto.FLOAT16}
    assert {entry.domain for entry in made.opset_import} <= {"", "local"}
    onnx.save(source, tmp_path / "in.onnx")
    onnxopt.simplify(tmp_path / "in.onnx", validate=False).save(tmp_path / "out.onnx")
    before, after = ((tmp_path / f).stat().st_size for f in ("in.onnx", "out.onnx"))
    assert after <= 1.02 * before


def test_narrow_weights_beside_a_large_one_stay_narrow() -> None:
    """The budget of the fold that they are part of would allow for it."""
    source = with_weights(
        model_of("""
        agraph (float[N,1,2000] x) => (float[N,?,2000] y, float[N,?,2000] z) {
            c = Cast <to = 1> (w)
            m = Mul (c, large)
            y = Mul (x, c)
            z = Mul (x, m)
        }"""),
        w=RNG.integers(-127, 128, 2000).astype(np.int8),
        large=normal(50, 2000),
    )
    made = simplified(source)
    assert "Cast" in ops(made)
    assert TensorProto.INT8 in {t.data_type for t in made.graph.initializer}


def test_no_operator_of_another_domain_is_emitted() -> None:
    """int8 DQ-MatMul, attention, Gelu...: standard ones only."""
    for body, _, opsets in YOUNG.values():
        made = simplified(model_of(body, opset=opsets[0], ir=10), runs=False)
        assert {node.domain for node in nodes(made)} <= {"", "ai.onnx"}
        assert {entry.domain for entry in made.opset_import} == {"", "local"}


# ---- growth ----

GROWING = {
    "ConstantOfShape": "k = ConstantOfShape <value = float[1] {2}> (dims)",
    "Expand": "k = Expand (row, dims)",
    "Tile": "k = Tile (row, many)",
    "Range": "r = Range (zero, most, one) f = Cast <to = 1> (r) k = Reshape (f, dims)",
    "Pad": "k = Pad (row, pads)",
    "Concat": "k = Concat <axis = 0> (" + ", ".join(["row"] * 1000) + ")",
    "Add": "k = Add (row, column)",
    "OneHot": "h = OneHot <axis = 1> (numbers, depth, offon) k = Slice (h, z, e, a)",
    "Expand-Add": "l = Expand (row, dims) m = Add (l, column) k = Sqrt (m)",
    "ConstantOfShape-NonZero": "c = ConstantOfShape <value = float[1] {2}> (dims)"
    " n = NonZero (c) g = Cast <to = 1> (n) t = Gather (g, one)"
    " k = Reshape (t, dims)",
    "EyeLike": "c = ConstantOfShape <value = float[1] {2}> (dims) k = EyeLike (c)",
    "Tril": "c = ConstantOfShape <value = float[1] {2}> (dims) k = Trilu (c)",
}


@pytest.mark.parametrize("name", GROWING)
def test_what_expands_a_constant_stays(name: str, tmp_path: Path) -> None:
    """1000 x 1000 floats: the file would be 4 MB."""
    source = with_weights(
        model_of(f"""
        agraph (float[N,1,1] x) => (float[N,?,?] y) {{
            {GROWING[name]}
            y = Mul (x, k)
        }}"""),
        dims=np.array([1000, 1000]),
        row=np.abs(normal(1, 1000)),
        column=np.abs(normal(1000, 1)),
        many=np.array([1000, 1]),
        zero=np.array(0),
        most=np.array(1_000_000),
        one=np.array(1),
        pads=np.array([0, 0, 999, 0]),
        numbers=np.arange(1000),
        depth=np.array([1001]),
        offon=np.array([0, 1], dtype=np.float32),
        z=np.array([0]),
        e=np.array([1000]),
        a=np.array([1]),
    )
    feeds = [{"x": normal(n, 1, 1)} for n in (2, 1)]
    made = simplified(source, feeds=feeds)
    assert made.ByteSize() <= 1.02 * source.ByteSize()
    onnx.save(source, tmp_path / "in.onnx")
    onnxopt.simplify(tmp_path / "in.onnx", validate=False).save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size <= made.ByteSize() + 100


def test_small_ones_are_computed() -> None:
    source = model_of("""
        agraph (float[N,2,3] x) => (float[N,2,3] y) <int64[2] dims = {2, 3}> {
            k = ConstantOfShape <value = float[1] {2}> (dims)
            y = Mul (x, k)
        }""")
    assert ops(simplified(source)) == ["Mul"]


def test_many_small_folds_have_one_budget() -> None:
    """5000 times 240 bytes: 1.2 MB together, each small enough."""
    count = 5000
    source = model_of("""
        agraph (float[60] x) => (float[60] y) <int64[1] dims = {60}> { y = Neg (x) }""")
    source.graph.ClearField("node")
    for number in range(count):
        value = helper.make_tensor("v", TensorProto.FLOAT, [1], [float(number)])
        source.graph.node.append(
            make_node("ConstantOfShape", ["dims"], [f"k{number}"], value=value)
        )
        last = number == count - 1
        inputs = [f"y{number - 1}" if number else "x", f"k{number}"]
        source.graph.node.append(
            make_node("Max", inputs, ["y" if last else f"y{number}"])
        )
    made = onnxopt.simplify(source, validate=False).model
    assert made.ByteSize() <= 1_000_000
    onnx.checker.check_model(made)
    feed = support.feeds_of(source)[0]
    support.assert_same(support.run(source, feed), support.run(made, feed))


def test_weights_stored_small_stay_small() -> None:
    """As onnx's `light_*` models: every weight is a ConstantOfShape."""
    source = with_weights(
        model_of("""
        agraph (float[N,64,8,8] x) => (float[N,256,8,8] y) {
            w = ConstantOfShape <value = float[1] {0.02}> (dims)
            g = ConstantOfShape <value = float[1] {1}> (wide)
            b = ConstantOfShape <value = float[1] {0.5}> (wide)
            v = ConstantOfShape <value = float[1] {0.9}> (wide)
            c = Conv <pads = [1, 1, 1, 1]> (x, w)
            n = BatchNormalization (c, g, b, b, v)
            y = Relu (n)
        }"""),
        dims=np.array([256, 64, 3, 3]),
        wide=np.array([256]),
    )
    made = simplified(source, feeds=support.feeds_of(source, (2, 1))[:1])
    assert made.ByteSize() < 20_000
