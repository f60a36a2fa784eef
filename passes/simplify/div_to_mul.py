"""div-to-mul: multiply by the reciprocal of a constant, which is faster than to divide.

    y = Div(x, c)               ->    y = Mul(x, 1 / c)

1. c is a constant of floats, and all who read it divide by it in this scope.
2. c and 1 / c are normal numbers of their type: else digits would be lost.
3. Not where the result goes on to be rounded or compared, powers of 2 aside: by these
   both are exact.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt.affine import Affine
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import Floats, smallest_normal
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.steps import reaches_step
from onnxopt.weights import Array


class DivToMul(Pass):
    """Multiply by the reciprocal of a constant."""

    name: ClassVar[str] = "div-to-mul"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at every Div by a constant, with those that share it."""
        for node in graph.visit(self, ("Div",)):
            division = Affine.of(graph, node)
            if division is None:
                continue
            readers = _divisions(graph, division.constant)
            if readers is None:
                continue
            factor, _ = division.terms(graph)
            rounded = _rounded(factor, division)
            if rounded is None:
                graph.skip(node, "the reciprocal would lose digits")
                continue
            if not _is_exact(factor) and any(
                reaches_step(graph, reader.output[0]) for reader in readers
            ):
                graph.skip(node, "its result is rounded or compared")
                continue
            edit = Edit(graph, node)
            edit.set_weight(division.constant, rounded)
            for reader in readers:
                edit.set_op_type(reader, "Mul")
            graph.apply(edit, "to multiply is faster than to divide")


def _divisions(graph: GraphView, name: str) -> list[NodeProto] | None:
    """Who reads constant `name`, where all of them divide by it in this scope."""
    home = graph.home(name)
    if home is None or home.is_output(name) or home.is_pinned(name):
        return None
    uses = home.uses(name)
    if any(
        use.view is not graph or use.index != 1 or graph.op(use.node) != "Div"
        for use in uses
    ):
        return None
    return [use.node for use in uses]


def _rounded(factor: Floats, division: Affine) -> Array | None:
    """The reciprocals in the type of the constant; None where some are not normal."""
    least = smallest_normal(division.dtype)
    with np.errstate(all="ignore"):
        rounded = factor.astype(division.dtype)
        sizes, divisors = np.abs(rounded.astype(np.float64)), np.abs(1 / factor)
    normal = (sizes >= least) & np.isfinite(sizes)
    normal &= (divisors >= least) & np.isfinite(divisors)
    return rounded if bool(normal.all()) else None


def _is_exact(factor: Floats) -> bool:
    """Whether all are powers of 2."""
    mantissas, _ = np.frexp(np.abs(factor))
    return bool((mantissas == 0.5).all())
