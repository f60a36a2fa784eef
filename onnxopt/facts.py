"""Measured facts of one model file for the report: digests, sizes, counts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from onnxopt import cost
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.report import Digest, Pair, Side
from onnxopt.save import Staged
from onnxopt.weights import pieces


def of_file(model: Model, path: Path) -> Side:
    """The facts of the file at `path`, which holds `model`.

    The digest of external data is over its files in the order of their locations.
    """
    data = model.weights.data_files()
    digest = Digest(_sha256([path]), _sha256(data) if data else None)
    size = Pair(os.path.getsize(path), sum(os.path.getsize(file) for file in data))
    return _side(model, digest, size)


def of_staged(model: Model, staged: Staged) -> Side:
    """The facts of a file that was just written, whose bytes were hashed on the way."""
    return _side(model, staged.digest, staged.bytes)


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
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:
                for piece in pieces(file.fileno(), 0, os.path.getsize(path)):
                    digest.update(piece)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()
