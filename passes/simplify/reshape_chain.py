"""reshape-chain: one Reshape for a chain of Reshape, Flatten, Squeeze and Unsqueeze.

    t = Unsqueeze(x, axes)
    y = Reshape(t, [2, -1])     ->    y = Reshape(x, [2, -1])

1. A Reshape whose constant shape copies no dim (no 0) does not care about the dims of
   what it reads, so it reads what the chain started from.
2. Any other last node becomes a Reshape to the shape that inference knows, where at most
   one dim of it is open (-1) and none is 0.
3. The middle value has no other reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

_CHAIN = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Merge chains of Reshape, Flatten, Squeeze and Unsqueeze."""

    name: ClassVar[str] = "reshape-chain"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at the last node of each pair."""
        for last in graph.visit(self, _CHAIN):
            first = graph.producer(last.input[0])
            if first is None or graph.op(first) not in _CHAIN:
                continue
            if attributes.has_references(first) or graph.only_use(last.input[0]) is None:
                continue
            edit = Edit(graph, last)
            if _ignores_dims(graph, last):
                edit.set_input(last, 0, first.input[0])
            else:
                dims = _known_dims(graph, last)
                if dims is None:
                    graph.skip(last, "the shape of the chain's end is not known")
                    continue
                shape = edit.add_weight(dims, f"{last.output[0]}_shape")
                edit.rewrite("Reshape", [first.input[0], shape])
            graph.apply(edit, f"{first.op_type} before {last.op_type} is not needed")


def _ignores_dims(graph: GraphView, node: NodeProto) -> bool:
    if node.op_type != "Reshape" or len(node.input) < 2:
        return False
    dims = graph.array(node.input[1])
    if dims is None:
        return False
    return bool(attributes.get(node, "allowzero", 0)) or not bool((dims == 0).any())


def _known_dims(graph: GraphView, node: NodeProto) -> np.ndarray | None:
    shape = graph.shape(node.output[0])
    if shape is None or graph.opset() < 5:
        return None  # before opset 5 the shape was an attribute
    dims = [dim if isinstance(dim, int) else -1 for dim in shape]
    if dims.count(-1) > 1 or 0 in dims:
        return None
    return np.array(dims, dtype=np.int64)
