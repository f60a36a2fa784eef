"""Does the cost of shrink grow with the model? CPU seconds at 1k and 10k nodes.

    python benchmarks/channels_scaling.py [NODES ...]

Three networks with masks: residual blocks of convolutions with a stream that all of them
share, dense blocks whose Concats grow, and transformer layers with heads behind Reshape
and Transpose. In each a third of the channels that can go is zero. Time per node should
stay the same; it is the time of this process and its children, imports aside, of the
analysis (facts, demand, groups and the decision) and of `shrink(validate=False)`, each on
its own, with `save`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.channels.decision import Decision
from onnxopt.channels.engine import analyse
from onnxopt.channels.groups import Groups
from onnxopt.evaluate import Evaluator
from onnxopt.model import Model

if __package__:
    from benchmarks.scaling import cpu_seconds
else:
    from scaling import cpu_seconds

SIZES = (1_000, 10_000)
WIDTH, GROWTH, LAYERS, HEADS = 16, 4, 8, 4
MASKED = 1 / 3

Floats = npt.NDArray[np.float32]


class Network:
    """Nodes and weights, while they are made."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, npt.NDArray[np.generic]] = {}
        self.random = np.random.default_rng(0)

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        """A node; the name of what it makes."""
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def weight(self, array: npt.NDArray[np.generic]) -> str:
        """A constant; its name."""
        name = f"w{len(self.weights)}"
        self.weights[name] = array
        return name

    def mask(self, size: int) -> npt.NDArray[np.bool_]:
        """Which of so many channels stay: never none."""
        kept = self.random.random(size) >= MASKED
        kept[0] = True
        return kept

    def masked(self, shape: tuple[int, ...], axis: int) -> str:
        """A weight of which a third of the channels along `axis` is zero."""
        array = self.random.standard_normal(shape).astype(np.float32) / 8
        kept = self.mask(shape[axis])
        dims = [1] * len(shape)
        dims[axis] = -1
        return self.weight(array * kept.reshape(dims))

    def full(self, *shape: int) -> str:
        """A weight without zeros."""
        return self.weight(self.random.standard_normal(shape).astype(np.float32) / 8)

    def norm(self, value: str, size: int) -> str:
        """BatchNormalization and Relu."""
        zeros, ones = np.zeros(size, np.float32), np.ones(size, np.float32)
        names = [self.full(size), *map(self.weight, (zeros, zeros, ones))]
        return self.add("Relu", self.add("BatchNormalization", value, *names))

    def model(self, dims: list[int | str], output: str) -> onnx.ModelProto:
        """The network as a model."""
        self.nodes.append(helper.make_node("Identity", [output], ["y"], "last"))
        graph = helper.make_graph(
            self.nodes,
            "scaling",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [
                numpy_helper.from_array(array, name)
                for name, array in self.weights.items()
            ],
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        )


def residual(nodes: int) -> onnx.ModelProto:
    """A stream of channels that every block adds to."""
    net = Network()
    stream = net.add("Conv", "x", net.full(WIDTH, 3, 1, 1))
    while len(net.nodes) < nodes:
        first = net.masked((WIDTH, WIDTH, 3, 3), 0)
        inner = net.norm(net.add("Conv", stream, first, pads=[1, 1, 1, 1]), WIDTH)
        second = net.full(WIDTH, WIDTH, 3, 3)
        outer = net.norm(net.add("Conv", inner, second, pads=[1, 1, 1, 1]), WIDTH)
        stream = net.add("Relu", net.add("Add", stream, outer))
    return net.model(["batch", 3, 8, 8], stream)


def dense(nodes: int) -> onnx.ModelProto:
    """Blocks of layers, each of which reads all before it in the block."""
    net = Network()
    value = net.add("Conv", "x", net.full(WIDTH, 3, 1, 1))
    while len(net.nodes) < nodes:
        size = WIDTH
        for _ in range(LAYERS):
            given = net.norm(value, size)
            new = net.add(
                "Conv", given, net.masked((GROWTH, size, 3, 3), 0), pads=[1] * 4
            )
            value, size = net.add("Concat", value, new, axis=1), size + GROWTH
        value = net.add("Conv", net.norm(value, size), net.masked((WIDTH, size, 1, 1), 0))
    return net.model(["batch", 3, 8, 8], value)


def transformer(nodes: int) -> onnx.ModelProto:
    """Attention and a feed-forward layer with a third of its units, by turns."""
    net = Network()
    depth = WIDTH // HEADS
    split = net.weight(np.array([0, 0, HEADS, depth], np.int64))
    joined = net.weight(np.array([0, 0, WIDTH], np.int64))
    scale = net.weight(np.array(depth**-0.5, np.float32))
    value = "x"

    def heads(value: str, perm: list[int], weight: str) -> str:
        made = net.add("Add", net.add("MatMul", value, weight), net.full(WIDTH))
        return net.add("Transpose", net.add("Reshape", made, split), perm=perm)

    while len(net.nodes) < nodes:
        given = net.add(
            "LayerNormalization", value, net.full(WIDTH), net.full(WIDTH), axis=-1
        )
        query = heads(given, [0, 2, 1, 3], net.full(WIDTH, WIDTH))
        key = heads(given, [0, 2, 3, 1], net.full(WIDTH, WIDTH))
        kept = np.repeat(net.mask(HEADS), depth)
        matrix = net.random.standard_normal((WIDTH, WIDTH)).astype(np.float32) * kept
        content = heads(given, [0, 2, 1, 3], net.weight(matrix))
        scores = net.add("Mul", net.add("MatMul", query, key), scale)
        mixed = net.add("MatMul", net.add("Softmax", scores, axis=-1), content)
        back = net.add("Reshape", net.add("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        value = net.add("Add", value, net.add("MatMul", back, net.full(WIDTH, WIDTH)))
        up = net.add("MatMul", value, net.masked((WIDTH, 2 * WIDTH), 1))
        down = net.add("MatMul", net.add("Relu", up), net.full(2 * WIDTH, WIDTH))
        value = net.add("Add", value, down)
    return net.model(["batch", "length", WIDTH], value)


NETWORKS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "residual": residual,
    "dense": dense,
    "transformer": transformer,
}


def analysed(path: Path) -> float:
    """CPU seconds to know which channels of a model go."""
    start = cpu_seconds()
    model = Model.open(path)
    with Evaluator() as evaluator:
        Decision(Groups(analyse(model.main, evaluator)))
    model.weights.close()
    return cpu_seconds() - start


def shrunk(path: Path) -> tuple[float, onnxopt.Result]:
    """CPU seconds to take them out, and what came of it."""
    start = cpu_seconds()
    result = onnxopt.shrink(path, validate=False)
    result.save(path.with_suffix(".out.onnx"))
    return cpu_seconds() - start, result


def main() -> None:
    """Print a line per network and size."""
    sizes = [int(text) for text in sys.argv[1:]] or list(SIZES)
    print(
        f"{'network':12} {'nodes':>7} {'analysis s':>10} {'shrink s':>9} "
        f"{'us/node':>8} {'parameters':>22}"
    )
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as name:
        for label, build in NETWORKS.items():
            path = Path(name) / f"{label}.onnx"
            onnx.save(build(100), path)
            shrunk(path)  # imports, and caches of schemas
            for size in sizes:
                onnx.save(build(size), path)
                analysis = analysed(path)
                seconds, result = shrunk(path)
                before, after = result.report.source, result.report.output
                assert after is not None
                change = f"{before.parameters:,} -> {after.parameters:,}"
                print(
                    f"{label:12} {before.nodes:7d} {analysis:10.2f} {seconds:9.2f} "
                    f"{1e6 * seconds / before.nodes:8.0f} {change:>22}",
                    flush=True,
                )


if __name__ == "__main__":
    os.environ.setdefault("NO_COLOR", "1")
    main()
