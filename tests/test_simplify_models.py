"""The simplifier on real models: idempotent, and right on random parts of them.

A part is a run of consecutive nodes of one of our models; a random pipeline makes
another model of it, which has to compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnx.checker
import onnx.printer
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

import onnxopt
from models.fetch import default_cache
from onnxopt import attributes
from onnxopt.manager import Context
from onnxopt.model import Model
from onnxopt.passes import PASSES
from tests import support
from tests.simplified import interface
from tests.test_properties import exact, random_pipeline, strength

FOLDER = Path(__file__).parent.parent / "models"
OURS = sorted(FOLDER.glob("*.onnx"))
CACHE = default_cache()
FETCHED = sorted([*CACHE.glob("*.onnx"), *CACHE.glob("exports/*.onnx")])


# ---- a second run changes nothing ----


def check_idempotent(path: Path, folder: Path) -> None:
    """Neither an edit nor a byte."""
    first, second = folder / "first.onnx", folder / "second.onnx"
    result = onnxopt.simplify(path, validate=False)
    assert not result.report.notes
    result.save(first)
    again = onnxopt.simplify(first, validate=False)
    again.save(second)
    made = {report.name: report.edits for report in again.report.passes if report.edits}
    assert made == {}
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size <= max(1_000_000, 1.02 * path.stat().st_size)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_simplified_models_stay_as_they_are(path: Path, tmp_path: Path) -> None:
    check_idempotent(path, tmp_path)


@pytest.mark.catalogue
@pytest.mark.parametrize("path", FETCHED, ids=lambda path: path.stem)
def test_simplified_real_models_stay_as_they_are(path: Path, tmp_path: Path) -> None:
    """Those of the catalogue and the exports, as far as they are there."""
    check_idempotent(path, tmp_path)


# ---- parts of models ----

QUIET_DB = 25
"""Where a code of a quantized value flips, an output moves by a step or two."""


@functools.cache
def opened(path: Path) -> Model:
    return Model.open(onnx.load(path))


def declared(model: Model, name: str) -> ValueInfoProto | None:
    """What inference knows of a value that can be fed; None where that is too little."""
    shape, dtype = model.main.shape(name), model.main.dtype(name)
    if shape is None or dtype in (None, TensorProto.INT64):
        return None  # what a shape is made of cannot be made up
    return helper.make_tensor_value_info(name, dtype, list(shape))


def part(path: Path, random: Random, most: int) -> ModelProto:
    """A run of up to `most` nodes of a model as a model of its own."""
    model = opened(path)
    nodes = model.main.nodes()
    while True:
        start = random.randrange(len(nodes))
        made = _cut(model, nodes[start : start + random.randrange(1, most)])
        if made is not None:
            return made


def _cut(model: Model, nodes: Sequence[NodeProto]) -> ModelProto | None:
    made = {name for node in nodes for name in node.output if name}
    needed = [name for node in nodes for name in attributes.reads(node) if name]
    outside = dict.fromkeys(name for name in needed if name not in made)
    weights = [t for t in model.proto.graph.initializer if t.name in outside]
    known = {tensor.name for tensor in weights}
    inputs = [declared(model, name) for name in outside if name not in known]
    within = {id(node) for node in nodes}
    outputs = [declared(model, name) for name in made if _is_end(model, name, within)]
    if None in inputs or None in outputs or not inputs or not outputs:
        return None
    graph = helper.make_graph(nodes, "part", inputs, outputs)
    for tensor in weights:
        graph.initializer.add().CopyFrom(model.weights.inline(tensor))
    found = helper.make_model(
        graph,
        opset_imports=list(model.proto.opset_import),
        ir_version=model.proto.ir_version,
    )
    onnx.checker.check_model(found)
    return found


def _is_end(model: Model, name: str, within: set[int]) -> bool:
    uses = model.main.uses(name)
    return model.main.is_output(name) or any(id(use.node) not in within for use in uses)


def check_part(path: Path, random: Random, context: Context, most: int = 40) -> None:
    """A random part through random passes, in any order."""
    source, pipeline = part(path, random, most), random_pipeline(random)
    model = support.run_passes(source, pipeline, context)
    made = support.final(model)
    onnx.checker.check_model(made)
    assert interface(made) == interface(source)
    again = support.run_passes(made, exact(pipeline), context)
    assert again.ledger.edits == 0 or model.notes, pipeline
    guarantee = strength(pipeline)
    is_coded = any("QuantizeLinear" in node.op_type for node in source.graph.node)
    feeds = [support.feeds_of(source, (size,))[0] for size in (2, 1)]
    if guarantee == "bitwise":
        feeds += support.feeds_of(source, (2, 3))[1:]  # with infinities and NaN
    for feed in feeds:
        expected, found = support.run(source, feed), support.run(made, feed)
        try:
            if guarantee == "equivalent" and is_coded:
                assert_near(expected, found)
            else:
                support.assert_same(expected, found, guarantee)
        except AssertionError:
            print(pipeline, onnx.printer.to_text(source), sep="\n")
            raise


def assert_near(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> None:
    """Equal but for codes that flip."""
    for left, right in zip(expected, found, strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        one, other = left.astype(np.float64), right.astype(np.float64)
        noise = np.square(one - other).mean() if one.size else 0.0
        power = np.square(one).mean() if one.size else 0.0
        assert noise <= power * 10 ** (-QUIET_DB / 10), (left, right)


FEW = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
MANY = settings(FEW, max_examples=2000, derandomize=False)
SEEDS = st.integers(0, (1 << 32) - 1)


@FEW
@given(path=st.sampled_from(OURS), seed=SEEDS)
def test_parts_of_models(path: Path, seed: int, context: Context) -> None:
    """Any passes in any order on any part of our models."""
    check_part(path, Random(seed), context)


@pytest.mark.slow
@MANY
@given(path=st.sampled_from(OURS), seed=SEEDS)
def test_many_parts_of_models(path: Path, seed: int, context: Context) -> None:
    """The same, much longer, and on longer parts."""
    check_part(path, Random(seed), context, most=200)


@pytest.mark.parametrize("name", ["fashion_float", "fashion_qat_legacy"])
def test_whole_models(name: str, context: Context) -> None:
    """A few random pipelines on all of a model."""
    source = onnx.load(FOLDER / f"{name}.onnx")
    for seed in range(3):
        pipeline = random_pipeline(Random(seed))
        made = support.final(support.run_passes(source, pipeline, context))
        for feed in support.feeds_of(source, (2, 1))[:1]:
            assert_near(support.run(source, feed), support.run(made, feed))


def test_random_pipelines_draw_from_every_pass() -> None:
    """A new pass is in them without further ado."""
    random = Random(0)
    drawn = {name for _ in range(100) for name in random_pipeline(random).split(",")}
    assert drawn == set(PASSES)
