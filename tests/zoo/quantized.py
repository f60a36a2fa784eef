"""A masked network after static quantization by ONNX Runtime, and what has to go then.

Weights are symmetric: what is zero has the code of zero, and so has what it makes.

The arithmetic is exact on every machine, so that one code too many is an error and not a
sum in another order: scales are powers of two, and weights have 7 bits, for kernels that
add two products of uint8 and int8 in 16 bits saturate with 8.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx.numpy_helper import from_array, to_array
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from tests.zoo.masks import Masked
from tests.zoo.toolkit import Array


class Reader(CalibrationDataReader):
    def __init__(self, feeds: Iterable[dict[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        """The next one."""
        return next(self._feeds, None)


def quantize(
    given: Masked,
    feeds: Iterable[dict[str, Array]],
    *,
    operators: bool = False,
    per_channel: bool = True,
) -> Masked:
    """With QuantizeLinear and DequantizeLinear; `operators`: as QLinearConv and the like.

    The codes of weight W are called W_quantized.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "quantized.onnx"
        quantize_static(
            copy.deepcopy(given.model),  # its weights may be moved to a file
            target,
            Reader(feeds),
            quant_format=QuantFormat.QOperator if operators else QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        model = onnx.load(target)
    make_exact(model)
    names = {tensor.name for tensor in model.graph.initializer}
    expected = [
        each if each.weight in names else replace(each, weight=f"{each.weight}_quantized")
        for each in given.expected
    ]
    assert {each.weight for each in expected} <= names
    return replace(given, model=model, expected=expected)


def make_exact(model: onnx.ModelProto) -> None:
    """Let every scale be the next power of two: a network like it, without rounding."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scale"):
            scale = to_array(tensor)
            rounded = np.exp2(np.ceil(np.log2(scale))).astype(scale.dtype)
            tensor.CopyFrom(from_array(rounded, tensor.name))
