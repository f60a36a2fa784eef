"""Verdicts on quantized models do not depend on the processor that judges them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from onnx.numpy_helper import from_array, to_array

import onnxopt
from onnxopt import processor
from onnxopt.data import generate_feeds, input_specs
from onnxopt.validation.judge import judge
from onnxopt.validation.verdict import Question
from tests.support import model_of

EXPORTS = Path(__file__).parents[1] / "models" / "quantized"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    processor.adds_pairs.cache_clear()
    yield
    processor.adds_pairs.cache_clear()


@pytest.mark.parametrize(
    ("machine", "text", "expected"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("x86_64", "model name\t: x\nflags\t: fpu avx2 avx_vnni sse\n", False),
        ("x86_64", "flags\t\t: fpu avx avx2\n", True),
        ("x86_64", "nothing of the kind", True),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_processors_that_add_pairs(
    machine: str,
    text: str | None,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", info)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert processor.adds_pairs() is expected


def test_models_are_judged_with_exact_kernels_on_the_cpu_alone() -> None:
    question = Question(Path("a"), Path("b"))
    for level in ("disable_all", "enable_all"):
        assert processor.PRECISE in question.spec("cpu", level).options
        assert processor.PRECISE not in question.spec("cuda", level).options


def saturating() -> ModelProto:
    """A quantized MatMul whose products are as large as they get."""
    model = model_of(
        """agraph (float[1, 64] x) => (float[1, 8] y)
        <float s = {0.01}, uint8 z = {0}, int8 n = {0}> {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            w = DequantizeLinear(c, s, n)
            m = MatMul(d, w)
            y = Identity(m)
        }"""
    )
    codes = np.full((64, 8), 127, np.int8)
    codes[:, ::2] = -127
    model.graph.initializer.append(from_array(codes, "c"))
    return model


def test_what_default_kernels_do_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run: on a processor that does not saturate there is nothing to tell."""
    onnx.save(saturating(), tmp_path / "m.onnx")
    data = [{"x": np.full((1, 64), 2.5, np.float32)}]
    verdict = onnxopt.validate(tmp_path / "m.onnx", tmp_path / "m.onnx", data=data)
    assert verdict.status == "passed"
    told = any("kernels saturate" in note for note in verdict.notes)
    assert told is processor.adds_pairs()
    monkeypatch.setattr(processor, "adds_pairs", lambda: False)
    verdict = onnxopt.validate(tmp_path / "m.onnx", tmp_path / "m.onnx", data=data)
    assert not any("kernels saturate" in note for note in verdict.notes)


# ---- what the optimizer changes ----


def shifted(model: ModelProto) -> ModelProto:
    """The model with one bias that is off by a step of its codes."""
    for tensor in model.graph.initializer:
        array = to_array(tensor)
        if array.dtype == np.float32 and array.ndim == 1 and array.size > 1:
            changed = array.copy()
            changed[0] += 0.1
            tensor.CopyFrom(from_array(changed, tensor.name))
            return model
    raise AssertionError("the model has no bias")


def test_a_candidate_that_keeps_to_the_file_is_right(tmp_path: Path) -> None:
    """ONNX Runtime rounds the float weights of this reference, and not those codes."""
    source = EXPORTS / "keras_folded.onnx"
    result = onnxopt.optimize(source)
    assert result.report.validation is not None
    notes = " ".join(result.report.validation.notes)
    assert "changes what the reference computes" in notes

    made = tmp_path / "wrong.onnx"
    onnx.save(shifted(result.model), made)
    reference = onnx.load(source)
    feeds = generate_feeds(input_specs(reference), model=reference)
    verdict = judge(source, made, feeds=feeds)
    assert verdict.status == "failed"
    levels = {c.level: c.status for c in verdict.checks if c.provider == "cpu"}
    assert levels["enable_all"] == "failed"
