"""Every model of the catalogue: copied to the byte, and right after real edits.

The runs here are independent of `onnxopt.validate`: plain sessions of ONNX Runtime in
this process, on the catalogue's shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import onnxopt
from catalogue.test_fetch import feeds, session
from models.fetch import Entry, catalogue, fetch
from onnxopt import cost
from onnxopt.evaluate import Evaluator
from onnxopt.ledger import Ledger
from onnxopt.manager import Context, PassManager
from onnxopt.model import Model
from onnxopt.recipe import load_recipe
from onnxopt.save import stage
from onnxopt.weights import place, tensors

pytestmark = pytest.mark.catalogue
ENTRIES = {entry.name: entry for entry in catalogue()}

LOST = {
    "efficientnet-lite0": 49,  # every BatchNormalization folded
    "opennsfw": 2,  # a chain of reshapes
    "ppocr-det": 400,  # Constants become weights
    "ppocr-rec": 500,
    "ppocr-cls": 400,  # the same, and 35 BatchNormalizations
    "silero-vad": 600,  # Constants and Identities of branches
    "basic-pitch": 100,  # chains of reshapes
    "minilm-l3": 200,  # constants, and what is computed twice
    "ddddocr-old": 40,  # what is computed twice
    "magika": 20,  # operators that do nothing
    "light-resnet50": 200,  # dead code; its weights would grow 1,000 times if folded
}
"""How many nodes the default pipeline takes out, at least."""

NOTHING_TO_DO = {
    "yolov8n-320": "simplified when it was exported; its shapes depend on the input",
    "smart-turn": "ONNX Runtime optimized and quantized it, the weights are int8 already",
    "surfaces-knn": "it is a single node",
}


@pytest.fixture(params=ENTRIES, name="entry")
def _entry(request: pytest.FixtureRequest) -> Entry:
    return ENTRIES[request.param]


@pytest.fixture(scope="module", name="context")
def _context() -> Iterator[Context]:
    with Evaluator() as evaluator:
        yield Context(evaluator=evaluator)


def serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))


def assert_copied(made: ModelProto, source: ModelProto) -> None:
    assert serialized(made.graph) == serialized(source.graph), "the graphs differ"
    assert serialized(made) == serialized(source), "the models differ"


def copy(source: Path, target: Path) -> Path:
    """The empty pipeline, without the rest of the library."""
    with stage(Model.open(source), target) as staged:
        staged.commit()
    return target


def test_the_empty_pipeline_copies_it_to_the_byte(entry: Entry, tmp_path: Path) -> None:
    path = fetch(entry.name)
    source = ModelProto.FromString(path.read_bytes())
    made = copy(path, tmp_path / "out.onnx")
    assert_copied(ModelProto.FromString(made.read_bytes()), source)
    assert_copied(onnxopt.optimize(path, passes="", validate=False).model, source)
    assert [item.name for item in tmp_path.iterdir()] == ["out.onnx"]


def test_so_it_does_with_weights_outside(entry: Entry, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save(onnx.load(fetch(entry.name)), source, **options)
    (tmp_path / "out").mkdir()
    made = copy(source, tmp_path / "out" / "m.onnx")
    before, after = Model.open(source).weights, Model.open(made).weights
    one, other = (onnx.load(path, load_external_data=False) for path in (source, made))
    for old, new in zip(tensors(one), tensors(other), strict=True):
        assert (place(old) is None) == (place(new) is None)
        if place(old) is not None:
            assert after.read(new) == before.read(old)
        for tensor in (old, new):
            tensor.ClearField("external_data")
    assert_copied(other, one)


def is_accepted(path: Path) -> bool:
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError:
        return False
    return True


def assert_close(found: Any, expected: Any) -> None:
    """Within 1e-4, of the largest value where that is over 1; equal where not floats."""
    if isinstance(expected, list):  # a sequence of arrays or of maps
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale)
    else:
        np.testing.assert_equal(found, expected)


def test_the_default_pipeline_edits_it_and_it_computes_the_same(
    entry: Entry, tmp_path: Path, context: Context
) -> None:
    path, target = fetch(entry.name), tmp_path / "out.onnx"
    model = Model.open(path)
    model.ledger = Ledger(path.stat().st_size)
    passes, _ = load_recipe("default")
    before = cost.nodes(model)
    PassManager(passes, verify_each=True).run(model, context)
    assert (entry.name in LOST) != (entry.name in NOTHING_TO_DO)
    assert before - cost.nodes(model) >= LOST.get(entry.name, 0)
    with stage(model, target) as staged:
        staged.commit()
    assert is_accepted(target) or not is_accepted(path)
    assert target.stat().st_size <= max(1_000_000, 1.02 * path.stat().st_size)
    reference, candidate = session(path), session(target)
    feed = feeds(entry, reference.get_inputs())
    names = [output.name for output in reference.get_outputs()]
    assert [output.name for output in candidate.get_outputs()] == names
    assert_close(candidate.run(names, feed), reference.run(names, feed))


def test_most_models_have_something_to_edit() -> None:
    assert len(LOST) >= 10
    assert LOST.keys() | NOTHING_TO_DO.keys() == ENTRIES.keys()
