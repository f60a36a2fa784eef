"""Messages between onnxopt and its workers: a JSON head and raw buffers behind it.

A frame is `count`, then `count` lengths (8 bytes each, little endian), then the
parts themselves: part 0 is the JSON head, the others are array buffers that the
head refers to by number. Nothing is ever unpickled: a worker runs models and
libraries from anywhere, and what it answers must not be able to run code here.

Values are numpy arrays (numeric, bool, or `object` arrays of `str`), `Raw` for
element types that numpy lacks, lists (sequences), dicts (maps) and None (an
optional that is empty).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import IO, Any

import numpy as np


@dataclass(frozen=True)
class Raw:
    """A tensor of an ONNX element type without a numpy dtype: bytes as ORT keeps them.

    4-bit types are packed, two elements a byte, the first one in the low half.
    """

    elem_type: int
    shape: tuple[int, ...]
    data: bytes


class EndOfStreamError(Exception):
    """The other side closed its end of the pipe."""


Head = dict[str, Any]
Buffer = bytes | memoryview


def pack(value: Any, parts: list[Buffer]) -> Any:
    """JSON form of a value; its array bytes are appended to `parts`.

    Raises TypeError for anything that is not a value (a sparse tensor, say).
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Raw():
            parts.append(value.data)
            return {"raw": value.elem_type, "shape": value.shape, "part": len(parts)}
        case np.generic():
            return pack(value.item(), parts)
        case np.ndarray():
            return _pack_array(value, parts)
        case list() | tuple():
            return [pack(item, parts) for item in value]
        case dict():
            return {"map": [[pack(k, parts), pack(v, parts)] for k, v in value.items()]}
    raise TypeError(f"cannot send a value of type {type(value).__name__}")


def _pack_array(array: np.ndarray, parts: list[Buffer]) -> Head:
    if array.dtype.kind in "OUS":
        return {"strings": [_text(item) for item in array.flat], "shape": array.shape}
    if array.dtype.kind not in "biufc":
        raise TypeError(f"cannot send an array of {array.dtype}")
    flat = np.ascontiguousarray(array).reshape(-1)
    parts.append(flat.view(np.uint8).data)
    return {"dtype": array.dtype.str, "shape": array.shape, "part": len(parts)}


def _text(item: Any) -> str:
    return (
        item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else str(item)
    )


def unpack(form: Any, parts: list[bytearray]) -> Any:
    """The value that `pack` made `form` and the buffers `parts[1:]` from."""
    if isinstance(form, list):
        return [unpack(item, parts) for item in form]
    if not isinstance(form, dict):
        return form
    if "map" in form:
        return {unpack(k, parts): unpack(v, parts) for k, v in form["map"]}
    shape = tuple(form["shape"])
    if "strings" in form:
        array = np.empty(math.prod(shape), dtype=object)
        array[:] = form["strings"]
        return array.reshape(shape)
    data = parts[form["part"]]
    if "raw" in form:
        return Raw(form["raw"], shape, bytes(data))
    return np.frombuffer(data, dtype=np.dtype(form["dtype"])).reshape(shape)


def write(stream: IO[bytes], head: Head, parts: list[Buffer]) -> None:
    """Send one frame."""
    everything: list[Buffer] = [json.dumps(head).encode(), *parts]
    lengths = [len(part) for part in everything]
    stream.write(struct.pack(f"<Q{len(lengths)}Q", len(lengths), *lengths))
    for part in everything:
        stream.write(part)
    stream.flush()


def read(stream: IO[bytes]) -> tuple[Head, list[bytearray]]:
    """Receive one frame: its head, and all parts (part 0 is the head's own text).

    Raises EndOfStreamError where the stream ends, in a frame or between two.
    """
    (count,) = struct.unpack("<Q", _exactly(stream, 8))
    lengths = struct.unpack(f"<{count}Q", _exactly(stream, 8 * count))
    parts = [_exactly(stream, length) for length in lengths]
    head = json.loads(bytes(parts[0]))
    assert isinstance(head, dict)
    return head, parts


def _exactly(stream: IO[bytes], length: int) -> bytearray:
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EndOfStreamError
        done += got
    return data
