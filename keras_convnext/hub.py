"""keras-hub's parts of a ConvNeXt: backbone, image converter, preprocessor and classifier.

After `import keras_convnext.hub`, keras-hub finds them by the name in a preset folder:

>>> import keras_convnext.hub
>>> classifier = keras_hub.models.ImageClassifier.from_preset("presets/convnext_tiny")
>>> classifier = keras_hub.models.ImageClassifier.from_preset("presets/convnext_tiny", num_classes=5)

`keras-convnext preset TAG DIR` writes such folders. Written for keras-hub 0.32; the package does not import
this module by itself.
"""

import contextlib
import functools
import math

import keras
import numpy as np

from keras_convnext import convnext
from keras_convnext._environment import require
from keras_convnext._messages import unknown
from keras_convnext.data.preprocess import preprocess_image
from keras_convnext.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from keras_convnext.model_options import ModelOptions
from keras_convnext.models import assemble
from keras_convnext.variants import VARIANTS
from keras_convnext.weights.resolve import resolve

require("keras_hub", "keras_convnext.hub")

from keras_hub.layers import ImageConverter  # noqa: E402
from keras_hub.models import (  # noqa: E402
    FeaturePyramidBackbone,
    ImageClassifier,
    ImageClassifierPreprocessor,
    Task,
)

__all__ = [
    "ConvNeXtBackbone",
    "ConvNeXtImageClassifier",
    "ConvNeXtImageClassifierPreprocessor",
    "ConvNeXtImageConverter",
]

_register = keras.saving.register_keras_serializable(package="keras_convnext")
_HEAD_NAMES = {"avg_pool": "pooler", "norm_pre": "norm", "head": "predictions"}  # keras-hub's


@_register
class ConvNeXtBackbone(FeaturePyramidBackbone):
    """Any ConvNeXt without its final norm and classifier, for keras-hub's tasks.

    Pixels in 0..255, (N, H, W, C), to the last map, (N, H / 32, W / 32, dims[3]) at output stride 32.
    `pyramid_outputs` are the stages' maps by stride, "P2": (N, H / 4, W / 4, dims[0]) and so on. keras-hub
    reads the stride from that name, where `ConvNeXt.pyramid_outputs` counts stages: below output stride 32
    the last map is here "P4" or "P3", and the maps of equal stride in front of it have no name.

    Args:
        architecture: name, such as "convnextv2_atto" (`keras-convnext list --architectures`).
        image_shape: (height, width, channels), each side None or at least 32.
        mean, std: of R, G and B for pixels in 0..1, with which the backbone normalises.
        drop_path_rate: float in [0, 1), of the last block; earlier blocks less, linearly from 0.
        output_stride: 8, 16 or 32.
        dtype: policy of the layers, or its name; None for the global one.

    Raises:
        ValueError: for an unknown architecture, or another value out of range.

    Example:
        >>> ConvNeXtBackbone("test_convnext2", image_shape=(64, 64, 3)).output_shape
        (None, 2, 2, 128)
    """

    def __init__(
        self,
        architecture,
        image_shape=(None, None, 3),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        drop_path_rate=0.0,
        output_stride=32,
        dtype=None,
        **kwargs,
    ):
        if architecture not in VARIANTS:
            raise ValueError(unknown("architecture", architecture, VARIANTS))
        preprocessing = Preprocessing(224, mean=mean, std=std)
        source = resolve(architecture, None)
        options = ModelOptions(
            include_top=False,
            input_shape=tuple(image_shape),
            drop_path_rate=drop_path_rate,
            output_stride=output_stride,
        )
        with _policy(dtype):
            model = assemble(source.variant, options.settled(source), preprocessing)
        maps = list(model.pyramid_outputs.values())
        super().__init__(inputs=model.input, outputs=maps[-1], dtype=dtype, **kwargs)
        strides = [16] if source.variant.isotropic else [min(4 << n, output_stride) for n in range(4)]
        self.pyramid_outputs = {f"P{int(math.log2(s))}": x for s, x in zip(strides, maps, strict=True)}
        self.architecture = architecture
        self.image_shape = tuple(image_shape)
        self.mean, self.std = preprocessing.mean, preprocessing.std
        self.drop_path_rate = drop_path_rate
        self.output_stride = output_stride

    def get_config(self):
        return {
            **super().get_config(),
            "architecture": self.architecture,
            "image_shape": list(self.image_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "drop_path_rate": self.drop_path_rate,
            "output_stride": self.output_stride,
        }

    def default_lora_layer_names(self):
        """The pointwise layers, which have most of the weights."""
        return ["pwconv1", "pwconv2"]

    def quantize(self, mode=None, **kwargs):
        raise NotImplementedError(
            "keras-hub cannot store a quantised ConvNeXtBackbone. Quantise a model of this package: "
            "keras_convnext.load(preset).quantize('int8'), which model.save() keeps."
        )


@_register
class ConvNeXtImageConverter(ImageConverter):
    """Resizes an image and cuts out its centre, as the evaluation of published weights does.

    The pixels are those of `keras_convnext.data.eval_image`, bit for bit, eagerly, in tf.data and in Grain:
    Pillow makes them. It takes images of any size, one (H, W, 3), a batch (N, H, W, 3) or a list of such, in
    0..255, whose values other than uint8 are rounded to whole levels. It gives 0..255 in the compute dtype,
    as a NumPy array, in tf.data as a tensor; `ConvNeXtBackbone` normalises. keras-hub's own class cuts the
    largest window before it resizes, so it cannot say a crop fraction below 1.

    Args:
        image_size: (height, width) of the result, or None to leave images as they are.
        crop_fraction, crop_mode, interpolation, resize_size: as in `keras_convnext.Preprocessing`.
    """

    backbone_cls = ConvNeXtBackbone

    def __init__(
        self,
        image_size=None,
        crop_fraction=0.875,
        crop_mode="center",
        interpolation="bicubic",
        resize_size=None,
        **kwargs,
    ):
        for name in ("scale", "offset"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"Expected {name}=None, as ConvNeXtBackbone normalises by itself: pass it mean and std. "
                    f"Received: {name}={kwargs[name]!r}"
                )
        if kwargs.get("data_format") not in (None, "channels_last"):
            raise ValueError(f"Expected images (N, H, W, 3). Received: {kwargs['data_format']!r}")
        kwargs |= {"antialias": True, "data_format": "channels_last"}
        super().__init__(image_size=image_size, interpolation=interpolation, **kwargs)
        self.crop_fraction = crop_fraction
        self.crop_mode = crop_mode
        self.resize_size = resize_size
        self.preprocessing  # noqa: B018 - checks the values

    @property
    def preprocessing(self):
        """What it does, as a `Preprocessing`; None where it resizes nothing."""
        if self.image_size is None:
            return None
        return Preprocessing(
            tuple(self.image_size),
            self.crop_fraction,
            self.interpolation,
            self.crop_mode,
            self.resize_size,
        )

    def _call_python(self, inputs):
        if isinstance(inputs, dict):
            raise ValueError(
                f"Expected images, received a dictionary of {', '.join(inputs)}. Boxes are resized by "
                "keras_hub.layers.RetinaNetImageConverter(image_size, antialias=True)."
            )
        if keras.utils.is_keras_tensor(inputs):
            raise ValueError("Expected images, received a symbolic tensor: it is no layer of a model.")
        return self._pixels(inputs)

    def _call_tf(self, inputs):
        """The same within a tf.data pipeline, on every backend."""
        import tensorflow as tf

        images = tf.convert_to_tensor(inputs)
        dtype = tf.as_dtype(self.compute_dtype)
        pixels = tf.numpy_function(self._pixels, [images], dtype, stateful=False)
        sides = images.shape[-3:-1] if self.image_size is None else self.image_size
        pixels.set_shape((*images.shape[:-3], *sides, images.shape[-1]))
        return pixels

    def _pixels(self, inputs):
        """Images to an array (H, W, 3) or (N, H, W, 3) of the compute dtype."""
        is_batch = isinstance(inputs, list | tuple)
        arrays = [_levels(image) for image in (inputs if is_batch else [inputs])]
        if not is_batch and arrays[0].ndim == 4:
            is_batch, arrays = True, list(arrays[0])
        if preprocessing := self.preprocessing:
            arrays = [preprocess_image(array, preprocessing) for array in arrays]
        return (np.stack(arrays) if is_batch else arrays[0]).astype(self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        del config["antialias"]
        return config | {
            "crop_fraction": self.crop_fraction,
            "crop_mode": self.crop_mode,
            "resize_size": self.resize_size,
        }


@_register
class ConvNeXtImageClassifierPreprocessor(ImageClassifierPreprocessor):
    """Images and labels to what `ConvNeXtImageClassifier` is fed."""

    backbone_cls = ConvNeXtBackbone
    image_converter_cls = ConvNeXtImageConverter

    def call(self, x, y=None, sample_weight=None):
        if self.image_converter:
            x = self.image_converter(x)
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)


@_register
class ConvNeXtImageClassifier(ImageClassifier):
    """Backbone, pooling, norm, dropout, classifier: as published heads are, so that their weights fit.

    Architectures whose head is another in the paper or in timm have that: norm before pooling, or a hidden
    layer. keras-hub's own `ImageClassifier` has no norm there.

    Args:
        backbone: `ConvNeXtBackbone`.
        num_classes: int, outputs.
        preprocessor: None, or what `fit` and `predict` prepare images with.
        activation: of the outputs. Default None: logits.
        dropout: float in [0, 1), share of features dropped in training. Default 0.
        head_dtype: policy of norm and classifier, default the backbone's; the norm and pooling are float32
            where that computes in 16 bits.
    """

    backbone_cls = ConvNeXtBackbone
    preprocessor_cls = ConvNeXtImageClassifierPreprocessor

    def __init__(
        self,
        backbone,
        num_classes,
        preprocessor=None,
        activation=None,
        dropout=0.0,
        head_dtype=None,
        **kwargs,
    ):
        if not isinstance(backbone, ConvNeXtBackbone):
            raise ValueError(
                f"Expected a ConvNeXtBackbone, received {type(backbone).__name__}. For other models "
                "keras_hub.models.ImageClassifier makes the classifier."
            )
        policy = keras.dtype_policies.get(head_dtype or backbone.dtype_policy)
        dtype = "float32" if policy.compute_dtype in ("float16", "bfloat16") else policy
        variant, named = VARIANTS[backbone.architecture], functools.partial(_renamed, _HEAD_NAMES)
        self.backbone = backbone
        self.preprocessor = preprocessor
        x = convnext.final_norm(backbone(backbone.input), variant, "avg", dtype, named)
        x = keras.layers.Dropout(dropout, dtype=dtype, name="output_dropout")(x)
        outputs = convnext.classifier(x, variant, num_classes, activation, dtype, named)
        Task.__init__(self, inputs=backbone.input, outputs=outputs, **kwargs)
        self.num_classes = num_classes
        self.activation = activation
        self.dropout = dropout
        self.head_dtype = head_dtype

    def get_config(self):
        head_dtype = self.head_dtype
        if head_dtype is not None:
            head_dtype = keras.dtype_policies.serialize(keras.dtype_policies.get(head_dtype))
        return {
            **Task.get_config(self),  # not the base class's, which has a pooling
            "num_classes": self.num_classes,
            "activation": keras.activations.serialize(keras.activations.get(self.activation)),
            "dropout": self.dropout,
            "head_dtype": head_dtype,
        }


@contextlib.contextmanager
def _policy(dtype):
    """Makes a policy the global one, with which layers are made."""
    before = keras.config.dtype_policy()
    if dtype is not None:
        keras.config.set_dtype_policy(keras.dtype_policies.get(dtype))
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _renamed(names, official):
    return names.get(official, official)


def _levels(image):
    """An array of pixels as uint8."""
    pixels = image if isinstance(image, np.ndarray) else keras.ops.convert_to_numpy(image)
    if pixels.dtype == np.uint8:
        return pixels
    return np.clip(np.rint(pixels.astype("float32")), 0, 255).astype("uint8")
