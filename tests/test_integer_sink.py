"""Sums of products of codes, written anew with fewer of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from onnxopt.channels.rules.integer_sink import solve


def assert_solves(sums: np.ndarray, factors: Sequence[int], low: int, high: int) -> None:
    found = solve(sums, factors, low, high)
    assert found is not None
    assert found.shape == (len(factors), *sums.shape)
    assert low <= found.min()
    assert found.max() <= high
    np.testing.assert_array_equal(np.tensordot(np.array(factors), found, 1), sums)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("count", [1, 2])
def test_whatever_has_a_solution_of_one_or_two_is_solved(seed: int, count: int) -> None:
    rng = np.random.default_rng([seed, count])
    factors = rng.choice([*range(-128, 0), *range(1, 256)], count, replace=False)
    weights = rng.integers(-127, 128, (count, 4, 3, 3))
    assert_solves(np.tensordot(factors, weights, 1), factors.tolist(), -127, 127)


@pytest.mark.parametrize("seed", range(20))
def test_small_codes_carry_large_sums_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    factors = [17, 15, 13, 11, 10, 7]
    sums = rng.integers(-6000, 6001, (8, 1, 3, 3))
    assert_solves(sums, factors, -127, 127)


def test_what_has_no_solution_is_not_solved() -> None:
    assert solve(np.array([7]), [2], -127, 127) is None
    assert solve(np.array([7]), [4, 2], -127, 127) is None  # a common factor
    assert solve(np.array([4 * 127 + 1]), [4], -127, 127) is None
    assert solve(np.array([100_000]), [3, 2], -127, 127) is None
    assert solve(np.array([3, 100_000]), [3, 2], -127, 127) is None  # one of two


def test_bounds_are_kept_on_either_side() -> None:
    assert_solves(np.array([-128 * 5]), [5], -128, 127)
    assert solve(np.array([128 * 5]), [5], -128, 127) is None
    assert_solves(np.array([0, 255 * 9]), [9], 0, 255)
    assert solve(np.array([-9]), [9], 0, 255) is None
