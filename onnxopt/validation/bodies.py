"""Opening a node with subgraphs: a model of the body that runs first.

    c -> If(then: ... -> t) -> y    becomes, where c is true,    ... -> t

So what happens inside can be looked at like any model's main graph: of an If the branch
taken, of a Loop its first turn. What the body reads from outside stays part of the
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from onnxopt import attributes
from onnxopt.save import stage
from onnxopt.validation.taps import TapModel

OPENED = {"If", "Loop"}
"""Operators whose body can be opened."""


def body_name(node: NodeProto, condition: bool) -> str | None:
    """The attribute that holds the body run first; None where nothing can be opened."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "If":
        return "then_branch" if condition else "else_branch"
    return "body" if node.op_type == "Loop" else None


def write_body(path: Path, value: str, attribute: str, target: Path) -> bool:
    """Write the model whose outputs are those of the body of the node that makes `value`.

    False where the body's names are not its own.
    """
    taps = TapModel(path)
    try:
        node = taps.maker(value)
        body = next(g for name, g in attributes.subgraphs(node) if name == attribute)
        graph = taps.model.proto.graph
        if _names(body) & taps.order.keys():
            return False
        first = _first_turn(node, body)
        opened = GraphProto()
        opened.CopyFrom(body)
        at = next(index for index, each in enumerate(graph.node) if each is node)
        rest = [NodeProto.FromString(n.SerializeToString()) for n in graph.node[:at]]
        del graph.node[:]
        graph.node.extend([*rest, *first, *opened.node])
        graph.initializer.extend(opened.initializer)
        graph.sparse_initializer.extend(opened.sparse_initializer)
        for field in ("output", "value_info", "quantization_annotation"):
            graph.ClearField(field)
        graph.output.extend(opened.output)
        stage(taps.model, target, hashes=False).commit()
        return True
    finally:
        taps.close()


def _names(body: GraphProto) -> set[str]:
    made = {name for node in body.node for name in node.output}
    return made | {tensor.name for tensor in body.initializer}


def _first_turn(node: NodeProto, body: GraphProto) -> list[NodeProto]:
    """What gives the inputs of a Loop's body their values in the first turn."""
    if node.op_type != "Loop":
        return []
    starts: Mapping[int, Any] = {0: np.array(0, np.int64), 1: np.array(True)}
    made = []
    for index, value in enumerate(body.input):
        if index in starts:
            tensor: TensorProto = numpy_helper.from_array(starts[index])
            made.append(helper.make_node("Constant", [], [value.name], value=tensor))
        else:
            made.append(helper.make_node("Identity", [node.input[index]], [value.name]))
    return made
