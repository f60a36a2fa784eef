"""Options of the test suite, and what several test modules share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from onnx import ModelProto

from onnxopt.channels.decision import Decision
from onnxopt.channels.engine import analyse
from onnxopt.channels.groups import Groups
from onnxopt.evaluate import Evaluator
from onnxopt.manager import Context
from onnxopt.model import Model


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden`: write what the passes make now into the golden files."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the expectations in tests/golden to what the passes make now",
    )


@pytest.fixture(scope="session")
def context() -> Iterator[Context]:
    """One context, so that all tests share one worker process."""
    with Evaluator() as evaluator:
        yield Context(evaluator=evaluator)


@pytest.fixture
def reasons(context: Context) -> Callable[[ModelProto, str], list[str | None]]:
    """For each channel of a value what keeps it, None where it goes."""

    def call(source: ModelProto, name: str) -> list[str | None]:
        view = Model.open(source).main
        decision = Decision(Groups(analyse(view, context.evaluator)))
        (slot,) = decision.groups.slots_of(name)
        return [decision.reason(atom) for atom in slot.atoms.tolist()]

    return call
