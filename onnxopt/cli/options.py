"""The options that several verbs share.

A parameter is called as in `onnxopt.api.Options`, so that a verb hands on what it was
given. Nothing heavy is imported before an option is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from onnxopt.errors import UsageError
from onnxopt.settings import Options

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


def job_options(given: dict[str, Any]) -> dict[str, Any]:
    """Of a verb's parameters those that `onnxopt.api` takes, less what was not given."""
    return {
        key: value
        for key, value in given.items()
        if key in Options.__annotations__ and value is not None and value != ()
    }


def check_pipeline(recipe: str | None, passes: str | None) -> None:
    """Raise UsageError where both are given."""
    if recipe is not None and passes is not None:
        raise UsageError("give --recipe or --passes, not both")


def _together(*decorators: Decorator[Any]) -> Decorator[Any]:
    """One decorator for several options, listed in help as they are here."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _shapes(
    _: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """`x:1,3,224,224`, several times, as a dict."""
    if not values:
        return {}
    from onnxopt.data.inputs import parse_shape

    shapes: dict[str, tuple[int, ...]] = {}
    for text in values:
        try:
            name, dims = parse_shape(text)
        except UsageError as error:
            raise click.BadParameter(str(error), param=parameter) from None
        if name in shapes:
            raise click.BadParameter(f"{name!r} is given twice", param=parameter)
        shapes[name] = dims
    return shapes


def model_argument(name: str, label: str) -> Decorator[Any]:
    """A model file that is there."""
    kind = click.Path(exists=True, dir_okay=False)
    return click.argument(name, type=kind, metavar=label)


def model_arguments(name: str, label: str) -> Decorator[Any]:
    """One or more model files that are there."""
    kind = click.Path(exists=True, dir_okay=False)
    return click.argument(name, type=kind, metavar=label, nargs=-1, required=True)


_data = click.option(
    "--data",
    metavar="SPEC",
    help="Feeds: file.npz, a folder of .npz, an ONNX test_data_set_* folder, or "
    "script.py:function. Made up (seeded) without it.",
)

_seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of made-up feeds.",
)

_batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Samples a feed: of an .npz file; in bench of made-up feeds too.",
)

_input_shapes = click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    callback=_shapes,
    metavar="NAME:DIMS",
    help="Shape of an input's made-up feeds, as in x:1,3,224,224. Repeatable.",
)

_custom_op_libraries = click.option(
    "--custom-op-library",
    "custom_op_libraries",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="SO",
    help="Load custom operators, in the worker only. Repeatable.",
)

_timeout = click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For each load and each run of a model in ONNX Runtime (600).",
)

_memory_limit = click.option(
    "--memory-limit",
    type=click.IntRange(min=1),
    metavar="BYTES",
    help="Of each model's process, above what it takes without a model.",
)

validation = _together(
    _data,
    click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="P",
        help="Execution provider to validate on (cpu, cuda, tensorrt, ...), with options "
        "as in cuda:device_id=1. Repeatable; cpu without it.",
    ),
    click.option(
        "--require-provider",
        "require_providers",
        multiple=True,
        metavar="P",
        help="A provider that must be there: exit code 4 where it is not. Repeatable.",
    ),
    _seed,
    _batch_size,
    _input_shapes,
    click.option(
        "--min-sqnr",
        type=float,
        metavar="DB",
        help="Budget: the least signal-to-noise ratio of any output.",
    ),
    click.option(
        "--rtol",
        type=click.FloatRange(min=0),
        help="Budget: relative tolerance, in place of the measured noise floor.",
    ),
    click.option(
        "--atol",
        type=click.FloatRange(min=0),
        help="Budget: absolute tolerance, in place of the measured noise floor.",
    ),
    click.option(
        "--metric",
        metavar="SCRIPT.py:F",
        help="Budget: F(run) -> float, higher is better, called once per model.",
    ),
    click.option(
        "--max-drop",
        type=click.FloatRange(min=0),
        metavar="X",
        help="Budget: by how much the metric may drop (absolute).",
    ),
    _custom_op_libraries,
    _timeout,
)

measure = click.option(
    "--measure",
    is_flag=True,
    help="Time both models on each provider, and print which part each one takes.",
)

_report = click.option(
    "--report",
    metavar="FILE",
    help="Write the report as JSON; - is stdout.",
)

pipeline = _together(
    click.option(
        "--recipe",
        metavar="NAME|FILE.yaml",
        help="A pipeline (see onnxopt passes) or a YAML file; default without it.",
    ),
    click.option(
        "--passes",
        metavar="PIPELINE",
        help="Passes in place of a recipe, as in 'a,b{x=1}'; '' copies the model.",
    ),
)

preparation = _together(
    click.option(
        "--target",
        default="onnx",
        show_default=True,
        metavar="T",
        help="What the model is to run on: onnx, ort-cpu, ort-cpu-x86, ort-cpu-arm, "
        "ort-cuda, tensorrt.",
    ),
    click.option(
        "--opset",
        type=click.IntRange(min=1),
        metavar="N",
        help="Raise the standard operator set, with onnx's version converter.",
    ),
    click.option(
        "--fix-shape",
        "fix_shapes",
        multiple=True,
        callback=_shapes,
        metavar="NAME:DIMS",
        help="Fix an input's shape in the file. Repeatable.",
    ),
    click.option(
        "--freeze-inputs",
        is_flag=True,
        help="Make inputs that have a default value constants.",
    ),
)

_bisect_limit = click.option(
    "--bisect-limit",
    type=click.IntRange(min=0),
    metavar="N",
    help="Stop after N edits, to find a wrong one.",
)

transform = _together(
    click.option(
        "-o",
        "--output",
        type=click.Path(dir_okay=False),
        metavar="OUT",
        help="The model to write; may be IN itself.",
    ),
    preparation,
    _report,
    click.option("--dry-run", is_flag=True, help="Do everything but write the model."),
    validation,
    measure,
    click.option(
        "--no-validate",
        "validate",
        flag_value=False,
        default=True,
        help="Do not run the result against the original: it stays unproven.",
    ),
    click.option(
        "--require-validation",
        is_flag=True,
        help="Fail where the models cannot be run, rather than warn.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Write the model even where validation fails (the exit code stays 1).",
    ),
    click.option(
        "--on-failure",
        type=click.Choice(["raise", "rollback"]),
        default="raise",
        show_default=True,
        help="Where validation fails: give up, or make all edits but the wrong ones.",
    ),
    click.option(
        "--print-after",
        multiple=True,
        metavar="PASS",
        help="Print the model after each run of a pass that changed it ('all' for any).",
    ),
    click.option("--time-passes", is_flag=True, help="Print the CPU time of each pass."),
    click.option(
        "--timings",
        metavar="FILE",
        help="Write the times of the passes, and those of --measure, as JSON.",
    ),
    _bisect_limit,
    click.option(
        "--verify-each",
        is_flag=True,
        help="Check the graph and run it in ONNX Runtime after each pass.",
    ),
)

tolerance = click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="T",
    help="Lossy: take channels as zero whose weights, scales and biases are at most T in "
    "magnitude. Judged by the budget, or the floor of lossy passes.",
)

channels = click.option(
    "--channels",
    is_flag=True,
    help="List every layer: its channels that are zero, constant or unused, and what "
    "keeps the others.",
)

quantization = _together(
    click.option(
        "--quantization",
        is_flag=True,
        help="List every layer: how it is quantized, and whether ONNX Runtime runs it in "
        "integers, with the reason where it does not.",
    ),
    click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="P",
        help="Execution provider to ask with --quantization. Repeatable; cpu without it.",
    ),
)

measurement = _together(
    click.option(
        "--provider",
        default="cpu",
        show_default=True,
        metavar="P",
        help="Execution provider (cpu, cuda, tensorrt, ...), with options as in "
        "cuda:device_id=1.",
    ),
    click.option(
        "--level",
        type=click.Choice(["enable_all", "disable_all"]),
        default="enable_all",
        show_default=True,
        help="How far ONNX Runtime optimizes; deployment runs enable_all.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="N",
        help="Threads in an operator; on Linux the CPU provider is pinned to N CPUs.",
    ),
    click.option(
        "--clock",
        type=click.Choice(["wall", "cpu"]),
        help="What is compared; without it cpu for one thread on the CPU, else wall.",
    ),
    click.option(
        "--rounds",
        type=int,
        default=20,
        show_default=True,
        metavar="N",
        help="Blocks of runs of each model, which take turns.",
    ),
    click.option(
        "--starts",
        type=int,
        metavar="N",
        help="Processes of each model, one after the other; one every two rounds "
        "without it.",
    ),
    click.option(
        "--runs",
        type=int,
        metavar="N",
        help="Runs in a block; without it what the fastest model does in 0.1 s.",
    ),
    _data,
    _seed,
    _batch_size,
    _input_shapes,
    _custom_op_libraries,
    _timeout,
    _memory_limit,
)

json_to = click.option(
    "--json", "json_to", metavar="FILE", help="Write JSON to a file; - is stdout."
)

blame = _together(
    pipeline,
    preparation,
    click.option(
        "--repro",
        type=click.Path(file_okay=False),
        metavar="DIR",
        help="Write before.onnx, after.onnx and feed.npz: the parts that differ.",
    ),
    validation,
    _bisect_limit,
)
