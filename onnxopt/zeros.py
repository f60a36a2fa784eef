"""Counting zeros in weights, and finding channels that hold nothing else.

Weights are read in pieces and only one bit per channel is kept, so the size of a model
does not matter. -0.0 is a zero; a quantized weight is zero where it equals its zero
point.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from onnxopt.weights import Buffer, WeightStore, elements

Mask = npt.NDArray[np.bool_]

# Bits that say nothing about being zero: the sign. Types without an entry have none, or
# (fnuz) give the pattern of -0.0 to NaN.
_SIGN: dict[int, tuple[np.dtype[np.unsignedinteger[Any]], int]] = {
    TensorProto.FLOAT16: (np.dtype("<u2"), 0x8000),
    TensorProto.BFLOAT16: (np.dtype("<u2"), 0x8000),
    TensorProto.FLOAT: (np.dtype("<u4"), 0x8000_0000),
    TensorProto.DOUBLE: (np.dtype("<u8"), 0x8000_0000_0000_0000),
    TensorProto.FLOAT8E4M3FN: (np.dtype("u1"), 0x80),
    TensorProto.FLOAT8E5M2: (np.dtype("u1"), 0x80),
}
_FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
_UNCOUNTED = {TensorProto.STRING} | {
    value
    for name, value in TensorProto.DataType.items()
    if name in ("FLOAT8E8M0", "INT2", "UINT2")  # no zero; too rare to unpack
}


@dataclass(frozen=True)
class Zeros:
    """How many elements are zero, and which indices of an axis hold nothing else."""

    elements: int
    zeros: int
    channels: dict[int, Mask]


def count(
    weights: WeightStore, tensor: TensorProto, axes: Iterable[int] = (), zero: int = 0
) -> Zeros | None:
    """The zeros of a tensor, and for each of `axes` (>= 0) the all-zero indices.

    `zero`: the value that stands for zero, in integer types. None for types that are
    not counted.
    """
    if tensor.data_type in _UNCOUNTED:
        return None
    total, nonzero, start = elements(tensor), 0, 0
    if not total:
        return Zeros(0, 0, {})
    watches = {axis: _Axis(list(tensor.dims), axis) for axis in axes}
    for chunk in weights.chunks(tensor):
        mask = _nonzero(chunk, tensor.data_type, zero)[: total - start]
        nonzero += int(np.count_nonzero(mask))
        for watch in watches.values():
            watch.see(mask, start)
        start += len(mask)
    return Zeros(
        total, total - nonzero, {axis: ~watch.seen for axis, watch in watches.items()}
    )


class _Axis:
    """Which indices of one axis have shown a nonzero element so far."""

    def __init__(self, dims: Sequence[int], axis: int) -> None:
        self.size = dims[axis]
        self.stride = int(np.prod(dims[axis + 1 :], dtype=np.int64))
        self.seen: Mask = np.zeros(self.size, dtype=bool)

    def see(self, mask: Mask, start: int) -> None:
        """Take in elements `start`, `start` + 1, ... of the flat tensor."""
        if not len(mask) or self.seen.all():
            return
        first, last = start // self.stride, (start + len(mask) - 1) // self.stride
        # one run of equal index for each value of `first` to `last`
        starts = np.arange(first, last + 1, dtype=np.int64) * self.stride - start
        starts[0] = 0
        runs = mask if self.stride == 1 else np.logical_or.reduceat(mask, starts)
        for part, index in _periods(runs, first, self.size):
            self.seen[index : index + len(part)] |= part


def _periods(runs: Mask, first: int, size: int) -> Iterator[tuple[Mask, int]]:
    """The runs cut where the index of the axis starts again, each with its index.

    Whole periods come as one, folded together.
    """
    index = first % size
    head = runs[: size - index] if index else runs[:0]
    if len(head):
        yield head, index
    whole = (len(runs) - len(head)) // size * size
    if whole:
        middle = runs[len(head) : len(head) + whole].reshape(-1, size)
        yield np.logical_or.reduce(middle, axis=0), 0
    tail = runs[len(head) + whole :]
    if len(tail):
        yield tail, 0


def _nonzero(data: Buffer, data_type: int, zero: int) -> Mask:
    """For each element of a raw payload whether it is not zero."""
    if data_type in _FOUR_BITS:
        return _nonzero_nibbles(data, data_type, zero)
    if data_type in _SIGN:
        dtype, sign = _SIGN[data_type]
        return _differs(np.frombuffer(data, dtype) & dtype.type(sign - 1), 0)
    plain = np.dtype(helper.tensor_dtype_to_np_dtype(data_type))
    if plain.kind == "c":
        return _differs(np.frombuffer(data, plain.newbyteorder("<")), 0)
    if plain.kind not in "iub":
        return _differs(np.frombuffer(data, np.uint8), 0)  # fnuz: only 0x00 is zero
    return _differs(np.frombuffer(data, plain.newbyteorder("<")), zero)


def _differs(values: npt.NDArray[Any], zero: int) -> Mask:
    mask: Mask = np.not_equal(values, zero)
    return mask


def _nonzero_nibbles(data: Buffer, data_type: int, zero: int) -> Mask:
    """Two elements a byte, the first one in the low half."""
    packed = np.frombuffer(data, np.uint8)
    nibbles = np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(-1)
    if data_type == TensorProto.FLOAT4E2M1:
        return _differs(nibbles & 0x7, 0)
    return _differs(nibbles, zero & 0xF)
