"""What every pass over the feeds shares: numbering, hard cases, samples, blame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxopt.data.generate import GeneratedFeeds
from onnxopt.data.inputs import Feed, Feeds
from onnxopt.errors import WorkerError
from onnxopt.runtime import SessionSpec, Worker
from onnxopt.validation.hard import HARD_CASES, UNIFORM_CASES, Ranges, hard_feed
from onnxopt.validation.metrics import compare
from onnxopt.validation.rules import Rule, Sample

# Settings whose first feed is made hard.
_HARD_SETTINGS = 4


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
    """All feeds, then some made hard where that is wanted."""
    wanted = _to_be_hard(feeds) if hard else {}
    kept: dict[int, Feed] = {}
    index = -1
    for index, feed in enumerate(feeds):
        if index in wanted:
            kept[index] = feed
        yield NumberedFeed(index, "data", feed)
    made = (
        (kind, hard_feed(kind, kept[at], _ranges(feeds, at)))
        for at in wanted
        if at in kept
        for kind in wanted[at]
    )
    number = index
    for kind, case in made:
        if case is not None:
            number += 1
            yield NumberedFeed(number, kind, case)


def _to_be_hard(feeds: Feeds) -> dict[int, Sequence[str]]:
    """The feeds that hard cases are made from: the first one.

    Of generated feeds, the first one of every setting: what a setting turns on meets
    them too. And a feed of one sample, where other kernels run: what is left of a
    difference between equal values is up to these.
    """
    if not isinstance(feeds, GeneratedFeeds):
        return {0: HARD_CASES}
    wanted: dict[int, Sequence[str]]
    wanted = dict.fromkeys(feeds.firsts()[:_HARD_SETTINGS], HARD_CASES)
    single = feeds.first_single()
    if single is not None and single not in wanted:
        wanted[single] = UNIFORM_CASES
    return wanted


def _ranges(feeds: Feeds, index: int) -> Ranges:
    if not isinstance(feeds, GeneratedFeeds):
        return {}
    known = {spec.name: feeds.range_of(spec, index) for spec in feeds.inputs}
    return {name: both for name, both in known.items() if both is not None}


def run_once(
    worker: Worker, path: Path, spec: SessionSpec, feed: Feed, names: Sequence[str]
) -> dict[str, Any]:
    """Some outputs of a model on what it takes of a feed. Raises WorkerError."""
    session = worker.load(path, spec)
    wanted = {value.name for value in session.inputs}
    given = {name: value for name, value in feed.items() if name in wanted}
    try:
        return session.run(given, names)
    finally:
        session.close()


def samples_of(
    at: NumberedFeed, expected: object, found: object, rules: Sequence[Rule] = ()
) -> list[Sample]:
    """A sample per array of one output's value."""
    allowance = next((rule.allowance for rule in rules if rule.allowance), None)
    return [
        Sample(at.index, leaf, at.kind, difference)
        for leaf, difference in enumerate(compare(expected, found, allowance))
    ]
