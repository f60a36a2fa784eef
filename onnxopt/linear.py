"""Linear layers with constant weights, and what can be folded into these.

A `Layer` is a Conv, ConvTranspose, Gemm or MatMul as the passes see it that scale and
shift: it knows which axes of its weight are channels, however the operator lays them out,
and writes new weights in place of the old ones. Its numbers are read only when they
change; then they are computed in float64 and rounded once to the weight's type.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.weights import Array

Floats = npt.NDArray[np.float64]
FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class DeclinedError(Exception):
    """The rewrite does not apply; the text is the reason."""


def constant(graph: GraphView, name: str) -> TensorProto:
    """The constant of floats called `name`, unread."""
    tensor = graph.weight(name)
    if tensor is None:
        raise DeclinedError(f"{name!r} is not a constant")
    if tensor.data_type not in FLOATS:
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        raise DeclinedError(f"{name!r} is of type {kind}")
    return tensor


def floats(graph: GraphView, name: str) -> Floats:
    """The constant called `name`, in float64."""
    return graph.model.weights.array(constant(graph, name)).astype(np.float64)


class _Layout(msgspec.Struct, frozen=True):
    """The weight as [group, ...]: which axes of that are output and input channels."""

    shape: tuple[int, ...]
    outputs: int
    inputs: int


class Layer(msgspec.Struct, frozen=True):
    """A linear operator whose weight is a constant."""

    graph: GraphView
    node: NodeProto
    tensor: TensorProto
    layout: _Layout

    @classmethod
    def of(cls, graph: GraphView, node: NodeProto) -> Layer:
        """The layer that `node`, one of LAYERS, is; raises DeclinedError."""
        if attributes.has_references(node):
            raise DeclinedError("the layer differs from call to call")
        is_product = node.op_type in ("Gemm", "MatMul")
        if is_product and graph.opset() < 7:
            raise DeclinedError("Gemm broadcasts by attribute before opset 7")
        tensor = constant(graph, node.input[1])
        if (len(tensor.dims) != 2) if is_product else (len(tensor.dims) < 3):
            raise DeclinedError(f"the weight of the {node.op_type} is of another rank")
        return cls(graph, node, tensor, _layout(node, tuple(tensor.dims)))

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
            return len(self.tensor.dims)
        shape = self.graph.shape(self.node.input[0])
        return None if shape is None else len(shape)

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the product, constant or not."""
        return len(self.node.input) > 2 and bool(self.node.input[2])

    @property
    def is_shared(self) -> bool:
        """Whether somebody else reads the weight, so that another one is a copy."""
        return self.graph.only_use_everywhere(self.node.input[1]) is None

    def bias(self) -> Floats:
        """What is added to each output channel."""
        if not self.has_bias:
            return np.zeros(self.outputs)
        bias = floats(self.graph, self.node.input[2])
        if self.node.op_type == "Gemm":
            bias = bias * float(attributes.get(self.node, "beta", 1.0))
        one_row = not bias.ndim or bias.shape[-1] == bias.size
        if bias.size not in (1, self.outputs) or not one_row:
            raise DeclinedError("the bias of the Gemm is not one per channel")
        return np.broadcast_to(bias.reshape(-1), (self.outputs,))

    def scale_outputs(self, edit: Edit, factor: Floats, shift: Floats) -> None:
        """Let the layer compute factor * y + shift, one of each per output channel."""
        _check_count(self.outputs, factor)
        bias = self.bias() * factor + shift
        if (factor != 1).any():
            self._write_weight(edit, self._scaled(factor, self.layout.outputs))
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
            self._write_weight(edit, self._scaled(factor, self.layout.inputs))

    def scale(self, edit: Edit, factor: float) -> None:
        """Let the weight be `factor` times what it was, and the bias what it is."""
        self._write_weight(edit, self._scaled(np.array([factor]), self.layout.outputs))

    def write_bias(self, edit: Edit, bias: Floats) -> None:
        """Give the layer another bias; a MatMul of rank 2 becomes a Gemm for it."""
        if not self.has_bias and not bias.any():
            return
        if self.node.op_type == "MatMul":
            if self.rank != 2:
                raise DeclinedError("the MatMul is not of rank 2")
            edit.set_op_type(self.node, "Gemm")
        with np.errstate(over="ignore"):
            rounded = bias.astype(FLOATS[self.tensor.data_type])
        set_constant(self.graph, edit, self.node, 2, rounded)
        if attributes.find(self.node, "beta") is not None:
            edit.set_attribute(self.node, "beta", None)

    def select_outputs(self, edit: Edit, indices: npt.NDArray[np.int64]) -> None:
        """Let the layer, of one group, compute these output channels in this order."""
        if self.has_bias:
            self.write_bias(edit, self.bias()[indices])
        weight = np.take(self._weight(), indices, axis=self.layout.outputs - 1)
        self._write_weight(edit, weight)

    def permute_inputs(self, edit: Edit, indices: npt.NDArray[np.int64]) -> None:
        """Let the layer, of one group, read x where input i was channel indices[i] of x.

        `indices` is a permutation.
        """
        order = np.argsort(indices)
        weight = np.take(self._weight(), order, axis=self.layout.inputs - 1)
        self._write_weight(edit, weight)

    def _weight(self) -> Array:
        return self.graph.model.weights.array(self.tensor)

    def _write_weight(self, edit: Edit, weight: Array) -> None:
        set_constant(self.graph, edit, self.node, 1, weight)

    def _scaled(self, factor: Floats, axis: int) -> Array:
        """The weight times one factor per channel along `axis` of the layout, or one."""
        weight = self._weight().reshape(self.layout.shape)
        spread = self._spread(factor, axis) if factor.size > 1 else factor
        spread = spread.reshape(spread.shape if spread.size > 1 else [1] * weight.ndim)
        _check_precision(weight, spread, self.layout)
        made = np.empty_like(weight)
        narrow = spread.astype(weight.dtype)
        with np.errstate(all="ignore"):
            if (narrow == spread).all():
                np.multiply(weight, narrow, out=made)  # exact, and rounded once
            else:
                # in float64, rounded once; few elements at a time are that wide
                np.multiply(weight, spread, out=made, dtype=np.float64, casting="unsafe")
        return made.reshape(tuple(self.tensor.dims))

    def _spread(self, factor: Floats, axis: int) -> Floats:
        """One number per channel, as it broadcasts to the layout of the weight."""
        dims = [1] * len(self.layout.shape)
        dims[0], dims[axis] = self.layout.shape[0], self.layout.shape[axis]
        return factor.reshape(dims)

    def _response(self, shift: Floats) -> Floats:
        """What the product is where the input is `shift` everywhere."""
        weight = self._weight().reshape(self.layout.shape)
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


def _layout(node: NodeProto, dims: tuple[int, ...]) -> _Layout:
    """Channels run group by group, on both sides."""
    group = attributes.get(node, "group", 1)
    if group < 1 or dims[0] % group:
        raise DeclinedError("its groups do not divide the channels")
    match node.op_type:
        case "Conv":
            return _Layout((group, dims[0] // group, *dims[1:]), outputs=1, inputs=2)
        case "ConvTranspose":
            return _Layout((group, dims[0] // group, *dims[1:]), outputs=2, inputs=1)
    transposed = bool(attributes.get(node, "transB", 0))
    outputs, inputs = (1, 2) if transposed else (2, 1)
    return _Layout((1, *dims), outputs, inputs)


def is_padded(conv: NodeProto) -> bool:
    """Whether a Conv may read anything besides its input."""
    auto = str(attributes.get(conv, "auto_pad", "NOTSET"))
    if auto not in ("NOTSET", "VALID"):
        return True
    return auto == "NOTSET" and any(attributes.get(conv, "pads", ()))


def _check_count(channels: int, factor: Floats) -> None:
    if channels != len(factor):
        raise DeclinedError(f"{channels} channels in the layer, {len(factor)} in it")


def _check_precision(weight: Array, factor: Floats, layout: _Layout) -> None:
    """Below the normal numbers of its type a channel would lose its last digits."""
    if not weight.size:
        return
    kept = {0, layout.outputs}
    if factor.shape[layout.inputs] > 1:
        kept.add(layout.inputs)
    axes = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    with np.errstate(all="ignore"):
        high = weight.max(axis=axes, keepdims=True).astype(np.float64)
        low = weight.min(axis=axes, keepdims=True).astype(np.float64)
        peak = np.maximum(high, -low) * np.abs(factor)
        peak = peak.max(axis=layout.inputs)
    if ((peak > 0) & (peak < smallest_normal(weight.dtype))).any():
        raise DeclinedError(f"a channel would lose its precision in {weight.dtype}")


def smallest_normal(dtype: Any) -> float:
    """The least positive number of a float type that has all its digits."""
    finfo: Any = ml_dtypes.finfo
    return float(finfo(dtype).smallest_normal)


def is_finite(array: Array) -> bool:
    """Without an array of truths beside it: NaN and infinity reach the extremes."""
    with np.errstate(all="ignore"):
        return not array.size or bool(np.isfinite([array.min(), array.max()]).all())


def set_constant(
    graph: GraphView, edit: Edit, node: NodeProto, slot: int, array: Array
) -> None:
    """Give input `slot` of a node a new value, under its old name if it can."""
    if not is_finite(array):
        raise DeclinedError(f"a folded weight does not fit into {array.dtype}")
    name = node.input[slot] if slot < len(node.input) else ""
    if name and graph.only_use_everywhere(name) is not None:
        edit.set_weight(name, array)
    else:
        hint = name or f"{node.input[1]}_bias"
        edit.set_input(node, slot, edit.add_weight(array, hint))


def per_channel(values: Floats, channels: int, axis: int, rank: int) -> Floats | None:
    """`values` as one per channel, if they vary along that axis at most.

    `axis` and `rank` are those of what they are combined with, whose shape stays.
    """
    if values.ndim > rank or values.size not in (1, channels):
        return None
    along = values.ndim - (rank - axis)
    if values.size > 1 and (along < 0 or values.shape[along] != channels):
        return None
    return np.broadcast_to(values.reshape(-1), (channels,)).astype(np.float64)
