"""merge-elementwise: one operator for two in a row that clamp, round or negate.

    t = Relu(x)
    y = Min(t, 6)               ->    y = Clip(x, 0, 6)

1. Relu, Clip, and Min and Max with a scalar constant, in float32, are clamps: two of them
   are one, from the first through the second. The value between has no other reader.
2. A clamp that lets through all that the one before it does goes, whoever reads that.
   Max(x, 0) is a Relu.
3. Neg(Neg(x)) and Not(Not(x)) are x; Abs, Floor, Ceil, Round and Sign of what the same
   operator made (Abs: or Neg) are that operator once.

A bound that Clip lacks is the largest finite number (infinity does not pass ONNX
Runtime's), while Relu, Min and Max let infinity through: bounds are kept apart by that.
All hand NaN on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt.clamps import CLAMPS, Clamp, clamp_of
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.pattern import LARGEST
from onnxopt.report import Guarantee

_INVERSE_OF_ITSELF = ("Neg", "Not")
_IDEMPOTENT = ("Abs", "Floor", "Ceil", "Round", "Sign")


class MergeElementwise(Pass):
    """Merge Relu, Clip, Min, Max with scalars; remove Neg of Neg, Not of Not..."""

    name: ClassVar[str] = "merge-elementwise"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the last node of each pair."""
        if graph.opset() < 8:
            return  # Min and Max broadcast no scalar
        for node in graph.visit(self, (*CLAMPS, *_INVERSE_OF_ITSELF, *_IDEMPOTENT)):
            if node.op_type in CLAMPS:
                _merge_clamps(graph, node)
            else:
                _merge_signs(graph, node)


# ---- Neg, Not, Abs, Floor... ----


def _merge_signs(graph: GraphView, node: NodeProto) -> None:
    first = graph.producer(node.input[0])
    if first is None:
        return
    before = graph.op(first)
    edit = Edit(graph, node)
    if before == node.op_type and before in _INVERSE_OF_ITSELF:
        edit.bypass(node, {node.output[0]: first.input[0]})
    elif before == node.op_type:
        edit.bypass(node, {node.output[0]: node.input[0]})
    elif (node.op_type, before) == ("Abs", "Neg"):
        edit.set_input(node, 0, first.input[0])
    else:
        return
    graph.apply(edit, f"{node.op_type} of {before} is less")


# ---- clamps ----


def _merge_clamps(graph: GraphView, node: NodeProto) -> None:
    last = clamp_of(graph, node)
    if last is None:
        return
    maker = graph.producer(last.value)
    first = None
    if maker is not None and graph.op(maker) in CLAMPS:
        first = clamp_of(graph, maker)
    edit = Edit(graph, node)
    if maker is None or first is None:
        if node.op_type == "Max" and (last.low, last.high) == (0, math.inf):
            edit.rewrite("Relu", [last.value])
            graph.apply(edit, "the maximum with 0 is Relu")
        return
    if last.covers(first):
        edit.bypass(node, {node.output[0]: last.value})
        graph.apply(edit, f"what {maker.op_type} leaves passes {node.op_type}")
    elif graph.only_use(last.value) is not None:
        _write(graph, edit, first.then(last), [*maker.input, *node.input])
        graph.apply(edit, f"{maker.op_type} and {node.op_type} are one")


def _write(graph: GraphView, edit: Edit, clamp: Clamp, near: Sequence[str]) -> None:
    """Put the operator that clamps like this in the edit's place.

    Bounds that are among the values `near` are read there.
    """

    def bound(number: float) -> str:
        for name in near:
            tensor = graph.weight(name) if name else None
            if tensor is not None and not tensor.dims:
                array = graph.array(name)
                if array is not None and float(array) == number:
                    return name
        hint = f"{edit.node.output[0]}_bound"
        return edit.add_weight(np.array(number, np.float32), hint)

    low, high = clamp.low, clamp.high
    if math.isinf(low):
        edit.rewrite("Min", [clamp.value, bound(high)])
    elif math.isinf(high) and low == 0:
        edit.rewrite("Relu", [clamp.value])
    elif math.isinf(high):
        edit.rewrite("Max", [clamp.value, bound(low)])
    elif graph.opset() < 11:
        edit.rewrite("Clip", [clamp.value], {"min": low, "max": high})
    else:
        bounds = [bound(low) if low > -LARGEST else ""]
        bounds += [bound(high)] if high < LARGEST else []
        edit.rewrite("Clip", [clamp.value, *bounds])
