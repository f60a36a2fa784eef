"""Patterns: what matches, and what a failure says."""

from __future__ import annotations

import pytest

from onnxopt.model import Model
from onnxopt.pattern import (
    Constant,
    Either,
    Failure,
    Match,
    Op,
    Pattern,
    Product,
    Value,
    match,
)
from tests import support

X = Value("x")
WEIGHTS = (
    "<float half = {0.5}, float two = {2}, float near = {0.50001}, float[2] c = {1, 2}>"
)


def compare(
    pattern: Pattern, nodes: str, outputs: str = "float[N,2] y"
) -> Match | Failure:
    """The outcome of comparing `pattern` with what makes y in a graph of `nodes`."""
    source = support.model_of(
        f"main (float[N,2] x, float[N,2] z) => ({outputs}) {WEIGHTS} {{ {nodes} }}"
    )
    graph = Model.open(source).main
    node = graph.producer("y")
    assert node is not None
    return match(graph, node, pattern)


def reason(pattern: Pattern, nodes: str, outputs: str = "float[N,2] y") -> str:
    """Why it does not match."""
    found = compare(pattern, nodes, outputs)
    assert isinstance(found, Failure)
    return found.reason


def test_operands_in_either_order() -> None:
    """A commutative operator's operands are tried both ways, another's are not."""
    for text in ("y = Add (t, x)", "y = Add (x, t)"):
        found = compare(Op("Add", Op("Exp", X), X), f"t = Exp (x) {text}")
        assert isinstance(found, Match)
        assert found["x"] == "x"
    why = reason(Op("Sub", X, Op("Exp", X)), "t = Exp (z) y = Sub (x, t)")
    assert why == "'z' is not 'x'"


def test_reasons() -> None:
    """The failure that got furthest tells what is not as it should be."""
    scaled = Op("Exp", Op("Mul", X, Constant(0.5)))
    assert reason(scaled, "t = Mul (x, two) y = Exp (t)") == "'two' is 2 and not 0.5"
    assert "is 0.500010014" in reason(scaled, "t = Mul (x, near) y = Exp (t)")
    assert "not a scalar" in reason(scaled, "t = Mul (x, c) y = Exp (t)")
    outputs = "float[N,2] y, float[N,2] t"
    why = reason(scaled, "t = Mul (x, half) y = Exp (t)", outputs)
    assert why == "'t' has other readers"
    either = Op("Exp", Either(Op("Sqrt", X), Op("Neg", X)))
    assert "comes from Abs" in reason(either, "t = Abs (x) y = Exp (t)")


@pytest.mark.parametrize(
    "nodes",
    [
        "e = Exp (x) t = Mul (e, half) y = Mul (t, x)",
        "e = Exp (x) t = Mul (x, e) y = Div (t, two)",
        "e = Exp (x) t = Div (x, two) y = Mul (t, e)",
    ],
)
def test_products_in_any_association(nodes: str) -> None:
    """Factors and constants in any order, a division by a constant among them."""
    found = compare(Product(0.5, Op("Exp", X), X), nodes)
    assert isinstance(found, Match)
    assert found["x"] == "x"


def test_products_that_differ() -> None:
    """Another factor, or one too many."""
    pattern = Product(0.5, Op("Exp", X), X)
    why = reason(pattern, "e = Exp (x) t = Mul (e, two) y = Mul (t, x)")
    assert why == "the factor of 'y' is 2 and not 0.5"
    why = reason(pattern, "e = Exp (x) t = Mul (e, z) y = Mul (t, x)")
    assert why == "'y' is not a product of 2"


def test_shared_elements_are_one_value() -> None:
    """One element at two places is the same value at both."""
    inner = Op("Exp", X)
    assert isinstance(
        compare(Op("Mul", inner, inner), "t = Exp (x) y = Mul (t, t)"), Match
    )
    twice = "t = Exp (x) u = Exp (x) y = Mul (t, u)"
    assert reason(Op("Mul", inner, inner), twice) in ("'u' is not 't'", "'t' is not 'u'")


def test_constants_may_raise_the_rank() -> None:
    """What a scalar of some rank does to the shape is known."""
    source = support.model_of(
        "main (float[2] x) => (float[1,2] y) <float[1,1] k = {2}> { y = Mul (x, k) }"
    )
    graph = Model.open(source).main
    found = match(graph, graph.nodes()[0], Op("Mul", X, Constant(2.0)))
    assert isinstance(found, Match)
    assert not found.keeps_shape("x")
