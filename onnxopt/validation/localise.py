"""Where a wrong result begins: the first node that is wrong, in topological order.

Values that both models have are made by each from the reference's own values, lot by lot
within a bound of memory (see `inside`), so that a node is told from what only follows
from it. Where every value is right by itself, what they become on their way through the
whole model is compared. Nodes with subgraphs are opened (see `bodies`).

The error is told twice: of the value made from the reference's own values (local), and
as it comes out of the whole model (cumulative).
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from onnxopt.data.inputs import Feed
from onnxopt.errors import SessionError
from onnxopt.report import Check, OutputCheck
from onnxopt.runtime import Worker
from onnxopt.validation.bodies import OPENED, body_name, write_body
from onnxopt.validation.inside import CHUNK_BYTES, GivenFeeds, Inside, judge_pair
from onnxopt.validation.metrics import compare
from onnxopt.validation.ordering import is_comparable, is_misordered
from onnxopt.validation.rules import Outcome
from onnxopt.validation.taps import TapModel
from onnxopt.validation.ties import find_search, producers_of
from onnxopt.validation.verdict import Question, Workers, output_check

MAX_DEPTH = 4
"""Subgraphs within subgraphs that are opened."""


class Drift(msgspec.Struct, frozen=True):
    """The first value that is wrong.

    `node` makes `value` in the candidate, in scope `scope`. Errors are relative to the
    largest magnitude in the reference, None where shape, type or what is finite differs,
    or (`local`) where the value is right when made from the reference's own values.
    `bound`: what rounding explains. `after`: the values, right by themselves, that it is
    made from. `compared` of `common` values are made differently and were looked at.
    """

    node: str
    op: str
    scope: str
    value: str
    reason: str
    local: float | None
    cumulative: float | None
    bound: float | None
    after: list[str]
    compared: int
    common: int


@dataclass(frozen=True)
class Found:
    """A drift, and the pair of models whose main graphs hold it."""

    drift: Drift
    reference: Path
    candidate: Path


def localise(question: Question, feed: Feed, folder: Path) -> Found | None:
    """The first wrong value on `feed`; None where all that both models have is right.

    `folder` keeps the models that are returned. Raises SessionError where a model with
    inner values as outputs cannot be run, and the other WorkerErrors.
    """
    question = dataclasses.replace(question, bitwise=False)
    with question.worker() as left, question.worker() as right:
        workers = Workers(left, right)
        found = _search(question, workers, feed, "main")
        for depth in range(MAX_DEPTH):
            inner = found and _opened(question, workers, feed, found, folder, depth)
            if not inner:
                break
            question = dataclasses.replace(
                question, reference=inner.reference, candidate=inner.candidate
            )
            found = inner
        return found


def _search(question: Question, workers: Workers, feed: Feed, scope: str) -> Found | None:
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as name:
        inside = Inside(question, workers, [feed], Path(name))
        try:
            wrong = inside.first_wrong()
            local = wrong is not None
            wrong = wrong or _first_drift(inside) or _first_misordered(inside)
            wrong = _first_unlike(inside, wrong.name if wrong else None) or wrong
            if wrong is None:
                return None
            drift = _drift(inside, wrong, local, scope)
        finally:
            inside.close()
    return Found(drift, question.reference, question.candidate)


def _first_drift(inside: Inside) -> OutputCheck | None:
    """What begins the first difference of common values in the whole models.

    Small errors that are within rounding may grow in a node that is right, so it is the
    first value before that is made differently and differs at all.
    """
    for names in inside.one.chunks(inside.common, inside.feeds[0], CHUNK_BYTES):
        checks = _judge_taps(inside, names)
        found = {output.name: output for check in checks for output in check.outputs}
        failed = [n for n in names if n in found and found[n].status == "failed"]
        if failed:
            return _cause(inside, failed[0]) or found[failed[0]]
    return None


def _cause(inside: Inside, name: str) -> OutputCheck | None:
    nodes, _ = inside.two.cut((), [name])
    read = {source for node in nodes for source in inside.two.sources(node)}
    before = [other for other in inside.suspected if other in read]
    for names in inside.one.chunks(before, inside.feeds[0], CHUNK_BYTES):
        checks = _judge_taps(inside, names)
        found = {output.name: output for check in checks for output in check.outputs}
        for other in names:
            if other in found and (found[other].max_abs.worst or 0) > 0:
                reason = (
                    f"differs by {found[other].max_abs.worst:.3g}, as shows in {name!r}"
                )
                return msgspec.structs.replace(found[other], reason=reason)
    return None


def _first_misordered(inside: Inside) -> OutputCheck | None:
    """The first indices that are equal, and chosen from values of another order."""
    one, two = inside.one, inside.two
    feed = inside.feeds[0]
    makers = producers_of(one.model.proto), producers_of(two.model.proto)
    for name in inside.suspected:
        left, right = (find_search(made, name) for made in makers)
        if not left or not right or left.kind != right.kind:
            continue
        if left.source not in one.order or right.source not in two.order:
            continue
        workers = inside.workers
        values = inside.values(one, workers.reference, [left.source], feed)
        others = inside.values(two, workers.candidate, [right.source], feed)
        pair = values[left.source], others[right.source]
        if is_comparable(*pair) and is_misordered(*pair, left.axis):
            return _without_numbers(name, "is chosen from values of another order")
    return None


def _first_unlike(inside: Inside, name: str | None = None) -> OutputCheck | None:
    """The first value of another shape or type; of those that `name` is made of."""
    nodes = inside.two.nodes
    if name is not None:
        nodes, _ = inside.two.cut(set(inside.common), [name])
    made = (value for node in nodes for value in node.output)
    found = next((value for value in made if inside.unlike.get(value)), None)
    if found is None:
        return None
    return _without_numbers(found, inside.unlike[found])


def _without_numbers(name: str, reason: str) -> OutputCheck:
    """A value that is wrong, where no distance tells by how much."""
    return output_check(name, (), Outcome(reason, None), False)


def _judge_taps(inside: Inside, names: list[str]) -> list[Check]:
    question = dataclasses.replace(
        inside.question,
        reference=inside.one.write(names, inside.folder / "taps-one.onnx"),
        candidate=inside.two.write(names, inside.folder / "taps-two.onnx"),
    )
    feeds = GivenFeeds(inside.feeds)
    return judge_pair(question, inside.workers, feeds, inside.folder / "moved")


def _drift(inside: Inside, wrong: OutputCheck, local: bool, scope: str) -> Drift:
    name, taps = wrong.name, inside.two
    node = taps.maker(name)
    start = set(inside.common)
    _, before = taps.cut(start, [name])
    return Drift(
        node=taps.graph.label(node),
        op=taps.graph.op(node),
        scope=scope,
        value=name,
        reason=wrong.reason or "",
        local=wrong.max_rel.worst if local else None,
        cumulative=_cumulative(inside, name) if local else wrong.max_rel.worst,
        bound=wrong.bound,
        after=sorted(before, key=taps.order.__getitem__),
        compared=len(inside.suspected),
        common=len(inside.common),
    )


def _cumulative(inside: Inside, name: str) -> float | None:
    feed = inside.feeds[0]
    try:
        left = inside.values(inside.one, inside.workers.reference, [name], feed)
        right = inside.values(inside.two, inside.workers.candidate, [name], feed)
    except SessionError:
        return None
    errors = [d.max_rel for d in compare(left[name], right[name]) if not d.problem]
    return max((e for e in errors if np.isfinite(e)), default=None)


# --- subgraphs ----------------------------------------------------------------------


def _opened(
    question: Question,
    workers: Workers,
    feed: Feed,
    found: Found,
    folder: Path,
    depth: int,
) -> Found | None:
    """The same search in the body of the node that was found, if it has one."""
    if found.drift.op not in OPENED:
        return None
    attribute = _body_taken(question, workers, feed, found.drift.value)
    if attribute is None:
        return None
    paths = [folder / f"body-{depth}-{side}.onnx" for side in ("one", "two")]
    for path, target in zip((found.reference, found.candidate), paths, strict=True):
        if not write_body(path, found.drift.value, attribute, target):
            return None
    pair = dataclasses.replace(question, reference=paths[0], candidate=paths[1])
    scope = f"{found.drift.scope}/{found.drift.node}.{attribute}"
    try:
        return _search(pair, workers, feed, scope)
    except SessionError:
        return None


def _body_taken(
    question: Question, workers: Workers, feed: Feed, value: str
) -> str | None:
    """The body that both models run first to make `value`; None where there is none."""
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as name:
        inside = Inside(question, workers, [feed], Path(name))
        try:
            one = _taken(inside, inside.one, workers.reference, value)
            two = _taken(inside, inside.two, workers.candidate, value)
        finally:
            inside.close()
    return one if one == two else None


def _taken(inside: Inside, taps: TapModel, worker: Worker, value: str) -> str | None:
    node = taps.maker(value)
    if node.op_type != "If":
        return body_name(node, True)
    name, feed = node.input[0], inside.feeds[0]
    if name in taps.order:
        feed = inside.values(taps, worker, [name], feed)
    condition = feed[name] if name in feed else taps.graph.array(name)
    return body_name(node, bool(np.all(condition)))
