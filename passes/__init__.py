"""The passes, one file each or a small family, in folders by purpose.

`PASSES` maps names to classes; `PIPELINES` names the recipes that come with onnxopt.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

if not __name__.startswith("onnxopt."):
    raise ImportError("import onnxopt.passes, not passes: the folder is linked into it")

from onnxopt.manager import Pass

_HOMES = {
    "dead-code": ("simplify.dead_code", "DeadCode"),
    "identity": ("simplify.identity", "RemoveIdentity"),
    "cast-like": ("simplify.cast_like", "CastLikeToCast"),
    "split-sequence": ("simplify.split_sequence", "SplitSequence"),
    "inline-if": ("simplify.inline_if", "InlineIf"),
    "unroll-loop": ("simplify.unroll_loop", "UnrollLoop"),
    "inline-functions": ("simplify.inline_functions", "InlineFunctions"),
    "fold-constants": ("simplify.fold_constants", "FoldConstants"),
    "fold-shapes": ("simplify.fold_shapes", "FoldShapes"),
    "no-op": ("simplify.no_op", "RemoveNoOp"),
    "cast-chain": ("simplify.cast_chain", "MergeCasts"),
    "reshape-chain": ("simplify.reshape_chain", "MergeReshapes"),
    "reshape-transpose": ("simplify.reshape_transpose", "ReshapeTranspose"),
    "transpose": ("simplify.transpose", "MergeTransposes"),
    "sink-transpose": ("simplify.sink_transpose", "SinkTransposes"),
    "slice-chain": ("simplify.slice_chain", "MergeSlices"),
    "concat-chain": ("simplify.concat_chain", "MergeConcats"),
    "expand-broadcast": ("simplify.expand_broadcast", "DropExpands"),
    "share-weights": ("simplify.share_weights", "ShareWeights"),
    "cse": ("simplify.cse", "ShareCommonSubexpressions"),
    "fuse-operators": ("simplify.fuse_operators", "FuseOperators"),
    "merge-elementwise": ("simplify.merge_elementwise", "MergeElementwise"),
    "merge-products": ("simplify.merge_products", "MergeProducts"),
    "matmul-to-gemm": ("simplify.matmul_to_gemm", "MatMulToGemm"),
    "transpose-into-gemm": ("simplify.transpose_into_gemm", "TransposeIntoGemm"),
    "fold-pad": ("simplify.fold_pad", "FoldPad"),
    "fold-batch-norm": ("simplify.fold_batch_norm", "FoldBatchNorm"),
    "fold-scale": ("simplify.fold_scale", "FoldScale"),
    "fold-gather": ("simplify.fold_gather", "FoldGather"),
    "constant-chain": ("simplify.constant_chain", "MergeConstants"),
    "div-to-mul": ("simplify.div_to_mul", "DivToMul"),
    "integer-weights": ("qdq.integer_weights", "IntegerWeights"),
    "grid-weights": ("qdq.grid_weights", "GridWeights"),
    "fake-quant": ("qdq.fake_quant", "FakeQuant"),
    "near-fake-quant": ("qdq.near_fake_quant", "NearFakeQuant"),
    "custom-quantizers": ("qdq.custom_quantizers", "CustomQuantizers"),
    "fold-qdq-weights": ("qdq.fold_qdq_weights", "FoldQdqWeights"),
    "implied-clip": ("qdq.implied_clip", "ImpliedClip"),
    "qdq-bias": ("qdq.qdq_bias", "QdqBias"),
    "round-bias": ("qdq.qdq_bias", "RoundBias"),
    "add-output-quantizer": ("qdq.add_output_quantizer", "AddOutputQuantizer"),
    "requantize": ("qdq.requantize", "Requantize"),
    "share-qdq": ("qdq.share_qdq", "ShareQdq"),
    "move-qdq": ("qdq.move_qdq", "MoveQdq"),
    "qoperator-to-qdq": ("qdq.qoperator_to_qdq", "QOperatorToQdq"),
    "qdq-to-qoperator": ("qdq.qdq_to_qoperator", "QdqToQOperator"),
    "dead-layers": ("shrink.dead_layers", "DeadLayers"),
    "zero-channels": ("shrink.zero_channels", "ZeroChannels"),
    "merge-linear": ("shrink.merge_linear", "MergeLinear"),
    "quantize-static": ("quantize.quantize_static", "QuantizeStatic"),
    "round-to-zero": ("shrink.round_to_zero", "RoundToZero"),
}
"""Where each pass lies: its module in this package, and its class."""


class _Passes(Mapping[str, type[Pass]]):
    """The passes by name, each imported when it is looked up: many runs need a few."""

    def __getitem__(self, name: str) -> type[Pass]:
        module, kind = _HOMES[name]
        found: type[Pass] = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
        return found

    def __contains__(self, name: object) -> bool:
        return name in _HOMES

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


PASSES: Mapping[str, type[Pass]] = _Passes()

# What is computed from shapes goes first: its constants need not be lifted then.
_PREPARE = (
    "dead-code",
    "identity",
    "cast-like",
    "split-sequence",
    "inline-if",
    "unroll-loop",
    "fold-shapes",
)
_SIMPLIFY = (
    "no-op",
    "cast-chain",
    "reshape-chain",
    "reshape-transpose",
    "transpose",
    "sink-transpose",
    "slice-chain",
    "concat-chain",
    "expand-broadcast",
    "share-weights",
    "cse",
    "fuse-operators",
    "merge-elementwise",
    "merge-products",
    "matmul-to-gemm",
    "transpose-into-gemm",
    "fold-pad",
    "fold-batch-norm",
    "fold-scale",
    "fold-gather",
    "constant-chain",
    "div-to-mul",
)

# Weights are to be seen before their arithmetic is folded, and what quantizes activations
# behind that, when its scales are known, but before they are merged with what is beside.
_RECOGNIZE = (
    "integer-weights",
    "fold-constants",
    "grid-weights",
    "custom-quantizers",
    "fake-quant",
)

ON_REQUEST = (
    "inline-functions",
    "near-fake-quant",
    "round-bias",
    "add-output-quantizer",
    "qoperator-to-qdq",
    "qdq-to-qoperator",
    "quantize-static",
    "round-to-zero",
)
"""Passes of no recipe that comes with onnxopt: they change what a user may want kept."""

_QDQ = (
    "fold-qdq-weights",
    "qdq-bias",
    "implied-clip",
    "requantize",
    "share-qdq",
    "move-qdq",
)

_SHRINK = ("dead-layers", "zero-channels", "merge-linear")

PIPELINES: dict[str, tuple[str, ...]] = {
    "default": (*_PREPARE, *_RECOGNIZE, *_SIMPLIFY, *_QDQ, *_SHRINK),
    "simplify": (*_PREPARE, "fold-constants", *_SIMPLIFY),
    "shrink": (
        "dead-code",
        "identity",
        "inline-if",
        "fold-constants",
        "no-op",
        *_SHRINK,
    ),
}
