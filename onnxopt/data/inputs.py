"""What a model takes, and the feeds that are checked against it.

A feed is one run's worth of inputs: `{name: array}`. `Feeds` can be iterated again and
again; every iteration reads afresh, so a folder of large files is never held at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx

from onnxopt.errors import InvalidModelError, UsageError

# Arrays mostly; a list where the input is a sequence, None where it is an empty optional.
Feed: TypeAlias = dict[str, Any]
Kind = Literal["tensor", "sequence", "optional", "optional_sequence", "map", "sparse"]
Dim: TypeAlias = int | str | None


@dataclass(frozen=True)
class InputSpec:
    """An input that a feed must hold.

    `elem_type` is a TensorProto.DataType; `shape` holds an int (static), a str (symbol)
    or None (anything) per axis, or is None where even the rank is open. For sequences
    and optionals both describe the element.
    """

    name: str
    elem_type: int
    shape: tuple[Dim, ...] | None
    kind: Kind = "tensor"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy (or ml_dtypes) dtype of its arrays; object for strings.

        Raises InvalidModelError where the model declares no element type.
        """
        try:
            return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.elem_type))
        except KeyError:
            raise InvalidModelError(
                f"input {self.name!r} has unknown element type {self.elem_type}"
            ) from None

    @property
    def is_integer(self) -> bool:
        """Whether its elements are integers, of any width."""
        return self.dtype.kind in "iu" or "int" in self.dtype.name


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """Inputs that have no default: those that name an initializer need no feed."""
    graph = model.graph
    given = {tensor.name for tensor in graph.initializer}
    given |= {tensor.values.name for tensor in graph.sparse_initializer}
    return [_input_spec(info) for info in graph.input if info.name not in given]


def _input_spec(info: onnx.ValueInfoProto) -> InputSpec:
    kind, tensor_type = _element(info.type)
    if tensor_type is None:
        return InputSpec(info.name, 0, None, kind)
    return InputSpec(info.name, tensor_type.elem_type, dims_of(tensor_type), kind)


def _element(type_: onnx.TypeProto) -> tuple[Kind, Any]:
    match type_.WhichOneof("value"):
        case "sequence_type":
            return "sequence", type_.sequence_type.elem_type.tensor_type
        case "optional_type":
            inner, tensor_type = _element(type_.optional_type.elem_type)
            return ("optional" if inner == "tensor" else "optional_sequence"), tensor_type
        case "map_type":
            return "map", None
        case "sparse_tensor_type":
            return "sparse", type_.sparse_tensor_type
    return "tensor", type_.tensor_type


def dims_of(tensor_type: Any) -> tuple[Dim, ...] | None:
    """Dims of a TypeProto.Tensor as int, symbol or None; None where it has no shape."""
    if not tensor_type.HasField("shape"):
        return None
    return tuple(_dim(dim) for dim in tensor_type.shape.dim)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    # Negative static dims (-1 by careless exporters) mean "anything", as in ORT.
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return None if dim.dim_param in ("", "?") else str(dim.dim_param)


class Feeds:
    """Feeds that can be iterated any number of times.

    `make` returns a fresh iterator of feeds. `source` names them in messages.
    """

    def __init__(self, make: Callable[[], Iterator[Feed]], source: str) -> None:
        self._make = make
        self.source = source

    def __iter__(self) -> Iterator[Feed]:
        return self._make()


def checked(
    feeds: Feeds, inputs: Sequence[InputSpec], *, allow_nan: bool = True
) -> Feeds:
    """The same feeds, each one checked as it passes; the first one now.

    Raises UsageError: no feed at all, or what `check_feed` finds.
    """

    def make() -> Iterator[Feed]:
        for index, feed in enumerate(feeds):
            yield check_feed(
                feed, inputs, f"{feeds.source}[{index}]", allow_nan=allow_nan
            )

    if next(make(), None) is None:
        raise UsageError(f"{feeds.source} holds no feeds")
    return Feeds(make, feeds.source)


def check_feed(
    feed: Mapping[str, Any],
    inputs: Sequence[InputSpec],
    where: str,
    *,
    allow_nan: bool = True,
) -> Feed:
    """The feed in the order of the inputs, strings as object arrays.

    Raises UsageError naming the input: missing, unknown, wrong dtype, rank or static
    dim, a symbol bound to two sizes is left to the model, empty, NaN (unless allowed).
    """
    if not isinstance(feed, Mapping):
        raise UsageError(
            f"{where}: a feed is a dict of input name to array, not {type(feed).__name__}"
        )
    known = [spec.name for spec in inputs]
    for name in feed:
        if name not in known:
            raise UsageError(
                f"{where}: {name!r} is no input of the model (it has {_listed(known)})"
            )
    result: Feed = {}
    for spec in inputs:
        if spec.name in feed:
            result[spec.name] = _check_value(feed[spec.name], spec, where, allow_nan)
        elif not spec.kind.startswith("optional"):
            raise UsageError(
                f"{where}: input {spec.name!r} is missing (it has {_listed(list(feed))})"
            )
    return result


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(str(name)) for name in names[:6])
    return (shown + ", ..." if len(names) > 6 else shown) or "none"


def _check_value(value: Any, spec: InputSpec, where: str, allow_nan: bool) -> Any:
    if spec.kind in ("map", "sparse"):
        return value
    if value is None and spec.kind.startswith("optional"):
        return value
    if spec.kind.endswith("sequence"):
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{where}: input {spec.name!r} is a sequence: give a list")
        return [_check_array(item, spec, where, allow_nan) for item in value]
    return _check_array(value, spec, where, allow_nan)


def _check_array(value: Any, spec: InputSpec, where: str, allow_nan: bool) -> np.ndarray:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise UsageError(
            f"{where}: input {spec.name!r} is a {type(value).__name__}, not a numpy array"
        )
    array = _with_dtype(np.asarray(value), spec, where)
    _check_shape(array, spec, where)
    if not allow_nan and has_nan(array):
        raise UsageError(f"{where}: input {spec.name!r} holds NaN")
    return array


def _with_dtype(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    wanted = spec.dtype
    if array.dtype == wanted:
        return array
    if array.dtype.newbyteorder("=") == wanted:
        return array.astype(wanted)
    if wanted.kind == "O" and array.dtype.kind in "US":
        return array.astype(object)
    if array.dtype.kind == "V" and array.dtype.itemsize == wanted.itemsize:
        # How .npy files keep bfloat16 and fp8: the bytes, without the name.
        return array.view(wanted)
    raise UsageError(
        f"{where}: input {spec.name!r} is {array.dtype}, the model takes "
        f"{wanted if wanted.kind != 'O' else 'strings'}"
    )


def _check_shape(array: np.ndarray, spec: InputSpec, where: str) -> None:
    if spec.shape is None:
        return
    fits = array.ndim == len(spec.shape) and all(
        size == dim
        for size, dim in zip(array.shape, spec.shape, strict=True)
        if isinstance(dim, int)
    )
    if not fits:
        raise UsageError(
            f"{where}: input {spec.name!r} has shape {shape_text(array.shape)}, "
            f"the model takes {shape_text(spec.shape)}"
        )
    if array.size == 0 and 0 not in spec.shape:
        raise UsageError(
            f"{where}: input {spec.name!r} is empty (shape {shape_text(array.shape)})"
        )


def has_nan(array: np.ndarray) -> bool:
    """Whether an array of any dtype holds NaN."""
    if array.dtype.kind in "fc":
        return bool(np.isnan(array).any())
    if array.dtype.kind == "V":
        return bool(np.isnan(array.astype(np.float32)).any())
    return False


def shape_text(shape: Sequence[Dim]) -> str:
    """(1, "N", None) -> "[1,N,?]"."""
    return "[" + ",".join("?" if dim is None else str(dim) for dim in shape) + "]"


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """`x:1,3,224,224` or `x:[1,3,224,224]` -> ("x", (1, 3, 224, 224)).

    The name may itself hold a colon (`input:0:1,3`): the last one counts; `x:` and
    `x:[]` are a scalar. Raises UsageError.
    """
    name, colon, dims = text.rpartition(":")
    dims = dims.strip()
    if dims.startswith("[") and dims.endswith("]"):
        dims = dims[1:-1]
    if not colon or not name or not re.fullmatch(r"(\s*\d+\s*(,\s*\d+\s*)*)?", dims):
        raise UsageError(f"{text!r} is no shape: write name:1,3,224,224")
    return name, tuple(int(dim) for dim in dims.split(",") if dim.strip())
