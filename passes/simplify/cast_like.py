"""cast-like: CastLike to a type that is known is a Cast.

    y = CastLike(x, w)      w: float16
                            ->    y = Cast(x, to = float16)

1. The element type of the second input is known; nothing else of it is needed.
2. From opset 19 on `saturate` counts where the type is a float of 8 bits: it is kept.

The Cast may then fold, or turn out to change nothing.
"""

from __future__ import annotations

from typing import ClassVar

from onnxopt import attributes
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee


class CastLikeToCast(Pass):
    """Let CastLike be a Cast where the type is known."""

    name: ClassVar[str] = "cast-like"
    guarantee: ClassVar[Guarantee] = "bitwise"

    def run(self, graph: GraphView, context: Context) -> None:
        """Look at every CastLike."""
        for node in graph.visit(self, ("CastLike",)):
            to = graph.dtype(node.input[1])
            if to is None:
                graph.skip(node, f"the type of {node.input[1]!r} is not known")
                continue
            edit = Edit(graph, node)
            saturate = attributes.get(node, "saturate")
            edit.rewrite("Cast", [node.input[0]], {"to": to, "saturate": saturate})
            graph.apply(edit, "the type that it casts to is known")
