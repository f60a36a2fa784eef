"""What is gone of masked networks of every family, and whether they compute the same.

    python benchmarks/zoo.py [--networks NAME ...] [--seed N] [--json FILE]

Builds each network of `tests/zoo` with random weights, masks 30, 50 and 70 % of the
channels of every group that is free to go (zeros, silenced norms, constants; and zeros
drawn for each layer alone, at 70 %), runs `onnxopt.shrink` and compares with what the
masks allow, which is known from how the network was built: indices of weight axes, those
left out that carry constants across a padding. Outputs are compared in ONNX Runtime
without optimizations, on three feeds of two sizes. Exits with 1 where a zero stays that
could go, more than 5 % of the constants do, or an output differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto

import onnxopt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import support
from tests.zoo import ZOO, feeds, masks
from tests.zoo.masks import Masked

SHARES = (0.3, 0.5, 0.7)
ENOUGH = {"constant": 0.95}
HEADER = (
    f"{'network':24}{'mask':10}{'share':>6}{'can go':>9}{'gone':>8}"
    f"{'parameters':>20}{'ratio':>7}  equal"
)


@dataclass(frozen=True)
class Row:
    """One masked network after the rewrite."""

    network: str
    kind: str
    share: float
    removable: int
    removed: int
    before: int
    after: int
    equal: bool

    @property
    def holds(self) -> bool:
        """Whether what is promised came out."""
        return self.equal and self.removed >= ENOUGH.get(self.kind, 1) * self.removable

    def __str__(self) -> str:
        sizes = f"{self.before} -> {self.after}"
        return (
            f"{self.network:24}{self.kind:10}{self.share:6.0%}{self.removable:9}"
            f"{self.removed:8}{sizes:>20}{self.after / self.before:7.2f}  "
            f"{'yes' if self.equal else 'NO'}{'' if self.holds else '  NOT MET'}"
        )


def cases(name: str, seed: int) -> Iterator[tuple[str, float, Masked | None]]:
    """Every mask of a network; None where it has nothing that could be masked so."""
    for kind in masks.KINDS:
        net = ZOO[name](seed)
        for share in SHARES:
            is_possible = kind != "norm" or net.norms
            given = masks.by_group(net, kind, share, seed) if is_possible else None
            yield kind, share, given
    yield "layers", 0.7, masks.by_layer(ZOO[name](seed), 0.7, seed)


def measured(name: str, kind: str, share: float, given: Masked) -> Row:
    """Shrink it and compare."""
    made = onnxopt.shrink(given.model, validate=False).model
    return Row(
        network=name,
        kind=kind,
        share=share,
        removable=given.removable,
        removed=min(given.removed(made), given.removable),
        before=parameters(given.model),
        after=parameters(made),
        equal=equal(given.model, made),
    )


def parameters(model: ModelProto) -> int:
    """Elements of all float constants."""
    return sum(
        int(np.prod(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.data_type == tensor.FLOAT
    )


def equal(source: ModelProto, made: ModelProto) -> bool:
    """Up to rounding, on every feed."""
    try:
        for feed in feeds(source):
            expected, found = support.run(source, feed), support.run(made, feed)
            support.assert_same(expected, found, "equivalent")
    except AssertionError:
        return False
    return True


def rows(names: Sequence[str], seed: int) -> Iterator[Row]:
    """Print as they come."""
    print(HEADER)
    for name in names:
        for kind, share, given in cases(name, seed):
            if given is None:
                continue
            row = measured(name, kind, share, given)
            print(row, flush=True)
            yield row


def main() -> int:
    """Print the table; 0 where every promise holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(ZOO), choices=list(ZOO))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = list(rows(options.networks, options.seed))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=2))
    print("no row of masked norms: the network has none that could be silenced")
    return 0 if all(row.holds for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
