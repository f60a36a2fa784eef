"""GPT-2: one projection and a Split to queries, keys, values; a causal mask; tied words.

Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto

from tests.zoo.toolkit import Maker, Net, Value
from tests.zoo.transformer import (
    By,
    attend,
    copied,
    couple,
    embedding,
    heads_apart,
    merged,
    picked,
)

WIDTH, WORDS, LENGTH, HEADS = 24, 40, 32, 4


def _conv1d(net: Net, x: Value, out: int) -> Value:
    """GPT-2's Conv1D: Reshape to a matrix, Gemm, Reshape back."""
    flat = net.node("Reshape", [x.name, net.ints(-1, x.width)])
    ids = net.union.new(out)
    array = net.normal(x.width, out, fan=x.width)
    weight = net.weight(array, {0: x.ids, 1: ids})
    bias = net.weight(net.normal(out, fan=10), {0: ids}, "bias")
    net.make(Maker(weight, 1, ids, bias))
    made = net.node("Gemm", [flat, weight, bias])
    dims = net.node("Slice", [net.node("Shape", [x.name]), net.ints(0), net.ints(2)])
    dims = net.node("Concat", [dims, net.ints(out)], axis=0)
    return Value(net.node("Reshape", [made, dims]), ids, 2)


def _causal(net: Net, x: Value) -> str:
    """The rows and columns of the mask that a length needs."""
    whole = np.triu(np.full((LENGTH, LENGTH), -1e4, np.float32), 1)
    made = net.constant(whole.reshape(1, 1, LENGTH, LENGTH), "causal")
    length = net.node("Gather", [net.node("Shape", [x.name]), net.ints(1)], axis=0)
    for axis in (2, 3):
        made = net.node("Slice", [made, net.ints(0), length, net.ints(axis)])
    return made


def _attention(net: Net, x: Value, by: By, mask: str) -> Value:
    q, k, v = net.split(_conv1d(net, x, 3 * WIDTH), WIDTH, WIDTH, WIDTH)
    couple(net, q.ids, k.ids, v.ids, HEADS, 1, by)
    shape, size = copied(net), WIDTH // HEADS
    keys = heads_apart(net, k, HEADS, shape, 0, 2, 3, 1)
    queries, values = (heads_apart(net, each, HEADS, shape) for each in (q, v))
    made = attend(net, queries, keys, values, size, mask)
    made = net.node("Transpose", [made], perm=[0, 2, 1, 3])
    made = net.node("Reshape", [made, merged(net, x, HEADS, size, shape)])
    return _conv1d(net, Value(made, v.ids, 2), WIDTH)


def _gelu_new(net: Net, x: Value) -> Value:
    cube = net.on(x, "Pow", net.scalar(3.0))
    inner = net.on(x, "Add", net.on(cube, "Mul", net.scalar(0.044715)).name)
    inner = net.on(inner, "Mul", net.scalar(float(np.sqrt(2 / np.pi))))
    inner = net.on(net.on(inner, "Tanh"), "Add", net.scalar(1.0))
    return net.on(net.on(x, "Mul", net.scalar(0.5)), "Mul", inner.name)


def gpt2(seed: int) -> Net:
    """Two blocks; the words' table is the last layer's weight as well."""
    net = Net(seed)
    net.input("ids", ["N", "S"], kind=TensorProto.INT64)
    table = embedding(net, WORDS, WIDTH)
    words = picked(net, table, "ids")
    mask = _causal(net, replace(words, name="ids"))
    place = embedding(net, LENGTH, WIDTH, "places")
    length = net.node("Gather", [net.node("Shape", ["ids"]), net.ints(1)], axis=0)
    first = net.node("Slice", [place.name, net.ints(0), length, net.ints(0)])
    x = net.add(words, replace(place, name=first))
    for by in ("head", "dim"):
        x = net.add(x, _attention(net, net.layer_norm(x), by, mask))
        made = _gelu_new(net, _conv1d(net, net.layer_norm(x), 32))
        x = net.add(x, _conv1d(net, made, WIDTH))
    turned = net.node("Transpose", [table.name], perm=[1, 0])
    made = net.node("MatMul", [net.layer_norm(x).name, turned])
    net.output(Value(made, net.union.new(WORDS), 2), ["N", "S", WORDS])
    return net
