"""Which weight a layer has, and which of its axes are output and input channels."""

from __future__ import annotations

from typing import NamedTuple

from onnx import NodeProto, TensorProto

from onnxopt import attributes
from onnxopt.graph import GraphView
from onnxopt.linear import LAYERS
from onnxopt.quantization.layers import FLOAT_LAYERS, INTEGER_LAYERS

_LAYERS = (*LAYERS, "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
_SLOTS = {**FLOAT_LAYERS, **INTEGER_LAYERS}
_DEPTH = 32


class Layer(NamedTuple):
    """A layer, which stands in scope `reader`, and the constant of its weight, in `home`.

    `outputs` and `inputs` are the axes of the constant that hold its channels, None
    where they cannot be told. `zero_point` names the value that stands for zero, as
    seen from scope `view`; None where plain zero does.
    """

    reader: GraphView
    node: NodeProto
    home: GraphView
    name: str
    tensor: TensorProto
    outputs: int | None
    inputs: int | None
    zero_point: str | None
    view: GraphView


def layer(view: GraphView, node: NodeProto) -> Layer | None:
    """The layer that `node` is; None where it is none, or its weight is not constant."""
    op = view.op(node)
    if op not in _LAYERS:
        return None
    slot, zero_slot = _SLOTS[op].weights[0], _SLOTS[op].zero_point
    if len(node.input) <= slot:
        return None
    zero = node.input[zero_slot] if zero_slot and len(node.input) > zero_slot else None
    found = _trace(view, node.input[slot], zero or None)
    if found is None:
        return None
    rank = len(found.tensor.dims)
    outputs, inputs = _channel_axes(op, node, rank)
    return Layer(
        reader=view,
        node=node,
        home=found.home,
        name=found.name,
        tensor=found.tensor,
        outputs=found.axis(outputs),
        inputs=found.axis(inputs),
        zero_point=found.zero_point,
        view=found.view,
    )


class _Traced(NamedTuple):
    home: GraphView
    name: str
    tensor: TensorProto
    axes: tuple[int, ...] | None
    zero_point: str | None
    view: GraphView

    def axis(self, wanted: int | None) -> int | None:
        if wanted is None or self.axes is None or wanted >= len(self.axes):
            return None
        return self.axes[wanted]


def _trace(view: GraphView, name: str, zero_point: str | None) -> _Traced | None:
    """The constant behind `name`, through quantization and changes of layout.

    `axes[i]` is the axis of the constant that axis i of the value is.
    """
    moves: list[list[int]] = []
    zero_view = view
    for _ in range(_DEPTH):
        home, tensor = view.home(name), view.weight(name)
        if home is None:
            return None
        if tensor is not None:
            axes = _axes(len(tensor.dims), moves)
            return _Traced(home, name, tensor, axes, zero_point, zero_view)
        maker = home.producer(name)
        if maker is None or not maker.input:
            return None
        view = home
        match view.op(maker):
            case "DequantizeLinear":
                given = maker.input[2] if len(maker.input) > 2 else ""
                zero_point, zero_view = given or None, view
            case "QuantizeLinear":
                zero_point = None  # what comes before is a float
            case "Transpose":
                moves.append(list(attributes.get(maker, "perm", [])))
            case "Identity" | "Cast":
                pass
            case _:
                return None
        name = maker.input[0]
    return None


def _axes(rank: int, moves: list[list[int]]) -> tuple[int, ...] | None:
    """Where the axes come from, through Transposes, the last of which is first."""
    axes = list(range(rank))
    for perm in moves:
        perm = perm or list(reversed(range(rank)))
        if sorted(perm) != list(range(rank)):
            return None
    for perm in reversed(moves):
        axes = [axes[index] for index in perm or reversed(range(rank))]
    return tuple(axes)


def _channel_axes(op: str, node: NodeProto, rank: int) -> tuple[int | None, int | None]:
    """The axes of the weight that hold output and input channels.

    Input channels of a grouped convolution are counted within a group: None.
    """
    grouped = attributes.get(node, "group", 1) != 1
    match op:
        case "Conv" | "ConvInteger" | "QLinearConv":
            return 0, None if grouped else 1
        case "ConvTranspose":
            return None if grouped else 1, 0
        case "Gemm":
            return (0, 1) if attributes.get(node, "transB", 0) else (1, 0)
    if rank == 2:
        return 1, 0
    return None, None  # a batch of matrices has no channels of the whole
