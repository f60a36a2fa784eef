"""Whether QuantizeLinear gives back the codes that DequantizeLinear was given.

With q a code, z the zero point and s the scale, q - z is exact, the product p = (q - z) s
is rounded once and p / s once more. So p / s is off from q - z by less than
|q - z| 2^-22 in float32, which is far below one half for 8 bits, and rounds to q - z.
That holds while p is a normal number: denormal scales are multiples of 2^-149, so the
product is exact or rounded as before, but p can overflow to infinity, and 16 bits are
too many for 11 digits of float16 (8 of bfloat16, 24 of float32 with 16 bits are enough).
So nothing rests on this argument alone: every code is tried, with every distinct pair of
scale and zero point.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxopt import attributes
from onnxopt.evaluate import EvaluationError, Evaluator
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.quantization.parameters import Parameters, code_limits
from onnxopt.quantization.quantize_linear import quantize
from onnxopt.weights import PACKED_BITS, Array

_INTEGERS = "INT2 UINT2 INT4 UINT4 INT8 UINT8 INT16 UINT16"
INTEGER_CODES = frozenset(TensorProto.DataType.Value(name) for name in _INTEGERS.split())
MAX_CODES = 1 << 22
"""So many are tried at a time."""
NEAR = 0.25
"""In bfloat16, of which much is unknown, the ratio stays away from the next code."""


class RoundTrips(msgspec.Struct):
    """Tries codes, those of equal parameters once."""

    evaluator: Evaluator
    _known: dict[tuple[object, ...], str | None] = msgspec.field(default_factory=dict)

    def check(
        self, graph: GraphView, first: NodeProto, second: NodeProto, made: Parameters
    ) -> None:
        """Raises DeclinedError where some code changes from DequantizeLinear `first` to
        QuantizeLinear `second`, both with the parameters `made`.
        """
        settings = _settings(first), _settings(second)
        arrays = (made.scale, made.zero_point)
        key = (
            graph.opset(),
            *(tuple(sorted(items.items())) for items in settings),
            *((str(array.dtype), array.shape, array.tobytes()) for array in arrays),
        )
        if key not in self._known:
            self._known[key] = self._reason(graph, *settings, made)
        reason = self._known[key]
        if reason is not None:
            raise DeclinedError(reason)

    def _reason(
        self,
        graph: GraphView,
        first: dict[str, Any],
        second: dict[str, Any],
        made: Parameters,
    ) -> str | None:
        if made.is_blocked:
            return "its codes are in blocks"
        codes = _all_codes(made.data_type)
        for scale, zero in _pairs(made, len(codes)):
            batch = np.broadcast_to(codes, (len(scale), len(codes)))
            back = None
            if scale.dtype == ml_dtypes.bfloat16:
                if not _is_safe(batch, Parameters(scale, zero, 0)):
                    return "some code may change in bfloat16"
                continue
            if not first and not second:
                back = _in_numpy(batch, Parameters(scale, zero, 0))
            if back is None:
                try:
                    model = _model(graph.opset(), batch, scale, zero, first, second)
                    back = self.evaluator.evaluate(model)["back"]
                except EvaluationError as error:
                    return f"its round trip could not be computed: {error}"
            changed = _bits(back) != _bits(batch)
            if changed.any():
                row, column = np.argwhere(changed)[0]
                return (
                    f"code {codes[column]} of scale {scale[row]!s} "
                    f"comes back as {back[row, column]}"
                )
        return None


def _settings(node: NodeProto) -> dict[str, Any]:
    """The attributes besides the axis, which the codes to be tried do not have."""
    return {
        item.name: attributes.value_of(item)
        for item in node.attribute
        if item.name != "axis"
    }


def _all_codes(data_type: int) -> Array:
    """Every value of an integer type; every pattern of bits of a float type."""
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    if data_type in INTEGER_CODES:
        low, high = code_limits(data_type)
        return np.arange(low, high + 1).astype(dtype)
    return np.arange(1 << PACKED_BITS.get(data_type, 8), dtype=np.uint8).view(dtype)


def _pairs(made: Parameters, count: int) -> Iterator[tuple[Array, Array]]:
    """The distinct pairs of scale and zero point, some at a time."""
    scale, zero = made.scale.reshape(-1), made.zero_point.reshape(-1)
    seen = {
        (one.tobytes(), other.tobytes()): index
        for index, (one, other) in enumerate(zip(scale, zero, strict=True))
    }
    distinct = np.array(sorted(seen.values()))
    step = max(1, MAX_CODES // count)
    for start in range(0, len(distinct), step):
        part = distinct[start : start + step]
        yield scale[part], zero[part]


def _in_numpy(codes: Array, made: Parameters) -> Array | None:
    """Of 8-bit codes with float32 scales; None where a product is not finite."""
    with np.errstate(over="ignore"):
        return quantize(made.dequantized(codes), made.scale, made.zero_point, 0)


def _is_safe(codes: Array, made: Parameters) -> bool:
    """Of bfloat16 scales, for which ONNX Runtime has no kernel: whether codes come back.

    The ratio is taken in float32. Where it is near enough to the whole number, it rounds
    to that in bfloat16 as well, in which whole numbers up to 256 are exact.
    """
    if made.data_type not in INTEGER_CODES:
        return False
    wide = made.spread(made.scale, codes.shape).astype(np.float32)
    zero = made.spread(made.zero_point, codes.shape).astype(np.int64)
    whole = codes.astype(np.int64) - zero
    with np.errstate(over="ignore"):
        values = (whole.astype(np.float32) * wide).astype(made.scale.dtype)
        ratio = values.astype(np.float32) / wide
    return bool((np.abs(ratio - whole) < NEAR).all())


def _model(
    opset: int,
    codes: Array,
    scale: Array,
    zero: Array,
    first: dict[str, Any],
    second: dict[str, Any],
) -> ModelProto:
    """Both nodes on `codes`, with one scale for each row."""
    single = len(scale) == 1  # before opset 13 there is no axis
    if single:
        scale, zero = scale.reshape(()), zero.reshape(())
    axis: dict[str, Any] = {} if single else {"axis": 0}
    pair = ["scale", "zero"]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", *pair], ["x"], **axis, **first),
        helper.make_node("QuantizeLinear", ["x", *pair], ["back"], **axis, **second),
    ]
    arrays = {"q": codes, "scale": scale, "zero": zero}
    graph = helper.make_graph(
        nodes,
        "round_trip",
        [],
        [helper.make_empty_tensor_value_info("back")],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    made: ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return made


def _bits(codes: Array) -> Array:
    """Codes as integers, so that NaN is equal to itself."""
    if codes.dtype.kind in "iu":
        return codes
    if codes.dtype.itemsize == 1:
        return np.ascontiguousarray(codes).view(np.uint8)
    return codes
