"""VGG: padded 3x3 convolutions, MaxPool, Flatten, a stack of Gemm.

Source: Simonyan and Zisserman, https://arxiv.org/abs/1409.1556
"""

from __future__ import annotations

from tests.zoo.toolkit import Net


def vgg(seed: int, *, norms: bool = False) -> Net:
    """Three stages of two convolutions; with norms, VGG-BN."""
    net = Net(seed)
    x = net.input("x", ["N", 3, 16, 16])
    for width in (8, 16, 16):
        for _ in range(2):
            x = net.conv(x, width)
            x = net.act(net.batch_norm(x) if norms else x, "Relu")
        x = net.pool(x, 2, 2)
    x = net.flatten(x, 4)
    for width in (24, 16):
        x = net.on(net.act(net.gemm(x, width), "Relu"), "Dropout")
    net.output(net.gemm(x, 10), ["N", 10])
    return net


def vgg_bn(seed: int) -> Net:
    """With BatchNormalization behind the convolutions, which have biases."""
    return vgg(seed, norms=True)
