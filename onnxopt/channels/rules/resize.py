"""Resize and Upsample: other heights and widths, the channels as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, fact
from onnxopt.channels.groups import Link
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

Part = tuple[NodeProto, int, int]
"""Where a number of a vector is written: input `index` of a node, element `place`."""


class Resize(Rule):
    """Channels go through where their axis keeps its size; written sizes are corrected.

    Scales and sizes may be computed, if those of the channels stand in a Concat.
    """

    def _is_plain(self, node: NodeProto) -> bool:
        """Whether what comes out at a place is a mean of what went in."""
        mode = attributes.get(node, "mode", "nearest")
        how = attributes.get(node, "coordinate_transformation_mode", "half_pixel")
        return mode in ("nearest", "linear") and how != "tf_crop_and_resize"

    def _keeps(self, a: Analysis, node: NodeProto, axis: int) -> bool:
        """Whether a batch or channel axis is handed on as it is."""
        index, is_scale = self._given(a, node)
        if attributes.get(node, "axes") is not None:
            rank = a.rank(node.input[0]) or 1
            axes = [given % rank for given in attributes.get(node, "axes")]
            return axis not in axes
        if attributes.get(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
            return False
        if index is None:  # an attribute, before opset 9
            scales = attributes.get(node, "scales", [])
            return axis < len(scales) and scales[axis] == 1.0
        found = _literal(a, node, index, axis)
        if found is None:
            return False
        return found[1] == 1.0 if is_scale else found[1] == a.size(node.input[0], axis)

    def _given(self, a: Analysis, node: NodeProto) -> tuple[int | None, bool]:
        """The input that says how large, and whether by scales."""
        if node.op_type == "Upsample":
            return (1 if len(node.input) > 1 else None), True
        scales, sizes = (2, 3) if a.graph.opset() > 10 else (1, 2)
        is_sized = len(node.input) > sizes and bool(node.input[sizes])
        return (sizes, False) if is_sized else (scales, True)

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Nearest and linear keep a constant."""
        given = a.fact(node.input[0])
        if given is None or given.kinds.ndim < 3 or not self._keeps(a, node, 1):
            return [None]
        flat = given.along(1, given.kinds.shape[1])
        kinds = flat.kinds
        if not self._is_plain(node):
            kinds = np.asarray(np.where(flat.is_const, Kind.MAP, kinds), np.uint8)
        return [fact(kinds, flat.values)]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """The channels that are needed of the result."""
        wanted: list[Demand] = [None] * len(node.input)
        size, rank = a.size(node.input[0], 1), a.rank(node.input[0])
        if size is None or rank is None or not self._keeps(a, node, 1):
            return wanted
        wanted[0] = demand.along(demand.channels(needs[0], 1, size), 1, rank)
        return wanted

    def link(self, link: Link) -> None:
        """See the class."""
        a, node = link.analysis, link.node
        if link.side == "in" and link.index > 0:
            link.bar("its sizes are computed from this")
            return
        for axis in link.axes:
            if axis > 1:
                link.bar("it resizes this axis")
                return
            if not self._keeps(a, node, axis):
                link.bar("it is not known to keep the size of this axis")
                return
        index, is_scale = self._given(a, node)
        # where it names its axes, channels are none of them
        is_whole = attributes.get(node, "axes") is None
        if link.axes == (1,) and index is not None and not is_scale and is_whole:
            self._patch(link, index)
        link.tie(link.opposite, 0, link.axes)

    def _patch(self, link: Link, index: int) -> None:
        found, given = _literal(link.analysis, link.node, index, 1), link.slot
        if found is None:
            return
        (reader, slot, place), _ = found

        def patch(removal: Removal) -> None:
            channels = int(removal.kept(given).sum())
            if channels:
                removal.change(reader, slot, lambda array: _with(array, place, channels))

        link.patch(patch)


def _literal(
    a: Analysis, node: NodeProto, index: int, place: int
) -> tuple[Part, float] | None:
    """Where element `place` of a vector is written, and what it is; None if computed."""
    name = node.input[index] if index < len(node.input) else ""
    array = a.graph.array(name) if name else None
    if array is not None:
        if place >= array.size:
            return None
        return (node, index, place), float(array.reshape(-1)[place])
    maker = a.graph.producer(name) if name else None
    if maker is None or a.graph.op(maker) != "Concat":
        return None
    for part, given in enumerate(maker.input):
        size = a.size(given, 0)
        if size is None:
            return None
        if place < size:
            return _literal(a, maker, part, place)
        place -= size
    return None


def _with(array: Array, index: int, value: int) -> Array:
    made = array.copy()
    made.reshape(-1)[index] = value
    return made
