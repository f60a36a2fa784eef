"""Quantized models of the catalogue: right, no larger, and no weight ever expanded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto
from onnx.numpy_helper import from_array, to_array
from support import graphs

import onnxopt
from models.fetch import fetch
from onnxopt.weights import tensor_bytes

pytestmark = pytest.mark.catalogue

MODELS = ("smart-turn", "ddddocr-old")
RUNS: dict[str, dict[str, Any]] = {
    "default": {"recipe": "default"},
    "ort-cpu": {"recipe": "default", "target": "ort-cpu"},
    "tensorrt": {"recipe": "default", "target": "tensorrt"},
    "to-qdq": {"passes": "qoperator-to-qdq"},
    "to-qoperator": {"passes": "qdq-to-qoperator", "target": "ort-cpu"},
}
INTEGERS = (TensorProto.INT8, TensorProto.UINT8)
SMALLEST = 256
"""Bytes of a weight that counts."""
SEVEN_BITS = 64
"""Products of uint8 and larger int8 saturate on x86 processors without VNNI."""
ALLOWED = {
    "default": 8192 + 512,  # two initial states of an LSTM, which are zero, are computed
    "ort-cpu": 8192 + 512,
    "tensorrt": 8192 + 512,
    "to-qdq": 22 * 300,  # for each layer two nodes more, and their names
}
"""Bytes by which ddddocr may grow."""


def weights(model: ModelProto) -> list[TensorProto]:
    """The large ones, scales and zero points aside."""
    found = [tensor for graph in graphs(model) for tensor in graph.initializer]
    return [t for t in found if len(t.dims) > 1 and tensor_bytes(t) >= SMALLEST]


def integers(model: ModelProto) -> Counter[int]:
    """How many weights of integers there are of each number of axes."""
    return Counter(len(t.dims) for t in weights(model) if t.data_type in INTEGERS)


def bytes_of_floats(model: ModelProto) -> int:
    return sum(tensor_bytes(t) for t in weights(model) if t.data_type not in INTEGERS)


def reduced(path: Path, folder: Path) -> Path:
    """A copy whose weights are within seven bits."""
    model = onnx.load(path)
    for tensor in weights(model):
        if tensor.data_type == TensorProto.INT8:
            codes = np.clip(to_array(tensor), -SEVEN_BITS, SEVEN_BITS)
            tensor.CopyFrom(from_array(codes, tensor.name))
    onnx.save(model, folder / "reduced.onnx")
    return folder / "reduced.onnx"


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MODELS)
def test_it_stays_quantized(name: str, run: str, tmp_path: Path) -> None:
    """By every recipe that is about quantized models, each judged by its validation."""
    path = fetch(name)
    if run == "to-qoperator":
        path = reduced(path, tmp_path)
    result = onnxopt.optimize(path, **RUNS[run])
    assert result.report.validation is not None
    assert result.report.validation.status == "passed"
    source, made = onnx.load(path), result.model
    onnx.checker.check_model(made)
    assert integers(source)
    assert integers(made) <= integers(source)  # what does not matter may go
    allowed = ALLOWED.get(run, 0) if name == "ddddocr-old" else 0
    assert bytes_of_floats(made) <= bytes_of_floats(source) + min(allowed, 8192)
    assert made.ByteSize() <= path.stat().st_size + allowed
