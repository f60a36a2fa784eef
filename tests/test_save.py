"""A file appears complete, under its own name, or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxopt
import onnxopt.model
from onnxopt import save, wire
from onnxopt.edit import Edit
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.save import stage, to_proto
from onnxopt.weights import Place, place, set_place

ROOT = Path(__file__).resolve().parent.parent


def make_model(seed: int = 0, size: int = 3000) -> ModelProto:
    """x @ w + b with a large and a small weight."""
    random = np.random.default_rng(seed)
    large = random.standard_normal((4, size)).astype(np.float32)
    small = random.standard_normal(size).astype(np.float32)[:8]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("ReduceSum", ["xw"], ["s"]),
            helper.make_node("Add", ["s", "b"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(large, "w"), numpy_helper.from_array(small, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def write(path: Path, proto: ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def write_external(path: Path, proto: ModelProto, data: str = "weights.bin") -> Path:
    """The model with every weight in a file of its own beside it."""
    onnx.save(
        ModelProto.FromString(proto.SerializeToString()),
        path,
        save_as_external_data=True,
        location=data,
        size_threshold=0,
    )
    return path


def loaded(path: Path) -> ModelProto:
    """The file as onnx reads it, with its external data inline."""
    proto = onnx.load(path)
    for tensor in save.tensors(proto):
        tensor.ClearField("data_location")  # onnx leaves DEFAULT, in so many words
    return proto


def put(source: Path | ModelProto, target: Path) -> save.Staged:
    """The empty pipeline."""
    with stage(Model.open(source), target) as staged:
        staged.commit()
    return staged


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the files ----


def test_inline_weights_stay_inline(tmp_path: Path) -> None:
    proto = make_model()
    staged = put(write(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    assert loaded(tmp_path / "out.onnx") == proto
    assert names(tmp_path) == ["in.onnx", "out.onnx"]
    data = (tmp_path / "out.onnx").read_bytes()
    assert staged.digest.model == hashlib.sha256(data).hexdigest()
    assert staged.digest.data is None
    assert (staged.bytes.model, staged.bytes.data) == (len(data), 0)


def test_fields_stand_where_protobuf_writes_them(tmp_path: Path) -> None:
    """So the same model gives the same bytes, wherever its payloads came from."""
    proto = make_model()
    for tensor in proto.graph.initializer:
        tensor.doc_string = "behind the payload"
        tensor.metadata_props.add(key="key", value="value")
    put(write(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    expected = proto.SerializeToString(deterministic=True)
    assert (tmp_path / "out.onnx").read_bytes() == expected


def test_external_weights_stay_external_under_the_name_of_their_hash(
    tmp_path: Path,
) -> None:
    proto = make_model()
    source = write_external(tmp_path / "in.onnx", proto)
    out = tmp_path / "out"
    out.mkdir()
    staged = put(source, out / "net.v2.onnx")
    (data,) = out.glob("*.data")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert data.name == f"net.v2-{digest[:12]}.data"
    assert names(out) == [data.name, "net.v2.onnx"]
    assert loaded(out / "net.v2.onnx") == proto
    model_digest = hashlib.sha256((out / "net.v2.onnx").read_bytes()).hexdigest()
    assert (staged.digest.model, staged.digest.data) == (model_digest, digest)
    assert staged.bytes.model == (out / "net.v2.onnx").stat().st_size
    assert staged.bytes.data == data.stat().st_size
    assert names(tmp_path) == ["in.onnx", "out", "weights.bin"]


def test_the_output_does_not_need_the_input(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    put(source, tmp_path / "out.onnx")
    (tmp_path / "weights.bin").unlink()
    assert loaded(tmp_path / "out.onnx") == make_model()


def test_large_payloads_start_on_a_page(tmp_path: Path) -> None:
    proto = make_model()
    large = numpy_helper.from_array(np.ones(1 << 17, np.float32), "large")
    proto.graph.initializer.append(large)
    proto.graph.initializer.insert(0, numpy_helper.from_array(np.arange(3), "first"))
    put(write_external(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    made = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    offsets = {
        t.name: where.offset for t in made.graph.initializer if (where := place(t))
    }
    assert offsets == {"first": 0, "w": 32, "b": 32 + 48_000, "large": 49_152}


def test_small_payloads_do_not_grow_a_data_file(tmp_path: Path) -> None:
    proto = make_model()
    for index in range(200):
        array = np.full(1025, index, np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, f"s{index}"))
    source = write_external(tmp_path / "in.onnx", proto)
    before = sum(path.stat().st_size for path in tmp_path.iterdir())
    put(source, tmp_path / "out.onnx")
    made = sum(path.stat().st_size for path in tmp_path.glob("out*"))
    assert made <= 1.02 * before


def test_payloads_that_overlap_stay_one(tmp_path: Path) -> None:
    proto = make_model()
    del proto.graph.node[:], proto.graph.initializer[:], proto.graph.output[:]
    (tmp_path / "shared.data").write_bytes(np.arange(4000, dtype=np.int32).tobytes())
    for index in range(20):
        tensor = proto.graph.initializer.add(name=f"t{index}", data_type=6, dims=[3000])
        set_place(tensor, Place("shared.data", 4 * 50 * index, 12_000))
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    put(tmp_path / "in.onnx", tmp_path / "out.onnx")
    (data,) = tmp_path.glob("out-*.data")
    assert data.stat().st_size == 4 * (50 * 19 + 3000)
    for index, tensor in enumerate(onnx.load(tmp_path / "out.onnx").graph.initializer):
        expected = np.arange(50 * index, 50 * index + 3000)
        assert (numpy_helper.to_array(tensor) == expected).all()


def test_the_data_of_the_input_is_not_replaced(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    (data,) = {tmp_path / name for name in names(tmp_path)} - {source}
    before = data.read_bytes()
    with pytest.raises(UsageError, match="weights of the input"):
        put(source, data)
    assert data.read_bytes() == before


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    first = put(source, tmp_path / "out.onnx")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    second = put(source, tmp_path / "out.onnx")
    assert before == {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    assert first.digest == second.digest


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            put(source, tmp_path / "out.onnx")
        finally:
            os.umask(before)
        (data,) = tmp_path.glob("*.data")
        for path in (tmp_path / "out.onnx", data):
            assert stat.S_IMODE(path.stat().st_mode) == mode
        data.unlink()


# ---- places that several tensors share ----


def tied_model(
    folder: Path, entries: list[tuple[str, str | None, str | None, int]]
) -> Path:
    """Float weights at the given places (name, offset, length, elements) of one file."""
    (folder / "w.bin").write_bytes(np.arange(64, dtype="<f4").tobytes())
    proto = make_model()
    for name, offset, length, count in entries:
        tensor = proto.graph.initializer.add(name=name, data_type=1, dims=[count])
        tensor.data_location = TensorProto.EXTERNAL
        values = {"location": "w.bin", "offset": offset, "length": length}
        for key, value in values.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)
    return write(folder / "in.onnx", proto)


def test_weights_that_share_their_place_still_do(tmp_path: Path) -> None:
    entries = [("a", "0", "64", 16), ("c", "64", "64", 16), ("d", "0", "64", 16)]
    source = tied_model(tmp_path, entries)
    put(source, tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    where = {tensor.name: place(tensor) for tensor in proto.graph.initializer}
    assert where["a"] == where["d"] != where["c"]
    assert loaded(tmp_path / "out.onnx") == loaded(source)


def test_weights_of_other_sizes_at_one_place_keep_theirs(tmp_path: Path) -> None:
    entries = [("a", None, None, 4), ("c", "0", None, 16), ("d", None, "64", 16)]
    source = tied_model(tmp_path, entries)
    put(source, tmp_path / "out.onnx")
    made = {t.name: t for t in loaded(tmp_path / "out.onnx").graph.initializer}
    for name, _, _, count in entries:
        np.testing.assert_array_equal(numpy_helper.to_array(made[name]), np.arange(count))
    Model.open(tmp_path / "out.onnx")


def test_a_checksum_of_the_old_file_is_not_kept(tmp_path: Path) -> None:
    """It says the SHA1 of a file that the model no longer names."""
    source = write_external(tmp_path / "in.onnx", make_model())
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data.add(key="checksum", value="0" * 40)
    put(write(source, proto), tmp_path / "out.onnx")
    made = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    for tensor in made.graph.initializer:
        assert [e.key for e in tensor.external_data] == ["location", "offset", "length"]
    assert loaded(tmp_path / "out.onnx") == make_model()


# ---- outside in unusual places ----


def everywhere(folder: Path) -> ModelProto:
    """External data in every kind of tensor that a model has."""
    (folder / "w.bin").write_bytes(np.arange(64, dtype="<i8").tobytes())

    def outside(name: str, offset: int, dims: list[int]) -> TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.INT64, dims=dims)
        set_place(tensor, Place("w.bin", offset * 8, int(np.prod(dims)) * 8))
        return tensor

    proto = make_model()
    graph = proto.graph
    graph.node.append(helper.make_node("Constant", [], ["k"], value=outside("", 1, [2])))
    graph.sparse_initializer.add(
        values=outside("sparse", 3, [2]), indices=outside("", 5, [2]), dims=[99]
    )
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["t"])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.INT64, [2])],
        [outside("inner", 7, [2])],
    )
    graph.node.append(
        helper.make_node("If", ["s"], ["i"], then_branch=branch, else_branch=branch)
    )
    graph.node.append(
        helper.make_node("Odd", [], ["o"], domain="odd", many=[outside("", 9, [1])])
    )
    proto.opset_import.add(domain="odd", version=1)
    function = proto.functions.add(name="f", domain="odd", output=["o"])
    function.opset_import.add(version=17)
    function.node.append(
        helper.make_node("Constant", [], ["o"], value=outside("", 11, [3]))
    )
    function.attribute_proto.append(helper.make_attribute("d", outside("", 14, [1])))
    training = proto.training_info.add()
    training.initialization.initializer.append(outside("start", 15, [1]))
    training.algorithm.initializer.append(outside("rate", 16, [1]))
    return proto


def external_values(path: Path) -> list[list[int]]:
    """Every payload that lies outside, in order, and that it lies beside the model."""
    store = Model.open(path).weights
    proto = onnx.load(path, load_external_data=False)
    found = [t for t in save.tensors(proto) if t.data_location == TensorProto.EXTERNAL]
    return [store.array(tensor).ravel().tolist() for tensor in found]


def test_every_kind_of_tensor_takes_its_data_along(tmp_path: Path) -> None:
    source = write(tmp_path / "in.onnx", everywhere(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    expected = external_values(source)
    assert expected == [
        *([3, 4], [5, 6]),
        *([1, 2], [7, 8], [7, 8], [9]),
        *([14], [11, 12, 13]),
        *([15], [16]),
    ]
    put(source, out / "m.onnx")
    assert external_values(out / "m.onnx") == expected


def test_in_memory_they_all_come_inline(tmp_path: Path) -> None:
    source = write(tmp_path / "in.onnx", everywhere(tmp_path))
    proto = to_proto(Model.open(source))
    assert all(place(tensor) is None for tensor in save.tensors(proto))
    store = Model.open(proto).weights
    kept = [t for t in save.tensors(proto) if t.data_type == TensorProto.INT64]
    values = [store.array(tensor).ravel().tolist() for tensor in kept]
    assert values == external_values(source)


def test_large_weights_that_a_pass_wrote_into_a_branch_come_inline(
    tmp_path: Path,
) -> None:
    """The writer streams only the main graph's."""
    proto = make_model()
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["t"])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(4, np.float32), "inner")],
    )
    proto.graph.node.append(
        helper.make_node("If", ["s"], ["i"], then_branch=branch, else_branch=branch)
    )
    model = Model.open(proto)
    values = np.arange(500_000, dtype=np.float32)
    for view in model.main.children():
        edit = Edit(view, view.nodes()[0])
        edit.set_weight("inner", values)
        assert view.apply(edit, "a test")
        assert place(view.initializers()[0]) is not None
    with stage(model, tmp_path / "out.onnx") as staged:
        staged.commit()
    for attribute in onnx.load(tmp_path / "out.onnx").graph.node[-1].attribute:
        (tensor,) = attribute.g.initializer
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), values)


# ---- models over the limit of protobuf (here: a low one) ----


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "PROTOBUF_LIMIT", 10_000)


@pytest.mark.usefixtures("low_limit")
def test_large_weights_go_outside_where_they_must(tmp_path: Path) -> None:
    put(write(tmp_path / "in.onnx", make_model()), tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert [t.name for t in proto.graph.initializer if place(t)] == ["w"]
    assert loaded(tmp_path / "out.onnx") == make_model()


def test_a_constant_that_becomes_a_weight_is_no_growth() -> None:
    """What lies outside counts wherever it is named from."""
    values = numpy_helper.from_array(np.zeros((1000, 1000), np.float32), "")
    proto = make_model()
    proto.graph.node.append(helper.make_node("Constant", [], ["k"], value=values))
    proto.graph.node.append(helper.make_node("Odd", ["k"], ["o"], domain="odd"))
    proto.opset_import.add(domain="odd", version=1)
    result = onnxopt.optimize(proto, validate=False)
    (entry,) = [item for item in result.report.passes if item.edits]
    assert (entry.name, entry.edits) == ("fold-constants", 1)
    assert abs(entry.bytes) < 100
    assert Model.open(proto).bytes() > 4_000_000


@pytest.mark.usefixtures("low_limit")
def test_small_external_weights_come_along_as_well(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    out = tmp_path / "out"
    out.mkdir()
    put(source, out / "m.onnx")
    assert loaded(out / "m.onnx") == make_model()


@pytest.mark.usefixtures("low_limit")
def test_typed_fields_and_inner_scopes_go_outside_too(tmp_path: Path) -> None:
    proto = make_model()
    values = np.arange(3000, dtype=np.float32)
    typed = helper.make_tensor("t", TensorProto.FLOAT, [3000], values)
    assert not typed.HasField("raw_data")
    proto.graph.initializer.append(typed)
    inner = numpy_helper.from_array(values, "")
    proto.graph.node.append(helper.make_node("Constant", [], ["k"], value=inner))
    put(write(tmp_path / "in.onnx", proto), tmp_path / "out.onnx")
    slim = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert slim.ByteSize() < 2000
    made = loaded(tmp_path / "out.onnx").graph
    for tensor in (made.initializer[2], made.node[-1].attribute[0].t):
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), values)


def test_a_copy_of_a_model_too_large_to_serialize_keeps_all() -> None:
    """`_copy_large` is what a ModelProto of over 2 GiB goes through."""
    proto = make_model()
    extra = b"\xfa\x3f\x03new"
    for message in (proto, proto.graph, *proto.graph.initializer):
        message.MergeFromString(extra)
        message.metadata_props.add(key="k", value="v")
        message.doc_string = "doc"
    weights = onnxopt.model.WeightStore()
    copy = onnxopt.model._copy_large(proto, weights)
    assert place(copy.graph.initializer[0]) is not None
    again = to_proto(Model(copy, weights))
    assert again.SerializeToString(deterministic=True) == proto.SerializeToString(
        deterministic=True
    )


@pytest.mark.slow
def test_a_model_of_over_2_gib_in_memory(tmp_path: Path) -> None:
    """Runs in a process of its own: it needs about 5 GB."""
    script = f"""
import numpy as np, onnx, onnxopt
from onnx import TensorProto, helper
nodes, weights = [], []
payload = np.random.default_rng(0).bytes(300 << 20)
for index in range(8):
    tensor = TensorProto(name=f"w{{index}}", data_type=TensorProto.UINT8)
    tensor.dims.append(len(payload))
    tensor.raw_data = payload
    weights.append(tensor)
    nodes.append(helper.make_node("Identity", [f"w{{index}}"], [f"y{{index}}"]))
outputs = [helper.make_tensor_value_info(f"y{{i}}", 2, None) for i in range(8)]
proto = helper.make_model(helper.make_graph(nodes, "g", [], outputs))
while weights:
    proto.graph.initializer.append(weights.pop(0))
result = onnxopt.optimize(proto, passes="", validate=False)
assert len(proto.graph.initializer[7].raw_data) == len(payload)
del proto
result.save({str(tmp_path / "big.onnx")!r})
assert result.model.graph.initializer[0].data_location == TensorProto.EXTERNAL
assert result.base_dir is not None and list(result.base_dir.glob("*.data"))
from onnxopt.model import Model
model = Model.open({str(tmp_path / "big.onnx")!r})
for tensor in model.main.initializers():
    assert model.weights.read(tensor) == payload
import onnxruntime as ort
ort.InferenceSession({str(tmp_path / "big.onnx")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == 0


# ---- replacing ----


def test_an_output_may_replace_its_own_input(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", make_model())
    put(source, source)
    assert loaded(source) == make_model()
    assert names(tmp_path) == ["m.onnx"]


def test_an_output_may_replace_its_own_input_with_external_data(tmp_path: Path) -> None:
    source = write_external(tmp_path / "m.onnx", make_model())
    put(source, source)  # now the data file is named as ours are
    ours = [name for name in names(tmp_path) if name.endswith(".data")]
    assert loaded(source) == make_model()
    assert names(tmp_path) == [*ours, "m.onnx", "weights.bin"]
    put(source, source)
    assert loaded(source) == make_model()
    assert names(tmp_path) == [*ours, "m.onnx", "weights.bin"]


def test_the_command_line_may_replace_its_input_with_external_data(
    tmp_path: Path,
) -> None:
    source = put(write_external(tmp_path / "a.onnx", make_model()), tmp_path / "m.onnx")
    assert source.data_path is not None
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    spare = helper.make_node("Identity", ["x"], ["unread"])
    proto.graph.node.append(spare)
    proto.graph.initializer.pop()  # so that the data changes, and its name
    proto.graph.node[2].input[1] = "s"
    write(tmp_path / "m.onnx", proto)
    command = [sys.executable, "-m", "onnxopt", "optimize", "m.onnx", "-o", "m.onnx"]
    done = subprocess.run([*command, "--no-validate"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    made = loaded(tmp_path / "m.onnx")
    assert [node.op_type for node in made.graph.node] == ["MatMul", "ReduceSum", "Add"]
    assert made.graph.initializer[0] == make_model().graph.initializer[0]
    ours = [name for name in names(tmp_path) if name.endswith(".data")]
    assert len(ours) == 1
    assert ours != [source.data_path.name]


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is a pipe"):
        Model.open(tmp_path / "pipe")


def test_the_data_of_the_replaced_model_is_removed_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_external(tmp_path / "a.onnx", make_model(1), "a.bin")
    second = write_external(tmp_path / "b.onnx", make_model(2), "b.bin")
    target = tmp_path / "out.onnx"
    old = put(first, target).data_path
    assert old is not None
    staged = stage(Model.open(second), target)
    assert loaded(target) == make_model(1)
    order: list[str] = []
    replace, unlink = os.replace, os.unlink
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("r"), replace(*a)))
    monkeypatch.setattr(os, "unlink", lambda *a: (order.append("u"), unlink(*a)))
    staged.commit()
    assert order == ["r", "u"]
    assert not old.exists()
    assert staged.data_path is not None
    assert loaded(target) == make_model(2)
    assert names(tmp_path) == sorted(
        ["a.bin", "a.onnx", "b.bin", "b.onnx", "out.onnx", staged.data_path.name]
    )


def test_data_that_others_need_stays(tmp_path: Path) -> None:
    """Named in `keep`, or not named as ours are, or of another model."""
    target = tmp_path / "out.onnx"
    kept = put(write_external(tmp_path / "a.onnx", make_model(1)), target).data_path
    other = put(target, tmp_path / "other.onnx").data_path
    assert kept is not None
    assert other is not None
    with stage(Model.open(write(tmp_path / "b.onnx", make_model(2))), target) as staged:
        staged.keep = [kept]
        staged.commit()
    assert kept.exists()
    assert other.exists()
    assert (tmp_path / "weights.bin").exists()


def test_what_is_no_model_is_replaced_all_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "in.onnx", make_model())
    junk = b"\x3a\x04\x2a\x02\x6a\x01"  # a graph whose initializer is cut short
    for old in (b"", b"some text", junk, bytes(range(256)) * 50):
        (tmp_path / "out.onnx").write_bytes(old)
        put(source, tmp_path / "out.onnx")
        assert loaded(tmp_path / "out.onnx") == make_model()
    assert names(tmp_path) == ["in.onnx", "out.onnx"]


def test_a_replaced_model_cannot_have_other_files_removed(tmp_path: Path) -> None:
    """Its external data is only ours to remove where it lies beside it."""
    source = write(tmp_path / "in.onnx", make_model())
    (tmp_path / "sub").mkdir()
    victim = tmp_path / "out-0123456789ab.data"
    victim.write_bytes(bytes(64))
    proto = make_model()
    for location in ("../out-0123456789ab.data", str(victim)):
        set_place(proto.graph.initializer[0], Place(location, 0, 48000))
        put(source, write(tmp_path / "sub" / "out.onnx", proto))
        assert victim.exists()


def test_a_damaged_data_file_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    data = put(source, tmp_path / "out.onnx").data_path
    assert data is not None
    data.write_bytes(b"damaged")
    put(source, tmp_path / "out.onnx")
    assert loaded(tmp_path / "out.onnx") == make_model()


def test_links_are_replaced_and_never_written_through(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    folder = tmp_path / "out"
    folder.mkdir()
    data = put(source, folder / "m.onnx").data_path
    assert data is not None
    precious = {name: tmp_path / name for name in ("model", "data")}
    for path in precious.values():
        path.write_bytes(b"precious")
    for link, path in ((folder / "m.onnx", "model"), (data, "data")):
        link.unlink()
        link.symlink_to(precious[path])
    put(source, folder / "m.onnx")
    assert loaded(folder / "m.onnx") == make_model()
    assert not (folder / "m.onnx").is_symlink()
    assert not data.is_symlink()
    assert [path.read_bytes() for path in precious.values()] == [b"precious"] * 2


# ---- what goes wrong ----


def test_nothing_is_left_of_what_is_not_committed(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    before = names(tmp_path)
    with stage(Model.open(source), tmp_path / "out.onnx") as staged:
        assert loaded(staged.path) == make_model()
    assert names(tmp_path) == before


def test_discarding_does_not_take_the_data_of_a_finished_model(tmp_path: Path) -> None:
    source = write_external(tmp_path / "in.onnx", make_model())
    put(source, tmp_path / "out.onnx")
    with stage(Model.open(source), tmp_path / "out.onnx"):
        pass
    assert loaded(tmp_path / "out.onnx") == make_model()


@pytest.mark.parametrize("external", [False, True])
def test_a_source_that_changes_meanwhile_is_an_error(
    tmp_path: Path, external: bool
) -> None:
    writer = write_external if external else write
    source = writer(tmp_path / "in.onnx", make_model())
    model = Model.open(source)
    changed = tmp_path / ("weights.bin" if external else "in.onnx")
    with open(changed, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(changed, ns=(1, 1))
    with pytest.raises(UsageError, match="changed while it was being read"):
        stage(model, tmp_path / "out.onnx")
    assert not [name for name in names(tmp_path) if "out" in name]


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_is_told_and_leaves_no_debris(tmp_path: Path, external: bool) -> None:
    """A limit on the size of files stands for a disk that fills up."""
    writer = write_external if external else write
    source = writer(tmp_path / "in.onnx", make_model(size=20_000))
    put(write(tmp_path / "small.onnx", make_model(1)), tmp_path / "out.onnx")
    before = names(tmp_path)
    model = Model.open(source)
    for limit in (0, 1, 100_000, 319_000):
        with files_of_at_most(limit), pytest.raises(UsageError, match="File too large"):
            stage(model, tmp_path / "out.onnx")
        assert names(tmp_path) == before
        assert loaded(tmp_path / "out.onnx") == make_model(1)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_places_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    model = Model.open(make_model())
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for target, text in (
        (tmp_path / "none" / "m.onnx", "there is no folder"),
        (tmp_path / "file" / "m.onnx", "there is no folder"),
        (tmp_path / "folder", "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/proc/m.onnx"), "cannot write /proc/m.onnx"),
    ):
        with pytest.raises(UsageError, match=text):
            stage(model, target)
    assert names(tmp_path) == ["file", "folder", "pipe"]


def forked(work: Callable[[], object]) -> int:
    """Start work in a process of its own, which exits with 1 where it raises."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """The exit status of a process that `forked` started."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], object]) -> int:
    return ended(forked(work))


def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    model = Model.open(make_model())
    tmp_path.chmod(0o555)

    def work() -> None:
        os.chdir(tmp_path)
        if os.geteuid() == 0:  # root may write anywhere
            os.setuid(65534)
        with pytest.raises(UsageError, match="is not writable"):
            stage(model, Path("m.onnx"))

    assert in_child(work) == 0
    assert names(tmp_path) == []


# ---- at any moment ----


def dies_at(step: int) -> None:
    """Let the process die, as by kill -9, before its `step`-th call of the system."""
    left = step

    def patched(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return original(*arguments, **named)

        return call

    for name in ("open", "fdopen", "replace", "fsync", "unlink", "stat", "dup"):
        setattr(os, name, patched(name))


@pytest.mark.parametrize("external", [False, True])
def test_killed_at_any_moment_old_or_new_is_there(tmp_path: Path, external: bool) -> None:
    writer = write_external if external else write
    old = writer(tmp_path / "old.onnx", make_model(1))
    new = writer(tmp_path / "new.onnx", make_model(2))
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    seen = []
    for step in range(1, 100):
        put(old, target)

        def work(step: int = step) -> None:
            model = Model.open(new)
            dies_at(step)
            with stage(model, target) as staged:
                staged.commit()

        status = in_child(work)
        found = loaded(target)
        assert found in (make_model(1), make_model(2))
        seen.append(found == make_model(2))
        if status == 0:
            break
        assert status == 9
    assert seen[0] is False
    assert seen[-1] is True
    assert seen == sorted(seen)
    assert len(seen) > 5


def test_two_at_a_time_do_not_mix(tmp_path: Path) -> None:
    """Two processes replace one model over and over; in the end it is one of theirs."""
    sources = [
        write_external(tmp_path / f"{seed}.onnx", make_model(seed), f"{seed}.bin")
        for seed in (1, 2)
    ]
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()

    def again_and_again(source: Path) -> None:
        for _ in range(40):
            put(source, target)

    children = [forked(lambda path=path: again_and_again(path)) for path in sources]
    codes = [ended(child) for child in children]
    assert codes == [0, 0]
    assert loaded(target) in (make_model(1), make_model(2))
    assert len(names(target.parent)) == 2


def test_one_that_waits_keeps_its_data_while_another_commits(tmp_path: Path) -> None:
    """The same data file is named by a model that is replaced and by one to come."""
    first = write_external(tmp_path / "a.onnx", make_model(1), "a.bin")
    second = write_external(tmp_path / "b.onnx", make_model(2), "b.bin")
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    put(first, target)
    waiting = stage(Model.open(first), target)
    assert in_child(lambda: put(second, target)) == 0
    assert loaded(target) == make_model(2)
    waiting.commit()
    assert loaded(target) == make_model(1)
    assert len(names(target.parent)) == 2


def test_renames_in_a_folder_come_one_after_the_other(tmp_path: Path) -> None:
    """Else the data of the model that is replaced second would stay for ever."""
    sources = [
        write_external(tmp_path / f"{seed}.onnx", make_model(seed), f"{seed}.bin")
        for seed in (1, 2, 3)
    ]
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    put(sources[0], target)
    started, tell = os.pipe()

    def slowly() -> None:
        staged, replace = stage(Model.open(sources[1]), target), os.replace

        def late(*names: object) -> None:
            os.write(tell, b"!")
            time.sleep(0.5)
            replace(*names)  # type: ignore[arg-type]

        os.replace = late  # type: ignore[assignment]
        staged.commit()

    second = stage(Model.open(sources[2]), target)
    child = forked(slowly)
    os.read(started, 1)
    second.commit()
    assert ended(child) == 0
    assert loaded(target) == make_model(3)
    assert len(names(target.parent)) == 2


# ---- the streaming writer ----


def test_weights_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece that is written is larger than a chunk, however large the weight."""
    monkeypatch.setattr("onnxopt.weights.CHUNK", 1000)
    source = write(tmp_path / "in.onnx", make_model())
    sizes: list[int] = []

    class Counting(io.FileIO):
        def write(self, data: bytes, /) -> int:  # type: ignore[override]
            sizes.append(len(data))
            return super().write(data)

    monkeypatch.setattr(save, "_create", lambda path: Counting(path, "xb+"))
    put(source, tmp_path / "out.onnx")
    assert max(sizes) <= 1000
    assert loaded(tmp_path / "out.onnx") == make_model()


def test_the_written_file_can_be_scanned_again(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    put(write(tmp_path / "in.onnx", make_model()), target)
    data = target.read_bytes()
    skeleton = wire.skeleton(io.BytesIO(data), len(data), "\0x")
    assert len(skeleton) < len(data) - 48_000 + 200
