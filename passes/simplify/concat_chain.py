"""concat-chain: one Concat for nested ones, and none for what was only taken apart.

    t = Concat <axis = 1> (a, b)
    y = Concat <axis = 1> (t, c)        ->    y = Concat <axis = 1> (a, b, c)

    a, b = Split <axis = 1> (x)
    y = Concat <axis = 1> (a, b)        ->    (readers of y read x)

1. A Concat that only another one over the same axis reads goes into it.
2. All outputs of a Split, in order, are what was split.
3. Slices of one value, step 1, each from where the last one ended and together all of
   the axis, are that value, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from onnx import NodeProto

from onnxopt import attributes, axes, slices
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee


class MergeConcats(Pass):
    """Merge nested Concats; undo Split and Slices that a Concat puts together again."""

    name: ClassVar[str] = "concat-chain"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look for what each Concat could read instead."""
        for node in graph.visit(self, ("Concat",)):
            names = [
                inner
                for name in node.input
                for inner in _parts(graph, node, graph.producer(name)) or [name]
            ]
            names = _whole(graph, node, names)
            if names == list(node.input):
                continue
            edit = Edit(graph, node)
            if len(names) == 1:
                edit.bypass(node, {node.output[0]: names[0]})
            else:
                edit.set_inputs(node, names)
            graph.apply(edit, "a Concat can read what its inputs are made of")


def _parts(graph: GraphView, outer: NodeProto, inner: NodeProto | None) -> list[str]:
    """What `inner` joins for `outer` alone; empty where it does something else."""
    if inner is None or graph.op(inner) != "Concat" or attributes.has_references(inner):
        return []
    use = graph.only_use(inner.output[0])
    if use is None or use.view is not graph or not _same_axis(graph, outer, inner):
        return []
    return list(inner.input)


def _same_axis(graph: GraphView, node: NodeProto, other: NodeProto) -> bool:
    """Whether two nodes work on the same axis of values of one rank."""
    return _is_axis(graph, node, _raw_axis(graph, other), node.output[0])


def _is_axis(graph: GraphView, node: NodeProto, axis: int, name: str) -> bool:
    own = _raw_axis(graph, node)
    if own == axis:
        return True
    shape = graph.shape(name)
    if shape is None:
        return False
    return axes.normalize([own], len(shape)) == axes.normalize([axis], len(shape))


def _raw_axis(graph: GraphView, node: NodeProto) -> int:
    is_old = node.op_type == "Concat" and graph.opset() < 4
    return int(attributes.get(node, "axis", 1 if is_old else 0))


def _whole(graph: GraphView, node: NodeProto, names: Sequence[str]) -> list[str]:
    """The inputs, with what was taken apart for them as one."""
    found: list[str] = []
    index = 0
    while index < len(names):
        run = _run(graph, node, names[index:])
        found.append(run[0] if run else names[index])
        index += run[1] if run else 1
    return found


def _run(
    graph: GraphView, node: NodeProto, names: Sequence[str]
) -> tuple[str, int] | None:
    """The value that the first few `names` are together, and how many they are."""
    maker = graph.producer(names[0])
    if maker is None or attributes.has_references(maker):
        return None
    if graph.op(maker) == "Split" and graph.opset() >= 2:
        count = len(maker.output)
        is_all = list(maker.output) == list(names[:count])
        return (
            (maker.input[0], count) if is_all and _same_axis(graph, node, maker) else None
        )
    if graph.op(maker) == "Slice":
        return _sliced(graph, node, maker.input[0], names)
    return None


def _sliced(
    graph: GraphView, node: NodeProto, whole: str, names: Sequence[str]
) -> tuple[str, int] | None:
    bounds: list[int] = [0]
    for count, name in enumerate(names, 1):
        maker = graph.producer(name)
        if maker is None or graph.op(maker) != "Slice" or maker.input[0] != whole:
            return None
        found = None if attributes.has_references(maker) else slices.cuts(graph, maker)
        if found is None or len(found) != 1:
            return None
        cut = found[0]
        if cut.step != 1 or not _is_axis(graph, node, cut.axis, whole):
            return None
        if cut.start != bounds[-1]:
            return None
        bounds.append(cut.end)
        if cut.end >= slices.END:
            return (whole, count) if _are_rising(bounds[1:-1]) else None
    return None


def _are_rising(bounds: Sequence[int]) -> bool:
    """Whether the bounds come in order, whatever the size of the axis."""
    same_side = all(bound < 0 for bound in bounds) or all(bound >= 0 for bound in bounds)
    return same_side and list(bounds) == sorted(bounds)
