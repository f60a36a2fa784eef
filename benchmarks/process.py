"""Processor time and peak memory of a process, and of what it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_MEASURE = """
import json, resource, subprocess, sys
limit, *command = sys.argv[1:]
try:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=float(limit))
    code = done.returncode
except subprocess.TimeoutExpired:
    code = 124
use = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, use.ru_maxrss, use.ru_utime + use.ru_stime]))
"""


class FailedError(RuntimeError):
    """A measured process ended with an error."""


@dataclass(frozen=True)
class Cost:
    """Peak resident memory (MB of 10^6 bytes) and CPU seconds of one process.

    The seconds include those of its children; the peak is the largest one's.
    """

    what: str
    peak_mb: float
    cpu_seconds: float


def measure(what: str, command: Sequence[str], timeout: float = 3600) -> Cost:
    """Run a command from a small process: a child starts with its parent's peak.

    Raises FailedError with the end of what it wrote.
    """
    outer = [sys.executable, "-c", _MEASURE, str(timeout), *command]
    done = subprocess.run(outer, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise FailedError(done.stderr[-2000:])
    code, kib, seconds = json.loads(done.stdout)
    if code:
        raise FailedError(f"exit code {code}: {done.stderr.strip()[-2000:]}")
    return Cost(what, kib * 1024 / 1e6, seconds)


def _environment() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1"}
