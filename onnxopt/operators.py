"""Facts about standard operators that several passes need."""

from __future__ import annotations

import functools

import onnx

RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",  # in training mode
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
"""Operators whose outputs may differ from run to run."""


@functools.cache
def exists(op_type: str, opset: int) -> bool:
    """Whether the standard operator set of version `opset` has `op_type`."""
    try:
        schema = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return False
    return not schema.deprecated
