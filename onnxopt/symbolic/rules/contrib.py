"""Operators of ONNX Runtime's own domain, com.microsoft, that models come with.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from onnx import TensorProto

from onnxopt import attributes
from onnxopt.symbolic import dim
from onnxopt.symbolic.fact import Call, Dims, Fact
from onnxopt.symbolic.rules import attention
from onnxopt.symbolic.rules.elementwise import Rule, broadcast, same
from onnxopt.symbolic.rules.layers import conv, global_pool, pool


def lstm(call: Call) -> list[Fact]:
    """Y [steps, directions, batch, hidden], and the last states without the steps."""
    data = call.inputs[0]
    hidden = attributes.get(call.node, "hidden_size")
    both = attributes.get(call.node, "direction", "forward") == "bidirectional"
    if data.dims is None or len(data.dims) != 3 or hidden is None:
        return [Fact(data.dtype)] * len(call.node.output)
    state: Dims = (2 if both else 1, data.dims[1], int(hidden))
    facts = [Fact(data.dtype, (data.dims[0], *state)), *[Fact(data.dtype, state)] * 2]
    return facts[: len(call.node.output)]


def product(call: Call, slot: int, dtype: int) -> list[Fact]:
    """As MatMul of inputs 0 and `slot`."""
    left, right = call.inputs[0].dims, call.inputs[slot].dims
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return [Fact(dtype)]
    stack = broadcast((left[:-2], right[:-2])) or ()
    return [Fact(dtype, (*stack, left[-2], right[-1]))]


def dynamic_quantize_matmul(call: Call) -> list[Fact]:
    """Floats times integers: floats."""
    return product(call, 1, call.inputs[0].dtype)


def matmul_integer_to_float(call: Call) -> list[Fact]:
    """Integers times integers, by the type of the scale."""
    return product(call, 1, call.inputs[2].dtype)


def matmul_n_bits(call: Call) -> list[Fact]:
    """[..., K] times packed weights: [..., N]."""
    data, columns = call.inputs[0], attributes.get(call.node, "N")
    if data.dims is None or columns is None:
        return [Fact(data.dtype)]
    return [Fact(data.dtype, (*data.dims[:-1], int(columns)))]


def quantized_binary(call: Call) -> list[Fact]:
    """QLinearAdd and QLinearMul: a, its scale and zero point, b..."""
    dims = broadcast((call.inputs[0].dims, call.inputs[3].dims))
    return [Fact(call.inputs[0].dtype, dims)]


def quantize(call: Call) -> list[Fact]:
    """The type of the zero point."""
    kind = call.inputs[2].dtype if call.has(2) else TensorProto.UINT8
    return [Fact(kind, call.inputs[0].dims)]


def dequantize(call: Call) -> list[Fact]:
    """The type of the scale."""
    return [Fact(call.inputs[1].dtype, call.inputs[0].dims)]


def quantized_gemm(call: Call) -> list[Fact]:
    """[M, N], by what is transposed; floats without a scale of the result."""
    kind = call.inputs[8].dtype if call.has(8) else TensorProto.FLOAT
    left, right = call.inputs[0].dims, call.inputs[3].dims
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return [Fact(kind)]
    rows = left[1 if attributes.get(call.node, "transA", 0) else 0]
    return [Fact(kind, (rows, right[0 if attributes.get(call.node, "transB", 0) else 1]))]


def quantized_concat(call: Call) -> list[Fact]:
    """Scale and zero point of the result, then operands with theirs."""
    kind, every = call.inputs[1].dtype, [given.dims for given in call.inputs[2::3]]
    first = every[0] if every else None
    axis = attributes.get(call.node, "axis")
    if first is None or axis is None or not -len(first) <= axis < len(first):
        return [Fact(kind)]
    made = list(first)
    for dims in every[1:]:
        if dims is None or len(dims) != len(first):
            return [Fact(kind)]
        made[axis] = dim.add(made[axis], dims[axis])
        for place, size in enumerate(dims):
            if place != axis % len(first) and size != first[place]:
                made[place] = call.fresh(place)
    return [Fact(kind, tuple(made))]


def quantized_pool(call: Call) -> list[Fact] | None:
    """The channels on axis 1, or not known."""
    if attributes.get(call.node, "channels_last", 0):
        return [Fact(call.inputs[0].dtype)]
    is_global = call.node.op_type == "QLinearGlobalAveragePool"
    return global_pool(call) if is_global else pool(call)


_SAME = "BiasGelu FastGelu Gelu QLinearLeakyRelu QLinearSigmoid QuickGelu"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), same),
    "Attention": attention.packed_attention,
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLSTM": lstm,
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "EmbedLayerNormalization": attention.embed_norm,
    "FusedConv": conv,
    "GroupQueryAttention": attention.group_query_attention,
    "MatMulIntegerToFloat": matmul_integer_to_float,
    "MatMulNBits": matmul_n_bits,
    "MultiHeadAttention": attention.multi_head_attention,
    "QGemm": quantized_gemm,
    "QLinearAdd": quantized_binary,
    "QLinearAveragePool": quantized_pool,
    "QLinearConcat": quantized_concat,
    "QLinearGlobalAveragePool": quantized_pool,
    "QLinearMul": quantized_binary,
    "QuantizeLinear": quantize,
    "RotaryEmbedding": same,
    "SkipLayerNormalization": attention.skip_norm,
    "SkipSimplifiedLayerNormalization": attention.skip_norm,
}
