"""grid-weights: codes for float weights that a quantizer rounded, and an exporter folded.

    y = Conv(x, W)              ->   w = DequantizeLinear(q, s)      q: int8
                                     y = Conv(x, w)

1. W is a constant of float32 that only layers (Conv, ConvTranspose, Gemm, MatMul) and
   what moves it read, of at least 64 elements.
2. Along its output channels each element is (code - zero point) * scale, rounded once, of
   8-bit codes: compared to the bit. In matrices also along blocks of inputs, of 128, 64,
   32 or 16, at opset 21.
3. Half of the channels have at least four magnitudes: with fewer any numbers would do.

4. `weight_only` as with `integer-weights`.

PyTorch's exporters fold what a QAT model computes of its weights; here is it unfolded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import LAYERS, DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.passes.qdq.integer_weights import weight_only_reason
from onnxopt.quantization import parameters
from onnxopt.quantization.codes import Codes, Scales, coded
from onnxopt.quantization.grids import scales
from onnxopt.quantization.written_out import float_product
from onnxopt.report import Guarantee
from onnxopt.weights import Array, elements

_LEAST = 64
_BLOCKS = (128, 64, 32, 16)


class GridWeights(Pass):
    """Store float weights that are multiples of a scale as integers."""

    name: ClassVar[str] = "grid-weights"
    guarantee: ClassVar[Guarantee] = "bitwise"

    weight_only: bool = False

    def run(self, graph: GraphView, context: Context) -> None:
        """The weight of each layer."""
        for node in graph.visit(self, LAYERS):
            tensor = graph.weight(node.input[1])
            if tensor is None or not _is_suitable(graph, node, tensor):
                continue
            array = graph.model.weights.array(tensor)
            try:
                weight = next(_weights(graph, node, array), None)
                if weight is None:
                    continue
                layer = float_product(graph, node.input[1])
                if layer is not None and not self.weight_only:
                    graph.skip(node, weight_only_reason(graph, layer))
                    continue
                _write(graph, node, weight)
            except DeclinedError as declined:
                graph.skip(node, str(declined))


def _is_suitable(graph: GraphView, node: NodeProto, tensor: TensorProto) -> bool:
    """Whether it is a weight of floats, here, that nothing but layers reads."""
    name = node.input[1]
    home = graph.home(name)
    if tensor.data_type != TensorProto.FLOAT or elements(tensor) < _LEAST:
        return False
    if home is not graph or graph.is_output(name) or graph.is_pinned(name):
        return False
    if len(tensor.dims) < 2 or attributes.has_references(node):
        return False
    return all(
        use.view is graph and use.index == 1 and graph.op(use.node) in LAYERS
        for use in graph.uses(name)
    )


def _weights(graph: GraphView, node: NodeProto, array: Array) -> Iterator[Codes]:
    """As codes, by channels or in blocks."""
    axis = _channels(node, array.ndim)
    turned = np.moveaxis(array, axis, 0)
    found = scales(turned.reshape(len(turned), -1))
    if found is not None:
        grid = [1] * array.ndim
        grid[axis] = -1
        yield from _checked(graph, array, Scales(found.reshape(grid), axis))
    if array.ndim != 2 or graph.opset() < parameters.BLOCKED_SINCE:
        return
    inputs = 1 - axis
    rows = np.moveaxis(array, inputs, 1)
    for block in _BLOCKS:
        if array.shape[inputs] % block == 0:
            found = scales(rows.reshape(-1, block))
            if found is not None:
                grid_of = np.moveaxis(found.reshape(len(rows), -1), 1, inputs)
                layout = Scales(np.ascontiguousarray(grid_of), inputs, is_blocked=True)
                yield from _blocked(graph, array, layout)


def _channels(node: NodeProto, rank: int) -> int:
    """The axis of the weight that its output channels are along."""
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if attributes.get(node, "transB", 0) else 1
    return rank - 1


def _checked(graph: GraphView, array: Array, layout: Scales) -> Iterator[Codes]:
    whole = np.rint(array / layout.scale.astype(np.float64)).astype(np.float32)
    weight = coded(graph, whole, layout)
    if np.array_equal(weight.values(), array):
        yield weight


def _blocked(graph: GraphView, array: Array, layout: Scales) -> Iterator[Codes]:
    """With each block an axis of its own, and joined again."""
    assert layout.axis is not None
    axis = layout.axis
    groups = layout.scale.shape[axis]
    dims = list(array.shape)
    dims[axis : axis + 1] = [groups, dims[axis] // groups]
    scale = np.expand_dims(layout.scale, axis + 1)
    split = Scales(scale, axis + 1, is_blocked=True)
    for weight in _checked(graph, array.reshape(dims), split):
        zero = weight.zero_point.squeeze(axis + 1)
        yield Codes(weight.codes.reshape(array.shape), layout, zero)


def _write(graph: GraphView, node: NodeProto, weight: Codes) -> None:
    made = weight.parameters()
    reason = parameters.missing(graph, made)
    if reason:
        raise DeclinedError(f"its weight is of codes: {reason}")
    edit = Edit(graph, node)
    name = node.input[1]
    codes = edit.add_weight(weight.codes, f"{name}_codes")
    edit.redirect(name, parameters.insert(edit, "DequantizeLinear", codes, made))
    graph.apply(edit, "its weight is whole multiples of a scale")
