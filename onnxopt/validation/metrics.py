"""How far two values of one output are apart.

`compare` takes the reference's value and the candidate's, of any kind, and gives one
`Difference` per array in them (sequences, maps and optionals are walked). Sums are kept
in float64. Elements that are not finite on either side stay out of the distances and
are counted instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_BLOCK = 1 << 20
# Slices along an axis are looked at one by one between these limits.
_MOST_SLICES = 4096
_SMALLEST_SLICE = 16
# The longest last axis that may be classes, and not, say, the width of an image.
_MOST_CLASSES = 1 << 18
_TOP = 5
# How far from 1 the sum of a distribution may be, and the least probability that counts.
_SUM_TOLERANCE = 1e-3
_LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Slices:
    """Largest difference and largest reference magnitude per index along one axis."""

    axis: int
    error: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Difference:
    """One array against another; distances are over elements finite in both.

    `problem` names a difference in structure, shape or dtype; then only the reference's
    `dtype` and `shape` are set, in the first case neither. `exact` tells that the type
    has no rounding (integers, bools, strings). `nans` and `infs` count elements of the
    reference and of the candidate. The two parts of a complex number count as elements.
    """

    dtype: str
    problem: str | None = None
    shape: tuple[int, ...] | None = None
    exact: bool = False
    count: int = 0
    flipped: int = 0
    scale: float = 0.0
    max_abs: float = 0.0
    p99_abs: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    cosine: float | None = None
    beyond: float = 0.0
    top1: float | None = None
    top5: float | None = None
    kl: float | None = None
    nans: tuple[int, int] = (0, 0)
    infs: tuple[int, int] = (0, 0)
    not_finite: int = 0
    lost_finite: int = 0
    moved_not_finite: int = 0
    slices: tuple[Slices, ...] = ()

    @property
    def max_rel(self) -> float:
        """The largest difference, relative to the largest magnitude of the reference."""
        if self.max_abs == 0:
            return 0.0
        return self.max_abs / self.scale if self.scale else math.inf

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise in dB; None where nothing differs, -inf without a signal."""
        return sqnr_db(self.signal, self.noise)


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10 of two sums of squares; None where the noise is zero."""
    if noise == 0:
        return None
    return 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass(frozen=True)
class Allowance:
    """numpy's allclose: an element may differ by `atol + rtol * |reference|`."""

    rtol: float = 0.0
    atol: float = 0.0


def compare(
    reference: Any, candidate: Any, allowance: Allowance | None = None
) -> list[Difference]:
    """One Difference per array of the reference, in order.

    `beyond` is the most by which an element exceeds the allowance.
    """
    left, right = list(_leaves(reference, "")), list(_leaves(candidate, ""))
    if [path for path, _ in left] != [path for path, _ in right]:
        text = f"holds {_structure(right)}, the reference {_structure(left)}"
        return [Difference("", problem=text)]
    allowance = allowance or Allowance()
    return [
        _compare_arrays(a, b, allowance)
        for (_, a), (_, b) in zip(left, right, strict=True)
    ]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{path}[{key!r}]")
    elif value is None:
        yield f"{path}?", np.zeros(0, dtype=bool)
    else:
        yield path, np.asarray(value)


def _structure(leaves: Sequence[tuple[str, np.ndarray]]) -> str:
    shown = ", ".join((path or "an array") for path, _ in leaves[:4])
    return f"{len(leaves)} arrays ({shown}{', ...' if len(leaves) > 4 else ''})"


def _compare_arrays(a: np.ndarray, b: np.ndarray, allowance: Allowance) -> Difference:
    dtype, shape = _dtype_name(a), a.shape
    if dtype != _dtype_name(b):
        problem = f"has dtype {_dtype_name(b)}, not {dtype}"
        return Difference(dtype, problem, shape)
    if shape != b.shape:
        problem = f"has shape {list(b.shape)}, not {list(shape)}"
        return Difference(dtype, problem, shape)
    a, b = _plain(a), _plain(b)
    if a.dtype.kind == "c":
        a, b = (x.view(x.real.dtype) for x in map(np.atleast_1d, (a, b)))
        found = _compare_floats(dtype, a, b, allowance)
        return replace(found, shape=shape, top1=None, top5=None, kl=None)
    if a.dtype.kind == "f":
        return replace(_compare_floats(dtype, a, b, allowance), shape=shape)
    return replace(_compare_exact(dtype, a, b), shape=shape)


def _dtype_name(array: np.ndarray) -> str:
    return "string" if array.dtype.kind in "OUS" else array.dtype.name


def _plain(array: np.ndarray) -> np.ndarray:
    """A numpy dtype that holds the same values: ml_dtypes and float16 are widened."""
    if array.dtype.kind == "V" or array.dtype.name in ("int4", "uint4", "int2", "uint2"):
        return array.astype(np.int8 if "int" in array.dtype.name else np.float32)
    if array.dtype == np.float16 or array.dtype.name.startswith(("bfloat", "float8")):
        return array.astype(np.float32)
    return array


def _compare_exact(dtype: str, a: np.ndarray, b: np.ndarray) -> Difference:
    flipped = int(np.count_nonzero(a != b))
    if a.dtype.kind not in "iu":
        return Difference(dtype, exact=True, count=a.size, flipped=flipped)
    signal, noise, _ = _sums(a, b, np.ones(a.shape, dtype=bool))
    far = 0.0
    if flipped:
        far = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return Difference(
        dtype,
        exact=True,
        count=a.size,
        flipped=flipped,
        max_abs=far,
        signal=signal,
        noise=noise,
    )


def _compare_floats(
    dtype: str, a: np.ndarray, b: np.ndarray, allowance: Allowance
) -> Difference:
    finite_a, finite_b = np.isfinite(a), np.isfinite(b)
    both = finite_a & finite_b
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    with np.errstate(invalid="ignore", over="ignore"):
        equal = (a == b) | (nan_a & nan_b)
        error = np.where(both, np.abs(a - b), 0)
    size = np.where(both, np.abs(a), 0)
    signal, noise, cosine = _sums(a, b, both)
    nans = np.count_nonzero(nan_a), np.count_nonzero(nan_b)
    bad = a.size - np.count_nonzero(finite_a), a.size - np.count_nonzero(finite_b)
    return Difference(
        dtype,
        count=a.size,
        flipped=a.size - int(np.count_nonzero(equal)),
        scale=_max(size),
        max_abs=_max(error),
        p99_abs=_percentile(error, 0.99),
        signal=signal,
        noise=noise,
        cosine=cosine,
        beyond=_max(error - allowance.rtol * size) - allowance.atol,
        top1=_top1(a, b),
        top5=_top5(a, b),
        kl=_divergence(a, b),
        nans=(int(nans[0]), int(nans[1])),
        infs=(int(bad[0] - nans[0]), int(bad[1] - nans[1])),
        not_finite=int(bad[0]),
        lost_finite=int(np.count_nonzero(finite_a & ~finite_b)),
        moved_not_finite=int(np.count_nonzero(~both & ~equal)),
        slices=tuple(_slices(error, size)),
    )


def _max(array: np.ndarray) -> float:
    return float(array.max()) if array.size else 0.0


def _percentile(array: np.ndarray, part: float) -> float:
    if not array.size:
        return 0.0
    index = min(array.size - 1, int(part * array.size))
    return float(np.partition(array, index, axis=None)[index])


def _sums(
    a: np.ndarray, b: np.ndarray, both: np.ndarray
) -> tuple[float, float, float | None]:
    """Sums of squares of reference and difference, and the cosine, in float64."""
    flat_a, flat_b, keep = a.reshape(-1), b.reshape(-1), both.reshape(-1)
    aa = bb = ab = dd = 0.0
    for start in range(0, a.size, _BLOCK):
        part = keep[start : start + _BLOCK]
        x = np.where(part, flat_a[start : start + _BLOCK], 0).astype(np.float64)
        y = np.where(part, flat_b[start : start + _BLOCK], 0).astype(np.float64)
        aa, bb, ab = aa + float(x @ x), bb + float(y @ y), ab + float(x @ y)
        dd += float((x - y) @ (x - y))
    if not (aa and bb):
        return aa, dd, None
    return aa, dd, (1.0 if dd == 0 else ab / math.sqrt(aa) / math.sqrt(bb))


def _top1(a: np.ndarray, b: np.ndarray) -> float | None:
    """Share (0 to 1) of rows with the same largest element; the first of equal ones.

    None where the last axis may not be classes. NaN counts as the largest.
    """
    if not _has_classes(a):
        return None
    return float(np.mean(a.argmax(axis=-1) == b.argmax(axis=-1)))


def _has_classes(a: np.ndarray) -> bool:
    return a.ndim in (2, 3) and 2 <= a.shape[-1] <= _MOST_CLASSES and bool(a.size)


def _top5(a: np.ndarray, b: np.ndarray) -> float | None:
    """Share (0 to 1) of rows with the same set of five largest elements.

    Of equal elements the first ones are taken, NaN counts as the largest. None where the
    last axis may not be classes, or has no more than five.
    """
    if not _has_classes(a) or a.shape[-1] <= _TOP:
        return None
    other = 0
    for x, y in _row_blocks(a, b):
        differ = (x != y).any(axis=1)
        other += int(np.count_nonzero(~_same_five(x[differ], y[differ])))
    return float(1 - other / (a.size // a.shape[-1]))


def _row_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both, as rows along the last axis, some rows at a time."""
    width = a.shape[-1]
    rows_a, rows_b = a.reshape(-1, width), b.reshape(-1, width)
    step = max(1, _BLOCK // width)
    for start in range(0, len(rows_a), step):
        yield rows_a[start : start + step], rows_b[start : start + step]


def _same_five(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether the five largest elements of each row have the same indices in both."""
    picked = np.argpartition(x, -_TOP, axis=1)[:, -_TOP:]
    same: np.ndarray = _are_the_largest(x, picked) & _are_the_largest(y, picked)
    unsure = ~same
    same[unsure] = (_largest_of(x[unsure]) == _largest_of(y[unsure])).all(axis=1)
    return same


def _are_the_largest(rows: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """True where the elements picked are surely the five largest: no ties, no NaN."""
    least = np.take_along_axis(rows, picked, axis=1).min(axis=1, keepdims=True)
    result: np.ndarray = np.count_nonzero(~(rows < least), axis=1) == _TOP
    return result


def _largest_of(rows: np.ndarray) -> np.ndarray:
    """True at the five largest elements of each row."""
    least = np.partition(rows, -_TOP, axis=1)[:, -_TOP, None]  # NaN is put last
    is_nan, least_is_nan = np.isnan(rows), np.isnan(least)
    above = (rows > least) | (is_nan & ~least_is_nan)
    level = (rows == least) | (is_nan & least_is_nan)
    room = _TOP - np.count_nonzero(above, axis=1, keepdims=True)
    result: np.ndarray = above | (
        level & (np.cumsum(level, axis=1, dtype=np.int32) <= room)
    )
    return result


def _divergence(a: np.ndarray, b: np.ndarray) -> float | None:
    """Kullback-Leibler divergence of the candidate from the reference, in nats.

    The mean over rows (along the last axis) of sum p ln(p / q), p being the reference's
    row and q the candidate's, each divided by its sum. Probabilities below 1e-12 count as
    1e-12 in the logarithm, so that it is finite. None where some row of either holds a
    negative element or has a sum that is not within 1e-3 of 1.
    """
    if not a.ndim or not a.size or not 2 <= a.shape[-1] <= _MOST_CLASSES:
        return None
    total = 0.0
    for x, y in _row_blocks(a, b):
        if (p := _probabilities(x)) is None or (q := _probabilities(y)) is None:
            return None
        logs = (np.log(np.maximum(r, _LEAST_PROBABILITY)) for r in (p, q))
        total += float(np.sum(p * np.subtract(*logs)))
    return float(max(0.0, total / (a.size // a.shape[-1])))


def _probabilities(rows: np.ndarray) -> np.ndarray | None:
    """The rows in float64, with a sum of 1; None where one is no distribution."""
    if not bool((rows[0] >= 0).all()) or not bool((rows >= 0).all()):
        return None
    with np.errstate(over="ignore"):
        sums = rows.sum(axis=1, keepdims=True, dtype=np.float64)
    if not bool((np.abs(sums - 1) <= _SUM_TOLERANCE).all()):
        return None
    normal: np.ndarray = rows / sums
    return normal


def _slices(error: np.ndarray, size: np.ndarray) -> Iterator[Slices]:
    for axis, count in enumerate(error.shape):
        if 2 <= count <= _MOST_SLICES and error.size >= count * _SMALLEST_SLICE:
            others = tuple(i for i in range(error.ndim) if i != axis)
            yield Slices(axis, error.max(axis=others), size.max(axis=others))
