"""GraphView: the facts of the index, scopes and captures, visiting what changed."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto
from onnx.helper import make_node, make_tensor_value_info

from onnxopt.edit import Edit
from onnxopt.errors import InvalidModelError
from onnxopt.graph import GraphView
from onnxopt.model import Model
from tests import support
from tests.support import model_of

NESTED = """
main (float[2] x, bool c) => (float[2] y) <float[2] W = {1, 2}, float k = {3}> {
   t = Neg (x)
   y = If (c) <
      then_branch = a () => (float[2] p) <float k = {4}> {
         u = Mul (t, k)
         p = If (c) <
            then_branch = aa () => (float[2] pp) { pp = Add (u, W) },
            else_branch = ab () => (float[2] pq) { pq = Add (t, k) }
         >
      },
      else_branch = b () => (float[2] q) {
         u = Exp (x)
         q = Mul (u, k)
      }
   >
}"""


def opened(body: str, opset: int = 17, ir: int = 8) -> GraphView:
    """The view of the main graph."""
    return Model.open(model_of(body, opset, ir)).main


def scopes(view: GraphView) -> dict[str, GraphView]:
    """Every scope of the model by the name of its graph."""
    return {inner.proto.name: inner for inner in view.model.views()}


def producer(view: GraphView, name: str) -> NodeProto:
    """The node that makes `name`."""
    node = view.producer(name)
    assert node is not None
    return node


def readers(view: GraphView, name: str) -> set[tuple[str, int, str]]:
    """Who reads a value: the operator, the slot, the scope."""
    return {(u.node.op_type, u.index, u.view.proto.name) for u in view.uses(name)}


# ---- facts ----


def test_producers_and_readers() -> None:
    view = opened(
        """
main (float[2] x) => (float[2] y, float[2] b) <float[2] W = {1, 2}> {
   a, b = Split <axis = 0> (z, s)
   y = Add (a, a)
   u = Mul (a, W)
}""".replace("(float[2] x)", "(float[4] z)").replace(
            "W = {1, 2}", "W = {1, 2}, int64[2] s = {2, 2}"
        )
    )
    assert producer(view, "b").op_type == "Split"
    assert view.producer("z") is None
    assert view.producer("W") is None
    assert readers(view, "a") == {
        ("Add", 0, "main"),
        ("Add", 1, "main"),
        ("Mul", 0, "main"),
    }
    assert view.uses("y") == []
    assert view.is_output("b")
    assert not view.is_output("a")
    assert view.is_used("b")
    assert not view.is_used("u")
    assert view.only_use("a") is None
    only = view.only_use("W")
    assert only is not None
    assert (only.node.op_type, only.index) == ("Mul", 1)
    assert view.only_use("y") is None
    assert view.outputs() == ["y", "b"]


def test_an_output_that_is_read_once_has_two_readers() -> None:
    view = opened("""
main (float[2] x) => (float[2] t, float[2] y) {
   t = Neg (x)
   y = Abs (t)
}""")
    assert view.only_use("t") is None
    assert view.only_use("x") is not None


def test_captures_count_where_the_value_is_defined() -> None:
    view = opened(NESTED)
    found = scopes(view)
    assert readers(view, "t") == {("Mul", 0, "a"), ("Add", 0, "ab")}
    assert readers(view, "W") == {("Add", 1, "aa")}
    assert readers(view, "x") == {("Neg", 0, "main"), ("Exp", 0, "b")}
    assert readers(view, "c") == {("If", 0, "main"), ("If", 0, "a")}
    assert readers(found["a"], "u") == {("Add", 0, "aa")}
    assert readers(found["b"], "u") == {("Mul", 0, "b")}
    assert found["aa"].uses("W") == []
    assert len(found["aa"].home_uses("W")) == 1
    assert set(found["a"].captures()) == {"t", "c", "W"}
    assert found["aa"].only_use_everywhere("W") is not None


def test_the_innermost_definition_is_meant() -> None:
    view = opened(NESTED)
    found = scopes(view)
    assert found["ab"].home("k") is found["a"]
    assert found["b"].home("k") is view
    assert readers(view, "k") == {("Mul", 1, "b")}
    assert readers(found["a"], "k") == {("Mul", 1, "a"), ("Add", 1, "ab")}
    four, three = found["ab"].array("k"), found["b"].array("k")
    assert four is not None
    assert three is not None
    assert (float(four), float(three)) == (4, 3)
    assert found["b"].home("nothing") is None


def test_scopes_know_their_place() -> None:
    view = opened(NESTED)
    found = scopes(view)
    assert set(found) == {"main", "a", "aa", "ab", "b"}
    assert found["aa"].parent is found["a"]
    assert found["aa"].scope == "main/If:y:then_branch/If:p:then_branch"
    owner = found["aa"].owner
    assert owner is not None
    assert owner.output[0] == "p"
    node = producer(found["aa"], "pp")
    assert found["aa"].ancestor(view, node).output[0] == "y"
    assert view.children_of(producer(view, "y")) == [found["a"], found["b"]]


def test_a_branch_that_passes_an_outer_value_on_pins_it() -> None:
    view = opened("""
main (float[2] x, bool c) => (float[2] y) {
   t = Neg (x)
   y = If (c) <
      then_branch = a () => (float[2] t) { u = Abs (x) },
      else_branch = b () => (float[2] q) { q = Exp (x) }
   >
}""")
    assert view.is_used("t")
    assert not view.is_removable(producer(view, "t"))


@pytest.mark.parametrize(
    ("ir", "kind"), [(3, "weight"), (4, "overridable"), (8, "overridable")]
)
def test_an_initializer_that_is_an_input(ir: int, kind: str) -> None:
    body = """
main (float[2] x, float[2] W) => (float[2] y) <float[2] W = {1, 2}> { y = Add (x, W) }"""
    view = opened(body, opset=8, ir=ir)
    assert (view.weight("W") is not None) == (kind == "weight")
    assert view.is_droppable("W") == (kind == "weight")


def test_constants_of_every_kind() -> None:
    view = opened(
        """
main (float[2] x) => (float[2] y) <int4[3] q = {1}> {
   a = Constant <value = float[2] {1, 2}> ()
   b = Constant <value_float = 1.5> ()
   c = Constant <value_floats = [1.0, 2.0]> ()
   d = Constant <value_int = 7> ()
   e = Constant <value_ints = [7, 8]> ()
   f = Constant <value_string = "s"> ()
   g = Constant <value_strings = ["s", "t"]> ()
   y = Neg (x)
}""".replace(" <int4[3] q = {1}>", "")
    )
    values = {name: view.array(name) for name in "abcdefg"}
    shapes = {name: value.shape for name, value in values.items() if value is not None}
    assert shapes == {
        "a": (2,),
        "b": (),
        "c": (2,),
        "d": (),
        "e": (2,),
        "f": (),
        "g": (2,),
    }
    assert values["d"] == 7
    assert view.array("x") is None
    assert view.array("y") is None


def test_operators_and_functions() -> None:
    view = opened("""
main (float[2] x) => (float[2] y) {
   a = local.Neg (x)
   b = other.Neg (a)
   y = Neg (b)
}
<domain: "local", opset_import: ["" : 13]>
Neg (p) => (q) { q = Abs (p) }""")
    ops = [view.op(node) for node in view.nodes()]
    assert ops == ["local::Neg()", "other::Neg", "Neg"]
    body = view.model.functions[0]
    assert body.is_function
    assert (view.opset(), body.opset()) == (17, 13)
    assert not body.holds_initializers
    assert view.opset("nowhere") == 0
    assert view.label(producer(view, "a")) == "Neg:a"


def test_an_old_format_holds_initializers_in_the_main_graph_only() -> None:
    found = scopes(opened(NESTED.replace("c)", "c)", 1), opset=11, ir=4))
    assert all(view.holds_initializers for view in found.values())
    body = """
main (float[2] x, bool c) => (float[2] y) {
   y = If (c) <
      then_branch = a () => (float[2] p) { p = Neg (x) },
      else_branch = b () => (float[2] q) { q = Exp (x) }
   >
}"""
    found = scopes(opened(body, opset=8, ir=3))
    assert {n: v.holds_initializers for n, v in found.items()} == {
        "main": True,
        "a": False,
        "b": False,
    }


def test_fresh_names_are_new_in_every_scope() -> None:
    view = opened(NESTED)
    assert view.fresh("pp") == "pp_1"
    assert view.fresh("pp") == "pp_2"
    assert scopes(view)["b"].fresh("new") == "new"
    assert view.fresh("new") == "new_1"


# ---- order ----


def test_unsorted_nodes_are_sorted_and_said_so() -> None:
    view = opened("""
main (float[2] x, bool c) => (float[2] y) {
   y = Abs (b)
   b = If (c) <
      then_branch = t () => (float[2] p) { p = Abs (a) },
      else_branch = e () => (float[2] q) { q = Exp (x) }
   >
   a = Neg (x)
}""")
    assert [node.output[0] for node in view.nodes()] == ["a", "b", "y"]
    assert view.model.notes == ["main: nodes were not sorted; they are now"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("main (float x) => (float y) { y = Add (x, y) }", "depends on itself"),
        (
            "main (float x) => (float y) { a = Neg (b)\n b = Neg (a)\n y = Neg (a) }",
            "depends on itself",
        ),
        ("main (float x) => (float y) { y = Neg (z) }", "which nothing makes"),
        ("main (float x) => (float y) { z = Neg (x) }", "nothing makes its output 'y'"),
        ("main (float x) => (float y) { y = Neg (x)\n y = Abs (x) }", "defined twice"),
        ("main (float x) => (float x) { x = Neg (x) }", "defined twice"),
    ],
)
def test_graphs_that_make_no_sense(body: str, message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        opened(body)


# ---- shapes ----


def test_shapes_are_inferred_not_believed() -> None:
    proto = model_of("""
main (float[N,3] x) => (float[7] y) {
   t = Transpose (x)
   y = ReduceMax <axes = [1], keepdims = 0> (t)
}""")
    proto.graph.value_info.append(make_tensor_value_info("t", 10, [9]))
    view = Model.open(proto).main
    assert view.shape("t") == (3, "N")
    assert view.dtype("t") == 1
    assert view.shape("y") == (3,)


def test_equal_symbols_are_facts_only_where_one_dim_has_them() -> None:
    view = opened("""
main (float[N,M] x, float[M] z) => (float[N,M] y, float[M] u) {
   y = Neg (x)
   u = Neg (z)
   a = Transpose (x)
   b = Transpose (a)
}""")
    assert view.same_shape("x", "y")
    assert not view.same_shape("x", "z")  # that they share N and M is a promise
    assert view.same_shape("z", "u")
    simple = opened("main (float[N,M] x) => (float[N,M] y) { y = Neg (x) }")
    assert simple.same_shape("x", "y")
    square = opened("main (float[N,N] x) => (float[N,N] y) { y = Neg (x) }")
    assert square.same_shape("x", "y")
    assert square.shape("x") == ("x@0", "x@1")


def test_nothing_is_known_inside_a_function() -> None:
    view = opened("""
main (float[2] x) => (float[2] y) { y = local.f (x) }
<domain: "local", opset_import: ["" : 17]>
f (a) => (b) {
   k = Constant <value = float[2] {1, 2}> ()
   b = Add (a, k)
}""")
    body = view.model.functions[0]
    assert body.shape("a") is None
    assert body.dtype("b") is None
    assert body.shape("k") == (2,)


# ---- visiting ----

CHAIN = """
main (float[2] x) => (float[2] z) {
   a = Neg (x)
   b = Identity (a)
   c = Abs (b)
   d = Exp (c)
   e = Sin (d)
   z = Cos (e)
}"""


def visited(view: GraphView, owner: object, *ops: str) -> list[str]:
    """The outputs of the nodes that a visit gives."""
    return [node.output[0] for node in view.visit(owner, ops)]


def test_a_visit_is_of_all_and_then_of_what_changed() -> None:
    view = opened(CHAIN)
    assert visited(view, "p") == list("abcdez")
    assert visited(view, "p") == []
    assert visited(view, "q", "Abs", "Sin") == ["c", "e"]
    edit = Edit(view, producer(view, "b"))
    edit.bypass(edit.node, {"b": "a"})
    assert view.apply(edit, "test")
    assert set(visited(view, "p")) == {"a", "c", "d"}  # c changed; its neighbours
    assert visited(view, "p") == []
    assert visited(view, "q", "Abs", "Sin") == ["c"]
    assert visited(view, "new") == list("acdez")


def test_edits_during_a_visit_bring_nodes_back() -> None:
    view = opened(CHAIN)
    seen = []
    for node in view.visit("p"):
        seen.append(node.output[0])
        if node.op_type == "Identity":
            edit = Edit(view, node)
            edit.bypass(node, {node.output[0]: node.input[0]})
            assert view.apply(edit, "test")
    assert seen[:2] == ["a", "b"]
    assert sorted(seen[2:]) == ["a", "c", "d", "e", "z"]  # what waits comes once
    assert visited(view, "p") == []


def test_a_node_comes_back_once_it_is_the_only_reader() -> None:
    view = opened("""
main (float[2] x) => (float[2] y) {
   t = Neg (x)
   u = Exp (t)
   y = Abs (t)
}""")
    visited(view, "p")
    edit = Edit(view, producer(view, "u"))
    edit.erase(edit.node)
    assert view.apply(edit, "test")
    assert "y" in visited(view, "p")


def test_a_change_inside_reaches_the_owner_outside() -> None:
    view = opened(NESTED)
    inner = scopes(view)["aa"]
    visited(view, "p")
    edit = Edit(inner, producer(inner, "pp"))
    edit.set_op_type(edit.node, "Mul")
    assert inner.apply(edit, "test")
    assert "y" in visited(view, "p")
    assert visited(inner, "p") == ["pp"]


def test_references_to_function_attributes_are_left_out() -> None:
    view = opened("""
main (float[2] x) => (float[2] y) { y = local.f <alpha = 0.5> (x) }
<domain: "local", opset_import: ["" : 17]>
f <alpha> (a) => (b) {
   c = LeakyRelu <alpha: float = @alpha> (a)
   b = Neg (c)
}""")
    body = view.model.functions[0]
    assert visited(body, "p") == ["b"]
    assert [n.output[0] for n in body.visit("q", references=True)] == ["c", "b"]


def test_a_pass_that_never_settles_is_stopped() -> None:
    view = opened("main (float[2] x) => (float[2] y) { y = Add (x, x) }")

    def turn_for_ever() -> None:
        for node in view.visit("p"):
            edit = Edit(view, node)
            edit.set_op_type(node, "Mul" if node.op_type == "Add" else "Add")
            assert view.apply(edit, "test")

    with pytest.raises(RuntimeError, match="does not settle"):
        turn_for_ever()


def test_settling_removes_what_is_declared_of_dead_values() -> None:
    proto = model_of(CHAIN)
    proto.graph.value_info.append(make_tensor_value_info("b", 1, [2]))
    proto.graph.value_info.append(make_tensor_value_info("c", 1, [2]))
    model = support.run_passes(proto, "identity")
    assert [value.name for value in model.proto.graph.value_info] == ["c"]
    assert [node.op_type for node in model.main.nodes()] == [
        "Neg",
        "Abs",
        "Exp",
        "Sin",
        "Cos",
    ]


def test_purity() -> None:
    view = opened("""
main (float[2] x, bool c) => (float[2] y) {
   a = Neg (x)
   b = other.Draw (x)
   d = If (c) <
      then_branch = t () => (float[2] p) { p = other.Draw (x) },
      else_branch = e () => (float[2] q) { q = Exp (x) }
   >
   f = local.g (x)
   y = Neg (x)
}
<domain: "local", opset_import: ["" : 17, "other" : 1]>
g (a) => (b) { b = other.Draw (a) }""")
    found = {name: view.is_removable(producer(view, name)) for name in "abdfy"}
    assert found == {"a": True, "b": False, "d": False, "f": False, "y": False}


def test_nodes_keep_their_identity_when_sorted() -> None:
    view = opened(CHAIN)
    node = producer(view, "c")
    edit = Edit(view, node)
    name = edit.insert("Neg", ["b"])[0]
    edit.set_input(node, 0, name)
    assert view.apply(edit, "test")
    assert [n.output[0] for n in view.nodes()] == ["a", "b", name, *"cdez"]
    assert producer(view, "c") is node
    assert any(item is node for item in view.proto.node)
    assert view.precedes(producer(view, name), node)
    assert not view.holds(make_node("Neg", ["a"], ["q"]))


def test_weights_are_read_as_arrays() -> None:
    view = opened(NESTED)
    array = view.array("W")
    assert array is not None
    np.testing.assert_array_equal(array, np.array([1, 2], np.float32))
    assert [tensor.name for tensor in view.initializers()] == ["W", "k"]
