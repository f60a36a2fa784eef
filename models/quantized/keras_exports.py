"""What tf2onnx makes of Keras models with FakeQuant nodes, and of an int8 TFLite model.

    python -m models.quantized.keras_exports

Run in an environment with `pip install tensorflow-cpu==2.21.0 tf_keras tf2onnx==1.17.0`
(Python 3.12), from the root of the repository.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
import tf2onnx
import tf_keras as keras
from tensorflow.python.framework.convert_to_constants import (
    convert_variables_to_constants_v2,
)

from models.quantized.store import store

SEED = 20241
OPSET = 17
SHAPE = (8, 8, 3)


class Quantize(keras.layers.Layer):
    """FakeQuantWithMinMaxVars of an activation."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def call(self, x: Any) -> Any:
        return tf.quantization.fake_quant_with_min_max_vars(x, self.low, self.high)


class Conv(keras.layers.Conv2D):
    def call(self, x: Any) -> Any:
        kernel = tf.quantization.fake_quant_with_min_max_vars(self.kernel, -0.35, 0.35)
        return tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), self.bias)


class Dense(keras.layers.Dense):
    def call(self, x: Any) -> Any:
        kernel = tf.quantization.fake_quant_with_min_max_vars(self.kernel, -0.9, 0.9)
        return tf.matmul(x, kernel) + self.bias


def _fake_quantized() -> keras.Model:
    keras.utils.set_random_seed(SEED)
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            Quantize(-3.0, 3.0),
            Conv(24, 3),
            keras.layers.ReLU(),
            Quantize(0.0, 2.0),
            keras.layers.GlobalAveragePooling2D(),
            Quantize(0.0, 1.0),
            Dense(10),
            Quantize(-2.0, 2.0),
        ]
    )


def default() -> None:
    """TensorFlow folds FakeQuant of a weight before tf2onnx sees it: float numbers."""
    spec = (tf.TensorSpec((None, *SHAPE), tf.float32, name="x"),)
    made, _ = tf2onnx.convert.from_keras(_fake_quantized(), spec, opset=OPSET)
    store(made, "keras_folded")


def unfolded() -> None:
    """Weights float behind Q-DQ and a Transpose: tf2onnx kept from folding constants."""
    model = _fake_quantized()
    spec = tf.TensorSpec((None, *SHAPE), tf.float32, name="x")
    traced = tf.function(lambda x: model(x), input_signature=[spec])
    frozen = convert_variables_to_constants_v2(traced.get_concrete_function())
    ends = [[value.name for value in part] for part in (frozen.inputs, frozen.outputs)]
    with (
        tf.Graph().as_default() as graph,
        mock.patch("tf2onnx.tfonnx.fold_constants_using_tf", return_value=None),
    ):
        tf.import_graph_def(frozen.graph.as_graph_def(), name="")
        made = tf2onnx.tfonnx.process_tf_graph(
            graph, opset=OPSET, input_names=ends[0], output_names=ends[1]
        )
    store(made.make_model("keras"), "keras_fake_quant")


def tflite() -> None:
    """Full-integer TFLite: int8 activations and weights, int32 biases."""
    keras.utils.set_random_seed(SEED)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(16, 3, activation="relu"),
            layers.DepthwiseConv2D(3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    rng = np.random.default_rng(SEED)

    def samples() -> Iterator[list[Any]]:
        for _ in range(8):
            yield [rng.standard_normal((1, *SHAPE)).astype(np.float32)]

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = samples
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(converter.convert())
        made, _ = tf2onnx.convert.from_tflite(str(path), opset=OPSET)
    store(made, "tflite_int8")


if __name__ == "__main__":
    default()
    unfolded()
    tflite()
