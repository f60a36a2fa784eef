"""How each layer is quantized: its weight, its activations, what its result goes to.

A layer is an operator with a weight (Conv, MatMul, LSTM...) in its float or its integer
form, or any other one whose values all come from DequantizeLinear (a residual Add).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.graph import GraphView
from onnxopt.linear import FLOATS, DeclinedError
from onnxopt.quantization.parameters import code_limits
from onnxopt.weights import Array, tensor_bytes

State = Literal["integer", "fake", "float"]
Mode = Literal["static", "dynamic", "none"]
Scheme = Literal["symmetric", "asymmetric", "unknown"]
Granularity = Literal["per-tensor", "per-channel", "blocked", "unknown"]


class Slots(NamedTuple):
    """Input slots: of activations, weights, and the scale and zero point of weights."""

    activations: tuple[int, ...] = (0,)
    weights: tuple[int, ...] = (1,)
    bias: int | None = None
    scale: int | None = None
    zero_point: int | None = None


FLOAT_LAYERS = {
    "Conv": Slots(bias=2),
    "ConvTranspose": Slots(bias=2),
    "Gemm": Slots(bias=2),
    "MatMul": Slots(),
    "LSTM": Slots(weights=(1, 2), bias=3),
    "GRU": Slots(weights=(1, 2), bias=3),
    "RNN": Slots(weights=(1, 2), bias=3),
    "com.microsoft::FusedConv": Slots(bias=2),
    "com.microsoft::FusedGemm": Slots(bias=2),
    "com.microsoft::FusedMatMul": Slots(),
}
"""Layers that read floats, which DequantizeLinear may have made."""

INTEGER_LAYERS = {
    "QLinearConv": Slots(weights=(3,), bias=8, scale=4, zero_point=5),
    "QLinearMatMul": Slots(weights=(3,), scale=4, zero_point=5),
    "ConvInteger": Slots(zero_point=3),
    "MatMulInteger": Slots(zero_point=3),
    "com.microsoft::QGemm": Slots(weights=(3,), bias=6, scale=4, zero_point=5),
    "com.microsoft::MatMulIntegerToFloat": Slots(scale=3, zero_point=5),
    "com.microsoft::DynamicQuantizeMatMul": Slots(scale=2, zero_point=3),
    "com.microsoft::DynamicQuantizeLSTM": Slots(weights=(1, 2), scale=8, zero_point=9),
    "com.microsoft::QAttention": Slots(scale=4, zero_point=7),
    "com.microsoft::MatMulNBits": Slots(scale=2, zero_point=3),
    "com.microsoft::GatherBlockQuantized": Slots((), (0,), scale=2, zero_point=3),
}
"""Layers that read integers themselves."""

_STATIC = frozenset({"QLinearConv", "QLinearMatMul", "com.microsoft::QGemm"})
MOVES = frozenset(
    {
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool"),
        *("Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile"),
        *("Transpose", "Unsqueeze"),
    }
)
"""Operators that compute nothing: what they read may be quantized or not."""
_NO_LAYERS = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"),
        *("Constant", "If", "Loop", "Scan", "Shape", "Size"),
    }
)
_PASSED_THROUGH = frozenset(
    {
        *("Abs", "Add", "Cast", "Clip", "Concat", "Div", "Expand", "Flatten", "Gather"),
        *("Identity", "Mul", "Neg", "Pow", "Reshape", "Slice", "Split", "Sqrt"),
        *("Squeeze", "Sub", "Transpose", "Unsqueeze"),
    }
)
_DEPTH = 16
_MOST_VALUES = 64
"""A constant expression of more values than this is not looked through."""


class WeightScheme(msgspec.Struct, frozen=True):
    """A constant that a layer multiplies by, and how it is quantized.

    `state`: `integer` as stored, `fake` where QuantizeLinear of floats makes it,
    `float`. `dtype` is that of the codes, of floats their own. `zero_point`: where all
    channels have the same, else None; `scheme` is symmetric where it stands in the middle
    of the codes (0 of int8, 128 of uint8).
    """

    name: str
    state: State
    dtype: str
    granularity: Granularity
    scheme: Scheme
    zero_point: int | None


class ActivationScheme(msgspec.Struct, frozen=True):
    """How the values that a layer reads are quantized.

    `static`: with scales that are constants; `dynamic`: with scales of each run.
    """

    mode: Mode
    dtype: str | None = None
    granularity: Granularity | None = None
    scheme: Scheme | None = None


class QuantizedLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer; `output` is the type of the codes that its result becomes, if any."""

    node: str
    scope: str
    op: str
    weight: WeightScheme | None
    activation: ActivationScheme
    output: str | None


class Site(NamedTuple):
    """A layer in its graph: the description, and the nodes that it was read from.

    `dequantizers`: of the activations and of the weights, None where there is none.
    """

    view: GraphView
    node: NodeProto
    slots: Slots
    layer: QuantizedLayer
    inputs: tuple[NodeProto | None, ...]
    weights: tuple[NodeProto | None, ...]


def sites(view: GraphView) -> Iterator[Site]:
    """The layers of one scope, in the order of its nodes."""
    for node in view.proto.node:
        found = site(view, node)
        if found is not None:
            yield found


def site(view: GraphView, node: NodeProto) -> Site | None:
    """The layer that `node` is, None where it is none."""
    op = view.op(node)
    slots = FLOAT_LAYERS.get(op) or INTEGER_LAYERS.get(op) or _other(view, node, op)
    if slots is None:
        return None
    slots = _by_constants(view, node, op, slots)
    inputs = tuple(dequantizer(view, name) for name in _named(node, slots.activations))
    weights = tuple(dequantizer(view, name) for name in _named(node, slots.weights))
    layer = QuantizedLayer(
        node=view.label(node),
        scope=view.scope,
        op=op,
        weight=_weight(view, node, op, slots),
        activation=_activation(view, node, op, slots, inputs),
        output=_output(view, node, op),
    )
    return Site(view, node, slots, layer, inputs, weights)


def _other(view: GraphView, node: NodeProto, op: str) -> Slots | None:
    """The slots of an operator whose values all come from DequantizeLinear."""
    if op in _NO_LAYERS or op in MOVES:
        return None
    read = [i for i, name in enumerate(node.input) if name and not _is_plain(view, name)]
    if not read or any(dequantizer(view, node.input[i]) is None for i in read):
        return None
    return Slots(tuple(read), ())


def _is_plain(view: GraphView, name: str) -> bool:
    """Whether it is a constant, or no value that could be quantized (a condition)."""
    kind = view.dtype(name)
    return view.weight(name) is not None or kind not in (None, *FLOATS)


def _by_constants(view: GraphView, node: NodeProto, op: str, slots: Slots) -> Slots:
    """The first operand of MatMul and Gemm may be the weight, or both activations."""
    if op not in ("MatMul", "Gemm", "com.microsoft::FusedMatMul"):
        return slots
    constant = [constant_behind(view, name) is not None for name in node.input[:2]]
    if constant == [True, False]:
        return slots._replace(activations=(1,), weights=(0,))
    return slots if constant[1] else slots._replace(activations=(0, 1), weights=())


def _named(node: NodeProto, slots: tuple[int, ...]) -> list[str]:
    return [node.input[i] for i in slots if i < len(node.input) and node.input[i]]


# ---- what is behind a value ----


def dequantizer(view: GraphView, name: str) -> NodeProto | None:
    """The DequantizeLinear that makes `name`, moved about perhaps; None without one."""
    for _ in range(_DEPTH):
        home = view.home(name)
        maker = home.producer(name) if home is not None else None
        if home is None or maker is None or not maker.input:
            return None
        op = home.op(maker)
        if op == "DequantizeLinear":
            return maker
        if op not in MOVES or op == "Concat":
            return None
        view, name = home, maker.input[0]
    return None


class Behind(NamedTuple):
    """The constant behind a value, and the nodes that quantize and dequantize it."""

    home: GraphView
    name: str
    tensor: TensorProto
    quantizer: NodeProto | None
    dequantizer: NodeProto | None


def constant_behind(view: GraphView, name: str) -> Behind | None:
    """The constant that `name` is computed from; None where from inputs as well."""
    quantizer: NodeProto | None = None
    dequantizes: NodeProto | None = None
    for _ in range(_DEPTH):
        home, tensor = view.home(name), view.weight(name)
        if home is None:
            return None
        if tensor is not None:
            return Behind(home, name, tensor, quantizer, dequantizes)
        maker = home.producer(name)
        if maker is None or not maker.input:
            return None
        op = home.op(maker)
        if op == "QuantizeLinear":
            quantizer = quantizer or maker
        elif op == "DequantizeLinear":
            dequantizes = dequantizes or maker
        elif op not in MOVES and op != "Cast":
            source = constant_source(home, name)
            return source and Behind(*source, quantizer, dequantizes)
        view, name = home, maker.input[0]
    return None


class Source(NamedTuple):
    """A constant and the scope that it stands in."""

    view: GraphView
    name: str
    tensor: TensorProto


def constant_source(view: GraphView, name: str) -> Source | None:
    """The constant that `name` is, or is computed from; None where from inputs as well.

    Of several (a mask times a weight) the largest.
    """
    found: list[Source] = []
    seen, stack = set[tuple[int, str]](), [(view, name)]
    while stack:
        view, name = stack.pop()
        home, tensor = view.home(name), view.weight(name)
        if home is None or (id(home), name) in seen:
            continue
        seen.add((id(home), name))
        if tensor is not None:
            found.append(Source(home, name, tensor))
            continue
        maker = home.producer(name)
        computed = maker is not None and home.op(maker) in _PASSED_THROUGH
        if maker is None or not computed or len(seen) > _MOST_VALUES:
            return None
        stack += [(home, given) for given in maker.input if given]
    return max(found, key=lambda item: tensor_bytes(item.tensor), default=None)


# ---- schemes ----


def _weight(
    view: GraphView, node: NodeProto, op: str, slots: Slots
) -> WeightScheme | None:
    for name in _named(node, slots.weights):
        found = constant_behind(view, name)
        if found is None:
            continue
        if op in INTEGER_LAYERS:
            return _integer_weight(view, node, op, slots, found)
        if found.dequantizer is None:
            kind, is_float = found.tensor.data_type, found.tensor.data_type in FLOATS
            state: State = "float" if is_float else "integer"
            scheme: Scheme = "unknown"
            return WeightScheme(
                found.name, state, dtype_name(kind), "unknown", scheme, None
            )
        pair = found.quantizer or found.dequantizer
        codes = _codes(found.home, pair, found.tensor)
        return WeightScheme(
            found.name,
            "fake" if found.quantizer is not None else "integer",
            dtype_name(codes),
            granularity(found.home, pair, pair.input[1]),
            *_scheme(codes, _zero_point(found.home, pair)),
        )
    return None


def _integer_weight(
    view: GraphView, node: NodeProto, op: str, slots: Slots, found: Behind
) -> WeightScheme:
    """Of an operator that reads integers, whose own inputs say how."""
    kind = found.tensor.data_type
    grain: Granularity = "unknown"
    if op.endswith(("NBits", "BlockQuantized")):
        grain = "blocked"
    elif slots.scale is not None and slots.scale < len(node.input):
        grain = granularity(view, node, node.input[slots.scale])
    if op.endswith("NBits"):
        bits = attributes.get(node, "bits", 4)
        return WeightScheme(found.name, "integer", f"uint{bits}", grain, "unknown", None)
    slot = slots.zero_point
    given = slot is not None and slot < len(node.input) and node.input[slot]
    zero = view.array(given) if given else np.zeros((), np.int8)
    return WeightScheme(
        found.name, "integer", dtype_name(kind), grain, *_scheme(kind, zero)
    )


def _activation(
    view: GraphView,
    node: NodeProto,
    op: str,
    slots: Slots,
    inputs: tuple[NodeProto | None, ...],
) -> ActivationScheme:
    if op in INTEGER_LAYERS:
        return _integer_activation(view, node, op)
    makers = [maker for maker in inputs if maker is not None]
    if not makers or len(makers) < len(inputs):
        return ActivationScheme("none")
    maker = makers[0]
    codes = view.dtype(maker.input[0]) or 0
    is_static = constant_source(view, maker.input[1]) is not None
    scheme, _ = _scheme(codes, _zero_point(view, maker))
    return ActivationScheme(
        "static" if is_static else "dynamic",
        dtype_name(codes),
        granularity(view, maker, maker.input[1]),
        scheme,
    )


def _integer_activation(view: GraphView, node: NodeProto, op: str) -> ActivationScheme:
    """Of an operator that reads integers."""
    if op.endswith(("NBits", "BlockQuantized")):
        return ActivationScheme("none")
    if "Dynamic" in op:
        return ActivationScheme("dynamic", "uint8", "per-tensor", "asymmetric")
    codes = view.dtype(node.input[0])
    kind = dtype_name(codes) if codes else None
    maker = view.producer(node.input[0])
    if maker is not None and view.op(maker) == "DynamicQuantizeLinear":
        return ActivationScheme("dynamic", "uint8", "per-tensor", "asymmetric")
    slot = 2 if op in _STATIC else None
    zero = view.array(node.input[slot]) if slot is not None else None
    scheme, _ = _scheme(codes or 0, zero)
    return ActivationScheme("static", kind, "per-tensor", scheme)


def _output(view: GraphView, node: NodeProto, op: str) -> str | None:
    """The type of the codes that the first output becomes, past a Relu or Clip."""
    if op in _STATIC:
        codes = view.dtype(node.output[0])
        return dtype_name(codes) if codes else None
    name = node.output[0]
    for _ in range(2):
        for use in view.uses(name):
            if use.view is view and view.op(use.node) == "QuantizeLinear":
                codes = view.dtype(use.node.output[0])
                return dtype_name(codes) if codes else None
        only = view.only_use(name)
        if only is None or view.op(only.node) not in ("Relu", "Clip"):
            return None
        name = only.node.output[0]
    return None


def _codes(view: GraphView, node: NodeProto, tensor: TensorProto) -> int:
    """The type of the codes of a Q or DQ, whose constant is `tensor`."""
    if view.op(node) == "DequantizeLinear":
        return tensor.data_type
    return view.dtype(node.output[0]) or TensorProto.UINT8


def _zero_point(view: GraphView, node: NodeProto) -> Array | None:
    """That of a Q or DQ, through Identity and Cast; plain zero where it has none."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros((), np.int8)
    name = node.input[2]
    for _ in range(_DEPTH):
        array, maker = view.array(name), view.producer(name)
        if array is not None or maker is None or view.op(maker) not in _RENAMES:
            return array
        name = maker.input[0]
    return None


_RENAMES = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze")


def _scheme(codes: int, zero: Array | None) -> tuple[Scheme, int | None]:
    """The scheme, and the zero point where there is but one."""
    if zero is None or not codes:
        return "unknown", None
    values = np.unique(zero.astype(np.int64))
    only = int(values[0]) if len(values) == 1 else None
    try:
        least, most = code_limits(codes)
    except (DeclinedError, ValueError, KeyError):  # codes that are floats
        return "symmetric", only
    middle = (least + most + 1) // 2
    return "symmetric" if only == middle else "asymmetric", only


def granularity(view: GraphView, node: NodeProto, scale: str) -> Granularity:
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


def dtype_name(data_type: int) -> str:
    """`float32` for TensorProto.FLOAT; `type 99` for one that is unknown."""
    try:
        name = str(TensorProto.DataType.Name(data_type))
    except ValueError:
        return f"type {data_type}"
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())


def is_eight_bits(name: str | None) -> bool:
    """Whether a type by its name has codes that integer kernels read."""
    return name in ("int8", "uint8")
