"""Pass and PassManager: what a pass is, and how a pipeline of them runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import msgspec

from onnxopt import verifier
from onnxopt.errors import OnnxoptError, PassError
from onnxopt.evaluate import Evaluator
from onnxopt.graph import GraphView
from onnxopt.model import Model
from onnxopt.report import Guarantee
from onnxopt.target import TARGETS, Target

if TYPE_CHECKING:
    from onnxopt.quantization.calibration import Calibration

log = logging.getLogger("onnxopt.manager")

MAX_ROUNDS = 12


class Context(msgspec.Struct):
    """What a pass may ask besides the graph.

    `calibration`: runs the model on the user's data, None where none was given; made-up
    feeds tell no ranges.
    """

    target: Target = TARGETS["onnx"]
    evaluator: Evaluator = msgspec.field(default_factory=Evaluator)
    calibration: Calibration | None = None


class Pass(msgspec.Struct):
    """One rewrite. Its fields are its parameters in recipes and pipelines.

    `guarantee` is what it promises: `bitwise`, `equivalent` or `lossy`.
    """

    name: ClassVar[str]
    guarantee: ClassVar[Guarantee]

    def run(self, graph: GraphView, context: Context) -> None:
        """Rewrite one scope; the manager calls it for each, inner ones after outer."""
        raise NotImplementedError

    def run_model(self, model: Model, context: Context) -> None:
        """Rewrite the model: by default scope by scope."""
        for view in list(model.views()):
            if view.is_attached:
                self.run(view, context)


Observer = Callable[[Pass, Model, int], None]
"""Told after each run of a pass: the pass, the model, the number of edits it made."""


class PassManager:
    """Runs a pipeline to its fixed point, with a bound, verifying after each pass.

    `verify_each` also rebuilds every index from the protobuf and compares.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        verify_each: bool = False,
        observer: Observer | None = None,
        max_rounds: int = MAX_ROUNDS,
    ) -> None:
        self.passes = passes
        self.verify_each = verify_each
        self.observer = observer
        self.max_rounds = max_rounds
        self.seconds: dict[str, float] = {}

    def run(self, model: Model, context: Context | None = None) -> None:
        """Run the exact passes to their fixed point, and each lossy one once.

        What a lossy pass takes away is its measure. It runs when the exact passes before
        it have nothing left to do, and all exact ones run again behind it.

        Raises verifier.BrokenGraphError, naming the pass, where a pass broke the graph.
        """
        context = context or Context()
        exact: list[Pass] = []
        for pass_ in self.passes:
            if pass_.guarantee == "lossy":
                self._run_to_fixed_point(exact, model, context)
                self._run_one(pass_, model, context)
            else:
                exact.append(pass_)
        self._run_to_fixed_point(exact, model, context)
        model.settle()

    def _run_to_fixed_point(
        self, passes: Sequence[Pass], model: Model, context: Context
    ) -> None:
        """Run until a whole round makes no edit, not even where all is looked at anew.

        Within the rounds, a pass revisits what changed, and shapes once inferred stay;
        an edit can also tell more about the shapes of values far from it.
        """
        idle = rounds = 0
        anew = model.ledger.edits
        while passes:
            if idle == len(passes):
                if model.ledger.edits == anew:
                    break
                _look_anew(model)
                idle, anew = 0, model.ledger.edits
            if rounds == self.max_rounds * len(passes):
                model.notes.append(f"no fixed point after {self.max_rounds} rounds")
                break
            edits = self._run_one(passes[rounds % len(passes)], model, context)
            idle = 0 if edits else idle + 1
            rounds += 1

    def _run_one(self, pass_: Pass, model: Model, context: Context) -> int:
        ledger = model.ledger
        before, started = ledger.edits, time.process_time()
        ledger.begin(pass_.name, pass_.guarantee)
        _run_pass(pass_, model, context)
        edits = ledger.edits - before
        if edits:
            model.settle()
            verifier.verify(model, f"after {pass_.name}", rebuild=self.verify_each)
        taken = time.process_time() - started
        self.seconds[pass_.name] = self.seconds.get(pass_.name, 0.0) + taken
        log.info("%s: %d edits in %.3f s", pass_.name, edits, taken)
        if self.observer is not None:
            self.observer(pass_, model, edits)
        return edits


def _run_pass(pass_: Pass, model: Model, context: Context) -> None:
    """Let an error that is nobody's on purpose name the pass."""
    try:
        pass_.run_model(model, context)
    except (OnnxoptError, MemoryError):
        raise
    except Exception as error:
        text = f"pass {pass_.name} failed: {type(error).__name__}: {error}"
        raise PassError(text) from error


def _look_anew(model: Model) -> None:
    """Let every pass visit every node again, and shapes be inferred again."""
    if model.shapes.refresh():
        model.analyses.clear()  # they rest on shapes of which more may be known now
    for view in model.views():
        view.forget_visits()
