"""BatchNormalization outside of training: a scale and a shift for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels import demand
from onnxopt.channels.demand import Demand
from onnxopt.channels.facts import Fact, Kind, computed
from onnxopt.channels.groups import Link
from onnxopt.channels.rules.rule import Rule
from onnxopt.weights import Array

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis

Floats = npt.NDArray[np.float64]


class BatchNormalization(Rule):
    """y = gamma * (x - mean) / sqrt(var + epsilon) + beta."""

    drops_inputs = True
    data_axis = 1

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """A scale of zero leaves the shift, whatever comes in."""
        nothing: list[Fact | None] = [None] * len(node.output)
        rank, found = a.rank(node.output[0]), scale_and_shift(a, node)
        if rank is None or rank < 2 or found is None:
            return nothing
        scale, shift, dtype = found
        given = a.fact(node.input[0])
        if given is None and scale.all():
            return nothing
        shape = [1] * rank
        shape[1] = -1
        scale, shift = scale.reshape(shape), shift.reshape(shape)
        kinds = np.full(scale.shape, Kind.DYN, np.uint8)
        values = np.zeros(scale.shape)
        if given is not None:
            kinds = np.broadcast_to(
                given.kinds, np.broadcast_shapes(given.kinds.shape, scale.shape)
            )
            values = given.values.astype(np.float64)
        kinds = np.where((scale == 0) & (kinds != Kind.WILD), Kind.CONST, kinds)
        with np.errstate(all="ignore"):
            made = np.where(scale == 0, 0, values * scale) + shift
        return [computed(kinds, made.astype(dtype)), *nothing[1:]]

    def backward(
        self, a: Analysis, node: NodeProto, needs: Sequence[Demand]
    ) -> Sequence[Demand]:
        """Where the scale is zero, the input is not needed."""
        wanted: list[Demand] = [None] * len(node.input)
        found, rank = scale_and_shift(a, node), a.rank(node.input[0])
        if found is None or rank is None or rank < 2:
            return wanted
        need, scale = needs[0], found[0]
        if not scale.all():
            live = demand.along(scale != 0, 1, rank)
            assert live is not None
            need = live if need is None else np.asarray(need & live)
        wanted[0] = need
        return wanted

    def link(self, link: Link) -> None:
        """Everything has the same channels: data on axis 1, parameters on axis 0."""
        a, node = link.analysis, link.node
        if is_training(a, node):
            link.bar("it runs in training mode")
        elif link.side == "in" and link.index > 0:
            link.tie("in", 0, (1,))
        elif 1 not in link.axes:
            link.tie(link.opposite, 0, link.axes)
        elif len(link.axes) > 1:
            link.bar("its parameters have some of its axes only")
        elif (link.side, link.index) in (("in", 0), ("out", 0)):
            link.tie(link.opposite, 0, (1,))
            for index in range(1, 5):
                link.tie("in", index, (0,))
        else:
            link.bar("it runs in training mode")


def is_training(a: Analysis, node: NodeProto) -> bool:
    """Whether it computes statistics, or parameters per element."""
    opset = a.graph.opset()
    if attributes.get(node, "training_mode", 0) or any(node.output[1:]):
        return True
    if opset < 7 and not attributes.get(node, "is_test", 0):
        return True
    return opset < 9 and not attributes.get(node, "spatial", 1)


def scale_and_shift(a: Analysis, node: NodeProto) -> tuple[Floats, Floats, Any] | None:
    """y = scale * x + shift per channel, in float64; None where it is not constant."""
    if is_training(a, node):
        return None
    arrays: list[Array] = []
    for name in node.input[1:5]:
        array = a.array(name)
        if array is None:
            return None
        arrays.append(array)
    gamma, beta, mean, variance = (array.astype(np.float64) for array in arrays)
    epsilon = float(np.float32(attributes.get(node, "epsilon", 1e-5)))
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + epsilon)
        shift = beta - mean * scale
    return scale, shift, arrays[0].dtype
