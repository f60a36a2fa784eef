"""What `diff` says of two models: every kind of difference, and what is none."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.cli import cli
from onnxopt.differences import Differences, diff
from onnxopt.errors import InvalidModelError, UsageError

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n,3] x) => (float[n,3] y) <float[3] w = {1.5, -2, 0.25}> {
    m = Mul(x, w)
    c = Constant<value = float[3] {1, 2, 3}>()
    a = Add(m, c)
    l = LeakyRelu<alpha = 0.5>(a)
    y = Relu(l)
}"""
BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (bool b, float[3] x) => (float[3] y) {
    s = Sin(x)
    y = If(b) <then_branch = t () => (float[3] p) { q = Abs(s) p = Neg(q) },
               else_branch = e () => (float[3] r) { r = Exp(s) }>
}"""
FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[3] x) => (float[3] y) { y = local.f(x) }
<opset_import: ["" : 17], domain: "local">
f (a) => (c) { b = Abs(a) c = Neg(b) }"""
Edit = Callable[[ModelProto], object]


def parse(text: str) -> ModelProto:
    model: ModelProto = onnx.parser.parse_model(text)
    return model


def edited(edit: Edit, text: str = TEXT) -> Differences:
    """A model and a copy of it after `edit`."""
    a, b = parse(text), parse(text)
    edit(b)
    return diff(a, b)


def only(found: Differences, *kinds: str) -> None:
    """Nothing but differences of these kinds was found."""
    names = ("nodes", "order", "weights", "interface", "metadata")
    assert [name for name in names if getattr(found, name)] == list(kinds)
    assert found.equal == (not kinds)


def node_lines(found: Differences) -> list[str]:
    return [f"{c.node} {c.change}: {'; '.join(c.details)}" for c in found.nodes]


# ---- nodes ----


@pytest.mark.parametrize("text", [TEXT, BRANCHES, FUNCTION])
def test_equal_models(text: str) -> None:
    found = edited(lambda _: None, text)
    only(found)
    assert found.notes == []


def test_an_operator() -> None:
    found = edited(lambda m: m.graph.node[4].__setattr__("op_type", "Sigmoid"))
    only(found, "nodes")
    (change,) = found.nodes
    assert (change.op, change.matched) == ("Relu", "output")
    assert change.details == ["operator: Relu -> Sigmoid"]


def test_attributes() -> None:
    def edit(model: ModelProto) -> None:
        model.graph.node[3].attribute[0].f = 0.25

    assert node_lines(edited(edit)) == [
        "LeakyRelu:l changed: attribute alpha: 0.5 -> 0.25"
    ]
    found = edited(lambda m: m.graph.node[3].ClearField("attribute"))
    assert node_lines(found) == ["LeakyRelu:l changed: attribute alpha: 0.5 -> none"]


def test_an_attribute_that_changes_its_type() -> None:
    def edit(model: ModelProto) -> None:
        node = model.graph.node[0]
        node.attribute.append(helper.make_attribute("k", 1.0))

    def other(model: ModelProto) -> None:
        model.graph.node[0].attribute.append(helper.make_attribute("k", 1))

    a, b = parse(TEXT), parse(TEXT)
    edit(a)
    other(b)
    assert node_lines(diff(a, b)) == ["Mul:m changed: attribute k: 1.0 -> 1"]


def test_minus_zero_and_nan_in_an_attribute() -> None:
    def with_alpha(value: float) -> ModelProto:
        model = parse(TEXT)
        model.graph.node[3].attribute[0].f = value
        return model

    assert diff(with_alpha(np.nan), with_alpha(np.nan)).equal
    assert node_lines(diff(with_alpha(0.0), with_alpha(-0.0))) == [
        "LeakyRelu:l changed: attribute alpha: 0.0 -> -0.0"
    ]


def test_a_tensor_in_an_attribute() -> None:
    def fill(value: float) -> ModelProto:
        model = parse(
            '<ir_version: 8, opset_import: ["" : 17]> g (int64[1] x) => (float[n] y) '
            "{ y = ConstantOfShape(x) }"
        )
        tensor = numpy_helper.from_array(np.array([value], np.float32), "v")
        attribute = helper.make_attribute("value", tensor)
        model.graph.node[0].attribute.append(attribute)
        return model

    assert diff(fill(np.nan), fill(np.nan)).equal
    assert node_lines(diff(fill(1), fill(3))) == [
        "ConstantOfShape:y changed: attribute value: 1 of 1 elements differ, by up to 2"
    ]


def test_inputs() -> None:
    found = edited(lambda m: m.graph.node[4].input.__setitem__(0, "a"))
    assert node_lines(found) == ["Relu:y changed: input 0: l -> a"]


def test_a_node_more_and_a_node_less() -> None:
    def edit(model: ModelProto) -> None:
        model.graph.node.insert(0, helper.make_node("Sin", ["x"], ["s"]))

    found = edited(edit)
    only(found, "nodes")
    (change,) = found.nodes
    assert (change.node, change.other, change.change) == (None, "Sin:s", "only in B")

    def skip(model: ModelProto) -> None:
        del model.graph.node[3]
        model.graph.node[3].input[0] = "a"

    assert node_lines(edited(skip)) == [
        "LeakyRelu:l only in A: ",
        "Relu:y changed: input 0: l -> a",
    ]


def test_the_name_doc_string_and_metadata_of_a_node() -> None:
    def edit(model: ModelProto) -> None:
        node = model.graph.node[0]
        node.name, node.doc_string = "mul", "doc"
        node.metadata_props.add(key="k", value="v")

    (change,) = edited(edit).nodes
    assert change.change == "changed"
    assert change.details == [
        "doc_string: '' -> doc",
        "metadata_props k: none -> v",
        "name: '' -> 'mul'",
    ]


def test_renamed_only() -> None:
    def edit(model: ModelProto) -> None:
        """Every inner value has another name."""
        new = {name: f"{name}_new" for name in ("m", "a", "l", "c", "w")}
        model.graph.initializer[0].name = new["w"]
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [new.get(name, name) for name in names]

    found = edited(edit)
    only(found, "nodes", "weights")
    assert {change.change for change in (*found.nodes, *found.weights)} == {"renamed"}
    assert [change.op for change in found.nodes] == ["Mul", "Add", "LeakyRelu"]
    assert {change.matched for change in found.nodes} == {"structure"}
    assert {change.name: change.other for change in found.weights} == {
        "w": "w_new",
        "c": "c_new",
    }


def test_renamed_constants_are_told_apart_by_value() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y) {
        one = Constant<value = float[2] {1, 2}>()
        two = Constant<value = float[2] {3, 4}>()
        m = Mul(x, one)
        y = Add(m, two)
    }"""
    # the other order of the two, under names that say nothing
    other = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y) {
        k1 = Constant<value = float[2] {3, 4}>()
        k2 = Constant<value = float[2] {1, 2}>()
        m = Mul(x, k2)
        y = Add(m, k1)
    }"""
    found = diff(parse(text), parse(other))
    assert not found.nodes
    assert {c.name: (c.other, c.change) for c in found.weights} == {
        "one": ("k2", "renamed"),
        "two": ("k1", "renamed"),
    }
    assert found.order == ["main"]


def test_a_renamed_constant_with_another_value_is_another_one() -> None:
    def edit(model: ModelProto) -> None:
        _, constant, add, *_ = model.graph.node
        constant.output[0] = add.input[1] = "c9"
        constant.attribute[0].t.float_data[0] = 9

    found = edited(edit)
    assert [(c.name, c.change) for c in found.weights] == [
        ("c", "only in A"),
        ("c9", "only in B"),
    ]
    assert node_lines(found) == ["Add:a changed: input 1: c -> c9"]


def test_a_changed_node_in_a_renamed_chain_is_found_by_position() -> None:
    def edit(model: ModelProto) -> None:
        mul, _, add, leaky, relu = model.graph.node
        mul.output[0] = add.input[0] = "m2"
        add.output[0] = leaky.input[0] = "a2"
        leaky.output[0] = relu.input[0] = "l2"
        add.input[1] = "x"

    found = edited(edit)
    by_label = {change.node: change for change in found.nodes}
    assert by_label["Add:a"].matched == "position"
    assert by_label["Add:a"].details[0] == "input 1: c -> x"
    assert by_label["LeakyRelu:l"].change == "renamed"
    assert by_label["Mul:m"].change == "renamed"


def test_order_alone() -> None:
    def edit(model: ModelProto) -> None:
        constant = model.graph.node[1]
        copy = onnx.NodeProto()
        copy.CopyFrom(constant)
        del model.graph.node[1]
        model.graph.node.insert(0, copy)

    found = edited(edit)
    only(found, "order")
    assert found.order == ["main"]


# ---- scopes ----


def test_inside_a_branch() -> None:
    def edit(model: ModelProto) -> None:
        branch = next(a for a in model.graph.node[1].attribute if a.name == "then_branch")
        branch.g.node[0].op_type = "Sqrt"

    found = edited(edit, BRANCHES)
    only(found, "nodes")
    (change,) = found.nodes
    assert change.scope == "main/If:y:then_branch"
    assert change.details == ["operator: Abs -> Sqrt"]


def test_captured_names_that_are_renamed_outside() -> None:
    def edit(model: ModelProto) -> None:
        model.graph.node[0].output[0] = "s2"
        for attribute in model.graph.node[1].attribute:
            node = attribute.g.node[0]
            node.input[0] = "s2"

    found = edited(edit, BRANCHES)
    only(found, "nodes")
    assert node_lines(found) == ["Sin:s renamed: output 0: s -> s2"]


def test_inside_a_function() -> None:
    def edit(model: ModelProto) -> None:
        model.functions[0].node[0].op_type = "Sqrt"
        model.functions[0].doc_string = "doc"

    found = edited(edit, FUNCTION)
    only(found, "nodes", "metadata")
    assert found.nodes[0].scope == "function local::f"
    assert found.metadata[0].what == "function local::f: doc_string"


def test_a_function_that_is_gone() -> None:
    found = edited(lambda m: m.functions.pop(), FUNCTION)
    assert any(
        (change.node, change.op, change.change) == ("local::f", "function", "only in A")
        for change in found.nodes
    )


# ---- weights ----


def holding(array: Any, name: str = "w") -> ModelProto:
    """A model with one weight, which nothing reads."""
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]> g (float x) => (float y) '
        "{ y = Relu(x) }"
    )
    is_tensor = isinstance(array, TensorProto)
    tensor = array if is_tensor else numpy_helper.from_array(np.asarray(array), name)
    model.graph.initializer.append(tensor)
    return model


def values(a: Any, b: Any) -> tuple[int, int, int, float | None] | None:
    """(changed, same value, nonfinite, max_abs) of weights, None where equal."""
    found = diff(holding(a), holding(b))
    if found.equal:
        return None
    only(found, "weights")
    (change,) = found.weights
    got = change.values
    assert got is not None
    assert got.elements == np.asarray(a).size
    return got.changed, got.same_value, got.nonfinite, got.max_abs


FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats(dtype: Any) -> None:
    one = np.array([1, -2, 0.25, np.nan, np.inf, 0, 0], dtype)
    assert values(one, one.copy()) is None
    two = np.array([1, -2.5, 0.5, np.nan, np.inf, 0, 1], dtype)
    assert values(one, two) == (3, 0, 0, 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_zero_differs_in_bits(dtype: Any) -> None:
    one, two = np.array([0.0, 1], dtype), np.array([-0.0, 1], dtype)
    assert values(one, two) == (1, 1, 0, None)


def test_kinds_of_nan_differ_in_bits() -> None:
    one = np.array([0x7FC00000, 0x3F800000], np.uint32).view(np.float32)
    two = np.array([0x7FC00001, 0x3F800000], np.uint32).view(np.float32)
    assert values(one, one) is None
    assert values(one, two) == (1, 1, 0, None)


def test_differences_that_are_no_number() -> None:
    one = np.array([1, np.nan, np.inf, 3], np.float32)
    two = np.array([np.nan, 1, -np.inf, 3.5], np.float32)
    assert values(one, two) == (4, 0, 3, 0.5)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("size", [4, 5])
def test_four_bits(dtype: Any, size: int) -> None:
    one = np.arange(size).astype(dtype)
    two = one.copy()
    assert values(one, two) is None
    two[size - 1] = 0
    two[0] = 7
    assert values(one, two) == (2, 0, 0, 7.0)


@pytest.mark.parametrize("size", [3, 2_000_001])
def test_padding_of_four_bits_is_no_value(size: int) -> None:
    one = numpy_helper.from_array(np.ones(size, np.int8).astype(ml_dtypes.int4), "w")
    two = TensorProto()
    two.CopyFrom(one)
    two.raw_data = one.raw_data[:-1] + bytes([one.raw_data[-1] | 0xF0])
    assert one.raw_data != two.raw_data
    assert diff(holding(one), holding(two)).equal


@pytest.mark.parametrize("name", ["FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT8E4M3FNUZ"])
def test_eight_bit_floats(name: str) -> None:
    kind = TensorProto.DataType.Value(name)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    one, two = np.array([1, 2, 3], dtype), np.array([1, 2, 2], dtype)
    assert values(one, one) is None
    assert values(one, two) == (1, 0, 0, 1.0)


def test_integers_do_not_overflow() -> None:
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    assert values(np.array([low, 1]), np.array([high, 1])) == (1, 0, 0, 2.0**64)
    one, two = np.array([-128, 0], np.int8), np.array([127, 0], np.int8)
    assert values(one, two) == (1, 0, 0, 255.0)
    one, two = np.array([0], np.uint64), np.array([2**63], np.uint64)
    assert values(one, two) == (1, 0, 0, 2.0**63)


def test_booleans_strings_complex_scalars_and_nothing() -> None:
    assert values(np.array([True, False]), np.array([True, True])) == (1, 0, 0, 1.0)
    words = np.array(["a", "b"], object), np.array(["a", "c"], object)
    assert values(words[0], words[0]) is None
    assert values(*words) == (1, 0, 0, None)
    assert values(np.complex64([3 + 4j]), np.complex64([0])) == (1, 0, 0, 5.0)
    assert values(np.float32(1), np.float32(2)) == (1, 0, 0, 1.0)
    assert values(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)) is None


def test_typed_fields_are_storage() -> None:
    for dtype in (np.float32, np.int8, np.float16, np.int64):
        array = np.arange(6).astype(dtype)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        typed = helper.make_tensor("w", kind, [6], array)
        assert not typed.HasField("raw_data")
        assert values(numpy_helper.from_array(array, "w"), array) is None
        assert diff(holding(typed), holding(array)).equal


def test_dtype_and_shape() -> None:
    one = np.zeros((2, 3), np.float32)
    (change,) = diff(holding(one), holding(one.astype(np.int8))).weights
    assert (change.change, change.dtype) == ("changed", ("float32", "int8"))
    assert change.values is None
    (change,) = diff(holding(one), holding(one.reshape(3, 2))).weights
    assert change.shape == ([2, 3], [3, 2])


def test_weights_of_one_model_alone() -> None:
    def edit(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.ones(2), "more"))
        del model.graph.node[1]
        model.graph.node[1].input[1] = "w"

    found = edited(edit)
    assert [(c.name, c.change) for c in found.weights] == [
        ("c", "only in A"),
        ("more", "only in B"),
    ]
    assert found.weights[0].dtype == ("float32", None)
    assert node_lines(found) == ["Add:a changed: input 1: c -> w"]


def test_the_value_of_a_constant() -> None:
    def edit(model: ModelProto) -> None:
        value = np.array([1, 2, 4], np.float32)
        model.graph.node[1].attribute[0].t.CopyFrom(numpy_helper.from_array(value))

    found = edited(edit)
    only(found, "weights")
    assert found.weights[0].name == "c"
    assert found.weights[0].values.max_abs == 1.0  # type: ignore[union-attr]


def test_a_constant_that_became_an_initializer() -> None:
    def edit(model: ModelProto) -> None:
        value = model.graph.node[1].attribute[0].t
        model.graph.initializer.append(
            numpy_helper.from_array(numpy_helper.to_array(value), "c")
        )
        del model.graph.node[1]

    assert node_lines(edited(edit)) == ["Constant:c only in A: "]


def test_sparse_weights() -> None:
    def sparse(value: float) -> ModelProto:
        model = holding(np.zeros(1, np.float32))
        item = model.graph.sparse_initializer.add(dims=[4])
        item.values.CopyFrom(numpy_helper.from_array(np.array([value]), "s"))
        item.indices.CopyFrom(numpy_helper.from_array(np.array([2]), ""))
        return model

    assert diff(sparse(1), sparse(1)).equal
    (change,) = diff(sparse(1), sparse(2)).weights
    assert change.name == "s (values)"


def external(model: ModelProto, path: Path) -> Path:
    onnx.save(model, path, save_as_external_data=True, size_threshold=0)
    assert path.with_name(path.name + ".data").exists() or list(path.parent.glob("*"))
    return path


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.int4])
def test_inline_or_outside_is_no_difference(tmp_path: Path, dtype: Any) -> None:
    array = (np.arange(30_001) % 7).astype(dtype)
    inside = tmp_path / "inside.onnx"
    onnx.save(holding(array), inside)
    (tmp_path / "out").mkdir()
    outside = external(holding(array), tmp_path / "out" / "outside.onnx")
    found = diff(inside, outside)
    only(found)
    assert found.notes == ["only B keeps weights in other files: no difference"]
    array[30_000] = 1 - array[30_000]
    changed = diff(holding(array), outside).weights[0].values
    assert changed is not None
    assert changed.changed == 1


def test_large_weights_are_read_in_pieces(tmp_path: Path) -> None:
    """Beyond one piece, at an odd size, with a difference in the last element."""
    size = 80 << 20
    array = np.zeros(size // 4 + 1, np.float32)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = external(holding(array), tmp_path / "a" / "m.onnx")
    array[0], array[-1] = 1, -3
    two = external(holding(array), tmp_path / "b" / "m.onnx")
    inside = tmp_path / "inside.onnx"
    onnx.save(holding(array), inside)
    tracemalloc.start()
    for other in (two, inside):
        (change,) = diff(one, other).weights
        assert change.values is not None
        assert (change.values.changed, change.values.max_abs) == (2, 3.0)
    assert diff(two, inside).equal
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 2


def test_doc_strings_of_weights() -> None:
    found = edited(lambda m: m.graph.initializer[0].__setattr__("doc_string", "doc"))
    only(found, "metadata")
    assert found.metadata[0].what == "main: weight w: doc_string"


# ---- interface ----


def interface(edit: Edit) -> list[tuple[str, str, str, str | None, str | None]]:
    found = edited(edit)
    return [(c.kind, c.name, c.what, c.a, c.b) for c in found.interface]


def test_types_and_shapes() -> None:
    def edit(model: ModelProto) -> None:
        kind = model.graph.input[0].type.tensor_type
        kind.elem_type = TensorProto.DOUBLE
        kind.shape.dim[0].dim_value = 4
        model.graph.output[0].type.tensor_type.ClearField("shape")

    assert interface(edit) == [
        ("input", "x", "type", "float32", "float64"),
        ("input", "x", "shape", "[n,3]", "[4,3]"),
        ("output", "y", "shape", "[n,3]", "any"),
    ]


def test_inputs_more_and_less_and_their_order() -> None:
    def edit(model: ModelProto) -> None:
        value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])
        model.graph.input.append(value)

    assert interface(edit) == [("input", "z", "only in B", None, "float32 [1]")]
    a, b = parse(TEXT), parse(TEXT)
    edit(a)
    edit(b)
    b.graph.input.reverse()
    (change,) = diff(a, b).interface
    assert (change.what, change.a, change.b) == ("order", "x, z", "z, x")


def test_a_renamed_input_and_output() -> None:
    def edit(model: ModelProto) -> None:
        model.graph.input[0].name = model.graph.node[0].input[0] = "x2"
        model.graph.output[0].name = model.graph.node[4].output[0] = "y2"

    found = edited(edit)
    only(found, "nodes", "interface")
    assert [(c.what, c.a, c.b) for c in found.interface] == [
        ("name", "x", "x2"),
        ("name", "y", "y2"),
    ]
    assert node_lines(found) == ["Relu:y renamed: output 0: y -> y2"]


def test_the_doc_string_and_denotation_of_an_input() -> None:
    def edit(model: ModelProto) -> None:
        model.graph.input[0].doc_string = "doc"
        model.graph.input[0].type.denotation = "IMAGE"

    assert interface(edit) == [
        ("input", "x", "details of its type", None, None),
        ("input", "x", "doc_string", "", "doc"),
    ]


# ---- metadata ----


def test_metadata() -> None:
    def edit(model: ModelProto) -> None:
        model.ir_version = 9
        model.opset_import[0].version = 18
        model.opset_import.add(domain="acme", version=2)
        model.producer_name, model.doc_string = "me", "doc"
        model.metadata_props.add(key="k", value="v")
        model.graph.doc_string, model.graph.name = "inner", "h"

    found = edited(edit)
    only(found, "metadata")
    assert {(c.what, c.a, c.b) for c in found.metadata} == {
        ("ir_version", "8", "9"),
        ("opset_import ai.onnx", "17", "18"),
        ("opset_import acme", None, "2"),
        ("producer_name", "", "me"),
        ("doc_string", "", "doc"),
        ("metadata_props k", None, "v"),
        ("graph: name", "g", "h"),
        ("graph: doc_string", "", "inner"),
    }


def test_the_order_of_metadata_does_not_count() -> None:
    a, b = parse(TEXT), parse(TEXT)
    for model, keys in ((a, "kl"), (b, "lk")):
        for key in keys:
            model.metadata_props.add(key=key, value=key)
    assert diff(a, b).equal


def test_declared_types_inside_and_quantization_annotations() -> None:
    def edit(model: ModelProto) -> None:
        value = helper.make_tensor_value_info("m", TensorProto.FLOAT, ["n", 3])
        model.graph.value_info.append(value)
        model.graph.quantization_annotation.add(tensor_name="m")

    assert [(c.what, c.a, c.b) for c in edited(edit).metadata] == [
        ("graph: value_info m", None, "float32[n,3]"),
        ("graph: quantization_annotation", "0 entries", "1 entries"),
    ]


def test_training_information_and_unknown_fields() -> None:
    found = edited(lambda m: m.training_info.add())
    assert [change.what for change in found.metadata] == ["training_info"]
    # field 9999, a varint
    found = edited(lambda m: m.MergeFromString(b"\xf8\xf0\x04\x01"))
    assert [c.what for c in found.metadata] == ["fields that onnx does not know"]


# ---- what comes in, what goes out ----


def test_the_exported_function() -> None:
    found = onnxopt.diff(parse(TEXT), parse(TEXT))
    assert isinstance(found, onnxopt.Differences)
    assert (found.a, found.b) == ("model A", "model B")


def test_models_are_left_alone() -> None:
    a, b = parse(TEXT), parse(TEXT)
    before = a.SerializeToString()
    diff(a, b)
    assert a.SerializeToString() == before == b.SerializeToString()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(InvalidModelError):
        diff(parse(TEXT), tmp_path / "bad.onnx")
    with pytest.raises(UsageError):
        diff(tmp_path / "missing.onnx", parse(TEXT))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two models that differ in a weight, an operator, and twelve entries."""
    a, b = parse(TEXT), parse(TEXT)
    b.graph.node[4].op_type = "Sigmoid"
    b.graph.initializer[0].float_data[0] = 1.0
    for number in range(12):
        b.metadata_props.add(key=f"key{number}", value="v" * 200)
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    for model, path in zip((a, b), paths, strict=True):
        onnx.save(model, path)
    return paths


def test_exit_codes(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = files
    assert run("diff", a, a) == 0
    assert "are equal" in capsys.readouterr().out
    assert run("diff", a, b) == 1
    assert run("diff", a) == 2
    assert run("diff", a, tmp_path / "missing.onnx") == 2
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert run("diff", a, tmp_path / "bad.onnx") == 3


def test_text_is_short_unless_asked(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", *files) == 1
    short = capsys.readouterr().out
    assert "main: Relu:y (Relu): changed: operator: Relu -> Sigmoid" in short
    assert "main: w (float32[3]): 1 of 3 elements differ, by up to 0.5" in short
    assert "... 2 more (-v shows them)" in short
    assert "key9" in short
    assert "key11" not in short
    assert max(map(len, short.splitlines()[1:])) < 120
    assert run("diff", *files, "-v") == 1
    full = capsys.readouterr().out
    assert "key11" in full
    assert "more" not in full


def test_json(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", *files, "--json", "-") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["equal"]) == (1, False)
    assert found["weights"][0]["values"]["max_abs"] == 0.5
    assert len(found["metadata"]) == 12
    assert run("diff", *files, "--json", tmp_path / "d.json") == 1
    assert json.loads((tmp_path / "d.json").read_text()) == found


def test_words_for_zeros_order_and_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(holding(np.array([0.0, 1, np.nan], np.float32)), one)
    onnx.save(holding(np.array([-0.0, 1, 5], np.float32)), two)
    assert run("diff", one, two) == 1
    out = capsys.readouterr().out
    assert "2 of 3 elements differ; 1 in bits only (0.0 and -0.0" in out
    assert "1 beyond measure" in out
    model = parse(TEXT)
    onnx.save(model, one)
    constant = onnx.NodeProto()
    constant.CopyFrom(model.graph.node[1])
    del model.graph.node[1]
    model.graph.node.insert(0, constant)
    onnx.save(model, two)
    assert run("diff", one, two) == 1
    assert "differ (only the order of nodes)" in capsys.readouterr().out
