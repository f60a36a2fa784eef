"""Running a verb that writes a model: `optimize`, `simplify`, `shrink`.

In this order: what is wrong with the command line, the run, the report under a
temporary name, then the model, then the report. So a report that cannot be written
keeps the model from appearing, and one that is there tells of a finished run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from onnxopt import api, files
from onnxopt.cli import describe, options, terminal
from onnxopt.cli.document import Document
from onnxopt.cli.outcome import warn
from onnxopt.errors import InvalidModelError, OnnxoptError, UsageError, ValidationError
from onnxopt.manager import Observer, Pass
from onnxopt.model import Model
from onnxopt.report import Report

if TYPE_CHECKING:
    from onnxopt.validation.placement import ProviderTime


def transform(source: str, recipe: str, given: Mapping[str, Any]) -> int:
    """Run `recipe` over the model at `source` as the options say; the exit code."""
    output = _output(source, given)
    times: list[ProviderTime] = []
    with Document(given["report"]) as report, Document(given["timings"]) as timings:
        job = api.Job.create(
            source,
            recipe,
            given["data"],
            given["target"],
            {
                **options.job_options(dict(given)),  # type: ignore[typeddict-item]
                "observer": _printer(given["print_after"], report.to_stdout),
                "time_observer": times.append if given["measure"] else None,
            },
        )
        _check_names(given["print_after"], job.passes)
        command = _Command(source, job, output, report, timings, times, given)
        try:
            return command.run()
        except InvalidModelError:
            raise
        except OnnxoptError as error:
            if error.report is not None:
                with contextlib.suppress(
                    UsageError
                ):  # the first error is the one to tell
                    report.write(error.report.to_json())
                if error.report.output is not None:
                    command.show(error.report)
            raise


class _Command:
    """One run and what becomes of it."""

    def __init__(
        self,
        source: str,
        job: api.Job,
        output: Path | None,
        report: Document,
        timings: Document,
        times: Sequence[ProviderTime],
        given: Mapping[str, Any],
    ) -> None:
        self.source = source
        self.job = job
        self.output = output
        self.report = report
        self.timings = timings
        self.times = times
        self.given = given

    def run(self) -> int:
        """Transform, judge, write; the exit code."""
        force, on_failure = self.given["force"], self.given["on_failure"]
        if force and on_failure == "raise":
            on_failure = "return"
        with self.job.run(on_failure, self.output) as (result, staged):
            made = result.report
            failed = made.validation is not None and made.validation.status == "failed"
            written = self.output is not None and (force or not failed)
            self.report.stage(made.to_json())
            self.timings.stage(self._timings_json(result.seconds))
            if written:
                staged.commit()
            self.report.commit()
            self.timings.commit()
        self.show(made)
        if self.given["time_passes"]:
            terminal.show(describe.seconds(result.seconds), err=self.report.to_stdout)
        if self.given["measure"]:
            terminal.show(
                describe.provider_seconds(self.times), err=self.report.to_stdout
            )
        if failed and not written:
            raise ValidationError(f"validation failed: {api.why(made.validation)}")
        self._say_what_is_unproven(made, failed)
        if written:
            terminal.show([f"written: {self.output}"], err=self.report.to_stdout)
        return 1 if failed else 0

    def show(self, made: Report) -> None:
        """The report as text; on stderr where stdout takes the JSON."""
        lines = describe.report(self.source, made, self.given["verbose"])
        terminal.show(lines, err=self.report.to_stdout)

    def _timings_json(self, seconds: Mapping[str, float]) -> str:
        found: dict[str, object] = {"cpu_seconds": seconds}
        if self.given["measure"]:
            found["provider_seconds"] = self.times
        text = msgspec.json.format(msgspec.json.encode(found), indent=2)
        return text.decode() + "\n"

    def _say_what_is_unproven(self, made: Report, failed: bool) -> None:
        if made.validation is None:
            warn("not validated: the result is not proven")
        elif failed:
            warn(f"validation failed, written all the same: {api.why(made.validation)}")
        elif made.validation.status == "not_run":
            warn(f"not validated, the result is not proven: {made.validation.reason}")
        else:
            for check in made.validation.checks:
                if check.status == "not_run":
                    warn(f"{check.provider} {check.level}: not run: {check.reason}")


def _output(source: str, given: Mapping[str, Any]) -> Path | None:
    """Where the model goes, None for nowhere; raises UsageError before any work."""
    if given["output"] is None and not given["dry_run"]:
        raise UsageError("give -o OUT for the model to write, or --dry-run")
    named = [given[key] for key in ("output", "report", "timings")]
    paths = [Path(name).resolve() for name in named if name not in (None, "-")]
    if len(set(paths)) < len(paths):
        raise UsageError("-o, --report and --timings must be different files")
    if Path(source).resolve() in paths[given["output"] is not None :]:
        raise UsageError("--report and --timings must not be the model itself")
    if given["output"] is None:
        return None
    output = Path(given["output"])
    files.check_target(output)
    return None if given["dry_run"] else output


def _check_names(names: Sequence[str], passes: Sequence[Pass]) -> None:
    known = {entry.name for entry in passes}
    for name in names:
        if name != "all" and name not in known:
            raise UsageError(
                f"--print-after {name}: no such pass in this run; there are "
                f"{', '.join(sorted(known)) or 'none'}"
            )


def _printer(names: Sequence[str], to_stderr: bool) -> Observer | None:
    """What shows the model after the passes in `names`."""
    if not names:
        return None

    import onnx.printer

    def show(pass_: Pass, model: Model, edits: int) -> None:
        if edits and ("all" in names or pass_.name in names):
            model.settle()
            text = onnx.printer.to_text(model.proto)
            heading = f"after {pass_.name} ({edits} edits):"
            terminal.show([heading, *text.splitlines()], err=to_stderr)

    return show
