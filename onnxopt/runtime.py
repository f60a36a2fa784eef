"""ONNX Runtime sessions in worker processes, one execution provider each.

A model can crash ONNX Runtime, never return, or take all memory, so no session runs
in the caller's process. A `Worker` owns one subprocess (`python -m onnxopt._worker`),
starts it when first needed, and always reaps it: on `close`, when the object is
collected, and when the interpreter exits.

    with Worker(timeout=60) as worker:
        session = worker.load(Path("model.onnx"), SessionSpec(provider="cuda"))
        outputs = session.run({"x": x})

A provider that was asked for is used or named in a ProviderError: ORT's silent
fallback to the CPU is never accepted.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from onnxopt import _frames
from onnxopt._frames import Buffer, EndOfStreamError, Head
from onnxopt._values import Value, from_wire, to_wire
from onnxopt.errors import (
    OnnxoptError,
    ProviderError,
    SessionError,
    UsageError,
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
    WorkerTimeoutError,
)
from onnxopt.quantization.histogram import Histogram

log = logging.getLogger("onnxopt.runtime")

Level = Literal["disable_all", "enable_all"]
INSTALL = "pip install 'onnxopt[cpu]'"
_SHORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}


@dataclass(frozen=True)
class SessionSpec:
    """How to run a model.

    `provider` is a short or full name, with options behind a colon where wanted
    ("cuda:device_id=1"). `threads` 0 leaves the number to ORT. `options` are provider
    options, or session configuration entries where the key begins with "session.".
    `strict` refuses a session that leaves nodes to the CPU; `placement` records which
    provider runs which node (`Session.assigned`), `profile` keeps ORT's profile
    (`Session.profile`). `optimized` is a file that ORT writes the graph to as it will run
    it, with larger weights in a file beside. `pinned` are the CPUs that the worker may
    use from then on, any without them; only Linux has such a setting.
    """

    provider: str = "cpu"
    level: Level = "disable_all"
    threads: int = 1
    options: tuple[tuple[str, str], ...] = ()
    custom_op_libraries: tuple[str, ...] = ()
    strict: bool = False
    placement: bool = False
    profile: bool = False
    optimized: Path | None = None
    pinned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ran:
    """What one provider ran of one operator: nodes, and seconds over all runs."""

    provider: str
    op_type: str
    nodes: int
    seconds: float


@dataclass(frozen=True)
class ValueSpec:
    """An input or output as ORT sees it: kind is "tensor(float)" or the like."""

    name: str
    kind: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Times:
    """What a block of runs took: seconds of each run, and the worker's peak memory.

    `wall` and `cpu` have one entry a run; `cpu` counts all threads. `peak` is the most
    resident memory (bytes) that the worker ever had, None where the platform does not
    say.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    peak: int | None


def provider_name(short: str) -> str:
    """Full name of a provider: "cuda" -> "CUDAExecutionProvider".

    Full names pass through; options behind a colon are dropped. Raises UsageError.
    """
    name = short.partition(":")[0]
    if name.endswith("ExecutionProvider"):
        return name
    try:
        return _SHORT_NAMES[name.lower()]
    except KeyError:
        known = ", ".join(_SHORT_NAMES)
        raise UsageError(
            f"provider {name!r} is unknown: use {known}, or a full name that ends in "
            "ExecutionProvider"
        ) from None


def is_cpu(provider: str) -> bool:
    """Whether a provider is ONNX Runtime's own on the CPU."""
    return provider_name(provider) == "CPUExecutionProvider"


def provider_options(short: str) -> tuple[tuple[str, str], ...]:
    """Options in a provider's text: "cuda:device_id=1,use_tf32=1". Raises UsageError."""
    text = short.partition(":")[2]
    pairs = [item.partition("=") for item in text.split(",") if item]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise UsageError(
                f"provider {short!r}: options are written name:key=value,..."
            )
    return tuple((key.strip(), value.strip()) for key, _, value in pairs)


@functools.cache
def available_providers() -> tuple[str, ...]:
    """Providers that the installed onnxruntime was built with, asked in a worker.

    Raises ProviderError where onnxruntime is not installed.
    """
    with Worker(timeout=120) as worker:
        return tuple(worker.request({"op": "providers"}, [])[0])


class Session:
    """A model loaded in a worker; made by `Worker.load`."""

    def __init__(self, worker: Worker, process: _Process, facts: Head) -> None:
        self._worker, self._process, self._id = worker, process, facts["session"]
        self.inputs = tuple(_value_spec(v) for v in facts["inputs"])
        self.outputs = tuple(_value_spec(v) for v in facts["outputs"])
        self.providers: tuple[str, ...] = tuple(facts["providers"])
        # Peak memory (bytes) of the worker before it loaded the model.
        self.bare: int | None = facts["bare"]
        # Nodes per provider and operator; None where not asked for, or ORT < 1.24.
        self.assigned: dict[str, dict[str, int]] | None = facts["assigned"]

    def run(
        self, feed: Mapping[str, Value], outputs: Sequence[str] | None = None
    ) -> dict[str, Value]:
        """Run once; `outputs` None means all of them.

        Raises SessionError (ORT refused), WorkerCrashedError, WorkerTimeoutError,
        WorkerMemoryError.
        """
        self._check_alive()
        names = [v.name for v in self.outputs] if outputs is None else list(outputs)
        parts: list[Buffer] = []
        head = {
            "op": "run",
            "session": self._id,
            "outputs": names,
            "feed": {k: _frames.pack(to_wire(v), parts) for k, v in feed.items()},
        }
        forms, received = self._worker.request(head, parts)
        values = [from_wire(_frames.unpack(form, received)) for form in forms]
        return dict(zip(names, values, strict=True))

    def profile(self) -> list[Ran]:
        """End the profile of a session made with `profile`: what ran where.

        Raises SessionError where there is none, and as `run` does.
        """
        self._check_alive()
        head = {"op": "profile", "session": self._id}
        rows, _ = self._worker.request(head, [])
        return [Ran(name, op, nodes, micros / 1e6) for name, op, nodes, micros in rows]

    def time(self, feed: Mapping[str, Value], runs: int, warmup: int = 0) -> Times:
        """Run `warmup` times, then `runs` times by the clock; no output travels.

        The worker's time-out holds for each run, not for all together. Raises as `run`.
        """
        self._check_alive()
        parts: list[Buffer] = []
        head = {
            "op": "time",
            "session": self._id,
            "runs": runs,
            "warmup": warmup,
            "feed": {k: _frames.pack(to_wire(v), parts) for k, v in feed.items()},
        }
        found, _ = self._worker.request(head, parts, runs + warmup)
        return Times(
            wall=tuple(wall for wall, _ in found["seconds"]),
            cpu=tuple(cpu for _, cpu in found["seconds"]),
            peak=found["peak"],
        )

    def observe(self, feed: Mapping[str, Value]) -> None:
        """Run once and count the elements of all float outputs; no output travels.

        Raises as `run`.
        """
        self._check_alive()
        parts: list[Buffer] = []
        head = {
            "op": "observe",
            "session": self._id,
            "feed": {k: _frames.pack(to_wire(v), parts) for k, v in feed.items()},
        }
        self._worker.request(head, parts)

    def observed(self) -> dict[str, Histogram]:
        """What `observe` has counted so far, per output. Raises as `run`."""
        self._check_alive()
        rows, parts = self._worker.request({"op": "observed", "session": self._id}, [])
        return {
            name: Histogram.from_parts(head, _frames.unpack(form, parts))
            for name, head, form in rows
        }

    def close(self) -> None:
        """Free the session; the worker stays. Safe to call again, or after a crash."""
        if self.is_alive:
            self._worker.request({"op": "close", "session": self._id}, [])

    @property
    def is_alive(self) -> bool:
        """Whether the process that holds this session still serves."""
        return self._worker.process is self._process and self._process.usable

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise WorkerCrashedError("the worker that held this session is gone")


def _value_spec(fact: list[Any]) -> ValueSpec:
    name, kind, shape = fact
    return ValueSpec(name, kind, tuple(shape))


class Worker:
    """One subprocess for ONNX Runtime sessions; use it as a context manager.

    `timeout` (seconds) holds for each load and each run. `memory_limit` (bytes of
    resident memory, above what the bare worker takes) defaults to 90 % of the
    machine's or container's memory. After a failure the next `load` starts a new
    process; sessions of the old one raise WorkerCrashedError.
    """

    def __init__(
        self, *, timeout: float = 600.0, memory_limit: int | None = None
    ) -> None:
        self.timeout = timeout
        self.memory_limit = memory_limit
        self.process: _Process | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the subprocess, None where none runs."""
        return self.process.popen.pid if self.process else None

    def load(self, model: Path | bytes, spec: SessionSpec | None = None) -> Session:
        """Create a session on exactly the provider that `spec` asks for.

        Raises ProviderError where it is absent or would not be used, SessionError
        where ORT refuses the model, or one of the other WorkerErrors.
        """
        spec = spec or SessionSpec()
        inline = [model] if isinstance(model, bytes) else []
        provider = provider_name(spec.provider)
        head = {
            "op": "load",
            "path": None if inline else os.path.abspath(model),
            "provider": provider,
            "options": [*provider_options(spec.provider), *spec.options],
            "level": spec.level,
            "threads": spec.threads,
            "custom_op_libraries": list(spec.custom_op_libraries),
            "pinned": list(spec.pinned),
            "strict": spec.strict and provider != "CPUExecutionProvider",
            "placement": spec.placement,
            "profile": spec.profile,
            "optimized": os.path.abspath(spec.optimized) if spec.optimized else None,
        }
        facts, _ = self.request(head, list(inline))
        assert self.process is not None
        return Session(self, self.process, facts)

    def request(
        self, head: Head, parts: list[Buffer], runs: int = 1
    ) -> tuple[Any, list[bytearray]]:
        """Send one request and wait for its answer; the parts of both are buffers.

        The time-out is that of one run, `runs` times.
        """
        if self.process is None or not self.process.usable:
            self.close()
            self.process = _Process(self.memory_limit)
        reply, received = self.process.exchange(head, parts, self.timeout * runs)
        if "error" in reply:
            raise _named_error(reply["error"], reply["text"])
        return reply["ok"], received

    def close(self) -> None:
        """Kill and reap the subprocess, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process = None


class _Process:
    """The subprocess with its pipes, and the watch over the request in hand."""

    def __init__(self, memory_limit: int | None) -> None:
        self.limit = memory_limit or int(0.9 * machine_memory())
        self.usable = True
        # A file, not a pipe: nobody has to drain it while a run prints.
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.popen = _start(memory_limit or 0, self.stderr)
        self._reap = weakref.finalize(self, _kill_and_reap, self.popen)
        self._baseline: int | None = None
        self.peak = 0

    def exchange(
        self, head: Head, parts: list[Buffer], timeout: float
    ) -> tuple[Head, list[bytearray]]:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        watch = _Watch(self, time.monotonic() + timeout)
        try:
            with watch:
                _frames.write(self.popen.stdin, head, parts)
                return _frames.read(self.popen.stdout)
        except (EndOfStreamError, BrokenPipeError, ConnectionError):
            raise self._cause_of_death(watch.verdict, timeout) from None
        except BaseException:
            # An interrupt, perhaps: a half-read answer makes the pipes useless.
            self.kill()
            raise

    def kill(self) -> None:
        """Kill, wait, close the pipes. Safe to call again."""
        self.usable = False
        self._reap()
        for stream in (self.popen.stdin, self.popen.stdout, self.stderr):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def over_limit(self) -> bool:
        """Whether the process holds more resident memory than it may."""
        resident = resident_bytes(self.popen.pid)
        if resident is None:
            return False
        if self._baseline is None:
            self._baseline = resident
        self.peak = max(self.peak, resident)
        return resident - self._baseline > self.limit

    def _cause_of_death(self, verdict: str | None, timeout: float) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(5)
        code, printed = self.popen.poll(), self._last_words()
        self.kill()
        if verdict == "timeout":
            return WorkerTimeoutError(
                f"the worker gave no answer within {timeout:g} s and was killed"
            )
        if verdict == "memory" or _died_of_memory(code, printed, self.peak):
            return WorkerMemoryError(
                f"the worker ran out of memory (limit {_gib(self.limit)}, "
                f"last seen using {_gib(self.peak)})"
            )
        return WorkerCrashedError(f"the worker {_exit_words(code)}{_quoted(printed)}")

    def _last_words(self) -> str:
        """The last line that the worker printed, less Python's own traceback."""
        size = self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(0, size - 8192))
        text = self.stderr.read().decode("utf-8", "replace")
        text = re.split(r"Fatal Python error|Current thread", text)[0]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""


class _Watch:
    """Kills the process when a request takes too long or too much memory.

    Blocking reads and writes in the caller's thread then end by themselves, on every
    platform and without a second reader. `verdict` says why it killed.
    """

    interval = 0.02

    def __init__(self, process: _Process, deadline: float) -> None:
        self.process, self.deadline = process, deadline
        self.verdict: str | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(self.interval):
            if time.monotonic() > self.deadline:
                self.verdict = "timeout"
            elif self.process.over_limit():
                self.verdict = "memory"
            if self.verdict:
                self.process.popen.kill()
                return


def _start(memory_limit: int, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a worker that imports from where this process imports."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in _import_path() if path),
        # A message box or a wait for a debugger would look like a hang.
        "PYTHONFAULTHANDLER": "1",
    }
    command = [sys.executable, "-P", "-m", "onnxopt._worker", str(memory_limit)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        # Ctrl-C at a terminal is the caller's to handle; it kills the worker.
        start_new_session=True,
    )


def _import_path() -> Iterator[str]:
    yield str(Path(__file__).resolve().parent.parent)
    yield from sys.path


def _kill_and_reap(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    popen.wait()


def _named_error(kind: str, text: str) -> OnnxoptError:
    match kind:
        case "provider":
            return ProviderError(text)
        case "memory":
            return WorkerMemoryError(f"ONNX Runtime ran out of memory: {_short(text)}")
        case "no_onnxruntime":
            return ProviderError(
                f"onnxruntime is not installed ({_short(text)}): {INSTALL}"
            )
    return SessionError(f"ONNX Runtime refused: {_short(text)}")


def _short(text: str) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text)
    return text if len(text) <= 400 else text[:397] + "..."


def _exit_words(code: int | None) -> str:
    if code is None:
        return "closed its pipe without an answer"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"
    return f"left with exit code {code} and no answer"


def _quoted(printed: str) -> str:
    return f" after it printed: {printed}" if printed else ""


def _died_of_memory(code: int | None, printed: str, peak: int) -> bool:
    """Whether a death is for want of memory: it says so, or the kernel did it."""
    if re.search(r"bad_alloc|MemoryError|out of memory|ENOMEM", printed):
        return True
    return code == -9 and peak > 0.5 * machine_memory()


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process; None where the platform does not say."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


@functools.cache
def machine_memory() -> int:
    """Memory of this machine, or of the container that it is, in bytes."""
    limits = [1 << 46]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(path).read_text()))
    return min(limits)
