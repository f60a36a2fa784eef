"""A copy of a model for shape inference: only what is sure to hold at run time.

What is declared of inner values and outputs is left out, and so are the payloads of large
weights and the values of inputs that only have a default. Where ONNX's inference is known
to differ from ONNX Runtime, `onnxopt.doubt` hides the node from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from onnx import GraphProto, ModelProto, TypeProto

from onnxopt import attributes, doubt
from onnxopt.weights import WeightStore, place, tensor_bytes
from onnxopt.wire import MIN_PAYLOAD

if TYPE_CHECKING:
    from onnxopt.model import Model

MARK = "\0"
"""What stands between a name and the number that makes it unique for inference."""


def bare_copy(model: Model) -> ModelProto:
    """A copy for inference: small weights inline, large ones absent, nothing declared."""
    copy = ModelProto()
    copy.CopyFrom(model.proto)
    if copy.ir_version >= 4:
        _drop_defaults(copy.graph)
    for function in copy.functions:
        doubt.hide(function.node, {})
    for value in copy.graph.input:
        if not value.type.HasField("tensor_type"):
            _drop_dims(value.type)  # nobody holds the elements of a feed to them
    _bare_graph(copy.graph, model.weights)
    numbers = itertools.count()
    for nodes in (copy.graph.node, *(function.node for function in copy.functions)):
        for node in nodes:
            for _, inner in attributes.subgraphs(node) if node.attribute else ():
                _rename(inner, {}, numbers)
    return copy


def _drop_defaults(graph: GraphProto) -> None:
    """An initializer that is an input as well has a value only until it is fed."""
    fed = {value.name for value in graph.input}
    for index in range(len(graph.initializer) - 1, -1, -1):
        if graph.initializer[index].name in fed:
            del graph.initializer[index]


def _rename(graph: GraphProto, outer: Mapping[str, str], numbers: Iterator[int]) -> None:
    """Give the values of an inner graph names that no other graph has.

    ONNX's inference remembers the values of shapes by name alone, whatever the scope.
    """
    given = [*graph.input, *graph.initializer]
    names = [item.name for item in given]
    names += [item.values.name for item in graph.sparse_initializer]
    names += [name for node in graph.node for name in node.output if name]
    seen = {**outer, **{name: f"{name}{MARK}{next(numbers)}" for name in names}}
    for item in (*given, *graph.output):
        item.name = seen.get(item.name, item.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = seen[sparse.values.name]
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [seen.get(name, name) for name in values]
        for _, inner in attributes.subgraphs(node) if node.attribute else ():
            _rename(inner, seen, numbers)


def _bare_graph(graph: GraphProto, weights: WeightStore) -> None:
    del graph.value_info[:]
    for output in graph.output:
        _drop_dims(output.type)
    for tensor in graph.initializer:
        if place(tensor) is not None and tensor_bytes(tensor) < MIN_PAYLOAD:
            payload = weights.read(tensor)
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            tensor.raw_data = payload
    for value in graph.input:
        _drop_negative(value.type)
    doubt.hide(graph.node, {tensor.name: tensor for tensor in graph.initializer})
    for node in graph.node:
        for _, inner in attributes.subgraphs(node) if node.attribute else ():
            for value_info in inner.input:
                _drop_dims(value_info.type)  # a Loop's may change from round to round
            _bare_graph(inner, weights)


def _drop_negative(kind: TypeProto) -> None:
    """A declared dim below 0 stands for any size."""
    for dim in kind.tensor_type.shape.dim:
        if dim.dim_value < 0:
            dim.ClearField("dim_value")


def _drop_dims(kind: TypeProto) -> None:
    if kind.HasField("tensor_type"):
        kind.tensor_type.ClearField("shape")
    for inner in (kind.sequence_type, kind.optional_type):
        if inner.HasField("elem_type"):
            _drop_dims(inner.elem_type)
