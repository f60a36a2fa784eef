"""transpose: one Transpose, or none, for two in a row.

    t = Transpose <perm = [0, 2, 3, 1]> (x)
    y = Transpose <perm = [0, 3, 1, 2]> (t)     ->    (readers of y read x)

1. Inverse ones both go; of others, the second does the work of both. Other readers of
   the first keep it.
2. A Reshape, Squeeze, Unsqueeze or Flatten that only moves dims of size 1 is as good as
   a Transpose, before or behind one.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxopt import attributes, axes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

_MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


class MergeTransposes(Pass):
    """Merge Transpose with Transpose, and with what moves dims of size 1."""

    name: ClassVar[str] = "transpose"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the second of each pair."""
        for node in graph.visit(self, _MOVES):
            first = graph.producer(node.input[0])
            if first is None or graph.op(first) not in _MOVES:
                continue
            if "Transpose" not in (first.op_type, node.op_type):
                continue
            if not attributes.has_references(first):
                _merge(graph, first, node)


def _merge(graph: GraphView, first: NodeProto, second: NodeProto) -> None:
    is_pair = first.op_type == second.op_type
    if not is_pair and graph.only_use(first.output[0]) is None:
        return  # both nodes would stay
    perm = _composed(graph, first, second)
    if perm is None:
        return
    edit = Edit(graph, second)
    if axes.is_identity(perm):
        edit.bypass(second, {second.output[0]: first.input[0]})
    else:
        edit.rewrite("Transpose", [first.input[0]], {"perm": list(perm)})
    graph.apply(edit, f"{first.op_type} and {second.op_type} are one Transpose")


def _composed(graph: GraphView, first: NodeProto, second: NodeProto) -> axes.Perm | None:
    if _reverses_all(first) and _reverses_all(second):
        return ()
    perms = [_perm(graph, node) for node in (first, second)]
    if perms[0] is None or perms[1] is None or len(perms[0]) != len(perms[1]):
        return None
    return axes.compose(perms[0], perms[1])


def _reverses_all(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and attributes.find(node, "perm") is None


def _perm(graph: GraphView, node: NodeProto) -> axes.Perm | None:
    """The permutation that `node` is; None where it is none."""
    if node.op_type == "Transpose":
        return axes.perm_of(graph, node)
    source, target = graph.shape(node.input[0]), graph.shape(node.output[0])
    if source is None or target is None:
        return None
    return axes.perm_between(source, target)
