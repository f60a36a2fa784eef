"""Quantization-aware training: fold BatchNorm, then put fake quantizers in.

What an int8 runtime fuses gets one quantizer at its output: Conv(+ReLU), Add(+ReLU),
the pools, the linear head.  Weights: per channel, symmetric, -128..127, the scale
computed from the weight on every call, so that it follows the weight while training
(and is written into the graph by exporters that trace it).  Activations: per tensor,
0..255, the range a running average of what was seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.network import ConvBN, FashionNet, Residual

# Divided by 127 this is still a normal float32: a channel of zeros keeps a usable scale.
SMALLEST_RANGE = 1e-8


def weight_scale(weight: Tensor, smallest: float = SMALLEST_RANGE) -> Tensor:
    """One scale for each output channel (axis 0): abs-max / 127."""
    others = list(range(1, weight.dim()))
    return weight.abs().amax(others).clamp(min=smallest) / 127.0


class WeightQuantizer(nn.Module):
    """Rounds a weight to -128..127 steps of its channel's scale.

    `fixed` (set by `fix`) replaces the computed scale by a stored one, which is what a
    framework that keeps observers in its checkpoints exports.
    """

    zero_point: Tensor
    fixed: Tensor | None

    def __init__(self, channels: int, smallest: float) -> None:
        super().__init__()
        self.smallest = smallest
        zeros = torch.zeros(channels, dtype=torch.int32)
        self.register_buffer("zero_point", zeros, persistent=False)
        self.register_buffer("fixed", None, persistent=False)

    def fix(self, weight: Tensor) -> None:
        self.fixed = weight_scale(weight.detach(), self.smallest)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.fixed
        if scale is None:
            scale = weight_scale(weight.detach(), self.smallest)
        return torch.fake_quantize_per_channel_affine(
            weight, scale, self.zero_point, 0, -128, 127
        )


class ActivationQuantizer(nn.Module):
    """Rounds an activation to 0..255; `observe` says whether the range still moves."""

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, momentum: float = 0.02) -> None:
        super().__init__()
        self.momentum = momentum
        self.observe = True
        self.fixed: tuple[float, int] | None = None
        self.register_buffer("low", torch.tensor(torch.nan))
        self.register_buffer("high", torch.tensor(torch.nan))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        # The range holds zero, so that zero padding has an exact code.
        low, high = x.min().clamp(max=0.0), x.max().clamp(min=SMALLEST_RANGE)
        first = bool(self.high.isnan())
        self.low.copy_(low if first else self.low.lerp(low, self.momentum))
        self.high.copy_(high if first else self.high.lerp(high, self.momentum))
        self.scale.copy_((self.high - self.low) / 255.0)
        self.zero_point.copy_((-self.low / self.scale).round().clamp(0, 255))

    def fix(self) -> None:
        """Parameters as Python numbers: exporters know only this form of the operator."""
        self.observe = False
        self.fixed = self.scale.item(), int(self.zero_point.item())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.observe:
            self._update(x)
        scale, zero_point = self.fixed or (self.scale, self.zero_point)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)


class QuantConv2d(nn.Conv2d):
    def __init__(self, source: nn.Conv2d, smallest: float) -> None:
        super().__init__(
            source.in_channels,
            source.out_channels,
            source.kernel_size,
            stride=source.stride,
            padding=source.padding,
            groups=source.groups,
            bias=source.bias is not None,
        )
        self.load_state_dict(source.state_dict())
        self.quantize_weight = WeightQuantizer(source.out_channels, smallest)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.quantize_weight(self.weight), self.bias)


class QuantLinear(nn.Linear):
    def __init__(self, source: nn.Linear, smallest: float) -> None:
        super().__init__(source.in_features, source.out_features)
        self.load_state_dict(source.state_dict())
        self.quantize_weight = WeightQuantizer(source.out_features, smallest)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantize_weight(self.weight), self.bias)


def fold_batch_norm(model: nn.Module) -> None:
    """Every ConvBN's BatchNorm into its convolution, in place."""
    model.eval()
    for part in model.modules():
        if isinstance(part, ConvBN) and isinstance(part.bn, nn.BatchNorm2d):
            part.conv = nn.utils.fuse_conv_bn_eval(part.conv, part.bn)
            part.bn = nn.Identity()


def insert_quantizers(model: FashionNet, smallest: float) -> None:
    for part in model.modules():
        if isinstance(part, ConvBN | Residual):
            part.quantize = ActivationQuantizer()
        if isinstance(part, ConvBN):
            part.conv = QuantConv2d(part.conv, smallest)
    model.head = QuantLinear(model.head, smallest)
    model.quantize_input = ActivationQuantizer()
    model.quantize_pool = ActivationQuantizer()
    model.quantize_logits = ActivationQuantizer()


def freeze_ranges(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, ActivationQuantizer):
            part.observe = False


def fix_ranges(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, ActivationQuantizer):
            part.fix()


def fix_weight_scales(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, QuantConv2d | QuantLinear):
            part.quantize_weight.fix(part.weight)


def quantized(model: FashionNet, smallest: float = SMALLEST_RANGE) -> FashionNet:
    """`model` (changed in place) ready for quantization-aware training.

    `smallest`: the least range of a channel's weights.  Runtimes store a bias in int32
    steps of input scale x weight scale, which a bias over a filter of zeros outgrows
    where that scale is next to nothing.
    """
    fold_batch_norm(model)
    insert_quantizers(model, smallest)
    return model
