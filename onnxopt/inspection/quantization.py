"""How far a model is quantized: what its weights really are, and which operators run.

A weight behind QuantizeLinear -> DequantizeLinear that is stored in float is *fake*: it
computes as int8 and takes the room of float. One stored in integers is *integer*.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec
from onnx import NodeProto

from onnxopt.graph import GraphView
from onnxopt.model import Model
from onnxopt.quantization.kernels import Kernels
from onnxopt.quantization.layers import (
    Granularity,
    Source,
    constant_source,
    dtype_name,
    granularity,
)
from onnxopt.weights import tensor_bytes

State = Literal["integer", "fake"]

_LINEAR = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_MICROSOFT = ("MatMulNBits", "GatherBlockQuantized", "QAttention", "QGemm", "QMoE")
# operator: the input slots of its integer weight and of that weight's scale
_INTEGER_WEIGHT = {
    "DequantizeLinear": (0, 1),
    "QLinearConv": (3, 4),
    "QLinearMatMul": (3, 4),
    "ConvInteger": (1, None),
    "MatMulInteger": (1, None),
    "com.microsoft::MatMulNBits": (1, 2),
    "com.microsoft::QGemm": (3, 4),
}


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
            found = _weight_of(view, node, op)
            if found is None:
                activations += op == "QuantizeLinear"
                continue
            source, state, grain = found
            key = (id(source.view), source.name, state)
            if key not in weights:  # a shared one counts once
                weights[key] = _describe(view, node, source, state, grain)
    return Quantization(dict(sorted(operators.items())), activations, [*weights.values()])


def _is_quantizing(op: str) -> bool:
    name = op.rpartition("::")[2]
    known = name in _LINEAR or name in _MICROSOFT or name.startswith("QLinear")
    return known or name in ("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul")


def _weight_of(
    view: GraphView, node: NodeProto, op: str
) -> tuple[Source, State, Granularity] | None:
    """The quantized weight that `node` reads, None where it reads none."""
    if op == "QuantizeLinear":
        source = constant_source(view, node.input[0])
        if source is None:
            return None
        return source, "fake", granularity(view, node, node.input[1])
    slots = _INTEGER_WEIGHT.get(op)
    if slots is None or len(node.input) <= slots[0]:
        return None
    name, scale = node.input[slots[0]], slots[1]
    tensor, home = view.weight(name), view.home(name)
    if tensor is None or home is None:
        return None
    grain: Granularity = "unknown"
    if op.endswith("NBits"):
        grain = "blocked"
    elif scale is not None:
        grain = granularity(view, node, node.input[scale])
    return Source(home, name, tensor), "integer", grain


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
