"""The reference against itself: how far its outputs move by rounding alone.

Runs of moved copies (see `noise`), at the provider and level of the check, on the feeds
that no constant bound settles. One moved session is alive beside the reference's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxopt.data.inputs import Feeds
from onnxopt.errors import SessionError, WorkerError
from onnxopt.runtime import Session, SessionSpec, Worker
from onnxopt.validation import noise
from onnxopt.validation.rules import Sample, Spread
from onnxopt.validation.samples import NumberedFeed, numbered, samples_of
from onnxopt.validation.verdict import Question

log = logging.getLogger("onnxopt.validate")

# Units in the last place that inputs and weights are moved by. On a quantized model one
# unit rarely flips a code, so a rewrite's few flips would look like an error: there they
# are moved by 3e-5 of their value, far less than a code, and by 5e-4 if nothing flips.
_ULPS = (1,)
_ULPS_QUANTIZED = (256, 4096)
# A reference whose quantizers are single steps runs as floats; where a candidate has
# QuantizeLinear, ONNX Runtime rounds biases to integers at the product of two scales.
_ULPS_WRITTEN_OUT = (4096,)
_SEEDS = (1, 2, 3)
# Few runs can miss, by luck, how far some output moves; before it counts as wrong, more
# are made on the feeds in question.
_MORE_SEEDS = (4, 5, 6, 7, 8, 9, 10)
_MORE_FEEDS = 4
# Above this many bytes further runs move the inputs only, and use the copies again.
_CHEAP_COPY = 1 << 27


class MovedModels:
    """Copies of the reference with moved weights, made when first asked for."""

    def __init__(
        self,
        question: Question,
        facts: noise.Facts,
        folder: Path,
        ladder: tuple[int, ...] | None = None,
    ) -> None:
        """`ladder`: units in the last place to move by, the next where nothing moves."""
        self.question, self.facts, self.folder = question, facts, folder
        self.ladder = ladder or _ladder(facts)

    def path(self, ulps: int, seed: int) -> Path:
        """The copy; the reference itself where it is too large, or has no weights."""
        reference = self.question.reference
        if self.facts.size > _CHEAP_COPY:
            seed = 1 + (seed - 1) % len(_SEEDS)
        if self.facts.size > noise.WEIGHT_LIMIT:
            return reference
        path = self.folder / f"moved-{ulps}-{seed}.onnx"
        if not path.exists():
            if self.facts.size > _CHEAP_COPY:
                self._remove_others(ulps)
            if not noise.write_moved(reference, ulps, self.question.seed + seed, path):
                return reference
        return path

    def _remove_others(self, ulps: int) -> None:
        """Large copies are kept of one size of move only, for the sake of the disk."""
        for old in self.folder.glob("moved-*"):
            if not old.name.startswith(f"moved-{ulps}-"):
                old.unlink()


def _ladder(facts: noise.Facts) -> tuple[int, ...]:
    if not facts.quantized:
        return _ULPS
    return _ULPS_WRITTEN_OUT if facts.written_out else _ULPS_QUANTIZED


@dataclass(frozen=True)
class Move:
    """One way to run the reference a little off: which file, how, and moved by what."""

    path: Path
    spec: SessionSpec
    ulps: int = 0
    seed: int = 0


@dataclass
class SpreadMeasure:
    """Measures `Spread`s of some outputs on some feeds (by number)."""

    moved: MovedModels
    reference: Session
    spec: SessionSpec
    worker: Worker
    feeds: Feeds
    hard: bool
    ulps: int = 1

    def measure(
        self, names: Sequence[str], wanted: set[int], repeat: dict[str, list[Sample]]
    ) -> dict[str, Spread]:
        """The spread of each output; `repeat` holds what running it twice gave."""
        spreads = {name: Spread() for name in names}
        for name in names:
            for sample in repeat.get(name, ()):
                spreads[name].add(sample)
        for ulps in self.moved.ladder:
            self.ulps = ulps
            self._move(spreads, wanted, _SEEDS)
            if any(spread.moved for spread in spreads.values()):
                break
        self._run(spreads, wanted, self._other_threads())
        return spreads

    def measure_more(
        self, spreads: dict[str, Spread], names: Sequence[str], wanted: set[int]
    ) -> None:
        """More runs on a few of the feeds that are still in doubt."""
        chosen = {name: spreads[name] for name in names}
        few = set(sorted(wanted)[:_MORE_FEEDS])
        self._move(chosen, few, _MORE_SEEDS)

    def _move(
        self, spreads: dict[str, Spread], wanted: set[int], seeds: Sequence[int]
    ) -> None:
        for seed in seeds:
            path = self.moved.path(self.ulps, seed)
            self._run(spreads, wanted, Move(path, self.spec, self.ulps, seed))

    def _other_threads(self) -> Move:
        question = self.moved.question
        threads = 2 if question.threads == 1 else 1
        spec = question.spec(self.spec.provider, self.spec.level, threads)
        return Move(question.reference, spec)

    def _run(self, spreads: dict[str, Spread], wanted: set[int], move: Move) -> None:
        """What goes wrong here costs a measurement, never the verdict."""
        try:
            session = self.worker.load(move.path, move.spec)
            for at in numbered(self.feeds, self.hard):
                if at.index in wanted:
                    self._run_feed(spreads, session, at, move)
            session.close()
        except WorkerError as error:
            log.info("the moved reference was not measured: %s", error)

    def _run_feed(
        self, spreads: dict[str, Spread], session: Session, at: NumberedFeed, move: Move
    ) -> None:
        seed = self.moved.question.seed + move.seed
        feed = noise.moved_feed(at.feed, move.ulps, seed) if move.ulps else at.feed
        try:
            expected = self.reference.run(at.feed, list(spreads))
            found = session.run(feed, list(spreads))
        except SessionError as error:
            log.info("the moved reference rejects feed %d: %s", at.index, error)
            return
        for name, spread in spreads.items():
            for sample in samples_of(at, expected[name], found[name]):
                spread.add(sample)
