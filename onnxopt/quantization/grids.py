"""Scales of floats that are whole multiples of one, as a quantizer left them.

An exporter that folds constants stores w = code * scale, rounded once to float32. The
scale is found again from the largest value, which is one of 255 multiples of it.
"""

from __future__ import annotations

import numpy as np

from onnxopt.quantization.staircase import Floats, Floats32

MOST = 255
_TOLERANCE = 2.0**-22
_SAMPLE = 32
_DISTINCT = 4
"""Magnitudes in half of the rows: fewer say nothing of a quantizer."""


def scales(rows: Floats32) -> Floats32 | None:
    """The largest scale of each row [rows, values] that gives it to the bit, or None.

    A row of zeros has scale 1. None too where the rows take so few values that they
    may have any other origin.
    """
    if not rows.size or not np.isfinite(rows).all():
        return None
    wide = rows.astype(np.float64)
    peak = np.abs(wide).max(axis=1)
    found = np.where(peak == 0, np.float32(1), np.float32(0))
    largest = np.argsort(-np.abs(wide), axis=1)[:, :_SAMPLE]
    sample = np.take_along_axis(wide, largest, axis=1)
    for count in range(1, MOST + 1):
        (left,) = np.nonzero(found == 0)
        if not left.size:
            break
        fits = left[_fits(sample[left], peak[left] / count)]
        fits = fits[_fits(wide[fits], peak[fits] / count)]
        for row in fits:
            found[row] = _exact(rows[row], peak[row] / count)
    if (found == 0).any() or not _is_varied(wide, found):
        return None
    return found


def _fits(values: Floats, step: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether all of a row are multiples of its step, but for rounding."""
    steps = step[:, None]
    error = np.abs(np.rint(values / steps) * steps - values)
    limit = np.abs(values).max(axis=1, initial=0) * _TOLERANCE
    return np.asarray((error <= limit[:, None]).all(axis=1))


def _exact(row: Floats32, step: float) -> np.float32:
    """The float32 next to `step` whose multiples the row is; 0 where there is none."""
    codes = np.rint(row / np.float64(step)).astype(np.float32)
    middle = np.float32(step)
    below = np.nextafter(middle, np.float32(0))
    for scale in (middle, below, np.nextafter(middle, np.float32(np.inf))):
        if scale > 0 and np.array_equal(codes * scale, row):
            return np.float32(scale)
    return np.float32(0)


def _is_varied(rows: Floats, found: Floats32) -> bool:
    codes = np.abs(np.rint(rows / found[:, None].astype(np.float64)))
    counts = [len(np.unique(row[row > 0])) for row in codes]
    return float(np.median(counts)) >= _DISTINCT
