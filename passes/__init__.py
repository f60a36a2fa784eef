"""The passes, one file each or a small family, in folders by purpose.

`PASSES` maps names to classes; `PIPELINES` names the recipes that come with onnxopt.
"""

from __future__ import annotations

if not __name__.startswith("onnxopt."):
    raise ImportError("import onnxopt.passes, not passes: the folder is linked into it")

import importlib
from collections.abc import Iterator, Mapping

from onnxopt.manager import Pass

_HOMES = {
    "dead-code": ("simplify.dead_code", "DeadCode"),
    "identity": ("simplify.identity", "RemoveIdentity"),
    "no-op": ("simplify.no_op", "RemoveNoOp"),
    "fold-constants": ("simplify.fold_constants", "FoldConstants"),
    "fold-shapes": ("simplify.fold_shapes", "FoldShapes"),
    "reshape-chain": ("simplify.reshape_chain", "MergeReshapes"),
    "transpose": ("simplify.transpose", "MergeTransposes"),
    "sink-transpose": ("simplify.sink_transpose", "SinkTransposes"),
    "inline-if": ("simplify.inline_if", "InlineIf"),
    "inline-functions": ("simplify.inline_functions", "InlineFunctions"),
    "share-weights": ("simplify.share_weights", "ShareWeights"),
    "cse": ("simplify.cse", "ShareCommonSubexpressions"),
    "fold-batch-norm": ("simplify.fold_batch_norm", "FoldBatchNorm"),
    "constant-chain": ("simplify.constant_chain", "MergeConstants"),
    "div-to-mul": ("simplify.div_to_mul", "DivToMul"),
    "fold-gather": ("simplify.fold_gather", "FoldGather"),
    "fold-pad": ("simplify.fold_pad", "FoldPad"),
    "fold-scale": ("simplify.fold_scale", "FoldScale"),
    "matmul-to-gemm": ("simplify.matmul_to_gemm", "MatMulToGemm"),
    "transpose-into-gemm": ("simplify.transpose_into_gemm", "TransposeIntoGemm"),
    "fuse-operators": ("simplify.fuse_operators", "FuseOperators"),
    "merge-elementwise": ("simplify.merge_elementwise", "MergeElementwise"),
    "fold-qdq-weights": ("qdq.fold_qdq_weights", "FoldQdqWeights"),
    "dead-layers": ("shrink.dead_layers", "DeadLayers"),
    "zero-channels": ("shrink.zero_channels", "ZeroChannels"),
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

_SIMPLIFY = (
    "dead-code",
    "identity",
    "fold-constants",
    "fold-shapes",
    "no-op",
    "reshape-chain",
    "transpose",
    "sink-transpose",
    "inline-if",
    "share-weights",
    "cse",
    "matmul-to-gemm",
    "transpose-into-gemm",
    "fold-pad",
    "fold-batch-norm",
    "fold-scale",
    "fold-gather",
    "constant-chain",
    "div-to-mul",
    "fuse-operators",
    "merge-elementwise",
)

ON_REQUEST = ("inline-functions",)
"""Passes of no recipe that comes with onnxopt: they change what a user may want kept."""

_SHRINK = ("dead-layers", "zero-channels")

PIPELINES: dict[str, tuple[str, ...]] = {
    "default": (*_SIMPLIFY, "fold-qdq-weights", *_SHRINK),
    "simplify": _SIMPLIFY,
    "shrink": ("dead-code", "identity", "fold-constants", "no-op", *_SHRINK),
}
