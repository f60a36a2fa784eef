"""Softmax and its kin: along their axis the others change, across it nothing does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, fact
from onnxopt.channels.groups import Link
from onnxopt.channels.rules.rule import Rule

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Softmax(Rule):
    """Softmax, LogSoftmax and Hardmax: over one axis, before opset 13 over a tail."""

    def axes(self, a: Analysis, node: NodeProto) -> tuple[int, ...] | None:
        """The axes that are normalized together; None where the rank is not known."""
        rank = a.rank(node.input[0])
        if not rank:
            return None
        if a.graph.opset() >= 13:
            return (attributes.get(node, "axis", -1) % rank,)
        return tuple(range(attributes.get(node, "axis", 1) % rank, rank))

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """What does not depend on the input still does not; of values nothing is said."""
        given, axes = a.fact(node.input[0]), self.axes(a, node)
        if given is None or axes is None:
            return [None]
        kinds = np.minimum(given.kinds.min(axis=axes, keepdims=True), Kind.MAP)
        return [fact(kinds, np.ones(kinds.shape, np.float32))]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """All along the axis, where any of it is needed."""
        axes, need = self.axes(a, node), needs[0]
        if axes is None or need is None or not need.ndim:
            return [need if axes is not None else None]
        return [np.asarray(need.any(axis=axes, keepdims=True))]

    def link(self, link: Link) -> None:
        """Other axes go through."""
        axes = self.axes(link.analysis, link.node)
        if axes is None or set(axes) & set(link.axes):
            link.bar(f"{link.op} mixes the positions along this axis")
        else:
            link.tie(link.opposite, 0, link.axes)


_HANDS_ON = {"Cast", "Dropout", "Identity"}


def has_rows_of_sum_one(a: Analysis, name: str) -> bool:
    """Whether `name` is a Softmax over its last axis, with nothing done to it."""
    from onnxopt.channels.rules.elementwise import is_idle

    node = a.graph.producer(name)
    while node is not None and a.graph.op(node) in _HANDS_ON:
        if a.graph.op(node) == "Dropout" and not is_idle(a, node):
            return False
        if not a.is_float(node.output[0]):
            return False
        node = a.graph.producer(node.input[0])
    if node is None or a.graph.op(node) != "Softmax" or attributes.has_references(node):
        return False
    rank = a.rank(node.input[0])
    return rank is not None and Softmax().axes(a, node) == (rank - 1,)
