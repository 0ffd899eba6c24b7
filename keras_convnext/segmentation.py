"""UPerNet, a class for each pixel: heads for semantic segmentation on any ConvNeXt with a feature pyramid.

Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding" (arXiv:1807.10221), as the ConvNeXt
paper uses it (section 4.2); facebookresearch/ConvNeXt at 048efce, semantic_segmentation/; mmsegmentation
1.2.2, mmseg/models/decode_heads/uper_head.py, psp_head.py and fcn_head.py.

Names of layers and weights repeat mmsegmentation's, with "_" where it has "." in a layer's name:
`decode_head.bottleneck.conv.weight` is `decode_head_bottleneck_conv/kernel`.
"""

import functools
import math

import keras
from keras import layers

from keras_convnext import models
from keras_convnext.architecture import POOLED_SIZES
from keras_convnext.convnext import layer_name
from keras_convnext.data.preprocessing import is_positive_integer
from keras_convnext.layers.convolution import Convolution2D, ConvolutionOfMaps
from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.layers.normalization import BatchNormalization
from keras_convnext.layers.resizing import AdaptiveAveragePooling2D, ResizeLike
from keras_convnext.model_options import ModelOptions
from keras_convnext.weights.resolve import ResolvedWeights

_register = keras.saving.register_keras_serializable(package="keras_convnext")


@_register
class Segmenter(keras.Model):
    """A functional Keras model, (N, H, W, 3) pixels to (N, H, W, classes) logits, made by `UPerNet`."""

    @property
    def classes(self) -> int:
        return _layer(self, "decode_head_conv_seg").filters

    @property
    def has_auxiliary(self) -> bool:
        """Whether it has the auxiliary head, which only training uses."""
        return any(isinstance(layer, KeepAuxiliary) for layer in self.layers)


@_register
class KeepAuxiliary(layers.Layer):
    """Hands on the first of two maps, the logits, and keeps the second, the auxiliary head's, in the graph.

    So weights, files and state dicts have that head, and the model one output.
    """

    def call(self, inputs):
        return inputs[0]

    def compute_output_shape(self, input_shape):
        return input_shape[0]


def UPerNet(backbone, classes, channels=512, auxiliary=True, dropout=0.1, upsample=True, name=None):
    """Puts the heads of UPerNet on a ConvNeXt.

    Pyramid pooling (PPM) over the last map, then a feature pyramid from the top down, whose four maps are
    joined at a quarter of the resolution; a 1x1 convolution gives the logits there. The auxiliary head is a
    convolution on the third stage and another 1x1; its loss helps training. Convolutions in front of the
    logits are without bias, each with batch norm and ReLU.
    Reference: Xiao et al. 2018, section 3.1 and figure 4; mmsegmentation 1.2.2 uper_head.py, fcn_head.py;
    facebookresearch/ConvNeXt semantic_segmentation/configs/_base_/models/upernet_convnext.py at 048efce.

    Args:
        backbone: ConvNeXt of either paper built with `include_top=False, pyramid_norms=True`; its layers
            become the model's. Or a name or file, opened with its weights as by `load`: a tag with those, an
            architecture with its ImageNet weights. For random weights pass a model.
        classes: int, number of classes.
        channels: int, width of the heads. Default 512, as published; the auxiliary head has half.
        auxiliary: bool, whether to have the auxiliary head. Default True; `with_auxiliary` gives its logits.
        dropout: float in [0, 1), share of channels dropped in front of the logits in training. Default 0.1.
        upsample: bool. Default True: logits at the size of the image; False: at a quarter, as computed.
        name: of the model. One of your own stands in front of the names of its heads' layers.

    Returns:
        A `Segmenter`: pixels as its backbone takes them, 0..255, (N, H, W, C) to logits (N, H, W, classes) in
        float32 or wider, each side from 32 up.

    Raises:
        ValueError: for a backbone without the four normalised maps, or another value out of range.

    Example:
        >>> body = TestConvNeXt2(weights=None, include_top=False, pyramid_norms=True)
        >>> UPerNet(body, classes=11, channels=16).output_shape
        (None, None, None, 11)
    """
    models.check_rules(
        {
            "classes": (classes, is_positive_integer(classes), "a whole number from 1 up"),
            "channels": (
                channels,
                is_positive_integer(channels) and channels > 1,
                "a whole number from 2 up",
            ),
            "dropout": (
                dropout,
                isinstance(dropout, int | float) and 0 <= dropout < 1,
                "in [0, 1), the share of channels dropped in training",
            ),
        }
    )
    backbone = models.with_pyramid(backbone)
    maps = [backbone.output[f"P{level}"] for level in (2, 3, 4, 5)]
    image = backbone.input
    is_16_bit = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
    dtype = "float32" if is_16_bit else None  # of logits
    named = functools.partial(layer_name, model_name=name)

    x = decode_head(maps, channels, named)
    x = logits(x, classes, dropout, dtype, "decode_head", named)  # (N, H / 4, W / 4, classes)
    if upsample:
        x = ResizeLike(dtype=dtype, name=named("decode_head_upsample"))([x, image])
    if auxiliary:
        y = convolution(maps[2], channels // 2, 3, "auxiliary_head_convs_0", named)
        y = logits(y, classes, dropout, dtype, "auxiliary_head", named)  # (N, H / 16, W / 16, classes)
        x = KeepAuxiliary(dtype=dtype, name=named("auxiliary_head_kept"))([x, y])
    return Segmenter(image, x, name=name or "upernet")


def decode_head(maps, channels, named=layer_name):
    """Joins the four normalised maps P2 .. P5 to one at the size of P2: (N, H / 4, W / 4, channels)."""

    top = maps[-1]
    pooled = [top]
    for number, cells in enumerate(POOLED_SIZES):
        place = f"psp_modules_{number}"
        x = AdaptiveAveragePooling2D(cells, name=named(f"decode_head_{place}_0"))(top)
        pooled.append(convolution(x, channels, 1, f"decode_head_{place}_1", named))
    x = convolution(pooled, channels, 3, "decode_head_bottleneck", named)  # (N, H / 32, W / 32, channels)

    joined = [x]  # from the top down, without a convolution for the topmost
    for level in (2, 1, 0):
        lateral = convolution(maps[level], channels, 1, f"decode_head_lateral_convs_{level}", named)
        x = ResizeLike(name=named(f"decode_head_lateral_convs_{level}_resize"))([x, lateral])
        x = layers.Add(name=named(f"decode_head_lateral_convs_{level}_add"))([lateral, x])
        joined.insert(0, convolution(x, channels, 3, f"decode_head_fpn_convs_{level}", named))
    return convolution(joined, channels, 3, "decode_head_fpn_bottleneck", named)


def convolution(x, filters, kernel_size, place, named=layer_name):
    """Convolution without bias, batch norm, ReLU: (N, H, W, C), or a list of maps, to (N, H, W, filters)."""
    stddev = math.sqrt(2 / (filters * kernel_size**2))  # He et al. 2015 by outputs, mmcv's default
    kind = ConvolutionOfMaps if isinstance(x, list) else Convolution2D
    x = kind(
        filters,
        kernel_size,
        padding="same",
        data_format="channels_last",
        use_bias=False,
        kernel_initializer=RandomNormal(stddev),
        name=named(f"{place}_conv"),
    )(x)
    x = BatchNormalization(name=named(f"{place}_bn"))(x)
    return layers.ReLU(name=named(f"{place}_relu"))(x)


def logits(x, classes, dropout, dtype, head, named=layer_name):
    """Drops whole channels in training, then a 1x1 convolution: (N, H, W, C) to (N, H, W, classes)."""
    x = layers.SpatialDropout2D(dropout, data_format="channels_last", name=named(f"{head}_dropout"))(x)
    return Convolution2D(
        classes,
        1,
        padding="same",
        data_format="channels_last",
        kernel_initializer=RandomNormal(0.01),  # decode_head.py, init_cfg
        dtype=dtype,
        name=named(f"{head}_conv_seg"),
    )(x)


def with_auxiliary(model: keras.Model) -> keras.Model:
    """The model for training: images to {"logits": ..., "auxiliary": ...}, both (N, H, W, classes).

    Both are at the size of the image. The layers are those of `model`: what is trained is in both. ValueError
    where it has no auxiliary head.
    """
    kept = next((layer for layer in model.layers if isinstance(layer, KeepAuxiliary)), None)
    if kept is None:
        raise ValueError(
            "Expected a segmenter with an auxiliary head, as UPerNet(..., auxiliary=True) builds it. "
            f"Received {model.name!r}, which has none."
        )
    image, dtype = model.input, kept.dtype_policy
    found = dict(zip(("logits", "auxiliary"), kept.input, strict=True))
    outputs = {key: ResizeLike(dtype=dtype, name=key)([x, image]) for key, x in found.items()}
    return keras.Model(image, outputs, name=model.name)


def without_auxiliary(model: keras.Model) -> Segmenter:
    """The model without its auxiliary head, for use; as it is where it has none."""
    kept = next((layer for layer in model.layers if isinstance(layer, KeepAuxiliary)), None)
    return model if kept is None else Segmenter(model.input, kept.input[0], name=model.name)


def build(source: ResolvedWeights, options: ModelOptions) -> Segmenter:
    """Lays out the segmenter that weights are of, then gives them to it; `load` describes the options.

    With another number of classes than the weights have, or `new_head`, the last layers of both heads start
    fresh.
    """
    upsample = not source.is_model or any(
        layer.name.endswith("decode_head_upsample") for layer in source.model.layers
    )

    def attach(backbone, heads) -> Segmenter:
        return UPerNet(
            backbone, heads.classes, heads.channels, heads.auxiliary, upsample=upsample, name=options.name
        )

    return models.build_with_heads(source, options, "segmentation", attach)


def _layer(model, official):
    """The layer of a model with an official name, whatever stands in front of it."""
    return next(layer for layer in model.layers if layer.name.endswith(official))
