"""Scanning a file without its weights: nothing is lost, nothing malformed is taken."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
    helper,
    numpy_helper,
)

from onnxopt import wire
from onnxopt.errors import OnnxoptError
from onnxopt.model import Model
from onnxopt.save import stage
from onnxopt.weights import place, tensors

LARGE = wire.MIN_PAYLOAD + 1
MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
LOCATION = "\0here"
EXTRA = b"\xfa\x3f\x03new\xf8\x3f\x85\x01\xfd\x3f1234\xf9\x3f12345678"
"""Fields that onnx does not know, one of each wire type."""


def scan(data: bytes) -> ModelProto:
    """The skeleton of the file, with every payload left out put back."""
    proto = ModelProto.FromString(wire.skeleton(io.BytesIO(data), len(data), LOCATION))
    for tensor in tensors(proto):
        where = place(tensor)
        if where is not None and where.location == LOCATION:
            assert where.length is not None
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = data[where.offset : where.offset + where.length]
    return proto


def left_out(data: bytes) -> list[str]:
    """The tensors whose payload the skeleton leaves in the file."""
    proto = ModelProto.FromString(wire.skeleton(io.BytesIO(data), len(data), LOCATION))
    return [tensor.name for tensor in tensors(proto) if place(tensor) is not None]


def same(data: bytes) -> bool:
    expected = ModelProto.FromString(data).SerializeToString(deterministic=True)
    return scan(data).SerializeToString(deterministic=True) == expected


def field(number: int, value: bytes) -> bytes:
    return wire.header(number, len(value)) + value


def weight(name: str, size: int = LARGE) -> TensorProto:
    values = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    return numpy_helper.from_array(values, name)


def model_bytes(*initializers: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A serialized model around initializers that are serialized already."""
    graph = GraphProto(name="g").SerializeToString()
    graph += b"".join(field(GRAPH_INITIALIZER, item) for item in initializers)
    model = ModelProto(ir_version=10, doc_string="d").SerializeToString()
    return before + model + field(MODEL_GRAPH, graph) + after


# ---- nothing is lost ----


def test_large_payloads_stay_in_the_file_and_small_ones_come_along() -> None:
    large, small = weight("large"), weight("small", 100)
    large.doc_string = "about it"
    large.metadata_props.add(key="k", value="v")
    data = model_bytes(large.SerializeToString(), small.SerializeToString())
    assert left_out(data) == ["large"]
    assert same(data)


@pytest.mark.parametrize("size", range(wire.MIN_PAYLOAD - 30, wire.MIN_PAYLOAD + 3))
def test_around_the_limit_nothing_is_lost(size: int) -> None:
    assert same(model_bytes(weight("w", size).SerializeToString()))


def test_fields_may_come_in_any_order() -> None:
    tensor = weight("w")
    parts = [
        TensorProto(name="w").SerializeToString(),
        TensorProto(dims=[LARGE]).SerializeToString(),
        TensorProto(data_type=tensor.data_type).SerializeToString(),
    ]
    payload = field(wire.TENSOR_RAW_DATA, tensor.raw_data)
    for index in range(4):
        mixed = b"".join([*parts[:index], payload, *parts[index:]])
        data = model_bytes(mixed)
        assert left_out(data) == ["w"]
        assert scan(data).graph.initializer[0] == tensor


def test_unknown_fields_stay() -> None:
    extra = EXTRA
    tensor = weight("w").SerializeToString()
    data = model_bytes(extra + tensor + extra, before=extra, after=extra)
    assert left_out(data) == ["w"]
    assert same(data)


def test_unknown_fields_of_a_parsed_message() -> None:
    extra = (
        b"\xfa\x3f\x03new" + b"\xf8\x3f\x85\x01" + b"\xfd\x3f1234" + b"\xf9\x3f12345678"
    )
    message = NodeProto.FromString(b"\x0a\x01x" + extra)
    assert wire.unknown_fields(message) == extra
    assert wire.unknown_fields(NodeProto(name="x")) == b""


def constant(name: str) -> NodeProto:
    return helper.make_node("Constant", [], [f"{name}_out"], value=weight(name))


def test_weights_of_nodes_in_every_scope_stay_in_the_file_too() -> None:
    inner = GraphProto(name="inner", node=[constant("inside"), constant("inside 2")])
    inner.initializer.append(weight("of the branch"))
    proto = ModelProto(ir_version=10, doc_string="d")
    proto.graph.initializer.append(weight("outer"))
    proto.graph.node.append(constant("in a node"))
    owner = helper.make_node("Odd", ["a"], ["b"], body=inner, many=[inner, inner])
    owner.attribute.append(helper.make_attribute("tensors", [weight("t1"), weight("t2")]))
    owner.attribute[0].doc_string = "about the attribute"
    owner.MergeFromString(EXTRA)
    proto.graph.node.append(owner)
    proto.graph.node.append(helper.make_node("Relu", ["b"], ["c"]))
    proto.functions.add(name="f", doc_string="d").node.append(constant("of a function"))
    data = proto.SerializeToString()
    branch = ["of the branch", "inside", "inside 2"]
    assert left_out(data) == [
        *("outer", "in a node", *branch, *branch, *branch, "t1", "t2", "of a function")
    ]
    assert same(data)
    assert len(wire.skeleton(io.BytesIO(data), len(data), LOCATION)) < LARGE


@pytest.mark.parametrize(
    "twist",
    [
        field(wire.TENSOR_RAW_DATA, b"again"),
        TensorProto(data_location=TensorProto.DEFAULT).SerializeToString(),
        TensorProto(data_location=TensorProto.EXTERNAL).SerializeToString(),
        TensorProto(
            external_data=[StringStringEntryProto(key="location", value="x")]
        ).SerializeToString(),
        TensorProto(doc_string="d" * LARGE).SerializeToString(),
        TensorProto(float_data=[1.0] * LARGE).SerializeToString(),
        wire.varint(wire.TENSOR_RAW_DATA << 3 | wire.VARINT) + b"\x05",
    ],
    ids=["twice", "default", "external", "entries", "doc", "typed", "wire type"],
)
def test_odd_initializers_are_left_to_the_parser(twist: bytes) -> None:
    tensor = weight("w").SerializeToString()
    for data in (model_bytes(twist + tensor), model_bytes(tensor + twist)):
        skeleton = wire.skeleton(io.BytesIO(data), len(data), LOCATION)
        assert ModelProto.FromString(skeleton) == ModelProto.FromString(data)


def test_a_graph_in_two_pieces_is_merged_as_protobuf_does() -> None:
    first, second = weight("a").SerializeToString(), weight("b").SerializeToString()
    data = model_bytes(first) + field(MODEL_GRAPH, field(GRAPH_INITIALIZER, second))
    assert left_out(data) == ["a", "b"]
    assert same(data)


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**31, 2**63 - 1])
def test_numbers(value: int) -> None:
    data = wire.varint(value)
    assert wire._varint_at(b".." + data, 2) == (value, 2 + len(data))
    message = StringStringEntryProto(key="k" * min(value, 1000)).SerializeToString()
    found = list(wire.fields(io.BytesIO(message), 0, len(message)))
    assert [(item.number, item.end) for item in found] == [(1, len(message))]


def test_only_what_is_needed_is_read() -> None:
    """A payload is skipped, not read."""

    class Counting(io.BytesIO):
        total = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.total += len(data)
            return data

        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            count = super().readinto(buffer)
            self.total += count
            return count

    data = model_bytes(weight("w", 10_000_000).SerializeToString())
    file = Counting(data)
    wire.skeleton(file, len(data), LOCATION)
    assert file.total < 2_000


# ---- nothing malformed gets through ----


def rich() -> bytes:
    """A small model with a bit of everything, one weight that is left in the file."""
    then = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["t"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, ["N", 4])],
    )
    function = helper.make_function(
        "local",
        "f",
        ["a"],
        ["b"],
        [helper.make_node("Neg", ["a"], ["b"])],
        [helper.make_opsetid("", 20)],
        ["alpha"],
    )
    nodes = [
        helper.make_node(
            "Constant", [], ["c"], value=numpy_helper.from_array(np.ones(4))
        ),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product", doc_string="doc"),
        helper.make_node("If", ["flag"], ["z"], then_branch=then, else_branch=then),
        helper.make_node("f", ["z"], ["v"], domain="local"),
        helper.make_node("Odd", ["c", ""], ["u", ""], domain="other", strings=["a"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in ("y", "v", "u")
        ],
        [
            numpy_helper.from_array(np.ones((4, 300), np.float32), "w"),
            numpy_helper.from_array(np.array(["s"], object), "s"),
        ],
    )
    opsets = [helper.make_opsetid(name, 20) for name in ("", "local", "other")]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets)
    model.metadata_props.add(key="k", value="v")
    return model.SerializeToString()


RICH = rich()


def survives(data: bytes, folder: Path) -> bool:
    """Whether the bytes are taken for a model; refusing them is fine, crashing is not."""
    path, out = folder / "m.onnx", folder / "out.onnx"
    path.write_bytes(data)
    started = time.process_time()
    refusal: OnnxoptError | None = None
    try:
        with stage(Model.open(path), out) as staged:
            staged.commit()
    except OnnxoptError as error:
        refusal = error
    assert time.process_time() - started < 2
    if refusal is None:
        Model.open(out)
        return True
    assert refusal.exit_code in (2, 3)
    assert "\n" not in str(refusal)
    return False


quick = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def test_the_rich_model_is_taken(tmp_path: Path) -> None:
    assert survives(RICH, tmp_path)
    assert left_out(RICH) == ["w"]


@quick
@given(st.integers(0, len(RICH) - 1))
def test_files_that_are_cut_short(tmp_path: Path, end: int) -> None:
    survives(RICH[:end], tmp_path)


@quick
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=4))
def test_files_with_wrong_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(RICH)
    for position, value in changes:
        data[position - 450] = value  # the ends: the middle is the payload
    survives(bytes(data), tmp_path)


@quick
@given(st.integers(0, 900), st.binary(max_size=12), st.integers(0, 12))
def test_files_with_bytes_put_in_and_taken_out(
    tmp_path: Path, at: int, new: bytes, gone: int
) -> None:
    position = (at - 450) % len(RICH)
    survives(RICH[:position] + new + RICH[position + gone :], tmp_path)


@quick
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    survives(data, tmp_path)
    survives(field(MODEL_GRAPH, data), tmp_path)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is empty"),
        (b"hello, this is text and no model\n", "is not an ONNX model"),
        (b"PK\x03\x04" + bytes(100), "is not an ONNX model"),
        (ModelProto(ir_version=10).SerializeToString(), "it has no graph"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "is not an ONNX model"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "is not an ONNX model"),
        (b"\x3b\x3c", "is not an ONNX model"),
    ],
    ids=["empty", "text", "zip", "no graph", "too long", "endless number", "group"],
)
def test_what_is_no_model_is_told_so(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(OnnxoptError, match=text) as error:
        Model.open(path)
    assert error.value.exit_code == 3
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "data",
    [b"\x0a\x05ab", b"\x0a\x80", b"\x0d123", b"\x00\x00", b"\x08" + b"\x80" * 10 + b"\0"],
    ids=["past the end", "no length", "short", "number 0", "endless number"],
)
def test_malformed_fields_are_noticed_within_a_longer_file(data: bytes) -> None:
    file = io.BytesIO(data + bytes(100))
    with pytest.raises(wire.WireError):
        list(wire.fields(file, 0, len(data)))


def test_a_file_of_many_tiny_fields_is_read_in_time(tmp_path: Path) -> None:
    assert not survives(b"\x08\x01" * 100_000, tmp_path)
    survives(field(MODEL_GRAPH, b"\x0a\x00" * 50_000), tmp_path)


@pytest.mark.parametrize("size", [0, LARGE])
@pytest.mark.parametrize("depth", [200, 2000])
def test_deep_nesting_is_refused(tmp_path: Path, size: int, depth: int) -> None:
    graph = GraphProto(name="g", initializer=[weight("w", size)]).SerializeToString()
    for _ in range(depth):
        attribute = b"\x0a\x01b\xa0\x01\x05" + field(6, graph)
        node = b"\x22\x02If" + field(5, attribute)
        graph = field(1, node)
    assert not survives(field(MODEL_GRAPH, graph), tmp_path)


def test_a_payload_that_ends_past_the_file_is_refused(tmp_path: Path) -> None:
    data = model_bytes(weight("w").SerializeToString())
    for cut in (1, 100, LARGE):
        assert not survives(data[:-cut], tmp_path)


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    for name in (b"product", b"inner", b"local", b"flag", b"MatMul", b"alpha"):
        data = RICH.replace(name, b"\xff" * len(name))
        assert data != RICH
        assert not survives(data, tmp_path), name
    odd = RICH.replace(b"\x03doc", b"\x03\xff\xff\xff")  # nothing refers to it
    assert odd != RICH
    assert survives(odd, tmp_path)
