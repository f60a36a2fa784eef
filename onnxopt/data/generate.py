"""Feeds made up from a model's inputs: seeded, legal, and different from each other.

A value depends on (seed, input name, index) and its shape alone, so adding an input
to a model leaves the others as they were. Symbolic dims are bound by `Binding`s, each
symbol to one size within a feed: which sizes a model accepts cannot be read off its
inputs, so `candidate_bindings` proposes and whoever has a session tries them. A single
number that chooses what is computed (a sampling rate, a flag) is a `setting`, bound
beside the sizes, since one often allows the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx

from onnxopt.data.inputs import Dim, Feed, Feeds, InputSpec, shape_text
from onnxopt.data.ranges import Bound, index_bounds, telling_values
from onnxopt.errors import SessionError, UsageError

Binding: TypeAlias = dict[str, int]

# Batch size, then sizes of other symbols and of image axes (used in turn), tried in
# this order. First sizes that differ, so that swapped axes show; then 1; then sizes
# that models insist on: equal ones, multiples of 32, OCR's height of 48, waveforms.
_ROUNDS: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = (
    (2, (7, 5, 6, 4), (64, 96)),
    (1, (1,), (32, 32)),
    (1, (8,), (64, 64)),
    (3, (16,), (32, 64)),
    (1, (3, 2), (48, 320)),
    (1, (128,), (224, 224)),
    (1, (512,), (320, 320)),
    (1, (16000,), (640, 640)),
    (1, (100,), (1, 1)),
)
# The same for sizes as they occur in use: those of images, and lengths.
_REALISTIC: tuple[tuple[int, tuple[int, int]], ...] = (
    (128, (224, 224)),
    (128, (320, 320)),
    (256, (256, 256)),
)
_RATES = (16000, 8000)
BLAND_ATTEMPT = 2
"""Attempt from which on no telling values are put in: a model may refuse them all."""
_MOST_SETTINGS = 8
_MASK = re.compile(r"mask|^valid", re.IGNORECASE)
_RATE = re.compile(r"^sr$|sampl(e|ing)_?rate", re.IGNORECASE)
_POSITION = re.compile(r"position", re.IGNORECASE)
_LENGTH = re.compile(r"len(gth)?s?$", re.IGNORECASE)
_SUM = re.compile(r"\s*(\w+)\s*([-+*])\s*(\w+)\s*")
_DEFAULT_BOUND = 10
# Integers of which nothing is known, in turn: small ones, pixels, signed ones, and more
# than a byte holds. Few at a time may be sizes, and stay small.
_WIDE_RANGES = ((0, _DEFAULT_BOUND), (0, 256), (-128, 128), (-300, 301))
_FEW = 4
_KINDS = 4
"""Kinds of float values, see `_floats`."""
_RANK_IF_OPEN = 2
_TELLING_SHARE = 0.25
"""Part of the integers that lie at a limit or beside what they are compared with."""
_LARGEST = 1 << 30
"""Bytes of one input beyond which no values are made up."""


@dataclass(frozen=True)
class GeneratedFeeds(Feeds):
    """`count` feeds, the n-th with the n-th binding (in turn).

    `telling` holds values on every side of what an input is compared with; `attempts`
    says which feeds, by number, are made from other random numbers than usual.
    """

    inputs: tuple[InputSpec, ...]
    seed: int
    count: int
    bindings: tuple[Binding, ...]
    bounds: Mapping[str, Sequence[Bound]] = field(default_factory=dict)
    telling: Mapping[str, Sequence[float]] = field(default_factory=dict)
    attempts: Mapping[int, int] = field(default_factory=dict)
    source: str = "generated feeds"

    def __iter__(self) -> Iterator[Feed]:
        return (self.feed(index) for index in range(self.count))

    def feed(self, index: int, binding: Binding | None = None) -> Feed:
        """Feed number `index`, with its own binding unless another is given."""
        if binding is None:
            binding = self.binding(index)
        return {
            spec.name: _value(self, spec, index, binding)
            for spec in self.inputs
            if not (spec.kind.startswith("optional") and index % 4 == 3)
        }

    def binding(self, index: int) -> Binding:
        """The binding of a feed; each meets every kind of values sooner or later."""
        size = len(self.bindings)
        return self.bindings[(index + index // math.lcm(size, _KINDS)) % size]

    def with_bindings(self, bindings: Sequence[Binding]) -> GeneratedFeeds:
        """The same feeds at other sizes."""
        return dataclasses.replace(self, bindings=tuple(bindings))

    def with_attempts(self, attempts: Mapping[int, int]) -> GeneratedFeeds:
        """The same feeds, some of them made anew."""
        return dataclasses.replace(self, attempts=dict(attempts))

    @property
    def may_be_refused(self) -> bool:
        """Whether a model may refuse values and not only sizes."""
        return any(
            spec.dtype.kind != "f" and not is_mask(spec.name) for spec in self.inputs
        )

    def settings(self) -> list[Binding]:
        """Combinations of the numbers that choose what is computed; `[{}]` without."""
        chosen = {
            setting_of(spec): values
            for spec in self.inputs
            if (values := _setting_values(self, spec))
        }
        lengths = [len(values) for values in chosen.values()]
        rows: Iterable[Sequence[int]] = itertools.product(*map(range, lengths))
        if math.prod(lengths) > _MOST_SETTINGS:
            rows = (
                [_digit(row, place) % length for place, length in enumerate(lengths)]
                for row in range(_MOST_SETTINGS)
            )
        return [
            {
                name: values[at]
                for (name, values), at in zip(chosen.items(), row, strict=True)
            }
            for row in rows
        ]

    def firsts(self) -> list[int]:
        """The first feed of every setting."""
        names = [setting_of(spec) for spec in self.inputs]
        found: dict[tuple[int | None, ...], int] = {}
        for index in range(self.count):
            binding = self.binding(index)
            found.setdefault(tuple(binding.get(name) for name in names), index)
        return list(found.values())

    def first_single(self) -> int | None:
        """The first feed that holds one sample; None where the model leaves no choice."""
        batch = _symbols(self.inputs)[0]
        single = (
            index
            for index in range(self.count)
            if all(self.binding(index).get(symbol) == 1 for symbol in batch)
        )
        return next(single, None) if batch else None

    def range_of(self, spec: InputSpec, index: int) -> tuple[int, int] | None:
        """Lowest and highest integer that is known to mean something in a feed."""
        plain = not any(p.search(spec.name) for p in (_MASK, _RATE, _POSITION, _LENGTH))
        if not spec.is_integer or not plain or _setting_values(self, spec):
            return None
        bound = _bound(self.bounds.get(spec.name, ()), self.binding(index))
        if bound is not None:
            return 0, bound - 1
        if spec.dtype.itemsize == 1:
            return _limits(spec)
        legal = _legal(spec, self.telling.get(spec.name, ()), None)
        return (min(legal), max(legal)) if legal else None


def _digit(row: int, place: int) -> int:
    """The place-th of some numbers that vary independently over few rows."""
    return (row >> place % 3) + place // 3 * (row >> (place + 1) % 3)


def generate_feeds(
    inputs: Sequence[InputSpec],
    *,
    model: onnx.ModelProto | None = None,
    seed: int = 0,
    count: int = 8,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> GeneratedFeeds:
    """Seeded feeds; `shapes` fixes the shape of inputs.

    `model` gives the ranges of indices, and constants that inputs are compared with.

    Raises UsageError for an input that cannot be made up (a map, a sparse tensor), and
    for `shapes` that name no input or contradict a static dim.
    """
    for spec in inputs:
        if spec.kind in ("map", "sparse"):
            raise UsageError(
                f"input {spec.name!r} is a {spec.kind}: give feeds for it (--data)"
            )
    fixed = _with_shapes(inputs, shapes or {})
    integers = [spec.name for spec in fixed if spec.is_integer]
    floats = [spec.name for spec in fixed if spec.dtype.kind == "f"]
    return GeneratedFeeds(
        inputs=tuple(fixed),
        seed=seed,
        count=count,
        bindings=tuple(candidate_bindings(fixed)[:4]),
        bounds=index_bounds(model, integers) if model is not None else {},
        telling=telling_values(model, integers, floats) if model is not None else {},
    )


def _with_shapes(
    inputs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]
) -> list[InputSpec]:
    """Inputs with the given shapes; symbols shared with other inputs are bound there."""
    known = {spec.name: spec for spec in inputs}
    bound: Binding = {}
    for name, shape in shapes.items():
        if name not in known:
            raise UsageError(
                f"--input-shape: {name!r} is no input of the model (it has "
                f"{', '.join(map(repr, known)) or 'none'})"
            )
        bound |= _match(known[name], tuple(shape))
    return [_bind(spec, shapes.get(spec.name), bound) for spec in inputs]


def _match(spec: InputSpec, shape: tuple[int, ...]) -> Binding:
    """Symbols of the input at the sizes of `shape`."""
    own = spec.shape if spec.shape is not None else (None,) * len(shape)
    clash = len(own) != len(shape) or any(
        isinstance(dim, int) and dim != size
        for dim, size in zip(own, shape, strict=False)
    )
    if clash:
        raise UsageError(
            f"--input-shape: {spec.name!r} takes {shape_text(own)}, "
            f"not {shape_text(shape)}"
        )
    return {d: size for d, size in zip(own, shape, strict=True) if isinstance(d, str)}


def _bind(spec: InputSpec, shape: Sequence[int] | None, bound: Binding) -> InputSpec:
    dims: Sequence[Dim] | None = shape if shape is not None else spec.shape
    if dims is None:
        return spec
    new = tuple(bound.get(d, d) if isinstance(d, str) else d for d in dims)
    return dataclasses.replace(spec, shape=new)


def symbol_of(spec: InputSpec, axis: int) -> str:
    """The symbol of a dim; an unnamed one has its own: `x[2]`."""
    dim = spec.shape[axis] if spec.shape is not None else None
    return dim if isinstance(dim, str) else f"{spec.name}[{axis}]"


def candidate_bindings(inputs: Sequence[InputSpec]) -> list[Binding]:
    """Bindings of all symbols that are worth trying, the most telling ones first."""
    batch, image, other = _symbols(inputs)
    found: list[Binding] = []
    for size, lengths, pixels in _ROUNDS:
        for first in dict.fromkeys((size, 1)):
            binding = dict.fromkeys(batch, first)
            binding |= {s: pixels[i % len(pixels)] for i, s in enumerate(image)}
            binding |= {s: lengths[i % len(lengths)] for i, s in enumerate(other)}
            if binding not in found:
                found.append(binding)
    return found


def batched(inputs: Sequence[InputSpec], binding: Binding, size: int) -> Binding:
    """The binding with another number of samples."""
    return binding | dict.fromkeys(_symbols(inputs)[0], size)


def without_samples(inputs: Sequence[InputSpec], binding: Binding) -> Binding:
    """The binding without the symbols that count samples."""
    batch = _symbols(inputs)[0]
    return {symbol: size for symbol, size in binding.items() if symbol not in batch}


def ragged(inputs: Sequence[InputSpec], binding: Binding) -> list[Binding]:
    """One sample at sizes that common strides do not divide, near the binding's.

    An eighth more, which leaves half a stride over (512 -> 576: 64 modulo 128), and an
    odd size: a last window then ends elsewhere, in the padding or before the end.
    """
    _, image, other = _symbols(inputs)
    eighth = {s: binding[s] + max(1, binding[s] // 8) for s in (*image, *other)}
    odd = {s: (binding[s] + binding[s] // 4) | 1 for s in (*image, *other)}
    found = [batched(inputs, binding | sizes, 1) for sizes in (eighth, odd)]
    return found if image or other else []


def realistic(inputs: Sequence[InputSpec]) -> list[Binding]:
    """One sample at sizes that occur in use: small ones leave windows all padding."""
    batch, image, other = _symbols(inputs)
    found = [
        dict.fromkeys(batch, 1)
        | {symbol: pixels[i % 2] for i, symbol in enumerate(image)}
        | dict.fromkeys(other, length)
        for length, pixels in _REALISTIC
    ]
    return found if image or other else []


def setting_of(spec: InputSpec) -> str:
    """What a binding calls the value of an input that is one number: `sr[]`."""
    return f"{spec.name}[]"


def is_mask(name: str) -> bool:
    """Whether an input is a mask, by its name."""
    return _MASK.search(name) is not None


def _setting_values(feeds: GeneratedFeeds, spec: InputSpec) -> list[int]:
    """Values of an input that chooses what is computed; none where it is just data."""
    telling = feeds.telling.get(spec.name, ())
    rate = spec.is_integer and _RATE.search(spec.name) and spec.name not in feeds.bounds
    if spec.kind != "tensor" or is_mask(spec.name):
        return []
    if rate:
        # A rate is a round number: beside the ones compared with, none makes sense.
        named = [int(value) for value in telling if value > 0 and value % 25 == 0]
        return list(dict.fromkeys((*_RATES, *named)))[:_MOST_SETTINGS]
    if spec.shape is None or any(dim != 1 for dim in spec.shape):
        return []
    if spec.dtype.kind == "b":
        return [0, 1]
    if not spec.is_integer:
        return []
    legal = _legal(spec, telling, _bound(feeds.bounds.get(spec.name, ()), {}))
    step = max(1, -(-len(legal) // _MOST_SETTINGS))
    return legal[::step]


def _legal(spec: InputSpec, telling: Sequence[float], bound: int | None) -> list[int]:
    """Integers among the telling values that the input may hold."""
    low, high = _limits(spec)
    if bound is not None:
        low, high = 0, bound - 1
    if _LENGTH.search(spec.name):
        low = 1
    return [int(value) for value in telling if low <= value <= high]


def _limits(spec: InputSpec) -> tuple[int, int]:
    """Smallest and largest integer of the input's type."""
    limits = ml_dtypes.iinfo(spec.dtype)  # type: ignore[no-untyped-call]
    return int(limits.min), int(limits.max)


def _symbols(inputs: Sequence[InputSpec]) -> tuple[list[str], list[str], list[str]]:
    """Symbols that count samples, those on the axes of images, and all others."""
    batch: dict[str, None] = {}
    image: dict[str, None] = {}
    other: dict[str, None] = {}
    for spec in inputs:
        shape = spec.shape if spec.shape is not None else (None,) * _RANK_IF_OPEN
        for axis, dim in enumerate(shape):
            symbol = symbol_of(spec, axis)
            if isinstance(dim, int) or _SUM.fullmatch(symbol):
                continue
            if axis == 0 or _is_state_batch(shape, axis):
                batch[symbol] = None
            else:
                (image if len(shape) == 4 else other)[symbol] = None
    return (
        list(batch),
        [s for s in image if s not in batch],
        [s for s in other if s not in batch and s not in image],
    )


def _is_state_batch(shape: Sequence[Dim], axis: int) -> bool:
    """Axis 1 of a recurrent state: (layers, batch, hidden)."""
    return axis == 1 and len(shape) == 3 and isinstance(shape[0], int)


def _size(spec: InputSpec, axis: int, dim: Dim, binding: Binding) -> int:
    if isinstance(dim, int):
        return dim
    return _resolve(symbol_of(spec, axis), binding)


def _resolve(symbol: str, binding: Binding) -> int:
    """Size of a symbol; exporters also write sums: "past_length + length"."""
    if symbol in binding:
        return binding[symbol]
    if match := _SUM.fullmatch(symbol):
        left, right = (_term(match[i], binding) for i in (1, 3))
        result = {"+": left + right, "-": left - right, "*": left * right}[match[2]]
        return max(result, 0)
    return 1


def _term(text: str, binding: Binding) -> int:
    return int(text) if text.isdigit() else binding.get(text, 1)


def _value(feeds: GeneratedFeeds, spec: InputSpec, index: int, binding: Binding) -> Any:
    attempt = feeds.attempts.get(index, 0)
    dims = spec.shape if spec.shape is not None else (None,) * _RANK_IF_OPEN
    shape = tuple(_size(spec, axis, dim, binding) for axis, dim in enumerate(dims))
    size = math.prod(shape) * spec.dtype.itemsize
    if size > _LARGEST:
        raise SessionError(
            f"made-up values of input {spec.name!r} would take {size:,} bytes "
            f"({shape_text(shape)}): give feeds (--data)"
        )
    if settings := _setting_values(feeds, spec):
        setting = binding.get(setting_of(spec), settings[index % len(settings)])
        return np.full(shape, setting).astype(spec.dtype)
    made = _Maker(
        random=_generator(feeds.seed, spec.name, index, attempt),
        spec=spec,
        bound=_bound(feeds.bounds.get(spec.name, ()), binding),
        telling=feeds.telling.get(spec.name, ()) if attempt < BLAND_ATTEMPT else (),
        wide=attempt < BLAND_ATTEMPT,
        index=index,
    )
    if spec.kind.endswith("sequence"):
        return [made.array(shape) for _ in range(1 + index % 3)]
    return made.array(shape)


def _generator(seed: int, name: str, index: int, attempt: int) -> np.random.Generator:
    text = f"{seed}:{index}:{name}" + (f":{attempt}" if attempt else "")
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _bound(bounds: Sequence[Bound], binding: Binding) -> int | None:
    sizes = [b if isinstance(b, int) else binding.get(b) for b in bounds]
    return min((size for size in sizes if size), default=None)


@dataclass(frozen=True)
class _Maker:
    """Makes the arrays of one input in one feed."""

    random: np.random.Generator
    spec: InputSpec
    bound: int | None
    telling: Sequence[float]
    wide: bool
    index: int

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next array."""
        random, spec, kind = self.random, self.spec, self.spec.dtype.kind
        if is_mask(spec.name) and kind != "O":
            return _prefix_mask(random, shape, self.index).astype(spec.dtype)
        if kind == "O":
            return _strings(random, shape)
        if kind == "b":
            return random.random(shape) < 0.5
        if spec.is_integer:
            return self._integers(shape)
        floats = _floats(random, shape, self.index)
        if self.telling and math.prod(shape) == 1:
            floats = np.full(shape, self.telling[self.index % len(self.telling)])
        if kind == "c":
            floats = floats + 1j * random.standard_normal(shape)
        return np.asarray(floats, dtype=np.float32 if kind == "V" else None).astype(
            spec.dtype
        )

    def _integers(self, shape: tuple[int, ...]) -> np.ndarray:
        spec, bound = self.spec, self.bound
        if _POSITION.search(spec.name) and shape:
            steps = np.arange(shape[-1]) % (bound or max(shape[-1], 1))
            return np.broadcast_to(steps, shape).astype(spec.dtype)
        low, high = 0, bound or _DEFAULT_BOUND
        if bound is None and self.wide and math.prod(shape) > _FEW:
            low, high = _WIDE_RANGES[self.index % len(_WIDE_RANGES)]
            low = max(low, _limits(spec)[0])
        if bound is None and spec.dtype.itemsize == 1:
            low, high = _limits(spec)[0], _limits(spec)[1] + 1
        if bound is None and _LENGTH.search(spec.name):
            low = 1
        values = self.random.integers(low, high, size=shape)
        ends = [low, high - 1] if bound or spec.dtype.itemsize == 1 else []
        return self._with_telling(values, ends).astype(spec.dtype)

    def _with_telling(self, values: np.ndarray, ends: Sequence[int]) -> np.ndarray:
        """Some of the values at a limit, or beside a constant they are compared with."""
        telling = [*ends, *_legal(self.spec, self.telling, self.bound)]
        if not telling:
            return values
        if values.size == 1:
            at = self.index // 2 % len(telling)
            return np.full_like(values, telling[at]) if self.index % 2 else values
        drawn = self.random.choice(np.array(telling), size=values.shape)
        here = self.random.random(values.shape) < _TELLING_SHARE
        return np.where(here, drawn, values)


def _floats(
    random: np.random.Generator, shape: tuple[int, ...], index: int
) -> np.ndarray:
    """Four kinds in turn: what a network was trained on is not known.

    Centred and non-negative noise; then larger values, in blocks where there are two
    axes for it; then, for images, the range of pixels. A text detector answers the
    first two with 1e-7 everywhere, which proves nothing.
    """
    match index % _KINDS:
        case 1:
            return random.random(shape)
        case 2:
            return 4 * _blocks(random, shape)
        case 3:
            return random.random(shape) * (255 if len(shape) == 4 else 1)
    return random.standard_normal(shape)


def _blocks(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal values that are constant over blocks of 4 x 4 along the last two axes."""
    if len(shape) < 3:
        return random.standard_normal(shape)
    height, width = shape[-2:]
    coarse = random.standard_normal((*shape[:-2], -(-height // 4), -(-width // 4)))
    blocks = coarse.repeat(4, axis=-2).repeat(4, axis=-1)
    return np.asarray(blocks[..., :height, :width])


def _prefix_mask(
    random: np.random.Generator, shape: tuple[int, ...], index: int
) -> np.ndarray:
    """Ones, then zeros, along the last axis: padding at the end, never all of it."""
    mask = np.ones(shape, dtype=bool)
    if not shape or index % 2 == 0 or shape[-1] < 2:
        return mask
    lengths = random.integers(1, shape[-1] + 1, size=(*shape[:-1], 1))
    return np.asarray(np.arange(shape[-1]) < lengths)


def _strings(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    words = np.array(["a", "no", "yes", "Zürich", "onnx 1", "", "42"], dtype=object)
    return np.asarray(words[random.integers(0, len(words), size=shape)], dtype=object)
