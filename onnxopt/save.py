"""Writing a model: streamed, complete or not at all.

A model is staged first, under temporary names beside its target, where it can be
loaded and judged; `commit` makes it appear by one rename. Weights stream from where
they lie into the file, so they never have to fit in memory.

Weights that were external data stay external, in `<stem>-<12 hex of sha256>.data`, and
so do the large ones of any model that would pass protobuf's limit of 2 GiB.
"""

from __future__ import annotations

import bisect
import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from onnxopt import copying, files, wire
from onnxopt.errors import UsageError
from onnxopt.model import Model
from onnxopt.report import Digest, Pair
from onnxopt.weights import (
    HELD,
    SOURCE,
    SPILL,
    TYPED_FIELDS,
    Place,
    WeightStore,
    pieces,
    place,
    set_place,
    tensor_bytes,
    tensors,
)

PROTOBUF_LIMIT = (1 << 31) - (1 << 20)
ALIGNMENT = 4096
ALIGNED_FROM = 256 << 10
"""From this size on payloads start on a page, so that runtimes can map them (bytes)."""


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


def stage(model: Model, target: Path, *, hashes: bool = True) -> Staged:
    """Write `model` beside `target`, ready to be judged and committed.

    Unless it `hashes` there is a digest of external data only, which names its file.
    Raises UsageError where the folder cannot be written or the disk is full.
    """
    files.check_target(target)
    model.settle()
    for file in model.weights.data_files():
        if target.exists() and file.exists() and target.samefile(file):
            raise UsageError(f"cannot write {target}: it holds weights of the input")
    staged = Staged(target)
    try:
        shell = ModelProto()
        shell.CopyFrom(model.proto)
        moved = _moved_outside(shell, model)
        if moved:
            _write_data(staged, moved, model.weights)
        _write_model(staged, shell, model.weights, hashes=hashes)
        model.weights.check_unchanged()
    except OSError as error:
        staged.discard()
        raise files.cannot_write(target, error) from None
    except BaseException:
        staged.discard()
        raise
    return staged


def measure(model: Model, target: Path) -> Staged:
    """What `stage` would write for `target`, measured and not written."""
    model.settle()
    shell = ModelProto()
    shell.CopyFrom(model.proto)
    staged = Staged(target)
    moved = _moved_outside(shell, model)
    if moved:
        sink = _Sink(None)
        _name_data(staged, sink, moved, _lay_out(sink, moved, model.weights))
    sink = _Sink(None)
    data = shell.SerializeToString(deterministic=True)
    _write_filled(sink, data, model.weights)
    staged.digest = Digest(sink.hexdigest(), staged.digest.data)
    staged.bytes = Pair(sink.size, staged.bytes.data)
    return staged


def to_proto(model: Model) -> ModelProto:
    """A self-contained copy of a model of less than 2 GiB."""
    model.settle()
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in tensors(proto):
        if place(tensor) is not None:
            _inline(tensor, model.weights)
    model.weights.check_unchanged()
    return proto


def fits_in_protobuf(model: Model) -> bool:
    """Whether one protobuf message can hold the model and all its weights."""
    return model.bytes() < PROTOBUF_LIMIT


# ---- external data ----


def _moved_outside(shell: ModelProto, model: Model) -> list[TensorProto]:
    """The tensors that go to a data file: all that were there, or too large together."""
    found = [tensor for tensor in tensors(shell) if place(tensor) is not None]
    was_outside = any(not _is_internal(tensor) for tensor in found)
    if not fits_in_protobuf(model):
        return [tensor for tensor in tensors(shell) if _is_heavy(tensor)]
    if was_outside:
        return [tensor for tensor in found if not _is_source(tensor)]
    return []


def _is_heavy(tensor: TensorProto) -> bool:
    """Whether a tensor goes to the data file of a model that is over the limit."""
    if place(tensor) is not None and not _is_internal(tensor):
        return True
    if tensor.data_type == TensorProto.STRING:
        return False
    return tensor_bytes(tensor) >= wire.MIN_PAYLOAD


def _is_internal(tensor: TensorProto) -> bool:
    where = place(tensor)
    return where is not None and where.location.startswith("\0")


def _is_source(tensor: TensorProto) -> bool:
    where = place(tensor)
    return where is not None and where.location == SOURCE


def _write_data(staged: Staged, moved: list[TensorProto], weights: WeightStore) -> None:
    """Write the data file, and let the tensors name it."""
    temporary = files.beside(staged.target)
    try:
        with _create(temporary) as file:
            sink = _Sink(file)
            spots = _lay_out(sink, moved, weights)
            _sync(file)
            name = _name_data(staged, sink, moved, spots)
            staged.claim(files.Claim(file, temporary, staged.target.with_name(name)))
    finally:
        temporary.unlink(missing_ok=True)


def _lay_out(
    sink: _Sink, moved: list[TensorProto], weights: WeightStore
) -> list[tuple[int, int]]:
    """Write payloads one after the other; offset and length of each."""
    regions = _Regions(moved)
    known: dict[Place, int] = {}
    spots: list[tuple[int, int]] = []
    for tensor in moved:
        where = place(tensor)
        if where is None:
            spots.append(_append(sink, tensor, weights))
            continue
        region = regions.around(where)
        if region not in known:  # what overlaps stays one
            known[region], _ = _append(sink, _region_tensor(region), weights)
        offset = known[region] + where.offset - region.offset
        spots.append((offset, tensor_bytes(tensor)))
    return spots


def _name_data(
    staged: Staged,
    sink: _Sink,
    moved: list[TensorProto],
    spots: list[tuple[int, int]],
) -> str:
    """Let the tensors name the data file, which is called by its digest."""
    digest = sink.hexdigest()
    name = f"{staged.target.stem}-{digest[:12]}.data"
    for tensor, (offset, length) in zip(moved, spots, strict=True):
        for field in TYPED_FIELDS:
            tensor.ClearField(field)
        set_place(tensor, Place(name, offset, length))
    staged.digest = Digest("", digest)
    staged.bytes = Pair(0, sink.size)
    return name


class _Regions:
    """The places of payloads, those that overlap as one region."""

    def __init__(self, tensors: Iterable[TensorProto]) -> None:
        self._starts: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        spans = sorted(
            (where.location, where.offset, where.offset + tensor_bytes(tensor))
            for tensor in tensors
            if (where := place(tensor)) is not None
        )
        for location, start, end in spans:
            starts = self._starts.setdefault(location, [])
            ends = self._ends.setdefault(location, [])
            if ends and (start < ends[-1] or start == starts[-1]):
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)

    def around(self, where: Place) -> Place:
        """The region that holds the payload at `where`."""
        index = bisect.bisect_right(self._starts[where.location], where.offset) - 1
        start = self._starts[where.location][index]
        return Place(where.location, start, self._ends[where.location][index] - start)


def _region_tensor(region: Place) -> TensorProto:
    """A tensor of bytes that stands for a region."""
    tensor = TensorProto(data_type=TensorProto.UINT8, dims=[region.length or 0])
    set_place(tensor, region)
    return tensor


def _append(sink: _Sink, tensor: TensorProto, weights: WeightStore) -> tuple[int, int]:
    length = tensor_bytes(tensor)
    step = ALIGNMENT if length >= ALIGNED_FROM else 16
    sink.write(bytes(-sink.size % step))
    sink.copy(tensor, weights)
    return sink.size - length, length


# ---- the model file ----


def _inline(tensor: TensorProto, weights: WeightStore) -> None:
    payload = weights.read(tensor)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = payload


def _write_model(
    staged: Staged, shell: ModelProto, weights: WeightStore, *, hashes: bool
) -> None:
    data = shell.SerializeToString(deterministic=True)
    with _create(staged.path) as file:
        sink = _Sink(file, hashes=hashes)
        _write_filled(sink, data, weights)
        _sync(file)
    staged.digest = Digest(sink.hexdigest(), staged.digest.data)
    staged.bytes = Pair(sink.size, staged.bytes.data)


def _write_filled(sink: _Sink, data: bytes, weights: WeightStore) -> None:
    """The serialized shell with the payloads back in their places."""
    file, view = io.BytesIO(data), memoryview(data)
    for piece in wire.rewrite(
        file, len(data), _holds_places(data), lambda field: _filled(data, field)
    ):
        match piece:
            case wire.Payload(tensor=tensor):
                sink.copy(tensor, weights)
            case wire.Span(start=start, end=end):
                sink.write(view[start:end])
            case bytes():
                sink.write(piece)


class _Sink:
    """A file that is written from start to end, and hashed on the way.

    Without a file it only measures; unless it `hashes` there is no digest.
    """

    def __init__(self, file: BinaryIO | None, *, hashes: bool = True) -> None:
        self.file = file
        self.hashes = hashes
        self.size = 0
        if hashes:
            import hashlib  # slow, and for most results not needed

            self.digest = hashlib.sha256()

    def hexdigest(self) -> str:
        """sha256 of what was written so far; empty where it does not hash."""
        return self.digest.hexdigest() if self.hashes else ""

    def write(self, chunk: bytes | memoryview) -> None:
        """Append bytes."""
        if self.file is not None:
            self.file.write(chunk)
        self._count(chunk)

    def copy(self, tensor: TensorProto, weights: WeightStore) -> None:
        """Append a payload, through one small buffer where it lies in a file."""
        length = tensor_bytes(tensor)
        spot = weights.spot(tensor) if length >= wire.MIN_PAYLOAD else None
        if spot is None:
            for chunk in weights.chunks(tensor):
                self.write(chunk)
            return
        if self.file is None:
            for piece in pieces(*spot, length):
                self._count(piece)
            return
        self.file.flush()
        start = self.file.tell()
        copying.copy(*spot, self.file.fileno(), start, length)
        self.file.seek(0, os.SEEK_END)
        self.size += length
        if self.hashes:
            for piece in copying.windows(self.file.fileno(), start, length):
                self.digest.update(piece)

    def _count(self, chunk: bytes | memoryview) -> None:
        if self.hashes:
            self.digest.update(chunk)
        self.size += len(chunk)


def _holds_places(data: bytes) -> Callable[[wire.Field], bool]:
    """Whether one of our places is named anywhere in a field, without looking into it."""
    found = sorted(
        match.start()
        for location in (SOURCE, SPILL, HELD)
        for match in re.finditer(re.escape(location.encode()), data)
    )

    def holds(field: wire.Field) -> bool:
        index = bisect.bisect_left(found, field.value)
        return index < len(found) and found[index] < field.end

    return holds


def _filled(data: bytes, field: wire.Field) -> list[wire.Piece] | None:
    """The tensor with its payload inline; None where it does not lie in our places."""
    tensor = TensorProto.FromString(data[field.value : field.end])
    if not _is_internal(tensor):
        return None
    rest = TensorProto()
    rest.CopyFrom(tensor)
    rest.ClearField("external_data")
    rest.ClearField("data_location")
    length = tensor_bytes(tensor)
    head, tail = _around_payload(rest)
    head += wire.header(wire.TENSOR_RAW_DATA, length)
    return [head, wire.Payload(tensor, length), tail]


def _around_payload(rest: TensorProto) -> tuple[bytes, bytes]:
    """What stands before and behind the payload where protobuf itself writes a tensor.

    So a payload from a file and one from memory give the same bytes.
    """
    front = TensorProto()
    front.CopyFrom(rest)
    front.DiscardUnknownFields()
    for field, _ in front.ListFields():
        if field.number > wire.TENSOR_RAW_DATA:
            front.ClearField(field.name)
    whole = rest.SerializeToString(deterministic=True)
    length = front.ByteSize()
    return whole[:length], whole[length:]


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
            proto = ModelProto.FromString(wire.skeleton(file, size, SOURCE))
            places = [place(tensor) for tensor in tensors(proto)]
    except (OSError, ValueError, DecodeError):
        return []  # whatever stands there is replaced; its data is not ours to judge
    names = {where.location for where in places if where is not None}
    return [target.with_name(name) for name in sorted(names) if pattern.fullmatch(name)]
