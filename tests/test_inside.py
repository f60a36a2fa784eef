"""Inner values judged by themselves: what outputs hide, and what is no error."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from onnxopt.data import generate_feeds, input_specs
from onnxopt.report import Validation
from onnxopt.validation.inside import GAIN, amplified
from onnxopt.validation.judge import Budget, judge
from onnxopt.validation.segments import common_values, made_differently
from onnxopt.validation.taps import TapModel, write_part


def parsed(body: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{body}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def validated(
    folder: Path, one: onnx.ModelProto, two: onnx.ModelProto, budget: Budget | None = None
) -> Validation:
    paths = folder / "one.onnx", folder / "two.onnx"
    for model, path in zip((one, two), paths, strict=True):
        onnx.save(model, path)
    feeds = generate_feeds(input_specs(one), model=one)
    return judge(*paths, feeds=feeds, budget=budget)


def told(verdict: Validation) -> str:
    return " ".join(note for note in verdict.notes if "inner values" in note)


def chaotic(factor: str = "r") -> onnx.ModelProto:
    """A long logistic map: rounding grows to a part in a hundred of the output."""
    steps = "\n".join(
        f"m{i} = Mul (z{i}, r) \n o{i} = Sub (one, z{i}) \n z{i + 1} = Mul (m{i}, o{i})"
        for i in range(18)
    )
    last = steps.replace("m17 = Mul (z17, r)", f"m17 = Mul (z17, {factor})")
    return parsed(
        f"""g (float[N, 8] x) => (float[N, 8] y)
          <float r = {{3.9}}, float near = {{3.90004}}, float one = {{1}}> {{
          z0 = Sigmoid (x)
          {last}
          y = Identity (z18)
        }}"""
    )


def test_an_error_that_drowns_in_rounding_is_found_where_it_is(tmp_path: Path) -> None:
    verdict = validated(tmp_path, chaotic(), chaotic("near"))
    assert verdict.status == "failed"
    assert verdict.checks[0].status == "passed", "the outputs alone tell nothing"
    inner = next(c for c in verdict.checks if c.provider == "cpu, inner values")
    assert "'m17'" in (inner.reason or "")
    assert inner.outputs[0].name == "m17"
    assert inner.outputs[0].max_rel.worst == pytest.approx(1e-5, rel=0.1)


def test_equal_models_have_no_value_to_compare(tmp_path: Path) -> None:
    verdict = validated(tmp_path, chaotic(), chaotic())
    assert verdict.status == "passed"
    assert told(verdict).endswith(": 0")


def test_a_budget_replaces_it(tmp_path: Path) -> None:
    verdict = validated(tmp_path, chaotic(), chaotic("near"), Budget(rtol=0.5, atol=0.5))
    assert verdict.status == "passed"
    assert told(verdict) == ""


def layers(scale: float = 1.0, order: list[int] | None = None) -> onnx.ModelProto:
    """Two products with a Relu between; the second undoes what the first is scaled by."""
    random = np.random.default_rng(0)
    first = random.normal(size=(8, 16)).astype(np.float32)
    second = random.normal(size=(16, 4)).astype(np.float32)
    order = order or list(range(16))
    return parsed(
        """g (float[N, 8] x) => (float[N, 4] y) {
          a = MatMul (x, first)
          b = Relu (a)
          c = MatMul (b, second)
          d = Add (c, shift)
          y = Softmax <axis = -1> (d)
        }""",
        first=first[:, order] * np.float32(scale),
        second=second[order] / np.float32(scale),
        shift=np.zeros(1, np.float32),
    )


@pytest.mark.parametrize(
    "other",
    [layers(3.0), layers(0.7), layers(order=[*range(1, 16), 0]), layers(4.0)],
    ids=["times-3", "times-0.7", "permuted", "times-4"],
)
def test_names_that_mean_another_thing_are_no_errors(
    tmp_path: Path, other: onnx.ModelProto
) -> None:
    verdict = validated(tmp_path, layers(), other)
    assert verdict.status == "passed", verdict.reason


def test_an_error_behind_such_a_name_is_still_one(tmp_path: Path) -> None:
    """Of the permuted channels the last two are not put back."""
    wrong = layers(order=[*range(1, 16), 0])
    tensor = next(t for t in wrong.graph.initializer if t.name == "second")
    array = numpy_helper.to_array(tensor).copy()
    array[[14, 15]] = array[[15, 14]]
    tensor.CopyFrom(numpy_helper.from_array(array, "second"))
    assert validated(tmp_path, layers(), wrong).status == "failed"


def test_what_no_output_depends_on_is_no_error(tmp_path: Path) -> None:
    """A Softmax does not see a shift of all its scores."""
    shifted = layers()
    tensor = next(t for t in shifted.graph.initializer if t.name == "shift")
    tensor.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "shift"))
    verdict = validated(tmp_path, layers(), shifted)
    assert verdict.status == "passed", verdict.reason
    assert told(verdict).endswith(": 1")


def quantized(rounding: str = "Round", shift: float = 0.0) -> onnx.ModelProto:
    """Codes made by hand, then layers of codes that flip."""
    random = np.random.default_rng(1)
    steps, value = [], "s0"
    for i in range(6):
        steps.append(
            f"q{i} = QuantizeLinear ({value}, scale, zero) \n"
            f"f{i} = DequantizeLinear (q{i}, scale, zero) \n"
            f"c{i} = MatMul (f{i}, w{i}) \n s{i + 1} = Tanh (c{i})"
        )
        value = f"s{i + 1}"
    weights = {
        f"w{i}": (random.normal(size=(32, 32)) / 3).astype(np.float32) for i in range(6)
    }
    body = "\n".join(steps)
    return parsed(
        f"""g (float[N, 32] x) => (float[N, 32] y)
          <float scale = {{0.01}}, int8 zero = {{0}}> {{
          t = Tanh (x)
          u = Div (t, scale)
          v = {rounding} (u)
          s0 = Mul (v, scale)
          {body}
          y = Identity ({value})
        }}""",
        **weights,
    )


def test_another_rounding_of_codes_is_found(tmp_path: Path) -> None:
    """Its outputs differ by less than codes that flip by chance."""
    verdict = validated(tmp_path, quantized(), quantized("Floor"))
    assert verdict.status == "failed"
    assert validated(tmp_path, quantized(), quantized()).status == "passed"


def test_codes_made_in_another_way_are_no_errors(tmp_path: Path) -> None:
    other = quantized()
    node = next(n for n in other.graph.node if n.output[0] == "u")
    node.op_type = "Mul"
    node.input[1] = "inverse"
    inverse = np.array(1 / np.float32(0.01), np.float32)
    other.graph.initializer.append(numpy_helper.from_array(inverse, "inverse"))
    verdict = validated(tmp_path, quantized(), other)
    assert verdict.status == "passed", verdict.reason


def test_values_of_other_shapes_are_left_out(tmp_path: Path) -> None:
    """A channel of zeros that went: nothing inside can be compared, the outputs can."""
    whole = layers()
    for tensor in whole.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == "first":
            array[:, 5] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    less = copy.deepcopy(whole)
    for tensor in less.graph.initializer:
        if tensor.name in ("first", "second"):
            axis = 1 if tensor.name == "first" else 0
            array = np.delete(numpy_helper.to_array(tensor), 5, axis)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    verdict = validated(tmp_path, whole, less)
    assert verdict.status == "passed", verdict.reason


# --- segments ---------------------------------------------------------------------------


def differing(tmp_path: Path, one: onnx.ModelProto, two: onnx.ModelProto) -> list[str]:
    paths = tmp_path / "one.onnx", tmp_path / "two.onnx"
    for model, path in zip((one, two), paths, strict=True):
        onnx.save(model, path)
    left, right = map(TapModel, paths)
    try:
        return made_differently(left, right, common_values(left, right))
    finally:
        left.close()
        right.close()


def with_nodes(edit: str, other: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    text = """g (float[N, 2] x, bool f) => (float[N, 2] y) <float[2] w = {{1, 2}}> {{
      a = {0}
      b = Add (a, w)
      y = If (f) <then_branch = t () => (float[N, 2] p) {{ p = {1} }},
                  else_branch = e () => (float[N, 2] q) {{ q = Neg (b) }}>
    }}"""
    return parsed(text.format(edit, "Relu (b)")), parsed(text.format(edit, other))


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (*with_nodes("Mul (x, w)", "Relu (b)"), []),
        (*with_nodes("Mul (x, w)", "Abs (b)"), ["y"]),
        (with_nodes("Mul (x, w)", "Relu (b)")[0], with_nodes("Mul (w, x)", "Relu (b)")[0],
         ["a"]),
        (with_nodes("Elu <alpha = 1.0> (x)", "Relu (b)")[0],
         with_nodes("Elu <alpha = 2.0> (x)", "Relu (b)")[0], ["a"]),
    ],
    ids=["equal", "in-a-branch", "inputs-swapped", "attribute"],
)  # fmt: skip
def test_segments_that_differ(
    tmp_path: Path, one: onnx.ModelProto, two: onnx.ModelProto, expected: list[str]
) -> None:
    assert differing(tmp_path, one, two) == expected


def test_constants_are_equal_by_value_wherever_they_lie(tmp_path: Path) -> None:
    one, _ = with_nodes("Mul (x, w)", "Relu (b)")
    two = copy.deepcopy(one)
    tensor = two.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    del two.graph.initializer[:]
    node = onnx.helper.make_node(
        "Constant", [], ["w"], value=numpy_helper.from_array(array)
    )
    two.graph.node.insert(0, node)
    assert differing(tmp_path, one, two) == []
    array[1] += 1
    node.attribute[0].t.CopyFrom(numpy_helper.from_array(array))
    two.graph.node[0].CopyFrom(node)
    assert differing(tmp_path, one, two) == ["a", "b"]


def test_a_part_makes_its_end_from_what_is_given(tmp_path: Path) -> None:
    onnx.save(layers(), tmp_path / "m.onnx")
    target = tmp_path / "part.onnx"
    given = {"b": onnx.TensorProto.FLOAT}
    write_part(tmp_path / "m.onnx", {"c": "c"}, given, target, {"b": (3, 16)})
    part = onnx.load(target)
    assert [n.op_type for n in part.graph.node] == ["MatMul"]
    assert [v.name for v in part.graph.input] == ["b"]
    assert [t.name for t in part.graph.initializer] == ["second"]
    onnx.shape_inference.infer_shapes(part, check_type=True, strict_mode=True)
    session = ort.InferenceSession(target)
    b = np.ones((3, 16), np.float32)
    weight = numpy_helper.to_array(part.graph.initializer[0])
    assert np.allclose(session.run(None, {"b": b})[0], b @ weight, atol=1e-5)


@pytest.mark.parametrize(
    ("right", "own", "expected"),
    [
        (np.float32([1, 2]), np.float32([1, 2.5]), np.float32([1, 4])),
        (np.int8([1, 100]), np.int8([1, 101]), np.int8([1, 127])),
        (np.float32([0, 1000]), np.float32([0, 1001]), np.float32([0, 1000 + GAIN])),
        (np.array([True, False]), np.array([True, True]), np.array([True, True])),
        (np.float32([1, np.inf]), np.float32([2, 3]), np.float32([2, 3])),
        (np.int64([0, 5]), np.int64([0, 4]), np.int64([0, 0])),
    ],
)
def test_errors_are_enlarged_within_their_type(
    right: np.ndarray, own: np.ndarray, expected: np.ndarray
) -> None:
    found = amplified(right, own)
    assert found.dtype == right.dtype
    assert np.array_equal(found, expected)


def called(epsilon: float, weight: float = 1.0) -> onnx.ModelProto:
    """A function that calls another, from inside a branch."""
    model = parsed(
        """g (float[N, 4] x, bool f) => (float[N, 4] y) {
          y = If (f) <then_branch = t () => (float[N, 4] p) { p = Abs (x) },
                      else_branch = e () => (float[N, 4] q) { q = Neg (x) }>
        }"""
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)]
    scale = numpy_helper.from_array(np.full(4, weight, np.float32))
    nodes = [
        onnx.helper.make_node("Constant", [], ["w"], value=scale),
        onnx.helper.make_node("LayerNormalization", ["a", "w"], ["b"], epsilon=epsilon),
    ]
    inner = onnx.helper.make_function("own", "Norm", ["a"], ["b"], nodes, opsets[:1])
    call = onnx.helper.make_node("Norm", ["a"], ["b"], domain="own")
    outer = onnx.helper.make_function("own", "Outer", ["a"], ["b"], [call], opsets)
    model.functions.extend([inner, outer])
    model.opset_import.append(opsets[1])
    branch = model.graph.node[0].attribute[1].g.node[0]
    branch.op_type, branch.domain = "Outer", "own"
    return model


def test_functions_of_functions_are_looked_at(tmp_path: Path) -> None:
    assert differing(tmp_path, called(1e-5), called(1e-5)) == []
    assert differing(tmp_path, called(1e-5), called(1e-4)) == ["y"]
    assert differing(tmp_path, called(1e-5), called(1e-5, 2.0)) == ["y"]


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    other = copy.deepcopy(model)
    for node in other.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return other


@pytest.mark.parametrize(
    "names",
    [
        {"a": "b", "b": "c", "c": "d", "d": "e"},
        {"a": "c", "c": "a"},
        {"a": "b", "b": "a"},
        {"b": "d", "c": "b", "d": "c"},
    ],
    ids=["shifted", "swapped", "idempotent", "turned"],
)
def test_names_given_anew_are_no_errors(tmp_path: Path, names: dict[str, str]) -> None:
    verdict = validated(tmp_path, layers(), renamed(layers(), names))
    assert verdict.status == "passed", verdict.reason


def test_a_name_that_nothing_reads_is_no_error(tmp_path: Path) -> None:
    other = renamed(layers(), {"a": "new"})
    other.graph.node.append(onnx.helper.make_node("Neg", ["x"], ["a"]))
    verdict = validated(tmp_path, layers(), other)
    assert verdict.status == "passed", verdict.reason
