"""Indices that differ: judged by the values they select.

    y = ArgMax(x)       where two elements of x are equal up to rounding, either index
                        is right

The tensor that was searched is read from the reference, which for that is given one
output more. A differing index is forgiven where the value it selects is, within the
noise of that tensor, the value that the reference's own index selects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxopt import attributes
from onnxopt.data.inputs import Feeds
from onnxopt.errors import SessionError
from onnxopt.runtime import Session, SessionSpec, Worker
from onnxopt.validation import noise
from onnxopt.validation.metrics import compare
from onnxopt.validation.rules import FACTOR, Floor
from onnxopt.validation.samples import blamed, numbered
from onnxopt.validation.verdict import Question

# Nodes that keep elements and their order.
_CARRIERS = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
_SEARCHES = {"ArgMax": 0, "ArgMin": 0, "TopK": 1}
_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Search:
    """The tensor that an output's indices point into, and along which axis.

    `kind`: by which operator, and whether the largest or the smallest come first.
    """

    source: str
    axis: int
    kind: tuple[str, int, bool] = ("", 0, True)

    def select(self, source: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
        """Values that the indices select, flat; None where they do not fit."""
        axis = self.axis % source.ndim
        rest = source.size // max(source.shape[axis], 1)
        if not rest or indices.size % rest:
            return None
        shape = list(source.shape)
        shape[axis] = indices.size // rest
        shaped = indices.reshape(shape).astype(np.int64)
        if shaped.min() < -source.shape[axis] or shaped.max() >= source.shape[axis]:
            return None
        return np.take_along_axis(source, shaped % source.shape[axis], axis).reshape(-1)


def producers_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Who makes each value of the main graph."""
    return {name: node for node in model.graph.node for name in node.output}


def find_search(producers: Mapping[str, onnx.NodeProto], output: str) -> Search | None:
    """The search that a value of the main graph comes from, if it does."""
    node = producers.get(output)
    while node is not None and node.op_type in _CARRIERS:
        output = node.input[0]
        node = producers.get(output)
    if node is None or node.op_type not in _SEARCHES:
        return None
    if node.output[_SEARCHES[node.op_type]] != output:
        return None
    default = -1 if node.op_type == "TopK" else 0
    axis = next((a.i for a in node.attribute if a.name == "axis"), default)
    largest = attributes.get(node, "largest", 1) != 0
    return Search(node.input[0], int(axis), (node.op_type, int(axis), largest))


def tapped(path: Path, names: Iterable[str]) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """The model with more outputs, and the session options to load it with."""
    model = onnx.load(path, load_external_data=False)
    present = {info.name for info in (*model.graph.output, *model.graph.input)}
    for name in dict.fromkeys(names):
        if name not in present:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return model.SerializeToString(), ((_FOLDER, str(path.absolute().parent)),)


@dataclass
class TieBreak:
    """Looks again at outputs whose indices differ; both sessions are its own."""

    question: Question
    spec: SessionSpec
    rule: Floor
    feeds: Feeds
    hard: bool

    def forgiven(self, outputs: Iterable[str], wanted: set[int]) -> set[str]:
        """Outputs whose indices select equal values on all wanted feeds."""
        model = onnx.load(self.question.reference, load_external_data=False)
        producers = producers_of(model)
        searches = {name: find_search(producers, name) for name in outputs}
        found = {name: search for name, search in searches.items() if search}
        if not found:
            return set()
        try:
            return self._run(found, wanted)
        except SessionError:
            return set()

    def _run(self, searches: dict[str, Search], wanted: set[int]) -> set[str]:
        sources = [search.source for search in searches.values()]
        with self.question.worker() as left, self.question.worker() as right:
            with blamed("reference"):
                reference = self._load_tapped(left, sources)
            with blamed("candidate"):
                candidate = right.load(self.question.candidate, self.spec)
            good = set(searches)
            for at in numbered(self.feeds, self.hard):
                if at.index in wanted and good:
                    good -= self._wrong(searches, at.feed, reference, candidate)
            return good

    def _load_tapped(self, worker: Worker, names: list[str]) -> Session:
        model, options = tapped(self.question.reference, names)
        spec = self.question.spec(self.spec.provider, self.spec.level)
        return worker.load(model, _with_options(spec, options))

    def _wrong(
        self,
        searches: dict[str, Search],
        feed: dict[str, Any],
        reference: Session,
        candidate: Session,
    ) -> set[str]:
        sources = dict.fromkeys(search.source for search in searches.values())
        names = [name for name in (*searches, *sources) if name not in feed]
        with blamed("reference"):
            expected = reference.run(feed, names)
            moved = reference.run(noise.moved_feed(feed, 1, self.question.seed), names)
        with blamed("candidate"):
            found = candidate.run(feed, list(searches))
        values = expected | feed
        return {
            name
            for name, search in searches.items()
            if not self._equal(search, expected[name], found[name], values, moved)
        }

    def _equal(
        self,
        search: Search,
        left: np.ndarray,
        right: np.ndarray,
        values: dict[str, Any],
        moved: dict[str, Any],
    ) -> bool:
        source = values[search.source]
        if left.shape != right.shape or source.dtype.kind != "f":
            return False
        one, two = search.select(source, left), search.select(source, right)
        if one is None or two is None:
            return False
        gap = float(np.abs(one - two).max(initial=0.0))
        return gap <= self._noise(source, moved.get(search.source, source))

    def _noise(self, source: np.ndarray, moved: np.ndarray) -> float:
        (difference,) = compare(source, moved)
        if difference.problem or not math.isfinite(difference.scale):
            return 0.0
        bound = self.rule.bound(difference.dtype) * difference.scale
        return max(bound, FACTOR * difference.max_abs)


def _with_options(spec: SessionSpec, options: tuple[tuple[str, str], ...]) -> SessionSpec:
    return SessionSpec(
        spec.provider, spec.level, spec.threads, options, spec.custom_op_libraries
    )
