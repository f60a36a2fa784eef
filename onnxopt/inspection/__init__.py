"""What a model holds: operators, sizes, zeros, dead channels, quantization."""

from __future__ import annotations

from onnxopt.inspection.survey import Inspection, inspect

__all__ = ["Inspection", "inspect"]
