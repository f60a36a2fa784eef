"""Conv and ConvTranspose: plain, grouped and depthwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.facts import Mask
from onnxopt.channels.groups import Ints, Link, Side, Slot
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.integer_sink import integer_sink
from onnxopt.channels.rules.layer import Layer
from onnxopt.channels.rules.matrix import Geometry
from onnxopt.channels.rules.sinks import LayerSink
from onnxopt.graph import GraphView
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Conv(Layer):
    """Weight [out, in / group, ...]; data and result have channels on axis 1."""

    layer_axis = 1

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """See Layer."""
        name = node.input[self.weight_slot]
        dims = a.shape(name)
        if dims is None or len(dims) < 3 or not a.is_constant(name):
            return None
        if not all(isinstance(size, int) for size in dims):
            return None
        groups = attributes.get(node, "group", 1)
        spreads = _is_padded(node, [int(size) for size in dims[2:] if size])
        return Geometry(1, 1, 0, 1, groups=groups, spreads=spreads)

    def link(self, link: Link) -> None:
        """Depthwise convolutions hand their channels on; grouped ones keep balance."""
        g = self.geometry(link.analysis, link.node)
        if g is not None and g.groups > 1 and len(link.axes) == 1:
            a, weight = link.analysis, link.node.input[self.weight_slot]
            if a.size(weight, 1) == 1 and a.size(weight, 0) == g.groups:
                self._link_depthwise(link, g)
            else:
                self._link_grouped(link, g)
        else:
            super().link(link)

    def sink(self, a: Analysis, link: Link, g: Geometry) -> LayerSink:
        """Integers with padding have a sink of their own."""
        found = integer_sink(self, a, link, g) if g.spreads else None
        return found or super().sink(a, link, g)

    def _link_depthwise(self, link: Link, g: Geometry) -> None:
        """Input i makes output i."""
        place = self._place(link, g)
        if place == "inputs" and link.side == "in" and link.index == 0:
            link.tie("in", self.weight_slot, (0,))
            link.tie("out", 0, (1,))
        elif place == "outputs":
            self.link_outputs(link, g)
            link.tie("in", 0, (1,))
        else:
            link.bar("its filters have one input each")
            return
        _count_groups(link)

    def _link_grouped(self, link: Link, g: Geometry) -> None:
        place = self._place(link, g)
        if place == "outputs":
            self.link_outputs(link, g)
        elif place == "inputs" and link.index == 0:
            if _constant(link.groups.graph, link.node, self.weight_slot) is None:
                link.bar("the weight of a grouped convolution is computed")
                return
            link.sink(self.sink(link.analysis, link, g))
        else:
            link.bar("it counts the inputs of each group apart")
            return
        _balance(link, g, self.weight_slot, rows="out")


def _count_groups(link: Link) -> None:
    """Of a depthwise convolution, `group` is its number of channels."""
    node = link.node

    def patch(removal: Removal) -> None:
        kept = removal.kept_of(node.output[0], 1)  # what it reads may be a constant
        if kept is not None and kept.any():
            removal.edit.set_attribute(node, "group", int(kept.sum()))

    link.patch(patch)


def _constant(
    graph: GraphView, node: NodeProto, slot: int
) -> tuple[NodeProto, int] | None:
    """Who reads the weight itself: the layer, or the node that dequantizes it."""
    if graph.weight(node.input[slot]) is not None:
        return node, slot
    maker = graph.producer(node.input[slot])
    if maker is None or graph.op(maker) != "DequantizeLinear":
        return None
    scale = graph.weight(maker.input[1])
    if graph.weight(maker.input[0]) is None or scale is None:
        return None
    if attributes.get(maker, "block_size", 0) or not graph.only_use(node.input[slot]):
        return None
    is_plain = list(scale.dims) in ([], [1]) or attributes.get(maker, "axis", 1) == 0
    return (maker, 0) if is_plain else None


def _balance(link: Link, g: Geometry, weight_slot: int, rows: Side) -> None:
    balance = Balance(link, g, weight_slot, rows)
    if balance.rows is not None and balance.columns is not None:
        link.restrict(balance.check, "every group keeps equally many")
        link.patch(balance.patch)


class Balance:
    """A grouped convolution loses whole groups, and equally much from the others.

    Axis 0 of its weight are the `rows` of all groups, its inputs or its outputs; axis 1
    the columns of one group, the others.
    """

    def __init__(self, link: Link, g: Geometry, weight_slot: int, rows: Side) -> None:
        self.node, self.groups, self.weight_slot = link.node, g.groups, weight_slot
        self.rows: Slot | None = self._slot(link, rows)
        self.columns: Slot | None = self._slot(link, "in" if rows == "out" else "out")
        if self.rows is not None and self.columns is not None:
            link.groups.join(self.rows, self.columns)

    def _slot(self, link: Link, side: Side) -> Slot | None:
        if (link.side, link.index) == (side, 0):
            return link.slot
        return link.other(side, 0, (1,))

    def check(self, removed: Mask) -> Ints:
        """The atoms to hold back."""
        assert self.rows is not None
        assert self.columns is not None
        sides = [
            (slot, slot.of(removed).reshape(self.groups, -1))
            for slot in (self.rows, self.columns)
        ]
        whole = np.asarray(sides[0][1].all(axis=1) & sides[1][1].all(axis=1))
        held = []
        for slot, gone in sides:
            rest = gone[~whole]
            most = int(rest.sum(axis=1).min()) if len(rest) else 0
            most = min(most, gone.shape[1] - 1)
            surplus = gone & (np.cumsum(gone, axis=1) > most) & ~whole[:, None]
            held.append(slot.atoms[surplus.reshape(-1)])
        return np.concatenate(held)

    def patch(self, removal: Removal) -> None:
        """Gather the columns that each row keeps; set the number of groups."""
        assert self.rows is not None
        assert self.columns is not None
        kept = removal.kept(self.columns).reshape(self.groups, -1)
        rows = removal.kept(self.rows).reshape(self.groups, -1)
        lives = kept.any(axis=1)
        columns = np.stack([np.flatnonzero(row) for row in kept[lives]])
        group = np.repeat(np.arange(int(lives.sum())), rows[lives].sum(axis=1))

        def change(array: Array) -> Array:  # its rows are sliced already
            index = columns[group].reshape(len(group), -1, *[1] * (array.ndim - 2))
            return np.take_along_axis(array, index, axis=1)

        place = _constant(removal.graph, self.node, self.weight_slot)
        if not kept.all() and place is not None:
            removal.change(*place, change)
        if not lives.all():
            removal.edit.set_attribute(self.node, "group", int(lives.sum()))


class ConvTranspose(Layer):
    """Weight [in, out / group, ...]; a constant input is not constant after it."""

    layer_axis = 1

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """See Layer."""
        dims = a.shape(node.input[1])
        if dims is None or len(dims) < 3 or not a.is_constant(node.input[1]):
            return None
        return Geometry(1, 1, 1, 0, attributes.get(node, "group", 1), spreads=True)

    def link(self, link: Link) -> None:
        """Depthwise ones hand their channels on; other grouped ones keep balance."""
        a, node = link.analysis, link.node
        g = self.geometry(a, node)
        if g is None or g.groups == 1 or len(link.axes) != 1:
            super().link(link)
            return
        place = self._place(link, g)
        if place is None or (link.index == 1 and link.side == "in"):
            link.bar("it mixes the positions along this axis")
        elif a.size(node.input[1], 1) == 1 and a.size(node.input[1], 0) == g.groups:
            self._link_depthwise(link, g, place)
        elif _constant(link.groups.graph, node, 1) is None:
            link.bar("the weight of a grouped convolution is computed")
        else:
            if place == "outputs":
                self.link_outputs(link, g, of_weight=False)
            else:
                self.link_inputs(link, g)
            _balance(link, g, 1, rows="in")

    def _link_depthwise(self, link: Link, g: Geometry, place: str) -> None:
        """Input i makes output i."""
        if place == "inputs":
            link.tie("in", 1, (0,))
            link.tie("out", 0, (1,))
        else:
            self.link_outputs(link, g, of_weight=False)
            link.tie("in", 0, (1,))
            link.tie("in", 1, (0,))
        _count_groups(link)


def _is_padded(node: NodeProto, kernel: Sequence[int]) -> bool:
    """Whether a tap can fall outside of the input."""
    if attributes.get(node, "auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return any(size > 1 for size in kernel)
    return any(attributes.get(node, "pads", [0]))
