"""no-op: take out operators that, with these attributes and shapes, change nothing.

    t = Expand(x, [1, 1])
    y = Mul(t, 1.0)             ->    (readers of y read x)

1. Cast to the type that the value has; Transpose that permutes nothing; Pad by zero;
   Concat, Sum, Mean, Max and Min of one; Split into one; Slice of everything; Reshape,
   Expand, Squeeze, Unsqueeze, Flatten and Tile whose result has the shape of the input
   (symbols that are sure included); Reduce over axes of size 1; AveragePool of single
   elements; Resize by 1.
2. x + 0, x - 0, x * 1, x / 1, x ** 1 (floats), x and true, x or false, with a constant
   that does not broadcast x.
3. Where of one value in both cases, which the condition does not broadcast.

x + 0 turns -0.0 into 0.0, and removing it keeps -0.0: equal by ==.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt import attributes, axes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.weights import tensor_bytes

MAX_SCAN = 1 << 20
"""Larger constants (bytes) are not read just to see whether they are all 0 or 1."""


class RemoveNoOp(Pass):
    """Remove Cast, Transpose, Pad, Slice, Reshape, Add... where they change nothing."""

    name: ClassVar[str] = "no-op"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Bypass what hands one of its inputs on."""
        for node in graph.visit(self, _RULES):
            kept = _RULES[node.op_type](graph, node)
            if kept is not None:
                edit = Edit(graph, node)
                edit.bypass(node, {node.output[0]: kept})
                graph.apply(edit, f"this {node.op_type} changes nothing")


Rule = Callable[[GraphView, NodeProto], str | None]
"""The input that the node hands on unchanged; None where it may change something."""


def _cast(graph: GraphView, node: NodeProto) -> str | None:
    same = graph.dtype(node.input[0]) == attributes.get(node, "to")
    return node.input[0] if same else None


def _transpose(graph: GraphView, node: NodeProto) -> str | None:
    perm = attributes.get(node, "perm")
    return node.input[0] if perm is not None and perm == sorted(perm) else None


def _concat(graph: GraphView, node: NodeProto) -> str | None:
    return node.input[0] if len(node.input) == 1 else None


def _split(graph: GraphView, node: NodeProto) -> str | None:
    return node.input[0] if len(node.output) == 1 and graph.opset() >= 2 else None


def _average_pool(graph: GraphView, node: NodeProto) -> str | None:
    """One element at a time."""
    steps = [*attributes.get(node, "kernel_shape"), *attributes.get(node, "strides", [])]
    is_plain = set(steps) == {1} and not any(attributes.get(node, "pads", []))
    return node.input[0] if is_plain else None


def _resize(graph: GraphView, node: NodeProto) -> str | None:
    """By scales of 1, which ONNX Runtime takes for a copy, whatever the mode."""
    mode = attributes.get(node, "coordinate_transformation_mode")
    if mode == "tf_crop_and_resize" or attributes.get(node, "antialias", 0):
        return None
    slot = 2 if graph.opset() >= 11 else 1
    name = node.input[slot] if len(node.input) == slot + 1 else ""
    scales = graph.array(name) if name else None
    is_copy = scales is not None and scales.size > 0 and bool((scales == 1).all())
    return node.input[0] if is_copy else None


def _pad(graph: GraphView, node: NodeProto) -> str | None:
    pads = attributes.get(node, "pads")
    if pads is None and len(node.input) > 1:
        array = graph.array(node.input[1])
        pads = None if array is None else array.tolist()
    return node.input[0] if pads is not None and not any(pads) else None


def _slice(graph: GraphView, node: NodeProto) -> str | None:
    """All steps 1 and nothing cut off: the shape stays, and with it every element."""
    steps = graph.array(node.input[4]) if len(node.input) > 4 and node.input[4] else None
    given = len(node.input) > 4 and bool(node.input[4])
    if given and (steps is None or not bool((steps == 1).all())):
        return None
    return node.input[0] if _keeps_shape(graph, node) else None


def _reshape(graph: GraphView, node: NodeProto) -> str | None:
    return node.input[0] if _keeps_shape(graph, node) else None


def _keeps_shape(graph: GraphView, node: NodeProto) -> bool:
    return graph.same_shape(node.input[0], node.output[0])


def _neutral(value: int, *, either: bool) -> Rule:
    """x op `value` is x; `either` also on the left."""

    def rule(graph: GraphView, node: NodeProto) -> str | None:
        if graph.opset() < 7 or len(node.input) != 2:
            return None  # older ones broadcast by attribute
        for slot in (1, 0) if either else (1,):
            other = node.input[1 - slot]
            if _is_all(graph, node.input[slot], value) and axes.leaves_shape(
                graph.shape(node.input[slot]), graph.shape(other)
            ):
                return str(other)
        return None

    return rule


def _power(graph: GraphView, node: NodeProto) -> str | None:
    """x ** 1; integers go through floating point, where large ones are rounded."""
    floats = graph.dtype(node.input[0]) in (TensorProto.FLOAT, TensorProto.DOUBLE)
    return _neutral(1, either=False)(graph, node) if floats else None


def _where(graph: GraphView, node: NodeProto) -> str | None:
    is_one = node.input[1] == node.input[2]
    same = is_one and graph.same_shape(node.input[1], node.output[0])
    return node.input[1] if same else None


def _is_all(graph: GraphView, name: str, value: int) -> bool:
    tensor = graph.weight(name)
    if tensor is None or tensor_bytes(tensor) > MAX_SCAN:
        return False
    array = graph.array(name)
    if array is None or array.nbytes > MAX_SCAN or array.dtype == object:
        return False
    return array.size > 0 and bool(np.all(array == np.asarray(value).astype(array.dtype)))


_RULES: dict[str, Rule] = {
    "Cast": _cast,
    "Transpose": _transpose,
    "Concat": _concat,
    "Sum": _concat,
    "Mean": _concat,
    "Max": _concat,
    "Min": _concat,
    "Split": _split,
    "AveragePool": _average_pool,
    "Resize": _resize,
    "Pad": _pad,
    "Slice": _slice,
    "Reshape": _reshape,
    "Expand": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Flatten": _reshape,
    "Tile": _reshape,
    "Where": _where,
    "Pow": _power,
    "And": _neutral(1, either=True),
    "Or": _neutral(0, either=True),
    "ReduceMax": _reshape,
    "ReduceMean": _reshape,
    "ReduceMin": _reshape,
    "ReduceProd": _reshape,
    "ReduceSum": _reshape,
    "Add": _neutral(0, either=True),
    "Sub": _neutral(0, either=False),
    "Mul": _neutral(1, either=True),
    "Div": _neutral(1, either=False),
}
