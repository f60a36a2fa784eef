"""Timing models in turns: the statistics on made-up times, then real workers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

import onnxopt
from onnxopt import latency
from onnxopt.cli import cli
from onnxopt.data import Feeds
from onnxopt.errors import UsageError, WorkerError, WorkerTimeoutError
from onnxopt.latency import Plan, Ratio, Timing, bench, compare, take_turns
from onnxopt.runtime import Times

ROOT = Path(__file__).resolve().parent.parent
FASHION = ROOT / "models" / "fashion_float.onnx"
FEED = {"x": np.zeros(1, np.float32)}
FEEDS = Feeds(lambda: iter([FEED]), "one feed")


class Machine:
    """Stand-in timers: noise in a run and in a start, a drift of the whole machine.

    `settling`: by how much the first block of a start is slower than later ones; it
    fades by half from block to block, whichever model a block is of.
    """

    def __init__(
        self,
        factors: tuple[float, ...],
        seed: int = 0,
        *,
        noise: float = 0.01,
        start_noise: float = 0.005,
        drift: float = 0.0,
        settling: float = 0.0,
    ) -> None:
        self.factors, self.random = factors, np.random.default_rng(seed)
        self.noise, self.start_noise, self.drift = noise, start_noise, drift
        self.slowness, self.settling, self.unsettled = 1.0, settling, 0.0
        self.log: list[tuple[int, int, int, int]] = []
        """(start, model, runs, warm-up) of each request."""
        self.feeds: list[Mapping[str, Any]] = []

    @contextlib.contextmanager
    def start(self, number: int) -> Iterator[list[Timer]]:
        self.unsettled = self.settling
        yield [
            Timer(self, number, index, factor * self.spread(self.start_noise))
            for index, factor in enumerate(self.factors)
        ]

    def spread(self, scale: float) -> float:
        return float(np.exp(self.random.normal(0, scale)))


class Timer:
    """One model of a `Machine`, in one start."""

    def __init__(self, machine: Machine, start: int, model: int, speed: float) -> None:
        self.machine, self.speed = machine, speed
        self.who = (start, model)

    def time(self, feed: Mapping[str, Any], runs: int, warmup: int = 0) -> Times:
        machine = self.machine
        machine.log.append((*self.who, runs, warmup))
        machine.feeds.append(feed)
        machine.slowness *= 1 + machine.drift
        slowness = machine.slowness * (1 + machine.unsettled)
        machine.unsettled /= 2
        base = self.speed * slowness * machine.spread(machine.noise)
        wall = tuple(base * machine.spread(0.002) for _ in range(runs))
        return Times(wall, wall, None)


def measured(machine: Machine, plan: Plan) -> Ratio:
    """The ratio of the second model to the first."""
    first, second = take_turns(machine.start, FEEDS, plan)
    pairs = [
        (float(np.median(one.wall)), float(np.median(two.wall)))
        for one, two in zip(first, second, strict=True)
    ]
    starts = [plan.start_of(number) for number in range(plan.rounds)]
    return compare(pairs, starts if plan.starts > 1 else None)


PLANS = [Plan(20, 10, 3), Plan(6, 6, 3), Plan(12, 6, 3), Plan(20, 1, 3)]
TRIALS = 100


def verdicts(plan: Plan, factor: float, **how: float) -> list[str]:
    machines = (Machine((1e-3, factor * 1e-3), seed, **how) for seed in range(TRIALS))
    return [measured(machine, plan).verdict for machine in machines]


# ---- what the times say ----


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_equal_models_do_not_differ(plan: Plan) -> None:
    noise = 0.0 if plan.starts == 1 else 0.005
    found = verdicts(plan, 1.0, start_noise=noise)
    assert found.count("no difference") >= 0.93 * TRIALS


@pytest.mark.parametrize("plan", PLANS[:3], ids=str)
def test_what_differs_between_starts_is_no_difference_of_models(plan: Plan) -> None:
    """Many blocks in each of a few lucky processes are no evidence."""
    found = verdicts(plan, 1.0, start_noise=0.02, noise=0.001)
    assert found.count("no difference") >= 0.93 * TRIALS


@pytest.mark.parametrize("plan", PLANS[:3], ids=str)
@pytest.mark.parametrize("drift", [0.002, -0.002, 0.02])
def test_a_drift_of_the_machine_is_no_difference(plan: Plan, drift: float) -> None:
    found = verdicts(plan, 1.0, drift=drift)
    assert found.count("no difference") >= 0.93 * TRIALS


@pytest.mark.parametrize("plan", PLANS[:3], ids=str)
def test_whoever_comes_first_in_a_process_does_not_lose_by_it(plan: Plan) -> None:
    found = verdicts(plan, 1.0, settling=0.2, noise=0.003, start_noise=0.003)
    assert found.count("no difference") >= 0.93 * TRIALS


@pytest.mark.parametrize(("factor", "word"), [(0.97, "faster"), (1.03, "slower")])
def test_three_percent_are_seen(factor: float, word: str) -> None:
    found = verdicts(PLANS[0], factor, start_noise=0.003, noise=0.003)
    assert found.count(word) >= 0.95 * TRIALS


def test_three_percent_are_seen_while_the_machine_slows_down() -> None:
    found = verdicts(PLANS[0], 0.97, start_noise=0.003, noise=0.003, drift=0.002)
    assert found.count("faster") >= 0.95 * TRIALS


@pytest.mark.parametrize("count", [6, 10, 15])
def test_the_interval_misses_the_truth_once_in_twenty_at_most(count: int) -> None:
    """Also of few values, where a plain percentile interval misses twice as often."""
    times = np.exp(np.random.default_rng(0).normal(0, 0.01, (1000, count)))
    found = [compare([(1.0, float(value)) for value in row]) for row in times]
    missed = sum(ratio.verdict != "no difference" for ratio in found)
    assert missed <= 55


def test_an_interval_that_holds_1_is_never_a_win() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        size, noise = int(random.integers(6, 20)), random.choice([0.001, 0.01, 0.1])
        second = random.uniform(0.9, 1.1) * np.exp(random.normal(0, noise, size))
        ratio = compare([(1.0, float(value)) for value in second])
        assert ratio.low <= ratio.value <= ratio.high
        expected = "no difference"
        if ratio.high < 1 or ratio.low > 1:
            expected = "faster" if ratio.high < 1 else "slower"
        assert ratio.verdict == expected


def test_a_large_ratio_of_wild_times_is_no_win() -> None:
    wild = [(1.0, value) for value in (0.1, 0.2, 0.3, 0.9, 1.4, 2.0)]
    ratio = compare(wild)
    assert ratio.value < 0.7
    assert ratio.verdict == "no difference"


def test_outliers_do_not_decide() -> None:
    """One block in ten was interrupted, always while the second model ran."""
    second = [10.0 if number % 10 == 0 else 0.9 for number in range(20)]
    jitter = np.exp(np.random.default_rng(0).normal(0, 0.002, 20))
    ratio = compare([(1.0, value * j) for value, j in zip(second, jitter, strict=True)])
    assert ratio.verdict == "faster"
    assert ratio.value == pytest.approx(0.9, rel=0.01)


def test_equal_times_give_an_equal_answer() -> None:
    pairs = [(1.0, 1.0 + 0.01 * number) for number in range(8)]
    assert compare(pairs, seed=3) == compare(pairs, seed=3)


def test_a_clock_that_stands_still_says_nothing() -> None:
    ratio = compare([(0.0, 0.0)] * 6)
    assert (ratio.value, ratio.verdict) == (1.0, "no difference")


# ---- taking turns ----


def test_models_take_turns_and_each_start_mirrors_the_one_before() -> None:
    machine = Machine((1.0, 1.0, 1.0))
    take_turns(machine.start, FEEDS, Plan(12, 6, 5))
    forwards, backwards = [0, 1, 2], [2, 1, 0]
    for start in range(6):
        order = [model for number, model, *_ in machine.log if number == start]
        first, second = (forwards, backwards)[:: -1 if start % 2 else 1]
        # one round by no clock, then two that count
        assert order == first + first + second


def test_one_round_a_start_alternates_too() -> None:
    machine = Machine((1.0, 1.0))
    take_turns(machine.start, FEEDS, Plan(6, 6, 5))
    last = [[m for number, m, *_ in machine.log if number == s][-2:] for s in range(6)]
    assert last == [[0, 1], [1, 0]] * 3


def test_blocks_come_out_by_model_and_round() -> None:
    machine = Machine((1.0, 100.0), noise=0.0, start_noise=0.0)
    first, second = take_turns(machine.start, FEEDS, Plan(7, 6, 5))
    assert len(first) == len(second) == 7
    assert all(len(block.wall) == 5 for block in (*first, *second))
    assert max(max(block.wall) for block in first) < 2
    assert min(min(block.wall) for block in second) > 50


def test_a_block_is_opened_by_a_run_that_does_not_count() -> None:
    machine = Machine((1.0, 1.0))
    take_turns(machine.start, FEEDS, Plan(12, 6, 5))
    assert {(runs, warmup) for *_, runs, warmup in machine.log} == {(5, 1)}


def test_both_sides_of_a_pair_see_one_feed_and_no_feed_is_left_out() -> None:
    machine = Machine((1.0, 1.0))
    feeds = Feeds(lambda: iter([{"x": number} for number in range(4)]), "four")
    take_turns(machine.start, feeds, Plan(12, 6, 5))
    seen = [int(feed["x"]) for feed in machine.feeds]
    expected: list[int] = []
    for start in range(6):
        one, two = 2 * start % 4, (2 * start + 1) % 4
        expected += [one, one, one, one, two, two]
    assert seen == expected


def test_no_feeds_are_an_error() -> None:
    with pytest.raises(UsageError, match="nothing holds no feeds"):
        take_turns(Machine((1.0,)).start, Feeds(lambda: iter([]), "nothing"), PLANS[0])


def test_every_start_has_its_share_of_rounds() -> None:
    for rounds, starts in ((6, 6), (7, 6), (20, 10), (21, 10), (50, 7)):
        plan = Plan(rounds, starts, 1)
        shares = np.bincount([plan.start_of(number) for number in range(rounds)])
        assert len(shares) == starts
        assert shares.max() - shares.min() <= 1


# ---- real workers ----


def matmuls(count: int, size: int = 128, name: str = "x") -> ModelProto:
    """`count` products with one matrix, in a row."""
    names = [name, *(f"y{number}" for number in range(count))]
    nodes = [
        helper.make_node("MatMul", [one, "w"], [two])
        for one, two in itertools.pairwise(names)
    ]
    shape = ["n", size]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(names[-1], onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def endless() -> ModelProto:
    """A loop that takes hours."""
    return onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n,128] x) => (float[n,128] y)
        <int64 trips = {1000000000000}, bool go = {1}> {
            y = Loop(trips, go, x) <body = b (int64 i, bool c, float[n,128] s)
                => (bool d, float[n,128] t) { d = Identity(c) t = Sin(s) }>
        }"""
    )


def test_a_model_against_itself() -> None:
    found = bench([FASHION, FASHION], rounds=6, runs=3)
    assert isinstance(found, onnxopt.Bench)
    assert [timing.model for timing in found.models] == [str(FASHION)] * 2
    assert (found.rounds, found.starts, found.runs, found.threads) == (6, 6, 3, 1)
    assert (found.clock, found.level, found.provider) == ("cpu", "enable_all", "cpu")
    first, second = found.models
    assert first.ratio is None
    assert second.ratio is not None
    for timing in found.models:
        check_timing(timing, 6)


def check_timing(timing: Timing, rounds: int) -> None:
    assert len(timing.blocks) == rounds
    assert timing.wall == np.median([block.wall for block in timing.blocks])
    assert timing.cpu == np.median([block.cpu for block in timing.blocks])
    assert timing.providers == ["CPUExecutionProvider"]
    if timing.peak_bytes is not None:
        assert timing.bare_bytes is not None
        assert timing.peak_bytes > timing.bare_bytes > 1 << 20


def test_an_enormous_difference_has_a_verdict() -> None:
    found = bench([matmuls(100), matmuls(1)], rounds=6, runs=3, batch_size=64)
    ratio = found.models[1].ratio
    assert ratio is not None
    assert ratio.verdict == "faster"
    back = bench([matmuls(1), matmuls(100)], rounds=6, runs=3, batch_size=64)
    ratio = back.models[1].ratio
    assert ratio is not None
    assert ratio.verdict == "slower"


def test_one_model_is_timed_alone() -> None:
    found = onnxopt.bench(matmuls(1), rounds=6, runs=3)
    assert [timing.ratio for timing in found.models] == [None]
    assert found.models[0].model == "model 1"


def test_more_memory_shows() -> None:
    peaks = []
    for size in (64, 3000):
        feeds = [{"x": np.zeros((1, size), np.float32)}]
        (timing,) = bench(matmuls(1, size), feeds, rounds=6, runs=3).models
        if timing.peak_bytes is None or timing.bare_bytes is None:
            pytest.skip("this platform does not say")
        peaks.append(timing.peak_bytes - timing.bare_bytes)
    assert peaks[1] - peaks[0] > 30 << 20


def test_integer_inputs_stay_in_the_range_that_the_model_reads() -> None:
    """An embedding of three rows: an index from the usual range would be refused."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[n,64] ids) => (float[n,64,2] y)
        <float[3,2] table = {1, 2, 3, 4, 5, 6}> { y = Gather(table, ids) }"""
    )
    assert bench(model, rounds=6, runs=3).models[0].wall > 0


def test_sizes_that_a_model_refuses_are_not_used() -> None:
    picky = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n,k] x) => (float[n,1] y) { y = MatMul(x, w) }"""
    )
    weight = numpy_helper.from_array(np.ones((512, 1), np.float32), "w")
    picky.graph.initializer.append(weight)
    assert "k=512" in bench(picky, rounds=6, runs=3).feeds


def test_data_of_the_user(tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", x=np.ones((6, 128), np.float32))
    found = bench(matmuls(1), str(tmp_path / "feeds.npz"), batch_size=3, rounds=6, runs=1)
    assert found.feeds == "feeds.npz"


def test_an_input_that_only_the_first_model_has_is_no_problem() -> None:
    wider = matmuls(1)
    wider.graph.input.append(
        helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, [1])
    )
    assert len(bench([wider, matmuls(1)], rounds=6, runs=1).models) == 2


# ---- pinning ----

LINUX = hasattr(os, "sched_setaffinity")


@pytest.mark.skipif(not LINUX, reason="only Linux has affinity")
@pytest.mark.parametrize("threads", [1, 2])
def test_workers_run_where_pinned_says(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("not enough CPUs")
    seen: list[set[int]] = []
    own = latency.Session.time

    def look(session: latency.Session, *given: Any) -> Times:
        pid = session._worker.pid
        assert pid is not None
        seen.append(os.sched_getaffinity(pid))
        # threads of the session's own pool, which come after the main one
        last = max(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
        if threads > 1:
            seen.append(os.sched_getaffinity(last))
        return own(session, *given)

    monkeypatch.setattr(latency.Session, "time", look)
    found = bench(matmuls(1), rounds=6, runs=1, threads=threads)
    assert len(found.pinned) == threads
    assert seen
    assert all(cpus == set(found.pinned) for cpus in seen)
    assert os.sched_getaffinity(0) >= set(found.pinned)


def test_waiting_threads_are_not_what_is_compared() -> None:
    if len(os.sched_getaffinity(0) if LINUX else range(os.cpu_count() or 1)) < 2:
        pytest.skip("not enough CPUs")
    assert bench(matmuls(1), rounds=6, runs=1, threads=2).clock == "wall"
    assert bench(matmuls(1), rounds=6, runs=1, threads=2, clock="cpu").clock == "cpu"


def test_lists_of_cpus_as_the_kernel_writes_them() -> None:
    assert latency._siblings("0-3,8\n") == [0, 1, 2, 3, 8]
    assert latency._siblings("0,64") == [0, 64]
    with pytest.raises(ValueError, match="invalid literal"):
        latency._siblings("")


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rounds": 5}, "5 rounds are too few"),
        ({"starts": 3}, "3 starts"),
        ({"starts": 21}, "21 starts"),
        ({"runs": 0}, "at least 1 run"),
        ({"threads": 0}, "at least 1 thread"),
        ({"threads": 0, "provider": "cuda"}, "at least 1 thread"),
        ({"threads": 100_000}, "100000 threads, but only"),
        ({"clock": "sun"}, "clock 'sun'"),
        ({"level": "most"}, "level 'most'"),
        ({"provider": "abacus"}, "provider 'abacus'"),
        ({"input_shapes": {"z": (1,)}}, "'z' is no input"),
        ({"data": "missing.npz"}, "no such file"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        bench(matmuls(1), **options)


def test_a_batch_size_for_fixed_shapes() -> None:
    fixed = matmuls(1)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(UsageError, match="fixed"):
        bench(fixed, batch_size=4)


def test_no_models_and_no_model() -> None:
    with pytest.raises(UsageError, match="no model"):
        bench([])
    nothing: Any = 5
    with pytest.raises(UsageError, match="int"):
        bench(nothing)


def test_an_input_that_the_first_model_lacks() -> None:
    with pytest.raises(UsageError, match="model 2: takes an input 'z'"):
        bench([matmuls(1), matmuls(1, name="z")], rounds=6)


@pytest.mark.parametrize("given", [None, [{"x": np.ones((1, 128), np.float32)}]])
def test_a_worker_that_hangs_names_the_model_in_time(given: Any) -> None:
    before = time.monotonic()
    with pytest.raises(WorkerTimeoutError, match=r"model 2: .*no answer within 2 s"):
        bench([matmuls(1), endless()], given, rounds=6, timeout=2)
    assert time.monotonic() - before < 30


def test_a_model_that_does_not_run_is_named() -> None:
    broken = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
        g (float[n,128] x) => (float[n,128] y) { y = acme.Rocket(x) }"""
    )
    with pytest.raises(WorkerError, match="model 2: "):
        bench([matmuls(1), broken], rounds=6)


# ---- the command line ----


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, made = (tmp_path / name for name in ("a.onnx", "b.onnx", "r.json"))
    onnx.save(matmuls(100), one)
    onnx.save(matmuls(1), two)
    how = ("--rounds", 6, "--runs", 3, "--batch-size", 64, "--level", "disable_all")
    assert run("bench", one, two, *how, "--json", made, "-v") == 0
    captured = capsys.readouterr()
    assert "6 blocks of 3 runs each" in captured.out
    assert "faster" in captured.out
    assert "ms of each block" in captured.out
    assert captured.err == ""
    found = json.loads(made.read_text())
    assert (found["schema"], found["level"]) == (1, "disable_all")
    assert found["models"][1]["ratio"]["verdict"] == "faster"
    assert run("bench", one, *how, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["{folder}/missing.onnx"], 2),
        ([], 2),
        (["{model}", "--rounds", "2"], 2),
        (["{model}", "--threads", "100000"], 2),
        (["{model}", "--provider", "rocm"], 4),
        (["{model}", "{folder}/bad.onnx"], 3),
        (["{model}", "--timeout", "0.001"], 5),
    ],
)
def test_failures_of_the_verb(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    onnx.save(matmuls(1), tmp_path / "model.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    names = {"folder": tmp_path, "model": tmp_path / "model.onnx"}
    assert run("bench", *(text.format(**names) for text in arguments)) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("onnxopt: error: ")
    assert len(captured.err.strip().splitlines()) == 1
