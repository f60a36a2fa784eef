"""Staircases: monotone functions of one float32, and whether two of them are equal.

A quantizer, however it is written, is a chain of steps that never fall: its values are
few, and each is taken from one threshold up to the next. Two such functions are equal
for every finite float32 if they are equal at the thresholds of one of them and right
below each: between these that one is constant, and the other, which does not fall, is
held by equal ends. So a proof costs two values per level, and no assumption about the
rounding of the steps.

Arrays are [channels, values]; constants of steps are [channels, 1] or [1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

Floats32 = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Step = Callable[[Floats32], Floats32]
"""One operator of a chain; it does not fall, and computes as its ONNX kernel does."""

LARGEST = float(np.finfo(np.float32).max)
MAX_LEVELS = 1 << 18
"""Levels of all channels together that are gone through."""
NEAR = 2.0**-10
"""What `nearly_equal` passes over, in steps: how far from a tie, and in the results."""

_TOP = int(np.float32(LARGEST).view(np.int32))


class Quantizer(msgspec.Struct, frozen=True, eq=False):
    """QuantizeLinear and DequantizeLinear of float32, with a Clip before them or not.

    `divisor`, `factor`, `zero_point`: [channels, 1] float32, the scales of the one and
    the other, and what both add and subtract; `low` and `high` the limits of the codes;
    `bounds` those of the Clip.
    """

    divisor: Floats32
    factor: Floats32
    zero_point: Floats32
    low: int
    high: int
    bounds: tuple[float, float] | None = None

    def codes(self, values: Floats32) -> Floats32:
        """The codes of `values`, as floats."""
        if self.bounds is not None:
            values = np.clip(values, *np.array(self.bounds, np.float32))
        with np.errstate(all="ignore"):
            shifted = np.rint(values / self.divisor) + self.zero_point
        limits = np.float32(self.low), np.float32(self.high)
        return np.asarray(np.clip(shifted, *limits), np.float32)

    def __call__(self, values: Floats32) -> Floats32:
        """What DequantizeLinear makes of the codes."""
        return self.level(self.codes(values))

    def level(self, codes: Floats32) -> Floats32:
        """The values that codes stand for."""
        with np.errstate(all="ignore"):
            return np.asarray((codes - self.zero_point) * self.factor)


def composed(steps: Sequence[Step]) -> Step:
    """The function that takes the steps one after the other."""

    def run(values: Floats32) -> Floats32:
        with np.errstate(all="ignore"):
            for step in steps:
                values = step(values)
        return values

    return run


def ends(function: Step, channels: int) -> tuple[Floats32, Floats32]:
    """The least and the largest value of `function`, [channels, 1] each."""
    extremes = np.broadcast_to(np.array([-LARGEST, LARGEST], np.float32), (channels, 2))
    values = np.broadcast_to(function(extremes), (channels, 2))
    return values[:, :1], values[:, 1:]


def is_equal(function: Step, quantizer: Quantizer) -> bool:
    """Whether both are equal for every finite float32.

    `function` does not fall.
    """
    keys, _ = _thresholds(quantizer)
    if keys is None:
        return False
    for points in (_floats(keys), _floats(np.maximum(keys - 1, -_TOP))):
        values = np.broadcast_to(function(points), points.shape)
        if not np.array_equal(values, quantizer(points)):
            return False
    low, high = ends(function, len(keys))
    least, most = ends(quantizer, len(keys))
    return np.array_equal(low, least) and np.array_equal(high, most)


def nearly_equal(function: Step, quantizer: Quantizer) -> bool:
    """Whether both are equal but for values very near a tie, and last digits.

    A value within NEAR steps of a tie may go to the other side of it, and results may
    differ by NEAR steps.
    """
    keys, codes = _thresholds(quantizer)
    if keys is None:
        return False
    upper, lower = quantizer.level(codes), quantizer.level(codes - 1)
    points = _floats(keys)
    margin = quantizer.divisor.astype(np.float64) * NEAR
    above = np.minimum(points + margin, LARGEST).astype(np.float32)
    below = np.maximum(points - margin, -LARGEST).astype(np.float32)
    low, high = ends(function, len(keys))
    pairs = [(function(above), upper), (function(below), lower)]
    pairs += [(low, lower[:, :1]), (high, upper[:, -1:])]
    allowed = quantizer.factor.astype(np.float64) * NEAR
    return all(_close(values, wanted, allowed) for values, wanted in pairs)


def _close(values: Floats32, wanted: Floats32, allowed: Floats) -> bool:
    values = np.broadcast_to(values, wanted.shape)
    if not np.isfinite(values).all():
        return False
    return bool((np.abs(values.astype(np.float64) - wanted) <= allowed).all())


def _thresholds(
    quantizer: Quantizer,
) -> tuple[npt.NDArray[np.int64] | None, Floats32]:
    """The least float of each code but the first, as keys, and those codes.

    Both are [channels, codes]; None where there are too many, or a code is of no float.
    """
    channels = max(len(quantizer.divisor), len(quantizer.zero_point))
    least, most = ends(quantizer.codes, channels)
    count = int((most - least).max(initial=0))
    if not count or (most - least != count).any() or channels * count > MAX_LEVELS:
        return None, np.zeros((channels, 0), np.float32)
    codes: Floats32 = (least + np.arange(1, count + 1)).astype(np.float32)
    low = np.full((channels, count), -_TOP, np.int64)
    high = np.full((channels, count), _TOP, np.int64)
    while (low < high).any():
        middle = (low + high) >> 1
        reached = quantizer.codes(_floats(middle)) >= codes
        high = np.where(reached, middle, high)
        low = np.where(reached, low, middle + 1)
    return low, codes


def _floats(keys: npt.NDArray[np.int64]) -> Floats32:
    """The floats that have these places in the order of all; 0 is at 0."""
    bits = np.abs(keys).astype(np.int32).view(np.float32)
    return np.asarray(np.where(keys < 0, -bits, bits))
