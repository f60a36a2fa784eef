"""Write checkpoints as ONNX files, with nothing of the exporting machine in them."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import nn

import models.shapes  # noqa: F401 - a rule that torch.export lacks
from models.network import FashionNet
from models.quantize import fix_ranges, fix_weight_scales

OPSET = 17
DYNAMO_OPSET = 18  # the lowest that the dynamo exporter writes without converting
SAMPLE = torch.zeros(2, 1, 28, 28)


def export_float(model: FashionNet, target: Path) -> None:
    """PRESERVE keeps an eval model's BatchNorm as it is; EVAL would fold it."""
    _export_legacy(model.eval(), target, torch.onnx.TrainingMode.PRESERVE)


def export_qat_legacy(model: FashionNet, target: Path) -> None:
    """Weight scales stay computed in the graph: Abs, ReduceMax, Clip, Div."""
    fix_ranges(model)
    _export_legacy(model.eval(), target, torch.onnx.TrainingMode.EVAL)


def export_qat_dynamo(model: FashionNet, target: Path) -> None:
    """Weight scales are stored, as a framework with observers has them."""
    model.eval()
    fix_ranges(model)
    fix_weight_scales(model)
    program = torch.onnx.export(
        model,
        (SAMPLE,),
        dynamo=True,
        opset_version=DYNAMO_OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    _save(program.model_proto, target)


def _export_legacy(
    model: nn.Module, target: Path, training: torch.onnx.TrainingMode
) -> None:
    torch.onnx.export(
        model,
        (SAMPLE,),
        str(target),
        dynamo=False,
        training=training,
        do_constant_folding=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    _save(onnx.load(target), target)


def _save(model: onnx.ModelProto, target: Path) -> None:
    strip_traces(model)
    onnx.checker.check_model(model, full_check=True)
    target.write_bytes(model.SerializeToString(deterministic=True))


def strip_traces(model: onnx.ModelProto) -> None:
    """Drop metadata and doc strings of nodes and values.

    The exporters write Python stack traces there (`pkg.torch.onnx.stack_trace`), with
    the paths of the machine that ran them.
    """
    graph = model.graph
    for holder in (
        graph,
        *graph.node,
        *graph.value_info,
        *graph.initializer,
        *graph.input,
        *graph.output,
        *model.functions,
    ):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
