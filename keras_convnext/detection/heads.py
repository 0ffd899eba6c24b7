"""The parts of a detector that have weights: the feature pyramid, and heads for proposals, boxes and masks.

Layers and weights have mmdetection's names, with "_" for ".". Reference: mmdetection 3.3.0, mmdet/models/
(necks/fpn.py, dense_heads/rpn_head.py, roi_heads/bbox_heads/convfc_bbox_head.py and mask_heads/
fcn_mask_head.py); Lin et al. 2017 (arXiv:1612.03144), section 3; He et al. 2017 (arXiv:1703.06870), figure 4.
"""

import math

import keras
import numpy as np
from keras import layers, ops

from keras_convnext.detection.boxes import RATIOS
from keras_convnext.layers.convolution import Convolution2D
from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.layers.normalization import BatchNormalization

_register = keras.saving.register_keras_serializable(package="keras_convnext")


class _Head(layers.Layer):
    """A layer of layers; its arguments are in `config`."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.config = config

    @property
    def inherited(self):
        return {"dtype": self.dtype_policy, "trainable": self.trainable}

    @property
    def logits_dtype(self):
        """float32 where the policy has 16 bits, which predictions would lose digits in."""
        return "float32" if self.compute_dtype in ("float16", "bfloat16") else self.compute_dtype

    def convolution(self, filters, kernel_size, stddev, name, **changes):
        settings = {**self.inherited, "padding": "same", "data_format": "channels_last", **changes}
        return Convolution2D(
            filters, kernel_size, kernel_initializer=RandomNormal(stddev), **settings, name=name
        )

    def dense(self, units, stddev, name, **changes):
        settings = {**self.inherited, **changes}
        return layers.Dense(units, kernel_initializer=RandomNormal(stddev), **settings, name=name)

    def get_config(self):
        return {**super().get_config(), **self.config}


@_register
class FeaturePyramid(_Head):
    """Five maps of equal width, each with what the coarser ones saw: P2 .. P5 to strides 4 .. 64.

    From the top down each map is enlarged to the next finer one, which is added after a 1x1 convolution; a
    3x3 convolution follows. The fifth map is every second cell of the fourth.
    """

    def __init__(self, channels=256, **kwargs):
        super().__init__({"channels": channels}, **kwargs)
        self.channels = channels

    def build(self, input_shape):
        width = self.channels
        self.lateral = [
            # Glorot and Bengio 2010, as in fpn.py
            self.convolution(width, 1, math.sqrt(2 / (shape[-1] + width)), f"lateral_convs_{level}_conv")
            for level, shape in enumerate(input_shape)
        ]
        stddev = math.sqrt(2 / (2 * 9 * width))
        self.output_convolutions = [
            self.convolution(width, 3, stddev, f"fpn_convs_{level}_conv") for level in range(len(input_shape))
        ]
        for lateral, convolution, shape in zip(
            self.lateral, self.output_convolutions, input_shape, strict=True
        ):
            lateral.build(shape)
            convolution.build((*shape[:-1], width))

    def call(self, inputs):
        maps = [lateral(x) for lateral, x in zip(self.lateral, inputs, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            maps[level] = maps[level] + _enlarged(maps[level + 1], maps[level])
        maps = [convolution(x) for convolution, x in zip(self.output_convolutions, maps, strict=True)]
        return [*maps, maps[-1][:, ::2, ::2]]

    def compute_output_shape(self, input_shape):
        height, width = input_shape[-1][1:3]
        halves = [None if side is None else -(-side // 2) for side in (height, width)]
        shapes = [(*shape[:3], self.channels) for shape in input_shape]
        return [*shapes, (input_shape[-1][0], *halves, self.channels)]


@_register
class ProposalHead(_Head):
    """Whether each anchor holds something, and where: of each map (N, H, W, C) logits and deltas.

    {"logits": of each map (N, H, W, 3), "deltas": (N, H, W, 12)}; a 3x3 convolution with ReLU, shared by the
    maps, and a 1x1 convolution for each of the two.
    """

    def __init__(self, **kwargs):
        super().__init__({}, **kwargs)

    def build(self, input_shape):
        width, count = input_shape[0][-1], len(RATIOS)
        self.convolutions = [
            self.convolution(width, 3, 0.01, "rpn_conv", activation="relu"),  # rpn_head.py, `init_cfg`
            self.convolution(count, 1, 0.01, "rpn_cls", dtype=self.logits_dtype),
            self.convolution(4 * count, 1, 0.01, "rpn_reg", dtype=self.logits_dtype),
        ]
        for each in self.convolutions:
            each.build((None, None, None, width))

    def call(self, inputs):
        shared, logits, deltas = self.convolutions
        maps = [shared(x) for x in inputs]
        return {"logits": [logits(x) for x in maps], "deltas": [deltas(x) for x in maps]}

    def compute_output_spec(self, inputs):
        count = len(RATIOS)
        return {
            name: [keras.KerasTensor((*x.shape[:3], width), self.logits_dtype) for x in inputs]
            for name, width in (("logits", count), ("deltas", 4 * count))
        }


@_register
class BoxHead(_Head):
    """Class and exact box of regions: (M, 7, 7, C) to logits (M, classes + 1) and deltas (M, 4 classes).

    The last logit is that of the background. Two linear layers with ReLU in front, or with `cascade` four 3x3
    convolutions without bias, each with batch norm and ReLU, and one linear layer.
    """

    def __init__(self, classes, hidden_channels=1024, cascade=False, **kwargs):
        super().__init__(
            {"classes": classes, "hidden_channels": hidden_channels, "cascade": cascade}, **kwargs
        )
        self.classes = classes

    def build(self, input_shape):
        channels, width, is_cascade = input_shape[-1], self.config["hidden_channels"], self.config["cascade"]
        body, linear = [], []  # Keras tracks a list when it is set
        for number in range(4 if is_cascade else 0):
            place, stddev = f"shared_convs_{number}", math.sqrt(2 / (9 * channels))  # mmcv's default
            body += [
                self.convolution(channels, 3, stddev, f"{place}_conv", use_bias=False),
                BatchNormalization(**self.inherited, name=f"{place}_bn"),
            ]
        for layer in body:
            layer.build(input_shape)
        inputs = math.prod(input_shape[1:])
        for number in range(1 if is_cascade else 2):
            stddev = math.sqrt(2 / (inputs + width))
            linear.append(self.dense(width, stddev, f"shared_fcs_{number}", activation="relu"))
            linear[-1].build((None, inputs))
            inputs = width
        self.body, self.linear = body, linear
        self.fc_cls = self.dense(self.classes + 1, 0.01, "fc_cls", dtype=self.logits_dtype)
        self.fc_reg = self.dense(4 * self.classes, 0.001, "fc_reg", dtype=self.logits_dtype)
        self.fc_cls.build((None, width))
        self.fc_reg.build((None, width))

    def call(self, inputs, training=None):
        x = inputs
        for convolution, norm in zip(self.body[::2], self.body[1::2], strict=True):
            x = ops.relu(norm(convolution(x), training=training))
        x = ops.reshape(x, (-1, math.prod(x.shape[1:])))
        for layer in self.linear:
            x = layer(x)
        return self.fc_cls(x), self.fc_reg(x)

    def compute_output_spec(self, inputs, training=None):
        return tuple(
            keras.KerasTensor((inputs.shape[0], width), self.logits_dtype)
            for width in (self.classes + 1, 4 * self.classes)
        )


@_register
class MaskHead(_Head):
    """What of regions their object covers: (M, 14, 14, C) to logits (M, 28, 28, classes), of each class.

    Four 3x3 convolutions, a transposed one that doubles the size, each with ReLU, and a 1x1 convolution.
    """

    def __init__(self, classes, **kwargs):
        super().__init__({"classes": classes}, **kwargs)
        self.classes = classes

    def build(self, input_shape):
        width = input_shape[-1]
        stddev = math.sqrt(2 / (9 * width))  # He et al. 2015 by outputs, as fcn_mask_head.py
        upsample = layers.Conv2DTranspose(
            width,
            2,
            strides=2,
            data_format="channels_last",
            activation="relu",
            kernel_initializer=RandomNormal(math.sqrt(2 / (4 * width))),
            **self.inherited,
            name="upsample",
        )
        last = math.sqrt(2 / self.classes)
        self.body = [
            *(self.convolution(width, 3, stddev, f"convs_{i}_conv", activation="relu") for i in range(4)),
            upsample,
            self.convolution(self.classes, 1, last, "conv_logits", dtype=self.logits_dtype),
        ]
        for layer in self.body:
            layer.build(input_shape)

    def call(self, inputs):
        x = inputs
        for layer in self.body:
            x = layer(x)
        return x

    def compute_output_spec(self, inputs):
        shape = (inputs.shape[0], 2 * inputs.shape[1], 2 * inputs.shape[2], self.classes)
        return keras.KerasTensor(shape, self.logits_dtype)


def _enlarged(x, like):
    """A map at the height and width of another, each cell that of the nearest corner."""
    for axis in (1, 2):
        size, wanted = ops.shape(x)[axis], ops.shape(like)[axis]
        are_known = isinstance(size, int) and isinstance(wanted, int)
        places = (np if are_known else ops).arange(wanted, dtype="int32") * size // wanted
        x = ops.take(x, ops.convert_to_tensor(places), axis=axis)
    return x
