"""Facts about a value's channels: the lattice of the forward analysis.

A fact has the rank of its value; each of its dims is 1 (the same all along the axis) or
the value's own. So [1, C, 1, 1] says something about every channel of an image, and
broadcasting is that of NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxopt.weights import Array

Mask = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.uint8]

MAX_ELEMENTS = 1 << 20
"""Facts with more elements than this are not kept."""


class Kind(IntEnum):
    """What is known of an element; an operator's result knows no more than its inputs.

    WILD elements are known not to be finite: what is multiplied by zero is then not
    zero. MAP does not depend on the model's inputs, but its value is not known here.
    """

    WILD = 0
    DYN = 1
    MAP = 2
    CONST = 3


@dataclass(frozen=True, eq=False)
class Fact:
    """`kinds` and, where those are CONST, `values` (1 elsewhere); equal shapes."""

    kinds: Kinds
    values: Array

    @property
    def is_const(self) -> Mask:
        """Where the value is known."""
        return np.asarray(self.kinds == Kind.CONST)

    @property
    def is_zero(self) -> Mask:
        """Where the value is known to be zero, of either sign."""
        return np.asarray(self.is_const & (self.values == 0))

    @property
    def is_wild(self) -> Mask:
        """Where the value is known not to be finite."""
        return np.asarray(self.kinds == Kind.WILD)

    def whole(self, kind: Kind) -> bool:
        """Whether every element is at least of `kind`."""
        return bool((self.kinds >= kind).all())

    def across(self, axes: tuple[int, ...]) -> Fact:
        """The fact with dims of 1 on `axes`: what holds at each of their indices.

        Where the elements differ, it is of their lowest kind, or MAP.
        """
        kinds = self.kinds.min(axis=axes, keepdims=True)
        values = self.values.min(axis=axes, keepdims=True)
        same = values == self.values.max(axis=axes, keepdims=True)
        kinds = np.where((kinds == Kind.CONST) & ~same, Kind.MAP, kinds)
        return Fact(np.asarray(kinds, np.uint8), values)

    def along(self, axis: int, size: int) -> Fact:
        """The fact with dims of 1 on all axes but `axis`: what holds at each index."""
        return self.over((axis,), (size,))

    def over(self, axes: Sequence[int], dims: Sequence[int]) -> Fact:
        """The same for several axes, of these sizes.

        Where the elements of an index differ, it is of their lowest kind, or MAP.
        """
        others = tuple(other for other in range(self.kinds.ndim) if other not in axes)
        shared = self.across(others)
        kinds, values = shared.kinds, shared.values
        shape = [1] * kinds.ndim
        for axis, size in zip(axes, dims, strict=True):
            shape[axis] = size
        return Fact(
            np.broadcast_to(kinds, shape).astype(np.uint8), np.broadcast_to(values, shape)
        )


def fact(kinds: Any, values: Any) -> Fact | None:
    """A fact in its smallest form; None where nothing is known or it is too large."""
    kinds = np.asarray(kinds, dtype=np.uint8)
    values = np.asarray(values)
    shape = np.broadcast_shapes(kinds.shape, values.shape)
    if math.prod(shape) > MAX_ELEMENTS or bool((kinds == Kind.DYN).all()):
        return None
    kinds = np.broadcast_to(kinds, shape)
    values = np.where(kinds == Kind.CONST, values, np.ones_like(values))
    for axis, size in enumerate(shape):
        if size > 1 and _is_uniform(kinds, axis) and _is_uniform(values, axis):
            kinds = kinds.take([0], axis)
            values = values.take([0], axis)
    return Fact(np.ascontiguousarray(kinds).reshape(kinds.shape), values)


def _is_uniform(array: Array, axis: int) -> bool:
    return bool((array == array.take([0], axis)).all())


def known(array: Array) -> Fact | None:
    """The fact about a constant; what is not finite in it is WILD."""
    if array.dtype == object:
        return None
    kinds = np.where(_finite(array), Kind.CONST, Kind.WILD)
    return fact(kinds, array)


def _finite(array: Array) -> Mask:
    if array.dtype.kind in "biu":
        return np.ones(array.shape, bool)
    with np.errstate(all="ignore"):
        return np.isfinite(array.astype(np.float64))


def computed(kinds: Any, values: Array) -> Fact | None:
    """A fact whose values were computed: those that came out not finite are WILD."""
    kinds = np.asarray(kinds)
    shape = np.broadcast_shapes(kinds.shape, values.shape)
    bad = (kinds == Kind.CONST) & ~np.broadcast_to(_finite(values), shape)
    return fact(np.where(bad, Kind.WILD, kinds), values)


def aligned(array: Array, rank: int) -> Array:
    """`array` with leading dims of 1 up to `rank`, as broadcasting adds them."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def join(facts: Iterable[Fact | None], rank: int) -> Kinds:
    """The kinds of an elementwise result: the lowest of its operands' (None is DYN)."""
    kinds = np.full((1,) * rank, Kind.CONST, np.uint8)
    for item in facts:
        other = DYNAMIC if item is None else item.kinds
        kinds = np.minimum(kinds, aligned(other, max(rank, other.ndim)))
    return kinds


DYNAMIC: Kinds = np.full((), Kind.DYN, np.uint8)
