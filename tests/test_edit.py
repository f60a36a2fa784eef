"""Edit: whole or not at all, names and metadata, sweeping, every kind of scope."""

from __future__ import annotations

import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx.checker
import pytest
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper
from onnx.helper import make_node, make_tensor_value_info

from onnxopt import verifier
from onnxopt.edit import Edit, EditError
from onnxopt.errors import InvalidModelError
from onnxopt.graph import GraphView
from onnxopt.ledger import Ledger
from onnxopt.manager import PassManager
from onnxopt.model import Model
from onnxopt.recipe import parse_pipeline
from onnxopt.weights import inline_bytes
from tests import support
from tests.support import model_of

BODY = """
main (float[2] x, bool c) => (float[2] y, float[2] z)
   <float[2] W = {1, 2}, float[2] V = {3, 4}> {
   t = Identity (x)
   a = Add (t, W)
   y = Identity (a)
   b = Mul (a, V)
   z = If (c) <
      then_branch = then () => (float[2] p) {
         u = Neg (b)
         p = Identity (u)
      },
      else_branch = else () => (float[2] q) <float k = {2}> { q = Mul (x, k) }
   >
}"""


OLD = """
main (float[2] x, float[2] W) => (float[2] y) <float[2] W = {1, 2}> { y = Neg (x) }"""


def opened(body: str = BODY, opset: int = 17, ir: int = 8) -> GraphView:
    """The view of the main graph, with reports on."""
    model = Model.open(model_of(body, opset, ir))
    model.ledger.begin("test", "bitwise")
    return model.main


def node_of(view: GraphView, name: str) -> NodeProto:
    """The node that makes `name`."""
    node = view.producer(name)
    assert node is not None
    return node


def inner(view: GraphView, name: str) -> GraphView:
    """The scope whose graph is called `name`."""
    return next(v for v in view.model.views() if v.proto.name == name)


def ops(view: GraphView) -> list[str]:
    """The operators of a scope, in order."""
    return [node.op_type for node in view.nodes()]


def verified(view: GraphView) -> GraphView:
    """The same view, after a check of the protobuf and of the index."""
    view.model.settle()
    verifier.verify(view.model, "now", rebuild=True)
    return view


# ---- refused edits leave no trace ----


def bypass_all(view: GraphView) -> Edit:
    """Everything that an edit can do, at once."""
    edit = Edit(view, node_of(view, "a"))
    new = edit.add_weight(np.ones(3, np.float32), "new")
    name = edit.insert("Reshape", [new, new])[0]
    edit.set_input(edit.node, 1, "V")
    edit.set_attribute(edit.node, "note", "text")
    edit.set_weight("V", np.zeros((2, 2), np.float32))
    edit.bypass(node_of(view, "t"), {"t": "x"})
    edit.insert("Abs", [name])
    edit.set_op_type(node_of(view, "b"), "Div")
    edit.set_shape("b", 1, [5])
    edit.erase(edit.node)  # before what reads it
    edit.erase(node_of(view, "z"))
    edit.insert("Sub", ["x", "W"], ["a"])
    edit.insert("Relu", ["b"], ["z"])
    edit.bypass(node_of(view, "y"), {"y": "a"})
    return edit


def refuse_by_limit(view: GraphView) -> Edit:
    """The bisect limit."""
    view.model.ledger.limit = 0
    return bypass_all(view)


def refuse_by_budget(view: GraphView) -> Edit:
    """The budget of the whole run."""
    view.model.ledger.bytes = view.model.ledger.most_bytes = 10
    edit = bypass_all(view)
    edit.add_weight(np.ones(1000, np.float32), "large")
    return edit


def refuse_by_own_bound(view: GraphView) -> Edit:
    """The edit's own bound on its growth."""
    edit = bypass_all(view)
    edit.add_weight(np.ones(1000, np.float32), "large")
    edit.max_growth = 100
    return edit


def refuse_by_cycle(view: GraphView) -> Edit:
    """A node would depend on itself."""
    edit = Edit(view, node_of(view, "a"))
    edit.bypass(node_of(view, "t"), {"t": "x"})
    edit.set_input(node_of(view, "a"), 1, "b")
    return edit


def refuse_by_captured_cycle(view: GraphView) -> Edit:
    """A cycle by way of what a branch captures."""
    edit = Edit(view, node_of(view, "a"))
    edit.set_input(node_of(view, "a"), 1, "z")
    return edit


def refuse_output_of_input(view: GraphView) -> Edit:
    """An output would be an input of the graph."""
    edit = Edit(view, node_of(view, "a"))
    edit.bypass(node_of(view, "t"), {"t": "x"})
    edit.bypass(node_of(view, "y"), {"y": "x"})
    return edit


def refuse_output_of_output(view: GraphView) -> Edit:
    """Two outputs would be one value."""
    edit = Edit(view, node_of(view, "z"))
    edit.bypass(node_of(view, "z"), {"z": "y"})
    return edit


def refuse_by_operator_set(view: GraphView) -> Edit:
    """An operator that the model's opset has not got."""
    edit = bypass_all(view)
    edit.insert("Gelu", ["x"])
    return edit


def refuse_by_old_operator(view: GraphView) -> Edit:
    """An operator that a node would become, which the opset has no more."""
    edit = bypass_all(view)
    edit.set_op_type(node_of(view, "b"), "Upsample")
    return edit


def refuse_by_domain(view: GraphView) -> Edit:
    """A domain that the model does not import."""
    edit = bypass_all(view)
    edit.insert("QuickGelu", ["x"], domain="com.microsoft")
    return edit


def refuse_in_a_branch(view: GraphView) -> Edit:
    """A branch would hand an outer value on."""
    then = inner(view, "then")
    edit = Edit(then, node_of(then, "p"))
    edit.bypass(edit.node, {"p": "b"})
    return edit


REFUSALS: list[Callable[[GraphView], Edit]] = [
    refuse_by_limit,
    refuse_by_budget,
    refuse_by_own_bound,
    refuse_by_cycle,
    refuse_by_captured_cycle,
    refuse_output_of_input,
    refuse_output_of_output,
    refuse_by_operator_set,
    refuse_by_old_operator,
    refuse_by_domain,
    refuse_in_a_branch,
]


def declared() -> GraphView:
    """The model of these tests, with a declared inner value."""
    proto = model_of(BODY)
    proto.graph.value_info.append(make_tensor_value_info("b", 1, [2]))
    proto.graph.value_info.append(make_tensor_value_info("t", 1, [2]))
    model = Model.open(proto)
    model.ledger.begin("test", "bitwise")
    return model.main


@pytest.mark.parametrize("refuse", REFUSALS)
def test_a_refused_edit_leaves_no_trace(refuse: Callable[[GraphView], Edit]) -> None:
    """Bytes, index, order, budget and change logs are as before; the reason is told."""
    view = declared()
    before = view.model.proto.SerializeToString(deterministic=True)
    order = [node.output[0] for node in view.nodes()]
    edit = refuse(view)
    state = view.model.ledger.bytes
    assert not edit.graph.apply(edit, "test")
    verified(view)
    assert view.model.proto.SerializeToString(deterministic=True) == before
    assert [node.output[0] for node in view.nodes()] == order
    assert all(not scope.changes for scope in view.model.views())
    assert (view.model.ledger.edits, view.model.ledger.bytes) == (0, state)
    if refuse is refuse_by_limit:
        assert not support.skips(view.model)  # the limit says nothing about the node
        return
    (skip,) = support.skips(view.model)
    assert skip.node == view.label(edit.node)
    assert skip.reason


def test_the_same_edit_goes_through_where_nothing_forbids_it() -> None:
    """So the refusals above are not for a fault of the edit."""
    view = declared()
    before = view.model.bytes()
    edit = bypass_all(view)
    assert view.apply(edit, "test")
    verified(view)
    assert ops(view) == ["Reshape", "Abs", "Sub", "Div", "Relu"]
    assert [value.name for value in view.model.proto.graph.output] == ["y", "z"]
    growth = view.model.bytes() - before
    declared_bytes = view.model.ledger.bytes - growth  # of values that are gone
    assert 0 <= declared_bytes < 20
    assert not support.skips(view.model)


def test_a_faulty_edit_is_undone_as_well() -> None:
    """It raises; the model is as before."""
    view = declared()
    before = view.model.proto.SerializeToString(deterministic=True)
    edit = Edit(view, node_of(view, "a"))
    edit.set_input(node_of(view, "b"), 1, "W")
    edit.erase(node_of(view, "a"))
    with pytest.raises(EditError, match="'a' is read but nothing makes it"):
        view.apply(edit, "test")
    assert view.model.proto.SerializeToString(deterministic=True) == before
    verified(view)


def test_an_edit_that_reads_what_nothing_makes_is_undone() -> None:
    """The change that raises is undone as well."""
    for fault in ("set_input", "insert", "insert again"):
        view = declared()
        before = view.model.proto.SerializeToString(deterministic=True)
        edit = Edit(view, node_of(view, "a"))
        edit.bypass(node_of(view, "t"), {"t": "x"})
        if fault == "set_input":
            edit.set_input(edit.node, 1, "nothing")
        elif fault == "insert":
            edit.insert("Neg", ["nothing"])
        else:
            edit.insert("Neg", ["x"], ["b"])
        with pytest.raises((EditError, InvalidModelError)):
            view.apply(edit, "test")
        view.settle()
        assert view.model.proto.SerializeToString(deterministic=True) == before
        verified(view)


def test_producers_may_go_before_their_readers() -> None:
    """In any order, whether the edit is refused or not; captures included."""
    for order in (["a", "b", "z"], ["z", "b", "a"], ["b", "a", "z"]):
        view = declared()
        before = view.model.proto.SerializeToString(deterministic=True)
        for limit in (0, None):
            view.model.ledger.limit = limit
            edit = Edit(view, node_of(view, "y"))
            for name in order:
                edit.erase(node_of(view, name))
            for name in ("a", "z"):
                edit.add_weight(np.ones(2, np.float32), name, name=name)
            assert view.apply(edit, "test") == (limit is None)
            verified(view)
            if limit == 0:
                after = view.model.proto.SerializeToString(deterministic=True)
                assert after == before
        assert [use.node.output[0] for use in view.uses("a")] == ["y"]
        assert view.uses("b") == []


def test_the_limit_counts_edits() -> None:
    """A pipeline stops where it says; the model there is valid."""
    proto = model_of(BODY)
    whole = support.run_passes(proto, "identity,dead-code").ledger.edits
    assert whole == 3
    for limit in range(whole + 1):
        model = support.run_passes(proto, "identity,dead-code", limit=limit)
        assert model.ledger.edits == limit
        onnx.checker.check_model(support.final(model))


# ---- the budget ----


def test_the_budget_is_one_for_the_whole_run() -> None:
    """What one edit frees another may use; beyond, it is refused."""
    ledger = Ledger(10_000_000)
    assert ledger.most_bytes == 10_200_000
    assert ledger.refusal(200_000) is None
    assert ledger.refusal(200_001) is not None
    ledger.bytes += 200_000
    assert ledger.refusal(1) is not None
    assert ledger.refusal(0) is None
    ledger.bytes -= 500_000
    assert ledger.refusal(500_000) is None
    assert Ledger(10).most_bytes == 1_000_000
    assert Ledger().refusal(1 << 40) is None
    assert Ledger().refusal(11, most=10) is not None


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool", "int4", "U"])
@pytest.mark.parametrize("length", [1, 127, 128, 20_000])
def test_a_weight_counts_as_it_is_written(dtype: str, length: int) -> None:
    """With its tag, dims, type and name, and the length of each."""
    kind = ml_dtypes.int4 if dtype == "int4" else np.dtype(dtype)
    view = opened()
    name = "w" * length
    for shape in ((), (0,), (1,), (100,), (130, 1), (3, 200, 300)):
        array = np.ones(shape).astype(kind)
        tensor = view.model.weights.tensor(array, name)
        graph = GraphProto(initializer=[numpy_helper.from_array(array, name)])
        assert inline_bytes(tensor) == len(graph.SerializeToString()), shape


def test_growth_is_that_of_the_file() -> None:
    """Whatever an edit does: weights, nodes, names of inputs and outputs."""
    view = opened()
    add, mul = node_of(view, "a"), node_of(view, "b")
    long = "long" * 50

    def grown(node: NodeProto, change: Callable[[Edit], object]) -> None:
        before = len(view.model.proto.graph.SerializeToString())
        ledger = view.model.ledger.bytes
        edit = Edit(view, node)
        change(edit)
        assert view.apply(edit, "test")
        view.settle()
        after = len(view.model.proto.graph.SerializeToString())
        assert view.model.ledger.bytes - ledger == after - before != 0

    def other_weight(edit: Edit) -> None:
        edit.set_input(mul, 1, edit.add_weight(np.ones((1, 2), np.float32), long))

    def other_name(edit: Edit) -> None:
        edit.divert(add, 0, long + "a")
        edit.insert("Identity", [long + "a"], ["a"])

    grown(mul, other_weight)
    grown(add, lambda edit: edit.set_weight("W", np.ones((1, 1, 2), np.float32)))
    grown(add, other_name)
    grown(add, lambda edit: edit.set_input(add, 1, mul.input[1]))
    grown(mul, lambda edit: edit.set_op_type(mul, "GreaterOrEqual"))
    grown(mul, lambda edit: edit.rewrite("Sub", mul.input, {"alpha": 1.0}))


@pytest.mark.parametrize("where", ["main", "then"])
def test_growth_is_measured_with_what_goes(where: str) -> None:
    """A weight that loses its last reader counts against the new one."""
    view = opened(
        BODY.replace("p = Identity (u)", "p = Add (u, k)").replace(
            "(float[2] p) {", "(float[2] p) <float[2] k = {1, 2}> {"
        )
    )
    scope = inner(view, where)
    reader, old = ("a", "W") if where == "main" else ("p", "k")
    edit = Edit(scope, node_of(scope, reader), max_growth=8)
    edit.set_input(edit.node, 1, edit.add_weight(np.ones(2, np.float32), "n"))
    assert scope.apply(edit, "test")
    assert scope.home(old) is None
    assert abs(view.model.ledger.bytes) <= 8
    verified(view)


# ---- bypass ----


def test_bypass_moves_readers_in_inner_scopes() -> None:
    view = opened()
    edit = Edit(view, node_of(view, "b"))
    edit.bypass(edit.node, {"b": "a"})
    assert view.apply(edit, "test")
    assert list(node_of(inner(view, "then"), "u").input) == ["a"]
    assert view.home("V") is None
    verified(view)


def test_bypass_gives_an_output_its_name() -> None:
    """All who read the old name read the new one, inner scopes too."""
    view = opened()
    edit = Edit(view, node_of(view, "y"))
    edit.bypass(edit.node, {"y": "a"})
    assert view.apply(edit, "test")
    assert view.producer("a") is None
    assert node_of(view, "y").op_type == "Add"
    assert list(node_of(view, "b").input) == ["y", "V"]
    verified(view)


def test_bypass_of_the_output_of_a_branch() -> None:
    view = opened()
    then = inner(view, "then")
    edit = Edit(then, node_of(then, "p"))
    edit.bypass(edit.node, {"p": "u"})
    assert then.apply(edit, "test")
    assert [(n.op_type, n.output[0]) for n in then.nodes()] == [("Neg", "p")]
    verified(view)


def test_bypass_of_a_pinned_value_is_refused() -> None:
    """A branch hands an outer value on by name."""
    view = opened("""
main (float[2] x, bool c) => (float[2] y) {
   s = Neg (x)
   t = Identity (s)
   y = If (c) <
      then_branch = then () => (float[2] t) { u = Abs (x) },
      else_branch = else () => (float[2] q) { q = Exp (x) }
   >
}""")
    edit = Edit(view, node_of(view, "t"))
    edit.bypass(edit.node, {"t": "s"})
    assert not view.apply(edit, "test")
    assert "passed through" in support.skips(view.model)[0].reason


def test_bypass_does_not_change_what_a_name_means_inside() -> None:
    view = opened("""
main (float[2] x, bool c) => (float[2] y) {
   t = Identity (x)
   y = If (c) <
      then_branch = then () => (float[2] p) <float[2] x = {1, 2}> { p = Add (x, t) },
      else_branch = else () => (float[2] q) { q = Exp (x) }
   >
}""")
    edit = Edit(view, node_of(view, "t"))
    edit.bypass(edit.node, {"t": "x"})
    assert not view.apply(edit, "test")
    assert "means another value" in support.skips(view.model)[0].reason
    verified(view)


# ---- sweeping ----


def test_a_sweep_takes_what_only_the_dead_needed() -> None:
    """A chain, its weights, and captures by way of an If; nothing that has an effect."""
    view = opened("""
main (float[2] x, bool c) => (float[2] y) <float[2] W = {1, 2}, float[2] V = {3, 4}> {
   e = other.Draw (x)
   a = Add (x, W)
   b = Mul (e, V)
   d = If (c) <
      then_branch = then () => (float[2] p) { p = Neg (a) },
      else_branch = else () => (float[2] q) { q = Neg (b) }
   >
   y = Abs (d)
}""")
    edit = Edit(view, node_of(view, "y"))
    edit.set_input(edit.node, 0, "x")
    assert view.apply(edit, "test")
    assert ops(view) == ["Draw", "Abs"]
    assert view.initializers() == []
    verified(view)


def test_a_sweep_leaves_inputs_and_overridable_initializers() -> None:
    view = opened("""
main (float[2] x, float[2] W, float[2] v) => (float[2] y) <float[2] W = {1, 2}> {
   a = Add (v, W)
   b = Add (x, a)
   y = Neg (b)
}""")
    edit = Edit(view, node_of(view, "y"))
    edit.set_input(edit.node, 0, "x")
    assert view.apply(edit, "test")
    verified(view)
    assert [value.name for value in view.model.proto.graph.input] == ["x", "W", "v"]
    assert [tensor.name for tensor in view.initializers()] == ["W"]


# ---- names and metadata ----


def test_new_nodes_inherit() -> None:
    """Names derive from the node's, metadata is copied, the place is before it."""
    proto = model_of(BODY)
    add = next(node for node in proto.graph.node if node.op_type == "Add")
    add.name, add.doc_string = "sum", "what it is"
    add.metadata_props.add(key="namespace", value="layer1")
    model = Model.open(proto)
    view = model.main
    edit = Edit(view, node_of(view, "a"))
    (first,) = edit.insert("Neg", ["t"])
    edit.rewrite("Sub", [first, "W"], {"absent": None, "kept": 1})
    assert view.apply(edit, "test")
    verified(view)
    neg, sub = node_of(view, first), node_of(view, "a")
    assert (neg.name, sub.name) == ("sum_Neg", "sum")
    assert first == "a_Neg"
    assert sub.doc_string == "what it is"
    assert [a.name for a in sub.attribute] == ["kept"]
    for node in (neg, sub):
        assert [(m.key, m.value) for m in node.metadata_props] == [
            ("namespace", "layer1")
        ]
    assert ops(view) == ["Identity", "Neg", "Sub", "Identity", "Mul", "If"]


def test_nodes_without_a_name_get_none() -> None:
    view = opened()
    edit = Edit(view, node_of(view, "a"))
    (name,) = edit.insert("Neg", ["t"])
    edit.set_input(edit.node, 0, name)
    assert view.apply(edit, "test")
    assert node_of(view, name).name == ""


def test_a_weight_keeps_its_name_and_metadata() -> None:
    proto = model_of(BODY)
    proto.graph.initializer[0].doc_string = "a weight"
    proto.graph.initializer[0].metadata_props.add(key="k", value="v")
    view = Model.open(proto).main
    edit = Edit(view, node_of(view, "a"))
    edit.set_weight("W", np.array([[5, 6]], np.float64))
    assert view.apply(edit, "test")
    tensor = view.initializers()[0]
    assert (tensor.name, tensor.doc_string, len(tensor.metadata_props)) == (
        "W",
        "a weight",
        1,
    )
    assert (list(tensor.dims), tensor.data_type) == ([1, 2], 11)


# ---- weights, by format and scope ----


def with_weight(view: GraphView, name: str) -> str:
    """Let the node that makes `name` read a new constant as its first input."""
    edit = Edit(view, node_of(view, name))
    new = edit.add_weight(np.array([7, 8], np.float32), "new")
    edit.set_input(edit.node, 0, new)
    assert view.apply(edit, "test")
    return new


def test_a_new_weight_is_an_initializer() -> None:
    view = opened()
    name = with_weight(view, "a")
    assert [t.name for t in view.initializers()] == ["W", "V", name]
    assert [value.name for value in view.model.proto.graph.input] == ["x", "c"]
    verified(view)


def test_before_ir_4_it_is_an_input_as_well() -> None:
    body = OLD.replace("Neg (x)", "Add (W, x)")
    view = opened(body, opset=8, ir=3)
    name = with_weight(view, "y")
    verified(view)
    graph = view.model.proto.graph
    assert [value.name for value in graph.input] == ["x", name]
    assert [tensor.name for tensor in graph.initializer] == [name]
    onnx.checker.check_model(view.model.proto)


def test_before_ir_4_a_branch_holds_constant_nodes() -> None:
    body = """
main (float[2] x, bool c) => (float[2] y) {
   y = If (c) <
      then_branch = then () => (float[2] p) { p = Add (x, x) },
      else_branch = else () => (float[2] q) { q = Exp (x) }
   >
}"""
    view = opened(body, opset=8, ir=3)
    then = inner(view, "then")
    name = with_weight(then, "p")
    assert ops(then) == ["Constant", "Add"]
    assert isinstance(then.proto, GraphProto)
    assert not then.proto.input
    array = then.array(name)
    assert array is not None
    assert array.tolist() == [7, 8]
    verified(view)


def test_a_function_holds_constant_nodes() -> None:
    view = opened("""
main (float[2] x) => (float[2] y) { y = local.f (x) }
<domain: "local", opset_import: ["" : 17]>
f (a) => (b) { b = Add (a, a) }""")
    body = view.model.functions[0]
    name = with_weight(body, "b")
    assert ops(body) == ["Constant", "Add"]
    edit = Edit(body, node_of(body, "b"))
    edit.set_weight(name, np.array([9, 9], np.float32))
    assert body.apply(edit, "test")
    array = body.array(name)
    assert array is not None
    assert array.tolist() == [9, 9]
    verified(view)
    onnx.checker.check_model(view.model.proto)
    found = support.run(view.model.proto, {"x": np.array([1, 2], np.float32)})
    assert found[0].tolist() == [10, 11]


def test_what_is_declared_of_a_weight_follows_it() -> None:
    body = OLD.replace("Neg (x)", "Add (x, W)")
    proto = model_of(body, 8, 3)
    proto.graph.value_info.append(make_tensor_value_info("W", 1, [2]))
    view = Model.open(proto).main
    edit = Edit(view, node_of(view, "y"))
    edit.set_weight("W", np.ones((1, 2), np.float32))
    assert view.apply(edit, "test")
    graph = view.model.proto.graph
    for value in (graph.input[1], graph.value_info[0]):
        assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == [1, 2]


def test_a_dropped_weight_of_an_old_format_is_no_input_any_more() -> None:
    view = opened(OLD, opset=8, ir=3)
    edit = Edit(view, None)
    edit.drop_weight("W")
    assert view.apply(edit, "test")
    assert [value.name for value in verified(view).model.proto.graph.input] == ["x"]


def test_a_large_weight_leaves_memory() -> None:
    view = opened()
    values = np.arange(1 << 19, dtype=np.float32)
    edit = Edit(view, node_of(view, "a"))
    edit.set_input(edit.node, 1, edit.add_weight(values, "large"))
    assert view.apply(edit, "test")
    tensor = view.weight("large")
    assert tensor is not None
    assert not tensor.raw_data
    array = view.array("large")
    assert array is not None
    np.testing.assert_array_equal(array, values)
    assert view.model.bytes() > 1 << 21


# ---- single changes ----


def test_inputs_grow_and_shrink_back() -> None:
    view = opened("""
main (float[2] x) => (float[2] y) <float low = {0}> { y = Clip (x, low) }""")
    before = view.model.proto.SerializeToString(deterministic=True)
    for limit in (0, None):
        view.model.ledger.limit = limit
        edit = Edit(view, node_of(view, "y"))
        edit.set_input(edit.node, 1, "")
        edit.set_input(edit.node, 2, edit.add_weight(np.float32(9), "high"))
        assert view.apply(edit, "test") == (limit is None)
        verified(view)
        if limit == 0:
            assert view.model.proto.SerializeToString(deterministic=True) == before
    assert list(node_of(view, "y").input) == ["x", "", "high_1"]
    assert view.home("low") is None


def test_attributes_are_set_replaced_and_removed() -> None:
    view = opened("main (float[2] x) => (float[2] y) { y = LeakyRelu <alpha = 0.5> (x) }")
    for value, expected in ((0.25, [0.25]), (None, [])):
        edit = Edit(view, node_of(view, "y"))
        edit.set_attribute(edit.node, "alpha", value)
        before = view.model.proto.SerializeToString(deterministic=True)
        view.model.ledger.limit = 0
        assert not view.apply(edit, "test")
        assert view.model.proto.SerializeToString(deterministic=True) == before
        view.model.ledger.limit = None
        assert view.apply(edit, "test")
        found = [attribute.f for attribute in node_of(view, "y").attribute]
        assert found == expected


def test_a_declared_type_is_corrected() -> None:
    view = declared()
    edit = Edit(view, node_of(view, "b"))
    edit.set_shape("b", 1, ["N", 3])
    assert view.apply(edit, "test")
    dims = view.model.proto.graph.value_info[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, dims[1].dim_value) == ("N", 3)


# ---- scale ----


def chain(size: int) -> ModelProto:
    """`size` nodes: a quarter of them Identity, a quarter dead."""
    nodes = []
    for index in range(size // 4):
        name = f"v{index}"
        nodes.append(make_node("Identity", [name], [f"{name}i"]))
        nodes.append(make_node("Neg", [f"{name}i"], [f"{name}n"]))
        nodes.append(make_node("Abs", [f"{name}n"], [f"v{index + 1}"]))
        nodes.append(make_node("Exp", [f"{name}i"], [f"{name}dead"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [make_tensor_value_info("v0", 1, [2])],
        [make_tensor_value_info(f"v{size // 4}", 1, [2])],
    )
    model: ModelProto = helper.make_model(graph)
    return model


def seconds(size: int) -> float:
    """CPU time of the index, the bypasses and the dead code of such a chain."""
    source = chain(size)
    started = time.process_time()
    model = Model.open(source)
    PassManager(parse_pipeline("identity,dead-code")).run(model)
    taken = time.process_time() - started
    assert len(model.main.nodes()) == size // 2
    assert model.ledger.edits == size // 2
    return taken


def test_time_grows_with_the_size() -> None:
    """Index, 5,000 bypasses and dead code of 20,000 nodes; four times the nodes."""
    small, large = min(seconds(5_000) for _ in range(2)), seconds(20_000)
    print(f"5,000 nodes: {small:.2f} s of CPU; 20,000 nodes: {large:.2f} s")
    assert large < 10 * small  # a quadratic step would show as 16


def test_time_with_a_value_that_all_read() -> None:
    """A value with thousands of readers does not make each edit slow."""

    def star(size: int) -> float:
        nodes = [make_node("Neg", ["x"], ["hub"])]
        for index in range(size):
            nodes.append(make_node("Identity", ["hub"], [f"i{index}"]))
            nodes.append(make_node("Add", [f"i{index}", "hub"], [f"a{index}"]))
        nodes.append(make_node("Sum", [f"a{index}" for index in range(size)], ["y"]))
        value = [make_tensor_value_info(name, 1, [2]) for name in ("x", "y")]
        graph = helper.make_graph(nodes, "star", value[:1], value[1:])
        started = time.process_time()
        model = Model.open(helper.make_model(graph))
        PassManager(parse_pipeline("identity,dead-code")).run(model)
        assert len(model.main.nodes()) == size + 2
        return time.process_time() - started

    small, large = min(star(500) for _ in range(2)), star(2_000)
    print(f"500 readers: {small:.2f} s of CPU; 2,000 readers: {large:.2f} s")
    assert large < 12 * small


def test_an_attribute_keeps_its_place_and_the_subgraphs_their_views() -> None:
    graph = opened()
    branch, chooser = inner(graph, "then"), node_of(graph, "z")
    names = [attribute.name for attribute in chooser.attribute]
    edit = Edit(graph, chooser)
    edit.set_attribute(chooser, "note", 7)
    assert graph.apply(edit, "test")
    assert [attribute.name for attribute in chooser.attribute] == [*names, "note"]
    node = node_of(branch, "p")
    edit = Edit(branch, node)
    edit.bypass(node, {"p": "u"})
    assert branch.apply(edit, "test")
    branch.settle()
    made = [inner_node.op_type for inner_node in chooser.attribute[0].g.node]
    assert made == ["Neg"]
    verifier.verify(graph.model, "test", rebuild=True)


def test_a_subgraph_is_not_set_as_an_attribute() -> None:
    graph = opened()
    edit = Edit(graph, node_of(graph, "z"))
    edit.set_attribute(node_of(graph, "z"), "then_branch", None)
    with pytest.raises(EditError, match="subgraph"):
        graph.apply(edit, "test")


def test_an_edit_does_not_reach_into_other_scopes() -> None:
    graph = opened()
    foreign = node_of(inner(graph, "then"), "u")
    edit = Edit(graph, node_of(graph, "a"))
    for change in (
        lambda: edit.set_input(foreign, 0, "a"),
        lambda: edit.erase(foreign),
        lambda: edit.bypass(foreign, {"u": "b"}),
        lambda: edit.set_attribute(foreign, "k", 1),
        lambda: edit.set_op_type(foreign, "Abs"),
    ):
        with pytest.raises(EditError, match="not one of its nodes"):
            change()


def test_shapes_follow_a_weight_of_another_shape() -> None:
    graph = opened(
        "main (float[1,4] x) => (float[1,n] y) "
        "<float[4,2] W = {1, 2, 3, 4, 5, 6, 7, 8}> { t = MatMul (x, W) y = Neg (t) }"
    )
    assert graph.shape("t") == (1, 2)
    edit = Edit(graph, node_of(graph, "t"))
    edit.set_weight("W", np.ones((4, 3), np.float32))
    assert graph.apply(edit, "test")
    assert graph.shape("t") == (1, 3)
    assert graph.shape("y") == (1, 3)


def refuse_missing_operator(view: GraphView) -> Edit:
    edit = Edit(view, node_of(view, "a"))
    edit.rewrite("Gelu", ["t"])
    return edit


def refuse_missing_domain(view: GraphView) -> Edit:
    edit = Edit(view, node_of(view, "a"))
    edit.rewrite("FusedGemm", ["t"], domain="com.microsoft")
    return edit


@pytest.mark.parametrize("refuse", [refuse_missing_operator, refuse_missing_domain])
def test_no_operator_that_the_model_lacks(refuse: Callable[[GraphView], Edit]) -> None:
    view = opened()
    edit = refuse(view)
    assert not view.apply(edit, "test")
    (skip,) = support.skips(view.model)
    assert "has no Gelu" in skip.reason or "com.microsoft" in skip.reason
    verifier.verify(view.model, "test", rebuild=True)


def test_an_annotation_follows_the_name_of_its_value() -> None:
    proto = model_of(
        "main (float[2] x) => (float[2] y) { a = Relu (x) y = Identity (a) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(1), "scale"))
    annotation = proto.graph.quantization_annotation.add(tensor_name="a")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    model = Model.open(proto)
    PassManager(parse_pipeline("dead-code,identity"), verify_each=True).run(model)
    (kept,) = model.proto.graph.quantization_annotation
    assert kept.tensor_name == "y"
    assert [tensor.name for tensor in model.proto.graph.initializer] == ["scale"]


def test_a_graph_without_outputs_is_left_alone() -> None:
    view = opened("main (float[2] x) => () { a = Relu (x) b = Neg (a) }")
    PassManager(parse_pipeline("dead-code"), verify_each=True).run(view.model)
    assert ops(view) == ["Relu", "Neg"]


# ---- outputs and inputs that move ----


def two_convs() -> Model:
    return Model.open(
        support.parse(
            """<ir_version: 8, opset_import: ["" : 17]>
            main (float[1,2,2,2] x) => (float[1,1,2,2] y)
            <float[3,2,1,1] W = {1,2,3,4,5,6}, float[1,3,1,1] V = {1,2,3}> {
               t = Conv (x, W)
               y = Conv (t, V)
            }"""
        )
    )


def test_shapes_are_inferred_anew_where_the_edit_says_so() -> None:
    model = two_convs()
    graph = model.main
    first, second = graph.nodes()
    assert graph.shape("t") == (1, 3, 2, 2)
    edit = Edit(graph, first)
    edit.set_input(first, 1, edit.add_weight(np.ones((2, 2, 1, 1), np.float32), "W"))
    edit.set_input(second, 1, edit.add_weight(np.ones((1, 2, 1, 1), np.float32), "V"))
    edit.forget_shapes()
    assert graph.apply(edit, "fewer channels")
    assert graph.shape("t") == (1, 2, 2, 2)


def test_an_output_is_diverted_and_made_by_another_node() -> None:
    model = two_convs()
    graph = model.main
    first, second = graph.nodes()
    for subject in (second, first):  # wherever the new node is put at first
        edit = Edit(graph, subject)
        plain = graph.fresh("t")
        maker = graph.producer("t")
        assert maker is not None
        edit.divert(maker, 0, plain)
        edit.insert("Relu", [plain], ["t"])
        assert graph.apply(edit, "something in between")
        model.settle()
        verifier.verify(model, "after it", rebuild=True)
    assert [n.op_type for n in graph.nodes()] == ["Conv", "Relu", "Relu", "Conv"]


def test_a_diverted_output_comes_back_where_the_edit_is_refused() -> None:
    model = two_convs()
    graph = model.main
    before = model.proto.SerializeToString()
    first = graph.nodes()[0]
    edit = Edit(graph, first, max_growth=0)
    edit.divert(first, 0, graph.fresh("t"))
    edit.insert("Relu", [first.output[0]], ["t"])
    assert not graph.apply(edit, "it would read itself")
    graph.settle()
    assert model.proto.SerializeToString() == before


def test_inputs_are_replaced_as_a_whole() -> None:
    model = Model.open(
        support.parse(
            """<ir_version: 8, opset_import: ["" : 17]>
            main (float[1,2] x, float[1,2] z) => (float[1,K] y) {
               y = Concat <axis = 1> (x, z, x)
            }"""
        )
    )
    graph = model.main
    (node,) = graph.nodes()
    edit = Edit(graph, node)
    edit.set_inputs(node, ["z"])
    assert graph.apply(edit, "fewer operands")
    assert list(node.input) == ["z"]
    assert not graph.uses("x")
    verifier.verify(model, "after it", rebuild=True)


def test_before_ir_4_an_input_goes_and_comes_back_with_its_initializer() -> None:
    view = opened(
        """main (float[2] x, float[2] W, float[2] V) => (float[2] y)
        <float[2] W = {1,2}, float[2] V = {3,4}> {
           u = Add (x, W)
           y = Add (x, V)
        }""",
        ir=3,
    )
    graph = view.proto
    assert isinstance(graph, GraphProto)
    before = graph.SerializeToString()
    view.model.ledger = Ledger(limit=0)
    assert not view.apply(erased(view, "u"), "refused")
    view.settle()
    assert graph.SerializeToString() == before
    view.model.ledger = Ledger()
    assert view.apply(erased(view, "u"), "done")
    view.settle()
    assert [value.name for value in graph.input] == ["x", "V"]
    edit = Edit(view, view.producer("y"))
    edit.set_input(edit.node, 1, edit.add_weight(np.ones(2, np.float32), "W", "W"))
    assert view.apply(edit, "the name is free again, and V goes")
    view.settle()
    assert [value.name for value in graph.input] == ["x", "W"]


def erased(view: GraphView, name: str) -> Edit:
    edit = Edit(view, view.producer(name))
    edit.erase(edit.node)
    return edit
