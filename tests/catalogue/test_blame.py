"""Wrong rewrites of real models: localisation names the node, bisect the pass."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnx
import pytest

import onnxopt
from catalogue.planted_pass import Planted
from catalogue.test_wrong_rewrites import HARMLESS
from catalogue.wrong_rewrites import PLANTED, Wrong
from onnxopt import data
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.validation.judge import settle
from onnxopt.validation.localise import Found, localise
from onnxopt.validation.samples import numbered
from onnxopt.validation.verdict import Question, Verdict

pytestmark = [pytest.mark.catalogue, pytest.mark.slow]

WRONG = [each for each in PLANTED if each.name not in HARMLESS]
BLAMED = 40
"""So many rewrites, spread over all models, are also made by a pass and bisected."""


def first_found(question: Question, reference: onnx.ModelProto, folder: Path) -> Found:
    feeds = data.generate_feeds(data.input_specs(reference), model=reference)
    with question.worker() as worker:
        settled = settle(Verdict(question), worker, "cpu", feeds)
    for at in numbered(settled, hard=True):
        if found := localise(question, at.feed, folder):
            return found
    raise AssertionError("nothing was found on any feed")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_the_first_wrong_node_is_named(wrong: Wrong, tmp_path: Path) -> None:
    reference = wrong.reference()
    question = Question(tmp_path / "reference.onnx", tmp_path / "candidate.onnx")
    onnx.save(reference, question.reference)
    onnx.save(wrong.apply(reference), question.candidate)
    assert first_found(question, reference, tmp_path).drift.value == wrong.first


class Copied(Pass):
    """Right edits: as many nodes as `count` get a description."""

    name: ClassVar[str] = "copied"
    guarantee: ClassVar[Guarantee] = "bitwise"
    count: int = 3

    def run(self, graph: GraphView, context: Context) -> None:
        for node in graph.nodes()[: self.count]:
            if graph.scope == "main" and not graph.is_output(node.output[0]):
                self._pass_through(graph, node)

    def _pass_through(self, graph: GraphView, node: onnx.NodeProto) -> None:
        for use in graph.uses(node.output[0]):
            if use.node.op_type == "Identity" or not graph.holds(use.node):
                return
        edit = Edit(graph, graph.uses(node.output[0])[0].node)
        (same,) = edit.insert("Identity", [node.output[0]])
        edit.set_input(edit.node, graph.uses(node.output[0])[0].index, same)
        graph.apply(edit, "an Identity in between")


@pytest.mark.parametrize(
    "wrong", WRONG[:: max(1, len(WRONG) // BLAMED)], ids=lambda wrong: wrong.name
)
def test_the_pass_is_named(wrong: Wrong, tmp_path: Path) -> None:
    reference = wrong.reference()
    found = onnxopt.bisect(
        reference, passes=[Copied(), Planted(wrong.name)], repro=tmp_path
    )
    assert found.culprit is not None
    assert found.culprit.name == "planted"
    assert found.drift is not None
    assert found.drift.value == wrong.first
