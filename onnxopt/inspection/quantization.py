"""How far a model is quantized: what its weights really are, and which operators run.

A weight behind QuantizeLinear -> DequantizeLinear that is stored in float is *fake*: it
computes as int8 and takes the room of float. One stored in integers is *integer*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import msgspec
from onnx import NodeProto

from onnxopt.graph import GraphView
from onnxopt.model import Model
from onnxopt.quantization.kernels import Kernels
from onnxopt.quantization.layers import (
    INTEGER_LAYERS,
    Granularity,
    Slots,
    Source,
    constant_source,
    dtype_name,
    granularity,
)
from onnxopt.quantization.parameters import LINEAR
from onnxopt.weights import tensor_bytes

State = Literal["integer", "fake"]

_OTHERS = ("DynamicQuantizeLinear", "QMoE")
_READERS = {**INTEGER_LAYERS, "DequantizeLinear": Slots((), (0,), scale=1)}
"""Operators that read integer weights, and where."""


class QuantizedWeight(msgspec.Struct, frozen=True):
    """One weight that the graph treats as quantized; `bytes` as it is stored."""

    name: str
    scope: str
    node: str
    state: State
    dtype: str
    granularity: Granularity
    bytes: int


class Quantization(msgspec.Struct, frozen=True):
    """The quantization status of a model.

    `operators`: how many of each quantizing operator; `activations`: QuantizeLinear on
    values that are computed; `kernels`: what each asked provider makes of the layers.
    """

    operators: dict[str, int]
    activations: int
    weights: list[QuantizedWeight]
    kernels: list[Kernels] = []


def quantization(model: Model) -> Quantization:
    """Look at every scope of `model`."""
    operators: Counter[str] = Counter()
    weights: dict[tuple[int, str, State], QuantizedWeight] = {}
    activations = 0
    for view in model.views():
        for node in view.proto.node:
            op = view.op(node)
            if _is_quantizing(op):
                operators[op] += 1
            found = list(_weights_of(view, node, op))
            activations += op == "QuantizeLinear" and not found
            for source, state, grain in found:
                key = (id(source.view), source.name, state)
                if key not in weights:  # a shared one counts once
                    weights[key] = _describe(view, node, source, state, grain)
    return Quantization(dict(sorted(operators.items())), activations, [*weights.values()])


def _is_quantizing(op: str) -> bool:
    name = op.rpartition("::")[2]
    known = op in INTEGER_LAYERS or name in (*LINEAR, *_OTHERS)
    return known or name.startswith("QLinear")


def _weights_of(
    view: GraphView, node: NodeProto, op: str
) -> Iterator[tuple[Source, State, Granularity]]:
    """The quantized weights that `node` reads."""
    if op == "QuantizeLinear":
        source = constant_source(view, node.input[0])
        if source is not None:
            yield source, "fake", granularity(view, node, node.input[1])
    slots = _READERS.get(op)
    if slots is None:
        return
    scale = slots.scale
    grain: Granularity = "unknown"
    if op.endswith(("NBits", "BlockQuantized")):
        grain = "blocked"
    elif scale is not None and scale < len(node.input):
        grain = granularity(view, node, node.input[scale])
    for name in (node.input[slot] for slot in slots.weights if slot < len(node.input)):
        tensor, home = view.weight(name), view.home(name)
        if tensor is not None and home is not None:
            yield Source(home, name, tensor), "integer", grain


def _describe(
    view: GraphView,
    node: NodeProto,
    source: Source,
    state: State,
    granularity: Granularity,
) -> QuantizedWeight:
    return QuantizedWeight(
        name=source.name,
        scope=source.view.scope,
        node=view.label(node),
        state=state,
        dtype=dtype_name(source.tensor.data_type),
        granularity=granularity,
        bytes=tensor_bytes(source.tensor),
    )
