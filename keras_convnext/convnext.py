"""ConvNeXt, from pixels to logits: the block of each paper, the body they share, the heads.

V1: Liu et al. 2022, "A ConvNet for the 2020s" (arXiv:2201.03545); facebookresearch/ConvNeXt at 048efce.
V2: Woo et al. 2023, "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders"
    (arXiv:2301.00808); facebookresearch/ConvNeXt-V2 at 2553895.
Overlapping stems, RMS norms, norm-first and MLP heads, output strides: timm 1.0.31, models/convnext.py.

Names of layers and weights repeat those of the official code, with "_" where it has "." in a layer's name:
`stages.1.0.dwconv.weight` is `stages_1_0/dwconv/kernel`. What others may call a layer too has a prefix
(`layer_name`): `norm.weight` is `convnext_norm/gamma`. Maps are channels-last, (N, H, W, C).
"""

import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

from keras_convnext import _messages
from keras_convnext.layers.chunking import in_chunks
from keras_convnext.layers.depthwise import DepthwiseConv2D, depthwise_in_frames
from keras_convnext.layers.direct import Direct
from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.layers.normalization import (
    GlobalResponseNormalization,
    LayerNormalization,
    RMSNormalization,
    SameShape,
    SimpleNormalization,
)
from keras_convnext.layers.pointwise import PatchConv2D, PointwiseConv2D, pointwise, pointwise_after_grn
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


def _chosen(kind, name, table):
    if name not in table:
        raise ValueError(_messages.unknown(kind, name, table))
    return table[name]


class Block(Direct, SameShape):
    """What the blocks share: `x + drop_path(branch(x))`, and the depthwise convolution and norm in front.

    A final class makes the other layers in the order of its paper, connects all of them in `branch`, and
    keeps its arguments in `self.config`. Keras hands `trainable` down to sub-layers when it is set, but not
    when a layer is made with it, from a configuration for example: sub-layers are made with `inherited`, and
    the configuration tells those that differ.
    """

    def __init__(self, dim, kernel_size, dilation_rate, norm, epsilon, activation, affine=True, **kwargs):
        super().__init__(**kwargs)
        self.config = {"dim": dim, "kernel_size": kernel_size, "dilation_rate": dilation_rate}
        self.config.update({"norm": norm, "epsilon": epsilon, "activation": activation})
        self.dwconv = DepthwiseConv2D(kernel_size, dilation_rate, **self.inherited, name="dwconv")
        self.norm = _chosen("norm", norm, NORMS)(epsilon, affine, **self.inherited, name="norm")
        self.activation = _chosen("activation", activation, ACTIVATIONS)

    differs_in_training = True

    @property
    def map_weight(self):
        return self.dwconv.kernel

    @property
    def inherited(self):
        return {"dtype": self.dtype_policy, "trainable": self.trainable}

    def dense(self, units, name, policy):
        """A pointwise layer, with a dtype policy of its own once quantize() gave it one."""
        settings = self.inherited if policy is None else {**self.inherited, "dtype": policy}
        return layers.Dense(units, kernel_initializer=INITIALIZER, **settings, name=name)

    def build(self, input_shape):
        hidden_shape = (*input_shape[:-1], 4 * self.config["dim"])
        for layer in self._layers:  # in the order in which they were made
            layer.build(hidden_shape if layer.name in ("grn", "pwconv2") else input_shape)

    def branch(self, x):
        """(N, H, W, C) to the same shape.

        By `call`: the block has checked what `__call__` checks for each layer, at 0.1 ms in eager mode.
        """
        raise NotImplementedError

    def call(self, x, training=None):
        hidden_channels = 4 * self.config["dim"]
        if not training:
            return in_chunks(lambda x: x + self.branch(x), x, hidden_channels)
        branch = keras.remat(self.branch) if self.config["rematerialize"] else self.branch
        return x + self.drop_path(in_chunks(branch, x, hidden_channels, training=True), training=training)

    def get_config(self):
        config = {**super().get_config(), **self.config}
        flags = {layer.name: layer.trainable for layer in self._layers if layer.trainable != self.trainable}
        if flags:
            config["sublayers_trainable"] = flags
        if self.pwconv1.dtype_policy != self.dtype_policy:
            config["pointwise_dtype"] = keras.dtype_policies.serialize(self.pwconv1.dtype_policy)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        flags = config.pop("sublayers_trainable", {})
        layer = super().from_config(config)
        for name, trainable in flags.items():
            getattr(layer, name).trainable = trainable
        return layer


@_register
class ConvNeXtBlock(Block):
    """The block of ConvNeXt (V1).

    `x + drop_path(gamma * pwconv2(gelu(pwconv1(norm(dwconv(x))))))`: a depthwise convolution, then a layer
    norm and two pointwise layers, four times wider in between, scaled per channel; x (N, H, W, C) to the same
    shape, in the compute dtype. ValueError for an unknown norm or activation, an even kernel, or a rate
    outside [0, 1).
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
        super().__init__(dim, kernel_size, dilation_rate, norm, epsilon, activation, **kwargs)
        self.config.update({"drop_path_rate": drop_path_rate, "rematerialize": rematerialize, "seed": seed})
        self.config["layer_scale_init_value"] = layer_scale_init_value
        self.pwconv1 = self.dense(4 * dim, "pwconv1", pointwise_dtype)
        self.pwconv2 = self.dense(dim, "pwconv2", pointwise_dtype)
        self.layer_scale = None
        if layer_scale_init_value is not None:
            self.layer_scale = LayerScale(layer_scale_init_value, **self.inherited, name="layer_scale")
        self.drop_path = StochasticDepth(drop_path_rate, seed, **self.inherited, name="drop_path")

    def branch(self, x):
        x = self.dwconv.call(x)
        x = self.norm.call(x)
        x = pointwise(self.pwconv1, x, self.activation)  # (N, H, W, 4C)
        x = pointwise(self.pwconv2, x)  # (N, H, W, C)
        return x if self.layer_scale is None else self.layer_scale.call(x)


@_register
class ConvNeXtV2Block(Block):
    """The block of ConvNeXt V2.

    `x + drop_path(pwconv2(grn(gelu(pwconv1(norm(dwconv(x)))))))`: the V1 block with global response
    normalisation between the pointwise layers, and without LayerScale.
    Reference: Woo et al. 2023, section 3.3 and figure 5; models/convnextv2.py, class Block.

    Arguments, result and errors are those of `ConvNeXtBlock`, but for `layer_scale_init_value`.
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
        super().__init__(dim, kernel_size, dilation_rate, norm, epsilon, activation, **kwargs)
        self.config.update({"drop_path_rate": drop_path_rate, "rematerialize": rematerialize, "seed": seed})
        self.pwconv1 = self.dense(4 * dim, "pwconv1", pointwise_dtype)
        self.grn = GlobalResponseNormalization(**self.inherited, name="grn")
        self.pwconv2 = self.dense(dim, "pwconv2", pointwise_dtype)
        self.drop_path = StochasticDepth(drop_path_rate, seed, **self.inherited, name="drop_path")

    def branch(self, x):
        x = self.dwconv.call(x)
        x = self.norm.call(x)
        x = pointwise(self.pwconv1, x, self.activation)  # (N, H, W, 4C)
        return pointwise_after_grn(self.pwconv2, x, self.grn)  # (N, H, W, C)


@_register
class InferenceBlock(Block):
    """A block of either paper without what inference does not need; `deploy` makes it.

    `x + pwconv2(grn(gelu(pwconv1(normalise(dwconv(x))))))`, where the norm has neither gain nor shift, GRN
    (of V2 only, `response_norm`) has no shift, and the pointwise layers are 1x1 convolutions that contain the
    rest. It cannot be trained as the block that it was made from can. `for_litert`: see
    `pointwise.PointwiseConv2D` and `depthwise.depthwise_in_frames`.
    """

    def __init__(
        self,
        dim,
        kernel_size=7,
        dilation_rate=1,
        norm="layer_norm",
        epsilon=1e-6,
        activation="gelu",
        response_norm=False,
        for_litert=False,
        **kwargs,
    ):
        super().__init__(dim, kernel_size, dilation_rate, norm, epsilon, activation, affine=False, **kwargs)
        self.config.update({"response_norm": response_norm, "for_litert": for_litert})
        self.pwconv1 = PointwiseConv2D(4 * dim, for_litert, **self.inherited, name="pwconv1")
        self.grn = None
        if response_norm:
            self.grn = GlobalResponseNormalization(center=False, **self.inherited, name="grn")
            self.grn.sums_by_product = not for_litert
        self.pwconv2 = PointwiseConv2D(dim, for_litert, **self.inherited, name="pwconv2")

    def branch(self, x):
        x = depthwise_in_frames(self.dwconv, x) if self.config["for_litert"] else self.dwconv.call(x)
        x = self.norm.call(x)
        x = pointwise(self.pwconv1, x, self.activation)  # (N, H, W, 4C)
        if self.grn is None:
            return pointwise(self.pwconv2, x)  # (N, H, W, C)
        return pointwise_after_grn(self.pwconv2, x, self.grn)

    def call(self, x, training=None):
        return super().call(x, training=False)  # it has no drop path


def drop_path_rates(drop_path_rate: float, depth: int) -> list[float]:
    """The rate of each block, on a line from 0 to `drop_path_rate` (models/convnext.py, `dp_rates`)."""
    return np.linspace(0, drop_path_rate, depth).tolist()


def layer_name(official: str, model_name: str | None = None) -> str:
    """The name of a layer in a graph, where those of Keras and of the user's own layers stand beside it.

    A model that was given a name puts it in front of all, so that two of them fit into one graph.
    """
    if model_name is not None:
        return f"{model_name.replace('.', '_')}_{official}"
    body, heads = (
        ("stages_", "blocks_", "downsample_layers_"),
        ("decode_", "auxiliary_", "neck", "rpn_", "roi_"),
    )
    is_rare = official.startswith(body + heads)
    return official if is_rare else f"convnext_{official}"


_convolution = functools.partial(PatchConv2D, data_format="channels_last", kernel_initializer=INITIALIZER)


def stem(x, variant, named=layer_name):
    """Turns normalised pixels into the first map, at a quarter of the resolution.

    "patch" is the papers' stem: 4x4 patches, side by side. Three are timm's: two 3x3 convolutions of stride 2
    that overlap, with all channels ("overlap"), with half of them in between ("overlap_tiered"), or with an
    activation in between ("overlap_act"). "isotropic" has 16x16 patches, as a plain ViT, and no norm.
    """
    dim = variant.dims[0]
    if variant.isotropic:
        return _convolution(dim, 16, 16, name=named("stem"))(x)  # (N, H / 16, W / 16, C)
    # The last convolution's place in the official nn.Sequential.
    last = {"patch": 0, "overlap_act": 2}.get(variant.stem, 1)
    if variant.stem == "patch":
        x = _convolution(dim, 4, 4, name=named("downsample_layers_0_0"))(x)  # (N, H / 4, W / 4, C)
    else:
        # One pixel of padding on both sides; "same" would pad an even-sized map only after its last pixel.
        x = layers.ZeroPadding2D(1, data_format="channels_last", name=named("stem_padding_0"))(x)
        # To (N, H / 2, W / 2, D).
        x = _convolution(variant.stem_dim, 3, 2, name=named("downsample_layers_0_0"))(x)
        if variant.stem == "overlap_act":
            x = layers.Activation(ACTIVATIONS[variant.activation], name=named("stem_activation"))(x)
        x = layers.ZeroPadding2D(1, data_format="channels_last", name=named("stem_padding_1"))(x)
        x = _convolution(dim, 3, 2, name=named(f"downsample_layers_0_{last}"))(x)  # (N, H / 4, W / 4, C)
    return NORMS[variant.norm](variant.epsilon, name=named(f"downsample_layers_0_{last + 1}"))(x)


def body(x, variant, block, output_stride: int, drop_path_rate: float, seed: int | None, named=layer_name):
    """Applies the stem and the stages of blocks, with a halving of the resolution between stages.

    Reference: Liu et al. 2022, table 9; models/convnext.py, class ConvNeXt. An isotropic model has one stage
    (section 3.3; models/convnext_isotropic.py). For an output stride of 16 or 8 the last one or two halvings
    become stride 1 and the blocks after them dilate by 2 and 4; the weights stay the same (timm
    models/convnext.py).

    `block` is a function (dim, kernel_size, dilation_rate, drop_path_rate, seed, name) -> layer; `named`
    names it. The last block has `drop_path_rate`, the first 0; block number i gets seed + i. Gives the list
    of the stages' outputs, (N, H / 4, W / 4, dims[0]) to (N, H / 32, W / 32, dims[3]) at stride 32; of an
    isotropic model one, (N, H / 16, W / 16, dim).
    """
    rates = drop_path_rates(drop_path_rate, sum(variant.depths))
    stride, dilation, number = 4, 1, 0
    outputs = []
    x = stem(x, variant, named)
    for stage, (depth, dim) in enumerate(zip(variant.depths, variant.dims, strict=True)):
        if stage > 0:
            x = NORMS[variant.norm](variant.epsilon, name=named(f"downsample_layers_{stage}_0"))(x)
            name = named(f"downsample_layers_{stage}_1")
            if stride < output_stride:
                x = _convolution(dim, 2, 2, name=name)(x)  # (N, H / (2 * stride), W / (2 * stride), C)
                stride *= 2
            else:  # the dilation is that of the stage before
                x = _convolution(dim, 2, padding="same", dilation_rate=dilation, name=name)(x)
                dilation *= 2
        for index in range(depth):
            x = block(
                dim,
                kernel_size=variant.kernel_sizes[stage],
                dilation_rate=dilation,
                drop_path_rate=rates[number],
                seed=None if seed is None else seed + number,
                name=named(f"blocks_{index}" if variant.isotropic else f"stages_{stage}_{index}"),
            )(x)
            number += 1
        outputs.append(x)
    return outputs


def final_norm(x, variant, pooling: str | None, dtype, named=layer_name):
    """Pools the last map and normalises it, in the order that the head asks for: (N, H, W, C) -> (N, C).

    "norm_last" and "mlp": pool, then norm (models/convnext.py, `forward_features`). "norm_first": norm, then
    pool. With `pooling=None`, not "avg" or "max", each position of the map is normalised and nothing is
    pooled, which is what `keras.applications` returns without the top. `dtype` is float32 or wider; 16-bit
    sums over a map lose digits.
    """
    norm_first = variant.head == "norm_first"
    name = named("norm_pre" if norm_first else "norm")
    normalise = NORMS[variant.norm](variant.epsilon, dtype=dtype, name=name)
    if pooling is None:
        return normalise(x)
    kind = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[pooling]
    pool = kind(data_format="channels_last", dtype=dtype, name=named(f"{pooling}_pool"))
    return pool(normalise(x)) if norm_first else normalise(pool(x))


def classifier(x, variant, classes: int, activation, dtype, named=layer_name):
    """Computes logits, or what `activation` makes of them: (N, C) -> (N, classes).

    An "mlp" head has a hidden layer with exact GELU in front, as wide as its input (timm
    layers/classifier.py, NormMlpClassifierHead).
    """
    dense = functools.partial(layers.Dense, kernel_initializer=INITIALIZER, dtype=dtype)
    if variant.head == "mlp":
        x = dense(x.shape[-1], activation="gelu", name=named("pre_logits"))(x)
    return dense(classes, activation=activation, name=named("head"))(x)
