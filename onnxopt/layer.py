"""Linear layers with constant weights, and what can be folded into these.

A `Layer` is a Conv, ConvTranspose, Gemm or MatMul as the passes see it that scale and
shift: it knows which axes of its weight are channels, however the operator lays them out,
and writes new weights in place of the old ones. The weight is a constant of floats, or
one of integer codes behind a DequantizeLinear (`layer_weight.py`).
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.layer_weight import FloatWeight, Weight, layer_weight
from onnxopt.linear import (
    FLOATS,
    LAYERS,
    DeclinedError,
    Floats,
    Layout,
    floats,
    is_padded,
    set_constant,
)
from onnxopt.quantization.coded_weight import CodedWeight, dequantized_constant
from onnxopt.quantization.product import (
    INT32_LARGEST,
    INVISIBLE,
    check_float_bias,
    dequantized_peak,
    product_scale,
)


class Layer(msgspec.Struct, frozen=True):
    """A linear operator whose weight is a constant."""

    graph: GraphView
    node: NodeProto
    weight: Weight
    layout: Layout

    @classmethod
    def of(cls, graph: GraphView, node: NodeProto) -> Layer:
        """The layer that `node`, one of LAYERS, is; raises DeclinedError."""
        if attributes.has_references(node):
            raise DeclinedError("the layer differs from call to call")
        is_product = node.op_type in ("Gemm", "MatMul")
        if is_product and graph.opset() < 7:
            raise DeclinedError("Gemm broadcasts by attribute before opset 7")
        weight = layer_weight(graph, node)
        rank = len(weight.dims)
        if (rank != 2) if is_product else (rank < 3):
            raise DeclinedError(f"the weight of the {node.op_type} is of another rank")
        return cls(graph, node, weight, _layout(node, weight.dims))

    @classmethod
    def of_floats(cls, graph: GraphView, node: NodeProto) -> Layer:
        """`of`, where the weight is no quantized one."""
        layer = cls.of(graph, node)
        if not isinstance(layer.weight, FloatWeight):
            raise DeclinedError("the weight is quantized")
        return layer

    @classmethod
    def beside(
        cls, graph: GraphView, node: NodeProto | None, between: str
    ) -> Layer | None:
        """The layer that `node` is, where nothing else reads its weight.

        `between` is the value by which it was found, which nothing else may read.
        """
        if node is None or graph.op(node) not in LAYERS:
            return None
        if graph.only_use(between) is None:
            return None
        try:
            layer = cls.of(graph, node)
        except DeclinedError:
            return None
        return None if layer.is_shared else layer

    @property
    def tensor(self) -> TensorProto:
        """The weight, which is one of floats."""
        assert isinstance(self.weight, FloatWeight), "see `of_floats`"
        return self.weight.tensor

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return self.layout.shape[0] * self.layout.shape[self.layout.outputs]

    @property
    def inputs(self) -> int:
        """The number of input channels."""
        return self.layout.shape[0] * self.layout.shape[self.layout.inputs]

    @property
    def groups(self) -> int:
        """The number of groups of channels that do not see one another."""
        return self.layout.shape[0]

    @property
    def output_axis(self) -> int | None:
        """The axis of the output's channels; None where its rank is not known."""
        if self.node.op_type != "MatMul":
            return 1
        return None if self.rank is None else self.rank - 1

    @property
    def rank(self) -> int | None:
        """The number of dims of the output."""
        if self.node.op_type != "MatMul":
            return len(self.weight.dims)
        shape = self.graph.shape(self.node.input[0])
        return None if shape is None else len(shape)

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the product, constant or not."""
        return len(self.node.input) > 2 and bool(self.node.input[2])

    @property
    def is_shared(self) -> bool:
        """Whether somebody else reads the weight, so that another one is a copy."""
        return self.weight.is_shared

    def bias(self) -> Floats:
        """What is added to each output channel."""
        if not self.has_bias:
            return np.zeros(self.outputs)
        bias = _bias_values(self.graph, self.node.input[2])
        if self.node.op_type == "Gemm":
            bias = bias * float(attributes.get(self.node, "beta", 1.0))
        one_row = not bias.ndim or bias.shape[-1] == bias.size
        if bias.size not in (1, self.outputs) or not one_row:
            raise DeclinedError("the bias of the Gemm is not one per channel")
        return np.broadcast_to(bias.reshape(-1), (self.outputs,))

    def scale_outputs(
        self, edit: Edit, factor: Floats, shift: Floats, *, may_move_zero: bool = False
    ) -> None:
        """Let the layer compute factor * y + shift, one of each per output channel.

        `may_move_zero`: a weight of codes may get another zero point for it.
        """
        _check_count(self.outputs, factor)
        bias = self.bias() * factor + shift
        kept = factor
        if isinstance(self.weight, CodedWeight):
            kept = self._kept_integer(self.weight, factor, bias)
        if (kept != 1).any():
            self._scale_weight(edit, kept, self.layout.outputs, may_move_zero)
        if shift.any() or not self._scale_bias_codes(edit, factor):
            self.write_bias(edit, bias)

    def scale_inputs(self, edit: Edit, factor: Floats, shift: Floats) -> None:
        """Let the layer read x where it read factor * x + shift, per input channel."""
        _check_count(self.inputs, factor)
        if attributes.get(self.node, "transA", 0):
            raise DeclinedError("its input channels are not the second axis")
        if shift.any():
            self._check_shiftable()
            self.write_bias(edit, self.bias() + self._response(shift))
        if (factor != 1).any():
            self._scale_weight(edit, factor, self.layout.inputs, False)

    def scale(self, edit: Edit, factor: float) -> None:
        """Let the weight be `factor` times what it was, and the bias what it is."""
        self._scale_weight(edit, np.array([factor]), self.layout.outputs, False)

    def write_bias(self, edit: Edit, bias: Floats) -> None:
        """Give the layer another bias; a MatMul of rank 2 becomes a Gemm for it."""
        if not self.has_bias and not bias.any():
            return
        if self.node.op_type == "MatMul":
            if self.rank != 2:
                raise DeclinedError("the MatMul is not of rank 2")
            edit.set_op_type(self.node, "Gemm")
        has_floats = self.has_bias and self.graph.weight(self.node.input[2]) is not None
        if not has_floats:
            check_float_bias(self.graph, self.node)
        with np.errstate(over="ignore"):
            rounded = bias.astype(FLOATS[self.weight.data_type])
        set_constant(self.graph, edit, self.node, 2, rounded)
        if attributes.find(self.node, "beta") is not None:
            edit.set_attribute(self.node, "beta", None)

    def select_outputs(self, edit: Edit, indices: npt.NDArray[np.int64]) -> None:
        """Let the layer, of one group, compute these output channels in this order."""
        if self.has_bias:
            self.write_bias(edit, self.bias()[indices])
        self.weight.take(edit, indices, self.layout.outputs - 1)

    def permute_inputs(self, edit: Edit, indices: npt.NDArray[np.int64]) -> None:
        """Let the layer, of one group, read x where input i was channel indices[i] of x.

        `indices` is a permutation.
        """
        self.weight.take(edit, np.argsort(indices), self.layout.inputs - 1)

    def _scale_weight(
        self, edit: Edit, factor: Floats, axis: int, may_move_zero: bool
    ) -> None:
        """The weight times one factor per channel along `axis` of the layout, or one."""
        spread = self._spread(factor, axis) if factor.size > 1 else factor
        if spread.size == 1:
            spread = spread.reshape([1] * len(self.layout.shape))
        self.weight.scale(edit, spread, self.layout, may_move_zero=may_move_zero)

    def _spread(self, factor: Floats, axis: int) -> Floats:
        """One number per channel, as it broadcasts to the layout of the weight."""
        dims = [1] * len(self.layout.shape)
        dims[0], dims[axis] = self.layout.shape[0], self.layout.shape[axis]
        return factor.reshape(dims)

    def _response(self, shift: Floats) -> Floats:
        """What the product is where the input is `shift` everywhere."""
        weight = self.weight.values().reshape(self.layout.shape)
        turned = np.moveaxis(weight, (self.layout.outputs, self.layout.inputs), (1, 2))
        with np.errstate(all="ignore"):
            made: Floats = np.einsum(
                "goik,gi->go",
                turned.reshape(*turned.shape[:3], -1),
                shift.reshape(turned.shape[0], turned.shape[2]),
                dtype=np.float64,
                casting="unsafe",
            )
        return made.reshape(-1) * float(attributes.get(self.node, "alpha", 1.0))

    def _check_shiftable(self) -> None:
        """Whether each output sees the same share of a shift of the whole input."""
        if self.node.op_type == "ConvTranspose":
            raise DeclinedError("outputs of a ConvTranspose sum over different inputs")
        if self.node.op_type == "Conv" and is_padded(self.node):
            raise DeclinedError("the padding of the Conv would be shifted, too")

    def _kept_integer(self, weight: CodedWeight, factor: Floats, bias: Floats) -> Floats:
        """`factor`, with zeros for channels of which only the bias is seen.

        Kernels that multiply integers add the bias as int32, in steps of the product of
        both scales, and saturate where a tiny factor makes these too small for it.
        """
        step = product_scale(self.graph, self.node, self.layout, weight)
        if step is None:
            return factor
        with np.errstate(all="ignore"):
            steps = np.abs(step * np.where(factor == 0, 1, factor))
            over = np.abs(bias) >= steps * INT32_LARGEST
        if not over.any():
            return factor
        peak = self._largest_product(weight) * np.abs(factor)
        if (over & (peak > np.abs(bias) * INVISIBLE)).any():
            raise DeclinedError("the bias of a channel does not fit int32 at its scale")
        return np.where(over, 0.0, factor)

    def _largest_product(self, weight: CodedWeight) -> Floats:
        """What no output exceeds without the bias, where the input is dequantized."""
        values = np.abs(weight.values().astype(np.float64)).reshape(self.layout.shape)
        axes = tuple(range(2, values.ndim))
        turned = np.moveaxis(values, self.layout.outputs, 1)
        peak = dequantized_peak(self.graph, self.node.input[0])
        alpha = abs(float(attributes.get(self.node, "alpha", 1.0)))
        made: Floats = turned.sum(axis=axes).reshape(-1) * peak * alpha
        return made

    def _scale_bias_codes(self, edit: Edit, factor: Floats) -> bool:
        """Scale a bias of codes, one per channel, as such; False where it is none."""
        if not self.has_bias:
            return False
        try:
            bias = CodedWeight.of(self.graph, self.node, 2)
            if bias.dims != (self.outputs,):
                return False
            if (factor != 1).any():
                bias.scale_by(edit, factor)
        except DeclinedError:
            return False
        return True


def _layout(node: NodeProto, dims: tuple[int, ...]) -> Layout:
    """Channels run group by group, on both sides."""
    group = attributes.get(node, "group", 1)
    if group < 1 or dims[0] % group:
        raise DeclinedError("its groups do not divide the channels")
    match node.op_type:
        case "Conv":
            return Layout((group, dims[0] // group, *dims[1:]), outputs=1, inputs=2)
        case "ConvTranspose":
            return Layout((group, dims[0] // group, *dims[1:]), outputs=2, inputs=1)
    transposed = bool(attributes.get(node, "transB", 0))
    outputs, inputs = (1, 2) if transposed else (2, 1)
    return Layout((1, *dims), outputs, inputs)


def _check_count(channels: int, factor: Floats) -> None:
    if channels != len(factor):
        raise DeclinedError(f"{channels} channels in the layer, {len(factor)} in it")


def _bias_values(graph: GraphView, name: str) -> Floats:
    """The constant called `name`, of floats or of codes, in float64."""
    if graph.weight(name) is None and graph.producer(name) is not None:
        return dequantized_constant(graph, name).astype(np.float64)
    return floats(graph, name)
