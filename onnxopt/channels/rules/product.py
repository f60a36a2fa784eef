"""Gemm and MatMul with a constant right-hand side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.removal import Removal
from onnxopt.channels.rules.layer import Floats, Geometry, Layer
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Gemm(Layer):
    """alpha * A * B + beta * C, with A or B transposed where the attributes say so."""

    layer_axis = 1

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """See Layer."""
        if not a.is_constant(node.input[1]) or a.graph.opset() < 7:
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
    """[..., K] times a constant [K, N]; a constant channel goes into an Add behind it."""

    layer_axis = -1
    bias_slot = None

    def geometry(self, a: Analysis, node: NodeProto) -> Geometry | None:
        """See Layer."""
        if not a.is_constant(node.input[1]) or a.rank(node.input[1]) != 2:
            return None
        rank = a.rank(node.input[0])
        return Geometry(-1, -1, 1, 0) if rank is not None and rank >= 2 else None

    def can_shift(self, a: Analysis, node: NodeProto, g: Geometry) -> bool:
        """Never between a MatMul and the QuantizeLinear that it is fused with."""
        graph, name = a.graph, node.output[0]
        if graph.is_output(name) or graph.is_pinned(name):
            return False
        uses = graph.uses(name)
        return all(u.view is graph and u.node.op_type != "QuantizeLinear" for u in uses)

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
