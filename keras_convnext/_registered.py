"""Registers every class that a saved model may name, by importing the modules that define them."""

from keras_convnext import convnext, detection, fcmae, models, segmentation  # noqa: F401
from keras_convnext.training import distillation, optimizer, schedule, segmentation_loss  # noqa: F401
