"""Means over channels of which some go: the number that they divide by is another.

The mean of K of C elements, of which the others are zero, is larger by C / K. In an
RMSNorm that goes into the constants that it has anyway:

    x / sqrt(mean * C/K + C/K * epsilon) * gamma * sqrt(C/K) = the same with C elements
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, helper

from onnxopt.channels.groups import Slot
from onnxopt.channels.removal import Change, Removal, check_fits
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


def kept_share(removal: Removal, slot: Slot, axes: Sequence[int]) -> float:
    """The part of the elements along `axes` that stays."""
    share = 1.0
    for axis in axes:
        kept = removal.kept_along(slot, axis)
        share *= int(kept.sum()) / len(kept)
    return share


def times(factor: float) -> Change:
    """Multiplies a constant, computed in float64."""

    def change(array: Array) -> Array:
        made = array.astype(np.float64) * factor
        check_fits(made, array.dtype)
        return np.asarray(made.astype(array.dtype))

    return change


class MeanSquare:
    """A ReduceMean, and where in the norm that it is part of its constants stand.

    `epsilon` and `gamma`: a node and the input that is the constant; None where the
    mean is used in another way.
    """

    def __init__(self, mean: NodeProto) -> None:
        self.mean = mean
        self.epsilon: tuple[NodeProto, int] | None = None
        self.gamma: tuple[NodeProto, int] | None = None

    @classmethod
    def of(cls, a: Analysis, mean: NodeProto) -> MeanSquare:
        """Add a constant, Sqrt, divide by it, multiply by a constant; nothing else."""
        made = cls(mean)
        added = _constant_beside(a, mean, "Add")
        root = _reader(a, added[0], "Sqrt") if added is not None else None
        if added is None or root is None:
            return made
        divided = _reader(a, root, "Div", 1)
        if divided is None:
            inverse = _reader(a, root, "Reciprocal")
            divided = _reader(a, inverse, "Mul") if inverse is not None else None
        elif a.is_constant(divided.input[0]):  # 1 / root, a factor of what is normalized
            divided = _reader(a, divided, "Mul")
        while divided is not None and (cast := _reader(a, divided, "Cast")) is not None:
            divided = cast if a.is_float(cast.output[0]) else None
        gamma = _constant_beside(a, divided, "Mul") if divided is not None else None
        if gamma is not None:
            made.epsilon, made.gamma = added, gamma
        return made

    def scale(self, removal: Removal, share: float) -> None:
        """Make up for a mean that is 1 / `share` of what it was."""
        if self.epsilon is not None and self.gamma is not None:
            removal.change(*self.epsilon, times(1 / share))
            removal.change(*self.gamma, times(math.sqrt(1 / share)))
            return
        name = self.mean.output[0]
        kind = removal.graph.dtype(name)
        assert kind is not None
        array = np.asarray(share, helper.tensor_dtype_to_np_dtype(kind))
        plain = removal.graph.fresh(name)
        factor = removal.edit.add_weight(array, f"{name}_share")
        removal.edit.divert(self.mean, 0, plain)
        removal.edit.insert("Mul", [plain, factor], [name])


def _reader(a: Analysis, node: NodeProto, op: str, slot: int = -1) -> NodeProto | None:
    """The one reader of what `node` makes, if it is an `op` that reads it at `slot`."""
    use = a.graph.only_use(node.output[0])
    if use is None or use.view is not a.graph or a.graph.op(use.node) != op:
        return None
    return use.node if slot in (-1, use.index) else None


def _constant_beside(
    a: Analysis, node: NodeProto, op: str
) -> tuple[NodeProto, int] | None:
    """The one reader where it is an `op` with a constant, and which input that is."""
    found = _reader(a, node, op)
    if found is None:
        return None
    for index, name in enumerate(found.input):
        if a.graph.weight(name) is not None:
            return found, index
    return None
