"""The comparison with other tools counts, judges and promises what it says."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, parser

from benchmarks import exports, outcome, rivals, simplify

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, 4] x, bool flag) => (float[N, 4] y) {
  i = Identity(x)
  y = If (flag) <
    then_branch = then_graph () => (float[N, 4] a) { a = Relu(i) },
    else_branch = else_graph () => (float[N, 4] b) { n = Neg(i) b = Relu(n) }
  >
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return _write(parser.parse_model(TEXT), tmp_path / "source.onnx")


def _write(model: ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def _judge(source: Path, model: ModelProto) -> outcome.Outcome:
    target = _write(model, source.with_name("target.onnx"))
    return outcome.of(source, target, outcome.Expected(source))


def test_nodes_are_counted_at_all_depths_and_in_functions() -> None:
    model = parser.parse_model(TEXT)
    assert outcome.count(model) == 5
    node = onnx.helper.make_node("Relu", ["p"], ["q"])
    opset = onnx.helper.make_opsetid("", 17)
    model.functions.append(
        onnx.helper.make_function("local", "f", ["p"], ["q"], [node], [opset])
    )
    assert outcome.count(model) == 6


def test_feeds_differ_in_the_sizes_that_are_free(source: Path) -> None:
    feeds = outcome.Expected(source).feeds
    assert len({feed["x"].shape for feed in feeds}) > 1


def test_the_original_itself_is_eligible(source: Path) -> None:
    assert _judge(source, onnx.load(source)).eligible


def test_other_values_are_wrong(source: Path) -> None:
    model = onnx.load(source)
    model.graph.node[1].attribute[0].g.node[0].op_type = "Sigmoid"
    model.graph.node[1].attribute[1].g.node[1].op_type = "Sigmoid"
    made = _judge(source, model)
    assert made.difference.startswith("y: differs by")
    assert made.standard
    assert not made.eligible


def test_a_result_for_one_size_only_is_wrong(source: Path) -> None:
    model = onnx.load(source)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert "invalid dimensions" in _judge(source, model).difference


def test_a_raised_opset_and_operators_of_ort_are_not_standard(source: Path) -> None:
    model = onnx.load(source)
    model.opset_import[0].version = 18
    assert not _judge(source, model).standard
    model = onnx.load(source)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    assert _judge(source, model).standard
    model.graph.node[0].domain = "com.microsoft"
    assert not _judge(source, model).standard


def test_a_file_may_grow_by_2_percent_or_to_1_mb(source: Path) -> None:
    model = onnx.load(source)
    model.doc_string = "x" * 900_000
    assert _judge(source, model).small
    model.doc_string = "x" * 1_100_000
    assert not _judge(source, model).small


def test_data_files_count_as_bytes_of_the_model(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(outcome.np.zeros(1000, "float32"), "w")
    model = parser.parse_model(TEXT)
    model.graph.initializer.append(weight)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    assert outcome.size(path, proto) == path.stat().st_size + 4000


def test_our_own_tool_runs_and_is_measured() -> None:
    path = simplify.models()["fashion_float"]
    tool = replace(rivals.TOOLS[simplify.OURS], interpreter=sys.executable)
    row = simplify.compare("fashion_float", path, [tool], 1)
    made = row.ours
    assert made.error == ""
    assert made.eligible
    assert made.result is not None
    assert made.result.nodes < row.nodes
    assert 0 < made.cpu < 30
    assert made.peak > made.bare_peak
    assert simplify.problems([row]) == []


def _run(tool: str, nodes: int, cpu: float, peak: float, **flaws: object) -> simplify.Run:
    sound = {"standard": True, "small": True, "checker": "", "equal": True} | flaws
    made = outcome.Outcome(nodes=nodes, bytes=1, difference="", **sound)  # type: ignore[arg-type]
    return simplify.Run(tool, cpu, peak, result=made)


def _row(*runs: simplify.Run, model: str = "m") -> simplify.Row:
    return simplify.Row(model, 100, 1, {run.tool: run for run in runs})


def test_a_promise_that_is_kept_is_no_problem() -> None:
    row = _row(
        _run("onnxopt", 10, 0.5, 100),
        _run("onnxsim", 10, 2.0, 200),
        _run("onnxslim", 5, 0.1, 50, equal=False),
        _run("ort-basic", 4, 0.1, 50, standard=False),
    )
    assert simplify.problems([row]) == []


@pytest.mark.parametrize(
    ("nodes", "cpu", "peak", "words"),
    [
        (11, 0.5, 100, ["m: 11 nodes, onnxsim 10"]),
        (10, 1.0, 100, ["median CPU ratio 0.50 > 0.4"]),
        (10, 1.4, 100, ["m: CPU 0.70 of onnxsim", "median CPU ratio 0.70 > 0.4"]),
        (10, 0.5, 201, ["m: 201 MB, onnxsim 200 MB"]),
    ],
)
def test_a_promise_that_is_not_kept_is_named(
    nodes: int, cpu: float, peak: float, words: list[str]
) -> None:
    row = _row(_run("onnxopt", nodes, cpu, peak), _run("onnxsim", 10, 2.0, 200))
    assert simplify.problems([row]) == words


def test_the_large_model_has_promises_of_its_own() -> None:
    row = _row(
        _run("onnxopt", 10, 5.0, 151), _run("onnxscript", 10, 2.0, 300), model="large"
    )
    assert simplify.problems([row]) == [
        "large: 151 MB, more than 150",
        "large: CPU 2.50 of onnxscript",
    ]


def test_versions_are_pinned_and_every_rival_has_an_environment_of_its_own() -> None:
    for tool in rivals.TOOLS.values():
        assert all(re.fullmatch(r"[\w-]+==[\d.]+", item) for item in tool.packages)
    pinned = {tool.environment: tool.packages for tool in rivals.TOOLS.values()}
    assert {tool.packages for tool in rivals.TOOLS.values()} == set(pinned.values())
    assert len(set(exports.NAMES)) == len(exports.NAMES)
