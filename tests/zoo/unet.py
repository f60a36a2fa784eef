"""U-Net: down by MaxPool, up by ConvTranspose or Resize, joined by Concat.

Source: Ronneberger et al., https://arxiv.org/abs/1505.04597
"""

from __future__ import annotations

from collections.abc import Callable

from tests.zoo.toolkit import Net, Value

Up = Callable[[Net, Value, int], Value]


def _double(net: Net, x: Value, width: int) -> Value:
    return net.cbr(net.cbr(x, width), width)


def _net(seed: int, up: Up, size: int | str) -> Net:
    net = Net(seed)
    x = net.input("x", ["N", 3, size, size])
    skips = []
    for width in (8, 12):
        x = _double(net, x, width)
        skips.append(x)
        x = net.pool(x, 2, 2)
    x = _double(net, x, 16)
    for skip in reversed(skips):
        x = net.concat(skip, up(net, x, skip.width))
        x = _double(net, x, skip.width)
    x = net.conv(x, 2, 1)
    net.output(net.on(x, "Sigmoid"), ["N", 2, size, size])
    return net


def unet_transposed(seed: int) -> Net:
    """Up by ConvTranspose; images of one size."""
    return _net(seed, lambda net, x, width: net.conv_transpose(x, width, 2, 2), 16)


def unet_resized(seed: int) -> Net:
    """Up by Resize and a convolution; the size of the image is open."""
    return _net(
        seed, lambda net, x, width: net.cbr(net.resize(x, 2, "linear"), width), "H"
    )
