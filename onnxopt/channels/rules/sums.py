"""Sums over channels: zeros go as they are, constants into what is added behind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from onnx import helper

from onnxopt.channels.facts import Mask
from onnxopt.channels.groups import Link, Sink
from onnxopt.channels.removal import CannotRemove, Removal, check_fits

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

WHY_NOT = {
    "ReduceLogSum": "the logarithm of none is another than that of zeros",
    "ReduceLogSumExp": "the exponential of zero counts",
    "ReduceMax": "the largest may be one of the others",
    "ReduceMean": "its mean is over all of them",
    "ReduceMin": "the least may be one of the others",
    "ReduceProd": "it multiplies them",
}


class SumSink(Sink):
    """ReduceSum, ReduceL1, ReduceL2 and ReduceSumSquare over the axes of the slot.

    `count`: how many elements of a channel are added up, None where that is open.
    """

    def __init__(self, link: Link, axes: tuple[int, ...]) -> None:
        a, self.node, self.slot = link.analysis, link.node, link.slot
        size = self.slot.size
        self.free = np.zeros(size, bool)
        self.constant = np.zeros(size, bool)
        self.values = np.zeros(size)
        self._count = self._elements(a, axes)
        found = a.fact(self.slot.name)
        if found is None:
            return
        over = found.over(self.slot.axes, self.slot.dims)
        is_const = over.is_const.reshape(-1)
        self.values = np.where(is_const, over.values.reshape(-1), 0).astype(float)
        self.free = self.slot.zeros(found)
        if self.node.op_type == "ReduceSum" and a.is_float(self.slot.name):
            self.constant = is_const & (self._count is not None)

    def _elements(self, a: Analysis, axes: tuple[int, ...]) -> int | None:
        others = [a.size(self.slot.name, o) for o in axes if o not in self.slot.axes]
        known = [size for size in others if size is not None]
        return math.prod(known) if len(known) == len(others) else None

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """Add what the constants come to."""
        gone = removed & self.constant
        total = float(self.values[gone].sum()) * (self._count or 0)
        if not total:
            return
        kind = removal.graph.dtype(self.slot.name)
        if not kind:
            raise CannotRemove("the type of the sum is not known")
        by = np.array(total)
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        check_fits(by, dtype)
        removal.shift_after(self.node, by.astype(dtype), axis=0)
