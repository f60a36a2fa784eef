"""What the benchmarks measure keeps to its limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import edits, memory


def test_the_benchmark_of_edits_makes_the_edits_that_it_says() -> None:
    times = edits.measure(400)
    assert times.edits == 200
    assert times.total > 0


@pytest.mark.slow
def test_20_000_nodes_are_edited_within_a_second_of_cpu() -> None:
    times = edits.best(20_000, repeat=3)
    assert times.edits == 10_000
    assert times.total <= edits.LIMIT_SECONDS


@pytest.mark.slow
def test_time_grows_with_the_number_of_nodes_and_no_faster() -> None:
    few, many = edits.best(5_000, repeat=3), edits.best(50_000, repeat=2)
    assert many.total / few.total < 10 * 2


def test_the_benchmark_of_memory_makes_a_model_that_is_simplified(tmp_path: Path) -> None:
    costs, words = memory.simplify_cost(tmp_path, gib=0.3)
    assert costs[0].what == "import onnx"
    assert "'fold-batch-norm': " in words
    assert "'fold-constants': " in words
    assert costs[1].peak_mb <= memory.LIMIT_MB


@pytest.mark.slow
def test_weights_of_2_25_gib_need_at_most_200_mb(tmp_path: Path) -> None:
    costs, words = memory.simplify_cost(tmp_path)
    assert "2.25 GiB" in words
    assert costs[1].peak_mb <= memory.LIMIT_MB
