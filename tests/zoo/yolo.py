"""YOLOv8: C2f (Split, a chain, Concat), SPPF, a neck with Resize, a DFL head.

Source: Ultralytics YOLOv8, https://github.com/ultralytics/ultralytics
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.zoo.toolkit import Net, Value

BINS = 8
CLASSES = 3


def _cbs(net: Net, x: Value, out: int, kernel: int = 1, stride: int = 1) -> Value:
    return net.cbr(x, out, kernel, stride, act="SiLU")


def _c2f(net: Net, x: Value, out: int, is_residual: bool) -> Value:
    half = out // 2
    parts = net.split(_cbs(net, x, out), half, half)
    for _ in range(2):
        made = _cbs(net, _cbs(net, parts[-1], half, 3), half, 3)
        parts.append(net.add(parts[-1], made) if is_residual else made)
    return _cbs(net, net.concat(*parts), out)


def _sppf(net: Net, x: Value) -> Value:
    made = [_cbs(net, x, x.width // 2)]
    for _ in range(3):
        made.append(net.pool(made[-1], 5, 1, 2))
    return _cbs(net, net.concat(*made), x.width)


def _head(net: Net, x: Value, cells: int) -> tuple[Value, Value]:
    """The bins of four distances, and the classes: [N, .., cells] each."""
    box = _cbs(net, _cbs(net, x, 16, 3), 16, 3)
    box = net.reshape(net.conv(box, 4 * BINS, 1), 0, 4 * BINS, cells)
    kind = _cbs(net, _cbs(net, x, 8, 3), 8, 3)
    kind = net.reshape(net.conv(kind, CLASSES, 1), 0, CLASSES, cells)
    return net.freeze(box), net.freeze(kind)


def _distances(net: Net, x: Value, cells: int) -> Value:
    """DFL: the mean of each distance under the softmax of its bins, as a 1x1 Conv."""
    made = net.reshape(x, 0, 4, BINS, cells)
    made = net.on(made, "Transpose", perm=[0, 2, 1, 3])
    made = net.on(made, "Softmax", axis=1)
    mean = net.constant(np.arange(BINS, dtype=np.float32).reshape(1, BINS, 1, 1))
    made = net.on(made, "Conv", mean)
    made = net.reshape(made, 0, 4, cells)
    return replace(made, ids=net.union.new(4))


def yolo(seed: int) -> Net:
    """Two scales of a 32x32 image."""
    net = Net(seed)
    x = net.input("x", ["N", 3, 32, 32])
    x = _cbs(net, _cbs(net, x, 8, 3, 2), 12, 3, 2)
    fine = _c2f(net, x, 12, True)
    coarse = _sppf(net, _c2f(net, _cbs(net, fine, 16, 3, 2), 16, True))
    fine = _c2f(net, net.concat(net.resize(coarse, 2), fine), 12, False)
    coarse = net.concat(_cbs(net, fine, 12, 3, 2), coarse)
    coarse = _c2f(net, coarse, 16, False)
    heads = [_head(net, fine, 64), _head(net, coarse, 16)]
    boxes = [replace(box, axis=2) for box, _ in heads]
    kinds = [replace(kind, axis=2) for _, kind in heads]
    box = replace(net.concat(*boxes), ids=heads[0][0].ids, axis=1)
    kind = replace(net.concat(*kinds), ids=heads[0][1].ids, axis=1)
    box = net.freeze(_distances(net, box, 80))
    made = net.concat(box, net.on(kind, "Sigmoid"))
    net.output(made, ["N", 4 + CLASSES, 80])
    return net
