"""How commands end where something breaks: workers that die, pipes, bugs, odd names.

A stand-in for onnxruntime goes before the real one on the workers' import path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxopt import runtime
from onnxopt.cli import cli
from onnxopt.cli.outcome import INTERNAL_ERROR
from onnxopt.cli.terminal import Table, plain
from onnxopt.report import Report

ROOT = Path(__file__).resolve().parent.parent
MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n,3] x) => (float[n,3] y) { t = Identity(x) y = Relu(t) }"""

# The real onnxruntime, except that making a session first does {action}.
STAND_IN = """
import os, sys, time
sys.path.remove(os.path.dirname(__file__))
del sys.modules["onnxruntime"]
import onnxruntime
real = onnxruntime.InferenceSession
def make(model, *args, **kwargs):
    candidate = isinstance(model, str) and model.endswith(".tmp")
    {action}
    return real(model, *args, **kwargs)
onnxruntime.InferenceSession = make
"""

Stand = Callable[[str], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


@pytest.fixture
def stand_in(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stand]:
    """Puts the given code before onnxruntime for every worker that starts."""

    def install(code: str) -> None:
        folder = tmp_path_factory.mktemp("stand-in")
        (folder / "onnxruntime.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))

    runtime.available_providers.cache_clear()
    yield install
    runtime.available_providers.cache_clear()


def run(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, list[str]]:
    """The exit code, stdout, and the lines on stderr."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = left.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err.strip().splitlines()


# ---- workers ----


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("candidate and os.abort()", "SIGABRT"),
        ("candidate and os._exit(3)", "exit code 3"),
        ("candidate and time.sleep(60)", "no answer within"),
        ("if candidate: raise MemoryError", "out of memory"),
    ],
    ids=["signal", "exit", "time", "memory"],
)
def test_a_worker_that_dies_of_the_candidate(
    capsys: pytest.CaptureFixture[str],
    stand_in: Stand,
    model: Path,
    tmp_path: Path,
    action: str,
    text: str,
) -> None:
    stand_in(STAND_IN.format(action=action))
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    code, _, errors = run(
        capsys, "optimize", model, "-o", out, "--report", made, "--timeout", 3
    )
    assert code == 5
    assert len(errors) == 1
    assert errors[0].startswith("onnxopt: error: ")
    assert "candidate" in errors[0]
    assert text in errors[0]
    report = json.loads(made.read_text())
    assert report["validation"]["status"] == "not_run"
    assert text in report["validation"]["reason"]
    assert {path.name for path in tmp_path.iterdir()} == {made.name, model.name}


def test_a_reference_that_needs_too_much_memory_is_not_run(
    capsys: pytest.CaptureFixture[str], stand_in: Stand, model: Path, tmp_path: Path
) -> None:
    stand_in(STAND_IN.format(action="raise MemoryError"))
    out = tmp_path / "out.onnx"
    code, shown, errors = run(capsys, "optimize", model, "-o", out)
    assert code == 0
    assert out.exists()
    assert "validation: not run" in shown
    assert errors[0].startswith("onnxopt: warning: ")
    assert "memory" in errors[0]


def test_without_onnxruntime(
    capsys: pytest.CaptureFixture[str], stand_in: Stand, model: Path, tmp_path: Path
) -> None:
    stand_in("raise ImportError('there is none')\n")
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    code, _, errors = run(capsys, "optimize", model, "-o", out, "--report", made)
    assert code == 4
    assert len(errors) == 1
    assert "pip install 'onnxopt[cpu]'" in errors[0]
    assert not out.exists()
    assert json.loads(made.read_text())["validation"]["status"] == "not_run"
    code, _, errors = run(capsys, "optimize", model, "-o", out, "--no-validate")
    assert code == 0
    assert out.exists()
    assert errors == ["onnxopt: warning: not validated: the result is not proven"]


def test_validate_of_what_runs_nowhere_proves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
    g (float[n] x) => (float[n] y) { y = acme.Rocket(x) }"""
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    code, shown, _ = run(capsys, "validate", path, path)
    assert code == 5
    assert "validation: not run" in shown


# ---- where things may be written ----


@pytest.mark.parametrize(
    "arguments",
    [
        ("-o", "{folder}"),
        ("-o", "/dev/null"),
        ("-o", "{folder}/out.onnx", "--report", "/dev/full"),
        ("-o", "{folder}/out.onnx", "--report", "{folder}/out.onnx"),
        ("-o", "{folder}/out.onnx", "--report", "{folder}/none/r.json"),
        ("-o", "{folder}/out.onnx", "--report", "{folder}"),
        ("-o", "{folder}/out.onnx", "--timings", "{model}"),
        ("-o", "{folder}/out.onnx", "--recipe", "default", "--passes", ""),
        ("-o", "{folder}/out.onnx", "--provider", "toaster"),
        ("-o", "{folder}/out.onnx", "--provider", "cpu:fast"),
        ("-o", "{folder}/out.onnx", "--metric", "{folder}/none.py:f"),
        ("-o", "{folder}/out.onnx", "--print-after", "toast"),
        ("-o", "{folder}/out.onnx", "--input-shape", "x:1,2,3"),
        ("-o", "{folder}/out.onnx", "--input-shape", "x:1,a"),
        ("-o", "{folder}/out.onnx", "--input-shape", "x:1,3", "--input-shape", "x:2,3"),
    ],
)
def test_what_cannot_be_done_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.setattr("onnxopt.api.PassManager.run", None)  # no pass may run
    before = model.read_bytes()
    given = [text.format(folder=tmp_path, model=model) for text in arguments]
    code, shown, errors = run(capsys, "optimize", model, *given)
    assert (code, shown, len(errors)) == (2, "", 1)
    assert errors[0].startswith("onnxopt: error: ")
    assert [path.name for path in tmp_path.iterdir()] == [model.name]
    assert model.read_bytes() == before
    assert not Path("/dev/null").is_file()


def save_external(path: Path, values: list[float]) -> Path:
    """A model whose weight is in `weights.bin`."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,2] x) => (float[n,2] y) { t = Identity(x) y = MatMul(t, W) }"""
    proto = onnx.parser.parse_model(text)
    weight = proto.graph.initializer.add(name="W", data_type=1, dims=[2, 2])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    path.parent.mkdir(exist_ok=True)
    path.with_name("weights.bin").write_bytes(np.array(values, np.float32).tobytes())
    onnx.save(proto, path)
    return path


@pytest.fixture
def external(tmp_path: Path) -> Path:
    return save_external(tmp_path / "model.onnx", [1, 2, 3, 4])


def test_the_weights_of_the_input_are_not_overwritten(
    capsys: pytest.CaptureFixture[str], external: Path
) -> None:
    data = external.with_name("weights.bin")
    before = data.read_bytes()
    assert len(before) == 16
    code, _, errors = run(capsys, "optimize", external, "-o", data)
    assert code == 2
    assert "holds weights of the input" in errors[0]
    assert data.read_bytes() == before


def test_data_files_go_with_the_model_that_they_belong_to(
    capsys: pytest.CaptureFixture[str], external: Path
) -> None:
    """The input's own file is not ours and stays."""
    assert run(capsys, "optimize", external, "-o", external)[0] == 0
    first = {path.name for path in external.parent.iterdir()}
    assert len(first) == 3
    assert run(capsys, "optimize", external, "-o", external, "--opset", 18)[0] == 0
    assert {path.name for path in external.parent.iterdir()} == first
    other = save_external(external.parent / "other" / "m.onnx", [5, 6, 7, 8])
    assert run(capsys, "optimize", other, "-o", external)[0] == 0
    second = {path.name for path in external.parent.iterdir()} - {"other"}
    assert len(second) == 3
    assert second & first == {"model.onnx", "weights.bin"}
    assert onnx.numpy_helper.to_array(onnx.load(external).graph.initializer[0])[0, 0] == 5


def test_a_report_that_fails_keeps_the_model_away(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    tmp_path: Path,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxopt.cli.document.os.fsync", full)
    monkeypatch.setattr("onnxopt.save._sync", lambda file: file.flush())
    out, made = tmp_path / "out.onnx", tmp_path / "report.json"
    command = ("optimize", model, "-o", out, "--report", made, "--no-validate")
    code, _, errors = run(capsys, *command)
    assert code == 2
    assert errors == [f"onnxopt: error: cannot write {made}: No space left on device"]
    assert [path.name for path in tmp_path.iterdir()] == [model.name]


def test_timings_have_a_file_of_their_own(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    made, report = tmp_path / "t.json", tmp_path / "r.json"
    code, shown, _ = run(
        capsys,
        *("simplify", model, "--dry-run", "--no-validate", "--time-passes"),
        *("--timings", made, "--report", report),
    )
    assert code == 0
    assert "CPU seconds" in shown
    assert "identity" in json.loads(made.read_text())["cpu_seconds"]
    assert "seconds" not in report.read_text()
    assert Report(**json.loads(report.read_text())).schema == 1


# ---- the process ----


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnxopt", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        timeout=120,
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )


def test_exit_codes_of_the_process(model: Path, tmp_path: Path) -> None:
    assert process("inspect", model, stdout=subprocess.PIPE).returncode == 0
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    ran = process("inspect", bad, stdout=subprocess.PIPE)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert len(ran.stderr.splitlines()) == 1
    ran = process(stdout=subprocess.PIPE)
    assert ran.returncode == 2
    assert "Usage: onnxopt" in ran.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_stdout_that_is_full_or_gone(model: Path) -> None:
    with open("/dev/full", "w") as full:
        ran = process("inspect", model, "--json", "-", stdout=full)
        assert ran.returncode == 2
        assert len(ran.stderr.splitlines()) == 1
        assert "No space left" in ran.stderr
        assert process("inspect", model, stdout=full).returncode == 2
    reader, writer = os.pipe()
    os.close(reader)
    ran = process("inspect", model, stdout=writer)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_bug_is_told_as_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.setattr("onnxopt.inspection.survey._inspect", lambda *_: 1 / 0)
    code, _, errors = run(capsys, "inspect", model)
    assert code == INTERNAL_ERROR
    assert len(errors) == 1
    assert "internal error, ZeroDivisionError" in errors[0]


def test_names_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    proto = onnx.parser.parse_model(MODEL)
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "x\x1b[2J\nonnxopt: error"
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    code, shown, _ = run(capsys, "inspect", path)
    assert code == 0
    assert "\x1b" not in shown
    assert "x?[2J?onnxopt: error" in shown


def test_tables_are_in_columns() -> None:
    table = Table(("name", "count"))
    table.add("long name", "7")
    table.add("n", "12,345")
    assert plain(table) == ["name        count", "long name       7", "n          12,345"]


def test_a_terminal_gets_the_same_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    _, expected, _ = run(capsys, "inspect", model)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    _, shown, _ = run(capsys, "inspect", model)
    assert shown.split() == expected.split()
