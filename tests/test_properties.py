"""Random models through random pipelines: the outcome is valid and computes the same.

The slow variants try many more. Where one fails, the seed says with which model.
"""

from __future__ import annotations

from random import Random

import onnx.checker
import onnx.printer
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto
from onnx.helper import make_tensor_value_info
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from onnxopt import verifier
from onnxopt.ledger import Ledger
from onnxopt.manager import Context, PassManager
from onnxopt.model import Model
from onnxopt.passes import PASSES
from onnxopt.recipe import parse_pipeline
from onnxopt.report import Guarantee
from tests import support
from tests.random_graphs import random_model

QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
MANY = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))


def random_pipeline(random: Random) -> str:
    """Passes in any order, some of them several times."""
    names = list(PASSES)
    return ",".join(random.choices(names, k=random.randrange(1, 2 * len(names))))


def strength(pipeline: str) -> Guarantee:
    """What all the passes of a pipeline promise together."""
    kinds = {PASSES[name].guarantee for name in pipeline.split(",")}
    return "bitwise" if kinds == {"bitwise"} else "equivalent"


def exact(pipeline: str) -> str:
    """Its passes but the lossy ones, which run once: those that settle."""
    names = pipeline.split(",")
    return ",".join(name for name in names if PASSES[name].guarantee != "lossy")


def runnable(random: Random) -> ModelProto:
    """A model that ONNX Runtime runs: it may free what two scopes have captured."""
    while True:
        source = random_model(random)
        try:
            support.run(source, support.feeds_of(source, (2,))[0])
        except Fail:
            continue
        return source


def check_same(source: ModelProto, result: ModelProto, guarantee: Guarantee) -> None:
    """Valid, of the same interface, and equal on feeds of several sizes."""
    onnx.checker.check_model(result)
    for field in ("input", "output"):
        ours, theirs = getattr(result.graph, field), getattr(source.graph, field)
        assert [v.SerializeToString() for v in ours] == [
            v.SerializeToString() for v in theirs
        ]
    for number, feed in enumerate(support.feeds_of(source, (2, 1, 3))):
        if number and guarantee == "equivalent":
            break  # what is infinite or NaN may become the other in a reordered sum
        expected = support.run(source, feed)
        support.assert_same(expected, support.run(result, feed), guarantee)


def check_pipeline(random: Random, context: Context) -> None:
    """One random model and pipeline; then again, up to a random number of edits."""
    source, pipeline = runnable(random), random_pipeline(random)
    guarantee = strength(pipeline)
    onnx.checker.check_model(source)
    try:
        model = support.run_passes(source, pipeline, context)
        check_same(source, support.final(model), guarantee)
        again = support.run_passes(support.final(model), exact(pipeline), context)
        assert again.ledger.edits == 0 or model.notes
        limit = random.randrange(model.ledger.edits + 1)
        part = support.run_passes(source, pipeline, context, limit=limit)
        assert part.ledger.edits == limit
        check_same(source, support.final(part), guarantee)
    except BaseException:
        print(pipeline, onnx.printer.to_text(source), sep="\n")
        raise


def check_budget(random: Random, context: Context) -> None:
    """The model never grows where the budget is what it already has."""
    source = runnable(random)
    pipeline = random_pipeline(random)
    model = Model.open(source)
    before = model.bytes()
    model.ledger = Ledger(before)
    model.ledger.most_bytes = before
    PassManager(parse_pipeline(pipeline), verify_each=True).run(model, context)
    verifier.verify(model, "at the end", rebuild=True)
    check_same(source, support.final(model), strength(pipeline))
    # what protobuf needs for lengths is not all foreseen
    assert model.bytes() <= before + 64, onnx.printer.to_text(source)


def check_shapes(random: Random) -> None:
    """What inference says of inner values holds when the model runs."""
    source = random_model(random)
    if random.random() < 0.5:
        source = random.choice([support.in_branches, support.in_loop])(source)
    model = Model.open(source)
    names = [name for node in source.graph.node for name in node.output if name]
    facts = {name: (model.main.shape(name), model.main.dtype(name)) for name in names}
    del source.graph.output[:]
    for name in names:
        kind = facts[name][1] or TensorProto.UNDEFINED
        source.graph.output.append(make_tensor_value_info(name, kind, None))
    for feed in support.feeds_of(source, (2, 1, 5)):
        values = support.run(source, feed)
        sizes: dict[str, int] = {}
        for name, value in zip(names, values, strict=True):
            dims = facts[name][0]
            assert dims is None or len(dims) == value.ndim, name
            for dim, size in zip(dims or (), value.shape, strict=bool(dims)):
                if isinstance(dim, str):
                    dim = sizes.setdefault(dim, size)
                assert not isinstance(dim, int) or dim == size, name


SEEDS = st.integers(0, (1 << 32) - 1)


@QUICK
@given(seed=SEEDS)
def test_pipelines(seed: int, context: Context) -> None:
    """Any pipeline on any model, whole and in part."""
    check_pipeline(Random(seed), context)


@settings(QUICK, max_examples=60)
@given(seed=SEEDS)
def test_budget(seed: int, context: Context) -> None:
    """Any pipeline within the tightest budget."""
    check_budget(Random(seed), context)


@settings(QUICK, max_examples=100)
@given(seed=SEEDS)
def test_shapes(seed: int) -> None:
    """Inferred shapes are true."""
    check_shapes(Random(seed))


@pytest.mark.slow
@settings(MANY, max_examples=1000)
@given(seed=SEEDS)
def test_many_shapes(seed: int) -> None:
    """The same, much longer."""
    check_shapes(Random(seed))


@pytest.mark.slow
@MANY
@given(seed=SEEDS)
def test_many_pipelines(seed: int, context: Context) -> None:
    """The same, much longer."""
    check_pipeline(Random(seed), context)


@pytest.mark.slow
@settings(MANY, max_examples=500)
@given(seed=SEEDS)
def test_many_budgets(seed: int, context: Context) -> None:
    """The same, much longer."""
    check_budget(Random(seed), context)
