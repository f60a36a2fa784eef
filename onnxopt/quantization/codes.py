"""Integer codes for weights that are whole numbers times scales.

`layout_of` says how scales lie over a weight, `coded` finds the type and the zero points
of its codes, `moved` carries out on them what only moves elements behind, and
`Codes.write` puts DequantizeLinear there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import msgspec
import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxopt import axes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.quantization import parameters
from onnxopt.quantization.parameters import Parameters
from onnxopt.quantization.written_out import MOVES
from onnxopt.weights import Array, tensor_bytes


class Scales(msgspec.Struct, frozen=True, eq=False):
    """How scales lie over a weight: none of axis and block is one scale for all."""

    scale: Array
    axis: int | None = None
    is_blocked: bool = False


def layout_of(whole: Array, scale: Array) -> Scales:
    """How `scale` lies over `whole`; raises DeclinedError where in no way of ours."""
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
        return Scales(wide, along[0] if along else None)
    if not across:
        raise DeclinedError("it has a scale for each element")
    if len(across) > 1:
        raise DeclinedError("its scale varies along several axes")
    return Scales(wide, across[0], is_blocked=True)


class Codes(msgspec.Struct, frozen=True, eq=False):
    """Codes, scales and zero points, of one rank; `name` is that of stored codes."""

    codes: Array
    layout: Scales
    zero_point: Array
    name: str = ""

    def values(self) -> Array:
        """What DequantizeLinear makes of them."""
        return self.parameters().dequantized(self.codes)

    def write(self, edit: Edit) -> None:
        """Let DequantizeLinear make the outputs of the edit's own node of them."""
        made = self.parameters()
        reason = parameters.missing(edit.graph, made)
        if reason:
            raise DeclinedError(reason)
        hint = f"{edit.node.output[0]}_codes"
        name = self.name or edit.add_weight(self.codes, hint)
        inputs, settings = parameters.operands(edit, name, made)
        edit.rewrite("DequantizeLinear", inputs, settings)

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


def coded(
    graph: GraphView, whole: Array, layout: Scales, narrow: Sequence[TensorProto] = ()
) -> Codes:
    """Codes for `whole`, floats; raises DeclinedError where no type holds them.

    `narrow` are the constants that they come from, and no larger than these they get.
    """
    zeros = np.zeros(layout.scale.shape, np.int64)
    kinds = {helper.tensor_dtype_to_np_dtype(item.data_type) for item in narrow}
    floats = [kind for kind in kinds if not _is_integer(kind)]
    if floats:
        codes = whole.astype(floats[0])
        if not np.array_equal(codes.astype(whole.dtype), whole):
            raise DeclinedError(f"its values are not those of {floats[0]}")
        name = _stored_as(graph, narrow, codes)
        return Codes(codes, layout, zeros.astype(floats[0]), name)
    if not np.array_equal(np.rint(whole), whole):
        raise DeclinedError("its values are not whole numbers")
    if float(np.abs(whole).max(initial=0)) > np.iinfo(np.uint16).max:
        raise DeclinedError("its values do not fit into 16 bits")
    numbers = whole.astype(np.int32)
    stored = _as_stored(graph, numbers, layout, narrow)
    if stored is not None:
        return stored
    low, high = _extremes(numbers, layout)
    for dtype in _types(numbers, layout, narrow):
        least, most = _limits(np.dtype(dtype))
        zero = zeros if least < 0 else np.maximum(-low, 0)
        if (low + zero >= least).all() and (high + zero <= most).all():
            codes = (numbers + zero.astype(np.int32)).astype(dtype)
            return Codes(codes, layout, zero.astype(dtype))
    raise DeclinedError("its values do not fit into a code of its size")


def _limits(dtype: np.dtype[np.generic]) -> tuple[int, int]:
    return parameters.code_limits(int(helper.np_dtype_to_tensor_dtype(dtype)))


def _extremes(numbers: Array, layout: Scales) -> tuple[Array, Array]:
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
    numbers: Array, layout: Scales, narrow: Sequence[TensorProto]
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


def _stored_as(graph: GraphView, narrow: Sequence[TensorProto], codes: Array) -> str:
    """The name of the constant that holds these codes; empty where none does."""
    for tensor in narrow:
        if tuple(tensor.dims) == codes.shape and graph.weight(tensor.name) is tensor:
            held = graph.model.weights.array(tensor)
            if held.dtype == codes.dtype and held.tobytes() == codes.tobytes():
                return str(tensor.name)
    return ""


def _as_stored(
    graph: GraphView, numbers: Array, layout: Scales, narrow: Sequence[TensorProto]
) -> Codes | None:
    """The codes as they are, where what is subtracted is one number for each scale."""
    for tensor in narrow:
        if tuple(tensor.dims) != numbers.shape or graph.weight(tensor.name) is not tensor:
            continue
        held = graph.model.weights.array(tensor)
        low, high = _extremes(held.astype(np.int32) - numbers, layout)
        least, most = _limits(held.dtype)
        fits = (low >= least).all() and (high <= most).all()
        if np.array_equal(low, high) and fits:
            zero = np.broadcast_to(low, layout.scale.shape).astype(held.dtype)
            return Codes(held, layout, zero, str(tensor.name))
    return None


# ---- what moves them ----


def moved(graph: GraphView, weight: Codes, node: NodeProto) -> tuple[Codes, NodeProto]:
    """The weight behind what only moves it, and the last node that does."""
    while True:
        use = graph.only_use(node.output[0])
        if use is None or use.view is not graph or use.index != 0:
            return weight, node
        moved = _move(graph, weight, use.node)
        if moved is None:
            return weight, node
        weight, node = moved, use.node


def _move(graph: GraphView, weight: Codes, node: NodeProto) -> Codes | None:
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


def _transposed(graph: GraphView, weight: Codes, node: NodeProto) -> Codes | None:
    perm = axes.perm_of(graph, node)
    if perm is None:
        return None
    layout = weight.layout
    axis = None if layout.axis is None else perm.index(layout.axis)
    made = Scales(np.transpose(layout.scale, perm), axis, layout.is_blocked)
    return Codes(
        np.transpose(weight.codes, perm), made, np.transpose(weight.zero_point, perm)
    )


def _reshaped(weight: Codes, shape: tuple[int, ...]) -> Codes | None:
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
    made = Scales(layout.scale.reshape(grid), axis, layout.is_blocked)
    zero = weight.zero_point.reshape(grid)
    return Codes(weight.codes.reshape(shape), made, zero)
