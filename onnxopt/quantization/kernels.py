"""Which layers ONNX Runtime runs in integers, read back from what it makes of a model.

A copy of the model, its layers named by number, is loaded in a worker at
ORT_ENABLE_ALL, and ONNX Runtime writes the graph that it will run. A layer is looked for
there by its number: ONNX Runtime keeps the name of a node that it fuses. Where it does
not (its blocked NCHWc layout), the name of the layer's value leads to the node.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from onnxopt.errors import ProviderError, WorkerError
from onnxopt.model import Model, Source
from onnxopt.quantization.layers import QuantizedLayer, Site, sites
from onnxopt.quantization.reasons import why_float, worth_knowing
from onnxopt.runtime import SessionSpec, Worker, provider_name
from onnxopt.save import stage

Runs = Literal["integer", "weights", "float", "unknown"]
_FAMILIES: dict[str, Runs] = {
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"), "integer"),
    **dict.fromkeys(("DynamicQuantizeMatMul", "DynamicQuantizeLSTM"), "integer"),
    **dict.fromkeys(("QGemm", "QAttention", "QMoE"), "integer"),
    **dict.fromkeys(("MatMulNBits", "GatherBlockQuantized"), "weights"),
}
_TAG = re.compile(r"onnxopt-layer-(\d+)-")


class LayerKernel(QuantizedLayer, frozen=True, kw_only=True):
    """A layer, and what a provider runs for it.

    `kernel`: the operator that ONNX Runtime made of it, None where it could not be
    found. `runs`: `integer` arithmetic, integer `weights` that meet float activations,
    `float`, or `unknown`. `fusable`: it runs in integers, or would, in 8 bits, if
    `reason` did not stand against it. `notes`: what is wrong or slow all the same.
    """

    kernel: str | None
    runs: Runs
    fusable: bool
    reason: str | None
    notes: list[str]


class Kernels(msgspec.Struct, frozen=True, kw_only=True):
    """The layers of a model on one provider.

    `status` is `not_run`, with the reason, where the provider is absent or refused the
    model: the layers are then empty. `integer` counts the layers that keep integer
    weights or compute in integers, `float` the others; `fused` are those of `fusable`
    that do.
    """

    provider: str
    status: Literal["read", "not_run"]
    reason: str | None = None
    integer: int = 0
    float: int = 0
    fusable: int = 0
    fused: int = 0
    layers: list[LayerKernel] = []


def integer_kernels(
    model: Source,
    provider: str = "cpu",
    *,
    base_dir: str | os.PathLike[str] | None = None,
    custom_op_libraries: Sequence[str] = (),
    timeout: float = 600.0,
) -> Kernels:
    """What `provider` makes of the layers of a model: a path, ModelProto or gs.Graph.

    The model is written once to a temporary folder. Raises InvalidModelError where it is
    malformed, UsageError where it cannot be read or the provider's name is unknown.
    """
    name = provider_name(provider)
    opened = Model.open(model, base_dir)
    try:
        found = [site for view in opened.views() for site in sites(view)]
        with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
            spec = SessionSpec(
                provider=provider,
                level="enable_all",
                custom_op_libraries=tuple(custom_op_libraries),
                optimized=Path(folder) / "optimized.onnx",
            )
            values = _values(found)
            path = _tagged(opened, found, Path(folder) / "tagged.onnx")
            try:
                optimized = _optimized(path, spec, timeout)
            except (ProviderError, WorkerError) as error:
                return Kernels(provider=name, status="not_run", reason=str(error))
        return _counted(name, _layers(name, found, values, optimized))
    finally:
        opened.weights.close()


def _tagged(model: Model, found: Iterable[Site], path: Path) -> Path:
    """The model as a file whose layers are named by number; `model` is ours to rename."""
    for number, site in enumerate(found):
        site.node.name = f"onnxopt-layer-{number}-"
    stage(model, path, hashes=False).commit()
    return path


def _optimized(path: Path, spec: SessionSpec, timeout: float) -> ModelProto:
    """The graph that ONNX Runtime will run, without its larger weights."""
    assert spec.optimized is not None
    with Worker(timeout=timeout) as worker:
        worker.load(path, spec).close()
    return onnx.load(spec.optimized, load_external_data=False)


def _layers(
    provider: str, found: Sequence[Site], values: Sequence[list[str]], model: ModelProto
) -> list[LayerKernel]:
    numbered: dict[int, list[NodeProto]] = {}
    made: dict[str, NodeProto] = {}
    for node in _nodes(model.graph):
        tag = _TAG.search(node.name)
        if tag:
            numbered.setdefault(int(tag[1]), []).append(node)
        made |= {name: node for name in (*node.output, node.name) if name}
    layers = []
    for number, site in enumerate(found):
        nodes = numbered.get(number) or _by_value(values[number], made)
        layers.append(_layer(provider, site, nodes))
    return layers


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _by_value(names: list[str], made: dict[str, NodeProto]) -> list[NodeProto]:
    """The node that makes one of these values: of that name, or named after it."""
    for name in names:
        node = made.get(f"{name}_nchwc") or made.get(name)
        if node is not None:
            return [node]
    return []


def _values(found: Iterable[Site]) -> list[list[str]]:
    """For each layer its value, and what follows from it alone: fusions end there."""
    return [list(_chain(site)) for site in found]


def _chain(site: Site, length: int = 4) -> Iterator[str]:
    name = site.node.output[0] if site.node.output else ""
    for _ in range(length):
        if not name:
            return
        yield name
        use = site.view.only_use(name)
        if use is None or use.view is not site.view or not use.node.output:
            return
        name = use.node.output[0]


def _layer(provider: str, site: Site, nodes: Sequence[NodeProto]) -> LayerKernel:
    """One layer; of several nodes (call sites of a function) the slowest counts."""
    found = [(_runs(node), node.op_type) for node in nodes]
    order: list[Runs] = ["float", "weights", "integer"]
    runs, kernel = min(found, key=lambda item: order.index(item[0]), default=(None, None))
    described = msgspec.structs.asdict(site.layer)
    if runs is None:
        told = "ONNX Runtime merged it into another node, or took it out"
        return LayerKernel(
            **described,
            kernel=None,
            runs="unknown",
            fusable=False,
            reason=told,
            notes=[],
        )
    reason, fusable = (None, True) if runs != "float" else why_float(site, provider)
    return LayerKernel(
        **described,
        kernel=kernel,
        runs=runs,
        fusable=fusable,
        reason=reason,
        notes=list(worth_knowing(site)) if runs != "float" else [],
    )


def _runs(node: NodeProto) -> Runs:
    if node.op_type.startswith("QLinear"):
        return "integer"
    return _FAMILIES.get(node.op_type, "float")


def _counted(provider: str, layers: list[LayerKernel]) -> Kernels:
    integer = [layer for layer in layers if layer.runs in ("integer", "weights")]
    return Kernels(
        provider=provider,
        status="read",
        integer=len(integer),
        float=sum(layer.runs == "float" for layer in layers),
        fusable=sum(layer.fusable for layer in layers),
        fused=sum(layer.fusable for layer in integer),
        layers=layers,
    )
