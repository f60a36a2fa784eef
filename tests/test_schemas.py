"""What is known of standard operators without onnx's registry is what that says."""

from __future__ import annotations

import json
from typing import Any

import onnx
import pytest

from onnxopt import operators, schemas

SCHEMAS = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""]


def expected(op_type: str, opset: int) -> Any:
    try:
        schema = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None
    kinds: Any = schema.attributes
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return (
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        tuple(item.option == single for item in schema.inputs),
        {name: int(item.type.value) for name, item in kinds.items()},
        schema.deprecated,
    )


@pytest.mark.parametrize("opset", range(onnx.defs.onnx_opset_version() + 2))
def test_every_operator_of_every_set(opset: int) -> None:
    for op_type in {schema.name for schema in SCHEMAS} | {"NoSuch"}:
        form = schemas.form(op_type, opset)
        found = form and (
            form.inputs,
            form.outputs,
            form.required,
            form.attributes,
            form.deprecated,
        )
        assert found == expected(op_type, opset), (op_type, opset)
        exists = found is not None and not found[-1]
        assert operators.exists(op_type, opset) == exists


def test_newer_sets_are_asked_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    table = schemas._Table(newest=12, operators={})
    monkeypatch.setattr(schemas, "_table", lambda: table)
    schemas.form.cache_clear()
    assert schemas.form("Conv", 12) is None
    conv = schemas.form("Conv", 13)
    schemas.form.cache_clear()
    assert conv is not None
    assert conv.inputs == (2, 3)


def test_the_file_is_made_by_the_module() -> None:
    made, kept = json.loads(schemas.make_table()), json.loads(schemas.PATH.read_bytes())
    if made["newest"] == kept["newest"]:
        assert made == kept
