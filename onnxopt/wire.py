"""Reading a model file without its weights: a scanner of the protobuf wire format.

`skeleton(file)` copies a model file except for the payloads (`raw_data`) of its large
tensors, initializers and Constants alike, which stay in the file and are named by offset
and length. So a model is parsed in the memory that its structure needs, however large
its weights are, and nothing is freed in vain: a protobuf arena keeps what was cleared.
`rewrite` is the same walk for whoever puts the payloads back.

Source: https://protobuf.dev/programming-guides/encoding (wire types 0, 1, 2, 5), and
the field numbers of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import StringStringEntryProto, TensorProto

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
TENSOR_RAW_DATA = 9
TENSOR_EXTERNAL_DATA = 13
TENSOR_DATA_LOCATION = 14
_PAYLOAD_ELSEWHERE = (TENSOR_RAW_DATA, TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION)
_INNER = {
    # message: field number -> the message in it, on the way to tensors
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
WINDOW = 256
MAX_HEADER = 20
"""Bytes of a field's tag and of the number behind it, at most."""
MAX_DEPTH = 100
"""Messages within messages: protobuf itself takes no more."""
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


def fields(file: BinaryIO, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in bytes [start, end) of `file`, in file order.

    Raises WireError where the bytes are not a message.
    """
    window, base = b"", start  # the bytes from `base` on that were read last
    position = start
    while position < end:
        at = position - base
        if len(window) - at < MAX_HEADER:
            file.seek(position)
            window, base, at = file.read(min(WINDOW, end - position)), position, 0
        tag, at = _varint_at(window, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == LENGTH:
            length, at = _varint_at(window, at)
            value = base + at
            stop = value + length
        elif wire_type == VARINT:
            value = base + at
            _, at = _varint_at(window, at)
            stop = base + at
        elif wire_type in (FIXED64, FIXED32):
            value = base + at
            stop = value + (8 if wire_type == FIXED64 else 4)
        else:
            raise WireError(f"unknown wire type {wire_type}")
        if number == 0 or stop > end:
            raise WireError("a field runs past the end of its message")
        yield Field(number, wire_type, position, value, stop)
        position = stop


def _varint_at(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at `at`, and where it ends."""
    try:
        value = data[at]
        if value < 0x80:
            return value, at + 1
        value, shift = value & 0x7F, 7
        while True:
            at += 1
            byte = data[at]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at + 1
            shift += 7
            if shift > 63:
                raise WireError("a number is too long")
    except IndexError:
        raise WireError("the file ends inside a number") from None


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


class Span(NamedTuple):
    """A piece of a rewritten message: bytes [start, end) of the file, as they are."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class Payload(NamedTuple):
    """A piece of a rewritten message: the payload of a tensor, wherever it lies."""

    tensor: TensorProto
    size: int


Piece = bytes | Span | Payload
Change = Callable[[Field], "list[Piece] | None"]


def length(pieces: Iterable[Piece]) -> int:
    """Bytes of all pieces together."""
    return sum(len(piece) if isinstance(piece, bytes) else piece.size for piece in pieces)


def rewrite(
    file: BinaryIO, size: int, wanted: Callable[[Field], bool], change: Change
) -> list[Piece]:
    """The model in `file` with some of its tensors written anew, in pieces.

    `change` gives the new body of a tensor, None where it stays; only fields that are
    `wanted` are looked into. Raises WireError where the file is not a message.
    """
    made = _rewrite(file, "model", Span(0, size), wanted, change, 0)
    return [Span(0, size)] if made is None else made


def _rewrite(
    file: BinaryIO,
    kind: str,
    span: Span,
    wanted: Callable[[Field], bool],
    change: Change,
    depth: int,
) -> list[Piece] | None:
    """The message of a kind in `span`, None where nothing in it changes."""
    if depth > MAX_DEPTH:
        raise WireError("messages are nested too deeply")
    pieces: list[Piece] = []
    copied = span.start  # everything before it is in `pieces`
    for field in fields(file, span.start, span.end):
        inner = _INNER[kind].get(field.number)
        if inner is None or field.wire_type != LENGTH or not wanted(field):
            continue
        if inner == "tensor":
            body = change(field)
        else:
            body = _rewrite(
                file, inner, Span(field.value, field.end), wanted, change, depth + 1
            )
        if body is not None:
            pieces.append(Span(copied, field.start))
            pieces.append(header(field.number, length(body)))
            pieces += body
            copied = field.end
    return [*pieces, Span(copied, span.end)] if pieces else None


def _slim_tensor(file: BinaryIO, field: Field, location: str) -> list[Piece] | None:
    """The tensor with its payload left in the file; None where it has none."""
    payload: Field | None = None
    kept: list[Piece] = []
    for inner in fields(file, field.value, field.end):
        if inner.number == TENSOR_RAW_DATA and payload is None:
            payload = inner
        elif inner.number in _PAYLOAD_ELSEWHERE:
            return None  # twice, or external besides: let the parser decide
        elif inner.end - inner.start > MIN_PAYLOAD:
            return None
        else:
            kept.append(Span(inner.start, inner.end))
    if payload is None or payload.wire_type != LENGTH:
        return None
    size = payload.end - payload.value
    return [*kept, external_entries(location, payload.value, size)]


def skeleton(file: BinaryIO, size: int, location: str) -> bytearray:
    """A serialized ModelProto equal to the one in `file`, less the large payloads.

    Each payload is replaced by external_data entries: `location` as given, offset and
    length (bytes) in `file`. Raises WireError where the file is not a message.
    """
    pieces = rewrite(
        file,
        size,
        lambda field: field.end - field.value >= MIN_PAYLOAD,
        lambda field: _slim_tensor(file, field, location),
    )
    made = bytearray(length(pieces))
    view, at = memoryview(made), 0
    for piece in pieces:
        if isinstance(piece, bytes):
            view[at : at + len(piece)] = piece
            at += len(piece)
        elif isinstance(piece, Span):
            file.seek(piece.start)
            if file.readinto(view[at : at + piece.size]) != piece.size:  # type: ignore[attr-defined]
                raise WireError("the file ends early")
            at += piece.size
    return made
