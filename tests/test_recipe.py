"""Pipelines and recipes: what they accept, and what each error names."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import ClassVar

import pytest

from onnxopt import recipe
from onnxopt.errors import PassError, UsageError
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass, PassManager
from onnxopt.model import Model
from onnxopt.passes import ON_REQUEST, PASSES, PIPELINES
from onnxopt.passes.simplify.dead_code import DeadCode
from onnxopt.passes.simplify.fold_constants import FoldConstants
from onnxopt.passes.simplify.identity import RemoveIdentity
from onnxopt.recipe import load_recipe, make_pass, make_passes, parse_pipeline
from onnxopt.report import Guarantee
from tests import support


class Example(Pass):
    """A pass with parameters of several types, as a third party may have."""

    name: ClassVar[str] = "example"
    guarantee: ClassVar[Guarantee] = "bitwise"

    count: int = 1
    factor: float = 0.5
    label: str = "x"
    on: bool = False
    names: tuple[str, ...] = ()

    def run(self, graph: GraphView, context: Context) -> None:
        """Nothing."""


@pytest.fixture(params=[False])
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let `example` be a pass that another package brings."""
    entry = importlib.metadata.EntryPoint(
        "example", f"{__name__}:Example", "onnxopt.passes"
    )
    shadow = importlib.metadata.EntryPoint(
        "identity", f"{__name__}:Example", "onnxopt.passes"
    )

    absent, other = (
        importlib.metadata.EntryPoint(name, value, "onnxopt.passes")
        for name, value in (("absent", "no_such_module:P"), ("other", "pathlib:Path"))
    )

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [entry, shadow, *faulty] if group == "onnxopt.passes" else []

    faulty = [absent, other] if request.param else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


# ---- the textual form ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  ", []),
        ("identity", [RemoveIdentity()]),
        ("identity,dead-code", [RemoveIdentity(), DeadCode()]),
        (" identity , dead-code ", [RemoveIdentity(), DeadCode()]),
        ("identity,identity", [RemoveIdentity(), RemoveIdentity()]),
        ("identity{}", [RemoveIdentity()]),
        ("fold-constants{max_growth=9}", [FoldConstants(9)]),
        ("fold-constants{max-growth=9}", [FoldConstants(9)]),
        ("fold-constants{ max_growth=9 },identity", [FoldConstants(9), RemoveIdentity()]),
    ],
)
def test_pipelines(text: str, expected: list[Pass]) -> None:
    assert parse_pipeline(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "unknown pass 'nothing'; there are .*, custom-quantizers, dead"),
        ("identity{x=1}", "pass 'identity' has no parameter 'x'"),
        ("fold-constants{x=1}", "no parameter 'x'; it has max_growth"),
        ("fold-constants{max_growth=a}", "pass 'fold-constants': .*max_growth"),
        ("fold-constants{max_growth=[}", r"cannot read the value of 'max_growth=\['"),
        ("fold-constants{max_growth}", "cannot read the parameter 'max_growth'"),
        ("fold-constants{=1}", "cannot read the parameter '=1'"),
        ("fold-constants{max_growth=1", "cannot read the pipeline at"),
        ("identity dead-code", "cannot read the pipeline at"),
        ("identity,,dead-code", "cannot read the pipeline at ',dead-code'"),
        (",identity", "cannot read the pipeline at"),
        ("identity,", "cannot read the pipeline at 'identity,'"),
    ],
)
def test_pipelines_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pipeline(text)


@pytest.mark.usefixtures("example")
def test_parameters_have_types() -> None:
    (made,) = parse_pipeline("example{count=3,factor=1.5,label=abc,on=true}")
    assert made == Example(3, 1.5, "abc", True)
    assert make_pass("example", {"names": ["a", "b"]}) == Example(names=("a", "b"))
    for wrong in ("count=1.5", "on=3", "factor=a"):
        with pytest.raises(UsageError, match=f"pass 'example': .*{wrong.split('=')[0]}"):
            parse_pipeline(f"example{{{wrong}}}")


# ---- entry points ----


@pytest.mark.usefixtures("example")
def test_other_packages_bring_passes() -> None:
    """Their names are known as ours are; ours cannot be replaced."""
    assert parse_pipeline("example") == [Example()]
    assert parse_pipeline("identity") == [RemoveIdentity()]
    assert set(recipe.pass_table()) == {*PASSES, "example"}


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("example", [True], indirect=True)
def test_passes_that_cannot_be_loaded_are_told_where_they_are_named() -> None:
    assert parse_pipeline("example,identity") == [Example(), RemoveIdentity()]
    with pytest.raises(UsageError, match=r"pass 'absent' of .*no_such_module"):
        parse_pipeline("absent")
    with pytest.raises(UsageError, match=r"pass 'other' of .* is no onnxopt Pass"):
        parse_pipeline("other")
    with pytest.raises(UsageError, match=r"there are absent, .*, cse, custom-quant"):
        parse_pipeline("nothing")


# ---- recipes ----


def written(folder: Path, text: str, name: str = "r.yaml") -> str:
    """The path of a recipe with that text."""
    path = folder / name
    path.write_text(text, "utf-8")
    return str(path)


def test_a_recipe(tmp_path: Path) -> None:
    text = """
name: small
target: ort-cpu
opset: 17
passes:
  - identity
  - fold-constants: {max_growth: 9}
  - dead-code:
  - dead-code: {}
"""
    passes, found = load_recipe(written(tmp_path, text))
    assert passes == [RemoveIdentity(), FoldConstants(9), DeadCode(), DeadCode()]
    assert (found.name, found.target, found.opset) == ("small", "ort-cpu", 17)
    passes, found = load_recipe(written(tmp_path, "passes: []", "empty.yml"))
    assert (passes, found.target, found.opset) == ([], None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [identity]\nextra: 1", "unknown field `extra`"),
        ("passes: [identity]\ntarget: 3", "target"),
        ("passes: identity", "passes"),
        ("passes: [3]", "passes"),
        ("passes: [nothing]", "unknown pass 'nothing'"),
        ("passes: [{identity: {x: 1}}]", "pass 'identity' has no parameter 'x'"),
        ("passes: [{fold-constants: {max_growth: a}}]", "max_growth"),
        (
            "passes: [{identity: {}, dead-code: {}}]",
            "a step names one pass, not 2: identity, dead-code",
        ),
        ("passes: [{}]", "a step names one pass, not 0"),
        ("passes: [", "recipe .*r.yaml: "),
        ("- identity", "recipe .*r.yaml: "),
        ("", "recipe .*r.yaml: "),
    ],
)
def test_recipes_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    """The error is one line that names what is wrong."""
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    for name, message in (
        ("nothing", "unknown recipe 'nothing'; there are default"),
        (str(tmp_path / "absent.yaml"), "cannot read .*absent.yaml: No such file"),
    ):
        with pytest.raises(UsageError, match=message):
            load_recipe(name)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UsageError, match=r"binary\.yaml"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", PIPELINES)
def test_named_pipelines(name: str) -> None:
    passes, found = load_recipe(name)
    assert [step.name for step in passes] == list(PIPELINES[name])
    assert found.name == name
    assert make_passes(list(PIPELINES[name])) == passes


def test_every_pass_is_in_the_default_pipeline_and_says_what_it_does() -> None:
    """Each by its own name, with a promise, and with defaults for its parameters."""
    assert {*PIPELINES["default"], *ON_REQUEST} == set(PASSES)
    for name, kind in PASSES.items():
        assert (kind.name, kind()) == (name, make_pass(name))
        assert kind.guarantee in ("bitwise", "equivalent", "lossy")
        assert kind.__doc__


# ---- running ----

CHAIN = """
main (float[2] x) => (float[2] y) {
   a = Identity (x)
   b = Identity (a)
   c = Exp (b)
   y = Abs (b)
}"""


def test_the_manager_tells_what_ran() -> None:
    """Passes in order, until nothing changes, even where all is looked at anew."""
    told: list[tuple[str, int]] = []
    manager = PassManager(
        parse_pipeline("dead-code,identity"),
        observer=lambda pass_, model, edits: told.append((pass_.name, edits)),
    )
    model = Model.open(support.model_of(CHAIN))
    manager.run(model)
    assert told[:2] == [("dead-code", 1), ("identity", 2)]
    assert [edits for _, edits in told[2:]] == [0] * (len(told) - 2)
    assert [report.name for report in model.ledger.reports()] == ["dead-code", "identity"]
    assert [report.edits for report in model.ledger.reports()] == [1, 2]
    assert set(manager.seconds) == {"dead-code", "identity"}
    assert model.notes == []


def test_shapes_known_late_are_used_far_away() -> None:
    """A fold tells the shapes of values that no edit is next to."""
    source = support.model_of("""
main (float[2,3] x) => (float[2,3] y)
   <int64[2] k = {7, 13}, int64[2] m = {5, 5}, int64[2] one = {1, 1}> {
   s = Div (k, m)
   n = Add (s, one)
   d = Min (n, k)
   t = Reshape (x, d)
   u = Neg (t)
   v = Exp (u)
   w = Expand (v, one)
   y = Abs (w)
}""")
    source.graph.initializer[0].int64_data[:] = [5, 10]
    model = support.run_passes(source, "no-op,fold-constants")
    assert support.op_types(model) == ["Neg", "Exp", "Abs"]


def test_the_empty_pipeline_changes_nothing() -> None:
    source = support.model_of(CHAIN)
    model = support.run_passes(source, "")
    assert model.proto.SerializeToString(deterministic=True) == source.SerializeToString(
        deterministic=True
    )


class Restless(Pass):
    """A pass that always finds something."""

    name: ClassVar[str] = "restless"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Swap the inputs of every Add."""
        from onnxopt.edit import Edit

        for node in graph.nodes():
            edit = Edit(graph, node)
            edit.set_attribute(node, "count", len(node.attribute))
            graph.apply(edit, "for ever")


class Broken(Pass):
    """A pass with a bug."""

    name: ClassVar[str] = "broken"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Divide by zero."""
        raise ZeroDivisionError("a bug")


def test_a_bug_names_its_pass() -> None:
    model = Model.open(support.model_of(CHAIN))
    with pytest.raises(PassError, match="pass broken failed: ZeroDivisionError: a bug"):
        PassManager([Broken()]).run(model)


def test_rounds_are_bounded() -> None:
    model = Model.open(support.model_of("main (float x) => (float y) { y = Neg (x) }"))
    PassManager([Restless()], max_rounds=3).run(model)
    assert model.ledger.edits == 3
    assert model.notes == ["no fixed point after 3 rounds"]
