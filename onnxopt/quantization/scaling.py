"""Integer weights times constant factors: other scales, and codes where these turn.

    w = s * (q - z)      ->     f * w = (|f| * s) * (q' - z')

1. f > 0: the codes and the zero point stay.
2. f < 0: the codes turn about the zero point, q' = 2z - q. Where one has no mirror in
   its type (-128 about 0), the codes and the zero point of that channel turn about the
   middle of the type, q' = lo + hi - q and z' = lo + hi - z; only on request, since some
   runtimes want all zero points of weights to be 0.
3. f = 0: q' = z, and the scale is 1.
4. One scale for all becomes one per channel where the factors differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxopt.linear import DeclinedError, Floats, smallest_normal
from onnxopt.quantization.parameters import Parameters, code_limits
from onnxopt.weights import Array

_NO_MIRROR = "a code has no mirror about its zero point, and the factor is negative"


class Scaled(NamedTuple):
    """The new parameters, and the new codes; None where they are the old ones."""

    parameters: Parameters
    codes: Array | None


def scaled(
    given: Parameters,
    shape: Sequence[int],
    factor: Floats,
    read: Callable[[], Array],
    *,
    may_move_zero: bool = False,
) -> Scaled:
    """What stands for the values times `factor`, of their rank, that broadcasts to them.

    `shape` is that of the codes, which `read` gives. Raises DeclinedError.
    """
    magnitude = np.abs(factor)
    units = refined(given, shape, [magnitude])
    made = _scaled(units, magnitude)
    if (factor > 0).all():
        return Scaled(made, None)
    codes = read()
    whole = _turned(units, codes, factor)
    low, high = code_limits(given.data_type)
    outside = (whole < low) | (whole > high)
    if outside.any():
        if not may_move_zero or given.data_type == TensorProto.INT32:
            raise DeclinedError(_NO_MIRROR)
        turns = np.where(factor == 0, 0.0, np.where(factor < 0, 2.0, 1.0))
        units = refined(given, shape, [magnitude, turns])
        made = _with_moved_zero(units, _scaled(units, magnitude), outside)
        middle = units.spread(made.zero_point != units.zero_point, shape)
        whole = np.where(middle & (factor < 0), low + high - _whole(codes), whole)
        whole = np.where(factor == 0, made.spread(_whole(made.zero_point), shape), whole)
    return Scaled(made, whole.astype(codes.dtype))


def _turned(units: Parameters, codes: Array, factor: Floats) -> npt.NDArray[Any]:
    """The codes about the zero point, in a type that holds all of them."""
    zero = units.spread(_whole(units.zero_point), codes.shape)
    whole = _whole(codes)
    whole = np.where(factor < 0, 2 * zero - whole, whole)
    return np.where(factor == 0, zero, whole)


def _whole(codes: Array) -> npt.NDArray[Any]:
    return codes.astype(np.int64 if codes.dtype == np.int32 else np.int32)


def _with_moved_zero(units: Parameters, made: Parameters, outside: Array) -> Parameters:
    """Where codes were outside of their type, the zero point beyond the middle of it."""
    low, high = code_limits(units.data_type)
    moved = _reduced(units, outside, np.logical_or).astype(bool)
    zero = _whole(units.zero_point)
    zero = np.where(moved, low + high - zero, zero).astype(units.zero_point.dtype)
    return msgspec.structs.replace(made, zero_point=zero)


def _scaled(units: Parameters, magnitude: Floats) -> Parameters:
    """Other scales, rounded once to their type."""
    factor = _reduced(units, magnitude, np.maximum)
    if not np.isfinite(factor).all():
        raise DeclinedError("a factor is not finite")
    old = units.scale.astype(np.float64)
    wide = np.where(factor == 0, 1.0, old * factor)
    with np.errstate(all="ignore"):
        scale = wide.astype(units.scale.dtype)
    changed = (factor != 1) & (factor != 0)
    if (changed & (wide < smallest_normal(scale.dtype))).any():
        raise DeclinedError(f"a scale would lose its precision in {scale.dtype}")
    low, high = code_limits(units.data_type)
    with np.errstate(all="ignore"):
        largest = (scale.astype(np.float64) * (high - low)).astype(scale.dtype)
    if (changed & ~np.isfinite(largest.astype(np.float64))).any():
        raise DeclinedError(f"a weight would not fit into {scale.dtype}")
    return msgspec.structs.replace(units, scale=scale)


# ---- units: the elements that share a scale ----


def refined(
    given: Parameters, shape: Sequence[int], values: Sequence[Floats]
) -> Parameters:
    """The same scales, one per channel where one for all would not do.

    In each unit, each of `values` (not negative) is to be one number, or zero.
    """
    if all(_is_one_per_unit(given, item) for item in values):
        return given
    if given.is_per_tensor:
        for axis, size in enumerate(shape):
            one = (size,)
            scale, zero = np.full(one, given.scale), np.full(one, given.zero_point)
            finer = Parameters(scale, zero, axis)
            if all(_is_one_per_unit(finer, item) for item in values):
                return finer
    raise DeclinedError("its scales do not run along the axis of the factors")


def _is_one_per_unit(units: Parameters, values: Floats) -> bool:
    high = _reduced(units, values, np.maximum)
    low = _reduced(units, np.where(values == 0, np.inf, values), np.minimum)
    return bool(((high == low) | (high == 0)).all())


def _reduced(units: Parameters, values: Array, ufunc: np.ufunc) -> Array:
    """One number per unit, of the shape of the scale."""
    if units.is_per_tensor:
        return np.asarray(ufunc.reduce(values, axis=None))
    axis = units.axis % values.ndim
    if units.is_blocked:
        if values.shape[axis] > 1:
            starts = np.arange(0, values.shape[axis], units.block_size)
            values = ufunc.reduceat(values, starts, axis)
        return np.broadcast_to(values, units.scale.shape)
    others = tuple(other for other in range(values.ndim) if other != axis)
    return np.broadcast_to(ufunc.reduce(values, axis=others), units.scale.shape)
