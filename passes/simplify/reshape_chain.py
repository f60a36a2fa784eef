"""reshape-chain: one Reshape for a chain of Reshape, Flatten, Squeeze and Unsqueeze.

    t = Unsqueeze(x, axes)
    y = Reshape(t, [2, -1])     ->    y = Reshape(x, [2, -1])

1. What ends in the shape that the chain started from is not needed at all.
2. A Reshape by a constant reads what the chain started from, where that has, or the
   Reshape before copies, the dims that a 0 copies.
3. Squeeze of Squeeze and Unsqueeze of Unsqueeze are one with more axes.
4. Any other last node becomes a Reshape to the shape that inference knows, where at most
   one dim of it is open (-1) and none is 0.
5. A Transpose that only moves dims of size 1 is such a node, too.
6. The middle value has no other reader, except for rule 1.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt import attributes, axes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

_CHAIN = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_NODES = (*_CHAIN, "Transpose")


class MergeReshapes(Pass):
    """Merge chains of Reshape, Flatten, Squeeze and Unsqueeze."""

    name: ClassVar[str] = "reshape-chain"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the last node of each pair."""
        for last in graph.visit(self, _NODES):
            first = graph.producer(last.input[0])
            if first is None or graph.op(first) not in _NODES:
                continue
            if attributes.has_references(first):
                continue
            if not (_keeps_order(graph, first) and _keeps_order(graph, last)):
                continue
            edit = _merged(graph, first, last)
            if edit is not None:
                why = f"{first.op_type} before {last.op_type} is not needed"
                graph.apply(edit, why)


def _keeps_order(graph: GraphView, node: NodeProto) -> bool:
    """Whether only the shape changes."""
    if node.op_type != "Transpose":
        return True
    perm, shape = axes.perm_of(graph, node), graph.shape(node.input[0])
    if perm is None or shape is None or len(perm) != len(shape):
        return False
    return axes.moves_only_ones(perm, shape)


def _merged(graph: GraphView, first: NodeProto, last: NodeProto) -> Edit | None:
    edit, start = Edit(graph, last), first.input[0]
    if _is_undone(graph, first, last) and _may_replace(graph, last.output[0], start):
        edit.bypass(last, {last.output[0]: start})
        return edit
    if graph.only_use(last.input[0]) is None:
        return None
    if first.op_type == last.op_type == "Transpose":
        return None  # the pass transpose does it
    if _ignores_dims(graph, first, last):
        edit.set_input(last, 0, start)
        return edit
    joined = _joined_axes(graph, first, last)
    if joined is not None:
        _write_axes(graph, edit, start, joined)
        return edit
    dims = _known_dims(graph, last)
    if dims is None:
        graph.skip(last, "the shape of the chain's end is not known")
        return None
    shape = edit.add_weight(dims, f"{last.output[0]}_shape")
    edit.rewrite("Reshape", [start, shape])
    return edit


def _is_undone(graph: GraphView, first: NodeProto, last: NodeProto) -> bool:
    """Whether the chain ends in the shape that it started from."""
    if {first.op_type, last.op_type} == {"Squeeze", "Unsqueeze"}:
        ours, theirs = axes.axes_of(graph, first), axes.axes_of(graph, last)
        if ours and theirs and sorted(ours) == sorted(theirs):
            return True
    return graph.same_shape(first.input[0], last.output[0])


def _may_replace(graph: GraphView, name: str, start: str) -> bool:
    """Whether `start` can have the name of an output, where `name` is one."""
    if not graph.is_output(name):
        return True
    is_free = not graph.is_output(start) and not graph.is_pinned(start)
    return graph.producer(start) is not None and is_free


def _ignores_dims(graph: GraphView, first: NodeProto, last: NodeProto) -> bool:
    """Whether a Reshape does the same with what the chain started from."""
    dims = _target(graph, last)
    if dims is None:
        return False
    if attributes.get(last, "allowzero", 0):
        return True
    copied = [axis for axis, dim in enumerate(dims) if dim == 0]
    return all(_stays(graph, first, axis) for axis in copied)


def _stays(graph: GraphView, first: NodeProto, axis: int) -> bool:
    """Whether `first` has the dim `axis` of its input in the same place."""
    dims = _target(graph, first)
    copies = dims is not None and not attributes.get(first, "allowzero", 0)
    if dims is not None and copies and axis < len(dims) and dims[axis] == 0:
        return True
    before, after = graph.shape(first.input[0]), graph.shape(first.output[0])
    if before is None or after is None or axis >= min(len(before), len(after)):
        return False
    return before[axis] == after[axis]


def _target(graph: GraphView, node: NodeProto) -> list[int] | None:
    """The constant shape of a Reshape."""
    if node.op_type != "Reshape" or len(node.input) < 2:
        return None
    dims = graph.array(node.input[1])
    return None if dims is None else [int(dim) for dim in dims.reshape(-1)]


def _joined_axes(graph: GraphView, first: NodeProto, last: NodeProto) -> list[int] | None:
    """The axes of one node that does what both do; they count from the front."""
    if first.op_type != last.op_type or last.op_type not in ("Squeeze", "Unsqueeze"):
        return None
    if last.op_type == "Squeeze":
        outer, inner = first, last
    else:
        outer, inner = last, first
    taken, more = axes.axes_of(graph, outer), axes.axes_of(graph, inner)
    if not taken or not more or min(*taken, *more) < 0:
        return None
    # `more` counts without the axes of `taken`
    places = [axis for axis in range(len(taken) + max(more) + 1) if axis not in taken]
    return sorted([*taken, *(places[axis] for axis in more)])


def _write_axes(graph: GraphView, edit: Edit, start: str, found: list[int]) -> None:
    op_type = edit.node.op_type
    if graph.opset() < 13:
        edit.rewrite(op_type, [start], {"axes": found})
        return
    name = edit.add_weight(np.array(found, np.int64), f"{edit.node.output[0]}_axes")
    edit.rewrite(op_type, [start, name])


def _known_dims(graph: GraphView, node: NodeProto) -> np.ndarray | None:
    shape = graph.shape(node.output[0])
    if shape is None or graph.opset() < 5:
        return None  # before opset 5 the shape was an attribute
    dims = [dim if isinstance(dim, int) else -1 for dim in shape]
    if dims.count(-1) > 1 or 0 in dims:
        return None
    return np.array(dims, dtype=np.int64)
