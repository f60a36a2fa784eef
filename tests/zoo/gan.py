"""DCGAN's generator: a vector, a Gemm, ConvTranspose up to an image.

Source: Radford et al., https://arxiv.org/abs/1511.06434
"""

from __future__ import annotations

from dataclasses import replace

from tests.zoo.toolkit import Net


def gan(seed: int) -> Net:
    """Three layers up; the Reshape makes channels of runs of the Gemm's outputs."""
    net = Net(seed)
    x = net.gemm(net.input("z", ["N", 16]), 16 * 4 * 4)
    channels = x.ids[::16]
    for place in range(1, 16):  # the 16 outputs of a channel go together
        net.union.unite(channels, x.ids[place::16])
    x = replace(net.reshape(x, -1, 16, 4, 4), ids=channels)
    x = net.act(net.batch_norm(x), "Relu")
    for width in (12, 8):
        x = net.act(net.batch_norm(net.conv_transpose(x, width, 4, 2, 1)), "Relu")
    x = net.conv_transpose(x, 3, 4, 2, 1)
    net.output(net.on(x, "Tanh"), ["N", 3, 32, 32])
    return net
