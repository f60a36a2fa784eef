"""What benchmarks/qdq.py measures, and what it lets pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxopt
from benchmarks import encoder, qdq
from onnxopt.latency import Ratio
from tests import support

EQUAL = Ratio(1.0, 0.9, 1.1, "no difference")
ROW = qdq.Row(
    name="model",
    bytes=0.26,
    before=(3, 4),
    after=(4, 4),
    by_tool=(4, 4),
    of_export=EQUAL,
    of_tool=EQUAL,
)
SLOWER = Ratio(1.2, 1.1, 1.3, "slower")


def test_what_keeps_the_promises() -> None:
    assert qdq.problems(ROW) == []
    assert qdq.line(ROW) == (
        "| model | 0.260 | 3 of 4 | 4 of 4 | 4 of 4 | 1.000 [0.900, 1.100] | "
        "1.000 [0.900, 1.100] |"
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bytes": 0.28}, "more than 0.27 of the bytes"),
        ({"bytes": 1.01, "of_tool": None}, "larger"),
        ({"after": (3, 4)}, "a layer that could run in integers is float"),
        ({"of_export": SLOWER}, "slower than the export"),
        ({"of_tool": SLOWER}, "slower than the tool's"),
    ],
)
def test_what_breaks_one(change: dict[str, Any], problem: str) -> None:
    row = dataclasses.replace(ROW, **change)
    assert qdq.problems(row) == [f"model: {problem}"]


def test_the_encoder_as_float_and_as_export(tmp_path: Path) -> None:
    """They compute the same but for quantization, and every product fuses."""
    case = next(case for case in qdq.cases(tmp_path) if case.name == "encoder")
    assert case.twin is not None
    assert case.data is not None
    feed = next(iter(case.data(2)))
    plain, faked = (support.run(onnx.load(p), feed)[0] for p in (case.twin, case.export))
    noise = np.square(plain - faked).mean() / np.square(plain).mean()
    assert 1e-6 < noise < 1e-2
    result = tmp_path / "result.onnx"
    onnxopt.optimize(case.export, validate=False, target="ort-cpu").save(result)
    fused, fusable = qdq._fused(result)
    assert fused == fusable == encoder.LAYERS * 8 + 2
    assert result.stat().st_size <= qdq.MAX_BYTES * case.export.stat().st_size


@pytest.mark.slow
def test_a_row(tmp_path: Path) -> None:
    case = next(qdq.cases(tmp_path))
    row = qdq.measure(case, tmp_path, batch=4, rounds=6)
    assert row.by_tool is not None
    assert row.after == row.by_tool
    assert row.of_tool is not None
    assert row.of_tool.low <= row.of_tool.value <= row.of_tool.high
