"""Where ONNX Runtime's optimizer changes what the reference computes.

ORT quantizes float weights and biases behind a DequantizeLinear, at ENABLE_BASIC already:
the reference is then another model than its file says, and a candidate that keeps to the
file differs from it. What the candidate computes at that level is right all the same
where it is what the reference computes as written, at ORT_DISABLE_ALL.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from onnxopt.data.inputs import Feeds
from onnxopt.errors import SessionError, WorkerMemoryError
from onnxopt.runtime import SessionSpec
from onnxopt.validation.rules import Rule, Sample, Spread
from onnxopt.validation.samples import numbered, samples_of
from onnxopt.validation.verdict import Question


def right_as_written(
    question: Question,
    spec: SessionSpec,
    feeds: Feeds,
    rules: Sequence[Rule],
    spreads: Mapping[str, Spread],
    names: Collection[str],
) -> set[str]:
    """Outputs of `names` in which the candidate, loaded by `spec`, equals the reference
    at ORT_DISABLE_ALL on every feed.

    No output where one of the models does not run.
    """
    found: dict[str, list[Sample]] = {name: [] for name in names}
    plain = question.spec(spec.provider, "disable_all")
    with question.worker() as left, question.worker() as right:
        try:
            reference = left.load(question.reference, plain)
            candidate = right.load(question.candidate, spec)
            for at in numbered(feeds, hard=False):
                expected = reference.run(at.feed, list(names))
                made = candidate.run(at.feed, list(names))
                for name in names:
                    samples = samples_of(at, expected[name], made[name], rules)
                    found[name].extend(samples)
        except (SessionError, WorkerMemoryError):
            return set()
    return {
        name
        for name, samples in found.items()
        if samples
        and not any(rule.judge(samples, spreads.get(name)).reason for rule in rules)
    }
