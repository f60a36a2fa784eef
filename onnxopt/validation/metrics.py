"""How far two values of one output are apart.

`compare` takes the reference's value and the candidate's, of any kind, and gives one
`Difference` per array in them (sequences, maps and optionals are walked). Sums are kept
in float64. Elements that are not finite on either side stay out of the distances and
are counted instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK = 1 << 20
# Slices along an axis are looked at one by one between these limits.
_MOST_SLICES = 4096
_SMALLEST_SLICE = 16
# The longest last axis that may be classes, and not, say, the width of an image.
_MOST_CLASSES = 1 << 18


@dataclass(frozen=True)
class Slices:
    """Largest difference and largest reference magnitude per index along one axis."""

    axis: int
    error: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Difference:
    """One array against another; distances are over elements finite in both.

    `problem` names a difference in structure, shape or dtype; then nothing else is
    set. `exact` tells that the type has no rounding (integers, bools, strings).
    """

    dtype: str
    problem: str | None = None
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
    dtype = _dtype_name(a)
    if dtype != _dtype_name(b):
        return Difference(dtype, problem=f"has dtype {_dtype_name(b)}, not {dtype}")
    if a.shape != b.shape:
        shapes = f"{list(b.shape)}, not {list(a.shape)}"
        return Difference(dtype, problem=f"has shape {shapes}")
    a, b = _plain(a), _plain(b)
    if a.dtype.kind == "c":
        a, b = (x.view(x.real.dtype) for x in map(np.atleast_1d, (a, b)))
    if a.dtype.kind == "f":
        return _compare_floats(dtype, a, b, allowance)
    return _compare_exact(dtype, a, b)


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
    with np.errstate(invalid="ignore", over="ignore"):
        equal = (a == b) | (np.isnan(a) & np.isnan(b))
        error = np.where(both, np.abs(a - b), 0)
    size = np.where(both, np.abs(a), 0)
    signal, noise, cosine = _sums(a, b, both)
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
        not_finite=a.size - int(np.count_nonzero(finite_a)),
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
    """Share of rows with the same largest element, where the last axis may be classes."""
    if a.ndim not in (2, 3) or not 2 <= a.shape[-1] <= _MOST_CLASSES or not a.size:
        return None
    return float(np.mean(a.argmax(axis=-1) == b.argmax(axis=-1)))


def _slices(error: np.ndarray, size: np.ndarray) -> Iterator[Slices]:
    for axis, count in enumerate(error.shape):
        if 2 <= count <= _MOST_SLICES and error.size >= count * _SMALLEST_SLICE:
            others = tuple(i for i in range(error.ndim) if i != axis)
            yield Slices(axis, error.max(axis=others), size.max(axis=others))
