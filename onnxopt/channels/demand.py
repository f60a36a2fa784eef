"""Demand: which elements of a value something depends on (the backward fact UNUSED).

A demand is a boolean array in the form of a fact (dims of 1 or the value's own); None
stands for all, False everywhere for a value that nothing reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Demand = npt.NDArray[np.bool_] | None
"""None: everything is needed."""

NOTHING: npt.NDArray[np.bool_] = np.zeros((), bool)


def merge(first: Demand, second: Demand) -> Demand:
    """What at least one of two readers needs."""
    if first is None or second is None:
        return None
    both = np.asarray(first | second)
    return None if both.all() else both


def onto(demand: Demand, dims: Sequence[int | str | None] | None) -> Demand:
    """The demand on an operand of `dims` that broadcasts to a result with `demand`."""
    if demand is None or dims is None:
        return None
    found = demand
    while found.ndim > len(dims):
        found = np.asarray(found.any(axis=0))
    for axis, size in enumerate(dims[len(dims) - found.ndim :]):
        if found.shape[axis] == 1 or found.shape[axis] == size:
            continue
        if size != 1:
            return None  # the operand's size is not known
        found = np.asarray(found.any(axis=axis, keepdims=True))
    return found


def channels(demand: Demand, axis: int, size: int) -> npt.NDArray[np.bool_]:
    """For each index of `axis` whether any of it is needed: [size]."""
    if demand is not None and demand.ndim:
        axis %= demand.ndim
    return over(demand, (axis,), (size,))


def over(
    demand: Demand, axes: Sequence[int], dims: Sequence[int]
) -> npt.NDArray[np.bool_]:
    """The same for several axes (ascending, of these sizes), flat."""
    if demand is None or not demand.ndim:
        return np.full(math.prod(dims), demand is None or bool(demand))
    others = tuple(other for other in range(demand.ndim) if other not in axes)
    return np.broadcast_to(demand.any(axis=others), dims).reshape(-1)


def along(needed: npt.NDArray[np.bool_], axis: int, rank: int) -> Demand:
    """The demand of a value of `rank` from one truth per index of `axis`."""
    if needed.all():
        return None
    shape = [1] * rank
    shape[axis] = -1
    return needed.reshape(shape)
