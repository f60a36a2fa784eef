"""Options of the test suite, and what several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onnxopt.evaluate import Evaluator
from onnxopt.manager import Context


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
