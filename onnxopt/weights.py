"""Where the weights lie, and how to read and write them.

A TensorProto holds its payload inline, or names a place: external data of the source
model, the source file itself (see `onnxopt.wire`), or, for large weights that passes
wrote, the memory that they lie in and beyond a limit the spill file. `WeightStore` reads
them all alike, on demand.

Places of ours are external_data entries whose location starts with NUL, which no path
can contain; `onnxopt.save` turns them into inline or external data.
"""

from __future__ import annotations

import functools
import math
import os
import stat
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from onnxopt import wire
from onnxopt.errors import InvalidModelError, UsageError

Array = npt.NDArray[Any]
Buffer = bytes | memoryview

CHUNK = 4 << 20
_PIECE = 256 << 10
_STRIP = 8
SPILL_FROM = 1 << 20
"""Weights that a pass wrote leave memory from this size on (bytes)."""

SOURCE = f"\0source-{os.urandom(8).hex()}"
SPILL = f"\0spill-{os.urandom(8).hex()}"
HELD = f"\0held-{os.urandom(8).hex()}"
"""Locations of ours, which no model can name: the model file, the spill file, memory."""

MAX_HELD = 128 << 20
"""So much of what passes wrote stays in memory; the rest is spilled (bytes)."""
LARGE = 1 << 30
"""Of a model from this size on nothing stays (bytes)."""

_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}
_BITS |= {"FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
PACKED_BITS = {
    value: _BITS[name] for name, value in TensorProto.DataType.items() if name in _BITS
}
"""Types whose raw form packs several elements into a byte, with the bits of one."""

TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
PAYLOAD_FIELDS = ("raw_data", *TYPED_FIELDS, "external_data", "data_location")


class Place(NamedTuple):
    """Bytes [offset, offset + length) of the file that `location` names."""

    location: str
    offset: int
    length: int | None


def place(tensor: TensorProto) -> Place | None:
    """Where `tensor` says that its payload lies; None where it is inline.

    Raises InvalidModelError where the entries do not say it.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else None
    except ValueError:
        raise InvalidModelError(
            f"tensor {tensor.name!r}: offset or length of its external data is no number"
        ) from None
    location = entries.get("location")
    usable = isinstance(location, str) and location  # bytes where it is not UTF-8
    if not usable or offset < 0 or (length is not None and length < 0):
        raise InvalidModelError(
            f"tensor {tensor.name!r}: its external data has no valid location, "
            "offset and length"
        )
    return Place(str(location), offset, length)


def elements(tensor: TensorProto) -> int:
    """How many elements the dims say."""
    return math.prod(tensor.dims)


def payload_bytes(data_type: int, count: int) -> int:
    """Bytes of `count` elements of an ONNX dtype in raw form; 0 for strings."""
    if data_type == TensorProto.STRING:
        return 0
    bits = PACKED_BITS.get(data_type)
    if bits is not None:
        return (count * bits + 7) // 8
    return count * _item_bytes(data_type)


@functools.cache
def _item_bytes(data_type: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of the payload of `tensor`, wherever it lies."""
    if tensor.data_type == TensorProto.STRING:
        return sum(len(item) for item in tensor.string_data)
    return payload_bytes(tensor.data_type, elements(tensor))


def field_bytes(length: int) -> int:
    """Bytes of a message or string of `length` bytes as a field of another message.

    That is with its length, a varint, and its tag: one byte, as of fields 1 to 15.
    """
    return 1 + max(1, (length.bit_length() + 6) // 7) + length


def inline_bytes(tensor: TensorProto) -> int:
    """Bytes of `tensor` as a field of a graph or an attribute, its payload inline."""
    size = int(tensor.ByteSize())
    if tensor.data_location:
        places = (int(entry.ByteSize()) for entry in tensor.external_data)
        size -= 2 + sum(map(field_bytes, places))  # 2: data_location
        size += field_bytes(tensor_bytes(tensor))
    return field_bytes(size)


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that can lie outside, initializers of the main graph first."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from attribute_tensors(function.attribute_proto)
        yield from _node_tensors(function.node)
    for info in proto.training_info:
        yield from _graph_tensors(info.initialization)
        yield from _graph_tensors(info.algorithm)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        if node.attribute:
            yield from attribute_tensors(node.attribute)


def attribute_tensors(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    """Every tensor in attributes, those of inner graphs included."""
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        elif attribute.HasField("sparse_tensor"):
            yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
        elif attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        yield from attribute.tensors
        for sparse in attribute.sparse_tensors:
            yield from (sparse.values, sparse.indices)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)


def set_place(tensor: TensorProto, where: Place) -> None:
    """Make `tensor` name `where` instead of holding a payload."""
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key in ("location", "offset", "length"):
        value = getattr(where, key)
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def pieces(file: int, offset: int, length: int) -> Iterator[memoryview]:
    """`length` bytes of an open file, piece by piece in one small buffer.

    Each piece holds until the next is asked for. A buffer that stays in the processor's
    cache, and is not allocated anew for each piece, takes half the time that pieces of
    megabytes take. To copy between files see `onnxopt.copying`.
    """
    buffer = memoryview(bytearray(min(_PIECE, max(length, 1))))
    end = offset + length
    while offset < end:
        count = os.preadv(file, [buffer[: min(len(buffer), end - offset)]], offset)
        if not count:
            break
        yield buffer[:count]
        offset += count


class _Source:
    """An open file that payloads are read from, with what it looked like when opened."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        self.file = file
        self.label = label
        self.state = self._state()

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def size(self) -> int:
        """The file's size now: a spill file grows."""
        return os.fstat(self.file.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        self.file.seek(offset)
        data = self.file.read(length)
        if len(data) != length:
            raise InvalidModelError(
                f"{self.label}: {length} bytes at offset {offset} are past its end"
            )
        return data

    def check_unchanged(self) -> None:
        if self._state() != self.state:
            raise UsageError(f"{self.label} changed while it was being read")


class WeightStore:
    """Reads every payload of one model; keeps the files that it reads open.

    An open file survives its replacement by rename, so an output may replace its own
    input. The spill file has no name and vanishes with the process.
    """

    def __init__(self, base_dir: Path | None = None, model_path: Path | None = None):
        self.base_dir = base_dir
        self.model_path = model_path
        self._sources: dict[str, _Source] = {}
        self._spill: BinaryIO | None = None
        self._held: dict[int, memoryview] = {}
        self._held_bytes = 0
        self._finalizer = weakref.finalize(self, _close_all, self._sources)

    def add_source(self, location: str, file: BinaryIO, label: str) -> None:
        """Let payloads named `location` be read from `file`, which the store now owns."""
        self._sources[location] = _Source(file, label)

    def data_files(self) -> list[Path]:
        """The external data files of the model, all of which were opened to check it."""
        if self.base_dir is None:
            return []
        names = sorted(name for name in self._sources if not name.startswith("\0"))
        return [self.base_dir / name for name in names]

    def open_files(self) -> list[int]:
        """Descriptors of the file that was opened, then of its data files by name."""
        data = sorted(name for name in self._sources if not name.startswith("\0"))
        return [self._sources[name].file.fileno() for name in (SOURCE, *data)]

    def close(self) -> None:
        """Close every file; payloads outside the proto can no longer be read."""
        self._finalizer()
        self._held.clear()

    def check_unchanged(self) -> None:
        """Raise UsageError where a file has changed since it was opened."""
        for location, source in self._sources.items():
            if location != SPILL:
                source.check_unchanged()

    def read(self, tensor: TensorProto) -> bytes:
        """The raw payload (little endian, 4-bit packed) of a tensor that is not a string.

        Raises InvalidModelError where the place does not hold it.
        """
        return b"".join(self.chunks(tensor))

    def chunks(self, tensor: TensorProto) -> Iterator[Buffer]:
        """The raw payload in pieces, of at most CHUNK bytes where read from a file."""
        where = place(tensor)
        if where is None:
            yield tensor.raw_data or _raw(tensor)
            return
        if where.location == HELD:
            yield self._held[where.offset]
            return
        source, length = self._open(tensor, where), tensor_bytes(tensor)
        for start in range(0, length, CHUNK):
            yield source.read(where.offset + start, min(CHUNK, length - start))

    def spot(self, tensor: TensorProto) -> tuple[int, int] | None:
        """The open file and the offset at which a payload lies; None where in memory."""
        where = place(tensor)
        if where is None or where.location == HELD:
            return None
        file = self._open(tensor, where).file
        file.flush()  # what was spilled may still be in memory
        return file.fileno(), where.offset

    def head(self, tensor: TensorProto, size: int) -> bytes:
        """The first `size` bytes of the raw payload, or all where there are fewer."""
        where = place(tensor)
        if where is None or where.location == HELD:
            return bytes(next(self.chunks(tensor))[:size])
        length = min(size, tensor_bytes(tensor))
        return self._open(tensor, where).read(where.offset, length)

    def array(self, tensor: TensorProto) -> Array:
        """The tensor as an array of its own dtype (ml_dtypes where NumPy has none).

        Shape: `tensor.dims`. Strings come as an object array of str or bytes.
        """
        where = place(tensor)
        if tensor.data_type == TensorProto.STRING:
            return _strings(tensor)
        if where is None:
            return numpy_helper.to_array(tensor)
        if tensor.data_type in PACKED_BITS:
            return numpy_helper.to_array(self.inline(tensor))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        data: Buffer
        if where.location == HELD:
            data = self._held[where.offset]
        else:
            data = self._open(tensor, where).read(where.offset, tensor_bytes(tensor))
        return np.frombuffer(data, dtype=dtype).reshape(tuple(tensor.dims))

    def inline(self, tensor: TensorProto) -> TensorProto:
        """`tensor` itself where it holds its payload, else a copy that does."""
        if place(tensor) is None:
            return tensor
        copy = TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
        copy.raw_data = self.read(tensor)
        return copy

    def tensor(self, array: Array, name: str) -> TensorProto:
        """A new initializer that holds `array`, which must not change from now on.

        A large one is kept as it is, or lies in the spill file.
        """
        array = _in_order(array)
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        if array.dtype.kind in "OSU":
            return numpy_helper.from_array(array, name)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        if kind in PACKED_BITS:
            tensor = numpy_helper.from_array(array, name)
            return tensor if array.nbytes < SPILL_FROM else self.spill(tensor)
        slim = TensorProto(name=name, data_type=kind, dims=array.shape)
        if array.nbytes < SPILL_FROM:
            slim.raw_data = array.tobytes()
            return slim
        set_place(slim, self._spilled(array.reshape(-1).view(np.uint8).data))
        return slim

    def _size(self) -> int:
        return sum(source.size() for source in self._sources.values())

    def spill(self, tensor: TensorProto) -> TensorProto:
        """A tensor equal to the inline `tensor` whose payload lies in the spill file."""
        slim = TensorProto()
        copy_fields(tensor, slim, without=PAYLOAD_FIELDS)
        set_place(slim, self._spilled(tensor.raw_data))
        return slim

    def _spilled(self, payload: Buffer) -> Place:
        """Where `payload` lies now: in memory as it is, or in the spill file."""
        length = len(payload)
        if self._held_bytes + length <= MAX_HELD and self._size() < LARGE:
            start = self._held_bytes
            self._held[start] = memoryview(payload).toreadonly()
            self._held_bytes += length
            return Place(HELD, start, length)
        if self._spill is None:
            self._spill = tempfile.TemporaryFile(prefix="onnxopt-")  # noqa: SIM115
            self.add_source(SPILL, self._spill, "the spill file")
        try:
            start = self._spill.seek(0, os.SEEK_END)
            self._spill.write(payload)
            self._spill.flush()
            return Place(SPILL, start, self._spill.tell() - start)
        except OSError as error:
            raise UsageError(
                f"cannot keep weights in {tempfile.gettempdir()}: {error.strerror}"
            ) from None

    def check(self, tensor: TensorProto) -> None:
        """Raise InvalidModelError where the payload of an outside tensor is not there."""
        where = place(tensor)
        if where is None or where.location == HELD:
            return
        source = self._open(tensor, where)
        size, wanted = source.size(), tensor_bytes(tensor)
        if where.length is not None and where.length != wanted:
            raise InvalidModelError(
                f"tensor {tensor.name!r}: its external data has {where.length} bytes, "
                f"its shape and type need {wanted}"
            )
        if where.offset + wanted > size:
            raise InvalidModelError(
                f"tensor {tensor.name!r}: bytes {where.offset} to "
                f"{where.offset + wanted} are past the end of {source.label} "
                f"({size} bytes)"
            )

    def _open(self, tensor: TensorProto, where: Place) -> _Source:
        source = self._sources.get(where.location)
        if source is None:
            path = self._resolve(tensor, where.location)
            try:
                file = open(path, "rb")  # noqa: SIM115 - the store closes it
            except OSError as error:
                raise InvalidModelError(
                    f"tensor {tensor.name!r}: cannot read its external data {path}: "
                    f"{error.strerror}"
                ) from None
            self.add_source(where.location, file, str(path))
            source = self._sources[where.location]
        return source

    def _resolve(self, tensor: TensorProto, location: str) -> Path:
        """The file that holds external data, if reading it is safe."""
        problem = None
        base = self.base_dir
        pure = Path(location)
        if base is None:
            problem = "the model came without a folder (give base_dir)"
        elif pure.is_absolute() or ".." in pure.parts or "\0" in location:
            problem = "it must lie inside the model's own folder"
        if problem is None and base is not None:
            path = base / pure
            problem = _unsafe(path, base, self.model_path)
            if problem is None:
                return path
        raise InvalidModelError(
            f"tensor {tensor.name!r}: external data {location!r} is not read: {problem}"
        )


def copy_fields(source: Message, target: Message, without: Collection[str] = ()) -> None:
    """Merge `source` into the empty `target`, fields that onnx does not know included.

    `without` names fields that are never touched, however large they are.
    """
    for name in source.DESCRIPTOR.fields_by_name:
        if name in without:
            continue
        value = getattr(source, name)
        if hasattr(value, "extend"):
            getattr(target, name).extend(value)
        elif not source.HasField(name):
            continue
        elif hasattr(value, "CopyFrom"):
            getattr(target, name).CopyFrom(value)
        else:
            setattr(target, name, value)
    target.MergeFromString(wire.unknown_fields(source))


def _in_order(array: Array) -> Array:
    """`array` itself where it lies in C order, else a copy that does."""
    if array.ndim != 2 or array.flags.c_contiguous or not array.flags.f_contiguous:
        return np.asarray(array, order="C")  # ascontiguousarray makes scalars [1]
    made = np.empty(array.shape, array.dtype)
    for start in range(0, len(made[0]), _STRIP):  # five times as fast as NumPy's own
        made[:, start : start + _STRIP] = array[:, start : start + _STRIP]
    return made


def _strings(tensor: TensorProto) -> Array:
    """String data as it is: str where it is UTF-8, bytes where not."""
    if place(tensor) is not None:
        raise InvalidModelError(f"tensor {tensor.name!r}: strings cannot lie outside")
    array = np.empty(len(tensor.string_data), dtype=object)
    for index, item in enumerate(tensor.string_data):
        try:
            array[index] = item.decode()
        except UnicodeDecodeError:
            array[index] = item
    return array.reshape(tuple(tensor.dims))


def _raw(tensor: TensorProto) -> bytes:
    """The raw form of a payload that is stored in a typed field."""
    return numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def _unsafe(path: Path, base: Path, model_path: Path | None) -> str | None:
    """Why the data file `path` must not be read; None where it may.

    A link may lead to the folder where the model file itself really lies: in a
    Hugging Face cache both the model and its data are links into one blob folder.
    """
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except OSError as error:
        return f"{error.strerror} (looked for {path})"
    except RuntimeError:
        return f"its links go in a circle (looked for {path})"
    roots = [base.resolve()]
    if model_path is not None:
        roots.append(model_path.resolve().parent)
    if not any(real.is_relative_to(root) for root in roots):
        return "it is a link that leaves the model's own folder"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_nlink > 1:
        return "it is a hard link; copy it"
    return None


def _close_all(sources: dict[str, _Source]) -> None:
    for source in sources.values():
        source.file.close()
    sources.clear()
