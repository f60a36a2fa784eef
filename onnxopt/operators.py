"""Facts about standard operators that several passes need."""

from __future__ import annotations

from onnxopt import schemas

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


def exists(op_type: str, opset: int) -> bool:
    """Whether the standard operator set of version `opset` has `op_type`."""
    form = schemas.form(op_type, opset)
    return form is not None and not form.deprecated
