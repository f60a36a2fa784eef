"""The table: operator -> rule. Whatever is not in it is a barrier."""

from __future__ import annotations

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.rules.convolution import Conv, ConvTranspose
from onnxopt.channels.rules.elementwise import Dropout, Elementwise, Product, Quotient
from onnxopt.channels.rules.expand import Expand, Tile
from onnxopt.channels.rules.gather import Gather
from onnxopt.channels.rules.join import Concat, Slice, Split
from onnxopt.channels.rules.layer_norm import LayerNormalization, RMSNormalization
from onnxopt.channels.rules.layout import Reshape, Transpose
from onnxopt.channels.rules.normalization import BatchNormalization
from onnxopt.channels.rules.product import Gemm, MatMul
from onnxopt.channels.rules.quantize import Quantizing
from onnxopt.channels.rules.reduction import Reduce
from onnxopt.channels.rules.rule import BARRIER, Rule
from onnxopt.channels.rules.size import Size
from onnxopt.channels.rules.softmax import Softmax
from onnxopt.channels.rules.spatial import Pad, Pool, Resize
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

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), Elementwise()),
    **dict.fromkeys(_BROADCASTING.split(), Elementwise()),
    **dict.fromkeys(_REDUCTIONS.split(), Reduce()),
    **dict.fromkeys(_POOLS.split(), Pool()),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), Reshape()),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), Softmax()),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), Quantizing()),
    "BatchNormalization": BatchNormalization(),
    "Concat": Concat(),
    "Conv": Conv(),
    "ConvTranspose": ConvTranspose(),
    "Div": Quotient(),
    "Dropout": Dropout(),
    "Expand": Expand(),
    "Gather": Gather(),
    "Gemm": Gemm(),
    "LayerNormalization": LayerNormalization(),
    "MatMul": MatMul(),
    "Mul": Product(),
    "Pad": Pad(),
    "RMSNormalization": RMSNormalization(),
    "Resize": Resize(),
    "Shape": Size(),
    "SimplifiedLayerNormalization": RMSNormalization(),
    "Slice": Slice(),
    "Split": Split(),
    "Tile": Tile(),
    "Transpose": Transpose(),
}


def rule_of(graph: GraphView, node: NodeProto) -> Rule:
    """The rule of a node: by its operator, unless its attributes vary by call."""
    if attributes.has_references(node):
        return BARRIER
    return RULES.get(graph.op(node), BARRIER)
