"""The other end of `onnxopt.runtime`: `python -m onnxopt._worker`, one per Worker.

Requests come on stdin and answers go to what stdout was at the start; stdout itself
is pointed at stderr first, so that a library that prints cannot garble an answer.
Imports are numpy and onnxruntime, nothing else: it starts in a fifth of a second.
Custom operator libraries are loaded here and nowhere else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import queue
import re
import sys
import threading
from typing import IO, Any

import numpy as np

from onnxopt import _frames
from onnxopt._frames import Buffer, EndOfStreamError, Head, Raw

Request = tuple[Head, list[bytearray]]

# What ORT, the C++ runtime and CUDA say when memory is short.
_OUT_OF_MEMORY = re.compile(
    r"bad_?alloc|bad allocation|[Ff]ailed to allocate memory|out of memory|"
    r"OUT_OF_MEMORY|CUDA failure 2:|cannot allocate memory",
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
_COMPARABLE_CUDA = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}


class RefusedError(Exception):
    """An answer that is an error: its kind, then one line of text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Loaded:
    """One ORT session and what a run needs to know of it."""

    def __init__(self, session: Any) -> None:
        self.session = session
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

    def _run_bound(self, feed: dict[str, Any], names: list[str]) -> dict[str, Raw]:
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
        self.session.run_with_iobinding(binding)
        return {
            name: _read_raw(value)
            for name, value in zip(names, binding.get_outputs(), strict=True)
        }


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
            case "close":
                self.sessions.pop(head["session"], None)
                return None, sent
        raise RefusedError("session", f"unknown request {head['op']!r}")

    def _load(self, head: Head, parts: list[bytearray]) -> Head:
        ort = _onnxruntime()
        provider: str = head["provider"]
        _require(provider, ort.get_available_providers(), "this onnxruntime offers")
        on_cpu = provider == "CPUExecutionProvider"
        if not on_cpu and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        if on_cpu and self.memory_limit:
            _limit_address_space(self.memory_limit)
            self.memory_limit = None
        model = head["path"] if head["path"] is not None else bytes(parts[1])
        session = ort.InferenceSession(
            model,
            _session_options(ort, head),
            providers=_providers(
                provider, head["options"], ort.get_available_providers()
            ),
            enable_fallback=0,
        )
        session.disable_fallback()
        _require(provider, session.get_providers(), "the session runs on")
        self.count += 1
        self.sessions[self.count] = Loaded(session)
        return {
            "session": self.count,
            "inputs": [[v.name, v.type, list(v.shape)] for v in session.get_inputs()],
            "outputs": [[v.name, v.type, list(v.shape)] for v in session.get_outputs()],
            "providers": list(session.get_providers()),
        }


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RefusedError("no_onnxruntime", str(error)) from error
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
    for key, value in head["options"]:
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    for library in head["custom_op_libraries"]:
        options.register_custom_ops_library(library)
    return options


def _providers(provider: str, given: list[list[str]], present: list[str]) -> list[Any]:
    """The provider with its options, then those that take what it leaves."""
    options = {key: value for key, value in given if not key.startswith("session.")}
    if provider == "CPUExecutionProvider":
        return [(provider, options)]
    cuda = "CUDAExecutionProvider"
    if provider == cuda:
        options = _COMPARABLE_CUDA | options
    chain: list[Any] = [(provider, options)]
    if provider == "TensorrtExecutionProvider" and cuda in present:
        chain.append((cuda, dict(_COMPARABLE_CUDA)))
    return [*chain, "CPUExecutionProvider"]


def _limit_address_space(limit: int) -> None:
    """Let allocations fail once they exceed what is mapped now by `limit` bytes."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + limit, resource.RLIM_INFINITY))


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
