"""constant-chain: one operation for a chain of those with constants.

    t = Mul(x, a)
    y = Div(t, b)               ->    y = Mul(x, a / b)

1. Mul and Div by constants of floats become one Mul; Add and Sub one Add, or Sub where x
   is subtracted. The value between the two has no other reader.
2. The constants together are no larger than the larger of them.
3. Computed in float64 and rounded once. Not where the constants cancel out, which is a
   way of rounding x, nor where digits would be lost, nor where the result goes on to be
   rounded or compared.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from onnxopt.affine import AFFINE, Affine
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError, Floats, is_finite, smallest_normal
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.steps import reaches_step


class MergeConstants(Pass):
    """Merge chains of Mul and Div, or of Add and Sub, by constants."""

    name: ClassVar[str] = "constant-chain"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the last node of each pair."""
        for node in graph.visit(self, AFFINE):
            last = Affine.of(graph, node)
            first = None if last is None else _before(graph, last)
            if last is None or first is None:
                continue
            try:
                edit = _merged(graph, first, last)
            except DeclinedError as declined:
                graph.skip(node, str(declined))
            else:
                graph.apply(edit, "two constants are one")


def _before(graph: GraphView, last: Affine) -> Affine | None:
    """The first node of the chain that ends with `last`, where there is one."""
    node = graph.producer(last.value)
    if node is None or graph.op(node) not in AFFINE:
        return None
    first = Affine.of(graph, node)
    if first is None or first.is_scale != last.is_scale:
        return None
    if first.data_type != last.data_type or graph.only_use(last.value) is None:
        return None
    try:
        together = np.broadcast_shapes(first.dims, last.dims)
    except ValueError:
        return None
    return first if math.prod(together) <= max(first.size, last.size) else None


def _merged(graph: GraphView, first: Affine, last: Affine) -> Edit:
    node = last.node
    if reaches_step(graph, node.output[0]):
        raise DeclinedError("its result is rounded or compared")
    factor, shift = _composed(graph, first, last)
    with np.errstate(all="ignore"):
        rounded = (factor if last.is_scale else shift).astype(last.dtype)
    if not is_finite(rounded):
        raise DeclinedError(f"the constants together do not fit into {last.dtype}")
    edit = Edit(graph, node, max_growth=0)
    if graph.only_use_everywhere(last.constant) is not None:
        constant = last.constant
        edit.set_weight(constant, rounded)
    else:
        constant = edit.add_weight(rounded, last.constant)
    if last.is_scale:
        op_type, inputs = "Mul", [first.value, constant]
    elif (factor > 0).all():
        op_type, inputs = "Add", [first.value, constant]
    else:
        op_type, inputs = "Sub", [constant, first.value]
    edit.set_inputs(node, inputs)
    edit.set_op_type(node, op_type)
    return edit


def _composed(graph: GraphView, first: Affine, last: Affine) -> tuple[Floats, Floats]:
    """y = factor * x + shift for the two together."""
    (a, b), (c, d) = first.terms(graph), last.terms(graph)
    with np.errstate(all="ignore"):
        factor, shift = a * c, b * c + d
    if not all(np.isfinite(term).all() for term in (a, b, c, d, factor, shift)):
        raise DeclinedError("a constant is not finite")
    least = smallest_normal(last.dtype)
    if ((np.abs(factor) < least) & (a != 0) & (c != 0)).any():
        raise DeclinedError(f"the constants together are too small for {last.dtype}")
    if (2 * np.abs(shift) < np.maximum(np.abs(b), np.abs(d))).any():
        raise DeclinedError("the constants cancel out, which rounds")
    return factor, shift
