"""How long models take, and whether one is faster than another.

    bench = onnxopt.bench(["model.onnx", "smaller.onnx"])
    bench.models[1].ratio.verdict   # "faster", "slower" or "no difference"

Each model has a worker process of its own, and the models take turns: a block of runs of
each, in alternating order, on the same feed. So whatever slows the machine down slows
both sides of a pair, and a ratio is taken within each pair before anything is averaged.

A process is faster or slower for all of its life by how its memory happens to lie: the
same model, started twice, is often 0.5 % apart however long one measures. So the workers
are started anew again and again, in alternating order too; the ratios of a start become
one, their median, and the interval comes from a bootstrap over starts. A difference is
reported where the interval of 95 % lies on one side of 1; anything less is "no
difference". (Ratios drawn without regard to their starts, or pooled from the starts that
were drawn, find a difference between equal models in up to 12 % of trials.)

Times are no facts of a model: they never go into a report.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, Protocol, get_args

import msgspec
import numpy as np
from onnx import ModelProto

from onnxopt import data as feeding
from onnxopt._version import __version__
from onnxopt.data.generate import batched
from onnxopt.errors import SessionError, UsageError
from onnxopt.model import Model, Source
from onnxopt.runtime import (
    Level,
    Session,
    SessionSpec,
    Times,
    Worker,
    is_cpu,
)
from onnxopt.save import stage
from onnxopt.validation.samples import blamed
from onnxopt.weights import Array

Clock = Literal["wall", "cpu"]
Outcome = Literal["faster", "slower", "no difference"]

MIN_STARTS = 6
"""Of fewer no interval of 95 % can be made: five ratios of equal models all fall on one
side of 1 once in sixteen times."""
_ROUNDS_A_START = 2
_DRAWS = 4000
_CONFIDENCE = 0.95
_BLOCK_SECONDS = 0.1
_RUNS = (3, 1000)
"""The least and the most runs in a block."""
_USUAL_SIZE = 224
"""Sizes of symbolic dims near this one are tried first: small ones time the overhead."""


class Ratio(msgspec.Struct, frozen=True):
    """The time of a model over that of the first: the median over starts.

    What a start says is the median over its pairs of blocks. [`low`, `high`] is the
    bootstrap interval of 95 %.
    """

    value: float
    low: float
    high: float
    verdict: Outcome


class Block(msgspec.Struct, frozen=True):
    """The median run of one block, in seconds."""

    wall: float
    cpu: float


class Timing(msgspec.Struct, frozen=True):
    """One model: seconds of a run (the median of the blocks' medians), and memory.

    `cpu` counts all threads. `peak_bytes` is the most resident memory that its worker
    ever had, of which `bare_bytes` before it loaded the model; null where the platform
    does not say. `ratio` is null for the first model.
    """

    model: str
    wall: float
    cpu: float
    ratio: Ratio | None
    peak_bytes: int | None
    bare_bytes: int | None
    providers: list[str]
    blocks: list[Block]


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """What was timed, how, and what came of it.

    `clock` is what ratios compare; `pinned` are the CPUs that the workers ran on, empty
    where they could run on any; a block has `runs` runs, a model `rounds` blocks, in
    `starts` processes one after the other.
    """

    schema: int = 1
    onnxopt: str = __version__
    provider: str
    level: Level
    threads: int
    pinned: list[int]
    clock: Clock
    rounds: int
    starts: int
    runs: int
    feeds: str
    seed: int
    models: list[Timing]


class Timer(Protocol):
    """What can be timed: a session, or a test's stand-in for one."""

    def time(self, feed: Mapping[str, Any], runs: int, warmup: int = 0) -> Times:
        """Seconds of `runs` runs after `warmup` others."""


Start = Callable[[int], AbstractContextManager[Sequence[Timer]]]
"""Fresh timers of the models, one each in their order, for as long as the context lasts.

It is told the number of the start."""


@dataclass(frozen=True)
class Plan:
    """How much is measured: `rounds` blocks of `runs` runs, in `starts` starts."""

    rounds: int
    starts: int
    runs: int

    def start_of(self, number: int) -> int:
        """The start that a round belongs to."""
        return number * self.starts // self.rounds


def bench(
    models: Source | Sequence[Source],
    data: Any = None,
    *,
    provider: str = "cpu",
    level: Level = "enable_all",
    threads: int = 1,
    clock: Clock | None = None,
    rounds: int = 20,
    starts: int | None = None,
    runs: int | None = None,
    base_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    custom_op_libraries: Sequence[str] = (),
    timeout: float = 600.0,
    memory_limit: int | None = None,
) -> Bench:
    """Time one or more models; ratios are to the first.

    `data` as everywhere (see `onnxopt.data`), for the inputs of the first model; made up
    without it, at `batch_size` samples (1) and `input_shapes`. `threads` work inside an
    operator, and on Linux the CPU provider is pinned to as many CPUs. `clock` is "cpu"
    for one thread on the CPU provider and "wall" elsewhere: CPU seconds add up over
    threads, and say nothing of how long one waits. `rounds` blocks a model (at least 6),
    of `runs` runs (as many as the fastest does in about 0.1 s without it), in `starts`
    processes (one for every two rounds; with 1, how processes differ is not in the
    interval). `timeout` (seconds) holds for each load and each run (a block has its runs'
    time-outs together), `memory_limit` (bytes) for each worker.

    Raises UsageError, InvalidModelError, ProviderError, and a WorkerError that names the
    model whose worker failed.
    """
    sources = _listed(models)
    starts = _starts(rounds, starts)
    _check_choices(level, clock, threads, runs)
    on_cpu = is_cpu(provider)
    chosen: Clock = clock or ("cpu" if on_cpu and threads == 1 else "wall")
    spec = SessionSpec(
        provider,
        level,
        threads,
        options=_session_options(chosen),
        custom_op_libraries=tuple(custom_op_libraries),
        pinned=_cpus(threads) if on_cpu else (),
    )
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as name:
        opened = [
            _Opened.of(source, base_dir, Path(name), index)
            for index, source in enumerate(sources)
        ]
        feeds = _feeds(opened[0].proto, data, seed, batch_size, input_shapes)
        fleet = _Fleet(opened, spec, timeout, memory_limit)
        with fleet.started(0) as lanes:
            facts = [(lane.name, lane.session) for lane in lanes]
            feeds, told = _that_run(feeds, lanes, batch_size)
            count = runs or runs_a_block(lanes, next(_endless(feeds)))
        plan = Plan(rounds, starts, count)
        taken = take_turns(fleet.started, feeds, plan)
    return Bench(
        provider=provider,
        level=level,
        threads=threads,
        pinned=list(spec.pinned),
        clock=chosen,
        rounds=rounds,
        starts=starts,
        runs=count,
        feeds=told,
        seed=seed,
        models=[
            _timing(name, session, row, taken[0] if index else None, plan, chosen, seed)
            for index, ((name, session), row) in enumerate(zip(facts, taken, strict=True))
        ],
    )


# ---- taking turns ----


def runs_a_block(timers: Sequence[Timer], feed: feeding.Feed) -> int:
    """How many runs of the fastest model fill a block."""
    times = [timer.time(feed, _RUNS[0], 2).wall for timer in timers]
    fastest = min(float(np.median(wall)) for wall in times)
    least, most = _RUNS
    return min(most, max(least, math.ceil(_BLOCK_SECONDS / max(fastest, 1e-9))))


def take_turns(start: Start, feeds: feeding.Feeds, plan: Plan) -> list[list[Times]]:
    """Blocks by model and round, on one feed a round: A B, B A in one start, B A, A B in
    the next.

    A process is slow at first, and less and less so: whoever opens every start would
    lose by it. So each start is the mirror of the one before, and begins with a block
    by no clock. One more run opens each block, since the other models have had the
    caches.
    """
    rounds: list[list[Times]] = []
    endless = _endless(feeds)
    for number in range(plan.starts):
        with start(number) as timers:
            backwards, warm = number % 2 == 1, False
            while len(rounds) < plan.rounds and plan.start_of(len(rounds)) == number:
                feed = next(endless)
                if not warm:
                    _one_round(timers, feed, plan.runs, backwards)
                rounds.append(_one_round(timers, feed, plan.runs, backwards))
                backwards, warm = not backwards, True
    return [list(row) for row in zip(*rounds, strict=True)]


def _one_round(
    timers: Sequence[Timer], feed: feeding.Feed, runs: int, backwards: bool
) -> list[Times]:
    """A block of each model, in the order of the models."""
    order = range(len(timers))
    blocks = {
        index: timers[index].time(feed, runs, 1)
        for index in (reversed(order) if backwards else order)
    }
    return [blocks[index] for index in order]


def _endless(feeds: feeding.Feeds) -> Iterator[feeding.Feed]:
    """The feeds again and again. Raises UsageError where they have come to an end."""
    while True:
        feed = None
        for feed in feeds:
            yield feed
        if feed is None:
            raise UsageError(f"{feeds.source} holds no feeds")


# ---- what the times say ----


def _timing(
    name: str,
    session: Session,
    taken: Sequence[Times],
    first: Sequence[Times] | None,
    plan: Plan,
    clock: Clock,
    seed: int,
) -> Timing:
    """One model's blocks, and how they compare with the first's."""
    blocks = [_block(times) for times in taken]
    ratio = None
    if first is not None:
        pairs = [
            (getattr(_block(one), clock), getattr(two, clock))
            for one, two in zip(first, blocks, strict=True)
        ]
        starts = [plan.start_of(number) for number in range(len(pairs))]
        ratio = compare(pairs, starts if plan.starts > 1 else None, seed)
    return Timing(
        model=name,
        wall=_median(block.wall for block in blocks),
        cpu=_median(block.cpu for block in blocks),
        ratio=ratio,
        peak_bytes=max((t.peak for t in taken if t.peak is not None), default=None),
        bare_bytes=session.bare,
        providers=list(session.providers),
        blocks=blocks,
    )


def compare(
    pairs: Sequence[tuple[float, float]],
    starts: Sequence[int] | None = None,
    seed: int = 0,
) -> Ratio:
    """The second time of each pair over its first: the median ratio and its interval.

    `starts` numbers the start that each pair belongs to: a start counts as one, with the
    median of its ratios. Without it each pair stands alone. Seeded, so that equal times
    give an equal answer. A difference whose interval holds 1 is none, however large it
    looks.
    """
    # A clock that did not move says nothing: two such blocks are equal.
    tick = 1e-9
    ratios = np.array([(second + tick) / (first + tick) for first, second in pairs])
    if starts is not None:
        groups = np.array(starts)
        ratios = np.array([np.median(ratios[groups == g]) for g in np.unique(groups)])
    low, high = _interval(ratios, seed)
    verdict: Outcome = "no difference"
    if high < 1:
        verdict = "faster"
    elif low > 1:
        verdict = "slower"
    return Ratio(float(np.median(ratios)), low, high, verdict)


def _interval(values: Array, seed: int) -> tuple[float, float]:
    """The bootstrap interval of the median of independent `values`."""
    draws = np.random.default_rng(seed).choice(values, (_DRAWS, len(values)))
    tail = _tail(len(values))
    low, high = np.quantile(np.median(draws, axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _tail(count: int) -> float:
    """What to cut off at each end of the draws of `count` values.

    Less than 2.5 %, since few values spread less than what they are drawn from: the
    expanded percentile interval of https://arxiv.org/abs/1411.5279, with Student's t
    by its expansion in 1 / (count - 1).
    """
    z, free = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2), max(count - 1, 1)
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / free**2
    return NormalDist().cdf(-student * math.sqrt(count / free))


def _block(times: Times) -> Block:
    return Block(_median(times.wall), _median(times.cpu))


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


# ---- models and workers ----


@dataclass(frozen=True)
class _Opened:
    """A model on disk: what it is called, its file, and its structure."""

    name: str
    path: Path
    proto: ModelProto

    @classmethod
    def of(
        cls,
        source: Source,
        base_dir: str | os.PathLike[str] | None,
        folder: Path,
        index: int,
    ) -> _Opened:
        """The source itself, or a copy in `folder` of what is in memory."""
        model = Model.open(source, base_dir)
        is_path = isinstance(source, str | os.PathLike)
        name = os.fspath(source) if is_path else f"model {index + 1}"
        if is_path and base_dir is None:
            path = Path(source)
        else:
            path = folder / f"model_{index}.onnx"
            stage(model, path, hashes=False).commit()
        model.weights.close()
        return cls(name, path, model.proto)


@dataclass(frozen=True)
class _Lane:
    """A model in its worker."""

    name: str
    session: Session

    @classmethod
    def load(cls, model: _Opened, worker: Worker, spec: SessionSpec) -> _Lane:
        """Load it. Raises ProviderError, or a WorkerError that names the model."""
        with blamed(model.name):
            return cls(model.name, worker.load(model.path, spec))

    def time(self, feed: Mapping[str, Any], runs: int, warmup: int = 0) -> Times:
        """As `Session.time`, on what of the feed this model takes.

        Raises UsageError where it takes what the first model does not.
        """
        wanted = [value.name for value in self.session.inputs]
        missing = [name for name in wanted if name not in feed]
        optional = {v.name for v in self.session.inputs if v.kind.startswith("optional")}
        lacking = [name for name in missing if name not in optional]
        if lacking:
            raise UsageError(
                f"{self.name}: takes an input {lacking[0]!r}, which the first model has "
                "not: there is nothing to compare"
            )
        own = {name: feed[name] for name in wanted if name in feed}
        with blamed(self.name):
            return self.session.time(own, runs, warmup)


@dataclass(frozen=True)
class _Fleet:
    """The models, and how they are loaded."""

    models: Sequence[_Opened]
    spec: SessionSpec
    timeout: float
    memory_limit: int | None

    @contextlib.contextmanager
    def started(self, number: int) -> Iterator[list[_Lane]]:
        """Every model in a worker of its own, which ends with the context.

        Every other start loads the last model first: who comes second may find memory
        in another state.
        """
        order = list(range(len(self.models)))
        lanes: dict[int, _Lane] = {}
        with contextlib.ExitStack() as stack:
            for index in reversed(order) if number % 2 else order:
                worker = Worker(timeout=self.timeout, memory_limit=self.memory_limit)
                stack.enter_context(worker)
                lanes[index] = _Lane.load(self.models[index], worker, self.spec)
            yield [lanes[index] for index in order]


def _listed(models: Any) -> list[Source]:
    """The sources; one alone is a list of one. Raises UsageError for none."""
    single = isinstance(models, str | os.PathLike) or not isinstance(models, Iterable)
    sources = [models] if single else list(models)
    if not sources:
        raise UsageError("there is no model to time")
    return sources


def _check_choices(
    level: Level, clock: Clock | None, threads: int, runs: int | None
) -> None:
    """Raise UsageError, before any work, for what cannot be asked for."""
    for name, value, known in (
        ("level", level, get_args(Level)),
        ("clock", clock, (None, *get_args(Clock))),
    ):
        if value not in known:
            told = ", ".join(filter(None, known))
            raise UsageError(f"{name} {value!r} is unknown: use {told}")
    if threads < 1:
        raise UsageError("at least 1 thread is needed")
    if runs is not None and runs < 1:
        raise UsageError("a block needs at least 1 run")


def _starts(rounds: int, starts: int | None) -> int:
    """How many starts there are. Raises UsageError for too few to tell anything."""
    if rounds < MIN_STARTS:
        raise UsageError(
            f"{rounds} rounds are too few for an interval of 95 %: take {MIN_STARTS}"
        )
    if starts is None:
        return max(MIN_STARTS, rounds // _ROUNDS_A_START)
    if starts == 1 or MIN_STARTS <= starts <= rounds:
        return starts
    raise UsageError(
        f"{starts} starts: take 1, or from {MIN_STARTS} to {rounds} (rounds)"
    )


def _session_options(clock: Clock) -> tuple[tuple[str, str], ...]:
    """Threads that wait must not count as work, nor disturb the model whose turn it is.

    By default ORT's threads spin while they wait for the next operator and for a while
    after a run.
    """
    if clock == "cpu":
        return (("session.intra_op.allow_spinning", "0"),)
    return (("session.force_spinning_stop", "1"),)


def _cpus(threads: int) -> tuple[int, ...]:
    """As many CPUs of this process as there are threads; none where none can be chosen.

    Raises UsageError where there are fewer: threads would wait for each other.
    """
    can_choose = hasattr(os, "sched_getaffinity")
    allowed = sorted(os.sched_getaffinity(0)) if can_choose else []
    count = len(allowed) if can_choose else os.cpu_count() or threads
    if threads > count:
        raise UsageError(f"{threads} threads, but only {count} CPUs to run them on")
    return tuple(sorted(sorted(allowed, key=_place_in_core)[:threads]))


def _place_in_core(cpu: int) -> int:
    """0 for the first hardware thread of a core: whole cores are taken first."""
    file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return _siblings(file.read_text()).index(cpu)
    except (OSError, ValueError):
        return 0


def _siblings(text: str) -> list[int]:
    """CPUs as the kernel lists them: "0-3,8" is 0, 1, 2, 3, 8. Raises ValueError."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


# ---- feeds ----


def _feeds(
    first: ModelProto,
    data: Any,
    seed: int,
    batch_size: int | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> feeding.Feeds:
    """The user's feeds, else made-up ones, for the inputs of the first model."""
    inputs = feeding.input_specs(first)
    if data is not None:
        return feeding.load_feeds(data, inputs, batch_size)
    made = feeding.generate_feeds(inputs, model=first, seed=seed, shapes=shapes)
    if batch_size is not None and not batched(made.inputs, {}, batch_size):
        fixed = {spec.shape[0] for spec in made.inputs if spec.shape}
        if fixed != {batch_size}:
            raise UsageError(
                f"batch size {batch_size}: the shapes of the inputs are fixed"
            )
    return made


def _that_run(
    feeds: feeding.Feeds, lanes: Sequence[_Lane], batch_size: int | None
) -> tuple[feeding.Feeds, str]:
    """The feeds, made-up ones at sizes that every model accepts, and words for them.

    One run of each model alone comes first, so that one that hangs is found within one
    time-out. Raises SessionError where no size will do.
    """
    if not isinstance(feeds, feeding.GeneratedFeeds):
        feed = next(_endless(feeds))
        for lane in lanes:
            lane.time(feed, 1)
        return feeds, feeds.source
    refusal: SessionError | None = None
    for binding in sorted(feeding.candidate_bindings(feeds.inputs), key=_oddity):
        sized = batched(feeds.inputs, binding, batch_size or 1)
        try:
            for lane in lanes:
                lane.time(feeds.feed(0, sized), 1)
        except SessionError as error:
            refusal = refusal or error
            continue
        words = ", ".join(f"{symbol}={size}" for symbol, size in sized.items())
        told = f"{feeds.source} ({words})" if words else feeds.source
        return feeds.with_bindings([sized]), told
    raise refusal or SessionError("there is nothing to run")


def _oddity(binding: feeding.Binding) -> float:
    """How far the largest size is from a usual one."""
    return abs(math.log(max(binding.values(), default=1) / _USUAL_SIZE))


__all__ = ["Bench", "Block", "Plan", "Ratio", "Timing", "bench", "compare", "take_turns"]
