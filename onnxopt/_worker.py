"""The other end of `onnxopt.runtime`: `python -m onnxopt._worker`, one per Worker.

Requests come on stdin and answers go to what stdout was at the start; stdout itself
is pointed at stderr first, so that a library that prints cannot garble an answer.
Imports are numpy and onnxruntime, nothing else: it starts in a fifth of a second.
Custom operator libraries are loaded here and nowhere else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from onnxopt import _frames, _placement
from onnxopt._frames import Buffer, EndOfStreamError, Head, Raw
from onnxopt.quantization.histogram import Histogram

Request = tuple[Head, list[bytearray]]

# What ORT, the C++ runtime and CUDA say when memory is short.
_OUT_OF_MEMORY = re.compile(
    r"bad_?alloc|bad allocation|[Ff]ailed to allocate memory|out of memory|"
    r"OUT_OF_MEMORY|CUDA failure 2:|cannot allocate memory|"
    r"Available memory of \d+ is smaller than requested",
    re.IGNORECASE,
)
# Element types that ORT knows and numpy does not, by their number in TensorProto.
_EXOTIC = {
    "bfloat16": 16,
    "float8e4m3fn": 17,
    "float8e4m3fnuz": 18,
    "float8e5m2": 19,
    "float8e5m2fnuz": 20,
    "uint4": 21,
    "int4": 22,
    "float4e2m1": 23,
    "float8e8m0": 24,
    "uint2": 25,
    "int2": 26,
}
_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_OPTIMIZED_WEIGHTS = "session.optimized_model_external_initializers_file_name"
_OPTIMIZED_LEAST = "session.optimized_model_external_initializers_min_size_in_bytes"
# What ORT says where session.disable_cpu_ep_fallback forbids what it would do.
_FELL_BACK = "assigned to the default CPU EP"
_COMPARABLE_CUDA = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}


class RefusedError(Exception):
    """An answer that is an error: its kind, then one line of text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Loaded:
    """One ORT session and what a run needs to know of it."""

    def __init__(self, session: Any, profile: _placement.Profile | None = None) -> None:
        self.session, self.profile = session, profile
        self.seen: dict[str, Histogram] = {}
        kinds = {out.name: out.type for out in session.get_outputs()}
        self.outputs = list(kinds)
        self.exotic = {name for name, kind in kinds.items() if _exotic_type(kind)}

    def run(self, feed: dict[str, Any], wanted: list[str]) -> list[Any]:
        """Values of the outputs `wanted`; those that numpy lacks come as Raw."""
        feed = {name: _as_input(value) for name, value in feed.items()}
        if not self.exotic.intersection(wanted):
            return list(self.session.run(wanted, feed))
        plain = [name for name in wanted if name not in self.exotic]
        found: dict[str, Any] = {}
        if plain:
            found |= zip(plain, self.session.run(plain, feed), strict=True)
        found |= self._run_bound(feed, [name for name in wanted if name in self.exotic])
        return [found[name] for name in wanted]

    def time(self, feed: dict[str, Any], runs: int, warmup: int) -> list[list[float]]:
        """Seconds of each of `runs` runs, as [wall, CPU]; `warmup` more come before.

        All outputs are computed and dropped. CPU seconds are those of every thread of
        this process.
        """
        feed = {name: _as_input(value) for name, value in feed.items()}
        if self.exotic:
            run = functools.partial(
                self.session.run_with_iobinding, self._bound(feed, self.outputs)
            )
        else:
            run = functools.partial(self.session.run, self.outputs, feed)
        for _ in range(warmup):
            run()
        return [_timed(run) for _ in range(runs)]

    def observe(self, feed: dict[str, Any]) -> None:
        """Run, and count the elements of every float output; the values stay here."""
        for name, value in zip(self.outputs, self.run(feed, self.outputs), strict=True):
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                self.seen.setdefault(name, Histogram()).add(value)

    def observed(self, sent: list[Buffer]) -> list[Any]:
        """What `observe` has counted so far: per output its name, head and counts."""
        found: list[Any] = []
        for name, seen in self.seen.items():
            head, counts = seen.to_parts()
            found.append([name, head, _frames.pack(counts, sent)])
        return found

    def _run_bound(self, feed: dict[str, Any], names: list[str]) -> dict[str, Raw]:
        binding = self._bound(feed, names)
        self.session.run_with_iobinding(binding)
        return {
            name: _read_raw(value)
            for name, value in zip(names, binding.get_outputs(), strict=True)
        }

    def _bound(self, feed: dict[str, Any], names: list[str]) -> Any:
        """The binding of the inputs, and of the outputs `names`, to ORT's own values."""
        binding = self.session.io_binding()
        for name, value in feed.items():
            if isinstance(value, np.ndarray) and value.dtype != object:
                value = _ort_value_class().ortvalue_from_numpy(value)
            elif isinstance(value, np.ndarray | list | dict | None):
                raise RefusedError(
                    "session",
                    f"ORT's Python interface cannot give outputs {names} (bfloat16, fp8 "
                    f"or 4 bits) while input {name!r} is no numeric tensor",
                )
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name)
        return binding


def _timed(run: Callable[[], object]) -> list[float]:
    """One run: its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return [wall, cpu]


def _exotic_type(kind: str) -> int | None:
    """`tensor(bfloat16)` -> 16; None for what numpy can hold."""
    return _EXOTIC.get(kind.removeprefix("tensor(").removesuffix(")"))


def _ort_value_class() -> Any:
    import onnxruntime

    return onnxruntime.OrtValue


def _as_input(value: Any) -> Any:
    if not isinstance(value, Raw):
        return value
    ort_value = _ort_value_class().ortvalue_from_shape_and_type(
        list(value.shape), value.elem_type
    )
    ctypes.memmove(ort_value.data_ptr(), value.data, len(value.data))
    return ort_value


def _read_raw(value: Any) -> Raw:
    elem_type = _exotic_type(value.data_type())
    assert elem_type is not None
    size = value.tensor_size_in_bytes()
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return Raw(elem_type, tuple(value.shape()), data)


class Server:
    """Keeps the sessions of this process and answers requests, one at a time."""

    def __init__(self, memory_limit: int | None) -> None:
        self.sessions: dict[int, Loaded] = {}
        self.count = 0
        self.preloaded = False
        self.memory_limit = memory_limit

    def answer(self, head: Head, parts: list[bytearray]) -> tuple[Any, list[Buffer]]:
        """The answer's JSON form and its buffers; raises RefusedError."""
        sent: list[Buffer] = []
        match head["op"]:
            case "providers":
                return list(_onnxruntime().get_available_providers()), sent
            case "load":
                return self._load(head, parts), sent
            case "run":
                feed = {k: _frames.unpack(v, parts) for k, v in head["feed"].items()}
                loaded = self.sessions[head["session"]]
                values = loaded.run(feed, head["outputs"] or loaded.outputs)
                return [_frames.pack(value, sent) for value in values], sent
            case "profile":
                loaded = self.sessions[head["session"]]
                if loaded.profile is None:
                    raise RefusedError("session", "this session keeps no profile")
                return loaded.profile.read(loaded.session), sent
            case "time":
                feed = {k: _frames.unpack(v, parts) for k, v in head["feed"].items()}
                loaded = self.sessions[head["session"]]
                seconds = loaded.time(feed, head["runs"], head["warmup"])
                return {"seconds": seconds, "peak": _peak_bytes()}, sent
            case "observe":
                feed = {k: _frames.unpack(v, parts) for k, v in head["feed"].items()}
                self.sessions[head["session"]].observe(feed)
                return None, sent
            case "observed":
                return self.sessions[head["session"]].observed(sent), sent
            case "close":
                self.sessions.pop(head["session"], None)
                return None, sent
        raise RefusedError("session", f"unknown request {head['op']!r}")

    def _load(self, head: Head, parts: list[bytearray]) -> Head:
        ort = _onnxruntime()
        provider: str = head["provider"]
        _require(provider, ort.get_available_providers(), "this onnxruntime offers")
        self._make_room(provider)
        if provider in (_CUDA, _TENSORRT):
            self._preload(ort)
        if head["pinned"]:
            os.sched_setaffinity(0, head["pinned"])
        bare = _peak_bytes()
        model = head["path"] if head["path"] is not None else bytes(parts[1])
        options = _session_options(ort, head)
        profile = _placement.Profile(options) if head["profile"] else None
        session = _create(ort, model, options, head)
        session.disable_fallback()
        _require(provider, session.get_providers(), "the session runs on")
        self.count += 1
        self.sessions[self.count] = Loaded(session, profile)
        return {
            "session": self.count,
            "inputs": [[v.name, v.type, list(v.shape)] for v in session.get_inputs()],
            "outputs": [[v.name, v.type, list(v.shape)] for v in session.get_outputs()],
            "providers": list(session.get_providers()),
            "bare": bare,
            "assigned": _placement.assigned(session) if head["placement"] else None,
        }

    def _make_room(self, provider: str) -> None:
        """A lid on the address space for the CPU; none for what maps a whole GPU.

        The caller polls resident memory in either case.
        """
        if provider != _CPU:
            _lift_address_space()
        elif self.memory_limit:
            _limit_address_space(self.memory_limit)
            self.memory_limit = None

    def _preload(self, ort: Any) -> None:
        """Let ORT find the CUDA and cuDNN of Python packages, before its first use."""
        if not self.preloaded and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        self.preloaded = True


def _create(ort: Any, model: str | bytes, options: Any, head: Head) -> Any:
    """The session; refused with what fell to the CPU where `strict` forbids that."""
    present = ort.get_available_providers()
    try:
        return ort.InferenceSession(
            model,
            options,
            providers=_providers(head, present, head["strict"]),
            enable_fallback=0,
        )
    except Exception as error:
        if not (head["strict"] and _FELL_BACK in str(error)):
            raise
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
    lenient = ort.InferenceSession(
        model, options, providers=_providers(head, present, False), enable_fallback=0
    )
    _require(head["provider"], lenient.get_providers(), "the session runs on")
    left = (_placement.assigned(lenient) or {}).get(_CPU, {})
    told = ", ".join(f"{op} {count}" for op, count in left.items()) or "some nodes"
    raise RefusedError(
        "provider",
        f"{head['provider']} is required for all nodes, and leaves to the CPU: {told}",
    )


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RefusedError("no_onnxruntime", str(error)) from error
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def _require(provider: str, present: list[str], where: str) -> None:
    """ORT falls back to the CPU without a word where a provider cannot start."""
    if provider not in present:
        raise RefusedError(
            "provider", f"{provider} asked for but not used: {where} {', '.join(present)}"
        )


def _session_options(ort: Any, head: Head) -> Any:
    options = ort.SessionOptions()
    level = {
        "disable_all": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "enable_all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
    options.graph_optimization_level = level[head["level"]]
    options.intra_op_num_threads = head["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    if head["placement"] or head["strict"]:
        options.add_session_config_entry(_placement.RECORD, "1")
    if head["strict"]:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in head["options"]:
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    if head["optimized"]:
        options.optimized_model_filepath = head["optimized"]
        beside = os.path.basename(head["optimized"]) + ".data"
        options.add_session_config_entry(_OPTIMIZED_WEIGHTS, beside)
        options.add_session_config_entry(_OPTIMIZED_LEAST, "1024")
    for library in head["custom_op_libraries"]:
        options.register_custom_ops_library(library)
    return options


def _providers(head: Head, present: list[str], strict: bool) -> list[Any]:
    """The provider with its options, then those that take what it leaves.

    Where `strict` the CPU is not among them: ORT calls that a contradiction.
    """
    provider: str = head["provider"]
    given = {k: v for k, v in head["options"] if not k.startswith("session.")}
    if provider == _CPU:
        return [(provider, given)]
    chain: list[Any] = [
        (provider, _COMPARABLE_CUDA | given if provider == _CUDA else given)
    ]
    if provider == _TENSORRT and _CUDA in present:
        chain.append((_CUDA, dict(_COMPARABLE_CUDA)))
    return chain if strict else [*chain, _CPU]


def _peak_bytes() -> int | None:
    """The most resident memory that this process ever had; None where nobody says."""
    try:
        with open("/proc/self/status") as file:
            found = re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _limit_address_space(limit: int) -> None:
    """Let allocations fail once they exceed what is mapped now by `limit` bytes."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + limit, resource.RLIM_INFINITY))


def _lift_address_space() -> None:
    """Undo `_limit_address_space`, which a CPU session in this process asked for."""
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _error_head(error: BaseException) -> Head:
    text = " ".join(str(error).split())
    if isinstance(error, RefusedError):
        return {"error": error.kind, "text": text}
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return {"error": "memory", "text": text}
    return {"error": "session", "text": text or type(error).__name__}


def _receive(stream: IO[bytes], requests: queue.SimpleQueue[Request]) -> None:
    """Queue requests as they come; when the caller is gone, so are we, at once."""
    try:
        while True:
            requests.put(_frames.read(stream))
    except EndOfStreamError:
        os._exit(0)
    except MemoryError:
        os._exit(_frames_out_of_memory())


def _frames_out_of_memory() -> int:
    os.write(2, b"MemoryError: out of memory while a request was read\n")
    return 1


def main() -> None:
    """Serve until the caller closes our stdin. The argument is the memory limit, or 0."""
    answers = os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    os.dup2(2, 1)
    faulthandler.enable()
    stdin = os.fdopen(os.dup(0), "rb", buffering=1 << 16)
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(stdin, requests), daemon=True).start()
    server = Server(int(sys.argv[1]) or None)
    while True:
        head, parts = requests.get()
        try:
            form, sent = server.answer(head, parts)
            reply: Head = {"ok": form}
        except Exception as error:  # noqa: BLE001  the boundary: the caller names it
            reply, sent = _error_head(error), []
        del parts
        _frames.write(answers, reply, sent)


if __name__ == "__main__":
    main()
