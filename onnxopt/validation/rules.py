"""Rules that turn measured differences into a verdict on one output.

Exact      equal by ==, NaN in the same places
Floor      within max(bound, 8 x the reference's own noise), as a whole and slice
           by slice along every axis, so that a large channel hides no wrong small one
Within     the user's rtol and atol, element by element
Ratio      the user's SQNR, or the floor of a lossy pass
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from onnxopt.validation.metrics import Allowance, Difference, Slices, sqnr_db
from onnxopt.validation.noise import BOUNDS, UNMEASURED_BOUNDS

# How many times its own noise a reference may be off.
FACTOR = 8.0
# On quantized models the mean noise is held to less: flips are few and large, so the
# largest one says little.
MEAN_FACTOR = 4.0
# Decibels that a lossy pass has to keep where the user named no budget.
LOSSY_FLOOR_DB = 10.0


@dataclass(frozen=True)
class Sample:
    """One array of one output on one feed: its place, and how the candidate differs.

    `kind` is "data", or the hard case that the feed is.
    """

    feed: int
    leaf: int
    kind: str
    difference: Difference

    @property
    def key(self) -> tuple[int, int]:
        """What a Spread files it under."""
        return self.feed, self.leaf

    @property
    def where(self) -> str:
        """The feed in words."""
        return f"feed {self.feed}" if self.kind == "data" else f"hard case {self.kind!r}"


@dataclass
class Spread:
    """How one output of the reference differs from itself, per feed and array."""

    samples: dict[tuple[int, int], list[Sample]] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        """Record one run of the moved reference."""
        self.samples.setdefault(sample.key, []).append(sample)

    def __or__(self, other: Spread) -> Spread:
        """The runs of both."""
        keys = {**self.samples, **other.samples}
        return Spread(
            {k: [*self.samples.get(k, ()), *other.samples.get(k, ())] for k in keys}
        )

    @property
    def moved(self) -> bool:
        """Whether anything differed in any run."""
        return any(
            sample.difference.max_abs or sample.difference.flipped
            for many in self.samples.values()
            for sample in many
        )

    def largest(self, key: tuple[int, int]) -> float:
        """The most it moved on one feed."""
        return max((s.difference.max_abs for s in self.samples.get(key, ())), default=0.0)

    def pooled(self, kind: str) -> tuple[float, float]:
        """The most it moved on any feed of a kind: absolute, and relative.

        Hard cases are made from ordinary feeds, so the noise of those counts there too.
        """
        same = self._of(kind)
        moved = max((d.max_abs for d in same), default=0.0)
        return moved, max((d.max_rel for d in same if d.scale), default=0.0)

    def _of(self, kind: str) -> list[Difference]:
        """All runs on feeds of a kind; ordinary feeds stand in for hard ones too."""
        kinds = {kind, "data"}
        return [
            sample.difference
            for many in self.samples.values()
            for sample in many
            if sample.kind in kinds
        ]

    def flipped(self, kind: str) -> float:
        """The largest share of elements that changed, for types without rounding."""
        return max((d.flipped / max(d.count, 1) for d in self._of(kind)), default=0.0)

    def mean_square(self) -> float:
        """Noise over signal, summed over the ordinary feeds."""
        same = self._of("data")
        signal = sum(d.signal for d in same)
        return sum(d.noise for d in same) / signal if signal else 0.0

    def slices(self, key: tuple[int, int], axis: int) -> np.ndarray | None:
        """The most that each slice moved along an axis."""
        found = [
            part.error
            for sample in self.samples.get(key, ())
            for part in sample.difference.slices
            if part.axis == axis
        ]
        return np.max(found, axis=0) if found else None


@dataclass(frozen=True)
class Outcome:
    """The verdict on one output: why not, and the bound it was held to."""

    reason: str | None
    bound: float | None


class Rule(Protocol):
    """Judges the samples of one output; `spread` is None until it was measured."""

    @property
    def allowance(self) -> Allowance | None:
        """What `compare` needs for this rule."""

    def judge(self, samples: Sequence[Sample], spread: Spread | None) -> Outcome:
        """The verdict, with the first reason found."""

    def doubtful(self, samples: Sequence[Sample], spread: Spread | None) -> set[int]:
        """Feeds on which more runs of the moved reference could change the verdict."""


def structural(samples: Sequence[Sample]) -> str | None:
    """A difference that no rule forgives: shape, dtype, a value that is not finite."""
    for sample in samples:
        difference = sample.difference
        if difference.problem:
            return f"{difference.problem} on {sample.where}"
        if difference.lost_finite:
            return (
                f"{difference.lost_finite} elements are NaN or Inf on {sample.where} "
                "where the reference's are finite"
            )
        if difference.moved_not_finite and sample.kind == "data":
            return (
                f"{difference.moved_not_finite} elements that are NaN or Inf in the "
                f"reference are not the same on {sample.where}"
            )
    return None


@dataclass(frozen=True)
class Exact:
    """Equal by ==, NaN in the same places, also on hard cases."""

    allowance: Allowance | None = None

    def judge(self, samples: Sequence[Sample], spread: Spread | None) -> Outcome:
        """See the class."""
        for sample in samples:
            difference = sample.difference
            if difference.problem:
                return Outcome(f"{difference.problem} on {sample.where}", 0.0)
            if difference.flipped:
                return Outcome(
                    f"{difference.flipped} of {difference.count} elements are not equal "
                    f"on {sample.where} (largest difference {difference.max_abs:.3g})",
                    0.0,
                )
        return Outcome(None, 0.0)

    def doubtful(self, samples: Sequence[Sample], spread: Spread | None) -> set[int]:
        """None."""
        return set()


@dataclass(frozen=True)
class Within:
    """The user's rtol and atol; types without rounding must be equal."""

    allowance: Allowance

    def judge(self, samples: Sequence[Sample], spread: Spread | None) -> Outcome:
        """See the class."""
        data = [s for s in samples if s.kind == "data"]
        if reason := structural(data):
            return Outcome(reason, None)
        for sample in data:
            difference = sample.difference
            if difference.beyond > 0 or (difference.exact and difference.flipped):
                return Outcome(
                    f"beyond rtol {self.allowance.rtol:g} and atol "
                    f"{self.allowance.atol:g} on {sample.where} "
                    f"(largest difference {difference.max_abs:.3g})",
                    None,
                )
        return Outcome(None, None)

    def doubtful(self, samples: Sequence[Sample], spread: Spread | None) -> set[int]:
        """None."""
        return set()


@dataclass(frozen=True)
class Ratio:
    """At least `decibels` on every feed that has a signal; None: only finite and shaped.

    Types without rounding are not held to anything but shape: a lossy pass may change
    a class or an index.
    """

    decibels: float | None
    allowance: Allowance | None = None

    def judge(self, samples: Sequence[Sample], spread: Spread | None) -> Outcome:
        """See the class."""
        data = [s for s in samples if s.kind == "data"]
        if reason := structural(data):
            return Outcome(reason, self.decibels)
        if self.decibels is None or not data:
            return Outcome(None, None)
        rounded = [s for s in data if not s.difference.exact]
        typical = float(np.mean([s.difference.signal for s in rounded] or [0.0]))
        for sample in rounded:
            # A feed on which the output is all but zero is judged as the others are.
            signal = max(sample.difference.signal, 1e-6 * typical)
            found = sqnr_db(signal, sample.difference.noise)
            if found is not None and found < self.decibels:
                return Outcome(
                    f"{found:.1f} dB on {sample.where}, {self.decibels:g} dB wanted",
                    self.decibels,
                )
        return Outcome(None, self.decibels)

    def doubtful(self, samples: Sequence[Sample], spread: Spread | None) -> set[int]:
        """None."""
        return set()


@dataclass(frozen=True)
class Floor:
    """Within the measured noise floor.

    `precision` is the type that the model computes in, `quantized` whether codes can
    flip, `measurable` whether inputs or weights could be moved at all.
    """

    precision: str
    quantized: bool
    measurable: bool = True
    allowance: Allowance | None = None

    def bound(self, dtype: str) -> float:
        """The relative error that needs no measuring for an output of this dtype."""
        table = BOUNDS if self.measurable else UNMEASURED_BOUNDS
        own = table.get(dtype, table["float32"])
        if dtype.startswith("float8") or dtype.startswith("float4"):
            # One code of the output's own type: 3 bits of mantissa at most.
            own = 0.125
        coarse = table[self.precision] if self.precision != "float32" else 0.0
        return max(own, coarse)

    def doubtful(self, samples: Sequence[Sample], spread: Spread | None) -> set[int]:
        """Those with a sample beyond what is known of the noise so far."""
        if structural(samples) is not None:
            return set()
        usual = usual_scale(samples)
        return {s.feed for s in samples if self._excess(s, spread, usual) is not None}

    def judge(self, samples: Sequence[Sample], spread: Spread | None) -> Outcome:
        """See the class; the bound is the largest relative one that was applied."""
        if reason := structural(samples):
            return Outcome(reason, None)
        usual = usual_scale(samples)
        for sample in samples:
            if reason := self._excess(sample, spread, usual):
                return Outcome(reason, self._applied([sample], spread))
        if (
            spread is not None
            and self.quantized
            and (reason := self._mean(samples, spread))
        ):
            return Outcome(reason, self._applied(samples, spread))
        return Outcome(None, self._applied(samples, spread))

    def _tolerance(
        self, sample: Sample, spread: Spread | None, usual: float = 0.0
    ) -> float:
        """The largest absolute difference that one sample may have.

        `usual`: the largest value on ordinary feeds. On hard cases it counts for one
        unit in the last place: where all is zero, a Sigmoid gives 0 or 1e-9.
        """
        difference = sample.difference
        own = self.bound(difference.dtype) * difference.scale + _tiny(difference.dtype)
        if sample.kind != "data":
            own = max(own, _epsilon(difference.dtype) * usual)
        if spread is None:
            return own
        moved, relative = spread.pooled(sample.kind)
        # Noise seen on another feed counts, as far as it is no larger in either measure.
        shared = min(moved, relative * difference.scale)
        return max(own, FACTOR * spread.largest(sample.key), FACTOR * shared)

    def _excess(self, sample: Sample, spread: Spread | None, usual: float) -> str | None:
        difference = sample.difference
        if difference.exact:
            return self._flips(sample, spread)
        if difference.max_abs == 0:
            return None
        tolerance = self._tolerance(sample, spread, usual)
        if difference.max_abs > tolerance:
            return (
                f"differs by {difference.max_abs:.3g} on {sample.where} "
                f"({_share(difference.max_rel)} of the largest value; "
                f"{tolerance:.3g} is within rounding)"
            )
        return self._slices(sample, spread, usual)

    def _slices(self, sample: Sample, spread: Spread | None, usual: float) -> str | None:
        difference = sample.difference
        bound = self.bound(difference.dtype)
        # A code flips here or there by luck: slices of quantized models say nothing.
        for part in () if self.quantized else difference.slices:
            allowed = bound * part.scale + _tiny(difference.dtype)
            # Nothing is expected of digits that the whole tensor's scale does not have.
            scale = difference.scale if sample.kind == "data" else usual
            scale = max(scale, difference.scale)
            allowed = np.maximum(allowed, _epsilon(difference.dtype) * scale)
            if spread is not None:
                own = spread.slices(sample.key, part.axis)
                if own is None or own.shape != part.error.shape:
                    continue  # not measured on this feed: the whole was judged
                whole = self._tolerance(sample, spread)
                allowed = np.maximum(allowed, _slice_noise(part, own, whole))
            if reason := _worst_slice(part, allowed, sample):
                return reason
        return None

    def _flips(self, sample: Sample, spread: Spread | None) -> str | None:
        """Integers, bools and strings: equal, or no more changes than rounding makes."""
        difference = sample.difference
        if not difference.flipped:
            return None
        share = difference.flipped / difference.count
        usual = spread.flipped(sample.kind) if spread else 0.0
        if share <= FACTOR * usual:
            return None
        return (
            f"{difference.flipped} of {difference.count} elements are not equal on "
            f"{sample.where} ({_share(usual)} change by rounding alone)"
        )

    def _mean(self, samples: Sequence[Sample], spread: Spread) -> str | None:
        """On quantized models: the mean noise too, over all feeds.

        Of floats and of codes; integers of 64 bits are indices, and those that differ
        can be any distance apart.
        """
        data = [
            s.difference
            for s in samples
            if s.kind == "data" and (not s.difference.exact or _is_code(s.difference))
        ]
        signal, noise = sum(d.signal for d in data), sum(d.noise for d in data)
        dtype = data[0].dtype if data else "float32"
        usual = math.sqrt(spread.mean_square())
        own = 0.0 if data and data[0].exact else self.bound(dtype)
        allowed = max(own, MEAN_FACTOR * usual)
        found = math.sqrt(noise / signal) if signal else 0.0
        if found <= allowed:
            return None
        return (
            f"differs by {_share(found)} in the mean, codes flipped by rounding "
            f"make {_share(usual)}"
        )

    def _applied(self, samples: Sequence[Sample], spread: Spread | None) -> float | None:
        bounds = [
            self._tolerance(s, spread) / s.difference.scale
            for s in samples
            if s.difference.scale and not s.difference.exact and s.kind == "data"
        ]
        return max(bounds, default=None)


def usual_scale(samples: Sequence[Sample]) -> float:
    """The largest magnitude of the reference on ordinary feeds."""
    return max((s.difference.scale for s in samples if s.kind == "data"), default=0.0)


def _slice_noise(part: Slices, own: np.ndarray, whole: float) -> np.ndarray:
    """What rounding explains in each slice, from how far each one moved.

    A few runs leave some slice still by luck, so each is granted the typical relative
    noise of its neighbours; one that never moved, being zero or saturated, is granted
    that of the whole.
    """
    moving = (own > 0) & (part.scale > 0)
    typical = np.median(own[moving] / part.scale[moving]) if moving.any() else 0.0
    expected = np.maximum(own, typical * part.scale)
    return np.where(own > 0, FACTOR * expected, whole)


def _worst_slice(part: Slices, allowed: np.ndarray, sample: Sample) -> str | None:
    excess = part.error - allowed
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return None
    return (
        f"differs by {part.error[worst]:.3g} at index {worst} of axis {part.axis} on "
        f"{sample.where} (the largest value there is {part.scale[worst]:.3g}; "
        f"{allowed[worst]:.3g} is within rounding)"
    )


def _is_code(difference: Difference) -> bool:
    return difference.exact and "int" in difference.dtype and "64" not in difference.dtype


def _tiny(dtype: str) -> float:
    """Below the smallest normal number there is no relative precision."""
    return float(np.finfo(_float(dtype)).smallest_normal)


def _epsilon(dtype: str) -> float:
    return float(np.finfo(_float(dtype)).eps)


def _float(dtype: str) -> np.dtype:
    known: Mapping[str, np.dtype] = {
        "float16": np.dtype(np.float16),
        "float64": np.dtype(np.float64),
    }
    return known.get(dtype, np.dtype(np.float32))


def _share(part: float) -> str:
    return f"{100 * part:.3g} %"
