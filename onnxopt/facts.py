"""Measured facts of one model file for the report: digests, sizes, counts.

Hashing takes as long as all else for a model of few nodes and many weights, so the
digests of a result that nobody judges are made when somebody asks for the report.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from onnxopt import cost
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.report import Digest, Pair, Side
from onnxopt.save import Staged
from onnxopt.weights import pieces

NOT_HASHED = Digest("", None)


def of_file(model: Model, path: Path, *, hashes: bool = True) -> Side:
    """The facts of the file at `path`, which holds `model`.

    The digest of external data is over its files in the order of their locations;
    unless it `hashes` there is none.
    """
    data = model.weights.data_files()
    digest = NOT_HASHED
    if hashes:
        digest = Digest(_sha256([path]), _sha256(data) if data else None)
    size = Pair(os.path.getsize(path), sum(os.path.getsize(file) for file in data))
    return _side(model, digest, size)


def of_staged(model: Model, staged: Staged) -> Side:
    """The facts of a file that was just written, whose bytes were hashed on the way."""
    return _side(model, staged.digest, staged.bytes)


def digest_of_source(model: Model) -> Digest:
    """The digest of the file that `model` was opened from, and of its external data.

    Read from the files that are still open, whatever lies at their paths by now. Raises
    UsageError where one has changed.
    """
    files = model.weights.open_files()
    made = Digest(_digest(files[:1]), _digest(files[1:]) if files[1:] else None)
    model.weights.check_unchanged()
    return made


def _side(model: Model, digest: Digest, size: Pair) -> Side:
    return Side(
        sha256=digest,
        bytes=size,
        nodes=cost.nodes(model),
        parameters=cost.parameters(model),
        macs=cost.macs(model),
        opset={
            entry.domain or "ai.onnx": entry.version for entry in model.proto.opset_import
        },
    )


def _sha256(paths: Iterable[Path]) -> str:
    with contextlib.ExitStack() as stack:
        files = []
        for path in paths:
            try:
                files.append(stack.enter_context(open(path, "rb", buffering=0)).fileno())
            except OSError as error:
                raise UsageError(f"cannot read {path}: {error.strerror}") from None
        return _digest(files)


def _digest(files: Iterable[int]) -> str:
    """Over the contents of open files, one after the other."""
    import hashlib  # slow, and for most results not needed

    digest = hashlib.sha256()
    for file in files:
        for piece in pieces(file, 0, os.fstat(file).st_size):
            digest.update(piece)
    return digest.hexdigest()
