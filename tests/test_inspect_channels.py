"""`inspect --channels`: how many channels of each layer are dead, and what keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import ModelProto

import onnxopt
from onnxopt.cli import cli
from onnxopt.inspection.dead import LayerChannels
from onnxopt.inspection.survey import Inspection
from tests import support

TEXT = """main (float[N,2,6,6] x) => (float[N,2,6,6] y, float[N,4,6,6] z)
<float[4,2,1,1] A = {1,2, 0,0, 0,0, 3,4}, float[4] a = {0.5,0,-1,0},
 float[4,4,1,1] B = {1,2,3,0, 4,5,6,0, 0,0,0,0, 0,0,0,0}, float[4] b = {0,0,0,7},
 float[2,4,1,1] C = {1,0,3,4, 5,0,7,8}> {
   t = Conv (x, A, a)
   r = Relu (t)
   z = Conv (r, B, b)
   q = Tanh (z)
   y = Conv (q, C)
}"""


@pytest.fixture
def source() -> ModelProto:
    return support.model_of(TEXT)


def test_every_layer(source: ModelProto) -> None:
    """Of A one channel is zero, one constant, one unused; B makes an output."""
    first, second, last = onnxopt.inspect(source, channels=True).layers or []
    assert first == LayerChannels(
        node="Conv:t",
        scope="main",
        op="Conv",
        channels=4,
        zero=1,
        constant=1,
        unused=1,
        removable=3,
        kept_by={},
        needed_by={"Conv:z depends on it": 1},
    )
    assert (second.zero, second.constant, second.unused, second.removable) == (1, 1, 0, 0)
    assert second.kept_by == {"'z' is an output of the graph": 2}
    assert second.needed_by == {"'z' is an output of the graph": 2}
    assert (last.channels, last.zero, last.constant, last.unused) == (2, 0, 0, 0)
    assert last.needed_by == {"'y' is an output of the graph": 2}


def test_a_layer_without_dead_channels_is_listed_on_request_only() -> None:
    model = support.model_of(
        "main (float[N,2] x) => (float[N,A] y) <float[2,2] W = {1,2,3,4}> "
        "{ y = MatMul (x, W) }"
    )
    plain, whole = onnxopt.inspect(model), onnxopt.inspect(model, channels=True)
    assert (plain.dead, plain.layers, whole.dead) == ([], None, [])
    (layer,) = whole.layers or []
    assert (layer.node, layer.channels, layer.removable) == ("MatMul:y", 2, 0)


def test_counts_are_those_of_the_removal(source: ModelProto) -> None:
    """What is said to go goes, and what is said to stay stays."""
    (first, *_) = onnxopt.inspect(source, channels=True).layers or []
    made = onnxopt.shrink(source).model
    left = support.find_tensor(made, "A").dims[0]
    assert left == first.channels - first.removable
    stay = [*first.kept_by.values(), *first.needed_by.values()]
    assert sum(stay) == left


def test_layers_of_inner_graphs(source: ModelProto) -> None:
    found = onnxopt.inspect(support.in_branches(source), channels=True)
    scopes = [layer.scope for layer in found.layers or []]
    assert len(scopes) == 6
    assert len(set(scopes)) == 2


def test_json(source: ModelProto) -> None:
    found = onnxopt.inspect(source, channels=True)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Inspection) == found


def test_command_line(
    source: ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(source, tmp_path / "m.onnx")

    def inspect(*more: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["inspect", str(tmp_path / "m.onnx"), *more])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    text = inspect("--channels")
    assert "  Conv:t: 1 live: Conv:z depends on it" in text
    assert "  Conv:y: 2 live: 'y' is an output of the graph" in text
    assert "  Conv:y:" not in inspect()
    layers = json.loads(inspect("--channels", "--json", "-"))["layers"]
    assert [layer["op"] for layer in layers] == ["Conv"] * 3
    assert json.loads(inspect("--json", "-"))["layers"] is None
