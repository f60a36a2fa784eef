"""A quantized model with the rounding of its codes taken out.

    q = QuantizeLinear(x, s, z)        q = Clip(x / s + z, 0, 255)
    y = DequantizeLinear(q, s, z)  ->  y = (q - z) * s

Two right evaluations of a quantized model may differ by whole codes, so a small error
hides among them. Without rounding the model is smooth and has the noise floor of a
float model, while scales, zero points, saturation and everything between are as they
were. Constants keep their rounding: they are codes in one model and floats in another.
Quantizers in single steps lose their Round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxopt import attributes
from onnxopt.validation.single_steps import rounding

# Nodes that only move elements of input 0 (of all inputs: Concat).
_CARRIERS = {
    "Concat",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
# Clip takes its limits as inputs from here on.
_OLDEST_OPSET = 11


_ROUNDING = re.compile("QLinear|QGemm|QAttention|DynamicQuantize")


class _UnsuitableError(Exception):
    """The codes are used in a way that has no counterpart without rounding."""


def unrounded(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy without rounding; None where codes are used for more than Q-DQ.

    The model has to hold its weights. None too if nothing would change.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    work = _Work(copy)
    try:
        work.run()
    except _UnsuitableError:
        return None
    return copy if work.codes or work.rounds else None


@dataclass
class _Work:
    model: onnx.ModelProto
    codes: dict[str, None] = field(default_factory=dict)
    rounds: bool = False

    def run(self) -> None:
        """Rewrite the main graph in place. Raises _UnsuitableError."""
        graph = self.model.graph
        if self._opset() < _OLDEST_OPSET or _rounds_elsewhere(self.model):
            raise _UnsuitableError
        rounds = rounding(graph.node)
        if any(rounds.values()):
            raise _UnsuitableError  # a Cast to integers would round instead
        self.constants = dict(_constants(graph))
        varying = self._varying()
        nodes: list[NodeProto] = []
        for node in graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] in varying:
                nodes += self._quantize(node)
            elif node.op_type == "DequantizeLinear" and node.input[0] in self.codes:
                nodes += self._dequantize(node)
            elif node.output and node.output[0] in rounds and node.input[0] in varying:
                nodes.append(helper.make_node("Identity", node.input, node.output))
                self.rounds = True
            else:
                nodes.append(node)
                self._follow(node)
        if any(output.name in self.codes for output in graph.output):
            raise _UnsuitableError
        del graph.node[:]
        graph.node.extend(nodes)
        self._forget_types()

    def _opset(self) -> int:
        versions = [
            e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx")
        ]
        return max(versions, default=0)

    def _varying(self) -> set[str]:
        """Tensors that depend on an input."""
        graph = self.model.graph
        names = {info.name for info in graph.input} - set(self.constants)
        for node in graph.node:
            if names.intersection(attributes.reads(node)):
                names.update(node.output)
        return names

    def _follow(self, node: NodeProto) -> None:
        """Codes may be moved about, and are used for nothing else."""
        used = [name in self.codes for name in attributes.reads(node)]
        if not any(used):
            return
        data = used if node.op_type == "Concat" else used[:1]
        rest = used[len(data) :]
        if node.op_type not in _CARRIERS or not all(data) or any(rest):
            raise _UnsuitableError
        self.codes.update(dict.fromkeys(node.output))

    def _quantize(self, node: NodeProto) -> Iterator[NodeProto]:
        x, scale, y = node.input[0], node.input[1], node.output[0]
        low, high = self._limits(node)
        kind = self._scale_type(scale)
        zero = self._zero(node, kind)
        yield helper.make_node("Div", [x, scale], [f"{y}/divided"])
        yield from zero
        yield helper.make_node("Add", [f"{y}/divided", f"{y}/zero"], [f"{y}/moved"])
        limits = {f"{y}/low": low, f"{y}/high": high}
        for name, value in limits.items():
            self._constant(name, value, kind)
        yield helper.make_node("Clip", [f"{y}/moved", *limits], [y])
        self.codes[y] = None

    def _dequantize(self, node: NodeProto) -> Iterator[NodeProto]:
        q, scale, y = node.input[0], node.input[1], node.output[0]
        yield from self._zero(node, self._scale_type(scale))
        yield helper.make_node("Sub", [q, f"{y}/zero"], [f"{y}/centred"])
        yield helper.make_node("Mul", [f"{y}/centred", scale], [y])

    def _zero(self, node: NodeProto, kind: int) -> list[NodeProto]:
        """Nodes that give the zero point as a float, under the name `<output>/zero`."""
        name = f"{node.output[0]}/zero"
        if len(node.input) < 3 or not node.input[2]:
            self._constant(name, 0, kind)
            return []
        return [helper.make_node("Cast", [node.input[2]], [name], to=kind)]

    def _constant(self, name: str, value: float, kind: int) -> None:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        tensor = numpy_helper.from_array(np.array(value, dtype=dtype), name)
        self.model.graph.initializer.append(tensor)

    def _scale_type(self, scale: str) -> int:
        """Element type of a scale that is one number. Raises _UnsuitableError."""
        tensor = self.constants.get(scale)
        if tensor is None or np.prod(tensor.dims, dtype=np.int64) != 1:
            raise _UnsuitableError
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            raise _UnsuitableError
        return int(tensor.data_type)

    def _limits(self, node: NodeProto) -> tuple[int, int]:
        """Smallest and largest code. Raises _UnsuitableError for fp8 and fp4."""
        kind = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
        if len(node.input) > 2 and node.input[2]:
            zero = self.constants.get(node.input[2])
            if zero is None:
                raise _UnsuitableError
            kind = zero.data_type
        return _code_limits(kind or TensorProto.UINT8)

    def _forget_types(self) -> None:
        """Declared types of codes are no longer true."""
        kept = [i for i in self.model.graph.value_info if i.name not in self.codes]
        del self.model.graph.value_info[:]
        self.model.graph.value_info.extend(kept)


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t


def _code_limits(kind: int) -> tuple[int, int]:
    bits: dict[int, tuple[int, int]] = {
        TensorProto.UINT8: (0, 8),
        TensorProto.INT8: (1, 8),
        TensorProto.UINT16: (0, 16),
        TensorProto.INT16: (1, 16),
        TensorProto.UINT4: (0, 4),
        TensorProto.INT4: (1, 4),
    }
    if kind not in bits:
        raise _UnsuitableError
    signed, width = bits[kind]
    low = -(2 ** (width - 1)) if signed else 0
    return low, low + 2**width - 1


def _rounds_elsewhere(model: onnx.ModelProto) -> bool:
    """Whether something that stays rounds to codes: integer operators, inner scopes."""
    outer = [node.op_type for node in model.graph.node]
    inner = [node.op_type for node in _inner_nodes(model)]
    return any(
        "Integer" in op_type or _ROUNDING.match(op_type) for op_type in (*outer, *inner)
    ) or any("QuantizeLinear" in op_type for op_type in inner)


def _inner_nodes(model: onnx.ModelProto) -> Iterator[NodeProto]:
    for node in model.graph.node:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from attributes.nodes_in(graph.node)
    for function in model.functions:
        yield from attributes.nodes_in(function.node)
