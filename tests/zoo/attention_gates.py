"""SE-ResNet and CBAM: gates on channels and on places.

Sources: Hu et al., https://arxiv.org/abs/1709.01507; Woo et al.,
https://arxiv.org/abs/1807.06521
"""

from __future__ import annotations

from dataclasses import replace

from tests.zoo.toolkit import Net, Value


def _linear_gate(net: Net, x: Value) -> Value:
    """torch's SE with Linear layers: pooled, flattened, and back to [N, C, 1, 1]."""
    seen = net.flatten(net.on(x, "ReduceMean", axes=[2, 3], keepdims=1))
    seen = net.act(net.gemm(seen, 4), "Relu")
    seen = net.on(net.gemm(seen, x.width, gate=True), "Sigmoid")
    return net.mul(x, net.reshape(seen, -1, x.width, 1, 1))


def se_resnet(seed: int) -> Net:
    """Basic blocks with a gate before the sum."""
    net = Net(seed)
    x = net.cbr(net.input("x", ["N", 3, 16, 16]), 16)
    for _ in range(3):
        made = net.conv_bn(net.cbr(x, 16), 16)
        x = net.act(net.add(_linear_gate(net, made), x), "Relu")
    net.classify(x)
    return net


def _shared_layers(net: Net, x: Value) -> Value:
    """One pair of layers reads the mean and the maximum of every channel."""
    mean, peak = net.global_pool(x), net.on(x, "GlobalMaxPool")
    inner = net.conv(mean, 6, 1, bias=False)
    first = net.nodes[-1]
    one = net.act(inner, "Relu")
    gate = net.conv(one, x.width, 1, bias=False, gate=True)
    second = net.nodes[-1]
    two = net.on(peak, "Conv", first.input[1], kernel_shape=[1, 1])
    two = net.act(replace(two, ids=inner.ids), "Relu")
    two = net.on(two, "Conv", second.input[1], kernel_shape=[1, 1])
    return net.on(net.on(gate, "Add", two.name), "Sigmoid")


def _place_gate(net: Net, x: Value) -> Value:
    """Mean and maximum over the channels: without one they are others, so all stay."""
    mean = net.node("ReduceMean", [x.name], axes=[1], keepdims=1)
    peak = net.node("ReduceMax", [x.name], axes=[1], keepdims=1)
    net.freeze(x)
    two = Value(net.node("Concat", [mean, peak], axis=1), net.union.new(2))
    net.freeze(two)
    gate = net.on(net.conv(two, 1, 7, bias=False), "Sigmoid")
    net.freeze(gate)
    return net.on(x, "Mul", gate.name)


def cbam(seed: int) -> Net:
    """A gate on channels, and one on places, which keeps what it reads."""
    net = Net(seed)
    x = net.cbr(net.input("x", ["N", 3, 16, 16]), 16)
    for place in range(2):
        made = net.conv_bn(net.cbr(x, 12), 16)
        made = net.mul(made, _shared_layers(net, made))
        if place:
            made = _place_gate(net, made)
            x = net.act(made, "Relu")
            continue
        x = net.cbr(net.act(net.add(made, x), "Relu"), 16)
    net.classify(x)
    return net
