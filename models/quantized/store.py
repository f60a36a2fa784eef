"""Where the exports go, and what is taken out of them."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto

FOLDER = Path(__file__).parent


def store(model: ModelProto, name: str) -> None:
    """Write `<name>.onnx`, valid and with nothing of the exporting machine in it.

    Exporters leave Python stack traces with local paths in the metadata of nodes and
    values.
    """
    graph = model.graph
    values = (*graph.value_info, *graph.initializer, *graph.input, *graph.output)
    for holder in (model, graph, *graph.node, *values, *model.functions):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    path = FOLDER / f"{name}.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{path.name:34} {path.stat().st_size:>9,} bytes")
