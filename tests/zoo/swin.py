"""Swin: attention in windows, every other time of a shifted image.

Source: Liu et al., https://arxiv.org/abs/2103.14030
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.zoo.toolkit import Net, Value
from tests.zoo.transformer import (
    By,
    attend,
    couple,
    feed_forward,
)

SIDE, WINDOW, WIDTH = 8, 4, 24


def _roll(net: Net, x: Value, by: int) -> Value:
    """torch.roll on height and width: two Slices and a Concat each."""
    for axis in (1, 2):
        bounds = (by, SIDE), (0, by)
        parts = [
            net.on(x, "Slice", net.ints(a), net.ints(b), net.ints(axis)).name
            for a, b in bounds
        ]
        x = replace(x, name=net.node("Concat", parts, axis=axis))
    return x


def _apart(net: Net, x: Value) -> Value:
    """[N, H, W, C] to [N * windows, tokens, C]."""
    count = SIDE // WINDOW
    made = net.reshape(x, -1, count, WINDOW, count, WINDOW, x.width)
    made = net.on(made, "Transpose", perm=[0, 1, 3, 2, 4, 5])
    return replace(net.reshape(made, -1, WINDOW * WINDOW, x.width), axis=2)


def _together(net: Net, x: Value) -> Value:
    count = SIDE // WINDOW
    made = net.reshape(x, -1, count, count, WINDOW, WINDOW, x.width)
    made = net.on(made, "Transpose", perm=[0, 1, 3, 2, 4, 5])
    return replace(net.reshape(made, -1, SIDE, SIDE, x.width), axis=3)


def _window_attention(net: Net, x: Value, heads: int, by: By) -> Value:
    """One projection to queries, keys and values; a bias for each pair of places."""
    tokens, size = WINDOW * WINDOW, x.width // heads
    both = net.linear(x, 3 * x.width)
    q, k, v = np.split(both.ids, 3)
    couple(net, q, k, v, heads, 1, by)
    net.union.unite(q, v)  # [3, heads, size] is cut as one
    made = net.reshape(both, -1, tokens, 3, heads, size).name
    made = net.node("Transpose", [made], perm=[2, 0, 3, 1, 4])
    parts = [
        net.node("Gather", [made, net.constant(np.array(i, np.int64))], axis=0)
        for i in range(3)
    ]
    keys = net.node("Transpose", [parts[1]], perm=[0, 1, 3, 2])
    column = {1: q.reshape(heads, -1)[:, 0]} if by == "head" else {}
    bias = net.weight(net.normal(1, heads, tokens, tokens), column, "place")
    made = attend(net, parts[0], keys, parts[2], size, bias=bias)
    made = net.node("Transpose", [made], perm=[0, 2, 1, 3])
    made = net.node("Reshape", [made, net.ints(-1, tokens, x.width)])
    return net.linear(Value(made, v, 2), x.width)


def swin(seed: int) -> Net:
    """Two blocks, the second shifted; then patches are merged."""
    net = Net(seed)
    x = net.conv(net.input("x", ["N", 3, 16, 16]), WIDTH, 2, 2, pad=0)
    x = net.layer_norm(net.turn(x, 0, 2, 3, 1))
    for shift, by in ((0, "head"), (WINDOW // 2, "dim")):
        made = net.layer_norm(x)
        made = _roll(net, made, shift) if shift else made
        made = _together(net, _window_attention(net, _apart(net, made), 4, by))
        made = _roll(net, made, SIDE - shift) if shift else made
        x = net.add(x, made)
        x = net.add(x, feed_forward(net, net.layer_norm(x), 32))
    parts = []
    for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
        part = net.on(
            x,
            "Slice",
            net.ints(row, column),
            net.ints(SIDE, SIDE),
            net.ints(1, 2),
            net.ints(2, 2),
        )
        parts.append(part)
    x = net.linear(net.layer_norm(net.concat(*parts)), 32, bias=False)
    x = net.layer_norm(x)
    x = replace(net.on(x, "ReduceMean", axes=[1, 2], keepdims=0), axis=1)
    net.output(net.gemm(x, 10), ["N", 10])
    return net
