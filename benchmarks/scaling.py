"""Does the cost of simplify grow with the model? CPU seconds at 1k, 10k, 100k nodes.

    python benchmarks/scaling.py [NODES ...]

The model is a chain of blocks as an exporter leaves them in a transformer: a shape that
is computed from its input's, Reshapes, Transposes, Identity, Cast, Dropout, MatMul of
weights that are shared. Time per node should stay the same; it is the time of this
process and its children, imports aside, of `simplify(validate=False)` and `save`.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

import onnxopt

SIZES = (1_000, 10_000, 100_000)
HEADS, WIDTH = 2, 8


def block(number: int, source: str) -> tuple[list[NodeProto], str]:
    """One block from value `source`, with the name of what it makes."""
    made: list[NodeProto] = []

    def add(op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"b{number}_{len(made)}_{op_type}"
        made.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    shape = add("Shape", source)
    sizes = [
        add("Unsqueeze", add("Gather", shape, index, axis=0), "zeros")
        for index in ("zero", "one")
    ]
    split = add("Concat", *sizes, "heads", "depth", axis=0)
    joined = add("Concat", *sizes, "width", axis=0)
    kept = add("Dropout", add("Identity", source))
    layer = add("Add", add("MatMul", kept, "weight"), "bias")
    heads = add("Transpose", add("Reshape", layer, split), perm=[0, 2, 1, 3])
    scaled = add("Mul", add("Cast", heads, to=TensorProto.FLOAT), "half")
    back = add("Transpose", add("Softmax", scaled, axis=-1), perm=[0, 2, 1, 3])
    out = add("Add", add("Reshape", back, joined), source)
    return made, out


def model(nodes: int) -> onnx.ModelProto:
    """A chain of blocks with about so many nodes."""
    made: list[NodeProto] = []
    value = "x"
    while len(made) < nodes:
        new, value = block(len(made), value)
        made += new
    made[-1].output[0] = "y"
    random = np.random.default_rng(0)
    constants = {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "zeros": np.array([0], np.int64),
        "heads": np.array([HEADS], np.int64),
        "depth": np.array([WIDTH // HEADS], np.int64),
        "width": np.array([WIDTH], np.int64),
        "half": np.array(0.5, np.float32),
        "weight": random.random((WIDTH, WIDTH), np.float32),
        "bias": random.random(WIDTH, np.float32),
    }
    dims = ["batch", "length", WIDTH]
    graph = helper.make_graph(
        made,
        "scaling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, dims)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )


def cpu_seconds() -> float:
    """Of this process and of children that have ended."""
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def measured(nodes: int, folder: Path) -> tuple[int, int, float]:
    """Nodes before and after, and CPU seconds."""
    path = folder / f"{nodes}.onnx"
    onnx.save(model(nodes), path)
    start = cpu_seconds()
    result = onnxopt.simplify(path, validate=False)
    result.save(folder / f"{nodes}-out.onnx")
    seconds = cpu_seconds() - start
    assert result.report.output is not None
    return result.report.source.nodes, result.report.output.nodes, seconds


def main() -> None:
    """Print a line per size."""
    sizes = [int(text) for text in sys.argv[1:]] or list(SIZES)
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as name:
        folder = Path(name)
        measured(50, folder)  # imports, and caches of schemas
        base = None
        print(f"{'nodes':>8} {'after':>8} {'CPU s':>8} {'us/node':>8} {'ratio':>6}")
        for size in sizes:
            before, after, seconds = measured(size, folder)
            per_node = seconds / before * 1e6
            base = base or per_node
            print(
                f"{before:8d} {after:8d} {seconds:8.2f} {per_node:8.0f} "
                f"{per_node / base:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    os.environ.setdefault("NO_COLOR", "1")
    main()
