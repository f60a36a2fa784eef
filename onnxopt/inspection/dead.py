"""Which channels of layers are dead, which of them can go, and what keeps the rest.

Unlike a count of zeros in weights this follows channels through the graph: a filter that
is not zero is dead behind a BatchNormalization whose scale is.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from onnxopt.channels.decision import Decision
from onnxopt.channels.engine import analyse
from onnxopt.channels.groups import Groups
from onnxopt.channels.survey import dead_outputs
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
    for found in dead_outputs(Decision(Groups(analysis))):
        yield DeadChannels(
            node=view.label(found.node),
            scope=view.scope,
            op=view.op(found.node),
            channels=found.channels,
            zero=found.zero,
            constant=found.constant,
            unused=found.unused,
            removable=found.removable,
            kept_by=found.kept_by,
        )
