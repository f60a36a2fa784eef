"""share-weights on weights that lie outside the protobuf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx.numpy_helper import from_array

from onnxopt.manager import PassManager
from onnxopt.model import Model
from onnxopt.recipe import parse_pipeline
from tests.support import model_of

BODY = """
main (float[1, 600] x) => (float[1, 600] y) {
   t = MatMul (x, a)
   u = MatMul (t, b)
   y = MatMul (u, c)
}"""


def test_large_weights(tmp_path: Path) -> None:
    """Equal ones become one; one that differs in the last element only does not."""
    proto = model_of(BODY)
    array = np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32)
    for name in "abc":
        proto.graph.initializer.append(from_array(array, name))
        array = array.copy()
        array[-1, -1] += name == "b"
    for external in (False, True):
        path = tmp_path / f"{external}.onnx"
        onnx.save(proto, path, save_as_external_data=external, location=f"{external}.bin")
        model = Model.open(path)
        PassManager(parse_pipeline("share-weights"), verify_each=True).run(model)
        assert [list(node.input) for node in model.main.nodes()] == [
            ["x", "a"],
            ["t", "a"],
            ["u", "c"],
        ]
        assert [tensor.name for tensor in model.main.initializers()] == ["a", "c"]
