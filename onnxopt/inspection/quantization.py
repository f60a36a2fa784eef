"""How far a model is quantized: what its weights really are, and which operators run.

A weight behind QuantizeLinear -> DequantizeLinear that is stored in float is *fake*: it
computes as int8 and takes the room of float. One stored in integers is *integer*.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

import msgspec
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.graph import GraphView
from onnxopt.model import Model
from onnxopt.weights import tensor_bytes

State = Literal["integer", "fake"]
Granularity = Literal["per-tensor", "per-channel", "blocked", "unknown"]

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
_PASSED_THROUGH = frozenset(
    {
        *("Abs", "Add", "Cast", "Clip", "Concat", "Div", "Expand", "Flatten", "Gather"),
        *("Identity", "Mul", "Neg", "Pow", "Reshape", "Slice", "Split", "Sqrt"),
        *("Squeeze", "Sub", "Transpose", "Unsqueeze"),
    }
)
_MOST_VALUES = 64
"""A constant expression of more values than this is not looked through."""


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
    values that are computed.
    """

    operators: dict[str, int]
    activations: int
    weights: list[QuantizedWeight]


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


class _Source(NamedTuple):
    """A constant and the scope that it stands in."""

    view: GraphView
    name: str
    tensor: TensorProto


def _weight_of(
    view: GraphView, node: NodeProto, op: str
) -> tuple[_Source, State, Granularity] | None:
    """The quantized weight that `node` reads, None where it reads none."""
    if op == "QuantizeLinear":
        source = _constant_behind(view, node.input[0])
        if source is None:
            return None
        return source, "fake", _granularity(view, node, node.input[1])
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
        grain = _granularity(view, node, node.input[scale])
    return _Source(home, name, tensor), "integer", grain


def _describe(
    view: GraphView,
    node: NodeProto,
    source: _Source,
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


def dtype_name(data_type: int) -> str:
    """`float32` for TensorProto.FLOAT; `type 99` for one that is unknown."""
    try:
        name = str(TensorProto.DataType.Name(data_type))
    except ValueError:
        return f"type {data_type}"
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())


def _granularity(view: GraphView, node: NodeProto, scale: str) -> Granularity:
    """By the shape of the scale: a constant's, or what is inferred."""
    if attributes.get(node, "block_size", 0):
        return "blocked"
    found = view.weight(scale)
    shape = list(found.dims) if found is not None else view.shape(scale)
    if shape is None or any(not isinstance(dim, int) for dim in shape):
        return "unknown"
    if len(shape) == 0 or list(shape) == [1]:
        return "per-tensor"
    return "per-channel" if len(shape) == 1 else "blocked"


def _constant_behind(view: GraphView, name: str) -> _Source | None:
    """The constant that `name` is, or is computed from; None where from inputs as well.

    Of several (a mask times a weight) the largest.
    """
    found: list[_Source] = []
    seen, stack = set[tuple[int, str]](), [(view, name)]
    while stack:
        view, name = stack.pop()
        home, tensor = view.home(name), view.weight(name)
        if home is None or (id(home), name) in seen:
            continue
        seen.add((id(home), name))
        if tensor is not None:
            found.append(_Source(home, name, tensor))
            continue
        maker = home.producer(name)
        computed = maker is not None and home.op(maker) in _PASSED_THROUGH
        if maker is None or not computed or len(seen) > _MOST_VALUES:
            return None
        stack += [(home, given) for given in maker.input if given]
    return max(found, key=lambda item: tensor_bytes(item.tensor), default=None)
