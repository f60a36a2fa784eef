"""The integer weight and the bias of one layer: scales, codes, and what these leave.

Weights are symmetric, one scale per output channel. With the moments of what the layer
reads, codes are chosen by GPTQ, and the mean of the error left goes into the bias.

Source of the bias correction: Nagel et al., Data-Free Quantization, section 4.2
(https://arxiv.org/abs/1906.04721), with the measured mean of the inputs.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from onnxopt.quantization import gptq
from onnxopt.quantization.moments import Moments
from onnxopt.quantization.parameters import Parameters
from onnxopt.quantization.weight_scales import Method, symmetric_scales
from onnxopt.weights import Array

Floats = npt.NDArray[np.float64]


class Rounded(msgspec.Struct, frozen=True, eq=False):
    """Codes of a weight, in its shape, their parameters, and a shift per channel.

    `shift` [outputs]: what is to be added to the bias, None where nothing is known.
    """

    codes: Array
    parameters: Parameters
    shift: Floats | None


def rounded_weight(
    weight: Array,
    axis: int,
    largest: int,
    method: Method = "mse",
    moments: Moments | None = None,
) -> Rounded:
    """Codes from -`largest` to `largest` of `weight`, whose outputs run along `axis`."""
    scales = symmetric_scales(weight, axis, largest, method)
    made = Parameters(scales, np.zeros(scales.shape, np.int8), axis)
    rows = np.moveaxis(weight, axis, 0).reshape(len(scales), -1).astype(np.float64)
    steps = np.broadcast_to(scales.astype(np.float64)[:, None], rows.shape)
    if moments is None:
        codes = np.clip(np.rint(rows / steps), -largest, largest)
        shift = None
    else:
        codes, shift = _by_moments(rows, steps, largest, moments)
    moved = np.moveaxis(weight, axis, 0).shape
    shaped = np.moveaxis(codes.astype(np.int8).reshape(moved), 0, axis)
    return Rounded(np.ascontiguousarray(shaped), made, shift)


def _by_moments(
    rows: Floats, steps: Floats, largest: int, moments: Moments
) -> tuple[Floats, Floats]:
    """Group by group: the outputs of a group read the inputs of that group."""
    groups = len(moments.products)
    shape = (groups, len(rows) // groups, rows.shape[1])
    weight, scales = rows.reshape(shape), steps.reshape(shape)
    codes = gptq.rounded(weight, moments.products, scales, -largest, largest)
    error = weight - codes * scales
    shift = np.einsum("goi,gi->go", error, moments.means)
    return codes.reshape(rows.shape).astype(np.float64), shift.reshape(-1)
