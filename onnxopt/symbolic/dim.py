"""Sizes that are not numbers: polynomials with integer coefficients over atoms.

An atom is a size of which nothing is known but its name: a dim of an input, a dim that a
value turns out to have, or a function of other sizes that is no polynomial, such as
`floor_quotient(h, 2)`. Two sizes are equal where their canonical texts are; of unequal
texts nothing follows.

Every atom is at least 0, as sizes are. Division is exact where it divides every term;
else it makes an atom of its text.

Functions of functions are graphs: layer by layer a size may be made of the last one's
twice, and written out it would double. So what is asked of an atom is worked out when it
is made, and long arguments stand in its text as their digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

LONGEST = 512
"""Arguments of more characters are written as a digest."""


class Atom:
    """A size with a name, or a function of sizes. Equal where the texts are.

    `at_one` and `vanishes` are what the functions `at_one` and `may_vanish` say of it.
    """

    __slots__ = ("arguments", "at_one", "function", "text", "vanishes")

    def __init__(self, text: str, function: str = "", *arguments: Dim) -> None:
        self.text = text
        self.function = function
        self.arguments = arguments
        self.at_one = _function_at_one(function, arguments)
        self.vanishes = _function_may_vanish(function, arguments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self.text == other.text

    def __lt__(self, other: Atom) -> bool:
        return self.text < other.text

    def __hash__(self) -> int:
        return hash(self.text)


Monomial = tuple[Atom, ...]


class Expr:
    """A polynomial that is no number. Immutable; equal where the texts are."""

    __slots__ = ("terms", "text")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self.text = _text(terms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return self.text


Dim = int | Expr


def atom(name: str) -> Expr:
    """A size with a name."""
    return Expr((((Atom(name),), 1),))


def function(name: str, *arguments: Dim) -> Expr:
    """Some function of sizes: equal where name and arguments are."""
    inner = ", ".join(text(size) for size in arguments)
    if len(inner) > LONGEST:
        inner = hashlib.blake2b(inner.encode(), digest_size=16).hexdigest()
    return Expr((((Atom(f"{name}({inner})", name, *arguments),), 1),))


def arguments_of(size: Dim, name: str) -> tuple[Dim, ...] | None:
    """What `function` was called with, where `size` is what it made of them."""
    if isinstance(size, int) or len(size.terms) != 1:
        return None
    monomial, factor = size.terms[0]
    if factor != 1 or len(monomial) != 1 or monomial[0].function != name:
        return None
    return monomial[0].arguments


def add(left: Dim, right: Dim) -> Dim:
    """left + right."""
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    terms = dict(_terms(left))
    for monomial, factor in _terms(right):
        terms[monomial] = terms.get(monomial, 0) + factor
    return _made(terms)


def subtract(left: Dim, right: Dim) -> Dim:
    """left - right."""
    return add(left, multiply(right, -1))


def multiply(left: Dim, right: Dim) -> Dim:
    """left * right."""
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    terms: dict[Monomial, int] = {}
    for one, factor in _terms(left):
        for two, other in _terms(right):
            key = tuple(sorted(one + two))
            terms[key] = terms.get(key, 0) + factor * other
    return _made(terms)


def product(sizes: Iterable[Dim]) -> Dim:
    """The product of all; 1 of none."""
    total: Dim = 1
    for size in sizes:
        total = multiply(total, size)
    return total


def exact_quotient(left: Dim, right: Dim) -> Dim | None:
    """left / right where `right` is one term and divides every term; None elsewhere.

    Where an atom of `right` is 0 the quotient is any size: 0 * size is `left` all the
    same.
    """
    divisor = _terms(right)
    if len(divisor) != 1:
        return 1 if left == right else None
    (monomial, factor), terms = divisor[0], {}
    if factor == 0:
        return None
    for one, other in _terms(left):
        rest = _without(one, monomial)
        if rest is None or other % factor:
            return None
        terms[rest] = other // factor
    return _made(terms)


def floor_quotient(left: Dim, right: Dim) -> Dim:
    """floor(left / right), an atom where the division may have a remainder."""
    if isinstance(left, int) and isinstance(right, int):
        return left // right
    if isinstance(right, int):
        exact = exact_quotient(left, right)
        if exact is not None:
            return exact
    return function("floor_quotient", left, right)


def windows(room: Dim, stride: int) -> Dim:
    """How many windows fit, `stride` apart, where the first leaves `room` behind it.

    ONNX Runtime divides towards zero: a pool whose window is larger than what it slides
    over may find room for one. What a run makes is never below 0, so neither is the atom.
    """
    if isinstance(room, int):
        return windows_of(room, stride)
    exact = exact_quotient(room, stride)
    return function("windows", room, stride) if exact is None else add(exact, 1)


def windows_of(room: int, stride: int) -> int:
    """`windows` of numbers."""
    whole = abs(room) // stride
    return (whole if room >= 0 else -whole) + 1


def text(size: Dim) -> str:
    """The canonical text."""
    return str(size) if isinstance(size, int) else size.text


def atoms(size: Dim) -> Iterator[Atom]:
    """The atoms in it, and those in what functions were called with."""
    for monomial, _ in _terms(size):
        for item in monomial:
            yield item
            for argument in item.arguments:
                yield from atoms(argument)


def at_one(size: Dim) -> int:
    """What it is where every size that has but a name is 1."""
    if isinstance(size, int):
        return size
    total = 0
    for monomial, factor in size.terms:
        for item in monomial:
            factor *= item.at_one
        total += factor
    return total


def _function_at_one(function: str, arguments: Iterable[Dim]) -> int:
    given = [at_one(argument) for argument in arguments]
    match function, given:
        case "bcast", _:
            return max(given)
        case "floor_quotient", (left, right):
            return left // right if right else 1
        case "windows", (room, stride):
            return windows_of(room, stride)
        case "length", (low, high):
            return max(high - low, 0)
        case "max", _:
            return max(given)
        case "min", _:
            return min(given)
        case "mod", (left, right):
            return left % right if right else 1
    return 1


def is_never_negative(size: Dim) -> bool:
    """Whether no atom's value makes it less than 0, as far as the signs tell."""
    return all(factor >= 0 for _, factor in _terms(size))


def may_vanish(size: Dim) -> bool:
    """Whether it may be 0 (or less) where every size that has but a name is 1 or more."""
    terms = _terms(size)
    is_sum = all(factor > 0 for _, factor in terms)
    return not is_sum or all(any(i.vanishes for i in items) for items, _ in terms)


def _function_may_vanish(function: str, arguments: Iterable[Dim]) -> bool:
    given = [may_vanish(argument) for argument in arguments]
    match function:
        case "" | "windows":
            return False
        case "max":
            return all(given)
        case "bcast" | "min":
            return any(given)
    return True


def _terms(size: Dim) -> tuple[tuple[Monomial, int], ...]:
    if isinstance(size, int):
        return (((), size),) if size else ()
    return size.terms


def _made(terms: Mapping[Monomial, int]) -> Dim:
    kept = tuple(sorted((key, factor) for key, factor in terms.items() if factor))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Expr(kept)


def _without(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    rest = list(monomial)
    for name in divisor:
        if name not in rest:
            return None
        rest.remove(name)
    return tuple(rest)


def _text(terms: tuple[tuple[Monomial, int], ...]) -> str:
    parts = []
    for monomial, factor in terms:
        names = "*".join(item.text for item in monomial)
        if not monomial:
            parts.append(str(factor))
        else:
            parts.append(names if factor == 1 else f"{factor}*{names}")
    return parts[0] if len(parts) == 1 else f"({' + '.join(parts)})"
