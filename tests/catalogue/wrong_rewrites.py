"""Wrong rewrites of real models, of the kinds that an optimizer gets wrong.

Each was written from the structure of its model alone and is never tuned to what the
validation catches. `first` names the first value that is wrong. A few kinds have no
operator in the catalogue (Loop, TopK, a padded average pool); there `before` puts one
into the reference first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper

from catalogue.surgery import (
    after,
    become,
    constant,
    copied,
    insert,
    load,
    new_constant,
    own_constant,
    place,
    producer,
    set_attributes,
    set_constant,
    swap_inputs,
)

Edit = Callable[[ModelProto], None]
node = helper.make_node


@dataclass(frozen=True)
class Wrong:
    """A wrong rewrite and the model that it is planted into."""

    name: str
    model: str
    first: str
    edit: Edit
    before: Edit | None = None

    def reference(self) -> ModelProto:
        """What the rewrite is applied to."""
        model = load(self.model)
        return model if self.before is None else copied(self.before, model)

    def apply(self, model: ModelProto) -> ModelProto:
        """The wrong model, apart from the right one."""
        return copied(self.edit, model)


PLANTED: list[Wrong] = []


def plant(model: str, first: str, before: Edit | None = None) -> Callable[[Edit], Edit]:
    """Note a wrong rewrite."""

    def note(edit: Edit) -> Edit:
        PLANTED.append(Wrong(edit.__name__, model, first, edit, before))
        return edit

    return note


# efficientnet-lite0


@plant("efficientnet-lite0", "_bn0.norm.clip")
def clip_bound_slightly_off(model: ModelProto) -> None:
    own_constant(model, producer(model, "_bn0.norm.clip"), 2, 5.99)


@plant("efficientnet-lite0", "_blocks.15._bn2.norm")
def batch_norm_epsilon_changed(model: ModelProto) -> None:
    set_attributes(producer(model, "_blocks.15._bn2.norm"), epsilon=1e-5)


@plant("efficientnet-lite0", "_blocks.2.add")
def residual_dropped(model: ModelProto) -> None:
    become(producer(model, "_blocks.2.add"), "Identity", ["_blocks.2._bn2.norm"])


@plant("efficientnet-lite0", "_blocks.4._depthwise_conv.conv")
def two_channels_swapped(model: ModelProto) -> None:
    name = "_blocks.4._depthwise_conv.weight"
    weight = constant(model, name)
    weight[[3, 5]] = weight[[5, 3]]
    set_constant(model, name, weight)


@plant("efficientnet-lite0", "_blocks.1._project_conv.conv")
def one_weight_negated(model: ModelProto) -> None:
    name = "_blocks.1._project_conv.weight"
    weight = constant(model, name)
    weight[0, 0] *= -1
    set_constant(model, name, weight)


@plant("efficientnet-lite0", "_conv_stem.conv")
def stem_padding_flipped(model: ModelProto) -> None:
    set_attributes(producer(model, "_conv_stem.conv"), pads=[1, 1, 0, 0])


def with_padded_average_pool(model: ModelProto) -> None:
    """Smooth what is pooled in the end."""
    value = "_bn1.norm.clip"
    pool = node(
        "AveragePool", [f"{value}/raw"], [value], kernel_shape=[3, 3], pads=[1] * 4
    )
    set_attributes(pool, count_include_pad=1)
    after(model, value, pool)


@plant("efficientnet-lite0", "_bn1.norm.clip", with_padded_average_pool)
def average_pool_leaves_padding_out(model: ModelProto) -> None:
    set_attributes(producer(model, "_bn1.norm.clip"), count_include_pad=0)


# opennsfw


@plant("opennsfw", "max_pooling2d/MaxPool:0")
def max_pool_padding_flipped(model: ModelProto) -> None:
    set_attributes(producer(model, "max_pooling2d/MaxPool:0"), pads=[1, 1, 0, 0])


@plant("opennsfw", "conv_1/Conv2D__7:0")
def height_and_width_swapped(model: ModelProto) -> None:
    set_attributes(producer(model, "conv_1/Conv2D__7:0"), perm=[0, 3, 2, 1])


@plant("opennsfw", "outputs")
def softmax_over_the_batch(model: ModelProto) -> None:
    set_attributes(producer(model, "outputs"), axis=0)


@plant("opennsfw", "Reshape:0")
def samples_mixed(model: ModelProto) -> None:
    """A Reshape to [channels, batch] and a Transpose: right for one sample only."""
    shape = new_constant(model, "stale_shape", np.array([1024, -1]))
    turned = node("Transpose", ["Reshape:0/turned"], ["Reshape:0"], perm=[1, 0])
    after(model, "Reshape:0", turned)
    source = producer(model, "Reshape:0/raw").input[0]
    become(producer(model, "Reshape:0/raw"), "Reshape", [source, shape])
    producer(model, "Reshape:0/raw").output[0] = "Reshape:0/turned"


@plant("opennsfw", "fc_nsfw/BiasAdd:0")
def bias_dropped(model: ModelProto) -> None:
    become(producer(model, "fc_nsfw/BiasAdd:0"), "Identity", ["fc_nsfw/MatMul:0"])


# ppocr-det


@plant("ppocr-det", "nearest_interp_v2_0.tmp_0")
def resize_coordinates_changed(model: ModelProto) -> None:
    resize = producer(model, "nearest_interp_v2_0.tmp_0")
    set_attributes(resize, coordinate_transformation_mode="half_pixel")


@plant("ppocr-det", "nearest_interp_v2_3.tmp_0")
def resize_mode_changed(model: ModelProto) -> None:
    resize = producer(model, "nearest_interp_v2_3.tmp_0")
    set_attributes(resize, mode="linear", nearest_mode=None)


@plant("ppocr-det", "p2o.ConvTranspose.3")
def transposed_kernel_flipped(model: ModelProto) -> None:
    weight = constant(model, "conv2d_transpose_1.w_0")
    set_constant(model, "conv2d_transpose_1.w_0", weight[:, :, ::-1, ::-1])


@plant("ppocr-det", "hardsigmoid_4.tmp_0")
def hard_sigmoid_slope_changed(model: ModelProto) -> None:
    set_attributes(producer(model, "hardsigmoid_4.tmp_0"), alpha=0.2)


@plant("ppocr-det", "p2o.Concat.1")
def concat_order_changed(model: ModelProto) -> None:
    swap_inputs(producer(model, "p2o.Concat.1"), 1, 2)


@plant("ppocr-det", "conv2d_497.tmp_0")
def dilation_off(model: ModelProto) -> None:
    conv = producer(model, "conv2d_497.tmp_0")
    set_attributes(conv, dilations=[2, 2], pads=[2, 2, 2, 2])


@plant("ppocr-det", "p2o.Add.279")
def bias_of_the_first_upsampling_dropped(model: ModelProto) -> None:
    become(producer(model, "p2o.Add.279"), "Identity", ["p2o.ConvTranspose.1"])


# ppocr-rec


@plant("ppocr-rec", "p2o.ReduceMean.5")
def mean_over_the_wrong_axis(model: ModelProto) -> None:
    set_attributes(producer(model, "p2o.ReduceMean.5"), axes=[1])


@plant("ppocr-rec", "p2o.Mul.181")
def attention_scale_dropped(model: ModelProto) -> None:
    become(producer(model, "p2o.Mul.181"), "Identity", ["transpose_44.tmp_0_slice_0"])


@plant("ppocr-rec", "p2o.Add.253")
def layer_norm_epsilon_changed(model: ModelProto) -> None:
    own_constant(model, producer(model, "p2o.Add.253"), 1, 1e-6)


@plant("ppocr-rec", "p2o.Slice.9")
def slice_off_by_one(model: ModelProto) -> None:
    """The keys in place of the values."""
    values = producer(model, "p2o.Slice.9")
    own_constant(model, values, 1, [1])
    own_constant(model, values, 2, [2])


@plant("ppocr-rec", "p2o.Sub.9")
def subtraction_swapped(model: ModelProto) -> None:
    swap_inputs(producer(model, "p2o.Sub.9"))


@plant("ppocr-rec", "transpose_48.tmp_0")
def queries_and_keys_swapped(model: ModelProto) -> None:
    """The scores transposed; with one position the same."""
    producer(model, "transpose_48.tmp_0").input[0] = "p2o.Mul.190"
    producer(model, "p2o.MatMul.15").input[0] = "transpose_47.tmp_0_slice_1"


@plant("ppocr-rec", "softmax_11.tmp_0")
def tiny_offset_on_one_probability(model: ModelProto) -> None:
    offset = np.zeros(6625, np.float32)
    offset[100] = 2e-5
    name = new_constant(model, "offset", offset)
    value = "softmax_11.tmp_0"
    after(model, value, node("Add", [f"{value}/raw", name], [value]))


# ppocr-cls


@plant("ppocr-cls", "relu_3.tmp_0")
def relu_leaks(model: ModelProto) -> None:
    become(
        producer(model, "relu_3.tmp_0"), "LeakyRelu", ["batch_norm_4.tmp_2"], alpha=0.01
    )


@plant("ppocr-cls", "relu_1.tmp_0", lambda model: _leaky(model, 0.1))
def leaky_relu_slope_changed(model: ModelProto) -> None:
    set_attributes(producer(model, "relu_1.tmp_0"), alpha=0.11)


def _leaky(model: ModelProto, alpha: float) -> None:
    relu = producer(model, "relu_1.tmp_0")
    become(relu, "LeakyRelu", list(relu.input), alpha=alpha)


@plant("ppocr-cls", "depthwise_conv2d_0.tmp_0")
def depthwise_padding_flipped(model: ModelProto) -> None:
    set_attributes(producer(model, "depthwise_conv2d_0.tmp_0"), pads=[0, 1, 2, 1])


@plant("ppocr-cls", "softmax_0.tmp_0")
def softmax_over_the_samples(model: ModelProto) -> None:
    """In opset 11 axis 0 takes all samples together; with one the same."""
    set_attributes(producer(model, "softmax_0.tmp_0"), axis=0)


@plant("ppocr-cls", "batch_norm_34.tmp_2")
def epsilon_forgotten_in_a_fold(model: ModelProto) -> None:
    set_attributes(producer(model, "batch_norm_34.tmp_2"), epsilon=0.0)


# silero-vad

THEN = "If_0_then_branch__Inline_0__"
ELSE = "If_0_else_branch__Inline_0__"


@plant("silero-vad", f"{THEN}/decoder/rnn/Concat_output_0")
def lstm_gates_swapped(model: ModelProto) -> None:
    swap_inputs(producer(model, f"{THEN}/decoder/rnn/Concat_output_0"), 1, 2)


@plant("silero-vad", f"{ELSE}/encoder/2/reparam_conv/Conv_output_0")
def bias_halved_in_the_other_branch(model: ModelProto) -> None:
    name = f"{ELSE}encoder.2.reparam_conv.bias"
    set_constant(model, name, constant(model, name) / 2)


@plant("silero-vad", f"{THEN}/Equal_output_0")
def branches_swapped(model: ModelProto) -> None:
    condition = f"{THEN}/Equal_output_0"
    after(model, condition, node("Not", [f"{condition}/raw"], [condition]))


@plant("silero-vad", f"{THEN}/stft/padding/Pad_output_0")
def pad_mode_changed(model: ModelProto) -> None:
    set_attributes(producer(model, f"{THEN}/stft/padding/Pad_output_0"), mode="edge")


@plant("silero-vad", f"{THEN}/stft/Sqrt_output_0")
def root_by_its_reciprocal(model: ModelProto) -> None:
    """x * 1 / sqrt(x): NaN at zero alone, in silence."""
    value = f"{THEN}/stft/Sqrt_output_0"
    square = f"{THEN}/stft/Add_output_0"
    raw = after(
        model,
        value,
        node("Reciprocal", [f"{value}/raw"], ["reciprocal"]),
        node("Mul", [square, "reciprocal"], [value]),
    )
    assert producer(model, raw).input[0] == square


@plant("silero-vad", f"{THEN}/stft/Slice_3_output_0")
def imaginary_part_off_by_one(model: ModelProto) -> None:
    part = producer(model, f"{THEN}/stft/Slice_3_output_0")
    own_constant(model, part, 1, [128])
    own_constant(model, part, 2, [257])


@plant("silero-vad", "If_0_then_branch__Inline_0_outputs_1")
def states_swapped(model: ModelProto) -> None:
    swap_inputs(producer(model, "If_0_then_branch__Inline_0_outputs_1"))


# basic-pitch

LOG = "model_1/normalized_log_1"


def _twice(prefix: str, name: str, end: str = "") -> str:
    """How TensorFlow's converter named a fused value."""
    return f"{prefix}/{name};{prefix}/{name}{end}"


@plant("basic-pitch", _twice("model_1/harmonic-stacking-diff", "concat"))
def harmonics_swapped(model: ModelProto) -> None:
    stacked = _twice("model_1/harmonic-stacking-diff", "concat")
    swap_inputs(producer(model, stacked), 2, 3)


@plant("basic-pitch", _twice(LOG, "div_no_nan", "3"))
def division_unguarded(model: ModelProto) -> None:
    """NaN in silence alone."""
    divided = _twice(LOG, "div_no_nan", "2")
    become(producer(model, _twice(LOG, "div_no_nan", "3")), "Identity", [divided])


@plant("basic-pitch", _twice(LOG, "div_no_nan", "3"))
def where_branches_swapped(model: ModelProto) -> None:
    swap_inputs(producer(model, _twice(LOG, "div_no_nan", "3")), 1, 2)


@plant("basic-pitch", _twice(LOG, "Min"))
def minimum_over_all_samples(model: ModelProto) -> None:
    """The smallest value of the batch in place of each sample's own."""
    low = producer(model, _twice(LOG, "Min"))
    set_attributes(low, axes=[0, 1, 2], keepdims=1)
    become(producer(model, _twice(LOG, "Reshape")), "Identity", list(low.output))


@plant("basic-pitch", _twice(LOG, "add"))
def floor_of_the_logarithm_changed(model: ModelProto) -> None:
    set_constant(model, _twice(LOG, "add/y"), 1e-9)


@plant("basic-pitch", "StatefulPartitionedCall:1")
def outputs_swapped(model: ModelProto) -> None:
    one = producer(model, "StatefulPartitionedCall:1")
    other = producer(model, "StatefulPartitionedCall:2")
    one.input[0], other.input[0] = other.input[0], one.input[0]


# minilm-l3

BERT = "/model/model.0/auto_model"
LAYER = f"{BERT}/encoder/layer"


@plant("minilm-l3", f"{LAYER}.1/attention/self/Div_output_0")
def scores_not_scaled(model: ModelProto) -> None:
    scores = producer(model, f"{LAYER}.1/attention/self/Div_output_0")
    become(scores, "Identity", [scores.input[0]])


@plant("minilm-l3", f"{BERT}/Sub_output_0")
def mask_inverted(model: ModelProto) -> None:
    become(producer(model, f"{BERT}/Sub_output_0"), "Identity", [f"{BERT}/Cast_output_0"])


@plant("minilm-l3", f"{LAYER}.2/attention/self/Add_output_0")
def mask_dropped(model: ModelProto) -> None:
    masked = producer(model, f"{LAYER}.2/attention/self/Add_output_0")
    become(masked, "Identity", [masked.input[0]])


@plant("minilm-l3", f"{BERT}/embeddings/Slice_output_0")
def position_of_the_first_token_for_all(model: ModelProto) -> None:
    """As if the positions had been folded at sequence length 1."""
    position = new_constant(model, "position", np.array([[0]]))
    become(producer(model, f"{BERT}/embeddings/Slice_output_0"), "Identity", [position])


@plant("minilm-l3", f"{LAYER}.0/intermediate/intermediate_act_fn/Erf_output_0")
def erf_by_a_tanh(model: ModelProto) -> None:
    value = f"{LAYER}.0/intermediate/intermediate_act_fn/Erf_output_0"
    erf = producer(model, value)
    cube = new_constant(model, "three", np.float32(3))
    linear = new_constant(model, "linear", np.float32(2 / np.sqrt(np.pi)))
    cubic = new_constant(model, "cubic", np.float32(0.044715 * 4 / np.sqrt(np.pi)))
    nodes = [
        node("Pow", [erf.input[0], cube], ["power"]),
        node("Mul", ["power", cubic], ["upper"]),
        node("Mul", [erf.input[0], linear], ["lower"]),
        node("Add", ["upper", "lower"], ["both"]),
    ]
    insert(model, value, nodes)
    become(producer(model, value), "Tanh", ["both"])


@plant("minilm-l3", "onnx::Shape_422")
def layer_normalization_epsilon_changed(model: ModelProto) -> None:
    set_attributes(producer(model, "onnx::Shape_422"), epsilon=1e-5)


@plant("minilm-l3", f"{BERT}/Slice_output_0")
def token_type_off_by_one(model: ModelProto) -> None:
    set_constant(model, "onnx::Slice_65", np.ones((1, 512)))


@plant("minilm-l3", f"{LAYER}.0/attention/self/Softmax_output_0")
def softmax_over_the_queries(model: ModelProto) -> None:
    set_attributes(producer(model, f"{LAYER}.0/attention/self/Softmax_output_0"), axis=-2)


@plant("minilm-l3", f"{LAYER}.1/intermediate/dense/Add_output_0")
def rounded_to_float16_inside(model: ModelProto) -> None:
    value = f"{LAYER}.1/intermediate/dense/Add_output_0"
    half = node("Cast", [f"{value}/raw"], [f"{value}/half"], to=TensorProto.FLOAT16)
    back = node("Cast", [f"{value}/half"], [value], to=TensorProto.FLOAT)
    after(model, value, half, back)


@plant("minilm-l3", f"{LAYER}.0/attention/self/Concat_output_0")
def heads_split_in_another_order(model: ModelProto) -> None:
    """A stale shape: 32 heads of 12 for 12 heads of 32."""
    for number, (heads, size) in enumerate([(2, 3), (6, 7), (10, 11)]):
        end = f"_{number}" if number else ""
        joined = producer(model, f"{LAYER}.0/attention/self/Concat{end}_output_0")
        assert joined.input[2].endswith(f"Constant_{heads}_output_0")
        assert joined.input[3].endswith(f"Constant_{size}_output_0")
        swap_inputs(joined, 2, 3)


# smart-turn


@plant("smart-turn", "val_68_DequantizeLinear_Output")
def zero_point_of_scores_off_by_one(model: ModelProto) -> None:
    own_constant(model, producer(model, "val_68_DequantizeLinear_Output"), 2, 113)


@plant("smart-turn", "val_80_DequantizeLinear_Output")
def zero_point_off_by_one(model: ModelProto) -> None:
    own_constant(model, producer(model, "val_80_DequantizeLinear_Output"), 2, 129)


@plant("smart-turn", "val_17_DequantizeLinear_Output")
def weights_dequantized_along_the_other_axis(model: ModelProto) -> None:
    set_attributes(producer(model, "val_17_DequantizeLinear_Output"), axis=0)


@plant("smart-turn", "val_79_DequantizeLinear_Output")
def scale_of_one_channel_wrong(model: ModelProto) -> None:
    scale = constant(model, "val_79_scale")
    scale[7] *= 1.05
    set_constant(model, "val_79_scale", scale)


@plant("smart-turn", "conv1d_1")
def padding_of_a_strided_convolution_flipped(model: ModelProto) -> None:
    set_attributes(producer(model, "conv1d_1"), pads=[0, 2])


@plant("smart-turn", "softmax")
def pooling_weights_over_the_wrong_axis(model: ModelProto) -> None:
    set_attributes(producer(model, "softmax"), axis=2)


@plant("smart-turn", "add_20")
def positions_dropped(model: ModelProto) -> None:
    become(producer(model, "add_20"), "Identity", ["permute"])


# ddddocr-old


@plant("ddddocr-old", "401_quant_rounded:0")
def rounded_for_floored(model: ModelProto) -> None:
    floor = producer(model, "401_quant_rounded:0")
    become(floor, "Round", list(floor.input))


@plant("ddddocr-old", "393_output_quantized")
def zero_point_of_weights_off_by_one(model: ModelProto) -> None:
    set_constant(model, "394_zero_point", 177)


@plant("ddddocr-old", "Conv_46_quant_scales_mul:0")
def scale_of_another_tensor(model: ModelProto) -> None:
    producer(model, "Conv_46_quant_scales_mul:0").input[0] = "198_scale"


@plant("ddddocr-old", "147")
def shortcut_dropped(model: ModelProto) -> None:
    become(producer(model, "147"), "Identity", ["396"])


# magika

FLAX = "jax2tf_get_logits_/pjit_get_logits_"


@plant("magika", f"{FLAX}/pjit__one_hot_/Equal:0")
def index_off_by_one(model: ModelProto) -> None:
    compared = f"{FLAX}/pjit__one_hot_/BroadcastTo_1:0"
    set_constant(model, compared, constant(model, compared) + 1)


@plant("magika", f"{FLAX}/MagikaV2/LayerNorm_0/Maximum:0")
def variance_not_clamped(model: ModelProto) -> None:
    """NaN where rounding makes a variance of zero negative: all bytes alike."""
    clamped = producer(model, f"{FLAX}/MagikaV2/LayerNorm_0/Maximum:0")
    become(clamped, "Identity", [clamped.input[1]])


@plant("magika", f"{FLAX}/MagikaV2/ApplyActivation_0/Mul:0")
def coefficient_rounded(model: ModelProto) -> None:
    own_constant(
        model, producer(model, f"{FLAX}/MagikaV2/ApplyActivation_0/Mul:0"), 0, 0.0447
    )


@plant("magika", f"{FLAX}/Sum:0")
def sum_of_one_class_short(model: ModelProto) -> None:
    """Off by one: the last class is missing from the sum of the softmax."""
    total = producer(model, f"{FLAX}/Sum:0")
    ends = [
        new_constant(model, f"end_{index}", np.array([value]))
        for index, value in enumerate([0, -1, 1])
    ]
    cut = node("Slice", [total.input[0], *ends], ["all_but_one"])
    insert(model, f"{FLAX}/Sum:0", [cut])
    producer(model, f"{FLAX}/Sum:0").input[0] = "all_but_one"


@plant("magika", f"{FLAX}/MagikaV2/LayerNorm_1/AddV2:0")
def epsilon_of_the_last_norm_changed(model: ModelProto) -> None:
    own_constant(model, producer(model, f"{FLAX}/MagikaV2/LayerNorm_1/AddV2:0"), 1, 1e-5)


# yolov8n-320

HEAD = "/model.22"


@plant("yolov8n-320", "/model.2/Split_output_0")
def split_outputs_swapped(model: ModelProto) -> None:
    split = producer(model, "/model.2/Split_output_0")
    split.output[:] = reversed(split.output)


@plant("yolov8n-320", f"{HEAD}/Sub_1_output_0")
def box_size_negated(model: ModelProto) -> None:
    swap_inputs(producer(model, f"{HEAD}/Sub_1_output_0"))


@plant("yolov8n-320", f"{HEAD}/Add_3_output_0")
def anchors_half_a_cell_off(model: ModelProto) -> None:
    own_constant(model, producer(model, f"{HEAD}/Add_3_output_0"), 1, 0.0)


@plant("yolov8n-320", "/model.9/m_1/MaxPool_output_0")
def smaller_max_pool(model: ModelProto) -> None:
    pool = producer(model, "/model.9/m_1/MaxPool_output_0")
    set_attributes(pool, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


@plant("yolov8n-320", f"{HEAD}/Concat_15_output_0")
def coordinates_swapped(model: ModelProto) -> None:
    swap_inputs(producer(model, f"{HEAD}/Concat_15_output_0"))


@plant("yolov8n-320", f"{HEAD}/Sigmoid_output_0")
def small_offset_on_the_scores(model: ModelProto) -> None:
    """A thousandth on scores below one, beside coordinates of hundreds."""
    offset = new_constant(model, "offset", np.float32(1e-3))
    value = f"{HEAD}/Sigmoid_output_0"
    after(model, value, node("Add", [f"{value}/raw", offset], [value]))


@plant("yolov8n-320", f"{HEAD}/Cast_2_output_0")
def width_for_height(model: ModelProto) -> None:
    """The same for square images."""
    one = producer(model, f"{HEAD}/Cast_2_output_0")
    other = producer(model, f"{HEAD}/Cast_3_output_0")
    one.input[0], other.input[0] = other.input[0], one.input[0]


# light-resnet50


@plant("light-resnet50", "gpu_0/pred_b_0")
def one_bias_changed(model: ModelProto) -> None:
    bias = np.full(1000, 0.02, np.float32)
    bias[17] = 0.03
    producer(model, "gpu_0/pred_b_0").output[0] = "unused"
    new_constant(model, "gpu_0/pred_b_0", bias)


# our own


def _folded_constant(model: ModelProto, norm: str) -> tuple[int, float]:
    """The zeroed channel with the largest constant after norm and Relu."""
    _, scale, bias, mean, variance = producer(model, norm).input
    conv = producer(model, producer(model, norm).input[0])
    zero = ~constant(model, conv.input[1]).any(axis=(1, 2, 3))
    epsilon = 1e-5
    deviation = np.sqrt(constant(model, variance) + epsilon)
    value = (
        constant(model, bias) - constant(model, mean) * constant(model, scale) / deviation
    )
    value[~zero] = 0
    return int(value.argmax()), float(value.max())


@plant("fashion_masked", "/blocks/blocks.0/branch/branch.1/conv/Conv_output_0")
def constant_channel_folded_in_spite_of_padding(model: ModelProto) -> None:
    """Into the norm's mean, as if the padding were of the constant as well."""
    branch = "/blocks/blocks.0/branch"
    channel, value = _folded_constant(
        model, f"{branch}/branch.0/bn/BatchNormalization_output_0"
    )
    assert value > 0
    name = "blocks.0.branch.1.conv.weight"
    weight = constant(model, name)
    bias = weight[:, channel].sum(axis=(1, 2)) * value
    weight[:, channel] = 0
    set_constant(model, name, weight)
    conv = producer(model, f"{branch}/branch.1/conv/Conv_output_0")
    conv.input.append(new_constant(model, "folded", bias.astype(np.float32)))


@plant("fashion_qat_dynamo", "fake_quantize_per_tensor_affine_4")
def residual_zero_point_off_by_one(model: ModelProto) -> None:
    own_constant(model, producer(model, "fake_quantize_per_tensor_affine_4"), 2, 127)


@plant("fashion_qat_dynamo", "mean")
def mean_of_rows_only(model: ModelProto) -> None:
    """Off by one: the last column is left out of the mean."""
    ends = [
        new_constant(model, f"end_{index}", np.array([value]))
        for index, value in enumerate([0, -1, 3])
    ]
    source = producer(model, "mean").input[0]
    insert(model, "mean", [node("Slice", [source, *ends], ["cut"])])
    producer(model, "mean").input[0] = "cut"


@plant(
    "fashion_qat_legacy",
    "/blocks/blocks.0/branch/branch.0/conv/quantize_weight/Abs_output_0",
)
def one_channel_of_quantized_weights_off(model: ModelProto) -> None:
    name = "blocks.0.branch.0.conv.weight"
    weight = constant(model, name)
    weight[3] *= 1.1
    set_constant(model, name, weight)


@plant(
    "fashion_masked_qat",
    "/blocks/blocks.0/branch/branch.0/conv/quantize_weight/DequantizeLinear_output_0",
)
def weights_dequantized_by_the_input_channel(model: ModelProto) -> None:
    name = (
        "/blocks/blocks.0/branch/branch.0/conv/quantize_weight/DequantizeLinear_output_0"
    )
    set_attributes(producer(model, name), axis=1)


@plant("fashion_float", "/blocks/blocks.3/branch/branch.0/bn/BatchNormalization_output_0")
def norm_folded_without_epsilon(model: ModelProto) -> None:
    name = "/blocks/blocks.3/branch/branch.0/bn/BatchNormalization_output_0"
    set_attributes(producer(model, name), epsilon=0.0)


def with_three_best(model: ModelProto) -> None:
    """The logits of the three best classes, where best is told to one digit."""
    first = new_constant(model, "three", np.array([3]))
    nodes = [
        node("Round", ["logits"], ["rounded"]),
        node("TopK", ["rounded", first], ["best", "which"], axis=1),
        node("GatherElements", ["logits", "which"], ["chosen"], axis=1),
    ]
    model.graph.node.extend(nodes)
    shape: list[str | int | None] = ["batch", 3]
    made = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, shape)
    model.graph.output.append(made)


@plant("fashion_float", "which", with_three_best)
def ties_told_apart_the_other_way(model: ModelProto) -> None:
    """The last of equals for the first: another value of what is chosen by it."""
    back = new_constant(model, "back", np.arange(9, -1, -1))
    nine = new_constant(model, "nine", np.array(9))
    value = "rounded"
    insert(model, "which", [node("Gather", [value, back], ["turned"], axis=1)])
    producer(model, "which").input[0] = "turned"
    after(model, "which", node("Sub", [nine, "which/raw"], ["which"]))


def with_the_best(model: ModelProto) -> None:
    """The class, besides the logits."""
    best = node("ArgMax", ["logits"], ["class"], axis=1, keepdims=0)
    model.graph.node.append(best)
    made = helper.make_tensor_value_info("class", TensorProto.INT64, ["batch"])
    model.graph.output.append(made)


@plant("fashion_float", "class", with_the_best)
def best_class_of_shifted_logits(model: ModelProto) -> None:
    offset = np.zeros(10, np.float32)
    offset[4] = 0.5
    name = new_constant(model, "offset", offset)
    insert(model, "class", [node("Add", ["logits", name], ["shifted"])])
    producer(model, "class").input[0] = "shifted"


def _loop_body() -> GraphProto:
    value = helper.make_tensor_value_info
    nodes = [
        node("Mul", ["state", "factor"], ["smaller"]),
        node("Add", ["smaller", "step"], ["next"]),
        node("Identity", ["going"], ["still"]),
    ]
    inputs = [
        value("turn", TensorProto.INT64, []),
        value("going", TensorProto.BOOL, []),
        value("state", TensorProto.FLOAT, None),
    ]
    outputs = [
        value("still", TensorProto.BOOL, []),
        value("next", TensorProto.FLOAT, None),
    ]
    return helper.make_graph(nodes, "body", inputs, outputs)


def with_a_loop(model: ModelProto) -> None:
    """Three rounds of halving and adding behind the logits."""
    new_constant(model, "factor", np.float32(0.5))
    new_constant(model, "step", np.float32(1))
    rounds = new_constant(model, "rounds", np.array(3))
    going = new_constant(model, "always", np.array(True))
    inputs = [rounds, going, "logits/raw"]
    after(model, "logits", node("Loop", inputs, ["logits"], body=_loop_body()))


@plant("fashion_float", "next", with_a_loop)
def loop_body_changed(model: ModelProto) -> None:
    """Adds first and halves then."""
    graph, index = place(model, "smaller")
    del graph.node[index : index + 2]
    graph.node.insert(index, node("Add", ["state", "step"], ["larger"]))
    graph.node.insert(index + 1, node("Mul", ["larger", "factor"], ["next"]))


@plant("fashion_float", "logits", with_a_loop)
def loop_one_round_short(model: ModelProto) -> None:
    set_constant(model, "rounds", 2)
