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
from onnxopt.passes.simplify.cse import ShareCommonSubexpressions
from onnxopt.passes.simplify.dead_code import DeadCode
from onnxopt.passes.simplify.fold_batch_norm import FoldBatchNorm
from onnxopt.passes.simplify.fold_constants import FoldConstants
from onnxopt.passes.simplify.identity import RemoveIdentity
from onnxopt.passes.simplify.inline_functions import InlineFunctions
from onnxopt.passes.simplify.inline_if import InlineIf
from onnxopt.passes.simplify.no_op import RemoveNoOp
from onnxopt.passes.simplify.reshape_chain import MergeReshapes
from onnxopt.passes.simplify.share_weights import ShareWeights
from onnxopt.passes.simplify.unroll_loop import UnrollLoop

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        DeadCode,
        RemoveIdentity,
        RemoveNoOp,
        FoldConstants,
        InlineIf,
        UnrollLoop,
        InlineFunctions,
        MergeReshapes,
        ShareWeights,
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
    "inline-if",
    "unroll-loop",
    "no-op",
    "reshape-chain",
    "share-weights",
    "cse",
    "fold-batch-norm",
)

ON_REQUEST = ("inline-functions",)
"""Passes of no recipe that comes with onnxopt: they change what a user may want kept."""

_SHRINK = ("dead-layers", "zero-channels")

PIPELINES: dict[str, tuple[str, ...]] = {
    "default": (*_SIMPLIFY, "fold-qdq-weights", *_SHRINK),
    "simplify": _SIMPLIFY,
    "shrink": ("dead-code", "identity", "fold-constants", "no-op", *_SHRINK),
}
