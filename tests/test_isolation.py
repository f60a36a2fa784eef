"""What a model does to ONNX Runtime stays in its worker: the caller is told, and lives.

A model that crashes, one that takes memory without end and one that never returns, as
reference and as candidate, through the functions and through the command line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxopt
from onnxopt.errors import (
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
    WorkerTimeoutError,
)

ROOT = Path(__file__).resolve().parent.parent
# The rounds are a constant: an input would be fed with made-up numbers.
MODEL = """<ir_version: 8, opset_import: ["": 17]>
{name} (float[4] x) => (float[m] y) <int64 n = {{{rounds}}}, bool c = {{1}}> {{
  y = Loop (n, c, x) <body = b (int64 i, bool cc, float[p] v) => (bool co, float[q] w) {{
    co = Identity (cc)
    w = {step}
  }}>
}}"""
MODELS = {
    "good": (3, "Identity (v)"),
    "crash": (3, "Identity (v)"),
    "grow": (2**60, "Concat <axis = 0> (v, v)"),
    "hang": (2**60, "Identity (v)"),
}
LIMIT = 512 << 20
GIVEN = [{"x": np.ones(4, np.float32)}]

# Run by every worker as it starts: it leaves its number, and a run of the model "crash"
# reads from address 0. The command line has no limit of memory, so one comes from here.
SHIM = """
import os, sys
if "onnxopt._worker" in sys.orig_argv:
    here = os.path.dirname(__file__)
    with open(os.path.join(here, "pids"), "a") as file:
        print(os.getpid(), file=file)
    import ctypes, onnxruntime
    plain = onnxruntime.InferenceSession.run
    def run(self, *args):
        if self.get_modelmeta().graph_name == "crash":
            ctypes.string_at(0)
        return plain(self, *args)
    onnxruntime.InferenceSession.run = run
    if room := os.environ.get("ROOM"):
        import resource
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + int(room),) * 2)
"""

# What goes wrong: the error, its words, and the options that the functions need.
Case = tuple[type[WorkerError], str, dict[str, Any]]
CRASH: Case = (WorkerCrashedError, "was killed by SIGSEGV", {})
GROW: Case = (WorkerMemoryError, "out of memory", {"memory_limit": LIMIT})
HANG: Case = (WorkerTimeoutError, "no answer within 2 s", {"timeout": 2})
CASES = {"crash": CRASH, "grow": GROW, "hang": HANG}


@pytest.fixture
def nothing_left(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """To be called at the end: workers have run, and none, nor a file, is left of them.

    Installs the shim for workers of this process and of those that it starts.
    """
    shim, spare = tmp_path_factory.mktemp("shim"), tmp_path_factory.mktemp("spare")
    (shim / "sitecustomize.py").write_text(SHIM)
    monkeypatch.syspath_prepend(str(shim))
    monkeypatch.setenv("PYTHONPATH", str(shim))
    monkeypatch.setenv("TMPDIR", str(spare))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def check() -> None:
        pids = [int(line) for line in (shim / "pids").read_text().split()]
        assert pids
        assert not [pid for pid in pids if alive(pid)]
        # Where there is an .ses, it is onnxruntime's own.
        assert {path.name for path in spare.iterdir()} <= {".ses"}

    return check


def alive(pid: int) -> bool:
    """Whether the process is there; one that ended and was not waited for is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def model(name: str) -> onnx.ModelProto:
    rounds, step = MODELS[name]
    return onnx.parser.parse_model(MODEL.format(name=name, rounds=rounds, step=step))


def assert_next_call_works() -> None:
    assert onnxopt.validate(model("good"), model("good")).status == "passed"


def assert_names(error: WorkerError, side: str, case: Case) -> None:
    assert type(error) is case[0]
    assert error.exit_code == 5
    assert str(error).startswith(f"{side}: ")
    assert case[1] in str(error)
    assert "\n" not in str(error)


# ---- functions ----


@pytest.mark.parametrize("how", CASES)
def test_validate_says_what_the_candidate_did(
    nothing_left: Callable[[], None], how: str
) -> None:
    with pytest.raises(WorkerError) as caught:
        onnxopt.validate(model("good"), model(how), **CASES[how][2])
    assert_names(caught.value, "candidate", CASES[how])
    assert_next_call_works()
    nothing_left()


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_validate_says_what_the_reference_did(
    nothing_left: Callable[[], None], how: str
) -> None:
    """On given feeds: made-up ones are tried on the reference before, as below."""
    with pytest.raises(WorkerError) as caught:
        onnxopt.validate(model(how), model("good"), data=GIVEN, **CASES[how][2])
    assert_names(caught.value, "reference", CASES[how])
    assert_next_call_works()
    nothing_left()


def test_a_reference_that_takes_all_memory_leaves_the_question_open(
    nothing_left: Callable[[], None],
) -> None:
    verdict = onnxopt.validate(
        model("grow"), model("good"), data=GIVEN, memory_limit=LIMIT
    )
    assert verdict.status == "not_run"
    assert {check.status for check in verdict.checks} == {"not_run"}
    assert "reference: " in (verdict.reason or "")
    assert "out of memory" in (verdict.reason or "")
    assert_next_call_works()
    nothing_left()


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_optimize_of_a_model_that_does_it(
    nothing_left: Callable[[], None], how: str
) -> None:
    source = model(how)
    with pytest.raises(WorkerError) as caught:
        onnxopt.optimize(source, **CASES[how][2])
    assert_names(caught.value, "reference", CASES[how])
    report = caught.value.report
    assert report is not None
    assert report.validation is not None
    assert report.validation.status == "not_run"
    assert source == model(how)
    assert_next_call_works()
    nothing_left()


def test_optimize_of_a_model_that_takes_all_memory(
    nothing_left: Callable[[], None],
) -> None:
    result = onnxopt.optimize(model("grow"), memory_limit=LIMIT)
    assert result.report.validation is not None
    assert result.report.validation.status == "not_run"
    assert "out of memory" in (result.report.validation.reason or "")
    with pytest.raises(
        WorkerError, match=r"not proven: reference: .* out of memory"
    ) as no:
        onnxopt.optimize(model("grow"), memory_limit=LIMIT, require_validation=True)
    assert no.value.exit_code == 5
    assert_next_call_works()
    nothing_left()


# ---- command line ----


def command(folder: Path, verb: str, *names: str) -> subprocess.CompletedProcess[str]:
    """Run a verb over models, which it finds in `folder`, and say how it ended."""
    for name in names:
        if name in MODELS:
            onnx.save(model(name), folder / name)
    line = [sys.executable, "-m", "onnxopt", verb]
    line += [str(folder / name) if name[0] != "-" else name for name in names]
    line += ["--timeout", "2"] if "hang" in names else []
    return subprocess.run(
        line,
        cwd=ROOT,
        env=os.environ | ({"ROOM": str(LIMIT)} if "grow" in names else {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_ended(ran: subprocess.CompletedProcess[str], side: str, how: str) -> None:
    assert ran.returncode == 5
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith(f"onnxopt: error: {side}: ")
    assert CASES[how][1] in ran.stderr


@pytest.mark.parametrize("how", CASES)
def test_command_validate_says_what_the_candidate_did(
    nothing_left: Callable[[], None], tmp_path: Path, how: str
) -> None:
    assert_ended(command(tmp_path, "validate", "good", how), "candidate", how)
    assert names_in(tmp_path) == {"good", how}
    nothing_left()


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_command_optimize_writes_nothing(
    nothing_left: Callable[[], None], tmp_path: Path, how: str
) -> None:
    ran = command(tmp_path, "optimize", how, "-o", "out.onnx")
    assert_ended(ran, "reference", how)
    assert names_in(tmp_path) == {how}
    nothing_left()


def test_command_with_a_model_that_takes_all_memory(
    nothing_left: Callable[[], None], tmp_path: Path
) -> None:
    """Written with a warning, for exact passes; not where a proof is required."""
    ran = command(tmp_path, "validate", "grow", "good")
    assert ran.returncode == 5
    assert "validation: not run" in ran.stdout
    wanted = ("optimize", "grow", "-o", "out.onnx")
    ran = command(tmp_path, *wanted, "--require-validation")
    assert ran.returncode == 5
    assert "not proven: reference: " in ran.stderr
    assert names_in(tmp_path) == {"good", "grow"}
    ran = command(tmp_path, *wanted)
    assert ran.returncode == 0
    assert ran.stderr.startswith("onnxopt: warning: not validated")
    assert "out of memory" in ran.stderr
    assert names_in(tmp_path) == {"good", "grow", "out.onnx"}
    nothing_left()
