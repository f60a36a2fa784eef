"""Accuracy and size of models on the 10,000 Fashion-MNIST test images.

    python models/evaluate.py [--level all] MODEL [MODEL ...]

Prints, for each model: top-1 accuracy, top-1 agreement with the first model, the bytes
of the file and of its initializers.  Needs numpy, onnx and onnxruntime, no torch.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

TEST_FILE = Path(__file__).parent / "data" / "fashion_test.npz"
LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
BATCH = 500


@cache
def test_set() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Images as the models read them (float32 [N, 1, 28, 28] in [0, 1]) and labels."""
    with np.load(TEST_FILE) as stored:
        images, labels = stored["images"], stored["labels"]
    return images[:, None].astype(np.float32) / np.float32(255), labels


def logits(path: str | Path, level: str = "disable") -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    images, _ = test_set()
    batches = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
    return np.concatenate([session.run(None, {name: rows})[0] for rows in batches])


def predictions(path: str | Path, level: str = "disable") -> NDArray[np.int64]:
    return logits(path, level).argmax(axis=1)


def accuracy(path: str | Path, level: str = "disable") -> float:
    """The share of the test images that the model at `path` gets right, 0 to 1."""
    return float((predictions(path, level) == test_set()[1]).mean())


def initializer_bytes(path: str | Path) -> int:
    """Bytes of the main graph's initializers, packed 4-bit types as they are packed."""
    graph = onnx.load(path, load_external_data=False).graph
    return sum(_tensor_bytes(tensor) for tensor in graph.initializer)


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data)
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return onnx.numpy_helper.to_array(tensor).nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--level", choices=LEVELS, default="disable")
    options = parser.parse_args()
    _, labels = test_set()
    width = max(len(path.name) for path in options.models)
    print(
        f"{'model':{width}}  accuracy  agreement  file bytes  initializer bytes"
        f"  ({len(labels)} images, optimization: {options.level})"
    )
    first: NDArray[np.int64] | None = None
    for path in options.models:
        found = predictions(path, options.level)
        first = found if first is None else first
        print(
            f"{path.name:{width}}  {(found == labels).mean():8.2%}"
            f"  {(found == first).mean():9.2%}  {path.stat().st_size:10,}"
            f"  {initializer_bytes(path):17,}"
        )


if __name__ == "__main__":
    main()
