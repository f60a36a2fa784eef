"""Names and metadata that can survive the simplifier do, also where it edits.

`test_fidelity` shows that what is not edited stays to the byte; here the model is edited
all around, or the very thing that bears the name is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
)
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array

from onnxopt import attributes
from onnxopt.manager import Context
from tests import support
from tests.simplified import named, nodes, ops, serialized, simplified
from tests.support import model_of
from tests.test_golden import CASES, Case


def props(message: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in message.metadata_props}


def add_props(message: Any, **values: str) -> None:
    for key, value in values.items():
        message.metadata_props.add(key=key, value=value)


def bodies(model: ModelProto) -> Iterator[Sequence[NodeProto]]:
    """The nodes of the main graph and of each function, inner scopes included."""
    yield nodes(model)
    for function in model.functions:
        yield list(attributes.nodes_in(function.node))


def origin(node: NodeProto) -> str:
    return node.output[0] if node.output else "nothing"


def tagged(model: ModelProto) -> ModelProto:
    """The model with a name, a doc string and metadata for each node."""
    for body in bodies(model):
        for node in body:
            node.name = f"node_{origin(node)}"
            node.doc_string = f"doc of {origin(node)}"
            add_props(node, origin=origin(node))
    return model


def assert_tagged(node: NodeProto, source: str) -> None:
    """The node is called, and described, as the one that made `source` was."""
    assert node.name == f"node_{source}"
    assert node.doc_string == f"doc of {source}"
    assert props(node) == {"origin": source}


# ---- nodes, pass by pass ----

MERGED = {
    "fold-batch-norm": (
        "agraph (float[N,2,4,4] x) => (float[N,3,4,4] y)"
        "<float[3,2,1,1] w = {1,2,3,4,5,6}, float[3] g = {1,2,3}, float[3] b = {0,1,2}>"
        "{ t = Conv (x, w) n = BatchNormalization (t, g, b, b, g) y = Relu (n) }",
        {"t": "Conv", "y": "Relu"},
    ),
    "fold-batch-norm-before": (
        "agraph (float[N,2,4,4] x) => (float[N,3,4,4] y)"
        "<float[3,2,1,1] w = {1,2,3,4,5,6}, float[2] g = {1,2}, float[2] b = {0,1}>"
        "{ t = BatchNormalization (x, g, b, b, g) c = Conv (t, w) y = Relu (c) }",
        {"c": "Conv", "y": "Relu"},
    ),
    "fold-scale": (
        "agraph (float[N,2] x) => (float[N,2] y)"
        "<float[2,2] w = {1,2,3,4}, float[2] g = {2,3}>"
        "{ t = MatMul (x, w) m = Mul (t, g) y = Relu (m) }",
        {"t": "MatMul", "y": "Relu"},
    ),
    "fold-pad": (
        "agraph (float[N,1,4,4] x) => (float[N,1,4,4] y)"
        "<float[1,1,3,3] w = {1,2,3,4,5,6,7,8,9}, int64[8] p = {0,0,1,1,0,0,1,1}>"
        "{ q = Pad (x, p) c = Conv (q, w) y = Relu (c) }",
        {"c": "Conv", "y": "Relu"},
    ),
    "reshape-chain": (
        "agraph (float[N,4,6] x) => (float[N,24] y)"
        "<int64[4] s = {0,2,2,6}, int64[2] f = {0,-1}>"
        "{ a = Reshape (x, s) b = Reshape (a, f) y = Relu (b) }",
        {"b": "Reshape", "y": "Relu"},
    ),
    "reshape-chain-of-squeezes": (
        "agraph (float[N,1,4,1] x) => (float[?,?] y)"
        "<int64[1] one = {1}, int64[1] last = {2}>"
        "{ a = Squeeze (x, one) b = Squeeze (a, last) y = Relu (b) }",
        {"b": "*", "y": "Relu"},
    ),
    "transpose": (
        "agraph (float[N,2,3,4] x) => (float[?,?,?,?] y)"
        "{ a = Transpose <perm = [0,2,3,1]> (x) b = Transpose <perm = [0,2,3,1]> (a)"
        "  y = Relu (b) }",
        {"b": "Transpose", "y": "Relu"},
    ),
    "transpose-undone": (
        "agraph (float[N,2,3] x) => (float[?,?,?] y)"
        "{ r = Relu (x) a = Transpose <perm = [0,2,1]> (r)"
        "  b = Transpose <perm = [0,2,1]> (a) y = Exp (b) }",
        {"r": "Relu", "y": "Exp"},
    ),
    "cse": (
        "agraph (float[N] x) => (float[N] y)"
        "{ a = Exp (x) b = Exp (x) c = Sin (a) d = Cos (b) y = Mul (c, d) }",
        {"a": "Exp", "c": "Sin", "d": "Cos", "y": "Mul"},
    ),
    "fuse-operators": (
        "agraph (float[N,4] x) => (float[N,4] y) <float r = {1.4142135}, float one = {1},"
        " float h = {0.5}>"
        "{ u = Div (x, r) e = Erf (u) p = Add (e, one) m = Mul (x, p) g = Mul (m, h)"
        "  y = Relu (g) }",
        {"g": "Gelu", "y": "Relu"},
    ),
    "merge-elementwise": (
        "agraph (float[N] x) => (float[N] y)"
        "<float a = {0}, float b = {6}, float c = {4}>"
        "{ s = Clip (x, a, b) t = Min (s, c) y = Exp (t) }",
        {"t": "Clip", "y": "Exp"},
    ),
    "matmul-to-gemm": (
        "agraph (float[N,2] x) => (float[N,2] y)"
        "<float[2,2] w = {1,2,3,4}, float[2] b = {2,3}>"
        "{ t = MatMul (x, w) m = Add (t, b) y = Relu (m) }",
        {"m": "Gemm", "y": "Relu"},
    ),
    "slice-chain": (
        "agraph (float[10,10] x) => (float[?,?] y)"
        "<int64[1] one = {1}, int64[1] e = {9}, int64[1] z = {0}>"
        "{ a = Slice (x, one, e, z) b = Slice (a, one, e, one) y = Relu (b) }",
        {"b": "Slice", "y": "Relu"},
    ),
    "concat-chain": (
        "agraph (float[N] x, float[N] z) => (float[?] y)"
        "{ a = Concat <axis = 0> (x, z) b = Concat <axis = 0> (a, x) y = Relu (b) }",
        {"b": "Concat", "y": "Relu"},
    ),
    "cast-chain": (
        "agraph (float16[N] x) => (double[N] y)"
        "{ a = Cast <to = 1> (x) b = Cast <to = 11> (a) y = Floor (b) }",
        {"b": "Cast", "y": "Floor"},
    ),
    "no-op": (
        "agraph (float[N] x) => (float[N] y) <float one = {1}>"
        "{ a = Exp (x) b = Mul (a, one) c = Identity (b) y = Sin (c) }",
        {"a": "Exp", "y": "Sin"},
    ),
    "div-to-mul": (
        "agraph (float[N] x) => (float[N] y) <float two = {2}>"
        "{ a = Div (x, two) y = Sin (a) }",
        {"a": "Mul", "y": "Sin"},
    ),
    "constant-chain": (
        "agraph (float[N] x) => (float[N] y) <float two = {2}, float three = {3}>"
        "{ a = Mul (x, two) b = Mul (a, three) y = Sin (b) }",
        {"b": "Mul", "y": "Sin"},
    ),
    "fold-gather": (
        "agraph (float[N,2,4,4] x) => (float[N,3,4,4] y)"
        "<float[3,2,1,1] w = {1,2,3,4,5,6}, int64[3] i = {2,0,1}>"
        "{ t = Conv (x, w) g = Gather <axis = 1> (t, i) y = Relu (g) }",
        {"g": "*", "y": "Relu"},
    ),
}
"""Bodies, and what operator makes which value in the result ("*": any)."""


@pytest.mark.parametrize("name", MERGED)
def test_a_node_is_called_as_the_one_whose_output_it_makes(name: str) -> None:
    """A merged node has the name, doc string and metadata of the one that survives."""
    body, expected = MERGED[name]
    made = simplified(tagged(model_of(body, opset=20, ir=9)))
    found = {node.output[0]: node.op_type for node in nodes(made)}
    assert found.keys() == expected.keys(), found
    for node in nodes(made):
        assert expected[node.output[0]] in ("*", node.op_type)
        if name == "fold-gather" and node.op_type == "Conv":
            assert_tagged(node, "t")  # the same Conv, with the name that is read
        else:
            assert_tagged(node, node.output[0])


def test_a_node_that_takes_over_an_output_keeps_its_name() -> None:
    """The Conv makes `y` in place of the BatchNormalization, and is the same Conv."""
    source = model_of("""
        agraph (float[N,2,4,4] x) => (float[N,3,4,4] y)
        <float[3,2,1,1] w = {1,2,3,4,5,6}, float[3] g = {1,2,3}, float[3] b = {0,1,2}> {
            t = Conv (x, w)
            y = BatchNormalization (t, g, b, b, g)
        }""")
    (node,) = nodes(simplified(tagged(source)))
    assert node.output[0] == "y"
    assert_tagged(node, "t")


@pytest.mark.parametrize("where", ["then_branch", "else_branch"])
def test_nodes_that_move_out_of_an_if_keep_names_and_metadata(where: str) -> None:
    value = int(where == "then_branch")
    source = tagged(
        model_of(f"""
        agraph (float[N] x) => (float[N] y) <bool c = {{{value}}}> {{
            a = Exp (x)
            r = If (c) <
                then_branch = one () => (float[N] t) {{ p = Abs (a) t = Sin (p) }},
                else_branch = two () => (float[N] e) {{ q = Sin (a) e = Abs (q) }}
            >
            y = Cos (r)
        }}""")
    )
    made = simplified(source)
    inner = ["p", "t"] if where == "then_branch" else ["q", "e"]
    assert [props(node)["origin"] for node in made.graph.node] == ["a", *inner, "y"]
    for node in made.graph.node:
        assert_tagged(node, props(node)["origin"])


def test_a_new_node_has_the_metadata_of_the_one_it_comes_from() -> None:
    """HardSwish where the opset lacks it: a HardSigmoid before the Mul."""
    source = tagged(
        model_of(
            """
        agraph (float[N,4] x) => (float[N,4] y)
        <float three = {3}, float lo = {0}, float hi = {6}> {
            a = Add (x, three)
            c = Clip (a, lo, hi)
            m = Mul (x, c)
            y = Div (m, hi)
        }""",
            opset=13,
        )
    )
    made = simplified(source)
    assert ops(made) == ["HardSigmoid", "Mul"]
    first, last = made.graph.node
    assert props(first) == {"origin": "y"}
    assert first.name == "node_y_HardSigmoid"
    assert_tagged(last, "y")


def group(case: Case) -> str:
    return case.pass_name


@pytest.mark.parametrize(
    "cases",
    [list(cases) for _, cases in groupby(CASES, group)],
    ids=lambda cases: cases[0].pass_name,
)
def test_no_pass_leaves_a_node_without_name_and_metadata(
    cases: list[Case], context: Context
) -> None:
    """In all golden cases: each node stems from one of the source, and says so."""
    for case in cases:
        source = tagged(case.model())
        known = {node.name: node for body in bodies(source) for node in body}
        made = support.final(case.run(source, context))
        for node in (node for body in bodies(made) for node in body):
            if node.op_type == "Constant" and not node.name:
                continue  # a new weight of a scope that holds no initializers
            assert node.name, case.name
            assert f"node_{props(node)['origin']}" in known, case.name
            if node.name in known:
                assert props(node) == props(known[node.name]), case.name
                assert node.doc_string == known[node.name].doc_string, case.name


# ---- constants ----

LIFTED = """
    agraph (float[N,2] x) => (float[N,2] y) {
        k = Constant <value = float[2] {3, 4}> ()
        i = Identity (x)
        y = Max (i, k)
    }"""


def test_a_constant_node_hands_its_doc_string_and_metadata_on() -> None:
    made = simplified(tagged(model_of(LIFTED)))
    (tensor,) = made.graph.initializer
    assert tensor.name == "k"
    assert tensor.doc_string == "doc of k"
    assert props(tensor) == {"origin": "k"}


def test_the_tensor_of_a_constant_keeps_its_own() -> None:
    source = tagged(model_of(LIFTED))
    value = source.graph.node[0].attribute[0].t
    value.doc_string = "its own"
    add_props(value, unit="m")
    (tensor,) = simplified(source).graph.initializer
    assert tensor.doc_string == "its own"
    assert props(tensor) == {"unit": "m", "origin": "k"}


def test_a_folded_weight_keeps_name_doc_string_and_metadata() -> None:
    source = model_of(MERGED["fold-batch-norm"][0])
    weight = source.graph.initializer[0]
    weight.doc_string = "the kernel"
    add_props(weight, unit="m")
    made = simplified(source)
    found = next(t for t in made.graph.initializer if t.name == "w")
    assert found.doc_string == "the kernel"
    assert props(found) == {"unit": "m"}
    assert not np.array_equal(to_array(found), to_array(weight))


def test_a_folded_value_keeps_its_name() -> None:
    source = model_of("""
        agraph (float[N,2] x) => (float[N,3] y) <float[3,2] w = {1,2,3,4,5,6}> {
            w_t = Transpose <perm = [1, 0]> (w)
            m = MatMul (x, w_t)
            y = Relu (m)
        }""")
    source.graph.value_info.append(
        make_tensor_value_info("w_t", TensorProto.FLOAT, [2, 3], doc_string="turned")
    )
    made = simplified(source)
    assert [tensor.name for tensor in made.graph.initializer] == ["w_t"]
    assert [v.doc_string for v in made.graph.value_info] == ["turned"]


def test_of_equal_weights_the_first_keeps_its_metadata() -> None:
    source = model_of("""
        agraph (float[N] x) => (float[N] y) <float a = {3}, float b = {3}> {
            m = Max (x, a)
            s = Sin (m)
            y = Max (s, b)
        }""")
    for tensor in source.graph.initializer:
        add_props(tensor, origin=tensor.name)
    (tensor,) = simplified(source).graph.initializer
    assert (tensor.name, props(tensor)) == ("a", {"origin": "a"})


# ---- the model around an edit ----

EDITED = """
    agraph (float[N,2] x, bool[N] b, bool c) => (float[N,2] y, float[N,2] z)
    <float[2] w = {3, 4}, float one = {1}> {
        i = Identity (x)
        e = Exp (i)
        m = Mul (e, one)
        a = Abs (m)
        r = If (c) <
            then_branch = then_graph () => (float[N,2] t) {
                t1 = Sin (a)
                t2 = Sin (a)
                t = Mul (t1, t2)
            },
            else_branch = else_graph () => (float[N,2] f) { j = Dropout (a) f = Cos (j) }
        >
        y = Max (r, w)
        z = local.twice (a)
    }
    <domain: "local", opset_import: ["" : 17]>
    twice (p) => (q) { h = Identity (p) q = Add (h, h) }
    """


def edited() -> ModelProto:
    """A model that the simplifier edits in all of its scopes."""
    return model_of(EDITED, ir=10)


def branches(model: ModelProto) -> list[GraphProto]:
    node = next(node for node in model.graph.node if node.op_type == "If")
    return [attribute.g for attribute in node.attribute]


def test_the_model_is_edited_in_all_scopes() -> None:
    made = simplified(edited())
    assert ops(made) == ["Abs", "Cos", "Exp", "If", "Max", "Mul", "Sin", "twice"]
    assert [node.op_type for node in made.functions[0].node] == ["Add"]


Kept = tuple[Callable[[ModelProto], None], Callable[[ModelProto], Any]]


def set_fields(message: Any, **values: Any) -> None:
    for key, value in values.items():
        setattr(message, key, value)


def value_of(model: ModelProto, field: str, name: str) -> Any:
    return next(v for v in getattr(model.graph, field) if v.name == name)


def declare(graph: Any, name: str) -> None:
    value = graph.value_info.add(name=name, doc_string=f"about {name}")
    value.type.CopyFrom(
        helper.make_tensor_type_proto(TensorProto.FLOAT, ["Batch", 2], ["BATCH", "C"])
    )
    add_props(value, key="value")


def declare_ends(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = f"about {value.name}"
        value.type.denotation = "TENSOR"
        add_props(value, key="value")
        for dim in value.type.tensor_type.shape.dim:
            dim.denotation = "DATA_BATCH"


def add_training(model: ModelProto) -> None:
    training = model.training_info.add()
    training.algorithm.name = "algorithm"
    training.algorithm.node.append(make_node("Identity", ["w"], ["w_next"]))
    training.algorithm.output.append(
        make_tensor_value_info("w_next", TensorProto.FLOAT, [2])
    )
    training.update_binding.add(key="w", value="w_next")
    training.initialization.name = "initialization"
    training.initialization.node.append(
        make_node("RandomNormal", [], ["w_start"], shape=[2])
    )
    training.initialization.output.append(
        make_tensor_value_info("w_start", TensorProto.FLOAT, [2])
    )
    training.initialization_binding.add(key="w", value="w_start")


def annotate(model: ModelProto) -> None:
    for name in ("a", "w", "y"):
        annotation = model.graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    model.graph.initializer.append(from_array(np.float32(0.5), "scale"))


def place_nodes(model: ModelProto) -> None:
    model.configuration.add(name="pair", num_devices=2, device=["gpu:0", "gpu:1"])
    for node in model.graph.node:
        made = node.device_configurations.add(configuration_id="pair", pipeline_stage=1)
        for name in (*node.input, *node.output):
            spec = made.sharding_spec.add(tensor_name=name, device=[0, 1])
            spec.sharded_dim.add(axis=0)


def add_unused_function(model: ModelProto) -> None:
    function: FunctionProto = model.functions.add(name="unused", domain="other")
    function.input.append("p")
    function.output.append("q")
    function.node.append(make_node("Neg", ["p"], ["q"], name="inside"))
    function.opset_import.add(domain="", version=17)
    model.opset_import.add(domain="other", version=1)


def add_overloads(model: ModelProto) -> None:
    for overload in ("one", "two"):
        function = model.functions.add(name="many", domain="local", overload=overload)
        function.input.append("p")
        function.output.append("q")
        function.node.append(make_node("Identity", ["p"], ["h"]))
        function.node.append(make_node("Neg", ["h"], ["q"]))
        function.opset_import.add(domain="", version=17)
    for number, overload in enumerate(("one", "two")):
        call = make_node("many", ["a"], [f"call{number}"], domain="local")
        call.overload = overload
        model.graph.node.append(call)
        model.graph.output.append(
            make_tensor_value_info(f"call{number}", TensorProto.FLOAT, ["N", 2])
        )


def describe_function(model: ModelProto) -> None:
    function = model.functions[0]
    function.doc_string = "about the function"
    function.attribute.append("alpha")
    function.attribute_proto.add(name="beta", type=1, f=0.5)
    function.opset_import.add(domain="never.used", version=3)
    add_props(function, key="value")
    declare(function, "q")


def function_of(model: ModelProto) -> FunctionProto:
    """The function with what stands in its nodes left out."""
    kept = FunctionProto()
    kept.CopyFrom(model.functions[0])
    del kept.node[:]
    return kept


def add_sparse(model: ModelProto) -> None:
    sparse = SparseTensorProto(dims=[2])
    sparse.values.CopyFrom(from_array(np.array([5], dtype=np.float32), "thin"))
    sparse.indices.CopyFrom(from_array(np.array([1])))
    model.graph.sparse_initializer.append(sparse)
    model.graph.node.append(make_node("Min", ["a", "thin"], ["u"]))
    model.graph.output.append(make_tensor_value_info("u", TensorProto.FLOAT, ["N", 2]))


def add_unknown(model: ModelProto) -> None:
    inner = helper.make_graph(
        [make_node("Thing", ["a"], ["g2"], domain="com.acme")],
        "inner",
        [],
        [make_tensor_value_info("g2", TensorProto.FLOAT, None)],
    )
    made = make_node(
        "Foo",
        ["a", "", "w"],
        ["foo", "", "bar"],
        domain="com.acme",
        body=inner,
        alpha=[1.5],
    )
    made.doc_string = "what it is"
    model.graph.node.append(made)
    model.opset_import.add(domain="com.acme", version=7)


def describe_branches(model: ModelProto) -> None:
    for graph in branches(model):
        graph.doc_string = f"about {graph.name}"
        add_props(graph, key=graph.name)
        declare(graph, graph.output[0].name)
        graph.output[0].doc_string = "its output"


def around_nodes(graph: GraphProto) -> GraphProto:
    kept = GraphProto()
    kept.CopyFrom(graph)
    del kept.node[:]
    return kept


KEPT: dict[str, Kept] = {
    "model-doc-string": (
        lambda m: set_fields(m, doc_string="line\nline"),
        lambda m: m.doc_string,
    ),
    "model-metadata": (lambda m: add_props(m, key="ü", empty=""), props),
    "producer": (
        lambda m: set_fields(m, producer_name="someone", producer_version="1.2"),
        lambda m: (m.producer_name, m.producer_version),
    ),
    "domain-and-version": (
        lambda m: set_fields(m, domain="org.example", model_version=7),
        lambda m: (m.domain, m.model_version, m.ir_version),
    ),
    "opset-imports": (
        lambda m: m.opset_import.extend(
            [helper.make_opsetid("com.unused", 9), helper.make_opsetid("ai.onnx.ml", 3)]
        ),
        lambda m: [(entry.domain, entry.version) for entry in m.opset_import],
    ),
    "graph": (
        lambda m: (
            set_fields(m.graph, doc_string="about the graph", name="its name"),
            add_props(m.graph, key="value"),
        ),
        lambda m: (m.graph.name, m.graph.doc_string, props(m.graph)),
    ),
    "branches": (describe_branches, lambda m: [around_nodes(g) for g in branches(m)]),
    "inputs-and-outputs": (
        declare_ends,
        lambda m: [*m.graph.input, *m.graph.output],
    ),
    "value-info": (
        lambda m: declare(m.graph, "a"),
        lambda m: value_of(m, "value_info", "a"),
    ),
    "training-info": (
        add_training,
        lambda m: (
            list(m.training_info),
            [t for t in m.graph.initializer if t.name == "w"],
        ),
    ),
    "quantization-annotations": (
        annotate,
        lambda m: (
            sorted(serialized(item) for item in m.graph.quantization_annotation),
            [t for t in m.graph.initializer if t.name in ("w", "scale")],
        ),
    ),
    "device-configurations": (place_nodes, lambda m: list(m.configuration)),
    "unused-functions": (
        add_unused_function,
        lambda m: (m.functions[1], len(m.functions)),
    ),
    "overloads": (
        add_overloads,
        lambda m: (
            [(f.name, f.domain, f.overload) for f in m.functions],
            [node.overload for node in nodes(m) if node.op_type == "many"],
        ),
    ),
    "function": (describe_function, function_of),
    "sparse-initializers": (
        add_sparse,
        lambda m: (list(m.graph.sparse_initializer), m.graph.node[-1]),
    ),
    "unknown-operators": (
        add_unknown,
        lambda m: next(node for node in m.graph.node if node.op_type == "Foo"),
    ),
}
"""What is added to the model, and what of it has to be the same afterwards."""

DOES_NOT_RUN = ("sparse-initializers", "unknown-operators", "overloads")


@pytest.mark.parametrize("name", KEPT)
def test_what_the_model_says_survives_edits(name: str) -> None:
    add, read = KEPT[name]
    source = edited()
    add(source)
    checks = name not in ("training-info", "unknown-operators")
    made = simplified(source, runs=name not in DOES_NOT_RUN, checks=checks)
    assert len(nodes(made)) < len(nodes(source))
    assert read(made) == read(source)


def test_every_kind_at_once_survives_edits() -> None:
    source = edited()
    for add, _ in KEPT.values():
        add(source)
    made = simplified(source, runs=False, checks=False)
    for name, (_, read) in KEPT.items():
        if name == "sparse-initializers":
            assert list(made.graph.sparse_initializer) == list(
                source.graph.sparse_initializer
            )
        else:
            assert read(made) == read(source), name


# ---- what moves with an edit ----


def test_a_sparse_constant_is_kept() -> None:
    sparse = SparseTensorProto(dims=[2])
    sparse.values.CopyFrom(from_array(np.array([5], dtype=np.float32)))
    sparse.indices.CopyFrom(from_array(np.array([1])))
    source = model_of("""
        agraph (float[N,2] x) => (float[N,2] y) { i = Identity (x) y = Max (i, k) }""")
    source.graph.node.insert(0, make_node("Constant", [], ["k"], sparse_value=sparse))
    simplified(source)


def test_a_quantization_annotation_follows_the_value_that_takes_its_place() -> None:
    source = model_of("""
        agraph (float[N] x) => (float[N] y) { e = Exp (x) y = Identity (e) }""")
    source.graph.quantization_annotation.add(tensor_name="e")
    made = simplified(source)
    assert [a.tensor_name for a in made.graph.quantization_annotation] == ["y"]


def test_what_is_declared_in_a_branch_moves_out_with_it() -> None:
    source = model_of("""
        agraph (float[N,2] x) => (float[N,2] y) <bool yes = {1}> {
            r = If (yes) <
                then_branch = one () => (float[N,2] t) { p = Abs (x) t = Sin (p) },
                else_branch = two () => (float[N,2] e) { e = Neg (x) }
            >
            y = Cos (r)
        }""")
    declare(source.graph.node[0].attribute[0].g, "p")
    made = simplified(source)
    assert value_of(made, "value_info", "p").doc_string == "about p"
    assert props(value_of(made, "value_info", "p")) == {"key": "value"}


def test_a_merged_node_runs_where_the_one_whose_output_survives_did() -> None:
    source = model_of(MERGED["reshape-chain"][0], opset=20, ir=10)
    place_nodes(source)
    made = simplified(source)
    merged = made.graph.node[0]
    assert merged.op_type == "Reshape"
    (found,) = merged.device_configurations
    assert (found.configuration_id, found.pipeline_stage) == ("pair", 1)
    assert {s.tensor_name for s in found.sharding_spec} <= {*merged.input, *merged.output}
    assert "b" in {spec.tensor_name for spec in found.sharding_spec}


def test_a_rewritten_node_runs_where_it_did() -> None:
    source = model_of(MERGED["fuse-operators"][0], opset=20, ir=10)
    place_nodes(source)
    made = simplified(source)
    gelu = next(node for node in made.graph.node if node.op_type == "Gelu")
    (found,) = gelu.device_configurations
    assert (found.configuration_id, found.pipeline_stage) == ("pair", 1)
    assert [spec.tensor_name for spec in found.sharding_spec] == ["g"]


def test_functions_that_are_called_keep_names_of_their_nodes() -> None:
    source = tagged(edited())
    made = simplified(source)
    (add,) = made.functions[0].node
    assert_tagged(add, "q")
    assert named(made, "node_z").op_type == "twice"


def test_domains_told_as_ai_onnx_stay_so() -> None:
    source = model_of(
        "agraph (float[N] x) => (float[N] y) { i = Identity (x) y = Exp (i) }"
    )
    source.opset_import[0].domain = "ai.onnx"
    for node in source.graph.node:
        node.domain = "ai.onnx"
    made = simplified(source, checks=False)  # onnx's checker does not know the alias
    assert ops(made) == ["Exp"]
    assert made.graph.node[0].domain == "ai.onnx"
    assert made.opset_import[0].domain == "ai.onnx"
