"""The ledger: what each pass did and declined, and what edits are still allowed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from onnx import NodeProto

from onnxopt.report import Guarantee, PassReport, Skip

if TYPE_CHECKING:
    from onnxopt.graph import GraphView

log = logging.getLogger("onnxopt.edit")

GROWTH_FLOOR = 1_000_000
GROWTH_FACTOR = 1.02
FORBIDDEN = "this edit was found to be wrong"
BISECT_LIMIT = "the bisect limit is reached"
"""A refusal that says nothing about the node, so that reports leave it out."""


class Edited(NamedTuple):
    """One edit that was made: by which pass, at which node, why."""

    name: str
    scope: str
    node: str
    why: str


class Ledger:
    """Counts edits per pass, keeps to the growth budget and to the bisect limit.

    The budget is one for the whole run: at no moment may the model be larger than
    max(1 MB, 1.02 x `start_bytes`); None leaves growth unchecked. `limit` refuses
    every edit after that many, so that a wrong one can be found by bisection.
    """

    def __init__(self, start_bytes: int | None = None, limit: int | None = None) -> None:
        self.edits = 0
        self.limit = limit
        self.bytes = self.start_bytes = start_bytes or 0
        self.most_bytes = (
            None
            if start_bytes is None
            else max(GROWTH_FLOOR, int(start_bytes * GROWTH_FACTOR), start_bytes)
        )
        self.history: list[Edited] = []
        self.forbidden: frozenset[Edited] = frozenset()
        self._reports: dict[str, PassReport] = {}
        self._skips: dict[str, dict[tuple[str, int], tuple[GraphView, NodeProto, str]]]
        self._skips = {}
        self._running = ""

    def begin(self, name: str, guarantee: Guarantee) -> None:
        """From now on, edits and skips are those of pass `name`."""
        self._running = name
        self._reports.setdefault(name, PassReport(name=name, guarantee=guarantee))
        self._skips.setdefault(name, {})

    def refusal(self, growth: int, most: int | None = None) -> str | None:
        """Why an edit that adds `growth` bytes may not be done; None where it may.

        `most` is a bound of the edit's own on its growth.
        """
        if self.limit is not None and self.edits >= self.limit:
            return BISECT_LIMIT
        if most is not None and growth > most:
            return f"the model would grow by {growth:,} bytes"
        if self.most_bytes is None or growth <= 0:
            return None
        if self.bytes + growth > self.most_bytes:
            return f"the model would outgrow its budget (by {growth:,} bytes here)"
        return None

    def forbids(self, graph: GraphView, node: NodeProto | None, why: str) -> bool:
        """Whether this very edit was found to be wrong and is not to be made again."""
        return bool(self.forbidden) and self._entry(graph, node, why) in self.forbidden

    def _entry(self, graph: GraphView, node: NodeProto | None, why: str) -> Edited:
        where = graph.label(node) if node is not None else graph.scope
        return Edited(self._running, graph.scope, where, why)

    def record(
        self,
        graph: GraphView,
        node: NodeProto | None,
        why: str,
        nodes: int,
        growth: int,
        label: str | None = None,
    ) -> None:
        """Count an edit that was done: the change in nodes and in bytes.

        `label`: what the node was called before.
        """
        self.edits += 1
        self.bytes += growth
        entry = self._entry(graph, node, why)
        entry = entry if label is None else entry._replace(node=label)
        self.history.append(entry)
        log.debug("#%d %s: %s at %s", self.edits, entry.name, why, entry.node)
        report = self._reports.get(self._running)
        if report is not None:
            report.edits += 1
            report.nodes += nodes
            report.bytes += growth
            if node is not None:
                self._skips[self._running].pop((graph.scope, id(node)), None)

    def skip(self, graph: GraphView, node: NodeProto, reason: str) -> None:
        """Record that the running pass left `node` alone."""
        skips = self._skips.get(self._running)
        if skips is not None and reason != BISECT_LIMIT:
            skips[graph.scope, id(node)] = graph, node, reason

    def reports(self) -> list[PassReport]:
        """One report a pass, in order of the first run; skips of living nodes only."""
        for name, report in self._reports.items():
            report.skipped = [
                Skip(node=graph.label(node), scope=graph.scope, reason=reason)
                for graph, node, reason in self._skips[name].values()
                if graph.holds(node)
            ]
        return list(self._reports.values())
