"""Walking two models side by side, scope by scope."""

from __future__ import annotations

import os
from collections.abc import Mapping

from onnx import FunctionProto, NodeProto

from onnxopt import attributes
from onnxopt.differences import nodes
from onnxopt.differences.facts import differing_fields
from onnxopt.differences.found import (
    Differences,
    FactChange,
    InterfaceChange,
    NodeChange,
    WeightChange,
)
from onnxopt.differences.interface import Interface
from onnxopt.differences.matching import Matching, Pair
from onnxopt.differences.weights import Weights
from onnxopt.graph import GraphView, constant_value
from onnxopt.model import Model, Source

_GRAPH = ("node", "initializer", "sparse_initializer", "input", "output")
_FUNCTION = ("node", "input", "output", "name", "domain", "overload")
_MODEL = ("graph", "functions")


def diff(
    a: Source, b: Source, *, base_dir: str | os.PathLike[str] | None = None
) -> Differences:
    """In what B differs from A: each a path, a ModelProto or a gs.Graph.

    `base_dir`: the folder of external data, for models in memory. Weights are read one
    after the other, in pieces. Raises InvalidModelError where a model is malformed,
    UsageError where it cannot be read.
    """
    opened: list[Model] = []
    try:
        opened += [Model.open(a, base_dir)]
        opened += [Model.open(b, base_dir)]
        walk = _Walk(*opened)
        walk.models()
        return walk.result(_name(a, "A"), _name(b, "B"))
    finally:
        for model in opened:
            model.weights.close()


def _name(source: Source, side: str) -> str:
    path = isinstance(source, str | os.PathLike)
    return os.fspath(source) if path else f"model {side}"


class _Walk:
    """What was found so far."""

    def __init__(self, a: Model, b: Model) -> None:
        self.a, self.b = a, b
        self.nodes: list[NodeChange] = []
        self.order: list[str] = []
        self.weights: list[WeightChange] = []
        self.interface: list[InterfaceChange] = []
        self.metadata: list[FactChange] = []

    def result(self, a: str, b: str) -> Differences:
        lists = (self.nodes, self.order, self.weights, self.interface, self.metadata)
        return Differences(
            a=a,
            b=b,
            equal=not any(lists),
            nodes=self.nodes,
            order=self.order,
            weights=self.weights,
            interface=self.interface,
            metadata=self.metadata,
            notes=self._notes(),
        )

    def models(self) -> None:
        """Compare everything."""
        self.metadata += differing_fields("", self.a.proto, self.b.proto, _MODEL)
        self._scope(self.a.main, self.b.main, {})
        ours = {_function(view): view for view in self.a.functions}
        theirs = {_function(view): view for view in self.b.functions}
        for name, view in ours.items():
            if name in theirs:
                self._scope(view, theirs[name], {})
            else:
                self.nodes.append(
                    NodeChange(view.scope, name, None, "function", "only in A")
                )
        for name, view in theirs.items():
            if name not in ours:
                self.nodes.append(
                    NodeChange(view.scope, None, name, "function", "only in B")
                )

    def _scope(self, a: GraphView, b: GraphView, outer: Mapping[str, str]) -> None:
        """Compare one scope, and those inside. `outer`: names of B that differ."""
        inputs, outputs = Interface(a, b, "input"), Interface(a, b, "output")
        self.interface += [*inputs.changes(), *outputs.changes()]
        weights = Weights(a, b)
        renamed = weights.renamed()
        found = list(weights.changes(renamed))
        self.weights += found
        self.metadata += weights.facts()
        names = {**outer, **inputs.renamed, **renamed}
        matching = Matching(a, b, names)
        told = {change.name for change in found if change.change.startswith("only")}
        self._left(a, b, matching, told)
        for pair in matching.pairs:
            change = nodes.compare(a, b, pair, names)
            if change is not None and not _is_told(change, pair, renamed):
                self.nodes.append(change)
            self._inner(a, b, pair, names)
        if matching.is_reordered():
            self.order.append(a.scope)
        self.metadata += differing_fields(
            _place(a), a.proto, b.proto, _FUNCTION if a.is_function else _GRAPH, names
        )

    def _left(
        self, a: GraphView, b: GraphView, matching: Matching, told: set[str]
    ) -> None:
        """Nodes that one model alone has, less the Constants among `told` weights."""
        for index in sorted(matching.left[0]):
            node = matching.nodes[0][index]
            if constant_value(node) is None or node.output[0] not in told:
                self.nodes.append(
                    NodeChange(a.scope, a.label(node), None, a.op(node), "only in A")
                )
        for index in sorted(matching.left[1]):
            node = matching.nodes[1][index]
            if constant_value(node) is None or node.output[0] not in told:
                self.nodes.append(
                    NodeChange(a.scope, None, b.label(node), b.op(node), "only in B")
                )

    def _inner(
        self, a: GraphView, b: GraphView, pair: Pair, names: Mapping[str, str]
    ) -> None:
        """Compare the subgraphs of two nodes that are in the same attributes."""
        ours, theirs = _inside(a, pair.a), _inside(b, pair.b)
        for label, view in ours.items():
            if label in theirs:
                self._scope(view, theirs[label], names)

    def _notes(self) -> list[str]:
        sides = {"A": self.a, "B": self.b}
        notes = [
            f"{side}: {note}" for side, model in sides.items() for note in model.notes
        ]
        files = [len(model.weights.data_files()) for model in sides.values()]
        if bool(files[0]) != bool(files[1]):
            side = "A" if files[0] else "B"
            notes.append(f"only {side} keeps weights in other files: no difference")
        return notes


def _inside(view: GraphView, node: NodeProto) -> dict[str, GraphView]:
    """The subgraphs of a node by where they stand."""
    labels = (label for label, _ in attributes.subgraphs(node))
    return dict(zip(labels, view.children_of(node), strict=True))


def _is_told(change: NodeChange, pair: Pair, renamed: Mapping[str, str]) -> bool:
    """Whether two Constants only differ in a name, and were told of as weights."""
    weight = constant_value(pair.a) is not None and pair.a.output[0] in renamed
    return weight and change.change == "renamed"


def _function(view: GraphView) -> str:
    assert isinstance(view.proto, FunctionProto)
    overload = f":{view.proto.overload}" if view.proto.overload else ""
    return f"{view.proto.domain}::{view.proto.name}{overload}"


def _place(view: GraphView) -> str:
    return "graph" if view.scope == "main" else view.scope
