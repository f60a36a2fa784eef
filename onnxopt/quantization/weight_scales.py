"""Scales for weights: symmetric, per tensor or channel, whole range or least error."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxopt.weights import Array

Floats = npt.NDArray[np.float64]
Method = Literal["minmax", "mse"]

SHARES = np.linspace(1.0, 0.5, 51)
"""Of the largest magnitude of a channel, so much is tried as the end of the range."""
LEAST_SCALE = float(np.finfo(np.float32).tiny)
_PIECE = 1 << 22


def symmetric_scales(
    weight: Array, axis: int | None, largest: int, method: Method = "mse"
) -> Array:
    """One float32 scale for each index along `axis` (None: one for all), shape () then.

    Codes run from -`largest` to `largest`, zero point 0. `mse`: the scale at which the
    squared error of the channel is least; a channel of zeros gets the scale 1.
    """
    rows = _rows(weight, axis)
    peak = np.abs(rows).max(axis=1) if rows.shape[1] else np.zeros(len(rows))
    peak = peak.astype(np.float64)
    scales = np.where(peak > 0, peak / largest, 1.0)
    scales = np.maximum(scales, LEAST_SCALE).astype(np.float32)
    if method == "mse":
        scales = _least_error(rows, scales, largest)
    return scales.reshape(()) if axis is None else scales


def _least_error(rows: Array, full: Array, largest: int) -> Array:
    """For each row the share of the full scale whose squared error is least."""
    best, least = full.copy(), np.full(len(full), np.inf)
    for share in SHARES:
        scales = (full * np.float32(share)).astype(np.float32)
        error = squared_error(rows, scales, largest)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return np.maximum(best, np.float32(LEAST_SCALE))


def squared_error(rows: Array, scales: Array, largest: int) -> Floats:
    """The squared quantization error of each row at its scale."""
    made = np.empty(len(rows))
    step = max(1, _PIECE // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        spread = scales[part, None]
        codes = np.rint(rows[part] / spread)
        np.clip(codes, -largest, largest, out=codes)
        codes *= spread
        codes -= rows[part]
        made[part] = np.einsum("ij,ij->i", codes, codes, dtype=np.float64)
    return made


def _rows(weight: Array, axis: int | None) -> Array:
    """The weight with one row per scale, float32."""
    values = weight.astype(np.float32, copy=False)
    if axis is None:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
