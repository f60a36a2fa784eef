"""What ONNX Runtime's own quantizers write, and blocked int4 weights by hand.

    python -m models.quantized.ort_exports

Run from the root of the repository with the `dev` extra (torch 2.13.0, onnxruntime
1.32.0).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from onnx.numpy_helper import from_array
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor, nn

from models.quantized.networks import SEED, images, vectors
from models.quantized.store import store

BLOCK = 32


class _Feeds(CalibrationDataReader):
    def __init__(self, samples: Sequence[Tensor]) -> None:
        self.feeds: Iterator[dict[str, Any]] = iter([{"x": x.numpy()} for x in samples])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def _float_model(model: nn.Module, sample: Tensor, opset: int) -> ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        model.eval(),
        (sample,),
        buffer,
        dynamo=False,
        opset_version=opset,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
    )
    return onnx.load_from_string(buffer.getvalue())


def _conv_net(opset: int) -> ModelProto:
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return _float_model(model, images()[0], opset)


def _linear_net() -> ModelProto:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    return _float_model(model, vectors(5, 64)[0], 17)


def static(name: str, opset: int = 17, **options: Any) -> None:
    """Per channel, 7-bit weights; the other options are those of quantize_static."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        reader = _Feeds(images())
        settings = {"per_channel": True, "reduce_range": True, **options}
        quantize_static(_conv_net(opset), path, reader, **settings)
        store(onnx.load(path), name)


def dynamic(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        kinds = ["Conv", "MatMul", "Gemm"]
        settings = {"per_channel": True, "reduce_range": True}
        quantize_dynamic(_conv_net(17), path, kinds, **settings)
        store(onnx.load(path), name)


def int4(name: str, form: QuantFormat, symmetric: bool) -> None:
    """MatMul weights in blocks: DequantizeLinear of int4, or MatMulNBits."""
    quantizer = MatMulNBitsQuantizer(
        _linear_net(), block_size=BLOCK, is_symmetric=symmetric, quant_format=form
    )
    quantizer.process()
    store(quantizer.model.model, name)


def blocked_int4(name: str) -> None:
    """A float weight behind blocked Q-DQ, the scale along axis 0, opset 21."""
    rng = np.random.default_rng(SEED)
    inputs, outputs = 128, 48
    weight = rng.standard_normal((inputs, outputs)).astype(np.float32)
    blocks = np.abs(weight).reshape(-1, BLOCK, outputs).max(1) / np.float32(7)
    zero = TensorProto(name="zero", data_type=TensorProto.INT4, dims=blocks.shape)
    zero.raw_data = bytes((blocks.size + 1) // 2)
    settings = {"axis": 0, "block_size": BLOCK}
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("QuantizeLinear", ["weight", "scale", "zero"], ["codes"], **settings),
            node("DequantizeLinear", ["codes", "scale", "zero"], ["w"], **settings),
            node("MatMul", ["x", "w"], ["y"]),
        ],
        "blocked",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])],
        [from_array(weight, "weight"), from_array(blocks, "scale"), zero],
    )
    opset = helper.make_opsetid("", 21)
    store(helper.make_model(graph, opset_imports=[opset], ir_version=10), name)


def main() -> None:
    unsigned = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    static("ort_qdq", quant_format=QuantFormat.QDQ, **unsigned)
    static("ort_qdq_opset21", 21, quant_format=QuantFormat.QDQ, **unsigned)
    static("ort_qoperator", quant_format=QuantFormat.QOperator, **unsigned)
    static(
        "ort_qdq_float_weights",
        13,
        quant_format=QuantFormat.QDQ,
        extra_options={
            "AddQDQPairToWeight": True,
            "QuantizeBias": False,
            "ActivationSymmetric": True,
        },
    )
    dynamic("ort_dynamic")
    int4("ort_int4_qdq", QuantFormat.QDQ, symmetric=True)
    int4("ort_int4_nbits", QuantFormat.QOperator, symmetric=False)
    blocked_int4("blocked_int4")


if __name__ == "__main__":
    main()
