"""Verdicts: wrong candidates are caught, equivalent ones are not, and doubts are told."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from onnxopt import runtime
from onnxopt.data import generate_feeds, input_specs, load_feeds
from onnxopt.errors import (
    InvalidModelError,
    UsageError,
    WorkerMemoryError,
    WorkerTimeoutError,
)
from onnxopt.report import Validation
from onnxopt.validation.judge import AbsentProviderError, Budget, judge
from onnxopt.validation.unrounded import unrounded


def parsed(body: str, opset: int = 17, extra: str = "") -> onnx.ModelProto:
    header = f'<ir_version: 8, opset_import: ["": {opset}{extra}]>'
    return onnx.parser.parse_model(f"{header}\n{body}")


def with_weights(model: onnx.ModelProto, **weights: np.ndarray) -> onnx.ModelProto:
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def normal(*shape: int) -> np.ndarray:
    """The same values whenever it is called for a shape."""
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


class Judge:
    """Saves two models and judges them on generated feeds, unless others are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, reference: onnx.ModelProto, candidate: onnx.ModelProto, **options: Any
    ) -> Validation:
        paths = self.folder / "reference.onnx", self.folder / "candidate.onnx"
        for model, path in zip((reference, candidate), paths, strict=True):
            onnx.save(model, path)
        inputs = input_specs(reference)
        data = options.pop("data", None)
        if data is not None:
            options["feeds"] = load_feeds(data, inputs)
        options.setdefault("feeds", generate_feeds(inputs, model=reference))
        return judge(*paths, **options)


@pytest.fixture
def judged(tmp_path: Path) -> Judge:
    return Judge(tmp_path)


def convnet() -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, a residual, pooling and a Gemm."""
    model = parsed(
        """g (float[N, 3, 12, 10] x) => (float[N, 5] y) {
          c = Conv <pads = [1, 1, 1, 1]> (x, w, cb)
          n = BatchNormalization (c, s, b, m, v)
          r = Relu (n)
          d = Conv <pads = [1, 1, 1, 1]> (r, w2)
          a = Sub (r, d)
          p = GlobalAveragePool (a)
          f = Flatten (p)
          y = Gemm (f, g, gb)
        }"""
    )
    return with_weights(
        model,
        w=normal(8, 3, 3, 3),
        cb=normal(8),
        s=1 + normal(8) / 4,
        b=normal(8),
        m=normal(8),
        v=np.abs(normal(8)) + 0.5,
        w2=normal(8, 8, 3, 3) / 6,
        g=normal(8, 5),
        gb=normal(5),
    )


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if output in n.output)


def weight(model: onnx.ModelProto, name: str) -> np.ndarray:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    return numpy_helper.to_array(tensor).copy()


def set_weight(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


# --- the same model --------------------------------------------------------------------


def test_a_model_equals_itself(judged: Judge) -> None:
    verdict = judged(convnet(), convnet(), bitwise=True)
    assert verdict.status == "passed"
    assert verdict.reason is None
    assert verdict.feeds == 8
    assert [(c.provider, c.level, c.status) for c in verdict.checks] == [
        ("cpu", "disable_all", "passed"),
        ("cpu", "enable_all", "passed"),
    ]
    (output,) = verdict.checks[0].outputs
    assert (output.max_abs.worst, output.sqnr_db.worst) == (0, None)
    assert output.top1_agreement is not None
    assert output.top1_agreement.worst == 1
    assert {d.model for d in verdict.level_differences} == {"reference", "candidate"}
    assert any("N=2" in note for note in verdict.notes)


def test_verdict_is_the_same_each_time(judged: Judge) -> None:
    model, other = convnet(), convnet()
    set_weight(other, "g", weight(other, "g") * np.float32(1.0000003))
    assert judged(model, other) == judged(model, other)


# --- wrong candidates ------------------------------------------------------------------


def swap_inputs(m: onnx.ModelProto) -> None:
    names = node(m, "a").input
    names[0], names[1] = names[1], names[0]


def drop_bias(m: onnx.ModelProto) -> None:
    del node(m, "y").input[2]


def shift_pads(m: onnx.ModelProto) -> None:
    node(m, "d").attribute[0].ints[:] = [0, 1, 2, 1]


def lose_one_bias(m: onnx.ModelProto) -> None:
    bias = weight(m, "cb")
    bias[3] *= np.float32(1.001)
    set_weight(m, "cb", bias)


def nudge_one_weight(m: onnx.ModelProto) -> None:
    weights = weight(m, "w2")
    weights[2, 5, 1, 1] += np.float32(2e-3)
    set_weight(m, "w2", weights)


def other_epsilon(m: onnx.ModelProto) -> None:
    node(m, "n").attribute.append(helper.make_attribute("epsilon", 1e-3))


def leak(m: onnx.ModelProto) -> None:
    node(m, "r").op_type = "LeakyRelu"


def flip_kernel(m: onnx.ModelProto) -> None:
    set_weight(m, "w", weight(m, "w")[:, :, ::-1])


@pytest.mark.parametrize(
    "break_it",
    [
        swap_inputs,
        drop_bias,
        shift_pads,
        lose_one_bias,
        nudge_one_weight,
        other_epsilon,
        leak,
        flip_kernel,
    ],
)
def test_wrong_rewrites_are_caught(
    judged: Judge, break_it: Callable[[onnx.ModelProto], None]
) -> None:
    model = convnet()
    wrong = copy.deepcopy(model)
    break_it(wrong)
    verdict = judged(model, wrong)
    assert verdict.status == "failed"
    assert verdict.reason is not None
    assert "output 'y' differs by" in verdict.reason
    assert {check.status for check in verdict.checks} == {"failed"}


def test_off_by_one_slice_is_a_shape_difference(judged: Judge) -> None:
    body = """g (float[N, 8] x) => (float[N, M] y)
      <int64[1] a = {1}, int64[1] b = {END}, int64[1] k = {1}> {
      y = Slice (x, a, b, k)
    }"""
    verdict = judged(parsed(body.replace("END", "7")), parsed(body.replace("END", "8")))
    assert verdict.status == "failed"
    assert "has shape [2, 7], not [2, 6] on feed 0" in (verdict.reason or "")


def test_error_on_one_feed_only(judged: Judge) -> None:
    """Log of what is negative on one feed alone."""
    model = parsed("g (float[N] x) => (float[N] y) { a = Abs (x) \n y = Sqrt (a) }")
    wrong = parsed("g (float[N] x) => (float[N] y) { a = Identity (x) \n y = Sqrt (a) }")
    feeds = [{"x": np.full(3, i, np.float32)} for i in (1, 2, -3, 4)]
    verdict = judged(model, wrong, data=feeds)
    assert verdict.status == "failed"
    assert "3 elements are NaN or Inf on feed 2" in (verdict.reason or "")


def test_error_at_batch_above_one(judged: Judge) -> None:
    model = parsed("g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }")
    wrong = parsed(
        """g (float[N, 4] x) => (float[N, 4] y) <int64 z = {0}, int64[1] u = {0}> {
          f = Gather (x, z)
          e = Unsqueeze (f, u)
          s = Shape (x)
          t = Expand (e, s)
          y = Relu (t)
        }"""
    )
    ones = [{"x": normal(1, 4)} for _ in range(3)]
    assert judged(model, wrong, data=ones).status == "passed"
    assert judged(model, wrong).status == "failed"


def test_stale_shape_fails_to_run(judged: Judge) -> None:
    body = """g (float[N, 4] x) => (float[M, 2] y) <int64[2] s = {ROWS, 2}> {
      y = Reshape (x, s)
    }"""
    model, wrong = parsed(body.replace("ROWS", "-1")), parsed(body.replace("ROWS", "2"))
    verdict = judged(model, wrong)
    assert verdict.status == "failed"
    assert "the candidate fails on feed 0" in (verdict.reason or "")


def test_small_channel_beside_a_large_one(judged: Judge) -> None:
    """An error far below rtol of the largest value, and all of a channel's own."""
    body = """g (float[N, 16, 16] x) => (float[N, 2, 16, 16] y)
      <int64[1] one = {1}, float big = {1000000}, float small = {FACTOR}> {
        a = Unsqueeze (x, one)
        b = Mul (a, big)
        c = Mul (a, small)
        y = Concat <axis = 1> (b, c)
      }"""
    model, wrong = (parsed(body.replace("FACTOR", f)) for f in ("1.0", "1.25"))
    verdict = judged(model, wrong)
    assert verdict.status == "failed"
    assert "at index 1 of axis 1" in (verdict.reason or "")


def test_missing_output_and_wrong_dtype(judged: Judge) -> None:
    model = parsed("g (float[N] x) => (float[N] y) { y = Neg (x) }")
    other = parsed("g (float[N] x) => (float[N] z) { z = Neg (x) }")
    assert "has no output 'y'" in (judged(model, other).reason or "")
    cast = parsed(
        "g (float[N] x) => (double[N] y) { a = Neg (x) \n y = Cast <to = 11> (a) }"
    )
    assert "has dtype float64, not float32" in (judged(model, cast).reason or "")


def test_candidate_that_cannot_be_loaded(judged: Judge) -> None:
    model = parsed("g (float[N] x) => (float[N] y) { y = Neg (x) }")
    broken = parsed("g (float[N] x) => (float[N] y) { y = NoSuchOp (x) }")
    verdict = judged(model, broken)
    assert verdict.status == "failed"
    assert "the candidate cannot be loaded" in (verdict.reason or "")
    verdict = judged(model, broken, lossy=True)
    assert verdict.status == "not_run"


def test_bitwise_holds_to_equality(judged: Judge) -> None:
    model = parsed("g (float[N] x) => (float[N] y) <float c = {3}> { y = Div (x, c) }")
    near = parsed(
        "g (float[N] x) => (float[N] y) <float c = {0.33333334}> { y = Mul (x, c) }"
    )
    feeds = [{"x": normal(100)}]
    assert judged(model, near, data=feeds).status == "passed"
    verdict = judged(model, near, data=feeds, bitwise=True)
    assert [check.status for check in verdict.checks] == ["failed", "passed"]
    assert "elements are not equal" in (verdict.reason or "")


def test_nan_has_to_pass_through_a_bitwise_rewrite(judged: Judge) -> None:
    model = parsed("g (float[N] x) => (float[N] y) <float z = {0}> { y = Mul (x, z) }")
    folded = parsed("g (float[N] x) => (float[N] y) { y = Sub (x, x) }")
    assert judged(model, folded, bitwise=True).status == "passed"
    zero = parsed(
        "g (float[N] x) => (float[N] y) { s = Shape (x) \n y = ConstantOfShape (s) }"
    )
    verdict = judged(model, zero, bitwise=True)
    assert verdict.status == "failed"
    assert "hard case 'nan'" in (verdict.reason or "")


# --- equivalent candidates -------------------------------------------------------------


def fold_batch_norm(m: onnx.ModelProto) -> None:
    s, b, mean, var = (weight(m, n).astype(np.float64) for n in ("s", "b", "m", "v"))
    factor = s / np.sqrt(var + 1e-5)
    w, cb = weight(m, "w"), weight(m, "cb")
    set_weight(m, "w", (w * factor[:, None, None, None]).astype(np.float32))
    set_weight(m, "cb", ((cb - mean) * factor + b).astype(np.float32))
    node(m, "r").input[0] = "c"
    m.graph.node.remove(node(m, "n"))


def permute_channels(m: onnx.ModelProto) -> None:
    """Another order of the same sum."""
    order = np.array([3, 1, 7, 0, 5, 2, 6, 4])
    set_weight(m, "w2", np.ascontiguousarray(weight(m, "w2")[:, order]))
    m.graph.initializer.append(numpy_helper.from_array(order, "order"))
    gather = helper.make_node("Gather", ["r", "order"], ["shuffled"], axis=1)
    m.graph.node.insert(3, gather)
    node(m, "d").input[0] = "shuffled"


def scale_and_back(m: onnx.ModelProto) -> None:
    set_weight(m, "g", weight(m, "g") * np.float32(3))
    set_weight(m, "gb", weight(m, "gb") * np.float32(3))
    m.graph.initializer.append(numpy_helper.from_array(np.float32(3), "three"))
    node(m, "y").output[0] = "tripled"
    m.graph.node.append(helper.make_node("Div", ["tripled", "three"], ["y"]))


@pytest.mark.parametrize("rewrite", [fold_batch_norm, permute_channels, scale_and_back])
def test_equivalent_rewrites_pass(
    judged: Judge, rewrite: Callable[[onnx.ModelProto], None]
) -> None:
    model = convnet()
    other = copy.deepcopy(model)
    rewrite(other)
    verdict = judged(model, other)
    assert verdict.status == "passed", verdict.reason
    assert verdict.checks[0].outputs[0].max_abs.worst != 0


def chaotic() -> onnx.ModelProto:
    """A long logistic map: rounding grows to a part in a thousand of the output."""
    steps = "\n".join(
        f"m{i} = Mul (z{i}, r) \n o{i} = Sub (one, z{i}) \n z{i + 1} = Mul (m{i}, o{i})"
        for i in range(18)
    )
    return parsed(
        f"""g (float[N, 8] x) => (float[N, 8] y)
          <float r = {{3.9}}, float one = {{1}}> {{
          z0 = Sigmoid (x)
          {steps}
          y = Identity (z18)
        }}"""
    )


def test_bound_follows_the_models_own_noise(judged: Judge) -> None:
    model, other = chaotic(), chaotic()
    node(other, "m0").input[:] = ["r", "z0"]
    node(other, "z1").input[:] = ["z0", "q"]
    node(other, "z1").op_type = "Mul"
    other.graph.node.insert(3, helper.make_node("Mul", ["r", "o0"], ["q"]))
    verdict = judged(model, other)
    assert verdict.status == "passed", verdict.reason
    bounds = [output.bound for check in verdict.checks for output in check.outputs]
    assert all(bound is not None and bound > 1e-5 for bound in bounds)
    node(other, "z1").input[0] = "o0"
    assert judged(model, other).status == "failed"


def quantized(scale: float = 0.05) -> onnx.ModelProto:
    """Q-DQ around two Gemms: a code that flips moves the output by a whole step."""
    model = parsed(
        f"""g (float[N, 32] x) => (float[N, 32] y)
          <float s = {{0.03}}, float t = {{{scale}}}, uint8 z = {{128}}> {{
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          a = MatMul (d, w)
          r = Relu (a)
          q2 = QuantizeLinear (r, t, z)
          d2 = DequantizeLinear (q2, t, z)
          y = MatMul (d2, v)
        }}"""
    )
    random = np.random.default_rng(3)
    w, v = random.standard_normal((2, 32, 32)).astype(np.float32) / 6
    return with_weights(model, w=w, v=v)


def test_flipped_codes_are_noise_on_quantized_models(judged: Judge) -> None:
    """(x W) (c / c) in another order: a few codes flip."""
    model, other = quantized(), quantized()
    set_weight(other, "w", weight(other, "w") * np.float32(3))
    other.graph.initializer.append(numpy_helper.from_array(np.float32(3), "three"))
    node(other, "r").input[0] = "back"
    other.graph.node.insert(3, helper.make_node("Div", ["a", "three"], ["back"]))
    feeds = [{"x": normal(512, 32)} for _ in range(4)]
    verdict = judged(model, other, data=feeds)
    assert verdict.status == "passed", verdict.reason


@pytest.mark.parametrize("wrong", ["scale", "zero point", "order"])
def test_wrong_rewrites_of_quantized_models(judged: Judge, wrong: str) -> None:
    model, other = quantized(), quantized()
    if wrong == "scale":
        other = quantized(0.0505)
    elif wrong == "zero point":
        other.graph.initializer.append(numpy_helper.from_array(np.uint8(129), "z1"))
        node(other, "d2").input[2] = "z1"
    else:
        set_weight(other, "v", np.ascontiguousarray(weight(other, "v").T))
    assert judged(model, other).status == "failed"


def test_small_errors_do_not_hide_among_flipped_codes(judged: Judge) -> None:
    """A part in a thousand off, in front of a rounding: few codes flip, as by noise."""
    model, other = quantized(), quantized()
    w = weight(other, "w")
    w[:, 5] *= np.float32(1.001)
    set_weight(other, "w", w)
    verdict = judged(model, other, data=[{"x": normal(512, 32)} for _ in range(4)])
    assert verdict.status == "failed"
    told = {check.provider: check.status for check in verdict.checks}
    assert told == {"cpu": "passed", "cpu without rounding of codes": "failed"}


def test_unrounded_keeps_scales_and_saturation() -> None:
    smooth = unrounded(quantized())
    assert smooth is not None
    assert not {"QuantizeLinear", "DequantizeLinear"} & {
        n.op_type for n in smooth.graph.node
    }
    x = normal(64, 32) * np.float32(2)
    with runtime.Worker() as worker:
        found = worker.load(smooth.SerializeToString()).run({"x": x})["y"]
    w, v = weight(smooth, "w"), weight(smooth, "v")
    inner = np.clip(x, -128 * 0.03, 127 * 0.03) @ w
    expected = np.clip(np.maximum(inner, 0), -128 * 0.05, 127 * 0.05) @ v
    assert np.abs(x).max() > 128 * 0.03
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "body",
    [
        "g (float[4] x) => (float[4] y) { y = Relu (x) }",
        """g (float[4] x) => (uint8[4] y) <float s = {1}, uint8 z = {0}> {
          y = QuantizeLinear (x, s, z)
        }""",
        """g (float[4] x) => (float[4] y) <float s = {1}, uint8 z = {0}> {
          q = QuantizeLinear (x, s, z)
          c = Cast <to = 1> (q)
          d = DequantizeLinear (q, s, z)
          y = Add (c, d)
        }""",
        """g (float[4] x) => (float[4] y) {
          q, s, z = DynamicQuantizeLinear (x)
          y = DequantizeLinear (q, s, z)
        }""",
    ],
)
def test_unrounded_declines(body: str) -> None:
    assert unrounded(parsed(body)) is None


def test_indices_may_differ_in_ties_only(judged: Judge) -> None:
    """Integers in, so that no moved input shows that the index hangs on rounding."""
    body = """g (int64[N, 1] i) => (int64[N] k)
      <float c = {3}, float third = {0.33333334}> {
      x = Cast <to = 1> (i)
      BODY
      e = Mul (d, c)
      p = Concat <axis = 1> (x, e, d)
      k = ArgMax <axis = 1, keepdims = 0> (p)
    }"""
    model = parsed(body.replace("BODY", "d = Div (x, c)"))
    other = parsed(body.replace("BODY", "d = Mul (x, third)"))
    x = np.arange(1, 200, dtype=np.float32)
    up = x * np.float32(0.33333334) * np.float32(3) > x
    assert up.any()
    assert (x / np.float32(3) * np.float32(3) <= x).all()
    feeds = [{"i": np.arange(1, 200)[:, None]}]
    verdict = judged(model, other, data=feeds)
    assert verdict.status == "passed", verdict.reason
    assert any("ties only" in note for note in verdict.notes)
    least = body.replace("ArgMax", "ArgMin").replace("BODY", "d = Div (x, c)")
    verdict = judged(model, parsed(least), data=feeds)
    assert verdict.status == "failed"
    assert "elements are not equal" in (verdict.reason or "")


def test_indices_may_change_where_rounding_changes_them(judged: Judge) -> None:
    body = """g (float[N, 4] x) => (int64[N, 2] i, float[N, 2] v)
      <float c = {3}, float third = {0.33333334}, int64[1] two = {2}> {
      BODY
      v, i = TopK (p, two)
    }"""
    model = parsed(body.replace("BODY", "p = Div (x, c)"))
    other = parsed(body.replace("BODY", "p = Mul (x, third)"))
    a = np.linspace(1, 2, 500, dtype=np.float32)
    b = np.nextafter(a, np.float32(4))
    x = np.stack([a, b, b, a], axis=1)
    assert judged(model, other, data=[{"x": x}]).status == "passed"
    wrong = parsed(body.replace("BODY", "n = Neg (x) \n p = Div (n, c)"))
    assert judged(model, wrong, data=[{"x": x}]).status == "failed"


# --- kinds of values and models --------------------------------------------------------


def test_strings_sequences_optionals_and_integers(judged: Judge) -> None:
    body = """g (string[N] t, float[N] x, optional(float[2]) o)
      => (string[N] t2, seq(float[N]) s, bool has, int64[1] n) {
      t2 = Identity (t)
      s = SequenceConstruct (x, SECOND)
      has = OptionalHasElement (o)
      n = Shape (x)
    }"""
    model = parsed(body.replace("SECOND", "x"))
    assert judged(model, copy.deepcopy(model), bitwise=True).status == "passed"
    wrong = parsed(
        body.replace("SECOND", "e").replace("s = Seq", "e = Exp (x)\n s = Seq")
    )
    assert "output 's' differs" in (judged(model, wrong).reason or "")
    longer = parsed(body.replace("(x, SECOND)", "(x, x, x)"))
    assert "holds 3 arrays" in (judged(model, longer).reason or "")
    texts = copy.deepcopy(model)
    node(texts, "t2").CopyFrom(helper.make_node("Cast", ["x"], ["t2"], to=8))
    assert "output 't2'" in (judged(model, texts).reason or "")


def test_random_model_is_neither_right_nor_wrong(judged: Judge) -> None:
    model = parsed(
        "g (float[N] x) => (float[N] y) { r = RandomNormalLike (x) \n y = Add (x, r) }"
    )
    verdict = judged(model, copy.deepcopy(model))
    assert verdict.status == "not_run"
    assert "gives other values when run again" in (verdict.reason or "")


def test_vacuous_outputs_are_told(judged: Judge) -> None:
    model = parsed(
        """g (float[4] x) => (float[4] y) <float z = {0}> {
          m = Min (x, z)
          y = Relu (m)
        }"""
    )
    verdict = judged(model, copy.deepcopy(model))
    assert any("same values on all feeds" in note for note in verdict.notes)
    model = parsed("g (float[4] x) => (float[4] y) <float z = {0}> { y = Div (x, z) }")
    verdict = judged(model, copy.deepcopy(model))
    assert any("holds NaN or Inf in the reference" in note for note in verdict.notes)


def test_reference_that_cannot_run_anywhere(judged: Judge) -> None:
    model = parsed(
        "g (float[N] x) => (float[N] y) { y = own.Op (x) }", extra=', "own": 1'
    )
    verdict = judged(model, copy.deepcopy(model))
    assert verdict.status == "not_run"
    assert "reference" in (verdict.reason or "")
    assert "own:Op" in (verdict.reason or "")


def test_feeds_the_reference_rejects_count_for_nothing(judged: Judge) -> None:
    model = parsed(
        "g (float[N] x) => (float[2, M] y) <int64[2] s = {2, -1}> { y = Reshape (x, s) }"
    )
    feeds = [{"x": normal(n)} for n in (3, 4, 5)]
    verdict = judged(model, copy.deepcopy(model), data=feeds)
    assert (verdict.status, verdict.feeds) == ("passed", 1)
    assert any("rejected 2 feeds" in note for note in verdict.notes)
    verdict = judged(model, copy.deepcopy(model), data=feeds[:1])
    assert verdict.status == "not_run"
    assert "no feed was accepted" in (verdict.reason or "")


def test_sizes_that_run_are_found(judged: Judge) -> None:
    """Dims that are tied without saying so, and must be a multiple of 32."""
    model = parsed(
        """g (float[A, P] x, float[B, Q] w) => (float[M, 32] y) <int64[2] s = {-1, 32}> {
          t = Add (x, w)
          y = Reshape (t, s)
        }"""
    )
    verdict = judged(model, copy.deepcopy(model))
    assert verdict.status == "passed", verdict.reason
    assert verdict.feeds == 8


def test_half_precision_has_its_own_bound(judged: Judge) -> None:
    body = """g (float[N, 64] x) => (float[N, 8] y) {
      h = Cast <to = 10> (x)
      m = MatMul (h, w)
      y = Cast <to = 1> (m)
    }"""
    w = normal(64, 8).astype(np.float16)
    model = with_weights(parsed(body), w=w)
    order = np.random.default_rng(0).permutation(64)
    other = with_weights(parsed(body), w=w[order], order=order)
    other.graph.node.insert(1, helper.make_node("Gather", ["h", "order"], ["g"], axis=1))
    node(other, "m").input[0] = "g"
    assert judged(model, other).status == "passed"
    assert judged(model, with_weights(parsed(body), w=w * np.float16(1.02))).status == (
        "failed"
    )


def test_models_with_external_data(judged: Judge, tmp_path: Path) -> None:
    model = convnet()
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    wrong = copy.deepcopy(model)
    lose_one_bias(wrong)
    for path, which in zip(paths, (model, wrong), strict=True):
        onnx.save(
            copy.deepcopy(which),
            path,
            save_as_external_data=True,
            location=f"{path.stem}.data",
            size_threshold=0,
        )
    feeds = generate_feeds(input_specs(model), model=model)
    assert judge(paths[0], paths[0], feeds=feeds).status == "passed"
    assert judge(*paths, feeds=feeds).status == "failed"


# --- budgets ---------------------------------------------------------------------------


def noisy(part: float) -> onnx.ModelProto:
    model = convnet_fixed()
    g = weight(model, "g")
    noise = np.random.default_rng(1).standard_normal(g.shape).astype(np.float32)
    set_weight(model, "g", g + np.float32(part) * noise)
    return model


def convnet_fixed() -> onnx.ModelProto:
    model = convnet()
    random = np.random.default_rng(5)
    for tensor in model.graph.initializer:
        shape = tuple(tensor.dims)
        array = np.abs(random.standard_normal(shape)).astype(np.float32) + 0.1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


@pytest.mark.parametrize(
    ("budget", "part", "status"),
    [
        (None, 0.001, "passed"),
        (None, 3.0, "failed"),
        (Budget(min_sqnr=20), 0.001, "passed"),
        (Budget(min_sqnr=90), 0.001, "failed"),
        (Budget(rtol=0.05), 0.001, "passed"),
        (Budget(rtol=1e-5), 0.001, "failed"),
        (Budget(atol=1e6), 0.001, "passed"),
        (Budget(rtol=0.05, min_sqnr=90), 0.001, "failed"),
    ],
)
def test_budgets(judged: Judge, budget: Budget | None, part: float, status: str) -> None:
    verdict = judged(convnet_fixed(), noisy(part), budget=budget, lossy=True)
    assert verdict.status == status, verdict.reason
    if status == "failed":
        assert verdict.reason


def test_lossy_result_must_be_finite(judged: Judge) -> None:
    model = parsed("g (float[N] x) => (float[N] y) { y = Exp (x) }")
    wrong = parsed("g (float[N] x) => (float[N] y) <float k = {1e6}> "
                   "{ m = Mul (x, k) \n y = Exp (m) }")  # fmt: skip
    verdict = judged(model, wrong, lossy=True)
    assert "NaN or Inf" in (verdict.reason or "")


def test_task_metric(judged: Judge, tmp_path: Path) -> None:
    script = tmp_path / "task.py"
    script.write_text(
        "import numpy as np\n"
        "def score(run):\n"
        "    return run({'x': np.ones((1, 4), np.float32)})['y'].sum()\n"
        "def broken(run):\n"
        "    return 1 / 0\n"
    )
    model = parsed("g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }")
    half = parsed(
        "g (float[N, 4] x) => (float[N, 4] y) <float h = {0.5}> { y = Mul (x, h) }"
    )
    metric = f"{script}:score"
    verdict = judged(model, half, budget=Budget(metric=metric, max_drop=1.5), lossy=True)
    assert verdict.status == "failed"
    assert "reference 4, candidate 2 (may drop by 1.5)" in (verdict.reason or "")
    verdict = judged(model, half, budget=Budget(metric=metric, max_drop=2.5), lossy=True)
    assert verdict.status == "passed"
    assert any("reference 4, candidate 2" in note for note in verdict.notes)
    with pytest.raises(UsageError, match="broken raised ZeroDivisionError"):
        judged(model, half, budget=Budget(metric=f"{script}:broken"))
    with pytest.raises(UsageError, match="no function 'absent'"):
        judged(model, half, budget=Budget(metric=f"{script}:absent"))
    with pytest.raises(UsageError, match="--max-drop needs --metric"):
        judged(model, half, budget=Budget(max_drop=1))


# --- providers and workers -------------------------------------------------------------


def absent_provider() -> str:
    names = ("QNNExecutionProvider", "RknpuExecutionProvider")
    return next(name for name in names if name not in runtime.available_providers())


def test_absent_provider_is_not_run(judged: Judge) -> None:
    model, absent = convnet(), absent_provider()
    verdict = judged(model, model, providers=["cpu", absent])
    assert verdict.status == "passed"
    told = [(c.provider, c.status) for c in verdict.checks]
    assert told.count((absent, "not_run")) == 2
    reasons = [c.reason or "" for c in verdict.checks if c.provider == absent]
    assert all(f"{absent} asked for but not used" in reason for reason in reasons)


@pytest.mark.parametrize(
    "options", [{"providers": ["ABSENT"]}, {"providers": ["cpu"], "required": ["ABSENT"]}]
)
def test_required_or_only_provider_absent(judged: Judge, options: dict) -> None:
    model, absent = convnet(), absent_provider()
    named = {k: [absent if p == "ABSENT" else p for p in v] for k, v in options.items()}
    with pytest.raises(AbsentProviderError) as caught:
        judged(model, model, **named)
    assert absent in str(caught.value)
    assert caught.value.exit_code == 4
    assert caught.value.validation.status == "not_run"


def test_other_providers_are_compared_with_the_cpu(judged: Judge) -> None:
    """Azure's is listed by every CPU build, and leaves its nodes to the CPU."""
    if "AzureExecutionProvider" not in runtime.available_providers():
        pytest.skip("this onnxruntime has the CPU's provider only")
    model = convnet()
    verdict = judged(model, model, providers=["AzureExecutionProvider"])
    names = [check.provider for check in verdict.checks]
    assert names == ["AzureExecutionProvider", "AzureExecutionProvider against cpu"] * 2
    wrong = copy.deepcopy(model)
    drop_bias(wrong)
    verdict = judged(model, wrong, providers=["AzureExecutionProvider"])
    assert {check.status for check in verdict.checks} == {"failed"}


SPIN = """g (float[N] x) => (float[M] y) <int64 n = {COUNT}, bool c = {1}> {
  y = Loop (n, c, x) <body = b (int64 i, bool cc, float[p] v) => (bool co, float[q] w) {
    co = Identity (cc)
    w = STEP
  }>
}"""
QUICK = SPIN.replace("COUNT", "1").replace("STEP", "Identity (v)")


def test_candidate_that_hangs(judged: Judge) -> None:
    hang = parsed(SPIN.replace("COUNT", str(2**60)).replace("STEP", "Identity (v)"))
    with pytest.raises(WorkerTimeoutError, match="candidate: the worker gave no answer"):
        judged(parsed(QUICK), hang, timeout=2.0)


def test_memory_of_candidate_and_reference(judged: Judge) -> None:
    grow = parsed(SPIN.replace("COUNT", "40").replace("STEP", "Concat <axis = 0> (v, v)"))
    with pytest.raises(WorkerMemoryError, match="candidate"):
        judged(parsed(QUICK), grow, memory_limit=1 << 29)
    verdict = judged(grow, grow, memory_limit=1 << 29)
    assert verdict.status == "not_run"
    assert "reference" in (verdict.reason or "")
    assert "memory" in (verdict.reason or "")


def test_not_an_onnx_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\xff\xff")
    with pytest.raises(InvalidModelError, match=r"bad\.onnx"):
        judge(bad, bad, feeds=generate_feeds([]))


def test_interrupt_leaves_no_worker(
    judged: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = []
    start = runtime._start

    def recorded(*arguments: Any) -> Any:
        popen = start(*arguments)
        pids.append(popen.pid)
        return popen

    monkeypatch.setattr(runtime, "_start", recorded)
    hang = parsed(SPIN.replace("COUNT", str(2**60)).replace("STEP", "Identity (v)"))
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        judged(hang, hang)
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# --- on a GPU --------------------------------------------------------------------------


@pytest.mark.cuda
def test_cuda_equivalent_and_wrong_rewrites(judged: Judge) -> None:
    model, folded, wrong = convnet(), convnet(), convnet()
    fold_batch_norm(folded)
    drop_bias(wrong)
    providers = ["cpu", "cuda"]
    verdict = judged(model, folded, providers=providers)
    assert verdict.status == "passed", verdict.reason
    names = {check.provider for check in verdict.checks}
    assert names == {"cpu", "cuda", "cuda against cpu"}
    verdict = judged(model, wrong, providers=providers)
    assert {check.status for check in verdict.checks} == {"failed"}
