"""The main job on our own models: before and after, measured on 10,000 test images.

    python benchmarks/main_job.py

For each model it runs `onnxopt.optimize` with its proof on the calibration images, and
compares the result with the original: file and weight bytes, nodes, top-1 accuracy and
agreement, and whether every integer weight is the code that ONNX Runtime computes in
the original (asked of ONNX Runtime itself, without onnxopt). Exits with 1 where one of
the figures that the project promises does not hold.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, ValueInfoProto, numpy_helper

import onnxopt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.evaluate import initializer_bytes, predictions, test_set  # noqa: E402

CALIBRATION = ROOT / "models" / "data" / "fashion_calib.npz"
MODELS = ("fashion_float", "fashion_qat_legacy", "fashion_qat_dynamo")
MAX_WEIGHT_RATIO = 0.27
MAX_DROP = 0.0005
MIN_AGREEMENT = 0.999


def main() -> int:
    """Print the table; 0 where every promise holds."""
    print(f"{'model':20} {'':7} {'bytes':>10} {'weights':>10} {'nodes':>6} {'top-1':>8}")
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            source = ROOT / "models" / f"{name}.onnx"
            target = Path(folder) / f"{name}.onnx"
            result = onnxopt.optimize(source, data=CALIBRATION, batch_size=64)
            result.save(target)
            problems += _compare(name, source, target, result.report)
    for problem in problems:
        print(f"NOT MET: {problem}")
    return 1 if problems else 0


def _compare(name: str, source: Path, target: Path, report: onnxopt.Report) -> list[str]:
    labels = test_set()[1]
    before, after = predictions(source), predictions(target)
    accuracies = [float((guess == labels).mean()) for guess in (before, after)]
    sizes = [initializer_bytes(path) for path in (source, target)]
    assert report.output is not None
    assert report.validation is not None
    sides = (report.source, report.output)
    for label, side, size, accuracy in zip(
        ("before", "after"), sides, sizes, accuracies, strict=True
    ):
        print(
            f"{name if label == 'before' else '':20} {label:7} {side.bytes.model:>10,} "
            f"{size:>10,} {side.nodes:>6} {accuracy:>8.2%}"
        )
    agreement = float((before == after).mean())
    equal, codes = _equal_codes(source, target)
    print(
        f"{'':20} {'ratio':7} {sides[1].bytes.model / sides[0].bytes.model:>10.3f} "
        f"{sizes[1] / sizes[0]:>10.3f} {'':6} agreement {agreement:.2%}, "
        f"{equal} of {codes} integer weights equal, {report.validation.status}"
    )
    problems = []
    if report.validation.status != "passed":
        problems.append(f"{name}: validation {report.validation.status}")
    if codes and sizes[1] > MAX_WEIGHT_RATIO * sizes[0]:
        problems.append(f"{name}: weights at {sizes[1] / sizes[0]:.3f}")
    if equal != codes:
        problems.append(f"{name}: {codes - equal} integer weights differ")
    if accuracies[0] - accuracies[1] > MAX_DROP or agreement < MIN_AGREEMENT:
        problems.append(f"{name}: accuracy or agreement moved")
    return problems


def _equal_codes(source: Path, target: Path) -> tuple[int, int]:
    """How many quantized weights there are, and how many are ONNX Runtime's own codes."""
    original, result = onnx.load(source), onnx.load(target)
    weights = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    expected = _codes(original, list(_weight_quantizers(original)))
    equal = [
        name in weights
        and weights[name].dtype == codes.dtype
        and np.array_equal(weights[name], codes)
        for name, codes in expected.items()
    ]
    return sum(equal), len(equal)


def _weight_quantizers(model: ModelProto) -> Iterator[str]:
    """Outputs of QuantizeLinear nodes that depend on no input of the graph."""
    varying = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if varying.intersection(node.input):
            varying.update(node.output)
        elif node.op_type == "QuantizeLinear":
            yield node.output[0]


def _codes(model: ModelProto, names: list[str]) -> dict[str, np.ndarray]:
    """The values of `names`, computed by ONNX Runtime in the original model."""
    if not names:
        return {}
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for name in names:
        copy.graph.output.append(ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        copy.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    shape = [dim if isinstance(dim, int) else 1 for dim in session.get_inputs()[0].shape]
    feed = {session.get_inputs()[0].name: np.zeros(shape, np.float32)}
    return dict(zip(names, session.run(names, feed), strict=True))


if __name__ == "__main__":
    sys.exit(main())
