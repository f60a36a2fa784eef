"""What a run does not import: start-up is most of what a small model costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from onnxopt.passes import PASSES

NOT_NEEDED = (
    *("onnxruntime", "yaml", "rich", "onnx_graphsurgeon"),
    *("onnx.reference", "onnx.version_converter", "onnx.printer"),
    *("onnxopt.runtime", "onnxopt.prepare", "onnxopt.latency", "onnxopt.blame"),
    *("onnxopt.data", "onnxopt.channels", "onnxopt.inspection", "onnxopt.differences"),
    *("onnxopt.validation.judge", "onnxopt.validation.placement"),
    *("onnxopt.passes.shrink.dead_layers", "onnxopt.passes.qdq.fold_qdq_weights"),
)
API = "import onnxopt; onnxopt.simplify('in.onnx', validate=False).save('out.onnx')"
COMMAND = (
    "from onnxopt.cli import cli\n"
    "try:\n"
    "    cli.main(['simplify', 'in.onnx', '-o', 'out.onnx', '--no-validate'])\n"
    "except SystemExit as exit:\n"
    "    assert not exit.code\n"
)


def loaded(code: str, folder: Path) -> set[str]:
    """The modules that a process has imported after `code`."""
    shown = f"{code}\nimport sys; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", shown],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
    )


@pytest.mark.parametrize("code", [API, COMMAND], ids=["api", "command"])
def test_a_run_without_validation_imports_only_what_it_needs(
    code: str, tmp_path: Path
) -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]>'
        "g (float[N] x) => (float[N] y) { i = Identity(x) y = Relu(i) }"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "in.onnx")
    needless = set(NOT_NEEDED) & (
        loaded(code, tmp_path) - loaded("import onnx", tmp_path)
    )
    assert needless == set()
    assert (tmp_path / "out.onnx").exists()


def test_the_names_of_passes_are_known_without_importing_them(tmp_path: Path) -> None:
    code = "from onnxopt.passes import PASSES; list(PASSES), 'cse' in PASSES, len(PASSES)"
    assert not any(name.startswith("onnxopt.passes.") for name in loaded(code, tmp_path))


def test_each_pass_is_found_by_the_name_that_it_has() -> None:
    assert {name: kind.name for name, kind in PASSES.items()} == {n: n for n in PASSES}
    with pytest.raises(KeyError):
        PASSES["nothing"]
