"""InstanceNormalization and GroupNormalization: statistics over space, or over groups.

Where all that is normalized together is zero, so is (x - mean) / sqrt(var + epsilon), and
the shift is left. A constant would be as well, on paper: what ONNX Runtime computes then
is off by what the mean is rounded by, times 1 / sqrt(epsilon). So that counts as MAP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, Mask, fact
from onnxopt.channels.groups import Ints, Link
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class GroupNormalization(Rule):
    """y = scale * (x - mean) / sqrt(var + epsilon) + bias, statistics by group."""

    drops_inputs = True

    def groups(self, a: Analysis, node: NodeProto) -> Ints | None:
        """The group of each channel; None where the channels are not known."""
        size, count = a.size(node.input[0], 1), attributes.get(node, "num_groups", 0)
        if size is None or not count or size % count:
            return None
        found: Ints = np.arange(size) // (size // count)
        return found

    def parameters(self, a: Analysis, node: NodeProto) -> tuple[Array, Array] | None:
        """Scale and bias of each channel; None where they are not constant."""
        groups = self.groups(a, node)
        if groups is None:
            return None
        found = []
        for name in node.input[1:3]:
            array = a.array(name)
            if array is None or array.ndim != 1:
                return None
            found.append(array if len(array) == len(groups) else array[groups])
        return found[0], found[1]

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The shift where the scale is zero, or all of the group."""
        given, groups = a.fact(node.input[0]), self.groups(a, node)
        found, rank = self.parameters(a, node), a.rank(node.input[0])
        if groups is None or found is None or rank is None or rank < 3:
            return [None]
        scale, bias = found
        kinds = np.full(len(groups), Kind.DYN, np.uint8)
        is_zero = np.zeros(len(groups), bool)
        if given is not None:
            flat = given.along(1, len(groups))
            kinds = np.minimum(flat.kinds.reshape(-1), Kind.MAP)
            is_zero = flat.is_zero.reshape(-1)
        lowest = np.full(int(groups[-1]) + 1, Kind.MAP)
        np.minimum.at(lowest, groups, kinds)
        kinds = lowest[groups]
        is_known = ((scale == 0) | ~_any(~is_zero, groups)) & (kinds != Kind.WILD)
        shape = [1] * rank
        shape[1] = -1
        kinds = np.where(is_known, Kind.CONST, kinds)
        return [fact(kinds.reshape(shape), bias.reshape(shape))]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """A group of which something is needed that is not multiplied by zero."""
        wanted: list[Demand] = [None] * len(node.input)
        groups, found = self.groups(a, node), self.parameters(a, node)
        rank = a.rank(node.input[0])
        if groups is None or found is None or rank is None:
            return wanted
        needed = demand.channels(needs[0], 1, len(groups)) & (found[0] != 0)
        wanted[0] = demand.along(_any(needed, groups), 1, rank)
        return wanted

    def link(self, link: Link) -> None:
        """The channels of a group are one; scale and bias go along."""
        groups, a = self.groups(link.analysis, link.node), link.analysis
        if groups is None:
            link.bar("its number of channels is not known")
        elif link.side == "in" and link.index > 0:
            link.tie("in", 0, (1,)) if self._is_per_channel(a, link.node) else link.bar(
                "it is for a whole group"
            )
        elif link.axes == (0,):
            link.tie(link.opposite, 0, (0,))
        elif link.axes != (1,):
            link.bar("it mixes the positions along this axis")
        else:
            self._link_channels(link, groups)

    def _is_per_channel(self, a: Analysis, node: NodeProto) -> bool:
        sizes = [a.size(name, 0) for name in node.input[1:3]]
        return all(size == a.size(node.input[0], 1) for size in sizes)

    def _link_channels(self, link: Link, groups: Ints) -> None:
        node, slot = link.node, link.slot
        link.tie(link.opposite, 0, (1,))
        first = np.searchsorted(groups, groups)
        link.groups.tie(slot.atoms, slot.start + first)
        if self._is_per_channel(link.analysis, node):
            for index in (1, 2):
                link.tie("in", index, (0,))
        else:
            every = np.arange(len(groups))
            for index in (1, 2):
                link.tie("in", index, (0,), here=every, there=groups)
        if node.op_type != "GroupNormalization":
            return

        def patch(removal: Removal) -> None:
            kept = np.unique(groups[removal.kept(slot)])
            if len(kept):
                removal.edit.set_attribute(node, "num_groups", len(kept))

        link.patch(patch)


class InstanceNormalization(GroupNormalization):
    """Each channel is a group of its own."""

    def groups(self, a: Analysis, node: NodeProto) -> Ints | None:
        """As many as channels."""
        size = a.size(node.input[0], 1)
        return None if size is None else np.arange(size)

    def link(self, link: Link) -> None:
        """Also where the positions of a group are one axis with the channels in it."""
        if 1 in link.axes and len(link.axes) > 1 and 0 not in link.axes:
            self._link_rows(link)
        else:
            super().link(link)

    def _link_rows(self, link: Link) -> None:
        """[N, groups, all of a group]: only whole groups go."""
        slot = link.slot
        link.tie(link.opposite, 0, link.axes)
        groups = np.arange(slot.size) // (slot.size // slot.dims[0])
        for index in (1, 2):
            link.tie("in", index, (0,), here=np.arange(slot.size), there=groups)


def _any(mask: Mask, groups: Ints) -> Mask:
    """For each channel whether any of its group is in `mask`."""
    found = np.zeros(int(groups[-1]) + 1, bool)
    np.logical_or.at(found, groups, mask)
    return np.asarray(found[groups])


class Neighbours(Rule):
    """LRN: each channel is divided by what its neighbours are."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """A zero stays one."""
        given = a.fact(node.input[0])
        if given is None:
            return [None]
        kinds = np.where(given.is_zero, Kind.CONST, np.minimum(given.kinds, Kind.DYN))
        return [fact(kinds, np.zeros_like(given.values))]

    def link(self, link: Link) -> None:
        """A channel that goes would make others neighbours."""
        if 1 in link.axes:
            link.bar("it sums over neighbouring channels")
        else:
            link.bar("it normalizes over channels")
