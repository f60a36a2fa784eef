"""Where ONNX Runtime put the nodes of a session: which provider runs what.

Used in the worker only, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

RECORD = "session.record_ep_graph_assignment_info"
# Nodes that run other nodes: their time is that of what they run.
_CONTROL = {"If", "Loop", "Scan", "SequenceMap"}
_Key = tuple[str, str]
_Event = dict[str, Any]


def assigned(session: Any) -> dict[str, dict[str, int]] | None:
    """Nodes per provider and operator, all scopes; None where ORT cannot say (< 1.24).

    Copies between devices come later and are not in it; see `Profile`.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        ops = (_full_name(node.domain, node.op_type) for node in part.get_nodes())
        found.setdefault(part.ep_name, Counter()).update(ops)
    return {name: dict(sorted(ops.items())) for name, ops in sorted(found.items())}


def _full_name(domain: str, op_type: str) -> str:
    return f"{domain}:{op_type}" if domain else op_type


class Profile:
    """ONNX Runtime's profile of one session, in a folder that goes with this object."""

    def __init__(self, options: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="onnxopt-profile-")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")

    def read(self, session: Any) -> list[list[Any]]:
        """End it: provider, operator, nodes that ran, microseconds of all runs.

        Times leave the first run out where there were several: it allocates. Nodes
        with subgraphs have no time of their own.
        """
        with open(session.end_profiling(), encoding="utf-8") as file:
            events: list[_Event] = json.load(file)
        self._folder.cleanup()
        return _summed(events)


def _summed(events: list[_Event]) -> list[list[Any]]:
    warm = _end_of_first_run(events)
    nodes: dict[_Key, set[tuple[str, str]]] = {}
    micros: Counter[_Key] = Counter()
    for event in events:
        about = event.get("args") or {}
        if event.get("cat") != "Node" or "op_name" not in about:
            continue
        key = (about.get("provider", ""), about["op_name"])
        nodes.setdefault(key, set()).add((event["name"], about.get("node_index", "")))
        if event["ts"] >= warm and about["op_name"] not in _CONTROL:
            micros[key] += event["dur"]
    return [[*key, len(nodes[key]), micros[key]] for key in sorted(nodes)]


def _end_of_first_run(events: list[_Event]) -> int:
    """When the first of several runs ended, 0 where there was one only."""
    ends = [e["ts"] + e["dur"] for e in events if e.get("name") == "model_run"]
    return min(ends) if len(ends) > 1 else 0
