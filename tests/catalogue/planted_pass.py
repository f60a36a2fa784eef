"""A pass that makes one of the wrong rewrites, as edits of the scope that it is in."""

from __future__ import annotations

from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, numpy_helper

from catalogue.surgery import attribute, scopes
from catalogue.wrong_rewrites import PLANTED
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.model import Model
from onnxopt.report import Guarantee

# A pass runs until nothing changes; this one makes its edits once.
_DONE: WeakKeyDictionary[Model, set[str]] = WeakKeyDictionary()


class Planted(Pass):
    """The wrong rewrite called `rewrite`: one edit a scope."""

    name: ClassVar[str] = "planted"
    guarantee: ClassVar[Guarantee] = "equivalent"
    rewrite: str = ""

    def run(self, graph: GraphView, context: Context) -> None:
        wrong = next(each for each in PLANTED if each.name == self.rewrite)
        reference = wrong.reference()
        pairs = zip(
            scopes(reference.graph), scopes(wrong.apply(reference).graph), strict=True
        )
        for old, new in pairs:
            if old != new and _made(old) <= _made(graph.proto):
                done = _DONE.setdefault(graph.model, set())
                if graph.scope not in done:
                    done.add(graph.scope)
                    self._replay(graph, old, new)

    def _replay(self, graph: GraphView, old: GraphProto, new: GraphProto) -> None:
        before = {tuple(node.output): node for node in old.node}
        after = {tuple(node.output): node for node in new.node}
        added = [n for n in new.node if _differ(n, before.get(tuple(n.output)))]
        gone = [n for n in old.node if _differ(n, after.get(tuple(n.output)))]
        weights = {t.name: t for t in old.initializer}
        set_ = [t for t in new.initializer if t != weights[t.name]]
        own = [graph.producer(node.output[0]) for node in gone]
        edit = Edit(graph, own[0] if own else graph.nodes()[0])
        for node in own:
            assert node is not None
            if node.op_type != "Constant":
                edit.erase(node)
        for node in added:
            if node.op_type == "Constant" and tuple(node.output) in before:
                value = numpy_helper.to_array(attribute(node, "value"))
                edit.set_weight(node.output[0], np.array(value))
                continue
            attributes = {a.name: attribute(node, a.name) for a in node.attribute}
            edit.insert(
                node.op_type,
                node.input,
                list(node.output),
                attributes,
                domain=node.domain,
            )
        for tensor in set_:
            edit.set_weight(tensor.name, np.array(numpy_helper.to_array(tensor)))
        graph.apply(edit, f"planted {self.rewrite}")


def _made(graph: GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.output}


def _differ(one: NodeProto, other: NodeProto | None) -> bool:
    """Whether two nodes differ apart from subgraphs, which are scopes of their own."""
    return other is None or _bare(one) != _bare(other)


def _bare(node: NodeProto) -> NodeProto:
    bare = NodeProto.FromString(node.SerializeToString())
    kept = [a for a in bare.attribute if a.type != AttributeProto.GRAPH]
    del bare.attribute[:]
    bare.attribute.extend(kept)
    return bare
