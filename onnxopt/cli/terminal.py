"""Showing text and tables: with rich on a terminal, as plain text elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO

from onnxopt.cli.outcome import clean

_STYLES = {"passed": "green", "failed": "bold red", "not run": "yellow"}


@dataclass
class Table:
    """Rows under a header; the columns after the first `left` ones are numbers."""

    header: Sequence[str]
    left: int = 1
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row."""
        self.rows.append(cells)


Block = str | Table
"""A line of text, or a table."""


def show(blocks: Iterable[Block], *, err: bool = False) -> None:
    """Write blocks to stdout (or stderr); a reader that has gone away is no error."""
    stream = sys.stderr if err else sys.stdout
    with contextlib.suppress(BrokenPipeError):
        if stream.isatty():
            _show_rich(blocks, stream)
        else:
            for block in blocks:
                lines = [block] if isinstance(block, str) else plain(block)
                stream.writelines(clean(line) + "\n" for line in lines)
        stream.flush()


def plain(table: Table) -> list[str]:
    """The table as lines of text, in columns."""
    rows = [table.header, *table.rows]
    widths = [max(len(clean(row[i])) for row in rows) for i in range(len(table.header))]
    return [
        "  ".join(
            clean(cell).ljust(width) if i < table.left else clean(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _show_rich(blocks: Iterable[Block], stream: IO[str]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    for block in blocks:
        if isinstance(block, str):
            console.print(Text(clean(block), style=_style(block)), soft_wrap=True)
            continue
        shown = RichTable(box=None, pad_edge=False, header_style="bold")
        for index, title in enumerate(block.header):
            shown.add_column(title, justify="left" if index < block.left else "right")
        for row in block.rows:
            shown.add_row(*(Text(clean(cell), style=_style(cell)) for cell in row))
        console.print(shown)


def _style(text: str) -> str:
    words = text.strip()
    return next((style for word, style in _STYLES.items() if words == word), "")
