"""fold-scale: let a linear layer do the scaling and shifting around it.

    t = Conv(x, W, b)
    s = Mul(t, f)               ->    y = Conv(x, f * W, f * b + c)
    y = Add(s, c)

1. Mul, Div, Add and Sub by a constant, a scalar or one per output channel, behind a Conv,
   ConvTranspose, Gemm or MatMul (which has no bias: a shift there is not folded).
2. Mul and Div by a scalar before such a layer.
3. The value between the two has no other reader, nobody else reads the weight, and the
   model does not grow (as it would by a bias for the sake of a scalar).
4. Computed in float64 and rounded once to the weight's dtype. Of a weight that
   DequantizeLinear makes of codes, the scales are scaled, and codes turn where a factor
   is negative (`onnxopt.quantization.scaling` says how, and when not).
5. For `ort-cpu` not where a layer leaves integer arithmetic for it
   (`onnxopt.quantization.integer_sums`).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from onnxopt.affine import AFFINE, Affine
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.layer import Layer
from onnxopt.linear import DeclinedError, Floats, per_channel
from onnxopt.manager import Context, Pass
from onnxopt.quantization.integer_sums import check_stays_integer
from onnxopt.report import Guarantee
from onnxopt.target import Target


class FoldScale(Pass):
    """Fold Mul, Div, Add and Sub by constants into the linear layer beside them."""

    name: ClassVar[str] = "fold-scale"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the nodes before and behind all arithmetic with constants."""
        for node in graph.visit(self, AFFINE):
            scale = Affine.of(graph, node)
            if scale is None:
                continue
            try:
                edit = _folded_before(graph, scale, context.target)
                edit = edit or _folded_behind(graph, scale)
            except DeclinedError as declined:
                graph.skip(node, str(declined))
                continue
            if edit is not None:
                graph.apply(edit, "a linear layer can do its own scale and shift")


def _folded_before(graph: GraphView, scale: Affine, target: Target) -> Edit | None:
    """Into the layer whose output it reads."""
    layer = Layer.beside(graph, graph.producer(scale.value), scale.value)
    if layer is None or (layer.node.op_type == "MatMul" and not scale.is_scale):
        return None
    if scale.size not in (1, layer.outputs) or not _fits(layer, scale):
        return None
    factor, shift = (_channels(layer, term) for term in scale.terms(graph))
    if factor is None or shift is None:
        return None
    _check_finite(factor, shift)
    check_stays_integer(graph, layer.node, scale.node, target)
    edit = Edit(graph, scale.node, max_growth=0)
    layer.scale_outputs(edit, factor, shift, may_move_zero=target.zero_points)
    edit.bypass(scale.node, {scale.node.output[0]: layer.node.output[0]})
    return edit


def _folded_behind(graph: GraphView, scale: Affine) -> Edit | None:
    """Into the layer that reads its output."""
    use = graph.only_use(scale.node.output[0])
    if use is None or use.view is not graph or use.index != 0:
        return None
    if not scale.is_scale or scale.size != 1 or not scale.keeps_shape(graph):
        return None
    layer = Layer.beside(graph, use.node, scale.node.output[0])
    if layer is None:
        return None
    factor, shift = scale.terms(graph)
    _check_finite(factor, shift)
    edit = Edit(graph, scale.node, max_growth=0)
    layer.scale(edit, float(factor.reshape(())))
    edit.bypass(scale.node, {scale.node.output[0]: scale.value})
    return edit


def _fits(layer: Layer, scale: Affine) -> bool:
    """Whether the output of the layer has the dims of the constant, and more."""
    if len(scale.dims) <= 1:
        return True
    return layer.rank is not None and len(scale.dims) <= layer.rank


def _channels(layer: Layer, values: Floats) -> Floats | None:
    """`values` as one per output channel of the layer, where they are."""
    rank = layer.rank or max(values.ndim, 1)
    axis = 1 if layer.node.op_type in ("Conv", "ConvTranspose") else rank - 1
    return per_channel(values, layer.outputs, axis, rank)


def _check_finite(factor: Floats, shift: Floats) -> None:
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        raise DeclinedError("its scale or shift is not finite")
