"""Counts the operations of a model from its architecture."""

from keras_convnext.architecture import layers_of
from keras_convnext.variants import Variant

CLASSES = 1000


def multiply_adds(variant: Variant, image_size: int = 224, batch: int = 1, classes: int = CLASSES) -> int:
    """Counts those of convolutions and matrix products, 4.46e9 for ConvNeXt-T at 224 pixels."""
    return batch * sum(layer.multiply_adds for layer in layers_of(variant, image_size, classes))
