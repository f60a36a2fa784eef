"""ShuffleNet v2: half of the channels pass a block by, then all are shuffled.

Source: Ma et al., https://arxiv.org/abs/1807.11164
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.zoo.toolkit import Net, Value


def _shuffle(net: Net, x: Value, space: int) -> Value:
    """[2, C/2] to [C/2, 2] by Reshape, Transpose, Reshape.

    The Reshape needs both rows of equal length: column j of the two goes as one.
    """
    half = x.width // 2
    net.union.unite(x.ids[:half], x.ids[half:])
    made = net.reshape(x, -1, 2, half, space, space)
    made = net.on(made, "Transpose", perm=[0, 2, 1, 3, 4])
    made = net.reshape(made, -1, x.width, space, space)
    return replace(made, ids=np.stack([x.ids[:half], x.ids[half:]], 1).reshape(-1))


def _branch(net: Net, x: Value, out: int, stride: int) -> Value:
    made = net.cbr(x, out, 1)
    made = net.conv(made, out, 3, stride, groups=out, bias=False)
    return net.cbr(net.batch_norm(made), out, 1)


def _down(net: Net, x: Value, out: int, space: int) -> Value:
    left = net.conv(x, x.width, 3, 2, groups=x.width, bias=False)
    left = net.cbr(net.batch_norm(left), out // 2, 1)
    made = net.concat(left, _branch(net, x, out // 2, 2))
    return _shuffle(net, made, space)


def _unit(net: Net, x: Value, space: int) -> Value:
    half = x.width // 2
    left, right = net.split(x, half, half)
    made = net.concat(left, _branch(net, right, half, 1))
    return _shuffle(net, made, space)


def shufflenet_v2(seed: int) -> Net:
    """Two stages of a block that halves the image and one that does not."""
    net = Net(seed)
    x = net.cbr(net.input("x", ["N", 3, 32, 32]), 8, 3, 2)
    for width, space in ((24, 8), (32, 4)):
        x = _unit(net, _down(net, x, width, space), space)
    net.classify(net.cbr(x, 32, 1))
    return net
