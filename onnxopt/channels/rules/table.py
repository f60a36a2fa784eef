"""The table: operator -> rule. Whatever is not in it is a barrier."""

from __future__ import annotations

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.rules.attention_grouped import GroupQueryAttention
from onnxopt.channels.rules.attention_multi_head import MultiHeadAttention
from onnxopt.channels.rules.attention_packed import PackedAttention
from onnxopt.channels.rules.attention_standard import StandardAttention
from onnxopt.channels.rules.convolution import Conv, ConvTranspose
from onnxopt.channels.rules.elementwise import Dropout, Elementwise, Product, Quotient
from onnxopt.channels.rules.expand import Expand, Tile
from onnxopt.channels.rules.fill import Fill
from onnxopt.channels.rules.gather import Gather
from onnxopt.channels.rules.groups_norm import (
    GroupNormalization,
    InstanceNormalization,
    Neighbours,
)
from onnxopt.channels.rules.integer_elementwise import (
    QLinear,
    QLinearConcat,
    QLinearPool,
    QLinearProduct,
)
from onnxopt.channels.rules.integer_layers import (
    DynamicQuantize,
    IntegerConv,
    IntegerMatMul,
    QGemm,
    QLinearConv,
    QLinearMatMul,
)
from onnxopt.channels.rules.join import Concat, Slice, Split
from onnxopt.channels.rules.layer_norm import LayerNormalization, RMSNormalization
from onnxopt.channels.rules.layout import Reshape, Transpose
from onnxopt.channels.rules.normalization import BatchNormalization
from onnxopt.channels.rules.pixel import PixelShuffle
from onnxopt.channels.rules.product import Gemm, MatMul
from onnxopt.channels.rules.quantize import Quantizing
from onnxopt.channels.rules.recurrent import Recurrent
from onnxopt.channels.rules.reduction import Reduce
from onnxopt.channels.rules.resize import Resize
from onnxopt.channels.rules.rotary import MicrosoftRotary, StandardRotary
from onnxopt.channels.rules.rule import BARRIER, Rule
from onnxopt.channels.rules.size import Size
from onnxopt.channels.rules.skip_norm import (
    EmbedLayerNormalization,
    SkipLayerNormalization,
    SkipRMSNormalization,
)
from onnxopt.channels.rules.softmax import Softmax
from onnxopt.channels.rules.spatial import Pad, Pool
from onnxopt.graph import GraphView

_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Elu Erf Exp "
    "Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not "
    "Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt "
    "Swish Tan Tanh ThresholdedRelu"
)
_BROADCASTING = (
    "Add And Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Or PRelu "
    "Pow Sub Sum Where Xor"
)
_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
    "ReduceProd ReduceSum ReduceSumSquare"
)
_POOLS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"

_MICROSOFT: dict[str, Rule] = {
    "Attention": PackedAttention(),
    "EmbedLayerNormalization": EmbedLayerNormalization(),
    "GroupQueryAttention": GroupQueryAttention(),
    "MultiHeadAttention": MultiHeadAttention(),
    "QGemm": QGemm(),
    "QLinearAdd": QLinear(operands=2),
    "QLinearAveragePool": QLinearPool(),
    "QLinearConcat": QLinearConcat(),
    "QLinearGlobalAveragePool": QLinearPool(),
    "QLinearLeakyRelu": QLinear(operands=1),
    "QLinearMul": QLinearProduct(operands=2),
    "QLinearSigmoid": QLinear(operands=1),
    "RotaryEmbedding": MicrosoftRotary(),
    "SkipLayerNormalization": SkipLayerNormalization(),
    "SkipSimplifiedLayerNormalization": SkipRMSNormalization(),
}

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), Elementwise()),
    **dict.fromkeys(_BROADCASTING.split(), Elementwise()),
    **dict.fromkeys(_REDUCTIONS.split(), Reduce()),
    **dict.fromkeys(_POOLS.split(), Pool()),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), Reshape()),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), Recurrent()),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), Softmax()),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), Quantizing()),
    "Attention": StandardAttention(),
    "BatchNormalization": BatchNormalization(),
    "Concat": Concat(),
    "Conv": Conv(),
    "ConstantOfShape": Fill(),
    "ConvTranspose": ConvTranspose(),
    "DepthToSpace": PixelShuffle(),
    "ConvInteger": IntegerConv(),
    "Dropout": Dropout(),
    "DynamicQuantizeLinear": DynamicQuantize(),
    "Gather": Gather(),
    "Gemm": Gemm(),
    "GroupNormalization": GroupNormalization(),
    "InstanceNormalization": InstanceNormalization(),
    "LRN": Neighbours(),
    "Div": Quotient(),
    "Expand": Expand(),
    "LayerNormalization": LayerNormalization(),
    "MatMul": MatMul(),
    "MatMulInteger": IntegerMatMul(),
    "Mul": Product(),
    "Pad": Pad(),
    "QLinearConv": QLinearConv(),
    "QLinearMatMul": QLinearMatMul(),
    "RMSNormalization": RMSNormalization(),
    "Resize": Resize(),
    "RotaryEmbedding": StandardRotary(),
    "Shape": Size(),
    "SimplifiedLayerNormalization": RMSNormalization(),
    "Slice": Slice(),
    "SpaceToDepth": PixelShuffle(),
    "Split": Split(),
    "Tile": Tile(),
    "Transpose": Transpose(),
    "Upsample": Resize(),
    **{f"com.microsoft::{name}": rule for name, rule in _MICROSOFT.items()},
}


def rule_of(graph: GraphView, node: NodeProto) -> Rule:
    """The rule of a node: by its operator, unless its attributes vary by call."""
    if attributes.has_references(node):
        return BARRIER
    return RULES.get(graph.op(node), BARRIER)
