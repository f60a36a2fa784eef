"""The command line. Importing it, and `--help`, need nothing but click.

A verb reads its options, calls the function of `onnxopt.api` that does the work, shows
what came of it and returns the exit code; `cli.outcome` turns errors into theirs.
"""

from __future__ import annotations

from typing import Any

import click

from onnxopt._version import __version__
from onnxopt.cli import options
from onnxopt.cli.outcome import Cli


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxopt")
def cli() -> None:
    """Make ONNX models smaller and faster, and prove that they still compute the same."""


@cli.command()
@options.model_argument("source", "IN")
@options.pipeline
@options.transform
def optimize(source: str, recipe: str | None, passes: str | None, **given: Any) -> int:
    """Run a recipe: everything exact without one, nothing lossy."""
    from onnxopt.cli.run import transform

    options.check_pipeline(recipe, passes)
    return transform(source, recipe or "default", {**given, "passes": passes})


@cli.command()
@options.model_argument("source", "IN")
@options.transform
def simplify(source: str, **given: Any) -> int:
    """Rewrite the graph exactly: constants, identities, BatchNormalization, dead code."""
    from onnxopt.cli.run import transform

    return transform(source, "simplify", given)


@cli.command()
@options.model_argument("source", "IN")
@options.tolerance
@options.transform
def shrink(source: str, **given: Any) -> int:
    """Take out zeroed channels and dead layers: exactly, unless --tolerance is given."""
    from onnxopt.cli.run import transform

    return transform(source, "shrink", given)


@cli.command()
@options.model_argument("reference", "REFERENCE")
@options.model_argument("candidate", "CANDIDATE")
@options.json_to
@options.validation
@options.measure
def validate(
    reference: str,
    candidate: str,
    json_to: str | None,
    measure: bool,
    verbose: int,
    **given: Any,
) -> int:
    """Say whether CANDIDATE computes what REFERENCE computes: exit code 0 or 1.

    Judged at the measured noise floor, unless a budget is given.
    """
    from onnxopt import api
    from onnxopt.cli import describe, terminal
    from onnxopt.cli.document import Document
    from onnxopt.errors import AbsentProviderError, ProviderError, WorkerError
    from onnxopt.report import as_json, not_judged
    from onnxopt.validation.placement import ProviderTime

    times: list[ProviderTime] = []
    with Document(json_to) as document:
        try:
            verdict = api.validate(
                reference,
                candidate,
                data=given["data"],
                providers=given["providers"],
                time_observer=times.append if measure else None,
                **options.job_options({**given, "providers": None}),
            )
        except AbsentProviderError as error:
            document.write(as_json(error.validation))
            raise
        except (ProviderError, WorkerError) as error:
            document.write(as_json(not_judged(str(error))))
            raise
        document.write(as_json(verdict))
    terminal.show(describe.verdict(verdict, verbose), err=document.to_stdout)
    if measure:
        terminal.show(describe.provider_seconds(times), err=document.to_stdout)
    return {"passed": 0, "failed": 1, "not_run": 5}[verdict.status]


@cli.command()
@options.model_argument("source", "IN")
@options.json_to
@options.blame
def bisect(
    source: str,
    recipe: str | None,
    passes: str | None,
    json_to: str | None,
    verbose: int,
    **given: Any,
) -> int:
    """Find the pass and the edit that make the result wrong: exit code 1 if one does."""
    from onnxopt import blame
    from onnxopt.cli import describe_blame, terminal
    from onnxopt.cli.document import Document
    from onnxopt.report import as_json

    options.check_pipeline(recipe, passes)
    with Document(json_to) as document:
        found = blame.bisect(
            source,
            recipe or "default",
            given["data"],
            given["target"],
            given["repro"],
            **options.job_options({**given, "passes": passes}),
        )
        document.write(as_json(found))
    terminal.show(describe_blame.bisection(found, verbose), err=document.to_stdout)
    return 0 if found.reason is None else 1


@cli.command()
@options.model_argument("source", "IN")
@options.json_to
@options.channels
@options.quantization
def inspect(
    source: str,
    json_to: str | None,
    channels: bool,
    quantization: bool,
    providers: tuple[str, ...],
    verbose: int,
) -> int:
    """Say what a model holds: operators, sizes, zeros, dead channels, quantization."""
    from onnxopt.cli import describe, terminal
    from onnxopt.cli.document import Document
    from onnxopt.inspection import inspect as look
    from onnxopt.report import as_json

    if providers and not quantization:
        raise click.UsageError("--provider is for --quantization")
    kernels = (providers or ("cpu",)) if quantization else ()
    with Document(json_to) as document:
        found = look(source, channels=channels, kernels=kernels)
        document.write(as_json(found))
    if not document.to_stdout:
        terminal.show(describe.inspection(source, found, verbose))
    return 0


@cli.command()
@options.model_arguments("models", "IN...")
@options.json_to
@options.measurement
def bench(
    models: tuple[str, ...], json_to: str | None, verbose: int, **given: Any
) -> int:
    """Time models in turns, and say which is faster than the first.

    Less than what the noise explains is "no difference".
    """
    from onnxopt.cli import describe_compare, terminal
    from onnxopt.cli.document import Document
    from onnxopt.latency import bench as measure
    from onnxopt.report import as_json

    asked = {key: value for key, value in given.items() if value is not None}
    with Document(json_to) as document:
        found = measure(models, asked.pop("data", None), **asked)
        document.write(as_json(found))
    if not document.to_stdout:
        terminal.show(describe_compare.bench(found, verbose))
    return 0


@cli.command()
@options.model_argument("first", "A")
@options.model_argument("second", "B")
@options.json_to
def diff(first: str, second: str, json_to: str | None, verbose: int) -> int:
    """Say in what two models differ: exit code 0 where in nothing, else 1.

    Nodes, weights, inputs and outputs, metadata. Where a file keeps its weights is no
    difference.
    """
    from onnxopt.cli import describe_compare, terminal
    from onnxopt.cli.document import Document
    from onnxopt.differences import diff as compare
    from onnxopt.report import as_json

    with Document(json_to) as document:
        found = compare(first, second)
        document.write(as_json(found))
    if not document.to_stdout:
        terminal.show(describe_compare.differences(found, verbose))
    return 0 if found.equal else 1


@cli.command()
@options.json_to
def passes(json_to: str | None, verbose: int) -> int:
    """List the passes with their parameters, and the pipelines."""
    from onnxopt.cli import listing, terminal
    from onnxopt.cli.document import Document
    from onnxopt.report import as_json

    found = listing.listing()
    with Document(json_to) as document:
        document.write(as_json(found))
    if not document.to_stdout:
        terminal.show(listing.lines(found))
    return 0
