"""merge-linear: one layer for two linear ones in a row, where that is less work.

    t = Conv(x, W, b)     3x3              y = Conv(x, VW, Vb + c)   3x3
    y = Conv(t, V, c)     1x1      ->

    t = MatMul(x, W)                       y = MatMul(x, W V)
    y = MatMul(t, V)

1. A Conv 1x1 behind a Conv or ConvTranspose of any kernel, padded or not: it is unpadded
   itself, and its strides multiply those before it (of a ConvTranspose it has none).
2. A Conv 1x1, unpadded and without strides, before a Conv of any kernel, which either has
   no padding or follows no bias: the padding stands for zeros, not for the bias. Before a
   ConvTranspose it must have no bias, since outputs there sum over different inputs.
3. Gemm and MatMul by constant matrices, also with the Add of a constant between two
   MatMul, which goes through the second.
4. Nothing else reads the value between the two or their weights; both are of one group.
   There must be fewer weights and fewer multiplications than before: not where the layers
   are a bottleneck.
5. Computed in float64 and rounded once to the weight's dtype.

Source: (x W + b) V + c = x (W V) + (b V + c); for convolutions, Ding et al., Diverse
Branch Block (https://arxiv.org/abs/2103.13425), transform III.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.layer import Layer
from onnxopt.linear import (
    FLOATS,
    LAYERS,
    DeclinedError,
    Floats,
    floats,
    is_finite,
    is_padded,
    smallest_normal,
)
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.weights import Array, elements

MAX_GROWTH = 64
"""Bytes that a merge may add: attributes, where weights are a few numbers."""
_CONVOLUTIONS = ("Conv", "ConvTranspose")


class MergeLinear(Pass):
    """Merge linear layers in a row: Conv 1x1 beside Conv, Gemm and MatMul in chains."""

    name: ClassVar[str] = "merge-linear"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at each layer that another one feeds."""
        for node in graph.visit(self, LAYERS):
            try:
                pair = _Pair.of(graph, node)
                edit = pair.merged() if pair is not None else None
            except DeclinedError as declined:
                graph.skip(node, str(declined))
                continue
            if edit is not None:
                graph.apply(edit, "two linear layers in a row")


class _Pair(NamedTuple):
    """`second` reads what `first` makes, plus constant `shift` where there is one."""

    first: Layer
    second: Layer
    shift: str

    @classmethod
    def of(cls, graph: GraphView, node: NodeProto) -> _Pair | None:
        """The pair that ends with `node`; None where there is none to think about."""
        maker, shift = _maker(graph, node.input[0]), ""
        if maker is not None and maker.op_type == "Add":
            maker, shift = _behind_shift(graph, maker)
        if maker is None or graph.op(maker) not in LAYERS:
            return None
        if (maker.op_type in _CONVOLUTIONS) != (node.op_type in _CONVOLUTIONS):
            return None
        if shift and (maker.op_type, node.op_type) != ("MatMul", "MatMul"):
            return None
        try:
            pair = cls(Layer.of_floats(graph, maker), Layer.of_floats(graph, node), shift)
        except DeclinedError:
            return None  # a weight that is computed, or quantized
        return pair if pair._fits() else None

    def _fits(self) -> bool:
        first, second = self.first, self.second
        if first.is_shared or second.is_shared or (first.groups, second.groups) != (1, 1):
            return False
        if attributes.get(second.node, "transA", 0):
            return False
        return (
            first.tensor.data_type == second.tensor.data_type
            and first.outputs == second.inputs
        )

    def merged(self) -> Edit | None:
        """The edit; None where it would not be less work."""
        if self.second.node.op_type not in _CONVOLUTIONS:
            return self._merged_products() if self._saves(1) else None
        taps = self._taps()
        return self._merged_convolutions() if taps and self._saves(taps) else None

    def _saves(self, taps: int) -> bool:
        """Whether there are fewer weights, biases with and without."""
        first, second = self.first, self.second
        before = elements(first.tensor) + elements(second.tensor)
        after = first.inputs * second.outputs * taps
        biases = first.outputs * (first.has_bias or bool(self.shift))
        biases += second.outputs * second.has_bias
        added = second.outputs * (biases > 0)
        return after < before and after + added < before + biases

    # ---- convolutions ----

    def _taps(self) -> int:
        """The size of the merged kernel; 0 where they cannot merge to less work.

        Where `_saves` of this many holds, there are fewer multiplications, too: the
        merged layer runs on no more positions than either of the two.
        """
        first, second = self.first, self.second
        if len(first.tensor.dims) != len(second.tensor.dims):
            return 0
        if self._follows:
            crops = first.node.op_type == "ConvTranspose" and is_padded(first.node)
            if crops and second.outputs > first.outputs:
                return 0
            return math.prod(first.tensor.dims[2:])
        if _is_pointwise(first) and (_ints(first, "strides") == 1).all():
            if first.inputs > first.outputs and _may_grow(second):
                return 0
            return math.prod(second.tensor.dims[2:])
        return 0

    @property
    def _follows(self) -> bool:
        """Whether the second is a Conv 1x1 that the first can do as well."""
        if not _is_pointwise(self.second):
            return False
        if (_ints(self.second, "strides") == 1).all():
            return True
        node = self.first.node
        auto = str(attributes.get(node, "auto_pad", "NOTSET"))
        return node.op_type == "Conv" and auto in ("NOTSET", "VALID")

    def _merged_convolutions(self) -> Edit:
        first, second = _matrix(self.first), _matrix(self.second)
        if self._follows:
            kept = self.first
            mixing = second.reshape(second.shape[:2])
            weight = np.tensordot(mixing, first, 1)
        else:
            kept = self.second
            mixing = second.reshape(*second.shape[:2], -1).sum(2)
            by_input = np.tensordot(second, first.reshape(first.shape[:2]), (1, 0))
            weight = np.moveaxis(by_input, -1, 1)
        bias = self.second.bias() + mixing @ self._bias_before()
        given = _attributes(kept.node)
        steps = _ints(self.second, "strides")
        if self._follows and (steps != 1).any():
            strides = _ints(self.first, "strides") * steps
            given["strides"] = strides.tolist()
        _check_precision(weight, self.second)
        if kept.node.op_type == "ConvTranspose":
            weight = np.swapaxes(weight, 0, 1)
        edit = Edit(self.graph, self.second.node, max_growth=MAX_GROWTH)
        inputs = [self.first.node.input[0], self._add(edit, weight, 1)]
        if self.first.has_bias or self.second.has_bias:
            inputs.append(self._add(edit, bias, 2))
        edit.rewrite(kept.node.op_type, inputs, given)
        return edit

    def _bias_before(self) -> Floats:
        """The first one's bias, where the second one sees all of it everywhere."""
        bias, after = self.first.bias(), self.second.node
        if bias.any() and not self._follows:
            if after.op_type == "ConvTranspose":
                raise DeclinedError("the bias before it is seen by some outputs only")
            if is_padded(after):
                raise DeclinedError("its padding stands beside the bias before it")
        return bias

    # ---- products ----

    def _merged_products(self) -> Edit:
        first, second = self.first.node, self.second.node
        mixing = _matrix(self.second)
        whole = mixing @ _matrix(self.first)
        _check_precision(whole, self.second)
        weight = np.ascontiguousarray(whole.T)
        edit = Edit(self.graph, second, max_growth=MAX_GROWTH)
        inputs = [first.input[0], self._add(edit, weight, 1)]
        if self.shift:
            bias = mixing @ floats(self.graph, self.shift)
            (product,) = edit.insert("MatMul", inputs)
            edit.rewrite("Add", [product, self._add(edit, bias, 1)])
        elif (first.op_type, second.op_type) == ("MatMul", "MatMul"):
            edit.rewrite("MatMul", inputs)
        else:
            if self.first.has_bias or self.second.has_bias:
                bias = self.second.bias() + mixing @ self.first.bias()
                inputs.append(self._add(edit, bias, 2))
            edit.rewrite("Gemm", inputs, {"transA": attributes.get(first, "transA")})
        return edit

    # ---- both ----

    @property
    def graph(self) -> GraphView:
        """Where they stand."""
        return self.second.graph

    def _add(self, edit: Edit, array: Floats, slot: int) -> str:
        """A new constant, rounded to the type of the weights."""
        with np.errstate(over="ignore"):
            rounded: Array = array.astype(FLOATS[self.second.tensor.data_type])
        if not is_finite(rounded):
            raise DeclinedError(f"the merged weight does not fit into {rounded.dtype}")
        names = [*self.second.node.input, *self.first.node.input[2:], "bias"]
        return edit.add_weight(rounded, names[slot] or "bias")


def _maker(graph: GraphView, name: str) -> NodeProto | None:
    """What makes a value that one node of the same scope reads, and nothing else."""
    use = graph.only_use(name)
    return graph.producer(name) if use is not None and use.view is graph else None


def _behind_shift(graph: GraphView, add: NodeProto) -> tuple[NodeProto | None, str]:
    """The MatMul to which `add` adds a constant [outputs], and that constant."""
    for slot in (0, 1):
        shift, maker = graph.weight(add.input[1 - slot]), _maker(graph, add.input[slot])
        if shift is None or maker is None or graph.op(maker) != "MatMul":
            continue
        weight = graph.weight(maker.input[1])
        if weight is not None and list(weight.dims[1:]) == list(shift.dims):
            return maker, add.input[1 - slot]
    return None, ""


def _is_pointwise(layer: Layer) -> bool:
    """Whether it is a Conv that works on each position alone."""
    is_single = all(size == 1 for size in layer.tensor.dims[2:])
    return layer.node.op_type == "Conv" and is_single and not is_padded(layer.node)


def _may_grow(layer: Layer) -> bool:
    """Whether a Conv may have more positions after it than before it."""
    if layer.node.op_type != "Conv":
        return False  # counted by the positions before it
    pads = np.array(attributes.get(layer.node, "pads", [0, 0]), np.int64)
    sizes = np.array(layer.tensor.dims[2:], np.int64) - 1
    added = pads.reshape(2, -1).sum(0)
    return bool((added > sizes * _ints(layer, "dilations")).any())


def _ints(layer: Layer, name: str) -> npt.NDArray[np.int64]:
    """Strides or dilations."""
    rank = len(layer.tensor.dims) - 2
    return np.array(attributes.get(layer.node, name, [1] * rank), np.int64)


def _matrix(layer: Layer) -> Floats:
    """[outputs, inputs, ...] in float64, its factor included."""
    weight = layer.graph.model.weights.array(layer.tensor).astype(np.float64)
    node = layer.node
    if node.op_type == "ConvTranspose":
        return np.swapaxes(weight, 0, 1)
    if node.op_type == "Gemm":
        weight *= float(attributes.get(node, "alpha", 1.0))
    if node.op_type == "Conv" or attributes.get(node, "transB", 0):
        return weight
    return weight.T


def _check_precision(matrix: Floats, layer: Layer) -> None:
    """Below the normal numbers of its type an output would lose its last digits."""
    dtype = FLOATS[layer.tensor.data_type]
    peaks = np.abs(matrix.reshape(len(matrix), -1)).max(1, initial=0)
    if ((peaks > 0) & (peaks < smallest_normal(np.dtype(dtype)))).any():
        raise DeclinedError(f"a channel would lose its precision in {dtype}")


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {item.name: attributes.value_of(item) for item in node.attribute}
