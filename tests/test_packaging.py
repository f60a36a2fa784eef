"""What is built, what is in it, and what importing it costs."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import onnxopt

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_COPIED = (".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "build", "dist")
HEAVY = ("numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "google.protobuf", "rich")


def python(
    *arguments: str, cwd: Path = ROOT, executable: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def done(*arguments: str, cwd: Path = ROOT, executable: str = sys.executable) -> str:
    result = python(*arguments, cwd=cwd, executable=executable)
    assert result.returncode == 0, result.stderr
    return result.stdout


def sources() -> set[str]:
    """The files that belong to the package, as the checkout has them."""
    folder = ROOT / "onnxopt"
    found = [*folder.rglob("*.py"), *(folder / "passes").rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in found}
    return names | {"onnxopt/py.typed", "onnxopt/schemas.json"}


# ---- the wheel and the source distribution ----


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, its link still a link, so that building leaves no trace."""
    target = tmp_path_factory.mktemp("checkout") / "onnxopt"
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    assert (target / "onnxopt" / "passes").is_symlink()
    return target


def build_wheel(source: Path, folder: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done("-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    done("-c", code, str(folder), cwd=checkout)
    (made,) = folder.glob("*.tar.gz")
    return made


def modules(names: Sequence[str]) -> set[str]:
    return {name for name in names if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert modules(names) == sources()
    assert "onnxopt/passes/simplify/dead_code.py" in names
    assert len(names) == len(set(names))


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {
            Path(name).name: name for name in archive.namelist() if "dist-info" in name
        }
        metadata = email.message_from_bytes(archive.read(names["METADATA"]))
        entry_points = archive.read(names["entry_points.txt"]).decode()
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {
        "cpu",
        "gpu",
        "test",
        "dev",
        "bench",
    }
    assert "LICENSE" in names
    assert "onnxopt = onnxopt.__main__:main" in entry_points
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert not any("onnxruntime" in item or "torch" in item for item in required)
    assert wheel.name == f"onnxopt-{PROJECT['version']}-py3-none-any.whl"


def test_the_source_distribution_gives_the_same_wheel(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        assert not [item.name for item in archive if not (item.isfile() or item.isdir())]
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for name in ("README.md", "LICENSE", "pyproject.toml", "onnxopt/passes/__init__.py"):
        assert (source / name).is_file()
    again = build_wheel(source, tmp_path / "wheel")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        assert modules(one.namelist()) == modules(other.namelist())
        for name in modules(one.namelist()):
            assert one.read(name) == other.read(name)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh environment with the wheel; its dependencies are those that run this."""
    folder = tmp_path_factory.mktemp("installed")
    done("-m", "venv", "--without-pip", str(folder))
    executable = str(folder / "bin" / "python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(done("-c", code, executable=executable).strip())
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--target"]
    done("-m", "pip", "install", *options, str(site), str(wheel))
    # paths that a .pth names come after what is installed, and their own are not read
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(paths))
    return executable


def test_an_installed_wheel_can_be_used(installed: str, tmp_path: Path) -> None:
    code = (
        "import onnxopt, onnxopt.passes, onnxopt.api\n"
        "from onnxopt.recipe import load_recipe\n"
        "print(onnxopt.__file__, len(load_recipe('default')[0]))"
    )
    file, count = done("-c", code, executable=installed, cwd=tmp_path).split()
    assert Path(file).is_relative_to(Path(installed).parent.parent)
    assert int(count) > 3
    version = done("-m", "onnxopt", "--version", executable=installed, cwd=tmp_path)
    assert PROJECT["version"] in version
    listed = done("-m", "onnxopt", "passes", executable=installed, cwd=tmp_path)
    assert "fold-batch-norm" in listed


# ---- the checkout ----


def test_passes_is_imported_by_its_right_name() -> None:
    result = python("-c", "import passes")
    assert result.returncode != 0
    assert "ImportError: import onnxopt.passes, not passes" in result.stderr
    done("-c", "import onnxopt.passes")


def test_there_is_one_version() -> None:
    assert PROJECT["version"] == onnxopt.__version__
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_all_that_is_public_can_be_imported() -> None:
    for name in onnxopt.__all__:
        assert getattr(onnxopt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        onnxopt.quantise  # noqa: B018


# ---- what importing costs ----

IMPORTS = f"""
import runpy, sys
sys.argv = ["onnxopt", *sys.argv[1:]]
try:
    runpy.run_module("onnxopt", run_name="__main__")
except SystemExit as exit:
    assert not exit.code, exit.code
print("LOADED", [name for name in {HEAVY} if name in sys.modules])
"""
VERBS = [
    *("", "optimize", "simplify", "shrink", "validate"),
    *("inspect", "diff", "bench", "passes"),
]


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy(verb: str) -> None:
    output = done("-c", IMPORTS, *([verb] if verb else []), "--help")
    assert "Usage: onnxopt" in output
    assert output.splitlines()[-1] == "LOADED []"


def test_the_installed_command_shows_help_likewise(tmp_path: Path) -> None:
    """`onnxopt --help` calls the function that pyproject.toml names."""
    assert PROJECT["scripts"] == {"onnxopt": "onnxopt.__main__:main"}
    code = IMPORTS.replace(
        'runpy.run_module("onnxopt", run_name="__main__")',
        "from onnxopt.__main__ import main; main()",
    )
    assert done("-c", code, "--help").splitlines()[-1] == "LOADED []"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import onnxopt, sys; print([n for n in {HEAVY} if n in sys.modules])"
    assert done("-c", code).strip() == "[]"


def test_using_the_library_does_not_import_onnxruntime() -> None:
    """It belongs to the workers: a crash of it must not take the caller along."""
    code = "import onnxopt, sys; onnxopt.optimize; print('onnxruntime' in sys.modules)"
    assert done("-c", code).strip() == "False"


def test_the_library_logs_to_a_null_handler_and_prints_nothing(tmp_path: Path) -> None:
    code = (
        "import logging, onnx, onnxopt\n"
        "model = onnx.parser.parse_model('<ir_version: 8, opset_import: [\"\": 17]>'\n"
        "    'g (float[N] x) => (float[N] y) { i = Identity(x) y = Relu(i) }')\n"
        "result = onnxopt.optimize(model, validate=False)\n"
        "result.save('out.onnx')\n"
        "assert result.report.passes\n"
    )
    result = python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
