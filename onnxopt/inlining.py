"""Copying the content of an inner scope, or of a function, to where it is used.

`Inliner.content` makes the copy under names that are free in the new place;
`Edit.adopt` puts it there. A name that nothing else in the model defines is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorAnnotation,
    TensorProto,
    ValueInfoProto,
    helper,
)

from onnxopt import attributes
from onnxopt.graph import GraphView

Names = Mapping[str, str]


class Content(msgspec.Struct):
    """What a scope holds, under the names of the scope that it is for."""

    values: list[str] = msgspec.field(default_factory=list)
    """What the outputs of the scope it came from are called now."""
    nodes: list[NodeProto] = msgspec.field(default_factory=list)
    weights: list[TensorProto] = msgspec.field(default_factory=list)
    sparse: list[SparseTensorProto] = msgspec.field(default_factory=list)
    value_info: list[ValueInfoProto] = msgspec.field(default_factory=list)
    annotations: list[TensorAnnotation] = msgspec.field(default_factory=list)


class Inliner:
    """Makes copies of scopes for the places of the nodes that they are the bodies of.

    It counts how many scopes define each name, once for each place, so that one copy
    costs no more than what it copies. Outer scopes come before inner ones.
    """

    def __init__(self) -> None:
        self._counts: dict[GraphView, Counter[str]] = {}
        self._node_names: dict[GraphView, set[str]] = {}

    def content(
        self,
        graph: GraphView,
        node: NodeProto,
        body: GraphView,
        given: Names,
        outputs: Sequence[str] = (),
        settings: Mapping[str, AttributeProto | None] | None = None,
        prefix: str = "",
    ) -> Content:
        """A copy of `body` that stands for `node` in `graph`.

        `given`: what the inputs of the body are. `outputs`: what its outputs are to be
        called; those that are no values of its own, or are there twice, keep the name
        that they have, and `Content.values` tells. `settings`: what references to a
        function's attributes stand for. `prefix`: what the nodes' names begin with.
        """
        body.settle_all()
        source = body.nodes()
        names = dict(given)
        own = [*_weights(body), *_sparse(body), *_made(source)]
        self._name_outputs(graph, body, set(own), outputs, names)
        counts = self._of(graph)
        within = _definitions([node])
        for name in own:
            if name not in names:
                is_free = counts[name] <= within[name] and _is_unknown(graph, name)
                names[name] = name if is_free else graph.fresh(name)
        counts.update(names[name] for name in own)
        taken = {names[name] for name in own}
        made = Content([names.get(name, name) for name in body.outputs()])
        for item in source:
            copy = NodeProto()
            copy.CopyFrom(item)
            copy.output[:] = [names.get(name, "") for name in item.output]
            _rename_reads(copy, names, graph, taken)
            for inner in attributes.nodes_in([copy]):
                if settings is not None:
                    attributes.bind(inner, settings)
                if prefix and inner.name:
                    inner.name = f"{prefix}/{inner.name}"
            if copy.name:
                copy.name = self._node_name(graph, copy.name)
            made.nodes.append(copy)
        counts.update(_definitions(made.nodes) - Counter(taken))
        if isinstance(body.proto, GraphProto):
            _copy_rest(graph, body.proto, names, outputs, made)
        return made

    def forget(self, graph: GraphView, node: NodeProto) -> None:
        """Say that `node`, once in `graph`, is gone with all that is inside it."""
        self._of(graph).subtract(_definitions([node]))

    def _of(self, graph: GraphView) -> Counter[str]:
        if graph not in self._counts:
            self._counts[graph] = _defined_in(graph)
        return self._counts[graph]

    def _node_name(self, graph: GraphView, name: str) -> str:
        """`name`, or one like it: ONNX Runtime wants those of a scope to differ."""
        known = self._node_names.get(graph)
        if known is None:
            known = self._node_names[graph] = {node.name for node in graph.nodes()}
        made, number = name, 0
        while made in known:
            number += 1
            made = f"{name}_{number}"
        known.add(made)
        return made

    @staticmethod
    def _name_outputs(
        graph: GraphView,
        body: GraphView,
        own: set[str],
        outputs: Sequence[str],
        names: dict[str, str],
    ) -> None:
        old_format = graph.model.proto.ir_version < 4 and graph.holds_initializers
        weights = set(_weights(body)) if old_format else set()
        for old, new in zip(body.outputs(), outputs, strict=False):
            # before IR 4 an initializer is an input, which cannot be an output as well
            if new and old in own and old not in names and old not in weights:
                names[old] = new


def _is_unknown(graph: GraphView, name: str) -> bool:
    """Whether `graph` neither sees a value of this name nor remembers one."""
    return graph.home(name) is None and not graph.model.shapes.remembers(graph, name)


def _weights(body: GraphView) -> list[str]:
    return [tensor.name for tensor in body.initializers()]


def _sparse(body: GraphView) -> list[str]:
    if isinstance(body.proto, FunctionProto):
        return []
    return [item.values.name for item in body.proto.sparse_initializer]


def _made(nodes: Iterable[NodeProto]) -> Iterator[str]:
    return (name for node in nodes for name in node.output if name)


def _own(graph: GraphProto) -> Iterator[str]:
    """Every name that a subgraph defines itself."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (item.values.name for item in graph.sparse_initializer)
    yield from _made(graph.node)


def _definitions(nodes: Sequence[NodeProto]) -> Counter[str]:
    """How many scopes of `nodes` and inside them define each name."""
    counts = Counter(_made(nodes))
    for node in nodes:
        for _, graph in attributes.subgraphs(node) if node.attribute else ():
            counts.update(set(_own(graph)))
            counts.update(_definitions(graph.node) - Counter(_made(graph.node)))
    return counts


def _defined_in(view: GraphView) -> Counter[str]:
    counts = Counter({*view._producer, *view._given, *view._weights})
    for child in view.children():
        counts.update(_defined_in(child))
    return counts


def _copy_rest(
    graph: GraphView,
    body: GraphProto,
    names: Names,
    outputs: Sequence[str],
    made: Content,
) -> None:
    """What a graph has besides nodes; what is told of outputs is told already."""
    for tensor in body.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = names[tensor.name]
        made.weights.append(copy)
    for sparse in body.sparse_initializer:
        _copy_sparse(graph, sparse, names, made)
    infos = () if graph.is_function else body.value_info  # they hold per call site
    told = {value.name for value in graph.proto.value_info} if infos else set()
    for value in infos:
        new = names.get(value.name, "")
        if new and new not in told and new not in outputs:
            info = ValueInfoProto()
            info.CopyFrom(value)
            info.name = new
            made.value_info.append(info)
    for annotation in body.quantization_annotation:
        kept = TensorAnnotation()
        kept.CopyFrom(annotation)
        _rename_annotation(kept, names)
        made.annotations.append(kept)


def _copy_sparse(
    graph: GraphView, sparse: SparseTensorProto, names: Names, made: Content
) -> None:
    copy = SparseTensorProto()
    copy.CopyFrom(sparse)
    copy.values.name = names[sparse.values.name]
    if graph.holds_initializers:
        made.sparse.append(copy)
        return
    name, copy.values.name = copy.values.name, ""
    constant = helper.make_node("Constant", [], [name], sparse_value=copy)
    made.nodes.insert(0, constant)


def _rename_annotation(annotation: TensorAnnotation, names: Names) -> None:
    annotation.tensor_name = names.get(annotation.tensor_name, annotation.tensor_name)
    for entry in annotation.quant_parameter_tensor_names:
        entry.value = names.get(entry.value, entry.value)


def _rename_reads(
    node: NodeProto, names: Names, graph: GraphView, taken: set[str]
) -> None:
    """Rename what `node` and the graphs inside it read.

    What an inner graph defines itself is renamed only where the name means a value of
    the new place (`taken`, or one that `graph` sees).
    """
    node.input[:] = [names.get(name, name) for name in node.input]
    for configuration in getattr(node, "device_configurations", ()):
        for spec in configuration.sharding_spec:
            spec.tensor_name = names.get(spec.tensor_name, spec.tensor_name)
    for _, inner in attributes.subgraphs(node) if node.attribute else ():
        _rename_inside(inner, names, graph, taken)


def _rename_inside(
    inner: GraphProto, outer: Names, graph: GraphView, taken: set[str]
) -> None:
    names = dict(outer)
    for name in _own(inner):
        is_taken = name in taken or graph.home(name) is not None
        names[name] = graph.fresh(name) if is_taken else name
    for item in (*inner.input, *inner.initializer, *inner.output, *inner.value_info):
        item.name = names.get(item.name, item.name)
    for sparse in inner.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for annotation in inner.quantization_annotation:
        _rename_annotation(annotation, names)
    for node in inner.node:
        node.output[:] = [names.get(name, name) for name in node.output]
        _rename_reads(node, names, graph, taken)
