"""Targets: which operators may be emitted for whom, and how QDQ is laid out."""

from __future__ import annotations

import msgspec

from onnxopt import processor
from onnxopt.errors import UsageError


class Target(msgspec.Struct, frozen=True):
    """What a deployment runtime runs well.

    `domains` are those that a pass may emit beyond the model's own; `activation` and
    `weight` are the 8-bit types of its QDQ layout (None: no QDQ on activations), with
    zero point 0 where `symmetric`. `zero_points`: its integer kernels take weights whose
    zero points are not 0; `float_bias`: they want biases of floats; `adds_pairs`: they
    add two products of uint8 and int8 in 16 bits, and with 8-bit weights saturate.
    `keeps_int8_pairs`: codes of int8 activations are to stay between one QuantizeLinear
    and one DequantizeLinear (`quantization.parameters.is_int8_quantizer` says why).
    """

    name: str
    domains: frozenset[str] = frozenset({""})
    activation: str | None = "uint8"
    weight: str = "int8"
    symmetric: bool = False
    zero_points: bool = False
    float_bias: bool = False
    adds_pairs: bool = False
    keeps_int8_pairs: bool = True


_ORT = frozenset({"", "com.microsoft"})
TARGETS = {
    target.name: target
    for target in (
        Target("onnx"),
        Target("ort-cpu-x86", _ORT, zero_points=True),
        Target(
            "ort-cpu-arm",
            _ORT,
            activation="int8",
            zero_points=True,
            keeps_int8_pairs=False,
        ),
        Target("ort-cuda", _ORT, activation=None),
        Target("tensorrt", activation="int8", symmetric=True, float_bias=True),
    )
}


def target(name: str) -> Target:
    """The target called `name`; `ort-cpu` is this machine's. Raises UsageError."""
    if name == "ort-cpu":
        name = "ort-cpu-arm" if processor.is_arm() else "ort-cpu-x86"
    if name not in TARGETS:
        known = ", ".join(sorted([*TARGETS, "ort-cpu"]))
        raise UsageError(f"unknown target {name!r}; there are {known}")
    if name == "ort-cpu-x86":
        return msgspec.structs.replace(TARGETS[name], adds_pairs=processor.adds_pairs())
    return TARGETS[name]
