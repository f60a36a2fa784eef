"""Where a last digit decides: values that are rounded, compared or turned to integers.

floor(x / 41) is 1 for x = 41, and floor(x * (1 / 41)) is 0: a rewrite that rounds
otherwise is not equivalent there. A layer or a sum in between has no exact values to
keep. What a custom operator, a local function or a Loop does is not looked into.
"""

from __future__ import annotations

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.graph import GraphView
from onnxopt.linear import FLOATS

_STEPS = frozenset(
    {
        "Ceil",
        "Equal",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Mod",
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "Round",
        "Sign",
        "ThresholdedRelu",
    }
)
_PASSING = frozenset(
    {
        "Abs",
        "Add",
        "Cast",
        "CastLike",
        "Clip",
        "Compress",
        "Concat",
        "ConcatFromSequence",
        "DepthToSpace",
        "Div",
        "Elu",
        "Exp",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "GlobalMaxPool",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "Max",
        "MaxPool",
        "Mean",
        "Min",
        "Mul",
        "Neg",
        "PRelu",
        "Pad",
        "Pow",
        "Reciprocal",
        "ReduceMax",
        "ReduceMin",
        "Relu",
        "Reshape",
        "Resize",
        "ReverseSequence",
        "ScatterElements",
        "ScatterND",
        "SequenceAt",
        "SequenceConstruct",
        "Slice",
        "SpaceToDepth",
        "Split",
        "SplitToSequence",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Upsample",
        "Where",
    }
)
MOST = 24
"""Readers that are looked at; where there are more, one of them may be a step."""


def reaches_step(graph: GraphView, name: str) -> bool:
    """Whether `name` may come to a step through nothing but simple arithmetic."""
    values, seen = [(graph, name)], 0
    while values:
        view, value = values.pop()
        if view.is_output(value):
            if view.is_function:
                return True  # whatever its callers make of it
            values += _outer(view)
        for use in view.uses(value):
            seen += 1
            if seen > MOST or use.view is not view or _is_step(view, use.node):
                return True
            if _passes(view, use.node):
                values += [(view, made) for made in use.node.output if made]
    return False


def _outer(view: GraphView) -> list[tuple[GraphView, str]]:
    """The values that an output of a subgraph may become."""
    if view.parent is None or view.owner is None:
        return []
    return [(view.parent, name) for name in view.owner.output if name]


def _is_step(graph: GraphView, node: NodeProto) -> bool:
    op = graph.op(node)
    if op == "Cast":
        return attributes.get(node, "to") not in FLOATS
    return op in _STEPS or "::" in op or bool(graph.children_of(node))


def _passes(graph: GraphView, node: NodeProto) -> bool:
    return graph.op(node) in _PASSING
