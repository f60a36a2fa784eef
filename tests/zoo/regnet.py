"""RegNetY: bottlenecks of one width with grouped 3x3 convolutions and SE.

Source: Radosavovic et al., https://arxiv.org/abs/2003.13678
"""

from __future__ import annotations

from tests.zoo.toolkit import Net, Value


def _block(net: Net, x: Value, width: int, stride: int) -> Value:
    made = net.cbr(x, width, 1)
    made = net.cbr(made, width, 3, stride, groups=width // 8)
    made = net.squeeze_excite(made, x.width // 4)
    made = net.conv_bn(made, width, 1)
    aside = x if stride == 1 else net.conv_bn(x, width, 1, stride)
    return net.act(net.add(made, aside), "Relu")


def regnet(seed: int) -> Net:
    """Three stages, groups of eight channels."""
    net = Net(seed)
    x = net.cbr(net.input("x", ["N", 3, 32, 32]), 16, 3, 2)
    for width in (16, 24, 32):
        x = _block(net, _block(net, x, width, 2), width, 1)
    net.classify(x)
    return net
