"""What a comparison of two models, A and B, has to say."""

from __future__ import annotations

from typing import Literal

import msgspec

from onnxopt._version import __version__

Change = Literal["only in A", "only in B", "changed", "renamed"]
Matched = Literal["output", "structure", "position"]


class NodeChange(msgspec.Struct, frozen=True):
    """A node, or a local function (`op` "function"), that is not the same.

    `node` is its label in A, `other` in B. `matched` says by what the two were taken
    for one: the name of an output; the operator and what it reads; or (a guess) the
    operator and its place among nodes of that operator. "renamed" means that only names
    differ. `details` are lines such as "attribute pads: [1, 1] -> [0, 0]".
    """

    scope: str
    node: str | None
    other: str | None
    op: str
    change: Change
    matched: Matched | None = None
    details: list[str] = []


class Values(msgspec.Struct, frozen=True):
    """How the elements of two tensors of one dtype and shape differ.

    Bits are compared: of the `changed` elements, `same_value` are equal as numbers (0.0
    and -0.0, NaN and NaN). `nonfinite` have a difference that is no number: an infinity
    or NaN on one side. `max_abs` is the largest of the other differences, null where
    there is none.
    """

    elements: int
    changed: int
    same_value: int
    nonfinite: int
    max_abs: float | None


class WeightChange(msgspec.Struct, frozen=True):
    """A constant (initializer, or a Constant's value) that is not the same.

    The first of each pair is A's, the second B's; null where it has none. `values` is
    null where dtype or shape differ, and where the model has the constant once only. A
    constant only of another name is "renamed".
    """

    scope: str
    name: str
    other: str | None
    change: Change
    dtype: tuple[str | None, str | None]
    shape: tuple[list[int] | None, list[int] | None]
    values: Values | None = None


class InterfaceChange(msgspec.Struct, frozen=True):
    """An input or output that is not the same.

    `what` is "only in A", "only in B", "name", "type", "shape", "order" or the name of
    another field; `a` and `b` say how it is there.
    """

    scope: str
    kind: Literal["input", "output"]
    name: str
    what: str
    a: str | None
    b: str | None


class FactChange(msgspec.Struct, frozen=True):
    """A version, doc string, entry of metadata or the like that is not the same."""

    what: str
    a: str | None
    b: str | None


class Differences(msgspec.Struct, frozen=True, kw_only=True):
    """All in which two models differ; `equal` where in nothing.

    `order` names the scopes whose nodes are the same (where they match at all) and
    stand in another order. `notes` are no differences: where weights are stored.
    """

    schema: int = 1
    onnxopt: str = __version__
    a: str
    b: str
    equal: bool
    nodes: list[NodeChange]
    order: list[str]
    weights: list[WeightChange]
    interface: list[InterfaceChange]
    metadata: list[FactChange]
    notes: list[str]


def words(values: Values) -> str:
    """`3 of 12 elements differ, by up to 0.5`, and what is peculiar about them."""
    text = f"{values.changed:,} of {values.elements:,} elements differ"
    if values.max_abs is not None:
        text += f", by up to {values.max_abs:.6g}"
    if values.same_value:
        text += f"; {values.same_value:,} in bits only (0.0 and -0.0, kinds of NaN)"
    if values.nonfinite:
        text += f"; {values.nonfinite:,} beyond measure (NaN or infinity)"
    return text
