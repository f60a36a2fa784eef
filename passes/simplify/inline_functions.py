"""inline-functions: put the body of a local function in the place of its calls.

    y = local.f <alpha = 0.1> (x)
                                        t = LeakyRelu <alpha = 0.1> (x)
    f <alpha> (a) => (b) {        ->    y = Neg (t)
        t = LeakyRelu <alpha: @alpha> (a)
        b = Neg (t)
    }

1. Attributes that refer to the call's take its values, else the function's defaults.
2. The nodes keep their names, below that of the call.
3. A call stays where the function means another version of an operator than the scope
   that calls it, or hands on an input that the call leaves out.
4. Functions that nothing calls any more go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx
from onnx import FunctionProto, NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.inlining import Inliner
from onnxopt.manager import Context, Pass
from onnxopt.model import Model
from onnxopt.report import Guarantee


class InlineFunctions(Pass):
    """Replace calls of local functions by what these compute."""

    name: ClassVar[str] = "inline-functions"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run_model(self, model: Model, context: Context) -> None:
        """The main graph and what is inside it; then no function is left, mostly."""
        inliner = Inliner()
        for view in model.views():
            if view.is_attached and not _root(view).is_function:
                self._run(view, inliner)
        _drop_uncalled(model)

    def _run(self, graph: GraphView, inliner: Inliner) -> None:
        for node in graph.visit(self, references=True):
            body = graph.model.function(node)
            if body is not None:
                reason = _inline(graph, node, body, inliner)
                if reason is not None:
                    graph.skip(node, reason)


def _root(view: GraphView) -> GraphView:
    while view.parent is not None:
        view = view.parent
    return view


def _inline(
    graph: GraphView, node: NodeProto, body: GraphView, inliner: Inliner
) -> str | None:
    """Why the call stays; None where it is replaced, or the edit was refused."""
    function = body.proto
    assert isinstance(function, FunctionProto)
    imports, reason = _imports(graph, body)
    if reason is not None:
        return reason
    given = dict.fromkeys(function.input, "")
    given.update(zip(function.input, node.input, strict=False))
    if any(not given.get(name, name) for name in function.output):
        return "it would hand on an input that is left out"
    outputs = [*node.output, *[""] * (len(function.output) - len(node.output))]
    content = inliner.content(
        graph, node, body, given, outputs, attributes.of_call(function, node), node.name
    )
    edit = Edit(graph, node)
    for domain, version in imports.items():
        edit.import_domain(domain, version)
    edit.erase(node)
    edit.adopt(content)
    edit.hand_on(outputs, content.values)
    if graph.apply(edit, f"inlined {function.name}"):
        inliner.forget(graph, node)
    return None


def _imports(graph: GraphView, body: GraphView) -> tuple[dict[str, int], str | None]:
    """The domains that the calling scope must import, or why they do not agree."""
    missing = {}
    for node in attributes.nodes_in(body.proto.node):
        ours, theirs = graph.opset(node.domain), body.opset(node.domain)
        if not ours:
            missing[node.domain] = theirs
        elif ours != theirs and not _is_same_operator(node, ours, theirs):
            return {}, f"its {node.op_type} is that of another operator set"
    return missing, None


def _is_same_operator(node: NodeProto, first: int, second: int) -> bool:
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        one, other = (
            onnx.defs.get_schema(node.op_type, version, domain)
            for version in (first, second)
        )
    except onnx.defs.SchemaError:
        return False
    return bool(one.since_version == other.since_version)


def _drop_uncalled(model: Model) -> None:
    called = {id(body) for body in _called(model, model.main)}
    for view in list(model.functions):
        if id(view) not in called:
            edit = Edit(model.main, None)
            edit.drop_function(view)
            model.main.apply(edit, f"nothing calls {view.scope}")


def _called(model: Model, view: GraphView) -> Iterator[GraphView]:
    seen: set[int] = set()
    scopes = [view]
    for scope in scopes:
        scope.settle()
        scopes += scope.children()
        for node in scope.proto.node:
            body = model.function(node)
            if body is not None and id(body) not in seen:
                seen.add(id(body))
                scopes.append(body)
                yield body
