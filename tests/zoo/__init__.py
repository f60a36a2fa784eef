"""Networks of every family, small and with random weights, whose channels are known.

`toolkit` is what they are built with; `masks` masks them, and says what has to go.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto

from tests.zoo.attention_gates import cbam, se_resnet
from tests.zoo.bert import bert
from tests.zoo.convnext import convnext
from tests.zoo.crnn import crnn
from tests.zoo.densenet import densenet
from tests.zoo.efficientnet import efficientnet
from tests.zoo.gan import gan
from tests.zoo.gpt2 import gpt2
from tests.zoo.inception import googlenet, inception_v3
from tests.zoo.llama import llama, llama_dims, llama_stream
from tests.zoo.mobilenet import mobilenet_v1, mobilenet_v2, mobilenet_v3
from tests.zoo.regnet import regnet
from tests.zoo.resnet import resnet_basic, resnet_bottleneck, resnet_preact, resnext
from tests.zoo.shufflenet import shufflenet_v2
from tests.zoo.swin import swin
from tests.zoo.toolkit import Array, Builder
from tests.zoo.unet import unet_resized, unet_transposed
from tests.zoo.vgg import vgg, vgg_bn
from tests.zoo.vit import vit
from tests.zoo.wavenet import wavenet
from tests.zoo.yolo import yolo

ZOO: dict[str, Builder] = {
    "VGG": vgg,
    "VGG-BN": vgg_bn,
    "ResNet basic": resnet_basic,
    "ResNet bottleneck": resnet_bottleneck,
    "ResNet pre-activation": resnet_preact,
    "ResNeXt": resnext,
    "DenseNet": densenet,
    "GoogLeNet": googlenet,
    "Inception v3": inception_v3,
    "MobileNet v1": mobilenet_v1,
    "MobileNet v2": mobilenet_v2,
    "MobileNet v3": mobilenet_v3,
    "EfficientNet": efficientnet,
    "ShuffleNet v2": shufflenet_v2,
    "RegNet": regnet,
    "ConvNeXt": convnext,
    "U-Net ConvTranspose": unet_transposed,
    "U-Net Resize": unet_resized,
    "YOLO": yolo,
    "SE-ResNet": se_resnet,
    "CBAM": cbam,
    "GAN": gan,
    "WaveNet": wavenet,
    "CRNN": crnn,
    "ViT": vit,
    "Swin": swin,
    "BERT": bert,
    "GPT-2": gpt2,
    "Llama": llama,
    "Llama, dims": llama_dims,
    "Llama, stream": llama_stream,
}


def feeds(model: ModelProto) -> list[dict[str, Array]]:
    """Three: two of one shape, one of another where the model leaves sizes open."""
    made = []
    for number, scale in enumerate((2, 2, 1)):
        random = np.random.default_rng(number)
        sizes = {"N": scale, "S": 5 * scale, "T": 24 * scale}
        feed = {}
        for value in model.graph.input:
            tensor = value.type.tensor_type
            dims = [
                d.dim_value or sizes.get(d.dim_param, 16 * scale)
                for d in tensor.shape.dim
            ]
            if value.name == "mask":  # one place or more is seen
                feed[value.name] = (np.indices(dims)[1] < 4).astype(np.int64)
            elif tensor.elem_type == TensorProto.INT64:
                feed[value.name] = random.integers(0, 40, dims)
            else:
                feed[value.name] = random.standard_normal(dims).astype(np.float32)
        made.append(feed)
    return made
