"""Layers that multiply integers and hand on floats: what may be folded into them.

ONNX Runtime's CPU provider runs a MatMul on codes, and a Gemm with a bias of codes or
none, where no QuantizeLinear follows: it scales the sums itself. Right behind the layer
it takes no bias of floats then, no Relu or Clip, and no QuantizeLinear to codes of int8
that several nodes read. Arithmetic between them keeps these apart.
"""

from __future__ import annotations

from onnx import NodeProto

from onnxopt.affine import Affine
from onnxopt.clamps import CLAMPS, clamp_of
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.quantization.implied import check_implied
from onnxopt.quantization.layers import site
from onnxopt.quantization.reasons import WITHOUT_OUTPUT, has_shared_codes, is_integer
from onnxopt.target import Target


def check_stays_integer(
    graph: GraphView, layer: NodeProto, scaling: NodeProto, target: Target
) -> None:
    """Raise DeclinedError where `layer` runs in integers, and not without `scaling`."""
    if not target.name.startswith("ort-cpu") or layer.op_type not in WITHOUT_OUTPUT:
        return
    found = site(graph, layer)
    if found is None or not is_integer(found):
        return
    reason = _follows(graph, scaling)
    if reason is not None:
        raise DeclinedError(
            f"ONNX Runtime would run {graph.label(layer)} in floats: {reason}"
        )


def _follows(graph: GraphView, scaling: NodeProto) -> str | None:
    """What the layer would meet behind arithmetic with constants; None if no harm."""
    node, adds = scaling, not _is_scale(scaling)
    while True:
        use = graph.only_use(node.output[0])
        if use is None or use.view is not graph:
            break
        node = use.node
        if graph.op(node) == "QuantizeLinear":
            return _quantizer(graph, node)
        if graph.op(node) in CLAMPS:
            quantizer = _implying(graph, node)
            if quantizer is not None:
                return _quantizer(graph, quantizer)
            if graph.op(node) in ("Relu", "Clip"):
                return f"{graph.label(node)} would follow it"
            break
        if graph.op(node) != "BatchNormalization" and not Affine.of(graph, node):
            break
        adds = adds or not _is_scale(node)
    return "no Q is behind a bias of floats" if adds else None


def _is_scale(node: NodeProto) -> bool:
    return node.op_type in ("Mul", "Div")


def _implying(graph: GraphView, node: NodeProto) -> NodeProto | None:
    """The quantizer behind a clamp that does without it."""
    use, clamp = graph.only_use(node.output[0]), clamp_of(graph, node)
    if use is None or clamp is None or graph.op(use.node) != "QuantizeLinear":
        return None
    try:
        check_implied(clamp, graph, use.node)
    except DeclinedError:
        return None
    return use.node


def _quantizer(graph: GraphView, node: NodeProto) -> str | None:
    """What is wrong with a QuantizeLinear right behind the layer."""
    readers = [use.node.output[0] for use in graph.uses(node.output[0])]
    if any(has_shared_codes(graph, reader) for reader in readers):
        return f"the int8 codes of {graph.label(node)} have several readers"
    return None
