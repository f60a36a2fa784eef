"""Comparing what is neither graph nor weight: versions, doc strings, metadata.

Field by field, as the protobuf has them, so that nothing is overlooked: fields that onnx
does not know are compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from onnxopt import wire
from onnxopt.data.inputs import shape_text
from onnxopt.differences.found import FactChange
from onnxopt.inspection.survey import Value, value_of

Names = Mapping[str, str]
"""What a value of A is called in B, where that is another name."""


def differing_fields(
    where: str,
    a: Message,
    b: Message,
    without: Collection[str] = (),
    names: Names | None = None,
) -> Iterator[FactChange]:
    """The fields of two messages of one type that differ, `without` some."""
    prefix = f"{where}: " if where else ""
    for name in a.DESCRIPTOR.fields_by_name:
        if name in without:
            continue
        one, two = getattr(a, name), getattr(b, name)
        if name in _KEYED:
            key = _KEYED[name]
            yield from _entries(f"{prefix}{name} ", key(one, names or {}), key(two, {}))
        elif _wire(one) != _wire(two):
            yield FactChange(f"{prefix}{name}", _text(one), _text(two))
    if wire.unknown_fields(a) != wire.unknown_fields(b):
        yield FactChange(f"{prefix}fields that onnx does not know", None, None)


def type_words(value: Value) -> str:
    """`float32[n,3]`; no brackets where the rank is open."""
    return value.type + (shape_text(value.shape) if value.shape is not None else "")


def _entries(prefix: str, a: dict[str, str], b: dict[str, str]) -> Iterator[FactChange]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield FactChange(f"{prefix}{key}", a.get(key), b.get(key))


def _properties(entries: Any, _: Names) -> dict[str, str]:
    return {entry.key: entry.value for entry in entries}


def _opsets(entries: Any, _: Names) -> dict[str, str]:
    return {entry.domain or "ai.onnx": str(entry.version) for entry in entries}


def _values(infos: Any, names: Names) -> dict[str, str]:
    """Types of values by name; what words do not say follows as it is."""
    return {names.get(info.name, info.name): _value_text(info) for info in infos}


def _value_text(info: Any) -> str:
    words = type_words(value_of(info))
    return f"{words} ({info.doc_string})" if info.doc_string else words


_KEYED: dict[str, Callable[[Any, Names], dict[str, str]]] = {
    "metadata_props": _properties,
    "opset_import": _opsets,
    "value_info": _values,
}
"""Repeated fields in which the order does not count, as dicts."""


def _wire(value: Any) -> Any:
    """A field's value in a form that `==` compares bit by bit."""
    if isinstance(value, Message):
        return value.SerializeToString(deterministic=True)
    if isinstance(value, str | bytes | int):
        return value
    if isinstance(value, float):
        return value.hex()
    return [_wire(item) for item in value]


def _text(value: Any) -> str:
    """A field's value for people; of messages only how many there are."""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, Message):
        return f"{value.ByteSize()} bytes"
    items = list(value)
    if any(isinstance(item, Message) for item in items) or not items:
        return f"{len(items)} entries"
    return ", ".join(map(_text, items))
