"""One check: both models on one provider at one optimization level of ONNX Runtime.

Three passes over the feeds at most: the comparison; where some output is farther off
than rounding explains by itself, the reference against itself; and on a provider other
than the CPU everything is compared with the CPU's reference along the way.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from onnxopt.data import Feeds, GeneratedFeeds
from onnxopt.errors import ProviderError, SessionError, WorkerMemoryError
from onnxopt.report import Check, OutputCheck, Placement, Status
from onnxopt.runtime import Level, Session, SessionSpec, Worker, is_cpu, provider_name
from onnxopt.validation.as_written import right_as_written
from onnxopt.validation.placement import of_session
from onnxopt.validation.rules import Floor, Outcome, Rule, Sample, Spread
from onnxopt.validation.samples import NumberedFeed, blamed, numbered, samples_of
from onnxopt.validation.spread import MovedModels, SpreadMeasure
from onnxopt.validation.ties import TieBreak
from onnxopt.validation.verdict import Side, Verdict, Workers, output_check

# Feeds on which the reference's own noise is measured.
_NOISE_FEEDS = 8
# A GPU is run again and again on so many feeds before anything is compared on it.
_SELF_FEEDS, _SELF_RUNS = 2, 3
# Two runs of one feed that differ by more than this part of the largest value are
# random; less is a GPU that adds in another order.
_REPEATABLE = 1e-3


@dataclass
class Comparison:
    """Samples of every output, and what kept a feed from being compared."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    random: set[str] = field(default_factory=set)
    rejected: list[str] = field(default_factory=list)
    failure: str | None = None
    data: set[int] = field(default_factory=set)

    @property
    def feeds(self) -> int:
        """How many feeds were compared, hard cases aside."""
        return len(self.data)

    def add(
        self,
        name: str,
        at: NumberedFeed,
        expected: object,
        found: object,
        rules: Sequence[Rule],
    ) -> None:
        """Compare one output on one feed."""
        self.samples.setdefault(name, []).extend(samples_of(at, expected, found, rules))


class LevelCheck:
    """The work of one check; `into` adds what it finds to a verdict."""

    def __init__(
        self,
        moved: MovedModels,
        workers: Workers,
        provider: str,
        level: Level,
        feeds: Feeds,
    ) -> None:
        question = moved.question
        self.question, self.moved, self.workers = question, moved, workers
        self.provider, self.level, self.feeds = provider, level, feeds
        self.rules = question.rules(moved.facts, provider, level)
        self.hard = question.exact and isinstance(feeds, GeneratedFeeds)
        self.against_cpu = Comparison()
        self.cpu_spread: dict[str, Spread] = {}
        # How far two runs of one feed on the reference were apart.
        self.repeat: dict[str, list[Sample]] = {}
        self.placements: list[Placement] = []

    @property
    def spec(self) -> SessionSpec:
        """How both models are loaded."""
        return self.question.spec(self.provider, self.level)

    def into(self, verdict: Verdict) -> None:
        """Run it. Raises ProviderError and the WorkerErrors that are nobody's verdict."""
        left, right = self.workers.reference, self.workers.candidate
        try:
            with blamed("reference"):
                reference = left.load(self.question.reference, self.spec)
        except (SessionError, WorkerMemoryError) as error:
            reason = str(error)
            verdict.checks.append(Check(self.provider, self.level, "not_run", reason, []))
            return
        self._place(reference, "reference")
        with contextlib.ExitStack() as stack:
            comparison = self._compare(reference, right, self._cpu_reference(stack))
        spreads = self._spreads(comparison, reference, right)
        reference.close()
        outputs = self._outputs(comparison, spreads)
        outputs = self._without_ties(comparison, outputs, verdict)
        outputs = self._as_written(comparison, outputs, spreads, verdict)
        self._conclude(verdict, comparison, outputs, spreads)

    def _place(self, session: Session, side: Side) -> None:
        found = of_session(session, self.provider, self.level, side)
        self.placements += [found] if found else []

    def _cpu_reference(self, stack: contextlib.ExitStack) -> Session | None:
        if is_cpu(self.provider):
            return None
        worker = stack.enter_context(self.question.worker())
        try:
            return worker.load(
                self.question.reference, self.question.spec("cpu", self.level)
            )
        except (SessionError, WorkerMemoryError):
            return None

    # --- the comparison ---------------------------------------------------------------

    def _compare(
        self, reference: Session, right: Worker, cpu: Session | None
    ) -> Comparison:
        comparison = Comparison()
        if not is_cpu(self.provider):
            self._measure_itself(comparison, reference)
        try:
            with blamed("candidate"):
                candidate = right.load(self.question.candidate, self.spec)
        except SessionError as error:
            comparison.failure = f"cannot be loaded: {error}"
            return comparison
        except ProviderError as error:
            raise ProviderError(f"candidate: {error}") from error
        self._place(candidate, "candidate")
        missing = _missing_output(reference, candidate)
        if missing is not None:
            comparison.failure = f"has no output {missing!r}"
        for at in () if missing else numbered(self.feeds, self.hard):
            if not self._compare_feed(comparison, at, reference, candidate, cpu):
                break
        candidate.close()
        return comparison

    def _measure_itself(self, comparison: Comparison, reference: Session) -> None:
        """How far the provider's own runs are apart, before anything is held to it."""
        for at in itertools.islice(numbered(self.feeds, hard=False), _SELF_FEEDS):
            try:
                with blamed("reference"):
                    first = reference.run(at.feed)
                    more = [reference.run(at.feed) for _ in range(_SELF_RUNS)]
            except SessionError:
                continue  # the comparison says what it rejects
            for again in more:
                for name, value in first.items():
                    self._check_repeat(comparison, name, at, value, again[name])

    def _compare_feed(
        self,
        comparison: Comparison,
        at: NumberedFeed,
        reference: Session,
        candidate: Session,
        cpu: Session | None,
    ) -> bool:
        """Whether to go on."""
        try:
            with blamed("reference"):
                self.question.refuse_to_swap("reference", self.provider, at.feed)
                expected = reference.run(at.feed)
                again = reference.run(at.feed) if comparison.feeds == 0 else None
        except (SessionError, WorkerMemoryError) as error:
            if at.kind == "data":
                comparison.rejected.append(f"feed {at.index}: {error}")
            return reference.is_alive
        try:
            with blamed("candidate"):
                self.question.refuse_to_swap("candidate", self.provider, at.feed)
                found = candidate.run(at.feed, list(expected))
        except SessionError as error:
            comparison.failure = f"fails on feed {at.index} ({at.kind}): {error}"
            return False
        if at.kind == "data":
            comparison.data.add(at.index)
        for name, value in expected.items():
            if again is not None:
                self._check_repeat(comparison, name, at, value, again[name])
            if self._judged(at.kind):
                comparison.add(name, at, value, found[name], self.rules)
        if cpu is not None and at.kind == "data":
            self._compare_with_cpu(at, expected, found, cpu)
        return True

    def _judged(self, kind: str) -> bool:
        """At enable_all, where a NaN goes is up to the kernels that ORT fuses."""
        return kind != "nan" or self.level == "disable_all"

    def _check_repeat(
        self,
        comparison: Comparison,
        name: str,
        at: NumberedFeed,
        one: object,
        two: object,
    ) -> None:
        samples = samples_of(at, one, two)
        self.repeat.setdefault(name, []).extend(samples)
        for sample in samples:
            difference = sample.difference
            varies = difference.problem or (difference.exact and difference.flipped)
            if varies or difference.max_rel > _REPEATABLE:
                comparison.random.add(name)

    def _compare_with_cpu(
        self,
        at: NumberedFeed,
        expected: dict[str, object],
        found: dict[str, object],
        cpu: Session,
    ) -> None:
        try:
            with blamed("reference"):
                truth = cpu.run(at.feed)
        except SessionError:
            return
        self.against_cpu.data.add(at.index)
        for name, value in truth.items():
            self.against_cpu.add(name, at, value, found[name], self.rules)
            for sample in samples_of(at, value, expected[name]):
                self.cpu_spread.setdefault(name, Spread()).add(sample)

    # --- the reference against itself -------------------------------------------------

    def _spreads(
        self, comparison: Comparison, reference: Session, right: Worker
    ) -> dict[str, Spread]:
        """The noise of the outputs that the bound alone does not settle."""
        doubts = self._all_doubts(comparison, {})
        if not doubts or comparison.failure:
            return {}
        measure = SpreadMeasure(
            self.moved, reference, self.spec, right, self.feeds, self.hard
        )
        wanted = self._chosen(comparison, set().union(*doubts.values()))
        spreads = measure.measure(list(doubts), wanted, self.repeat)
        if doubts := self._all_doubts(comparison, spreads):
            measure.measure_more(spreads, list(doubts), set().union(*doubts.values()))
        return spreads

    def _all_doubts(
        self, comparison: Comparison, spreads: dict[str, Spread]
    ) -> dict[str, set[int]]:
        """What is not settled on the provider, and what is not against the CPU."""
        doubts = self._doubts(comparison, spreads)
        cpu = self._doubts(self.against_cpu, self._with_cpu(spreads))
        return {n: doubts.get(n, set()) | cpu.get(n, set()) for n in {**doubts, **cpu}}

    def _with_cpu(self, spreads: dict[str, Spread]) -> dict[str, Spread]:
        """What another provider moves a reference by, besides what rounding does."""
        return {
            name: self.cpu_spread.get(name, Spread()) | spreads.get(name, Spread())
            for name in {**self.cpu_spread, **spreads}
        }

    def _doubts(
        self, comparison: Comparison, spreads: dict[str, Spread]
    ) -> dict[str, set[int]]:
        """Outputs and feeds where they are beyond the noise known so far."""
        doubts = {
            name: {
                feed
                for rule in self.rules
                for feed in rule.doubtful(samples, spreads.get(name))
            }
            for name, samples in comparison.samples.items()
        }
        return {name: feeds for name, feeds in doubts.items() if feeds}

    def _chosen(self, comparison: Comparison, doubtful: set[int]) -> set[int]:
        """Some ordinary feeds, always the first, and all hard ones."""
        ordinary = sorted(feed for feed in doubtful if feed in comparison.data)
        return {0, *ordinary[:_NOISE_FEEDS], *(doubtful - comparison.data)}

    # --- the verdict ------------------------------------------------------------------

    def _conclude(
        self,
        verdict: Verdict,
        comparison: Comparison,
        outputs: list[OutputCheck],
        spreads: dict[str, Spread],
    ) -> None:
        if comparison.rejected:
            verdict.note(
                f"the reference rejected {len(comparison.rejected)} feeds, which count "
                f"for nothing: {comparison.rejected[0]}"
            )
        verdict.placements += self.placements
        if not is_cpu(self.provider):
            verdict.note(f"{self.provider} {self.level}: {self._told_of_itself()}")
        verdict.feeds = max(verdict.feeds, comparison.feeds)
        for name, samples in comparison.samples.items():
            if told := _vacuous(samples):
                verdict.note(f"output {name!r} {told}")
        status, reason = self._status(comparison, outputs)
        verdict.checks.append(Check(self.provider, self.level, status, reason, outputs))
        if self.against_cpu.feeds:
            outputs = self._outputs(self.against_cpu, self._with_cpu(spreads))
            status, reason = self._status(self.against_cpu, outputs)
            name = f"{self.provider} against cpu"
            verdict.checks.append(Check(name, self.level, status, reason, outputs))

    def _idle(self) -> str | None:
        """Why agreement says nothing about the provider: it runs no node of a model."""
        asked = provider_name(self.provider)
        for place in () if is_cpu(self.provider) else self.placements:
            if place.nodes and not place.nodes.get(asked):
                return f"no node of the {place.model} runs on {asked}"
        return None

    def _told_of_itself(self) -> str:
        """Whether the provider repeats itself; how far off it is, is in the floor."""
        moving = [
            name
            for name, samples in self.repeat.items()
            if any(s.difference.max_abs or s.difference.flipped for s in samples)
        ]
        if not moving:
            return "the reference repeats itself to the last bit"
        return f"runs of the reference differ from each other in {', '.join(moving)}"

    def _without_ties(
        self, comparison: Comparison, outputs: list[OutputCheck], verdict: Verdict
    ) -> list[OutputCheck]:
        """Outputs that failed by indices alone pass where these select equal values."""
        rule = self.rules[0]
        failed: dict[str, set[int]] = {}
        for output in outputs:
            samples = comparison.samples[output.name]
            if output.status == "failed" and all(s.difference.exact for s in samples):
                failed[output.name] = {s.feed for s in samples if s.difference.flipped}
        if not failed or comparison.failure or not isinstance(rule, Floor):
            return outputs
        ties = TieBreak(self.question, self.spec, rule, self.feeds, self.hard)
        forgiven = ties.forgiven(failed, set().union(*failed.values()))
        for name in sorted(forgiven):
            verdict.note(f"indices in output {name!r} differ in ties only")
        return [
            msgspec.structs.replace(output, status="passed", reason=None)
            if output.name in forgiven
            else output
            for output in outputs
        ]

    def _as_written(
        self,
        comparison: Comparison,
        outputs: list[OutputCheck],
        spreads: dict[str, Spread],
        verdict: Verdict,
    ) -> list[OutputCheck]:
        """Outputs that failed pass where they are those of the reference unoptimized."""
        failed = [output.name for output in outputs if output.status == "failed"]
        plain = self.level == "disable_all" or not is_cpu(self.provider)
        if not failed or comparison.failure or plain or not self.question.exact:
            return outputs
        right = right_as_written(
            self.question, self.spec, self.feeds, self.rules, spreads, failed
        )
        for name in sorted(right):
            verdict.note(
                f"at {self.level} ONNX Runtime changes what the reference computes in "
                f"output {name!r}; the candidate computes what is written"
            )
        return [
            msgspec.structs.replace(output, status="passed", reason=None)
            if output.name in right
            else output
            for output in outputs
        ]

    def _outputs(
        self, comparison: Comparison, spreads: dict[str, Spread]
    ) -> list[OutputCheck]:
        return [
            output_check(
                name,
                samples,
                self._outcome(samples, spreads.get(name)),
                name in comparison.random,
            )
            for name, samples in comparison.samples.items()
        ]

    def _outcome(self, samples: Sequence[Sample], spread: Spread | None) -> Outcome:
        """The first rule that is broken, else the first rule's bound."""
        outcomes = [rule.judge(samples, spread) for rule in self.rules]
        return next((o for o in outcomes if o.reason), outcomes[0])

    def _status(
        self, comparison: Comparison, outputs: Sequence[OutputCheck]
    ) -> tuple[Status, str | None]:
        if comparison.failure:
            lossy_load = self.question.lossy and comparison.failure.startswith(
                "cannot be"
            )
            return ("not_run" if lossy_load else "failed"), (
                f"the candidate {comparison.failure}"
            )
        for output in outputs:
            if output.status == "failed":
                return "failed", f"output {output.name!r} {output.reason}"
        for output in outputs:
            if output.status == "not_run":
                return "not_run", f"output {output.name!r}: {output.reason}"
        if not comparison.feeds:
            return "not_run", f"no feed was accepted: {_first(comparison.rejected)}"
        idle = self._idle()
        return ("not_run", idle) if idle else ("passed", None)


def _missing_output(reference: Session, candidate: Session) -> str | None:
    present = {value.name for value in candidate.outputs}
    return next((v.name for v in reference.outputs if v.name not in present), None)


def _first(texts: Sequence[str]) -> str:
    return texts[0] if texts else "there was none"


def _vacuous(samples: Sequence[Sample]) -> str | None:
    """Why equal values of an output would prove little."""
    data = [s.difference for s in samples if s.kind == "data" and not s.difference.exact]
    data = [d for d in data if d.count and not d.problem]
    broken = sum(d.not_finite > 0 for d in data)
    if broken:
        return f"holds NaN or Inf in the reference on {broken} feeds"
    first = data[0] if len(data) > 1 else None
    same = first is not None and all(
        d.signal * first.count == first.signal * d.count and d.scale == first.scale
        for d in data
    )
    return "has the same values on all feeds: its check proves little" if same else None
