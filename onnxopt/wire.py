"""Reading a model file without its weights: a scanner of the protobuf wire format.

`skeleton(file)` copies a model file except for the payloads (`raw_data`) of its large
initializers, which stay in the file and are named by offset and length. So a model is
parsed in the memory that its structure needs, however large its weights are, and
nothing is freed in vain: a protobuf arena keeps what was cleared.

Source: https://protobuf.dev/programming-guides/encoding (wire types 0, 1, 2, 5), and
the field numbers of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import StringStringEntryProto, TensorProto

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA = 9
TENSOR_EXTERNAL_DATA = 13
TENSOR_DATA_LOCATION = 14
_PAYLOAD_ELSEWHERE = (TENSOR_RAW_DATA, TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION)
MIN_PAYLOAD = 4096
"""Smaller payloads stay inline: shape inference wants them, and they cost nothing."""


class WireError(ValueError):
    """The bytes are not a protobuf message."""


class Field(NamedTuple):
    """One field of a message: its number, and where it and its value lie in the file."""

    number: int
    wire_type: int
    start: int
    value: int
    end: int


def varint(value: int) -> bytes:
    """`value` (>= 0) in base 128, least significant group first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def header(number: int, length: int) -> bytes:
    """What stands before a length-delimited field of `length` bytes."""
    return varint(number << 3 | LENGTH) + varint(length)


def _read_varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = file.read(1)
        if not byte:
            raise WireError("the file ends inside a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7
        if shift > 63:
            raise WireError("a number is too long")


def fields(file: BinaryIO, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in bytes [start, end) of `file`, in file order.

    Raises WireError where the bytes are not a message.
    """
    position = start
    while position < end:
        file.seek(position)
        tag = _read_varint(file)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == LENGTH:
            length = _read_varint(file)
            value = file.tell()
            stop = value + length
        elif wire_type == VARINT:
            value = file.tell()
            _read_varint(file)
            stop = file.tell()
        elif wire_type in (FIXED64, FIXED32):
            value = file.tell()
            stop = value + (8 if wire_type == FIXED64 else 4)
        else:
            raise WireError(f"unknown wire type {wire_type}")
        if number == 0 or stop > end:
            raise WireError("a field runs past the end of its message")
        yield Field(number, wire_type, position, value, stop)
        position = stop


def external_entries(location: str, offset: int, length: int) -> bytes:
    """The serialized TensorProto fields that say where a payload lies."""
    out = bytearray()
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = StringStringEntryProto(key=key, value=str(value)).SerializeToString()
        out += header(TENSOR_EXTERNAL_DATA, len(entry)) + entry
    out += varint(TENSOR_DATA_LOCATION << 3 | VARINT) + varint(TensorProto.EXTERNAL)
    return bytes(out)


def unknown_fields(message: Message) -> bytes:
    """The top-level fields of a parsed message that its class does not know."""
    return b"".join(map(_unknown, UnknownFieldSet(message)))


def _unknown(field: Any) -> bytes:
    tag = varint(field.field_number << 3 | field.wire_type)
    match field.wire_type:
        case 0:
            return tag + varint(field.data)
        case 1:
            return tag + int(field.data).to_bytes(8, "little")
        case 2:
            return tag + varint(len(field.data)) + bytes(field.data)
        case 5:
            return tag + int(field.data).to_bytes(4, "little")
    return b""  # a group: nothing writes them any more


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    data = file.read(end - start)
    if len(data) != end - start:
        raise WireError("the file ends early")
    return data


def _slim_initializer(file: BinaryIO, field: Field, location: str) -> bytes | None:
    """The initializer with its payload left in the file; None where it has none."""
    payload: Field | None = None
    kept = bytearray()
    for inner in fields(file, field.value, field.end):
        if inner.number == TENSOR_RAW_DATA and payload is None:
            payload = inner
        elif inner.number in _PAYLOAD_ELSEWHERE:
            return None  # twice, or external besides: let the parser decide
        elif inner.end - inner.start > MIN_PAYLOAD:
            return None
        else:
            kept += _read(file, inner.start, inner.end)
    if payload is None or payload.wire_type != LENGTH:
        return None
    kept += external_entries(location, payload.value, payload.end - payload.value)
    return header(GRAPH_INITIALIZER, len(kept)) + bytes(kept)


def _slim_graph(file: BinaryIO, graph: Field, location: str) -> bytes:
    out = bytearray()
    copied = graph.value  # everything before this offset is already in `out`
    for field in fields(file, graph.value, graph.end):
        large = field.end - field.value >= MIN_PAYLOAD
        if field.number != GRAPH_INITIALIZER or field.wire_type != LENGTH or not large:
            continue
        slim = _slim_initializer(file, field, location)
        if slim is not None:
            out += _read(file, copied, field.start) + slim
            copied = field.end
    return bytes(out) + _read(file, copied, graph.end)


def skeleton(file: BinaryIO, size: int, location: str) -> bytes:
    """A serialized ModelProto equal to the one in `file`, less the large payloads.

    Each payload is replaced by external_data entries: `location` as given, offset and
    length (bytes) in `file`. Raises WireError where the file is not a message.
    """
    out = bytearray()
    for field in fields(file, 0, size):
        if field.number == MODEL_GRAPH and field.wire_type == LENGTH:
            slim = _slim_graph(file, field, location)
            out += header(MODEL_GRAPH, len(slim)) + slim
        else:
            out += _read(file, field.start, field.end)
    return bytes(out)
