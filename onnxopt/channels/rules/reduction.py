"""Reductions: what goes through them, and what zeros among the elements are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, Mask, fact
from onnxopt.channels.groups import Link, Sink
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.mean_square import MeanSquare, kept_share
from onnxopt.channels.rules.rule import Rule
from onnxopt.channels.rules.sums import WHY_NOT, SumSink

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

OF_ZEROS = frozenset({"ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"})


class Reduce(Rule):
    """ReduceMean and its kin; over channels, zeros make no difference to a sum."""

    keeps = frozenset({"ReduceMean", "ReduceMax", "ReduceMin"})

    def axes(self, a: Analysis, node: NodeProto) -> tuple[int, ...] | None:
        """The axes that are reduced (from 0 on); None where they are not known."""
        rank = a.rank(node.input[0])
        axes = attributes.get(node, "axes")
        if axes is None and len(node.input) > 1 and node.input[1]:
            array = a.array(node.input[1])
            if array is None:
                return None
            axes = array.tolist()
        if rank is None:
            return None
        if not axes:
            is_idle = attributes.get(node, "noop_with_empty_axes", 0)
            return () if is_idle else tuple(range(rank))
        return tuple(sorted(axis % rank for axis in axes))

    def _keepdims(self, node: NodeProto) -> bool:
        return bool(attributes.get(node, "keepdims", 1))

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Means and extremes of a constant are that constant."""
        given, axes = a.fact(node.input[0]), self.axes(a, node)
        if given is None or axes is None:
            return [None]
        shared = given.across(axes)
        kinds, first = shared.kinds, shared.values
        if node.op_type not in self.keeps:
            same = (first == 0) & (node.op_type in OF_ZEROS)
            kinds = np.where((kinds == Kind.CONST) & ~same, Kind.MAP, kinds)
        if not self._keepdims(node):
            kinds, first = kinds.squeeze(axes), first.squeeze(axes)
        return [fact(kinds, first)]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Of the input, all that is needed of the result went into."""
        wanted: list[Demand] = [None] * len(node.input)
        axes, need = self.axes(a, node), needs[0]
        rank = a.rank(node.input[0])
        if axes is None or need is None or rank is None:
            return wanted
        if need.ndim and not self._keepdims(node):
            need = np.expand_dims(need, axes)
        wanted[0] = need
        return wanted

    def link(self, link: Link) -> None:
        """Axes that are not reduced go through."""
        node = link.node
        axes = self.axes(link.analysis, node)
        rank = link.analysis.rank(node.input[0])
        if axes is None or rank is None or (link.side == "in" and link.index > 0):
            link.bar("the axes that it reduces are not known")
            return
        left = [axis for axis in range(rank) if axis not in axes]
        if self._keepdims(node):
            left = list(range(rank))
        if link.side == "out":
            own = {axis: left[axis] for axis in link.axes}
            if set(own.values()) & set(axes):
                link.bar("it reduces this axis")
            elif not self._waits(link, own):
                link.relate("in", 0, own)
            return
        own = {axis: left.index(axis) for axis in link.axes if axis not in axes}
        if own:
            link.relate("out", 0, own)
        if len(own) < len(link.axes):
            self._reduce(link, [axis for axis in link.axes if axis in axes])

    def _waits(self, link: Link, own: Mapping[int, int]) -> bool:
        """Whether to look again later: the input may have more axes than the result."""
        is_there = link.covering("in", 0, list(own.values())) is not None
        return not is_there and link.groups.defer(link, late=1)

    def _reduce(self, link: Link, reduced: Sequence[int]) -> None:
        """Zeros change no sum; of a mean they change the number that it divides by."""
        if link.op not in {*OF_ZEROS, "ReduceMean"}:
            link.bar(f"it reduces this axis: {WHY_NOT[link.op]}")
        elif not link.analysis.is_float(link.node.output[0]):
            link.bar("it reduces this axis, in integers")
        elif link.op == "ReduceSum" and len(reduced) == len(link.axes):
            link.sink(SumSink(link, self.axes(link.analysis, link.node) or ()))
        else:
            link.sink(_Addends(link, reduced))


class _Addends(Sink):
    """What a sum or a mean runs over: zeros go, and a mean is made up for that."""

    def __init__(self, link: Link, reduced: Sequence[int]) -> None:
        self.slot, self.node, self.reduced = link.slot, link.node, reduced
        self.constant = np.zeros(link.slot.size, bool)
        self.values = np.zeros(link.slot.size)
        a, name = link.analysis, link.slot.name
        self.free = link.slot.zeros(a.fact(name)) | link.slot.unread(
            a.demand(name), reduced
        )

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """A mean over fewer elements is larger by this ratio."""
        if self.node.op_type != "ReduceMean":
            return
        ratio = kept_share(removal, self.slot, self.reduced)
        if ratio != 1:
            MeanSquare.of(removal.groups.analysis, self.node).scale(removal, ratio)
