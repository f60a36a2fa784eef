"""What torchao's weight-only and PT2E quantization become in the dynamo exporter.

    python -m models.quantized.torchao_exports

Run from the root of the repository in an environment with torch 2.13.0 and
`pip install --no-deps torchao==0.18.0`.
"""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from models.quantized.networks import SEED, images, vectors
from models.quantized.store import store


def weight_only() -> None:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 96)).eval()
    quantize_(model, Int8WeightOnlyConfig())
    _store(model, vectors(128)[0], "torchao_int8_weights")


def pt2e() -> None:
    torch.manual_seed(SEED)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)).eval()
    traced = torch.export.export(model, (images()[0],)).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(reduce_range=True))
    prepared = prepare_pt2e(traced, quantizer)
    for sample in images():
        prepared(sample)
    _store(convert_pt2e(prepared), images()[0], "torchao_pt2e")


def _store(model: nn.Module, sample: torch.Tensor, name: str) -> None:
    exported = torch.export.export(model, (sample,))
    program = torch.onnx.export(
        exported,
        (),
        dynamo=True,
        opset_version=18,
        verbose=False,
        input_names=["x"],
        output_names=["y"],
    )
    assert program is not None
    store(program.model_proto, name)


if __name__ == "__main__":
    weight_only()
    pt2e()
