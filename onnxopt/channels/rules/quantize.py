"""QuantizeLinear and DequantizeLinear: elementwise, with parameters along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import compute, demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, aligned, computed, fact
from onnxopt.channels.groups import Link, Side
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

TIE = 1e-3
"""A value this close (in steps) to the middle of two codes counts as unknown: rounding
before it could decide otherwise at run time."""


class Quantizing(Rule):
    """The scale and zero point of each channel go with it."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The codes of what is known; the values of known codes."""
        given, scale = a.fact(node.input[0]), a.array(node.input[1])
        if given is None or scale is None or attributes.get(node, "block_size", 0):
            return [None]
        axis, rank = attributes.get(node, "axis", 1), given.kinds.ndim
        parameters = [a.array(name) if name else None for name in node.input[1:]]
        if any(array is None for array in parameters):
            return [None]
        values = given.values
        if scale.size > 1:
            shape = list(values.shape)
            shape[axis % rank] = scale.size
            values = np.broadcast_to(values, shape)
        made = self._computed(a, node, values, parameters)
        if made is None:
            return [fact(np.minimum(given.kinds, Kind.MAP), given.values)]
        kinds = np.broadcast_to(given.kinds, values.shape)
        if node.op_type == "QuantizeLinear":
            steps = values.astype(np.float64) / _along(scale, axis, rank)
            near = np.abs(np.abs(steps % 1.0) - 0.5) < TIE
            kinds = np.where((kinds == Kind.CONST) & near, Kind.MAP, kinds)
        return [computed(kinds, made)]

    def _computed(
        self, a: Analysis, node: NodeProto, values: Array, parameters: list[Array | None]
    ) -> Array | None:
        if node.op_type == "DequantizeLinear":
            made = compute.dequantized(node, [values, *parameters])
        else:
            made = compute.quantized(node, [values, *parameters])
        if made is not None:
            return made
        return compute.evaluated(
            a.evaluator, node, [values, *parameters], a.graph.opset()
        )

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Of the input, what is needed of the result."""
        wanted: list[Demand] = [None] * len(node.input)
        wanted[0] = demand.onto(needs[0], a.shape(node.input[0]))
        return wanted

    def keeps_rows(self, link: Link) -> bool:
        """Every element is handed on by itself."""
        return True

    def link(self, link: Link) -> None:
        """Tie input and output, and the parameters where their axis is the slot's."""
        node, a = link.node, link.analysis
        if attributes.get(node, "block_size", 0):
            link.bar("it has a scale for each block")
            return
        rank = a.rank(node.input[0])
        if rank is None:
            link.bar("its rank is not known")
            return
        axis = attributes.get(node, "axis", 1) % max(rank, 1)
        if link.side == "in" and link.index > 0:
            own: tuple[int, ...] = (axis,)
        else:
            own = link.axes
        for side, index in link.ports():
            self._tie(link, side, index, own, axis)

    def _tie(
        self, link: Link, side: Side, index: int, own: tuple[int, ...], axis: int
    ) -> None:
        if side == "out" or index == 0:
            link.tie(side, index, own)
            return
        dims = link.analysis.shape(link.name(side, index))
        if dims is None:
            link.bar("the shape of its scale is not known")
        elif dims in ((), (1,)):
            return
        elif own == (axis,):
            link.tie(side, index, (0,))
        elif axis in own:
            link.bar("its scale has some of its axes only")


def _along(scale: Array, axis: int, rank: int) -> Array:
    if scale.size == 1:
        return aligned(scale.astype(np.float64).reshape(()), rank)
    shape = [1] * rank
    shape[axis % rank] = -1
    return scale.astype(np.float64).reshape(shape)
