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
   zero point where they fit, or uint8. Codes that were packed become int4 or uint4, and so
   do rounded floats in blocks; that takes opset 21, without which they stay packed.
5. Transpose, Reshape and the like behind are carried out on the codes.
6. Rounded floats, and integers of 32 and 64 bits, only where a layer reads them.

It has to run before `fold-constants`, which would compute the floats.
"""

from __future__ import annotations

import math
from typing import ClassVar

import ml_dtypes
import msgspec
import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxopt import axes
from onnxopt.edit import Edit
from onnxopt.evaluate import MAX_VALUE_BYTES, EvaluationError, constant_values
from onnxopt.graph import GraphView
from onnxopt.linear import LAYERS, DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization import parameters
from onnxopt.quantization.chains import ROUNDING
from onnxopt.quantization.parameters import Parameters
from onnxopt.quantization.written_out import (
    MOVES,
    NARROW,
    Scaling,
    cone,
    scaling,
    sources,
)
from onnxopt.report import Guarantee
from onnxopt.weights import Array, elements, tensor_bytes

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

    def run(self, graph: GraphView, context: Context) -> None:
        """From each operator that makes whole floats to the one that scales them."""
        seen: dict[int, NodeProto] = {}
        for node in graph.visit(self, ("Cast", *ROUNDING)):
            if node.op_type == "Cast" and graph.dtype(node.input[0]) not in _INTEGERS:
                continue
            found = scaling(graph, node)
            if found is None or id(found.node) in seen:
                continue
            seen[id(found.node)] = found.node
            try:
                _store(graph, context, found)
            except DeclinedError as declined:
                graph.skip(found.node, str(declined))
            except EvaluationError as error:
                graph.skip(found.node, f"its value could not be computed: {error}")


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
    layout = _layout(whole, scale)
    grid = _Grid.of(found, whole, layout)
    weight = _coded(graph, grid, narrow)
    if not np.array_equal(weight.values(), grid.product(found.node.op_type)):
        raise DeclinedError("DequantizeLinear would round its values otherwise")
    end = found.node
    if not any(_is_shared(graph, item) for item in sources(graph, nodes)):
        weight, end = _moved(graph, weight, end)
    _write(graph, weight, end)


def _is_shared(graph: GraphView, tensor: TensorProto) -> bool:
    """Whether others read a weight too: their codes, not moved, can be the same."""
    return elements(tensor) > 1 and graph.only_use_everywhere(tensor.name) is None


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


# ---- the grid of scales ----


class _Layout(msgspec.Struct, frozen=True, eq=False):
    """How scales lie over a weight: none of axis and block is one scale for all."""

    scale: Array
    axis: int | None = None
    is_blocked: bool = False


def _layout(whole: Array, scale: Array) -> _Layout:
    """`scale` with the rank of `whole`, and the axis that it varies along, or in blocks."""
    if scale.ndim > whole.ndim:
        if any(dim != 1 for dim in scale.shape[: scale.ndim - whole.ndim]):
            raise DeclinedError("its scale broadcasts it")
        if whole.ndim == 0 or scale.size > 1 or scale.ndim:
            raise DeclinedError("its scale is of a higher rank")
    wide = scale.reshape((1,) * (whole.ndim - scale.ndim) + scale.shape)
    pairs = list(zip(wide.shape, whole.shape, strict=True))
    if any(ours not in (1, theirs) for ours, theirs in pairs):
        raise DeclinedError("its scale broadcasts it")
    along = [axis for axis, (ours, _) in enumerate(pairs) if ours != 1]
    across = [axis for axis, (ours, theirs) in enumerate(pairs) if ours != theirs]
    if len(along) < 2:
        return _Layout(wide, along[0] if along else None)
    if not across:
        raise DeclinedError("it has a scale for each element")
    if len(across) > 1:
        raise DeclinedError("its scale varies along several axes")
    return _Layout(wide, across[0], is_blocked=True)


class _Grid(msgspec.Struct, frozen=True, eq=False):
    """Whole floats and their scales, positive, of equal rank; the sign is the codes'."""

    whole: Array
    layout: _Layout
    operand: Array

    @classmethod
    def of(cls, found: Scaling, whole: Array, layout: _Layout) -> _Grid:
        scale = layout.scale
        if not np.isfinite(scale).all() or not np.isfinite(whole).all():
            raise DeclinedError("its scale or its values are not finite")
        with np.errstate(all="ignore"):
            factor = (1 / scale).astype(scale.dtype) if _divides(found) else scale
        if not np.isfinite(factor).all() or (_divides(found) and (factor == 0).any()):
            raise DeclinedError("its scale has no reciprocal")
        sign = np.where(factor < 0, -1, np.where(factor == 0, 0, 1)).astype(whole.dtype)
        positive = np.where(factor == 0, 1, np.abs(factor)).astype(whole.dtype)
        made = _Layout(positive, layout.axis, layout.is_blocked)
        return cls(whole * sign if (sign != 1).any() else whole, made, scale * sign)

    def product(self, op_type: str) -> Array:
        """What the graph computes (its two changes of sign cancel out)."""
        with np.errstate(all="ignore"):
            made = self.whole / self.operand if op_type == "Div" else self.whole * self.operand
        return np.asarray(made)


def _divides(found: Scaling) -> bool:
    return bool(found.node.op_type == "Div")


# ---- codes ----


class _Weight(msgspec.Struct, frozen=True, eq=False):
    """Codes, and scales and zero points of the same rank; `name` where they are stored."""

    codes: Array
    layout: _Layout
    zero_point: Array
    name: str = ""

    def values(self) -> Array:
        """What DequantizeLinear makes of them."""
        scale = self.layout.scale
        if self.codes.dtype.kind in "iu" or _is_integer(self.codes.dtype):
            shifted = self.codes.astype(np.int32) - self.zero_point.astype(np.int32)
            return np.asarray(shifted.astype(scale.dtype) * scale)
        return np.asarray(self.codes.astype(scale.dtype) * scale)

    def parameters(self) -> Parameters:
        """Those of the DequantizeLinear."""
        layout = self.layout
        if layout.axis is None:
            flat = layout.scale.reshape(()), self.zero_point.reshape(())
            return Parameters(*flat)
        if not layout.is_blocked:
            rows = layout.scale.reshape(-1), self.zero_point.reshape(-1)
            return Parameters(*rows, layout.axis)
        block = self.codes.shape[layout.axis] // layout.scale.shape[layout.axis]
        return Parameters(layout.scale, self.zero_point, layout.axis, block)


def _is_integer(dtype: np.dtype[np.generic]) -> bool:
    small = (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2)
    return dtype.kind in "iu" or dtype in small


def _coded(graph: GraphView, grid: _Grid, narrow: list[TensorProto]) -> _Weight:
    whole, layout = grid.whole, grid.layout
    zeros = np.zeros(layout.scale.shape, np.int64)
    kinds = {helper.tensor_dtype_to_np_dtype(item.data_type) for item in narrow}
    floats = [kind for kind in kinds if not _is_integer(kind)]
    if floats:
        codes = whole.astype(floats[0])
        if not np.array_equal(codes.astype(whole.dtype), whole):
            raise DeclinedError(f"its values are not those of {floats[0]}")
        name = _stored_as(graph, narrow, codes)
        return _Weight(codes, layout, zeros.astype(floats[0]), name)
    if not np.array_equal(np.rint(whole), whole):
        raise DeclinedError("its values are not whole numbers")
    if np.abs(whole).max(initial=0) > np.iinfo(np.uint16).max:
        raise DeclinedError("its values do not fit into 16 bits")
    numbers = whole.astype(np.int32)
    stored = _as_stored(graph, numbers, layout, narrow)
    if stored is not None:
        return stored
    low, high = _extremes(numbers, layout)
    for dtype in _types(numbers, layout, narrow):
        info = ml_dtypes.iinfo(dtype)
        zero = zeros if int(info.min) < 0 else np.maximum(-low, 0)
        if (low + zero >= int(info.min)).all() and (high + zero <= int(info.max)).all():
            codes = (numbers + zero.astype(np.int32)).astype(dtype)
            return _Weight(codes, layout, zero.astype(dtype))
    raise DeclinedError("its values do not fit into a code of its size")


def _extremes(numbers: Array, layout: _Layout) -> tuple[Array, Array]:
    """The least and the largest number of each scale."""
    if layout.axis is None:
        over = tuple(range(numbers.ndim))
    elif layout.is_blocked:
        over = (layout.axis,)
    else:
        over = tuple(axis for axis in range(numbers.ndim) if axis != layout.axis)
    if not numbers.size:
        raise DeclinedError("it is empty")
    ends = (
        numbers.min(axis=over, keepdims=True).astype(np.int64),
        numbers.max(axis=over, keepdims=True).astype(np.int64),
    )
    return ends


def _types(
    numbers: Array, layout: _Layout, narrow: list[TensorProto]
) -> list[type[np.generic]]:
    """What the codes may be stored as, in order: no larger than they were."""
    four: list[type[np.generic]] = [ml_dtypes.int4, ml_dtypes.uint4]
    eight: list[type[np.generic]] = [np.int8, np.uint8]
    if not narrow:
        return [*four, *eight] if layout.is_blocked else eight
    size = max(tensor_bytes(item) for item in narrow)
    if 2 * size <= numbers.size + 1:
        return four
    return eight if size <= numbers.size else [*eight, np.int16, np.uint16]


def _stored_as(graph: GraphView, narrow: list[TensorProto], codes: Array) -> str:
    """The name of the constant that holds these codes; empty where none does."""
    for tensor in narrow:
        if tuple(tensor.dims) == codes.shape and graph.weight(tensor.name) is tensor:
            held = graph.model.weights.array(tensor)
            if held.dtype == codes.dtype and held.tobytes() == codes.tobytes():
                return str(tensor.name)
    return ""


def _as_stored(
    graph: GraphView, numbers: Array, layout: _Layout, narrow: list[TensorProto]
) -> _Weight | None:
    """The codes as they are, where what is subtracted is one number for each scale."""
    for tensor in narrow:
        if tuple(tensor.dims) != numbers.shape or graph.weight(tensor.name) is not tensor:
            continue
        held = graph.model.weights.array(tensor)
        low, high = _extremes(held.astype(np.int32) - numbers, layout)
        info = ml_dtypes.iinfo(held.dtype)
        fits = (low >= int(info.min)).all() and (high <= int(info.max)).all()
        if np.array_equal(low, high) and fits:
            zero = np.broadcast_to(low, layout.scale.shape).astype(held.dtype)
            return _Weight(held, layout, zero, str(tensor.name))
    return None


# ---- what moves them ----


def _moved(graph: GraphView, weight: _Weight, node: NodeProto) -> tuple[_Weight, NodeProto]:
    """The weight behind what only moves it, and the last node that does."""
    while True:
        use = graph.only_use(node.output[0])
        if use is None or use.view is not graph or use.index != 0:
            return weight, node
        moved = _move(graph, weight, use.node)
        if moved is None:
            return weight, node
        weight, node = moved, use.node


def _move(graph: GraphView, weight: _Weight, node: NodeProto) -> _Weight | None:
    """The weight that `node` makes of one; None where it is no such node."""
    op = graph.op(node)
    if op == "Identity":
        return weight
    if op == "Transpose":
        return _transposed(graph, weight, node)
    if op not in MOVES:
        return None
    shape = graph.shape(node.output[0])
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return _reshaped(weight, tuple(int(dim or 0) for dim in shape))


def _transposed(graph: GraphView, weight: _Weight, node: NodeProto) -> _Weight | None:
    perm = axes.perm_of(graph, node)
    if perm is None:
        return None
    layout = weight.layout
    axis = None if layout.axis is None else perm.index(layout.axis)
    made = _Layout(np.transpose(layout.scale, perm), axis, layout.is_blocked)
    return _Weight(
        np.transpose(weight.codes, perm), made, np.transpose(weight.zero_point, perm)
    )


def _reshaped(weight: _Weight, shape: tuple[int, ...]) -> _Weight | None:
    """With other dims, where they leave the axis of the scales, or merge its blocks."""
    layout, dims = weight.layout, weight.codes.shape
    if layout.axis is None:
        grid: tuple[int, ...] = (1,) * len(shape)
        axis = None
    elif layout.is_blocked:
        axis = layout.axis - 1
        groups = layout.scale.shape[layout.axis]
        merged = (*dims[:axis], math.prod(dims[axis : axis + 2]), *dims[axis + 2 :])
        if axis < 0 or groups != 1 or shape != merged:
            return None
        grid = tuple(np.delete(layout.scale.shape, layout.axis).tolist())
    else:
        before, size = math.prod(dims[: layout.axis]), dims[layout.axis]
        places = [
            place
            for place, dim in enumerate(shape)
            if dim == size and math.prod(shape[:place]) == before
        ]
        if not places:
            return None
        axis = places[0]
        grid = tuple(size if place == axis else 1 for place in range(len(shape)))
    made = _Layout(layout.scale.reshape(grid), axis, layout.is_blocked)
    zero = weight.zero_point.reshape(grid)
    return _Weight(weight.codes.reshape(shape), made, zero)


def _write(graph: GraphView, weight: _Weight, end: NodeProto) -> None:
    made = weight.parameters()
    reason = parameters.missing(graph, made)
    if reason:
        raise DeclinedError(reason)
    edit = Edit(graph, end)
    name = weight.name or edit.add_weight(weight.codes, f"{end.output[0]}_codes")
    inputs, settings = parameters.operands(edit, name, made)
    edit.rewrite("DequantizeLinear", inputs, settings)
    graph.apply(edit, "DequantizeLinear makes its values of codes")
