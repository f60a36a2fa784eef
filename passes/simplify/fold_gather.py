"""fold-gather: let a layer read, or make, its channels in another order.

    t = Gather <axis = 1> (x, [2, 0, 1])
    y = Conv(t, W)              ->    y = Conv(x, W'), the columns of W in another order

    t = Conv(x, W, b)
    y = Gather <axis = 1> (t, [0, 2])
                                ->    y = Conv(x, W'', b''), rows 0 and 2 of both

1. Conv and ConvTranspose of one group, Gemm and MatMul; the indices are a constant
   vector, along the axis of channels.
2. Before a layer, they name every channel of x once. If one were left out, the weight
   would grow, and what is infinite in it would reach the output.
3. Behind a layer, they are no more than its channels. What it computed for nobody goes.
4. The value between the two has no other reader, and nobody else reads the weight.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.layer import Layer
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

Indices = npt.NDArray[np.int64]


class FoldGather(Pass):
    """Fold a Gather of channels into the linear layer beside it."""

    name: ClassVar[str] = "fold-gather"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the nodes before and behind every Gather by a constant vector."""
        for gather in graph.visit(self, ("Gather",)):
            tensor = graph.weight(gather.input[1])
            if tensor is None or len(tensor.dims) != 1 or not tensor.dims[0]:
                continue
            try:
                edit = _folded_before(graph, gather) or _folded_behind(graph, gather)
            except DeclinedError as declined:
                graph.skip(gather, str(declined))
                continue
            if edit is not None:
                graph.apply(edit, "a linear layer can order its channels")


def _folded_before(graph: GraphView, gather: NodeProto) -> Edit | None:
    """Into the layer whose output it reads."""
    layer = _layer(graph, graph.producer(gather.input[0]), gather.input[0])
    if layer is None or not _is_axis(gather, layer.output_axis, layer.rank):
        return None
    indices = _indices(graph, gather, layer.outputs)
    if indices is None or len(indices) > layer.outputs:
        return None
    edit = Edit(graph, gather, max_growth=0)
    layer.select_outputs(edit, indices)
    # the output of the layer has the dims, and so the name, of what was gathered
    edit.erase(gather)
    edit.divert(layer.node, 0, gather.output[0])
    return edit


def _folded_behind(graph: GraphView, gather: NodeProto) -> Edit | None:
    """Into the layer that reads its output."""
    use = graph.only_use(gather.output[0])
    if use is None or use.view is not graph or use.index != 0:
        return None
    layer = _layer(graph, use.node, gather.output[0])
    shape = graph.shape(gather.input[0])
    if layer is None or shape is None or attributes.get(layer.node, "transA", 0):
        return None
    axis = len(shape) - 1 if layer.node.op_type == "MatMul" else 1
    if not _is_axis(gather, axis, len(shape)):
        return None
    size = shape[axis]
    indices = _indices(graph, gather, size) if isinstance(size, int) else None
    if indices is None or not len(indices) == size == layer.inputs:
        return None
    if len(np.unique(indices)) != size:
        return None
    edit = Edit(graph, gather, max_growth=0)
    layer.permute_inputs(edit, indices)
    edit.bypass(gather, {gather.output[0]: gather.input[0]})
    return edit


def _layer(graph: GraphView, node: NodeProto | None, between: str) -> Layer | None:
    """The layer that `node` is, of one group and with a weight of its own."""
    layer = Layer.beside(graph, node, between)
    return None if layer is None or layer.groups != 1 else layer


def _is_axis(gather: NodeProto, axis: int | None, rank: int | None) -> bool:
    """Whether it gathers along `axis`, which None means not to know."""
    given = int(attributes.get(gather, "axis", 0))
    if axis is None or rank is None:
        return False
    return axis == (given + rank if given < 0 else given)


def _indices(graph: GraphView, gather: NodeProto, size: int) -> Indices | None:
    """The indices, counted from the front; None where one is out of range."""
    array = graph.array(gather.input[1])
    if array is None or not ((array >= -size) & (array < size)).all():
        return None
    found = array.astype(np.int64)
    return np.where(found < 0, found + size, found)
