"""What may go of the indices of several axes, and how an array loses it.

Of [2, 3] elements, say of two directions with three units each,

    x . .        . x .        . . x
    . x .   or   . x .   but not   . . .

may go: a whole index of an axis, or as many of each row, which then is shorter. Rows that
lose different columns close up, each for itself; operators that look at columns across
rows cannot have that, and ask for whole indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxopt.channels.facts import Mask
from onnxopt.weights import Array


def extents(kept: Mask) -> tuple[int, ...]:
    """The sizes of the axes once only `kept` is left."""
    if is_product(kept):
        return tuple(len(indices) for indices in _indices(kept))
    rows = kept.sum(axis=1)
    left = rows[rows > 0]
    assert kept.ndim == 2
    assert (left == left[0]).all()
    return len(left), int(left[0])


def compress(array: Array, axes: Sequence[int], kept: Mask) -> Array:
    """What is left of `array`, whose `axes` (ascending) `kept` speaks of."""
    if is_product(kept):
        for axis, indices in zip(axes, _indices(kept), strict=True):
            array = array.take(indices, axis)
        return array
    front = np.moveaxis(array, axes, range(len(axes)))
    rows, size = extents(kept)
    closed = front[kept].reshape(rows, size, *front.shape[2:])
    return np.ascontiguousarray(np.moveaxis(closed, range(len(axes)), axes))


def is_product(kept: Mask) -> bool:
    """Whether whole indices of the axes are left."""
    whole = np.ones((1,) * kept.ndim, bool)
    for axis, indices in enumerate(_indices(kept)):
        shape = [1] * kept.ndim
        shape[axis] = -1
        whole = whole & np.isin(np.arange(kept.shape[axis]), indices).reshape(shape)
    return bool((kept == whole).all())


def outside_of_indices(gone: Mask) -> Mask:
    """Of `gone`, what is no part of a whole index that goes."""
    kept = np.ones(gone.shape, bool)
    for axis in range(gone.ndim):
        kept &= ~gone.all(axis=_others(gone, axis), keepdims=True)
    return np.asarray(gone & kept)


def outside_of_rows(gone: Mask) -> Mask:
    """Of `gone` [rows, columns], what would make rows differ in length.

    Rows that go altogether do not count. Columns that all rows lose go first.
    """
    lives = np.asarray(~gone.all(axis=1))
    if not lives.any():
        return np.zeros(gone.shape, bool)
    most = int(gone[lives].sum(axis=1).min())
    order = np.argsort(~gone[lives].all(axis=0), kind="stable")
    surplus = np.zeros(gone.shape, bool)
    surplus[:, order] = np.cumsum(gone[:, order], axis=1) > most
    return np.asarray(gone & surplus & lives[:, None])


def _indices(kept: Mask) -> list[Array]:
    return [
        np.flatnonzero(kept.any(axis=_others(kept, axis))) for axis in range(kept.ndim)
    ]


def _others(array: Mask, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(array.ndim) if other != axis)
