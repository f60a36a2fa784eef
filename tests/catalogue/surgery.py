"""Small edits of ModelProtos by the names of values, independent of the library.

Values are looked up in the main graph and in every subgraph: in the models of the
catalogue no name is defined twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from models.fetch import fetch

MODELS = Path(__file__).parents[2] / "models"


def load(name: str) -> ModelProto:
    """A model of the catalogue, or one of our own."""
    own = MODELS / f"{name}.onnx"
    return onnx.load(own if own.exists() else fetch(name))


def copied(edit: Callable[[ModelProto], None], model: ModelProto) -> ModelProto:
    """The model after the edit, which may work in place."""
    result = ModelProto()
    result.CopyFrom(model)
    edit(result)
    return result


def scopes(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all that lie in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from scopes(attribute.g)


def place(model: ModelProto, value: str) -> tuple[GraphProto, int]:
    """Where the producer of a value stands."""
    for graph in scopes(model.graph):
        for index, node in enumerate(graph.node):
            if value in node.output:
                return graph, index
    raise KeyError(value)


def producer(model: ModelProto, value: str) -> NodeProto:
    graph, index = place(model, value)
    found: NodeProto = graph.node[index]
    return found


def readers(model: ModelProto, value: str) -> list[NodeProto]:
    nodes = (node for graph in scopes(model.graph) for node in graph.node)
    return [node for node in nodes if value in node.input]


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    for each in node.attribute:
        if each.name == name:
            return helper.get_attribute_value(each)
    return default


def set_attributes(node: NodeProto, **values: Any) -> None:
    kept = [each for each in node.attribute if each.name not in values]
    del node.attribute[:]
    node.attribute.extend(kept)
    made = [
        helper.make_attribute(*item) for item in values.items() if item[1] is not None
    ]
    node.attribute.extend(made)


def _tensor(model: ModelProto, name: str) -> TensorProto:
    tensors = [each for graph in scopes(model.graph) for each in graph.initializer]
    tensors = [each for each in tensors if each.name == name]
    if not tensors:
        node = producer(model, name)
        assert node.op_type == "Constant", name
        tensors = [each.t for each in node.attribute if each.name == "value"]
    found: TensorProto = tensors[0]
    return found


def constant(model: ModelProto, name: str) -> NDArray[Any]:
    """The value of an initializer or a Constant, as a copy."""
    return np.array(numpy_helper.to_array(_tensor(model, name)))


def set_constant(model: ModelProto, name: str, value: Any) -> None:
    """Another value of the same type, for all readers."""
    tensor = _tensor(model, name)
    dtype = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, dtype), name))


def is_constant(model: ModelProto, name: str) -> bool:
    try:
        _tensor(model, name)
    except (KeyError, AssertionError):
        return False
    return True


def new_constant(model: ModelProto, name: str, value: Any) -> str:
    """A Constant at the head of the main graph, where every subgraph sees it."""
    tensor = numpy_helper.from_array(np.asarray(value), name)
    model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    return name


def own_constant(model: ModelProto, node: NodeProto, index: int, value: Any) -> None:
    """Another value for this one reader."""
    name = f"{node.input[index]}/of/{node.output[0]}"
    dtype = constant(model, node.input[index]).dtype
    node.input[index] = name
    new_constant(model, name, np.asarray(value, dtype))


def become(node: NodeProto, op_type: str, inputs: list[str], **attributes: Any) -> None:
    """Another operator that gives the same outputs."""
    made = helper.make_node(op_type, inputs, list(node.output), **attributes)
    node.CopyFrom(made)


def swap_inputs(node: NodeProto, first: int = 0, second: int = 1) -> None:
    inputs = list(node.input)
    inputs[first], inputs[second] = inputs[second], inputs[first]
    node.input[:] = inputs


def insert(model: ModelProto, value: str, nodes: list[NodeProto]) -> None:
    """Put nodes right before the producer of a value."""
    graph, index = place(model, value)
    for node in reversed(nodes):
        graph.node.insert(index, node)


def after(model: ModelProto, value: str, *nodes: NodeProto) -> str:
    """Let nodes make the value; its producer now makes the name that is returned."""
    graph, index = place(model, value)
    raw = f"{value}/raw"
    old = graph.node[index]
    old.output[:] = [raw if name == value else name for name in old.output]
    for node in reversed(nodes):
        graph.node.insert(index + 1, node)
    return raw
