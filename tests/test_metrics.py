"""Metrics of one output against values worked out by hand or by another formula."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxopt.cli import describe
from onnxopt.cli.terminal import Table, plain
from onnxopt.report import Check, Counts, OutputCheck, as_json
from onnxopt.validation import metrics
from onnxopt.validation.metrics import Allowance, Difference, compare
from onnxopt.validation.rules import Outcome, Sample
from onnxopt.validation.verdict import output_check

NAN, INF = math.nan, math.inf


def one(a: Any, b: Any, dtype: Any = np.float32, allowance: Any = None) -> Difference:
    (found,) = compare(np.array(a, dtype), np.array(b, dtype), allowance)
    return found


def output(*pairs: tuple[Any, Any], kind: str = "data") -> OutputCheck:
    """The report on one output, from its value in both models on each feed."""
    samples = [
        Sample(feed, leaf, kind, difference)
        for feed, (a, b) in enumerate(pairs)
        for leaf, difference in enumerate(compare(a, b))
    ]
    return output_check("y", samples, Outcome(None, 1e-5), random=False)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def f32(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


# --- distances -------------------------------------------------------------------------


def test_distances_by_hand() -> None:
    found = one([3, -4, 0, 1], [3, -4.5, 0.25, 1])
    assert (found.max_abs, found.scale, found.max_rel) == (0.5, 4, 0.125)
    assert (found.signal, found.noise) == (26, 0.3125)
    assert found.sqnr_db == pytest.approx(10 * math.log10(26 / 0.3125))
    length = math.sqrt(26) * math.sqrt(9 + 20.25 + 0.0625 + 1)
    assert found.cosine == pytest.approx((9 + 18 + 0 + 1) / length)
    assert (found.count, found.flipped) == (4, 2)


def test_99_percent_of_the_elements_are_within_p99() -> None:
    error = np.zeros(200, np.float32)
    error[:3] = 8, 4, 2
    assert one(np.zeros(200), error).p99_abs == 4  # 198 of 200 are less
    assert one(np.zeros(200), error[::-1]).p99_abs == 4
    assert one(np.zeros(300), [*error, *[0] * 100]).p99_abs == 2


def test_excess_over_an_allowance() -> None:
    found = one([10, 1], [10.5, 1.5], allowance=Allowance(rtol=0.125, atol=0.125))
    assert found.beyond == pytest.approx(0.5 - (0.125 + 0.125))


def test_nothing_differs() -> None:
    found = one([1, 2], [1, 2])
    assert (found.max_abs, found.max_rel, found.sqnr_db, found.cosine) == (0, 0, None, 1)


def test_a_reference_of_zeros() -> None:
    found = one([0, 0], [0, 1])
    assert (found.max_rel, found.sqnr_db, found.cosine) == (INF, -INF, None)
    made = output((f32(0, 0), f32(0, 1)))
    assert (made.max_rel.worst, made.sqnr_db.worst) == (None, None)


def test_sums_are_in_float64_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    a = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    b = a * np.float32(1.001)
    x, y = a.astype(np.float64), b.astype(np.float64)
    found = one(a, b)
    assert found.signal == pytest.approx(x @ x, rel=1e-14)
    assert found.noise == pytest.approx((x - y) @ (x - y), rel=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats(dtype: Any) -> None:
    found = one([[1, 2, NAN]], [[1, 2.5, INF]], dtype)
    assert (found.dtype, found.exact) == (np.dtype(dtype).name, False)
    assert (found.shape, found.max_abs, found.max_rel) == ((1, 3), 0.5, 0.25)
    assert (found.nans, found.infs) == ((1, 0), (0, 1))


def test_complex_numbers_are_two_floats() -> None:
    found = one([[3 + 4j, 1]], [[3 + 2j, 1]], np.complex64)
    assert (found.shape, found.max_abs, found.signal) == ((1, 2), 2, 26)
    assert (found.top1, found.top5, found.kl) == (None, None, None)


# --- exact types -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, ml_dtypes.int4])
def test_integers_are_counted(dtype: Any) -> None:
    found = one([[1, 2, 3]], [[1, 5, 4]], dtype)
    assert (found.exact, found.flipped, found.max_abs) == (True, 2, 3)
    assert (found.shape, found.top1, found.kl) == ((1, 3), None, None)


@pytest.mark.parametrize(
    ("a", "b", "flipped"),
    [([True, False], [True, True], 1), (["a", "b"], ["a", "b"], 0), (["a"], ["b"], 1)],
)
def test_bools_and_strings(a: list[Any], b: list[Any], flipped: int) -> None:
    (found,) = compare(np.array(a), np.array(b))
    assert (found.exact, found.flipped, found.count) == (True, flipped, len(a))
    assert found.dtype == ("string" if isinstance(a[0], str) else "bool")


def test_no_ratios_of_exact_types_in_the_report() -> None:
    made = output((np.array([1, 2]), np.array([1, 4])))
    assert made.max_abs.worst == 2
    assert (made.max_rel.worst, made.cosine.worst, made.sqnr_db.worst) == (None,) * 3
    assert made.p99_abs.worst is None


# --- shape, NaN and Inf ----------------------------------------------------------------


def test_nan_and_inf_are_counted_on_either_side() -> None:
    found = one([NAN, NAN, INF, 1, 2], [NAN, 1, -INF, INF, 2])
    assert (found.nans, found.infs) == ((2, 1), (1, 2))
    assert (found.not_finite, found.lost_finite, found.moved_not_finite) == (3, 1, 3)
    assert (found.max_abs, found.signal) == (0, 4)


def test_counts_are_added_up_and_shapes_listed_once() -> None:
    nan, inf = f32([NAN, 1]), f32([1, INF])
    made = output((nan, inf), (nan, nan), (f32(1), f32(1)))
    assert made.not_finite.reference == Counts(nan=2, inf=0)
    assert made.not_finite.candidate == Counts(nan=1, inf=1)
    assert made.shapes == [[1, 2], [1]]


def test_a_long_list_of_shapes_is_cut() -> None:
    zeros = [np.zeros(size, np.float32) for size in range(40)]
    assert output(*((zero, zero) for zero in zeros)).shapes == [[n] for n in range(16)]


def test_the_shape_of_an_output_that_is_off() -> None:
    made = output((f32(1, 2), f32([1, 2])), (f32(1, 2), np.array([1, 2])))
    assert (made.shapes, made.dtype, made.max_abs.worst) == ([[2]], "float32", None)
    first, second = one([1], [[1]]), compare(f32(1), np.array([1]))[0]
    assert (first.shape, second.shape) == ((1,), (1,))
    assert first.problem == "has shape [1, 1], not [1]"
    assert second.problem == "has dtype int64, not float32"


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 7)])
def test_empty_arrays(shape: tuple[int, ...]) -> None:
    found = one(np.zeros(shape), np.zeros(shape))
    assert (found.shape, found.count, found.max_abs, found.p99_abs) == (shape, 0, 0, 0)
    assert (found.top1, found.top5, found.kl, found.cosine) == (None,) * 4


def test_a_scalar() -> None:
    found = one(1.0, 1.5)
    assert (found.shape, found.max_abs) == ((), 0.5)
    assert (found.top1, found.top5, found.kl) == (None, None, None)


# --- agreement -------------------------------------------------------------------------


def top5_by_sorting(a: np.ndarray, b: np.ndarray) -> float:
    """NaN first, then by value, then by index."""

    def five(row: np.ndarray) -> set[int]:
        def rank(i: int) -> tuple[bool, float, int]:
            nan = math.isnan(row[i])
            return not nan, 0.0 if nan else -float(row[i]), i

        return set(sorted(range(len(row)), key=rank)[:5])

    rows = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    return float(np.mean([five(x) == five(y) for x, y in rows]))


def test_agreement_by_hand() -> None:
    row = [9, 8, 7, 6, 5, 4, 3]
    swapped = [8, 9, 7, 6, 5, 4, 3]  # the first of all is another, the five are the same
    moved = [9, 8, 7, 6, 4, 5, 3]  # the fifth is another
    found = one([row, row, row, row], [row, swapped, moved, moved])
    assert (found.top1, found.top5) == (0.75, 0.5)
    assert one([[row]], [[moved]]).top5 == 0


def test_of_equal_elements_the_first_are_taken() -> None:
    a = [1, 1, 1, 1, 1, 1, 1]
    assert one([a], [[2, 1, 1, 1, 1, 1, 1]]).top5 == 1
    assert one([a], [[1, 1, 1, 1, 2, 1, 1]]).top5 == 1
    assert one([a], [[1, 1, 1, 1, 1, 2, 1]]).top5 == 0
    assert one([a], [[1, 1, 1, 1, 1, 2, 1]]).top1 == 0


def test_nan_counts_as_the_largest() -> None:
    row = [6, 5, 4, 3, 2, 1, 0]
    assert one([row], [[6, 5, 4, 3, NAN, 1, 0]]).top5 == 1
    assert one([row], [[6, 5, 4, 3, 2, NAN, 0]]).top5 == 0
    assert one([row], [[INF, 5, 4, 3, 2, 1, NAN]]).top5 == 0
    assert one([[NAN] * 7], [[NAN] * 7]).top5 == 1
    assert one([[NAN] * 7], [[0] + [NAN] * 6]).top5 == 0


@pytest.mark.parametrize("block", [1, 20, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_top5_is_that_of_sorting(
    block: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", block)
    rng = np.random.default_rng(block)
    for values in (4, 12, 1000):
        a = rng.integers(0, values, (6, 40, 9)).astype(np.float32)
        b = np.where(rng.random(a.shape) < 0.1, rng.integers(0, values, a.shape), a)
        a[rng.random(a.shape) < 0.05] = NAN
        b[rng.random(b.shape) < 0.05] = -INF
        a, b = a.astype(dtype), b.astype(dtype)
        assert one(a, b, dtype).top5 == pytest.approx(top5_by_sorting(a, b))


@pytest.mark.parametrize(
    ("shape", "top1", "top5"),
    [
        ((3, 6), 1, 1),
        ((2, 3, 6), 1, 1),
        ((3, 5), 1, None),
        ((3, 1), None, None),
        ((8,), None, None),
        ((1, 2, 3, 8), None, None),
    ],
)
def test_where_the_last_axis_may_be_classes(
    shape: tuple[int, ...], top1: float | None, top5: float | None
) -> None:
    a = np.random.default_rng(0).standard_normal(shape)
    found = one(a, a + 1e-9)
    assert (found.top1, found.top5) == (top1, top5)


# --- divergence ------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    found = one([[0.5, 0.5], [0.25, 0.75]], [[0.25, 0.75], [0.25, 0.75]])
    first = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert found.kl == pytest.approx(first / 2)
    assert one([0.5, 0.5], [0.25, 0.75]).kl == pytest.approx(first)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_divergence_is_cross_entropy_less_entropy(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", block)
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((2, 3, 4, 21))
    p, q = softmax(logits), softmax(logits + rng.standard_normal(logits.shape))
    entropy = -(p * np.log2(p)).sum(axis=-1)
    cross = -(p * np.log2(q)).sum(axis=-1)
    expected = float((cross - entropy).mean()) * math.log(2)
    assert one(p, q, np.float64).kl == pytest.approx(expected, rel=1e-12)
    assert one(p, q, np.float32).kl == pytest.approx(expected, rel=1e-5)
    assert one(p, q, np.float16).kl == pytest.approx(expected, rel=2e-2)


def test_zero_probabilities() -> None:
    assert one([0, 1], [0.5, 0.5]).kl == pytest.approx(math.log(2))
    assert one([0.5, 0.5], [0, 1]).kl == pytest.approx(
        0.5 * math.log(0.5 / 1e-12) + 0.5 * math.log(0.5)
    )
    assert one([0, 1], [1, 0]).kl == pytest.approx(12 * math.log(10))
    assert one([0, 1], [0, 1]).kl == 0


def test_divergence_is_never_negative() -> None:
    found = one([0.5004, 0.5004], [0.4999, 0.4999])
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.kl is not None
    assert found.kl >= 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_divergence_of_short_floats(dtype: Any) -> None:
    found = one([[0.5, 0.5]], [[0.25, 0.75]], dtype)
    assert found.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


@pytest.mark.parametrize(
    "row",
    [
        [0.5, 0.5011],
        [0.5, 0.4989],
        [1.5, -0.5],
        [NAN, 1],
        [NAN, NAN],
        [INF, 0],
        [0, 0],
        [3e38, 3e38],
    ],
)
def test_what_is_no_distribution(row: list[float]) -> None:
    fine = [0.5, 0.5]
    assert one([fine, fine], [fine, fine]).kl == 0
    assert one([fine, row], [fine, fine]).kl is None
    assert one([row, fine], [fine, fine]).kl is None
    assert one([fine, fine], [fine, row]).kl is None


def test_a_sum_within_a_thousandth_is_a_distribution() -> None:
    assert one([0.5, 0.5009], [0.5, 0.4991]).kl is not None


def test_one_entry_is_no_distribution() -> None:
    assert one([[1], [1]], [[1], [1]]).kl is None


# --- sequences, maps and optionals -----------------------------------------------------


def test_sequences_are_compared_item_by_item() -> None:
    made = compare([f32(1), [f32(2, 3)]], [f32(1), [f32(2, 5)]])
    assert [(d.shape, d.max_abs) for d in made] == [((1,), 0), ((2,), 2)]


def test_maps_are_compared_by_key() -> None:
    found = compare([{"b": 1.0, "a": 2.0}, {7: 1.0}], [{"a": 2.0, "b": 3.0}, {7: 1.5}])
    assert [(d.shape, d.max_abs) for d in found] == [((), 0), ((), 2), ((), 0.5)]


def test_optionals() -> None:
    (empty,) = compare(None, None)
    assert (empty.problem, empty.flipped) == (None, 0)
    (other,) = compare(None, f32(1))
    assert other.problem is not None
    assert other.shape is None
    assert [d.max_abs for d in compare([None, f32(1)], [None, f32(2)])] == [0, 1]


@pytest.mark.parametrize(
    ("a", "b"), [([f32(1)], [f32(1), f32(1)]), ({"a": 1.0}, {"b": 1.0}), ([f32(1)], [[]])]
)
def test_another_structure_is_one_problem(a: Any, b: Any) -> None:
    (found,) = compare(a, b)
    assert found.problem is not None
    assert "the reference" in found.problem


def test_every_array_of_a_sequence_counts_in_the_report() -> None:
    half, quarter = f32([0.5, 0.5]), f32([0.25, 0.75])
    made = output(([half, f32(NAN)], [quarter, f32(1)]))
    assert made.shapes == [[1, 2], [1]]
    assert made.kl is not None
    assert made.kl.worst == pytest.approx(0.1438410362)
    assert (made.not_finite.reference, made.not_finite.candidate) == (Counts(1), Counts())


# --- the report ------------------------------------------------------------------------


def test_worst_and_mean_over_feeds() -> None:
    a = f32([9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3])
    b = a.copy()
    b[0, 4:6] = 4, 5
    made = output((a, a), (a, b))
    assert made.top5_agreement is not None
    assert (made.top5_agreement.worst, made.top5_agreement.mean) == (0.5, 0.75)
    assert (made.max_abs.worst, made.max_abs.mean) == (1, 0.5)
    p, q = f32([0.5, 0.5]), f32([0.25, 0.75])
    kl = output((p, p), (p, q)).kl
    assert kl is not None
    assert (kl.worst, kl.mean) == pytest.approx((0.1438410362, 0.0719205181))


def test_hard_cases_stay_out_of_the_numbers() -> None:
    made = output((f32(NAN), f32(1)), kind="nan")
    assert (made.shapes, made.max_abs.worst) == ([], None)
    assert made.not_finite.reference == Counts()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (f32([0, 0]), f32([NAN, INF])),
        (f32([NAN, NAN]), f32([NAN, NAN])),
        (f32([0, 0]), f32([0, 1])),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)),
        (f32(1), np.array([1])),
    ],
)
def test_json_has_null_and_no_nan(a: np.ndarray, b: np.ndarray) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    text = as_json(output((a, b)))
    made = json.loads(text, parse_constant=refuse)
    assert made["kl"] is None
    assert made["top5_agreement"] is None
    assert made["not_finite"]["candidate"].keys() == {"nan", "inf"}


def table(*outputs: OutputCheck) -> list[str]:
    check = Check("cpu", "disable_all", "passed", None, list(outputs))
    (block,) = describe._outputs([check])
    assert isinstance(block, Table)
    return plain(block)


def test_metrics_are_shown_where_they_apply() -> None:
    p, q = f32([0.5, 0.5]), f32([0.25, 0.75])
    header, row = table(output((p, q)))
    assert "top 1" in header
    assert "top 5" not in header
    assert "KL nats" in header
    assert row.split()[-2:] == ["0.00%", "1.44e-01"]
    eight = f32(range(8))
    header, *_ = table(output((eight[None], eight[None])), output((p, q)))
    assert "top 5" in header
    header, row = table(output((f32(1), f32(2))))
    assert header.split() == [
        "provider",
        "level",
        "output",
        "verdict",
        "SQNR",
        "dB",
        "max",
        "abs",
    ]
    assert row.split()[-1] == "1.00e+00"
