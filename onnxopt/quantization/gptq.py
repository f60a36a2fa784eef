"""Rounding a weight against what its layer reads: GPTQ.

Codes are chosen one input at a time; the error that one leaves is taken out by those that
are still free, in the measure in which their inputs go together. All groups of a layer
are swept at once.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization (algorithm 1),
https://arxiv.org/abs/2210.17323; the order by diag(H) is its authors' `act_order`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.int64]

DAMPING = 0.01
"""This share of the mean of the diagonal is added to it: inputs that never vary."""
_BLOCK = 64


def rounded(
    weight: Floats, moments: Floats, scales: Floats, low: int, high: int
) -> Codes:
    """Codes [groups, outputs, inputs] with least error of the layer's output.

    `weight` is of that shape; `moments` [groups, inputs, inputs], the sums of x x^T over
    what the groups read; `scales` broadcasts to the weight, the step of each; zero point
    0. A group whose moments say nothing is rounded to nearest.
    """
    scales = np.broadcast_to(scales, weight.shape)
    order = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), kind="stable")
    rows, columns = order[:, :, None], order[:, None, :]
    groups = np.arange(len(weight))[:, None, None]
    upper = _inverse_factors(moments[groups, rows, columns])
    codes = np.empty(weight.shape, np.int64)
    swept = _swept(
        np.take_along_axis(weight, columns, axis=2),
        upper,
        np.take_along_axis(scales, columns, axis=2),
        low,
        high,
    )
    np.put_along_axis(codes, np.broadcast_to(columns, codes.shape), swept, axis=2)
    return codes


def _inverse_factors(moments: Floats) -> Floats:
    """Upper Cholesky factors of the inverses; the identity where there is none.

    With the identity no error is carried on: that is rounding to nearest.
    """
    size = moments.shape[-1]
    means = np.trace(moments, axis1=1, axis2=2) / max(size, 1)
    known = np.isfinite(means) & (means > 0)
    damped = np.where(known[:, None, None], moments, np.eye(size))
    added = DAMPING * np.where(known, means, 1.0)
    damped = damped + np.eye(size) * added[:, None, None]
    # H^-1 = U^T U with U upper: the inverse of the factor of H read from the other end
    flipped = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
    return np.asarray(np.linalg.inv(flipped))


def _swept(weight: Floats, upper: Floats, scales: Floats, low: int, high: int) -> Floats:
    """Input by input, the error carried to the right, block by block."""
    weight = weight.copy()
    codes = np.empty(weight.shape)
    count = weight.shape[2]
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        errors = np.empty((*weight.shape[:2], end - start))
        for column in range(start, end):
            step = scales[:, :, column]
            code = np.clip(np.rint(weight[:, :, column] / step), low, high)
            codes[:, :, column] = code
            error = weight[:, :, column] - code * step
            error /= upper[:, None, column, column]
            ahead = slice(column + 1, end)
            weight[:, :, ahead] -= error[:, :, None] * upper[:, None, column, ahead]
            errors[:, :, column - start] = error
        weight[:, :, end:] -= errors @ upper[:, start:end, end:]
    return codes
