"""Targets: which operators may be emitted for whom, and how QDQ is laid out."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import msgspec

from onnxopt.errors import UsageError


class Target(msgspec.Struct, frozen=True):
    """What a deployment runtime runs well.

    `domains` are those that a pass may emit beyond the model's own; `activation` and
    `weight` are the 8-bit types of its QDQ layout (None: no QDQ on activations), with
    zero point 0 where `symmetric`. Where it `adds_pairs`, its kernels add two products of
    uint8 and int8 in 16 bits, which saturates: weights must not use more than 7 bits.
    """

    name: str
    domains: frozenset[str] = frozenset({""})
    activation: str | None = "uint8"
    weight: str = "int8"
    symmetric: bool = False
    adds_pairs: bool = False


_ORT = frozenset({"", "com.microsoft"})
TARGETS = {
    target.name: target
    for target in (
        Target("onnx"),
        Target("ort-cpu-x86", _ORT),
        Target("ort-cpu-arm", _ORT, activation="int8"),
        Target("ort-cuda", _ORT, activation=None),
        Target("tensorrt", activation="int8", symmetric=True),
    )
}


def target(name: str) -> Target:
    """The target called `name`; `ort-cpu` is this machine's. Raises UsageError."""
    if name == "ort-cpu":
        arm = platform.machine().lower() in ("aarch64", "arm64")
        name = "ort-cpu-arm" if arm else "ort-cpu-x86"
    if name not in TARGETS:
        known = ", ".join(sorted([*TARGETS, "ort-cpu"]))
        raise UsageError(f"unknown target {name!r}; there are {known}")
    if name == "ort-cpu-x86":
        return msgspec.structs.replace(TARGETS[name], adds_pairs=not _has_vnni())
    return TARGETS[name]


@functools.cache
def _has_vnni() -> bool:
    """Whether this machine multiplies uint8 by int8 without a sum in 16 bits.

    Where it does not say (only Linux does), it is taken not to.
    """
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return not known.isdisjoint({"avx512_vnni", "avx_vnni"})
