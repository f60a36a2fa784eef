"""Rounding a weight against what its layer reads: GPTQ.

Codes are chosen one input at a time; the error that one leaves is taken out by those that
are still free, in the measure in which their inputs go together.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization (algorithm 1),
https://arxiv.org/abs/2210.17323; the order by diag(H) is its authors' `act_order`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

DAMPING = 0.01
"""This share of the mean of the diagonal is added to it: inputs that never vary."""
_BLOCK = 64


def rounded(
    weight: Floats, moments: Floats, scales: Floats, low: int, high: int
) -> Codes:
    """Codes [outputs, inputs] with least error of the layer's output.

    `weight` [outputs, inputs]; `moments` [inputs, inputs], the sum of x x^T over what the
    layer read; `scales` [outputs, inputs], the step of each weight; zero point 0. Returns
    round-to-nearest codes where the moments say nothing.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    upper = _inverse_factor(moments[np.ix_(order, order)])
    if upper is None:
        return _nearest(weight, scales, low, high)
    codes = np.empty(weight.shape, np.int64)
    codes[:, order] = _swept(weight[:, order], upper, scales[:, order], low, high)
    return codes


def _nearest(weight: Floats, scales: Floats, low: int, high: int) -> Codes:
    return np.clip(np.rint(weight / scales), low, high).astype(np.int64)


def _inverse_factor(moments: Floats) -> Floats | None:
    """The upper Cholesky factor of the inverse, None where there is none."""
    diagonal = np.diag(moments)
    mean = float(diagonal.mean()) if len(diagonal) else 0.0
    if not np.isfinite(mean) or mean <= 0:
        return None
    damped = moments + np.eye(len(moments)) * (DAMPING * mean)
    try:
        lower = np.linalg.cholesky(damped)
        inverse = np.linalg.inv(lower)
        return np.asarray(np.linalg.cholesky(inverse.T @ inverse).T)
    except np.linalg.LinAlgError:
        return None


def _swept(weight: Floats, upper: Floats, scales: Floats, low: int, high: int) -> Codes:
    """Column by column, the error carried to the right, block by block."""
    weight = weight.copy()
    codes = np.empty(weight.shape, np.int64)
    count = weight.shape[1]
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        errors = np.empty((len(weight), end - start))
        for column in range(start, end):
            step = scales[:, column]
            code = np.clip(np.rint(weight[:, column] / step), low, high)
            codes[:, column] = code
            error = (weight[:, column] - code * step) / upper[column, column]
            ahead = slice(column + 1, end)
            weight[:, ahead] -= error[:, None] * upper[column, ahead]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return codes
