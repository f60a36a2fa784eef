"""The input channels of a quantized convolution with padding.

There a constant cannot go into the bias, since the border differs, nor can one channel
carry all, since its weights are integers of limited range. But codes are integers, too:
with the codes d of the constant channels, zero point taken off, and their weights w,

    sum over all constant channels of d w  =  sum over a few of them of d w'

has solutions in integers once a few codes without a common factor span the range. Then
the integer sums of the convolution are what they were, at the border as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.facts import Mask
from onnxopt.channels.groups import Ints, Link
from onnxopt.channels.removal import CannotRemove, Removal
from onnxopt.channels.rules.matrix import Geometry
from onnxopt.channels.rules.sinks import LayerSink
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis
    from onnxopt.channels.rules.layer import Layer

MAX_CARRIERS = 8


class Codes(NamedTuple):
    """A quantized weight: who reads it at which input, its codes less zero point."""

    node: NodeProto
    slot: int
    zero: int
    low: int
    high: int

    @classmethod
    def of(cls, node: NodeProto, slot: int, codes: Array, zero: int) -> Codes:
        """No further than they reach by now, new ones may be."""
        used = codes.astype(np.int64) - zero
        return cls(node, slot, zero, int(used.min(initial=0)), int(used.max(initial=0)))


class IntegerSink(LayerSink):
    """Constants go once a few of them carry the integer sums of all."""

    def __init__(
        self, layer: Layer, link: Link, g: Geometry, codes: Codes, steps: Ints
    ) -> None:
        super().__init__(layer, link, g)
        self.codes, self.steps = codes, steps
        self.constant = (steps != 0) & (self.values != 0)
        self._weight = link.groups.graph.array(codes.node.input[codes.slot])

    def to_hold(self, removed: Mask) -> Ints:
        """The next channel that has to stay, if those that do cannot carry the sums."""
        nothing: Ints = np.zeros(0, np.int64)
        gone = removed & self.constant & ~self.free
        if not gone.any() or self._weight is None:
            return nothing
        held = np.flatnonzero(self.constant & ~removed)
        if self._solved(self._weight, removed) is not None:
            return nothing
        if len(held) >= MAX_CARRIERS:
            return self.slot.atoms[gone]
        return self.slot.atoms[[self._next(held, np.flatnonzero(gone))]]

    def _next(self, held: Ints, gone: Ints) -> int:
        """The largest code first, then the smallest without a common factor, then on."""
        sizes = np.abs(self.steps[gone])
        if len(held) == 1:
            factors = np.gcd(self.steps[gone], self.steps[held[0]])
            return int(gone[np.lexsort((sizes, factors))[0]])
        return int(gone[sizes.argmax()])

    def _solved(self, weight: Array, removed: Mask) -> tuple[Ints, Ints] | None:
        """The carriers, and their new weights [carriers, outputs, 1, taps...]."""
        held = np.flatnonzero(self.constant & ~removed)
        order = np.argsort(-np.abs(self.steps[held]), kind="stable")
        held = held[order]
        if len(held) > MAX_CARRIERS:  # the largest, and the smallest for the units
            held = np.concatenate([held[: MAX_CARRIERS - 1], held[-1:]])
        if not len(held):
            return None
        wide = np.moveaxis(weight, 1, 0).astype(np.int64) - self.codes.zero
        part = np.concatenate([np.flatnonzero(removed & self.constant), held])
        sums = np.tensordot(self.steps[part], wide[part], 1)
        found = solve(sums, self.steps[held].tolist(), self.codes.low, self.codes.high)
        return None if found is None else (held, found)

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """Give the carriers their new weights."""
        if not (removed & self.constant & ~self.free).any():
            return

        def change(array: Array) -> Array:
            found = self._solved(array, removed)
            if found is None:
                raise CannotRemove("its integer weights cannot carry the constants")
            made = np.moveaxis(array.copy(), 1, 0)
            made[found[0]] = (found[1] + self.codes.zero).astype(array.dtype)
            return np.moveaxis(made, 0, 1)

        removal.change(self.codes.node, self.codes.slot, change)


def integer_sink(
    layer: Layer, a: Analysis, link: Link, g: Geometry
) -> IntegerSink | None:
    """The sink of a padded convolution of codes by codes; None where it is not one."""
    codes = _weight_codes(a, link.node)
    steps = _steps(a, link.node.input[0], link.slot.size)
    if codes is None or steps is None or g.groups != 1 or (g.outputs, g.inputs) != (0, 1):
        return None
    return IntegerSink(layer, link, g, codes, steps)


def _weight_codes(a: Analysis, node: NodeProto) -> Codes | None:
    maker = a.graph.producer(node.input[1])
    if maker is None or a.graph.op(maker) != "DequantizeLinear":
        return None
    codes, scale = a.graph.array(maker.input[0]), a.graph.weight(maker.input[1])
    if codes is None or codes.dtype not in (np.int8, np.uint8) or scale is None:
        return None
    if list(scale.dims) not in ([], [1]) and attributes.get(maker, "axis", 1) != 0:
        return None  # a scale for each input channel: their codes do not add up
    if attributes.get(maker, "block_size", 0) or not a.graph.only_use(node.input[1]):
        return None
    zero = 0
    if len(maker.input) > 2 and maker.input[2]:
        zeros = a.graph.array(maker.input[2])
        if zeros is None or not zeros.size or (zeros != zeros.reshape(-1)[0]).any():
            return None
        zero = int(zeros.reshape(-1)[0])
    return Codes.of(maker, 0, codes, zero)


def _steps(a: Analysis, name: str, size: int) -> Ints | None:
    """The known codes of a value, less its zero point; 0 where they are not known."""
    maker = a.graph.producer(name)
    if maker is None or a.graph.op(maker) != "DequantizeLinear":
        return None
    if a.shape(maker.input[1]) not in ((), (1,)):
        return None
    zero: Any = 0
    if len(maker.input) > 2 and maker.input[2]:
        array = a.graph.array(maker.input[2])
        if array is None:
            return None
        zero = int(array.reshape(-1)[0])
    found = a.fact(maker.input[0])
    if found is None:
        return None
    along = found.along(1, size)
    steps: Ints = along.values.reshape(-1).astype(np.int64) - zero
    steps[~along.is_const.reshape(-1)] = 0
    return steps


# ---- integers ----


def solve(
    sums: npt.NDArray[np.int64], factors: Sequence[int], low: int, high: int
) -> Ints | None:
    """Integers w_k in low..high with sum(w_k * factors[k]) = sums, for every element.

    `factors`, not zero, with the largest first. Shape: [len(factors), *sums.shape];
    None where some element has no solution that was found.
    """
    values, inverse = np.unique(sums.reshape(-1), return_inverse=True)
    found = _solve(values, list(factors), low, high)
    if found is None or (found[0] == high + 1).any():
        return None
    return np.stack([part[inverse].reshape(sums.shape) for part in found])


def _solve(sums: Ints, factors: list[int], low: int, high: int) -> list[Ints] | None:
    """The same for a vector; elements without a solution have high + 1 first."""
    if len(factors) == 1:
        whole = sums // factors[0]
        fits = (whole * factors[0] == sums) & (whole >= low) & (whole <= high)
        return [np.where(fits, whole, high + 1)]
    if len(factors) == 2:
        return _solve_two(sums, factors[0], factors[1], low, high)
    made = [np.full(sums.shape, high + 1) for _ in factors]
    middle = np.rint(sums / factors[0]).astype(np.int64)
    reach = abs(factors[-1]) if len(factors) == 3 else 0
    for offset in sorted(range(-reach, reach + 1), key=abs):
        open_ = np.flatnonzero(made[0] == high + 1)
        if not len(open_):
            break
        first = np.clip(middle[open_] + offset, low, high)
        rest = _solve(sums[open_] - first * factors[0], factors[1:], low, high)
        if rest is None:
            continue
        good = rest[0] != high + 1
        for part, new in zip(made, [first, *rest], strict=True):
            part[open_[good]] = new[good]
    return made


def _solve_two(sums: Ints, one: int, two: int, low: int, high: int) -> list[Ints]:
    """By congruence: w_one runs through one residue class modulo two / gcd.

    Of its members that leave w_two in range, one near the middle is taken.
    """
    common = math.gcd(one, two)
    step = abs(two) // common
    inverse = pow(one // common, -1, step) if step > 1 else 0
    residue = (sums // common) * inverse % step
    ends = np.stack([(sums - two * low) / one, (sums - two * high) / one])
    least = np.maximum(low, np.ceil(ends.min(0))).astype(np.int64)
    most = np.minimum(high, np.floor(ends.max(0))).astype(np.int64)
    middle = (least + most) // 2
    first = middle + (residue - middle) % step
    first = np.where(first > most, first - step, first)
    second = (sums - first * one) // two
    good = (first >= least) & (first <= most) & (first * one + second * two == sums)
    return [np.where(good, first, high + 1), second]
