"""Who runs the nodes: placement, copies, time, int8 on CUDA, providers that are absent.

Without a GPU: what CUDA would do is played by a stand-in, or told from made-up counts.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxopt
from onnxopt import runtime
from onnxopt.cli import cli
from onnxopt.errors import ProviderError
from onnxopt.report import Placement, Validation, as_json
from onnxopt.runtime import SessionSpec, Worker
from onnxopt.validation.judge import AbsentProviderError
from onnxopt.validation.placement import ProviderTime, fallback_notes, int8_notes

QDQ = Path(__file__).parents[1] / "models" / "fashion_qat_legacy.onnx"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
MODELS = Path(__file__).parents[1] / "models"
AZURE = "AzureExecutionProvider"
LEVELS = ("disable_all", "enable_all")
SIDES = ("reference", "candidate")

PLAIN = """g (float[N, 3] x) => (float[N, 3] y) {
  t = Identity (x) u = Relu (t) y = Exp (u)
}"""
BRANCH = """g (float[N] x, bool c) => (float[N] y) {
  a = Relu (x)
  y = If (c) <
    then_branch = p () => (float[M] t) { t1 = Exp (a) t = Exp (t1) },
    else_branch = q () => (float[M] e) { e = Neg (a) }
  >
}"""

# As onnxruntime-gpu on a machine without a GPU. Providers are noted in a file as asked.
NO_GPU = """
import json, onnxruntime
present = onnxruntime.get_available_providers()
onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", *present]
plain = onnxruntime.InferenceSession
def session(*args, providers, **options):
    with open(NOTED, "a") as file:
        file.write(json.dumps(providers) + "\\n")
    left = [name for name in providers if name == "CPUExecutionProvider"]
    return plain(*args, providers=left, **options)
onnxruntime.InferenceSession = session
"""
# As before 1.24, when ONNX Runtime did not say what it assigned.
NO_RECORD = """
import onnxruntime
of = onnxruntime.capi.onnxruntime_inference_collection.Session
for kind in of.__mro__[:-1] + onnxruntime.InferenceSession.__mro__[:-1]:
    if "get_provider_graph_assignment_info" in vars(kind):
        del kind.get_provider_graph_assignment_info
"""
# As if another provider had run copies and a part of the time.
COPIES = """
from onnxopt import _placement
summed = _placement._summed
def more(events):
    rows = summed(events)
    time = sum(row[3] for row in rows)
    return [
        ["CUDAExecutionProvider", "MemcpyFromHost", 2, time],
        ["CUDAExecutionProvider", "MemcpyToHost", 1, 2 * time],
        *rows,
    ]
_placement._summed = more
"""

Run = Callable[..., tuple[int, str, str]]


def saved(folder: Path, body: str, name: str = "model.onnx") -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{body}')
    onnx.save(model, folder / name)
    return folder / name


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return saved(tmp_path, PLAIN)


@pytest.fixture
def stand_in(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Path]]:
    """Runs code in every worker that starts, before all else; the file it may note in."""

    def install(code: str) -> Path:
        folder = tmp_path_factory.mktemp("stand-in")
        noted = folder / "noted"
        noted.touch()
        head = f"NOTED = {str(noted)!r}\n"
        (folder / "sitecustomize.py").write_text(head + textwrap.dedent(code))
        monkeypatch.syspath_prepend(str(folder))
        return noted

    runtime.available_providers.cache_clear()
    yield install
    runtime.available_providers.cache_clear()


@pytest.fixture
def other() -> str:
    """A provider that is there, is not the CPU's, and runs none of our nodes."""
    if AZURE not in runtime.available_providers():
        pytest.skip(f"this onnxruntime has no {AZURE}")
    return AZURE


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, captured.out, captured.err

    return call


def statuses(verdict: Validation, provider: str) -> list[str]:
    return [check.status for check in verdict.checks if check.provider == provider]


# --- what the report says ---------------------------------------------------------------


def test_nodes_by_provider_level_and_model(plain: Path, tmp_path: Path) -> None:
    body = PLAIN.replace("t = Identity (x) u = Relu (t)", "u = Relu (x)")
    made = saved(tmp_path, body, "made.onnx")
    verdict = onnxopt.validate(plain, made)
    found = {(p.level, p.model): p for p in verdict.placements}
    assert set(found) == {(level, side) for level in LEVELS for side in SIDES}
    before, after = (found["disable_all", side] for side in SIDES)
    assert before.operators == {CPU: {"Exp": 1, "Identity": 1, "Relu": 1}}
    assert after.operators == {CPU: {"Exp": 1, "Relu": 1}}
    assert (before.nodes, after.nodes) == ({CPU: 3}, {CPU: 2})
    assert {p.memcpy for p in verdict.placements} == {0}
    assert {p.provider for p in verdict.placements} == {"cpu"}


def test_nodes_in_subgraphs_count(tmp_path: Path) -> None:
    path = saved(tmp_path, BRANCH)
    place = onnxopt.validate(path, path).placements[0]
    assert place.operators == {CPU: {"Exp": 2, "If": 1, "Neg": 1, "Relu": 1}}


def test_an_onnxruntime_that_does_not_say_is_profiled(
    tmp_path: Path, stand_in: Callable[[str], Path]
) -> None:
    """What did not run is not seen: one branch of the two."""
    stand_in(NO_RECORD)
    path = saved(tmp_path, BRANCH)
    feeds = [{"x": np.ones(2, np.float32), "c": np.array(False)}]
    places = onnxopt.validate(path, path, data=feeds).placements
    assert [(p.level, p.model) for p in places] == [(a, b) for a in LEVELS for b in SIDES]
    assert places[0].operators == {CPU: {"If": 1, "Neg": 1, "Relu": 1}}
    assert places[0].memcpy == 0


def test_the_report_of_a_transform_has_it_too(plain: Path) -> None:
    made = onnxopt.simplify(plain).report
    assert made.validation is not None
    nodes = {(p.level, p.model): p.nodes for p in made.validation.placements}
    assert nodes["disable_all", "reference"] == {CPU: 3}
    assert nodes["disable_all", "candidate"] == {CPU: 2}


def test_equal_validations_give_equal_bytes() -> None:
    """Also where time is measured."""
    told: list[ProviderTime] = []
    one, two = onnxopt.validate(QDQ, QDQ), onnxopt.validate(QDQ, QDQ)
    three = onnxopt.validate(QDQ, QDQ, time_observer=told.append)
    assert as_json(one) == as_json(two) == as_json(three)
    assert told
    assert "second" not in as_json(three)


def test_what_falls_to_the_cpu_is_told(plain: Path, other: str) -> None:
    verdict = onnxopt.validate(plain, plain, providers=[other])
    assert f"{other} disable_all: no node of the candidate runs on {other}" in (
        verdict.notes
    )
    assert (
        f"{other} disable_all: of the candidate, {CPU} runs Exp 1, Identity 1, Relu 1"
        in verdict.notes
    )
    assert {p.memcpy for p in verdict.placements if p.provider == other} == {0}


def place(provider: str = "cuda", **nodes: dict[str, int]) -> Placement:
    """Of a candidate; operators by short provider name."""
    operators = {runtime.provider_name(name): ops for name, ops in nodes.items()}
    counts = {name: sum(ops.values()) for name, ops in operators.items()}
    return Placement(provider, "enable_all", "candidate", counts, operators, 0)


def test_notes_on_what_a_provider_leaves_to_others() -> None:
    assert list(fallback_notes([place(cuda={"Conv": 2})])) == []
    assert list(fallback_notes([place("cpu", cpu={"Conv": 2})])) == []
    some = place("cuda:device_id=1", cuda={"Conv": 2}, cpu={"TopK": 1, "Cast": 2})
    assert list(fallback_notes([some])) == [
        f"cuda:device_id=1 enable_all: of the candidate, {CPU} runs Cast 2, TopK 1"
    ]


# --- time -----------------------------------------------------------------------------


def test_shares_of_time_sum_to_1() -> None:
    told: list[ProviderTime] = []
    onnxopt.validate(QDQ, QDQ, time_observer=told.append)
    for level in LEVELS:
        for side in SIDES:
            mine = [t for t in told if (t.level, t.model) == (level, side)]
            assert sum(t.share for t in mine) == pytest.approx(1)
            assert {(t.provider, t.runs_on) for t in mine} == {("cpu", CPU)}
            assert all(0 < t.seconds < 10 for t in mine)


def test_a_transform_times_its_result_only(tmp_path: Path) -> None:
    """Not what it looks at on the way."""
    path = saved(tmp_path, PLAIN)
    told: list[ProviderTime] = []
    onnxopt.simplify(path, verify_each=True, time_observer=told.append)
    assert [(t.level, t.model) for t in told] == [(a, b) for a in LEVELS for b in SIDES]


def test_copies_are_counted_and_timed(
    plain: Path, other: str, stand_in: Callable[[str], Path], run: Run
) -> None:
    stand_in(COPIES)
    told: list[ProviderTime] = []
    verdict = onnxopt.validate(plain, plain, providers=[other], time_observer=told.append)
    assert {p.memcpy for p in verdict.placements} == {3}
    assert {p.level: p.nodes for p in verdict.placements} == {
        "disable_all": {CPU: 3},
        "enable_all": {CPU: 2},
    }
    shares = {t.runs_on: t.share for t in told if t.level == "enable_all"}
    assert shares == pytest.approx({CUDA: 0.75, CPU: 0.25})
    _, shown, _ = run("validate", plain, plain, "--provider", other, "--measure")
    rows = [line.split()[-3:] for line in shown.splitlines() if other in line]
    assert [CPU, "3", "3"] in rows
    assert [row[-2:] for row in rows[-2:]] == [["25.0", "%"], ["75.0", "%"]]


# --- strict sessions ------------------------------------------------------------------


def test_a_strict_session_names_what_falls_to_the_cpu(plain: Path, other: str) -> None:
    with Worker() as worker:
        worker.load(plain, SessionSpec(provider=other))
        with pytest.raises(ProviderError) as caught:
            worker.load(plain, SessionSpec(provider=other, strict=True))
        worker.load(plain, SessionSpec(strict=True))
    assert str(caught.value) == (
        f"{other} is required for all nodes, and leaves to the CPU: "
        "Exp 1, Identity 1, Relu 1"
    )


def test_a_required_provider_runs_everything_or_nothing_is_proven(
    plain: Path, other: str, run: Run
) -> None:
    with pytest.raises(AbsentProviderError, match="leaves to the CPU: Exp 1") as caught:
        onnxopt.validate(plain, plain, providers=[other], require_providers=[other])
    assert statuses(caught.value.validation, other) == ["not_run"] * 2
    code, _, error = run("validate", plain, plain, "--require-provider", other)
    assert code == 4
    assert "Identity 1" in error


# --- absent providers -----------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_no_agreement(
    plain: Path, stand_in: Callable[[str], Path]
) -> None:
    """onnxruntime-gpu lists CUDA all the same, and makes a session on the CPU."""
    stand_in(NO_GPU)
    verdict = onnxopt.validate(plain, plain, providers=["cpu", "cuda"])
    assert CUDA in runtime.available_providers()
    assert statuses(verdict, "cpu") == ["passed"] * 2
    mine = [check for check in verdict.checks if check.provider.startswith("cuda")]
    assert [(c.provider, c.level, c.status, c.outputs) for c in mine] == [
        ("cuda", level, "not_run", []) for level in LEVELS
    ]
    reason = f"{CUDA} asked for but not used: the session runs on {CPU}"
    assert {check.reason for check in mine} == {reason}
    assert {p.provider for p in verdict.placements} == {"cpu"}
    with pytest.raises(AbsentProviderError, match=reason):
        onnxopt.validate(plain, plain, providers=["cuda"])


@pytest.mark.parametrize("listed", [True, False])
def test_exit_code_4_where_it_is_required(
    plain: Path, tmp_path: Path, stand_in: Callable[[str], Path], run: Run, listed: bool
) -> None:
    if listed:
        stand_in(NO_GPU)
    elif CUDA in runtime.available_providers():
        pytest.skip("CUDA is there")
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    both = ("--provider", "cpu", "--require-provider", "cuda")
    why = "the session runs on" if listed else "this onnxruntime offers"
    reason = f"{CUDA} asked for but not used: {why}"
    code, _, error = run("optimize", plain, "-o", out, "--report", made, *both)
    assert code == 4
    assert reason in error
    assert not out.exists()
    checks = json.loads(made.read_text())["validation"]["checks"]
    found = {c["status"] for c in checks if c["provider"] == "cuda"}
    assert found == {"not_run"}
    assert run("validate", plain, plain, *both)[0] == 4
    # Not required it is told, and the CPU's verdict holds.
    code, shown, _ = run(
        "validate", plain, plain, "--provider", "cpu", "--provider", "cuda"
    )
    assert code == 0
    assert "not run" in shown


# --- options of providers -------------------------------------------------------------


def test_options_of_a_provider_are_handed_on_and_reported(
    plain: Path, stand_in: Callable[[str], Path]
) -> None:
    """Among those that make CUDA comparable, which they may override."""
    noted = stand_in(NO_GPU)
    asked = "cuda:device_id=0,use_tf32=1"
    verdict = onnxopt.validate(plain, plain, providers=["cpu", "cuda", asked])
    assert statuses(verdict, asked) == ["not_run"] * 2
    chains = [json.loads(line) for line in noted.read_text().splitlines()]
    given = [chain[0][1] for chain in chains if chain[0][0] == CUDA]
    plainly = {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}
    assert given == [plainly, plainly | {"device_id": "0", "use_tf32": "1"}]
    assert [chain[1:] for chain in chains if chain[0][0] == CUDA] == [[CPU]] * 2


def test_a_cpu_with_options_is_still_the_cpu(plain: Path) -> None:
    name = "cpu:session.use_env_allocators=0"
    verdict = onnxopt.validate(plain, plain, providers=[name])
    assert statuses(verdict, name) == ["passed"] * 2
    assert {p.provider for p in verdict.placements} == {name}
    assert {p.memcpy for p in verdict.placements} == {0}
    assert len(verdict.checks) == 2


# --- int8 on CUDA ---------------------------------------------------------------------

NO_INT8 = "ONNX Runtime's CUDA provider has no int8 Conv and no QLinear kernels"


def test_int8_for_a_gpu_that_is_not_there_is_foretold(
    stand_in: Callable[[str], Path],
) -> None:
    stand_in(NO_GPU)
    verdict = onnxopt.validate(QDQ, QDQ, providers=["cpu", "cuda"])
    for side in SIDES:
        assert (
            f"cuda was not run. {NO_INT8}: of the {side}, Conv 19, Gemm 1 between Q and "
            "DQ would run as float" in verdict.notes
        )


def test_int8_on_the_cpu_is_not_worth_a_note() -> None:
    verdict = onnxopt.validate(QDQ, QDQ)
    assert not any("int8" in note for note in verdict.notes)


def test_target_ort_cuda_says_what_becomes_of_int8(plain: Path) -> None:
    made = onnxopt.simplify(QDQ, target="ort-cuda", validate=False).report
    assert [note for note in made.notes if "int8" in note] == [
        f"target ort-cuda: {NO_INT8}: of the candidate, Conv 19, Gemm 1 between Q and DQ "
        "would run as float"
    ]
    for target, model in (("ort-cpu", QDQ), ("ort-cuda", plain)):
        made = onnxopt.simplify(model, target=target, validate=False).report
        assert not any("int8" in note for note in made.notes)


def test_int8_that_was_placed_is_told_as_it_ran(tmp_path: Path) -> None:
    """Dequantized layers on CUDA run as float, integer operators are not CUDA's."""
    body = """g (uint8[1, 4, 8, 8] x, float s, uint8 z, float[4, 4, 1, 1] w,
               int8[4, 4, 1, 1] v, float t, int8 o) => (float[1, 4, 8, 8] y) {
      d = DequantizeLinear (x, s, z)
      c = Conv (d, w)
      q = QuantizeLinear (c, s, z)
      i = QLinearConv (q, s, z, v, t, o, s, z)
      y = DequantizeLinear (i, s, z)
    }"""
    path = saved(tmp_path, body)
    ran = place(cuda={"Conv": 1, "QuantizeLinear": 1}, cpu={"QLinearConv": 1})
    assert list(int8_notes("cuda", {"candidate": path}, [ran])) == [
        f"cuda enable_all: {NO_INT8}; of the candidate, Conv 1 between Q and DQ ran as "
        f"float; {CPU} ran QLinearConv 1 of the candidate"
    ]
    assert list(int8_notes("cuda", {"candidate": path}, [])) == [
        f"cuda was not run. {NO_INT8}: of the candidate, Conv 1 between Q and DQ would "
        "run as float and QLinearConv 1 would be left to the CPU"
    ]
    assert list(int8_notes("tensorrt", {"candidate": path}, [ran])) == []


# --- the command line -----------------------------------------------------------------


def test_measure_prints_shares_and_keeps_them_out_of_the_verdict(
    plain: Path, tmp_path: Path, run: Run
) -> None:
    made = tmp_path / "verdict.json"
    code, shown, _ = run("validate", plain, plain, "--measure", "--json", made)
    assert code == 0
    lines = shown[shown.index("time in kernels") :].splitlines()
    assert " ".join(lines[1].split()) == "provider level model runs on ms a run share"
    assert [line.split()[:4] for line in lines[2:]] == [
        ["cpu", level, side, CPU] for level in LEVELS for side in SIDES
    ]
    assert all(line.endswith("100.0 %") for line in lines[2:])
    assert made.read_text() == as_json(onnxopt.validate(plain, plain))
    code, shown, error = run("validate", plain, plain, "--measure", "--json", "-")
    assert json.loads(shown)["status"] == "passed"
    assert "time in kernels" in error
    assert "time in" not in run("validate", plain, plain)[1]


def test_measure_of_a_transform_goes_to_the_terminal_and_the_timings(
    plain: Path, tmp_path: Path, run: Run
) -> None:
    timings, report = tmp_path / "t.json", tmp_path / "r.json"
    files = ("--timings", timings, "--report", report)
    code, shown, _ = run("simplify", plain, "--dry-run", "--measure", *files)
    assert code == 0
    assert "time in kernels" in shown
    found = json.loads(timings.read_text())
    assert set(found) == {"cpu_seconds", "provider_seconds"}
    assert [
        (t["level"], t["model"], t["runs_on"]) for t in found["provider_seconds"]
    ] == [(level, side, CPU) for level in LEVELS for side in SIDES]
    assert all(t["share"] == 1 and t["seconds"] > 0 for t in found["provider_seconds"])
    measured = report.read_text()
    assert run("simplify", plain, "--dry-run", "--report", report)[0] == 0
    assert report.read_text() == measured
    assert "second" not in measured
    code, shown, _ = run("simplify", plain, "--dry-run", "--timings", timings)
    assert set(json.loads(timings.read_text())) == {"cpu_seconds"}
    assert "time in" not in shown


def test_nothing_measured_is_said(plain: Path, run: Run) -> None:
    code, shown, _ = run("simplify", plain, "--dry-run", "--no-validate", "--measure")
    assert code == 0
    assert "no time was measured" in shown


def test_placement_is_shown_of_other_providers_and_of_the_cpu_on_request(
    plain: Path, run: Run, other: str
) -> None:
    _, shown, _ = run("validate", plain, plain)
    assert "Memcpy" not in shown
    _, shown, _ = run("validate", plain, plain, "-v")
    row = next(line for line in shown.splitlines() if line.endswith(f"{CPU} 3       0"))
    assert row.split() == ["cpu", "disable_all", "reference", CPU, "3", "0"]
    both = ("--provider", "cpu", "--provider", other)
    _, shown, _ = run("validate", plain, plain, *both)
    after = shown[shown.index("Memcpy") : shown.index("note: ")].splitlines()[1:]
    assert [line.split()[0] for line in after] == [other] * 4


def test_notes_on_other_providers_are_shown_unasked(
    plain: Path, run: Run, other: str
) -> None:
    """Of all notes these only: a fallback is not for those alone who ask for more."""
    both = ("--provider", "cpu", "--provider", other)
    _, shown, _ = run("validate", plain, plain, *both)
    notes = [line for line in shown.splitlines() if line.startswith("note: ")]
    assert f"note: {other} enable_all: no node of the candidate runs on {other}" in notes
    assert all(note.startswith(f"note: {other} ") for note in notes)
    _, shown, _ = run("validate", plain, plain, *both, "-v")
    assert "note: sizes of symbolic dims" in shown
    assert "note: " not in run("validate", plain, plain)[1]


def test_int8_that_would_run_as_float_is_shown_unasked(
    run: Run, stand_in: Callable[[str], Path]
) -> None:
    stand_in(NO_GPU)
    code, shown, _ = run(
        "validate", QDQ, QDQ, "--provider", "cpu", "--provider", "cuda:device_id=0"
    )
    assert code == 0
    assert f"note: cuda:device_id=0 was not run. {NO_INT8}" in shown


def test_the_model_has_what_the_notes_say() -> None:
    """Counts in the notes above come from this file, so hold them to it."""
    model = onnx.load(QDQ)
    made = {n.output[0]: n.op_type for n in model.graph.node if n.output}
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert all(made[n.input[0]] == "DequantizeLinear" for n in layers)
    assert len(layers) == 20


def test_codes_that_flip_are_no_errors_against_the_cpu() -> None:
    """Where the reference gives the very same codes on both, and the candidate others."""
    if AZURE not in runtime.available_providers():
        pytest.skip("this onnxruntime has the CPU's provider only")
    model = MODELS / "fashion_masked_qat.onnx"
    result = onnxopt.optimize(model, providers=[AZURE], on_failure="return")
    validation = result.report.validation
    assert validation is not None
    assert {check.status for check in validation.checks} == {"not_run"}
    (flipped,) = [
        check.outputs[0].max_abs.worst
        for check in validation.checks
        if (check.provider, check.level) == (f"{AZURE} against cpu", "enable_all")
    ]
    assert flipped, "no code flips: another model is needed"


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--provider", "cuda"], 4), (["--timeout", "0.001"], 5)],
    ids=["absent", "time-out"],
)
def test_validate_writes_its_json_also_where_there_is_no_verdict(
    tmp_path: Path, options: list[str], code: int
) -> None:
    if "CUDAExecutionProvider" in runtime.available_providers() and code == 4:
        pytest.skip("CUDA is there")
    model, target = str(MODELS / "fashion_float.onnx"), tmp_path / "verdict.json"
    with pytest.raises(SystemExit) as left:
        cli.main(["validate", model, model, *options, "--json", str(target)])
    assert left.value.code == code
    found = json.loads(target.read_text())
    assert found["status"] == "not_run"
    assert found["reason"]
