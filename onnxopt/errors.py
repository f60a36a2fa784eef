"""Errors that reach the user, each with the exit code that the command line gives.

An error's text is one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxopt.report import Report, Validation


class OnnxoptError(Exception):
    """Base of every error that onnxopt raises on purpose."""

    exit_code = 2

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class UsageError(OnnxoptError, ValueError):
    """Wrong options, unreadable data, a place that cannot be written."""

    exit_code = 2


class InvalidModelError(OnnxoptError, ValueError):
    """The model is malformed, or unsafe to read."""

    exit_code = 3


class ProviderError(OnnxoptError):
    """No requested execution provider can be used, or a required one is absent."""

    exit_code = 4


class AbsentProviderError(ProviderError):
    """A required provider, or every requested one, is absent; `validation` says so."""

    def __init__(self, message: str, validation: Validation) -> None:
        super().__init__(message)
        self.validation = validation


class ValidationError(OnnxoptError):
    """The candidate does not compute what the reference computes; see `.report`."""

    exit_code = 1


class PassError(OnnxoptError):
    """A pass broke: a bug in it. The model that came in is untouched."""

    exit_code = 70


class WorkerError(OnnxoptError):
    """A worker process did not finish its job; the subclass says how."""

    exit_code = 5


class WorkerCrashedError(WorkerError):
    """The worker died on a signal or left without an answer."""


class WorkerTimeoutError(WorkerError):
    """The worker did not answer in time and was killed."""


class WorkerMemoryError(WorkerError):
    """The worker ran out of the memory that it was allowed."""


class SessionError(WorkerError):
    """ONNX Runtime refused to load the model or failed to run it."""
