"""What is not edited survives to the byte: one feature of the format a test.

Each feature is added to a model in which the default pipeline finds one thing to do (an
Identity), and nothing that the feature brings along. So the empty pipeline has to give
the model that went in, and the default one the model that the feature makes of the same
graph without the Identity.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from google.protobuf.message import Message
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    helper,
    numpy_helper,
)

import onnxopt
from onnxopt.model import Model
from onnxopt.save import stage
from onnxopt.weights import place, tensors

WIDTH = 2000
CUSTOM = "test.custom"
UNKNOWN = b"\xfa\x3f\x03new\xf8\x3f\x85\x01\xfd\x3f1234\xf9\x3f12345678"
"""Fields that onnx does not know, one of each wire type."""

Feature = Callable[[ModelProto], None]
FEATURES: dict[str, Feature] = {}


def feature(function: Feature) -> Feature:
    FEATURES[function.__name__] = function
    return function


def base(edited: bool = False) -> ModelProto:
    """x -> Relu -> Identity -> Add of a weight -> y; without the Identity if `edited`."""
    middle = [] if edited else [helper.make_node("Identity", ["r"], ["i"], name="copy")]
    weight = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"], name="first"),
            *middle,
            helper.make_node("Add", ["r" if edited else "i", "w"], ["y"], name="second"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", WIDTH])],
        [numpy_helper.from_array(weight, "w")],
        value_info=[helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", WIDTH])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(CUSTOM, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=onnx.IR_VERSION)


def node(model: ModelProto, op_type: str = "Add") -> NodeProto:
    return next(item for item in model.graph.node if item.op_type == op_type)


def keep(model: ModelProto, *names: str, **attributes: Any) -> NodeProto:
    """Let a node of an unknown operator read values: it is never removed."""
    number = sum(item.op_type == "Keep" for item in model.graph.node)
    made = helper.make_node("Keep", names, [f"kept{number}"], domain=CUSTOM, **attributes)
    return append(model.graph, made)


def append(graph: GraphProto, made: NodeProto) -> NodeProto:
    graph.node.append(made)
    return graph.node[-1]


def add_props(message: Any, key: str = "key") -> None:
    message.metadata_props.add(key=key, value="välue")
    message.metadata_props.add(key="empty", value="")


def tensor_type(kind: int = TensorProto.FLOAT) -> TypeProto:
    return helper.make_tensor_type_proto(kind, ["N", 3])


# ---- the model ----


@feature
def model_metadata(model: ModelProto) -> None:
    add_props(model)


@feature
def model_doc_string(model: ModelProto) -> None:
    model.doc_string = "line\nline\0größe"


@feature
def producer_domain_and_version(model: ModelProto) -> None:
    model.producer_name, model.producer_version = "someone", "1.2"
    model.domain, model.model_version = "org.example", -7


@feature
def fields_that_are_there_but_empty(model: ModelProto) -> None:
    model.producer_name = model.doc_string = ""
    model.model_version = 0
    model.graph.doc_string = node(model).doc_string = node(model).domain = ""


@feature
def opset_imports_of_unknown_domains(model: ModelProto) -> None:
    for domain, version in (("com.acme", 999), ("ai.onnx.ml", 3), ("", 18)):
        if domain:
            model.opset_import.add(domain=domain, version=version)


@feature
def model_device_configurations(model: ModelProto) -> None:
    model.configuration.add(name="two", num_devices=2, device=["gpu:0", "gpu:1"])


@feature
def training_information(model: ModelProto) -> None:
    info = model.training_info.add()
    info.initialization.name = "initialization"
    info.initialization.node.append(
        helper.make_node("Constant", [], ["start"], value_float=0.5)
    )
    info.algorithm.name = "algorithm"
    info.algorithm.node.append(helper.make_node("Identity", ["w"], ["w_new"]))
    info.algorithm.initializer.append(numpy_helper.from_array(np.ones(3), "rate"))
    info.initialization_binding.add(key="w", value="start")
    info.update_binding.add(key="w", value="w_new")
    info.update_binding.add(key="step", value="rate")  # the graph itself never reads it
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3), "step"))


# ---- the graph ----


@feature
def graph_metadata(model: ModelProto) -> None:
    add_props(model.graph)


@feature
def graph_doc_string_and_odd_name(model: ModelProto) -> None:
    model.graph.doc_string, model.graph.name = "about the graph", "a name: with/ odd ü"


@feature
def quantization_annotations(model: ModelProto) -> None:
    note = model.graph.quantization_annotation.add(tensor_name="r")
    for key, value in (("SCALE_TENSOR", "scale"), ("ZERO_POINT_TENSOR", "zero")):
        note.quant_parameter_tensor_names.add(key=key, value=value)
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    zero = numpy_helper.from_array(np.uint8(3), "zero")
    model.graph.initializer.extend([scale, zero])


# ---- nodes ----


@feature
def node_metadata(model: ModelProto) -> None:
    add_props(node(model))


@feature
def node_doc_string(model: ModelProto) -> None:
    node(model, "Relu").doc_string = "about the node"


@feature
def unnamed_nodes(model: ModelProto) -> None:
    node(model).ClearField("name")
    node(model, "Relu").name = ""


@feature
def standard_domain_spelled_out(model: ModelProto) -> None:
    node(model).domain = "ai.onnx"
    model.opset_import.add(domain="ai.onnx", version=18)


@feature
def unknown_operators(model: ModelProto) -> None:
    made = keep(model, "r", alpha=1.5, names=["a", "b"])
    made.doc_string = "what it does, nobody knows"
    made.output.append("second_output")


@feature
def empty_optional_inputs_and_outputs(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Clip", ["r", "", "w0"], ["clipped"]))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(6), "w0"))
    made = keep(model, "clipped", "", "")
    made.output[:] = ["", "second_of_two", ""]


@feature
def node_device_configurations(model: ModelProto) -> None:
    model.configuration.add(name="pair", num_devices=2)
    made = node(model, "Relu").device_configurations.add(
        configuration_id="pair", pipeline_stage=1
    )
    spec = made.sharding_spec.add(tensor_name="r", device=[-1, 1])
    spec.index_to_device_group_map.add(key=-1, value=[0, 1])
    dim = spec.sharded_dim.add(axis=1)
    dim.simple_sharding.add(dim_value=WIDTH, num_shards=2)
    dim.simple_sharding.add(dim_param="N", num_shards=2)


@feature
def attributes_of_every_type(model: ModelProto) -> None:
    tensor = numpy_helper.from_array(np.arange(3), "inside")
    sparse = sparse_tensor("inner sparse")
    graph = GraphProto(name="inside")
    graph.node.append(helper.make_node("Odd", [], ["inner_odd"], domain=CUSTOM))
    graph.output.add(name="inner_odd")
    keep(
        model,
        "r",
        a_float=0.1,
        an_int=-(1 << 62),
        a_string=b"\xff not utf-8",
        a_tensor=tensor,
        a_graph=graph,
        a_sparse_tensor=sparse,
        a_type=tensor_type(),
        floats=[0.1, float("nan")],
        ints=[1, -1],
        strings=[b"", b"\xff"],
        tensors=[tensor, tensor],
        sparse_tensors=[sparse],
        types=[tensor_type(), tensor_type(TensorProto.INT4)],
    )
    made = model.graph.node[-1]
    made.attribute.add(name="graphs", type=AttributeProto.GRAPHS).graphs.append(graph)
    made.attribute.add(name="no_ints", type=AttributeProto.INTS)
    made.attribute[0].doc_string = "about the attribute"


@feature
def nan_payloads_in_attributes(model: ModelProto) -> None:
    made = keep(model, "r").attribute.add(name="nan", type=AttributeProto.FLOAT)
    made.MergeFromString(b"\x15\x01\x00\xa0\xff")


# ---- inputs, outputs, value_info ----


@feature
def value_metadata_and_doc_strings(model: ModelProto) -> None:
    graph = model.graph
    for value in (graph.input[0], graph.output[0], graph.value_info[0]):
        value.doc_string = f"about {value.name}"
        add_props(value)


@feature
def denotations(model: ModelProto) -> None:
    graph = model.graph
    for value in (graph.input[0], graph.output[0], graph.value_info[0]):
        value.type.denotation = "IMAGE"
        value.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"


def add_input(model: ModelProto, name: str, type_: TypeProto | None) -> None:
    """An input, read by a node and handed on as an output of the same type."""
    model.graph.input.add(name=name)
    model.graph.output.add(name=f"{name}_out")
    if type_ is not None:
        model.graph.input[-1].type.CopyFrom(type_)
        model.graph.output[-1].type.CopyFrom(type_)
    keep(model, name).output[0] = f"{name}_out"


@feature
def sequence_inputs(model: ModelProto) -> None:
    add_input(model, "sequence", helper.make_sequence_type_proto(tensor_type()))


@feature
def map_inputs(model: ModelProto) -> None:
    made = helper.make_map_type_proto(TensorProto.STRING, tensor_type())
    add_input(model, "map", made)


@feature
def optional_inputs(model: ModelProto) -> None:
    inner = helper.make_sequence_type_proto(tensor_type())
    add_input(model, "optional", helper.make_optional_type_proto(inner))


@feature
def sparse_inputs(model: ModelProto) -> None:
    made = helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, ["N", 3])
    add_input(model, "sparse_input", made)


@feature
def opaque_inputs(model: ModelProto) -> None:
    made = TypeProto(opaque_type=TypeProto.Opaque(domain="org.example", name="thing"))
    add_input(model, "opaque", made)


@feature
def shapes_of_every_kind(model: ModelProto) -> None:
    kinds: dict[str, list[Any] | None] = {
        "rank_unknown": None,
        "scalar": [],
        "zero": [0],
        "negative": [-1, 3],
        "nothing_said": [None],
        "symbols": ["N", "a + b", "?"],
    }
    for name, dims in kinds.items():
        add_input(model, name, helper.make_tensor_type_proto(TensorProto.INT8, dims))
    add_input(model, "no_type", None)
    add_input(model, "no_element_type", TypeProto(tensor_type=TypeProto.Tensor()))


@feature
def inputs_nobody_reads(model: ModelProto) -> None:
    model.graph.input.add(name="unread").type.CopyFrom(tensor_type())


@feature
def inputs_that_are_outputs(model: ModelProto) -> None:
    model.graph.input.add(name="through").type.CopyFrom(tensor_type())
    model.graph.output.add(name="through").type.CopyFrom(tensor_type())


@feature
def value_info_of_weights_and_without_type(model: ModelProto) -> None:
    model.graph.value_info.add(name="w").type.CopyFrom(
        helper.make_tensor_type_proto(TensorProto.FLOAT, [WIDTH])
    )
    keep(model, "r").output[0] = "untyped"
    model.graph.value_info.add(name="untyped", doc_string="type unknown")


# ---- weights ----


def add_weight(model: ModelProto, tensor: TensorProto) -> TensorProto:
    model.graph.initializer.append(tensor)
    keep(model, tensor.name)
    return model.graph.initializer[-1]


@feature
def weight_metadata_and_doc_strings(model: ModelProto) -> None:
    model.graph.initializer[0].doc_string = "about the weight"
    add_props(model.graph.initializer[0])
    small = add_weight(model, numpy_helper.from_array(np.arange(3), "small"))
    small.doc_string = "about the small weight"
    add_props(small)


@feature
def weights_with_defaults_spelled_out(model: ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.DEFAULT
    small = add_weight(model, numpy_helper.from_array(np.arange(5), "default"))
    small.data_location = TensorProto.DEFAULT


@feature
def weights_that_callers_may_override(model: ModelProto) -> None:
    add_weight(model, numpy_helper.from_array(np.ones(2000), "overridable"))
    made = helper.make_tensor_value_info("overridable", TensorProto.DOUBLE, [2000])
    model.graph.input.append(made)


@feature
def string_weights(model: ModelProto) -> None:
    items = ["größe".encode(), b"", b"nul\0", b"\xff\xfe", b"x" * 5000]
    tensor = TensorProto(name="strings", data_type=TensorProto.STRING, dims=[5])
    tensor.string_data.extend(items)
    add_weight(model, tensor)


@feature
def scalars_and_empty_weights(model: ModelProto) -> None:
    for name, shape in (("scalar_w", ()), ("empty_w", (0,)), ("flat_w", (3, 0, 2))):
        add_weight(model, numpy_helper.from_array(np.ones(shape, np.float16), name))
    bare = TensorProto(name="no_payload", data_type=TensorProto.FLOAT, dims=[0])
    add_weight(model, bare)


@feature
def large_typed_fields(model: ModelProto) -> None:
    values = np.arange(3000, dtype=np.float32)
    add_weight(model, helper.make_tensor("typed_floats", 1, [3000], values))


def sparse_tensor(name: str) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.array([1.5, 2.5], np.float32), name)
    indices = numpy_helper.from_array(np.array([3, 7]), "")
    return helper.make_sparse_tensor(values, indices, [4, 5])


@feature
def sparse_initializers(model: ModelProto) -> None:
    made = sparse_tensor("sparse")
    made.values.doc_string = "about the values"
    add_props(made.values)
    model.graph.sparse_initializer.append(made)
    keep(model, "sparse")


@feature
def constants_with_sparse_values(model: ModelProto) -> None:
    made = helper.make_node("Constant", [], ["sparse_constant"])
    made.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
    made.attribute[0].sparse_tensor.CopyFrom(sparse_tensor(""))
    model.graph.node.append(made)
    keep(model, "sparse_constant")


def constants_of_every_kind(model: ModelProto) -> None:
    values: dict[str, Any] = {
        "value": numpy_helper.from_array(np.arange(3000), "a name inside"),
        "value_float": 0.1,
        "value_floats": [0.1, float("nan")],
        "value_int": -1,
        "value_ints": [1, 2],
        "value_string": b"one",
        "value_strings": [b"", b"two"],
    }
    for name, value in values.items():
        made = helper.make_node("Constant", [], [f"constant_{name}"], **{name: value})
        add_props(append(model.graph, made))
        keep(model, f"constant_{name}")


def _payload(dtype: int, count: int) -> TensorProto:
    dtype_name = TensorProto.DataType.Name(dtype)
    array = np.zeros(count, helper.tensor_dtype_to_np_dtype(dtype))
    tensor = numpy_helper.from_array(array, f"w_{dtype_name}_{count}")
    random = np.random.default_rng(dtype)
    size = len(tensor.raw_data)
    tensor.raw_data = random.integers(0, 2, size, np.uint8).tobytes()
    return tensor


def _dtype_feature(name: str, dtype: int) -> None:
    def raw(model: ModelProto) -> None:
        for count in (5, 5000):  # kept inline, left in the file
            add_weight(model, _payload(dtype, count))

    def typed(model: ModelProto) -> None:
        tensor = TensorProto(name=f"typed_{name}", data_type=dtype, dims=[4])
        width = 2 if name.startswith("COMPLEX") else 1
        packed = {"INT4": 2, "UINT4": 2, "FLOAT4E2M1": 2, "INT2": 1, "UINT2": 1}
        entries = packed.get(name, 4 * width)
        getattr(tensor, helper.tensor_dtype_to_field(dtype)).extend([1] * entries)
        add_weight(model, tensor)

    FEATURES[f"raw_{name}"], FEATURES[f"typed_{name}"] = raw, typed


for _name, _dtype in TensorProto.DataType.items():
    if _name not in ("UNDEFINED", "STRING"):
        _dtype_feature(_name, _dtype)


# ---- subgraphs ----


def branch(name: str, *nodes: NodeProto) -> GraphProto:
    graph = GraphProto(name=name)
    graph.node.extend(nodes)
    graph.output.add(name=nodes[-1].output[0]).type.CopyFrom(tensor_type())
    return graph


def add_if(model: ModelProto, then: GraphProto, otherwise: GraphProto) -> None:
    name = f"condition{len(model.graph.input)}"
    model.graph.input.add(name=name).type.CopyFrom(
        helper.make_tensor_type_proto(TensorProto.BOOL, [])
    )
    output = f"{name}_chosen"
    made = helper.make_node(
        "If", [name], [output], then_branch=then, else_branch=otherwise
    )
    model.graph.node.append(made)
    keep(model, output)


@feature
def nested_subgraphs(model: ModelProto) -> None:
    inner = branch("inner", helper.make_node("Neg", ["r"], ["n1"], doc_string="deep"))
    other = branch("other", helper.make_node("Odd", ["then_w"], ["n2"], domain=CUSTOM))
    nested = helper.make_node(
        "If", ["flag"], ["n3"], then_branch=inner, else_branch=other
    )
    then = branch("then", nested)
    then.initializer.append(numpy_helper.from_array(np.ones(2000), "then_w"))
    then.initializer[0].doc_string = "a weight of a branch"
    then.value_info.add(name="n3", doc_string="declared inside")
    then.doc_string = "about the branch"
    add_props(then)
    add_props(then.node[0])
    model.graph.input.add(name="flag").type.CopyFrom(
        helper.make_tensor_type_proto(TensorProto.BOOL, [])
    )
    add_if(model, then, branch("else", helper.make_node("Exp", ["r"], ["n4"])))


@feature
def branches_that_hand_on_outer_values(model: ModelProto) -> None:
    then = GraphProto(name="hands on")
    then.output.add(name="r").type.CopyFrom(tensor_type())
    add_if(model, then, branch("sin", helper.make_node("Sin", ["r"], ["s1"])))


@feature
def loops_with_state_and_captures(model: ModelProto) -> None:
    body = GraphProto(name="body")
    for name in ("step", "go", "state"):
        body.input.add(name=name)
    body.node.append(helper.make_node("Add", ["state", "r"], ["state_next"]))
    body.node.append(helper.make_node("Odd", ["go"], ["go_next"], domain=CUSTOM))
    for name in ("go_next", "state_next"):
        body.output.add(name=name)
    made = helper.make_node("Loop", ["", "", "w"], ["looped"], body=body)
    model.graph.node.append(made)
    keep(model, "looped")


# ---- functions ----


def add_function(model: ModelProto, name: str, *nodes: NodeProto) -> FunctionProto:
    """A function of one input and output, called on the middle of the model."""
    made: FunctionProto = model.functions.add(name=name, domain=CUSTOM)
    made.input.append("a")
    made.output.append(nodes[-1].output[0])
    made.node.extend(nodes)
    made.opset_import.add(domain="", version=18)
    call = helper.make_node(name, ["r"], [f"{name}_called"], domain=CUSTOM)
    model.graph.node.append(call)
    keep(model, f"{name}_called")
    return made


@feature
def functions_with_attributes(model: ModelProto) -> None:
    leaky = helper.make_node("LeakyRelu", ["a"], ["t"])
    leaky.attribute.add(name="alpha", type=AttributeProto.FLOAT, ref_attr_name="slope")
    elu = helper.make_node("Elu", ["t"], ["u"])
    elu.attribute.add(name="alpha", type=AttributeProto.FLOAT, ref_attr_name="given")
    made = add_function(model, "with_attributes", leaky, elu)
    made.attribute.append("given")
    made.attribute_proto.append(helper.make_attribute("slope", 0.25))
    made.attribute_proto[0].doc_string = "about the default"
    call = next(n for n in model.graph.node if n.op_type == "with_attributes")
    call.attribute.append(helper.make_attribute("given", 2.0))


@feature
def function_metadata_and_value_info(model: ModelProto) -> None:
    body = [helper.make_node("Neg", ["a"], ["t"]), helper.make_node("Exp", ["t"], ["u"])]
    made = add_function(model, "with_metadata", *body)
    made.doc_string = "about the function"
    add_props(made)
    add_props(made.node[0])
    made.node[1].doc_string = "about its node"
    made.value_info.add(name="t", doc_string="declared").type.CopyFrom(tensor_type())
    add_props(made.value_info[0])


@feature
def function_overloads(model: ModelProto) -> None:
    for overload, op_type in (("one", "Neg"), ("two", "Abs")):
        made = add_function(model, "twofold", helper.make_node(op_type, ["a"], ["t"]))
        made.overload = overload
        call = model.graph.node[-2]
        call.overload = overload
        call.output[0] = f"twofold_{overload}"
        model.graph.node[-1].input[0] = f"twofold_{overload}"


@feature
def large_constants_of_functions_and_branches(model: ModelProto) -> None:
    """Their payloads are left in the file, and stream into the copy."""
    values = numpy_helper.from_array(np.arange(3000.0), "a name inside")
    constant = helper.make_node("Constant", [], ["k"], value=values, doc_string="large")
    product = helper.make_node("Mul", ["a", "k"], ["t"])
    add_function(model, "with_constant", constant, product)
    inner = branch("holds", helper.make_node("Odd", ["r"], ["o1"], domain=CUSTOM))
    inner.node[0].attribute.append(helper.make_attribute("large", values))
    add_if(model, inner, branch("tan", helper.make_node("Tan", ["r"], ["t1"])))


@feature
def functions_that_call_functions(model: ModelProto) -> None:
    add_function(model, "callee", helper.make_node("Neg", ["a"], ["t"]))
    call = helper.make_node("callee", ["a"], ["t"], domain=CUSTOM)
    made = add_function(model, "caller", call)
    made.opset_import.add(domain=CUSTOM, version=1)


@feature
def functions_nobody_calls(model: ModelProto) -> None:
    """Whether they go is for a pass to say; the default pipeline has none that does."""
    add_function(model, "uncalled", helper.make_node("Neg", ["a"], ["t"]))
    del model.graph.node[-2:]


# ---- the tests ----


@pytest.fixture(params=[*FEATURES, "constants_of_every_kind"])
def source(request: pytest.FixtureRequest) -> ModelProto:
    """A model with one feature, or with what the default pipeline rewrites."""
    model = base()
    FEATURES.get(request.param, constants_of_every_kind)(model)
    return model


def serialized(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def assert_same(found: ModelProto, expected: ModelProto) -> None:
    """Equal to the byte; without pytest's diff, which takes minutes for this much."""
    for one, other in ((found.graph, expected.graph), (found, expected)):
        if serialized(one) != serialized(other):
            pytest.fail(difference(one, other))


def difference(found: Message, expected: Message) -> str:
    """The first lines of the text form that differ."""
    texts = [str(message).splitlines() for message in (found, expected)]
    lines = difflib.unified_diff(*texts, "found", "expected", n=1, lineterm="")
    return "\n".join(line[:200] for line in itertools.islice(lines, 40))


def test_a_file_is_copied_to_the_byte(source: ModelProto, tmp_path: Path) -> None:
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    path.write_bytes(source.SerializeToString())
    with stage(Model.open(path), out) as staged:
        staged.commit()
    assert_same(ModelProto.FromString(out.read_bytes()), source)
    result = onnxopt.optimize(path, passes="", validate=False)
    result.save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()
    assert_same(result.model, source)
    assert ModelProto.FromString(path.read_bytes()) == source


def test_a_proto_is_copied_to_the_byte(source: ModelProto) -> None:
    before = serialized(source)
    result = onnxopt.optimize(source, passes="", validate=False)
    assert_same(result.model, source)
    assert result.model is not source
    assert serialized(source) == before


@pytest.mark.parametrize("name", FEATURES)
def test_the_default_pipeline_edits_only_what_it_says(
    name: str,
) -> None:
    source, expected = base(), base(edited=True)
    FEATURES[name](source)
    FEATURES[name](expected)
    result = onnxopt.optimize(source, validate=False)
    assert sum(entry.edits for entry in result.report.passes) == 1
    assert_same(result.model, expected)


GS_CANNOT = {
    "attributes_of_every_type",
    "function_overloads",  # lost, so that two functions have one name
    "map_inputs",
    "opaque_inputs",
    "optional_inputs",
    "shapes_of_every_kind",
}
"""Features on which onnx-graphsurgeon's own import or export raises."""


@pytest.mark.parametrize("name", sorted(FEATURES.keys() - GS_CANNOT))
def test_a_graphsurgeon_graph_comes_back_as_it_is(name: str) -> None:
    """What its import and export lose is lost before and after; no more than that."""
    model = base()
    FEATURES[name](model)
    graph = gs.import_onnx(model)
    before = serialized(gs.export_onnx(gs.import_onnx(model)))
    made = onnxopt.optimize(graph, passes="", validate=False).model
    assert isinstance(made, gs.Graph)
    assert serialized(gs.export_onnx(made)) == before
    assert serialized(gs.export_onnx(graph)) == before


def test_a_graphsurgeon_graph_stays_as_it_is() -> None:
    """Its export alone would rename the protobuf that it came from, and note domains."""
    model = everything_gs_takes()
    graph = gs.import_onnx(model)
    before = serialized(model)
    domains = list(graph.import_domains)
    next(t for t in graph.tensors().values() if t.name == "w").name = "renamed"
    graph.nodes[0].domain = "new.domain"
    result = onnxopt.optimize(graph, passes="", validate=False)
    assert "renamed" in result.model.tensors()
    assert serialized(model) == before
    assert list(graph.import_domains) == domains


def everything_gs_takes() -> ModelProto:
    model = base()
    for name in sorted(FEATURES.keys() - GS_CANNOT):
        FEATURES[name](model)
    return model


# ---- other storage, other formats ----


def outside(source: ModelProto, path: Path) -> ModelProto:
    """Write the model with its weights in a file beside it; returns what is written."""
    copied = ModelProto.FromString(source.SerializeToString())
    onnx.save(
        copied, path, save_as_external_data=True, size_threshold=0, location="w.bin"
    )
    return onnx.load(path, load_external_data=False)


def without_places(model: ModelProto) -> ModelProto:
    """The model with the external data entries gone: a copy has others."""
    copied = ModelProto.FromString(model.SerializeToString())
    for tensor in tensors(copied):
        tensor.ClearField("external_data")
    return copied


def test_external_data_stays_external_and_to_the_byte(
    source: ModelProto, tmp_path: Path
) -> None:
    written = outside(source, tmp_path / "in.onnx")
    out = tmp_path / "out"
    out.mkdir()
    result = onnxopt.optimize(tmp_path / "in.onnx", passes="", validate=False)
    result.save(out / "m.onnx")
    made = onnx.load(out / "m.onnx", load_external_data=False)
    assert_same(without_places(made), without_places(written))
    before, after = Model.open(tmp_path / "in.onnx"), Model.open(out / "m.onnx")
    for old, new in zip(tensors(written), tensors(made), strict=True):
        if old.data_type != TensorProto.STRING:
            assert after.weights.read(new) == before.weights.read(old)
            assert (place(new) is None) == (place(old) is None)
    (tmp_path / "w.bin").unlink(missing_ok=True)
    onnx.load(out / "m.onnx")


def test_external_data_of_a_proto_comes_inline(
    source: ModelProto, tmp_path: Path
) -> None:
    written = outside(source, tmp_path / "in.onnx")
    result = onnxopt.optimize(written, passes="", validate=False, base_dir=tmp_path)
    made = result.model
    for tensor in tensors(written):
        if place(tensor) is not None:
            tensor.ClearField("data_location")
            tensor.raw_data = Model.open(source).weights.read(_named(source, tensor))
            tensor.ClearField("external_data")
    assert_same(made, written)


def _named(model: ModelProto, tensor: TensorProto) -> TensorProto:
    """The tensor of the same name, dims and type."""
    for other in tensors(model):
        same = other.dims == tensor.dims and other.data_type == tensor.data_type
        if same and other.name == tensor.name:
            return other
    raise AssertionError(tensor.name)


def old_format(edited: bool = False) -> ModelProto:
    """IR 3: every initializer is an input as well."""
    model = base(edited)
    model.ir_version = 3
    del model.opset_import[:]
    model.opset_import.add(domain="", version=8)
    model.graph.input.append(
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [WIDTH])
    )
    return model


def test_ir_3() -> None:
    result = onnxopt.optimize(old_format(), passes="", validate=False)
    assert_same(result.model, old_format())
    result = onnxopt.optimize(old_format(), validate=False)
    assert_same(result.model, old_format(edited=True))


def test_what_is_said_of_a_value_goes_with_it() -> None:
    source, expected = base(), base(edited=True)
    made = helper.make_tensor_value_info("i", TensorProto.FLOAT, ["N", WIDTH])
    source.graph.value_info.append(made)
    source.graph.quantization_annotation.add(tensor_name="i")
    assert_same(onnxopt.optimize(source, validate=False).model, expected)


def sharded(edited: bool) -> ModelProto:
    """The Add says how its inputs and output are spread over devices."""
    model = base(edited)
    made = node(model).device_configurations.add(configuration_id="pair")
    for name in ("r" if edited else "i", "w", "y"):
        made.sharding_spec.add(tensor_name=name, device=[0, 1])
    return model


def test_sharding_follows_the_input_that_it_is_about() -> None:
    result = onnxopt.optimize(sharded(edited=False), validate=False)
    assert_same(result.model, sharded(edited=True))
    refused = onnxopt.optimize(sharded(edited=False), validate=False, bisect_limit=0)
    assert_same(refused.model, sharded(edited=False))


def test_a_pipeline_that_edits_does_not_touch_what_came_in(tmp_path: Path) -> None:
    model = everything()
    onnxopt.optimize(model, validate=False)
    assert_same(model, everything())
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString())
    onnxopt.optimize(path, validate=False)
    assert path.read_bytes() == model.SerializeToString()


# ---- all at once ----


def everything(edited: bool = False) -> ModelProto:
    """One model that has every feature."""
    model = base(edited)
    for add in FEATURES.values():
        add(model)
    return model


def messages(message: Message, key: str = "") -> Iterator[tuple[str, Message]]:
    """Every message in a model with the field that it stands in; outer ones first."""
    yield key, message
    for field, value in message.ListFields():
        if field.message_type is not None:
            inner = f"{message.DESCRIPTOR.name}.{field.name}"
            for item in value if hasattr(value, "extend") else (value,):
                yield from messages(item, inner)


def first_of_each(model: ModelProto) -> dict[str, Message]:
    found: dict[str, Message] = {}
    for key, message in messages(model):
        found.setdefault(key, message)
    return found


def fields_of(descriptor: Any, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Every field of a message type, and of the types in it."""
    if descriptor.full_name not in seen:
        seen.add(descriptor.full_name)
        for field in descriptor.fields:
            yield descriptor.name, field.name
            if field.message_type is not None:
                yield from fields_of(field.message_type, seen)


def test_there_is_a_feature_for_every_field_of_the_format() -> None:
    """A new version of onnx that adds a field has to come with a test of it."""
    used = {
        (message.DESCRIPTOR.name, field.name)
        for _, message in messages(everything())
        for field, _ in message.ListFields()
    }
    there = set(fields_of(ModelProto.DESCRIPTOR, set()))
    segment = {("TensorProto", "segment"), ("Segment", "begin"), ("Segment", "end")}
    external = {("TensorProto", "external_data")}
    assert there - used == segment | external


def test_all_features_at_once(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    path.write_bytes(everything().SerializeToString())
    result = onnxopt.optimize(path, passes="", validate=False)
    assert_same(result.model, everything())
    result = onnxopt.optimize(path, validate=False)
    assert_same(result.model, everything(edited=True))


@pytest.mark.parametrize("key", first_of_each(everything()))
def test_unknown_fields_survive(key: str, tmp_path: Path) -> None:
    model = everything()
    first_of_each(model)[key].MergeFromString(UNKNOWN)
    assert UNKNOWN in model.SerializeToString()
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    path.write_bytes(model.SerializeToString())
    with stage(Model.open(path), out) as staged:
        staged.commit()
    assert_same(ModelProto.FromString(out.read_bytes()), model)
    assert_same(onnxopt.optimize(model, passes="", validate=False).model, model)


def test_unknown_fields_survive_an_edit_elsewhere() -> None:
    made = []
    for edited in (False, True):
        model = everything(edited)
        for message in first_of_each(model).values():
            message.MergeFromString(UNKNOWN)
        made.append(model)
    result = onnxopt.optimize(made[0], validate=False)
    assert_same(result.model, made[1])
