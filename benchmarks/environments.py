"""Environments with pinned packages, beside the project's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CACHE = Path.home() / ".cache" / "onnxopt"

_VERSIONS = """
import json
from importlib import metadata
print(json.dumps({d.name.lower(): d.version for d in metadata.distributions()}))
"""


def build(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of an environment with these packages; made where it is not there.

    A package is NAME==VERSION. Other packages of an environment that is there stay.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    missing = [package for package in packages if not _has(python, package)]
    if missing:
        install = [str(python), "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(install, check=True)
    return python


def _has(python: Path, package: str) -> bool:
    done = subprocess.run([str(python), "-c", _VERSIONS], capture_output=True, check=True)
    name, version = package.split("==")
    return json.loads(done.stdout).get(name, "").partition("+")[0] == version
