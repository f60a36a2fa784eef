"""Copies of a model that show inner values, or hold a part of it, weights streamed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, ValueInfoProto, helper

from onnxopt import attributes
from onnxopt.data.inputs import Feed
from onnxopt.model import Model
from onnxopt.save import stage


class TapModel:
    """A model file whose main graph can be asked for inner values.

    Only values of the main graph are shown: a node with subgraphs, or a call of a
    function, counts as one.
    """

    def __init__(self, path: Path) -> None:
        self.model = Model.open(path)
        self.graph = self.model.main
        self.nodes = self.graph.nodes()
        self.order = {
            name: index
            for index, node in enumerate(self.nodes)
            for name in node.output
            if name
        }

    def close(self) -> None:
        """Close the files that it reads from."""
        self.model.weights.close()

    def maker(self, name: str) -> NodeProto:
        """The node that makes a value in `order`."""
        return self.nodes[self.order[name]]

    def sources(self, node: NodeProto) -> set[str]:
        """The values that `node` reads, those read inside its subgraphs included."""
        return {name for inner in attributes.nodes_in([node]) for name in inner.input}

    def bytes_of(self, name: str, symbols: Mapping[str, int]) -> int | None:
        """Size of a value where its symbolic dims are `symbols`; None where unknown."""
        dims, kind = self.graph.shape(name), self.graph.dtype(name)
        if dims is None or not kind:
            return None
        sizes = [symbols.get(d) if isinstance(d, str) else d for d in dims]
        if any(size is None for size in sizes):
            return None
        width = helper.tensor_dtype_to_np_dtype(kind).itemsize
        return width * math.prod(size or 0 for size in sizes)

    def symbols(self, feed: Feed) -> dict[str, int]:
        """What the symbolic dims of the inputs are in `feed`."""
        found = {}
        for value in self.model.proto.graph.input:
            array = feed.get(value.name)
            if isinstance(array, np.ndarray):
                dims = value.type.tensor_type.shape.dim
                for dim, size in zip(dims, array.shape, strict=False):
                    if dim.dim_param:
                        found[dim.dim_param] = int(size)
        return found

    def write(self, names: Sequence[str], target: Path) -> Path:
        """Write a copy to `target` whose outputs are `names`, and nothing else."""
        outputs = self.model.proto.graph.output
        before = [ValueInfoProto.FromString(v.SerializeToString()) for v in outputs]
        del outputs[:]
        outputs.extend(ValueInfoProto(name=name) for name in names)
        try:
            stage(self.model, target).commit()
        finally:
            del outputs[:]
            outputs.extend(before)
        return target

    def cut(self, start: Iterable[str], end: str) -> tuple[list[NodeProto], set[str]]:
        """The nodes from values `start` to value `end`, and what of `start` they read."""
        stop, chosen, read = set(start), dict[int, NodeProto](), set[str]()
        stack = [end]
        while stack:
            name = stack.pop()
            if name not in self.order:
                continue
            node = self.maker(name)
            if id(node) in chosen:
                continue
            chosen[id(node)] = node
            for source in self.sources(node):
                if source in stop:
                    read.add(source)
                else:
                    stack.append(source)
        return [node for node in self.nodes if id(node) in chosen], read


def write_part(
    path: Path, start: Mapping[str, Any], end: str, target: Path
) -> Path | None:
    """Write the part of a model that makes value `end` from the values in `start`.

    These become its inputs, of the types and shapes of the arrays given. None where the
    part would still need one of the model's own inputs.
    """
    taps = TapModel(path)
    try:
        nodes, read = taps.cut(start, end)
        graph = taps.model.proto.graph
        kept = {id(node) for node in nodes}
        for index in range(len(graph.node) - 1, -1, -1):
            if id(graph.node[index]) not in kept:
                del graph.node[index]
        needed = {name for node in nodes for name in taps.sources(node)}
        made = {name for node in nodes for name in node.output}
        weights = {tensor.name for tensor in graph.initializer}
        weights |= {item.values.name for item in graph.sparse_initializer}
        own = {value.name for value in graph.input}
        if (needed - made - weights - read) & own:
            return None
        _keep_only(graph, needed, read, end, start)
        stage(taps.model, target).commit()
        return target
    finally:
        taps.close()


def _keep_only(
    graph: Any, needed: set[str], read: set[str], end: str, start: Mapping[str, Any]
) -> None:
    for index in range(len(graph.initializer) - 1, -1, -1):
        if graph.initializer[index].name not in needed - read:
            del graph.initializer[index]
    del graph.input[:]
    del graph.output[:]
    del graph.value_info[:]
    del graph.quantization_annotation[:]
    for name in sorted(read):
        array = np.asarray(start[name])
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    graph.output.append(ValueInfoProto(name=end))
