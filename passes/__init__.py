"""The passes, one file each or a small family, in folders by purpose.

`PASSES` maps names to classes; `PIPELINES` names the recipes that come with onnxopt.
"""

from __future__ import annotations

if not __name__.startswith("onnxopt."):
    raise ImportError("import onnxopt.passes, not passes: the folder is linked into it")

from onnxopt.manager import Pass
from onnxopt.passes.qdq.fold_qdq_weights import FoldQdqWeights
from onnxopt.passes.shrink.dead_layers import DeadLayers
from onnxopt.passes.shrink.zero_channels import ZeroChannels
from onnxopt.passes.simplify.cast_chain import MergeCasts
from onnxopt.passes.simplify.cast_like import CastLikeToCast
from onnxopt.passes.simplify.concat_chain import MergeConcats
from onnxopt.passes.simplify.constant_chain import MergeConstants
from onnxopt.passes.simplify.cse import ShareCommonSubexpressions
from onnxopt.passes.simplify.dead_code import DeadCode
from onnxopt.passes.simplify.div_to_mul import DivToMul
from onnxopt.passes.simplify.expand_broadcast import DropExpands
from onnxopt.passes.simplify.fold_batch_norm import FoldBatchNorm
from onnxopt.passes.simplify.fold_constants import FoldConstants
from onnxopt.passes.simplify.fold_gather import FoldGather
from onnxopt.passes.simplify.fold_pad import FoldPad
from onnxopt.passes.simplify.fold_scale import FoldScale
from onnxopt.passes.simplify.fold_shapes import FoldShapes
from onnxopt.passes.simplify.fuse_operators import FuseOperators
from onnxopt.passes.simplify.identity import RemoveIdentity
from onnxopt.passes.simplify.inline_functions import InlineFunctions
from onnxopt.passes.simplify.inline_if import InlineIf
from onnxopt.passes.simplify.matmul_to_gemm import MatMulToGemm
from onnxopt.passes.simplify.merge_elementwise import MergeElementwise
from onnxopt.passes.simplify.no_op import RemoveNoOp
from onnxopt.passes.simplify.reshape_chain import MergeReshapes
from onnxopt.passes.simplify.share_weights import ShareWeights
from onnxopt.passes.simplify.sink_transpose import SinkTransposes
from onnxopt.passes.simplify.slice_chain import MergeSlices
from onnxopt.passes.simplify.split_sequence import SplitSequence
from onnxopt.passes.simplify.transpose import MergeTransposes
from onnxopt.passes.simplify.transpose_into_gemm import TransposeIntoGemm
from onnxopt.passes.simplify.unroll_loop import UnrollLoop

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        DeadCode,
        RemoveIdentity,
        RemoveNoOp,
        FoldConstants,
        CastLikeToCast,
        SplitSequence,
        FoldShapes,
        MergeReshapes,
        MergeCasts,
        MergeSlices,
        MergeConcats,
        DropExpands,
        MergeTransposes,
        SinkTransposes,
        InlineIf,
        UnrollLoop,
        InlineFunctions,
        ShareWeights,
        ShareCommonSubexpressions,
        FoldBatchNorm,
        MergeConstants,
        DivToMul,
        FoldGather,
        FoldPad,
        FoldScale,
        MatMulToGemm,
        TransposeIntoGemm,
        FuseOperators,
        MergeElementwise,
        FoldQdqWeights,
        DeadLayers,
        ZeroChannels,
    )
import importlib
from collections.abc import Iterator, Mapping
_HOMES = {
    "dead-code": ("simplify.dead_code", "DeadCode"),
    "identity": ("simplify.identity", "RemoveIdentity"),
    "no-op": ("simplify.no_op", "RemoveNoOp"),
    "fold-constants": ("simplify.fold_constants", "FoldConstants"),
    "fold-shapes": ("simplify.fold_shapes", "FoldShapes"),
    "reshape-chain": ("simplify.reshape_chain", "MergeReshapes"),
    "transpose": ("simplify.transpose", "MergeTransposes"),
    "sink-transpose": ("simplify.sink_transpose", "SinkTransposes"),
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
    "cast-like",
    "split-sequence",
    "fold-constants",
    "fold-shapes",
    "inline-if",
    "unroll-loop",
    "no-op",
    "reshape-chain",
    "cast-chain",
    "slice-chain",
    "concat-chain",
    "expand-broadcast",
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
