"""What a Slice takes, axis by axis, in whichever form its opset has."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from onnx import NodeProto

from onnxopt import attributes

if TYPE_CHECKING:
    from onnxopt.graph import GraphView

END = (1 << 31) - 1
"""As the end of a step forwards, this and all that is larger is the end of the axis."""


class Cut(NamedTuple):
    """What a Slice does to one axis; `axis` as the node has it, perhaps from behind."""

    axis: int
    start: int
    end: int
    step: int


def cuts(graph: GraphView, node: NodeProto) -> list[Cut] | None:
    """The cuts of a Slice; None where they are not all constant."""
    if graph.opset() < 10:
        starts, ends = attributes.get(node, "starts"), attributes.get(node, "ends")
        axes, steps = attributes.get(node, "axes"), None
    else:
        given = [bool(name) for name in node.input[1:5]]
        found = [_ints(graph, name) if name else None for name in node.input[1:5]]
        if any(values is None for values, name in zip(found, given, strict=True) if name):
            return None
        starts, ends, axes, steps = (*found, None, None)[:4]
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    return [Cut(*items) for items in zip(axes, starts, ends, steps, strict=True)]


def _ints(graph: GraphView, name: str) -> list[int] | None:
    array = graph.array(name)
    return None if array is None else [int(item) for item in array.reshape(-1)]


def place(bound: int, size: int) -> int:
    """Where `bound` lies on an axis of `size`, for a step forwards."""
    return min(max(bound + size if bound < 0 else bound, 0), size)
