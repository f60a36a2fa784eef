"""Taking over an onnx-graphsurgeon graph without a trace.

A gs.Graph cannot be copied (its `__getattr__` recurses), and exporting one has effects:
it notes new domains in the graph, and gives tensors that still share the protobuf that
they were imported from their names. Both are undone here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues


def export(graph: Any) -> ModelProto:
    """The graph as a ModelProto of its own; the graph stays as it is."""
    scopes = [graph, *graph.functions]
    domains = [scope.import_domains for scope in scopes]
    names = [(tensor, tensor.name) for tensor in _shared(scopes)]
    try:
        for scope in scopes:
            if scope.import_domains is not None:
                scope.import_domains = list(scope.import_domains)
        exported: ModelProto = gs.export_onnx(graph)
        return exported
    finally:
        for scope, before in zip(scopes, domains, strict=True):
            scope.import_domains = before
        for tensor, name in names:
            tensor.name = name


def _shared(scopes: Iterable[Any]) -> Iterator[TensorProto]:
    """The protobufs of tensors whose values were never looked at, in all scopes."""
    for scope in scopes:
        for node in scope.nodes:
            for value in (*node.inputs, *node.outputs, *node.attrs.values()):
                values = getattr(value, "_values", None)
                if isinstance(value, gs.Graph):
                    yield from _shared([value])
                elif isinstance(values, LazyValues) and type(values) is not SparseValues:
                    yield values.tensor
