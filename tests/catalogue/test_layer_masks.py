"""Real networks of which every layer is masked for itself: what agrees goes, exactly.

Rows of every Conv, Gemm and MatMul are zeroed, each layer's own choice. Nothing says what
that allows; whatever goes, the outputs stay, and a second run finds nothing more.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from onnxruntime.quantization import (
    QuantFormat,
    QuantType,
    quantize_static,
)
from support import final

import onnxopt
from catalogue import mask_oracle, test_masks
from catalogue.mask_oracle import LAYERS, Feed, constants
from catalogue.test_masks import assert_close
from models.fetch import fetch
from onnxopt import cost
from onnxopt.evaluate import Evaluator
from onnxopt.ledger import Ledger
from onnxopt.manager import Context, PassManager
from onnxopt.model import Model
from onnxopt.recipe import load_recipe
from tests.zoo.quantized import Reader

pytestmark = pytest.mark.catalogue

SHARE = 0.5
SHAPES = test_masks.SHAPES | {"ppocr-rec": ("x", [2, 3, 48, 96], [1, 3, 48, 160])}


@pytest.fixture(scope="module", name="context")
def _context() -> Iterator[Context]:
    with Evaluator() as evaluator:
        yield Context(evaluator=evaluator)


feeds = functools.partial(test_masks.feeds, shapes=SHAPES)


@functools.lru_cache(maxsize=1)
def masked(name: str) -> ModelProto:
    """Half of the rows of each layer are zero; the others are louder by as much."""
    model = onnx.load(fetch(name))
    known, random = constants(model), np.random.default_rng(0)
    for node in model.graph.node:
        if node.op_type not in LAYERS or node.input[1] not in known:
            continue
        tensor = known[node.input[1]]
        axis = _outputs(node, len(tensor.dims))
        array = numpy_helper.to_array(tensor).copy()
        dead = random.permutation(array.shape[axis])[: int(SHARE * array.shape[axis])]
        array *= array.dtype.type(np.sqrt(1 / (1 - SHARE)))
        np.moveaxis(array, axis, 0)[dead] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        if len(node.input) > 2 and node.input[2] in known:
            bias = known[node.input[2]]
            shift = numpy_helper.to_array(bias).copy()
            shift.reshape(-1)[dead] = 0
            bias.CopyFrom(numpy_helper.from_array(shift, bias.name))
    return model


def _outputs(node: onnx.NodeProto, rank: int) -> int:
    """The axis of a weight that makes channels."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return 0 if node.op_type == "Conv" else 1
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if turned else rank - 1


def run(source: ModelProto, context: Context) -> Model:
    model = Model.open(source)
    model.ledger = Ledger()
    PassManager(load_recipe("shrink")[0], verify_each=True).run(model, context)
    return model


def parameters(source: ModelProto) -> int:
    return cost.parameters(Model.open(source))


def check(source: ModelProto, given: list[Feed], context: Context) -> float:
    """Shrink and compare; the share of the parameters that is left."""
    made = final(run(source, context))
    onnx.checker.check_model(made, full_check=True)
    one, two = mask_oracle.session(source), mask_oracle.session(made)
    names = [output.name for output in source.graph.output]
    for feed in given:
        pairs = zip(one.run(names, feed), two.run(names, feed), strict=True)
        for name, (expected, found) in zip(names, pairs, strict=True):
            assert_close(found, expected, name)
    again = run(made, context)
    assert sum(report.edits for report in again.ledger.reports()) == 0
    return parameters(made) / parameters(source)


@pytest.mark.parametrize("name", SHAPES)
def test_each_layer_masked_for_itself(name: str, context: Context) -> None:
    left = check(masked(name), feeds(name), context)
    print(f"{name}: {left:.3f} of the parameters are left")
    assert left < 0.9


@pytest.mark.parametrize("name", ["efficientnet-lite0", "ppocr-cls"])
def test_quantized_after_a_group_mask(
    name: str, context: Context, tmp_path: Path
) -> None:
    """Zeros are codes of zero: they go from the quantized model as from the other."""
    given = mask_oracle.mask(onnx.load(fetch(name)), feeds(name), SHARE, seed=0)
    target = tmp_path / "quantized.onnx"
    quantize_static(
        copy.deepcopy(given.model),  # its weights are moved to a file
        target,
        Reader(feeds(name)[:1]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    source = onnx.load(target)
    made = final(run(source, context))
    verdict = onnxopt.validate(source, made, data=feeds(name))
    assert verdict.status == "passed"  # a sum that rounds may come to the next code
    left = parameters(made) / parameters(source)
    allowed = 1 - (given.layers + given.norms) / parameters(given.model)
    print(f"{name}: {left:.3f} of the parameters are left; masks allow {allowed:.3f}")
    assert left < allowed + 0.02
