"""The verbs as functions: a model in, a proven model and a report out.

What makes feeds, runs models and judges them is imported where it is used: a run without
validation is done in less time than it takes to import that.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

import msgspec
import onnx
from onnx import ModelProto

from onnxopt import facts, recipe
from onnxopt import target as targets
from onnxopt.errors import (
    AbsentProviderError,
    OnnxoptError,
    ProviderError,
    UsageError,
    ValidationError,
    WorkerError,
)
from onnxopt.evaluate import Evaluator
from onnxopt.ledger import Edited, Ledger
from onnxopt.manager import Context, Observer, Pass, PassManager
from onnxopt.model import Model, Source
from onnxopt.report import (
    Check,
    Guarantee,
    PassReport,
    Report,
    Validation,
    not_judged,
)
from onnxopt.save import Staged, fits_in_protobuf, measure, stage, to_proto
from onnxopt.settings import Options, ValidationOptions
from onnxopt.validation import interface

if TYPE_CHECKING:
    from onnxopt.data import Feeds
    from onnxopt.quantization.calibration import Calibration
    from onnxopt.validation.placement import ProviderTime

OnFailure = Literal["raise", "return", "rollback"]
MAX_WRONG = 8
"""So many wrong edits are rolled back one by one."""
_CANDIDATE = "candidate.onnx"


class Result(msgspec.Struct):
    """A transformed model and its report.

    Where `base_dir` is set, the weights lie in files there, which live as long as the
    result.
    """

    _report: Report
    base_dir: Path | None = None
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    _model: Model | None = None
    _as_graph: bool = False
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _proto: ModelProto | None = None

    @property
    def report(self) -> Report:
        """What changed, what was skipped and why, and the verdict.

        Of a result that was not validated, digests and sizes are made on the first
        access, which reads the input and the weights; raises UsageError where these
        files have changed since.
        """
        report, model = self._report, self._model
        if report.output is None and model is not None:
            _hash_source(report, model)
            report.output = facts.of_staged(model, measure(model, Path(_CANDIDATE)))
        return report

    @property
    def model(self) -> Any:
        """The model: a ModelProto, or a gs.Graph where one came in. Built on access.

        Below 2 GiB it is self-contained; above, its weights are external data in
        `base_dir`.
        """
        if self._proto is None:
            self._proto = self._build()
        if not self._as_graph:
            return self._proto
        import onnx_graphsurgeon as gs

        return gs.import_onnx(self._proto)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, atomically; external data goes beside it where needed.

        Raises UsageError where it cannot be written.
        """
        assert self._model is not None
        with stage(self._model, Path(path), hashes=False) as staged:
            staged.keep = self._model.weights.data_files()
            staged.commit()

    def _build(self) -> ModelProto:
        assert self._model is not None
        if fits_in_protobuf(self._model):
            return to_proto(self._model)
        self._folder = tempfile.TemporaryDirectory(prefix="onnxopt-")
        self.base_dir = Path(self._folder.name)
        path = self.base_dir / "model.onnx"
        self.save(path)
        return onnx.load(path, load_external_data=False)


def optimize(
    model: Source,
    recipe: str = "default",
    data: Any = None,
    target: str = "onnx",
    on_failure: OnFailure = "raise",
    **options: Unpack[Options],
) -> Result:
    """Run a recipe over a copy of `model` and prove the result against the original.

    `recipe`: a pipeline's name or a YAML file; `data`: feeds (see `onnxopt.data`), made
    up where None. Raises ValidationError (with the report) where the result is wrong,
    InvalidModelError, UsageError, ProviderError or WorkerError as their names say.
    `on_failure="return"` returns a failed result all the same; `"rollback"` makes all
    edits but those that are found to be wrong.
    """
    job = Job.create(model, recipe, data, target, options)
    with job.run(on_failure) as (result, _):
        return result


def simplify(
    model: Source,
    data: Any = None,
    target: str = "onnx",
    on_failure: OnFailure = "raise",
    **options: Unpack[Options],
) -> Result:
    """`optimize` with the exact rewrites only; see there."""
    return optimize(model, "simplify", data, target, on_failure, **options)


def shrink(
    model: Source,
    data: Any = None,
    target: str = "onnx",
    on_failure: OnFailure = "raise",
    **options: Unpack[Options],
) -> Result:
    """`optimize` with what takes out zeroed channels and dead layers; see there.

    Exact: constant channels go into biases. Activations are taken to be finite. With
    `tolerance` lossy: channels near zero go, too, within the budget (`min_sqnr`, `metric`
    with `max_drop`...).
    """
    return optimize(model, "shrink", data, target, on_failure, **options)


def validate(
    reference: Source,
    candidate: Source,
    providers: Sequence[str] = ("cpu",),
    data: Any = None,
    **options: Unpack[ValidationOptions],
) -> Validation:
    """Judge `candidate` against `reference` on every provider; never raises for a no.

    At the noise floor, unless a budget is given. Raises as `optimize` does where
    something could not be run or read.
    """
    chosen = cast(Options, {**options, "providers": providers})
    base = options.get("base_dir")
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
        first = Model.open(reference, base)
        second = Model.open(candidate, base)
        _check_options(chosen)
        feeds = _feeds(first, data, chosen)
        paths = (
            _on_disk(first, reference, Path(folder) / "reference.onnx", base),
            _on_disk(second, candidate, Path(folder) / _CANDIDATE, base),
        )
        verdict = _judge(paths, feeds, chosen)
    problem = interface.difference(interface.of(first.proto), interface.of(second.proto))
    return verdict if problem is None else _as_failed(verdict, problem)


class Job(msgspec.Struct):
    """One run of a pipeline, ready to go."""

    source: Source
    passes: Sequence[Pass]
    recipe: str
    target: targets.Target
    data: Any
    options: Options

    @classmethod
    def create(
        cls, source: Source, name: str, data: Any, target: str, options: Options
    ) -> Job:
        """Read the recipe and check the options, before any model is read."""
        _check_options(options)
        given = options.get("passes")
        if given is not None:
            passes = recipe.parse_pipeline(given) if isinstance(given, str) else given
            passes = _tolerant(passes, options)
            return cls(source, passes, "passes", targets.target(target), data, options)
        passes, said = recipe.load_recipe(name)
        passes = _tolerant(passes, options)
        if said.opset is not None and options.get("opset") is None:
            options = {**options, "opset": said.opset}
        if said.target is not None and target == "onnx":
            target = said.target
        return cls(
            source, passes, said.name or name, targets.target(target), data, options
        )

    @contextlib.contextmanager
    def run(
        self, on_failure: OnFailure = "raise", output: Path | None = None
    ) -> Iterator[tuple[Result, Staged]]:
        """Transform, stage (beside `output` where given) and judge.

        Inside the context the staged file can be committed; after it, it is gone.
        """
        with self.attempts(output) as run:
            report, limit = run.report, self.options.get("bisect_limit")
            run.tolerant, run.is_kept = on_failure == "rollback", output is not None
            result, staged = run.attempt(limit)
            if _failed(report) and on_failure == "rollback":
                staged.discard()
                result, staged = run.roll_back(limit)
            run.tell_times()
            with staged:
                staged.keep = run.keep
                if _failed(report) and on_failure != "return":
                    raise ValidationError(why(report.validation))
                self._require_validation(report)
                yield result, staged

    @contextlib.contextmanager
    def attempts(self, output: Path | None = None) -> Iterator[Attempts]:
        """What runs the pipeline over the source, as often as asked.

        An error that comes after the source was read carries the report.
        """
        with tempfile.TemporaryDirectory(prefix="onnxopt-") as name:
            folder = Path(name)
            original = Model.open(self.source, self.options.get("base_dir"))
            reference = _on_disk(
                original,
                self.source,
                folder / "reference.onnx",
                self.options.get("base_dir"),
            )
            keep = _kept_data(original, self.source, output)
            report = Report(
                recipe=self.recipe,
                target=self.target.name,
                source=facts.of_file(
                    original, reference, hashes=self._is_looked_at(output)
                ),
            )
            target = output or folder / _CANDIDATE
            with _carrying(report, original):
                given = self._feeds(original)
                judged = self.options.get("validate", True)
                yield Attempts(
                    self,
                    report,
                    reference,
                    target,
                    keep,
                    given if judged else None,
                    given if self.data is not None else None,
                    interface.of(original.proto),
                    original,
                )

    def _is_looked_at(self, output: Path | None) -> bool:
        """Whether the run itself needs the file of the result, or its digests."""
        is_path = isinstance(self.source, str | os.PathLike)
        return (
            output is not None
            or not is_path
            or self.options.get("base_dir") is not None
            or self.options.get("validate", True)
            or self.target.name != "onnx"
        )

    def _feeds(self, original: Model) -> Feeds | None:
        """What the result is judged on: the user's data, or made-up feeds."""
        judged = self.options.get("validate", True)
        if not judged and self.data is None:
            return None
        return _feeds(original, self.data, self.options)  # also says what is wrong

    def _require_validation(self, report: Report) -> None:
        validation = report.validation
        if validation is None or validation.status != "not_run":
            return
        if self.options.get("require_validation"):
            raise WorkerError(f"the result is not proven: {validation.reason}")
        report.notes.append(f"not proven: {validation.reason}")


class Attempts(msgspec.Struct):
    """The runs of one job: the first one, and those that look for a wrong edit.

    `feeds`: what the result is judged on, if it is; `data`: those of the user, for
    passes. `history`: the edits of the last one; `times`: what its verdict measured,
    where asked for; `forbidden`: edits that are not made. Where `tolerant`, a result that
    crashes its worker, hangs or takes all memory is wrong as any other. `is_kept`:
    whether the file that is made is what was asked for. `starts_right`: whether the
    result without any edit is known to be right.
    """

    job: Job
    report: Report
    reference: Path
    target: Path
    keep: list[Path]
    feeds: Feeds | None
    data: Feeds | None
    ends: interface.Interface
    opened: Model | None
    history: list[Edited] = msgspec.field(default_factory=list)
    times: list[ProviderTime] = msgspec.field(default_factory=list)
    forbidden: frozenset[Edited] = frozenset()
    tolerant: bool = False
    is_kept: bool = False
    starts_right: bool = False

    @property
    def has_failed(self) -> bool:
        """Whether the result of the last attempt is wrong."""
        return _failed(self.report)

    def attempt(self, limit: int | None) -> tuple[Result, Staged]:
        """One whole run with at most `limit` edits; fills in the report."""
        report, options = self.report, self.job.options
        model = self._prepared(self._take_source())
        model.ledger = Ledger(report.source.bytes.model + report.source.bytes.data, limit)
        model.ledger.forbidden = self.forbidden
        evaluator = Evaluator(options.get("timeout", 600.0))
        context = Context(self.job.target, evaluator, self._calibration())
        manager = PassManager(
            self.job.passes,
            verify_each=options.get("verify_each", False),
            observer=self._observer(),
        )
        with context.evaluator:
            manager.run(model, context)
        self.history = list(model.ledger.history)
        self.times = []
        report.passes = model.ledger.reports()
        report.notes = list(model.notes)
        report.output = None
        staged = self._staged(model)
        as_graph = not isinstance(self.job.source, str | os.PathLike | ModelProto)
        result = Result(
            report,
            seconds=manager.seconds,
            _model=model,
            _as_graph=as_graph,
        )
        return result, staged

    def _calibration(self) -> Calibration | None:
        """What runs models on the user's data."""
        if self.data is None:
            return None
        from onnxopt.quantization.calibration import Calibration

        options = self.job.options
        return Calibration(
            self.data,
            timeout=options.get("timeout", 600.0),
            memory_limit=options.get("memory_limit"),
            custom_op_libraries=tuple(options.get("custom_op_libraries") or ()),
        )

    def _staged(self, model: Model) -> Staged:
        """The result as a file, judged; nothing where nobody looks at it."""
        report, target = self.report, self.job.target.name
        if not (self.is_kept or self.feeds is not None or target != "onnx"):
            return Staged(self.target)
        staged = stage(model, self.target)
        try:
            report.notes += _target_notes(target, staged.path)
            made = Model.open(staged.path)
            report.output = facts.of_staged(made, staged)
            if self.feeds is not None:
                times = self.times if self.job.options.get("time_observer") else None
                report.validation = self._judged(staged.path, report.passes, times)
                _check_format(report, self.reference, staged.path)
                self._check_interface(interface.of(made.proto))
        except BaseException:
            staged.discard()
            raise
        return staged

    def _judged(
        self, path: Path, passes: Sequence[PassReport], times: list[ProviderTime] | None
    ) -> Validation:
        """The verdict; a candidate that takes its worker down is wrong, if tolerated."""
        try:
            return self._verdict(path, passes, times)
        except WorkerError as error:
            if not (self.tolerant and str(error).startswith("candidate: ")):
                raise
            return msgspec.structs.replace(not_judged(str(error)), status="failed")

    def tell_times(self) -> None:
        """Tell the caller's observer what the last attempt measured."""
        observer = self.job.options.get("time_observer")
        if observer is not None:
            for time in self.times:
                observer(time)

    def _take_source(self) -> Model:
        """The source as it came: for the first attempt the model that is open anyway."""
        model, self.opened = self.opened, None
        return model or Model.open(self.job.source, self.job.options.get("base_dir"))

    def _check_interface(self, made: interface.Interface) -> None:
        frozen = bool(self.job.options.get("freeze_inputs"))
        problem = interface.difference(self.ends, made, frozen=frozen)
        if problem is not None and self.report.validation is not None:
            self.report.validation = _as_failed(self.report.validation, problem)

    def _prepared(self, model: Model) -> Model:
        freeze = self.job.options.get("freeze_inputs")
        shapes = self.job.options.get("fix_shapes")
        opset = self.job.options.get("opset")
        if not (freeze or shapes or opset is not None):
            return model
        from onnxopt import prepare

        if freeze:
            model = prepare.freeze_inputs(model)
        if shapes:
            model = prepare.fix_shapes(model, shapes)
        if opset is not None:
            model = prepare.raise_opset(model, opset)
        return model

    def _verdict(
        self,
        candidate: Path,
        passes: Sequence[PassReport],
        times: list[ProviderTime] | None = None,
    ) -> Validation:
        """The candidate's verdict; providers are timed where there is a list for it."""
        assert self.feeds is not None
        fired = {entry.guarantee for entry in passes if entry.edits}
        if self.job.options.get("opset") is not None:
            fired.add("equivalent")  # onnx's converter promises nothing more
        paths = (self.reference, candidate)
        observer = None if times is None else times.append
        options: Options = {**self.job.options, "time_observer": observer}
        return _judge(paths, self.feeds, options, fired)

    def _observer(self) -> Observer | None:
        """The caller's observer; under `verify_each` also a run of every result."""
        given = self.job.options.get("observer")
        if not self.job.options.get("verify_each") or self.feeds is None:
            return given

        def observe(pass_: Pass, model: Model, edits: int) -> None:
            if given is not None:
                given(pass_, model, edits)
            if edits:
                with stage(model, self.target) as staged:
                    verdict = self._verdict(staged.path, model.ledger.reports())
                if verdict.status == "failed":
                    self.report.passes = model.ledger.reports()
                    self.report.validation = verdict
                    raise ValidationError(f"after pass {pass_.name}: {why(verdict)}")

        return observe

    def roll_back(self, limit: int | None = None) -> tuple[Result, Staged]:
        """The run of at most `limit` edits without its wrong ones; all others are made.

        Each wrong edit is found by bisection and forbidden; where there are too many,
        what comes before the first of them is kept.
        """
        reasons, bad = [], 0
        for _ in range(MAX_WRONG):
            reason = why(self.report.validation)
            bad = self.first_wrong_edit()
            if not bad:
                break
            entry = self.history[bad - 1]
            reasons.append(
                f"rolled back edit {bad}, by {entry.name} at {entry.node} "
                f"({entry.why}): {reason}"
            )
            self.forbidden |= {entry}
            result, staged = self.attempt(limit)
            if not _failed(self.report):
                self.report.notes += reasons
                return result, staged
            staged.discard()
        result, staged = self.attempt(max(bad - 1, 0))
        self.report.notes += [*reasons, f"kept the first {max(bad - 1, 0)} edits only"]
        return result, staged

    def first_wrong_edit(self) -> int:
        """The number of the first edit after which the result is wrong.

        0 where it is wrong before the first. To be asked after an attempt at all edits
        whose result was wrong; `history` then ends with the edit that was found.
        """
        good, bad = 0, len(self.history)
        if not self.starts_right:
            self.attempt(0)[1].discard()
            if self.has_failed:
                return 0
            self.starts_right = True
        while bad - good > 1:
            middle = (good + bad) // 2
            _, staged = self.attempt(middle)
            staged.discard()
            good, bad = (good, middle) if _failed(self.report) else (middle, bad)
        if len(self.history) != bad and bad:
            self.attempt(bad)[1].discard()
        return bad


@contextlib.contextmanager
def _carrying(report: Report, original: Model) -> Iterator[None]:
    """Let an error carry the report, which says what could not be judged and why."""
    try:
        yield
    except AbsentProviderError as error:
        report.validation = error.validation
        error.report = error.report or report
        raise
    except OnnxoptError as error:
        with contextlib.suppress(UsageError):  # the file has changed: no digest
            _hash_source(report, original)
        if isinstance(error, ProviderError | WorkerError) and report.validation is None:
            report.validation = Validation("not_run", str(error), "", 0, [], [], [])
        error.report = error.report or report
        raise


def _hash_source(report: Report, model: Model) -> None:
    """Fill in the digests of the input where they were not asked for so far."""
    if report.source.sha256 == facts.NOT_HASHED:
        digest = facts.digest_of_source(model)
        report.source = msgspec.structs.replace(report.source, sha256=digest)


def _check_options(options: Options) -> None:
    """Raise for what can be known to be wrong before any model is read.

    TypeError for an argument that there is not, UsageError for the rest.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")
    wanted = (
        *(options.get("providers") or ()),
        *(options.get("require_providers") or ()),
    )
    if wanted:
        from onnxopt.runtime import provider_name, provider_options

        for provider in wanted:
            provider_name(provider)
            provider_options(provider)
    metric = options.get("metric")
    if metric is not None:
        from onnxopt.data import load_function

        load_function(metric)
    elif options.get("max_drop") is not None:
        raise UsageError("--max-drop needs --metric script.py:function")


def _tolerant(passes: Sequence[Pass], options: Options) -> Sequence[Pass]:
    """The pipeline, with what rounds to zero before what takes out channels."""
    tolerance = options.get("tolerance")
    if not tolerance:
        return passes
    for index, entry in enumerate(passes):
        if entry.name in ("dead-layers", "zero-channels"):
            rounding = recipe.make_pass("round-to-zero", {"tolerance": tolerance})
            return [*passes[:index], rounding, *passes[index:]]
    raise UsageError("a tolerance needs a pipeline with dead-layers or zero-channels")


def _feeds(model: Model, spec: Any, options: Options) -> Feeds:
    """The feeds that `spec` names, else made-up ones, for the inputs of `model`."""
    from onnxopt import data

    inputs = data.input_specs(model.proto)
    if spec is not None:
        return data.load_feeds(spec, inputs, options.get("batch_size"))
    shapes = {**(options.get("input_shapes") or {}), **(options.get("fix_shapes") or {})}
    return data.generate_feeds(
        inputs, model=model.proto, seed=options.get("seed", 0), shapes=shapes
    )


def _judge(
    paths: tuple[Path, Path],
    feeds: Feeds,
    options: Options,
    guarantees: Set[Guarantee] = frozenset({"equivalent"}),
) -> Validation:
    """Run the files at `paths` (reference, candidate) and compare what they compute.

    `guarantees`: those of the passes that fired, by which the candidate is judged.
    """
    from onnxopt.validation.judge import Budget, judge

    budget = Budget(
        min_sqnr=options.get("min_sqnr"),
        rtol=options.get("rtol"),
        atol=options.get("atol"),
        metric=options.get("metric"),
        max_drop=options.get("max_drop"),
    )
    return judge(
        *paths,
        providers=tuple(options.get("providers") or _default_providers(options)),
        feeds=feeds,
        budget=budget,
        lossy="lossy" in guarantees,
        bitwise=guarantees <= {"bitwise"},
        required=tuple(options.get("require_providers") or ()),
        custom_op_libraries=tuple(options.get("custom_op_libraries") or ()),
        timeout=options.get("timeout", 600.0),
        memory_limit=options.get("memory_limit"),
        seed=options.get("seed", 0),
        time_observer=options.get("time_observer"),
    )


def _target_notes(target: str, path: Path) -> list[str]:
    """What a model for `target` should expect of it."""
    if target != "ort-cuda":
        return []
    from onnxopt.validation.placement import target_notes

    return target_notes(path)


def _default_providers(options: Options) -> tuple[str, ...]:
    """The CPU, unless the user required others."""
    return () if options.get("require_providers") else ("cpu",)


def _on_disk(
    model: Model, source: Source, spare: Path, base_dir: str | os.PathLike[str] | None
) -> Path:
    """A file that holds `model`: the source itself, or a copy at `spare`."""
    if isinstance(source, str | os.PathLike) and base_dir is None:
        return Path(source)
    stage(model, spare).commit()
    return spare


def _kept_data(original: Model, source: Source, output: Path | None) -> list[Path]:
    """The input's data files, which stay, unless the output replaces the input.

    Raises UsageError where the output would replace one of them.
    """
    found = original.weights.data_files()
    if output is None or not output.exists():
        return found
    if any(file.exists() and output.samefile(file) for file in found):
        raise UsageError(f"cannot write {output}: it holds weights of the input")
    is_path = isinstance(source, str | os.PathLike)
    return [] if is_path and output.samefile(source) else found


def _failed(report: Report) -> bool:
    return report.validation is not None and report.validation.status == "failed"


def why(validation: Validation | None) -> str:
    """One line: what failed, where, by how much."""
    if validation is None:
        return "it was not validated"
    if validation.reason:
        return validation.reason
    bad: list[Check] = [check for check in validation.checks if check.status == "failed"]
    return "; ".join(f"{c.provider} {c.level}: {c.reason}" for c in bad) or "unknown"


def _check_format(report: Report, reference: Path, candidate: Path) -> None:
    """Fail where onnx.checker accepts the reference but not the candidate."""
    problem = _checker_problem(candidate)
    if problem is None or report.validation is None:
        return
    if _checker_problem(reference) is None:
        report.validation = _as_failed(report.validation, f"onnx.checker: {problem}")
    else:
        report.notes.append(f"onnx.checker objects, as it does to the input: {problem}")


def _as_failed(validation: Validation, reason: str) -> Validation:
    return msgspec.structs.replace(validation, status="failed", reason=reason)


def _checker_problem(path: Path) -> str | None:
    try:
        onnx.checker.check_model(os.fspath(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]
    return None


__all__ = ["Job", "Options", "Result", "optimize", "simplify", "validate", "why"]
