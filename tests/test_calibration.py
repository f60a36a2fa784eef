"""Calibration: histograms, the ranges made of them, runs in lots, the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxopt.data.inputs import Feed, Feeds
from onnxopt.errors import UsageError
from onnxopt.quantization import calibration
from onnxopt.quantization.calibration import Calibration
from onnxopt.quantization.histogram import BINS, LEAST_LIMIT, Histogram, limit_of
from onnxopt.quantization.ranges import METHODS, Range, mean_square, percentile
from tests.support import Array, model_of

SAMPLES = st.lists(
    hnp.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    ),
    min_size=1,
    max_size=6,
)


def histogram(*samples: Array) -> Histogram:
    made = Histogram()
    for sample in samples:
        made.add(sample)
    return made


# ---- histograms ----


@given(SAMPLES)
@settings(max_examples=80, deadline=None)
def test_extremes_are_exact_and_every_element_is_counted(samples: list[Array]) -> None:
    seen, whole = histogram(*samples), np.concatenate(samples)
    assert (seen.low, seen.high) == (whole.min(), whole.max())
    assert seen.total == whole.size
    assert seen.zeros == np.count_nonzero(whole == 0)
    assert (seen.counts >= 0).all()
    assert seen.limit >= np.abs(whole).max()


@given(SAMPLES)
@settings(max_examples=80, deadline=None)
def test_bins_are_those_of_the_values(samples: list[Array]) -> None:
    seen, whole = histogram(*samples), np.concatenate(samples).astype(np.float64)
    edges = np.linspace(-seen.limit, seen.limit, BINS + 1)
    expected, _ = np.histogram(whole[whole != 0], edges)
    np.testing.assert_array_equal(seen.counts, expected)


@given(SAMPLES, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_and_the_split_of_samples_change_nothing(
    samples: list[Array], random: Random
) -> None:
    whole = histogram(*samples)
    shuffled = list(samples)
    random.shuffle(shuffled)
    first, second = histogram(*shuffled[::2]), histogram(*shuffled[1::2])
    first.merge(second)
    assert (first.low, first.high, first.limit) == (whole.low, whole.high, whole.limit)
    np.testing.assert_array_equal(first.counts, whole.counts)
    assert (first.zeros, first.samples) == (whole.zeros, whole.samples)
    np.testing.assert_allclose(first.average, whole.average)


def test_what_is_not_finite_is_counted_apart() -> None:
    seen = histogram(np.array([1, np.nan, -2, np.inf, -np.inf], np.float32))
    assert (seen.low, seen.high, seen.not_finite, seen.total) == (-2, 1, 3, 2)
    seen.add(np.array([np.nan], np.float32))
    assert (seen.samples, seen.not_finite) == (1, 4)


@pytest.mark.parametrize("size", [1.0, 0.75, 2.0**-80, 3e38])
def test_limits_are_powers_of_two(size: float) -> None:
    limit = limit_of(size)
    assert limit >= max(size, LEAST_LIMIT)
    assert limit == LEAST_LIMIT or limit / 2 < size
    assert np.frexp(limit)[0] == 0.5


# ---- ranges ----


def error_of(values: Array, span: Range, levels: int = 256) -> float:
    """The squared error of an asymmetric quantizer, computed value by value."""
    step = (span.high - span.low) / (levels - 1)
    zero = np.rint(-span.low / step)
    codes = np.clip(np.rint(values / step) + zero, 0, levels - 1)
    return float((((codes - zero) * step - values) ** 2).sum())


def heavy(seed: int) -> Array:
    random = np.random.default_rng(seed)
    return random.standard_t(3, size=20_000).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_range_holds_zero_and_lies_within_what_was_seen(
    method: str, symmetric: bool
) -> None:
    values = heavy(0)
    span = METHODS[method](histogram(values), 256, symmetric)
    most = float(np.abs(values).max())
    assert -most * 1.001 <= span.low <= 0 <= span.high <= most * 1.001
    assert span.high > span.low
    assert not symmetric or span.low == -span.high


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_side_that_was_never_seen_gets_no_codes(method: str, sign: int) -> None:
    span = METHODS[method](histogram(sign * np.abs(heavy(1)) - 0.0), 256, False)
    assert (span.low if sign > 0 else span.high) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [16, 256])
def test_mse_beats_the_other_methods(seed: int, levels: int) -> None:
    values = heavy(seed)
    seen = histogram(values)
    best = error_of(values, mean_square(seen, levels, False), levels)
    for method in METHODS.values():
        assert best <= error_of(values, method(seen, levels, False), levels) * 1.02
    grid = np.linspace(0.01, 1, 200)
    spans = [Range(float(values.min() * s), float(values.max() * s)) for s in grid]
    assert best <= min(error_of(values, span, levels) for span in spans) * 1.02


def test_a_percentile_cuts_what_it_says() -> None:
    values = np.linspace(-1, 3, 100_001).astype(np.float32)
    span = percentile(histogram(values), share=90.0)
    assert span.low == pytest.approx(-0.8, abs=0.01)
    assert span.high == pytest.approx(2.8, abs=0.01)


def test_zeros_count_for_a_percentile() -> None:
    values = np.concatenate([np.zeros(99_000), np.linspace(0, 1, 1_000)])
    span = percentile(histogram(values.astype(np.float32)), share=99.0)
    assert span.high == pytest.approx(0.5, abs=0.02)


# ---- runs ----


NETWORK = model_of(
    """agraph (float[N, 3] x) => (float[N, 4] y) {
        z = ReduceMax<axes=[1], keepdims=1>(x)
        t = Concat<axis=1>(x, z)
        r = Relu(t)
        y = Sigmoid(r)
    }"""
)


def feeds(count: int, seed: int = 0, scale: float = 1.0) -> list[Feed]:
    random = np.random.default_rng(seed)
    return [
        {"x": (random.standard_normal((2, 3)) * scale).astype(np.float32)}
        for _ in range(count)
    ]


def as_feeds(found: list[Feed]) -> Feeds:
    def make() -> Iterator[Feed]:
        return iter(found)

    return Feeds(make, "test")


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    path.write_bytes(NETWORK.SerializeToString())
    return path


def test_values_are_those_of_a_run(network: Path) -> None:
    given_ = feeds(5)
    seen = Calibration(as_feeds(given_)).run(network, ["x", "t", "r"])
    whole = np.concatenate([feed["x"] for feed in given_])
    assert (seen["t"].low, seen["t"].high) == (whole.min(), whole.max())
    assert (seen["r"].low, seen["r"].high) == (0, whole.max())
    assert seen["x"].total == whole.size
    assert seen["t"].samples == 5


def test_lots_change_nothing(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["x", "t", "r"]
    together = Calibration(as_feeds(feeds(4))).run(network, names)
    monkeypatch.setattr(calibration, "LOT_BYTES", 1)
    apart = Calibration(as_feeds(feeds(4))).run(network, names)
    for name in names:
        np.testing.assert_array_equal(together[name].counts, apart[name].counts)


def test_a_cache_is_used_and_gone_on_from(network: Path, tmp_path: Path) -> None:
    cache, told = tmp_path / "cache.npz", list[int]()

    def calibrate(count: int) -> dict[str, Histogram]:
        told.clear()
        return Calibration(
            as_feeds(feeds(count)),
            cache=cache,
            progress=lambda done, lot: told.append(done),
        ).run(network, ["t"])

    calibrate(3)
    assert told == [1, 2, 3]
    first = calibrate(3)
    assert told == []
    second = calibrate(5)
    assert told == [4, 5]
    assert first["t"].samples == 3
    fresh = Calibration(as_feeds(feeds(5))).run(network, ["t"])["t"]
    assert second["t"].samples == 5
    np.testing.assert_array_equal(second["t"].counts, fresh.counts)
    assert (second["t"].low, second["t"].high) == (fresh.low, fresh.high)


def test_an_interrupted_run_is_resumed(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SAVE_EVERY", 2)
    cache = tmp_path / "cache.npz"

    def stop(done: int, lot: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Calibration(as_feeds(feeds(6)), cache=cache, progress=stop).run(network, ["t"])
    told = list[int]()
    seen = Calibration(
        as_feeds(feeds(6)), cache=cache, progress=lambda done, lot: told.append(done)
    ).run(network, ["t"])
    assert told == [3, 4, 5, 6]
    fresh = Calibration(as_feeds(feeds(6))).run(network, ["t"])
    np.testing.assert_array_equal(seen["t"].counts, fresh["t"].counts)


def test_a_cache_of_other_feeds_is_refused(network: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.npz"
    Calibration(as_feeds(feeds(4)), cache=cache).run(network, ["t"])
    with pytest.raises(UsageError, match="other feeds"):
        Calibration(as_feeds(feeds(4, seed=1)), cache=cache).run(network, ["t"])
    with pytest.raises(UsageError, match="has seen 4 samples, and there are 2"):
        Calibration(as_feeds(feeds(2)), cache=cache).run(network, ["t"])


def test_a_cache_of_another_model_is_not_used(network: Path, tmp_path: Path) -> None:
    cache, told = tmp_path / "cache.npz", list[int]()
    Calibration(as_feeds(feeds(2)), cache=cache).run(network, ["t"])
    other = tmp_path / "other.onnx"
    changed = type(NETWORK)()
    changed.CopyFrom(NETWORK)
    changed.graph.node[-2].op_type = "Neg"
    other.write_bytes(changed.SerializeToString())
    Calibration(
        as_feeds(feeds(2)), cache=cache, progress=lambda done, lot: told.append(done)
    ).run(other, ["t"])
    assert told == [1, 2]


def test_a_broken_cache_is_named(network: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.npz"
    cache.write_bytes(json.dumps({}).encode())
    with pytest.raises(UsageError, match=r"cannot read the calibration cache .*cache"):
        Calibration(as_feeds(feeds(2)), cache=cache).run(network, ["t"])


def test_no_feeds_at_all_are_an_error(network: Path) -> None:
    with pytest.raises(UsageError, match="holds no feeds"):
        Calibration(as_feeds([])).run(network, ["t"])
