"""The weight of a layer as a matrix of taps, read only as far as a question needs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxopt import zeros
from onnxopt.channels.facts import Fact, Kind, Mask
from onnxopt.weights import Array, elements, tensor_bytes

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

Floats = npt.NDArray[np.float64]

STREAMED_FROM = 1 << 16
"""Weights of this size (bytes) are streamed where zero channels are all that matters."""
LARGE = 1 << 24
"""Weights with more elements than this are never read as a whole to learn about them:
an output is taken to read every input that some output reads."""


@dataclass(frozen=True)
class Geometry:
    """How a layer treats its weight.

    `data` is the axis of input 0 that holds its input channels, `result` the axis of
    its output; `outputs` and `inputs` are axes of the weight, input 1. `scale` is what
    it multiplies the product by; `bias_scale` the bias. `spreads`: whether what a
    constant channel adds differs over space.
    """

    data: int
    result: int
    outputs: int
    inputs: int
    groups: int = 1
    scale: float = 1.0
    bias_scale: float = 1.0
    spreads: bool = False


def as_matrix(weight: Array, g: Geometry) -> Array:
    """`weight` as [groups, outputs, inputs, taps]; both counted within a group."""
    moved = np.moveaxis(weight, (g.outputs, g.inputs), (0, 1))
    whole = moved.reshape(*moved.shape[:2], -1)
    rows, columns, taps = whole.shape
    if g.outputs < g.inputs or g.groups == 1:  # outputs run group by group
        return whole.reshape(g.groups, rows // g.groups, columns, taps)
    grouped = whole.reshape(rows, g.groups, columns // g.groups, taps)
    return grouped.transpose(1, 0, 2, 3)


class Matrix:
    """The constant weight `name`; it keeps one truth for each channel and no more."""

    def __init__(self, a: Analysis, name: str, g: Geometry) -> None:
        self._analysis, self._name, self._geometry = a, name, g
        tensor = a.graph.weight(name)
        self._is_large = tensor is not None and elements(tensor) > LARGE

    def array(self) -> Array | None:
        """[groups, outputs, inputs, taps]; None where it could not be computed."""
        weight = self._analysis.array(self._name)
        if weight is None or weight.ndim < 2:
            return None
        return as_matrix(weight, self._geometry)

    @functools.cached_property
    def _outline(self) -> tuple[Mask, Mask] | None:
        """Which outputs read anything, which inputs are read: [groups * ...] each."""
        g = self._geometry
        tensor = self._analysis.graph.weight(self._name)
        if tensor is not None and tensor_bytes(tensor) >= STREAMED_FROM and g.groups == 1:
            rank = len(tensor.dims)
            axes = (g.outputs % rank, g.inputs % rank)
            found = zeros.count(self._analysis.graph.model.weights, tensor, axes)
            if found is not None:
                rows, columns = (~found.channels[axis] for axis in axes)
                return rows, columns
        taps = self._taps()
        if taps is None:
            return None
        return taps.any(axis=2).reshape(-1), taps.any(axis=1).reshape(-1)

    def _taps(self) -> Mask | None:
        """[groups, outputs, inputs]: whether an output reads an input at all."""
        array = self.array()
        return None if array is None else np.asarray((array != 0).any(axis=3))

    @property
    def rows(self) -> Mask | None:
        """For each output, of all groups, whether it reads any input."""
        return None if self._outline is None else self._outline[0]

    def live(self, needed: Mask) -> Mask | None:
        """Which inputs are read by outputs of which `needed` says that they matter."""
        if self._outline is None:
            return None
        rows, columns = self._outline
        if needed[rows].all():
            return columns
        if self._is_large:
            return columns & bool((needed & rows).any())
        taps = self._taps()
        assert taps is not None
        shape = (taps.shape[0], taps.shape[1], 1)
        return np.asarray((taps & needed.reshape(shape)).any(axis=1).reshape(-1))

    def mixed(self, channel: Fact) -> tuple[npt.NDArray[Any], Floats] | None:
        """Kind of each output, and what the constant inputs add to it: [outputs] each.

        `channel`: the fact of each input, of all groups.
        """
        if self._is_large:
            return self._mixed_by_outline(channel)
        array = self.array()
        return None if array is None else _mixed(channel, array, self._geometry)

    def _mixed_by_outline(self, channel: Fact) -> tuple[npt.NDArray[Any], Floats] | None:
        if self._outline is None:
            return None
        rows, columns = self._outline
        kinds, is_zero = channel.kinds.reshape(-1), channel.is_zero.reshape(-1)
        read = kinds[columns & ~is_zero]
        lowest = min([Kind.MAP, *read.tolist()]) if len(read) else Kind.CONST
        found = np.where(rows, lowest, Kind.CONST)
        if (kinds == Kind.WILD).any():
            found = np.full(rows.shape, Kind.WILD)
        return found, np.zeros(rows.shape)


def _mixed(channel: Fact, matrix: Array, g: Geometry) -> tuple[npt.NDArray[Any], Floats]:
    taps = (matrix != 0).any(axis=3)
    groups, _, inputs = taps.shape
    kinds = channel.kinds.reshape(groups, 1, inputs)
    is_zero = channel.is_zero.reshape(groups, 1, inputs)
    seen = np.where(taps & ~is_zero, kinds, Kind.CONST)
    if g.spreads:
        is_moved = taps & ~is_zero & (kinds == Kind.CONST)
        seen = np.where(is_moved, Kind.MAP, seen)
    lowest = seen.min(axis=2)
    is_wild = (kinds == Kind.WILD).any(axis=2)  # even a zero does not silence it
    lowest = np.where(is_wild, Kind.WILD, lowest)
    constants = np.where(kinds == Kind.CONST, channel.values.reshape(kinds.shape), 0)
    added = added_by(matrix, constants.reshape(-1).astype(np.float64))
    return lowest.reshape(-1), added


def added_by(matrix: Array, values: Floats) -> Floats:
    """What inputs of these values [groups * inputs] add to each output, in float64.

    `matrix`: [groups, outputs, inputs, taps]. Inputs of zero are not read.
    """
    groups, outputs, inputs, _ = matrix.shape
    values = values.reshape(groups, inputs)
    columns = np.flatnonzero((values != 0).any(axis=0))
    total = np.zeros((groups, outputs))
    if len(columns):
        with np.errstate(all="ignore"):
            sums = matrix[:, :, columns].sum(axis=3, dtype=np.float64)
            used = values[:, columns]
            sums = np.where(used[:, None] == 0, 0, sums)
            total = np.einsum("goi,gi->go", sums, used)
    return total.reshape(-1)
