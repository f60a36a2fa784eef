"""onnxopt makes ONNX models smaller and faster, and proves what it did.

    result = onnxopt.optimize("model.onnx")
    result.save("smaller.onnx")

What is imported here is loaded on first use: the command line's help needs no onnx.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from onnxopt._version import __version__

if TYPE_CHECKING:
    from onnxopt.api import Result, optimize, shrink, simplify, validate
    from onnxopt.blame import Bisection, bisect
    from onnxopt.differences import Differences, diff
    from onnxopt.errors import (
        InvalidModelError,
        OnnxoptError,
        ProviderError,
        SessionError,
        UsageError,
        ValidationError,
        WorkerError,
    )
    from onnxopt.inspection import Inspection, inspect
    from onnxopt.latency import Bench, bench
    from onnxopt.report import Report, Validation

logging.getLogger("onnxopt").addHandler(logging.NullHandler())

_HOMES = {
    "onnxopt.api": ("Result", "optimize", "shrink", "simplify", "validate"),
    "onnxopt.blame": ("Bisection", "bisect"),
    "onnxopt.differences": ("Differences", "diff"),
    "onnxopt.errors": (
        "InvalidModelError",
        "OnnxoptError",
        "ProviderError",
        "SessionError",
        "UsageError",
        "ValidationError",
        "WorkerError",
    ),
    "onnxopt.inspection": ("Inspection", "inspect"),
    "onnxopt.latency": ("Bench", "bench"),
    "onnxopt.report": ("Report", "Validation"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Bench",
    "Bisection",
    "Differences",
    "Inspection",
    "InvalidModelError",
    "OnnxoptError",
    "ProviderError",
    "Report",
    "Result",
    "SessionError",
    "UsageError",
    "Validation",
    "ValidationError",
    "WorkerError",
    "__version__",
    "bench",
    "bisect",
    "diff",
    "inspect",
    "optimize",
    "shrink",
    "simplify",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for from the module that holds it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onnxopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
