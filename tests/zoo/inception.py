"""GoogLeNet and Inception v3: branches side by side, factorized kernels, mixed pools.

Sources: Szegedy et al., https://arxiv.org/abs/1409.4842 and
https://arxiv.org/abs/1512.00567
"""

from __future__ import annotations

from tests.zoo.toolkit import Net, Value


def _inception(net: Net, x: Value, width: int) -> Value:
    one = net.cbr(x, width, 1)
    two = net.cbr(net.cbr(x, width // 2, 1), width)
    three = net.cbr(net.cbr(x, width // 4, 1), width // 2)
    four = net.cbr(net.pool(x, 3, 1, 1), width // 2, 1)
    return net.concat(one, two, three, four)


def googlenet(seed: int) -> Net:
    """Two stages of blocks with four branches."""
    net = Net(seed)
    x = net.input("x", ["N", 3, 32, 32])
    x = net.pool(net.cbr(x, 8, 7, 2), 3, 2, 1)
    x = net.cbr(net.cbr(x, 8, 1), 16)
    x = _inception(net, _inception(net, x, 16), 16)
    x = _inception(net, net.pool(x, 3, 2, 1), 16)
    net.classify(net.on(x, "Dropout"))
    return net


def _tall(net: Net, x: Value, out: int, kernel: int) -> Value:
    """1 x k and k x 1: a 1-D convolution each way."""
    return net.cbr(net.cbr(x, out, kernel, flat="wide"), out, kernel, flat="tall")


def _block_a(net: Net, x: Value) -> Value:
    one = net.cbr(x, 8, 1)
    two = net.cbr(net.cbr(x, 8, 1), 8, 5)
    three = net.cbr(net.cbr(net.cbr(x, 8, 1), 12), 12)
    four = net.cbr(net.mean_pool(x, 3, 1, 1), 8, 1)
    return net.concat(one, two, three, four)


def _block_b(net: Net, x: Value) -> Value:
    """It halves the image, without padding."""
    one = net.cbr(x, 12, 3, 2, pad=0)
    two = net.cbr(net.cbr(net.cbr(x, 8, 1), 12), 12, 3, 2, pad=0)
    return net.concat(one, two, net.pool(x, 3, 2))


def _block_c(net: Net, x: Value) -> Value:
    one = net.cbr(x, 12, 1)
    two = _tall(net, net.cbr(x, 8, 1), 12, 7)
    four = net.cbr(net.mean_pool(x, 3, 1, 1), 12, 1)
    return net.concat(one, two, four)


def _block_e(net: Net, x: Value) -> Value:
    """Branches that part again."""
    one = net.cbr(x, 8, 1)
    two = net.cbr(x, 12, 1)
    two = net.concat(net.cbr(two, 8, 3, flat="wide"), net.cbr(two, 8, 3, flat="tall"))
    return net.concat(one, two, net.cbr(net.mean_pool(x, 3, 1, 1), 8, 1))


def inception_v3(seed: int) -> Net:
    """Its blocks A to C and E, after a stem without padding."""
    net = Net(seed)
    x = net.input("x", ["N", 3, 43, 43])
    x = net.cbr(x, 8, 3, 2, pad=0)
    x = net.cbr(net.cbr(x, 8, 3, pad=0), 12)
    x = net.cbr(net.pool(x, 3, 2), 16, 1)
    x = _block_e(net, _block_c(net, _block_b(net, _block_a(net, x))))
    net.classify(net.on(x, "Dropout"))
    return net
