"""Fusion: patterns that stand for one operator, and what puts it in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from onnx import NodeProto, TensorProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.pattern import Match, Op, Pattern

Build = Callable[[GraphView, NodeProto, Match], Edit]
"""The edit that replaces what matched; raises DeclinedError."""


class Fusion(msgspec.Struct, frozen=True):
    """Replace what `patterns` match, from opset `since` on, by an `op_type`.

    Who gets as far as `telling` operators into a pattern and no further is told why.
    """

    op_type: str
    since: int
    patterns: tuple[Pattern, ...]
    build: Build
    telling: int = 1000

    def ends(self) -> set[str]:
        """The operators that its patterns end in."""
        found: set[str] = set()
        for pattern in self.patterns:
            found.update([pattern.op_type] if isinstance(pattern, Op) else ["Mul", "Div"])
        return found


def check_float32(graph: GraphView, name: str) -> None:
    """Elsewhere the single steps round, and overflow, long before the operator does."""
    if graph.dtype(name) != TensorProto.FLOAT:
        raise DeclinedError("it is not known to compute in float32")


def elementwise(
    graph: GraphView,
    node: NodeProto,
    found: Match,
    op_type: str,
    attrs: Mapping[str, float | str] | None = None,
) -> Edit:
    """Let `op_type` of the value `x` take the place of the pattern."""
    check_float32(graph, found["x"])
    check_shape(found, "x")
    edit = Edit(graph, node)
    edit.rewrite(op_type, [found["x"]], attrs)
    return edit


def check_shape(found: Match, name: str) -> None:
    """Constants of a higher rank than the value would raise that of the result."""
    if not found.keeps_shape(name):
        raise DeclinedError("its constants may raise the rank of the result")
