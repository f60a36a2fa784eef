"""Every wrong rewrite of `wrong_rewrites` is found out, with default settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxopt
from catalogue.test_fetch import ENTRIES, feeds, session
from catalogue.wrong_rewrites import PLANTED, Wrong

pytestmark = pytest.mark.catalogue

HARMLESS = {
    "zero_point_of_scores_off_by_one": "a softmax does not see a shift of all its scores",
    "one_bias_changed": "0.01 vanishes in float32 beside logits of 1e19",
    "epsilon_forgotten_in_a_fold": "every variance is over 7.9: 3 ulp at most",
    "epsilon_of_the_last_norm_changed": "variances of 10: 7 ulp, 1e-6 of the outputs",
}
"""Rewrites that were meant to be wrong, and why they are right on every feed."""


def test_they_are_many_and_all_apart() -> None:
    assert len({wrong.name for wrong in PLANTED}) == len(PLANTED) >= 36
    assert HARMLESS.keys() <= {wrong.name for wrong in PLANTED}


@pytest.mark.parametrize("wrong", PLANTED, ids=lambda wrong: wrong.name)
def test_it_runs(wrong: Wrong, tmp_path: Path) -> None:
    """On the catalogue's feeds: it is told apart by its numbers alone."""
    path = tmp_path / "wrong.onnx"
    onnx.save(wrong.apply(wrong.reference()), path)
    runner = session(path)
    entry = ENTRIES.get(wrong.model)
    image = np.linspace(0, 1, 2 * 784, dtype=np.float32).reshape(2, 1, 28, 28)
    feed = feeds(entry, runner.get_inputs()) if entry else {"image": image}
    assert all(output.size for output in runner.run(None, feed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [each for each in PLANTED if each.name not in HARMLESS],
    ids=lambda wrong: wrong.name,
)
def test_it_is_caught(wrong: Wrong) -> None:
    reference = wrong.reference()
    verdict = onnxopt.validate(reference, wrong.apply(reference))
    assert verdict.status == "failed", f"{wrong.first} is wrong"
    assert "fails on feed" not in (verdict.reason or ""), "told apart by a failure to run"
