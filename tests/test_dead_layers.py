"""dead-layers on random graphs, and how long an analysis of channels is kept."""

from __future__ import annotations

from random import Random

import pytest

from onnxopt.channels.engine import analyse
from onnxopt.evaluate import Evaluator
from onnxopt.manager import Context, PassManager
from onnxopt.model import Model
from onnxopt.recipe import parse_pipeline
from tests import support
from tests.random_graphs import random_model

SEEDS = (100134, *range(12))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_second_run_finds_nothing(seed: int, context: Context) -> None:
    """Also of what only other edits, or shapes known since, have made dead."""
    for wrap in (lambda source: source, support.in_branches):
        source = wrap(random_model(Random(seed)))
        for pipeline in ("dead-layers", "fold-shapes,dead-layers"):
            made = support.final(support.run_passes(source, pipeline, context))
            again = support.run_passes(made, pipeline, context)
            assert again.ledger.edits == 0, support.op_types(again)


@pytest.mark.parametrize(("body", "is_kept"), [("Relu", True), ("NonZero", False)])
def test_an_analysis_is_kept_as_long_as_nothing_more_can_be_known(
    body: str, is_kept: bool
) -> None:
    """Where shapes are not complete, an edit elsewhere may tell more about them."""
    model = Model.open(
        support.model_of(
            f"""main (float[2,3] x) => (float[2,3] y, float[2,3] z) {{
               i = Identity (x)
               z = Neg (i)
               n = {body} (x)
               s = Shape (n)
               r = Cast <to = 1> (n)
               q = ReduceSum <keepdims = 0> (r)
               y = Add (x, q)
            }}"""
        )
    )
    with Evaluator() as evaluator:
        PassManager(parse_pipeline("dead-layers")).run(
            model, Context(evaluator=evaluator)
        )
        first = analyse(model.main, evaluator)
        PassManager(parse_pipeline("identity")).run(model)
        model.version -= 1  # as if the edit had been one that the analysis knows of
        assert (analyse(model.main, evaluator) is first) == is_kept
