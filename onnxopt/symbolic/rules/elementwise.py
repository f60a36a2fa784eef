"""Operators that work on each element: the shape is the input's, or the broadcast one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxopt import attributes
from onnxopt.symbolic import dim
from onnxopt.symbolic.dim import Dim, Expr
from onnxopt.symbolic.fact import FOLLOWED, MAX_VALUE, Call, Dims, Fact, Value

Rule = Callable[[Call], list[Fact] | None]
"""Facts of the outputs; None where the rule does not know this form."""


def same(call: Call) -> list[Fact]:
    """The first output has the type and the dims of the first input."""
    first = call.inputs[0]
    return [Fact(first.dtype, first.dims)]


def identity(call: Call) -> list[Fact]:
    """The first output is the first input."""
    return [call.inputs[0]]


def cast(call: Call) -> list[Fact]:
    """Integers stay what they are, between types that hold any size."""
    to = int(attributes.get(call.node, "to", 0))
    first = call.inputs[0]
    wide = (TensorProto.INT64, TensorProto.INT32)
    kept = first.value if first.dtype in wide and to in wide else None
    if kept is not None and not all(fits(item, to) for item in kept.flat):
        kept = None
    if first.dtype == TensorProto.BOOL and to in wide:
        kept = first.value
    return [Fact(to, first.dims, kept)]


def cast_like(call: Call) -> list[Fact]:
    """The type of the second input."""
    return [Fact(call.inputs[1].dtype, call.inputs[0].dims)]


def to_bool(call: Call) -> list[Fact]:
    """IsNaN, IsInf."""
    return [Fact(TensorProto.BOOL, call.inputs[0].dims)]


def dropout(call: Call) -> list[Fact]:
    """The mask is of truths from opset 10 on."""
    first = call.inputs[0]
    mask = TensorProto.BOOL if call.opset >= 10 else first.dtype
    return [Fact(first.dtype, first.dims), Fact(mask, first.dims)]


def quantize(call: Call) -> list[Fact]:
    """The type of the zero point, or `output_dtype`."""
    kind = attributes.get(call.node, "output_dtype", 0)
    if call.has(2):
        kind = call.inputs[2].dtype
    return [Fact(int(kind or TensorProto.UINT8), call.inputs[0].dims)]


def dynamic_quantize(call: Call) -> list[Fact]:
    """uint8, with the scale and the zero point that it found."""
    first = call.inputs[0]
    kind = TensorProto.UINT8
    return [Fact(kind, first.dims), Fact(first.dtype, ()), Fact(kind, ())]


def dequantize(call: Call) -> list[Fact]:
    """The type of the scale."""
    kind = attributes.get(call.node, "output_dtype", 0) or call.inputs[1].dtype
    return [Fact(int(kind), call.inputs[0].dims)]


def broadcast(shapes: Iterable[Dims | None]) -> Dims | None:
    """The common shape, from the right; None where a rank is not known."""
    known = list(shapes)
    ranks = [len(dims) for dims in known if dims is not None]
    if len(ranks) != len(known) or not ranks:
        return None
    rank = max(ranks)
    padded = [(1,) * (rank - len(dims)) + dims for dims in known if dims is not None]
    return tuple(_joined(sizes) for sizes in zip(*padded, strict=True))


def _joined(sizes: tuple[Dim, ...]) -> Dim:
    """The one size that is not 1, whichever of them it is."""
    first = sizes[0]
    if all(size == first for size in sizes):
        return first
    numbers = [size for size in sizes if isinstance(size, int) and size != 1]
    if numbers:
        return numbers[0]
    parts: dict[str, Dim] = {}
    for size in sizes:
        for part in dim.arguments_of(size, "bcast") or (size,):
            parts[dim.text(part)] = part
    parts.pop("1", None)
    kept = [parts[key] for key in sorted(parts) if not _is_bounded(parts[key], parts)]
    return kept[0] if len(kept) == 1 else dim.function("bcast", *kept)


def _is_bounded(size: Dim, others: Mapping[str, Dim]) -> bool:
    """Whether it is min(number > 1, other): it can only be 1 where the other is.

    The other may be what some of `others` broadcast to.
    """
    bounds = dim.arguments_of(size, "min")
    if bounds is None or not isinstance(bounds[0], int) or bounds[0] <= 1:
        return False
    parts = dim.arguments_of(bounds[1], "bcast") or (bounds[1],)
    return all(dim.text(part) in others for part in parts)


def variadic(kind: int | None = None, first: int = 0) -> Rule:
    """Broadcasting inputs from slot `first` on; the type is theirs, or `kind`."""

    def rule(call: Call) -> list[Fact] | None:
        if call.opset < 7 and len(call.inputs) > 1:
            return None  # older ones broadcast by attribute
        dims = broadcast(given.dims for given in call.inputs)
        dtype = call.inputs[first].dtype if kind is None else kind
        return [Fact(dtype, dims, _value(call, dtype, dims))]

    return rule


def _value(call: Call, dtype: int, dims: Dims | None) -> Value | None:
    """What the operator makes of followed values."""
    function = _FUNCTIONS.get(call.node.op_type)
    if function is None or dims is None or dtype not in FOLLOWED:
        return None
    given = [fact.value for fact in call.inputs]
    values = [value for value in given if value is not None]
    if len(values) < len(given):
        return None
    made = np.broadcast_arrays(*values)
    if made[0].size > MAX_VALUE:
        return None
    result = np.empty(made[0].shape, dtype=object)
    for index in np.ndindex(*result.shape):
        item = function(*(array[index] for array in made))
        result[index] = item if fits(item, dtype) else None
    return result


def fits(item: Dim | None, dtype: int) -> bool:
    """Whether it is a number that the type holds, or of small factors: none wraps."""
    if isinstance(item, int):
        bits = 63 if dtype == TensorProto.INT64 else 31
        return -(1 << bits) <= item < 1 << bits
    return item is None or all(abs(factor) < 2**31 for _, factor in item.terms)


def _known(function: Callable[..., Dim | None]) -> Callable[..., Dim | None]:
    """None where an argument is None."""

    def wrapped(*arguments: Dim | None) -> Dim | None:
        return None if None in arguments else function(*arguments)

    return wrapped


def _chain(function: Callable[[Dim, Dim], Dim]) -> Callable[..., Dim | None]:
    def chained(*arguments: Dim) -> Dim:
        total = arguments[0]
        for argument in arguments[1:]:
            total = function(total, argument)
        return total

    return _known(chained)


def _quotient(left: Dim, right: Dim) -> Dim | None:
    """Towards zero, as the operator divides integers."""
    if isinstance(left, int) and isinstance(right, int):
        if right == 0:
            return None
        size = abs(left) // abs(right)
        return size if (left < 0) == (right < 0) else -size
    if isinstance(right, int) and right > 0 and dim.is_never_negative(left):
        return dim.floor_quotient(left, right)
    return None


def _remainder(left: Dim, right: Dim) -> Dim | None:
    if isinstance(left, int) and isinstance(right, int) and left >= 0 and right > 0:
        return left % right
    if isinstance(right, int) and right > 0 and dim.is_never_negative(left):
        exact = dim.exact_quotient(left, right)
        return 0 if exact is not None else dim.function("mod", left, right)
    return None


def extreme(name: str, pick: Callable[..., int]) -> Callable[[Dim, Dim], Dim]:
    """Min or Max of two sizes."""

    def rule(left: Dim, right: Dim) -> Dim:
        if isinstance(left, int) and isinstance(right, int):
            return pick(left, right)
        if left == right:
            return left
        for one, two in ((left, right), (right, left)):
            if is_at_least(one, two):
                return one if name == "max" else two
        ordered = sorted((left, right), key=lambda s: (isinstance(s, Expr), dim.text(s)))
        return dim.function(name, *ordered)

    return rule


def is_at_least(left: Dim, right: Dim) -> bool:
    """Whether left >= right whatever the atoms are."""
    return dim.is_never_negative(dim.subtract(left, right))


def _compare(decide: Callable[[Any], bool | None]) -> Callable[..., Dim | None]:
    def rule(left: Dim, right: Dim) -> Dim | None:
        result = decide(dim.subtract(left, right))
        return None if result is None else int(result)

    return _known(rule)


def _is_zero(difference: Dim) -> bool | None:
    if isinstance(difference, int):
        return difference == 0
    if is_positive(difference) or is_positive(dim.multiply(difference, -1)):
        return False
    return None


def is_positive(size: Dim) -> bool | None:
    """True or False where it is sure."""
    if isinstance(size, int):
        return size > 0
    if dim.is_never_negative(dim.subtract(size, 1)):
        return True
    return False if dim.is_never_negative(dim.multiply(size, -1)) else None


def _is_not_negative(size: Dim) -> bool | None:
    return is_positive(dim.add(size, 1))


def _where(condition: Dim | None, left: Dim | None, right: Dim | None) -> Dim | None:
    if condition is None:
        return left if left is not None and left == right else None
    return left if condition else right


_FUNCTIONS: dict[str, Callable[..., Dim | None]] = {
    "Add": _known(dim.add),
    "And": _known(lambda left, right: int(bool(left and right))),
    "Div": _known(_quotient),
    "Equal": _compare(_is_zero),
    "Greater": _compare(is_positive),
    "GreaterOrEqual": _compare(_is_not_negative),
    "Less": _compare(lambda size: is_positive(dim.multiply(size, -1))),
    "LessOrEqual": _compare(lambda size: _is_not_negative(dim.multiply(size, -1))),
    "Max": _chain(extreme("max", max)),
    "Min": _chain(extreme("min", min)),
    "Mod": _known(_remainder),
    "Mul": _known(dim.multiply),
    "Neg": _known(lambda size: dim.multiply(size, -1)),
    "Not": _known(lambda truth: int(not truth)),
    "Or": _known(lambda left, right: int(bool(left or right))),
    "Sub": _known(dim.subtract),
    "Sum": _chain(dim.add),
    "Where": _where,
}

_SAME = """Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization BitwiseNot Celu
    Ceil Clip Cos Cosh CumSum Elu Erf Exp Floor Gelu GroupNormalization HardSigmoid
    HardSwish Hardmax InstanceNormalization LRN LayerNormalization LeakyRelu Log
    LogSoftmax LpNormalization MeanVarianceNormalization Mish
    RMSNormalization Reciprocal Relu ReverseSequence RotaryEmbedding Round Scatter
    ScatterElements ScatterND Selu Shrink Sigmoid Sign SimplifiedLayerNormalization Sin
    Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Trilu"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), same),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Sum", "Mean", "PRelu"),
        variadic(),  # ONNX Runtime broadcasts the input of PRelu to its slope, too
    ),
    **dict.fromkeys(("And", "Or", "Xor"), variadic(TensorProto.BOOL)),
    **dict.fromkeys(
        ("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
        variadic(),
    ),
    **dict.fromkeys(
        ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        variadic(TensorProto.BOOL),
    ),
    "Cast": cast,
    "CastLike": cast_like,
    "DequantizeLinear": dequantize,
    "Dropout": dropout,
    "Identity": identity,
    "IsInf": to_bool,
    "IsNaN": to_bool,
    "Neg": variadic(),
    "Not": variadic(TensorProto.BOOL),
    "DynamicQuantizeLinear": dynamic_quantize,
    "QuantizeLinear": quantize,
    "Where": variadic(first=1),
}
