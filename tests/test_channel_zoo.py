"""Networks of every family, masked: what has to go is gone, and nothing has changed.

The networks and what their masks allow come from `zoo`, which knows nothing of the
engine. One share and seed here; the rest are marked slow, and `benchmarks/zoo.py` prints
them as a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from onnxopt.manager import Context
from onnxopt.model import Model
from onnxopt.passes import PIPELINES
from tests import support
from tests.zoo import ZOO, feeds, masks
from tests.zoo.masks import Kind, Masked
from tests.zoo.quantized import quantize

PIPELINE = ",".join(PIPELINES["shrink"])
ENOUGH = 0.95
"""Of the constants that can go; of zeros, all."""
SHARES = (0.3, 0.5, 0.7)

QUANTIZED = (
    "DenseNet",
    "MobileNet v2",
    "ResNeXt",
    "ResNet basic",
    "ShuffleNet v2",
    "U-Net Resize",
    "VGG",
    "WaveNet",
)

Check = Callable[[str, Masked, float], None]


@pytest.fixture(name="check")
def _check(context: Context) -> Check:
    """Shrinks a network; it comes out right, small enough, and a second time the same."""

    def call(name: str, given: Masked, enough: float) -> None:
        model = support.run_passes(given.model, PIPELINE, context)
        made = support.final(model)
        check_numbers(given.model, made)
        removed, allowed = given.removed(made), given.removable
        why = "\n".join([*given.short(made), *map(str, support.skips(model))])
        assert removed >= enough * allowed, f"{removed} of {allowed}\n{why}"
        again = support.run_passes(made, PIPELINE, context)
        assert edits(again) == 0

    return call


def check_numbers(source: ModelProto, made: ModelProto) -> None:
    """Valid, of the same interface, and equal but for rounding on every feed."""
    onnx.checker.check_model(made, full_check=True)
    assert list(made.graph.input) == list(source.graph.input)
    assert list(made.graph.output) == list(source.graph.output)
    for feed in feeds(source):
        expected = support.run(source, feed)
        assert all(np.isfinite(each).all() for each in expected)
        support.assert_same(expected, support.run(made, feed), "equivalent")


def edits(model: Model) -> int:
    return sum(report.edits for report in model.ledger.reports())


def kinds(name: str) -> tuple[Kind, ...]:
    """Masks by norms are for networks that have some which can be silenced."""
    return tuple(kind for kind in masks.KINDS if kind != "norm" or ZOO[name](0).norms)


CASES = [(name, kind) for name in ZOO for kind in kinds(name)]


def by_group(name: str, kind: Kind, share: float, seed: int) -> Masked:
    return masks.by_group(ZOO[name](seed), kind, share, seed)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_group_masks(name: str, kind: Kind, check: Check) -> None:
    enough = ENOUGH if kind == "constant" else 1.0
    check(name, by_group(name, kind, 0.5, 0), enough)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_group_masks_of_other_shares(name: str, kind: Kind, check: Check) -> None:
    enough = ENOUGH if kind == "constant" else 1.0
    for share, seed in itertools.product(SHARES, range(1, 4)):
        check(name, by_group(name, kind, share, seed), enough)


@pytest.mark.parametrize("name", ZOO)
def test_masks_of_each_layer_for_itself(name: str, check: Check) -> None:
    """What the layers of a group agree on goes, and nothing else changes."""
    check(name, masks.by_layer(ZOO[name](0), 0.7, 0), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_other_masks_of_each_layer(name: str, check: Check) -> None:
    for share, seed in itertools.product(SHARES, range(1, 4)):
        check(name, masks.by_layer(ZOO[name](seed), share, seed), 1.0)


@pytest.mark.parametrize("name", ZOO)
def test_masks_by_chance(name: str, check: Check) -> None:
    """Constants that meet zeros and live channels, at borders and in sums."""
    check(name, masks.by_chance(ZOO[name](0), 0.4, 0), 1.0)


def test_one_place_of_what_a_norm_makes_keeps_its_channels(check: Check) -> None:
    """The head asks for few channels of the first token; the norm in front gives all."""
    check("ViT", masks.by_chance(ZOO["ViT"](3), 0.8, 3), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_other_masks_by_chance(name: str, check: Check) -> None:
    for share, seed in itertools.product((0.2, 0.5, 0.8), range(1, 6)):
        check(name, masks.by_chance(ZOO[name](seed), share, seed), 1.0)


def quantized(name: str, kind: Kind, **options: bool) -> Masked:
    given = by_group(name, kind, 0.5, 0)
    return quantize(given, feeds(given.model), **options)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_networks(name: str, check: Check) -> None:
    check(name, quantized(name, "zero", per_channel=True), 1.0)
    check(f"{name}, QLinear", quantized(name, "zero", operators=True), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_other_quantized_networks(name: str, check: Check) -> None:
    """Of constants, what is said is that nothing changes: integers carry no fractions."""
    for per_channel in (False, True):
        kind: Kind
        for kind, enough in (("norm", 1.0), ("constant", 0.0)):
            if kind in kinds(name):
                check(name, quantized(name, kind, per_channel=per_channel), enough)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_masks_are_worth_the_test(name: str, kind: Kind) -> None:
    """There is something to lose, and the network still answers to its input."""
    given = by_group(name, kind, 0.5, 0)
    assert given.removable > 20
    first, second = (support.run(given.model, f)[0] for f in feeds(given.model)[:2])
    assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()


def test_networks_without_a_mask_lose_nothing(context: Context) -> None:
    """No rule takes a live channel."""
    for name, build in ZOO.items():
        source = build(0).model()
        made = support.final(support.run_passes(source, PIPELINE, context))
        sizes = {t.name: list(t.dims) for t in source.graph.initializer}
        for tensor in made.graph.initializer:
            assert sizes.get(tensor.name, list(tensor.dims)) == list(tensor.dims), name
