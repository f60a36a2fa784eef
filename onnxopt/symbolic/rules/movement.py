"""Operators that move elements: Reshape, Transpose, Concat, Slice, Gather..."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, numpy_helper

from onnxopt import arithmetic, attributes
from onnxopt.slices import END
from onnxopt.symbolic import dim
from onnxopt.symbolic.dim import Dim
from onnxopt.symbolic.fact import (
    FOLLOWED,
    MAX_VALUE,
    Call,
    Dims,
    Fact,
    Value,
    integers,
    numbers,
    of_value,
    vector,
)
from onnxopt.symbolic.rules.elementwise import (
    Rule,
    broadcast,
    extreme,
    is_at_least,
    is_positive,
)


def axis_of(call: Call, name: str, default: int, rank: int) -> int:
    """A normalized axis attribute. Raises ValueError where it is out of range."""
    axis = int(attributes.get(call.node, name, default))
    return normalized(axis, rank)


def normalized(axis: int, rank: int) -> int:
    """0 <= axis < rank; raises ValueError."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of {rank}")
    return axis % rank


def axes_of(call: Call, slot: int = 1) -> list[int] | None:
    """The axes by attribute or by input; [] where none are given, None if not known."""
    given = attributes.get(call.node, "axes")
    if given is not None:
        return [int(axis) for axis in given]
    if not call.has(slot):
        return []
    return integers(call.inputs[slot].value)


def _moved(call: Call) -> Value | None:
    """What a followed value becomes, by the same table that folds constants."""
    values = [given.value if call.has(i) else None for i, given in enumerate(call.inputs)]
    needed = [value for i, value in enumerate(values) if call.has(i)]
    if any(value is None for value in needed):
        return None
    return arithmetic.move(call.node, values, call.opset)


def _with_value(call: Call, fact: Fact) -> list[Fact]:
    value = _moved(call)
    if value is not None and value.size <= MAX_VALUE:
        return [of_value(fact.dtype, value)]
    return [fact]


# ---- Reshape and its like ----


def reshape(call: Call) -> list[Fact] | None:
    """To what the second input says, 0 and -1 resolved as far as that is sure."""
    data = call.inputs[0]
    target = _target(call)
    if target is None:
        return _by_length(call)
    dims = _resolved(call, data.dims, target)
    fact = Fact(data.dtype, dims)
    shape = numbers(dims)
    if data.value is None or shape is None:
        return [fact]
    return [of_value(data.dtype, data.value.reshape(shape))]


def _target(call: Call) -> list[Dim | None] | None:
    if call.opset < 5:
        return [int(size) for size in attributes.get(call.node, "shape", [])]
    value = call.inputs[1].value
    return None if value is None or value.ndim != 1 else list(value)


def _by_length(call: Call) -> list[Fact] | None:
    lengths = call.inputs[1].dims if call.has(1) else None
    if lengths is None or len(lengths) != 1 or not isinstance(lengths[0], int):
        return [Fact(call.inputs[0].dtype)]
    rank = lengths[0]
    return [Fact(call.inputs[0].dtype, tuple(call.fresh(axis) for axis in range(rank)))]


def _resolved(call: Call, before: Dims | None, target: Sequence[Dim | None]) -> Dims:
    """The dims of the result: what each entry means, or a fresh atom.

    An entry that is 0 in a run copies, as quotients and remainders may. Sizes that have
    but a name are taken to be 1 or more, as in `fold-shapes`: a tensor without elements
    can have any other size.
    """
    keeps_zero = bool(attributes.get(call.node, "allowzero", 0))
    after: list[Dim | None] = []
    for axis, size in enumerate(target):
        copied = before[axis] if before is not None and axis < len(before) else None
        if size == 0 and not keeps_zero:
            after.append(copied)
        elif isinstance(size, int):
            after.append(size if size >= 0 else None)
        else:
            is_sure = _is_size(size) if keeps_zero else _is_copied_or_sure(size, copied)
            after.append(size if is_sure else None)
    if after.count(None) == 1 and before is not None:
        after[after.index(None)] = _left(before, after)
    return tuple(
        call.fresh(axis) if size is None else size for axis, size in enumerate(after)
    )


def _is_copied_or_sure(size: Dim | None, copied: Dim | None) -> bool:
    """Whether an entry is the size that results, be it 0 in a run or not."""
    return size is not None and (size == copied or not dim.may_vanish(size))


def _left(before: Dims, after: Sequence[Dim | None]) -> Dim | None:
    """The one size that is not known, from the number of elements."""
    known = [size for size in after if size is not None]
    total, part = _cancelled(before, known)
    return dim.exact_quotient(dim.product(total), dim.product(part))


def _cancelled(
    before: Sequence[Dim], after: Sequence[Dim]
) -> tuple[list[Dim], list[Dim]]:
    """Without the sizes that both have."""
    common = Counter(before) & Counter(after)
    rest: list[list[Dim]] = []
    for sizes in (before, after):
        left, kept = Counter(common), []
        for size in sizes:
            if left[size] > 0:
                left[size] -= 1
            else:
                kept.append(size)
        rest.append(kept)
    return rest[0], rest[1]


def flatten(call: Call) -> list[Fact] | None:
    """Two dims: the products of those before and behind the axis."""
    dims = call.inputs[0].dims
    if dims is None:
        made: Dims = (call.fresh(0), call.fresh(1))
    else:
        axis = int(attributes.get(call.node, "axis", 1))
        axis += len(dims) if axis < 0 else 0
        made = (dim.product(dims[:axis]), dim.product(dims[axis:]))
    return [Fact(call.inputs[0].dtype, made)]


def squeeze(call: Call) -> list[Fact] | None:
    """Without the axes that are given; all of size 1 where none are.

    By an empty list ONNX means no axis, and ONNX Runtime all that it can.
    """
    first, axes = call.inputs[0], axes_of(call)
    if first.dims is None or axes is None or (not axes and call.has(1)):
        return [Fact(first.dtype)]
    if not axes:
        if any(not isinstance(size, int) for size in first.dims):
            return [Fact(first.dtype)]
        gone = {axis for axis, size in enumerate(first.dims) if size == 1}
    else:
        gone = {normalized(axis, len(first.dims)) for axis in axes}
    dims = tuple(size for axis, size in enumerate(first.dims) if axis not in gone)
    if first.value is None:
        return [Fact(first.dtype, dims)]
    return [of_value(first.dtype, np.squeeze(first.value, axis=tuple(gone)))]


def unsqueeze(call: Call) -> list[Fact] | None:
    """With dims of 1 at the axes that are given."""
    first, axes = call.inputs[0], axes_of(call)
    if first.dims is None or axes is None:
        return [Fact(first.dtype)]
    rank = len(first.dims) + len(axes)
    places = {normalized(axis, rank) for axis in axes}
    rest = iter(first.dims)
    dims = tuple(1 if axis in places else next(rest) for axis in range(rank))
    if first.value is None:
        return [Fact(first.dtype, dims)]
    return [of_value(first.dtype, np.expand_dims(first.value, tuple(sorted(places))))]


def transpose(call: Call) -> list[Fact] | None:
    """By `perm`; reversed where there is none."""
    first = call.inputs[0]
    if first.dims is None:
        return [Fact(first.dtype)]
    perm = attributes.get(call.node, "perm") or range(len(first.dims))[::-1]
    dims = tuple(first.dims[axis] for axis in perm)
    if first.value is None:
        return [Fact(first.dtype, dims)]
    return [of_value(first.dtype, first.value.transpose(list(perm)))]


# ---- Concat, Split, Slice, Gather ----


def concat(call: Call) -> list[Fact] | None:
    """The sizes of one axis are added; the others are those of any input."""
    known = [given.dims for given in call.inputs if given.dims is not None]
    if not known:
        return [Fact(call.inputs[0].dtype)]
    rank = len(known[0])
    axis = axis_of(call, "axis", 1, rank)
    total: Dim | None = 0
    for given in call.inputs:
        if given.dims is None:
            total = None
        elif total is not None:
            total = dim.add(total, given.dims[axis])
    sure = [s for s in known if is_positive(s[axis]) and not any(map(dim.may_vanish, s))]
    every = known if len(known) == len(call.inputs) else []
    dims = []
    for i in range(rank):
        size = _common([shape[i] for shape in every], [shape[i] for shape in sure])
        dims.append(call.fresh(i) if size is None else size)
    dims[axis] = call.fresh(axis) if total is None else total
    fact = Fact(call.inputs[0].dtype, tuple(dims))
    return _with_parts(call, fact, axis)


def _common(sizes: Sequence[Dim], sure: Sequence[Dim]) -> Dim | None:
    """The one size that all have: a number where one is; None where that is not sure.

    ONNX Runtime lets parts without elements have any other sizes. Only those that are
    `sure` to have elements tell: along the axis for certain, while a size of another axis
    that has but a name is taken to be 1 or more.
    """
    if sizes and all(size == sizes[0] for size in sizes):
        return sizes[0]
    numbers = (size for size in sure if isinstance(size, int))
    return next(numbers, sure[0] if sure else None)


def _with_parts(call: Call, fact: Fact, axis: int) -> list[Fact]:
    """Where only some parts are followed, the other elements are None."""
    parts = []
    for given in call.inputs:
        if given.value is not None:
            parts.append(given.value)
            continue
        shape = numbers(given.dims)
        if shape is None or math.prod(shape) > MAX_VALUE:
            return [fact]
        parts.append(np.full(shape, None, dtype=object))
    if all(part is None for value in parts for part in value.flat):
        return [fact]
    return [of_value(fact.dtype, np.concatenate(parts, axis=axis))]


def split(call: Call) -> list[Fact] | None:
    """By `split`, or in equal parts (the last may be smaller from opset 18 on)."""
    first, count = call.inputs[0], len(call.node.output)
    if first.dims is None:
        return [Fact(first.dtype)] * count
    axis = axis_of(call, "axis", 0, len(first.dims))
    sizes = _parts(call, first.dims[axis], count)
    facts = []
    for index in range(count):
        size = call.fresh(axis, index) if sizes is None else sizes[index]
        dims = (*first.dims[:axis], size, *first.dims[axis + 1 :])
        facts.append(Fact(first.dtype, dims))
    if first.value is not None and sizes is not None:
        lengths = numbers(tuple(sizes))
        assert lengths is not None, "the parts of what is followed are numbers"
        values = np.split(first.value, np.cumsum(lengths)[:-1], axis=axis)
        facts = [of_value(first.dtype, value) for value in values]
    return facts


def _parts(call: Call, size: Dim, count: int) -> list[Dim] | None:
    given = attributes.get(call.node, "split")
    if given is None and call.has(1):
        given = integers(call.inputs[1].value) or []
    if given is not None:
        return list(given) if len(given) == count else None
    if isinstance(size, int):
        chunk = -(-size // count)
        parts: list[Dim] = [chunk] * (count - 1)
        return [*parts, size - chunk * (count - 1)]
    exact = dim.exact_quotient(size, count)
    return None if exact is None else [exact] * count


def slice_(call: Call) -> list[Fact] | None:
    """By attributes before opset 10, by inputs from then on."""
    first = call.inputs[0]
    if first.dims is None:
        return [Fact(first.dtype)]
    rank = len(first.dims)
    bounds = _bounds(call, rank)
    if bounds is None:
        return [Fact(first.dtype, tuple(call.fresh(axis) for axis in range(rank)))]
    dims = list(first.dims)
    for axis, start, end, step in bounds:
        made = _sliced(dims[axis], start, end, step)
        dims[axis] = call.fresh(axis) if made is None else made
    fact = Fact(first.dtype, tuple(dims))
    return [fact] if first.value is None else _with_value(call, fact)


Bound = tuple[int, Dim | None, Dim | None, Dim | None]


def _bounds(call: Call, rank: int) -> list[Bound] | None:
    """(axis, start, end, step) of each axis that is cut; None where that is not known."""
    steps: list[Dim | None]
    if call.opset < 10:
        starts = attributes.get(call.node, "starts", [])
        ends = attributes.get(call.node, "ends", [])
        axes = attributes.get(call.node, "axes", list(range(len(starts))))
        steps = [1] * len(starts)
    else:
        axes = integers(call.inputs[3].value) if call.has(3) else None
        if call.has(3) and axes is None:
            return None
        length = _length(call, 1)
        if length is None:
            return None
        axes = list(range(length)) if axes is None else axes
        starts, ends = (_entries(call, slot, length) for slot in (1, 2))
        steps = _entries(call, 4, length) if call.has(4) else [1] * length
    places = [normalized(int(axis), rank) for axis in axes]
    return list(zip(places, starts, ends, steps, strict=True))


def _length(call: Call, slot: int) -> int | None:
    dims = call.inputs[slot].dims
    if dims is None or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    return dims[0]


def _entries(call: Call, slot: int, length: int) -> list[Dim | None]:
    value = call.inputs[slot].value
    return [None] * length if value is None else list(value.flat)


def _sliced(
    size: Dim, start: Dim | None, end: Dim | None, step: Dim | None
) -> Dim | None:
    """How many elements a slice takes; None where that is not sure."""
    if start is None or end is None or not isinstance(step, int) or step == 0:
        return None
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        # as the end of a step backwards, the largest integer means different things
        if step < 0 and end >= END:
            return None
        return _count(size, start, end, step)
    if step != 1:
        return None
    low, high = _clamped(start, size), _clamped(end, size)
    if low is None or high is None:
        return None
    length = dim.subtract(high, low)
    return length if is_at_least(length, 0) else dim.function("length", low, high)


def _count(size: int, start: int, end: int, step: int) -> int:
    if step < 0:
        start = max(start, -size)
        stop = None if end < -size else end
        return len(range(size)[start:stop:step])
    return len(range(size)[start:end:step])


def _clamped(place: Dim, size: Dim) -> Dim | None:
    """A start or end (of a forward step) as an index from 0 to `size`."""
    if isinstance(place, int):
        if place >= END:
            return size
        if place < 0:  # from the end, where that is long enough
            inside = dim.add(size, place)
            return inside if is_at_least(inside, 0) else None
    elif not dim.is_never_negative(place):
        return None
    return place if place == 0 else extreme("min", min)(place, size)


def gather(call: Call) -> list[Fact] | None:
    """The dims of the indices in place of one axis."""
    data, indices = call.inputs[0], call.inputs[1]
    if data.dims is None or indices.dims is None:
        return [Fact(data.dtype)]
    axis = axis_of(call, "axis", 0, len(data.dims))
    dims = (*data.dims[:axis], *indices.dims, *data.dims[axis + 1 :])
    fact = Fact(data.dtype, dims)
    if data.value is None or integers(indices.value) is None:
        return [fact]
    return _with_value(call, fact)


def gather_elements(call: Call) -> list[Fact]:
    """The dims of the indices."""
    return [Fact(call.inputs[0].dtype, call.inputs[1].dims)]


def gather_nd(call: Call) -> list[Fact]:
    """Indices but for their last dim, then what that leaves of the data."""
    data, indices = call.inputs[0], call.inputs[1]
    batch = int(attributes.get(call.node, "batch_dims", 0))
    if data.dims is None or indices.dims is None or not indices.dims:
        return [Fact(data.dtype)]
    depth = indices.dims[-1]
    if not isinstance(depth, int):
        return [Fact(data.dtype)]
    return [Fact(data.dtype, (*indices.dims[:-1], *data.dims[batch + depth :]))]


# ---- what makes or repeats values ----


def shape(call: Call) -> list[Fact]:
    """The dims, as a value."""
    dims = call.inputs[0].dims
    if dims is None:
        return [Fact(TensorProto.INT64, (call.fresh(0),))]
    start = int(attributes.get(call.node, "start", 0))
    end = attributes.get(call.node, "end")
    return [of_value(TensorProto.INT64, vector(dims[start:end]))]


def size(call: Call) -> list[Fact]:
    """The product of the dims."""
    dims = call.inputs[0].dims
    if dims is None:
        return [Fact(TensorProto.INT64, ())]
    value = np.empty((), dtype=object)
    value[()] = dim.product(dims)
    return [Fact(TensorProto.INT64, (), value)]


def sized(call: Call, slot: int, dtype: int) -> Fact:
    """A fact whose dims are the value of an input."""
    given = call.inputs[slot]
    if given.value is not None:
        entries = list(given.value.flat)
        dims = tuple(
            call.fresh(axis) if not _is_size(entry) else entry
            for axis, entry in enumerate(entries)
        )
        return Fact(dtype, dims)
    length = _length(call, slot)
    if length is None:
        return Fact(dtype)
    return Fact(dtype, tuple(call.fresh(axis) for axis in range(length)))


def _is_size(entry: Dim | None) -> bool:
    return entry is not None and dim.is_never_negative(entry)


def constant_of_shape(call: Call) -> list[Fact] | None:
    """One value, as often as the input says."""
    tensor = attributes.get(call.node, "value")
    fact = sized(call, 0, TensorProto.FLOAT if tensor is None else tensor.data_type)
    if fact.dims is None or tensor is None or tensor.data_type != TensorProto.INT64:
        return [fact]
    shape = numbers(fact.dims)
    if shape is None or math.prod(shape) > MAX_VALUE:
        return [fact]
    item = int(numpy_helper.to_array(tensor).reshape(-1)[0])
    return [Fact(fact.dtype, fact.dims, np.full(shape, item, dtype=object))]


def expand(call: Call) -> list[Fact]:
    """The broadcast of the dims and of what the second input says."""
    wanted = sized(call, 1, call.inputs[0].dtype)
    fact = Fact(wanted.dtype, broadcast((call.inputs[0].dims, wanted.dims)))
    value, shape = call.inputs[0].value, numbers(fact.dims)
    if value is None or shape is None or math.prod(shape) > MAX_VALUE:
        return [fact]
    return [of_value(fact.dtype, np.broadcast_to(value, shape))]


def tile(call: Call) -> list[Fact]:
    """Each dim as often as the second input says."""
    first, repeats = call.inputs[0], call.inputs[1].value
    if first.dims is None or call.opset < 6:
        return [Fact(first.dtype)]
    entries = [None] * len(first.dims) if repeats is None else list(repeats.flat)
    dims = tuple(
        dim.multiply(size, times)
        if times is not None and _is_size(times)
        else call.fresh(axis)
        for axis, (size, times) in enumerate(zip(first.dims, entries, strict=True))
    )
    return [Fact(first.dtype, dims)]


def range_(call: Call) -> list[Fact]:
    """ceil((limit - start) / delta) elements."""
    start, limit, delta = (_item(given.value) for given in call.inputs)
    dtype = call.inputs[0].dtype
    arrays = [call.array(slot) for slot in range(3)]
    if dtype not in FOLLOWED and all(a is not None and a.size == 1 for a in arrays):
        first, last, step = (float(a.item()) for a in arrays if a is not None)
        return [Fact(dtype, (max(math.ceil((last - first) / step), 0),))]
    if start is None or limit is None or not isinstance(delta, int) or delta == 0:
        return [Fact(dtype, (call.fresh(0),))]
    length = dim.subtract(limit, start)
    if isinstance(start, int) and isinstance(limit, int):
        items = range(start, limit, delta)
        if len(items) > MAX_VALUE:
            return [Fact(dtype, (len(items),))]
        return [of_value(dtype, vector(tuple(items)))]
    if delta == 1 and is_at_least(length, 0):
        return [Fact(dtype, (length,))]
    return [Fact(dtype, (call.fresh(0),))]


def _item(value: Value | None) -> Dim | None:
    return None if value is None or value.size != 1 else value.reshape(-1)[0]


def pad(call: Call) -> list[Fact]:
    """Each dim with the padding before and behind it."""
    first = call.inputs[0]
    if first.dims is None:
        return [Fact(first.dtype)]
    rank = len(first.dims)
    pads = _pads(call, rank)
    dims = []
    for axis, (size, (low, high)) in enumerate(zip(first.dims, pads, strict=True)):
        if low is None or high is None:
            dims.append(call.fresh(axis))
        else:
            dims.append(dim.add(size, dim.add(low, high)))
    return [Fact(first.dtype, tuple(dims))]


def _pads(call: Call, rank: int) -> list[tuple[Dim | None, Dim | None]]:
    given = attributes.get(call.node, "pads") or attributes.get(call.node, "paddings")
    axes: list[int] | None = list(range(rank))
    if given is None and call.has(1):
        value = call.inputs[1].value
        given = None if value is None else list(value.flat)
        if call.has(3):
            axes = integers(call.inputs[3].value)
    if given is None or axes is None or len(given) != 2 * len(axes):
        return [(None, None)] * rank
    pads: list[tuple[Dim | None, Dim | None]] = [(0, 0)] * rank
    for index, axis in enumerate(axes):
        pads[normalized(axis, rank)] = given[index], given[index + len(axes)]
    return pads


RULES: dict[str, Rule] = {
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Pad": pad,
    "Range": range_,
    "Reshape": reshape,
    "Shape": shape,
    "Size": size,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
