"""Layers whose weights are rounded in the graph, in the ways that frameworks write it.

A rule of rounding takes a weight and the axis of its channels and gives the weight as the
quantized layer computes with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.quantize import ActivationQuantizer

Rule = Callable[[Tensor, int], Tensor]

LARGEST_CODE = 63.0
"""Of 127: without VNNI, int8 kernels add two products of u8 and s8 in 16 bits, and what
they saturate would hide what a rewrite does."""


def channel_scale(weight: Tensor, axis: int, keepdim: bool = False) -> Tensor:
    """Abs-max / LARGEST_CODE of each channel."""
    others = [dim for dim in range(weight.dim()) if dim != axis]
    return weight.detach().abs().amax(others, keepdim).clamp(min=1e-8) / LARGEST_CODE


def per_channel(weight: Tensor, axis: int) -> Tensor:
    """One operator; the graph computes the scale from the weight."""
    scale = channel_scale(weight, axis)
    zero = torch.zeros(weight.shape[axis], dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -128, 127)


def per_tensor(weight: Tensor, axis: int) -> Tensor:
    """`per_channel` with one scale for all channels."""
    scale = weight.detach().abs().max() / LARGEST_CODE
    zero = torch.zeros((), dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(weight, scale, zero, -128, 127)


def decomposed(weight: Tensor, axis: int) -> Tensor:
    """Written out, to a symmetric -127..127, as training code of users does it."""
    scale = channel_scale(weight, axis, keepdim=True)
    return torch.clamp(torch.round(weight / scale), -127, 127) * scale


class Stored(nn.Module):
    """`per_channel` with scales as buffers: what observers leave behind."""

    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("scale", channel_scale(weight, axis))
        channels = weight.shape[axis]
        self.register_buffer("zero", torch.zeros(channels, dtype=torch.int32))

    def forward(self, weight: Tensor, axis: int) -> Tensor:
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale, self.zero, axis, -128, 127
        )


class DecomposedActivation(ActivationQuantizer):
    """Divide, round, shift, clip and back, with the learned range."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed is None:
            return super().forward(x)
        scale, zero = self.fixed
        codes = torch.clamp(torch.round(x / scale) + zero, 0, 255)
        return (codes - zero) * scale


class Quantized(nn.Module):
    """A Conv, ConvTranspose or Linear that multiplies by its rounded weight.

    `rule`: None for stored scales.
    """

    def __init__(self, layer: nn.Module, rule: Rule | None) -> None:
        super().__init__()
        self.layer = layer
        self.axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        self.rule = Stored(layer.weight, self.axis) if rule is None else rule

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.rule(self.layer.weight, self.axis)
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight, layer.bias)
        if isinstance(layer, nn.ConvTranspose2d):
            return functional.conv_transpose2d(
                x, weight, layer.bias, layer.stride, layer.padding
            )
        return layer._conv_forward(x, weight, layer.bias)


class QuantizedLSTM(nn.Module):
    """An LSTM of one direction with both its weights rounded per tensor or channel."""

    def __init__(self, lstm: nn.LSTM, rule: Rule | None) -> None:
        super().__init__()
        self.lstm = lstm
        weights = (lstm.weight_ih_l0, lstm.weight_hh_l0)
        self.rules = [Stored(w, 0) if rule is None else rule for w in weights]
        self.stored = nn.ModuleList([r for r in self.rules if isinstance(r, Stored)])

    def forward(self, x: Tensor) -> Tensor:
        lstm = self.lstm
        start = x.new_zeros(1, x.shape[0], lstm.hidden_size)
        weights = [
            self.rules[0](lstm.weight_ih_l0, 0),
            self.rules[1](lstm.weight_hh_l0, 0),
            lstm.bias_ih_l0,
            lstm.bias_hh_l0,
        ]
        found = torch._VF.lstm(
            x, (start, start), weights, True, 1, 0.0, False, False, True
        )
        return found[0]
