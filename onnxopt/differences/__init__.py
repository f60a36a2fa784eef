"""In what two models differ: nodes, weights, inputs and outputs, metadata.

    found = onnxopt.diff("a.onnx", "b.onnx")
    found.equal, found.nodes, found.weights, found.interface, found.metadata

Nothing is run: two models that differ may well compute the same (`onnxopt.validate`
tells), two that are equal do.
"""

from __future__ import annotations

from onnxopt.differences.compare import diff
from onnxopt.differences.found import (
    Differences,
    FactChange,
    InterfaceChange,
    NodeChange,
    WeightChange,
)

__all__ = [
    "Differences",
    "FactChange",
    "InterfaceChange",
    "NodeChange",
    "WeightChange",
    "diff",
]
