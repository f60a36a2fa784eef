"""What Brevitas exports: QONNX's `Quant`, and Q-Clip-DQ.

    python -m models.quantized.brevitas_exports

Run from the root of the repository in an environment with torch 2.13.0 and
`pip install --no-deps brevitas==0.13.4 dependencies==2.0.1 unfoldNd onnxoptimizer`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import onnx
import torch
from brevitas.export import export_onnx_qcdq, export_qonnx
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFloat,
)
from torch import Tensor, nn

from models.quantized.networks import SEED, images
from models.quantized.store import store


class Net(nn.Module):
    """Convolution, depthwise convolution and a linear layer."""

    def __init__(self, weights: type, bits: int) -> None:
        super().__init__()
        options = {"weight_quant": weights, "weight_bit_width": bits}
        relu = {"act_quant": Uint8ActPerTensorFloat}
        self.layers = nn.Sequential(
            qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat),
            qnn.QuantConv2d(3, 16, 3, **options),
            qnn.QuantReLU(**relu),
            qnn.QuantConv2d(16, 16, 3, groups=16, **options),
            qnn.QuantReLU(**relu),
            nn.Flatten(),
            qnn.QuantLinear(256, 10, True, **options),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _net(weights: type, bits: int) -> nn.Module:
    torch.manual_seed(SEED)
    model = Net(weights, bits).train()
    for sample in images():
        model(sample)
    return model.eval()


def _store(export: Any, model: nn.Module, name: str, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with torch.no_grad():
            model(images()[0])
        names = {"input_names": ["x"], "output_names": ["y"]}
        export(model, (images()[0],), export_path=str(path), **names, **options)
        store(onnx.load(path), name)


def main() -> None:
    legacy: dict[str, Any] = {"dynamo": False, "opset_version": 17}
    dynamo: dict[str, Any] = {"dynamo": True, "opset_version": 18}
    channels = _net(Int8WeightPerChannelFloat, 7)
    _store(export_qonnx, channels, "brevitas_qonnx", **legacy)
    _store(export_onnx_qcdq, channels, "brevitas_qcdq", **legacy)
    _store(export_onnx_qcdq, channels, "brevitas_qcdq_dynamo", **dynamo)
    _store(
        export_qonnx, _net(Int8WeightPerTensorFloat, 4), "brevitas_qonnx_int4", **legacy
    )


if __name__ == "__main__":
    main()
