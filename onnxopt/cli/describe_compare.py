"""Timings and differences as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onnxopt.cli.terminal import Block, Table

if TYPE_CHECKING:
    from onnxopt.differences.found import (
        Differences,
        FactChange,
        InterfaceChange,
        NodeChange,
        WeightChange,
    )
    from onnxopt.latency import Bench, Timing

_SHOWN = 10
"""How many items of a list are shown without -v."""
_LONG = 70
"""Characters of a value that are shown without -v."""

# ---- bench ----


def bench(found: Bench, verbose: int) -> Iterator[Block]:
    """How it was timed, then a row for each model."""
    pinned = f", pinned to CPU {_listed(found.pinned)}" if found.pinned else ""
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    yield f"{found.provider}, {found.level}, {threads}{pinned}; {found.feeds}"
    yield (
        f"{found.rounds} blocks of {found.runs} runs each, in turns, "
        f"{_starts(found.starts)}; {found.clock} time is compared"
    )
    titles = ("model", "", "wall ms", "CPU ms", "ratio", "95 % interval", "memory MiB")
    table = Table(titles, left=2)
    for timing in found.models:
        table.add(*_timing(timing))
    yield table
    if any(timing.bare_bytes is not None for timing in found.models):
        yield "memory: the most a process held, less what it held before it had a model"
    for timing in found.models if verbose else ():
        blocks = (getattr(block, found.clock) for block in timing.blocks)
        told = " ".join(f"{1e3 * value:.4g}" for value in blocks)
        yield f"{timing.model}: ms of each block: {told}"


def _timing(timing: Timing) -> tuple[str, ...]:
    ratio = timing.ratio
    return (
        timing.model,
        "" if ratio is None else ratio.verdict,
        f"{1e3 * timing.wall:.4g}",
        f"{1e3 * timing.cpu:.4g}",
        "" if ratio is None else f"{ratio.value:.3f}",
        "" if ratio is None else f"[{ratio.low:.3f}, {ratio.high:.3f}]",
        _mebibytes(timing),
    )


def _mebibytes(timing: Timing) -> str:
    if timing.peak_bytes is None or timing.bare_bytes is None:
        return "unknown"
    return f"{max(0, timing.peak_bytes - timing.bare_bytes) / 2**20:,.1f}"


def _starts(count: int) -> str:
    if count == 1:
        return "in 1 process (how processes differ is not in the interval)"
    return f"in {count} processes"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


# ---- diff ----


def differences(found: Differences, verbose: int) -> Iterator[Block]:
    """One line for the whole, then what differs, by kind."""
    yield _summary(found)
    for title, lines in (
        ("nodes", [_node(change) for change in found.nodes]),
        ("order of nodes", list(found.order)),
        ("weights", [_weight(change) for change in found.weights]),
        ("inputs and outputs", [_interface(change) for change in found.interface]),
        ("metadata", [_fact(change) for change in found.metadata]),
    ):
        yield from _section(title, lines, verbose)
    for note in found.notes:
        yield f"note: {note}"


def _summary(found: Differences) -> str:
    if found.equal:
        return f"{found.a} and {found.b} are equal"
    counts = (
        (len(found.nodes), "nodes"),
        (len(found.weights), "weights"),
        (len(found.interface), "inputs and outputs"),
        (len(found.metadata), "metadata"),
    )
    told = ", ".join(f"{what}: {count}" for count, what in counts if count)
    if found.order:
        told = f"{told}, order of nodes" if told else "only the order of nodes"
    return f"{found.a} and {found.b} differ ({told})"


def _section(title: str, lines: Sequence[str], verbose: int) -> Iterator[Block]:
    if not lines:
        return
    yield f"{title}:"
    for line in lines if verbose else lines[:_SHOWN]:
        yield f"  {line}"
    if len(lines) > _SHOWN and not verbose:
        yield f"  ... {len(lines) - _SHOWN} more (-v shows them)"


def _node(change: NodeChange) -> str:
    label = change.node if change.node is not None else change.other
    where = f"{change.scope}: {label} ({change.op})"
    if change.change.startswith("only"):
        return f"{where}: {change.change}"
    guess = " (matched by position: a guess)" if change.matched == "position" else ""
    return f"{where}: {change.change}{guess}: {'; '.join(change.details)}"


def _weight(change: WeightChange) -> str:
    from onnxopt.differences.found import words

    where = f"{change.scope}: {change.name}"
    ours, theirs = _form(change, 0), _form(change, 1)
    match change.change:
        case "renamed":
            return f"{where} ({ours}): renamed, {change.other} in B"
        case "only in A" | "only in B":
            return f"{where} ({ours or theirs}): {change.change}"
    if change.values is None:
        return f"{where}: {ours} -> {theirs}"
    return f"{where} ({ours}): {words(change.values)}"


def _form(change: WeightChange, side: int) -> str:
    dtype, shape = change.dtype[side], change.shape[side]
    return "" if dtype is None or shape is None else f"{dtype}{list(shape)}"


def _interface(change: InterfaceChange) -> str:
    where = f"{change.scope}: {change.kind} {change.name}".rstrip()
    if change.what.startswith("only"):
        return f"{where}: {change.what} ({change.a or change.b})"
    return f"{where}: {change.what}{_from_to(change.a, change.b)}"


def _fact(change: FactChange) -> str:
    return f"{change.what}{_from_to(change.a, change.b)}"


def _from_to(a: str | None, b: str | None) -> str:
    if a is None and b is None:
        return ""
    return f": {_short(a)} -> {_short(b)}"


def _short(text: str | None) -> str:
    if text is None:
        return "none"
    text = " ".join(text.split()) or "''"
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."
