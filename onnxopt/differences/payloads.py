"""Comparing the elements of two tensors, read piece by piece from wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from onnx import SparseTensorProto, TensorProto, numpy_helper

from onnxopt.differences.found import Values
from onnxopt.weights import Array, Buffer, WeightStore, elements, payload_bytes

_PIECE = 3 << 18
"""Bytes; it holds whole elements of every dtype (6 bits to 16 bytes)."""

Side = tuple[WeightStore, TensorProto]


def compare(a: Side, b: Side) -> Values | None:
    """How two tensors of one dtype and shape differ; None where no bit does.

    Raises InvalidModelError where a payload cannot be read.
    """
    kind = a[1].data_type
    if kind == TensorProto.STRING:
        return _strings(a[1].string_data, b[1].string_data)
    total, bits, start = elements(a[1]), _bits(kind), 0
    sums, largest = np.zeros(3, np.int64), None
    for one, two in zip(_pieces(a), _pieces(b), strict=True):
        count = min(len(one) * 8 // bits, total - start)
        if not np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)):
            counts, most = _differ(_array(one, kind, count), _array(two, kind, count))
            sums += counts
            known = [value for value in (largest, most) if value is not None]
            largest = max(known, default=None)
        start += count
    changed, same_value, nonfinite = map(int, sums)
    if not changed:
        return None  # at most the padding of packed elements
    return Values(total, changed, same_value, nonfinite, largest)


def digest(side: Side) -> bytes:
    """sha256 of a tensor's payload in raw form."""
    state = hashlib.sha256()
    store, tensor = side
    if tensor.data_type == TensorProto.STRING:
        for item in tensor.string_data:
            state.update(len(item).to_bytes(8, "little") + item)
        return state.digest()
    for chunk in store.chunks(tensor):
        state.update(chunk)
    return state.digest()


def sparse_dims(sparse: SparseTensorProto) -> TensorProto:
    """The dims of a sparse tensor, as a tensor."""
    dims = TensorProto(data_type=TensorProto.INT64, dims=[len(sparse.dims)])
    dims.int64_data.extend(sparse.dims)
    return dims


def _pieces(side: Side) -> Iterator[Buffer]:
    """The raw payload in pieces of _PIECE bytes, the last one shorter."""
    rest = b""
    for chunk in side[0].chunks(side[1]):
        view = memoryview(rest + chunk if rest else chunk)
        whole = len(view) // _PIECE * _PIECE
        for start in range(0, whole, _PIECE):
            yield view[start : start + _PIECE]
        rest = bytes(view[whole:])
    if rest:
        yield rest


def _bits(kind: int) -> int:
    """Bits of one element."""
    return payload_bytes(kind, 8)


def _array(piece: Buffer, kind: int, count: int) -> Array:
    tensor = TensorProto(dims=[count], data_type=kind, raw_data=bytes(piece))
    array: Array = numpy_helper.to_array(tensor)
    return array


def _differ(a: Array, b: Array) -> tuple[tuple[int, int, int], float | None]:
    """(changed, same value, nonfinite) and the largest finite difference."""
    size = a.dtype.itemsize
    bits = [np.ascontiguousarray(x).view(np.uint8).reshape(-1, size) for x in (a, b)]
    mask = (bits[0] != bits[1]).any(axis=1)
    a, b = _numbers(a[mask]), _numbers(b[mask])
    with np.errstate(all="ignore"):
        same = (a == b) | ((a != a) & (b != b))
        apart = _distance(a[~same], b[~same])
    finite = apart[np.isfinite(apart)] if apart.dtype.kind == "f" else apart
    largest = float(finite.max()) if len(finite) else None
    return (len(a), int(same.sum()), len(apart) - len(finite)), largest


def _numbers(values: Array) -> Array:
    """Elements of any dtype in one that NumPy computes in."""
    if values.dtype.kind in "iufc":
        return values.astype({"f": "f8", "c": "c16"}.get(values.dtype.kind, values.dtype))
    if values.dtype.kind == "b" or "int" in values.dtype.name:
        return values.astype(np.int64)
    return values.astype(np.float32).astype(np.float64)


def _distance(a: Array, b: Array) -> Array:
    """|a - b|, of integers without overflow."""
    if a.dtype.kind in "iu":
        # modulo 2**64 the difference of the larger and the smaller is right
        high, low = np.maximum(a, b), np.minimum(a, b)
        return high.astype(np.uint64) - low.astype(np.uint64)
    apart: Array = np.abs(a - b)
    return apart


def _strings(a: Iterable[bytes], b: Iterable[bytes]) -> Values | None:
    pairs = list(zip(a, b, strict=True))
    changed = sum(one != two for one, two in pairs)
    return Values(len(pairs), changed, 0, 0, None) if changed else None
