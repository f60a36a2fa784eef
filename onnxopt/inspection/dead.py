"""Which channels of layers are dead, which of them can go, and what keeps the others.

Unlike a count of zeros in weights this follows channels through the graph: a filter that
is not zero is dead behind a BatchNormalization whose scale is.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from onnxopt.channels.decision import Decision
from onnxopt.channels.engine import analyse
from onnxopt.channels.groups import Groups
from onnxopt.channels.survey import dead_outputs, outputs
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


class LayerChannels(DeadChannels, frozen=True):
    """All output channels of one layer; `needed_by`: what keeps how many of the live."""

    needed_by: dict[str, int] = {}


def layer_channels(model: Model, every: bool = False) -> list[LayerChannels]:
    """The layers of `model` that have dead channels, or every one, in order.

    Local functions are left out: there no shapes are known.
    """
    with Evaluator() as evaluator:
        return [
            found
            for view in model.views()
            if not view.is_function
            for found in _of_scope(view, evaluator, every)
        ]


def dead_channels(layers: list[LayerChannels]) -> list[DeadChannels]:
    """The layers among these that have dead channels."""
    names = DeadChannels.__struct_fields__
    return [
        DeadChannels(*(getattr(layer, name) for name in names))
        for layer in layers
        if layer.zero + layer.constant + layer.unused
    ]


def _of_scope(
    view: GraphView, evaluator: Evaluator, every: bool
) -> Iterator[LayerChannels]:
    analysis = analyse(view, evaluator)
    if not (every or analysis.has_findings):
        return
    decision = Decision(Groups(analysis))
    for found in outputs(decision) if every else dead_outputs(decision):
        yield LayerChannels(
            node=view.label(found.node),
            scope=view.scope,
            op=view.op(found.node),
            channels=found.channels,
            zero=found.zero,
            constant=found.constant,
            unused=found.unused,
            removable=found.removable,
            kept_by=found.kept_by,
            needed_by=found.needed_by,
        )
