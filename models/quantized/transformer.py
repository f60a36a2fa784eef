"""A small encoder with quantized linear layers and attention products."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.quantize import ActivationQuantizer
from models.quantized.layers import Quantized, per_channel
from models.quantized.networks import SEED, ready

WIDTH, HEADS, HIDDEN, LAYERS = 128, 4, 384, 2


def tokens() -> list[Tensor]:
    """Batches of embedded tokens, [batch, 16, WIDTH]."""
    rng = torch.Generator().manual_seed(SEED)
    return [torch.randn(2, 16, WIDTH, generator=rng) for _ in range(4)]


def _linear(inputs: int, outputs: int) -> Quantized:
    return Quantized(nn.Linear(inputs, outputs), per_channel)


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm and with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.query, self.key, self.value, self.out = (
            _linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.up, self.down = _linear(WIDTH, HIDDEN), _linear(HIDDEN, WIDTH)
        self.ranges = nn.ModuleList([ActivationQuantizer() for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.ranges[0](self._attend(self.ranges[1](self.norms[0](x)))))
        hidden = functional.relu(self.up(self.ranges[2](self.norms[1](x))))
        return x + self.down(self.ranges[3](hidden))

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = (
            self.ranges[4 + number](self._heads(layer(x)))
            for number, layer in enumerate((self.query, self.key, self.value))
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        weights = self.ranges[7](scores.softmax(-1))
        return (weights @ value).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)


def transformer() -> nn.Module:
    """Random weights, ranges as random tokens give them."""
    torch.manual_seed(SEED)
    model = nn.Sequential(*[Block() for _ in range(LAYERS)], nn.LayerNorm(WIDTH))
    return ready(model, tokens())
