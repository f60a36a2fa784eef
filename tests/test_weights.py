"""Payloads are read and written to the byte, wherever they lie, or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxopt import weights
from onnxopt.errors import InvalidModelError, UsageError
from onnxopt.weights import (
    CHUNK,
    HELD,
    PACKED_BITS,
    SPILL,
    SPILL_FROM,
    Place,
    WeightStore,
    payload_bytes,
    place,
    set_place,
    tensor_bytes,
)

DTYPES = {
    name: value
    for name, value in TensorProto.DataType.items()
    if name not in ("UNDEFINED", "STRING")
}
SIZES = {"scalar": (), "one": (1,), "odd": (7,), "matrix": (3, 5), "empty": (0, 4)}


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> int:
    return DTYPES[request.param]


@pytest.fixture(params=SIZES)
def dims(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SIZES[request.param]


def payload_of(dtype: int, count: int) -> bytes:
    """Arbitrary bits, NaN payloads and all; unused bits of a last byte are 0."""
    random = np.random.default_rng(dtype * 1000 + count)
    data = bytearray(random.integers(0, 256, payload_bytes(dtype, count), np.uint8))
    if dtype == TensorProto.BOOL:
        data = bytearray(item & 1 for item in data)
    unused = len(data) * 8 - count * PACKED_BITS.get(dtype, 8)
    if dtype in PACKED_BITS and unused:
        data[-1] &= 0xFF >> unused
    return bytes(data)


def raw(dtype: int, dims: tuple[int, ...], name: str = "w") -> TensorProto:
    tensor = TensorProto(data_type=dtype, dims=dims, name=name)
    tensor.raw_data = payload_of(dtype, int(np.prod(dims)))
    return tensor


def typed(dtype: int, dims: tuple[int, ...]) -> TensorProto:
    """The same payload in the field that the ONNX spec names for the type."""
    data = payload_of(dtype, int(np.prod(dims)))
    tensor = TensorProto(data_type=dtype, dims=dims, name="w")
    field = getattr(tensor, helper.tensor_dtype_to_field(dtype))
    if PACKED_BITS.get(dtype) == 6:  # one element an entry
        codes = numpy_helper.to_array(raw(dtype, dims)).view(np.uint8)
        field.extend(codes.ravel().tolist())
    elif dtype in PACKED_BITS:  # one byte an entry
        field.extend(data)
    else:
        field.extend(np.frombuffer(data, ENTRIES.get(dtype, "u1")).tolist())
    return tensor


ENTRIES = {
    TensorProto.FLOAT: "<f4",
    TensorProto.COMPLEX64: "<f4",
    TensorProto.DOUBLE: "<f8",
    TensorProto.COMPLEX128: "<f8",
    TensorProto.FLOAT16: "<u2",
    TensorProto.BFLOAT16: "<u2",
    TensorProto.UINT16: "<u2",
    TensorProto.INT16: "<i2",
    TensorProto.INT8: "i1",
    TensorProto.INT32: "<i4",
    TensorProto.INT64: "<i8",
    TensorProto.UINT32: "<u4",
    TensorProto.UINT64: "<u8",
}
"""How the bytes of a payload become entries of its typed field; uint8 else."""


def outside(
    folder: Path, tensor: TensorProto, offset: int = 48, length: bool = True
) -> TensorProto:
    """The tensor with its payload in `folder/w.bin`, between other bytes."""
    data = tensor.raw_data
    (folder / "w.bin").write_bytes(b"\xaa" * offset + data + b"\xbb" * 5)
    set_place(tensor, Place("w.bin", offset, len(data) if length else None))
    return tensor


# ---- every dtype, every storage ----


def test_raw_payloads_are_read_to_the_byte(dtype: int, dims: tuple[int, ...]) -> None:
    tensor = raw(dtype, dims)
    assert WeightStore().read(tensor) == tensor.raw_data
    assert tensor_bytes(tensor) == len(tensor.raw_data)


def test_typed_fields_are_read_to_the_byte(dtype: int, dims: tuple[int, ...]) -> None:
    expected = payload_of(dtype, int(np.prod(dims)))
    if ENTRIES.get(dtype) == "<f4":  # a float becomes a Python float on the way
        expected = np.frombuffer(expected, "<f4").astype("<f8").astype("<f4").tobytes()
    assert WeightStore().read(typed(dtype, dims)) == expected


def test_external_payloads_are_read_to_the_byte(
    dtype: int, dims: tuple[int, ...], tmp_path: Path
) -> None:
    inline = raw(dtype, dims)
    tensor = outside(tmp_path, raw(dtype, dims))
    assert place(tensor) == ("w.bin", 48, len(inline.raw_data))
    store = WeightStore(tmp_path)
    store.check(tensor)
    assert store.read(tensor) == inline.raw_data
    assert store.inline(tensor).raw_data == inline.raw_data
    array = store.array(tensor)
    assert array.dtype == helper.tensor_dtype_to_np_dtype(dtype)
    assert array.shape == dims
    assert array.tobytes() == numpy_helper.to_array(inline).tobytes()


def test_arrays_become_the_same_payload(dtype: int, dims: tuple[int, ...]) -> None:
    tensor = raw(dtype, dims)
    store = WeightStore()
    again = store.tensor(store.array(tensor), "w")
    assert again == tensor
    assert store.array(typed(dtype, dims)).dtype == store.array(tensor).dtype


@pytest.mark.parametrize("most_held", [0, 128 << 20])
def test_large_arrays_leave_the_protobuf_and_come_back(
    dtype: int, most_held: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(weights, "MAX_HELD", most_held)
    tensor = raw(dtype, (SPILL_FROM + 3,))
    store = WeightStore()
    array = store.array(tensor)
    first, second = store.tensor(array, "a"), store.tensor(array[::-1], "b")
    assert place(first) is not None
    assert not first.HasField("raw_data")
    assert store.read(first) == tensor.raw_data
    assert store.array(second).tobytes() == array[::-1].tobytes()
    store.check(first)
    store.check(second)


def test_arrays_of_any_layout_are_written_in_order() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    for odd in (array.T, np.asfortranarray(array), array[:, ::2], array.astype(">i4")):
        tensor = WeightStore().tensor(odd, "w")
        assert tensor.raw_data == odd.astype("<i4").tobytes(order="C")
        assert tuple(tensor.dims) == odd.shape


# ---- strings ----


def test_strings_keep_every_byte() -> None:
    items = [b"plain", "größe".encode(), b"nul at the end\0", b"", b"\xff\xfe not utf-8"]
    tensor = TensorProto(
        name="s", data_type=TensorProto.STRING, dims=[5], string_data=items
    )
    store = WeightStore()
    array = store.array(tensor)
    assert list(array) == [*(item.decode() for item in items[:4]), items[4]]
    assert store.tensor(array, "s") == tensor
    assert tensor_bytes(tensor) == sum(map(len, items))


def test_strings_have_the_shape_of_their_tensor() -> None:
    tensor = helper.make_tensor("s", TensorProto.STRING, [2, 1], ["a", "b"])
    assert WeightStore().array(tensor).tolist() == [["a"], ["b"]]
    scalar = helper.make_tensor("s", TensorProto.STRING, [], ["a"])
    assert WeightStore().array(scalar).item() == "a"


# ---- places ----


def test_without_offset_and_length_it_is_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(6, dtype="<f4").tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    store = WeightStore(tmp_path)
    store.check(tensor)
    np.testing.assert_array_equal(store.array(tensor), np.arange(6).reshape(2, 3))


def test_chunks_are_small_and_complete(tmp_path: Path) -> None:
    tensor = outside(tmp_path, raw(TensorProto.UINT8, (2 * CHUNK + 5,)))
    chunks = list(WeightStore(tmp_path).chunks(tensor))
    assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, 5]
    assert b"".join(chunks) == (tmp_path / "w.bin").read_bytes()[48:-5]


def test_a_file_in_a_folder_below_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    tensor = outside(tmp_path / "data", raw(TensorProto.INT8, (4,)))
    set_place(tensor, Place("data/w.bin", 48, 4))
    assert WeightStore(tmp_path).read(tensor) == payload_of(TensorProto.INT8, 4)


def test_a_blob_folder_may_hold_model_and_data_behind_links(tmp_path: Path) -> None:
    """As in a Hugging Face cache."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    tensor = outside(blobs, raw(TensorProto.INT8, (4,)))
    (blobs / "m.bin").write_bytes(b"the model")
    (snapshot / "w.bin").symlink_to(blobs / "w.bin")
    (snapshot / "model.onnx").symlink_to(blobs / "m.bin")
    store = WeightStore(snapshot, snapshot / "model.onnx")
    assert store.read(tensor) == payload_of(TensorProto.INT8, 4)
    with pytest.raises(InvalidModelError, match="a link that leaves"):
        WeightStore(snapshot).read(tensor)


# ---- what is refused ----


def refused(
    folder: Path | None, location: str, offset: str = "0", length: str = ""
) -> str:
    tensor = TensorProto(name="weight", data_type=TensorProto.INT8, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": offset, "length": length}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(InvalidModelError) as error:
        WeightStore(folder).check(tensor)
    text = str(error.value)
    assert "'weight'" in text
    assert "\n" not in text
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.bin").write_bytes(bytes(100))
    inner = tmp_path / "model"
    inner.mkdir()
    (inner / "w.bin").write_bytes(bytes(10))
    return inner


@pytest.mark.parametrize(
    "location", ["../secret.bin", "a/../../secret.bin", "/etc/hostname", "w.bin\0x"]
)
def test_paths_out_of_the_folder_are_refused(folder: Path, location: str) -> None:
    assert "inside the model's own folder" in refused(folder, location)


def test_the_places_of_our_own_cannot_be_named_by_a_model(folder: Path) -> None:
    for location in ("\0source", "\0spill", "\0"):
        assert "inside the model's own folder" in refused(folder, location)


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    assert "link that leaves" in refused(folder, "link.bin")
    (folder / "sub").symlink_to(folder.parent)
    assert "link that leaves" in refused(folder, "sub/secret.bin")


def test_hard_links_are_refused(folder: Path) -> None:
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    assert "hard link" in refused(folder, "hard.bin")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_what_is_not_a_regular_file_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert "not a regular file" in refused(folder, "pipe")
    (folder / "sub").mkdir()
    assert "not a regular file" in refused(folder, "sub")


def test_missing_files_and_loops_are_refused(folder: Path) -> None:
    assert "No such file" in refused(folder, "none.bin")
    (folder / "loop").symlink_to("loop")
    refused(folder, "loop")
    refused(folder, "x" * 5000)


def test_data_without_a_folder_is_refused() -> None:
    assert "base_dir" in refused(None, "w.bin")


@pytest.mark.parametrize(
    ("offset", "length", "text"),
    [
        ("7", "4", "past the end"),
        ("7", "", "past the end"),
        ("1" * 30, "4", "past the end"),
        ("0", "3", "has 3 bytes"),
        ("0", "1" * 30, "bytes"),
        ("-1", "4", "no valid location"),
        ("0", "-4", "no valid location"),
        ("x", "4", "no number"),
        ("0", "4.0", "no number"),
    ],
)
def test_wrong_offsets_and_lengths_are_refused(
    folder: Path, offset: str, length: str, text: str
) -> None:
    assert text in refused(folder, "w.bin", offset, length)


@pytest.mark.parametrize("location", [b"", b"\xff\xfe"])
def test_locations_that_are_no_names_are_refused(location: bytes) -> None:
    entry = b"\x0a\x08location\x12" + bytes([len(location)]) + location
    tensor = TensorProto(name="weight", data_location=TensorProto.EXTERNAL)
    tensor.MergeFromString(b"\x6a" + bytes([len(entry)]) + entry)
    with pytest.raises(InvalidModelError, match="no valid location"):
        place(tensor)


# ---- files that change ----


def test_a_source_that_changes_is_noticed(folder: Path) -> None:
    store = WeightStore(folder)
    tensor = TensorProto(name="w", data_type=TensorProto.INT8, dims=[10])
    set_place(tensor, Place("w.bin", 0, 10))
    store.read(tensor)
    store.check_unchanged()
    (folder / "w.bin").write_bytes(bytes(11))
    with pytest.raises(UsageError, match=r"w\.bin changed while it was being read"):
        store.check_unchanged()


def test_a_source_that_is_cut_short_is_an_error(folder: Path) -> None:
    store = WeightStore(folder)
    tensor = TensorProto(name="w", data_type=TensorProto.INT8, dims=[10])
    set_place(tensor, Place("w.bin", 0, 10))
    store.check(tensor)
    os.truncate(folder / "w.bin", 4)
    with pytest.raises(InvalidModelError, match="past its end"):
        store.read(tensor)


def test_a_source_that_is_replaced_by_rename_is_still_read(folder: Path) -> None:
    store = WeightStore(folder)
    tensor = TensorProto(name="w", data_type=TensorProto.INT8, dims=[10])
    set_place(tensor, Place("w.bin", 0, 10))
    store.check(tensor)
    (folder / "new.bin").write_bytes(b"\1" * 10)
    os.replace(folder / "new.bin", folder / "w.bin")
    assert store.read(tensor) == bytes(10)


# ---- the spill file ----


def test_spilling_keeps_all_but_the_payload() -> None:
    tensor = raw(TensorProto.FLOAT, (300, 1000))
    tensor.doc_string = "about it"
    tensor.metadata_props.add(key="k", value="v")
    tensor.MergeFromString(b"\xfa\x3f\x03new")
    store = WeightStore()
    slim = store.spill(tensor)
    assert slim.ByteSize() < 1000
    assert store.read(slim) == tensor.raw_data
    for field in weights.PAYLOAD_FIELDS:
        slim.ClearField(field)
    slim.raw_data = tensor.raw_data
    assert slim.SerializeToString() == tensor.SerializeToString()


def test_the_spill_file_has_no_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "MAX_HELD", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = WeightStore()
    tensor = store.tensor(np.zeros(SPILL_FROM, np.uint8), "w")
    assert list(tmp_path.iterdir()) == []
    store.close()
    with pytest.raises(InvalidModelError):
        store.read(tensor)


def test_what_is_held_in_memory_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "MAX_HELD", 3 * SPILL_FROM)
    store = WeightStore()
    tensors = [store.tensor(np.full(SPILL_FROM, i, np.uint8), "w") for i in range(6)]
    places = [place(tensor) for tensor in tensors]
    assert [where.location for where in places if where] == [HELD] * 3 + [SPILL] * 3
    for index, tensor in enumerate(tensors):
        assert set(store.read(tensor)) == {index}
        assert store.head(tensor, 2) == bytes([index, index])


def test_small_arrays_stay_in_memory() -> None:
    store = WeightStore()
    assert place(store.tensor(np.zeros(SPILL_FROM - 1, np.uint8), "w")) is None
    assert place(store.tensor(np.zeros(SPILL_FROM, np.uint8), "w")) is not None


def test_a_full_disk_is_reported(monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "MAX_HELD", 0)
    full = open("/dev/full", "w+b")  # noqa: SIM115 - the store closes it
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
    with pytest.raises(UsageError, match=r"cannot keep weights in .*No space left"):
        WeightStore().tensor(np.zeros(SPILL_FROM, np.uint8), "w")
