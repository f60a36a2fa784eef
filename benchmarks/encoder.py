"""A small transformer encoder, float and as a framework exports it after QAT.

Random weights. The second one is what torch's exporter writes: float weights behind
QuantizeLinear and DequantizeLinear and a Transpose, biases in float, one Q and DQ behind
each layer, its scales in constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxopt.quantization.ranges import Range, affine
from onnxopt.weights import Array

WIDTH, HEADS, LAYERS, TOKENS, FEATURES, CLASSES = 192, 4, 3, 64, 48, 10
OPSET = 17


def encoder(ranges: Mapping[str, Range] | None = None, seed: int = 0) -> ModelProto:
    """The float model; with the `ranges` of its values (`quantized`) the QAT export."""
    return _Encoder(ranges, seed).model()


def quantized(model: ModelProto) -> list[str]:
    """The values of the float model that the export quantizes."""
    kinds = ("Add", "LayerNormalization", "Softmax", "Mul", "MatMul", "Relu")
    names = [node.output[0] for node in model.graph.node if node.op_type in kinds]
    return ["x", *names]


class _Encoder:
    def __init__(self, ranges: Mapping[str, Range] | None, seed: int) -> None:
        self.ranges = ranges
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.tensors: list[TensorProto] = []

    def model(self) -> ModelProto:
        x = self.linear(self.fake("x"), FEATURES, WIDTH, "embed")
        for index in range(LAYERS):
            x = self.layer(x, f"layer{index}")
        x = self.linear(self.norm(x, "final"), WIDTH, CLASSES, "head")
        shape: list[Any] = ["batch", TOKENS, FEATURES]
        takes = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        gives = helper.make_tensor_value_info(
            x, TensorProto.FLOAT, ["batch", TOKENS, CLASSES]
        )
        graph = helper.make_graph(self.nodes, "encoder", [takes], [gives], self.tensors)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def layer(self, x: str, name: str) -> str:
        y = self.attention(self.norm(x, f"{name}.norm1"), name)
        x = self.binary("Add", x, y, f"{name}.residual1")
        y = self.norm(x, f"{name}.norm2")
        y = self.linear(y, WIDTH, 4 * WIDTH, f"{name}.up", activation=True)
        y = self.linear(y, 4 * WIDTH, WIDTH, f"{name}.down")
        return self.binary("Add", x, y, f"{name}.residual2")

    def attention(self, x: str, name: str) -> str:
        q, k, v = (
            self.heads(self.linear(x, WIDTH, WIDTH, f"{name}.{part}"), f"{name}.{part}")
            for part in "qkv"
        )
        k = self.node("Transpose", [k], f"{name}.kt", perm=[0, 1, 3, 2])
        scores = self.binary("MatMul", q, k, f"{name}.scores")
        factor = self.constant(np.float32(1 / math.sqrt(WIDTH // HEADS)), f"{name}.c")
        scores = self.fake(self.node("Mul", [scores, factor], f"{name}.scaled"))
        weights = self.fake(self.node("Softmax", [scores], f"{name}.softmax", axis=-1))
        y = self.binary("MatMul", weights, v, f"{name}.mixed")
        y = self.node("Transpose", [y], f"{name}.back", perm=[0, 2, 1, 3])
        shape = self.constant(np.array([0, TOKENS, WIDTH]), f"{name}.shape")
        y = self.node("Reshape", [y, shape], f"{name}.joined")
        return self.linear(y, WIDTH, WIDTH, f"{name}.out")

    def heads(self, x: str, name: str) -> str:
        shape = self.constant(np.array([0, TOKENS, HEADS, WIDTH // HEADS]), f"{name}.s")
        x = self.node("Reshape", [x, shape], f"{name}.split")
        return self.node("Transpose", [x], f"{name}.heads", perm=[0, 2, 1, 3])

    def linear(
        self, x: str, inputs: int, outputs: int, name: str, activation: bool = False
    ) -> str:
        weight = self.random.normal(size=(outputs, inputs)) / math.sqrt(inputs)
        weight = weight.astype(np.float32)
        bias = self.random.normal(size=outputs).astype(np.float32) / 10
        if self.ranges is None:
            w = self.constant(np.ascontiguousarray(weight.T), f"{name}.weight")
        else:
            w = self.fake_weight(self.constant(weight, f"{name}.weight"), weight, name)
            w = self.node("Transpose", [w], f"{name}.wt", perm=[1, 0])
        y = self.node("MatMul", [x, w], f"{name}.product")
        y = self.node("Add", [self.constant(bias, f"{name}.bias"), y], f"{name}.sum")
        if activation:
            y = self.node("Relu", [y], f"{name}.relu")
        return self.fake(y)

    def norm(self, x: str, name: str) -> str:
        ones = np.ones(WIDTH, np.float32)
        inputs = [x, self.constant(ones, f"{name}.g"), self.constant(ones, f"{name}.b")]
        return self.fake(self.node("LayerNormalization", inputs, f"{name}.y", axis=-1))

    def binary(self, op: str, first: str, second: str, name: str) -> str:
        return self.fake(self.node(op, [first, second], name))

    def fake(self, value: str) -> str:
        """The value through Q and DQ, in the export."""
        if self.ranges is None:
            return value
        made = affine(self.ranges[value], TensorProto.UINT8)
        pair = [
            self.constant(made.scale, f"{value}.scale"),
            self.constant(made.zero_point, f"{value}.zero"),
        ]
        codes = self.node("QuantizeLinear", [value, *pair], f"{value}.codes")
        return self.node("DequantizeLinear", [codes, *pair], f"{value}.fake")

    def fake_weight(self, value: str, weight: Array, name: str) -> str:
        scale = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
        pair = [
            self.constant(scale, f"{name}.w_scale"),
            self.constant(np.zeros(len(scale), np.int8), f"{name}.w_zero"),
        ]
        codes = self.node("QuantizeLinear", [value, *pair], f"{name}.w_codes", axis=0)
        return self.node("DequantizeLinear", [codes, *pair], f"{name}.w_fake", axis=0)

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        made = helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes)
        self.nodes.append(made)
        return output

    def constant(self, array: Array, name: str) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name
