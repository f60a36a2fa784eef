"""The command line: options in, `onnxopt.api` called, text and exit codes out."""

from __future__ import annotations

from onnxopt.cli.commands import cli

__all__ = ["cli"]
