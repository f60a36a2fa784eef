"""Indices that agree by luck: what they are chosen from tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxopt.data import generate_feeds, input_specs
from onnxopt.report import Validation
from onnxopt.validation.judge import judge
from onnxopt.validation.ordering import is_misordered


def chosen(
    extra: str, last: str = "z", search: str = "ArgMax <axis = 1>"
) -> onnx.ModelProto:
    """The class, where one class is far ahead on every feed."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(8, 6)).astype(np.float32)
    ahead = np.float32([0, 0, 30, 0, 0, 0])
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 8] x) => (int64[N, 1] y) {{
          m = MatMul (x, weight)
          z = Add (m, ahead)
          {extra}
          y = {search} ({last})
        }}"""
    )
    favour = np.float32([0, 0, 0, 2, 0, 0])
    for name, array in {"weight": weight, "ahead": ahead, "favour": favour}.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def validated(folder: Path, one: onnx.ModelProto, two: onnx.ModelProto) -> Validation:
    paths = folder / "one.onnx", folder / "two.onnx"
    for model, path in zip((one, two), paths, strict=True):
        onnx.save(model, path)
    return judge(*paths, feeds=generate_feeds(input_specs(one), model=one))


def test_a_favoured_class_is_found_where_it_never_wins(tmp_path: Path) -> None:
    wrong = chosen("s = Add (z, favour)", "s")
    verdict = validated(tmp_path, chosen(""), wrong)
    assert verdict.checks[0].status == "passed", "the indices agree"
    assert verdict.status == "failed"
    assert "another order" in (verdict.reason or "")


@pytest.mark.parametrize(
    ("extra", "last"),
    [
        ("s = Softmax <axis = 1> (z)", "s"),
        ("s = Relu (z)", "s"),
        ("s = Add (z, z)", "s"),
    ],
)
def test_what_keeps_the_order_may_go_or_come(
    tmp_path: Path, extra: str, last: str
) -> None:
    for pair in (chosen(""), chosen(extra, last)), (chosen(extra, last), chosen("")):
        verdict = validated(tmp_path, *pair)
        assert verdict.status == "passed", verdict.reason


def test_other_searches_are_not_compared(tmp_path: Path) -> None:
    other = chosen("s = Neg (z)", "s", "ArgMin <axis = 1>")
    verdict = validated(tmp_path, chosen(""), other)
    assert verdict.status == "passed", verdict.reason


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], False),
        ([1, 2, 3], [10, 20, 30], False),
        ([1, 2, 3], [1, 3, 2], True),
        ([1, 2, 3], [1, 1, 3], False),
        ([1, 2, 3], [2, 2, 2], False),
        ([1, 1, 3], [2, 1, 3], False),
        ([1, 1.0001, 3], [1.0001, 1, 3], False),
        ([1, 2, 3], [3, 2, 1], True),
        ([5], [6], False),
        ([1, 2, 3, 4], [1, 2, 4, 3.9999], False),
    ],
)
def test_orders(one: list[float], two: list[float], expected: bool) -> None:
    rows = [np.float32([values, values]) for values in (one, two)]
    assert is_misordered(*rows, 1) == expected
    assert is_misordered(*(row.T for row in rows), 0) == expected
