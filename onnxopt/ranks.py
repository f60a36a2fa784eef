"""Ranks that a value may have, and the one that its readers can take.

A run in which an operator gets a tensor of another rank than it takes fails. So where a
reader takes one rank only, a run that succeeds has made that one.
"""

from __future__ import annotations

from onnx import NodeProto

from onnxopt import axes
from onnxopt.graph import GraphView

_RECURRENT = ("GRU", "LSTM", "RNN")
_SAME = frozenset(
    ("Abs", "Cast", "Clip", "Identity", "LeakyRelu", "Neg", "Relu", "Sigmoid", "Tanh")
)
_DEPTH = 12


def needed(graph: GraphView, name: str, depth: int = _DEPTH) -> int | None:
    """The rank that `name` has in every run of its scope that succeeds; or None."""
    for use in graph.uses(name):
        if use.view is graph and use.index == 0 and depth:
            rank = _taken_by(graph, use.node, depth - 1)
            if rank is not None:
                return rank
    return None


def _taken_by(graph: GraphView, node: NodeProto, depth: int) -> int | None:
    """The rank of the first input that a node takes."""
    op = graph.op(node)
    if op in _RECURRENT:
        return 3
    if op in ("Conv", "ConvTranspose"):
        weight = graph.shape(node.input[1])
        return None if weight is None else len(weight)
    change = _change(graph, node)
    after = needed(graph, node.output[0], depth) if change is not None else None
    return None if change is None or after is None else after - change


def _change(graph: GraphView, node: NodeProto) -> int | None:
    """By how much a node changes the rank of its first input."""
    op = graph.op(node)
    if op in _SAME:
        return 0
    given = axes.axes_of(graph, node) if op in ("Squeeze", "Unsqueeze") else None
    if not given:
        return None
    return len(given) if op == "Unsqueeze" else -len(given)


def possible(graph: GraphView, name: str, depth: int = _DEPTH) -> set[int] | None:
    """All ranks that `name` may have, as seen from `graph`; None where any."""
    shape = graph.shape(name)
    if shape is not None:
        return {len(shape)}
    home = graph.home(name)
    node = home.producer(name) if home is not None else None
    if home is None or node is None or not depth:
        return None
    if home.op(node) == "If":
        return _of_branches(home, node, list(node.output).index(name), depth - 1)
    change = _change(home, node)
    before = possible(home, node.input[0], depth - 1) if change is not None else None
    return None if before is None or change is None else {r + change for r in before}


def _of_branches(
    graph: GraphView, node: NodeProto, slot: int, depth: int
) -> set[int] | None:
    found: set[int] = set()
    for branch in graph.children_of(node):
        ranks = possible(branch, branch.outputs()[slot], depth)
        if ranks is None:
            return None
        found |= ranks
    return found
