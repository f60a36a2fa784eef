"""What inference knows of a value: its type, its dims, and small integers in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, TypeProto, helper

from onnxopt.symbolic.dim import Dim, Expr
from onnxopt.weights import Array

Dims = tuple[Dim, ...]
Value = npt.NDArray[Any]
"""An array of objects: each a Dim, or None where it is not known."""

MAX_VALUE = 128
"""Elements of the longest value that is followed: shapes are shorter."""

FOLLOWED = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
"""Types whose values are followed: sizes, indices, and comparisons of them."""


class Fact(msgspec.Struct, frozen=True):
    """Of one value: ONNX element type (0: unknown), dims (None: unknown rank), value.

    `value`, where there is one, has the rank and the sizes that `dims` says.
    """

    dtype: int = 0
    dims: Dims | None = None
    value: Value | None = None


UNKNOWN = Fact()


class Call(Protocol):
    """One node, as a rule sees it."""

    node: NodeProto
    opset: int
    inputs: list[Fact]

    def has(self, slot: int) -> bool:
        """Whether input `slot` is given."""
        ...

    def array(self, slot: int) -> Array | None:
        """Input `slot` where it is a constant of at most MAX_VALUE elements."""
        ...

    def fresh(self, axis: int, slot: int = 0) -> Dim:
        """A size of output `slot` of which nothing is known: one atom for each axis."""
        ...


def of_value(dtype: int, value: Value) -> Fact:
    """A fact with the dims that its value has."""
    return Fact(dtype, value.shape, value if value.size <= MAX_VALUE else None)


def objects(array: Array) -> Value:
    """The elements as Python integers."""
    return array.astype(object)


def vector(sizes: Dims) -> Value:
    """A shape as a value, int64 [rank]."""
    made = np.empty(len(sizes), dtype=object)
    for index, size in enumerate(sizes):
        made[index] = size
    return made


def integers(value: Value | None) -> list[int] | None:
    """The elements in order where all are numbers; None where some is not."""
    if value is None:
        return None
    flat: list[Any] = list(value.flat)
    return None if any(not isinstance(item, int) for item in flat) else flat


def array_of(fact: Fact) -> Array | None:
    """The value as ONNX Runtime computes it; None where some element is no number."""
    items = integers(fact.value)
    if items is None or fact.value is None or fact.dtype not in FOLLOWED:
        return None
    dtype = helper.tensor_dtype_to_np_dtype(fact.dtype)
    return np.array(items, dtype=dtype).reshape(fact.value.shape)


def of_type(kind: TypeProto, size_of: Callable[[int, str], Dim]) -> Fact:
    """What a type says; `size_of` makes the dims that it gives no number.

    It is asked with the axis and the symbol, "" where there is none.
    """
    if not kind.HasField("tensor_type"):
        return UNKNOWN
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return Fact(tensor.elem_type)
    dims = tuple(
        int(size.dim_value)
        if size.HasField("dim_value") and size.dim_value >= 0
        else size_of(axis, size.dim_param)
        for axis, size in enumerate(tensor.shape.dim)
    )
    return Fact(tensor.elem_type, dims)


def numbers(dims: Dims | None) -> list[int] | None:
    """Dims that are all numbers; None where some is not."""
    if dims is None or any(not isinstance(size, int) for size in dims):
        return None
    return [size for size in dims if isinstance(size, int)]


def is_symbolic(value: Value) -> bool:
    """Whether all elements are known and some is no number."""
    items = list(value.flat)
    return None not in items and any(isinstance(item, Expr) for item in items)
