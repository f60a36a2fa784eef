"""No rewrite that is right but for rounding raises a false alarm."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest

import onnxopt
from catalogue.equivalent_rewrites import COUNTS, KINDS, MODELS, SHAPES, rewritten

pytestmark = pytest.mark.catalogue


def test_they_are_many_and_of_every_kind() -> None:
    assert len(MODELS) >= 200
    drawn = Counter(kind for seed in range(len(MODELS)) for kind in rewritten(seed).kinds)
    assert drawn.keys() == {kind.__name__ for kind in KINDS}
    assert len(COUNTS) >= 12


def test_a_seed_tells_all() -> None:
    one, other = rewritten(3), rewritten(3)
    assert one.kinds == other.kinds
    assert one.candidate == other.candidate
    assert one.candidate != one.reference
    onnx.checker.check_model(one.candidate)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", range(len(MODELS)), ids=lambda seed: f"{MODELS[seed]}-{seed}"
)
def test_it_passes(seed: int) -> None:
    case = rewritten(seed)
    shapes = SHAPES.get(MODELS[seed])
    verdict = onnxopt.validate(case.reference, case.candidate, input_shapes=shapes)
    assert verdict.status == "passed", f"{case.kinds}: {verdict.reason}"
