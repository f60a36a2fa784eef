"""The verdict: does the candidate compute what the reference computes?

Both models run in ONNX Runtime on the same feeds, at equal optimization levels, on each
requested provider. Nothing of a feed is kept once it was compared. `docs/validation.md`
says what the numbers mean and where they come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxopt.data import (
    Binding,
    Feed,
    Feeds,
    GeneratedFeeds,
    candidate_bindings,
    load_function,
)
from onnxopt.data.generate import (
    BLAND_ATTEMPT,
    batched,
    ragged,
    realistic,
    without_samples,
)
from onnxopt.data.load import script_error
from onnxopt.errors import (
    AbsentProviderError,
    InvalidModelError,
    OnnxoptError,
    ProviderError,
    SessionError,
    UsageError,
    WorkerError,
    WorkerMemoryError,
)
from onnxopt.report import Check, LevelDifference, Validation
from onnxopt.runtime import (
    Level,
    Session,
    Worker,
    available_providers,
    provider_name,
)
from onnxopt.validation import noise, placement
from onnxopt.validation.check import LevelCheck
from onnxopt.validation.inside import judge_inside
from onnxopt.validation.metrics import compare
from onnxopt.validation.ordering import judge_ordering
from onnxopt.validation.placement import TimeObserver
from onnxopt.validation.samples import blamed
from onnxopt.validation.saturation import add_saturation_note, needs_exact_kernels
from onnxopt.validation.smooth import judge_unrounded
from onnxopt.validation.spread import MovedModels
from onnxopt.validation.verdict import (
    LEVELS,
    Budget,
    Question,
    Side,
    Verdict,
    Workers,
)

log = logging.getLogger("onnxopt.validate")

__all__ = ["Budget", "judge"]

# Plain sizes of the symbolic dims that generated feeds are spread over, once found to
# run; ragged and realistic ones come on top.
_BINDINGS_WANTED = 4
# Once some size runs, larger ones are not tried: they could take all memory.
_MODEST_SIZE = 512
# Sizes up to this are large enough to have something left over by common strides.
_MODERATE_SIZE = 128
# Multiply-accumulates of one run up to which sizes as they occur in use are tried.
_REALISTIC_MACS = 10**10
# How often a feed that the reference refuses is made anew.
_ATTEMPTS = 4
# Feeds on which the difference between levels is measured.
_LEVEL_FEEDS = 4


class UnsettledError(Exception):
    """The reference runs on no feed; the text is the reason."""


def judge(
    reference: Path,
    candidate: Path,
    *,
    providers: Sequence[str] = ("cpu",),
    feeds: Feeds,
    budget: Budget | None = None,
    lossy: bool = False,
    bitwise: bool = False,
    threads: int = 1,
    timeout: float = 600.0,
    memory_limit: int | None = None,
    required: Collection[str] = (),
    custom_op_libraries: Sequence[str] = (),
    seed: int = 0,
    time_observer: TimeObserver | None = None,
) -> Validation:
    """Judge `candidate` against `reference`, both files on disk.

    A reference that ONNX Runtime cannot run gives status `not_run` with the reason, as
    does a random model; a candidate that cannot run where the reference could has
    failed (if `lossy` and it cannot even be loaded: was not run). A provider in
    `required` must run every node. `time_observer` is told where the time goes.

    Raises AbsentProviderError (no provider present, or a `required` one is not),
    UsageError (the budget, the user's metric), InvalidModelError (not an ONNX file), and
    WorkerCrashedError, WorkerTimeoutError or WorkerMemoryError that say which model it
    was.
    """
    question = Question(
        reference=Path(reference),
        candidate=Path(candidate),
        budget=_checked(budget),
        lossy=lossy,
        bitwise=bitwise,
        threads=threads,
        timeout=timeout,
        memory_limit=memory_limit,
        custom_op_libraries=tuple(custom_op_libraries),
        seed=seed,
        required=frozenset(map(provider_name, required)),
    )
    question = dataclasses.replace(question, precise=needs_exact_kernels(question))
    verdict = Verdict(question)
    present = _present(verdict, _wanted(providers, required))
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
        moved = MovedModels(question, _facts(question.reference), Path(folder))
        for provider in present:
            _judge_provider(verdict, provider, feeds, moved, time_observer)
            _add_placement_notes(verdict, provider)
    if all(
        c.status == "not_run" and c.provider in verdict.absent for c in verdict.checks
    ):
        raise AbsentProviderError(verdict.checks[0].reason or "", verdict.validation())
    return verdict.validation()


def _wanted(providers: Sequence[str], required: Collection[str]) -> list[str]:
    """Each provider once; one that is required may be asked for with options as well."""
    wanted = dict.fromkeys(providers)
    named = {provider_name(provider) for provider in wanted}
    return [
        *wanted,
        *(p for p in dict.fromkeys(required) if provider_name(p) not in named),
    ]


def _checked(budget: Budget | None) -> Budget:
    budget = budget or Budget()
    if budget.max_drop is not None and budget.metric is None:
        raise UsageError("--max-drop needs --metric script.py:function")
    if budget.metric is not None:
        load_function(budget.metric)
    return budget


def _facts(path: Path) -> noise.Facts:
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        text = " ".join(str(error).split())
        raise InvalidModelError(f"{path}: not an ONNX model ({text})") from error
    return noise.facts(model, path)


def _present(verdict: Verdict, providers: list[str]) -> list[str]:
    """Providers that this onnxruntime lists; the others are noted as not run."""
    known = available_providers()
    absent = [p for p in providers if provider_name(p) not in known]
    for provider in absent:
        _not_used(
            verdict,
            provider,
            f"{provider_name(provider)} asked for but not used: this onnxruntime offers "
            f"{', '.join(known)}",
        )
    return [provider for provider in providers if provider not in absent]


def _not_used(verdict: Verdict, provider: str, reason: str) -> None:
    verdict.not_run(provider, reason)
    verdict.absent.add(provider)
    _add_placement_notes(verdict, provider)
    if verdict.question.is_required(provider):
        raise AbsentProviderError(reason, verdict.validation())


def _judge_provider(
    verdict: Verdict,
    provider: str,
    feeds: Feeds,
    moved: MovedModels,
    time_observer: TimeObserver | None,
) -> None:
    question = verdict.question
    with question.worker() as left, question.worker() as right:
        workers = Workers(left, right)
        try:
            settled = settle(verdict, left, provider, feeds)
            _judge_settled(verdict, workers, provider, settled, moved)
        except ProviderError as error:
            # Listed by onnxruntime, yet its sessions run elsewhere: no usable GPU.
            _not_used(verdict, provider, str(error))
            return
        except UnsettledError as error:
            verdict.not_run(provider, str(error))
            return
        placement.Profiler(verdict, workers, provider, time_observer).run(settled)


def _judge_settled(
    verdict: Verdict, workers: Workers, provider: str, feeds: Feeds, moved: MovedModels
) -> None:
    """All checks of one provider, on feeds that the reference accepts."""
    for level in LEVELS:
        LevelCheck(moved, workers, provider, level, feeds).into(verdict)
    judge_unrounded(verdict, workers, provider, feeds, moved)
    judge_inside(verdict, workers, provider, feeds, moved)
    judge_ordering(verdict, workers, provider, feeds, moved.facts)
    _add_level_differences(verdict, workers, provider, feeds)
    add_saturation_note(verdict, workers.candidate, provider, feeds)
    metric = verdict.question.budget.metric
    if metric is not None:
        _judge_metric(verdict, workers, provider, metric)


def _add_placement_notes(verdict: Verdict, provider: str) -> None:
    """What ran elsewhere, and what becomes of int8 there."""
    mine = [p for p in verdict.placements if p.provider == provider]
    question = verdict.question
    models: dict[Side, Path] = {
        "reference": question.reference,
        "candidate": question.candidate,
    }
    for text in (
        *placement.fallback_notes(mine),
        *placement.int8_notes(provider, models, mine),
    ):
        verdict.note(text)


# --- feeds that run -----------------------------------------------------------------


def settle(verdict: Verdict, worker: Worker, provider: str, feeds: Feeds) -> Feeds:
    """Feeds that the reference accepts: sizes of symbolic dims are found by trying.

    Raises UnsettledError where the reference cannot be loaded at either level or rejects
    all that was tried, ProviderError where its session would run elsewhere.
    """
    try:
        with blamed("reference"):
            session = _load_at_any_level(verdict.question, worker, provider)
            if not isinstance(feeds, GeneratedFeeds):
                session.close()
                return feeds
            reference = _Reference(verdict.question, provider, session)
            bindings = _bindings_that_run(reference, feeds)
            feeds = _values_that_run(reference, feeds.with_bindings(bindings))
            session.close()
    except (SessionError, WorkerMemoryError) as error:
        raise UnsettledError(str(error)) from error
    if bindings[0]:
        sizes = "; ".join(_binding_text(binding) for binding in bindings)
        verdict.note(f"sizes of symbolic dims in the generated feeds: {sizes}")
    return feeds


def _load_at_any_level(question: Question, worker: Worker, provider: str) -> Session:
    """Some models need what ORT's optimizations put in the place of a missing kernel."""
    try:
        return worker.load(question.reference, question.spec(provider, LEVELS[0]))
    except SessionError as error:
        try:
            return worker.load(question.reference, question.spec(provider, LEVELS[1]))
        except SessionError:
            raise error from None


def _binding_text(binding: Binding) -> str:
    return ", ".join(f"{s.removesuffix('[]')}={size}" for s, size in binding.items())


@dataclass
class _Reference:
    """The reference's session, and what says whether it may run on a feed."""

    question: Question
    provider: str
    session: Session

    def refusal(self, feed: Feed) -> SessionError | None:
        """Why ONNX Runtime rejects the feed. Raises WorkerMemoryError before it swaps."""
        self.question.refuse_to_swap("reference", self.provider, feed)
        try:
            self.session.run(feed)
        except SessionError as error:
            return error
        return None

    def runs(self, feed: Feed) -> bool:
        """Whether ONNX Runtime accepts the feed."""
        return self.refusal(feed) is None

    def is_modest(self, feed: Feed) -> bool:
        """Whether a run on the feed costs little enough to be made many times."""
        return self.question.macs("reference", feed) <= _REALISTIC_MACS


def _bindings_that_run(reference: _Reference, feeds: GeneratedFeeds) -> list[Binding]:
    """Bindings for as many feeds at most, every setting that runs among them in turn.

    Raises SessionError where none runs, WorkerError where none was found before one.
    """
    settings = feeds.settings()
    share = max(1, feeds.count // len(settings))
    found: list[list[Binding]] = []
    refusal: WorkerError | None = None
    for setting in settings:
        trial = _Trial(reference, feeds, setting)
        try:
            trial.run(in_use=not found)
            found.append(trial.best(share))
        except WorkerError as error:
            refusal = refusal or error
            if not isinstance(error, SessionError):
                break
    if not found:
        raise refusal or SessionError("there is nothing to try")
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*found))
    return [binding for binding in in_turn if binding is not None][: feeds.count]


@dataclass
class _Trial:
    """Bindings under one setting, as they are tried; those that ran, in order.

    `plain` ones are small and even; `special` ones ragged, and as large as in use.
    """

    reference: _Reference
    feeds: GeneratedFeeds
    setting: Binding
    plain: list[Binding] = field(default_factory=list)
    special: list[Binding] = field(default_factory=list)
    refusal: SessionError | None = None

    def run(self, in_use: bool) -> None:
        """Try sizes, those as they are `in_use` where wanted. Raises where none runs."""
        try:
            self._try_plain()
            if self.plain:
                self._try_special(in_use)
        except WorkerError as error:
            # Some size took all memory or time: those before it will do.
            if not self.plain:
                raise
            log.info("no larger feeds were tried: %s", error)
        if not self.plain:
            raise self.refusal or SessionError("there is nothing to try")

    def best(self, count: int) -> list[Binding]:
        """So many, with something of either sort."""
        plain = self.plain[: max(1, count - len(self.special))]
        return [*plain, *self.special][:count]

    def _try_plain(self) -> None:
        for binding in candidate_bindings(self.feeds.inputs):
            large = max(binding.values(), default=0) > _MODEST_SIZE
            if len(self.plain) == _BINDINGS_WANTED or (self.plain and large):
                break
            if not self._has_sizes_of(binding):
                self._add(self.plain, binding | self.setting)
        if self.plain and not any(self._single(each) == each for each in self.plain):
            self._add(self.plain, self._single(self.plain[0]))
        if self.plain:
            more = _more_samples(self.reference, self.feeds, self.plain)
            self.plain = [*more, *self.plain][:_BINDINGS_WANTED]

    def _try_special(self, in_use: bool) -> None:
        inputs, setting = self.feeds.inputs, self.setting
        for binding in ragged(inputs, min(self.plain, key=self._from_moderate)):
            self._add(self.special, binding)
        for binding in realistic(inputs) if in_use else ():
            feed = self.feeds.feed(0, binding | setting)
            if self.reference.is_modest(feed) and self._add(
                self.special, binding | setting
            ):
                break

    def _add(self, found: list[Binding], binding: Binding) -> bool:
        """Keep a binding that the reference accepts, with other values if need be."""
        if binding in self.plain or binding in self.special:
            return True
        for attempt in (0, BLAND_ATTEMPT) if self.feeds.may_be_refused else (0,):
            feeds = self.feeds.with_attempts({0: attempt})
            refusal = self.reference.refusal(feeds.feed(0, binding))
            if refusal is None:
                found.append(binding)
                return True
            self.refusal = self.refusal or refusal
        return False

    def _single(self, binding: Binding) -> Binding:
        return batched(self.feeds.inputs, binding, 1)

    def _has_sizes_of(self, binding: Binding) -> bool:
        """Whether only the number of samples would be new; it may be all there is."""
        inputs = self.feeds.inputs
        new = without_samples(inputs, binding)
        return bool(new) and any(
            without_samples(inputs, found) == new | self.setting for found in self.plain
        )

    def _from_moderate(self, binding: Binding) -> tuple[bool, int]:
        """Orders bindings: the largest of moderate size first, then the least large."""
        sizes = (size for symbol, size in binding.items() if symbol not in self.setting)
        size = max(sizes, default=0)
        return size > _MODERATE_SIZE, abs(size - _MODERATE_SIZE)


def _more_samples(
    reference: _Reference, feeds: GeneratedFeeds, found: list[Binding]
) -> list[Binding]:
    """The same sizes with two or three samples, where every one found has one."""
    larger = [batched(feeds.inputs, found[0], size) for size in (2, 3)]
    if any(binding in found for binding in larger):
        return []
    running = (b for b in larger if reference.runs(feeds.feed(0, b)))
    return [binding for binding in [next(running, None)] if binding]


def _values_that_run(reference: _Reference, feeds: GeneratedFeeds) -> GeneratedFeeds:
    """The feeds, made anew where the reference refuses the values of one.

    One that it refuses each time stays, and is reported by the checks.
    """
    if not feeds.may_be_refused:
        return feeds
    attempts: dict[int, int] = {}
    try:
        for index in range(feeds.count):
            tries = (
                attempt
                for attempt in range(_ATTEMPTS)
                if reference.runs(feeds.with_attempts({index: attempt}).feed(index))
            )
            attempts[index] = next(tries, 0)
    except WorkerError as error:
        log.info("no more feeds were made anew: %s", error)
    return feeds.with_attempts({i: attempt for i, attempt in attempts.items() if attempt})


# --- beside the checks --------------------------------------------------------------


def _add_level_differences(
    verdict: Verdict, workers: Workers, provider: str, feeds: Feeds
) -> None:
    """How far ORT's optimizations move either model; nothing where it cannot run."""
    for side, worker, path in workers.sides(verdict.question):
        worst: dict[str, tuple[float, float | None]] = {}
        try:
            # One session after the other: two would hold the weights twice.
            plain, optimized = (
                _level_outputs(
                    verdict.question, side, worker, path, provider, level, feeds
                )
                for level in LEVELS
            )
            for index in plain.keys() & optimized.keys():
                _add_level_difference(worst, plain[index], optimized[index])
        except (WorkerError, ProviderError) as error:
            log.info("levels of the %s were not compared: %s", side, error)
        verdict.differences += [
            LevelDifference(provider, side, name, sqnr, far)
            for name, (far, sqnr) in worst.items()
        ]


def _level_outputs(
    question: Question,
    side: Side,
    worker: Worker,
    path: Path,
    provider: str,
    level: Level,
    feeds: Feeds,
) -> dict[int, dict[str, object]]:
    """The outputs on the first feeds, less those that are too large to run."""
    found = {}
    session = worker.load(path, question.spec(provider, level))
    for index, feed in enumerate(itertools.islice(feeds, _LEVEL_FEEDS)):
        with contextlib.suppress(WorkerMemoryError):
            question.refuse_to_swap(side, provider, feed)
            found[index] = session.run(feed)
    session.close()
    return found


def _add_level_difference(
    worst: dict[str, tuple[float, float | None]],
    plain: dict[str, object],
    optimized: dict[str, object],
) -> None:
    for name, value in plain.items():
        for difference in compare(value, optimized[name]):
            far, sqnr = worst.get(name, (0.0, None))
            ratios = [r for r in (sqnr, difference.sqnr_db) if r is not None]
            worst[name] = (max(far, difference.max_abs), min(ratios, default=None))


def _judge_metric(verdict: Verdict, workers: Workers, provider: str, text: str) -> None:
    """The user's own measure, at the level that deployment runs."""
    question = verdict.question
    values = {}
    for side, worker, path in workers.sides(question):
        with blamed(side):
            session = worker.load(path, question.spec(provider, "enable_all"))
            values[side] = _call_metric(text, session)
            session.close()
    drop = values["reference"] - values["candidate"]
    allowed = question.budget.max_drop or 0.0
    told = (
        f"{text}: reference {values['reference']:.6g}, candidate "
        f"{values['candidate']:.6g} (may drop by {allowed:g})"
    )
    verdict.note(f"{provider}: {told}")
    # NaN compares false, so a metric that is NaN fails too.
    if not drop <= allowed:
        verdict.checks.append(Check(provider, "enable_all", "failed", told, []))


def _call_metric(text: str, session: Session) -> float:
    try:
        return float(load_function(text)(session.run))
    except OnnxoptError:
        raise
    except Exception as error:
        raise script_error(text, error) from error
