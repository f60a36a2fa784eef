"""WaveNet: dilated 1-D convolutions, gated by tanh times sigmoid, with skip sums.

Source: van den Oord et al., https://arxiv.org/abs/1609.03499
"""

from __future__ import annotations

from tests.zoo.toolkit import Net, Value


def _conv(net: Net, x: Value, out: int, kernel: int = 1, dilation: int = 1) -> Value:
    return net.conv(x, out, kernel, dilation=dilation, rank=1)


def wavenet(seed: int) -> Net:
    """Four layers; the signal may be of any length. A Split parts filter and gate."""
    net = Net(seed)
    x = _conv(net, net.input("x", ["N", 4, "T"]), 12, 3)
    skips = []
    for place in range(4):
        both = _conv(net, x, 24, 3, 2**place)
        part, gate = net.split(both, 12, 12)
        made = net.mul(net.on(part, "Tanh"), net.on(gate, "Sigmoid"))
        skips.append(_conv(net, made, 16))
        x = net.add(x, _conv(net, made, 12))
    made = net.act(net.add(*skips), "Relu")
    made = net.act(_conv(net, made, 16), "Relu")
    net.output(_conv(net, made, 8), ["N", 8, "T"])
    return net
