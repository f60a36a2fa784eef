"""ViT: patches by a convolution, a class token, pre-norm blocks.

Source: Dosovitskiy et al., https://arxiv.org/abs/2010.11929
"""

from __future__ import annotations

from dataclasses import replace

from tests.zoo.toolkit import Net
from tests.zoo.transformer import attention, feed_forward, literal

WIDTH, TOKENS = 24, 17


def vit(seed: int) -> Net:
    """Two blocks on 16 patches; one is masked by heads, the other by dims."""
    net = Net(seed)
    x = net.conv(net.input("x", ["N", 3, 16, 16]), WIDTH, 4, 4, pad=0)
    x = net.turn(net.reshape(x, 0, WIDTH, 16), 0, 2, 1)
    token = net.weight(net.normal(1, 1, WIDTH), {2: x.ids}, "token")
    batch = net.node("Shape", [x.name])
    first = net.node("Slice", [batch, net.ints(0), net.ints(1)])
    dims = net.node("Concat", [first, net.ints(1, WIDTH)], axis=0)
    token = net.node("Expand", [token, dims])
    x = replace(x, name=net.node("Concat", [token, x.name], axis=1))
    place = net.weight(net.normal(1, TOKENS, WIDTH), {2: x.ids}, "place")
    x = net.on(x, "Add", place)
    for by in ("head", "dim"):
        normed = net.layer_norm(x)
        made = attention(net, normed, 4, 6, literal(net, TOKENS), by)
        x = net.add(x, made)
        x = net.add(x, feed_forward(net, net.layer_norm(x), 32))
    x = net.layer_norm(x)
    index = net.constant(0)
    x = replace(x, name=net.node("Gather", [x.name, index], axis=1), axis=1)
    net.output(net.gemm(x, 10), ["N", 10])
    return net
