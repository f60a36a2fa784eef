"""Shapes and dtypes of values, as passes ask for them.

Dims are numbers, or texts: two texts are equal where the sizes are sure to be. What is
known comes from `onnxopt.symbolic`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxopt.symbolic.fact import Fact
from onnxopt.symbolic.infer import Inference

if TYPE_CHECKING:
    from onnxopt.graph import GraphView, Shape
    from onnxopt.model import Model


class Shapes:
    """Answers for every scope; a value is inferred when it is first asked for.

    Facts in a function body hold per call site, so nothing is known there.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._inference = Inference(model)

    def fact(self, view: GraphView, name: str) -> Fact:
        """Type, dims and value of `name`, as far as they are known."""
        return self._inference.fact(view, name)

    def shape(self, view: GraphView, name: str) -> Shape | None:
        """Dims of `name` (a number or a text each), None where the rank is open."""
        dims = self._inference.fact(view, name).dims
        if dims is None:
            return None
        return tuple(size if isinstance(size, int) else size.text for size in dims)

    def dtype(self, view: GraphView, name: str) -> int | None:
        """ONNX element type of `name`, None where unknown."""
        return self._inference.fact(view, name).dtype or None

    def remembers(self, view: GraphView, name: str) -> bool:
        """Whether `view` has made a value of this name of which something was inferred.

        That stays, so another value must not take the name where that one is gone.
        """
        return name in self._inference.known(view)

    def refresh(self) -> bool:
        """Infer anew what edits may have made more known of; what is complete stays.

        Whether there was anything that is not.
        """
        before = self._inference
        self._inference = before.renewed()
        return not self._inference.holds_all(before)

    def forget(self) -> None:
        """Infer all anew: an edit changed dims."""
        self._inference = Inference(self._model)
