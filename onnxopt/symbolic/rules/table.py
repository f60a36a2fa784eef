"""All rules, by operator."""

from __future__ import annotations

from onnxopt.symbolic.rules import contrib, elementwise, layers, movement
from onnxopt.symbolic.rules.elementwise import Rule

STANDARD: dict[str, Rule] = {**elementwise.RULES, **movement.RULES, **layers.RULES}
RULES: dict[str, dict[str, Rule]] = {
    "": STANDARD,
    "ai.onnx": STANDARD,
    "com.microsoft": contrib.RULES,
}
"""By domain, then by operator."""
