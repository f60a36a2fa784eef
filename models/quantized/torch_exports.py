"""What torch's two exporters write: fake quantization, int8 weights, eager int8.

    python -m models.quantized.torch_exports

Run from the root of the repository with the `dev` extra (torch 2.13.0, CPU).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import onnx
import torch
from torch import Tensor, nn

import models.shapes  # noqa: F401 - a rule that torch.export lacks
from models.quantized.integers import GroupedLinear, IntegerLinear, eager_net
from models.quantized.layers import decomposed, per_channel, per_tensor
from models.quantized.networks import (
    batch_norm_net,
    conv_net,
    images,
    linear_net,
    lstm_net,
    up_net,
    vectors,
    wide_net,
)
from models.quantized.store import store
from models.quantized.transformer import tokens, transformer

Make = Callable[[], nn.Module]
_PRESERVE = torch.onnx.TrainingMode.PRESERVE  # EVAL folds the BatchNorm
_IMAGES, _ROWS, _SEQUENCES = images()[0], vectors(48)[0], vectors(7, 48)[0]


def legacy(model: nn.Module, sample: Tensor, name: str, fold: bool = True) -> None:
    """The TorchScript exporter, opset 17."""
    buffer = io.BytesIO()
    torch.onnx.export(
        model.eval(),
        (sample,),
        buffer,
        dynamo=False,
        training=_PRESERVE,
        do_constant_folding=fold,
        opset_version=17,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
    )
    store(onnx.load_from_string(buffer.getvalue()), f"torch_legacy_{name}")


def dynamo(
    model: nn.Module, sample: Tensor, name: str, opset: int = 18, optimize: bool = True
) -> None:
    """The torch.export exporter; not `optimize`: operator by operator, nothing folded."""
    program = torch.onnx.export(
        model.eval(),
        (sample,),
        dynamo=True,
        opset_version=opset,
        optimize=optimize,
        verbose=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    store(program.model_proto, f"torch_dynamo_{name}")


def main() -> None:
    legacy(conv_net(None), _IMAGES, "conv_stored")
    legacy(conv_net(per_channel), _IMAGES, "conv_computed", fold=False)
    legacy(conv_net(per_tensor), _IMAGES, "conv_per_tensor")
    legacy(conv_net(decomposed), _IMAGES, "conv_decomposed")
    legacy(batch_norm_net(per_channel), _IMAGES, "batch_norm")
    legacy(up_net(per_channel), _IMAGES, "transposed_conv")
    legacy(linear_net(per_channel, ()), _ROWS, "linear")
    legacy(linear_net(per_channel, (7,)), _SEQUENCES, "linear_rank3")
    legacy(linear_net(decomposed, (7,)), _SEQUENCES, "linear_decomposed")
    legacy(lstm_net(None), vectors(5, 24)[0], "lstm")
    legacy(lstm_net(per_tensor), vectors(5, 24)[0], "lstm_per_tensor")
    legacy(eager_net(), _IMAGES, "eager")
    legacy(transformer(), tokens()[0], "transformer", fold=False)

    dynamo(conv_net(None), _IMAGES, "conv_stored")
    dynamo(conv_net(per_channel), _IMAGES, "conv_computed", 21, optimize=False)
    dynamo(conv_net(per_tensor), _IMAGES, "conv_per_tensor", 21)
    dynamo(conv_net(decomposed), _IMAGES, "conv_decomposed", optimize=False)
    dynamo(batch_norm_net(None), _IMAGES, "batch_norm")
    dynamo(up_net(None), _IMAGES, "transposed_conv")
    dynamo(linear_net(per_channel, ()), _ROWS, "linear")
    dynamo(linear_net(per_channel, (7,)), _SEQUENCES, "linear_rank3", 21)
    dynamo(wide_net(decomposed), vectors(3, 96)[0], "linear_decomposed")
    for name, make in _INTEGER.items():
        dynamo(make(), vectors(96)[0], name, 21 if "group" in name else 18)


_INTEGER: dict[str, Make] = {
    "int8_scaled_weight": partial(IntegerLinear, "weight"),
    "int8_zero_point": partial(IntegerLinear, "zero point"),
    "int8_scaled_result": partial(IntegerLinear, "result"),
    "int4_groups": GroupedLinear,
}


if __name__ == "__main__":
    main()
