"""Gemm, and MatMul: with a constant right-hand side a layer, else a contraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact
from onnxopt.channels.groups import Link
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.contraction import Contraction
from onnxopt.channels.rules.layer import Layer
from onnxopt.channels.rules.matrix import Floats, Geometry
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Gemm(Layer):
    """alpha * A * B + beta * C, with A or B transposed where the attributes say so."""

    layer_axis = 1

    def is_layer(self, a: Analysis, node: NodeProto) -> bool:
        """Only with a constant weight."""
        return self.geometry(a, node) is not None

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """See Layer."""
        if not a.is_constant(node.input[self.weight_slot]) or a.graph.opset() < 7:
            return None
        turned = attributes.get(node, "transB", 0)
        return Geometry(
            data=0 if attributes.get(node, "transA", 0) else 1,
            result=1,
            outputs=0 if turned else 1,
            inputs=1 if turned else 0,
            scale=float(attributes.get(node, "alpha", 1.0)),
            bias_scale=float(attributes.get(node, "beta", 1.0)),
        )


class MatMul(Layer):
    """[..., K] times a constant [K, N]; a constant channel goes into an Add behind it.

    Where the right-hand side is computed, it is a contraction of two values.
    """

    layer_axis = -1
    bias_slot = None
    contraction = Contraction()

    def is_layer(self, a: Analysis, node: NodeProto) -> bool:
        """Only with a constant weight: scores of attention are no channels."""
        return self.geometry(a, node) is not None

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """See Layer and Contraction."""
        if self.geometry(a, node) is None:
            return self.contraction.forward(a, node)
        return super().forward(a, node)

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """See Layer and Contraction."""
        if self.geometry(a, node) is None:
            return self.contraction.backward(a, node, needs)
        return super().backward(a, node, needs)

    def link(self, link: Link) -> None:
        """See Layer and Contraction."""
        if self.geometry(link.analysis, link.node) is None:
            self.contraction.link(link)
        else:
            super().link(link)

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """See Layer."""
        name = node.input[self.weight_slot]
        rank, given = a.rank(name), a.rank(node.input[0])
        if not a.is_constant(name) or rank is None or rank < 2 or not given:
            return None
        # what a constant adds differs from matrix to matrix of a stack of them
        return Geometry(-1, -1, rank - 1, rank - 2, spreads=rank > 2)

    def can_shift(self, a: Analysis, node: NodeProto, g: Geometry) -> bool:
        """Never between a MatMul and the QuantizeLinear that it is fused with."""
        uses = a.graph.uses(node.output[0])
        return all(use.node.op_type != "QuantizeLinear" for use in uses)

    def shift(self, removal: Removal, node: NodeProto, g: Geometry, by: Floats) -> None:
        """Into the bias that is added anyway, else into a new one."""
        a, graph = removal.groups.analysis, removal.graph
        use = graph.only_use(node.output[0])
        if use is not None and use.view is graph and graph.op(use.node) == "Add":
            bias = graph.array(use.node.input[1 - use.index])
            if bias is not None and bias.ndim and bias.shape[-1] == len(by) == bias.size:
                removal.change(use.node, 1 - use.index, lambda array: _plus(array, by))
                return
        weight = a.array(node.input[1])
        assert weight is not None
        removal.shift_after(node, by.astype(weight.dtype), axis=0)


def _plus(array: Array, by: Floats) -> Array:
    moved: Array = (array.astype(float) + by).astype(array.dtype)
    return moved
