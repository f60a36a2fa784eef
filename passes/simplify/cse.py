"""cse: compute once what is computed twice (common subexpression elimination).

    a = Shape(x)                a = Shape(x)
    b = Shape(x)          ->    (readers of b read a)

1. Two nodes with the same operator, inputs and attributes; the order of the inputs does
   not matter to Add, Mul, Equal and logic (from opset 7 on).
2. Standard operators only, and none that is random or holds a subgraph.
3. The earlier one stays, with its names; that of an outer scope, before one inside.
4. QuantizeLinear to int8 stays double: ONNX Runtime fuses codes of one reader alone.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import AttributeProto, NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.model import Model
from onnxopt.operators import RANDOM
from onnxopt.quantization.parameters import is_int8_quantizer
from onnxopt.report import Guarantee


class ShareCommonSubexpressions(Pass):
    """Let equal nodes be one."""

    name: ClassVar[str] = "cse"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run_model(self, model: Model, context: Context) -> None:
        """Outer scopes first: what they compute serves the inner ones."""
        changed = [
            _is_comparable(view, node)
            for view in model.views()
            for node in view.visit(self)
        ]
        if any(changed):
            for root in (model.main, *model.functions):
                _share(root, [])


def _share(graph: GraphView, outer: list[_Firsts]) -> None:
    """In topological order, so that what reads twins becomes twins in turn."""
    firsts: _Firsts = {}
    for node in graph.nodes():
        if attributes.has_references(node) or not _is_comparable(graph, node):
            continue
        key = _key(graph, node)
        twins = (found[key] for found in (*outer, firsts) if key in found)
        view, first = next(twins, (graph, node))
        if first is node:
            firsts[key] = graph, node
        elif view is graph or _may_leave(graph, node, view):
            _merge(graph, first, node)
    for child in list(graph.children()):
        _share(child, [*outer, firsts])


def _may_leave(graph: GraphView, node: NodeProto, outer: GraphView) -> bool:
    """Whether a node of scope `outer` can do for `node`, which is in a scope inside."""
    if any(graph.is_output(name) for name in node.output):
        return False  # a scope makes its outputs itself
    return all(graph.home(name) is outer.home(name) for name in node.input if name)


Key = tuple[str, tuple[str, ...], tuple[bool, ...], tuple[bytes, ...]]
_Firsts = dict[Key, tuple[GraphView, NodeProto]]

_COMMUTATIVE = {"Add", "Mul", "Equal", "And", "Or", "Xor"}
_COMMUTATIVE |= {"BitwiseAnd", "BitwiseOr", "BitwiseXor"}


def _key(graph: GraphView, node: NodeProto) -> Key:
    """Nodes with equal keys compute equal outputs."""
    settings = sorted(
        item.SerializeToString(deterministic=True) for item in node.attribute
    )
    made = tuple(bool(name) for name in node.output)
    inputs = tuple(node.input)
    if node.op_type in _COMMUTATIVE and graph.opset() >= 7:
        inputs = tuple(sorted(inputs))
    return node.op_type, inputs, made, tuple(settings)


def _merge(graph: GraphView, first: NodeProto, second: NodeProto) -> None:
    edit = Edit(graph, second)
    pairs = zip(second.output, first.output, strict=True)
    edit.bypass(second, {old: new for old, new in pairs if old})
    graph.apply(edit, f"{graph.label(first)} computes the same")


def _is_comparable(graph: GraphView, node: NodeProto) -> bool:
    if not any(node.input) or graph.op(node) != node.op_type or node.op_type in RANDOM:
        return False
    if is_int8_quantizer(graph, node):
        return False
    inner = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    return all(attribute.type not in inner for attribute in node.attribute)
