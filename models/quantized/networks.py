"""The small networks, with random weights and observed activation ranges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.quantize import ActivationQuantizer
from models.quantized.layers import (
    DecomposedActivation,
    Quantized,
    QuantizedLSTM,
    Rule,
    decomposed,
)

SEED = 20241


def _activation(rule: Rule | None) -> ActivationQuantizer:
    return DecomposedActivation() if rule is decomposed else ActivationQuantizer()


def ready(model: nn.Module, samples: Sequence[Tensor]) -> nn.Module:
    """The model with the ranges that the samples gave, fixed, for inference.

    BatchNorm is in inference mode throughout.
    """
    for part in model.modules():
        part.training = isinstance(part, ActivationQuantizer)
    with torch.no_grad():
        for sample in samples:
            model(sample)
    for part in model.modules():
        if isinstance(part, ActivationQuantizer):
            part.fix()
    return model.eval()


def chain(layers: Sequence[nn.Module], rule: Rule | None) -> nn.Sequential:
    """Quantized layers, with activations quantized before the first and behind each.

    A ReLU or BatchNorm belongs to the layer in front of it.
    """
    parts: list[nn.Module] = [_activation(rule)]
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            parts.append(Quantized(layer, rule))
        else:
            parts.append(layer)
        following = layers[number + 1] if number + 1 < len(layers) else None
        moves = isinstance(layer, nn.Flatten)
        if not moves and not isinstance(following, nn.ReLU | nn.ReLU6 | nn.BatchNorm2d):
            parts.append(_activation(rule))
    return nn.Sequential(*parts)


def images(size: int = 8) -> list[Tensor]:
    rng = torch.Generator().manual_seed(SEED)
    return [torch.randn(2, 3, size, size, generator=rng) for _ in range(4)]


def conv_net(rule: Rule | None) -> nn.Module:
    """Standard, depthwise and pointwise convolution, a pool and a linear layer."""
    torch.manual_seed(SEED)
    layers = [
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ]
    return ready(chain(layers, rule), images())


def wide_net(rule: Rule | None) -> nn.Module:
    """A weight of more than 8,192 numbers: the dynamo exporter folds smaller ones."""
    torch.manual_seed(SEED)
    return ready(chain([nn.Linear(96, 96), nn.ReLU()], rule), vectors(3, 96))


def batch_norm_net(rule: Rule | None) -> nn.Module:
    """BatchNorm left behind quantized convolutions; half of its scales are negative."""
    torch.manual_seed(SEED)
    layers: list[nn.Module] = []
    for conv in (
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
        nn.Conv2d(24, 16, 1),
    ):
        norm = nn.BatchNorm2d(conv.out_channels)
        nn.init.uniform_(norm.weight, -1.0, 1.0)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        layers += [conv, norm, nn.ReLU()]
    return ready(chain(layers, rule), images())


def up_net(rule: Rule | None) -> nn.Module:
    """Transposed convolutions, whose output channels are axis 1 of the weight."""
    torch.manual_seed(SEED)
    layers = [
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 12, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 4, 3),
    ]
    return ready(chain(layers, rule), images())


def vectors(*shape: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(SEED)
    return [torch.randn(2, *shape, generator=rng) for _ in range(4)]


def linear_net(rule: Rule | None, shape: Sequence[int]) -> nn.Module:
    """Linear layers; rank 2 is exported as Gemm, rank 3 as MatMul of a transpose."""
    torch.manual_seed(SEED)
    layers = [nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 24, bias=False)]
    return ready(chain(layers, rule), vectors(*shape, 48))


class Recurrent(nn.Module):
    """A quantized LSTM between quantized activations, and a linear layer."""

    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.before, self.after = _activation(rule), _activation(rule)
        self.lstm = QuantizedLSTM(nn.LSTM(24, 32, batch_first=True), rule)
        self.head = Quantized(nn.Linear(32, 8), rule)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.lstm(self.before(x))))


def lstm_net(rule: Rule | None) -> nn.Module:
    torch.manual_seed(SEED)
    return ready(Recurrent(rule), vectors(5, 24))
