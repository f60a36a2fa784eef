"""All rules, by operator."""

from __future__ import annotations

from onnxopt.symbolic.rules import elementwise, layers, movement
from onnxopt.symbolic.rules.elementwise import Rule

RULES: dict[str, Rule] = {**elementwise.RULES, **movement.RULES, **layers.RULES}
