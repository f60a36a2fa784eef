"""Blame: the wrong edit is found, its node named, a small model of it written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)
from onnx.numpy_helper import from_array

import onnxopt
from onnxopt.blame import _save_arrays
from onnxopt.cli import commands
from onnxopt.edit import Edit
from onnxopt.errors import UsageError
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

LAYERS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers of eight channels, each with a bias and a Relu."""
    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index in range(LAYERS):
        names = [f"w{index}", f"b{index}"]
        weights += [
            from_array(random.normal(size=(8, 8, 3, 3)).astype(np.float32) / 6, names[0]),
            from_array(random.normal(size=8).astype(np.float32), names[1]),
        ]
        nodes += [
            make_node(
                "Conv", [value, *names], [f"c{index}"], f"conv{index}", pads=[1] * 4
            ),
            make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"),
        ]
        value = f"r{index}"
    nodes.append(make_node("Identity", [value], ["again"], "same"))
    nodes.append(make_node("GlobalAveragePool", ["again"], ["y"], "pool"))
    ends = [("x", ["N", 8, 6, 6]), ("y", ["N", 8, 1, 1])]
    x, y = (make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in ends)
    graph = make_graph(nodes, "g", [x], [y], weights)
    path = tmp_path_factory.mktemp("blame") / "model.onnx"
    opsets = [make_opsetid("", 17)]
    onnx.save(make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def convs(graph: GraphView) -> list[onnx.NodeProto]:
    return [node for node in graph.nodes() if node.op_type == "Conv"]


class Rename(Pass):
    """Right edits: weights written anew, as they were."""

    name: ClassVar[str] = "weights-anew"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        for node in convs(graph):
            if node.input[1].startswith("w"):
                edit = Edit(graph, node)
                array = graph.array(node.input[1])
                assert array is not None
                edit.set_input(node, 1, edit.add_weight(array, "anew"))
                graph.apply(edit, "the same weights")


class Spoil(Pass):
    """Some of these edits are wrong: the weights of `layers` are scaled by `factor`."""

    name: ClassVar[str] = "spoil"
    guarantee: ClassVar[Guarantee] = "equivalent"
    layers: tuple[int, ...] = (3,)
    factor: float = 1.5

    def run(self, graph: GraphView, context: Context) -> None:
        for index, node in enumerate(convs(graph)):
            if not node.input[1].startswith("touched"):
                edit = Edit(graph, node)
                array = graph.array(node.input[1])
                assert array is not None
                by = np.float32(self.factor if index in self.layers else 1)
                edit.set_input(node, 1, edit.add_weight(array * by, "touched"))
                graph.apply(edit, "weights that were touched")


def test_a_right_pipeline_has_no_culprit(model: Path) -> None:
    found = onnxopt.bisect(model, "simplify")
    assert found.edits > 0
    assert found.reason is None
    assert found.culprit is None
    assert found.drift is None


def test_pass_edit_and_node_are_named(model: Path, tmp_path: Path) -> None:
    found = onnxopt.bisect(
        model, passes=[Rename(), Spoil(layers=(3,))], repro=tmp_path / "repro"
    )
    assert found.culprit is not None
    assert found.culprit.name == "spoil"
    assert found.culprit.edit == LAYERS + 4
    assert found.culprit.node == "conv3"
    assert found.drift is not None
    assert found.drift.node == "conv3"
    assert found.drift.op == "Conv"
    assert found.drift.local == pytest.approx(0.5, rel=0.2)
    assert found.drift.cumulative == pytest.approx(found.drift.local, rel=1e-3)


def test_the_first_of_several_wrong_edits_is_blamed(model: Path) -> None:
    found = onnxopt.bisect(model, passes=[Spoil(layers=(5, 2))])
    assert found.culprit is not None
    assert found.culprit.edit == 3
    assert found.culprit.node == "conv2"


def test_an_error_that_outputs_hide_in_rounding_is_blamed(model: Path) -> None:
    found = onnxopt.bisect(model, passes=[Rename(), Spoil(layers=(1,), factor=1.00003)])
    assert found.culprit is not None
    assert found.culprit.node == "conv1"
    assert found.reason is not None


def test_the_repro_is_small_and_shows_the_error(model: Path, tmp_path: Path) -> None:
    found = onnxopt.bisect(model, passes=[Spoil(layers=(4,))], repro=tmp_path)
    before, after, feed = map(Path, found.repro)
    assert len(onnx.load(after).graph.node) == 1
    assert before.stat().st_size < model.stat().st_size / 3
    with np.load(feed) as arrays:
        given = dict(arrays)
    outputs = [ort.InferenceSession(path).run(None, given)[0] for path in (before, after)]
    assert np.allclose(
        1.5 * (outputs[0] - bias(before)), outputs[1] - bias(after), atol=1e-3
    )
    assert not np.allclose(outputs[0], outputs[1], rtol=0.1)


def bias(path: Path) -> Any:
    graph = onnx.load(path).graph
    node = graph.node[0]
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return arrays[node.input[2]][None, :, None, None]


def test_validation_cannot_be_left_out(model: Path) -> None:
    with pytest.raises(UsageError, match="validate"):
        onnxopt.bisect(model, validate=False)


@pytest.mark.parametrize("layers", [(3,), (1, 6)])
def test_rollback_undoes_the_wrong_edits_only(
    model: Path, layers: tuple[int, ...]
) -> None:
    result = onnxopt.optimize(
        model, passes=[Rename(), Spoil(layers=layers)], on_failure="rollback"
    )
    assert result.report.validation is not None
    assert result.report.validation.status == "passed"
    made = {entry.name: entry.edits for entry in result.report.passes}
    count = LAYERS
    assert made == {"weights-anew": count, "spoil": count - len(layers)}
    told = [note for note in result.report.notes if note.startswith("rolled back")]
    assert len(told) == len(layers)
    for note, layer in zip(told, layers, strict=True):
        assert f"conv{layer}" in note
        assert "spoil" in note


# --- the command ----------------------------------------------------------------------


def run(*args: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        commands.cli.main(["bisect", *args])
    return int(left.value.code or 0), capsys.readouterr().out


def test_command_exits_0_where_nothing_is_wrong(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, out = run(
        str(model), "--recipe", "simplify", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    assert "nothing wrong" in out


def test_command_tells_the_culprit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("onnxopt.recipe.parse_pipeline", lambda text: [Rename(), Spoil()])
    target = tmp_path / "found.json"
    code, out = run(
        str(model),
        "--passes",
        "spoil",
        "--repro",
        str(tmp_path / "repro"),
        "--json",
        str(target),
        monkeypatch=monkeypatch,
        capsys=capsys,
    )
    assert code == 1
    assert "spoil" in out
    assert "conv3" in out
    document = json.loads(target.read_text())
    assert document["culprit"]["name"] == "spoil"
    assert document["drift"]["node"] == "conv3"
    assert {Path(p).name for p in document["repro"]} == {
        "before.onnx",
        "after.onnx",
        "feed.npz",
    }


def test_rollback_keeps_to_the_bisect_limit(model: Path) -> None:
    result = onnxopt.optimize(
        model,
        passes=[Rename(), Spoil(layers=(1,))],
        on_failure="rollback",
        bisect_limit=LAYERS + 4,
    )
    made = {entry.name: entry.edits for entry in result.report.passes}
    assert made == {"weights-anew": LAYERS, "spoil": 4}
    assert any("edit" in note and "conv1" in note for note in result.report.notes)


def test_a_model_that_is_wrong_anyway_has_no_culprit(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "metric.py"
    script.write_text("def nan(run):\n    return float('nan')\n")
    found = onnxopt.bisect(model, passes=[Rename()], metric=f"{script}:nan", max_drop=0.1)
    assert found.reason is not None
    assert found.culprit is None
    assert found.edits == LAYERS


class Endless(Pass):
    """The edit after which a run takes all memory there is."""

    name: ClassVar[str] = "endless"
    guarantee: ClassVar[Guarantee] = "equivalent"

    def run(self, graph: GraphView, context: Context) -> None:
        node = next(node for node in graph.nodes() if node.name == "relu2")
        if node.input[0] == "c2":
            edit = Edit(graph, node)
            times = edit.add_weight(np.array([1, 1, 4096, 4096]), "times")
            (large,) = edit.insert("Tile", ["c2", times])
            edit.set_input(node, 0, large)
            graph.apply(edit, "a large value")


def test_an_edit_that_takes_all_memory_is_blamed_and_rolled_back(model: Path) -> None:
    options: Any = {"passes": [Rename(), Endless()], "memory_limit": 1 << 30}
    found = onnxopt.bisect(model, **options)
    assert found.culprit is not None
    assert (found.culprit.name, found.culprit.node) == ("endless", "relu2")
    assert "GiB at once" in (found.reason or "")
    result = onnxopt.optimize(model, on_failure="rollback", **options)
    assert [entry.edits for entry in result.report.passes] == [LAYERS, 0]


def test_any_name_can_be_in_a_repro(tmp_path: Path) -> None:
    _save_arrays(tmp_path / "feed.npz", {"file": np.ones(2), "allow_pickle": np.zeros(3)})
    with np.load(tmp_path / "feed.npz") as found:
        assert {name: found[name].shape for name in found.files} == {
            "file": (2,),
            "allow_pickle": (3,),
        }
