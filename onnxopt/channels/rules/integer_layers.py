"""Layers of integers: ConvInteger, QLinearConv, MatMulInteger, QLinearMatMul, QGemm.

They multiply codes less their zero points, so a channel counts as zero where its codes
are the zero point. Behind DynamicQuantizeLinear that is where the channel was zero
before: what it makes of zero is the zero point, whatever that is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, helper

from onnxopt import attributes
from onnxopt.channels import compute
from onnxopt.channels.facts import Fact, Kind, Mask, fact
from onnxopt.channels.groups import Link, Sink
from onnxopt.channels.removal import CannotRemove, Removal
from onnxopt.channels.rules.convolution import Conv
from onnxopt.channels.rules.integer_sink import Codes, IntegerSink
from onnxopt.channels.rules.layer import Layer
from onnxopt.channels.rules.matrix import Floats, Geometry, Matrix, as_matrix
from onnxopt.channels.rules.product import Gemm, MatMul
from onnxopt.channels.rules.rule import Rule
from onnxopt.channels.rules.sinks import LayerSink
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class CodeMatrix(Matrix):
    """A weight of codes, less its zero points."""

    def __init__(self, a: Analysis, name: str, zero: Array, g: Geometry) -> None:
        super().__init__(a, name, g)
        self._zero = zero

    def array(self) -> Array | None:
        """[groups, outputs, inputs, taps]; None where it could not be computed."""
        weight = self._analysis.array(self._name)
        if weight is None or weight.ndim < 2:
            return None
        shifted = _less(weight, self._zero, self._geometry.outputs)
        return as_matrix(shifted, self._geometry)

    @functools.cached_property
    def _outline(self) -> tuple[Mask, Mask] | None:
        taps = self._taps()
        if taps is None:
            return None
        return taps.any(axis=2).reshape(-1), taps.any(axis=1).reshape(-1)


class IntegerLayer(Layer):
    """`data_zero` and `weight_zero` are the inputs with the zero points.

    `by_output` are those that may have one element for each output.
    """

    of_codes = True
    data_zero = 2
    weight_zero = 3
    by_output: tuple[int, ...] = (3,)

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """None where its zero point is computed, too."""
        if self._zero(a, node, self.weight_zero) is None:
            return None
        return super().geometry(a, node)

    def matrix(self, a: Analysis, node: NodeProto, g: Geometry) -> Matrix:
        """See Layer."""
        zero = self._zero(a, node, self.weight_zero)
        assert zero is not None
        name = node.input[self.weight_slot]
        key = (name, g, zero.tobytes())
        found: Matrix = a.kept.setdefault(key, CodeMatrix(a, name, zero, g))
        return found

    def weight(self, a: Analysis, node: NodeProto) -> Array | None:
        """See Layer."""
        weight, g = super().weight(a, node), self.geometry(a, node)
        zero = self._zero(a, node, self.weight_zero)
        if weight is None or zero is None or g is None:
            return None
        return _less(weight, zero, g.outputs)

    def given(self, a: Analysis, node: NodeProto) -> Fact | None:
        """See Layer."""
        zero, found = self._zero(a, node, self.data_zero), a.fact(node.input[0])
        if zero is not None and zero.size == 1:
            if found is None:
                return None
            return fact(found.kinds, _less(found.values, zero, 0))
        return self._given_by_range(a, node)

    def _given_by_range(self, a: Analysis, node: NodeProto) -> Fact | None:
        """Behind DynamicQuantizeLinear: zeros are the zero point, which is not known."""
        maker = a.graph.producer(node.input[0])
        if maker is None or a.graph.op(maker) != "DynamicQuantizeLinear":
            return None
        if len(maker.output) < 3 or node.input[self.data_zero] != maker.output[2]:
            return None
        found = a.fact(maker.input[0])
        if found is None:
            return None
        kinds = np.where(found.is_zero, Kind.CONST, np.minimum(found.kinds, Kind.DYN))
        return fact(kinds, np.zeros_like(found.values))

    def _zero(self, a: Analysis, node: NodeProto, slot: int) -> Array | None:
        """A zero point; None where it is computed."""
        if len(node.input) <= slot or not node.input[slot]:
            return np.zeros((), np.int64)
        array = a.graph.array(node.input[slot])
        return None if array is None or array.ndim > 1 else array.astype(np.int64)

    def per_output(self, a: Analysis, node: NodeProto) -> list[int]:
        """See Layer."""
        return [
            slot
            for slot in self.by_output
            if len(node.input) > slot
            and node.input[slot]
            and a.shape(node.input[slot]) not in ((), (1,))
        ]

    def can_shift(self, a: Analysis, node: NodeProto, g: Geometry) -> bool:
        """Where there is a bias, in steps of the sums."""
        slot = self.bias_slot
        if slot is None:
            return False
        name = self._bias_name(node)
        return not name or a.graph.weight(name) is not None

    def shift(self, removal: Removal, node: NodeProto, g: Geometry, by: Floats) -> None:
        """Whole numbers: exact, unless they leave the range of the bias."""
        slot = self.bias_slot
        assert slot is not None
        start = removal.peek(node, slot)
        steps = np.rint(by)

        def change(array: Array) -> Array:
            moved = array.astype(np.float64) + steps
            limits = np.iinfo(np.int32)
            if moved.min() < limits.min or moved.max() > limits.max:
                raise CannotRemove("the bias does not fit into int32")
            return np.asarray(moved.astype(np.int32))

        if start is None:
            made = change(np.zeros(len(steps)))
            removal.add_input(node, slot, made, f"{node.input[self.weight_slot]}_bias")
        else:
            removal.change(node, slot, change)

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Outputs that read nothing but constants, as the layer itself computes them."""
        g, rank = self.geometry(a, node), a.rank(node.output[0])
        if g is None or rank is None:
            return [None]
        given, rows = self.given(a, node), self.matrix(a, node, g).rows
        if rows is None or (given is None and rows.all()):
            return [None]
        mixed = self._mixed(a, node, given, self.matrix(a, node, g), rows, g)
        if mixed is None:
            return [None]
        kinds = np.asarray(mixed[0])
        if node.op_type.startswith("Q"):
            values = self._made(a, node, g, len(kinds))
        else:
            values = mixed[1].astype(np.int64).astype(np.int32)
        if values is None:
            return [None]
        shape = [1] * rank
        shape[g.result] = len(kinds)
        return [fact(kinds.reshape(shape), values.reshape(shape))]

    def _made(
        self, a: Analysis, node: NodeProto, g: Geometry, outputs: int
    ) -> Array | None:
        """[outputs] by the layer itself, right for those that are CONST."""
        more = [a.array(name) if name else None for name in node.input[1:]]
        pairs = zip(node.input[1:], more, strict=True)
        if any(name and array is None for name, array in pairs):
            return None
        weight = more[self.weight_slot - 1]
        assert weight is not None
        data = self._probe(a, node, g, weight)
        if data is None:
            return None
        made = compute.evaluated(a.evaluator, node, [data, *more], a.graph.opset())
        if made is None or made.shape[g.result] != outputs:
            return None
        first: Array = np.moveaxis(made, g.result, -1).reshape(-1, outputs)[0]
        return first

    def _probe(
        self, a: Analysis, node: NodeProto, g: Geometry, weight: Array
    ) -> Array | None:
        """The least input: known codes where they are, zero points elsewhere."""
        size, found = a.size(node.input[0], g.data), a.fact(node.input[0])
        zero, kind = self._zero(a, node, self.data_zero), a.graph.dtype(node.input[0])
        if size is None or zero is None or not kind:
            return None
        codes = np.full(size, int(zero.reshape(-1)[0]), np.int64)
        if found is not None:
            along = found.along(g.data % found.kinds.ndim, size)
            known = along.is_const.reshape(-1)
            codes[known] = along.values.reshape(-1)[known]
        made = codes.astype(helper.tensor_dtype_to_np_dtype(kind))
        return self._spread(made, node, weight)

    def _spread(self, codes: Array, node: NodeProto, weight: Array) -> Array:
        """The codes of the channels, as an input: a single row."""
        return codes.reshape(1, -1)


class IntegerConv(IntegerLayer, Conv):
    """ConvInteger(x, w, x zero, w zero)."""

    bias_slot: int | None = None

    def _spread(self, codes: Array, node: NodeProto, weight: Array) -> Array:
        """As large as the kernel."""
        dilations = attributes.get(node, "dilations", [1] * (weight.ndim - 2))
        extent = [
            (size - 1) * step + 1
            for size, step in zip(weight.shape[2:], dilations, strict=True)
        ]
        image = codes.reshape(1, -1, *[1] * len(extent))
        return np.broadcast_to(image, (1, len(codes), *extent))

    def sink(self, a: Analysis, link: Link, g: Geometry) -> LayerSink:
        """With padding, a few constants carry the sums of all."""
        codes = self._codes(a, link.node)
        steps = LayerSink(self, link, g).values.astype(np.int64)
        if g.spreads and g.groups == 1 and codes is not None:
            return IntegerSink(self, link, g, codes, steps)
        return CodeSink(self, link, g)

    def _codes(self, a: Analysis, node: NodeProto) -> Codes | None:
        """The weight, to be written anew; None where that cannot be."""
        zero, slot = self._zero(a, node, self.weight_zero), self.weight_slot
        codes = a.graph.array(node.input[slot])
        if codes is None or zero is None or (zero != zero.reshape(-1)[0]).any():
            return None
        return Codes.of(node, slot, codes, int(zero.reshape(-1)[0]))


class CodeSink(LayerSink):
    """Constants go into the bias where no border differs."""

    def _can_compensate(self, a: Analysis) -> bool:
        return not self.geometry.spreads and super()._can_compensate(a)


class QLinearConv(IntegerConv):
    """x, scale, zero, w, scale, zero, scale and zero of y, bias."""

    weight_slot = 3
    bias_slot = 8
    data_zero = 2
    weight_zero = 5
    by_output = (4, 5)


class QGemm(IntegerLayer, Gemm):
    """a, scale, zero, b, scale, zero, bias, scale and zero of y (com.microsoft).

    The bias is in steps of the sums: alpha is a factor of both.
    """

    weight_slot = 3
    bias_slot = 6
    weight_zero = 5
    by_output = (4, 5)

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """See Layer."""
        found = super().geometry(a, node)
        if found is None or attributes.get(node, "transA", 0):
            return None
        return dataclasses.replace(found, scale=1.0)


class IntegerMatMul(IntegerLayer, MatMul):
    """MatMulInteger(a, b, a zero, b zero)."""

    def given(self, a: Analysis, node: NodeProto) -> Fact | None:
        """A zero point for each row is one for each position, not channel."""
        zero = self._zero(a, node, self.data_zero)
        return None if zero is not None and zero.size > 1 else super().given(a, node)


class QLinearMatMul(IntegerMatMul):
    """a, scale, zero, b, scale, zero, scale and zero of y."""

    weight_slot = 3
    weight_zero = 5
    by_output = (4, 5)


class DynamicQuantize(Rule):
    """DynamicQuantizeLinear: the range that it takes always includes zero.

    So a channel of zeros changes neither scale nor zero point; any other may.
    """

    def link(self, link: Link) -> None:
        """Channels go through, if they are zero."""
        if link.side == "out" and link.index > 0:
            link.bar("it depends on all values")
            return
        link.tie(link.opposite, 0, link.axes)
        if link.side == "in":
            link.sink(ZeroSink(link))


class ZeroSink(Sink):
    """Zeros go, nothing else."""

    def __init__(self, link: Link) -> None:
        slot = self.slot = link.slot
        self.node = link.node
        self.free = np.zeros(slot.size, bool)
        found = link.analysis.fact(slot.name)
        if found is not None:
            self.free = found.over(slot.axes, slot.dims).is_zero.reshape(-1)
        self.constant = np.zeros(slot.size, bool)
        self.values = np.zeros(slot.size)

    def compensate(self, removal: Removal, removed: Mask) -> None:
        """There is nothing to make up for."""


def _less(codes: Array, zero: Array, axis: int) -> Array:
    """Codes less a zero point, or one for each index of an axis."""
    if zero.size > 1:
        shape = [1] * codes.ndim
        shape[axis] = -1
        zero = zero.reshape(shape)
    else:
        zero = zero.reshape(())
    found: Array = codes.astype(np.int64) - zero
    return found
