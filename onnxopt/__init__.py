"""onnxopt makes ONNX models smaller and faster, and proves what it did."""

from __future__ import annotations

import logging

from onnxopt._version import __version__

logging.getLogger("onnxopt").addHandler(logging.NullHandler())

__all__ = ["__version__"]
