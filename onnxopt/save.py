"""Writing a model: streamed, complete or not at all.

A model is staged first, under temporary names beside its target, where it can be
loaded and judged; `commit` makes it appear by one rename. Weights stream from where
they lie into the file, so they never have to fit in memory.

Weights that were external data stay external, in `<stem>-<12 hex of sha256>.data`, and
so do the large ones of any model that would pass protobuf's limit of 2 GiB.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from onnx import GraphProto, ModelProto, TensorProto

from onnxopt import attributes, files, wire
from onnxopt.errors import InvalidModelError
from onnxopt.model import Model
from onnxopt.report import Digest, Pair
from onnxopt.weights import Place, WeightStore, place, set_place, tensor_bytes

PROTOBUF_LIMIT = (1 << 31) - (1 << 20)
ALIGNMENT = 4096
"""Payloads that fill a page start on one, so that runtimes can map them."""


class Staged:
    """A complete model under temporary names; `commit` or `discard` it.

    As a context manager it is discarded on the way out unless it was committed. `keep`
    names data files that outlive the model that is replaced.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = files.beside(target)
        self.data_path: Path | None = None
        self.digest = Digest("", None)
        self.bytes = Pair(0, 0)
        self.keep: Iterable[Path] = ()
        self._data: files.Claim | None = None

    def commit(self) -> None:
        """Let the model appear at its target. Raises UsageError."""
        with files.locked(self.target.parent):
            stale = _own_data_files(self.target)
            try:
                os.replace(self.path, self.target)
            except OSError as error:
                self.discard()
                raise files.cannot_write(self.target, error) from None
            needed = {path.resolve() for path in self.keep}
            needed |= {self.data_path.resolve()} if self.data_path else set()
            for path in stale:
                if path.resolve() not in needed:
                    files.remove_unclaimed(path)
            self._release()
        files.sync_folder(self.target.parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        self.path.unlink(missing_ok=True)
        if self._data is not None:
            self._data.withdraw()
            self._data = None

    def claim(self, data: files.Claim) -> None:
        """Take over the data file that this model refers to."""
        self._data, self.data_path = data, data.path

    def _release(self) -> None:
        if self._data is not None:
            self._data.release()
            self._data = None

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def stage(model: Model, target: Path) -> Staged:
    """Write `model` beside `target`, ready to be judged and committed.

    Raises UsageError where the folder cannot be written or the disk is full.
    """
    files.check_target(target)
    model.settle()
    staged = Staged(target)
    try:
        shell = ModelProto()
        shell.CopyFrom(model.proto)
        moved = _moved_outside(shell, model)
        if moved:
            _write_data(staged, moved, model.weights)
        _inline_inner(shell, model.weights)
        _write_model(staged, shell, model.weights)
        model.weights.check_unchanged()
    except OSError as error:
        staged.discard()
        raise files.cannot_write(target, error) from None
    except BaseException:
        staged.discard()
        raise
    return staged


def to_proto(model: Model) -> ModelProto:
    """A self-contained copy of a model of less than 2 GiB."""
    model.settle()
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in tensors(proto):
        if place(tensor) is not None:
            _inline(tensor, model.weights)
    return proto


def fits_in_protobuf(model: Model) -> bool:
    """Whether one protobuf message can hold the model and all its weights."""
    return model.bytes() < PROTOBUF_LIMIT


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every dense tensor that can lie outside: initializers, attributes, all scopes."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[object]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:  # type: ignore[attr-defined]
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for _, graph in attributes.subgraphs(node):  # type: ignore[arg-type]
            yield from _graph_tensors(graph)


# ---- external data ----


def _moved_outside(shell: ModelProto, model: Model) -> list[TensorProto]:
    """The tensors that go to a data file: all that were there, or too large together."""
    found = [tensor for tensor in tensors(shell) if place(tensor) is not None]
    was_outside = any(not _is_internal(tensor) for tensor in found)
    if not was_outside and fits_in_protobuf(model):
        return []
    if was_outside and fits_in_protobuf(model):
        return [tensor for tensor in found if not _is_source(tensor)]
    large = [t for t in tensors(shell) if tensor_bytes(t) >= wire.MIN_PAYLOAD]
    return [t for t in large if t.data_type != TensorProto.STRING]


def _is_internal(tensor: TensorProto) -> bool:
    where = place(tensor)
    return where is not None and where.location.startswith("\0")


def _is_source(tensor: TensorProto) -> bool:
    where = place(tensor)
    return where is not None and where.location == "\0source"


def _write_data(staged: Staged, moved: list[TensorProto], weights: WeightStore) -> None:
    """Write the data file, and let the tensors name it."""
    temporary = files.beside(staged.target)
    digest = hashlib.sha256()
    known: dict[Place, tuple[int, int]] = {}
    spots: list[tuple[int, int]] = []
    try:
        with _create(temporary) as file:
            for tensor in moved:
                where = place(tensor)
                spot = known.get(where) if where is not None else None
                if spot is None:
                    spot = _append(file, digest, tensor, weights)
                    if where is not None:
                        known[where] = spot  # tied payloads stay one
                spots.append(spot)
            _sync(file)
            size = file.tell()
            name = f"{staged.target.stem}-{digest.hexdigest()[:12]}.data"
            place_at = staged.target.with_name(name)
            staged.claim(files.Claim(file, temporary, place_at))
    finally:
        temporary.unlink(missing_ok=True)
    for tensor, (offset, length) in zip(moved, spots, strict=True):
        for field in ("float_data", "int32_data", "int64_data", "double_data"):
            tensor.ClearField(field)
        tensor.ClearField("uint64_data")
        set_place(tensor, Place(name, offset, length))
    staged.digest = Digest("", digest.hexdigest())
    staged.bytes = Pair(0, size)


def _append(
    file: BinaryIO, digest: hashlib._Hash, tensor: TensorProto, weights: WeightStore
) -> tuple[int, int]:
    length = tensor_bytes(tensor)
    step = ALIGNMENT if length >= ALIGNMENT else 16
    padding = bytes(-file.tell() % step)
    for chunk in itertools.chain((padding,), weights.chunks(tensor)):
        file.write(chunk)
        digest.update(chunk)
    return file.tell() - length, length


# ---- the model file ----


def _inline_inner(shell: ModelProto, weights: WeightStore) -> None:
    """Inline what the streaming writer does not reach: tensors in inner scopes."""
    outer = {id(tensor) for tensor in shell.graph.initializer}
    for tensor in tensors(shell):
        if id(tensor) not in outer and _is_internal(tensor):
            _inline(tensor, weights)


def _inline(tensor: TensorProto, weights: WeightStore) -> None:
    payload = weights.read(tensor)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = payload


def _write_model(staged: Staged, shell: ModelProto, weights: WeightStore) -> None:
    digest, size = hashlib.sha256(), 0
    with _create(staged.path) as file:
        for part in _parts(shell.SerializeToString(deterministic=True)):
            for chunk in (part,) if isinstance(part, bytes) else weights.chunks(part):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        _sync(file)
    staged.digest = Digest(digest.hexdigest(), staged.digest.data)
    staged.bytes = Pair(size, staged.bytes.data)


Part = bytes | TensorProto
"""A piece of the file: bytes as they are, or a tensor whose payload stands there."""


def _parts(data: bytes) -> Iterator[Part]:
    """The serialized shell with the payloads back in their places."""
    file = io.BytesIO(data)
    for field in wire.fields(file, 0, len(data)):
        if field.number != wire.MODEL_GRAPH:
            yield data[field.start : field.end]
            continue
        parts = list(_graph_parts(file, data, field))
        length = sum(len(p) if isinstance(p, bytes) else tensor_bytes(p) for p in parts)
        yield wire.header(wire.MODEL_GRAPH, length)
        yield from parts


def _graph_parts(file: BinaryIO, data: bytes, graph: wire.Field) -> Iterator[Part]:
    copied = graph.value
    for field in wire.fields(file, graph.value, graph.end):
        if field.number != wire.GRAPH_INITIALIZER:
            continue
        tensor = TensorProto.FromString(data[field.value : field.end])
        if not _is_internal(tensor):
            continue
        yield data[copied : field.start]
        copied = field.end
        rest = TensorProto()
        rest.CopyFrom(tensor)
        rest.ClearField("external_data")
        rest.ClearField("data_location")
        length = tensor_bytes(tensor)
        head = rest.SerializeToString(deterministic=True)
        head += wire.header(wire.TENSOR_RAW_DATA, length)
        yield wire.header(wire.GRAPH_INITIALIZER, len(head) + length) + head
        yield tensor
    yield data[copied : graph.end]


# ---- files ----


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), "w+b")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _own_data_files(target: Path) -> list[Path]:
    """The data files, named as ours are, that the model now at `target` refers to."""
    pattern = re.compile(re.escape(target.stem) + r"-[0-9a-f]{12}\.data")
    if not target.is_file():
        return []
    try:
        with open(target, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            proto = ModelProto.FromString(wire.skeleton(file, size, "\0source"))
            places = [place(tensor) for tensor in tensors(proto)]
    except (OSError, ValueError, InvalidModelError):
        return []  # whatever stands there is replaced; its data is not ours to judge
    names = {where.location for where in places if where is not None}
    return [target.with_name(name) for name in sorted(names) if pattern.fullmatch(name)]
