"""Whether the int8 kernels that ONNX Runtime takes by default saturate on this machine.

On x86 without VNNI they add two products of uint8 and int8 in 16 bits: with weights of 8
bits results can be far off, of any quantized model. That is no error of a rewrite, so
models are judged with the exact kernels (`processor.PRECISE`); what the default ones make
of the candidate is measured here, and told.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from onnxopt import processor
from onnxopt.data.inputs import Feed, Feeds
from onnxopt.errors import SessionError, WorkerError
from onnxopt.runtime import Session, Worker, is_cpu
from onnxopt.validation.placement import int8_layers
from onnxopt.validation.verdict import Question, Verdict

_FEEDS = 2
_NOTICEABLE = 1e-3
"""Of the largest value of an output; adding in another order stays below."""


def needs_exact_kernels(question: Question) -> bool:
    """Whether the default kernels could saturate, and ONNX Runtime loads both models
    with the exact ones, which for some weights that are shared it does not.
    """
    if not processor.adds_pairs():
        return False
    paths = (question.reference, question.candidate)
    if not any(any(int8_layers(path)) for path in paths):
        return False
    exact = dataclasses.replace(question, precise=True).spec("cpu", "enable_all")
    with question.worker() as worker:
        try:
            for path in paths:
                worker.load(path, exact).close()
        except WorkerError:
            return False
    return True


def add_saturation_note(
    verdict: Verdict, worker: Worker, provider: str, feeds: Feeds
) -> None:
    """Tell by how much the candidate's outputs are off with the default kernels."""
    question = verdict.question
    if not (is_cpu(provider) and question.precise):
        return
    exact = question.spec(provider, "enable_all")
    kept = tuple(entry for entry in exact.options if entry != processor.PRECISE)
    default = dataclasses.replace(exact, options=kept)
    try:
        sessions = [worker.load(question.candidate, spec) for spec in (exact, default)]
        apart = [_apart(sessions, feed) for feed in itertools.islice(feeds, _FEEDS)]
    except SessionError:
        return  # a candidate that does not run: the checks say so
    for session in sessions:
        session.close()
    share = max(apart, default=0.0)
    if share > _NOTICEABLE:
        verdict.note(
            f"{provider}: this processor has no VNNI, and ONNX Runtime's default int8 "
            f"kernels saturate there: outputs are off by {share:.1%} of the largest "
            "value. Judged with exact kernels; set session.x64quantprecision to 1 where "
            "the model runs, or give its weights 7 bits"
        )


def _apart(sessions: list[Session], feed: Feed) -> float:
    """The largest difference of any output, relative to its largest value."""
    exact, default = (session.run(feed) for session in sessions)
    most = 0.0
    for name, value in exact.items():
        other = default[name]
        if not (isinstance(value, np.ndarray) and isinstance(other, np.ndarray)):
            continue
        if value.dtype.kind != "f" or value.shape != other.shape or not value.size:
            continue
        peak = float(np.abs(value).max())
        apart = float(np.abs(value.astype(np.float64) - other).max())
        if np.isfinite(peak) and np.isfinite(apart) and peak:
            most = max(most, apart / peak)
    return most
