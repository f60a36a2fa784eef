"""Norms over the last axes of a value: LayerNormalization and RMSNormalization.

With a mean that is taken off, no channel can go: zero or not, it moves the mean. Without
one, zeros count only in the number of channels, which goes into epsilon and the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import NOTHING, Demand
from onnxopt.channels.facts import Fact, Kind, Mask, aligned, fact
from onnxopt.channels.groups import Link, Sink
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.mean_square import kept_share, times
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class LayerNormalization(Rule):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias.

    `scale_slot` and `shift_slot`: where those are; `addends`: the inputs of which the sum
    is normalized; `sum_slot`: the output that is that sum, -1 where there is none.
    """

    scale_slot = 1
    shift_slot = 2
    addends: tuple[int, ...] = (0,)
    sum_slot = -1

    def given(self, a: Analysis, node: NodeProto) -> Fact | None:
        """What is known of what is normalized."""
        return a.fact(node.input[0])

    def axis(self, a: Analysis, node: NodeProto) -> int | None:
        """The first axis that is normalized; None where the rank is not known."""
        rank, axis = a.rank(node.input[0]), attributes.get(node, "axis", -1)
        return axis % rank if rank and -rank <= axis < rank else None

    def zero_shift(self, a: Analysis, node: NodeProto) -> Array | None:
        """What comes out where the scale is zero; None where that is not known."""
        name = _input(node, self.shift_slot)
        return a.array(name) if name else np.zeros((1,), np.float32)

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """A scale of zero leaves the bias, whatever comes in."""
        nothing: list[Fact | None] = [None] * len(node.output)
        rank, scale = a.rank(node.input[0]), a.array(node.input[self.scale_slot])
        shift = self.zero_shift(a, node)
        given = self.given(a, node)
        if rank is None or scale is None or shift is None:
            return nothing
        if given is not None and given.is_wild.any():
            return nothing
        is_zero = aligned(self.dead(a, node, scale), rank)
        if not is_zero.any():
            return nothing
        kinds = np.where(is_zero, Kind.CONST, Kind.DYN)
        values = np.where(is_zero, aligned(shift, rank), 0).astype(scale.dtype)
        return [fact(kinds, values), *nothing[1:]]

    def dead(self, a: Analysis, node: NodeProto, scale: Array) -> Mask:
        """Where the result is the bias: in the form of a fact."""
        return np.asarray(scale == 0)

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """All that is normalized together, where any of it is needed."""
        wanted: list[Demand] = [None] * len(node.input)
        axis, need = self.axis(a, node), needs[0]
        if axis is None or need is None or any(other is None for other in needs[1:]):
            return wanted
        axes = tuple(range(axis, need.ndim))
        wanted[0] = demand.merge(NOTHING, np.asarray(need.any(axis=axes, keepdims=True)))
        return wanted

    def link(self, link: Link) -> None:
        """Axes in front go through; those that are normalized stay."""
        axis = self.axis(link.analysis, link.node)
        if axis is None or (link.side == "in" and link.index not in self.addends):
            link.bar(f"{link.op} has its parameters from this")
        elif any(place >= axis for place in link.axes):
            self.link_normalized(link, axis)
        else:
            self.link_through(link)

    def link_normalized(self, link: Link, axis: int) -> None:
        """Channels stay; of several axes, those that are not normalized may lose some."""
        if len(link.axes) == 1:
            link.bar(f"{link.op} mixes the channels")
        else:
            self.link_same(link, axis)

    def link_same(self, link: Link, axis: int) -> None:
        """The same channels before, after and in the parameters."""
        a, node = link.analysis, link.node
        rank = a.rank(node.input[0]) or 0
        outputs = [i for i, name in enumerate(node.output) if name]
        if not {link.index if link.side == "out" else 0, *outputs} <= {0, self.sum_slot}:
            link.bar("something reads what it divides by")
            return
        for index in range(1, len(node.input)):
            if index in self.addends or not node.input[index]:
                continue
            dims = a.shape(node.input[index])
            if a.graph.weight(node.input[index]) is None or dims is None:
                link.bar("its parameters are not constant")
                return
            shift = rank - len(dims)
            own = {o: o - shift for o in link.axes if o >= shift and dims[o - shift] != 1}
            if own:
                link.relate("in", index, own)
        self.link_through(link)
        if (link.side, link.index) == ("in", 0):
            link.sink(_Normalized(self, link, [o for o in link.axes if o >= axis]))

    def free(self, link: Link) -> Mask:
        """[atoms]: which zeros may go: none, since each moves the mean."""
        return np.zeros(link.slot.size, bool)

    def link_through(self, link: Link) -> None:
        """Every other output and the input have these axes as well."""
        for side, index in link.ports():
            if side == "out" or index in self.addends:
                link.tie(side, index, link.axes)


class RMSNormalization(LayerNormalization):
    """x / sqrt(mean of squares + epsilon) * scale; zeros can go."""

    def zero_shift(self, a: Analysis, node: NodeProto) -> Array | None:
        """There is no bias."""
        return np.zeros((1,), np.float32)

    def dead(self, a: Analysis, node: NodeProto, scale: Array) -> Mask:
        """Zeros stay zero."""
        rank, given = a.rank(node.input[0]) or 0, self.given(a, node)
        is_zero = aligned(np.asarray(scale == 0), rank)
        return is_zero if given is None else np.asarray(is_zero | given.is_zero)

    def link_normalized(self, link: Link, axis: int) -> None:
        """Zeros may go."""
        self.link_same(link, axis)

    def free(self, link: Link) -> Mask:
        """[atoms]: zeros."""
        return link.slot.zeros(self.given(link.analysis, link.node))


class _Normalized(Sink):
    """The channels of a norm: those that may, and rows of which nothing is needed."""

    def __init__(self, rule: LayerNormalization, link: Link, axes: Sequence[int]) -> None:
        self.slot, self.node, self.normalized = link.slot, link.node, axes
        self.scale_slot = rule.scale_slot
        self.constant = np.zeros(link.slot.size, bool)
        self.values = np.zeros(link.slot.size)
        need = link.analysis.demand(link.slot.name)
        self.free = rule.free(link) | link.slot.unread(need, axes)

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """The mean is over fewer channels: see mean_square."""
        share = kept_share(removal, self.slot, self.normalized)
        if share != 1:
            epsilon = attributes.get(self.node, "epsilon", 1e-5)
            removal.edit.set_attribute(self.node, "epsilon", epsilon / share)
            by = times(math.sqrt(1 / share))
            removal.change(self.node, self.scale_slot, by)


def _input(node: NodeProto, index: int) -> str:
    """An input; "" where there is none."""
    return node.input[index] if index < len(node.input) else ""
