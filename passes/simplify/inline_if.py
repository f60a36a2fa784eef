"""inline-if: put the branch that is taken in the place of an If.

    y = If(true) {
        then: t = Abs(x)              t = Abs(x)
              p = Neg(t)        ->    y = Neg(t)
        else: q = Exp(x)
    }

1. The condition is a constant; or it is that of an If around this one, whose branch says
   what it is.
2. Or both branches compute the same, whatever the condition is.
3. Or a reader takes a rank that only one of the branches makes (the LSTM behind an If
   that squeezes): a run that takes the other one fails.
4. What the branch holds keeps its name where that is free: nodes, weights, shapes told,
   annotations. Its outputs take the names of the If's.
5. An output that the branch only hands on (an outer value) is read directly; Identity
   makes it where it is an output of the scope.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxopt import attributes, ranks
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.inlining import Inliner
from onnxopt.manager import Context, Pass
from onnxopt.model import Model
from onnxopt.report import Guarantee
from onnxopt.twins import are_twins


class InlineIf(Pass):
    """Replace an If whose outcome is known by its branch."""

    name: ClassVar[str] = "inline-if"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run_model(self, model: Model, context: Context) -> None:
        """Scope by scope, outer ones first, so that what moves outwards comes again."""
        inliner = Inliner()
        for view in model.views():
            if view.is_attached:
                self._run(view, inliner)

    def _run(self, graph: GraphView, inliner: Inliner) -> None:
        for node in graph.visit(self, ("If",)):
            branch, why = _taken(graph, node)
            if branch is not None:
                _inline(graph, node, branch, inliner, why)


def _taken(graph: GraphView, node: NodeProto) -> tuple[GraphView | None, str]:
    """The branch that stands for the node, and why; None where it is not known."""
    branches = _branches(graph, node)
    if len(branches) != 2:
        return None, ""
    value = _constant(graph, node.input[0])
    why = f"its condition is always {value}"
    if value is None:
        value = _known_around(graph, node.input[0])
        why = f"in this branch its condition is {value}"
    if value is not None:
        return branches["then_branch" if value else "else_branch"], why
    then, other = branches["then_branch"].proto, branches["else_branch"].proto
    for view in branches.values():
        view.settle_all()
    if are_twins(then, other, graph.model.weights):
        return branches["then_branch"], "both branches compute the same"
    fitting = [view for view in branches.values() if _may_be_taken(graph, node, view)]
    if len(fitting) == 1:
        return fitting[0], "only this branch makes a rank that its readers take"
    return None, ""


def _may_be_taken(graph: GraphView, node: NodeProto, branch: GraphView) -> bool:
    """Whether each output that the branch makes can have the rank that is needed."""
    for name, inner in zip(node.output, branch.outputs(), strict=True):
        rank = ranks.needed(graph, name) if name else None
        made = ranks.possible(branch, inner) if rank is not None else None
        if made is not None and rank not in made:
            return False
    return True


def _branches(graph: GraphView, node: NodeProto) -> dict[str, GraphView]:
    names = [name for name, _ in attributes.subgraphs(node)]
    return dict(zip(names, graph.children_of(node), strict=True))


def _constant(graph: GraphView, name: str) -> bool | None:
    tensor = graph.weight(name)
    if tensor is None or any(dim != 1 for dim in tensor.dims):
        return None
    array = graph.array(name)
    return None if array is None else bool(array.reshape(-1)[0])


def _known_around(graph: GraphView, name: str) -> bool | None:
    """What an If around says of the condition by which branch we are in."""
    inner, home = graph, graph.home(name)
    for view, owner in graph.enclosing():
        if view.op(owner) == "If" and owner.input[0] == name and view.home(name) is home:
            branches = _branches(view, owner)
            return inner is branches.get("then_branch")
        inner = view
    return None


def _inline(
    graph: GraphView, node: NodeProto, branch: GraphView, inliner: Inliner, why: str
) -> None:
    content = inliner.content(graph, node, branch, {}, node.output)
    edit = Edit(graph, node)
    edit.erase(node)
    edit.adopt(content)
    edit.hand_on(node.output, content.values)
    if graph.apply(edit, why):
        inliner.forget(graph, node)
