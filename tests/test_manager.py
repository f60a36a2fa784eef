"""The pass manager: rounds, what runs once, what a broken pass does."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from support import model_of

import onnxopt
from onnxopt.edit import Edit
from onnxopt.errors import PassError, UsageError
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee

MODEL = model_of(
    """g (float[2, 4] x) => (float[2, 4] y) <float[4] w = {1, 2, 3, 4}> {
      a = Mul (x, w)
      y = Relu (a)
    }"""
)


class Smaller(Pass):
    """Takes a little away whenever it is asked."""

    name: ClassVar[str] = "smaller"
    guarantee: ClassVar[Guarantee] = "lossy"

    def run(self, graph: GraphView, context: Context) -> None:
        array = graph.array("w")
        assert array is not None
        edit = Edit(graph, graph.nodes()[0])
        edit.set_weight("w", np.float32(0.9) * array)
        graph.apply(edit, "a tenth off")


class Breaking(Pass):
    """Changes the protobuf behind the graph's back."""

    name: ClassVar[str] = "breaking"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        edit = Edit(graph, graph.nodes()[0])
        edit.set_weight("w", np.ones(4, np.float32))
        graph.apply(edit, "something")
        proto = graph.proto
        assert isinstance(proto, onnx.GraphProto)
        proto.node.append(proto.node[0])


def test_a_lossy_pass_runs_once() -> None:
    result = onnxopt.optimize(MODEL, passes=[Smaller()])
    (weight,) = result.model.graph.initializer
    expected = np.float32(0.9) * np.float32([1, 2, 3, 4])
    assert np.array_equal(onnx.numpy_helper.to_array(weight), expected)
    assert result.report.passes[0].edits == 1
    assert not any("fixed point" in note for note in result.report.notes)


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    with pytest.raises(PassError, match="after breaking"):
        onnxopt.optimize(MODEL, passes=[Breaking()])


def test_data_is_read_even_where_nothing_is_validated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.npz"):
        onnxopt.optimize(MODEL, data=str(tmp_path / "missing.npz"), validate=False)
