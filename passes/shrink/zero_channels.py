"""zero-channels: take out channels that are zero, constant, or that nothing reads.

    t = Conv(x, W, b)    W[3] = 0, b[3] = c        t = Conv(x, W', b')   without row 3
    y = Conv(t, V)                          ->     y = Conv(t, V', d)    nor column 3
                                                   d = c * sum(V[:, 3])

1. A channel goes where all that share it agree: what is added, multiplied, normalized,
   concatenated or pooled with it, along residual streams, through Reshape and Transpose.
2. What a constant channel adds goes into the next bias. Where padding makes the border
   differ, the constants of a value are collected in one channel, which stays:
   conv(c, w) = conv(k, w c / k), whatever the border.
3. A channel that only zero weights read goes with the filter that makes it.
4. Heads of attention, and dims of all heads, go from queries, keys, values and what
   follows; the scale of the scores stays. RMSNorm makes up for the channels it loses.
5. Inputs, outputs and operators without a rule keep what they touch, and so does what an
   operator turns into Inf or NaN. Activations are taken to be finite: 0 * x is 0.

Source: the facts are those of constant propagation over the lattice zero < constant < map
< dynamic, the groups those of Fang et al., DepGraph (https://arxiv.org/abs/2301.12900),
found from operators instead of gradients.
"""

from __future__ import annotations

from typing import ClassVar

from onnxopt.channels.decision import Decision
from onnxopt.channels.engine import analyse
from onnxopt.channels.groups import Groups
from onnxopt.channels.removal import remove
from onnxopt.channels.rules.table import rule_of
from onnxopt.channels.survey import dead_outputs
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee


class ZeroChannels(Pass):
    """Remove channels that are zero, constant or unused, with all that goes with them."""

    name: ClassVar[str] = "zero-channels"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """One analysis, then one edit for each group of values that share channels."""
        if graph.is_function:
            _decline(graph)
            return
        analysis = analyse(graph, context.evaluator)
        if not analysis.has_findings or self.name in analysis.settled:
            return
        decision = Decision(Groups(analysis))
        dead = list(dead_outputs(decision))
        if not remove(decision):
            analysis.settled.add(self.name)
        for layer in dead:
            for reason, count in layer.kept_by.items():
                graph.skip(layer.node, f"{count} dead channels stay: {reason}")


def _decline(graph: GraphView) -> None:
    """Say it once, of the first layer: no shapes are known in a function's body."""
    nodes = graph.nodes()
    layers = (node for node in nodes if rule_of(graph, node).layer_axis is not None)
    first = next(layers, None)
    if first is not None:
        graph.skip(first, "the sizes in a function's body differ from call to call")
