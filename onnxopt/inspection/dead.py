"""Which channels of layers are dead, which of them can go, and what keeps the rest.

Unlike a count of zeros in weights this follows channels through the graph: a filter that
is not zero is dead behind a BatchNormalization whose scale is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec
import numpy as np
from onnx import NodeProto

from onnxopt.channels import demand
from onnxopt.channels.analysis import Analysis
from onnxopt.channels.decision import Decision
from onnxopt.channels.engine import analyse
from onnxopt.channels.groups import Groups, Slot
from onnxopt.evaluate import Evaluator
from onnxopt.graph import GraphView
from onnxopt.model import Model


class DeadChannels(msgspec.Struct, frozen=True):
    """The output channels of one layer that make no difference, each counted once.

    `zero` and `constant` by value; of the others, `unused` are those that nothing
    depends on. `removable` go with `onnxopt shrink`; `kept_by` says what keeps how many
    of the rest.
    """

    node: str
    scope: str
    op: str
    channels: int
    zero: int
    constant: int
    unused: int
    removable: int
    kept_by: dict[str, int]


def dead_channels(model: Model) -> list[DeadChannels]:
    """The layers of `model` that have dead channels, in order."""
    with Evaluator() as evaluator:
        return [
            found
            for view in model.views()
            if not view.is_function  # there no shapes are known
            for found in _of_scope(view, evaluator)
        ]


def _of_scope(view: GraphView, evaluator: Evaluator) -> Iterator[DeadChannels]:
    analysis = analyse(view, evaluator)
    if not analysis.has_findings:
        return
    decision = Decision(Groups(analysis))
    for node in view.nodes():
        slot = _slot(decision.groups, node)
        found = _of_layer(analysis, decision, node, slot) if slot is not None else None
        if found is not None:
            yield found


def _slot(groups: Groups, node: NodeProto) -> Slot | None:
    """The slot of a layer's output channels."""
    axis = groups.analysis.rule(node).layer_axis
    if axis is None:
        return None
    rank = groups.analysis.rank(node.output[0]) or 1
    return groups.slots.get((node.output[0], (axis % rank,)))


def _of_layer(
    a: Analysis, decision: Decision, node: NodeProto, slot: Slot
) -> DeadChannels | None:
    size, axis = slot.size, slot.axes[0]
    fact = a.fact(node.output[0])
    is_zero = is_const = np.zeros(size, bool)
    if fact is not None:
        along = fact.along(axis, size)
        is_const = along.is_const.reshape(-1)
        is_zero = along.is_zero.reshape(-1)
    unused = ~demand.channels(a.demand(node.output[0]), axis, size) & ~is_const
    dead = is_const | unused
    if not dead.any():
        return None
    goes = slot.of(decision.removed)
    stay = slot.atoms[dead & ~goes].tolist()
    return DeadChannels(
        node=a.graph.label(node),
        scope=a.graph.scope,
        op=a.graph.op(node),
        channels=size,
        zero=int(is_zero.sum()),
        constant=int((is_const & ~is_zero).sum()),
        unused=int(unused.sum()),
        removable=int((dead & goes).sum()),
        kept_by=dict(Counter(decision.reason(atom) or "" for atom in stay)),
    )
