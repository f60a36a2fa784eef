"""Pipelines: a textual form for the command line, and YAML recipes.

    identity,fold-constants{max_bytes=1000000}

    target: ort-cpu
    passes:
      - identity
      - fold-constants: {max_bytes: 1000000}

A recipe's keys and a pass's parameters are strict: an unknown one is an error that
names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from onnxopt.errors import UsageError
from onnxopt.manager import Pass
from onnxopt.passes import PASSES, PIPELINES

if TYPE_CHECKING:
    import importlib.metadata

Step = str | dict[str, dict[str, Any] | None]


class Recipe(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a YAML recipe may say. None leaves the choice to the caller."""

    passes: list[Step] = []
    target: str | None = None
    opset: int | None = None
    name: str | None = None


def pass_table() -> dict[str, type[Pass]]:
    """Every pass by name: ours, then those of the entry-point group `onnxopt.passes`.

    Raises UsageError where a package's pass cannot be loaded.
    """
    return {**{name: _load(entry) for name, entry in _entries().items()}, **PASSES}


def _entries() -> dict[str, importlib.metadata.EntryPoint]:
    import importlib.metadata  # slow, and seldom needed

    found = importlib.metadata.entry_points(group="onnxopt.passes")
    return {entry.name: entry for entry in found}


def _load(entry: importlib.metadata.EntryPoint) -> type[Pass]:
    package = entry.dist.name if entry.dist else entry.value
    try:
        kind = entry.load()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise UsageError(f"pass {entry.name!r} of {package}: {text}") from error
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise UsageError(f"pass {entry.name!r} of {package} is no onnxopt Pass")
    return kind


def _find(name: str) -> type[Pass]:
    """One pass; those of other packages are loaded only where they are named."""
    if name in PASSES:
        return PASSES[name]
    entries = _entries()
    if name not in entries:
        known = ", ".join(sorted({*PASSES, *entries}))
        raise UsageError(f"unknown pass {name!r}; there are {known}")
    return _load(entries[name])


def make_pass(name: str, parameters: Mapping[str, Any] | None = None) -> Pass:
    """The pass `name` with its parameters; raises UsageError naming what is wrong."""
    kind = _find(name)
    values = {key: _number(value) for key, value in (parameters or {}).items()}
    known = kind.__struct_fields__
    for key in values:
        if key not in known:
            raise UsageError(
                f"pass {name!r} has no parameter {key!r}"
                + (f"; it has {', '.join(sorted(known))}" if known else "")
            )
    if not values and len(known) == len(kind.__struct_defaults__):
        return kind()
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"pass {name!r}: {error}") from None


def _number(value: Any) -> Any:
    """1e-5 as the number that it is: YAML 1.1 takes it for a text, having no dot."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value)
    return float(value) if is_number else value


def parse_pipeline(text: str) -> list[Pass]:
    """The passes that `a,b{x=1,y=2}` names; an empty text is the empty pipeline."""
    passes, rest = [], text.strip()
    while rest:
        found = re.match(r"\s*([\w.-]+)\s*(?:\{([^{}]*)\})?\s*(?:,(?=.)|$)", rest)
        if found is None:
            raise UsageError(f"cannot read the pipeline at {rest!r}; write a,b{{x=1}}")
        passes.append(make_pass(found[1], _parameters(found[2] or "")))
        rest = rest[found.end() :]
    return passes


def _parameters(text: str) -> dict[str, Any]:
    import yaml  # slow, and seldom needed

    values: dict[str, Any] = {}
    for item in re.findall(r"[^\s,]+", text):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"cannot read the parameter {item!r}; write name=value")
        try:
            values[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"cannot read the value of {item!r}") from None
    return values


def load_recipe(name: str) -> tuple[list[Pass], Recipe]:
    """A named pipeline (`default`, `simplify`...) or a YAML file's."""
    if name in PIPELINES:
        return [make_pass(step) for step in PIPELINES[name]], Recipe(name=name)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(
            f"unknown recipe {name!r}; there are {', '.join(PIPELINES)}, or a .yaml file"
        )
    import yaml  # slow, and seldom needed

    try:
        recipe = msgspec.convert(yaml.safe_load(path.read_text("utf-8")), Recipe)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"recipe {path}: {text}") from None
    return make_passes(recipe.passes), recipe


def make_passes(steps: Sequence[Step]) -> list[Pass]:
    """Passes from a recipe's steps: `name`, or `{name: {parameter: value}}`."""
    passes = []
    for step in steps:
        if isinstance(step, str):
            passes.append(make_pass(step))
        elif len(step) == 1:
            passes += [make_pass(name, values) for name, values in step.items()]
        else:
            raise UsageError(f"a step names one pass, not {len(step)}: {', '.join(step)}")
    return passes
