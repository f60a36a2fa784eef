"""What this machine is, as far as ONNX Runtime's int8 kernels depend on it."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni"}


def is_arm() -> bool:
    """Whether it is a 64-bit ARM."""
    return platform.machine().lower() in ("aarch64", "arm64")


def is_x86() -> bool:
    """Whether it is a 64-bit x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def adds_pairs() -> bool:
    """Whether kernels of uint8 by int8 add two products in 16 bits, which saturates.

    That is x86 without VNNI; where it is not known (only Linux says), it is taken to be
    without. ONNX Runtime has slower kernels that are exact: PRECISE.
    """
    if is_arm():
        return False
    try:
        text = _CPUINFO.read_text("utf-8", "replace")
    except OSError:
        return True
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return _DOT_PRODUCTS.isdisjoint(flags[1].split() if flags else ())


PRECISE = ("session.x64quantprecision", "1")
"""The session configuration entry that asks for exact int8 kernels on x86."""
