"""DenseNet: every layer reads the Concat of all before it, normed anew each time.

Source: Huang et al., https://arxiv.org/abs/1608.06993
"""

from __future__ import annotations

from tests.zoo.toolkit import Net, Value


def _layer(net: Net, x: Value, growth: int) -> Value:
    made = net.act(net.batch_norm(x), "Relu")
    made = net.conv(made, 2 * growth, 1, bias=False)
    made = net.act(net.batch_norm(made), "Relu")
    return net.conv(made, growth, bias=False, normed=True)


def densenet(seed: int) -> Net:
    """Two dense blocks and a transition."""
    net = Net(seed)
    x = net.input("x", ["N", 3, 32, 32])
    x = net.pool(net.cbr(x, 8, 7, 2), 3, 2, 1)
    for block in range(2):
        if block:
            x = net.act(net.batch_norm(x), "Relu")
            x = net.conv(x, 16, 1, bias=False, normed=True)
            x = net.mean_pool(x, 2, 2)
        for _ in range(3):
            x = net.concat(x, _layer(net, x, 8))
    net.classify(net.act(net.batch_norm(x), "Relu"))
    return net
