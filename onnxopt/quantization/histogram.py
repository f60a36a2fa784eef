"""A histogram of unbounded range, in constant memory: what calibration keeps of a value.

Bins are equal and cover (-limit, limit), where `limit` is a power of two that doubles
when a value lies beyond it: neighbouring bins then merge in pairs. Two histograms of any
ranges merge exactly, so samples can be counted in any order, in lots and by several
workers, and the sum is the same.

Imports NumPy alone, for worker processes count.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

BINS = 8192
"""Bins over (-limit, limit). A value that is never negative has a quarter of them to
itself in the worst case: eight for each of 256 codes."""
LEAST_LIMIT = 2.0**-60
MOST_COUNTED = 1 << 20
"""Of one tensor of one sample so many elements are counted, evenly spread; the extremes
are those of all of them."""
_PIECE = 1 << 14
"""Elements that are counted at once: what is made on the way stays in the cache."""


class Histogram:
    """What was seen of one tensor.

    `low` and `high` are the exact extremes of all finite elements (inf and -inf where
    there were none), `zeros` counts the elements that are exactly zero, which have a code
    of their own and stay out of the bins. `average` are running averages of the
    extremes per sample. `not_finite` counts NaN and infinities.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.limit = LEAST_LIMIT
        self.counts: Counts = np.zeros(BINS, np.int64)
        self.zeros = 0
        self.not_finite = 0
        self.samples = 0
        self.sums = (0.0, 0.0)

    @property
    def total(self) -> int:
        """How many elements are counted, zeros included."""
        return int(self.counts.sum()) + self.zeros

    @property
    def average(self) -> tuple[float, float]:
        """The mean over the samples of their least and largest element."""
        if not self.samples:
            return math.inf, -math.inf
        return self.sums[0] / self.samples, self.sums[1] / self.samples

    def add(self, values: Array) -> None:
        """Count one sample of the tensor, of any shape and float type."""
        flat = values.reshape(-1)
        if not flat.size:
            return
        if flat.dtype != np.float32:
            flat = flat.astype(np.float32)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = flat[np.isfinite(flat)]
            self.not_finite += flat.size - finite.size
            if not finite.size:
                return
            flat, low, high = finite, float(finite.min()), float(finite.max())
        self._widen(low, high)
        self._count(flat)

    def _widen(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.samples += 1
        self.sums = self.sums[0] + low, self.sums[1] + high
        self._double(limit_of(max(-low, high)))

    def _count(self, flat: Array) -> None:
        flat = flat[:: -(-flat.size // MOST_COUNTED)]
        # a power of two times a float32 is exact, and so are the edges of the bins
        factor, middle = np.float32(BINS / 2 / self.limit), np.float32(BINS / 2)
        counts = np.zeros(BINS + 1, np.int64)
        for start in range(0, flat.size, _PIECE):
            scaled = flat[start : start + _PIECE] * factor
            np.floor(scaled, out=scaled)
            scaled += middle
            counts += np.bincount(scaled.astype(np.int32), minlength=BINS + 1)
        counts[BINS - 1] += counts[BINS]  # the limit itself
        zeros = int(flat.size - np.count_nonzero(flat))
        counts[BINS // 2] -= zeros
        self.counts += counts[:BINS]
        self.zeros += zeros

    def _double(self, limit: float) -> None:
        """Let neighbouring bins merge until the range is (-limit, limit)."""
        while self.limit < limit:
            if not self.counts.any():
                self.limit = limit
                return
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[BINS // 4 : 3 * BINS // 4] = pairs
            self.limit *= 2

    def merge(self, other: Histogram) -> None:
        """Add what another one has seen; `other` may be widened, and counts the same."""
        limit = max(self.limit, other.limit)
        self._double(limit)
        other._double(limit)
        self.counts = self.counts + other.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.zeros += other.zeros
        self.not_finite += other.not_finite
        self.samples += other.samples
        self.sums = self.sums[0] + other.sums[0], self.sums[1] + other.sums[1]

    def centers(self) -> npt.NDArray[np.float64]:
        """The middle of each bin."""
        width = 2 * self.limit / BINS
        middles = np.arange(BINS, dtype=np.float64) + 0.5
        return np.asarray(middles * width - self.limit, np.float64)

    def to_parts(self) -> tuple[dict[str, Any], Counts]:
        """A JSON-able head and the counts: how it travels, and is cached."""
        head = {
            "low": self.low,
            "high": self.high,
            "limit": self.limit,
            "zeros": self.zeros,
            "not_finite": self.not_finite,
            "samples": self.samples,
            "sums": list(self.sums),
        }
        return head, self.counts

    @classmethod
    def from_parts(cls, head: dict[str, Any], counts: Counts) -> Histogram:
        """What `to_parts` gave."""
        made = cls()
        made.low, made.high, made.limit = head["low"], head["high"], head["limit"]
        made.zeros, made.not_finite = head["zeros"], head["not_finite"]
        made.samples = head["samples"]
        made.sums = (head["sums"][0], head["sums"][1])
        made.counts = np.array(counts, np.int64)
        return made


def limit_of(magnitude: float) -> float:
    """The least power of two that is not below `magnitude`, and LEAST_LIMIT at least."""
    if magnitude <= LEAST_LIMIT:
        return LEAST_LIMIT
    mantissa, exponent = math.frexp(magnitude)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
