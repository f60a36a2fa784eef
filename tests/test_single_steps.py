"""Which operators Round belong to a quantizer in single steps."""

from __future__ import annotations

import pytest

from onnxopt.validation.single_steps import rounding
from tests.support import model_of

QUANTIZER = "v = Div(x, s) r = Round(v) c = Clip(r, low, high) y = Mul(c, s)"
CASES = {
    "plain": (QUANTIZER, {"r": False}),
    "through integers": (
        "v = Div(x, s) r = Round(v) i = Cast<to=6>(r) c = Clip(i, l, h) "
        "f = Cast<to=1>(c) y = Mul(f, s)",
        {"r": True},
    ),
    # what reads the type of the value alone is no part of the chain
    "bounds of its type": (
        "v = Div(x, s) r = Round(v) l = CastLike(low, r) h = CastLike(high, r) "
        "m = Max(r, l) c = Min(m, h) y = Mul(c, s)",
        {"r": False},
    ),
    "no clamp": ("v = Div(x, s) r = Round(v) y = Mul(r, s)", {}),
    "other readers": (f"{QUANTIZER} z = Exp(r)", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_rounding_of_quantizers(name: str) -> None:
    body, expected = CASES[name]
    model = model_of(f"agraph (float[2] x) => (float[2] y) {{ {body} }}")
    assert rounding(model.graph.node) == expected
