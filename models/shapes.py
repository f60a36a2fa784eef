"""Importing this gives torch.export a rule that it lacks: shapes of a fake quantizer."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("aten::fake_quantize_per_tensor_affine_cachemask")
def _fake_quantize_shapes(
    x: Tensor, scale: float, zero_point: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """torch.export traces with shapes alone, and torch has no such rule for this one."""
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
