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
from onnxopt.passes.simplify.concat_chain import MergeConcats
from onnxopt.passes.simplify.cse import ShareCommonSubexpressions
from onnxopt.passes.simplify.dead_code import DeadCode
from onnxopt.passes.simplify.expand_broadcast import DropExpands
from onnxopt.passes.simplify.fold_batch_norm import FoldBatchNorm
from onnxopt.passes.simplify.fold_constants import FoldConstants
from onnxopt.passes.simplify.identity import RemoveIdentity
from onnxopt.passes.simplify.no_op import RemoveNoOp
from onnxopt.passes.simplify.reshape_chain import MergeReshapes
from onnxopt.passes.simplify.sink_transpose import SinkTransposes
from onnxopt.passes.simplify.slice_chain import MergeSlices
from onnxopt.passes.simplify.transpose import MergeTransposes

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        DeadCode,
        RemoveIdentity,
        RemoveNoOp,
        FoldConstants,
        MergeReshapes,
        MergeCasts,
        MergeSlices,
        MergeConcats,
        DropExpands,
        MergeTransposes,
        SinkTransposes,
        ShareCommonSubexpressions,
        FoldBatchNorm,
        FoldQdqWeights,
        DeadLayers,
        ZeroChannels,
    )
}

_SIMPLIFY = (
    "dead-code",
    "identity",
    "fold-constants",
    "no-op",
    "reshape-chain",
    "cast-chain",
    "slice-chain",
    "concat-chain",
    "expand-broadcast",
    "transpose",
    "sink-transpose",
    "cse",
    "fold-batch-norm",
)

_SHRINK = ("dead-layers", "zero-channels")

PIPELINES: dict[str, tuple[str, ...]] = {
    "default": (*_SIMPLIFY, "fold-qdq-weights", *_SHRINK),
    "simplify": _SIMPLIFY,
    "shrink": ("dead-code", "identity", "fold-constants", "no-op", *_SHRINK),
}
