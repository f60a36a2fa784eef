"""The masks of our masked models, and what is left of each convolution after a rewrite.

    python -m models.masks models/fashion_masked.onnx

A mask (`fashion_masked.json`) names, for the output of each convolution, the channels
that are zero and those that are constant.  Needs numpy and onnx, no torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto

MASK_FILE = Path(__file__).parent / "fashion_masked.json"


@dataclass(frozen=True)
class LayerMask:
    """How many channels a convolution has, and how many of them are dead."""

    channels: int
    zero: int
    constant: int

    @property
    def is_dead(self) -> bool:
        """Whether it is the end of a block that does nothing."""
        return self.zero == self.channels

    @property
    def live(self) -> int:
        """How many channels make a difference."""
        return self.channels - self.zero - self.constant


def masks() -> dict[str, LayerMask]:
    """The mask of each convolution, by the name of its module."""
    table = json.loads(MASK_FILE.read_text("utf-8"))
    return {
        name: LayerMask(entry["channels"], len(entry["zero"]), len(entry["constant"]))
        for name, entry in table.items()
    }


def dead_blocks() -> set[str]:
    """The blocks, as `blocks.3`, whose branch is zero."""
    return {
        name.rpartition(".branch")[0] for name, mask in masks().items() if mask.is_dead
    }


def filters(model: ModelProto) -> dict[str, int]:
    """How many filters each convolution has, by the name of its module."""
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight = node.input[1]
            while weight not in dims:
                weight = makers[weight].input[0]
            found[module(node)] = dims[weight][0]
    return found


def module(node: NodeProto) -> str:
    """`blocks.0.branch.1` for the node /blocks/blocks.0/branch/branch.1/conv/Conv."""
    parts = node.name.removesuffix("/conv/Conv").split("/")[1:]
    kept = [one for one, two in pairwise([*parts, ""]) if not two.startswith(f"{one}.")]
    return ".".join(kept)


@dataclass(frozen=True)
class Gone:
    """Dead channels of the convolutions outside of dead blocks: how many went."""

    dead: int
    zero: int
    constant: int
    removed: int
    live_removed: int
    blocks: int

    @property
    def constant_removed(self) -> int:
        """Of the constant ones; the zero ones count as gone first."""
        return max(0, self.removed - self.zero)


def compare(result: ModelProto) -> Gone:
    """What is gone in `result`, of what the mask says."""
    left, dead = filters(result), dead_blocks()
    inside = {
        name: mask
        for name, mask in masks().items()
        if name.rpartition(".branch")[0] not in dead
    }
    zero = sum(mask.zero for mask in inside.values())
    constant = sum(mask.constant for mask in inside.values())
    return Gone(
        dead=zero + constant,
        zero=zero,
        constant=constant,
        removed=sum(mask.channels - left[name] for name, mask in inside.items()),
        live_removed=sum(max(0, m.live - left[name]) for name, m in inside.items()),
        blocks=sum(not any(n.startswith(f"{b}.branch") for n in left) for b in dead),
    )


def main() -> None:
    for path in sys.argv[1:]:
        print(path, compare(onnx.load(path)))


if __name__ == "__main__":
    main()
