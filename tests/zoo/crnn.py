"""CRNN: a convolutional stem, columns as steps, two bidirectional LSTMs, a classifier.

The units of a LSTM go where the rows of its candidate gate are zero; both directions
lose equally many.

Source: Shi et al., https://arxiv.org/abs/1507.05717
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.zoo.toolkit import Maker, Net, Part, Value

SIZE = 12


def _lstm(net: Net, x: Value) -> Value:
    """[T, N, C] to [T, N, 2 * SIZE]; unit i goes in both directions or in none."""
    ids = net.union.new(2 * SIZE)
    net.union.unite(ids[:SIZE], ids[SIZE:])
    one, gates = ids[:SIZE], np.tile(ids[:SIZE], 4)
    fan = x.width + SIZE
    w = net.weight(net.normal(2, 4 * SIZE, x.width, fan=fan), {1: gates, 2: x.ids})
    r = net.weight(net.normal(2, 4 * SIZE, SIZE, fan=fan), {1: gates, 2: one})
    b = net.weight(net.normal(2, 8 * SIZE, fan=10), {1: np.tile(one, 8)}, "bias")
    also = Part(r, 1, gates), Part(b, 1, np.tile(one, 8))
    net.make(Maker(w, 1, gates, also=also))
    net.rigid.append(ids)
    made = net.node(
        "LSTM", [x.name, w, r, b], direction="bidirectional", hidden_size=SIZE
    )
    made = net.node("Transpose", [made], perm=[0, 2, 1, 3])
    return Value(net.node("Reshape", [made, net.ints(0, 0, -1)]), ids, 2)


def crnn(seed: int) -> Net:
    """Images of height 16 and any width."""
    net = Net(seed)
    x = net.input("x", ["N", 1, 16, "W"])
    for width in (8, 12):
        x = net.pool(net.cbr(x, width), 2, 2)
    x = net.act(net.conv(x, 16, 4, pad=0, flat="tall"), "Relu")
    x = replace(x, name=net.node("Squeeze", [x.name, net.ints(2)]))
    x = net.turn(x, 2, 0, 1)
    x = net.linear(_lstm(net, _lstm(net, x)), 11)
    net.output(x, ["T", "N", 11])
    return net
