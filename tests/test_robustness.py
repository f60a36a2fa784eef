"""Malformed and unsafe models: one clear line each, nothing else, and nothing written."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxopt
from onnxopt import wire
from onnxopt.errors import InvalidModelError
from onnxopt.model import Model

Change = Callable[[ModelProto], object]


def value(name: str, dims: list[int] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def base() -> ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "W"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    weights = [numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "W")]
    graph = helper.make_graph(
        nodes, "g", [value("x", [1, 3, 8, 8])], [value("y", [1, 4, 6, 6])], weights
    )
    imports = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def weight(model: ModelProto) -> TensorProto:
    return model.graph.initializer[0]


def set_dims(model: ModelProto, dims: list[int]) -> None:
    del weight(model).dims[:]
    weight(model).dims.extend(dims)


def attribute(model: ModelProto, name: str, kind: int) -> onnx.AttributeProto:
    made = model.graph.node[0].attribute.add()
    made.name, made.type, made.i, made.f = name, kind, 1, 1.0
    return made


def function(model: ModelProto, name: str, calls: str) -> None:
    body = [helper.make_node(calls, ["a"], ["b"], domain="f")]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    model.functions.append(helper.make_function("f", name, ["a"], ["b"], body, imports))


def call(model: ModelProto, name: str) -> None:
    model.opset_import.add(domain="f", version=1)
    model.graph.node[1].CopyFrom(helper.make_node(name, ["c"], ["y"], domain="f"))


def recursive(model: ModelProto) -> None:
    function(model, "F", "F")
    call(model, "F")


def mutual(model: ModelProto) -> None:
    function(model, "F", "G")
    function(model, "G", "F")
    call(model, "F")


def function_bomb(model: ModelProto) -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    for level in range(40):
        body = [
            helper.make_node(f"F{level + 1}", ["a"], ["t"], domain="f"),
            helper.make_node(f"F{level + 1}", ["t"], ["b"], domain="f"),
        ]
        model.functions.append(
            helper.make_function("f", f"F{level}", ["a"], ["b"], body, imports)
        )
    leaf = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(helper.make_function("f", "F40", ["a"], ["b"], leaf, imports))
    call(model, "F0")


def set_field(target: object, name: str, content: object) -> None:
    setattr(target, name, content)


REJECTED: dict[str, tuple[Change, str]] = {
    "no graph": (lambda m: m.ClearField("graph"), "no graph"),
    "unknown dtype": (lambda m: set_field(weight(m), "data_type", 99), "data type 99"),
    "undefined dtype": (lambda m: set_field(weight(m), "data_type", 0), "data type 0"),
    "negative dim": (lambda m: set_dims(m, [-4, 3, 3, 3]), "negative dims"),
    "two negative dims": (lambda m: set_dims(m, [-4, -3, 3, 3]), "negative dims"),
    "absurd dim": (lambda m: set_dims(m, [1 << 62]), "absurd dims"),
    "absurd product": (lambda m: set_dims(m, [1 << 40] * 40), "absurd dims"),
    "raw data too short": (
        lambda m: set_field(weight(m), "raw_data", weight(m).raw_data[:-1]),
        "need 432 bytes, it has 431",
    ),
    "raw data too long": (
        lambda m: set_field(weight(m), "raw_data", weight(m).raw_data + b"1234"),
        "need 432 bytes, it has 436",
    ),
    "no data": (lambda m: weight(m).ClearField("raw_data"), "it has 0"),
    "value defined twice": (
        lambda m: m.graph.node[1].output.__setitem__(0, "c"),
        "defined twice",
    ),
    "input defined again": (
        lambda m: m.graph.node[0].output.__setitem__(0, "x"),
        "defined twice",
    ),
    "two inputs of a name": (lambda m: m.graph.input.append(m.graph.input[0]), "two"),
    "cycle": (lambda m: m.graph.node[0].input.__setitem__(0, "y"), "depends on itself"),
    "own input": (
        lambda m: m.graph.node[1].input.__setitem__(0, "y"),
        "depends on itself",
    ),
    "dangling input": (
        lambda m: m.graph.node[1].input.__setitem__(0, "nope"),
        "'nope', which nothing makes",
    ),
    "dangling output": (
        lambda m: set_field(m.graph.output[0], "name", "nope"),
        "nothing makes its output 'nope'",
    ),
    "opset of the future": (
        lambda m: set_field(m.opset_import[0], "version", 999),
        "opset 999",
    ),
    "negative opset": (
        lambda m: set_field(m.opset_import[0], "version", -1),
        "opset -1",
    ),
    "no opset": (lambda m: m.opset_import.__delitem__(slice(None)), "no operator set"),
    "IR version 0": (lambda m: set_field(m, "ir_version", 0), "IR version 0"),
    "IR version 99": (lambda m: set_field(m, "ir_version", 99), "IR version 99"),
    "attribute of a wrong type": (lambda m: attribute(m, "group", 1), "not INT"),
    "attribute without a name": (lambda m: attribute(m, "", 2), "no name"),
    "operator without a type": (
        lambda m: set_field(m.graph.node[0], "op_type", ""),
        "no operator type",
    ),
    "too few inputs": (
        lambda m: m.graph.node[0].input.__delitem__(1),
        "it has 1 inputs",
    ),
    "required input left out": (
        lambda m: m.graph.node[1].input.__setitem__(0, ""),
        "not optional",
    ),
    "recursive function": (recursive, "calls itself"),
    "mutually recursive functions": (mutual, "calls itself"),
    "functions that explode": (function_bomb, "nodes come of it"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_malformed_models_are_rejected_in_one_line(name: str, tmp_path: Path) -> None:
    change, text = REJECTED[name]
    model = base()
    change(model)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    started = time.process_time()
    with pytest.raises(InvalidModelError) as caught:
        Model.open(path)
    assert time.process_time() - started < 10
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_model(tmp_path: Path) -> None:
    whole = base().SerializeToString()
    for content in (b"", b"hello, world", whole[:40], whole[:-7], os.urandom(5000)):
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        with pytest.raises(InvalidModelError, match=r"is empty|is not an ONNX model|\w"):
            Model.open(path)


def test_nesting_deeper_than_protobuf_reads(tmp_path: Path) -> None:
    graph = wire.header(2, 1) + b"g"
    for _ in range(5000):
        branch = wire.header(1, 11) + b"then_branch" + wire.header(6, len(graph)) + graph
        node = wire.header(4, 2) + b"If" + wire.header(5, len(branch)) + branch
        graph = wire.header(1, len(node)) + node
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x08" + wire.header(7, len(graph)) + graph)
    with pytest.raises(InvalidModelError, match="not an ONNX model"):
        Model.open(path)


def unsorted_nodes(model: ModelProto) -> None:
    first, second = copy.deepcopy(model.graph.node[0]), copy.deepcopy(model.graph.node[1])
    del model.graph.node[:]
    model.graph.node.extend([second, first])


def test_unsorted_nodes_are_sorted_with_a_note(tmp_path: Path) -> None:
    model = base()
    unsorted_nodes(model)
    result = onnxopt.optimize(model)
    assert [node.op_type for node in result.model.graph.node] == ["Conv", "Relu"]
    assert any("not sorted" in note for note in result.report.notes)
    onnx.checker.check_model(result.model)


def test_duplicate_initializers_follow_onnx_runtime() -> None:
    model = base()
    twice = numpy_helper.from_array(np.full((4, 3, 3, 3), 2, np.float32), "W")
    model.graph.initializer.append(twice)
    result = onnxopt.optimize(model)
    assert len(result.model.graph.initializer) == 1
    assert any("twice" in note for note in result.report.notes)


# ---- external data ----


def external(folder: Path, location: str, offset: int = 0, length: int = 432) -> Path:
    model = base()
    tensor = weight(model)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(entry))
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    content = np.ones(108, np.float32).tobytes()
    (made / "w.data").write_bytes(content)
    (tmp_path / "secret").write_bytes(content)
    return made


def test_external_data_in_its_place_is_read(folder: Path) -> None:
    model = Model.open(external(folder, "w.data"))
    array = model.main.array("W")
    assert array is not None
    assert (array == 1).all()


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("../secret", "inside the model's own folder"),
        ("/etc/passwd", "inside the model's own folder"),
        ("missing", "No such file"),
        ("link", "link that leaves"),
        ("hard", "hard link"),
        ("pipe", "not a regular file"),
        ("sub", "not a regular file"),
        ("", "no valid location"),
    ],
)
def test_unsafe_external_data_is_not_read(folder: Path, location: str, text: str) -> None:
    secret = folder.parent / "secret"
    (folder / "link").symlink_to(secret)
    (folder / "hard").hardlink_to(secret)
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    with pytest.raises(InvalidModelError, match=text):
        Model.open(external(folder, location))


@pytest.mark.parametrize(("offset", "length"), [(400, 432), (0, 100), (0, 9999), (-4, 1)])
def test_wrong_offset_or_length(folder: Path, offset: int, length: int) -> None:
    with pytest.raises(InvalidModelError, match="'W'"):
        Model.open(external(folder, "w.data", offset, length))


def test_a_cache_of_links_into_one_blob_folder_loads(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "2222").write_bytes(np.ones(108, np.float32).tobytes())
    external(blobs, "w.data").rename(blobs / "1111")
    (snapshot / "m.onnx").symlink_to("../../blobs/1111")
    (snapshot / "w.data").symlink_to("../../blobs/2222")
    array = Model.open(snapshot / "m.onnx").main.array("W")
    assert array is not None
    assert (array == 1).all()


# ---- bombs ----


def test_expanding_chains_are_left_in_place(tmp_path: Path) -> None:
    """2^40 elements if it were evaluated; it stays, and the report says so."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1] x) => (float[1] y)
        <float[1] one = {1.0}, int64[1] many = {1048576}, int64[1] zero = {0}> {
            a = Expand(one, many)
            b = Tile(a, many)
            s = ReduceMax<keepdims = 0>(b)
            y = Add(x, s)
        }"""
    )
    result = onnxopt.optimize(model, validate=False)
    assert [node.op_type for node in result.model.graph.node][:2] == ["Expand", "Tile"]
    reasons = [skip.reason for entry in result.report.passes for skip in entry.skipped]
    assert any("bytes" in reason or "size" in reason for reason in reasons)


BOMBS = {
    "constant": "a = ConstantOfShape(square) s = ReduceMax<keepdims = 0>(a)",
    "range": """a = Range(zero, huge, one) c = Cast<to = 1>(a)
        s = ReduceMax<keepdims = 0>(c)""",
    "tiles": """k = Cast<to = 1>(many) a = Tile(k, many) b = Tile(a, many)
        s = ReduceMax<keepdims = 0>(b)""",
    "computed": """n = Mul(many, many) a = ConstantOfShape(n) b = Add(a, a)
        s = ReduceMax<keepdims = 0>(b)""",
    "pad": """k = Cast<to = 1>(many) a = Pad(k, sides) s = ReduceMax<keepdims = 0>(a)""",
    "one hot": """c = Cast<to = 1>(square) a = OneHot(many, huge, c)
        s = ReduceMax<keepdims = 0>(a)""",
    "product": """a = ConstantOfShape(tall) b = ConstantOfShape(wide) c = MatMul(a, b)
        s = ReduceMax<keepdims = 0>(c)""",
    "doubling": "a0 = Cast<to = 1>(many) "
    + " ".join(f"a{i + 1} = Concat<axis = 0>(a{i}, a{i})" for i in range(40))
    + " s = ReduceMax<keepdims = 0>(a40)",
}
_MEASURE = """
import resource, sys, onnxopt
for path in sys.argv[1:]:
    result = onnxopt.optimize(path, validate=False)
    print(result.report.output.bytes.model)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
def test_bombs_take_neither_time_nor_memory(tmp_path: Path) -> None:
    paths = []
    for name, body in BOMBS.items():
        model = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[1] x) => (float[1] y)
            <int64[1] many = {{1048576}}, int64[2] square = {{1048576, 1048576}},
             int64[2] tall = {{1048576, 1}}, int64[2] wide = {{1, 1048576}},
             int64[2] sides = {{0, 1099511627776}}, int64 huge = {{1099511627776}},
             int64 zero = {{0}}, int64 one = {{1}}> {{ {body} y = Add(x, s) }}"""
        )
        paths.append(tmp_path / f"{name}.onnx")
        onnx.save(model, paths[-1])
    command = [sys.executable, "-c", _MEASURE, *map(str, paths)]
    started = time.monotonic()
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 10 * len(BOMBS)
    *sizes, peak = map(int, ran.stdout.split())
    assert len(sizes) == len(BOMBS)
    assert max(sizes) < 10_000
    assert peak < 1 << 20


def test_inputs_too_large_to_be_made_up_are_not_run() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1152921504606846976] x) => (float[n] y) { y = ReduceMax<keepdims = 0>(x) }"""
    result = onnxopt.optimize(onnx.parser.parse_model(text))
    validation = result.report.validation
    assert validation is not None
    assert validation.status == "not_run"
    assert "'x'" in str(validation.reason)


# ---- faults ----

_SAVE_FOREVER = """
import sys
from pathlib import Path
from onnxopt.model import Model
from onnxopt.save import stage
model = Model.open(sys.argv[1])
print("ready", flush=True)
while True:
    stage(model, Path(sys.argv[2])).commit()
"""


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.08, 0.15])
def test_kill_leaves_a_complete_output(folder: Path, delay: float) -> None:
    """At any moment the output is the old pair or the new one, and both load."""
    source, output = external(folder, "w.data"), folder / "out.onnx"
    onnxopt.optimize(source, passes="", validate=False).save(output)
    process = subprocess.Popen(
        [sys.executable, "-c", _SAVE_FOREVER, str(source), str(output)],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    loaded = onnx.load(output)
    assert (numpy_helper.to_array(loaded.graph.initializer[0]) == 1).all()
