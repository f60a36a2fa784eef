"""Inner values judged one by one: what rounding hides at the outputs shows inside.

On its way to the outputs, rounding noise grows a hundredfold and more, and codes flip;
a small error in one node drowns in it. So each value that the candidate makes
differently (see `segments`) is made by both models from the same values, those of the
reference, and judged at the noise floor of that one segment. What is off by itself is
wrong if

- the name stands for the same thing in both: the same values begin with it, given the
  reference's value the candidate goes right from there, and given another it does what
  the reference does, and
- the outputs see the error: a multiple of it moves them beyond their own bound.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import onnx
from onnx import helper

from onnxopt.data.inputs import Feed, Feeds
from onnxopt.errors import WorkerError
from onnxopt.report import Check, OutputCheck
from onnxopt.runtime import Worker, is_cpu
from onnxopt.validation import noise
from onnxopt.validation.check import LevelCheck
from onnxopt.validation.metrics import Difference, compare
from onnxopt.validation.rules import FACTOR, Floor
from onnxopt.validation.samples import blamed, run_once
from onnxopt.validation.segments import (
    common_values,
    known_difference,
    made_differently,
    surely_alike,
)
from onnxopt.validation.spread import MovedModels
from onnxopt.validation.taps import UNKNOWN_BYTES, TapModel, write_part
from onnxopt.validation.verdict import LEVELS, Question, Verdict, Workers

log = logging.getLogger("onnxopt.validate")

CHUNK_BYTES = 12 << 20
"""Values that are made at once, on all feeds together."""
MAX_FEEDS = 3
GAIN = 256.0
"""Errors are made so many times as large to see whether the outputs depend on them."""
SEEN = 1e-4
"""An enlarged error counts from this part of the largest output on: itself 4e-7."""
_STEPS = 4
_WIDE = 1e-2
# Outputs of both models that were moved a long way may differ by this part.
_RESPONSE = 1e-2
Meaning = Literal["wrong"] | set[str]
Response = Literal["seen", "unseen", "another"]
Bounds = Mapping[str, float]
_JUMPS = {"ArgMax", "ArgMin", "Ceil", "Floor", "NonMaxSuppression", "Round", "Sign"}
_JUMPS |= {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "TopK"}


# A rewrite moves what one segment makes by a few units in the last place, so codes that
# flip are counted at the least move that flips any.
_LADDER = (4, 64, 1024)


@dataclass(frozen=True)
class GivenFeeds(Feeds):
    """Feeds held in memory."""

    feeds: Sequence[Feed]
    source: str = "given values"

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)


def judge_inside(
    verdict: Verdict, workers: Workers, provider: str, feeds: Feeds, moved: MovedModels
) -> None:
    """Add a check of the inner values, where the outputs alone found nothing wrong."""
    question = verdict.question
    rules = question.rules(moved.facts, provider, LEVELS[0])
    outer = verdict.passed(provider)
    if outer is None or any(check.status == "failed" for check in verdict.checks):
        return
    if not is_cpu(provider) or not isinstance(rules[0], Floor):
        return
    folder = moved.folder / "inside"
    folder.mkdir(exist_ok=True)
    inside = Inside(question, workers, feeds, folder)
    try:
        wrong = inside.first_wrong(outer.outputs)
    except WorkerError as error:
        verdict.note(f"inner values were not compared: {error}")
        return
    finally:
        inside.close()
    verdict.note(
        f"inner values made differently, each compared by itself: {len(inside.suspected)}"
    )
    if wrong is not None:
        reason = (
            f"inner value {wrong.name!r} {wrong.reason}, and the outputs depend on it"
        )
        name = f"{provider}, inner values"
        verdict.checks.append(Check(name, LEVELS[0], "failed", reason, [wrong]))


class Kept(NamedTuple):
    """What all nodes after one can be made from, on one feed."""

    at: int
    values: dict[str, Any]


class Inside:
    """Both models, cut at the values that they share."""

    def __init__(
        self, question: Question, workers: Workers, feeds: Iterable[Feed], folder: Path
    ) -> None:
        self.question, self.workers, self.folder = question, workers, folder
        self.spec = question.spec("cpu", LEVELS[0])
        self.one, self.two = TapModel(question.reference), TapModel(question.candidate)
        self.feeds = list(itertools.islice(feeds, MAX_FEEDS))
        both = common_values(self.one, self.two)
        # Values looked at: those of equal kinds, and the others with how they differ.
        self.alike: set[str] = set()
        known = {name: known_difference(self.one, self.two, name) for name in both}
        self.unlike = {name: text for name, text in known.items() if text}
        self.common = [name for name in both if name not in self.unlike]
        self.suspected: list[str] = []
        self.limit = CHUNK_BYTES // max(1, len(self.feeds))
        self._kept: dict[tuple[Path, int | None], Kept] = {}
        self._expected: dict[int, dict[str, Any]] = {}

    def close(self) -> None:
        """Close the files that it reads from."""
        self.one.close()
        self.two.close()

    def first_wrong(
        self, outputs: Sequence[OutputCheck] | None = None
    ) -> OutputCheck | None:
        """The first value that is off by itself and that the outputs depend on.

        `outputs` hold the bounds of the outputs; without them an error counts that is
        still there some values on. Raises SessionError where a part of the reference
        cannot be run, and the other WorkerErrors.
        """
        bounds = None
        if outputs is not None:
            bounds = {output.name: output.bound or 0.0 for output in outputs}
        while True:
            wrong, renamed = self._look(bounds)
            if wrong is not None or not renamed:
                return wrong
            self.common = [name for name in self.common if name not in renamed]

    def _look(self, bounds: Bounds | None) -> tuple[OutputCheck | None, set[str]]:
        """The first wrong value, or else the names that mean another thing."""
        off = self.off()
        names = {value.name for value in off}
        renamed: set[str] = set()
        open_: set[str] = set()
        for value in off:
            if not open_.isdisjoint(self.reads([value.name], self.common)):
                # It begins with such a name: to be judged again without that.
                open_.add(value.name)
                continue
            found = self.meaning(value.name, names, bounds)
            if found == "wrong":
                return value, renamed
            if found:
                renamed |= found
                open_ |= found
        return None, renamed

    # ---- which values ----

    def suspects(self) -> list[str]:
        """Common values that are made differently, in the candidate's order."""
        while True:
            found = made_differently(self.one, self.two, self.common)
            unlike = self._unlike([*found, *self.reads(found, self.common)])
            if not unlike:
                return found
            self.common = [name for name in self.common if name not in unlike]

    def reads(self, names: Sequence[str], common: Sequence[str]) -> list[str]:
        """Those of `common` that segments of `names` begin with, in either model."""
        start = set(common)
        read = self.one.cut(start, names)[1] | self.two.cut(start, names)[1]
        return [name for name in common if name in read]

    def readers(self, names: Collection[str], common: Sequence[str]) -> list[str]:
        """Those of `common` whose segments begin with one of `names`, in either model."""
        start, wanted = {*common, *names}, set(names)
        found = self.one.readers(wanted, start) | self.two.readers(wanted, start)
        return [name for name in common if name in found]

    def _unlike(self, names: Sequence[str]) -> set[str]:
        """Those that are no tensors, or have other shapes or types in the two models."""
        new = [
            n for n in dict.fromkeys(names) if n not in self.alike | self.unlike.keys()
        ]
        sure = {name for name in new if surely_alike(self.one, self.two, name)}
        self.alike |= sure
        new = [name for name in new if name not in sure]
        for chunk in self.one.chunks(new, self.feeds[0], CHUNK_BYTES):
            left = self.values(self.one, self.workers.reference, chunk, self.feeds[0])
            right = self.values(self.two, self.workers.candidate, chunk, self.feeds[0])
            for name in chunk:
                if _same_kind(left[name], right[name]):
                    self.alike.add(name)
                else:
                    problems = (d.problem for d in compare(left[name], right[name]))
                    self.unlike[name] = next(problems, None) or "is no tensor"
        return self.unlike.keys() & set(names)

    def values(
        self, taps: TapModel, worker: Worker, names: Sequence[str], feed: Feed
    ) -> dict[str, Any]:
        """Inner values of one model on a feed.

        What is alive after the last of them is kept, as far as it is no more than a lot,
        and the next lot is made from there: the model is run once and not once a lot.
        """
        at = next((i for i, own in enumerate(self.feeds) if own is feed), None)
        kept = self._kept.pop((taps.path, at), Kept(-1, {}))
        known = {name: kept.values[name] for name in names if name in kept.values}
        new = [name for name in names if name not in known]
        if not new:
            self._kept[taps.path, at] = kept
            return known
        places = [taps.order[name] for name in new]
        if min(places) <= kept.at:
            kept, known, new = Kept(-1, {}), {}, list(names)
        ahead = [] if at is None else self._ahead(taps, max(places), feed)
        wanted = dict.fromkeys([*new, *(n for n in ahead if n not in kept.values)])
        path = self.folder / "taps.onnx"
        if kept.values:
            part = {name: name for name in wanted}
            held = feed | kept.values
            write_part(taps.path, part, self._given(held, list(kept.values)), path)
            found = self._run(worker, path, held, list(wanted))
        else:
            taps.write(list(wanted), path)
            found = self._run(worker, path, feed, list(wanted))
        every = kept.values | found
        if ahead and all(isinstance(every[name], np.ndarray) for name in ahead):
            left = {name: every[name] for name in ahead}
            self._kept[taps.path, at] = Kept(max(places), left)
        return known | {name: found[name] for name in new}

    def _ahead(self, taps: TapModel, index: int, feed: Feed) -> list[str]:
        """The values that all after node `index` can be made from; none if too large."""
        symbols, names = taps.symbols(feed), taps.alive_after(index)
        sizes = [taps.bytes_of(name, symbols) for name in names]
        known = [size for size in sizes if size is not None]
        fit = len(known) == len(sizes) and sum(known) <= self.limit
        return names if fit else []

    def _run(
        self, worker: Worker, path: Path, feed: Feed, names: Sequence[str]
    ) -> dict[str, Any]:
        side = "reference" if worker is self.workers.reference else "candidate"
        with blamed(side):
            return run_once(worker, path, self.spec, feed, names)

    # ---- each by itself ----

    def off(self) -> list[OutputCheck]:
        """Values that the two models make from equal values, and not alike."""
        self.suspected = self.suspects()
        return self.off_among(self.suspected, self.common)

    def off_among(self, names: Sequence[str], common: Sequence[str]) -> list[OutputCheck]:
        """Those of `names` that are off where both models are given all of `common`."""
        return [
            off
            for chunk in self._lots(names, common)
            for off in self._off_in(chunk, common)
        ]

    def _lots(self, names: Sequence[str], common: Sequence[str]) -> Iterator[list[str]]:
        """The names, in lots that are bounded with all that they are made from."""
        start, symbols = set(common), self.one.symbols(self.feeds[0])
        lot, held, size = list[str](), set[str](), 0
        for name in names:
            ends = self.one.cut(start, [name])[1] | self.two.cut(start, [name])[1]
            both = {name, *ends}
            more = self._size(both - held, symbols)
            if lot and size + more > self.limit:
                yield lot
                lot, held, size, more = [], set(), 0, self._size(both, symbols)
            lot.append(name)
            held |= both
            size += more
        if lot:
            yield lot

    def _size(self, names: Collection[str], symbols: Mapping[str, int]) -> int:
        sizes = [self.one.bytes_of(name, symbols) for name in names]
        return sum(UNKNOWN_BYTES if size is None else size for size in sizes)

    def _off_in(self, names: Sequence[str], common: Sequence[str]) -> list[OutputCheck]:
        reads = self.reads(names, common)
        held = [self._with_inner(feed, reads) for feed in self.feeds]
        given = self._given(held[0], reads)
        ends = {name: self._own_name(name) for name in names}
        question = dataclasses.replace(
            self.question,
            reference=self._part(self.one, ends, given, "one"),
            candidate=self._part(self.two, ends, given, "two"),
            bitwise=False,
        )
        feeds = GivenFeeds([{k: feed[k] for k in given if k in feed} for feed in held])
        checks = judge_pair(question, self.workers, feeds, self.folder / "moved")
        found = {output.name: output for check in checks for output in check.outputs}
        return [
            msgspec.structs.replace(found[own], name=name)
            for name, own in ends.items()
            if own in found and found[own].status == "failed"
        ]

    def _with_inner(self, feed: Feed, names: Sequence[str]) -> Feed:
        """The feed, and the reference's inner values on it."""
        if not names:
            return feed
        return feed | self.values(self.one, self.workers.reference, names, feed)

    def _given(self, feed: Feed, reads: Sequence[str]) -> dict[str, int]:
        """Inputs of a part: the model's own, and inner values with their types."""
        inputs = dict.fromkeys(self.one.inputs, 0)
        return inputs | {
            name: helper.np_dtype_to_tensor_dtype(feed[name].dtype) for name in reads
        }

    def _own_name(self, name: str) -> str:
        taken = self.one.model.names | self.two.model.names
        own = f"{name}/own"
        while own in taken:
            own += "'"
        return own

    def _part(
        self, taps: TapModel, ends: Mapping[str, str], given: Mapping[str, int], name: str
    ) -> Path:
        path = self.folder / f"{name}.onnx"
        write_part(taps.path, ends, given, path)
        return path

    # ---- whether it matters ----

    def meaning(self, name: str, off: set[str], bounds: Bounds | None) -> Meaning:
        """What the error of value `name` says; `off` are all that are off by themselves.

        "wrong", or the names by which the candidate means another thing: none of them
        where no output depends on what differs (a shift of all scores before a Softmax).
        """
        if name in self.two.outputs:
            return "wrong"
        if not self._is_read_alike(name):
            return {name}
        if bounds is None or max(bounds.values(), default=0.0) > _WIDE:
            return self._followed(name, off)
        if not self._is_same(name, bounds):
            return self._with_followers(name, bounds)
        found = {self._response(feed, name, bounds) for feed in self.feeds}
        if "another" in found:
            return {name}
        return "wrong" if "seen" in found else set()

    def _is_read_alike(self, name: str) -> bool:
        """Whether the same values begin with value `name` in both models."""
        start, common = set(self.common), set(self.common)
        one, two = (t.readers({name}, start) & common for t in (self.one, self.two))
        return one == two

    def _followed(self, name: str, off: set[str]) -> Meaning:
        """By whether the error is still there some values on.

        Where codes flip, outputs are so far apart by rounding alone that they tell
        nothing. So the error is followed value by value, each judged at its own noise,
        as far as some other value is off, which may undo it.
        """
        passed, clean = {name}, set[str]()
        ahead = off & self.two.followers(name)
        for step in itertools.count():
            common = [other for other in self.common if other not in passed]
            front = [r for r in self.readers(passed, common) if r not in clean]
            wrong = [value.name for value in self.off_among(front, common)]
            right = set(front).difference(wrong)
            if not wrong and not off.isdisjoint(right):
                return passed
            if not wrong:
                return "wrong" if step >= _STEPS else set()
            if any(value in self.two.outputs for value in wrong):
                return "wrong"
            passed.update(wrong)
            clean.update(right)
            if step >= _STEPS and ahead <= passed | clean:
                return "wrong"
        raise AssertionError  # the count does not end

    def _is_same(self, name: str, bounds: Bounds) -> bool:
        """Whether the candidate goes right from the reference's value `name`."""
        return all(self._is_same_on(feed, name, bounds) for feed in self.feeds)

    def _is_same_on(self, feed: Feed, name: str, bounds: Bounds) -> bool:
        held = self._with_inner(feed, [name])
        expected = self._outputs(feed, bounds)
        swapped = self._rest(self.two, self.workers.candidate, name, held, bounds)
        apart = _apart(expected, swapped)
        return all(apart[output] <= bound for output, bound in bounds.items())

    def _with_followers(self, name: str, bounds: Bounds) -> set[str]:
        """A name of another thing, with those after it that are of another thing too."""
        found, front = {name}, [name]
        while front:
            common = [other for other in self.common if other not in found]
            front = [
                other
                for other in self.readers(front, common)
                if other not in self.two.outputs and not self._is_same(other, bounds)
            ]
            found.update(front)
        return found

    def _response(self, feed: Feed, name: str, bounds: Bounds) -> Response:
        """What outputs do when the error is made larger, more than by rounding.

        "another" where those of the candidate do not do the same.
        """
        right, own = self._right_and_own(feed, name)
        larger = amplified(right, own)
        expected = self._outputs(feed, bounds)
        moved, still = (
            self._rest(
                self.one, self.workers.reference, name, feed | {name: value}, bounds
            )
            for value in (larger, _moved(right, enlargement(right, own)))
        )
        held = feed | {name: larger}
        other = self._rest(self.two, self.workers.candidate, name, held, bounds)
        more, usual = _apart(expected, moved), _apart(expected, still)
        if not any(more[o] > max(SEEN, FACTOR * usual[o]) for o in bounds):
            return "unseen"
        apart = _apart(moved, other)
        same = all(apart[o] <= max(FACTOR * bounds[o], _RESPONSE) for o in bounds)
        return "seen" if same else "another"

    def _outputs(self, feed: Feed, outputs: Bounds) -> dict[str, Any]:
        """The reference's own outputs on one of the feeds; they are kept."""
        at = next(i for i, own in enumerate(self.feeds) if own is feed)
        if at not in self._expected:
            left, path = self.workers.reference, self.question.reference
            self._expected[at] = self._run(left, path, feed, list(outputs))
        return self._expected[at]

    def _rest(
        self, taps: TapModel, worker: Worker, name: str, held: Feed, outputs: Bounds
    ) -> dict[str, Any]:
        """The outputs of one model, given a value."""
        ends = {output: output for output in outputs}
        path = self._part(taps, ends, self._given(held, [name]), "rest")
        return self._run(worker, path, held, list(ends))

    def _right_and_own(self, feed: Feed, name: str) -> tuple[Any, Any]:
        """A value in the reference, and what the candidate makes of equal beginnings."""
        reads = self.reads([name], self.common)
        held = self._with_inner(feed, [*reads, name])
        ends = {name: self._own_name(name)}
        given = self._given(held, reads)
        path = self._part(self.two, ends, given, "two")
        own = self._run(self.workers.candidate, path, held, list(ends.values()))
        return held[name], own[ends[name]]


def judge_pair(
    question: Question, workers: Workers, feeds: Feeds, folder: Path
) -> list[Check]:
    """The check of two parts of models on the CPU at disable_all."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    model = onnx.load(question.reference, load_external_data=False)
    facts = noise.facts(model, question.reference)
    jumps = any(node.op_type in _JUMPS for node in noise.all_nodes(model))
    facts = dataclasses.replace(facts, quantized=facts.quantized or jumps)
    inner = Verdict(question)
    moved = MovedModels(question, facts, folder, _LADDER if facts.quantized else None)
    LevelCheck(moved, workers, "cpu", LEVELS[0], feeds).into(inner)
    return inner.checks


def amplified(right: Any, own: Any) -> Any:
    """The right value with the error of the other, enlarged.

    `GAIN` times, or until it is as large as the value itself. Integers stay in the range
    of their type. Values that are not finite, truth values and strings have no larger
    error: they are those of the other.
    """
    if right.dtype.kind not in "fiu":
        return own
    gain = enlargement(right, own)
    with np.errstate(over="ignore", invalid="ignore"):
        error = own.astype(np.float64) - right.astype(np.float64)
        larger = np.where(error == 0, 0, gain * error) + right.astype(np.float64)
    if right.dtype.kind in "iu":
        limits = np.iinfo(right.dtype)
        low, high = float(limits.min), float(limits.max)
        if high > limits.max:  # float64 cannot hold the largest 64-bit integers
            high = np.nextafter(high, 0)
        return np.where(error == 0, right, larger.clip(low, high).astype(right.dtype))
    return np.where(np.isfinite(larger), larger, own).astype(right.dtype)


def enlargement(right: Any, own: Any) -> float:
    """From 1 to `GAIN`: how many times an error fits into the value."""
    if right.dtype.kind not in "fiu":
        return 1.0
    one, two = right.astype(np.float64), own.astype(np.float64)
    finite = np.isfinite(one) & np.isfinite(two)
    scale = float(np.abs(one[finite]).max(initial=0.0))
    error = float(np.abs(two[finite] - one[finite]).max(initial=0.0))
    return min(GAIN, max(1.0, scale / error)) if error else GAIN


def _moved(value: Any, gain: float) -> Any:
    """The value with rounding noise, as many times as large as an error is made."""
    moved: Any = noise.moved_feed({"": value}, max(1, int(gain)), 0)[""]
    return moved


def _same_kind(one: object, two: object) -> bool:
    if not isinstance(one, np.ndarray) or not isinstance(two, np.ndarray):
        return False
    return bool(one.shape == two.shape and one.dtype == two.dtype)


def _apart(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, float]:
    """How far each output is off, relative to its largest value."""
    return {
        name: max((_distance(d) for d in compare(value, found[name])), default=0.0)
        for name, value in expected.items()
    }


def _distance(difference: Difference) -> float:
    if difference.problem or difference.lost_finite:
        return math.inf
    if difference.exact:
        return 1.0 if difference.flipped else 0.0
    return difference.max_rel
