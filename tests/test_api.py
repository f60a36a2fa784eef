"""The Python functions: names, arguments, what they leave alone, what they give back."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import ModelProto, helper, numpy_helper

import onnxopt

VERBS = (
    *("optimize", "simplify", "shrink", "quantize", "prune", "distill"),
    *("validate", "inspect", "diff", "bench", "bisect"),
)
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n,3] x) => (float[n,3] y) <float[3] w = {1.5, -2, 0.25}> {
    i = Identity(x)
    m = Mul(i, w)
    y = Relu(m)
}"""


@pytest.fixture
def model() -> ModelProto:
    return onnx.parser.parse_model(TEXT)


def wrong(model: ModelProto) -> ModelProto:
    other = ModelProto()
    other.CopyFrom(model)
    other.graph.node[1].op_type = "Add"
    return other


@pytest.mark.parametrize("verb", VERBS)
def test_no_module_bears_the_name_of_a_verb(verb: str) -> None:
    """Importing it would put the module where the function was."""
    package = Path(onnxopt.__file__).parent
    assert not (package / f"{verb}.py").exists()
    assert not (package / verb).exists()


def test_functions_stay_functions_after_use(model: ModelProto) -> None:
    for _ in range(2):
        assert onnxopt.optimize(model).report.validation is not None
        assert onnxopt.simplify(model).report.recipe == "simplify"
        assert onnxopt.validate(model, model).status == "passed"
        assert onnxopt.inspect(model).nodes == 3


@pytest.mark.parametrize("name", ["valdiate", "min_snqr", "provider"])
def test_an_unknown_argument_is_an_error(model: ModelProto, name: str) -> None:
    options: Any = {name: 1}
    with pytest.raises(TypeError, match=name):
        onnxopt.optimize(model, **options)
    with pytest.raises(TypeError, match=name):
        onnxopt.validate(model, model, **options)


def test_what_the_caller_passed_in_stays_as_it_is(model: ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    result = onnxopt.optimize(model)
    assert model.SerializeToString(deterministic=True) == before
    assert [node.op_type for node in result.model.graph.node] == ["Mul", "Relu"]
    model.graph.node[2].op_type = "Abs"  # nor does the result follow the caller's model
    assert [node.op_type for node in result.model.graph.node] == ["Mul", "Relu"]


def test_a_graph_comes_back_as_a_graph(model: ModelProto) -> None:
    graph = gs.import_onnx(model)
    result = onnxopt.optimize(graph)
    assert isinstance(result.model, gs.Graph)
    assert [node.op for node in result.model.nodes] == ["Mul", "Relu"]
    assert [node.op for node in graph.nodes] == ["Identity", "Mul", "Relu"]


def test_transforms_do_not_print(
    model: ModelProto, capfd: pytest.CaptureFixture[str]
) -> None:
    onnxopt.optimize(model)
    assert capfd.readouterr() == ("", "")


def test_a_wrong_candidate_is_told(model: ModelProto) -> None:
    assert onnxopt.validate(model, wrong(model)).status == "failed"


def test_what_becomes_of_a_failed_result(model: ModelProto, tmp_path: Path) -> None:
    """A metric that must rise, and cannot: no edit is to blame."""
    script = tmp_path / "metric.py"
    script.write_text("def same(run):\n    return 1.0\n")
    options: Any = {"metric": f"{script}:same", "max_drop": -1.0}
    failed = onnxopt.optimize(model, on_failure="return", **options)
    assert failed.report.validation is not None
    assert failed.report.validation.status == "failed"
    choices: tuple[Any, ...] = ("raise", "rollback")
    for on_failure in choices:
        with pytest.raises(onnxopt.ValidationError) as caught:
            onnxopt.optimize(model, on_failure=on_failure, **options)
        assert caught.value.report is not None


def test_data_in_memory(model: ModelProto) -> None:
    feeds = [{"x": np.ones((2, 3), np.float32)}, {"x": np.zeros((1, 3), np.float32)}]
    result = onnxopt.optimize(model, data=feeds)
    assert result.report.validation is not None
    assert result.report.validation.feeds == 2
    with pytest.raises(onnxopt.UsageError, match="'x'"):
        onnxopt.optimize(model, data=[{"x": np.ones((2, 3), np.float64)}])


def test_saved_and_loaded(model: ModelProto, tmp_path: Path) -> None:
    result = onnxopt.optimize(model)
    result.save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == result.model


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_that_becomes_a_constant_is_no_difference(dtype: type) -> None:
    """ONNX Runtime packs constant weights, and rounds float16 by their neighbours."""
    random = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = numpy_helper.from_array(random.standard_normal((48, 64)).astype(dtype), "W")
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["W"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", 64])],
        [helper.make_tensor_value_info("y", kind, ["n", 48])],
        [weight],
    )
    imports = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    result = onnxopt.optimize(model)
    assert [node.op_type for node in result.model.graph.node] == ["MatMul"]
    assert result.report.validation is not None
    assert result.report.validation.status == "passed"


def test_a_model_is_not_built_from_data_that_changed(
    model: ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "in.onnx"
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight), weight.name))
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="in.data",
        size_threshold=0,
    )
    result = onnxopt.optimize(path)
    (tmp_path / "in.data").write_bytes(bytes((tmp_path / "in.data").stat().st_size))
    with pytest.raises(onnxopt.UsageError, match="changed"):
        _ = result.model


def test_a_norm_is_not_folded_below_the_precision_of_its_type() -> None:
    """In float16 these products would be subnormal numbers: 20 % off."""
    random = np.random.default_rng(0)
    weight = (random.standard_normal((4, 3, 1, 1)) * 0.02).astype(np.float16)
    columns = {"gamma": 0.001, "beta": 0.5, "mean": 0.1, "variance": 6e4}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "W"], ["c"]),
            helper.make_node("BatchNormalization", ["c", *columns], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", 10, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", 10, [1, 4, 4, 4])],
        [
            numpy_helper.from_array(weight, "W"),
            *(
                numpy_helper.from_array(np.full(4, value, np.float16), name)
                for name, value in columns.items()
            ),
        ],
    )
    imports = [helper.make_opsetid("", 14)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    result = onnxopt.optimize(model, validate=False)
    assert len(result.model.graph.node) == 2
    reasons = [skip.reason for entry in result.report.passes for skip in entry.skipped]
    assert any("precision" in reason for reason in reasons)


def changed(model: ModelProto, name: str) -> ModelProto:
    other = ModelProto()
    other.CopyFrom(model)
    graph = other.graph
    match name:
        case "order of outputs":
            graph.output.reverse()
        case "order of inputs":
            graph.input.reverse()
        case "another output":
            graph.output.append(helper.make_tensor_value_info("m", 1, None))
        case "type":
            graph.output[0].type.tensor_type.elem_type = 11
        case "rank":
            graph.input[0].type.tensor_type.shape.dim.add(dim_value=1)
        case "default":
            del graph.input[-1]
    return other


@pytest.mark.parametrize(
    "change",
    ["order of outputs", "order of inputs", "another output", "type", "rank", "default"],
)
def test_the_interface_is_part_of_the_verdict(change: str) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n] a, float[n] b, float[1] c) => (float[n] y, float[n] z)
        <float[1] c = {2}> { m = Mul(a, c) y = Add(m, b) z = Sub(m, b) }"""
    )
    other = changed(model, change)
    assert onnxopt.validate(model, model).status == "passed"
    verdict = onnxopt.validate(model, other)
    assert verdict.status == "failed"
    assert verdict.reason


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_digests_of_what_nobody_judged_are_those_of_the_files(
    model: ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    before = sha256(path)
    result = onnxopt.simplify(path, validate=False)
    result.save(path)  # over the input, which is still open
    assert result.report.source.sha256.model == before
    assert result.report.output is not None
    assert result.report.output.sha256.model == sha256(path) != before


def test_external_data_is_in_the_digests(model: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    weight = numpy_helper.from_array(np.arange(3, dtype=np.float32), "w")
    model.graph.initializer[0].CopyFrom(weight)
    options: Any = {"all_tensors_to_one_file": True, "location": "w", "size_threshold": 0}
    onnx.save_model(model, path, save_as_external_data=True, **options)
    lazy = onnxopt.simplify(path, validate=False).report
    eager = onnxopt.simplify(path).report
    assert lazy.source.sha256.data == sha256(tmp_path / "w")
    assert (lazy.source, lazy.output) == (eager.source, eager.output)


def test_no_digest_of_a_file_that_has_changed(model: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    result = onnxopt.simplify(path, validate=False)
    os.truncate(path, 10)
    with pytest.raises(onnxopt.UsageError, match="changed"):
        _ = result.report
