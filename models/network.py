"""The network of our own models: a small residual CNN for 28x28 grey images.

Two kinds of residual block share one stream: `standard` (two 3x3 convolutions) and
`separable` (3x3 depthwise, 1x1 pointwise).  Every convolution is followed by its own
BatchNorm, and each block ends in ReLU(branch + skip), so a branch whose last BatchNorm
is zeroed leaves ReLU(skip): a block that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm, and ReLU where `relu` is set.

    `bn` becomes Identity when it is folded, `quantize` becomes a fake quantizer when
    quantization-aware training starts: both change without touching the blocks.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        )
        self.bn: nn.Module = nn.BatchNorm2d(outputs)
        self.relu: nn.Module = nn.ReLU() if relu else nn.Identity()
        self.quantize: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(self.relu(self.bn(self.conv(x))))


class Residual(nn.Module):
    """ReLU(branch(x) + skip(x)); the skip is the identity or a 1x1 projection."""

    def __init__(self, branch: nn.Module, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.skip = skip if skip is not None else nn.Identity()
        self.relu = nn.ReLU()
        self.quantize: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(self.relu(self.branch(x) + self.skip(x)))


def standard(inputs: int, outputs: int, stride: int = 1) -> Residual:
    branch = nn.Sequential(
        ConvBN(inputs, outputs, 3, stride=stride),
        ConvBN(outputs, outputs, 3, relu=False),
    )
    same = inputs == outputs and stride == 1
    return Residual(
        branch, None if same else ConvBN(inputs, outputs, 1, stride=stride, relu=False)
    )


def separable(width: int) -> Residual:
    return Residual(
        nn.Sequential(
            ConvBN(width, width, 3, groups=width),
            ConvBN(width, width, 1, relu=False),
        )
    )


class FashionNet(nn.Module):
    """Stem, three stages of residual blocks (14x14, 7x7, 4x4), pool, linear head."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = ConvBN(1, first, 3)
        self.shrink = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(
            standard(first, first),
            separable(first),
            standard(first, second, stride=2),
            separable(second),
            standard(second, second),
            standard(second, third, stride=2),
            separable(third),
            standard(third, third),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(third, 10)
        # Fake quantizers for the three places no ConvBN or Residual covers.
        self.quantize_input: nn.Module = nn.Identity()
        self.quantize_pool: nn.Module = nn.Identity()
        self.quantize_logits: nn.Module = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        x = self.shrink(self.stem(self.quantize_input(image)))
        # Runtimes fuse an int8 operator only with a quantizer right before and right
        # after it: MaxPool and Flatten keep the codes, so their quantizer is the one
        # before them, again.
        x = self.blocks(self.stem.quantize(x))
        x = self.quantize_pool(self.pool(x))
        x = self.quantize_pool(torch.flatten(x, 1))
        return self.quantize_logits(self.head(x))
