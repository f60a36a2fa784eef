"""From a histogram to a range: min-max, moving average, percentile, MSE, entropy.

Each function gives (low, high), low <= 0 <= high: zero always has a code, for padding and
ReLU need it exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onnxopt.quantization.histogram import BINS, Histogram
from onnxopt.quantization.parameters import Parameters, code_limits

Floats = npt.NDArray[np.float64]

PERCENTILE = 99.999
_CANDIDATES = 96
"""So many ends of the range are tried on either side."""
_SMALLEST_SHARE = 0.02
"""No end of a range is tried that is less than this share of the exact one."""


class Range(NamedTuple):
    """What the codes span: low <= 0 <= high."""

    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        """Whether both ends are numbers."""
        return math.isfinite(self.low) and math.isfinite(self.high)


def min_max(seen: Histogram, levels: int = 256, symmetric: bool = False) -> Range:
    """The extremes of all that was seen."""
    return _spanned(seen.low, seen.high, symmetric)


def moving_average(seen: Histogram, levels: int = 256, symmetric: bool = False) -> Range:
    """The mean of the extremes of each sample."""
    return _spanned(*seen.average, symmetric)


def percentile(
    seen: Histogram,
    levels: int = 256,
    symmetric: bool = False,
    *,
    share: float = PERCENTILE,
) -> Range:
    """The range that holds `share` percent of the elements, the rest cut on both sides.

    A side whose exact extreme lies inside keeps that.
    """
    total = seen.total
    if not total:
        return _spanned(seen.low, seen.high, symmetric)
    rest = (100.0 - share) / 200.0 * total
    counts = seen.counts.astype(np.float64)
    counts[BINS // 2] += seen.zeros
    edges = seen.centers() + seen.limit / BINS
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])
    width = 2 * seen.limit / BINS
    low = edges[int(np.searchsorted(below, rest, side="right").clip(0, BINS - 1))] - width
    high = edges[::-1][int(np.searchsorted(above, rest, side="right").clip(0, BINS - 1))]
    return _spanned(max(low, seen.low), min(high, seen.high), symmetric)


def mean_square(seen: Histogram, levels: int = 256, symmetric: bool = False) -> Range:
    """The range whose quantization error, squared and summed, is least.

    The error of what lies inside is that of rounding, step^2 / 12 each; zeros have none;
    what lies outside is moved to the end. Both ends are searched together.

    Source: Banner et al., Post training 4-bit quantization (ACIQ), section 3
    (https://arxiv.org/abs/1810.05723), with the histogram in place of a distribution.
    """
    if not seen.counts.any():
        return _spanned(seen.low, seen.high, symmetric)
    if symmetric:
        return _symmetric_mean_square(seen, levels)
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    shares = np.linspace(_SMALLEST_SHARE, 1.0, _CANDIDATES)
    lows, highs = low * shares, high * shares
    if low == 0.0:
        lows = np.zeros(1)
    if high == 0.0:
        highs = np.zeros(1)
    tails = _Tails(seen)
    cut_low, lost_low = tails.below(lows)
    cut_high, lost_high = tails.above(highs)
    step = (highs[None, :] - lows[:, None]) / (levels - 1)
    inside = tails.number - lost_low[:, None] - lost_high[None, :]
    error = inside * step**2 / 12 + cut_low[:, None] + cut_high[None, :]
    row, column = np.unravel_index(int(error.argmin()), error.shape)
    return Range(float(lows[row]), float(highs[column]))


def _symmetric_mean_square(seen: Histogram, levels: int) -> Range:
    most = max(-seen.low, seen.high)
    ends = most * np.linspace(_SMALLEST_SHARE, 1.0, _CANDIDATES)
    tails = _Tails(seen)
    cut_low, lost_low = tails.below(-ends)
    cut_high, lost_high = tails.above(ends)
    step = 2 * ends / (levels - 1)
    error = (tails.number - lost_low - lost_high) * step**2 / 12 + cut_low + cut_high
    best = float(ends[int(error.argmin())])
    return Range(-best, best)


class _Tails:
    """Sums over what lies beyond an end: the number, and the squared distance."""

    def __init__(self, seen: Histogram) -> None:
        self.centers = seen.centers()
        counts = seen.counts.astype(np.float64)
        self.number = float(counts.sum())
        moments = [counts, counts * self.centers, counts * self.centers**2]
        self.left = [np.concatenate([[0.0], np.cumsum(part)]) for part in moments]

    def below(self, ends: Floats) -> tuple[Floats, Floats]:
        """Squared distance to each end, and number, of what lies below it."""
        index = np.searchsorted(self.centers, ends)
        return self._distance([part[index] for part in self.left], ends)

    def above(self, ends: Floats) -> tuple[Floats, Floats]:
        """The same for what lies above."""
        index = np.searchsorted(self.centers, ends, side="right")
        return self._distance([part[-1] - part[index] for part in self.left], ends)

    @staticmethod
    def _distance(sums: list[Floats], ends: Floats) -> tuple[Floats, Floats]:
        number, first, second = sums
        squared = second - 2 * ends * first + ends**2 * number
        return np.maximum(squared, 0.0), number


def entropy(seen: Histogram, levels: int = 256, symmetric: bool = False) -> Range:
    """The range whose quantized distribution is nearest to the real one (KL divergence).

    Of ranges that are the same share of the exact one on both sides.

    Source: Migacz, 8-bit Inference with TensorRT (GTC 2017).
    """
    if not seen.counts.any():
        return _spanned(seen.low, seen.high, symmetric)
    full = _spanned(seen.low, seen.high, symmetric)
    best, least = full, np.inf
    for share in np.linspace(0.1, 1.0, _CANDIDATES):
        tried = Range(full.low * share, full.high * share)
        divergence = _divergence(seen, tried, levels)
        if divergence < least:
            best, least = tried, divergence
    return best


def _divergence(seen: Histogram, tried: Range, levels: int) -> float:
    """KL divergence of the clipped distribution from its quantized form, in nats.

    Both are over the bins inside the range; what lies outside is clipped to the ends in
    the first and lost in the second.
    """
    centers = seen.centers()
    first = int(np.searchsorted(centers, tried.low))
    last = int(np.searchsorted(centers, tried.high, side="right"))
    if last - first < levels:
        return float(np.inf)
    inner = seen.counts[first:last].astype(np.float64)
    real = inner.copy()
    real[0] += seen.counts[:first].sum()
    real[-1] += seen.counts[last:].sum()
    codes = np.minimum(np.arange(inner.size) * levels // inner.size, levels - 1)
    filled = inner > 0
    sums = np.bincount(codes, weights=inner, minlength=levels)
    sizes = np.bincount(codes, weights=filled, minlength=levels)
    share = np.divide(sums, sizes, out=np.zeros(levels), where=sizes > 0)
    made = np.where(filled, share[codes], 0.0)
    if not made.sum():
        return float(np.inf)
    real, made = real / real.sum(), made / made.sum()
    both = (real > 0) & (made > 0)
    lost = float(real[(real > 0) & (made == 0)].sum())
    return float((real[both] * np.log(real[both] / made[both])).sum()) + 10.0 * lost


def _spanned(low: float, high: float, symmetric: bool) -> Range:
    """With zero inside; symmetric around it where asked for."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    return Range(low, high)


def affine(range_: Range, data_type: int, symmetric: bool = False) -> Parameters:
    """Scale and zero point, per tensor, whose codes reach from end to end of a range.

    The range is widened to hold zero, which has a code of its own then. Of one that holds
    nothing else, the scale is 1. `symmetric`: zero point 0, codes from -max to max.
    """
    least, most = code_limits(data_type)
    low, high = min(range_.low, 0.0), max(range_.high, 0.0)
    if symmetric:
        least, reach = -most, max(-low, high)
        low, high = -reach, reach
    width = (high - low) / (most - least)
    scale = np.float32(max(width, float(np.finfo(np.float32).tiny)) if width else 1.0)
    zero = 0 if symmetric else round(least - low / float(scale))
    dtype = np.int8 if least < 0 else np.uint8
    return Parameters(
        np.asarray(scale), np.asarray(min(max(zero, least), most)).astype(dtype)
    )


METHODS: dict[str, Callable[[Histogram, int, bool], Range]] = {
    "minmax": min_max,
    "average": moving_average,
    "percentile": percentile,
    "mse": mean_square,
    "entropy": entropy,
}
"""By the name that recipes and the command line use."""
