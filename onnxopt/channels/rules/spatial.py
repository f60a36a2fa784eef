"""Operators on the axes behind the channels: pools, Pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, Kinds, fact
from onnxopt.channels.groups import Link
from onnxopt.channels.rules.rule import Rule

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Pool(Rule):
    """MaxPool, AveragePool and the global ones: each channel on its own."""

    def keeps_constants(self, node: NodeProto) -> bool:
        """Whether a constant channel comes out as it went in."""
        if node.op_type == "AveragePool" and attributes.get(node, "count_include_pad", 0):
            padded = attributes.get(node, "auto_pad", "NOTSET").startswith("SAME")
            padded = padded or any(attributes.get(node, "pads", [0]))
            return not padded and not attributes.get(node, "ceil_mode", 0)
        return node.op_type not in ("GlobalLpPool", "LpPool")

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Constant over space stays constant; zero stays zero in any case."""
        others: list[Fact | None] = [None] * (len(node.output) - 1)
        given = a.fact(node.input[0])
        if given is None or given.kinds.ndim < 3 or _sees_padding_alone(node):
            return [None, *others]
        flat = given.along(1, given.kinds.shape[1])
        kinds = flat.kinds
        if not self.keeps_constants(node):
            kinds = _unless_zero(flat)
        return [fact(kinds, flat.values), *others]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Of the input, the channels that are needed of the result."""
        size = a.size(node.input[0], 1)
        rank = a.rank(node.input[0])
        if size is None or rank is None:
            return [None] * len(node.input)
        return [demand.along(demand.channels(needs[0], 1, size), 1, rank)]

    def link(self, link: Link) -> None:
        """Channels go through; positions are mixed."""
        if any(axis > 1 for axis in link.axes):
            link.bar("it mixes the positions along this axis")
        elif len(link.node.output) > 1 and link.node.output[1]:
            link.bar("its indices count the channels")
        else:
            link.tie(link.opposite, 0, link.axes)


def _sees_padding_alone(node: NodeProto) -> bool:
    """Whether a dilated window may step over the whole image."""
    padded = attributes.get(node, "auto_pad", "NOTSET").startswith("SAME")
    padded = padded or any(attributes.get(node, "pads", [0]))
    return padded and any(size != 1 for size in attributes.get(node, "dilations", [1]))


def _unless_zero(given: Fact) -> Kinds:
    """Constants become MAP, except for zeros."""
    changed = given.is_const & ~given.is_zero
    return np.asarray(np.where(changed, Kind.MAP, given.kinds), np.uint8)


class Pad(Rule):
    """Never along the channels; a border of another value makes a constant vary."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """A constant stays one where the border is of its value, or a copy of it."""
        given, pads = a.fact(node.input[0]), self.pads(a, node)
        if given is None or pads is None or any(pads[axis] for axis in (0, 1)):
            return [None]
        if given.kinds.ndim < 3:
            return [None]
        flat = given.along(1, given.kinds.shape[1])
        kinds = flat.kinds
        if attributes.get(node, "mode", "constant") == "constant":
            border = self._border(a, node)
            differs = flat.is_const if border is None else flat.values != border
            kinds = np.where(flat.is_const & differs, Kind.MAP, kinds)
        return [fact(kinds, flat.values)]

    def _border(self, a: Analysis, node: NodeProto) -> float | None:
        value = attributes.get(node, "value")
        if len(node.input) > 2 and node.input[2]:
            array = a.array(node.input[2])
            return None if array is None or array.size != 1 else array.item()
        return 0.0 if value is None else float(np.float32(value))

    def pads(self, a: Analysis, node: NodeProto) -> list[bool] | None:
        """For each axis whether it is padded (or cropped); None where not known."""
        rank = a.rank(node.input[0])
        pads = attributes.get(node, "pads")
        if len(node.input) > 1 and node.input[1]:
            array = a.array(node.input[1])
            pads = None if array is None else array.tolist()
        if rank is None or pads is None:
            return None
        axes = list(range(rank))
        if len(node.input) > 3 and node.input[3]:
            given = a.array(node.input[3])
            if given is None:
                return None
            axes = [int(axis) % rank for axis in given.tolist()]
        half, found = len(pads) // 2, [False] * rank
        for place, axis in enumerate(axes):
            found[axis] = bool(pads[place] or pads[place + half])
        return found

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """The channels that are needed of the result."""
        wanted: list[Demand] = [None] * len(node.input)
        size, rank = a.size(node.input[0], 1), a.rank(node.input[0])
        pads = self.pads(a, node)
        if pads is None or size is None or rank is None or rank < 2 or pads[1]:
            return wanted
        wanted[0] = demand.along(demand.channels(needs[0], 1, size), 1, rank)
        return wanted

    def link(self, link: Link) -> None:
        """Axes that are not padded go through."""
        pads = self.pads(link.analysis, link.node)
        if pads is None or (link.side == "in" and link.index > 0):
            link.bar("what it pads is not known")
        elif any(pads[axis] for axis in link.axes):
            link.bar("it pads this axis")
        else:
            link.tie(link.opposite, 0, link.axes)
