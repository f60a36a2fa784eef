"""The channels of each layer: which are dead, and what keeps those that stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from onnx import NodeProto

from onnxopt.channels import demand
from onnxopt.channels.decision import Decision
from onnxopt.channels.groups import Slot


class Outputs(NamedTuple):
    """Output channels of `node`, each counted once: dead or live.

    The dead make no difference: `zero` and `constant` by value, `unused` those of the
    others that nothing depends on. `removable` of these go; `kept_by` says what keeps
    how many of the rest, `needed_by` the same of the live ones.
    """

    node: NodeProto
    channels: int
    zero: int
    constant: int
    unused: int
    removable: int
    kept_by: dict[str, int]
    needed_by: dict[str, int]

    @property
    def dead(self) -> int:
        """How many make no difference."""
        return self.zero + self.constant + self.unused


def dead_outputs(decision: Decision) -> Iterator[Outputs]:
    """Layers with dead channels, in order."""
    return (found for found in outputs(decision) if found.dead)


def outputs(decision: Decision) -> Iterator[Outputs]:
    """All layers whose number of channels is known, in order."""
    groups = decision.groups
    for node in groups.graph.nodes():
        a = groups.analysis
        for index, axes in list(a.rule(node).seeds(a, node))[:1]:
            slot = groups.slots.get((node.output[index], axes))
            if slot is not None:
                yield _of_layer(decision, node, slot)


def _of_layer(decision: Decision, node: NodeProto, slot: Slot) -> Outputs:
    a, size = decision.groups.analysis, slot.size
    fact = a.fact(slot.name)
    is_zero = is_const = np.zeros(size, bool)
    if fact is not None:
        along = fact.over(slot.axes, slot.dims)
        is_const = along.is_const.reshape(-1)
        is_zero = along.is_zero.reshape(-1)
    unused = ~demand.over(a.demand(slot.name), slot.axes, slot.dims) & ~is_const
    dead = is_const | unused
    goes = slot.of(decision.removed)
    return Outputs(
        node=node,
        channels=size,
        zero=int(is_zero.sum()),
        constant=int((is_const & ~is_zero).sum()),
        unused=int(unused.sum()),
        removable=int((dead & goes).sum()),
        kept_by=decision.reasons(slot.atoms[dead & ~goes]),
        needed_by=decision.reasons(slot.atoms[~dead]),
    )
