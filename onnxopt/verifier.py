"""A cheap check of the graph between passes, with lazy weights and unknown operators.

It reads the protobuf, not the index: values are defined once and before use (captures
included), attributes have distinct names. With `rebuild` the index is built anew and
compared with the one that edits kept up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto

from onnxopt import attributes
from onnxopt.errors import PassError
from onnxopt.graph import GraphView, Use
from onnxopt.model import Model

_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


class BrokenGraphError(PassError):
    """A pass left the graph, or its index, in a wrong state: a bug in that pass."""


def verify(model: Model, when: str, *, rebuild: bool = False) -> None:
    """Raise BrokenGraphError at the first violation; `when` says after what."""
    _verify_scope(model.proto.graph, set(), f"main {when}")
    for function in model.proto.functions:
        _verify_scope(function, set(), f"function {function.name} {when}")
    if rebuild:
        for view in model.views():
            _compare_index(view, when)


def _given(scope: GraphProto | FunctionProto) -> set[str]:
    if isinstance(scope, FunctionProto):
        return set(scope.input)
    weights = [tensor.name for tensor in scope.initializer]
    if len(set(weights)) != len(weights):
        raise BrokenGraphError(f"graph {scope.name!r}: an initializer is there twice")
    sparse = (item.values.name for item in scope.sparse_initializer)
    return {*weights, *sparse, *(value.name for value in scope.input)}


def _verify_scope(scope: GraphProto | FunctionProto, outer: set[str], where: str) -> None:
    own = _given(scope)
    visible = outer | own
    visible.add("")  # an input or output that is left out
    for node in scope.node:
        if not visible.issuperset(node.input):
            name = next(name for name in node.input if name not in visible)
            raise BrokenGraphError(
                f"{where}: {node.op_type} {node.name!r} reads {name!r} before it is made"
            )
        if len(node.attribute) > 1 or _is_odd(node.attribute):
            _verify_attributes(node, visible, where)
        for name in node.output:
            if name in own:
                raise BrokenGraphError(f"{where}: {name!r} is defined twice")
            if name:
                own.add(name)
                visible.add(name)
    outputs = scope.output
    for output in outputs:
        name = output if isinstance(output, str) else output.name
        if name not in visible:
            raise BrokenGraphError(f"{where}: nothing makes output {name!r}")


def _is_odd(attributes: Sequence[AttributeProto]) -> bool:
    """Whether the only attribute, if there is one, needs a closer look."""
    return any(not only.name or only.type in _GRAPHS for only in attributes)


def _verify_attributes(node: NodeProto, visible: set[str], where: str) -> None:
    names = {attribute.name for attribute in node.attribute}
    if len(names) != len(node.attribute) or "" in names:
        raise BrokenGraphError(f"{where}: {node.name!r} repeats an attribute")
    for label, graph in attributes.subgraphs(node):
        _verify_scope(graph, visible, f"{where}, {node.name!r} {label}")


def _compare_index(view: GraphView, when: str) -> None:
    """Every fact of the index, recomputed from the protobuf."""
    nodes = {id(node): node for node in view.proto.node}
    if nodes.keys() != view._nodes.keys():
        raise BrokenGraphError(f"{view.scope} {when}: the index has other nodes")
    made = {name: id(node) for node in view.proto.node for name in node.output if name}
    if made != {name: id(node) for name, node in view._producer.items()}:
        raise BrokenGraphError(f"{view.scope} {when}: the index has other producers")
    reads = {
        (name, id(use.node), use.index)
        for inner in _within(view)
        for name, use in _reads(inner)
        if inner.home(name) is view
    }
    known = {(name, *key) for name, uses in view._uses.items() for key in uses}
    if reads != known:
        odd = sorted(name for name, *_ in reads ^ known)[:3]
        raise BrokenGraphError(f"{view.scope} {when}: the uses of {odd} are wrong")


def _within(view: GraphView) -> list[GraphView]:
    found = [view]
    for child in view.children():
        found += _within(child)
    return found


def _reads(view: GraphView) -> Iterator[tuple[str, Use]]:
    for node in view.proto.node:
        for index, name in enumerate(node.input):
            if name:
                yield name, Use(node, index, view)
