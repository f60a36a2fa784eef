"""Channels near zero: `--tolerance` makes of them what exact zeros would have been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from onnx.numpy_helper import from_array, to_array
from onnx.printer import to_text

import onnxopt
from onnxopt.cli import cli
from onnxopt.errors import UsageError, ValidationError
from onnxopt.manager import Context
from tests import support

TINY = 1e-7
PIPELINE = "dead-layers,zero-channels"
ROUND = "round-to-zero{tolerance=1e-5}," + PIPELINE

LAYERS = {
    # name: body, dims of W, (axis, index) of what is near zero
    "conv": ("t = Conv <pads=[1,1,1,1]> (x, W)", "4,4,3,3", [(0, 1), (0, 3)]),
    "grouped": ("t = Conv <group=2> (x, W)", "4,2,1,1", [(0, 0), (0, 2)]),
    "depthwise": ("t = Conv <group=4> (x, W)", "4,1,3,3", [(0, 2)]),
    "transposed": ("t = ConvTranspose (x, W)", "4,4,2,2", [(1, 1), (1, 2)]),
    "grouped-transposed": (
        "t = ConvTranspose <group=2> (x, W)",
        "4,2,2,2",
        [(1, 0)],
    ),
}
FLAT = {
    "gemm": ("t = Gemm <alpha=2.0> (x, W)", "4,4", [(1, 1), (1, 2)]),
    "gemm-turned": ("t = Gemm <transB=1> (x, W)", "4,4", [(0, 1)]),
    "matmul": ("t = MatMul (x, W)", "4,4", [(1, 0)]),
}


def layer_model(kind: str) -> ModelProto:
    """A layer W behind one, P, and before another, V."""
    if kind in LAYERS:
        body, dims, _ = LAYERS[kind]
        return _filled(
            f"""main (float[N,3,6,6] i) => (float[N,A,B,C] y)
            <float[4,3,1,1] P = {{}}, float[{dims}] W = {{}}, float[2,4,1,1] V = {{}}> {{
               p = Conv (i, P)
               x = Relu (p)
               {body}
               r = Tanh (t)
               y = Conv (r, V)
            }}"""
        )
    body, dims, _ = FLAT[kind]
    return _filled(
        f"""main (float[N,3] i) => (float[N,A] y)
        <float[3,4] P = {{}}, float[{dims}] W = {{}}, float[4,2] V = {{}}> {{
           p = Gemm (i, P)
           x = Relu (p)
           {body}
           r = Tanh (t)
           y = Gemm (r, V)
        }}"""
    )


def _filled(body: str) -> ModelProto:
    model = support.model_of(body)
    for name in ("P", "W", "V"):
        support.randomize(model, name)
    return model


def scaled(
    model: ModelProto, name: str, places: list[tuple[int, int]], by: float
) -> None:
    """Multiply slices of a weight by a factor; 0 makes zeros without a sign."""
    tensor = support.find_tensor(model, name)
    array = to_array(tensor).copy()
    for axis, index in places:
        array[(slice(None),) * axis + (index,)] *= by
    array[array == 0] = 0
    tensor.CopyFrom(from_array(array, name))


@pytest.fixture
def run(context: Context) -> Callable[[ModelProto, str], ModelProto]:
    """The model after a pipeline."""
    return lambda source, text: support.final(support.run_passes(source, text, context))


@pytest.mark.parametrize("kind", [*LAYERS, *FLAT])
@pytest.mark.parametrize("inputs", [False, True])
def test_near_zero_is_as_zero(
    run: Callable[[ModelProto, str], ModelProto], kind: str, inputs: bool
) -> None:
    """Output channels, or what reads them: the result is that of exact zeros."""
    *_, places = {**LAYERS, **FLAT}[kind]
    name = "W"
    if inputs:
        name, places = "V", [(1 if kind in LAYERS else 0, 2)]
    near, exact = layer_model(kind), layer_model(kind)
    scaled(near, name, places, TINY)
    scaled(exact, name, places, 0.0)
    made = run(near, ROUND)
    assert to_text(made) == to_text(run(exact, PIPELINE))
    if not kind.startswith("grouped"):  # there groups have to stay equal
        assert made.ByteSize() < near.ByteSize()
    assert run(made, ROUND).SerializeToString() == made.SerializeToString()
    for feed in support.feeds_of(near, (2,)):
        support.assert_same(
            support.run(near, feed), support.run(made, feed), "equivalent"
        )


@pytest.mark.parametrize("kind", [*LAYERS, *FLAT])
def test_without_a_tolerance_nothing_is_near_zero(
    run: Callable[[ModelProto, str], ModelProto], kind: str
) -> None:
    *_, places = {**LAYERS, **FLAT}[kind]
    near = layer_model(kind)
    scaled(near, "W", places, TINY)
    made = run(near, f"round-to-zero,{PIPELINE}")
    assert made.SerializeToString() == near.SerializeToString()


NORMED = """main (float[N,2,4,4] x) => (float[N,A,B,C] y)
<float[3,2,1,1] W = {1,2, -1,1, 2,3}, float[3] b = {0.1,0.2,0.3}, float[3] g = {1,1,1},
 float[3] e = {0.5,0,0}, float[3] m = {0,0.2,0}, float[3] v = {1,1,1},
 float[2,3,3,3] V = {}> {
   t = Conv (x, W, b)
   u = BatchNormalization (t, g, e, m, v)
   r = Relu (u)
   y = Conv (r, V)
}"""


def normed(**values: list[float]) -> ModelProto:
    model = support.model_of(NORMED)
    support.randomize(model, "V")
    for name, items in values.items():
        tensor = support.find_tensor(model, name)
        shape = list(tensor.dims)
        tensor.CopyFrom(from_array(np.array(items, np.float32).reshape(shape), name))
    return model


def channels(model: ModelProto) -> int:
    return int(support.find_tensor(model, "W").dims[0])


@pytest.mark.parametrize(
    ("values", "left"),
    [
        # a scale and a shift near zero, over a filter that is not
        ({"g": [1, 1e-6, 1], "e": [0.5, -1e-6, 0]}, 2),
        # the shift is not: the channel is constant, and negative before a Relu
        ({"g": [1, 1e-6, 1], "e": [0.5, -2, 0]}, 2),
        # a filter near zero, whose bias is taken off by the mean
        ({"W": [1, 2, 1e-7, -1e-7, 2, 3]}, 2),
        # the same, as small as its variance: it is no less than any other
        ({"W": [1, 2, 1e-5, -1e-5, 2, 3], "v": [1, 1e-11, 1]}, 3),
        # a scale is not near zero by being smaller than the others
        ({"g": [1, 2e-5, 1]}, 3),
    ],
    ids=["scale", "constant", "filter", "small-variance", "above"],
)
def test_batch_normalization(
    run: Callable[[ModelProto, str], ModelProto],
    values: dict[str, list[float]],
    left: int,
) -> None:
    source = normed(**values)
    made = run(source, ROUND)
    assert channels(made) == left
    assert channels(run(source, PIPELINE)) == 3
    for feed in support.feeds_of(source, (2,)):
        for one, two in zip(
            support.run(source, feed), support.run(made, feed), strict=True
        ):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-3)


def test_quantized_weights(run: Callable[[ModelProto, str], ModelProto]) -> None:
    """A channel whose scale has become next to nothing, whatever its codes."""
    text = """main (float[N,2,4,4] x) => (float[N,A,B,C] y)
    <int8[3,2,1,1] W = {{1,2, -100,50, 2,3}}, float[3] s = {{0.1,{scale},0.2}},
     int8[3] z = {{0,1,0}}, float[2,3,1,1] V = {{1,2,3,4,5,6}}> {{
       w = DequantizeLinear <axis = 0> (W, s, z)
       t = Conv (x, w)
       r = Relu (t)
       y = Conv (r, V)
    }}"""
    assert channels(run(support.model_of(text.format(scale="1e-8")), ROUND)) == 2
    assert channels(run(support.model_of(text.format(scale="1e-3")), ROUND)) == 3


def test_shared_weights_stay(context: Context) -> None:
    source = support.model_of(
        """main (float[N,2] x) => (float[N,A] y)
        <float[2,2] W = {1,1e-9,2,1e-9}> {
           t = Gemm (x, W)
           y = Gemm (t, W)
        }"""
    )
    model = support.run_passes(source, "round-to-zero{tolerance=1e-5}", context)
    assert not model.ledger.edits
    reason = "what is near zero in 'W' stays: it is computed, or others read it"
    assert {skip.reason for skip in support.skips(model)} == {reason}


# ---- the verb ----


def test_the_report_says_what_was_taken_as_zero() -> None:
    result = onnxopt.shrink(normed(g=[1, 1e-6, 1]), tolerance=1e-5)
    assert result.report.notes == [
        "taken as zero in BatchNormalization:u: 1 channels near zero, at most 1e-06 in "
        "magnitude"
    ]
    (entry,) = (p for p in result.report.passes if p.name == "round-to-zero")
    assert (entry.guarantee, entry.edits) == ("lossy", 1)
    assert result.report.validation is not None
    assert "lossy" in result.report.validation.judged_by
    assert channels(result.model) == 2


def test_the_report_counts_biases_among_what_was_taken_as_zero() -> None:
    model = support.model_of(
        """main (float[N,2] x) => (float[N,A] y)
        <float[2,3] W = {1,0,2, 3,0,4}, float[3] b = {1,2e-6,3}, float[3,2] V = {}> {
           t = Gemm (x, W, b)
           y = Gemm (t, V)
        }"""
    )
    support.randomize(model, "V")
    result = onnxopt.shrink(model, tolerance=1e-5)
    assert result.report.notes == [
        "taken as zero in Gemm:t: a bias near zero, at most 2e-06 in magnitude"
    ]


def test_a_bias_counts_as_what_a_gemm_makes_of_it(context: Context) -> None:
    """Its beta makes it larger, or smaller, than the tolerance."""
    for beta, edits in ((1.0, 1), (1e6, 0)):
        model = support.model_of(
            f"""main (float[N,2] x) => (float[N,A] y)
            <float[2,3] W = {{1,0,2, 3,0,4}}, float[3] b = {{1,2e-6,3}}> {{
               y = Gemm <beta: float = {beta}> (x, W, b)
            }}"""
        )
        made = support.run_passes(model, "round-to-zero{tolerance=1e-5}", context)
        assert made.ledger.edits == edits


def test_the_budget_decides() -> None:
    """What is taken as zero must be worth no more than the budget."""
    source = normed(g=[1, 1e-3, 1])
    with pytest.raises(ValidationError):
        onnxopt.shrink(source, tolerance=1e-2, min_sqnr=200.0)
    result = onnxopt.shrink(source, tolerance=1e-2, min_sqnr=20.0)
    assert channels(result.model) == 2


def test_no_tolerance_is_exact() -> None:
    source = normed(g=[1, 1e-6, 1])
    assert channels(onnxopt.shrink(source).model) == 3
    assert channels(onnxopt.shrink(source, tolerance=0.0).model) == 3


def test_wrong_tolerances() -> None:
    with pytest.raises(UsageError, match="tolerance"):
        onnxopt.shrink(normed(), tolerance=-1.0)
    with pytest.raises(UsageError, match="needs a pipeline with"):
        onnxopt.simplify(normed(), tolerance=1.0)


def test_on_the_command_line(tmp_path: Path) -> None:
    onnx.save(normed(g=[1, 1e-6, 1]), tmp_path / "in.onnx")
    arguments = [str(tmp_path / "in.onnx"), "-o", str(tmp_path / "out.onnx")]
    arguments += ["--tolerance", "1e-5", "--report", str(tmp_path / "report.json")]
    with pytest.raises(SystemExit) as exit_:
        cli.main(["shrink", *arguments])
    assert exit_.value.code == 0
    assert channels(onnx.load(tmp_path / "out.onnx")) == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert "round-to-zero" in {entry["name"] for entry in report["passes"]}
