"""integer-weights: DequantizeLinear for quantized weights that are written out.

    f = Cast(q)                      q: int8, uint8, int4, float8...
    d = Sub(f, z)               ->   w = DequantizeLinear(q, s, z)
    w = Mul(d, s)

    v = Div(W, s)
    c = Clip(Round(v), -128, 127)    q: int8 initializer
    w = Mul(c, s)               ->   w = DequantizeLinear(q, s)

1. What is multiplied by the scale is computed; it has to be whole numbers (or floats of
   8 bits). By which operators it was made does not matter: Cast, zero points, Reshape,
   Transpose, the unpacking of two 4-bit codes from a byte, Round and Clip of floats...
2. The scale is one number, one per index of an axis, or one per block: where it varies
   along all axes but one, that axis is the block, which a Reshape behind merges into the
   axis before it: [N, K / B, B] * [N, K / B, 1] to [N, K]. Blocks need opset 21.
3. DequantizeLinear computes (q - z) * s, exactly but for one rounding, as the product
   does: the values are equal to the bit, and compared. A division by s qualifies where
   they are. Where the scale is 0 the codes are 0, and the scale 1; where it is negative,
   both change their signs.
4. Stored codes stay as they are, if no operator moved them; else codes are int8 without a
   zero point where they fit, or uint8. Codes that were packed become int4 or uint4, and
   so do rounded floats in blocks; that takes opset 21, without which they stay packed.
5. Transpose, Reshape and the like behind are carried out on the codes.
6. Not where a MatMul or Gemm would read it beside floats, unless `weight_only`: ONNX
   Runtime makes MatMulNBits of those, and rounds the floats to 8 bits by default.
7. Rounded floats, and integers of 32 and 64 bits, only where a layer reads them.

It has to run before `fold-constants`, which would compute the floats.
"""

from __future__ import annotations

import math
from typing import ClassVar

import msgspec
import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt.edit import Edit
from onnxopt.evaluate import MAX_VALUE_BYTES, EvaluationError, constant_values
from onnxopt.graph import GraphView
from onnxopt.linear import LAYERS, DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.chains import ROUNDING
from onnxopt.quantization.codes import Scales, coded, layout_of, moved
from onnxopt.quantization.written_out import (
    MOVES,
    NARROW,
    Scaling,
    cone,
    float_product,
    scaling,
    sources,
)
from onnxopt.report import Guarantee
from onnxopt.weights import Array

_INTEGERS = (
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.UINT32,
    TensorProto.UINT64,
    *NARROW,
)
_READERS = (*LAYERS, "Gather", "LSTM", "GRU", "RNN")


class IntegerWeights(Pass):
    """Store quantized weights that the graph computes as codes and DequantizeLinear."""

    name: ClassVar[str] = "integer-weights"
    guarantee: ClassVar[Guarantee] = "bitwise"

    weight_only: bool = False

    def run(self, graph: GraphView, context: Context) -> None:
        """From each operator that makes whole floats to the one that scales them."""
        seen: dict[int, NodeProto] = {}
        for node in graph.visit(self, ("Cast", *ROUNDING)):
            if node.op_type == "Cast" and graph.dtype(node.input[0]) not in _INTEGERS:
                continue
            found = scaling(graph, node)
            if found is None and _is_scaled_later(graph, node):
                graph.skip(node, "its scale stands behind the layer that reads it")
            if found is None or id(found.node) in seen:
                continue
            seen[id(found.node)] = found.node
            layer = float_product(graph, found.node.output[0])
            if layer is not None and not self.weight_only:
                graph.skip(found.node, weight_only_reason(graph, layer))
                continue
            try:
                _store(graph, context, found)
            except DeclinedError as declined:
                graph.skip(found.node, str(declined))
            except EvaluationError as error:
                graph.skip(found.node, f"its value could not be computed: {error}")


def _is_scaled_later(graph: GraphView, cast: NodeProto) -> bool:
    """Whether a layer reads the codes of a weight as they are."""
    tensor = graph.weight(cast.input[0])
    if cast.op_type != "Cast" or tensor is None or tensor.data_type not in NARROW:
        return False
    return any(graph.op(use.node) in LAYERS for use in graph.uses(cast.output[0]))


def weight_only_reason(graph: GraphView, layer: NodeProto) -> str:
    """Why a weight stays as it is."""
    return f"ONNX Runtime would round the activations of {graph.label(layer)} to 8 bits"


def _store(graph: GraphView, context: Context, found: Scaling) -> None:
    nodes = cone(graph, [found.whole, found.scale])
    assert nodes is not None
    narrow = [item for item in sources(graph, nodes) if item.data_type in NARROW]
    if not narrow and not _is_layers(graph, found.node.output[0]):
        return  # positions, sizes: numbers that are no weights
    _check_size(graph, found)
    names = [found.whole, found.scale]
    known = {name: array for name in names if (array := graph.array(name)) is not None}
    wanted = [name for name in names if name not in known]
    made = constant_values(graph, context.evaluator, nodes, wanted)
    whole, scale = ({**made, **known}[name] for name in names)
    if whole.size < 2:
        return
    if whole.dtype not in (np.float32, np.float16) or scale.dtype != whole.dtype:
        raise DeclinedError(f"DequantizeLinear makes no {whole.dtype} of ours")
    layout = layout_of(whole, scale)
    grid = _Grid.of(found, whole, layout)
    weight = coded(graph, grid.whole, grid.layout, narrow)
    if not np.array_equal(weight.values(), grid.product(found.node.op_type)):
        raise DeclinedError("DequantizeLinear would round its values otherwise")
    end = found.node
    if not _is_shared(graph, sources(graph, nodes), [*nodes, end]):
        weight, end = moved(graph, weight, end)
    edit = Edit(graph, end)
    weight.write(edit)
    graph.apply(edit, "DequantizeLinear makes its values of codes")


def _is_shared(
    graph: GraphView, weights: list[TensorProto], nodes: list[NodeProto]
) -> bool:
    """Whether others read a weight too: their codes, not moved, can be the same."""
    own = {id(node) for node in nodes}
    readers = [use for item in weights for use in graph.home_uses(item.name)]
    return any(id(use.node) not in own for use in readers)


def _is_layers(graph: GraphView, name: str) -> bool:
    """Whether a layer reads `name`, directly or moved."""
    for use in graph.uses(name):
        op = graph.op(use.node)
        if op in _READERS or (op in MOVES and _is_layers(graph, use.node.output[0])):
            return True
    return False


def _check_size(graph: GraphView, found: Scaling) -> None:
    shape = graph.shape(found.whole)
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        raise DeclinedError("the size of its value is not known before it is computed")
    if 8 * math.prod(int(dim or 0) for dim in shape) > MAX_VALUE_BYTES:
        raise DeclinedError("its value is too large to be computed")


class _Grid(msgspec.Struct, frozen=True, eq=False):
    """Whole floats and their scales, positive, of equal rank; the sign is the codes'."""

    whole: Array
    layout: Scales
    operand: Array

    @classmethod
    def of(cls, found: Scaling, whole: Array, layout: Scales) -> _Grid:
        scale = layout.scale
        if not np.isfinite(scale).all() or not np.isfinite(whole).all():
            raise DeclinedError("its scale or its values are not finite")
        with np.errstate(all="ignore"):
            factor = (1 / scale).astype(scale.dtype) if _divides(found) else scale
        if not np.isfinite(factor).all() or (_divides(found) and (factor == 0).any()):
            raise DeclinedError("its scale has no reciprocal")
        sign = np.where(factor < 0, -1, np.where(factor == 0, 0, 1)).astype(whole.dtype)
        positive = np.where(factor == 0, 1, np.abs(factor)).astype(whole.dtype)
        made = Scales(positive, layout.axis, layout.is_blocked)
        return cls(whole * sign if (sign != 1).any() else whole, made, scale * sign)

    def product(self, op_type: str) -> Array:
        """What the graph computes (its two changes of sign cancel out)."""
        with np.errstate(all="ignore"):
            if op_type == "Div":
                return np.asarray(self.whole / self.operand)
            return np.asarray(self.whole * self.operand)


def _divides(found: Scaling) -> bool:
    return bool(found.node.op_type == "Div")
