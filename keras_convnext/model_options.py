"""`ModelOptions`: what `load` and the constructors take besides a name and weights, and its checks."""

import dataclasses
import logging
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_convnext.data.preprocessing import is_positive_integer
from keras_convnext.layers.pointwise import TOO_SMALL
from keras_convnext.variants import Variant
from keras_convnext.weights.resolve import IMAGENET_CLASSES, ResolvedWeights

_logger = logging.getLogger("keras_convnext")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The arguments that the docstrings of `load` and the constructors tell of. Checked when made.

    None for `include_top`, `classes`, `input_shape` and `name` leaves them to weights and architecture.
    """

    include_top: Any = None  # bool
    include_preprocessing: bool = True
    input_tensor: Any = None
    input_shape: Any = None  # (height, width, channels)
    pooling: str | None = None
    classes: Any = None  # int
    classifier_activation: Any = "default"
    name: str | None = None
    drop_path_rate: float = 0.0
    layer_scale_init_value: float | None = None
    output_stride: int = 32
    pyramid_norms: bool = False
    rematerialize: bool = False
    seed: int | None = None
    new_head: bool | None = None

    def __post_init__(self) -> None:
        rate, scale, classes = self.drop_path_rate, self.layer_scale_init_value, self.classes
        is_rate = isinstance(rate, numbers.Real) and 0 <= rate < 1
        is_scale = scale is None or (isinstance(scale, numbers.Real) and scale >= 0)
        is_width = self.include_top is False or classes is None or is_positive_integer(classes)
        rules = {
            "pooling": (self.pooling in (None, "avg", "max"), "None, 'avg' or 'max'"),
            "classes": (is_width, "a whole number from 1 up"),
            "drop_path_rate": (is_rate, "in [0, 1), the share of samples whose last block is dropped"),
            "layer_scale_init_value": (is_scale, "above 0, or 0 for no LayerScale"),
            "seed": (self.seed is None or _is_seed(self.seed), "None or a whole number of 32 bits"),
            "output_stride": (self.output_stride in (8, 16, 32), "8, 16 or 32"),
        }
        for name, (is_right, expected) in rules.items():
            if not is_right:
                raise ValueError(f"{name} must be {expected}. Received: {name}={getattr(self, name)!r}")
        if self.seed is not None:  # Keras takes no integer of NumPy
            object.__setattr__(self, "seed", int(self.seed))
        shape = self.input_shape
        if self.input_tensor is not None:
            if not keras.utils.is_keras_tensor(self.input_tensor):
                raise ValueError(
                    "input_tensor must be a Keras tensor, the output of keras.Input(...) or of a layer. "
                    f"Received: {type(self.input_tensor).__name__}"
                )
            shape = tuple(self.input_tensor.shape[1:])
        if shape is not None:
            _check_input_shape(shape)
            object.__setattr__(self, "input_shape", tuple(shape))

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "ModelOptions":
        """The options among the arguments of a constructor."""
        return cls(**{field.name: arguments[field.name] for field in dataclasses.fields(cls)})

    def changed(self, variant: Variant) -> Variant:
        """The architecture with what the options set in it."""
        if self.layer_scale_init_value is None:
            return variant
        return dataclasses.replace(variant, layer_scale_init_value=self.layer_scale_init_value or None)

    def settled(self, source: ResolvedWeights) -> "ModelOptions":
        """The options with what None leaves to the weights, checked against the architecture."""
        variant, available = source.variant, source.classes
        include_top, activation = self.include_top, self.classifier_activation
        if include_top is None:
            include_top = available > 0 or self.classes is not None
            if not include_top and source.beside and not self.new_head:
                raise ValueError(
                    f"{source.path} has no classifier of a ConvNeXt.{source.beside} Pass include_top=False "
                    "for the features without that, or classes=... and new_head=True to start one."
                )
        classes = self.classes or available or IMAGENET_CLASSES
        if isinstance(activation, str) and activation == "default":
            activation = "softmax" if self.new_head else source.activation(self.classes or available)
        if include_top and classes == 1 and activation == "softmax":
            raise ValueError(
                "A softmax over one class is always 1. Received: classes=1, classifier_activation='softmax'. "
                "Pass classifier_activation='sigmoid', or None for logits, or classes=2."
            )
        # A `.keras` file by itself stays the model it is; beside a name the arguments decide.
        is_normalised = source.architecture is not None or source.is_normalised
        if is_normalised and self.include_preprocessing and not source.is_normalised:
            _logger.warning(
                "%s has no normaliser; this model has one, unless include_preprocessing=False.", source.path
            )
        if not is_normalised and not source.around.lost:
            _logger.warning("%s has no normaliser, so its model takes normalised images.", source.path)
        # So does one without classifier.
        pooling, pyramid_norms = self.pooling, self.pyramid_norms
        if self.include_top is None and not include_top and source.architecture is None and source.is_model:
            pyramid_norms = pyramid_norms or source.contents.pyramid_norms
            pooling = pooling or source.around.pooling
        shape = self.input_shape
        if shape is None:
            shape = (*(source.input_sides if include_top else (None, None)), source.channels)
        if variant.version == 2 and self.layer_scale_init_value is not None:
            raise ValueError(
                f"{variant.name!r} is a ConvNeXt V2, whose blocks have no LayerScale (GRN replaced it). "
                f"Received: layer_scale_init_value={self.layer_scale_init_value}. Leave it out."
            )
        if variant.isotropic and self.output_stride != 32:
            raise ValueError(
                f"{variant.name!r} has stride 16 throughout and takes no output_stride. Received: "
                f"output_stride={self.output_stride}"
            )
        if pyramid_norms and (include_top or pooling or variant.isotropic):
            raise ValueError(
                "pyramid_norms=True returns the four normalised stage maps: it needs include_top=False, "
                "pooling=None and a model that has stages. Received: "
                f"include_top={include_top}, pooling={pooling!r}, architecture {variant.name!r}"
            )
        return dataclasses.replace(
            self,
            include_top=include_top,
            include_preprocessing=self.include_preprocessing and is_normalised,
            input_shape=shape,
            pooling=pooling,
            pyramid_norms=pyramid_norms,
            classes=int(classes),
            classifier_activation=activation,
            name=self.name or variant.name,
        )


def _is_seed(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < 2**31


def _check_input_shape(shape: Any) -> None:
    """Refuses what is not (height, width, channels), with the reason."""
    wanted = "(height, width, channels), each side None or 32 and more, at least one channel"
    is_triple = isinstance(shape, Sequence) and len(shape) == 3
    reason = ""
    if not is_triple or any(side is not None and not is_positive_integer(side) for side in shape[:2]):
        reason = f"input_shape must be {wanted}"
    elif not is_positive_integer(shape[2]):
        reason = f"The number of channels must be a whole number from 1 up, in input_shape {wanted}"
    elif any(side is not None and side < 32 for side in shape[:2]):
        reason = TOO_SMALL
    if reason:
        raise ValueError(f"{reason}. Received: input_shape={shape}")
