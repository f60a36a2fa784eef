"""fold-pad: let a Conv or a pool do the padding before it.

    t = Pad(x, [0, 0, 1, 1, 0, 0, 1, 1])
    y = Conv(t, W)              ->    y = Conv <pads = [1, 1, 1, 1]> (x, W)

1. A Pad with a constant, by constants that are not negative, of spatial axes only, whose
   result has no other reader.
2. Into a Conv: zeros. Into an AveragePool: zeros, which then count (count_include_pad);
   those of its own, if it has any, must count already. Into a MaxPool: -inf, where its
   indices are not asked for.
3. The layer pads by numbers (not auto_pad), does not round up (ceil_mode), and its pads
   stay below the extent of its kernel, as ONNX Runtime demands of pools.

By the standard, a MaxPool pads with -inf. In ONNX Runtime's CPU provider it is the lowest
finite number, which shows where all that a window sees of its input is -inf or NaN.
Of an input that is empty, or padded still smaller than the kernel, a pool has no window
by the standard; what ONNX Runtime makes of it may differ.
"""

from __future__ import annotations

from typing import Any, ClassVar

from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

_LAYERS = ("Conv", "AveragePool", "MaxPool")


class FoldPad(Pass):
    """Fold Pad into the Conv, AveragePool or MaxPool behind it."""

    name: ClassVar[str] = "fold-pad"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at what stands before every Conv and pool."""
        for layer in graph.visit(self, _LAYERS):
            pad = graph.producer(layer.input[0])
            if pad is None or graph.op(pad) != "Pad" or attributes.has_references(pad):
                continue
            if graph.only_use(pad.output[0]) is None:
                continue
            pads = _spatial_pads(graph, pad)
            obstacle = (
                "it does not pad spatial axes by constants"
                if pads is None
                else _obstacle(graph, layer, pad, pads)
            )
            if pads is None or obstacle is not None:
                graph.skip(pad, str(obstacle))
                continue
            graph.apply(_folded(graph, layer, pad, pads), "the layer behind it can pad")


def _folded(graph: GraphView, layer: NodeProto, pad: NodeProto, pads: list[int]) -> Edit:
    edit = Edit(graph, layer)
    edit.set_input(layer, 0, pad.input[0])
    own = _own_pads(layer, len(pads))
    edit.set_attribute(layer, "pads", [a + b for a, b in zip(own, pads, strict=True)])
    edit.set_attribute(layer, "auto_pad", None)
    if layer.op_type == "AveragePool":
        edit.set_attribute(layer, "count_include_pad", 1)
    return edit


def _spatial_pads(graph: GraphView, pad: NodeProto) -> list[int] | None:
    """Begins and ends of the spatial axes; None where that is not all, or not known."""
    pads = _numbers(graph, pad, "pads", 1)
    if pads is None or len(pads) % 2 or min(pads, default=0) < 0:
        return None
    begins, ends = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    axes = list(range(len(begins)))
    rank = len(begins)
    if len(pad.input) > 3 and pad.input[3]:  # from opset 18 on
        given, shape = _numbers(graph, pad, "axes", 3), graph.shape(pad.input[0])
        if given is None or shape is None or len(given) != len(begins):
            return None
        rank = len(shape)
        axes = [axis + rank if axis < 0 else axis for axis in given]
    full = [0] * (2 * rank)
    for axis, begin, end in zip(axes, begins, ends, strict=True):
        if not 0 <= axis < rank:
            return None
        full[axis] += begin
        full[rank + axis] += end
    if any((*full[:2], *full[rank : rank + 2])):
        return None
    return full[2:rank] + full[rank + 2 :]


def _numbers(graph: GraphView, pad: NodeProto, name: str, slot: int) -> list[int] | None:
    """What Pad is given as an input, or before opset 11 as an attribute."""
    if graph.opset() < 11:
        return list(attributes.get(pad, name, ())) or None
    array = graph.array(pad.input[slot])
    return None if array is None else [int(number) for number in array.reshape(-1)]


def _filler(graph: GraphView, pad: NodeProto) -> float | None:
    """What it pads with; None where that is not known."""
    if attributes.get(pad, "mode", "constant") != "constant":
        return None
    if graph.opset() < 11:
        return float(attributes.get(pad, "value", 0.0))
    if len(pad.input) < 3 or not pad.input[2]:
        return 0.0
    array: Any = graph.array(pad.input[2])
    return None if array is None or array.size != 1 else float(array.reshape(()))


def _own_pads(layer: NodeProto, count: int) -> list[int]:
    if attributes.get(layer, "auto_pad", "NOTSET") == "VALID":
        return [0] * count
    return attributes.get(layer, "pads") or [0] * count


def _obstacle(
    graph: GraphView, layer: NodeProto, pad: NodeProto, pads: list[int]
) -> str | None:
    """Why the layer cannot pad like this; None where it can."""
    if attributes.get(layer, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "the layer pads by a rule"
    own, kernel = _own_pads(layer, len(pads)), _kernel(graph, layer)
    if kernel is None or len(own) != len(pads) or 2 * len(kernel) != len(pads):
        return "the kernel of the layer is not known"
    reach = [*kernel, *kernel]
    if any(a + b >= most for a, b, most in zip(own, pads, reach, strict=True)):
        return "it pads by more than the kernel of the layer"
    if attributes.get(layer, "ceil_mode", 0):
        return "the layer rounds up"
    filler = float("-inf") if layer.op_type == "MaxPool" else 0.0
    if _filler(graph, pad) != filler:
        return f"it does not pad with {filler:g}"
    match layer.op_type:
        case "AveragePool":
            return _average_obstacle(graph, layer, own)
        case "MaxPool" if any(layer.output[1:]):
            return "the layer tells indices into what is padded"
        case "MaxPool" if _has_holes(layer):
            return "through its holes a window may see padding only"
    return None


def _average_obstacle(graph: GraphView, layer: NodeProto, own: list[int]) -> str | None:
    if graph.opset() < 7:
        return "the layer cannot count what it pads"
    if any(own) and not attributes.get(layer, "count_include_pad", 0):
        return "the layer does not count what it pads"
    if _has_holes(layer):
        return "the kernel of the layer has holes"
    return None


def _has_holes(layer: NodeProto) -> bool:
    return any(hole != 1 for hole in attributes.get(layer, "dilations", ()))


def _kernel(graph: GraphView, layer: NodeProto) -> list[int] | None:
    """The extent of the kernel: for a Conv with its holes, for a pool without."""
    kernel = attributes.get(layer, "kernel_shape")
    if layer.op_type != "Conv":
        return None if kernel is None else list(kernel)
    if kernel is None:
        shape = graph.shape(layer.input[1])
        if shape is None or not all(isinstance(dim, int) for dim in shape[2:]):
            return None
        kernel = [int(dim or 0) for dim in shape[2:]]
    holes = attributes.get(layer, "dilations") or [1] * len(kernel)
    if len(holes) != len(kernel):
        return None
    return [(size - 1) * hole + 1 for size, hole in zip(kernel, holes, strict=True)]
