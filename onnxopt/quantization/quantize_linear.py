"""QuantizeLinear in NumPy, bit-equal to ONNX Runtime's CPU kernel.

Only float32 to 8-bit integers with positive, finite scales: there the kernel divides
in float32, rounds half to even, adds the zero point and saturates. For every other
type the value is asked of ONNX Runtime itself.
"""

from __future__ import annotations

import math

import numpy as np

from onnxopt.weights import Array


def quantize(values: Array, scale: Array, zero_point: Array, axis: int) -> Array | None:
    """Codes of `values` (any shape) in the dtype of `zero_point`.

    `scale` and `zero_point` are scalars, or have one entry per index of `axis`. None
    where this function does not vouch for equality: other dtypes, blocks, values that
    are not finite, scales that are not positive.
    """
    if values.dtype != np.float32 or scale.dtype != np.float32:
        return None
    if zero_point.dtype not in (np.int8, np.uint8) or scale.shape != zero_point.shape:
        return None
    if scale.ndim > 1 or (scale.ndim == 1 and not -values.ndim <= axis < values.ndim):
        return None
    if not (np.isfinite(values).all() and np.isfinite(scale).all() and (scale > 0).all()):
        return None
    if scale.ndim == 1 and scale.size != 1:
        if scale.size != values.shape[axis]:
            return None
        shape = [1] * values.ndim
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    else:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return _codes(values, scale, zero_point)


def _codes(values: Array, scale: Array, zero_point: Array) -> Array:
    """In slices along the first axis, so that the float intermediates stay small."""
    limits = np.iinfo(zero_point.dtype)
    codes = np.empty(values.shape, zero_point.dtype)
    rows = max(1, (1 << 22) // max(1, math.prod(values.shape[1:])))
    for start in range(0, values.shape[0] if values.ndim else 1, rows):
        part = slice(start, start + rows) if values.ndim else ()
        own = part if scale.ndim and scale.shape[0] != 1 else ...
        with np.errstate(over="ignore"):
            ratio = values[part] / scale[own]
        shifted = np.rint(ratio) + zero_point[own].astype(np.float32)
        codes[part] = np.clip(shifted, limits.min, limits.max).astype(zero_point.dtype)
    return codes
