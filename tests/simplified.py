"""A model after `onnxopt.simplify`, with all checked that holds for any model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import onnx.checker
from google.protobuf.message import Message
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

import onnxopt
from onnxopt import attributes
from onnxopt.report import Guarantee
from onnxopt.settings import Options
from tests import support

LEAST_BUDGET = 1_000_000


def serialized(message: Message) -> bytes:
    """The bytes of a message, the same for equal ones."""
    return message.SerializeToString(deterministic=True)


def simplified(
    source: ModelProto,
    *,
    feeds: Sequence[Mapping[str, Any]] | None = None,
    guarantee: Guarantee = "equivalent",
    runs: bool = True,
    checks: bool = True,
    **options: Unpack[Options],
) -> ModelProto:
    """What `simplify` makes of a model.

    It is valid (unless not `checks`), in order, not too large, has the same interface,
    gives the same numbers on all feeds (where it `runs`; made up without any), and
    simplifying it again changes no byte. The source stays as it is.
    """
    before = serialized(source)
    made = _simplify(source, **options)
    assert serialized(source) == before
    if checks:
        onnx.checker.check_model(made)
    for scope in scopes(made):
        assert_ordered(scope, set())
    assert made.ByteSize() <= max(LEAST_BUDGET, 1.02 * source.ByteSize())
    if not options.get("freeze_inputs"):
        assert interface(made) == interface(source)
    assert serialized(_simplify(made, **options)) == serialized(made)
    if runs:
        for feed in support.feeds_of(source) if feeds is None else feeds:
            expected = support.run(source, feed)
            support.assert_same(expected, support.run(made, feed), guarantee)
    return made


def _simplify(source: ModelProto, **options: Unpack[Options]) -> ModelProto:
    result = onnxopt.simplify(source, validate=False, **options)
    made = result.model
    assert isinstance(made, ModelProto)
    return made


def interface(model: ModelProto) -> list[bytes]:
    """The inputs that have to be fed and the outputs, as they are declared, in order."""
    values = [*support.own_inputs(model.graph), *model.graph.output]
    return [serialized(value) for value in values]


def nodes(model: ModelProto) -> list[NodeProto]:
    """All nodes of the main graph and of all inner scopes, not of functions."""
    return list(attributes.nodes_in(model.graph.node))


def ops(model: ModelProto) -> list[str]:
    """The operators of the main graph and of all inner scopes, sorted."""
    return sorted(node.op_type for node in nodes(model))


def named(model: ModelProto, name: str) -> NodeProto:
    """The node that is called `name`."""
    (found,) = (node for node in nodes(model) if node.name == name)
    return found


def scopes(model: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    """The main graph and the bodies of the functions."""
    yield model.graph
    yield from model.functions


def assert_ordered(scope: GraphProto | FunctionProto, outer: set[str]) -> None:
    """Every node stands behind what it reads, in `scope` and in those in it."""
    known = set(outer)
    for value in scope.input:
        known.add(value if isinstance(value, str) else value.name)
    if isinstance(scope, GraphProto):
        known.update(tensor.name for tensor in scope.initializer)
        known.update(tensor.values.name for tensor in scope.sparse_initializer)
    for node in scope.node:
        unknown = [name for name in node.input if name and name not in known]
        assert not unknown, f"{node.name or node.op_type} reads {unknown}"
        for _, inner in attributes.subgraphs(node):
            assert_ordered(inner, known)
        known.update(node.output)
    for value in scope.output:
        name = value if isinstance(value, str) else value.name
        assert name in known, f"output {name} is not made"
