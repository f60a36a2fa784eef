"""Real networks with masked channels: shrunk to what the masks allow, and still equal.

The masks and what they allow come from `mask_oracle`, which knows nothing of the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from support import Array, final

from catalogue import mask_oracle
from catalogue.mask_oracle import Feed, Masked, count_layers, count_norms, every_value
from models.fetch import fetch
from onnxopt.evaluate import Evaluator
from onnxopt.ledger import Ledger
from onnxopt.manager import Context, PassManager
from onnxopt.model import Model
from onnxopt.recipe import load_recipe

pytestmark = pytest.mark.catalogue

Shapes = dict[str, tuple[str, list[int], list[int]]]

SHAPES: Shapes = {
    "efficientnet-lite0": ("input", [2, 3, 224, 224], [1, 3, 224, 224]),
    "opennsfw": ("input:0", [2, 224, 224, 3], [1, 224, 224, 3]),
    "ppocr-cls": ("x", [2, 3, 48, 128], [1, 3, 48, 192]),
    "ppocr-det": ("x", [2, 3, 64, 96], [1, 3, 160, 128]),
    "yolov8n-320": ("images", [2, 3, 64, 96], [1, 3, 160, 128]),
}
"""The input of each model, and two shapes that it takes."""

SHARES = (0.3, 0.5, 0.7)
ENOUGH = 0.99  # of what the masks allow
NEAR = 1e-4  # of the largest value


def feeds(name: str, shapes: Shapes = SHAPES) -> list[Feed]:
    """Two of the first shape and one of the second."""
    given, first, second = shapes[name]
    random = np.random.default_rng(0)
    return [
        {given: random.standard_normal(shape).astype(np.float32)}
        for shape in (first, first, second)
    ]


@functools.lru_cache(maxsize=1)
def masked(name: str, share: float) -> Masked:
    """The model with that share of its channels masked."""
    return mask_oracle.mask(onnx.load(fetch(name)), feeds(name), share, seed=0)


@pytest.fixture(
    params=[(name, share) for name in SHAPES for share in SHARES], name="case"
)
def _case(request: pytest.FixtureRequest) -> tuple[str, float]:
    case: tuple[str, float] = request.param
    return case


@pytest.fixture(scope="module", name="context")
def _context() -> Iterator[Context]:
    with Evaluator() as evaluator:
        yield Context(evaluator=evaluator)


def run(source: ModelProto, pipeline: str, context: Context) -> ModelProto:
    """What the pipeline makes of it, accepted by the checker."""
    model = Model.open(source)
    model.ledger = Ledger()
    passes, _ = load_recipe(pipeline)
    PassManager(passes, verify_each=True).run(model, context)
    made = final(model)
    onnx.checker.check_model(made, full_check=True)
    return made


def assert_close(found: Array, expected: Array, name: str) -> None:
    """Of one shape and, relative to the largest value, of the same values."""
    assert found.shape == expected.shape, name
    assert np.isfinite(expected).all(), name
    scale = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR * scale, err_msg=name)


def assert_same_outputs(case: Masked, made: ModelProto, feed: Feed) -> None:
    one, two = mask_oracle.session(case.model), mask_oracle.session(made)
    names = [output.name for output in case.model.graph.output]
    expected, found = one.run(names, dict(feed)), two.run(names, dict(feed))
    for name, left, right in zip(names, expected, found, strict=True):
        assert_close(right, left, name)


def compare_inner_values(case: Masked, made: ModelProto, feed: Feed) -> int:
    """Values that kept their names have the channels that stay; how many there are.

    Where another number of channels is left, which ones is not known here: natural zeros
    go as well, and what stays too wide is counted elsewhere.
    """
    before, after = every_value(case.model, feed), every_value(made, feed)
    compared = 0
    for name in after.keys() & case.walk.of.keys():
        axis, kept = case.kept(name) or (0, np.ones(0, bool))
        expected = np.compress(kept, before[name], axis)
        if after[name].shape[axis] != expected.shape[axis]:
            continue
        assert_close(after[name], expected, name)
        compared += 1
    return compared


def test_a_masked_channel_is_constant_wherever_a_layer_reads_it(
    case: tuple[str, float],
) -> None:
    """What the oracle promises: a layer can do without it, at borders too."""
    made = masked(*case)
    values = every_value(made.model, feeds(case[0])[0])
    for layer in made.walk.layers:
        axis, kept = made.kept(layer.node.input[0]) or (0, np.ones(0, bool))
        if layer.reads is None or kept.all():
            continue  # a depthwise one has its own filter masked
        read = np.compress(~kept, values[layer.node.input[0]], axis)
        rows = np.moveaxis(read, axis, 0).reshape(read.shape[axis], -1)
        assert (rows == rows[:, :1]).all(), layer.node.output[0]
        assert not (layer.is_padded and rows.any()), layer.node.output[0]


def test_shrink_takes_out_what_the_masks_allow(
    case: tuple[str, float], context: Context
) -> None:
    given = masked(*case)
    made = run(given.model, "shrink", context)
    for feed in feeds(case[0]):
        assert_same_outputs(given, made, feed)
        assert compare_inner_values(given, made, feed) > len(given.walk.of) // 2
    removed = count_layers(given.model) - count_layers(made)
    removed += count_norms(given.model) - count_norms(made)
    allowed = given.layers + given.norms
    print(f"{case}: {removed} of {allowed} parameters, {removed / allowed:.4f}")
    assert removed >= ENOUGH * allowed


def test_so_does_the_default_pipeline(case: tuple[str, float], context: Context) -> None:
    """It folds the norms, so that only the weights of the layers can be counted."""
    given = masked(*case)
    made = run(given.model, "default", context)
    for feed in feeds(case[0]):
        assert_same_outputs(given, made, feed)
    removed = count_layers(given.model) - count_layers(made)
    print(f"{case}: {removed} of {given.layers} weights, {removed / given.layers:.4f}")
    assert removed >= ENOUGH * given.layers
