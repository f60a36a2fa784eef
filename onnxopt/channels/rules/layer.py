"""What Conv, ConvTranspose, Gemm and MatMul share: a constant weight that mixes channels.

The weight is seen as a matrix [groups, outputs, inputs, taps], whatever its layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, helper

from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, Mask, computed
from onnxopt.channels.groups import Link, Side, Slot
from onnxopt.channels.removal import CannotRemove, Removal, check_fits
from onnxopt.channels.rules.matrix import Floats, Geometry, Matrix
from onnxopt.channels.rules.rule import Rule, Seed
from onnxopt.channels.rules.sinks import BorderSink, LayerSink
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Layer(Rule):
    """A weight of known layout; subclasses say which, and where the bias is.

    `of_codes`: it works on integers, of which the zero point stands for zero.
    """

    drops_inputs = True
    weight_slot = 1
    bias_slot: int | None = 2
    of_codes = False

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """None where the layer is not one of a constant weight."""
        raise NotImplementedError

    def matrix(self, a: Analysis, node: NodeProto, g: Geometry) -> Matrix:
        """The weight; what was learned about it is kept with the analysis."""
        name = node.input[self.weight_slot]
        found: Matrix = a.kept.setdefault((name, g), Matrix(a, name, g))
        return found

    def weight(self, a: Analysis, node: NodeProto) -> Array | None:
        """What it multiplies by; None where that could not be computed."""
        return a.array(node.input[self.weight_slot])

    def given(self, a: Analysis, node: NodeProto) -> Fact | None:
        """What is known of what it multiplies."""
        return a.fact(node.input[0])

    # ---- the bias ----

    def bias(self, a: Analysis, node: NodeProto, outputs: int) -> Floats | None:
        """The bias [outputs]; None where it is not constant, or not one per channel."""
        name = self._bias_name(node)
        array = np.zeros(()) if not name else a.array(name)
        if array is None or array.size not in (1, outputs):
            return None
        if array.size > 1 and array.shape[-1] != outputs:
            return None
        flat = array.astype(np.float64).reshape(-1)
        return np.asarray(np.broadcast_to(flat, (outputs,)))

    def _bias_name(self, node: NodeProto) -> str:
        slot = self.bias_slot
        return node.input[slot] if slot is not None and len(node.input) > slot else ""

    def can_shift(self, a: Analysis, node: NodeProto, g: Geometry) -> bool:
        """Whether a constant can be added to every output channel."""
        name = self._bias_name(node)
        if not g.bias_scale:
            return not name or a.graph.weight(name) is not None
        maker = a.graph.producer(name) if name else None
        is_computed = bool(name) and a.graph.weight(name) is None
        if is_computed and (maker is None or not self._takes_codes(a, node, maker)):
            return False
        outputs = self._outputs(a, node, g)
        return outputs is not None and self.bias(a, node, outputs) is not None

    def _takes_codes(self, a: Analysis, node: NodeProto, maker: NodeProto) -> bool:
        """Whether a quantized bias is this layer's own, in steps of its integer sums.

        Then what a constant adds is a whole number of steps.
        """
        graph = a.graph
        if graph.op(maker) != "DequantizeLinear" or not graph.only_use(maker.output[0]):
            return False
        if any(graph.weight(given) is None for given in maker.input if given):
            return False
        scales = []
        for name in node.input[:2]:
            source = graph.producer(name)
            if source is None or graph.op(source) != "DequantizeLinear":
                return False
            scales.append(graph.array(source.input[1]))
        given, weight = scales
        own = graph.array(maker.input[1])
        if given is None or weight is None or own is None or given.size != 1:
            return False
        if own.size not in (1, weight.size):
            return False
        product = given.reshape(-1).astype(np.float64) * weight.reshape(-1)
        return bool(np.allclose(own.reshape(-1), product, rtol=1e-5, atol=0))

    def _outputs(self, a: Analysis, node: NodeProto, g: Geometry) -> int | None:
        size = a.size(node.input[self.weight_slot], g.outputs)
        if size is None:
            return None
        return size if g.outputs < g.inputs or g.groups == 1 else size * g.groups

    # ---- facts ----

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """Zero taps leave the bias; constant inputs add to it where borders do not."""
        g = self.geometry(a, node)
        if g is None or not a.is_float(node.output[0]):
            return [None]
        given, rank = self.given(a, node), a.rank(node.output[0])
        matrix, kind = self.matrix(a, node, g), a.graph.dtype(node.output[0])
        rows = matrix.rows
        if rank is None or rows is None or kind is None or (given is None and rows.all()):
            return [None]
        bias = self.bias(a, node, len(rows))
        mixed = self._mixed(a, node, given, matrix, rows, g)
        if bias is None or mixed is None:
            return [None]
        kinds, total = mixed
        shape = [1] * rank
        shape[g.result] = len(kinds)
        values = (total * g.scale + bias * g.bias_scale).reshape(shape)
        with np.errstate(over="ignore"):
            made = values.astype(helper.tensor_dtype_to_np_dtype(kind))
        return [computed(kinds.reshape(shape), made)]

    def _mixed(
        self,
        a: Analysis,
        node: NodeProto,
        given: Fact | None,
        matrix: Matrix,
        rows: Mask,
        g: Geometry,
    ) -> tuple[Array, Floats] | None:
        if given is None:
            return np.where(rows, Kind.DYN, Kind.CONST), np.zeros(len(rows))
        size = a.size(node.input[0], g.data)
        if size is None:
            return None
        return matrix.mixed(given.along(g.data % given.kinds.ndim, size))

    # ---- demand ----

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """An input is needed where a needed output has a tap on it."""
        wanted: list[Demand] = [None] * len(node.input)
        g, rank = self.geometry(a, node), a.rank(node.input[0])
        if g is None or rank is None:
            return wanted
        live = self.live(a, node, g, needs[0])
        if live is not None:
            wanted[0] = demand.along(live, g.data % rank, rank)
        return wanted

    def live(
        self, a: Analysis, node: NodeProto, g: Geometry, need: Demand
    ) -> Mask | None:
        """Which input channels are read by output channels that `need` asks for."""
        matrix = self.matrix(a, node, g)
        if matrix.rows is None:
            return None
        return matrix.live(demand.channels(need, g.result, len(matrix.rows)))

    # ---- groups ----

    def sources(self, a: Analysis, node: NodeProto) -> Sequence[Seed]:
        """The axis of the data that the weight is multiplied along."""
        g, rank = self.geometry(a, node), a.rank(node.input[0])
        return [] if g is None or not rank else [(0, (g.data % rank,))]

    def link(self, link: Link) -> None:
        """Output channels are the weight's, input channels end here."""
        a, node = link.analysis, link.node
        g = self.geometry(a, node)
        if g is None:
            link.bar("its weight is not constant")
            return
        place = self._place(link, g)
        if place is None:
            link.bar("it mixes the positions along this axis")
        elif place == "outputs":
            self.link_outputs(link, g)
        else:
            self.link_inputs(link, g)

    def _place(self, link: Link, g: Geometry) -> str | None:
        if len(link.axes) != 1:
            return None
        rank = link.analysis.rank(link.name(link.side, link.index)) or 0
        axis = link.axes[0]
        match link.side, link.index:
            case "out", 0:
                return "outputs" if axis == g.result % rank else None
            case "in", 0:
                return "inputs" if axis == g.data % rank else None
            case "in", self.weight_slot:
                if axis == g.outputs % rank:
                    return "outputs"
                return "inputs" if axis == g.inputs % rank else None
        if self._is_per_output(link):
            return "outputs"
        return "outputs" if link.index == self.bias_slot and axis == rank - 1 else None

    def per_output(self, a: Analysis, node: NodeProto) -> list[int]:
        """Further inputs, vectors, that have one element for each output."""
        return []

    def _is_per_output(self, link: Link) -> bool:
        return link.side == "in" and link.index in self.per_output(
            link.analysis, link.node
        )

    def link_outputs(self, link: Link, g: Geometry, *, of_weight: bool = True) -> None:
        """Tie output and weight; the bias follows, whatever it is by then.

        Not `of_weight`: the outputs are no axis of it.
        """
        a, node = link.analysis, link.node
        ports: list[tuple[Side, int, int]] = [("out", 0, g.result)]
        if of_weight:
            ports.append(("in", self.weight_slot, g.outputs))
        ports += [("in", index, 0) for index in self.per_output(a, node)]
        name = self._bias_name(node)
        if name and a.graph.weight(name) is None:
            size, outputs = a.size(name, -1), a.size(node.output[0], g.result)
            if size is None or size not in (1, outputs):
                link.bar("its bias has another size")
                return
            if size == outputs:
                ports.append(("in", self.bias_slot or 0, -1))
        for side, index, axis in ports:
            if (side, index) != (link.side, link.index):
                rank = a.rank(link.name(side, index)) or 0
                link.tie(side, index, (axis % rank,))
        result = link.slot if (link.side, link.index) == ("out", 0) else None
        if result is not None:
            link.patch(lambda removal: self._slice_bias(removal, node, result), "bias")
            link.patch(lambda r: r.slice_after(node, r.kept(result)), "after")

    def _slice_bias(self, removal: Removal, node: NodeProto, result: Slot) -> None:
        """A bias that an earlier step of this run may have added or widened."""
        slot, kept = self.bias_slot, removal.kept(result)
        if slot is None or not kept.any():
            return
        bias = removal.peek(node, slot)
        if bias is not None and bias.ndim and bias.shape[-1] == len(kept) > 1:
            removal.change(node, slot, lambda array: np.compress(kept, array, -1))

    def link_inputs(self, link: Link, g: Geometry) -> None:
        """Tie input and weight, and let the layer say what it can do without."""
        a = link.analysis
        slot = self.weight_slot
        if link.side == "in" and link.index == slot:
            rank = a.rank(link.node.input[0]) or 0
            link.tie("in", 0, (g.data % rank,))
            return
        rank = a.rank(link.node.input[slot]) or 0
        if link.tie("in", slot, (g.inputs % rank,)) is not None:
            link.sink(self.sink(a, link, g))

    def sink(self, a: Analysis, link: Link, g: Geometry) -> LayerSink:
        """What the layer can do without."""
        return BorderSink(self, link, g) if g.spreads else LayerSink(self, link, g)

    # ---- making up for constants ----

    def shift(self, removal: Removal, node: NodeProto, g: Geometry, by: Floats) -> None:
        """Add `by` [outputs] to the layer's output."""
        slot, a = self.bias_slot, removal.groups.analysis
        name = self._bias_name(node)
        if slot is None:
            raise CannotRemove("the layer has no bias")
        if not g.bias_scale:
            self._replace_bias(removal, node, by)
            return
        dtype = _float_type(a, node)
        if not name:
            check_fits(by, dtype)
            removal.add_input(node, slot, by.astype(dtype), f"{node.input[1]}_bias")
            return
        maker = removal.graph.producer(name)
        if maker is not None and removal.graph.op(maker) == "DequantizeLinear":
            _shift_codes(removal, maker, by / g.bias_scale)
            return

        def change(array: Array) -> Array:
            with np.errstate(over="ignore"):
                moved = array.astype(np.float64) + by / g.bias_scale
            check_fits(moved, array.dtype)
            return np.asarray(moved.astype(array.dtype))

        removal.change(node, slot, change)

    def _replace_bias(self, removal: Removal, node: NodeProto, by: Floats) -> None:
        """Let a Gemm that does not read its bias (beta = 0) read one."""
        dtype = _float_type(removal.groups.analysis, node)
        check_fits(by, dtype)
        if self._bias_name(node):
            removal.change(node, 2, lambda _: by.astype(dtype))
        else:
            removal.add_input(node, 2, by.astype(dtype), f"{node.input[1]}_bias")
        removal.edit.set_attribute(node, "beta", 1.0)


def _float_type(a: Analysis, node: NodeProto) -> Any:
    weight = a.array(node.input[1])
    assert weight is not None
    return weight.dtype


def _shift_codes(removal: Removal, maker: NodeProto, by: Floats) -> None:
    """Add to a quantized bias: exact, since its scale is input scale x weight scale."""
    scale = removal.graph.array(maker.input[1])
    if scale is None or removal.graph.array(maker.input[0]) is None:
        raise CannotRemove("its bias is not a constant")
    codes = np.rint(by / scale.astype(np.float64))

    def change(array: Array) -> Array:
        moved = array.astype(np.float64) + codes
        limits = np.iinfo(array.dtype)
        if moved.min() < limits.min or moved.max() > limits.max:
            raise CannotRemove(f"the bias does not fit into {array.dtype}")
        return np.asarray(moved.astype(array.dtype))

    removal.change(maker, 0, change)
