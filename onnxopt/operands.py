"""Settings of operators that are attributes in old opsets and inputs in new ones."""

from __future__ import annotations

from onnx import NodeProto

from onnxopt import attributes, axes
from onnxopt.graph import GraphView

_AXES_INPUT = {"ReduceSum": 13}
"""Since when a reduction takes its axes as an input; 18 where it is not listed."""

Number = int | float


def takes_axes_input(op_type: str, opset: int) -> bool:
    """Whether reduction `op_type` has its axes as an input and not as an attribute."""
    return opset >= _AXES_INPUT.get(op_type, 18)


def reduced_axes(graph: GraphView, node: NodeProto) -> list[int] | None:
    """The axes that a reduction names; None where it names none, or no constants."""
    return axes.axes_of(graph, node) or None


def clip_bounds(
    graph: GraphView, node: NodeProto
) -> tuple[Number | None, Number | None] | None:
    """The bounds of a Clip, None for one that is absent; None where one is no constant.

    An absent bound is the largest finite number: infinity does not pass it.
    """
    if graph.opset() < 11:
        return attributes.get(node, "min"), attributes.get(node, "max")
    bounds: list[Number | None] = [None, None]
    for slot, name in enumerate(node.input[1:3]):
        if name:
            tensor = graph.weight(name)
            if tensor is None or tensor.dims not in ([], [1]):
                return None
            array = graph.array(name)
            if array is None or array.dtype.kind not in "fiu":
                return None
            bounds[slot] = array.reshape(-1)[0].item()
    return bounds[0], bounds[1]
