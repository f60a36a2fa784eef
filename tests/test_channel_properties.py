"""Random networks whose dead channels are known: they go, and nothing else changes.

The seed says which network failed; `channel_oracle.network(seed)` builds it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx.checker
import onnx.printer
import pytest
from onnx import ModelProto

from onnxopt.evaluate import Evaluator
from onnxopt.manager import Context
from onnxopt.passes import PIPELINES
from tests import support
from tests.channel_oracle import Network, network, size_of

SEEDS = 500
CHUNK = 10


@pytest.fixture(scope="module")
def worker() -> Iterator[Context]:
    """One context, so that all networks share one worker process."""
    with Evaluator() as evaluator:
        yield Context(evaluator=evaluator)


def feeds(model: ModelProto) -> list[support.Feed]:
    """Ordinary values; two batch sizes where the model leaves it open."""
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    sizes = [first.dim_value] * 2 if first.dim_value else [2, 1]
    rng = np.random.default_rng(0)
    return [
        {"x": rng.standard_normal((size, 3, 8, 8)).astype(np.float32)} for size in sizes
    ]


def check_equal(source: Network, result: ModelProto, feed: support.Feed) -> None:
    """Equal up to rounding.

    Where activations are quantized, another rounding may take a value to the next code:
    there, and only there, results may differ by what one step amounts to.
    """
    expected, found = support.run(source.model, feed), support.run(result, feed)
    try:
        support.assert_same(expected, found, "equivalent")
    except AssertionError:
        if not source.step:
            raise
        for one, two in zip(expected, found, strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=source.step)


def check_valid(source: ModelProto, result: ModelProto) -> None:
    """The result stands up to the checker, and its interface is the same."""
    onnx.checker.check_model(result, full_check=True)
    for field in ("input", "output"):
        ours, theirs = getattr(result.graph, field), getattr(source.graph, field)
        assert [v.SerializeToString() for v in ours] == [
            v.SerializeToString() for v in theirs
        ]


def check_lost(source: Network, result: ModelProto) -> None:
    """Every constant has lost what it has to lose."""
    kept = [
        f"input {part.index} of the node that makes {part.output!r} has "
        f"{size_of(result, part)} of {size} channels on axis {part.axis}, not {left}"
        for part, size, left in source.expected
        if size_of(result, part) > left
    ]
    assert not kept, "\n".join(kept)


def check_pipeline(source: Network, pipeline: str, context: Context) -> ModelProto:
    """Valid, equal, and nothing is left to do."""
    model = support.run_passes(source.model, pipeline, context)
    result = support.final(model)
    check_valid(source.model, result)
    for feed in feeds(source.model):
        check_equal(source, result, feed)
    again = support.run_passes(result, pipeline, context)
    assert again.ledger.edits == 0, "the second run still finds something"
    return result


def check_seed(seed: int, context: Context) -> None:
    """One network through the pass, through both, now and then through everything."""
    source = network(seed)
    onnx.checker.check_model(source.model, full_check=True)
    pipeline = "zero-channels"
    try:
        check_lost(source, check_pipeline(source, pipeline, context))
        pipeline = "dead-layers,zero-channels"
        check_lost(source, check_pipeline(source, pipeline, context))
        if seed % 5 == 0:
            pipeline = ",".join(PIPELINES["default"])
            check_pipeline(source, pipeline, context)
    except BaseException:
        print(f"seed {seed}, {pipeline}", onnx.printer.to_text(source.model), sep="\n")
        raise


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_networks(start: int, worker: Context) -> None:
    """What has to go is gone, and nothing else changes."""
    for seed in range(start, start + CHUNK):
        check_seed(seed, worker)


def test_networks_have_something_to_lose() -> None:
    """The networks are worth the test: most lose channels, some many."""
    losses: Sequence[int] = [network(seed).has_to_lose for seed in range(SEEDS)]
    assert sum(loss > 0 for loss in losses) > 0.9 * SEEDS
    assert sum(loss > 10 for loss in losses) > 0.6 * SEEDS
