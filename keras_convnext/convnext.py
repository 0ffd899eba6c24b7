"""ConvNeXt, from pixels to logits: the block of each paper, the body they share, the heads.

V1: Liu et al. 2022, "A ConvNet for the 2020s" (arXiv:2201.03545); facebookresearch/ConvNeXt at 048efce.
V2: Woo et al. 2023, "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders"
    (arXiv:2301.00808); facebookresearch/ConvNeXt-V2 at 2553895.
Overlapping stems, RMS norms, norm-first and MLP heads, output strides: timm 1.0.31, models/convnext.py.

Names of layers and weights repeat those of the official code, with "_" where it has "." in a layer's name:
`stages.1.0.dwconv.weight` is `stages_1_0/dwconv/kernel`. Maps are channels-last, (N, H, W, C).
"""

from collections.abc import Callable

import keras
import numpy as np
from keras import layers

from keras_convnext.layers.chunking import in_chunks
from keras_convnext.layers.depthwise import DepthwiseConv2D
from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.layers.normalization import (
    GlobalResponseNormalization,
    LayerNormalization,
    RMSNormalization,
    SimpleNormalization,
)
from keras_convnext.layers.pointwise import PatchConv2D, pointwise, pointwise_after_grn
from keras_convnext.layers.residual import LayerScale, StochasticDepth

_register = keras.saving.register_keras_serializable(package="keras_convnext")

INITIALIZER = RandomNormal(stddev=0.02)  # `_init_weights` of models/convnext.py; biases start at 0

NORMS: dict[str, type[layers.Layer]] = {
    "layer_norm": LayerNormalization,
    "rms_norm": RMSNormalization,
    "simple_norm": SimpleNormalization,
}


@_register
def gelu_tanh(x):
    """GELU with the tanh approximation; `keras.activations.gelu` is the exact one."""
    return keras.activations.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": keras.activations.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": keras.activations.silu,
}


def _pointwise_dtype(block):
    """Returns what a block's configuration adds when quantize() gave its pointwise layers another policy."""
    policy = block.pwconv1.dtype_policy
    if policy == block.dtype_policy:
        return {}
    return {"pointwise_dtype": keras.dtype_policies.serialize(policy)}


def _choose(what, name, table):
    if name not in table:
        raise ValueError(f"Unknown {what} {name!r}. Known: {', '.join(table)}")
    return table[name]


class Composite(layers.Layer):
    """A layer of the shape of its input made of sub-layers, which are as frozen when it is made anew.

    Keras hands `trainable` down to sub-layers when it is set, but not when a layer is made with it, from a
    configuration for example. So a subclass gives it to each sub-layer that it makes; this class stores the
    sub-layers that differ. A subclass keeps its other arguments in `self.config`.
    """

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        flags = {layer.name: layer.trainable for layer in self._layers if layer.trainable != self.trainable}
        return {**super().get_config(), **self.config, **({"sublayers_trainable": flags} if flags else {})}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        flags = config.pop("sublayers_trainable", {})
        layer = super().from_config(config)
        for name, trainable in flags.items():
            getattr(layer, name).trainable = trainable
        return layer


@_register
class ConvNeXtBlock(Composite):
    """The block of ConvNeXt (V1).

    `x + drop_path(gamma * pwconv2(gelu(pwconv1(norm(dwconv(x))))))`: a depthwise convolution, then a layer
    norm and two pointwise layers, four times wider in between, scaled per channel.
    Reference: Liu et al. 2022, section 2.6 and figure 4; models/convnext.py, class Block.

    Args:
        dim: int, channels C.
        kernel_size: int, side of the depthwise kernel. Default 7 (section 2.5).
        dilation_rate: int, of the depthwise kernel. Default 1; larger for an output stride below 32.
        norm: "layer_norm", "rms_norm" or "simple_norm".
        epsilon: float, of the norm. Default 1e-6, the official code's.
        activation: "gelu" (exact), "gelu_tanh" or "silu".
        layer_scale_init_value: float, start of gamma, or None for no LayerScale. Default 1e-6 (appendix A.1).
        drop_path_rate: float in [0, 1), probability of dropping the branch of a sample in training.
        rematerialize: bool, recompute the branch in the backward pass instead of keeping its activations.
        seed: int or None, of the drop path.
        pointwise_dtype: dtype policy of the two pointwise layers; None for the block's own. Set by Keras when
            it loads a quantised model.

    Call arguments:
        x: (N, H, W, C), float.
        training: bool.

    Returns:
        Same shape, in the compute dtype.

    Raises:
        ValueError: for an unknown norm or activation, an even kernel, or a rate outside [0, 1).
    """

    def __init__(
        self,
        dim,
        kernel_size=7,
        dilation_rate=1,
        norm="layer_norm",
        epsilon=1e-6,
        activation="gelu",
        layer_scale_init_value=1e-6,
        drop_path_rate=0.0,
        rematerialize=False,
        seed=None,
        pointwise_dtype=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        common = {"dtype": self.dtype_policy, "trainable": self.trainable}
        pointwise = dict(common)
        if pointwise_dtype is not None:
            pointwise["dtype"] = keras.dtype_policies.get(pointwise_dtype)
        self.dim = dim
        self.rematerialize = rematerialize
        self.config = {
            "dim": dim,
            "kernel_size": kernel_size,
            "dilation_rate": dilation_rate,
            "norm": norm,
            "epsilon": epsilon,
            "activation": activation,
            "layer_scale_init_value": layer_scale_init_value,
            "drop_path_rate": drop_path_rate,
            "rematerialize": rematerialize,
            "seed": seed,
        }
        self.dwconv = DepthwiseConv2D(kernel_size, dilation_rate, **common, name="dwconv")
        self.norm = _choose("norm", norm, NORMS)(epsilon, **common, name="norm")
        self.pwconv1 = layers.Dense(4 * dim, kernel_initializer=INITIALIZER, **pointwise, name="pwconv1")
        self.activation = _choose("activation", activation, ACTIVATIONS)
        self.pwconv2 = layers.Dense(dim, kernel_initializer=INITIALIZER, **pointwise, name="pwconv2")
        self.layer_scale = None
        if layer_scale_init_value is not None:
            self.layer_scale = LayerScale(layer_scale_init_value, **common, name="layer_scale")
        self.drop_path = StochasticDepth(drop_path_rate, seed, **common, name="drop_path")

    def build(self, input_shape):
        self.dwconv.build(input_shape)
        self.norm.build(input_shape)
        self.pwconv1.build(input_shape)
        self.pwconv2.build((*input_shape[:-1], 4 * self.dim))
        if self.layer_scale is not None:
            self.layer_scale.build(input_shape)
        self.drop_path.build(input_shape)

    def branch(self, x):
        # `call`: the block has checked what `__call__` checks for each layer, at 0.1 ms in eager mode.
        x = self.dwconv.call(x)
        x = self.norm.call(x)
        x = pointwise(self.pwconv1, x, self.activation)  # (N, H, W, 4C)
        x = pointwise(self.pwconv2, x)  # (N, H, W, C)
        if self.layer_scale is not None:
            x = self.layer_scale.call(x)
        return x

    def call(self, x, training=None):
        if not training:
            return in_chunks(lambda x: x + self.branch(x), x, 4 * self.dim)
        branch = keras.remat(self.branch) if self.rematerialize else self.branch
        return x + self.drop_path(in_chunks(branch, x, 4 * self.dim, training=True), training=training)

    def get_config(self):
        return {**super().get_config(), **_pointwise_dtype(self)}


@_register
class ConvNeXtV2Block(Composite):
    """The block of ConvNeXt V2.

    `x + drop_path(pwconv2(grn(gelu(pwconv1(norm(dwconv(x)))))))`: the V1 block with global response
    normalisation between the pointwise layers, and without LayerScale.
    Reference: Woo et al. 2023, section 3.3 and figure 5; models/convnextv2.py, class Block.

    Args:
        dim: int, channels C.
        kernel_size: int, side of the depthwise kernel. Default 7.
        dilation_rate: int, of the depthwise kernel. Default 1; larger for an output stride below 32.
        norm: "layer_norm", "rms_norm" or "simple_norm".
        epsilon: float, of the norm. Default 1e-6, the official code's.
        activation: "gelu" (exact), "gelu_tanh" or "silu".
        drop_path_rate: float in [0, 1), probability of dropping the branch of a sample in training.
        rematerialize: bool, recompute the branch in the backward pass instead of keeping its activations.
        seed: int or None, of the drop path.
        pointwise_dtype: dtype policy of the two pointwise layers; None for the block's own. Set by Keras when
            it loads a quantised model.

    Call arguments:
        x: (N, H, W, C), float.
        training: bool.

    Returns:
        Same shape, in the compute dtype.

    Raises:
        ValueError: for an unknown norm or activation, an even kernel, or a rate outside [0, 1).
    """

    def __init__(
        self,
        dim,
        kernel_size=7,
        dilation_rate=1,
        norm="layer_norm",
        epsilon=1e-6,
        activation="gelu",
        drop_path_rate=0.0,
        rematerialize=False,
        seed=None,
        pointwise_dtype=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        common = {"dtype": self.dtype_policy, "trainable": self.trainable}
        pointwise = dict(common)
        if pointwise_dtype is not None:
            pointwise["dtype"] = keras.dtype_policies.get(pointwise_dtype)
        self.dim = dim
        self.rematerialize = rematerialize
        self.config = {
            "dim": dim,
            "kernel_size": kernel_size,
            "dilation_rate": dilation_rate,
            "norm": norm,
            "epsilon": epsilon,
            "activation": activation,
            "drop_path_rate": drop_path_rate,
            "rematerialize": rematerialize,
            "seed": seed,
        }
        self.dwconv = DepthwiseConv2D(kernel_size, dilation_rate, **common, name="dwconv")
        self.norm = _choose("norm", norm, NORMS)(epsilon, **common, name="norm")
        self.pwconv1 = layers.Dense(4 * dim, kernel_initializer=INITIALIZER, **pointwise, name="pwconv1")
        self.activation = _choose("activation", activation, ACTIVATIONS)
        self.grn = GlobalResponseNormalization(**common, name="grn")
        self.pwconv2 = layers.Dense(dim, kernel_initializer=INITIALIZER, **pointwise, name="pwconv2")
        self.drop_path = StochasticDepth(drop_path_rate, seed, **common, name="drop_path")

    def build(self, input_shape):
        self.dwconv.build(input_shape)
        self.norm.build(input_shape)
        self.pwconv1.build(input_shape)
        self.grn.build((*input_shape[:-1], 4 * self.dim))
        self.pwconv2.build((*input_shape[:-1], 4 * self.dim))
        self.drop_path.build(input_shape)

    def branch(self, x):
        # `call`: the block has checked what `__call__` checks for each layer, at 0.1 ms in eager mode.
        x = self.dwconv.call(x)
        x = self.norm.call(x)
        x = pointwise(self.pwconv1, x, self.activation)  # (N, H, W, 4C)
        return pointwise_after_grn(self.pwconv2, x, self.grn)  # (N, H, W, C)

    def call(self, x, training=None):
        if not training:
            return in_chunks(lambda x: x + self.branch(x), x, 4 * self.dim)
        branch = keras.remat(self.branch) if self.rematerialize else self.branch
        return x + self.drop_path(in_chunks(branch, x, 4 * self.dim, training=True), training=training)

    def get_config(self):
        return {**super().get_config(), **_pointwise_dtype(self)}


def drop_path_rates(drop_path_rate: float, depth: int) -> list[float]:
    """Returns the drop rate of each block, on a straight line from 0 to `drop_path_rate` for the last.

    Reference: models/convnext.py, `dp_rates`. Example: `drop_path_rates(0.2, 3)` is `[0.0, 0.1, 0.2]`.
    """
    return [float(rate) for rate in np.linspace(0, drop_path_rate, depth)]


def stem(x, variant):
    """Turns pixels into the first map, at a quarter of the resolution.

    "patch" is the papers' stem: 4x4 patches, side by side. The others are timm's: two 3x3 convolutions of
    stride 2 that overlap, with all channels ("overlap"), with half of them in between ("overlap_tiered"), or
    with an activation in between ("overlap_act").

    Args:
        x: (N, H, W, 3), normalised pixels.
        variant: one of `variants.VARIANTS`.

    Returns:
        (N, H / 4, W / 4, dims[0]).
    """
    index = 0  # counts as the official nn.Sequential does

    def convolution(x, filters, kernel_size, strides):
        return PatchConv2D(
            filters,
            kernel_size,
            strides,
            data_format="channels_last",
            kernel_initializer=INITIALIZER,
            name=f"downsample_layers_0_{index}",
        )(x)

    dim = variant.dims[0]
    if variant.stem == "patch":
        x = convolution(x, dim, 4, 4)  # (N, H / 4, W / 4, C)
    else:
        # One pixel of padding on both sides; "same" would pad an even-sized map only after its last pixel.
        x = layers.ZeroPadding2D(1, data_format="channels_last", name="stem_padding_0")(x)
        x = convolution(x, variant.stem_dim, 3, 2)  # (N, H / 2, W / 2, stem_dim)
        index += 1
        if variant.stem == "overlap_act":
            x = layers.Activation(ACTIVATIONS[variant.activation], name="stem_activation")(x)
            index += 1
        x = layers.ZeroPadding2D(1, data_format="channels_last", name="stem_padding_1")(x)
        x = convolution(x, dim, 3, 2)  # (N, H / 4, W / 4, C)
    return NORMS[variant.norm](variant.epsilon, name=f"downsample_layers_0_{index + 1}")(x)


def body(x, variant, block, output_stride: int, drop_path_rate: float, seed: int | None):
    """Applies the stem and four stages of blocks, with a halving of the resolution between stages.

    Reference: Liu et al. 2022, table 9; models/convnext.py, class ConvNeXt. For an output stride of 16 or 8
    the last one or two halvings become stride 1 and the blocks after them dilate by 2 and 4; the weights
    stay the same (timm models/convnext.py).

    Args:
        x: (N, H, W, 3), normalised pixels.
        variant: one of `variants.VARIANTS`.
        block: function (dim, kernel_size, dilation_rate, drop_path_rate, seed, name) -> layer.
        output_stride: 8, 16 or 32.
        drop_path_rate: rate of the last block; the first has 0.
        seed: int or None; block number i gets seed + i.

    Returns:
        List of the four stage outputs, (N, H / 4, W / 4, dims[0]) to (N, H / 32, W / 32, dims[3]).
    """
    depths, dims = variant.depths, variant.dims
    rates = drop_path_rates(drop_path_rate, sum(depths))
    stride, dilation = 4, 1
    outputs = []
    x = stem(x, variant)
    for stage in range(4):
        if stage > 0:
            x = NORMS[variant.norm](variant.epsilon, name=f"downsample_layers_{stage}_0")(x)
            halve = stride < output_stride
            x = PatchConv2D(
                dims[stage],
                2,
                strides=2 if halve else 1,
                padding="valid" if halve else "same",
                dilation_rate=1 if halve else dilation,  # that of the stage before
                data_format="channels_last",
                kernel_initializer=INITIALIZER,
                name=f"downsample_layers_{stage}_1",
            )(x)  # (N, H / stride, W / stride, C)
            stride, dilation = (2 * stride, dilation) if halve else (stride, 2 * dilation)
        for index in range(depths[stage]):
            number = sum(depths[:stage]) + index
            x = block(
                dims[stage],
                kernel_size=variant.kernel_sizes[stage],
                dilation_rate=dilation,
                drop_path_rate=rates[number],
                seed=None if seed is None else seed + number,
                name=f"stages_{stage}_{index}",
            )(x)
        outputs.append(x)
    return outputs


def isotropic_body(x, variant, block, drop_path_rate: float, seed: int | None):
    """Applies blocks of one width to 16x16 patches, as in a plain ViT.

    Reference: Liu et al. 2022, section 3.3; models/convnext_isotropic.py, class ConvNeXtIsotropic.

    Args:
        x: (N, H, W, 3), normalised pixels.
        variant: an isotropic one of `variants.VARIANTS`.
        block: function (dim, kernel_size, dilation_rate, drop_path_rate, seed, name) -> layer.
        drop_path_rate: rate of the last block; the first has 0.
        seed: int or None; block number i gets seed + i.

    Returns:
        (N, H / 16, W / 16, dim).
    """
    (depth,), (dim,) = variant.depths, variant.dims
    x = PatchConv2D(dim, 16, 16, data_format="channels_last", kernel_initializer=INITIALIZER, name="stem")(x)
    for index, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
        x = block(
            dim,
            kernel_size=variant.kernel_sizes[0],
            dilation_rate=1,
            drop_path_rate=rate,
            seed=None if seed is None else seed + index,
            name=f"blocks_{index}",
        )(x)
    return x


def pool(x, kind: str, dtype):
    """Takes the mean ("avg") or maximum ("max") over the map: (N, H, W, C) -> (N, C)."""
    pooling = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[kind]
    return pooling(data_format="channels_last", dtype=dtype, name=f"{kind}_pool")(x)


def final_norm(x, variant, pooling: str | None, dtype):
    """Pools the last map and normalises it, in the order that the head asks for.

    "norm_last" and "mlp": pool, then norm (models/convnext.py, `forward_features`). "norm_first": norm, then
    pool. With `pooling=None` each position of the map is normalised and nothing is pooled, which is what
    `keras.applications` returns without the top.

    Args:
        x: (N, H, W, C), the last stage's output.
        variant: one of `variants.VARIANTS`; the cases above are those of its `head`.
        pooling: "avg", "max" or None.
        dtype: float32 or wider; 16-bit sums over a map lose digits.

    Returns:
        (N, C), or (N, H, W, C) with `pooling=None`.
    """
    norm_first = variant.head == "norm_first"
    name = "norm_pre" if norm_first else "norm"
    normalise = NORMS[variant.norm](variant.epsilon, dtype=dtype, name=name)
    if pooling is None:
        return normalise(x)
    return pool(normalise(x), pooling, dtype) if norm_first else normalise(pool(x, pooling, dtype))


def classifier(x, variant, classes: int, activation, dtype):
    """Computes logits, or what `activation` makes of them: (N, C) -> (N, classes).

    An "mlp" head has a hidden layer with exact GELU in front, as wide as its input (timm
    layers/classifier.py, NormMlpClassifierHead).
    """
    if variant.head == "mlp":
        x = layers.Dense(
            x.shape[-1],
            activation="gelu",
            kernel_initializer=INITIALIZER,
            dtype=dtype,
            name="pre_logits",
        )(x)
    return layers.Dense(
        classes, activation=activation, kernel_initializer=INITIALIZER, dtype=dtype, name="head"
    )(x)
