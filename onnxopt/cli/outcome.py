"""How a command ends: one line on stderr where it failed, and an exit code.

0 done   1 not equal   2 usage, data, cannot write   3 bad model
4 provider absent   5 not proven, or a worker died   70 a bug in onnxopt
130 interrupted   143 terminated
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import click

from onnxopt.errors import OnnxoptError

INTERNAL_ERROR = 70
_GRACE = 2.0
"""Seconds in which a second Ctrl-C does not disturb what the first one set off."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, so that it leaves nothing behind."""


class Verb(click.Command):
    """A command with `--debug` and `-v`, which it takes itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["-v", "--verbose"],
                count=True,
                help="Say more: every skip with its reason; -vv logs every edit.",
            ),
            click.Option(
                ["--debug"], is_flag=True, help="Show the traceback of an error."
            ),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Run, with the log on stderr as -v asks, and the traceback as --debug asks."""
        debug = ctx.params.pop("debug")
        try:
            with _logging_to_stderr(ctx.params["verbose"]):
                return super().invoke(ctx)
        except Exception:
            if debug:
                traceback.print_exc()
            raise


class Cli(click.Group):
    """The command group; every way to end goes through `main`."""

    command_class = Verb

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *_: Any,
        **extra: Any,
    ) -> NoReturn:
        """Run a command line and leave with its exit code."""
        extra["standalone_mode"] = False
        try:
            with _signals():
                code = super().main(args, prog_name or "onnxopt", **extra)
        except KeyboardInterrupt as interrupt:
            code = _stopped(interrupt)
        except Exception as error:  # noqa: BLE001 - the boundary: each has its exit code
            code = _failed(error)
        _flush()
        sys.exit(code if isinstance(code, int) else 0)


def say(text: str) -> None:
    """One line on stderr, in the form of an error."""
    _to_stderr(f"onnxopt: error: {text}")


def warn(text: str) -> None:
    """One line on stderr, in the form of a warning."""
    _to_stderr(f"onnxopt: warning: {text}")


def clean(text: str) -> str:
    """The text with what could steer a terminal replaced: names come from models."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(clean(" ".join(text.split())), err=True)


def _stopped(interrupt: BaseException | None) -> int:
    terminated = isinstance(interrupt, Terminated)
    say("terminated" if terminated else "interrupted")
    return 143 if terminated else 130


def _failed(error: Exception) -> int:
    match error:
        case click.exceptions.NoArgsIsHelpError():
            error.show()
            return 2
        case click.ClickException():
            say(_click_text(error))
            return 2
        case click.exceptions.Abort():  # click's own form of an interrupt
            return _stopped(error.__cause__)
        case OnnxoptError():
            say(str(error))
            return error.exit_code
        case MemoryError():
            say("out of memory")
            return 5
        case OSError():
            say(f"{error.strerror or error}{_about_file(error)}")
            return 2
    say(f"internal error, {type(error).__name__}: {error} (--debug shows where)")
    return INTERNAL_ERROR


def _click_text(error: click.ClickException) -> str:
    text = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{text}; see {context.command_path} --help" if context else text


def _about_file(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run by an exception, which cleans up on its way.

    A second one that comes while the first is being obeyed is ignored.
    """
    last = -_GRACE

    def stop(number: int, _: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _GRACE:
            last = now
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    previous = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _logging_to_stderr(verbose: int) -> Iterator[None]:
    """Show the log of the library: warnings, from -v on progress, from -vv every edit."""
    logger, handler = logging.getLogger("onnxopt"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("onnxopt: %(message)s"))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _flush() -> None:
    """Write out stdout; a reader that has gone away is no reason to complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        say(f"cannot write to stdout: {error.strerror}")
        sys.exit(2)
