"""Feeds from the user's data.

`load_feeds` takes every form of `--data`:

    file.npz                one array per input, axis 0 = samples
    a folder of .npz        one feed a file, in the order of their names
    test_data_set_* folder  ONNX's own: input_0.pb, input_1.pb, ...
    script.py:function      called without arguments; a fresh iterator of feeds per call

and in Python also an iterable of feeds, a function that returns one, or an ONNX Runtime
CalibrationDataReader. Whatever they hold is checked against the model's inputs: the
first feed at once, before any long work, and the others as they are read.
"""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from onnxopt.data.inputs import (
    Feed,
    Feeds,
    InputSpec,
    checked,
    shape_text,
)
from onnxopt.errors import OnnxoptError, UsageError

# What a one-shot iterator may hold when it is drained into memory.
_DRAIN_LIMIT = 2 << 30


def load_feeds(
    spec: Any,
    inputs: Sequence[InputSpec],
    batch_size: int | None = None,
    *,
    allow_nan: bool = True,
) -> Feeds:
    """Feeds that `spec` names or holds, checked against `inputs`.

    `batch_size` cuts an .npz along axis 0 where the model leaves that axis open (1
    without it). Raises UsageError, one line that names the file and the input.
    """
    feeds = _open(spec, inputs, batch_size)
    return checked(feeds, inputs, allow_nan=allow_nan)


def _open(spec: Any, inputs: Sequence[InputSpec], batch_size: int | None) -> Feeds:
    if isinstance(spec, Feeds):
        return spec
    if isinstance(spec, (str, Path)):
        return _open_path(str(spec), inputs, batch_size)
    if isinstance(spec, Mapping):
        return Feeds(lambda: iter([dict(spec)]), "data")
    if hasattr(spec, "get_next"):
        return _drained(iter(spec.get_next, None), type(spec).__name__)
    if callable(spec):
        return _from_function(spec, getattr(spec, "__name__", "data"))
    if isinstance(spec, Iterator):
        return _drained(spec, "data")
    if isinstance(spec, Iterable):
        return Feeds(lambda: iter(spec), "data")
    raise UsageError(f"data of type {type(spec).__name__} holds no feeds")


def _open_path(text: str, inputs: Sequence[InputSpec], batch_size: int | None) -> Feeds:
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, inputs)
    if path.is_file() and path.suffix == ".npz":
        return Feeds(lambda: _cut_npz(path, inputs, batch_size), path.name)
    file, colon, _ = text.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_function(load_function(text), text)
    if not path.exists():
        raise UsageError(f"data {text!r}: no such file or folder")
    raise UsageError(
        f"data {text!r}: give a .npz file, a folder of .npz files, an ONNX test_data_set "
        "folder, or script.py:function"
    )


def _drained(feeds: Iterator[Any], source: str) -> Feeds:
    """A one-shot iterator kept in memory, since several sessions read it.

    Raises UsageError above 2 GiB: a function that returns a fresh iterator has no limit.
    """
    kept, size = [], 0
    for feed in feeds:
        kept.append(feed)
        size += _bytes_of(feed)
        if size > _DRAIN_LIMIT:
            raise UsageError(
                f"{source}: an iterator that can be read once only may hold 2 GiB of "
                "feeds; pass a function that returns a fresh iterator"
            )
    return Feeds(lambda: iter(kept), source)


def _bytes_of(feed: Any) -> int:
    values = feed.values() if isinstance(feed, Mapping) else ()
    return sum(getattr(value, "nbytes", 0) for value in values)


# --- script.py:function -----------------------------------------------------------


def load_function(text: str) -> Callable[..., Any]:
    """The function that `script.py:function` names.

    The script is run as a module of its own; its folder can be imported from. Raises
    UsageError where the file or function is absent or the script fails.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{text!r}: no file {file!r}")
    function = getattr(_run_script(path), name, None)
    if not callable(function):
        raise UsageError(f"{text!r}: {path.name} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def _run_script(path: Path) -> ModuleType:
    name = f"_onnxopt_script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code: name it and stop
        raise script_error(path.name, error) from error
    return module


def script_error(where: str, error: Exception) -> UsageError:
    """One line for an exception out of the user's own code."""
    text = " ".join(str(error).split())
    return UsageError(f"{where} raised {type(error).__name__}: {text}")


def _from_function(function: Callable[..., Any], source: str) -> Feeds:
    def make() -> Iterator[Feed]:
        try:
            yield from function()
        except OnnxoptError:
            raise
        except Exception as error:  # the user's code: name it and stop
            raise script_error(source, error) from error

    return Feeds(make, source)


# --- .npz -------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"data {str(path)!r}: not a readable .npz ({error})") from error


def _cut_npz(
    path: Path, inputs: Sequence[InputSpec], batch_size: int | None
) -> Iterator[Feed]:
    """Feeds along axis 0 of every array; the arrays of one file are held while it lasts.

    An array with one axis more than its input holds one feed's value per index; one of
    the input's own rank is cut into batches; one for a scalar input serves every feed.
    """
    arrays = _read_npz(path)
    specs = {spec.name: spec for spec in inputs}
    cuts: dict[str, Cut] = {}
    for name, array in arrays.items():
        # Unknown names are cut somehow: the check of the feed then names them.
        cuts[name] = _cut(path, array, specs.get(name), batch_size)
    count = _agreed_count(path, cuts)
    for index in range(count):
        yield {name: take(index) for name, (_, take) in cuts.items()}


# How many feeds an array is good for (None: any number), and the value for each.
Cut = tuple[int | None, Callable[[int], np.ndarray]]


def _cut(
    path: Path, array: np.ndarray, spec: InputSpec | None, batch_size: int | None
) -> Cut:
    rank = len(spec.shape) if spec and spec.shape is not None else array.ndim
    if array.ndim == 0:
        return None, lambda _: array
    if array.ndim == rank + 1:
        return len(array), lambda index: array[index]
    size = _batch(path, spec, batch_size)
    return -(-len(array) // size), lambda index: array[index * size : (index + 1) * size]


def _batch(path: Path, spec: InputSpec | None, batch_size: int | None) -> int:
    """Samples a feed: what the model fixes, else what the user said, else 1."""
    first = spec.shape[0] if spec and spec.shape else None
    if not isinstance(first, int) or first == 0:
        return batch_size or 1
    if batch_size not in (None, first) and spec is not None:
        raise UsageError(
            f"data {str(path)!r}: batch size {batch_size}, but input {spec.name!r} takes "
            f"{shape_text(spec.shape or ())}"
        )
    return first


def _agreed_count(path: Path, cuts: Mapping[str, Cut]) -> int:
    counts = {name: count for name, (count, _) in cuts.items() if count is not None}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise UsageError(
            f"data {str(path)!r}: arrays are good for different numbers of feeds: {told}"
        )
    return next(iter(counts.values()), 1)


# --- folders ----------------------------------------------------------------------


def _open_folder(path: Path, inputs: Sequence[InputSpec]) -> Feeds:
    files = sorted(path.glob("*.npz"))
    if files:
        return Feeds(lambda: (_read_npz(file) for file in files), path.name)
    sets = (
        [path] if any(path.glob("input_*.pb")) else sorted(path.glob("test_data_set_*"))
    )
    if sets:
        return Feeds(lambda: (_read_test_data(one, inputs) for one in sets), path.name)
    raise UsageError(f"data {str(path)!r}: the folder holds neither .npz nor input_*.pb")


def _read_test_data(folder: Path, inputs: Sequence[InputSpec]) -> Feed:
    """`input_N.pb`: by the name inside where it is an input's, else by N."""
    files = sorted(folder.glob("input_*.pb"), key=_number)
    by_name = {spec.name: spec for spec in inputs}
    feed: Feed = {}
    for index, file in enumerate(files):
        spec = inputs[index] if index < len(inputs) else None
        name, value = _read_pb(file, spec)
        feed[name if name in by_name or spec is None else spec.name] = value
    return feed


def _number(file: Path) -> tuple[int, str]:
    digits = file.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else sys.maxsize, file.name)


def _read_pb(file: Path, spec: InputSpec | None) -> tuple[str, Any]:
    kind = spec.kind if spec else "tensor"
    try:
        data = file.read_bytes()
        if kind == "sequence":
            sequence = onnx.SequenceProto.FromString(data)
            return sequence.name, numpy_helper.to_list(sequence)
        if kind.startswith("optional"):
            optional = onnx.OptionalProto.FromString(data)
            return optional.name, numpy_helper.to_optional(optional)
        tensor = onnx.TensorProto.FromString(data)
        return tensor.name, _decode_strings(numpy_helper.to_array(tensor))
    except (OSError, DecodeError, ValueError, TypeError) as error:
        raise UsageError(f"data {str(file)!r}: not readable ({error})") from error


def _decode_strings(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "SO":
        return array
    texts = [x.decode() if isinstance(x, bytes) else str(x) for x in array.flat]
    return np.array(texts, dtype=object).reshape(array.shape)
