"""The golden cases of the passes: text in, text out, and the same numbers.

A file `golden/<pass>/<topic>.txt` holds cases like this one:

    [fires name-of-the-case]
    # what it shows, where the name does not say it
    options: random=W feeds=2,1
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[2] x) => (float[2] y) { ... }
    [out]
    ... the graph after the pass, or nothing where the case `stays` ...
    skipped: <node>: <reason>

`fires` cases must change, `stays` cases must not; `pytest --update-golden` writes what
comes after `[out]`. Each case also runs with its graph in the branches of an If, in a
Loop's body and in a local function. Options, by blanks:

    pass=a{x=1}     the pipeline, where it is not the pass alone
    random=W,b      fill these initializers with random values
    retype=W:float16,b:int4   give them a dtype that the text form cannot write
    hide=q          values that depend on the processor (ONNX Runtime's are right)
    target=ort-cpu  what it is for
    budget=1000     the size in bytes that the growth budget counts from
    feeds=2,1,3     the sizes that symbolic dims take
    only=main       the graph means nothing, or something else, in other scopes
    function=stays  in a function body, where shapes are not known, nothing fires
    norun=reason    ONNX Runtime cannot run the model
    close=casts     ONNX Runtime computes fp16 in fp32, and where it rounds depends on
                    which nodes are neighbours
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx.checker
import onnx.printer
import pytest
from onnx import ModelProto

from onnxopt.manager import Context
from onnxopt.model import Model
from onnxopt.passes import PASSES
from onnxopt.report import Guarantee
from onnxopt.target import target
from tests import support

GOLDEN = Path(__file__).parent / "golden"
WRAPPERS: dict[str, Callable[[ModelProto], ModelProto]] = {
    "if": support.in_branches,
    "loop": support.in_loop,
    "function": support.in_function,
}


@dataclass(frozen=True)
class Case:
    """One case of a golden file."""

    path: Path
    name: str
    fires: bool
    options: dict[str, str]
    head: str
    text: str
    expected: str

    @property
    def pass_name(self) -> str:
        return self.path.parent.name

    @property
    def guarantee(self) -> Guarantee:
        return PASSES[self.pass_name].guarantee

    @property
    def pipeline(self) -> str:
        return self.options.get("pass", self.pass_name)

    def model(self) -> ModelProto:
        """The model before the pass."""
        proto = support.parse(self.text)
        for name in filter(None, self.options.get("random", "").split(",")):
            support.randomize(proto, name)
        for item in filter(None, self.options.get("retype", "").split(",")):
            support.retype(proto, *item.split(":"))
        return proto

    def run(self, proto: ModelProto, context: Context) -> Model:
        """What the pass makes of `proto`."""
        budget = self.options.get("budget")
        goal = target(self.options.get("target", "onnx"))
        context = msgspec.structs.replace(context, target=goal)
        return support.run_passes(
            proto, self.pipeline, context, budget=int(budget) if budget else None
        )


def _cases(path: Path) -> Iterator[Case]:
    parts = re.split(r"^\[(fires|stays) ([\w.-]+)\]\n", path.read_text(), flags=re.M)
    assert not parts[0].strip(), f"{path}: text before the first case"
    for kind, name, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        source, _, expected = body.partition("[out]\n")
        start = source.index("<")
        options = re.findall(r"^options: (.*)$", source[:start], re.M)
        pairs = [item.split("=", 1) for line in options for item in line.split()]
        yield Case(
            path,
            name,
            kind == "fires",
            dict(pairs),
            source[:start],
            source[start:].strip(),
            expected.strip(),
        )


CASES = [case for path in sorted(GOLDEN.glob("*/*.txt")) for case in _cases(path)]


def _id(case: Case) -> str:
    return f"{case.pass_name}/{case.path.stem}/{case.name}"


def _outcome(case: Case, model: Model) -> str:
    """What stands after `[out]`: the graph where it changed, and the skips."""
    lines = [f"skipped: {skip.node}: {skip.reason}" for skip in support.skips(model)]
    lines = [re.sub(r"(could not be computed): .*", r"\1: ...", line) for line in lines]
    if model.ledger.edits:
        text = onnx.printer.to_text(model.proto).strip().replace("-nan", "nan")
        for name in filter(None, case.options.get("hide", "").split(",")):
            text = re.sub(rf"( {name} =)\s+{{[^}}]*}}", r"\1 ...", text)
        lines.insert(0, re.sub(r"[ \t]+$", "", text, flags=re.M))
    return "\n".join(lines)


_made: dict[Path, dict[str, str]] = {}


def _rewrite(case: Case, outcome: str) -> None:
    """Write the file of `case` anew, with the outcomes that are known by now."""
    made = _made.setdefault(case.path, {})
    made[case.name] = outcome
    blocks = []
    for other in (item for item in CASES if item.path == case.path):
        kind = "fires" if other.fires else "stays"
        expected = made.get(other.name, other.expected)
        head = f"[{kind} {other.name}]\n{other.head}{other.text}\n[out]\n{expected}"
        blocks.append(head.strip() + "\n")
    case.path.write_text("\n".join(blocks))


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_graph(case: Case, context: Context, pytestconfig: pytest.Config) -> None:
    """The graph, the interface and the numbers after the pass; a second run is idle."""
    source = case.model()
    model = case.run(source, context)
    outcome = _outcome(case, model)
    assert bool(model.ledger.edits) == case.fires, outcome
    if pytestconfig.getoption("update_golden"):
        _rewrite(case, outcome)
    else:
        assert outcome == case.expected
    _check(case, source, model, context)


@pytest.mark.parametrize("where", WRAPPERS)
@pytest.mark.parametrize(
    "case", [case for case in CASES if "only" not in case.options], ids=_id
)
def test_inner_scope(case: Case, where: str, context: Context) -> None:
    """The same where the graph stands in an inner scope or in a function."""
    source = WRAPPERS[where](case.model())
    model = case.run(source, context)
    kind = case.options.get("function") if where == "function" else None
    fires = case.fires if kind is None else kind == "fires"
    assert bool(model.ledger.edits) == fires, onnx.printer.to_text(model.proto)
    _check(case, source, model, context)


def _check(case: Case, source: ModelProto, model: Model, context: Context) -> None:
    again = case.run(support.final(model), context)
    assert again.ledger.edits == 0, onnx.printer.to_text(again.proto)
    proto = support.final(model)
    assert _interface(proto) == _interface(source)
    if "norun" in case.options:
        return
    onnx.checker.check_model(proto)
    guarantee = "equivalent" if "close" in case.options else case.guarantee
    sizes = [int(size) for size in case.options.get("feeds", "2,1,3").split(",")]
    for feed in support.feeds_of(source, sizes):
        support.assert_same(
            support.run(source, feed), support.run(proto, feed), guarantee
        )


def _interface(proto: ModelProto) -> list[bytes]:
    values = [*support.own_inputs(proto.graph), *proto.graph.output]
    return [value.SerializeToString(deterministic=True) for value in values]


NEED_DATA = {"add-output-quantizer", "quantize-static"}


def test_every_pass_has_cases() -> None:
    """Each pass has golden cases of both kinds; one that needs data stays without."""
    for fires in (True, False):
        wanted = PASSES.keys() - (NEED_DATA if fires else set())
        assert {c.pass_name for c in CASES if c.fires == fires} == wanted
