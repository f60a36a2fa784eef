"""Peak memory of simplifying a model whose weights are larger than memory should be.

    python benchmarks/memory.py [--gib 2.25] [--folder DIR] [--json]

Writes a chain of MatMul and Conv nodes with random weights in external data (once, in
a temporary folder), with Identity nodes, BatchNormalizations and constants to fold
between them, and runs `python -m onnxopt simplify IN -o OUT --no-validate` on it as a
process of its own. Peak is `ru_maxrss` of that process, or of the largest one that it
started; a bare `import onnx` stands beside it. Linux; needs twice the size on disk.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.process import Cost, measure  # noqa: E402

GIB = 1 << 30
CHUNK = 1 << 20
WIDTH = 4096
CHANNELS = 1024
LIMIT_MB = 200.0
"""What the run may need at most."""


def simplify_cost(folder: Path, gib: float = 2.25) -> tuple[list[Cost], str]:
    """Bare import and `simplify` of a model of `gib` GiB; what it did, in words."""
    source, target = folder / "model.onnx", folder / "simple.onnx"
    before = write_model(source, gib)
    report = folder / "report.json"
    command = [sys.executable, "-m", "onnxopt", "simplify", str(source)]
    command += ["-o", str(target), "--no-validate", "--report", str(report)]
    costs = [
        measure("import onnx", [sys.executable, "-c", "import onnx"]),
        measure("onnxopt simplify --no-validate", command),
    ]
    made = json.loads(report.read_text())
    size = made["output"]["bytes"]["data"] / GIB
    edits = {item["name"]: item["edits"] for item in made["passes"] if item["edits"]}
    words = f"{before} -> {made['output']['nodes']} nodes, {size:.2f} GiB, edits: {edits}"
    return costs, words


# ---- the model ----


class _Weights:
    """Writes random float32 weights to the data file and lists their tensors."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.tensors: list[TensorProto] = []
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._random = np.random.default_rng(0)

    def close(self) -> None:
        self._file.close()

    def add(self, name: str, dims: Sequence[int]) -> str:
        """Of such a size that a product with them has the variance of its input."""
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        count, offset = int(np.prod(dims)), self._file.tell()
        scale = np.float32(math.sqrt(12 / math.prod(dims[1:])) if dims[1:] else 1)
        entries = {"location": self.name, "offset": offset, "length": count * 4}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        for start in range(0, count, CHUNK):
            values = self._random.random(min(CHUNK, count - start), np.float32)
            self._file.write(((values - np.float32(0.5)) * scale).tobytes())
        self.tensors.append(tensor)
        return name


def write_model(path: Path, gib: float) -> int:
    """Write a model with about `gib` GiB of weights; returns its number of nodes."""
    weights = _Weights(path.with_suffix(".bin"))
    matmuls = max(1, round(gib * 0.75 * GIB / (4 * WIDTH * WIDTH)))
    convs = max(2, round(gib * 0.25 * GIB / (4 * 9 * CHANNELS * CHANNELS)))
    nodes = _matmuls(weights, matmuls) + _convs(weights, convs)
    weights.close()
    first = numpy_helper.from_array(np.array([0]), "first")
    rest = numpy_helper.from_array(np.array([CHANNELS, 2, 2]), "rest")
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CHANNELS, 2, 2])],
        [*weights.tensors, first, rest],
    )
    model = helper.make_model(
        graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]
    )
    path.write_bytes(ModelProto.SerializeToString(model))
    return len(nodes)


def _matmuls(weights: _Weights, count: int) -> list[NodeProto]:
    """x -> MatMul -> Identity -> Add of a constant that is yet to be computed."""
    nodes = []
    for index in range(count):
        weight = weights.add(f"w{index}", (WIDTH, WIDTH))
        half = numpy_helper.from_array(np.full(WIDTH, 0.5, np.float32))
        nodes += [
            helper.make_node("MatMul", [f"x{index}", weight], [f"m{index}"]),
            helper.make_node("Identity", [f"m{index}"], [f"i{index}"]),
            helper.make_node("Constant", [], [f"c{index}"], value=half),
            helper.make_node("Neg", [f"c{index}"], [f"n{index}"]),
            helper.make_node("Add", [f"i{index}", f"n{index}"], [f"x{index + 1}"]),
        ]
    return [
        *nodes,
        helper.make_node("Shape", [f"x{count}"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", [f"x{count}", "shape"], ["z0"]),
    ]


def _convs(weights: _Weights, count: int) -> list[NodeProto]:
    """z -> Conv -> BatchNormalization on every fourth -> Relu."""
    nodes = []
    for index in range(count):
        weight = weights.add(f"k{index}", (CHANNELS, CHANNELS, 3, 3))
        made = f"v{index}"
        nodes.append(
            helper.make_node("Conv", [f"z{index}", weight], [made], pads=[1, 1, 1, 1])
        )
        if index % 4 == 0:
            scales = [weights.add(f"b{index}_{part}", (CHANNELS,)) for part in range(3)]
            variance = numpy_helper.from_array(
                np.ones(CHANNELS, np.float32), f"b{index}_3"
            )
            weights.tensors.append(variance)
            nodes.append(
                helper.make_node(
                    "BatchNormalization", [made, *scales, variance.name], [f"b{index}"]
                )
            )
            made = f"b{index}"
        after = "y" if index == count - 1 else f"z{index + 1}"
        nodes.append(helper.make_node("Relu", [made], [after]))
    return nodes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.25, help="weights, in GiB")
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        costs, words = simplify_cost(Path(folder), given.gib)
    if given.json:
        print(json.dumps([asdict(cost) for cost in costs]))
        return
    print(f"{given.gib} GiB of external data: {words}\n")
    print(f"{'process':34} {'peak MB':>8} {'CPU s':>7}")
    for cost in costs:
        print(f"{cost.what:34} {cost.peak_mb:8.0f} {cost.cpu_seconds:7.2f}")
    print(f"\nlimit: {LIMIT_MB:.0f} MB; again: python benchmarks/memory.py")


if __name__ == "__main__":
    main()
