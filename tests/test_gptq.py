"""Rounding against the inputs of a layer, and the moments that it needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid
from onnx.helper import make_tensor_value_info as info
from onnx.numpy_helper import from_array

from onnxopt.data.inputs import Feeds
from onnxopt.model import Model
from onnxopt.quantization import gptq, moments
from onnxopt.quantization.calibration import Calibration
from onnxopt.quantization.moments import Moments, layer_moments
from onnxopt.quantization.rounding import rounded_weight
from onnxopt.quantization.weight_scales import symmetric_scales
from tests.support import Array


def correlated(inputs: int, seed: int) -> Array:
    """Inputs of a layer that go together, [positions, inputs]."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((inputs, inputs)) + 2
    return random.standard_normal((500, inputs)) @ mix


def output_error(weight: Array, codes: Array, scales: Array, x: Array) -> float:
    return float((((weight - codes * scales) @ x.T) ** 2).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("groups", [1, 3])
def test_the_error_of_the_output_is_less_than_by_rounding(seed: int, groups: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((groups, 6, 20))
    xs = [correlated(20, seed * 10 + group) for group in range(groups)]
    products = np.stack([x.T @ x for x in xs])
    scales = np.full((groups, 6, 1), 0.2)
    codes = gptq.rounded(weight, products, scales, -127, 127)
    for group, x in enumerate(xs):
        near = np.rint(weight[group] / 0.2)
        made = output_error(weight[group], codes[group], scales[group], x)
        assert made < 0.5 * output_error(weight[group], near, scales[group], x)
        alone = gptq.rounded(
            weight[group : group + 1], products[group : group + 1], scales[:1], -127, 127
        )
        np.testing.assert_array_equal(alone[0], codes[group])


def test_it_is_near_the_best_of_all_codes() -> None:
    random = np.random.default_rng(0)
    for seed in range(5):
        weight, x = random.standard_normal((1, 1, 6)), correlated(6, seed)
        codes = gptq.rounded(weight, (x.T @ x)[None], np.ones((1, 1, 1)), -3, 3)
        floor = np.floor(weight[0, 0])
        options = itertools.product(*[(low - 1, low, low + 1, low + 2) for low in floor])
        errors = [
            output_error(weight[0], np.clip([option], -3, 3), np.ones((1, 1)), x)
            for option in options
        ]
        made = output_error(weight[0], codes[0], np.ones((1, 1)), x)
        nearest = output_error(
            weight[0], np.clip(np.rint(weight[0]), -3, 3), np.ones((1, 1)), x
        )
        assert min(errors) - 1e-9 <= made <= nearest
        assert made <= 0.2 * nearest + 5 * min(errors)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_moments_that_say_nothing_give_the_nearest_codes(value: float) -> None:
    weight = np.random.default_rng(0).standard_normal((2, 3, 5)) * 10
    products = np.full((2, 5, 5), value)
    codes = gptq.rounded(weight, products, np.ones((2, 3, 1)), -7, 7)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight), -7, 7))


def test_codes_stay_within_their_limits() -> None:
    weight = np.random.default_rng(1).standard_normal((1, 4, 8)) * 100
    x = correlated(8, 1)
    codes = gptq.rounded(weight, (x.T @ x)[None], np.ones((1, 4, 1)), -63, 63)
    assert codes.min() == -63
    assert codes.max() == 63


# ---- scales ----


@pytest.mark.parametrize("axis", [0, 1, 3, None])
def test_scales_are_those_of_least_error(axis: int | None) -> None:
    weight = np.random.default_rng(2).standard_t(3, (4, 6, 3, 5)).astype(np.float32)
    found = symmetric_scales(weight, axis, 7, "mse")
    rows = weight.reshape(1, -1)
    if axis is not None:
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    assert found.shape == (() if axis is None else (weight.shape[axis],))
    for row, scale in zip(rows, found.reshape(-1), strict=True):
        tried = np.abs(row).max() / 7 * np.linspace(0.5, 1, 200)
        errors = [
            ((np.clip(np.rint(row / s), -7, 7) * s - row) ** 2).sum()
            for s in (*tried, scale)
        ]
        assert errors[-1] <= min(errors) * 1.03


def test_channels_of_zeros_keep_a_usable_scale() -> None:
    weight = np.zeros((3, 4), np.float32)
    weight[1] = 1e-42
    scales = symmetric_scales(weight, 0, 127)
    assert (scales > 0).all()
    assert scales[0] == 1
    assert (np.rint(weight / scales[:, None]) == 0).all()


def test_the_mean_of_the_error_goes_into_the_shift() -> None:
    random = np.random.default_rng(3)
    weight = random.standard_normal((4, 10)).astype(np.float32)
    x = correlated(10, 3) + 5
    seen = Moments((x.T @ x)[None], x.sum(0)[None], len(x))
    made = rounded_weight(weight, 0, 7, "minmax", seen)
    assert made.shift is not None
    values = made.codes * made.parameters.scale[:, None].astype(np.float64)
    mean = (x @ (weight - values).T).mean(0)
    np.testing.assert_allclose(made.shift, mean, rtol=1e-6, atol=1e-9)


# ---- moments ----

CONVS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    # attributes, weight, input
    "plain": ({}, (5, 3, 3, 3), (2, 3, 9, 8)),
    "padded": ({"pads": [1, 2, 0, 1], "strides": [2, 1]}, (5, 3, 3, 2), (1, 3, 9, 8)),
    "dilated": ({"dilations": [2, 2]}, (4, 2, 3, 3), (1, 2, 9, 8)),
    "grouped": ({"group": 2, "pads": [1, 1, 1, 1]}, (6, 2, 3, 3), (1, 4, 6, 5)),
    "depthwise": ({"group": 4}, (4, 1, 3, 3), (2, 4, 6, 5)),
    "one dim": ({"pads": [1, 1]}, (4, 3, 3), (2, 3, 12)),
    "same": ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (4, 3, 3, 3), (1, 3, 7, 6)),
}


def one_layer(
    op_type: str, weight: Array, shape: tuple[int, ...], attrs: Mapping[str, Any]
) -> ModelProto:
    node = make_node(op_type, ["x", "w"], ["y"], **attrs)
    graph = make_graph(
        [node],
        "g",
        [info("x", 1, [None, *shape[1:]])],
        [info("y", 1, None)],
        [from_array(weight, "w")],
    )
    made: ModelProto = make_model(
        graph, opset_imports=[make_opsetid("", 17)], ir_version=8
    )
    return made


def measured(
    model: ModelProto, shape: tuple[int, ...], folder: Path
) -> tuple[Moments, list[Array]]:
    random = np.random.default_rng(0)
    xs = [(random.standard_normal(shape) + 1).astype(np.float32) for _ in range(3)]
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    feeds = Feeds(lambda: iter([{"x": x} for x in xs]), "test")
    nodes = Model.open(path).main.nodes()
    return layer_moments(path, nodes, Calibration(feeds))["y"], xs


def output_energy(found: Moments, rows: Array) -> Array:
    """The sum of squares of each output, as the moments have it."""
    groups = len(found.products)
    split = rows.reshape(groups, len(rows) // groups, -1).astype(np.float64)
    return np.einsum("goi,gij,goj->go", split, found.products, split).reshape(-1)


@pytest.mark.parametrize("name", CONVS)
def test_moments_of_a_conv_are_those_of_its_patches(name: str, tmp_path: Path) -> None:
    attrs, dims, shape = CONVS[name]
    weight = np.random.default_rng(1).standard_normal(dims).astype(np.float32)
    model = one_layer("Conv", weight, shape, attrs)
    found, xs = measured(model, shape, tmp_path)
    from tests.support import run

    ys = [run(model, {"x": x})[0] for x in xs]
    axes = (0, *range(2, len(shape)))
    energy = sum((y.astype(np.float64) ** 2).sum(axes) for y in ys)
    total = sum(y.astype(np.float64).sum(axes) for y in ys)
    np.testing.assert_allclose(output_energy(found, weight), energy, rtol=1e-4)
    groups = len(found.sums)
    split = weight.reshape(groups, dims[0] // groups, -1)
    sums = np.einsum("goi,gi->go", split, found.sums).reshape(-1)
    np.testing.assert_allclose(sums, total, rtol=1e-3, atol=1e-2)
    assert found.count == sum(y.size // y.shape[1] for y in ys)


@pytest.mark.parametrize(
    ("op_type", "attrs", "dims", "shape"),
    [
        ("MatMul", {}, (4, 6), (2, 5, 4)),
        ("MatMul", {}, (4, 6), (5, 4)),
        ("Gemm", {}, (4, 6), (5, 4)),
        ("Gemm", {"transB": 1}, (6, 4), (5, 4)),
    ],
)
def test_moments_of_a_product_are_those_of_its_rows(
    op_type: str,
    attrs: dict[str, int],
    dims: tuple[int, ...],
    shape: tuple[int, ...],
    tmp_path: Path,
) -> None:
    model = one_layer(op_type, np.ones(dims, np.float32), shape, attrs)
    found, xs = measured(model, shape, tmp_path)
    rows = np.concatenate([x.reshape(-1, 4) for x in xs]).astype(np.float64)
    np.testing.assert_allclose(found.products[0], rows.T @ rows, rtol=1e-4)
    np.testing.assert_allclose(found.sums[0], rows.sum(0), rtol=1e-4)
    assert found.count == len(rows)


def test_of_a_large_value_some_positions_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "MOST_POSITIONS", 16)
    shape = (1, 2, 40, 40)
    model = one_layer("Conv", np.ones((3, 2, 3, 3), np.float32), shape, {})
    found, _ = measured(model, shape, tmp_path)
    assert 3 * 16 <= found.count <= 3 * 32


def test_a_layer_that_is_too_wide_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "MOST_INPUTS", 3)
    model = one_layer("MatMul", np.ones((4, 6), np.float32), (5, 4), {})
    with pytest.raises(KeyError):
        measured(model, (5, 4), tmp_path)
