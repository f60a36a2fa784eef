"""Reports, verdicts and inspections as text for people.

Every number comes from the report; what was not run is said to be not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from onnxopt.cli.terminal import Block, Table

if TYPE_CHECKING:
    from onnxopt.inspection.dead import DeadChannels
    from onnxopt.inspection.survey import Inspection, Kernels, Value
    from onnxopt.report import (
        Check,
        Metric,
        OutputCheck,
        PassReport,
        Placement,
        Report,
        Side,
        Validation,
    )
    from onnxopt.validation.placement import ProviderTime

_SHOWN = 10
"""How many items of a list are shown without -v."""


def report(source: str, made: Report, verbose: int) -> Iterator[Block]:
    """A run: sizes before and after, what each pass did, the verdict."""
    yield f"{source}: recipe {made.recipe}, target {made.target}"
    if made.output is not None:
        yield _sizes(made.source, made.output)
        yield ""
        yield from _passes(made.passes, verbose)
        yield ""
    for note in made.notes:
        yield f"note: {note}"
    if made.validation is None:
        yield "validation: not run"
    else:
        yield from verdict(made.validation, verbose)


def verdict(validation: Validation, verbose: int) -> Iterator[Block]:
    """A verdict: one line for the whole, one for each provider and level."""
    reason = f": {validation.reason}" if validation.reason else ""
    how = f" ({validation.feeds} feeds, judged by {validation.judged_by})"
    yield (
        f"validation: {_status(validation.status)}"
        f"{how if validation.judged_by else ''}{reason}"
    )
    if validation.checks:
        table = Table(("provider", "level", "verdict", "SQNR dB", "max abs", ""), left=3)
        for check in validation.checks:
            table.add(*_check_row(check))
        yield table
    if verbose:
        yield from _outputs(validation.checks)
    yield from _placements(validation.placements, verbose)
    for note in validation.notes if verbose else _notes_on_providers(validation):
        yield f"note: {note}"


def seconds(taken: Mapping[str, float]) -> Iterator[Block]:
    """The CPU time of each pass."""
    table = Table(("pass", "CPU seconds"))
    for name, value in taken.items():
        table.add(name, f"{value:.3f}")
    table.add("total", f"{sum(taken.values()):.3f}")
    yield table


def provider_seconds(times: Iterable[ProviderTime]) -> Iterator[Block]:
    """Which provider took which part of the time of a run."""
    table = Table(("provider", "level", "model", "runs on", "ms a run", "share"), left=4)
    for time in times:
        ms, share = f"{1000 * time.seconds:.3f}", f"{100 * time.share:.1f} %"
        table.add(time.provider, time.level, time.model, time.runs_on, ms, share)
    yield "time in kernels, by provider:" if table.rows else "no time was measured"
    if table.rows:
        yield table


# ---- a run ----


def _sizes(before: Side, after: Side) -> Table:
    table = Table(("", "before", "after", "change"))
    for name, old, new in (
        ("bytes", sum(_pair(before)), sum(_pair(after))),
        ("nodes", before.nodes, after.nodes),
        ("parameters", before.parameters, after.parameters),
        ("MACs", before.macs, after.macs),
    ):
        table.add(name, _count(old), _count(new), _change(old, new))
    return table


def _pair(side: Side) -> tuple[int, int]:
    return side.bytes.model, side.bytes.data


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _change(old: int | None, new: int | None) -> str:
    if not old or new is None:
        return "" if old != new else "same"
    return "same" if old == new else f"{100 * (new - old) / old:+.1f} %"


def _passes(passes: Iterable[PassReport], verbose: int) -> Iterator[Block]:
    fired = [entry for entry in passes if entry.edits]
    if fired:
        table = Table(("pass", "guarantee", "edits", "nodes", "bytes"), left=2)
        for entry in fired:
            edits = f"{entry.edits:,}"
            table.add(
                entry.name,
                entry.guarantee,
                edits,
                f"{entry.nodes:+,}",
                f"{entry.bytes:+,}",
            )
        yield table
    else:
        yield "no pass found anything to do"
    skipped = [entry for entry in passes if entry.skipped]
    if skipped:
        counts = ", ".join(f"{entry.name} {len(entry.skipped)}" for entry in skipped)
        hint = "" if verbose else " (-v shows them)"
        yield f"left alone, with a reason: {counts}{hint}"
    for entry in skipped if verbose else ():
        for skip in entry.skipped:
            yield f"  {entry.name}: {skip.scope}: {skip.node}: {skip.reason}"


# ---- a verdict ----


def _status(status: str) -> str:
    return status.replace("_", " ")


def _check_row(check: Check) -> tuple[str, ...]:
    return (
        check.provider,
        check.level,
        _status(check.status),
        _worst(check.outputs, "sqnr_db", min) if check.outputs else "",
        _worst(check.outputs, "max_abs", max) if check.outputs else "",
        check.reason or "",
    )


def _worst(outputs: Iterable[OutputCheck], name: str, pick: object) -> str:
    values = [getattr(output, name).worst for output in outputs]
    known = [value for value in values if value is not None]
    if not known:
        return "identical" if name == "sqnr_db" else "0"
    value = pick(known)  # type: ignore[operator]
    return f"{value:.1f}" if name == "sqnr_db" else f"{value:.2e}"


def _outputs(checks: Iterable[Check]) -> Iterator[Block]:
    checks = list(checks)
    every = [output for check in checks for output in check.outputs]
    extra = [(t, n, p) for t, n, p in _WHERE_DEFINED if _defined(every, n)]
    titles = ("SQNR dB", "max abs", *(title for title, _, _ in extra))
    table = Table(("provider", "level", "output", "verdict", *titles, ""), 4)
    for check in checks:
        for output in check.outputs:
            table.add(
                check.provider,
                check.level,
                output.name,
                _status(output.status),
                _worst([output], "sqnr_db", min),
                _worst([output], "max_abs", max),
                *(_cell(getattr(output, name), shown) for _, name, shown in extra),
                output.reason or "",
            )
    if table.rows:
        yield table


_WHERE_DEFINED = (
    ("top 1", "top1_agreement", "{:.2%}"),
    ("top 5", "top5_agreement", "{:.2%}"),
    ("KL nats", "kl", "{:.2e}"),
)
"""Columns that are shown where some output has the metric: title, field, format."""


def _defined(outputs: Iterable[OutputCheck], name: str) -> bool:
    return any(getattr(output, name) is not None for output in outputs)


def _cell(metric: Metric | None, shown: str) -> str:
    return "" if metric is None or metric.worst is None else shown.format(metric.worst)


def _placements(placements: Iterable[Placement], verbose: int) -> Iterator[Block]:
    """Nodes by the provider that runs them; of the CPU provider where `verbose`."""
    titles = ("provider", "level", "model", "nodes run on", "Memcpy")
    table = Table(titles, left=4)
    for place in placements:
        if verbose or not _is_cpu(place.provider):
            nodes = ", ".join(f"{name} {count}" for name, count in place.nodes.items())
            copies = "unknown" if place.memcpy is None else str(place.memcpy)
            table.add(place.provider, place.level, place.model, nodes or "none", copies)
    if table.rows:
        yield table


def _notes_on_providers(validation: Validation) -> Iterator[str]:
    """What providers other than the CPU left to it, and what they made of int8."""
    asked = {check.provider.removesuffix(" against cpu") for check in validation.checks}
    starts = tuple(f"{name} " for name in asked if not _is_cpu(name))
    return (note for note in validation.notes if note.startswith(starts))


def _is_cpu(provider: str) -> bool:
    from onnxopt.runtime import is_cpu  # only a verdict names providers

    return is_cpu(provider)


# ---- an inspection ----


def inspection(source: str, found: Inspection, verbose: int) -> Iterator[Block]:
    """What a model holds."""
    opsets = ", ".join(f"{domain} {number}" for domain, number in found.opset.items())
    made_by = f", by {found.producer}" if found.producer else ""
    yield f"{source}: IR {found.ir_version}, opset {opsets}{made_by}"
    for name, size in found.external_data.items():
        yield f"external data {name}: {size:,} bytes"
    for note in found.notes:
        yield f"note: {note}"
    yield from _facts(found)
    yield ""
    yield from _interface(found)
    yield ""
    yield from _operators(found, verbose)
    yield ""
    yield from _zeros(found, verbose)
    yield ""
    yield from _channels(found, verbose)
    yield ""
    yield from _quantization(found, verbose)
    for key, value in found.metadata.items() if verbose else ():
        yield f"metadata {key}: {value}"


def _facts(found: Inspection) -> Iterator[Block]:
    table = Table(("", "count"))
    table.add("bytes", f"{found.bytes.model + found.bytes.data:,}")
    table.add("nodes", _count(found.nodes))
    table.add("parameters", _count(found.parameters))
    table.add("MACs", _count(found.macs))
    for name, storage in found.storage.items():
        table.add(f"bytes of {name}", _count(storage.bytes))
    yield table


def _interface(found: Inspection) -> Iterator[Block]:
    table = Table(("", "name", "type", "shape"), left=4)
    for kind, values in (("input", found.inputs), ("output", found.outputs)):
        for value in values:
            table.add(kind, value.name, value.type, _shape(value))
    yield table


def _shape(value: Value) -> str:
    if value.shape is None:
        return "any"
    return "[" + ",".join("?" if dim is None else str(dim) for dim in value.shape) + "]"


def _operators(found: Inspection, verbose: int) -> Iterator[Block]:
    scopes = list(found.ops.items())
    for scope, counts in scopes if verbose else scopes[:_SHOWN]:
        told = ", ".join(f"{op} {number}" for op, number in counts.items())
        yield f"operators of {scope}: {told or 'none'}"
    yield from _more(len(scopes), verbose, "scopes")


def _zeros(found: Inspection, verbose: int) -> Iterator[Block]:
    sparsity = found.sparsity
    yield (
        f"zeros in the weights of layers: {sparsity.zeros:,} of {sparsity.elements:,} "
        f"({100 * sparsity.fraction:.2f} %)"
    )
    read = {channels.weight for channels in found.channels}
    sparse = [w for w in found.weights if w.name in read and w.sparsity >= 0.01]
    sparse.sort(key=lambda weight: -(weight.zeros or 0))
    if sparse:
        table = Table(("weight", "dtype", "shape", "zeros"), left=3)
        for weight in sparse if verbose else sparse[:_SHOWN]:
            shape = "x".join(map(str, weight.shape))
            table.add(weight.name, weight.dtype, shape, f"{100 * weight.sparsity:.2f} %")
        yield table
        yield from _more(len(sparse), verbose, "weights")
    empty = [c for c in found.channels if c.zero_outputs or c.zero_inputs]
    if not empty:
        yield "no layer has a channel of zeros"
        return
    table = Table(("layer", "operator", "zero outputs", "zero inputs"), left=2)
    for item in empty if verbose else empty[:_SHOWN]:
        table.add(
            item.node,
            item.op,
            _part(item.zero_outputs, item.outputs),
            _part(item.zero_inputs, item.inputs),
        )
    yield table
    yield from _more(len(empty), verbose, "layers")


def _channels(found: Inspection, verbose: int) -> Iterator[Block]:
    """Every layer where that was asked for, else those with dead channels."""
    layers: Sequence[DeadChannels] = found.layers or found.dead
    shown = layers
    if found.layers is not None:
        yield "channels of layers:" if layers else "no layer has channels"
    else:
        shown = layers if verbose else layers[:_SHOWN]
        told = "channels that make no difference to the outputs:"
        yield told if layers else "no layer has a dead channel"
    if not layers:
        return
    titles = ("layer", "operator", "channels", "zero", "constant", "unused", "can go")
    table = Table(titles, left=2)
    for item in shown:
        counts = (item.channels, item.zero, item.constant, item.unused, item.removable)
        table.add(item.node, item.op, *map(str, counts))
    yield table
    if len(shown) < len(layers):
        yield from _more(len(layers), verbose, "layers")
    for item in shown:
        for reason, count in item.kept_by.items():
            yield f"  {item.node}: {count} stay: {reason}"
        for reason, count in getattr(item, "needed_by", {}).items():
            yield f"  {item.node}: {count} live: {reason}"


def _part(some: int | None, whole: int | None) -> str:
    return "" if some is None else f"{some} of {whole}"


def _quantization(found: Inspection, verbose: int) -> Iterator[Block]:
    state = found.quantization
    if not state.operators:
        yield "not quantized"
        yield from _kernels(state.kernels)
        return
    counts = ", ".join(f"{op} {number}" for op, number in state.operators.items())
    yield f"quantizing operators: {counts}"
    yield f"quantized activations: {state.activations}"
    for kind, told in (
        ("integer", "stored as integers"),
        ("fake", "fake-quantized, still float"),
    ):
        weights = [weight for weight in state.weights if weight.state == kind]
        grains = sorted({weight.granularity for weight in weights})
        size = sum(weight.bytes for weight in weights)
        detail = f" ({size:,} bytes, {', '.join(grains)})" if weights else ""
        yield f"weights {told}: {len(weights)}{detail}"
        for weight in weights if verbose else ():
            yield f"  {weight.name}: {weight.dtype}, {weight.granularity}"
    yield from _kernels(state.kernels)


def _kernels(asked: Iterable[Kernels]) -> Iterator[Block]:
    """What each provider makes of every layer, and why it runs in float."""
    for found in asked:
        yield ""
        if found.status == "not_run":
            yield f"{found.provider}: not run: {found.reason}"
            continue
        yield (
            f"{found.provider}: {found.integer} of {len(found.layers)} layers run in "
            f"integers; of {found.fusable} that can, {found.fused} do"
        )
        table = Table(("layer", "operator", "weight", "activations", "runs as", ""), 6)
        for layer in found.layers:
            weight, given = layer.weight, layer.activation
            words = (weight.dtype, weight.granularity, weight.scheme) if weight else ()
            kept = [word for word in words if word != "unknown"]
            fake = ["fake"] if weight and weight.state == "fake" else []
            activation = [given.mode, given.dtype, given.scheme]
            table.add(
                layer.node,
                layer.op,
                " ".join([*fake, *kept]),
                " ".join(filter(None, activation)),
                layer.kernel or layer.runs,
                "; ".join([*filter(None, [layer.reason]), *layer.notes]),
            )
        if table.rows:
            yield table


def _more(count: int, verbose: int, what: str) -> Iterator[Block]:
    if count > _SHOWN and not verbose:
        yield f"... {count - _SHOWN} more {what} (-v shows them)"
