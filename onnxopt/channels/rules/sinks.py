"""What a layer can do without, and how it makes up for the constants among it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt.channels import compute
from onnxopt.channels.facts import Mask
from onnxopt.channels.groups import Ints, Link, Sink
from onnxopt.channels.removal import CannotRemove, Removal, check_fits
from onnxopt.channels.rules.matrix import Geometry, added_by, as_matrix
from onnxopt.channels.rules.normalization import scale_and_shift
from onnxopt.weights import Array, elements

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis
    from onnxopt.channels.rules.layer import Layer

BLOCK = 8
"""Runtimes compute channels in blocks of 8 or 16: one channel over is a whole block."""


class LayerSink(Sink):
    """The input channels of a layer.

    Zero ones go, and those that no needed output reads; constant ones go into the bias.
    """

    def __init__(self, layer: Layer, link: Link, g: Geometry) -> None:
        a, node, slot = link.analysis, link.node, link.slot
        self.layer, self.geometry, self.slot, self.node = layer, g, slot, node
        given = layer.given(a, node)
        size = slot.size
        self.free = np.zeros(size, bool)
        self.constant = np.zeros(size, bool)
        self.values = np.zeros(size)
        if given is not None:
            channel = given.along(slot.axes[0], size)
            is_const = channel.is_const.reshape(-1)
            self.values = np.where(is_const, channel.values.reshape(-1), 0).astype(float)
            self.free = is_const & (self.values == 0)
            if self._can_compensate(a):
                self.constant = is_const
            wild = channel.is_wild.reshape(-1)
        else:
            wild = np.zeros(size, bool)
        live = layer.live(a, node, g, a.demand(node.output[0]))
        if live is not None:  # the others are read by no output that is needed
            self.free = self.free | (~live & ~wild)

    def _can_compensate(self, a: Analysis) -> bool:
        if not a.is_float(self.node.output[0]) and not self.layer.of_codes:
            return False
        return self.layer.can_shift(a, self.node, self.geometry)

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """Make up for the constants among `removed`."""
        constants = np.flatnonzero(removed & self.constant & (self.values != 0))
        if not len(constants):
            return
        self.absorb(removal, constants, removed)

    def absorb(self, removal: Removal, constants: Ints, removed: Mask) -> None:
        """Put what `constants` add into the bias."""
        g, a = self.geometry, removal.groups.analysis
        a.forget_arrays()  # of the outputs some may be gone by now
        weight = self.layer.weight(a, self.node)
        assert weight is not None
        values = np.zeros(self.slot.size)
        values[constants] = self.values[constants]
        by = added_by(as_matrix(weight, g), values) * g.scale
        if not np.isfinite(by).all():
            raise CannotRemove("what a constant channel adds is not finite")
        if by.any():
            self.layer.shift(removal, self.node, g, by)


class BorderSink(LayerSink):
    """The same where padding makes what a constant adds differ at the border.

    Either the constants are collected in one constant channel that stays: conv(c, w) =
    conv(k, w c / k), exactly, whatever the size. Or what they add is computed now, for
    every position, and added behind the layer: where the positions are known, where
    that is smaller than what goes, and where the one channel would open a block
    of its own.
    """

    def __init__(self, layer: Layer, link: Link, g: Geometry) -> None:
        super().__init__(layer, link, g)
        self.needs_carrier = True
        self.blocks = g.groups
        self._map_size = self._size_of_map(link.analysis)
        weight = link.groups.graph.weight(self.node.input[layer.weight_slot])
        self._column_size = elements(weight) // self.slot.size if weight else 0

    def _can_compensate(self, a: Analysis) -> bool:
        plain = a.graph.weight(self.node.input[1]) is not None
        return a.is_float(self.node.output[0]) and plain

    def prefers_map(self, removed: Mask) -> bool:
        """Whether no constant should stay, if `removed` [atoms] were to go."""
        kept = int((~removed).sum())
        if not kept or kept % BLOCK or self._map_size is None:
            return False
        # the filters that make a channel are taken to be as large as the taps on it
        return self._map_size <= 2 * (len(removed) - kept) * self._column_size

    def _size_of_map(self, a: Analysis) -> int | None:
        """Elements of the map; None where it would depend on the input."""
        dims, given = a.shape(self.node.output[0]), a.shape(self.node.input[0])
        if dims is None or given is None or self.geometry.data != 1:
            return None
        sizes = [size for size in (*dims[1:], *given[1:]) if isinstance(size, int)]
        if len(sizes) != len(dims) + len(given) - 2 or self._anchor(a) is None:
            return None
        return math.prod(sizes[: len(dims) - 1])

    def _anchor(self, a: Analysis) -> NodeProto | None:
        """Behind which node to add: behind a BatchNormalization, which may be folded.

        None where an Add would come between the layer and its QuantizeLinear.
        """
        graph, node = a.graph, self.node
        after = graph.only_use(node.output[0])
        if after is not None and after.view is graph and after.index == 0:
            is_norm = graph.op(after.node) == "BatchNormalization"
            if is_norm and scale_and_shift(a, after.node) is not None:
                node = after.node
        uses = graph.uses(node.output[0])
        if any(use.node.op_type == "QuantizeLinear" for use in uses):
            return None
        return node

    def absorb(self, removal: Removal, constants: Ints, removed: Mask) -> None:
        """Into a constant channel that stays, else into a map behind the layer."""
        able = np.flatnonzero(~removed & self.constant & (self.values != 0))
        inputs = self.slot.size // self.blocks
        left = []
        for block in np.unique(constants // inputs):
            own = constants[constants // inputs == block]
            near = able[able // inputs == block]
            if len(near):
                carrier = int(near[np.abs(self.values[near]).argmax()])
                self._carry(removal, own, carrier)
            elif not self.free[own].all():
                left.append(own)
        if left:
            self._add_map(removal, np.concatenate(left))

    def _carry(self, removal: Removal, constants: Ints, carrier: int) -> None:
        """Let one constant channel that stays do the work of those that go.

        All are of one block, which only the filters of its group read.
        """
        ratios = self.values[constants] / self.values[carrier]
        g, inputs = self.geometry, self.slot.size // self.blocks
        # [out, in / group] counts inputs within a group, and groups by outputs
        is_local = g.inputs > g.outputs
        block, start = carrier // inputs, carrier // inputs * inputs * is_local

        def change(array: Array) -> Array:
            made = array.copy()
            wide = np.moveaxis(made, g.inputs, 0)
            if is_local:  # its outputs are sliced with the inputs, not before
                outputs = wide.shape[1] // self.blocks
                wide = wide[:, block * outputs : (block + 1) * outputs]
            moved = np.array(wide[carrier - start], np.float64)
            for index, ratio in zip(constants - start, ratios, strict=True):
                moved += wide[index].astype(np.float64) * ratio
            check_fits(moved, array.dtype)
            wide[carrier - start] = moved.astype(array.dtype)
            return made

        removal.change(self.node, 1, change)

    def _add_map(self, removal: Removal, constants: Ints) -> None:
        """The layer's own kernel on the constants alone says what they add where."""
        a, node = removal.groups.analysis, self.node
        anchor, dims = self._anchor(a), a.shape(node.input[0])
        weight = a.graph.array(node.input[1])
        if anchor is None or dims is None or weight is None:
            raise CannotRemove("what constants add at its border has no place")
        image = np.zeros((1, *(int(size or 0) for size in dims[1:])), weight.dtype)
        shape = (len(constants), *[1] * (image.ndim - 2))
        image[0, constants] = self.values[constants].reshape(shape)
        bare = NodeProto()
        bare.CopyFrom(node)
        del bare.input[2:]
        made = compute.evaluated(a.evaluator, bare, [image, weight], a.graph.opset())
        if made is None:
            raise CannotRemove("what constants add at its border could not be computed")
        whole = made.astype(np.float64)
        if anchor is not node:
            found = scale_and_shift(a, anchor)
            assert found is not None
            whole *= found[0].reshape(-1, *[1] * (whole.ndim - 2))
        check_fits(whole, weight.dtype)
        removal.shift_after(node, whole.astype(weight.dtype), 1, anchor)
