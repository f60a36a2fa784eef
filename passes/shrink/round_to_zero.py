"""round-to-zero: take weights that are next to nothing for nothing, a channel at a time.

    t = Conv(x, W, b)   |W[3]| <= T, b[3] = c      t = Conv(x, W', b)   W'[3] = 0
    y = BatchNormalization(u, gamma, beta, ...)
                        |gamma[5]| <= T     ->     gamma'[5] = 0

`zero-channels` and `dead-layers` then remove what that makes zero or constant, exactly.
This pass alone is lossy: the result is validated against the budget of lossy passes.

1. T is a magnitude, the same for all tensors: a branch that a training took to zero as a
   whole goes, too. A quantized weight is compared as what it stands for.
2. An output or input channel of a Conv, ConvTranspose, Gemm or MatMul is taken as zero
   where each of its weights is at most T, also after the factor by which the
   BatchNormalization directly behind the layer enlarges it: a filter whose running
   variance is as small as the filter is not near zero.
3. The bias of a filter that is zero becomes zero where it is at most T, else it stays,
   and the channel is constant.
4. An element of the scale of a normalization is taken as zero where it is at most T, then
   its shift, likewise. So is what a BatchNormalization makes of a filter that is zero.
5. A weight that others read as well stays as it is. Single weights in channels that stay
   are left alone: they would gain nothing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnxopt import attributes
from onnxopt.channels.analysis import Analysis
from onnxopt.channels.engine import analyse
from onnxopt.channels.facts import Mask
from onnxopt.channels.rules.layer import Layer
from onnxopt.channels.rules.matrix import Geometry, as_matrix
from onnxopt.channels.rules.normalization import is_training, scale_and_shift
from onnxopt.edit import Edit
from onnxopt.graph import GraphView
from onnxopt.linear import FLOATS, LAYERS
from onnxopt.manager import Context, Pass
from onnxopt.report import Guarantee
from onnxopt.weights import Array

Floats = npt.NDArray[np.float64]

_NORMS = (
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
)
"""Operators whose inputs 1 and, where they have it, 2 are a scale and a shift."""
_FIXED = "what is near zero in {!r} stays: it is computed, or others read it"


class RoundToZero(Pass):
    """Let channels whose weights are all at most `tolerance` in magnitude be zero."""

    name: ClassVar[str] = "round-to-zero"
    guarantee: ClassVar[Guarantee] = "lossy"
    tolerance: Annotated[float, msgspec.Meta(ge=0)] = 0.0

    def run(self, graph: GraphView, context: Context) -> None:
        """Layers and normalizations in order, so that these know the filters by then."""
        if graph.is_function or not self.tolerance:
            return
        nodes = graph.nodes((*LAYERS, *_NORMS))
        if nodes:
            rounding = _Rounding(analyse(graph, context.evaluator), self.tolerance)
            for node in nodes:
                rounding.look_at(node)


class _Source(NamedTuple):
    """The constant that can be written to change a value: a weight, or its codes.

    `zero`: what stands for zero in it, of a shape that broadcasts to it.
    """

    name: str
    array: Array
    zero: Array

    @classmethod
    def of(cls, graph: GraphView, name: str) -> _Source | None:
        """None where the value is computed otherwise, or others read the constant."""
        if graph.only_use_everywhere(name) is None:
            return None
        maker = graph.producer(name)
        if graph.weight(name) is None and maker is not None:
            return cls._codes(graph, maker)
        array, tensor = graph.array(name), graph.weight(name)
        if array is None or tensor is None or tensor.data_type not in FLOATS:
            return None
        return cls(name, array, np.zeros((), array.dtype))

    @classmethod
    def _codes(cls, graph: GraphView, maker: NodeProto) -> _Source | None:
        """The integers that a DequantizeLinear reads."""
        if graph.op(maker) != "DequantizeLinear" or attributes.get(maker, "block_size"):
            return None
        name = maker.input[0]
        codes = graph.array(name)
        if codes is None or graph.only_use_everywhere(name) is None:
            return None
        if len(maker.input) < 3 or not maker.input[2]:
            return cls(name, codes, np.zeros((), codes.dtype))
        zero = graph.array(maker.input[2])
        if zero is None or zero.ndim > 1 or codes.dtype.kind not in "iu":
            return None
        if zero.size > 1:
            shape = [1] * codes.ndim
            shape[attributes.get(maker, "axis", 1)] = -1
            zero = zero.reshape(shape)
        return cls(name, codes, zero.reshape(zero.shape if zero.size > 1 else ()))


class _Rounding:
    """One run over a scope: `idle` says, by value, which channels are only a bias."""

    def __init__(self, a: Analysis, tolerance: float) -> None:
        self.a, self.graph, self.tolerance = a, a.graph, tolerance
        self.idle: dict[str, Mask] = {}

    def look_at(self, node: NodeProto) -> None:
        """Round what is near zero in the constants of one node."""
        rule = self.a.rule(node)
        if self.graph.op(node) in _NORMS:
            self._norm(node)
        elif isinstance(rule, Layer) and self.a.is_float(node.output[0]):
            g, weight = rule.geometry(self.a, node), self.a.array(node.input[1])
            if g is not None and weight is not None and weight.ndim > 1 and weight.size:
                self._layer(node, g, weight)

    # ---- layers ----

    def _layer(self, node: NodeProto, g: Geometry, weight: Array) -> None:
        matrix = as_matrix(weight, g)
        with np.errstate(all="ignore"):
            peaks = np.maximum(matrix.max(3), -matrix.min(3))
        factor = self._factor(node, peaks.shape[0] * peaks.shape[1])
        enlarged = factor * abs(g.scale)
        wide = peaks
        if (enlarged != 1).any():
            wide = peaks * enlarged.reshape(*peaks.shape[:2], 1)
        small = wide <= self.tolerance  # [groups, outputs, inputs]
        rows, columns = small.all(2), small.all(1)
        new = (rows[:, :, None] | columns[:, None, :]) & (peaks != 0)
        edit = Edit(self.graph, node, max_growth=0)
        if new.any() and not self._write_weight(edit, node, g, new):
            return
        idle = rows.reshape(-1)
        bias = self._write_bias(edit, node, idle, factor * abs(g.bias_scale))
        outputs = int((new & rows[:, :, None]).any(2).sum())
        inputs = int((new & ~rows[:, :, None]).any(1).sum())
        told = [f"{outputs} output channels"] * (outputs > 0)
        told += [f"{inputs} input channels"] * (inputs > 0)
        largest = float(peaks[new].max(initial=bias))
        if edit.is_empty or self._apply(edit, " and ".join(told) or "a bias", largest):
            self.idle[node.output[0]] = idle

    def _factor(self, node: NodeProto, outputs: int) -> Floats:
        """By what a BatchNormalization that reads a layer enlarges each channel."""
        factor = np.ones(outputs)
        for use in self.graph.uses(node.output[0]):
            if use.view is self.graph and self.graph.op(use.node) == _NORMS[0]:
                found = scale_and_shift(self.a, use.node)
                if found is not None and found[0].size == outputs:
                    factor = np.maximum(factor, np.abs(found[0]))
        return factor

    def _write_weight(self, edit: Edit, node: NodeProto, g: Geometry, new: Mask) -> bool:
        name = node.input[1]
        source = _Source.of(self.graph, name)
        if source is None:
            self.graph.skip(node, _FIXED.format(name))
            return False
        made = source.array.copy()
        view = as_matrix(made, g)
        assert np.shares_memory(made, view), "a view of the weight"
        zero = as_matrix(np.broadcast_to(source.zero, made.shape), g)
        np.copyto(view, zero, where=new[..., None])
        edit.set_weight(source.name, made)
        return True

    def _write_bias(
        self, edit: Edit, node: NodeProto, idle: Mask, factor: Floats
    ) -> float:
        """Let the bias of what is only a bias be zero, where it is near zero.

        The largest magnitude among what became zero, 0 where nothing did.
        """
        name = node.input[2] if len(node.input) > 2 else ""
        bias = self.graph.array(name) if name else None
        source = _Source.of(self.graph, name) if bias is not None else None
        if bias is None or source is None or source.array.shape[-1:] != idle.shape:
            return 0.0
        if source.array.size != len(idle):
            return 0.0
        near = self._is_near(source.array.reshape(-1) * factor) & idle
        self._clear(edit, source, near.reshape(source.array.shape))
        return float(np.abs(bias.reshape(-1)[near]).max(initial=0))

    # ---- normalizations ----

    def _norm(self, node: NodeProto) -> None:
        graph, names = self.graph, [name for name in node.input[1:3] if name]
        is_batch = graph.op(node) == "BatchNormalization"
        if not names or (is_batch and is_training(self.a, node)):
            return
        scale = graph.array(names[0])
        shift = graph.array(names[1]) if len(names) > 1 else None
        if scale is None or (shift is not None and shift.shape != scale.shape):
            return
        near = self._is_near(scale)
        made = np.full(scale.shape, np.nan)
        if is_batch and shift is not None:
            made = self._constants(node, scale)
        gone = self._is_near(made)
        clear = [(names[0], scale, near | gone)]
        if shift is not None:
            clear.append((names[1], shift, gone | (near & self._is_near(shift))))
        values = [array[mask & ~gone] for _, array, mask in clear]
        largest = np.abs(np.concatenate([*values, made[gone]])).max(initial=0)
        self._write_norm(node, clear, float(largest))

    def _constants(self, node: NodeProto, scale: Array) -> Array:
        """What a BatchNormalization makes of filters that are zero; NaN of others."""
        nothing = np.full(scale.shape, np.nan)
        maker, idle = self.graph.producer(node.input[0]), self.idle.get(node.input[0])
        found = scale_and_shift(self.a, node)
        if maker is None or idle is None or found is None or idle.shape != scale.shape:
            return nothing
        rule = self.a.rule(maker)
        bias = rule.bias(self.a, maker, len(idle)) if isinstance(rule, Layer) else None
        if bias is None:
            return nothing
        return np.where(idle, found[0] * bias + found[1], np.nan)

    def _write_norm(
        self, node: NodeProto, clear: list[tuple[str, Array, Mask]], largest: float
    ) -> None:
        edit, changed = Edit(self.graph, node, max_growth=0), 0
        for name, array, mask in clear:
            new = mask & (array != 0)
            if not new.any():
                continue
            source = _Source.of(self.graph, name)
            if source is None:
                self.graph.skip(node, _FIXED.format(name))
                return
            self._clear(edit, source, new)
            changed = max(changed, int(new.sum()))
        if not edit.is_empty:
            self._apply(edit, f"{changed} channels", largest)

    # ---- both ----

    def _is_near(self, array: Array) -> Mask:
        with np.errstate(all="ignore"):
            return np.asarray(np.abs(array.astype(np.float64)) <= self.tolerance)

    def _clear(self, edit: Edit, source: _Source, mask: Mask) -> None:
        if (mask & (source.array != source.zero)).any():
            edit.set_weight(source.name, np.where(mask, source.zero, source.array))

    def _apply(self, edit: Edit, what: str, largest: float) -> bool:
        why = f"{what} near zero, at most {largest:.3g} in magnitude"
        done = self.graph.apply(edit, why)
        if done:
            label = self.graph.label(edit.node)
            self.graph.model.notes.append(f"taken as zero in {label}: {why}")
        return done
