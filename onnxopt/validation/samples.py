"""What every pass over the feeds shares: numbering, hard cases, samples, blame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnxopt.data.inputs import Feed, Feeds
from onnxopt.errors import WorkerError
from onnxopt.validation.hard import HARD_CASES, hard_feed
from onnxopt.validation.metrics import compare
from onnxopt.validation.rules import Rule, Sample


@contextlib.contextmanager
def blamed(side: str) -> Iterator[None]:
    """Let errors of a worker say which model it ran."""
    try:
        yield
    except WorkerError as error:
        raise type(error)(f"{side}: {error}") from error


@dataclass(frozen=True)
class NumberedFeed:
    """A feed with its place; `kind` is "data", or the hard case that it is."""

    index: int
    kind: str
    feed: Feed


def numbered(feeds: Feeds, hard: bool) -> Iterator[NumberedFeed]:
    """All feeds, then the first one made hard where that is wanted."""
    first: Feed | None = None
    index = -1
    for index, feed in enumerate(feeds):
        first = first or feed
        yield NumberedFeed(index, "data", feed)
    for offset, kind in enumerate(HARD_CASES if hard and first else (), index + 1):
        made = hard_feed(kind, first or {})
        if made is not None:
            yield NumberedFeed(offset, kind, made)


def samples_of(
    at: NumberedFeed, expected: object, found: object, rules: Sequence[Rule] = ()
) -> list[Sample]:
    """A sample per array of one output's value."""
    allowance = next((rule.allowance for rule in rules if rule.allowance), None)
    return [
        Sample(at.index, leaf, at.kind, difference)
        for leaf, difference in enumerate(compare(expected, found, allowance))
    ]
