"""ConstantOfShape: one value everywhere, such as the zeros that an LSTM starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, numpy_helper

from onnxopt import attributes
from onnxopt.channels.facts import Fact, known
from onnxopt.channels.groups import Link
from onnxopt.channels.rules.rule import Rule

if TYPE_CHECKING:
    from onnxopt.channels.analysis import Analysis


class Fill(Rule):
    """The value is known, whatever the shape."""

    def forward(self, a: Analysis, node: NodeProto) -> Sequence[Fact | None]:
        """The same at every place."""
        rank, tensor = a.rank(node.output[0]), attributes.get(node, "value")
        if rank is None:
            return [None]
        value = (
            np.zeros(1, np.float32) if tensor is None else numpy_helper.to_array(tensor)
        )
        return [known(value.reshape((1,) * rank))]

    def link(self, link: Link) -> None:
        """What it is filled for keeps its size."""
        link.bar("its shape is computed")
