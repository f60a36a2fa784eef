"""Operators on codes and those between Q and DQ: the same codes, there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper
from onnx.helper import make_node
from onnx.numpy_helper import from_array

from onnxopt.manager import Context
from onnxopt.model import Model
from onnxopt.target import target
from tests import support
from tests.support import Array

MICROSOFT = "com.microsoft"
SCALES = {"x": 0.0517, "w": 0.0213, "y": 0.1137}
WIDEST = 63
"""Products of uint8 and larger int8 saturate on processors without VNNI."""
FLOATING = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
"""What stands in cases whose result is floats."""
Build = Callable[[np.random.Generator, str, bool], "Case"]


class Case:
    """A graph of nodes, the arrays that are constant and those that are fed."""

    def __init__(self, nodes: list[NodeProto], weights: dict[str, Array]) -> None:
        self.nodes = nodes
        self.weights = weights
        self.inputs: dict[str, tuple[str, tuple[int, ...]]] = {}

    def model(self, opset: int = 17) -> ModelProto:
        """Its model, whose output is `y`."""
        infos = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape
            )
            for name, (kind, shape) in self.inputs.items()
        ]
        kind, shape = self.inputs["x"]
        if any(node.op_type in FLOATING for node in self.nodes):
            kind = "float32"
        output = helper.make_tensor_value_info(
            "y", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), [None] * len(shape)
        )
        graph = helper.make_graph(
            self.nodes,
            "g",
            infos,
            [output],
            [from_array(array, name) for name, array in self.weights.items()],
        )
        domains = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        made: ModelProto = helper.make_model(graph, opset_imports=domains, ir_version=8)
        return made


def scales(kind: str, channels: int | None = None) -> dict[str, Array]:
    """The scales and zero points of x, w and y."""
    rng = np.random.default_rng(1)
    zero = {"uint8": 120, "int8": -5}[kind]
    made: dict[str, Array] = {}
    for name, scale in SCALES.items():
        made[f"{name}s"] = np.array(scale, np.float32)
        made[f"{name}z"] = np.array(zero, kind)
    if channels:
        made["ws"] = rng.uniform(0.01, 0.03, channels).astype(np.float32)
        made["wz"] = np.zeros(channels, np.int8)
    else:
        made["wz"] = np.array(0, np.int8)
    return made


def conv(rng: np.random.Generator, kind: str, per_channel: bool, **attrs: Any) -> Case:
    """QLinearConv with a bias."""
    weights = scales(kind, 6 if per_channel else None)
    group = int(attrs.get("group", 1))
    weights["w"] = rng.integers(-WIDEST, WIDEST + 1, (6, 4 // group, 3, 3)).astype(
        np.int8
    )
    weights["b"] = rng.integers(-5000, 5000, 6).astype(np.int32)
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
    case = Case([make_node("QLinearConv", names, ["y"], **attrs)], weights)
    case.inputs["x"] = kind, (2, 4, 7, 7)
    return case


def padded(rng: np.random.Generator, kind: str, per_channel: bool) -> Case:
    return conv(rng, kind, per_channel, pads=[1, 1, 1, 1], strides=[2, 2], group=2)


def matmul(rng: np.random.Generator, kind: str, per_channel: bool) -> Case:
    weights = scales(kind, 5 if per_channel else None)
    weights["w"] = rng.integers(-WIDEST, WIDEST + 1, (8, 5)).astype(np.int8)
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    case = Case([make_node("QLinearMatMul", names, ["y"])], weights)
    case.inputs["x"] = kind, (2, 3, 8)
    return case


def gemm(rng: np.random.Generator, kind: str, per_channel: bool) -> Case:
    weights = scales(kind, 5 if per_channel else None)
    weights["w"] = rng.integers(-WIDEST, WIDEST + 1, (5, 8)).astype(np.int8)
    weights["b"] = rng.integers(-5000, 5000, 5).astype(np.int32)
    names = ["x", "xs", "xz", "w", "ws", "wz", "b", "ys", "yz"]
    node = make_node("QGemm", names, ["y"], domain=MICROSOFT, transB=1, alpha=0.5)
    case = Case([node], weights)
    case.inputs["x"] = kind, (3, 8)
    return case


def binary(op_type: str) -> Build:
    def build(rng: np.random.Generator, kind: str, per_channel: bool) -> Case:
        weights = scales(kind)
        names = ["x", "xs", "xz", "v", "ws", "xz", "ys", "yz"]
        node = make_node(op_type, names, ["y"], domain=MICROSOFT)
        case = Case([node], weights)
        case.inputs["x"] = kind, (2, 3, 40)
        case.inputs["v"] = kind, (3, 40)
        return case

    return build


def unary(op_type: str, **attrs: Any) -> Build:
    def build(rng: np.random.Generator, kind: str, per_channel: bool) -> Case:
        names = ["x", "xs", "xz", "ys", "yz"]
        node = make_node(op_type, names, ["y"], domain=MICROSOFT, **attrs)
        case = Case([node], scales(kind))
        case.weights["ys"] = np.array(1 / 256, np.float32)
        case.inputs["x"] = kind, (2, 3, 8, 8)
        return case

    return build


def concat(rng: np.random.Generator, kind: str, per_channel: bool) -> Case:
    names = ["ys", "yz", "x", "xs", "xz", "v", "ws", "xz"]
    node = make_node("QLinearConcat", names, ["y"], domain=MICROSOFT, axis=1)
    case = Case([node], scales(kind))
    case.inputs["x"] = kind, (2, 3, 5)
    case.inputs["v"] = kind, (2, 4, 5)
    return case


def where(rng: np.random.Generator, kind: str, per_channel: bool) -> Case:
    names = ["c", "x", "xs", "xz", "v", "ws", "xz", "ys", "yz"]
    case = Case([make_node("QLinearWhere", names, ["y"], domain=MICROSOFT)], scales(kind))
    case.inputs["c"] = "bool", (2, 3, 5)
    case.inputs["x"] = kind, (2, 3, 5)
    case.inputs["v"] = kind, (2, 3, 5)
    return case


BUILDS: dict[str, Build] = {
    "conv": conv,
    "padded": padded,
    "matmul": matmul,
    "gemm": gemm,
    "add": binary("QLinearAdd"),
    "mul": binary("QLinearMul"),
    "sigmoid": unary("QLinearSigmoid"),
    "leaky": unary("QLinearLeakyRelu", alpha=0.1),
    "pool": unary("QLinearAveragePool", kernel_shape=[2, 2], strides=[2, 2]),
    "global": unary("QLinearGlobalAveragePool", channels_last=0),
    "softmax": unary("QLinearSoftmax", axis=-1, opset=17),
    "concat": concat,
    "where": where,
}
WITH_WEIGHT = ("conv", "padded", "matmul", "gemm")
CASES = [
    (name, kind, per_channel)
    for name in BUILDS
    for kind in ("uint8", "int8")
    for per_channel in ((False, True) if name in WITH_WEIGHT else (False,))
]


def feeds(model: ModelProto) -> list[dict[str, Array]]:
    """Codes of the whole range."""
    made = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        feed = {}
        for value in model.graph.input:
            tensor = value.type.tensor_type
            dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            dims = [dim.dim_value for dim in tensor.shape.dim]
            if dtype == np.bool_:
                feed[value.name] = rng.integers(0, 2, dims) == 1
            elif dtype.kind == "f":
                feed[value.name] = rng.standard_normal(dims).astype(dtype)
            else:
                info = np.iinfo(dtype)
                feed[value.name] = rng.integers(info.min, info.max, dims).astype(dtype)
        made.append(feed)
    return made


def assert_near(source: ModelProto, made: ModelProto) -> None:
    """Equal codes; one in a hundred may be the next one, where a value lies midway."""
    onnx.checker.check_model(made)
    for feed in feeds(source):
        expected, found = support.run(source, feed)[0], support.run(made, feed)[0]
        assert expected.dtype == found.dtype
        if expected.dtype.kind == "f":
            support.assert_same([expected], [found], "equivalent")
            continue
        off = np.abs(expected.astype(np.int64) - found.astype(np.int64))
        assert off.max() <= 1
        assert (off > 0).mean() <= 0.01
        assert np.unique(expected).size > 2, "the codes say nothing"


def bytes_of_weights(proto: ModelProto) -> int:
    return sum(len(t.raw_data) for t in proto.graph.initializer if t.data_type != 1)


def floats_of_weights(proto: ModelProto) -> int:
    return sum(int(np.prod(t.dims)) for t in proto.graph.initializer if t.data_type == 1)


@pytest.mark.parametrize(("name", "kind", "per_channel"), CASES)
def test_there_and_back(
    name: str, kind: str, per_channel: bool, context: Context
) -> None:
    """To Q and DQ, and from there to the operator that it was."""
    case = BUILDS[name](np.random.default_rng(0), kind, per_channel)
    source = case.model()
    opened = support.run_passes(source, "qoperator-to-qdq", context)
    assert not support.skips(opened)
    assert "QLinear" not in " ".join(support.op_types(opened))
    middle = support.final(opened)
    assert_near(source, middle)
    assert bytes_of_weights(middle) <= bytes_of_weights(source)
    channels = sum(len(tensor.dims) for tensor in source.graph.initializer)
    assert floats_of_weights(middle) <= floats_of_weights(source) + 6 + channels
    again = support.run_passes(middle, "qdq-to-qoperator", context)
    assert not support.skips(again)
    assert support.op_types(again) == [node.op_type for node in case.nodes]
    back = support.final(again)
    assert_near(source, back)
    for first, second in zip(source.graph.node, back.graph.node, strict=True):
        assert list(first.input) == list(second.input)


def dynamic(op_type: str, per_channel: bool, bias: bool) -> Case:
    """ConvInteger or MatMulInteger as ONNX Runtime's quantizer writes it."""
    rng = np.random.default_rng(0)
    is_conv = op_type == "ConvInteger"
    dims, channels = ((6, 3, 3, 3), 6) if is_conv else ((8, 5), 5)
    shape = ((1, channels, 1, 1) if is_conv else (channels,)) if per_channel else ()
    weights = {
        "w": rng.integers(0, 255, dims).astype(np.uint8),
        "wz": np.array(110, np.uint8),
        "ws": rng.uniform(0.01, 0.02, shape).astype(np.float32),
    }
    sum_ = "i"
    nodes = [
        make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        make_node(op_type, ["q", "w", "z", "wz"], ["i"]),
        make_node("Mul", ["s", "ws"], ["f"]),
    ]
    if bias:
        dims = (1, channels, 1, 1) if is_conv else (channels,)
        weights["b"] = rng.integers(-5000, 5000, dims).astype(np.int32)
        nodes.append(make_node("Add", ["b", "i"], ["j"]))
        sum_ = "j"
    nodes.append(make_node("Cast", [sum_], ["c"], to=1))
    nodes.append(make_node("Mul", ["f", "c"], ["y"]))
    case = Case(nodes, weights)
    case.inputs["x"] = "float32", ((2, 3, 6, 6) if is_conv else (2, 4, 8))
    return case


@pytest.mark.parametrize("op_type", ["ConvInteger", "MatMulInteger"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_integer_products(
    op_type: str, per_channel: bool, bias: bool, context: Context
) -> None:
    """Products of what is quantized on the way; the weight stays what it is."""
    source = dynamic(op_type, per_channel, bias).model()
    opened = support.run_passes(source, "qoperator-to-qdq", context)
    assert not support.skips(opened)
    assert op_type not in support.op_types(opened)
    made = support.final(opened)
    assert_near(source, made)
    assert support.find_tensor(made, "w") == support.find_tensor(source, "w")
    again = support.run_passes(made, "qdq-to-qoperator", context)
    assert not support.skips(again)
    assert op_type in support.op_types(again)
    assert_near(source, support.final(again))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", ["", "b"])
@pytest.mark.parametrize("op_type", ["MatMulIntegerToFloat", "DynamicQuantizeMatMul"])
def test_products_to_floats(
    op_type: str, bias: str, per_channel: bool, context: Context
) -> None:
    """ONNX Runtime's own."""
    rng = np.random.default_rng(0)
    weights = scales("uint8", 5 if per_channel else None)
    weights["w"] = rng.integers(-WIDEST, WIDEST + 1, (8, 5)).astype(np.int8)
    weights["b"] = rng.standard_normal(5).astype(np.float32)
    names = ["x", "w", "xs", "ws", "xz", "wz", bias]
    if op_type == "DynamicQuantizeMatMul":
        names = ["x", "w", "ws", "wz", bias]
    case = Case([make_node(op_type, names, ["y"], domain=MICROSOFT)], weights)
    kind = "float32" if op_type == "DynamicQuantizeMatMul" else "uint8"
    case.inputs["x"] = kind, (3, 8)
    source = case.model()
    opened = support.run_passes(source, "qoperator-to-qdq", context)
    assert not support.skips(opened)
    assert support.op_types(opened).count("MatMul") == 1
    assert_near(source, support.final(opened))


def changed(case: Case, change: Callable[[ModelProto], None]) -> Model:
    """What the pass back makes of the QDQ form of `case` after a change."""
    opened = support.run_passes(case.model(), "qoperator-to-qdq")
    proto = support.final(opened)
    change(proto)
    return support.run_passes(proto, "qdq-to-qoperator")


def replace(name: str, array: Array) -> Callable[[ModelProto], None]:
    def change(proto: ModelProto) -> None:
        support.find_tensor(proto, name).CopyFrom(from_array(array, name))

    return change


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("b_scale", np.full(6, 1e-3, np.float32), "the scale of its bias"),
        ("wz", np.arange(6, dtype=np.int8), "differ from channel to channel"),
        ("yz", np.array(0, np.int8), "codes of different types"),
    ],
)
def test_what_stays(name: str, array: Array, reason: str) -> None:
    """Declined, and why."""
    model = changed(
        conv(np.random.default_rng(0), "uint8", per_channel=True), replace(name, array)
    )
    assert model.ledger.edits == 0
    assert reason in support.skips(model)[0].reason


def test_softmax_of_another_scale(context: Context) -> None:
    """ONNX Runtime's kernel is off by more than rounding there."""
    case = BUILDS["softmax"](np.random.default_rng(0), "uint8", False)
    case.weights["ys"] = np.array(0.013, np.float32)
    kept = support.run_passes(case.model(), "qoperator-to-qdq", context)
    assert kept.ledger.edits == 0
    assert "1/256" in support.skips(kept)[0].reason


def test_operators_of_the_runtime_need_its_target(context: Context) -> None:
    """Standard operators only, where the target does not say otherwise."""
    source = BUILDS["add"](np.random.default_rng(0), "uint8", False).model()
    opened = support.final(support.run_passes(source, "qoperator-to-qdq", context))
    del opened.opset_import[1:]
    kept = support.run_passes(opened, "qdq-to-qoperator", context)
    assert kept.ledger.edits == 0
    assert "operator of ONNX Runtime" in support.skips(kept)[0].reason
    ours = Context(target=target("ort-cpu"), evaluator=context.evaluator)
    made = support.run_passes(opened, "qdq-to-qoperator", ours)
    assert support.op_types(made) == ["QLinearAdd"]
    assert_near(source, support.final(made))
