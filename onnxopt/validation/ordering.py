"""Indices that are equal, by what they were chosen from.

    y = ArgMax(x)        reference
    y = ArgMax(x + c)    candidate, where c favours one class

On a few feeds the same index may win in both, since the others are far behind. So what
is searched is looked at too: wherever two of its elements are clearly apart in the
reference, the candidate may not have them clearly the other way round. What is in the
same order gives the same indices: a Softmax left out before an ArgMax does no harm.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxopt.data.inputs import Feed, Feeds
from onnxopt.errors import WorkerError
from onnxopt.report import Check
from onnxopt.runtime import Session
from onnxopt.validation import noise
from onnxopt.validation.rules import Floor
from onnxopt.validation.samples import blamed
from onnxopt.validation.ties import Search, find_search, producers_of, tapped
from onnxopt.validation.verdict import LEVELS, Question, Verdict, Workers

CLEARLY = 1e-3
"""Elements are apart if they differ by this part of the largest magnitude."""
MAX_ROWS = 256
_MAX_FEEDS = 8


def judge_ordering(
    verdict: Verdict, workers: Workers, provider: str, feeds: Feeds, facts: noise.Facts
) -> None:
    """Add a check of what indices were chosen from, where nothing wrong was found."""
    question = verdict.question
    rules = question.rules(facts, provider, LEVELS[0])
    failed = any(check.status == "failed" for check in verdict.checks)
    if failed or facts.quantized or not isinstance(rules[0], Floor):
        return
    pairs = _searches(question)
    if not pairs:
        return
    try:
        wrong = _Look(question, workers, provider, pairs).first_wrong(feeds)
    except WorkerError as error:
        verdict.note(f"what indices are chosen from was not compared: {error}")
        return
    if wrong is not None:
        name, index = wrong
        reason = (
            f"output {name!r} is chosen from values of another order on feed {index}: "
            "equal there by luck"
        )
        check = Check(f"{provider}, order", LEVELS[0], "failed", reason, [])
        verdict.checks.append(check)


def _searches(question: Question) -> dict[str, tuple[Search, Search]]:
    """Outputs that both models search along the same axis, with both searches."""
    one, two = (
        onnx.load(path, load_external_data=False)
        for path in (question.reference, question.candidate)
    )
    found = {}
    makers = producers_of(one), producers_of(two)
    for output in one.graph.output:
        left, right = (find_search(made, output.name) for made in makers)
        if left and right and left.kind == right.kind:
            found[output.name] = (left, right)
    return found


@dataclass
class _Look:
    question: Question
    workers: Workers
    provider: str
    pairs: Mapping[str, tuple[Search, Search]]

    def first_wrong(self, feeds: Feeds) -> tuple[str, int] | None:
        """The first output that was searched in another order, and the feed."""
        sessions = [self._load(side) for side in (0, 1)]
        for index, feed in enumerate(itertools.islice(feeds, _MAX_FEEDS)):
            values = [self._values(session, side, feed) for side, session in sessions]
            for name, (left, right) in self.pairs.items():
                one, two = values[0][left.source], values[1][right.source]
                if is_comparable(one, two) and is_misordered(one, two, left.axis):
                    return name, index
        return None

    def _load(self, side: int) -> tuple[int, Session]:
        what, worker, path = list(self.workers.sides(self.question))[side]
        model, options = tapped(path, self._sources(side))
        spec = self.question.spec(self.provider, LEVELS[0])
        spec = dataclasses.replace(spec, options=(*spec.options, *options))
        with blamed(what):
            return side, worker.load(model, spec)

    def _sources(self, side: int) -> list[str]:
        return list(dict.fromkeys(pair[side].source for pair in self.pairs.values()))

    def _values(self, session: Session, side: int, feed: Feed) -> dict[str, Any]:
        wanted = [name for name in self._sources(side) if name not in feed]
        with blamed(("reference", "candidate")[side]):
            return feed | session.run(feed, wanted)


def is_comparable(one: Any, two: Any) -> bool:
    """Whether two values are finite floats of one shape, with an axis to search."""
    return (
        isinstance(one, np.ndarray)
        and isinstance(two, np.ndarray)
        and one.shape == two.shape
        and one.ndim > 0
        and one.dtype.kind == two.dtype.kind == "f"
        and bool(np.isfinite(one).all() and np.isfinite(two).all())
    )


def is_misordered(one: np.ndarray, two: np.ndarray, axis: int) -> bool:
    """Whether two elements along `axis` are clearly in one order here, another there."""
    rows, others = (
        np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]).astype(np.float64)
        for array in (one, two)
    )
    pairs = zip(rows[:MAX_ROWS], others[:MAX_ROWS], strict=True)
    return any(_row_is_misordered(row, other) for row, other in pairs)


def _row_is_misordered(row: np.ndarray, other: np.ndarray) -> bool:
    if row.size < 2:
        return False
    order = np.argsort(row, kind="stable")
    row, other = row[order], other[order]
    apart = [CLEARLY * float(np.abs(array).max()) for array in (row, other)]
    # So many elements are clearly smaller than each one.
    smaller = np.searchsorted(row, row - apart[0], side="left")
    highest = np.maximum.accumulate(other)
    has_smaller = smaller > 0
    before = highest[smaller[has_smaller] - 1]
    return bool((before > other[has_smaller] + apart[1]).any())
