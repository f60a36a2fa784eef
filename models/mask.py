"""Masks: half of the channels and two whole blocks of the network do nothing.

Sparse training leaves dead channels in more than one form, and so do these masks:

- by rows: the filter is zero and the BatchNorm behind it keeps its scale;
- by scale: the BatchNorm's scale is zero over a filter that is not.

In both forms the shift is zero (the channel is zero) or trained on (it is a constant).
The channels of a residual stream die together, in all that write to it; the depthwise
convolutions on it too.  A dead block has a branch whose last BatchNorm is all zero.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.network import ConvBN, FashionNet, Residual

SHARE = 0.5  # of the channels are dead
CONSTANT = 0.6  # of those have a shift
DEAD_BLOCKS = (3, 7)  # one separable, one standard; both have an identity skip


@dataclass(frozen=True)
class Kinds:
    """What is dead in the output of one ConvBN: boolean vectors [channels]."""

    dead: Tensor
    constant: Tensor  # dead, with a shift
    by_scale: Tensor  # dead by the BatchNorm's scale; the others by the filter's rows

    @classmethod
    def draw(cls, dead: Tensor, constant: Tensor, generator: torch.Generator) -> Kinds:
        by_scale = torch.rand(len(dead), generator=generator) < 0.5
        return cls(dead, dead & constant, dead & by_scale)


def choose(width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of `width` channels die, and which of these have a shift."""
    order = torch.randperm(width, generator=generator)
    count = int(width * SHARE)
    dead = torch.zeros(width, dtype=torch.bool)
    constant = torch.zeros(width, dtype=torch.bool)
    dead[order[:count]] = True
    constant[order[: round(count * CONSTANT)]] = True
    return dead, constant


def draw_masks(model: FashionNet, seed: int) -> dict[str, Kinds]:
    """The mask of every ConvBN, by the name of the module."""
    generator = torch.Generator().manual_seed(seed)
    names = {part: name for name, part in model.named_modules()}
    masks: dict[str, Kinds] = {}

    def add(part: nn.Module, dead: Tensor, constant: Tensor) -> None:
        masks[names[part]] = Kinds.draw(dead, constant, generator)

    stream = choose(_width(model.stem), generator)
    add(model.stem, *stream)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Residual)
        assert isinstance(block.branch, nn.Sequential)
        first, last = block.branch
        if isinstance(block.skip, ConvBN):  # a new stream starts
            before, stream = stream, choose(_width(last), generator)
            add(block.skip, *stream)
        else:
            before = stream
        is_depthwise = first.conv.groups > 1
        inner = before if is_depthwise else choose(_width(first), generator)
        add(first, *inner)
        nothing = torch.zeros_like(stream[0])
        if index in DEAD_BLOCKS:
            add(last, ~nothing, nothing)
        else:
            add(last, *stream)
    return masks


def _width(part: nn.Module) -> int:
    assert isinstance(part, ConvBN)
    return part.conv.out_channels


@torch.no_grad()
def start(model: FashionNet, masks: dict[str, Kinds]) -> None:
    """Give the shifts that stay a value above 0, so that a ReLU lets them through."""
    for name, kinds in masks.items():
        norm = model.get_submodule(name).bn
        norm.bias[kinds.constant] = norm.bias[kinds.constant].abs() + 0.1
        norm.running_mean[kinds.dead & ~kinds.by_scale] = 0
    apply(model, masks)


@torch.no_grad()
def apply(model: FashionNet, masks: dict[str, Kinds]) -> None:
    """Put the zeros back, after a step of training."""
    for name, kinds in masks.items():
        part = model.get_submodule(name)
        by_rows = kinds.dead & ~kinds.by_scale
        part.conv.weight[by_rows] = 0
        part.bn.weight[kinds.by_scale] = 0
        part.bn.bias[kinds.dead & ~kinds.constant] = 0


@torch.no_grad()
def apply_folded(model: FashionNet, masks: dict[str, Kinds]) -> None:
    """The same where BatchNorm is folded: the shift is the convolution's bias."""
    for name, kinds in masks.items():
        conv = model.get_submodule(name).conv
        conv.weight[kinds.dead] = 0
        conv.bias[kinds.dead & ~kinds.constant] = 0


def write(masks: dict[str, Kinds], target: Path) -> None:
    """As JSON: for each ConvBN the indices of its zero and of its constant channels."""
    table = {
        name: {
            "channels": len(kinds.dead),
            "zero": (kinds.dead & ~kinds.constant).nonzero().flatten().tolist(),
            "constant": kinds.constant.nonzero().flatten().tolist(),
        }
        for name, kinds in masks.items()
    }
    lines = [f'  "{name}": {json.dumps(entry)}' for name, entry in table.items()]
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
