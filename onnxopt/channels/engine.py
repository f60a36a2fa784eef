"""The analysis of a scope by the table of rules, kept until the model changes."""

from __future__ import annotations

from onnxopt.channels.analysis import Analysis
from onnxopt.channels.rules.table import rule_of
from onnxopt.evaluate import Evaluator
from onnxopt.graph import GraphView


def analyse(graph: GraphView, evaluator: Evaluator) -> Analysis:
    """What is known of every value of `graph`.

    Weights are read once for each version of the model, however many passes ask.
    """
    model = graph.model
    kept = model.analyses.get(graph)
    if kept is None or kept[0] != model.version:
        kept = model.version, Analysis(graph, evaluator, rule_of)
        model.analyses[graph] = kept
    found: Analysis = kept[1]
    return found
