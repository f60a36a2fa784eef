"""Inlining undoes what wraps a graph: a call, or an If whose condition is constant."""

from __future__ import annotations

import numpy as np
import onnx.checker
import pytest
from onnx.numpy_helper import from_array

from onnxopt.manager import Context
from tests import support
from tests.test_golden import CASES, Case

WRAPPED = [case for case in CASES if not {"only", "norun"} & case.options.keys()]


def _sizes(case: Case) -> tuple[int, ...]:
    """A size that symbolic dims can take in this case."""
    return (int(str(case.options.get("feeds", "2")).split(",")[0]),)


def _name(case: Case) -> str:
    return f"{case.pass_name}/{case.name}"


@pytest.mark.parametrize("case", WRAPPED, ids=_name)
def test_calls(case: Case, context: Context) -> None:
    """No function is left, and the outputs are what they were."""
    source = support.in_function(case.model())
    model = support.run_passes(source, "inline-functions", context)
    assert not model.proto.functions
    for feed in support.feeds_of(source, _sizes(case)):
        support.assert_same(
            support.run(source, feed), support.run(support.final(model), feed)
        )


@pytest.mark.parametrize("case", WRAPPED, ids=_name)
def test_branches(case: Case, context: Context) -> None:
    """The If that wraps the graph is gone, and the outputs are what they were."""
    source = support.in_branches(case.model())
    value = source.graph.input.pop()
    assert value.name == "cond__"
    source.graph.initializer.append(from_array(np.array(False), value.name))
    model = support.run_passes(source, "inline-if", context)
    assert model.main.producer("which_out__").op_type == "Xor"  # type: ignore[union-attr]
    proto = support.final(model)
    onnx.checker.check_model(proto)
    for feed in support.feeds_of(source, _sizes(case)):
        support.assert_same(support.run(source, feed), support.run(proto, feed))


def test_the_name_of_a_value_that_is_gone_is_not_given_to_another(
    context: Context,
) -> None:
    """What was inferred of the first `t` would be believed of the second."""
    source = support.parse(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[n,4] x, float[m] z) => (int64[k] y, float[q] w) {
            t = Identity(x)
            u = Relu(t)
            s = Shape(u)
            w = Cast<to = 1>(s)
            y = local.f(z)
        }
        <domain: "local", opset_import: ["" : 17]>
        f (a) => (b) { t = Neg(a) b = Shape(t) }"""
    )
    passes = "fold-shapes,identity,inline-functions,fold-shapes"
    result = support.final(support.run_passes(source, passes, context))
    for feed in support.feeds_of(source):
        support.assert_same(support.run(source, feed), support.run(result, feed))
