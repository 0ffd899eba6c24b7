"""Registers all classes that a saved model may name, by importing their modules."""

from keras_convnext import convnext, models  # noqa: F401
from keras_convnext.exporting import deploy  # noqa: F401
from keras_convnext.training import distillation, optimizer, schedule  # noqa: F401
