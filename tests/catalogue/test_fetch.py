"""Every model of the catalogue can be had, is the pinned one, and runs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from models import fetch as fetcher
from models.fetch import Entry, catalogue, fetch

ort: Any = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.catalogue
ENTRIES = {entry.name: entry for entry in catalogue()}


@pytest.fixture(params=ENTRIES, name="entry")
def _entry(request: pytest.FixtureRequest) -> Entry:
    return ENTRIES[request.param]


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Some of the models declare shapes that they do not keep; the warnings are expected.
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(entry: Entry, inputs: Iterable[Any]) -> dict[str, NDArray[np.generic]]:
    """Seeded values in the shapes and ranges that the catalogue gives."""
    random = np.random.default_rng(0)
    dtypes = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
    made: dict[str, NDArray[np.generic]] = {}
    for value in inputs:
        shape = entry.inputs[value.name]
        if value.type == "tensor(float)":
            made[value.name] = random.standard_normal(shape).astype(np.float32)
        else:
            low, high = entry.ranges[value.name]
            whole = random.integers(low, high, shape)
            made[value.name] = np.asarray(whole, dtypes[value.type])
    return made


def test_the_cached_file_is_the_pinned_one(entry: Entry) -> None:
    data = fetch(entry.name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry.file_sha256
    assert entry.build or len(data) == entry.bytes


def test_onnx_reads_the_stated_opset_and_inputs(entry: Entry) -> None:
    model = onnx.load(fetch(entry.name))
    opsets = {each.domain: each.version for each in model.opset_import}
    initializers = {tensor.name for tensor in model.graph.initializer}
    assert opsets[""] == entry.opset
    assert entry.inputs.keys() == {v.name for v in model.graph.input} - initializers


def test_it_runs_on_the_stated_shapes(entry: Entry) -> None:
    runner = session(fetch(entry.name))
    for output in runner.run(None, feeds(entry, runner.get_inputs())):
        assert output.size
        assert np.isfinite(output).all()


def test_the_second_fetch_needs_no_network(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(entry.name)
    monkeypatch.setattr(fetcher, "download", None)
    assert fetch(entry.name) == path


def test_efficientnet_keeps_its_batch_normalizations() -> None:
    nodes = onnx.load(fetch("efficientnet-lite0")).graph.node
    assert Counter(node.op_type for node in nodes) == {
        "Conv": 49,
        "BatchNormalization": 49,
        "Clip": 33,
        "Add": 9,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


def test_efficientnet_computes_what_its_authors_network_does() -> None:
    """The numbers come from the authors' PyTorch code on the same weights and input."""
    wave = np.sin(np.arange(3 * 224 * 224) / 500).astype(np.float32)
    image = wave.reshape(1, 3, 224, 224)
    (logits,) = session(fetch("efficientnet-lite0")).run(None, {"input": image})
    expected = [-0.2702937, 0.0192915, -0.6090448, -1.7715058, -0.2889745]
    np.testing.assert_allclose(logits[0, :5], expected, atol=1e-4)
    assert logits.argmax() == 905
    assert np.linalg.norm(logits) == pytest.approx(42.252411, abs=1e-3)
