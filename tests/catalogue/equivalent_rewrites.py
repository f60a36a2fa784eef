"""Rewrites of real models that are right: equal in algebra, apart in rounding at most.

`rewritten(seed)` draws a model, how many edits it gets, and for each edit a kind and a
place. The same seed gives the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper

from catalogue.surgery import (
    after,
    attribute,
    become,
    constant,
    copied,
    insert,
    is_constant,
    load,
    new_constant,
    producer,
    readers,
    scopes,
)

node = helper.make_node
Kind = Callable[[ModelProto, Random], bool]
"""Edits in place; False where the model has no place for it."""

COUNTS = {
    "fashion_float": 30,
    "fashion_masked": 12,
    "fashion_qat_dynamo": 18,
    "fashion_qat_legacy": 10,
    "fashion_masked_qat": 10,
    "efficientnet-lite0": 8,
    "opennsfw": 8,
    "ppocr-det": 20,
    "ppocr-rec": 20,
    "ppocr-cls": 20,
    "silero-vad": 14,
    "basic-pitch": 8,
    "minilm-l3": 12,
    "smart-turn": 8,
    "ddddocr-old": 10,
    "magika": 12,
    "yolov8n-320": 14,
    "light-resnet50": 2,
}
"""How many rewrites each model gets: more where it runs fast."""

SHAPES: dict[str, dict[str, Sequence[int]]] = {
    "ppocr-det": {"x": [1, 3, 64, 96]},
    "ppocr-rec": {"x": [1, 3, 48, 64]},
    "ppocr-cls": {"x": [1, 3, 48, 96]},
    "minilm-l3": {"input_ids": [2, 7], "attention_mask": [2, 7]},
    "ddddocr-old": {"input1": [1, 1, 64, 48]},
    "yolov8n-320": {"images": [1, 3, 64, 96]},
    "magika": {"bytes": [2, 2048]},
}
"""Small inputs where the model leaves the choice."""

FLOAT = {
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "DequantizeLinear",
    "Erf",
    "Gemm",
    "GlobalAveragePool",
    "HardSigmoid",
    "LayerNormalization",
    "Relu",
    "Sigmoid",
    "Softmax",
    "Sqrt",
    "Tanh",
}
"""Operators whose result is of floats in all of these models."""

BETWEEN = {"Relu", "LeakyRelu", "MaxPool", "GlobalAveragePool", "AveragePool"}
"""Operators that treat channels alike, and a positive factor as a factor."""


@dataclass(frozen=True)
class Layer:
    """A Conv, or a BatchNormalization behind it, whose weights are constants."""

    output: str
    weights: tuple[int, ...]
    """Its inputs that hold one entry (or filter) a channel in axis 0."""
    affine: tuple[int, ...]
    """Those of them that a factor on the output goes into."""


def nodes_of(model: ModelProto, *op_types: str) -> list[NodeProto]:
    every = (each for graph in scopes(model.graph) for each in graph.node)
    return [each for each in every if each.op_type in op_types]


def drawn(random: Random, places: Sequence[Any]) -> Any:
    return random.choice(places) if places else None


def fresh(model: ModelProto, start: str) -> str:
    """A name that nothing has."""
    used = {
        name
        for graph in scopes(model.graph)
        for each in graph.node
        for name in each.output
    }
    number = 0
    while f"{start}/{number}" in used:
        number += 1
    return f"{start}/{number}"


def made_constant(model: ModelProto, value: Any, dtype: Any = np.float32) -> str:
    return new_constant(model, fresh(model, "constant"), np.asarray(value, dtype))


def is_fixed(model: ModelProto, name: str) -> bool:
    """A constant that no caller can override."""
    return is_constant(model, name) and name not in {
        each.name for each in model.graph.input
    }


def is_private(model: ModelProto, value: str) -> bool:
    """Read by one node, and not a result."""
    results = {each.name for graph in scopes(model.graph) for each in graph.output}
    return value not in results and len(readers(model, value)) == 1


def is_made(model: ModelProto, value: str) -> bool:
    """By a node, which is not a Constant."""
    try:
        return producer(model, value).op_type != "Constant"
    except KeyError:
        return False


def operands(model: ModelProto, each: NodeProto) -> tuple[str, str] | None:
    """The data and the constant of a node of two inputs, in this order."""
    for data, fixed in (each.input[:2], reversed(each.input[:2])):
        if is_fixed(model, fixed) and not is_fixed(model, data):
            return data, fixed
    return None


def replace_weight(
    model: ModelProto, each: NodeProto, index: int, value: NDArray[Any]
) -> None:
    each.input[index] = made_constant(model, value)


# Anywhere


def _behind_a_float(model: ModelProto, random: Random, *op_types: str) -> bool:
    """Put a chain of operators of one input behind some value."""
    chosen = drawn(random, nodes_of(model, *FLOAT))
    if chosen is None:
        return False
    value = chosen.output[0]
    names = [
        f"{value}/raw",
        *(fresh(model, f"{value}/{k}") for k in range(len(op_types))),
    ]
    names[-1] = value
    pairs = zip(op_types, names[:-1], names[1:], strict=True)
    after(model, value, *(node(kind, [one], [other]) for kind, one, other in pairs))
    return True


def identity_inserted(model: ModelProto, random: Random) -> bool:
    return _behind_a_float(model, random, "Identity")


def negated_twice(model: ModelProto, random: Random) -> bool:
    return _behind_a_float(model, random, "Neg", "Neg")


def zero_added(model: ModelProto, random: Random) -> bool:
    chosen = drawn(random, nodes_of(model, *FLOAT))
    if chosen is None:
        return False
    value, zero = chosen.output[0], made_constant(model, 0)
    after(model, value, node("Add", [f"{value}/raw", zero], [value]))
    return True


def transposed_twice(model: ModelProto, random: Random) -> bool:
    places = [
        (each.output[0], constant(model, each.input[1]).ndim)
        for each in nodes_of(model, "Conv")
        if is_constant(model, each.input[1])
    ]
    if not places:
        return False
    value, rank = random.choice(places)
    turn = random.sample(range(rank), rank)
    back = [turn.index(axis) for axis in range(rank)]
    middle = f"{value}/turned"
    first = node("Transpose", [f"{value}/raw"], [middle], perm=turn)
    after(model, value, first, node("Transpose", [middle], [value], perm=back))
    return True


def reordered(model: ModelProto, random: Random) -> bool:
    """Another order of the main graph's nodes, drawn among those that hold."""
    waiting, known = list(model.graph.node), _known(model.graph)
    made = {name for each in waiting for name in each.output}
    order: list[NodeProto] = []
    while waiting:
        ready = [each for each in waiting if not (_needed(each) & made) - known]
        chosen = random.choice(ready)
        waiting.remove(chosen)
        known.update(chosen.output)
        order.append(chosen)
    copies = [NodeProto.FromString(each.SerializeToString()) for each in order]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return True


def _known(graph: GraphProto) -> set[str]:
    return {each.name for each in (*graph.input, *graph.initializer)} | {""}


def _needed(each: NodeProto) -> set[str]:
    """What it reads, in its subgraphs as well."""
    names = set(each.input)
    for item in each.attribute:
        if item.HasField("g"):
            for inner in item.g.node:
                names |= _needed(inner)
            names |= {output.name for output in item.g.output}
    return names


def weights_as_nodes(model: ModelProto, random: Random) -> bool:
    tensors = [each for each in model.graph.initializer if is_fixed(model, each.name)]
    if not tensors:
        return False
    for tensor in random.sample(tensors, min(5, len(tensors))):
        made = node("Constant", [], [tensor.name], value=tensor)
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, made)
    return True


# Sums and products


def operands_swapped(model: ModelProto, random: Random) -> bool:
    chosen = drawn(random, nodes_of(model, "Add", "Mul"))
    if chosen is None:
        return False
    chosen.input[:] = list(reversed(chosen.input))
    return True


def sum_reassociated(model: ModelProto, random: Random) -> bool:
    """(a + b) + c as a + (b + c)."""
    places = [
        (each, index)
        for each in nodes_of(model, "Add")
        for index in (0, 1)
        if is_made(model, each.input[index])
        and producer(model, each.input[index]).op_type == "Add"
        and is_private(model, each.input[index])
    ]
    if not places:
        return False
    outer, index = random.choice(places)
    one, other = producer(model, outer.input[index]).input
    middle = fresh(model, "sum")
    third = outer.input[1 - index]
    result = outer.output[0]
    insert(model, result, [node("Add", [other, third], [middle])])
    producer(model, result).input[:] = [one, middle]
    return True


def product_reassociated(model: ModelProto, random: Random) -> bool:
    """(x * a) * b as x * (a * b)."""
    places = []
    for outer in nodes_of(model, "Mul"):
        found = operands(model, outer)
        if not found or not is_made(model, found[0]) or not is_private(model, found[0]):
            continue
        inner = producer(model, found[0])
        if inner.op_type == "Mul" and (innermost := operands(model, inner)):
            places.append((outer, innermost[0], innermost[1], found[1]))
    if not places:
        return False
    outer, data, first, second = random.choice(places)
    product = constant(model, first) * constant(model, second)
    outer.input[:] = [data, made_constant(model, product, product.dtype)]
    return True


def division_as_product(model: ModelProto, random: Random) -> bool:
    places = [
        each
        for each in nodes_of(model, "Div")
        if is_fixed(model, each.input[1])
        and constant(model, each.input[1]).dtype == np.float32
    ]
    chosen = drawn(random, places)
    if chosen is None:
        return False
    inverse = 1 / constant(model, chosen.input[1]).astype(np.float64)
    become(chosen, "Mul", [chosen.input[0], made_constant(model, inverse)])
    return True


def square_as_product(model: ModelProto, random: Random) -> bool:
    places = [
        each
        for each in nodes_of(model, "Pow")
        if is_constant(model, each.input[1])
        and np.all(constant(model, each.input[1]) == 2)
    ]
    chosen = drawn(random, places)
    if chosen is None:
        return False
    become(chosen, "Mul", [chosen.input[0], chosen.input[0]])
    return True


def difference_as_sum(model: ModelProto, random: Random) -> bool:
    chosen = drawn(random, nodes_of(model, "Sub"))
    if chosen is None:
        return False
    negative = fresh(model, "negative")
    value, (one, other) = chosen.output[0], chosen.input
    insert(model, value, [node("Neg", [other], [negative])])
    become(producer(model, value), "Add", [one, negative])
    return True


# Functions


def clip_as_min_and_max(model: ModelProto, random: Random) -> bool:
    places = [
        each for each in nodes_of(model, "Clip") if len(each.input) == 3 and each.input[2]
    ]
    chosen = drawn(random, places)
    if chosen is None:
        return False
    value, (data, low, high) = chosen.output[0], chosen.input
    raised = fresh(model, "raised")
    insert(model, value, [node("Max", [data, low], [raised])])
    become(producer(model, value), "Min", [raised, high])
    return True


def relu_as_max(model: ModelProto, random: Random) -> bool:
    chosen = drawn(random, nodes_of(model, "Relu"))
    if chosen is None:
        return False
    become(chosen, "Max", [chosen.input[0], made_constant(model, 0)])
    return True


def sigmoid_as_exponential(model: ModelProto, random: Random) -> bool:
    """1 / (1 + exp(-x))."""
    chosen = drawn(random, nodes_of(model, "Sigmoid"))
    if chosen is None:
        return False
    value, one = chosen.output[0], made_constant(model, 1)
    names = [fresh(model, name) for name in ("minus", "power", "below")]
    nodes = [
        node("Neg", [chosen.input[0]], [names[0]]),
        node("Exp", [names[0]], [names[1]]),
        node("Add", [names[1], one], [names[2]]),
    ]
    insert(model, value, nodes)
    become(producer(model, value), "Div", [one, names[2]])
    return True


def concat_in_two_steps(model: ModelProto, random: Random) -> bool:
    chosen = drawn(
        random, [each for each in nodes_of(model, "Concat") if len(each.input) > 2]
    )
    if chosen is None:
        return False
    cut = random.randint(2, len(chosen.input) - 1)
    value, axis, front = (
        chosen.output[0],
        attribute(chosen, "axis"),
        list(chosen.input[:cut]),
    )
    rest, start = list(chosen.input[cut:]), fresh(model, "start")
    insert(model, value, [node("Concat", front, [start], axis=axis)])
    become(producer(model, value), "Concat", [start, *rest], axis=axis)
    return True


# Layers


def norm_folded(model: ModelProto, random: Random) -> bool:
    """Conv and BatchNormalization as one Conv, computed in float64."""
    places = [
        each
        for each in nodes_of(model, "BatchNormalization")
        if all(is_fixed(model, name) for name in each.input[1:])
        and is_made(model, each.input[0])
        and is_private(model, each.input[0])
        and _is_plain_conv(model, producer(model, each.input[0]))
    ]
    chosen = drawn(random, places)
    if chosen is None:
        return False
    _fold(model, producer(model, chosen.input[0]), chosen)
    return True


def _fold(model: ModelProto, conv: NodeProto, norm: NodeProto) -> None:
    scale, bias, mean, variance = (
        constant(model, name).astype(np.float64) for name in norm.input[1:]
    )
    factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    weight = constant(model, conv.input[1]).astype(np.float64)
    old = constant(model, conv.input[2]).astype(np.float64) if len(conv.input) > 2 else 0
    shape = (-1, *[1] * (weight.ndim - 1))
    inputs = [
        conv.input[0],
        made_constant(model, weight * factor.reshape(shape)),
        made_constant(model, (old - mean) * factor + bias),
    ]
    conv.input[:] = inputs
    become(norm, "Identity", [conv.output[0]])


def _is_plain_conv(model: ModelProto, each: NodeProto) -> bool:
    return each.op_type == "Conv" and all(
        is_fixed(model, name) for name in each.input[1:] if name
    )


def product_in_halves(model: ModelProto, random: Random) -> bool:
    """A MatMul as the sum of two over half of the inner axis each."""
    places = [
        each
        for each in nodes_of(model, "MatMul")
        if is_fixed(model, each.input[1]) and constant(model, each.input[1]).ndim == 2
    ]
    chosen = drawn(random, places)
    if chosen is None or len(constant(model, chosen.input[1])) < 2:
        return False
    weight = constant(model, chosen.input[1])
    middle, value, data = len(weight) // 2, chosen.output[0], chosen.input[0]
    parts = [
        _part(model, data, weight, start, stop)
        for start, stop in ((0, middle), (middle, len(weight)))
    ]
    insert(model, value, [each for nodes in parts for each in nodes])
    become(producer(model, value), "Add", [nodes[-1].output[0] for nodes in parts])
    return True


def _part(
    model: ModelProto, data: str, weight: NDArray[Any], start: int, stop: int
) -> list[NodeProto]:
    cut, product = (
        fresh(model, f"{data}/{start}"),
        fresh(model, f"{data}/{start}/product"),
    )
    half = made_constant(model, weight[start:stop])
    return [
        _slice(model, data, cut, start, stop),
        node("MatMul", [cut, half], [product]),
    ]


def _slice(model: ModelProto, data: str, cut: str, start: int, stop: int) -> NodeProto:
    """Of the last axis, as the model's opset spells it."""
    opset = next(each.version for each in model.opset_import if not each.domain)
    if opset < 10:
        return node("Slice", [data], [cut], axes=[-1], starts=[start], ends=[stop])
    ends = [made_constant(model, [number], np.int64) for number in (start, stop, -1)]
    return node("Slice", [data, *ends], [cut])


def gemm_as_product_and_sum(model: ModelProto, random: Random) -> bool:
    places = [
        each
        for each in nodes_of(model, "Gemm")
        if len(each.input) == 3
        and is_fixed(model, each.input[1])
        and attribute(each, "transB", 0)
        and not attribute(each, "transA", 0)
        and attribute(each, "alpha", 1.0) == attribute(each, "beta", 1.0) == 1
    ]
    chosen = drawn(random, places)
    if chosen is None:
        return False
    value, (data, weight, bias) = chosen.output[0], chosen.input
    turned = made_constant(model, constant(model, weight).T)
    product = fresh(model, "product")
    insert(model, value, [node("MatMul", [data, turned], [product])])
    become(producer(model, value), "Add", [product, bias])
    return True


def _pairs(model: ModelProto) -> list[tuple[Layer, NodeProto]]:
    """Layers, and the Conv (of one group) that alone reads their channels."""
    pairs = []
    for each in nodes_of(model, "Conv", "BatchNormalization"):
        fixed = [name for name in each.input[1:] if name]
        if not all(is_fixed(model, name) for name in fixed):
            continue
        affine = (1, 2)[: len(fixed)]
        last = _follow(model, each.output[0])
        if last is not None:
            weights = tuple(range(1, len(each.input)))
            pairs.append((Layer(each.output[0], weights, affine), last))
    return pairs


def _follow(model: ModelProto, value: str) -> NodeProto | None:
    while is_private(model, value):
        (reader,) = readers(model, value)
        if _is_plain_conv(model, reader) and attribute(reader, "group", 1) == 1:
            return reader if reader.input[0] == value else None
        if reader.op_type not in BETWEEN:
            return None
        value = reader.output[0]
    return None


def scale_moved(model: ModelProto, random: Random) -> bool:
    """A layer times a number, the next one by it: exact for powers of two."""
    found = drawn(random, _pairs(model))
    if found is None:
        return False
    layer, last = found
    factor = random.choice([2.0, 0.25, 3.0, 0.7])
    first = producer(model, layer.output)
    for index in layer.affine:
        weight = constant(model, first.input[index]).astype(np.float64)
        replace_weight(model, first, index, weight * factor)
    weight = constant(model, last.input[1]).astype(np.float64)
    replace_weight(model, last, 1, weight / factor)
    return True


def channels_permuted(model: ModelProto, random: Random) -> bool:
    """Those of a Conv, or of Conv and norm, in another order; the next one undoes it."""
    found = drawn(random, _permutable(model))
    if found is None:
        return False
    layers, last = found
    count = len(constant(model, layers[0].input[1]))
    order = random.sample(range(count), count)
    for each in layers:
        for index in range(1, len(each.input)):
            replace_weight(model, each, index, constant(model, each.input[index])[order])
    replace_weight(model, last, 1, constant(model, last.input[1])[:, order])
    return True


def _permutable(model: ModelProto) -> list[tuple[list[NodeProto], NodeProto]]:
    found = []
    for layer, last in _pairs(model):
        first = producer(model, layer.output)
        if first.op_type == "Conv" and attribute(first, "group", 1) == 1:
            found.append(([first], last))
        elif first.op_type == "BatchNormalization" and is_made(model, first.input[0]):
            conv = producer(model, first.input[0])
            if (
                _is_plain_conv(model, conv)
                and attribute(conv, "group", 1) == 1
                and is_private(model, conv.output[0])
            ):
                found.append(([conv, first], last))
    return found


KINDS: tuple[Kind, ...] = (
    identity_inserted,
    negated_twice,
    zero_added,
    transposed_twice,
    reordered,
    weights_as_nodes,
    operands_swapped,
    sum_reassociated,
    product_reassociated,
    division_as_product,
    square_as_product,
    difference_as_sum,
    clip_as_min_and_max,
    relu_as_max,
    sigmoid_as_exponential,
    concat_in_two_steps,
    norm_folded,
    product_in_halves,
    gemm_as_product_and_sum,
    scale_moved,
    channels_permuted,
)

MODELS = [name for name, count in COUNTS.items() for _ in range(count)]
"""The model of each seed."""


@dataclass(frozen=True)
class Rewritten:
    """A model before and after some edits."""

    reference: ModelProto
    candidate: ModelProto
    kinds: tuple[str, ...]


def rewritten(seed: int) -> Rewritten:
    """One to four edits of the seed's model."""
    random = Random(seed)
    reference = load(MODELS[seed])
    candidate = copied(lambda model: None, reference)
    applied: list[str] = []
    wanted = random.randint(1, 4)
    while len(applied) < wanted:
        kind = random.choice(KINDS)
        if kind(candidate, random):
            applied.append(kind.__name__)
    return Rewritten(reference, candidate, tuple(applied))
