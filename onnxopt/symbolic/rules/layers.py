"""Layers and reductions: MatMul, Gemm, Conv, pools, Reduce..., TopK, OneHot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from onnxopt import attributes
from onnxopt.symbolic import dim
from onnxopt.symbolic.dim import Dim
from onnxopt.symbolic.fact import Call, Dims, Fact, integers
from onnxopt.symbolic.rules.attention import attention
from onnxopt.symbolic.rules.elementwise import Rule, broadcast, fits
from onnxopt.symbolic.rules.movement import axes_of, axis_of, normalized, sized


def matmul(call: Call) -> list[Fact]:
    """As numpy.matmul: stacks of matrices, vectors at either side."""
    left, right = call.inputs[0].dims, call.inputs[1].dims
    dtype = call.inputs[0].dtype
    if call.node.op_type != "MatMul":  # MatMulInteger
        dtype = TensorProto.INT32
    if left is None or right is None or not left or not right:
        return [Fact(dtype)]
    row = left[-2:-1] if len(left) > 1 else ()
    column = right[-1:] if len(right) > 1 else ()
    stack = broadcast((left[:-2], right[:-2]))
    assert stack is not None, "both ranks are known"
    return [Fact(dtype, (*stack, *row, *column))]


def einsum(call: Call) -> list[Fact] | None:
    """The size of each letter, 1 broadcast as ONNX Runtime does; no ellipsis."""
    dtype, text = call.inputs[0].dtype, attributes.get(call.node, "equation", "")
    left, arrow, right = text.replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in text or len(terms) != len(call.inputs):
        return [Fact(dtype)]
    letters = "".join(terms)
    if not arrow:
        right = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    found: dict[str, list[Dims]] = {letter: [] for letter in letters}
    for term, given in zip(terms, call.inputs, strict=True):
        if given.dims is not None:
            for letter, size in zip(term, given.dims, strict=True):
                found[letter].append((size,))
    dims: list[Dim] = []
    for axis, letter in enumerate(right):
        is_known = len(found[letter]) == letters.count(letter)
        common = broadcast(found[letter]) if is_known else None
        dims.append(call.fresh(axis) if common is None else common[0])
    return [Fact(dtype, tuple(dims))]


def gemm(call: Call) -> list[Fact]:
    """Two matrices, each perhaps transposed."""
    left, right = call.inputs[0].dims, call.inputs[1].dims
    row, column = call.fresh(0), call.fresh(1)
    if left is not None:
        row = left[1 if attributes.get(call.node, "transA", 0) else 0]
    if right is not None:
        column = right[0 if attributes.get(call.node, "transB", 0) else 1]
    return [Fact(call.inputs[0].dtype, (row, column))]


def conv(call: Call) -> list[Fact] | None:
    """Batch, the weight's first dim, and what is left of each extent."""
    data, weight = call.inputs[0], call.inputs[1]
    if weight.dims is None:
        return [Fact(data.dtype)]
    batch, kernel = _batch_and_kernel(call, data, weight.dims)
    extents = _extents(call, data.dims, kernel, len(weight.dims))
    dtype = TensorProto.INT32 if call.node.op_type == "ConvInteger" else data.dtype
    return [Fact(dtype, (batch, weight.dims[0], *extents))]


def conv_transpose(call: Call) -> list[Fact] | None:
    """Batch, the weight's second dim for each group, and the extents of a Conv undone."""
    data, weight = call.inputs[0], call.inputs[1]
    if weight.dims is None:
        return [Fact(data.dtype)]
    batch, kernel = _batch_and_kernel(call, data, weight.dims)
    channels = dim.multiply(weight.dims[1], attributes.get(call.node, "group", 1))
    extents = _grown(call, data.dims, kernel, len(weight.dims) - 2)
    return [Fact(data.dtype, (batch, channels, *extents))]


def _batch_and_kernel(call: Call, data: Fact, weight: Dims) -> tuple[Dim, Dims]:
    batch = data.dims[0] if data.dims is not None else call.fresh(0)
    return batch, tuple(attributes.get(call.node, "kernel_shape") or weight[2:])


def _grown(call: Call, data: Dims | None, kernel: Dims, count: int) -> Dims:
    fresh = tuple(call.fresh(axis + 2) for axis in range(count))
    known = _windows(call, count)
    if "output_shape" in (item.name for item in call.node.attribute):
        return fresh
    if data is None or known is None or len(kernel) != count:
        return fresh
    strides, dilations, pads = known
    extra = attributes.get(call.node, "output_padding") or [0] * count
    made: list[Dim] = []
    for axis, size in enumerate(data[2:]):
        width = kernel[axis]
        if not isinstance(width, int):
            made.append(fresh[axis])
            continue
        whole = dim.multiply(size, strides[axis])
        beyond = dilations[axis] * (width - 1) + 1 - strides[axis]
        if pads is not None:
            cut = pads[axis] + pads[axis + count]
            made.append(dim.add(whole, beyond + extra[axis] - cut))
        elif beyond < 0 or extra[axis]:
            made.append(fresh[axis])  # SAME, where runtimes disagree
        else:
            made.append(whole)
    return tuple(made)


def recurrent(call: Call) -> list[Fact] | None:
    """LSTM, GRU, RNN: all hidden states, the last one, and (LSTM) the last cell state."""
    data, weight = call.inputs[0], call.inputs[2]
    hidden = attributes.get(call.node, "hidden_size")
    if hidden is None:
        hidden = weight.dims[-1] if weight.dims else None
    if data.dims is None or len(data.dims) != 3 or hidden is None:
        return None
    ways = (
        2 if attributes.get(call.node, "direction", "forward") == "bidirectional" else 1
    )
    if attributes.get(call.node, "layout", 0):
        batch, length = data.dims[:2]
        last: Dims = (batch, ways, hidden)
        whole: Dims = (batch, length, ways, hidden)
    else:
        length, batch = data.dims[:2]
        last, whole = (ways, batch, hidden), (length, ways, batch, hidden)
    return [Fact(data.dtype, dims) for dims in (whole, last, last)]


def pool(call: Call) -> list[Fact] | None:
    """Batch and channels stay; a rounded up extent is not sure (see `onnxopt.doubt`)."""
    data = call.inputs[0]
    kernel = attributes.get(call.node, "kernel_shape")
    if data.dims is None or kernel is None:
        return [Fact(data.dtype)]
    dims = (*data.dims[:2], *_extents(call, data.dims, tuple(kernel), len(data.dims)))
    facts = [Fact(data.dtype, dims)]
    if len(call.node.output) > 1:
        facts.append(Fact(TensorProto.INT64, dims))
    return facts


def _extents(call: Call, data: Dims | None, kernel: Dims, rank: int) -> Dims:
    count = rank - 2
    known = _windows(call, count)
    if data is None or known is None or len(kernel) != count:
        return tuple(call.fresh(axis + 2) for axis in range(count))
    strides, dilations, pads = known
    made: list[Dim] = []
    for axis, size in enumerate(data[2:]):
        width = kernel[axis]
        if not isinstance(width, int):
            made.append(call.fresh(axis + 2))
        elif pads is None:  # SAME: as many windows as strides fit in
            upper = dim.add(size, strides[axis] - 1)
            made.append(dim.floor_quotient(upper, strides[axis]))
        else:
            reach = dilations[axis] * (width - 1) + 1
            inside = dim.add(size, pads[axis] + pads[axis + count] - reach)
            made.append(dim.windows(inside, strides[axis]))
    return tuple(made)


Windows = tuple[list[int], list[int], list[int] | None]


def _windows(call: Call, count: int) -> Windows | None:
    """Strides, dilations and pads (None: SAME); None where the extent is not sure."""
    node = call.node
    strides = attributes.get(node, "strides") or [1] * count
    dilations = attributes.get(node, "dilations") or [1] * count
    pads = attributes.get(node, "pads") or [0] * (2 * count)
    mode = attributes.get(node, "auto_pad", "NOTSET")
    if attributes.get(node, "ceil_mode", 0):
        return None
    if mode.startswith("SAME"):
        is_plain = call.node.op_type == "Conv" or all(size == 1 for size in dilations)
        return (strides, dilations, None) if is_plain else None
    return strides, dilations, [0] * (2 * count) if mode == "VALID" else pads


def resize(call: Call) -> list[Fact] | None:
    """To `sizes`, or by scales that are sure: multiples of 1/8 (a product in float32).

    Both are of `axes`, where those are named; the other axes keep their sizes.
    """
    first = call.inputs[0]
    if first.dims is None or not _is_plain_resize(call):
        return [Fact(first.dtype)]
    rank = len(first.dims)
    axes = [normalized(a, rank) for a in attributes.get(call.node, "axes", range(rank))]
    dims = list(first.dims)
    made = _resized(call, [first.dims[axis] for axis in axes])
    for place, axis in enumerate(axes):
        size = made[place] if made is not None else None
        dims[axis] = call.fresh(axis) if size is None else size
    return [Fact(first.dtype, tuple(dims))]


def _resized(call: Call, before: Sequence[Dim]) -> Sequence[Dim | None] | None:
    """What sizes `before` become; None where that is not known of any."""
    if call.has(3):
        sizes = sized(call, 3, call.inputs[0].dtype).dims
        return sizes if sizes and len(sizes) == len(before) else None
    slot = 2 if call.opset >= 11 else 1
    scales = attributes.get(call.node, "scales")
    if scales is None and call.has(slot):
        array = call.array(slot)
        scales = None if array is None else array.tolist()
    if scales is None or len(scales) != len(before):
        return None
    return [_scaled(size, scale) for size, scale in zip(before, scales, strict=True)]


def _is_plain_resize(call: Call) -> bool:
    mode = attributes.get(call.node, "coordinate_transformation_mode", "")
    policy = attributes.get(call.node, "keep_aspect_ratio_policy", "stretch")
    return bool(mode != "tf_crop_and_resize" and policy == "stretch")


def _scaled(size: Dim, scale: float) -> Dim | None:
    if scale * 8 != round(scale * 8):
        return None
    if isinstance(size, int):
        return int(size * scale)
    return dim.multiply(size, int(scale)) if scale == int(scale) else None


def global_pool(call: Call) -> list[Fact]:
    """Every extent is 1."""
    dims = call.inputs[0].dims
    made = None if dims is None else (*dims[:2], *[1] * len(dims[2:]))
    return [Fact(call.inputs[0].dtype, made)]


def reduce(call: Call) -> list[Fact]:
    """Over the axes that are given, or over all."""
    first = call.inputs[0]
    axes = axes_of(call)
    keeps = bool(attributes.get(call.node, "keepdims", 1))
    if axes == [] and attributes.get(call.node, "noop_with_empty_axes", 0):
        return [Fact(first.dtype, first.dims)]
    if first.dims is None or axes is None:
        if axes == [] and not keeps:
            return [Fact(first.dtype, ())]
        return [Fact(first.dtype)]
    rank = len(first.dims)
    gone = {normalized(axis, rank) for axis in axes} if axes else set(range(rank))
    return [Fact(first.dtype, _reduced(first.dims, gone, keeps))]


def _reduced(dims: Dims, gone: set[int], keeps: bool) -> Dims:
    if keeps:
        return tuple(1 if axis in gone else size for axis, size in enumerate(dims))
    return tuple(size for axis, size in enumerate(dims) if axis not in gone)


def product_of_value(call: Call) -> list[Fact]:
    """ReduceProd, also of a followed value: the number of elements of a shape."""
    (fact,) = reduce(call)
    value = call.inputs[0].value
    if value is None or value.ndim != 1 or None in value or fact.dims is None:
        return [fact]
    if len(fact.dims) == 1 and fact.dims[0] != 1:
        return [fact]
    total = np.full([1] * len(fact.dims), None, dtype=object)
    size = dim.product(value)
    total[...] = size if fits(size, fact.dtype) else None
    return [Fact(fact.dtype, fact.dims, total)]


def argument(call: Call) -> list[Fact]:
    """ArgMax, ArgMin: over one axis, int64."""
    dims = call.inputs[0].dims
    if dims is None:
        return [Fact(TensorProto.INT64)]
    axis = axis_of(call, "axis", 0, len(dims))
    keeps = bool(attributes.get(call.node, "keepdims", 1))
    return [Fact(TensorProto.INT64, _reduced(dims, {axis}, keeps))]


def top_k(call: Call) -> list[Fact]:
    """Values and int64 indices, k of them along one axis."""
    first = call.inputs[0]
    if first.dims is None:
        return [Fact(first.dtype), Fact(TensorProto.INT64)]
    axis = axis_of(call, "axis", -1, len(first.dims))
    count = attributes.get(call.node, "k")
    if count is None and call.has(1):
        counts = integers(call.inputs[1].value)
        count = counts[0] if counts else None
    size = call.fresh(axis) if count is None else int(count)
    dims = (*first.dims[:axis], size, *first.dims[axis + 1 :])
    return [Fact(first.dtype, dims), Fact(TensorProto.INT64, dims)]


def non_zero(call: Call) -> list[Fact]:
    """[rank, how many there are]."""
    dims = call.inputs[0].dims
    rank = call.fresh(0) if dims is None else max(len(dims), 1)
    return [Fact(TensorProto.INT64, (rank, call.fresh(1)))]


_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceSum ReduceSumSquare"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCE.split(), reduce),
    "Attention": attention,
    **dict.fromkeys(("ArgMax", "ArgMin"), argument),
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), global_pool),
    "Conv": conv,
    "ConvInteger": conv,
    "ConvTranspose": conv_transpose,
    "Einsum": einsum,
    "GRU": recurrent,
    "Gemm": gemm,
    "LSTM": recurrent,
    "MatMul": matmul,
    "MatMulInteger": matmul,
    "NonZero": non_zero,
    "RNN": recurrent,
    "ReduceProd": product_of_value,
    "Resize": resize,
    "TopK": top_k,
    "Upsample": resize,
}
