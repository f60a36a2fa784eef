"""Where the nodes of both models ran: which provider, copies between devices, time.

Counts come from ONNX Runtime's own record of what it assigned, copies (Memcpy nodes)
and times from a profile of a few runs. Times depend on the machine's mood, so they go
to who asked for them and never into the verdict.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import msgspec
import onnx
from google.protobuf.message import DecodeError

from onnxopt.data.inputs import Feed, Feeds
from onnxopt.errors import ProviderError, SessionError, WorkerError, WorkerMemoryError
from onnxopt.report import Placement
from onnxopt.runtime import Level, Ran, Session, is_cpu, provider_name
from onnxopt.validation import noise
from onnxopt.validation.verdict import LEVELS, Side, Verdict, Workers

log = logging.getLogger("onnxopt.validate")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# Runs whose time is summed, after one that is not.
_TIMED_RUNS = 5
_MEMCPY = {"MemcpyFromHost", "MemcpyToHost"}
# Layers that an int8 kernel would serve, where what they read was just dequantized.
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_INT8_LAYERS = {"ConvInteger", "QLinearConv", "QLinearMatMul", "com.microsoft:QGemm"}
_NO_INT8 = "ONNX Runtime's CUDA provider has no int8 Conv and no QLinear kernels"


class ProviderTime(msgspec.Struct, frozen=True):
    """Time that one execution provider took of a model's runs.

    `provider` is the one asked for, `runs_on` the one that ran; `share` is its part of
    all kernels' time, `seconds` are of one run. Nodes with subgraphs are not counted:
    their time is that of what is inside.
    """

    provider: str
    level: Level
    model: Side
    runs_on: str
    seconds: float
    share: float


TimeObserver: TypeAlias = Callable[[ProviderTime], None]


def of_session(
    session: Session, provider: str, level: Level, model: Side
) -> Placement | None:
    """What ORT assigned to whom; None where it does not say (before 1.24)."""
    if session.assigned is None:
        return None
    return Placement(
        provider=provider,
        level=level,
        model=model,
        nodes={name: sum(ops.values()) for name, ops in session.assigned.items()},
        operators=session.assigned,
        memcpy=0 if is_cpu(provider) else None,
    )


# --- profiles -----------------------------------------------------------------------


@dataclass
class Profiler:
    """Profiles both models on one provider: Memcpy nodes, and times where asked for."""

    verdict: Verdict
    workers: Workers
    provider: str
    observer: TimeObserver | None = None

    def run(self, feeds: Feeds) -> None:
        """Complete the placements of the verdict; what fails here is left unknown."""
        for level in LEVELS:
            for side, worker, path in self.workers.sides(self.verdict.question):
                known = self._known(level, side)
                if self.observer is None and known and known.memcpy is not None:
                    continue
                spec = replace(
                    self.verdict.question.spec(self.provider, level), profile=True
                )
                try:
                    rows = self._profile(side, worker.load(path, spec), feeds)
                except (WorkerError, ProviderError) as error:
                    log.info("no profile of the %s at %s: %s", side, level, error)
                    continue
                self._complete(level, side, known, rows)
                self._tell_times(level, side, rows)

    def _known(self, level: Level, side: Side) -> Placement | None:
        wanted = (self.provider, level, side)
        found = (
            p for p in self.verdict.placements if (p.provider, p.level, p.model) == wanted
        )
        return next(found, None)

    def _profile(self, side: Side, session: Session, feeds: Feeds) -> list[Ran]:
        """What ran, in one run or in those that are timed. Raises as `Session.run`."""
        feed = self._first_that_runs(side, session, feeds)
        for _ in range(_TIMED_RUNS if self.observer else 0):
            session.run(feed)
        rows = session.profile()
        session.close()
        return rows

    def _first_that_runs(self, side: Side, session: Session, feeds: Feeds) -> Feed:
        """The first feed that the model accepts, run once. Raises WorkerError."""
        refusal: WorkerError | None = None
        for feed in feeds:
            try:
                self.verdict.question.refuse_to_swap(side, self.provider, feed)
                session.run(feed)
            except (SessionError, WorkerMemoryError) as error:
                refusal = refusal or error
            else:
                return feed
            if not session.is_alive:
                break
        raise refusal or SessionError("there is no feed")

    def _complete(
        self, level: Level, side: Side, known: Placement | None, rows: list[Ran]
    ) -> None:
        copies = sum(row.nodes for row in rows if row.op_type in _MEMCPY)
        if known is None:
            made = _of_rows(rows, self.provider, level, side)
            self.verdict.placements.append(msgspec.structs.replace(made, memcpy=copies))
            return
        index = self.verdict.placements.index(known)
        self.verdict.placements[index] = msgspec.structs.replace(known, memcpy=copies)

    def _tell_times(self, level: Level, side: Side, rows: list[Ran]) -> None:
        if self.observer is None:
            return
        seconds: defaultdict[str, float] = defaultdict(float)
        for row in rows:
            seconds[row.provider] += row.seconds / _TIMED_RUNS
        total = sum(seconds.values())
        for name, value in sorted(seconds.items()):
            share = value / total if total else 0.0
            self.observer(ProviderTime(self.provider, level, side, name, value, share))


def _of_rows(rows: list[Ran], provider: str, level: Level, side: Side) -> Placement:
    """What ran, where ORT does not say what it assigned: nodes that did not run lack."""
    operators: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.op_type not in _MEMCPY:
            operators.setdefault(row.provider, {})[row.op_type] = row.nodes
    return Placement(
        provider=provider,
        level=level,
        model=side,
        nodes={name: sum(ops.values()) for name, ops in operators.items()},
        operators=operators,
        memcpy=None,
    )


# --- notes --------------------------------------------------------------------------


def fallback_notes(placements: list[Placement]) -> Iterator[str]:
    """What each provider left to others; a provider that ran nothing is told first."""
    for placement in placements:
        asked = provider_name(placement.provider)
        if asked == CPU:
            continue
        where = f"{placement.provider} {placement.level}"
        if not placement.nodes.get(asked):
            yield f"{where}: no node of the {placement.model} runs on {asked}"
        for name, ops in placement.operators.items():
            if name != asked:
                yield f"{where}: of the {placement.model}, {name} runs {_told(ops)}"


def int8_notes(
    provider: str, models: Mapping[Side, Path], placements: list[Placement]
) -> Iterator[str]:
    """What becomes of int8 on CUDA: from the placement, or foretold without one."""
    if provider_name(provider) != CUDA:
        return
    for side, path in models.items():
        dequantized, integer = int8_layers(path)
        if not dequantized and not integer:
            continue
        mine = [p for p in placements if (p.provider, p.model) == (provider, side)]
        told: dict[str, list[str]] = {}
        for placement in mine:
            text = _int8_as_run(placement, dequantized, integer)
            told.setdefault(text, []).append(placement.level)
        for text, levels in told.items():
            yield f"{provider} {' and '.join(levels)}: {text}"
        if not mine:
            yield f"{provider} was not run. {_int8_foretold(side, dequantized, integer)}"


def target_notes(path: Path) -> list[str]:
    """What a model for the target ort-cuda should expect of int8 there."""
    dequantized, integer = int8_layers(path)
    if not dequantized and not integer:
        return []
    return [f"target ort-cuda: {_int8_foretold('candidate', dequantized, integer)}"]


def int8_layers(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Layers by operator: those that read dequantized values, and those of integers."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError):
        return Counter(), Counter()
    nodes = list(noise.all_nodes(model))
    made = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear" and n.output}
    dequantized = Counter(
        node.op_type
        for node in nodes
        if node.op_type in _LAYERS and node.input and node.input[0] in made
    )
    names = (f"{n.domain}:{n.op_type}".removeprefix(":") for n in nodes)
    return dequantized, Counter(n for n in names if n in _INT8_LAYERS)


def _int8_as_run(
    placement: Placement, dequantized: Counter[str], integer: Counter[str]
) -> str:
    """What ran as float, and on what the integer operators ran."""
    on_cuda = placement.operators.get(CUDA, {})
    floats = {op: min(n, on_cuda.get(op, 0)) for op, n in sorted(dequantized.items())}
    told = _told({op: n for op, n in floats.items() if n})
    text = _NO_INT8
    if told:
        text += f"; of the {placement.model}, {told} between Q and DQ ran as float"
    for name, ops in placement.operators.items():
        ran = {op: n for op, n in ops.items() if op in integer}
        if ran:
            text += f"; {name} ran {_told(ran)} of the {placement.model}"
    return text


def _int8_foretold(side: str, dequantized: Counter[str], integer: Counter[str]) -> str:
    parts = []
    if dequantized:
        parts.append(f"{_told(dequantized)} between Q and DQ would run as float")
    if integer:
        parts.append(f"{_told(integer)} would be left to the CPU")
    return f"{_NO_INT8}: of the {side}, {' and '.join(parts)}"


def _told(ops: Mapping[str, int]) -> str:
    return ", ".join(f"{op} {count}" for op, count in sorted(ops.items()))
