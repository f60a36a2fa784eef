"""What a run takes at least, before it is tried: the activations alive at once.

A machine that swaps answers no more, so a feed whose activations alone exceed what a
worker may hold is refused and not run. The estimate is a lower bound: values of unknown
shape and everything inside subgraphs count nothing, a node may write over an input that
it is the last to read, and what ONNX Runtime's kernels need besides is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, shape_inference

from onnxopt import attributes, cost, memory
from onnxopt.bare import bare_copy
from onnxopt.data.inputs import Feed
from onnxopt.errors import OnnxoptError, WorkerMemoryError
from onnxopt.model import Model
from onnxopt.runtime import machine_memory

log = logging.getLogger("onnxopt.validate")

Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
_LID = 512 << 20
"""Bytes that shape inference may take to follow the values of shapes."""
_PACKED = {21, 22, 23, 25, 26}
"""Element types of less than a byte."""
_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators whose output is their input's memory."""


def limit(memory_limit: int | None) -> int:
    """Bytes that a worker may hold: what was asked for, else 90 % of the machine's."""
    return memory_limit or int(0.9 * machine_memory())


@dataclass
class Footprint:
    """Peaks of one model by the shapes of its inputs; each is computed once."""

    path: Path

    def __post_init__(self) -> None:
        self._bare: ModelProto | None = None
        self._opened = False
        self._peaks: dict[Shapes, int] = {}

    def refuse_above(self, most: int, feed: Feed) -> None:
        """Raise WorkerMemoryError where a run on `feed` takes more than `most` bytes."""
        needed = self.peak(feed)
        if needed > most:
            sizes = ", ".join(f"{name} {list(dims)}" for name, dims in _shapes(feed))
            raise WorkerMemoryError(
                f"not run: its activations take at least {_gib(needed)} at once "
                f"(limit {_gib(most)}) with inputs {sizes}"
            )

    def peak(self, feed: Feed) -> int:
        """Bytes of activations that are alive at once, at least; 0 where unknown."""
        shapes = _shapes(feed)
        if shapes not in self._peaks:
            self._peaks[shapes] = self._measured(dict(shapes))
        return self._peaks[shapes]

    def macs(self, feed: Feed) -> int:
        """Multiply-accumulates of a run, at least; 0 where unknown."""
        try:
            model = Model.open(self.path)
            _fix_inputs(model.proto.graph, dict(_shapes(feed)))
            return cost.known_macs(model)
        except (OnnxoptError, OSError, ValueError) as error:
            log.info("the work of a run could not be estimated: %s", error)
            return 0

    def _measured(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        bare = self._copy()
        if bare is None:
            return 0
        try:
            return _peak(_inferred(bare, shapes).graph)
        except (shape_inference.InferenceError, ValueError, RuntimeError) as error:
            log.info("the memory of a run could not be estimated: %s", error)
            return 0

    def _copy(self) -> ModelProto | None:
        """The model without its weights; None where it cannot be read by us."""
        if not self._opened:
            self._opened = True
            try:
                self._bare = bare_copy(Model.open(self.path))
            except (OnnxoptError, OSError, ValueError) as error:
                log.info("the memory of a run could not be estimated: %s", error)
        return self._bare


def _shapes(feed: Feed) -> Shapes:
    arrays = ((name, value) for name, value in feed.items())
    return tuple(
        (name, tuple(value.shape))
        for name, value in arrays
        if isinstance(value, np.ndarray)
    )


def _inferred(bare: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> ModelProto:
    model = ModelProto()
    model.CopyFrom(bare)
    _fix_inputs(model.graph, shapes)
    try:
        with memory.at_most(_LID + 8 * model.ByteSize()):
            return shape_inference.infer_shapes(model, data_prop=True)
    except MemoryError:
        return shape_inference.infer_shapes(model)


def _fix_inputs(graph: GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for value in graph.input:
        if value.name in shapes and value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
            for size in shapes[value.name]:
                value.type.tensor_type.shape.dim.add().dim_value = size


def _peak(graph: GraphProto) -> int:
    """The most bytes of inner values alive at once.

    In the order of the file or in that of ONNX Runtime, whichever takes less.
    """
    size, ends = _sizes(graph), [value.name for value in graph.output]
    in_turn = [graph.node[index] for index in _depth_first(graph.node)]
    return min(_peak_of(nodes, size, ends) for nodes in (graph.node, in_turn))


def _depth_first(nodes: Sequence[NodeProto]) -> list[int]:
    """Indices of the nodes in the order in which ONNX Runtime runs them by default.

    From the ends of the graph backwards, so that a branch is done before the next.
    """
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    before = [
        sorted({maker[n] for n in attributes.reads(node) if n in maker}) for node in nodes
    ]
    read = {index for sources in before for index in sources}
    stack = [(index, False) for index in range(len(nodes)) if index not in read]
    order: list[int] = []
    seen: set[int] = set()
    while stack:
        index, done = stack.pop()
        if done:
            order.append(index)
        elif index not in seen:
            seen.add(index)
            stack.append((index, True))
            stack += [(source, False) for source in before[index]]
    return order


def _peak_of(
    nodes: Sequence[NodeProto], size: Mapping[str, int], ends: Sequence[str]
) -> int:
    last = _last_reads(nodes, ends)
    alive: dict[str, int] = {}
    total = most = 0
    for index, node in enumerate(nodes):
        dying = [n for n in dict.fromkeys(attributes.reads(node)) if last.get(n) == index]
        made = {name: size.get(name, 0) for name in node.output if name}
        if node.op_type in _VIEWS:
            # It takes over what its input holds, which is nothing if others read that.
            held = alive.get(node.input[0], 0) if node.input[0] in dying else 0
            made = dict.fromkeys(made, held)
        total += sum(made.values())
        most = max(most, total - _reused(made, [alive.get(n, 0) for n in dying]))
        alive |= made
        for name in (*dying, *(n for n in made if n not in last)):
            total -= alive.pop(name, 0)
    return most


def _reused(made: Mapping[str, int], dying: list[int]) -> int:
    """Bytes that need no room of their own: outputs over inputs of the same size."""
    free = list(dying)
    total = 0
    for wanted in made.values():
        if wanted and wanted in free:
            free.remove(wanted)
            total += wanted
    return total


def _last_reads(nodes: Sequence[NodeProto], ends: Sequence[str]) -> dict[str, int]:
    """The last node that reads each value; outputs of the graph live on."""
    last = {n: i for i, node in enumerate(nodes) for n in attributes.reads(node)}
    return last | dict.fromkeys(ends, len(nodes))


def _sizes(graph: GraphProto) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in (*graph.value_info, *graph.output):
        tensor: Any = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
        if value.type.HasField("tensor_type") and tensor.HasField("shape"):
            found[value.name] = math.prod(dims) * _item_bytes(tensor.elem_type)
    return found


def _item_bytes(elem_type: int) -> int:
    """Bytes of an element, 0 for strings and for what is packed."""
    try:
        dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    except KeyError:
        return 0
    return 0 if elem_type in _PACKED or dtype.kind == "O" else int(dtype.itemsize)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
