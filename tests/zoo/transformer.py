"""Attention as exporters write it, for all transformers of the zoo.

A head goes as a whole where its values are zero or constant; a dimension of values, or of
queries and keys where either is zero, goes from every head alike. A block is masked by
one or the other.

The stream between blocks is read by norms over all of its channels: it stays, and so do
constants other than zero among dims of queries and keys, which are in every score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from tests.zoo.toolkit import Ints, Net, Value

By = Literal["head", "dim"]
Shape = Callable[[Value, int, int], str]
"""For [N, S, heads * size]: the shape [N, S, heads, size] as a constant or computed."""


def literal(net: Net, length: int) -> Shape:
    """Lengths are known: [-1, S, heads, size]."""
    return lambda x, heads, size: net.ints(-1, length, heads, size)


def copied(net: Net) -> Shape:
    """[0, 0, heads, size]: batch and length are copied."""
    return lambda x, heads, size: net.ints(0, 0, heads, size)


def computed(net: Net) -> Shape:
    """torch's view: Shape, Gather, Unsqueeze, Concat."""

    def shape(x: Value, heads: int, size: int) -> str:
        whole = net.node("Shape", [x.name])
        parts = []
        for place in (0, 1):
            index = net.constant(np.array(place, np.int64), "index")
            one = net.node("Gather", [whole, index], axis=0)
            parts.append(net.node("Unsqueeze", [one, net.ints(0)]))
        return net.node("Concat", [*parts, net.ints(heads), net.ints(size)], axis=0)

    return shape


def merged(net: Net, x: Value, heads: int, size: int, shape: Shape) -> str:
    """The shape [N, S, heads * size] in the same style."""
    name = shape(x, heads, size)
    if name in net.weights:
        array = net.weights[name]
        return net.ints(*array[:2].tolist(), heads * size)
    made = net.nodes[-1]
    return net.node("Concat", [*made.input[:2], net.ints(heads * size)], axis=0)


def bind(net: Net, ids: Ints, heads: int, by: By) -> Ints:
    """Unite the atoms of [heads * size] to whole heads, or to dims of every head."""
    grid = ids.reshape(heads, -1)
    if by == "head":
        for column in grid.T[1:]:
            net.union.unite(grid[:, 0], column)
    else:
        for row in grid[1:]:
            net.union.unite(grid[0], row)
    return ids


def couple(net: Net, q: Ints, k: Ints, v: Ints, heads: int, shared: int, by: By) -> None:
    """What goes together; `shared`: so many heads of queries for each of the others.

    By heads, queries and keys go with the values, whatever they are: the weights of a
    head sum to one, so that constant values leave a constant. By dims they are apart.
    """
    size = len(q) // heads
    wide = np.repeat(k.reshape(-1, 1, size), shared, axis=1).reshape(-1)
    bind(net, q, heads, by)
    bind(net, k, heads // shared, by)
    bind(net, v, heads // shared, by)
    net.union.unite(q, wide)
    if by == "head":
        net.union.unite(k, v)
    else:
        net.rigid += [q, k]


def heads_apart(net: Net, x: Value, heads: int, shape: Shape, *order: int) -> str:
    """[N, S, heads * size] to [N, heads, S, size], or turned as `order` says."""
    name = shape(x, heads, x.width // heads)
    made = net.node("Reshape", [x.name, name])
    return net.node("Transpose", [made], perm=list(order or (0, 2, 1, 3)))


def attend(
    net: Net, q: str, k: str, v: str, size: int, mask: str = "", bias: str = ""
) -> str:
    """softmax(q k / sqrt(size)) v; `k` has its last two axes swapped already."""
    scores = net.node("MatMul", [q, k])
    scores = net.node("Div", [scores, net.scalar(float(np.sqrt(size)))])
    for extra in (bias, mask):
        if extra:
            scores = net.node("Add", [scores, extra])
    weights = net.node("Softmax", [scores], axis=-1)
    return net.node("MatMul", [weights, v])


def attention(
    net: Net, x: Value, heads: int, size: int, shape: Shape, by: By, mask: str = ""
) -> Value:
    """Self-attention with three projections and one back; biases everywhere."""
    q = net.linear(x, heads * size, gate=by == "head")
    k = net.linear(x, heads * size, gate=True)
    v = net.linear(x, heads * size)
    couple(net, q.ids, k.ids, v.ids, heads, 1, by)
    keys = heads_apart(net, k, heads, shape, 0, 2, 3, 1)
    queries, values = (heads_apart(net, each, heads, shape) for each in (q, v))
    made = attend(net, queries, keys, values, size, mask)
    made = net.node("Transpose", [made], perm=[0, 2, 1, 3])
    made = net.node("Reshape", [made, merged(net, x, heads, size, shape)])
    return net.linear(Value(made, v.ids, 2), x.width)


def feed_forward(net: Net, x: Value, inner: int, act: str = "Gelu") -> Value:
    """Two layers."""
    return net.linear(net.act(net.linear(x, inner), act), x.width)


def embedding(net: Net, rows: int, width: int, hint: str = "embedding") -> Value:
    """A table [rows, width]; what picks from it has its channels at the end."""
    ids = net.union.new(width)
    name = net.weight(net.normal(rows, width), {1: ids}, hint)
    return Value(name, ids, 2)


def picked(net: Net, table: Value, index: str) -> Value:
    """Rows of a table."""
    return replace(table, name=net.node("Gather", [table.name, index], axis=0))
