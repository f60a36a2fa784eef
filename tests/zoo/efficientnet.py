"""EfficientNet: MBConv blocks with SiLU and squeeze-and-excitation.

Source: Tan and Le, https://arxiv.org/abs/1905.11946
"""

from __future__ import annotations

from tests.zoo.mobilenet import inverted_residual
from tests.zoo.toolkit import Net


def efficientnet(seed: int) -> Net:
    """Five MBConv blocks."""
    net = Net(seed)
    x = net.cbr(net.input("x", ["N", 3, 32, 32]), 8, 3, 2, act="SiLU")
    plan = ((8, 1, 3, 1), (12, 2, 3, 3), (12, 1, 3, 3), (16, 2, 5, 3), (16, 1, 5, 3))
    for width, stride, kernel, expand in plan:
        x = inverted_residual(
            net,
            x,
            width,
            stride,
            kernel=kernel,
            expand=expand,
            act="SiLU",
            gate="Sigmoid",
        )
    net.classify(net.cbr(x, 32, 1, act="SiLU"))
    return net
