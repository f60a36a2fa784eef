"""ResNet with basic and bottleneck blocks, and ResNeXt.

Sources: He et al., https://arxiv.org/abs/1512.03385; Xie et al.,
https://arxiv.org/abs/1611.05431
"""

from __future__ import annotations

from collections.abc import Callable

from tests.zoo.toolkit import Net, Value

Block = Callable[[Net, Value, int, int], Value]


def _shortcut(net: Net, x: Value, out: int, stride: int) -> Value:
    """The input, projected where it has another size."""
    if x.width == out and stride == 1:
        return x
    return net.conv_bn(x, out, 1, stride)


def _basic(net: Net, x: Value, width: int, stride: int) -> Value:
    made = net.cbr(x, width, 3, stride)
    made = net.conv_bn(made, width)
    return net.act(net.add(made, _shortcut(net, x, width, stride)), "Relu")


def _bottleneck(groups: int) -> Block:
    def block(net: Net, x: Value, width: int, stride: int) -> Value:
        out = 2 * width
        made = net.cbr(x, width, 1)
        made = net.cbr(made, width, 3, stride, groups=groups)
        made = net.conv_bn(made, out, 1)
        return net.act(net.add(made, _shortcut(net, x, out, stride)), "Relu")

    return block


def _net(seed: int, block: Block, widths: tuple[int, ...]) -> Net:
    net = Net(seed)
    x = net.input("x", ["N", 3, 32, 32])
    x = net.pool(net.cbr(x, 8, 7, 2), 3, 2, 1)
    for stage, width in enumerate(widths):
        x = block(net, x, width, 2 if stage else 1)
        x = block(net, x, width, 1)
    net.classify(x)
    return net


def resnet_basic(seed: int) -> Net:
    """As ResNet-18."""
    return _net(seed, _basic, (8, 16, 24))


def resnet_bottleneck(seed: int) -> Net:
    """As ResNet-50."""
    return _net(seed, _bottleneck(1), (8, 12, 16))


def resnext(seed: int) -> Net:
    """Its 3x3 convolutions have four groups."""
    return _net(seed, _bottleneck(4), (16, 24, 32))


def resnet_preact(seed: int) -> Net:
    """Norms and Relu before the convolutions, on the stream that all blocks share."""
    net = Net(seed)
    x = net.input("x", ["N", 3, 16, 16])
    x = net.conv(x, 16, bias=False, normed=True)
    for _ in range(3):
        made = net.act(net.batch_norm(x), "Relu")
        made = net.act(net.batch_norm(net.conv(made, 12, bias=False)), "Relu")
        x = net.add(x, net.conv(made, 16, bias=False, normed=True))
    net.classify(net.act(net.batch_norm(x), "Relu"))
    return net
