"""The dead channels of each layer, and what keeps those that stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from onnx import NodeProto

from onnxopt.channels import demand
from onnxopt.channels.decision import Decision
from onnxopt.channels.groups import Slot


class DeadOutputs(NamedTuple):
    """Output channels of `node` that make no difference, each counted once.

    `zero` and `constant` by value, `unused` those of the others that nothing depends
    on; `removable` go, and `kept_by` says what keeps how many of the rest.
    """

    node: NodeProto
    channels: int
    zero: int
    constant: int
    unused: int
    removable: int
    kept_by: dict[str, int]


def dead_outputs(decision: Decision) -> Iterator[DeadOutputs]:
    """Layers with dead channels, in order."""
    groups = decision.groups
    for node in groups.graph.nodes():
        a = groups.analysis
        for index, axes in list(a.rule(node).seeds(a, node))[:1]:
            slot = groups.slots.get((node.output[index], axes))
            found = _of_layer(decision, node, slot) if slot is not None else None
            if found is not None:
                yield found


def _of_layer(decision: Decision, node: NodeProto, slot: Slot) -> DeadOutputs | None:
    a, size = decision.groups.analysis, slot.size
    fact = a.fact(slot.name)
    is_zero = is_const = np.zeros(size, bool)
    if fact is not None:
        along = fact.over(slot.axes, slot.dims)
        is_const = along.is_const.reshape(-1)
        is_zero = along.is_zero.reshape(-1)
    unused = ~demand.over(a.demand(slot.name), slot.axes, slot.dims) & ~is_const
    dead = is_const | unused
    if not dead.any():
        return None
    goes = slot.of(decision.removed)
    stay = slot.atoms[dead & ~goes].tolist()
    return DeadOutputs(
        node=node,
        channels=size,
        zero=int(is_zero.sum()),
        constant=int((is_const & ~is_zero).sum()),
        unused=int(unused.sum()),
        removable=int((dead & goes).sum()),
        kept_by=dict(Counter(decision.reason(atom) or "" for atom in stay)),
    )
