"""Operators that exporters write as several: one file for each family of patterns."""

from __future__ import annotations

from onnxopt.passes.simplify.fusions.fusion import Fusion
from onnxopt.passes.simplify.fusions.gelu import GELU, TANH_GELU
from onnxopt.passes.simplify.fusions.hard import (
    CLIPPED_HARD_SWISH,
    HARD_SIGMOID,
    HARD_SWISH,
    LINEAR_HARD_SIGMOID,
)
from onnxopt.passes.simplify.fusions.normalization import (
    FOLDED_LAYER_NORM,
    LAYER_NORM,
    RMS_NORM,
)
from onnxopt.passes.simplify.fusions.reductions import L2, MEAN, SUM_SQUARE
from onnxopt.passes.simplify.fusions.softmax import SOFTMAX
from onnxopt.passes.simplify.fusions.swish import MISH, SWISH

FUSIONS: tuple[Fusion, ...] = (
    LAYER_NORM,
    FOLDED_LAYER_NORM,
    RMS_NORM,
    SOFTMAX,
    GELU,
    TANH_GELU,
    CLIPPED_HARD_SWISH,
    HARD_SWISH,
    HARD_SIGMOID,
    LINEAR_HARD_SIGMOID,
    SWISH,
    MISH,
    SUM_SQUARE,
    L2,
    MEAN,
)
