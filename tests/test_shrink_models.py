"""Our masked models: what their masks say can go is gone, and nothing has changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnxopt
from models import evaluate, masks
from onnxopt import cost
from onnxopt.model import Model

FOLDER = Path(__file__).parent.parent / "models"
DENSE = FOLDER / "fashion_float.onnx"
CALIBRATION = FOLDER / "data" / "fashion_calib.npz"


@pytest.fixture(scope="module", name="shrunk")
def _shrunk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The results of the default recipe, proven on the calibration images."""
    folder = tmp_path_factory.mktemp("shrunk")
    made = {}
    for name in ("fashion_masked", "fashion_masked_qat"):
        result = onnxopt.optimize(
            FOLDER / f"{name}.onnx", data=CALIBRATION, batch_size=128
        )
        validation = result.report.validation
        assert validation is not None
        assert validation.status == "passed"
        result.save(folder / f"{name}.onnx")
        made[name] = folder / f"{name}.onnx"
    return made


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": images})
    return np.asarray(found)


def parameters(path: Path) -> int:
    return cost.parameters(Model.open(path))


def test_the_float_model_loses_every_dead_channel_and_block(
    shrunk: dict[str, Path],
) -> None:
    path = shrunk["fashion_masked"]
    gone = masks.compare(onnx.load(path))
    assert gone.blocks == len(masks.dead_blocks()) == 2
    assert gone.zero + gone.constant == gone.dead == 480
    assert gone.removed == gone.dead
    assert gone.live_removed == 0
    assert parameters(path) <= 0.20 * parameters(DENSE)


def test_its_batch_normalizations_need_not_be_folded() -> None:
    source = FOLDER / "fashion_masked.onnx"
    result = onnxopt.shrink(source, data=CALIBRATION, batch_size=128)
    assert result.report.validation is not None
    assert result.report.validation.status == "passed"
    gone = masks.compare(result.model)
    assert gone.removed == gone.dead
    assert gone.blocks == 2
    operators = [node.op_type for node in result.model.graph.node]
    assert operators.count("BatchNormalization") == operators.count("Conv")


def test_the_quantized_model_is_integer_and_small(shrunk: dict[str, Path]) -> None:
    path = shrunk["fashion_masked_qat"]
    gone = masks.compare(onnx.load(path))
    assert gone.blocks == 2
    assert gone.removed >= gone.zero + 0.85 * gone.constant
    assert gone.live_removed == 0
    assert evaluate.initializer_bytes(path) <= 0.06 * evaluate.initializer_bytes(DENSE)
    weights = [t for t in onnx.load(path).graph.initializer if len(t.dims) >= 2]
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("name", ["fashion_masked", "fashion_masked_qat"])
@pytest.mark.parametrize("batch", [1, 200])
def test_they_compute_the_same(shrunk: dict[str, Path], name: str, batch: int) -> None:
    images = evaluate.test_set()[0][:batch]
    before, after = logits(FOLDER / f"{name}.onnx", images), logits(shrunk[name], images)
    np.testing.assert_array_equal(before.argmax(1), after.argmax(1))
    largest = np.abs(before).max()
    error = np.abs(before - after).max()
    # rounding moves a code now and then: one step of the last quantizer, about 1/64
    assert error <= (1e-5 if name == "fashion_masked" else 0.02) * largest


def test_inspect_tells_what_is_dead_and_what_keeps_it() -> None:
    found = {
        item.node: item for item in onnxopt.inspect(FOLDER / "fashion_masked.onnx").dead
    }
    first = found["/blocks/blocks.0/branch/branch.0/conv/Conv"]
    assert first.channels == 32
    assert first.zero + first.constant + first.unused == 16
    assert first.removable == 16
    assert first.kept_by == {}
