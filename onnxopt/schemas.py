"""What the schemas of standard operators say of their nodes, without onnx's registry.

The first question to `onnx.defs` builds the schemas of all operators of all versions
with their texts, which costs a process more than it takes to simplify a small model. So
what is asked of every node (arity, attribute types) is in `schemas.json`, made of that
registry by `python -m onnxopt.schemas`. For an operator set that is newer than the file,
the registry is asked.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import onnx

PATH = Path(__file__).with_name("schemas.json")


class Form(msgspec.Struct, frozen=True, array_like=True):
    """One version of an operator.

    `inputs` and `outputs`: least and most; `required`: whether an input may not be left
    out, as far as they have names of their own; `attributes`: their AttributeTypes.
    """

    since: int
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    required: tuple[bool, ...]
    attributes: dict[str, int]
    deprecated: bool


class _Table(msgspec.Struct):
    """All versions of each operator, newest first, up to operator set `newest`."""

    newest: int
    operators: dict[str, list[Form]]


@functools.cache
def form(op_type: str, opset: int) -> Form | None:
    """What `op_type` looks like in operator set `opset`; None where there is no such."""
    table = _table()
    if opset > table.newest:
        return _registered(op_type, opset)
    versions = table.operators.get(op_type, ())
    return next((found for found in versions if found.since <= opset), None)


@functools.cache
def _table() -> _Table:
    return msgspec.json.decode(PATH.read_bytes(), type=_Table)


def _registered(op_type: str, opset: int) -> Form | None:
    try:
        return _of_schema(onnx.defs.get_schema(op_type, opset))
    except onnx.defs.SchemaError:
        return None


def _of_schema(schema: onnx.defs.OpSchema) -> Form:
    kinds: Any = schema.attributes
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return Form(
        since=schema.since_version,
        inputs=(schema.min_input, schema.max_input),
        outputs=(schema.min_output, schema.max_output),
        required=tuple(formal.option == single for formal in schema.inputs),
        attributes={name: int(kinds[name].type.value) for name in sorted(kinds)},
        deprecated=schema.deprecated,
    )


def make_table() -> bytes:
    """The file's contents by the installed onnx: one operator a line."""
    operators: dict[str, list[Form]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            operators.setdefault(schema.name, []).append(_of_schema(schema))
    lines = []
    for name in sorted(operators):
        versions = sorted(operators[name], key=lambda found: -found.since)
        lines.append(f'"{name}": {msgspec.json.encode(versions).decode()}')
    newest = onnx.defs.onnx_opset_version()
    body = ",\n".join(lines)
    return f'{{"newest": {newest}, "operators": {{\n{body}\n}}}}\n'.encode()


if __name__ == "__main__":
    PATH.write_bytes(make_table())
