"""DepthToSpace and SpaceToDepth: a channel of one side is a block of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, fact
from onnxopt.channels.groups import Ints, Link
from onnxopt.channels.rules.rule import Rule

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class PixelShuffle(Rule):
    """Images; each channel of the larger one is taken apart into a block.

    The block may lie together (CRD), or one in each run of channels (DCR, and what
    SpaceToDepth makes).
    """

    def _members(self, a: Analysis, node: NodeProto) -> Ints | None:
        """For each channel of the deep side the one that it is a part of."""
        is_wide_first = node.op_type == "SpaceToDepth"
        name = node.output[0] if is_wide_first else node.input[0]
        deep, block = a.size(name, 1), int(attributes.get(node, "blocksize", 1)) ** 2
        if deep is None or deep % block or a.rank(name) != 4:
            return None
        if not is_wide_first and attributes.get(node, "mode", "DCR") == "CRD":
            return np.asarray(np.arange(deep) // block)
        return np.asarray(np.arange(deep) % (deep // block))

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The fact of a channel, or what its whole block has in common."""
        given, members = a.fact(node.input[0]), self._members(a, node)
        if given is None or members is None:
            return [None]
        if node.op_type == "SpaceToDepth":
            flat = given.along(1, int(members[-1]) + 1)
            return [fact(flat.kinds.take(members, 1), flat.values.take(members, 1))]
        flat = given.along(1, len(members))
        order = np.argsort(members, kind="stable")
        shape = (int(members[-1]) + 1, -1)
        kinds = flat.kinds.reshape(-1)[order].reshape(shape)
        values = flat.values.reshape(-1)[order].reshape(shape)
        same = (values == values[:, :1]).all(axis=1)
        lowest = kinds.min(axis=1)
        lowest = np.where((lowest == Kind.CONST) & ~same, Kind.MAP, lowest)
        return [fact(lowest.reshape(1, -1, 1, 1), values[:, 0].reshape(1, -1, 1, 1))]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """The channels that are needed of the result, as they were before."""
        members = self._members(a, node)
        if members is None:
            return [None]
        wide = int(members[-1]) + 1
        if node.op_type == "SpaceToDepth":
            needed = np.zeros(wide, bool)
            needed[members[demand.channels(needs[0], 1, len(members))]] = True
        else:
            needed = demand.channels(needs[0], 1, wide)[members]
        return [demand.along(needed, 1, 4)]

    def link(self, link: Link) -> None:
        """All of a block is one channel."""
        members = self._members(link.analysis, link.node)
        if members is None:
            link.bar("its number of channels is not known")
        elif link.axes == (0,):
            link.tie(link.opposite, 0, (0,))
        elif link.axes != (1,):
            link.bar("it mixes the positions along this axis")
        else:
            every = np.arange(len(members))
            is_deep = (link.side == "in") == (link.node.op_type == "DepthToSpace")
            here, there = (every, members) if is_deep else (members, every)
            link.tie(link.opposite, 0, (1,), here=here, there=there)
