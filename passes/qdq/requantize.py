"""requantize: codes that are only taken apart and put together again stay what they are.

    x = DequantizeLinear(q, s, z)
    r = QuantizeLinear(x, s, z)     ->    (readers of r read q)

1. Scale and zero point are equal constants, by value and type; per tensor or per axis.
2. Every code comes back (`onnxopt.quantization.roundtrip`): always for 8 bits with
   float32 scales that do not overflow, which is tried none the less; for 16 bits, float16
   or bfloat16 scales, 4 bits and float8 it is tried on all of them, and can fail.
3. Not where codes of int8 would get several readers, but for `ort-cpu-arm`: on x86 ONNX
   Runtime runs nothing on integers then.
4. So of Q, DQ, Q, DQ one pair stays. Other parameters change codes: both pairs stay.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import DeclinedError
from onnxopt.manager import Context, Pass
from onnxopt.quantization.parameters import is_int8_quantizer, parameters
from onnxopt.quantization.roundtrip import RoundTrips
from onnxopt.report import Guarantee


class Requantize(Pass):
    """Remove DequantizeLinear and QuantizeLinear in a row with equal parameters."""

    name: ClassVar[str] = "requantize"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Quantizer by quantizer."""
        trips = RoundTrips(context.evaluator)
        for node in graph.visit(self, ("QuantizeLinear",)):
            source = graph.producer(node.input[0])
            if source is None or graph.op(source) != "DequantizeLinear":
                continue
            try:
                if not _is_undone(graph, trips, source, node):
                    continue
            except DeclinedError as declined:
                graph.skip(node, str(declined))
                continue
            if context.target.keeps_int8_pairs and _shares_int8(graph, source, node):
                graph.skip(node, "its codes of int8 would get several readers")
                continue
            edit = Edit(graph, node)
            edit.bypass(node, {node.output[0]: source.input[0]})
            graph.apply(edit, "every code comes back as it was")


def _is_undone(
    graph: GraphView, trips: RoundTrips, first: NodeProto, second: NodeProto
) -> bool:
    """Whether `second` gives back what `first` reads; raises DeclinedError."""
    made, other = parameters(graph, first), parameters(graph, second)
    shape = graph.shape(first.input[0])
    if not made.equals(other, None if shape is None else len(shape)):
        return False
    trips.check(graph, first, second, made)
    return True


def _shares_int8(graph: GraphView, source: NodeProto, node: NodeProto) -> bool:
    """Whether int8 codes, which `source` alone reads, would go to several places."""
    maker = graph.producer(source.input[0])
    if maker is None or not is_int8_quantizer(graph, maker):
        return False
    if graph.only_use(source.input[0]) is None:
        return False
    places = len(graph.uses(node.output[0])) + graph.is_output(node.output[0])
    stays = graph.only_use(source.output[0]) is None
    return places + stays > 1
