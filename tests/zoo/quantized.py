"""A masked network after static quantization by ONNX Runtime, and what has to go then.

Weights are symmetric: what is zero has the code of zero, and so has what it makes.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import onnx
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
        )
        model = onnx.load(target)
    names = {tensor.name for tensor in model.graph.initializer}
    expected = [
        each if each.weight in names else replace(each, weight=f"{each.weight}_quantized")
        for each in given.expected
    ]
    assert {each.weight for each in expected} <= names
    return replace(given, model=model, expected=expected)
