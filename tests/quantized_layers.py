"""Models of one layer whose input, weight and bias are dequantized, for the QDQ tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array

from tests import support
from tests.support import Array

Feed = dict[str, Array]


@dataclass(frozen=True)
class Kind:
    """A layer: its operator, the dims of its input and weight, the weight's channels.

    `axis` is that of the output channels of the weight, `outputs` is their number.
    """

    op: str
    given: tuple[int, ...]
    weight: tuple[int, ...]
    axis: int
    outputs: int
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_product(self) -> bool:
        return self.op in ("Gemm", "MatMul")

    def along_outputs(self, numbers: Sequence[float]) -> Array:
        """A constant as it varies along the channels of the output."""
        array = np.array(numbers, np.float32)
        dims = [-1] if self.is_product else [-1] + [1] * (len(self.given) - 2)
        return array.reshape(dims) if array.ndim else array


KINDS = {
    "conv": Kind("Conv", (2, 3, 5, 5), (4, 3, 3, 3), 0, 4, {"pads": [1, 1, 1, 1]}),
    "conv-square": Kind("Conv", (1, 4, 5, 5), (4, 4, 1, 1), 0, 4),
    "conv-1d": Kind("Conv", (2, 3, 7), (4, 3, 3), 0, 4),
    "depthwise": Kind("Conv", (1, 4, 5, 5), (4, 1, 3, 3), 0, 4, {"group": 4}),
    "grouped": Kind("Conv", (1, 4, 5, 5), (6, 2, 3, 3), 0, 6, {"group": 2}),
    "transposed": Kind("ConvTranspose", (1, 3, 4, 4), (3, 4, 2, 2), 1, 4),
    "transposed-square": Kind("ConvTranspose", (1, 4, 4, 4), (4, 4, 2, 2), 1, 4),
    "gemm": Kind("Gemm", (3, 5), (5, 4), 1, 4),
    "gemm-square": Kind("Gemm", (3, 4), (4, 4), 1, 4, {"alpha": 0.5, "beta": 2.0}),
    "gemm-transposed": Kind("Gemm", (3, 4), (4, 4), 0, 4, {"transB": 1}),
    "matmul": Kind("MatMul", (3, 5), (5, 4), 1, 4),
    "matmul-square": Kind("MatMul", (3, 4), (4, 4), 1, 4),
}


class Maker:
    """Collects nodes and constants of a model."""

    def __init__(self, opset: int = 17) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.opset = opset

    def constant(self, name: str, array: Any) -> str:
        """Add an initializer."""
        self.weights.append(from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attrs: Any) -> str:
        """Add a node of one output."""
        self.nodes.append(make_node(op, list(inputs), [output], **attrs))
        return output

    def dequantized(
        self, name: str, codes: Array, scale: Array, zero: Array, axis: int | None = None
    ) -> str:
        """A constant of codes; per axis where the scale is."""
        names = [
            self.constant(f"{name}_q", codes),
            self.constant(f"{name}_s", scale),
            self.constant(f"{name}_z", zero),
        ]
        attrs = {} if scale.ndim == 0 else {"axis": axis}
        return self.node("DequantizeLinear", names, name, **attrs)

    def quantized(self, name: str, scale: float, zero: Array) -> str:
        """Round value `name` to codes; returns what is dequantized again."""
        names = [
            self.constant(f"{name}_s", np.float32(scale)),
            self.constant(f"{name}_z", zero),
        ]
        self.node("QuantizeLinear", [name, *names], f"{name}_q")
        return self.node("DequantizeLinear", [f"{name}_q", *names], f"{name}_d")

    def model(
        self, dims: Sequence[int], outputs: Sequence[str], kind: int = TensorProto.FLOAT
    ) -> ModelProto:
        """The model of input x with these dims."""
        graph = helper.make_graph(
            self.nodes,
            "layer",
            [make_tensor_value_info("x", TensorProto.FLOAT, dims)],
            [make_tensor_value_info(name, kind, None) for name in outputs],
            self.weights,
        )
        made: ModelProto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10
        )
        return made


def tensor(proto: ModelProto, name: str) -> Array:
    """The constant called `name`."""
    return np.asarray(to_array(support.find_tensor(proto, name)))


def maker_of(proto: ModelProto, name: str) -> NodeProto:
    """The node that makes value `name`."""
    return next(node for node in proto.graph.node if name in node.output)


def layer_of(proto: ModelProto, op_types: Sequence[str]) -> NodeProto:
    """The first node of one of these operators."""
    return next(node for node in proto.graph.node if node.op_type in op_types)


def feeds(dims: Sequence[int], count: int = 3) -> list[Feed]:
    """Normal numbers of the dims that input x has."""
    made = [np.random.default_rng(seed).standard_normal(dims) for seed in range(count)]
    return [{"x": array.astype(np.float32)} for array in made]
