"""The question that a judgement answers, and the verdict as it is put together."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from onnxopt.data.inputs import Feed
from onnxopt.processor import PRECISE
from onnxopt.report import (
    Check,
    Counts,
    LevelDifference,
    Metric,
    NotFinite,
    OutputCheck,
    Placement,
    Status,
    Validation,
)
from onnxopt.runtime import Level, SessionSpec, Worker, is_cpu, provider_name
from onnxopt.validation import noise
from onnxopt.validation.footprint import Footprint, limit
from onnxopt.validation.metrics import Allowance, Difference
from onnxopt.validation.rules import (
    LOSSY_FLOOR_DB,
    Exact,
    Floor,
    Outcome,
    Ratio,
    Rule,
    Sample,
    Within,
)

Side: TypeAlias = Literal["reference", "candidate"]
LEVELS: tuple[Level, ...] = ("disable_all", "enable_all")
# How many shapes of one output a report lists.
_MOST_SHAPES = 16


@dataclass(frozen=True)
class Budget:
    """What the user allows, in place of the noise floor.

    `min_sqnr` in dB, per output and feed; `rtol` and `atol` as in numpy's allclose;
    `metric` is `script.py:function`, called with `run(feed) -> {output: array}`, higher
    is better, and may drop by `max_drop` (absolute, 0 if not given).
    """

    min_sqnr: float | None = None
    rtol: float | None = None
    atol: float | None = None
    metric: str | None = None
    max_drop: float | None = None

    def rules(self) -> list[Rule]:
        """What every output has to satisfy; the metric asks for finite and shaped."""
        rules: list[Rule] = []
        if self.rtol is not None or self.atol is not None:
            rules.append(Within(Allowance(self.rtol or 0.0, self.atol or 0.0)))
        if self.min_sqnr is not None:
            rules.append(Ratio(self.min_sqnr))
        if self.metric is not None and not rules:
            rules.append(Ratio(None))
        return rules

    @property
    def text(self) -> str:
        """The budget in words; empty where nothing is set."""
        parts = []
        if self.rtol is not None or self.atol is not None:
            parts.append(f"rtol {self.rtol or 0:g}, atol {self.atol or 0:g}")
        if self.min_sqnr is not None:
            parts.append(f"at least {self.min_sqnr:g} dB")
        if self.metric is not None:
            parts.append(f"{self.metric} may drop by {self.max_drop or 0:g}")
        return "; ".join(parts)


# ORT packs constant weights at every level, for a kernel that adds in another order: a
# weight that became a constant would look like a wrong result.
_UNPACKED = (("session.disable_prepacking", "1"),)


@dataclass(frozen=True)
class Question:
    """What is asked of every check: which models, which rules, how they are run.

    `precise`: with exact int8 kernels on the CPU (see `onnxopt.validation.saturation`).
    """

    reference: Path
    candidate: Path
    budget: Budget = Budget()
    lossy: bool = False
    bitwise: bool = False
    threads: int = 1
    timeout: float = 600.0
    memory_limit: int | None = None
    custom_op_libraries: tuple[str, ...] = ()
    seed: int = 0
    precise: bool = False
    required: frozenset[str] = frozenset()

    @property
    def exact(self) -> bool:
        """Whether the candidate claims to compute the same, up to rounding."""
        return not (self.lossy or self.budget.text)

    def worker(self) -> Worker:
        """A process for sessions of one model."""
        return Worker(timeout=self.timeout, memory_limit=self.memory_limit)

    def spec(
        self, provider: str, level: Level, threads: int | None = None
    ) -> SessionSpec:
        """How a session of either model is made."""
        return SessionSpec(
            provider=provider,
            level=level,
            threads=self.threads if threads is None else threads,
            options=self._session_options(provider, level),
            custom_op_libraries=self.custom_op_libraries,
            strict=self.is_required(provider),
            placement=True,
        )

    def _session_options(
        self, provider: str, level: Level
    ) -> tuple[tuple[str, str], ...]:
        unpacked = _UNPACKED if self._is_exact(provider, level) else ()
        exact = self.precise and is_cpu(provider)
        return (*unpacked, PRECISE) if exact else unpacked

    def is_required(self, provider: str) -> bool:
        """Whether nothing may run elsewhere; `required` holds full names."""
        return provider_name(provider) in self.required

    @functools.cached_property
    def _footprints(self) -> dict[Side, Footprint]:
        return {
            "reference": Footprint(self.reference),
            "candidate": Footprint(self.candidate),
        }

    def refuse_to_swap(self, side: Side, provider: str, feed: Feed) -> None:
        """Raise WorkerMemoryError where a run would take more memory than it may.

        Only known on the CPU: a GPU has memory of its own.
        """
        if is_cpu(provider):
            most = limit(self.memory_limit)
            self._footprints[side].refuse_above(most, feed)

    def macs(self, side: Side, feed: Feed) -> int:
        """Multiply-accumulates of a run, at least; what is unknown counts nothing."""
        return self._footprints[side].macs(feed)

    def _is_exact(self, provider: str, level: Level) -> bool:
        return self.bitwise and level == "disable_all" and is_cpu(provider)

    def rules(self, facts: noise.Facts, provider: str, level: Level) -> list[Rule]:
        """What every output has to satisfy in one check."""
        if rules := self.budget.rules():
            return rules
        if self.lossy:
            return [Ratio(LOSSY_FLOOR_DB)]
        if self._is_exact(provider, level) and facts.precision == "float32":
            return [Exact()]
        measurable = facts.float_inputs or facts.size <= noise.WEIGHT_LIMIT
        return [Floor(facts.precision, facts.quantized, measurable)]

    @property
    def judged_by(self) -> str:
        """The rules in words, for the report."""
        if self.budget.text:
            return self.budget.text
        if self.lossy:
            return f"floor of lossy passes: finite, same shapes, {LOSSY_FLOOR_DB:g} dB"
        if self.bitwise:
            return "equality at disable_all on cpu, the noise floor elsewhere"
        return "noise floor"


@dataclass(frozen=True)
class Workers:
    """One process for either model, so that a crash has one culprit."""

    reference: Worker
    candidate: Worker

    def sides(self, question: Question) -> Iterator[tuple[Side, Worker, Path]]:
        """Either model: what it is called, its process, its file."""
        yield "reference", self.reference, question.reference
        yield "candidate", self.candidate, question.candidate


class Verdict:
    """Collects checks and notes, and sums them up."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.checks: list[Check] = []
        self.differences: list[LevelDifference] = []
        self.placements: list[Placement] = []
        self.notes: list[str] = []
        self.absent: set[str] = set()
        self.feeds = 0

    def passed(self, provider: str) -> Check | None:
        """The provider's own check at disable_all, where it found nothing."""
        wanted = (provider, LEVELS[0], "passed")
        found = (c for c in self.checks if (c.provider, c.level, c.status) == wanted)
        return next(found, None)

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def not_run(self, provider: str, reason: str) -> None:
        """The levels of a provider without a check, not run for one reason."""
        judged = {c.level for c in self.checks if c.provider == provider}
        for level in LEVELS:
            if level not in judged:
                self.checks.append(Check(provider, level, "not_run", reason, []))

    def validation(self) -> Validation:
        """The verdict on the whole."""
        status = sum_up([check.status for check in self.checks])
        reason = next((c.reason for c in self.checks if c.status == status), None)
        return Validation(
            status=status,
            reason=None if status == "passed" else reason,
            judged_by=self.question.judged_by,
            feeds=self.feeds,
            checks=self.checks,
            level_differences=self.differences,
            notes=self.notes,
            placements=self.placements,
        )


def sum_up(statuses: Collection[Status]) -> Status:
    """Failed if any failed, else passed if any passed."""
    if "failed" in statuses:
        return "failed"
    return "passed" if "passed" in statuses else "not_run"


def output_check(
    name: str, samples: Sequence[Sample], outcome: Outcome, random: bool
) -> OutputCheck:
    """One output's line of the report; the numbers are of the data, not of hard cases."""
    seen = [s.difference for s in samples if s.kind == "data"]
    data = [d for d in seen if not d.problem]
    status: Status = "failed" if outcome.reason else "passed"
    reason = outcome.reason
    if random:
        status, reason = "not_run", "the reference gives other values when run again"
    return OutputCheck(
        name=name,
        dtype=samples[0].difference.dtype if samples else "",
        status=status,
        reason=reason,
        bound=_finite(outcome.bound),
        max_abs=_largest(d.max_abs for d in data),
        max_rel=_largest(d.max_rel for d in data if not d.exact),
        p99_abs=_largest(d.p99_abs for d in data if not d.exact),
        cosine=_smallest(d.cosine for d in data if not d.exact),
        sqnr_db=_smallest(d.sqnr_db for d in data if not d.exact),
        top1_agreement=_smallest_known(d.top1 for d in data),
        top5_agreement=_smallest_known(d.top5 for d in data),
        kl=_largest_known(d.kl for d in data),
        shapes=_shapes(seen),
        not_finite=NotFinite(_counts(data, 0), _counts(data, 1)),
    )


def _shapes(data: Iterable[Difference]) -> list[list[int]]:
    different = dict.fromkeys(d.shape for d in data if d.shape is not None)
    return [list(shape) for shape in itertools.islice(different, _MOST_SHAPES)]


def _counts(data: Sequence[Difference], side: int) -> Counts:
    return Counts(sum(d.nans[side] for d in data), sum(d.infs[side] for d in data))


def _smallest_known(values: Iterable[float | None]) -> Metric | None:
    known = [value for value in values if value is not None]
    return _smallest(known) if known else None


def _largest_known(values: Iterable[float | None]) -> Metric | None:
    known = [value for value in values if value is not None]
    return _largest(known) if known else None


def _largest(values: Iterable[float | None]) -> Metric:
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return Metric(max(kept, default=None), float(np.mean(kept)) if kept else None)


def _smallest(values: Iterable[float | None]) -> Metric:
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return Metric(min(kept, default=None), float(np.mean(kept)) if kept else None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
