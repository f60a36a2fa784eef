"""Masks over the networks of the zoo, and what they allow to take out.

    zero        the weights and biases of a channel's makers are zero, and so is what
                norms (of trained weights) have seen of it: mean and shift
    norm        the scale and shift of its norms are zero, its weights are as they were
    constant    its makers have zero weights (some of their norms a scale of zero, too)
                and a bias or shift of more than zero, so that a Relu keeps it

A group mask draws channels with all that goes with them, of each layer the same share; a
layer mask draws of each layer for itself, and a channel can go where all that make it
happen to agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from tests.zoo.toolkit import Array, Ints, Maker, Net, Norm, Part

Kind = Literal["zero", "norm", "constant"]
KINDS: tuple[Kind, ...] = ("zero", "norm", "constant")
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Expected:
    """The size that an axis of a weight has to have; `before` without a removal."""

    weight: str
    axis: int
    before: int
    after: int


@dataclass(frozen=True)
class Masked:
    """A masked model, and what has to go of it.

    `spared`: so many of the indices counted may stay, as each padded layer that reads
    constants keeps one to make up for the others.
    """

    model: ModelProto
    expected: list[Expected]
    spared: int = 0

    @property
    def removable(self) -> int:
        """Indices of weight axes that have to go."""
        return sum(each.before - each.after for each in self.expected) - self.spared

    def removed(self, made: ModelProto) -> int:
        """How many of them are gone; each axis counts for what it has to lose."""
        dims = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
        found = 0
        for each in self.expected:
            left = dims[each.weight][each.axis] if each.weight in dims else 0
            found += min(each.before - left, each.before - each.after)
        return found

    def short(self, made: ModelProto) -> list[str]:
        """The axes that are longer than they have to be, as a message."""
        dims = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
        return [
            f"{each.weight} axis {each.axis}: {each.before} -> "
            f"{dims[each.weight][each.axis]}, not {each.after}"
            for each in self.expected
            if each.weight in dims and dims[each.weight][each.axis] > each.after
        ]


def by_group(net: Net, kind: Kind, share: float, seed: int) -> Masked:
    """A share of every group that is free to go."""
    random = np.random.default_rng(seed)
    roots = net.union.roots()
    for _ in range(100):
        masked = _draw(net, roots, share, random)
        if not any(masked[ids].all() for ids in net.values if len(ids)):
            break
    else:
        raise AssertionError("no mask leaves every value a channel")
    model = _written(net, kind, masked, random)
    goes = masked & ~_rigid(net, roots) if kind == "constant" else masked
    spared = _carriers(net, roots, goes) if kind == "constant" else 0
    return Masked(model, _expected(net, goes), spared)


def by_layer(net: Net, share: float, seed: int) -> Masked:
    """A share of what each layer makes, whatever the others do."""
    random = np.random.default_rng(seed)
    roots = net.union.roots()
    frozen = _frozen(net, roots)
    masked = np.zeros(len(roots), bool)
    for maker in net.makers:
        free = maker.ids[~frozen[maker.ids]]
        masked[random.permutation(free)[: int(share * len(maker.ids))]] = True
    model = _written(net, "zero", masked, random)
    made = [maker.ids for maker in net.makers if not maker.gate]
    atoms = np.concatenate(made)
    agrees = np.ones(len(roots), bool)
    np.logical_and.at(agrees, roots[atoms], masked[atoms])
    goes = agrees[roots] & ~frozen
    for ids in net.values:  # a value keeps one
        if goes[ids].all():
            goes[np.isin(roots, roots[ids[:1]])] = False
    return Masked(model, _expected(net, goes))


def by_chance(net: Net, share: float, seed: int) -> Masked:
    """Zeros, constants of either sign and silenced norms, each layer for itself.

    What that allows is not worked out.
    """
    random = np.random.default_rng(seed)
    kept = net.weights
    net.weights = {name: array.copy() for name, array in kept.items()}
    for maker in net.makers:
        dead = np.flatnonzero(random.random(len(maker.ids)) < share)
        np.moveaxis(net.weights[maker.weight], maker.axis, 0)[dead] = 0
        if maker.bias:
            values = random.choice([0.0, 0.0, 0.5, -0.5, 3.0], len(dead))
            net.weights[maker.bias][dead] = values
    for norm in net.norms:
        gamma, beta, mean, _ = (net.weights[name] for name in norm.names)
        for array, value in ((gamma, 0.0), (beta, 0.0), (mean, 0.0), (beta, 0.7)):
            array[random.random(len(norm.ids)) < share / 2] = value
    model = net.model()
    net.weights = kept
    return Masked(model, [])


# ---- drawing ----


def _frozen(net: Net, roots: Ints) -> Mask:
    atoms = np.concatenate(net.frozen)
    return np.isin(roots, roots[atoms])


def _rigid(net: Net, roots: Ints) -> Mask:
    """Channels that stay where they are constants other than zero."""
    if not net.rigid:
        return np.zeros(len(roots), bool)
    return np.isin(roots, roots[np.concatenate(net.rigid)])


def _draw(net: Net, roots: Ints, share: float, random: np.random.Generator) -> Mask:
    """[atoms]: of what each layer is the first to make, `share`."""
    frozen = set(roots[_frozen(net, roots)].tolist())
    seen, masked = set(frozen), set[int]()
    for maker in net.makers:
        own = set(roots[maker.ids].tolist())
        new = sorted(own - seen)
        count = min(round(share * len(new)), len(own) - 1)
        masked.update(random.permutation(new)[:count].tolist())
        seen |= own
    return np.isin(roots, list(masked))


# ---- writing ----


def _written(
    net: Net, kind: Kind, masked: Mask, random: np.random.Generator
) -> ModelProto:
    kept = net.weights
    net.weights = {name: array.copy() for name, array in kept.items()}
    values = random.uniform(0.2, 1.0, len(masked))[net.union.roots()]
    for maker in net.makers:
        dead = np.flatnonzero(masked[maker.ids])
        if maker.gate and kind != "constant":  # of some: it multiplies zeros
            dead = dead[random.random(len(dead)) < 0.5]
        if kind == "norm" and maker.normed:
            continue
        for part in (Part(maker.weight, maker.axis, maker.ids), *maker.also):
            gone = np.isin(part.ids, maker.ids[dead])
            np.moveaxis(net.weights[part.weight], part.axis, 0)[gone] = 0
        net.weights[maker.weight] *= _louder(net, maker, masked)
        if maker.bias:
            shift = values[maker.ids[dead]] if kind == "constant" else 0
            net.weights[maker.bias][dead] = shift
    for norm in net.norms:
        dead = np.flatnonzero(masked[norm.ids])
        _in_norm(net.weights, norm, dead, kind, random)
    model = net.model()
    net.weights = kept
    return model


def _louder(net: Net, maker: Maker, masked: Mask) -> float:
    """Makes up for inputs that are masked, so that the network does not fall silent."""
    for part in net.parts:
        if part.weight == maker.weight and part.axis != maker.axis:
            return float(1 / np.sqrt(max(np.mean(~masked[part.ids]), 0.1)))
    return 1.0


def _in_norm(
    weights: dict[str, Array],
    norm: Norm,
    dead: Ints,
    kind: Kind,
    random: np.random.Generator,
) -> None:
    gamma, beta, mean, _ = (weights[name] for name in norm.names)
    beta[dead] = 0
    if kind == "norm":
        gamma[dead] = 0
        return
    mean[dead] = 0
    if kind == "constant":
        beta[dead] = random.uniform(0.2, 1.0, len(dead))
        gamma[dead[::2]] = 0


# ---- what has to go ----


def _expected(net: Net, goes: Mask) -> list[Expected]:
    return [
        Expected(part.weight, part.axis, len(part.ids), int((~goes[part.ids]).sum()))
        for part in net.parts
        if goes[part.ids].any()
    ]


def _carriers(net: Net, roots: Ints, goes: Mask) -> int:
    """So many indices may stay: one constant channel for each padded layer.

    A channel that several such layers read serves them all.
    """
    places = np.concatenate([roots[part.ids] for part in net.parts])
    count = np.bincount(places, minlength=len(roots))
    held: set[int] = set()
    for ids in net.borders:
        own = set(roots[ids[goes[ids]]].tolist())
        if own and not own & held:
            held.add(max(own, key=lambda root: int(count[root])))
    return sum(int(count[root]) for root in held)
