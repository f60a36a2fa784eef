"""Layers that store integers: weight-only int8 and int4, and torch's eager int8."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.ao import quantization as eager
from torch.nn import functional

from models.quantized.networks import SEED, images

WIDTH = 96  # squared more than 8,192: the dynamo exporter folds smaller weights to float
GROUP = 32


class IntegerLinear(nn.Module):
    """y = x W' + b, W int8, cast in the graph; the scale goes on W or on the product."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, form: Literal["weight", "zero point", "result"]) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.form = form
        codes = torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8)
        zero = torch.randint(-9, 10, (WIDTH, 1), dtype=torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.rand(WIDTH, 1) * 1e-3 + 1e-4)
        self.register_buffer("zero", zero)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes.to(x.dtype)
        if self.form == "result":
            return functional.linear(x, weight) * self.scale.view(-1) + self.bias
        if self.form == "zero point":
            weight = weight - self.zero.to(x.dtype)
        return functional.linear(x, weight * self.scale, self.bias)


class GroupedLinear(nn.Module):
    """Four-bit codes in int8, a scale for each 32 inputs of an output."""

    codes: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        shape = (WIDTH, WIDTH // GROUP, GROUP)
        codes = torch.randint(-8, 8, shape, dtype=torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.rand(WIDTH, WIDTH // GROUP, 1) * 1e-2 + 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.codes.to(x.dtype) * self.scale).reshape(WIDTH, WIDTH)
        return functional.linear(x, weight)


def eager_net() -> nn.Module:
    """torch.ao's eager mode, converted: weights and biases are integers already."""
    torch.manual_seed(SEED)
    torch.backends.quantized.engine = "x86"
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)]
    model = nn.Sequential(eager.QuantStub(), *layers, eager.DeQuantStub()).eval()
    model.qconfig = eager.get_default_qconfig("x86")
    model = eager.prepare(eager.fuse_modules(model, [["1", "2"]]))
    for sample in images():
        model(sample)
    return eager.convert(model)
