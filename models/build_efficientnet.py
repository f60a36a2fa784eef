"""Build EfficientNet-Lite0 as ONNX from its published PyTorch weights, without torch.

    python models/build_efficientnet.py SOURCE.pth TARGET.onnx

The catalogue needs an ImageNet network whose BatchNormalization nodes are still there,
to fold them, and torch's own exporter folds them away. So the graph is written here,
the way an exporter in training mode would leave it:

    input -> (Conv -> BatchNormalization -> Clip(0, 6)) ... + Add where a block has a
    shortcut -> GlobalAveragePool -> Flatten -> Gemm -> logits

A `.pth` file is a pickle, which can run any code on loading. This reader knows the
four names that the weights need, refuses every other, and calls nothing but its own
stand-ins for them.

The same weights give the same bytes: no timestamps, no hashing order, fixed versions.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

IR_VERSION = 8
OPSET = 17
IMAGE = 224
# Trained in TensorFlow, whose default differs from PyTorch's 1e-5.
EPSILON = 1e-3


class Stage(NamedTuple):
    """A run of inverted residual blocks; only its first block strides and widens."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32

# --- Reading the weights ------------------------------------------------------------

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

Array = NDArray[Any]


# Tuples, because a pickle can rewrite the attributes of any other object it has made.
class _Storage(NamedTuple):
    """A flat buffer that tensors are views of; its data follows the pickle."""

    key: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, kept until the storage has been read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(
    storage: object, offset: int, shape: Any, strides: Any, *_unused: object
) -> _Tensor:
    """Stand-in for `torch._utils._rebuild_tensor_v2`; gradients and hooks are dropped."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


# The storage classes stand for nothing but their dtype, so a pickle cannot call them.
ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves the names in ALLOWED to our own objects; any other name is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """Never import: the lookup in `pickle` does, and importing runs code."""
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage comes by reference: (kind, dtype, key, device, size, view)."""
        match pid:
            case ("storage", "<f4" | "<i8" as dtype, str(key), str(), int(size), None):
                return _Storage(key, dtype, size)
        raise pickle.UnpicklingError(f"unexpected reference: {pid!r}")


def read_state_dict(file: BinaryIO) -> dict[str, Array]:
    """Read the file that `torch.save` wrote before 1.6: five pickles, then the data."""
    magic, protocol, _system, tensors, keys = (
        RestrictedUnpickler(file).load() for _ in range(5)
    )
    if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise pickle.UnpicklingError("not a PyTorch file of the legacy format")
    if not all(isinstance(each, _Tensor) for each in dict(tensors).values()):
        raise pickle.UnpicklingError("not a state dict")
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    data = {key: _read_storage(file, storages[key]) for key in keys}
    return {name: _view(tensor, data) for name, tensor in tensors.items()}


def _read_storage(file: BinaryIO, storage: _Storage) -> Array:
    """The count before the data must be the one that the tensors were checked against."""
    (count,) = struct.unpack("<q", file.read(8))
    if count != storage.size:
        raise pickle.UnpicklingError(f"storage {storage.key}: {count} elements")
    dtype = np.dtype(storage.dtype)
    return np.frombuffer(file.read(count * dtype.itemsize), dtype, count)


def _view(tensor: _Tensor, data: Mapping[str, Array]) -> Array:
    """Apply offset and strides, which may reach anywhere: check before numpy follows."""
    flat = data[tensor.storage.key]
    reach = [(n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)]
    if min([tensor.offset, *tensor.strides, *tensor.shape]) < 0 or (
        tensor.offset + sum(reach) >= flat.size
    ):
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    strides = [s * flat.itemsize for s in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)
    return np.ascontiguousarray(view).reshape(tensor.shape)


# --- Writing the graph --------------------------------------------------------------


@dataclass
class Builder:
    """Collects nodes and the weights they use; methods return the new value's name."""

    weights: Mapping[str, Array]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)

    def constant(self, name: str, value: Array) -> str:
        """Add an initializer once, however often it is used."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output, which takes its name."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str) -> str:
        """Add a trained weight under its own name."""
        return self.constant(name, self.weights[name])

    def conv(self, x: str, name: str, size: int, stride: int = 1, group: int = 1) -> str:
        """A convolution over a `size` x `size` image with TensorFlow's SAME padding."""
        kernel = self.weights[f"{name}.weight"].shape[-1]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        # Where the padding is odd, TensorFlow puts the extra pixel after the image.
        pads = [total // 2] * 2 + [total - total // 2] * 2
        return self.node(
            "Conv",
            f"{name}.conv",
            [x, self.weight(f"{name}.weight")],
            group=group,
            kernel_shape=[kernel, kernel],
            pads=pads,
            strides=[stride, stride],
        )

    def norm(self, x: str, name: str) -> str:
        """BatchNormalization, left explicit: folding it is the work of a pass."""
        parts = ("weight", "bias", "running_mean", "running_var")
        inputs = [x, *(self.weight(f"{name}.{part}") for part in parts)]
        return self.node("BatchNormalization", f"{name}.norm", inputs, epsilon=EPSILON)

    def relu6(self, x: str) -> str:
        """Clip to 0..6."""
        low = self.constant("relu6.min", np.array(0, np.float32))
        high = self.constant("relu6.max", np.array(6, np.float32))
        return self.node("Clip", f"{x}.clip", [x, low, high])

    def block(self, x: str, name: str, block: Stage, size: int, channels: int) -> str:
        """An inverted residual: widen, filter each channel, narrow, add the input."""
        wide, shortcut = channels * block.expand, x
        if block.expand != 1:
            x = self.conv(x, f"{name}._expand_conv", size)
            x = self.relu6(self.norm(x, f"{name}._bn0"))
        x = self.conv(x, f"{name}._depthwise_conv", size, block.stride, group=wide)
        x = self.relu6(self.norm(x, f"{name}._bn1"))
        x = self.conv(x, f"{name}._project_conv", math.ceil(size / block.stride))
        x = self.norm(x, f"{name}._bn2")
        if block.stride == 1 and block.channels == channels:
            x = self.node("Add", f"{name}.add", [x, shortcut])
        return x


def blocks() -> Iterator[Stage]:
    """Spell the stages out block by block."""
    for stage in STAGES:
        yield stage
        for _ in range(stage.repeats - 1):
            yield stage._replace(stride=1)


def build(weights: Mapping[str, Array]) -> onnx.ModelProto:
    """The whole network, from [batch, 3, 224, 224] to [batch, 1000] logits."""
    graph = Builder(weights)
    x = graph.conv("input", "_conv_stem", IMAGE, stride=2)
    x = graph.relu6(graph.norm(x, "_bn0"))
    size, channels = IMAGE // 2, STEM_CHANNELS
    for index, block in enumerate(blocks()):
        x = graph.block(x, f"_blocks.{index}", block, size, channels)
        size, channels = math.ceil(size / block.stride), block.channels
    x = graph.relu6(graph.norm(graph.conv(x, "_conv_head", size), "_bn1"))
    x = graph.node("Flatten", "flatten", [graph.node("GlobalAveragePool", "pool", [x])])
    classifier = [x, graph.weight("_fc.weight"), graph.weight("_fc.bias")]
    graph.node("Gemm", "logits", classifier, transB=1)
    return _model(graph)


def _model(graph: Builder) -> onnx.ModelProto:
    image: list[str | int | None] = ["batch", 3, IMAGE, IMAGE]
    proto = helper.make_graph(
        graph.nodes,
        "efficientnet-lite0",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])],
        list(graph.initializers.values()),
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    return model


def main(argv: Sequence[str]) -> int:
    """Build TARGET from SOURCE."""
    if len(argv) != 2:
        print("usage: build_efficientnet.py SOURCE.pth TARGET.onnx", file=sys.stderr)
        return 2
    weights = read_state_dict(io.BytesIO(Path(argv[0]).read_bytes()))
    Path(argv[1]).write_bytes(build(weights).SerializeToString(deterministic=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
