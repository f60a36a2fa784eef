"""ConvNeXt: depthwise 7x7, LayerNorm with channels last, layer scale.

Every LayerNorm freezes the stream that it reads; the inner channels of the blocks go.
None of its norms can silence a channel (what has gamma = beta = 0 is zero behind the
norm, where a stream of fixed width goes on), so there is no `norm` mask.

Source: Liu et al., https://arxiv.org/abs/2201.03545
"""

from __future__ import annotations

from tests.zoo.toolkit import Net, Value


def _norm(net: Net, x: Value) -> Value:
    """Over the channels of an image."""
    made = net.layer_norm(net.turn(x, 0, 2, 3, 1))
    return net.turn(made, 0, 3, 1, 2)


def _block(net: Net, x: Value) -> Value:
    made = net.conv(x, x.width, 7, groups=x.width)
    made = net.layer_norm(net.turn(made, 0, 2, 3, 1))
    made = net.linear(net.act(net.linear(made, 2 * x.width), "Gelu"), x.width)
    made = net.turn(made, 0, 3, 1, 2)
    scale = net.weight(net.normal(x.width, 1, 1), {0: made.ids}, "layer_scale")
    return net.add(net.on(made, "Mul", scale), x)


def convnext(seed: int) -> Net:
    """Two stages of two blocks."""
    net = Net(seed)
    x = net.conv(net.input("x", ["N", 3, 32, 32]), 12, 4, 4, pad=0)
    x = _block(net, _block(net, _norm(net, x)))
    x = net.conv(_norm(net, x), 16, 2, 2, pad=0)
    x = _block(net, _block(net, x))
    x = net.flatten(net.global_pool(x))
    net.output(net.gemm(net.layer_norm(x), 10), ["N", 10])
    return net
