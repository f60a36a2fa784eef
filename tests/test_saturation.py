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
from onnxopt.validation.verdict import Question
from tests.support import model_of


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
    question = Question(Path("a"), Path("b"), precise=True)
    assert not Question(Path("a"), Path("b")).spec("cpu", "enable_all").options
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


def on_a_grid() -> ModelProto:
    """Float weights that are whole multiples of 0.03, between quantized activations.

    ONNX Runtime rounds them to 8 bits of its own, per tensor, whose steps are others.
    """
    model = model_of(
        """agraph (float[N, 16, 6, 6] x) => (float[N, 8, 6, 6] y)
        <float s = {0.02}, float t = {0.05}, uint8 z = {128}> {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            c = Conv<pads=[1, 1, 1, 1]>(d, w, b)
            r = QuantizeLinear(c, t, z)
            y = DequantizeLinear(r, t, z)
        }"""
    )
    random = np.random.default_rng(0)
    codes = random.integers(-4, 5, (8, 16, 3, 3))
    codes[0] *= 15
    weight = codes.astype(np.float32) * np.float32(0.03)
    bias = random.standard_normal(8).astype(np.float32)
    model.graph.initializer.extend([from_array(weight, "w"), from_array(bias, "b")])
    return model


def test_a_candidate_that_keeps_to_the_file_is_right(tmp_path: Path) -> None:
    source, made = tmp_path / "source.onnx", tmp_path / "made.onnx"
    onnx.save(on_a_grid(), source)
    result = onnxopt.optimize(source)
    assert result.report.validation is not None
    notes = " ".join(result.report.validation.notes)
    assert "changes what the reference computes" in notes

    wrong = result.model
    for tensor in wrong.graph.initializer:
        if tensor.name == "b":
            tensor.CopyFrom(from_array(to_array(tensor) + np.float32(0.2), "b"))
    onnx.save(wrong, made)
    verdict = onnxopt.validate(source, made)
    levels = {c.level: c.status for c in verdict.checks if c.provider == "cpu"}
    assert levels["enable_all"] == "failed"
