"""Second moments of what layers read, by running the model itself with a few nodes more.

    P = Conv(x, one-hot kernel)       the patches that the Conv sees, as channels
    G = MatMul(P, P^T)                summed over positions: x x^T of the layer

The products are made in ONNX Runtime, next to the values; only [inputs, inputs] leaves
it. Of a large value positions are taken at even distances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper, numpy_helper

from onnxopt import attributes
from onnxopt.quantization.calibration import Calibration
from onnxopt.runtime import Worker
from onnxopt.validation.taps import Probe, TapModel

Floats = npt.NDArray[np.float64]

MOST_POSITIONS = 512
"""Of one sample so many positions of a layer are looked at, about."""
MOST_INPUTS = 2304
"""A layer with more inputs to one output has no moments: they take inputs^2."""
_LOT = 1 << 26
"""Elements of the moments that are summed in one run of the model."""


class Moments(msgspec.Struct):
    """Sums over what one layer read.

    `products` [groups, inputs, inputs], the sum of x x^T; `sums` [groups, inputs], that
    of x; `count`, of how many positions. Inputs are in the order of the weight's axes
    behind the output channel.
    """

    products: Floats
    sums: Floats
    count: int = 0

    @property
    def means(self) -> Floats:
        """The mean of each input."""
        return self.sums / max(self.count, 1)


def layer_moments(
    path: Path, nodes: Sequence[NodeProto], calibration: Calibration
) -> dict[str, Moments]:
    """The moments of Conv, Gemm and MatMul nodes, by the name of their first output.

    `nodes` are those of the file at `path`. A layer that is too wide is left out. Raises
    as `Calibration.run`.
    """
    found: dict[str, Moments] = {}
    with (
        TemporaryDirectory(prefix="onnxopt-") as folder,
        Worker(
            timeout=calibration.timeout, memory_limit=calibration.memory_limit
        ) as worker,
    ):
        for lot in _lots(path, nodes):
            part = Path(folder) / "moments.onnx"
            _write(path, lot, part)
            session = worker.load(part, calibration.spec())
            taken = {value.name for value in session.inputs}
            for feed in calibration.feeds:
                given = {name: feed[name] for name in feed if name in taken}
                _add(found, session.run(given), lot)
            session.close()
    return found


class _Size(msgspec.Struct, frozen=True):
    groups: int
    inputs: int


def _lots(path: Path, nodes: Sequence[NodeProto]) -> list[list[tuple[NodeProto, _Size]]]:
    taps = TapModel(path)
    lots: list[list[tuple[NodeProto, _Size]]] = [[]]
    held = 0
    try:
        for node in nodes:
            size = _size(taps, node)
            if size is None or size.inputs > MOST_INPUTS:
                continue
            elements = size.groups * size.inputs**2
            if lots[-1] and held + elements > _LOT:
                lots.append([])
                held = 0
            lots[-1].append((node, size))
            held += elements
    finally:
        taps.close()
    return [lot for lot in lots if lot]


def _size(taps: TapModel, node: NodeProto) -> _Size | None:
    weight = taps.graph.weight(node.input[1])
    if weight is None:
        return None
    dims = list(weight.dims)
    if node.op_type == "Conv":
        return _Size(int(attributes.get(node, "group", 1)), math.prod(dims[1:]))
    transposed = node.op_type == "Gemm" and attributes.get(node, "transB", 0)
    return _Size(1, dims[1] if transposed else dims[0])


def _write(path: Path, lot: Sequence[tuple[NodeProto, _Size]], target: Path) -> None:
    """The model with three outputs for each layer: moments, sums, and a shape."""
    taps = TapModel(path)
    try:
        probes = [
            _Prober(taps, node, size, f"onnxopt_{index}").probe()
            for index, (node, size) in enumerate(lot)
        ]
        taps.write([node.input[0] for node, _ in lot], target, probes)
    finally:
        taps.close()


class _Prober:
    """Makes the nodes that sum x x^T, and x, over the positions of one layer."""

    def __init__(self, taps: TapModel, node: NodeProto, size: _Size, prefix: str) -> None:
        self.node, self.size, self.prefix = node, size, prefix
        self.shape = taps.graph.shape(node.output[0])
        weight = taps.graph.weight(node.input[1])
        self.kernel = list(weight.dims[2:]) if weight is not None else []
        self.made = Probe([], [], [])

    def probe(self) -> Probe:
        """Outputs: G [groups, inputs, inputs], S [groups, inputs], and X's shape."""
        seen = self._patches() if self.node.op_type == "Conv" else self._rows()
        flipped = self._op("Transpose", [seen], "T", perm=[0, 2, 1])
        self.made.outputs = [
            self._op("MatMul", [seen, flipped], "G"),
            self._op("ReduceSum", [seen, self._ints("axes", [2])], "S", keepdims=0),
            self._op("Shape", [seen], "N"),
        ]
        return self.made

    def _patches(self) -> str:
        """What a Conv sees, as [groups, inputs, positions]."""
        node, (groups, inputs) = self.node, (self.size.groups, self.size.inputs)
        kernel = self.kernel
        shaped = np.eye(inputs, dtype=np.float32).reshape(inputs, -1, *kernel)
        name = self._weight("eye", np.tile(shaped, (groups, *[1] * (shaped.ndim - 1))))
        settings = {a.name: attributes.value_of(a) for a in node.attribute}
        settings["strides"] = self._strides(settings, len(kernel))
        seen = self._op("Conv", [node.input[0], name], "P", **settings)
        parts = self._ints("parts", [0, groups, inputs, -1])
        seen = self._op("Reshape", [seen, parts], "R")
        seen = self._op("Transpose", [seen], "Q", perm=[1, 2, 0, 3])
        return self._op("Reshape", [seen, self._ints("flat", [groups, inputs, -1])], "X")

    def _strides(self, settings: Mapping[str, Any], rank: int) -> list[int]:
        """Wider ones where the output has more positions than are looked at."""
        strides = [int(size) for size in settings.get("strides") or [1] * rank]
        if settings.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return strides  # the padding would move
        step = max(1, math.isqrt(self._positions() // MOST_POSITIONS))
        return [size * step for size in strides]

    def _positions(self) -> int:
        dims = (self.shape or ())[2:] if self.node.op_type == "Conv" else self.shape or ()
        return math.prod(dim for dim in dims if isinstance(dim, int))

    def _rows(self) -> str:
        """What a product sees, as [1, inputs, positions]."""
        flat = self._ints("flat", [1, -1, self.size.inputs])
        seen = self._op("Reshape", [self.node.input[0], flat], "R")
        return self._op("Transpose", [seen], "X", perm=[0, 2, 1])

    def _op(self, op_type: str, inputs: Sequence[str], mark: str, **settings: Any) -> str:
        name = f"{self.prefix}_{mark}"
        self.made.nodes.append(helper.make_node(op_type, inputs, [name], **settings))
        return name

    def _ints(self, mark: str, values: Sequence[int]) -> str:
        return self._weight(mark, np.array(values, np.int64))

    def _weight(self, mark: str, array: Any) -> str:
        name = f"{self.prefix}_{mark}"
        self.made.weights.append(numpy_helper.from_array(array, name))
        return name


def _add(
    found: dict[str, Moments],
    values: Mapping[str, Any],
    lot: Sequence[tuple[NodeProto, _Size]],
) -> None:
    """Add what one sample gave."""
    for index, (node, size) in enumerate(lot):
        products, sums, shape = (values[f"onnxopt_{index}_{mark}"] for mark in "GSN")
        one = found.get(node.output[0])
        if one is None:
            one = found[node.output[0]] = Moments(
                np.zeros((size.groups, size.inputs, size.inputs)),
                np.zeros((size.groups, size.inputs)),
            )
        one.products += products
        one.sums += sums
        one.count += int(shape[2])
