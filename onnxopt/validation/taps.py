"""Copies of a model that show inner values, or hold a part of it, weights streamed."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from onnx import (
    GraphProto,
    NodeProto,
    TensorProto,
    TensorShapeProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from onnxopt import attributes
from onnxopt.data.inputs import Feed
from onnxopt.model import Model
from onnxopt.save import stage

UNKNOWN_BYTES = 1 << 20
"""What a value is taken to need where its size is not known."""


class Probe(msgspec.Struct):
    """Nodes that compute something of inner values, and what they call it."""

    nodes: list[NodeProto]
    weights: list[TensorProto]
    outputs: list[str]


class TapModel:
    """A model file whose main graph can be asked for inner values.

    Only values of the main graph are shown: a node with subgraphs, or a call of a
    function, counts as one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = Model.open(path)
        self.graph = self.model.main
        self.nodes = self.graph.nodes()
        self.order = {
            name: index
            for index, node in enumerate(self.nodes)
            for name in node.output
            if name
        }
        self.digests: dict[str, bytes] = {}  # of constants, once they were read

    def close(self) -> None:
        """Close the files that it reads from."""
        self.model.weights.close()

    @property
    def inputs(self) -> list[str]:
        """The names of what the main graph takes, initializers with defaults aside."""
        graph = self.model.proto.graph
        held = {tensor.name for tensor in graph.initializer}
        held |= {item.values.name for item in graph.sparse_initializer}
        return [value.name for value in graph.input if value.name not in held]

    @property
    def outputs(self) -> list[str]:
        """The names of what the main graph gives."""
        return [value.name for value in self.model.proto.graph.output]

    def maker(self, name: str) -> NodeProto:
        """The node that makes a value in `order`."""
        return self.nodes[self.order[name]]

    def sources(self, node: NodeProto) -> set[str]:
        """The values that `node` reads, those read inside its subgraphs included."""
        return set(attributes.reads(node))

    def followers(self, name: str) -> set[str]:
        """All values that depend on value `name`."""
        found = {name}
        for node in self.nodes:
            if not found.isdisjoint(self.sources(node)):
                found.update(node.output)
        return found - {name}

    def readers(self, names: Collection[str], start: Collection[str]) -> set[str]:
        """The values whose making, from values `start`, begins with one of `names`."""
        found = set[str]()
        for node in self.nodes:
            for source in self.sources(node):
                if source in names or (source in found and source not in start):
                    found.update(node.output)
                    break
        return found

    def alive_after(self, index: int) -> list[str]:
        """What the nodes up to `index` make and others read; no constants."""
        return [
            name
            for name, last in self._last_reads.items()
            if self.order[name] <= index < last and self.maker(name).op_type != "Constant"
        ]

    @functools.cached_property
    def _last_reads(self) -> dict[str, int]:
        reads = enumerate(map(self.sources, self.nodes))
        return {name: i for i, names in reads for name in names if name in self.order}

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

    def chunks(self, names: Iterable[str], feed: Feed, limit: int) -> Iterator[list[str]]:
        """The names, in lots whose values take no more than `limit` bytes or are one."""
        symbols = self.symbols(feed)
        chunk: list[str] = []
        size = 0
        for name in names:
            known = self.bytes_of(name, symbols)
            more = UNKNOWN_BYTES if known is None else known
            if chunk and size + more > limit:
                yield chunk
                chunk, size = [], 0
            chunk.append(name)
            size += more
        if chunk:
            yield chunk

    def write(
        self, names: Sequence[str], target: Path, more: Sequence[Probe] = ()
    ) -> Path:
        """Write a copy to `target` whose outputs are `names`, and what makes them.

        With probes, their outputs take the place of the values themselves.
        """
        taps = TapModel(self.path)
        try:
            graph = taps.model.proto.graph
            nodes, _ = taps.cut((), names)
            _keep_nodes(taps, nodes, (), {})
            _keep_weights(taps, nodes, {value.name for value in graph.input})
            for field in ("output", "quantization_annotation"):
                graph.ClearField(field)
            ends = [name for probe in more for name in probe.outputs] or names
            for probe in more:
                graph.node.extend(probe.nodes)
                graph.initializer.extend(probe.weights)
            graph.output.extend(ValueInfoProto(name=name) for name in ends)
            stage(taps.model, target, hashes=False).commit()
        finally:
            taps.close()
        return target

    def cut(
        self, start: Collection[str], ends: Iterable[str]
    ) -> tuple[list[NodeProto], set[str]]:
        """The nodes from values `start` to values `ends`, and what of `start` they read.

        An end is made even where it is among `start`.
        """
        chosen, read = set[int](), set[str]()
        stack = list(ends)
        while stack:
            name = stack.pop()
            index = self.order.get(name)
            if index is None or index in chosen:
                continue
            chosen.add(index)
            for source in self.sources(self.nodes[index]):
                if source in start:
                    read.add(source)
                else:
                    stack.append(source)
        return [self.nodes[index] for index in sorted(chosen)], read


def write_part(
    path: Path,
    ends: Mapping[str, str],
    given: Mapping[str, int],
    target: Path,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write the part of a model that makes some values from others.

    `ends`: the values made, and what each is called in the part, where its own name may
    be that of an input. `given`: the inputs of the part, all of them whether read or
    not, with the element type (TensorProto.DataType) of those that are no inputs of the
    model; sizes are open but where `shapes` says them.
    """
    taps = TapModel(path)
    try:
        nodes, _ = taps.cut(given, ends)
        _keep_nodes(taps, nodes, given, ends)
        _keep_ends(taps, nodes, given, list(ends.values()))
        _fix_shapes(taps.model.proto.graph, shapes or {})
        stage(taps.model, target, hashes=False).commit()
    finally:
        taps.close()


def _keep_nodes(
    taps: TapModel,
    nodes: Sequence[NodeProto],
    given: Collection[str],
    ends: Mapping[str, str],
) -> None:
    """Leave nothing but `nodes`; what they make and is given too gets another name."""
    graph = taps.model.proto.graph
    kept = {id(node) for node in nodes}
    _keep(graph.node, [id(node) in kept for node in graph.node])
    for node in nodes:
        for index, name in enumerate(node.output):
            if name in ends:
                node.output[index] = ends[name]
            elif name in given:
                node.output[index] = taps.model.fresh(f"{name}/made")


def _keep_ends(
    taps: TapModel,
    nodes: Sequence[NodeProto],
    given: Mapping[str, int],
    ends: Sequence[str],
) -> None:
    """Inputs, outputs and weights of what is left."""
    graph: GraphProto = taps.model.proto.graph
    own = {
        value.name: ValueInfoProto.FromString(value.SerializeToString())
        for value in graph.input
    }
    _keep_weights(taps, nodes, (), given)
    for field in ("input", "output", "value_info", "quantization_annotation"):
        graph.ClearField(field)
    graph.input.extend(
        own[name] if name in own else _open_value(name, kind)
        for name, kind in given.items()
    )
    graph.output.extend(ValueInfoProto(name=name) for name in ends)


def _keep_weights(
    taps: TapModel,
    nodes: Sequence[NodeProto],
    more: Collection[str],
    given: Collection[str] = (),
) -> None:
    """Leave the weights that `nodes` read and that are not `given`, and `more`."""
    graph = taps.model.proto.graph
    kept = {name for node in nodes for name in taps.sources(node)}.difference(given)
    kept.update(more)
    _keep(graph.initializer, [tensor.name in kept for tensor in graph.initializer])
    sparse = graph.sparse_initializer
    _keep(sparse, [item.values.name in kept for item in sparse])


def _fix_shapes(graph: GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    for value in graph.input:
        if value.name in shapes:
            dims = [TensorShapeProto.Dimension(dim_value=n) for n in shapes[value.name]]
            shape = TensorShapeProto(dim=dims)
            value.type.tensor_type.shape.CopyFrom(shape)


def _open_value(name: str, kind: int) -> ValueInfoProto:
    """A tensor of any rank and size."""
    tensor = TypeProto.Tensor(elem_type=kind)
    return ValueInfoProto(name=name, type=TypeProto(tensor_type=tensor))


def _keep(items: Any, wanted: Sequence[bool]) -> None:
    for index in range(len(items) - 1, -1, -1):
        if not wanted[index]:
            del items[index]
