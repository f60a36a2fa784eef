"""Values at the edge of a worker: what numpy lacks travels as the bytes that ORT keeps.

bfloat16, fp8 and the 2- and 4-bit types are ml_dtypes arrays on this side. ORT's Python
API can neither take nor give those, so they cross as `Raw`; ml_dtypes holds one element
a byte where ORT packs two or four.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from onnxopt._frames import Raw

# An array, a list of values (sequence), a dict (map), None (an empty optional),
# or a plain scalar inside a map.
Value: TypeAlias = Any


def to_wire(value: Value) -> Value:
    """Arrays of ml_dtypes types become Raw, the bytes that ORT keeps; others stay."""
    if isinstance(value, (list, tuple)):
        return [to_wire(item) for item in value]
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.type.__module__ == "numpy":
        return value
    import onnx.helper

    array = np.ascontiguousarray(value).reshape(value.shape)
    elem_type = int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
    codes = array.reshape(-1).view(f"u{array.itemsize}")
    if bits := _packed_bits(elem_type):
        codes = _pack_codes(codes, bits)
    return Raw(elem_type, array.shape, codes.tobytes())


def from_wire(value: Value) -> Value:
    """The opposite of `to_wire`."""
    if isinstance(value, list):
        return [from_wire(item) for item in value]
    if not isinstance(value, Raw):
        return value
    import onnx.helper

    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.elem_type))
    codes = np.frombuffer(value.data, dtype=np.uint8)
    if bits := _packed_bits(value.elem_type):
        codes = _unpack_codes(codes, bits, int(np.prod(value.shape, dtype=np.int64)))
    return codes.view(dtype).reshape(value.shape)


def _packed_bits(elem_type: int) -> int | None:
    """Bits of an element type that is packed several to a byte."""
    return {21: 4, 22: 4, 23: 4, 25: 2, 26: 2}.get(elem_type)


def _pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (one a byte) to packed bytes, the first element in the lowest bits."""
    a_byte = 8 // bits
    padded = np.zeros(-(-codes.size // a_byte) * a_byte, dtype=np.uint8)
    padded[: codes.size] = codes & (2**bits - 1)
    shifts = np.arange(a_byte, dtype=np.uint8) * np.uint8(bits)
    packed = np.bitwise_or.reduce(padded.reshape(-1, a_byte) << shifts, axis=1)
    return np.asarray(packed, dtype=np.uint8)


def _unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Packed bytes to codes, one a byte, as ml_dtypes holds them."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[:, None] >> shifts) & np.uint8(2**bits - 1)
    return np.asarray(codes.reshape(-1)[:count], dtype=np.uint8)
