"""MobileNet v1, v2 and v3: depthwise convolutions, inverted residuals, SE, HardSwish.

Sources: Howard et al., https://arxiv.org/abs/1704.04861; Sandler et al.,
https://arxiv.org/abs/1801.04381; Howard et al., https://arxiv.org/abs/1905.02244
"""

from __future__ import annotations

from tests.zoo.toolkit import Net, Value


def depthwise(
    net: Net, x: Value, kernel: int, stride: int, act: str = "Relu", bias: bool = False
) -> Value:
    """A filter for each channel, its norm and an activation."""
    made = net.conv(x, x.width, kernel, stride, groups=x.width, bias=bias)
    return net.act(net.batch_norm(made), act)


def mobilenet_v1(seed: int) -> Net:
    """Depthwise and 1x1 in turn."""
    net = Net(seed)
    x = net.cbr(net.input("x", ["N", 3, 32, 32]), 8, 3, 2)
    for width, stride in ((8, 1), (16, 2), (16, 1), (24, 2), (24, 1)):
        x = net.cbr(depthwise(net, x, 3, stride), width, 1)
    net.classify(x)
    return net


def inverted_residual(
    net: Net,
    x: Value,
    out: int,
    stride: int,
    *,
    kernel: int = 3,
    expand: int = 3,
    act: str = "Relu6",
    gate: str = "",
) -> Value:
    """1x1 out, depthwise, 1x1 in, around which the input goes where it can."""
    made = net.cbr(x, expand * x.width, 1, act=act)
    made = depthwise(net, made, kernel, stride, act)
    if gate:
        made = net.squeeze_excite(made, max(x.width // 2, 4), gate)
    made = net.conv_bn(made, out, 1)
    return net.add(x, made) if stride == 1 and x.width == out else made


def mobilenet_v2(seed: int) -> Net:
    """Inverted residuals with Relu6."""
    net = Net(seed)
    x = net.cbr(net.input("x", ["N", 3, 32, 32]), 8, 3, 2, act="Relu6")
    for width, stride in ((8, 1), (12, 2), (12, 1), (16, 2), (16, 1)):
        x = inverted_residual(net, x, width, stride)
    net.classify(net.cbr(x, 32, 1, act="Relu6"))
    return net


def mobilenet_v3(seed: int) -> Net:
    """With squeeze-and-excitation by HardSigmoid, 5x5 kernels and HardSwish."""
    net = Net(seed)
    x = net.cbr(net.input("x", ["N", 3, 32, 32]), 8, 3, 2, act="HardSwish")
    plan = (
        (8, 1, 3, "Relu", "HardSigmoid"),
        (12, 2, 5, "HardSwish", ""),
        (12, 1, 5, "HardSwish", "HardSigmoid"),
        (16, 2, 3, "HardSwish", "HardSigmoid"),
    )
    for width, stride, kernel, act, gate in plan:
        x = inverted_residual(net, x, width, stride, kernel=kernel, act=act, gate=gate)
    x = net.cbr(x, 32, 1, act="HardSwish")
    x = net.act(net.gemm(net.flatten(net.global_pool(x)), 24), "HardSwish")
    net.output(net.gemm(x, 10), ["N", 10])
    return net
