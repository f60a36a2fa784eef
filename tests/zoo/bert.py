"""BERT: embeddings, post-norm blocks, a mask; batch and length are open.

Source: Devlin et al., https://arxiv.org/abs/1810.04805
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto

from tests.zoo.toolkit import Net
from tests.zoo.transformer import attention, computed, embedding, feed_forward, picked

WIDTH, WORDS = 24, 40


def _mask(net: Net) -> str:
    """1 to attend, 0 not to, as -1e4 in the scores."""
    net.input("mask", ["N", "S"], kind=TensorProto.INT64)
    made = net.node("Unsqueeze", ["mask", net.ints(1, 2)])
    made = net.node("Cast", [made], to=TensorProto.FLOAT)
    made = net.node("Sub", [net.scalar(1.0), made])
    return net.node("Mul", [made, net.scalar(-1e4)])


def bert(seed: int) -> Net:
    """Two blocks and a pooler."""
    net = Net(seed)
    net.input("ids", ["N", "S"], kind=TensorProto.INT64)
    mask = _mask(net)
    words = picked(net, embedding(net, WORDS, WIDTH), "ids")
    place = embedding(net, 64, WIDTH, "places")
    length = net.node("Gather", [net.node("Shape", ["ids"]), net.ints(1)], axis=0)
    first = net.node("Slice", [place.name, net.ints(0), length, net.ints(0)])
    x = net.layer_norm(net.add(words, replace(place, name=first)))
    for by in ("head", "dim"):
        made = attention(net, x, 4, 6, computed(net), by, mask)
        x = net.layer_norm(net.add(made, x))
        x = net.layer_norm(net.add(feed_forward(net, x, 32), x))
    index = net.constant(np.array(0, np.int64))
    x = replace(x, name=net.node("Gather", [x.name, index], axis=1), axis=1)
    x = net.on(net.gemm(x, 16), "Tanh")
    net.output(net.gemm(x, 3), ["N", 3])
    return net
