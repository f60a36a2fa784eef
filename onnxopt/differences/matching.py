"""Which node of B is which node of A, in one scope.

1. An output of the same name, and the same operator.
2. The same operator on the same values: only names differ. What its outputs are called
   in B is known from then on, so a chain of renamed nodes is followed.
3. An output of the same name, made by another operator.
4. The n-th node of an operator in both: a guess, and marked as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from onnx import AttributeProto, NodeProto

from onnxopt.differences.found import Matched
from onnxopt.graph import GraphView, constant_value

Key = Callable[[int, NodeProto], Hashable | None]


class Pair(NamedTuple):
    """Node `a` of A at `places[0]`, the node `b` of B at `places[1]`."""

    a: NodeProto
    b: NodeProto
    places: tuple[int, int]
    matched: Matched


class Matching:
    """The pairs of one scope, in the order of A; `left` are what has no partner."""

    def __init__(self, a: GraphView, b: GraphView, names: dict[str, str]) -> None:
        """`names`: what values of A are called in B where otherwise; it grows."""
        self.views, self.names = (a, b), names
        self.nodes = list(a.proto.node), list(b.proto.node)
        self.left = set(range(len(self.nodes[0]))), set(range(len(self.nodes[1])))
        self._pairs: dict[int, Pair] = {}
        self._match("output", self._made_by)
        self._match("structure", self._structure)
        self._match("output", self._made)
        numbers = tuple(map(_numbers, self.views, self.nodes))
        self._match("position", lambda side, node: numbers[side].get(id(node)))

    @property
    def pairs(self) -> list[Pair]:
        """The pairs, in the order of A."""
        return [self._pairs[index] for index in sorted(self._pairs)]

    def is_reordered(self) -> bool:
        """Whether nodes that surely are the same stand in another order in B."""
        sure = [pair.places[1] for pair in self.pairs if pair.matched != "position"]
        return sure != sorted(sure)

    def _match(self, matched: Matched, key: Key) -> None:
        """Pair what is left and has equal keys, in order; equal attributes first."""
        waiting: dict[Hashable, list[int]] = {}
        for index in sorted(self.left[1]):
            found = key(1, self.nodes[1][index])
            if found is not None:
                waiting.setdefault(found, []).append(index)
        for index in sorted(self.left[0]):
            node = self.nodes[0][index]
            found = key(0, node)
            candidates = waiting.get(found, []) if found is not None else []
            if candidates:
                other = min(candidates, key=lambda i: _unlike(node, self.nodes[1][i]))
                candidates.remove(other)
                self._join(index, other, matched)

    def _join(self, index: int, other: int, matched: Matched) -> None:
        a, b = self.nodes[0][index], self.nodes[1][other]
        self._pairs[index] = Pair(a, b, (index, other), matched)
        self.left[0].discard(index)
        self.left[1].discard(other)
        for one, two in zip(a.output, b.output, strict=False):
            if one and two and one != two:
                self.names[one] = two

    def _made(self, side: int, node: NodeProto) -> str | None:
        """The first output, in B's names."""
        made = next(filter(None, node.output), None)
        return self.names.get(made, made) if made is not None and side == 0 else made

    def _made_by(self, side: int, node: NodeProto) -> Hashable | None:
        made = self._made(side, node)
        return None if made is None else (made, self.views[side].op(node))

    def _structure(self, side: int, node: NodeProto) -> Hashable | None:
        """The operator and what it reads, in B's names; nothing for a source."""
        if not node.input:
            return None
        names = self.names if side == 0 else {}
        return self.views[side].op(node), tuple(
            names.get(name, name) for name in node.input
        )


def _numbers(view: GraphView, nodes: Iterable[NodeProto]) -> dict[int, Hashable]:
    """By id each operator with its number among its like; not for constants.

    Which constant is which, their values tell.
    """
    seen: Counter[str] = Counter()
    found: dict[int, Hashable] = {}
    for node in nodes:
        op = view.op(node)
        if constant_value(node) is None:
            found[id(node)] = (op, seen[op])
        seen[op] += 1
    return found


_LARGE = (
    *(AttributeProto.GRAPH, AttributeProto.GRAPHS, AttributeProto.TENSOR),
    *(AttributeProto.TENSORS, AttributeProto.SPARSE_TENSOR),
    AttributeProto.SPARSE_TENSORS,
)


def _unlike(a: NodeProto, b: NodeProto) -> bool:
    """Whether small attributes differ."""
    return _small(a) != _small(b)


def _small(node: NodeProto) -> list[bytes]:
    return sorted(
        attribute.SerializeToString()
        for attribute in node.attribute
        if attribute.type not in _LARGE
    )
