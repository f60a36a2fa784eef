"""What a rule answers, and the answers of an operator that nothing is known about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis
    from onnxopt.channels.groups import Link, Slot


class Rule:
    """An operator: by default one that mixes everything and lets nothing go.

    `drops_inputs`: whether it may leave something of an input unread although all of
    its output is needed. `layer_axis`: the axis of its output that it makes channels on.
    `data_axis`: the axis of its first input that is one of channels whatever comes
    before, where the operator knows only one such axis.
    """

    drops_inputs = False
    layer_axis: int | None = None
    data_axis: int | None = None

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """What is known of each output, from what is known of the inputs."""
        return [None] * len(node.output)

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """What is needed of each input, where `needs` is needed of the outputs."""
        return [None] * len(node.input)

    def link(self, link: Link) -> None:
        """Tie the slot that reaches `link.node` to the node's other slots, or bar it."""
        link.bar(f"there is no channel rule for {link.op}")

    def drops_operand(self, a: Analysis, node: NodeProto, slot: Slot) -> bool:
        """Whether `node` can do without an input of which all channels go."""
        return False


BARRIER = Rule()
