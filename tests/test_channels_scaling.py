"""Shrink takes long models: its time grows with their nodes, and no chain is too deep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from benchmarks import channels_scaling
from benchmarks.channels_scaling import NETWORKS, Network
from onnxopt.manager import Context
from tests import support

DEPTH = 1500
LIMIT_SECONDS = 10.0
PIPELINE = "dead-layers,zero-channels"


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_networks_of_the_benchmark_lose_channels(kind: str, tmp_path: Path) -> None:
    """And compute the same."""
    source = NETWORKS[kind](60)
    onnx.save(source, tmp_path / "m.onnx")
    _, result = channels_scaling.shrunk(tmp_path / "m.onnx")
    assert result.report.output is not None
    assert result.report.output.parameters < 0.9 * result.report.source.parameters
    for feed in support.feeds_of(source, (2,)):
        expected, found = support.run(source, feed), support.run(result.model, feed)
        support.assert_same(expected, found, "equivalent")


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_10_000_nodes_are_shrunk_within_10_seconds_of_cpu(
    kind: str, tmp_path: Path
) -> None:
    onnx.save(NETWORKS[kind](10_000), tmp_path / "m.onnx")
    seconds, _ = channels_scaling.shrunk(tmp_path / "m.onnx")
    assert seconds <= LIMIT_SECONDS


def chain(net: Network, value: str) -> str:
    for _ in range(DEPTH):
        value = net.add("Tanh", value)
    return value


def shrunk(source: ModelProto, context: Context) -> ModelProto:
    made = support.final(support.run_passes(source, PIPELINE, context))
    for feed in support.feeds_of(source, (2,)):
        expected, found = support.run(source, feed), support.run(made, feed)
        support.assert_same(expected, found, "equivalent")
    return made


def test_channels_at_the_end_of_a_long_chain(context: Context) -> None:
    """Activations by the thousand between a layer and a Concat."""
    net = Network()
    weight = net.random.standard_normal((4, 3, 1, 1)).astype(np.float32)
    weight[1:3] = 0
    deep = chain(net, net.add("Conv", "x", net.weight(weight)))
    wide = net.add("Conv", "x", net.full(4, 3, 1, 1))
    joined = net.add("Concat", deep, wide, axis=1)
    source = net.model(["N", 3, 2, 2], net.add("Conv", joined, net.full(2, 8, 1, 1)))
    made = shrunk(source, context)
    assert support.find_tensor(made, "w0").dims[0] == 2


def test_a_long_chain_that_does_not_depend_on_the_input(context: Context) -> None:
    """What padding makes of a constant, and a thousand activations of that."""
    net = Network()
    zero, bias = np.zeros((4, 3, 1, 1), np.float32), np.ones(4, np.float32)
    value = net.add("Conv", "x", net.weight(zero), net.weight(bias))
    value = chain(net, net.add("Conv", value, net.full(4, 4, 3, 3), pads=[1, 1, 1, 1]))
    other = net.add("Conv", "x", net.full(4, 3, 1, 1))
    source = net.model([1, 3, 4, 4], net.add("Add", value, other))
    made = shrunk(source, context)
    assert len(made.graph.node) < 10
