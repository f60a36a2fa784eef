"""slice-chain: one Slice for two in a row.

    t = Slice(x, starts = [1], ends = [9], axes = [1])
    y = Slice(t, starts = [2], ends = [4], axes = [0])
                            ->    y = Slice(x, [1, 2], [9, 4], axes = [1, 0])

1. Both are constant, and the first has no other reader.
2. On different axes as they are. On the same axis both have step 1; bounds count from the
   front, or the end from behind, so that the sum is right for any size. Other bounds need
   an axis of known size.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt import attributes, axes, slices
from onnxopt.edit import Edit
from onnxopt.graph import GraphView, Shape
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.slices import END, Cut

_ALL = (1 << 63) - 1


class MergeSlices(Pass):
    """Merge Slices of Slices."""

    name: ClassVar[str] = "slice-chain"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the second of each pair."""
        for node in graph.visit(self, ("Slice",)):
            first = graph.producer(node.input[0])
            if first is None or graph.op(first) != "Slice":
                continue
            if attributes.has_references(first) or graph.only_use(node.input[0]) is None:
                continue
            found = _merged(graph, first, node)
            if found is not None:
                edit = Edit(graph, node)
                _write(graph, edit, first.input[0], found)
                graph.apply(edit, "one Slice can cut all axes")


def _merged(graph: GraphView, first: NodeProto, second: NodeProto) -> list[Cut] | None:
    ours, theirs = slices.cuts(graph, first), slices.cuts(graph, second)
    if ours is None or theirs is None:
        return None
    shape = graph.shape(first.input[0])
    both = _comparable(ours, shape), _comparable(theirs, shape)
    if both[0] is None or both[1] is None:
        return None
    if ({cut.axis < 0 for cut in (*both[0], *both[1])}) == {True, False}:
        return None  # from both ends, and the rank is not known
    made = {cut.axis: cut for cut in both[0]}
    for cut in both[1]:
        found = made.get(cut.axis)
        joined = cut if found is None else _joined(found, cut, _size(shape, cut.axis))
        if joined is None:
            return None
        made[cut.axis] = joined
    return list(made.values())


def _comparable(found: list[Cut], shape: Shape | None) -> list[Cut] | None:
    """The cuts with their axes counted from the front, where the rank is known."""
    if shape is None:
        return found if len({cut.axis for cut in found}) == len(found) else None
    places = axes.normalize([cut.axis for cut in found], len(shape))
    if places is None:
        return None
    return [cut._replace(axis=axis) for cut, axis in zip(found, places, strict=True)]


def _size(shape: Shape | None, axis: int) -> int | None:
    dim = shape[axis] if shape is not None else None
    return dim if isinstance(dim, int) else None


def _joined(first: Cut, second: Cut, size: int | None) -> Cut | None:
    """One cut for two of the same axis."""
    if first.step != 1 or second.step != 1:
        return None
    if size is not None:
        start, end = slices.place(first.start, size), slices.place(first.end, size)
        length = max(end - start, 0)
        places = [slices.place(bound, length) for bound in (second.start, second.end)]
        return Cut(first.axis, start + places[0], start + places[1], 1)
    if first.start < 0 or second.start < 0:
        return None
    start = min(first.start + second.start, _ALL)
    if second.end >= END:
        return Cut(first.axis, start, first.end, 1)
    if second.end >= 0:  # relative to the first start
        end = first.start + second.end
        if first.end < 0:
            return None
        return Cut(first.axis, start, min(end, first.end), 1)
    if first.end >= END:
        return Cut(first.axis, start, second.end, 1)
    if first.end < 0:  # both from behind
        return Cut(first.axis, start, max(first.end + second.end, -_ALL), 1)
    return None


def _write(graph: GraphView, edit: Edit, name: str, found: list[Cut]) -> None:
    axis, starts, ends, steps = (list(items) for items in zip(*found, strict=True))
    ends = [
        _ALL if end >= END and step > 0 else end
        for end, step in zip(ends, steps, strict=True)
    ]
    if graph.opset() < 10:
        attrs = {"axes": axis, "starts": starts, "ends": ends}
        edit.rewrite("Slice", [name], attrs)
        return
    hint = edit.node.output[0]
    lists = [starts, ends, axis] + ([steps] if set(steps) != {1} else [])
    parts = ("starts", "ends", "axes", "steps")
    names = [
        edit.add_weight(np.array(values, np.int64), f"{hint}_{part}")
        for values, part in zip(lists, parts, strict=False)
    ]
    edit.rewrite("Slice", [name, *names])
