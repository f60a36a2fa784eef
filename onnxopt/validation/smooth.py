"""Quantized models once more, with the rounding of their codes taken out.

Codes that flip are noise and hide small errors, and codes that do not flip on the feeds
at hand hide them altogether. So both models are also judged as `unrounded` makes them,
at the noise floor of a smooth model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import onnx

from onnxopt.data.inputs import Feeds
from onnxopt.validation import noise
from onnxopt.validation.check import LevelCheck
from onnxopt.validation.rules import Floor
from onnxopt.validation.spread import MovedModels
from onnxopt.validation.unrounded import unrounded
from onnxopt.validation.verdict import LEVELS, Question, Verdict, Workers


def judge_unrounded(
    verdict: Verdict, workers: Workers, provider: str, feeds: Feeds, moved: MovedModels
) -> None:
    """Add a check at disable_all, where it applies and both models allow it."""
    question, facts = verdict.question, moved.facts
    rules = question.rules(facts, provider, LEVELS[0])
    if not facts.quantized or not any(isinstance(rule, Floor) for rule in rules):
        return
    if _is_large(question, facts) or verdict.passed(provider) is None:
        return
    folder = moved.folder / f"unrounded-{len(verdict.checks)}"
    folder.mkdir()
    smooth = _smooth(question, folder)
    if smooth is None:
        return
    inner = Verdict(smooth)
    copies = MovedModels(smooth, dataclasses.replace(facts, quantized=False), folder)
    LevelCheck(copies, workers, provider, LEVELS[0], feeds).into(inner)
    for check in inner.checks:
        if check.status != "not_run":
            name = f"{check.provider} without rounding of codes"
            verdict.checks.append(msgspec.structs.replace(check, provider=name))


def _is_large(question: Question, facts: noise.Facts) -> bool:
    """Whether either model is too large to be held in memory and copied."""
    path = question.candidate
    candidate = noise.facts(onnx.load(path, load_external_data=False), path)
    return max(facts.size, candidate.size) > noise.WEIGHT_LIMIT


def _smooth(question: Question, folder: Path) -> Question | None:
    """The same question of both models without rounding; None where one has none."""
    paths: list[Path] = []
    for path in (question.reference, question.candidate):
        model = unrounded(onnx.load(path))
        if model is None:
            return None
        paths.append(folder / f"unrounded-{len(paths)}.onnx")
        paths[-1].write_bytes(model.SerializeToString())
    reference, candidate = paths
    return dataclasses.replace(
        question, reference=reference, candidate=candidate, bitwise=False
    )
