"""The initial values of kernels."""

import random

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable(package="keras_convnext")
class RandomNormal(keras.initializers.Initializer):
    """Draws weights from a normal distribution, on the host.

    On JAX `keras.initializers.RandomNormal` compiles one program for each shape: ten seconds for a ConvNeXt.

    Args:
        stddev: float. Default 0.02, as the official code initialises all its kernels. (It truncates at +-2,
            100 standard deviations, which is no truncation; `TruncatedNormal(0.02)` of Keras cuts at 2
            standard deviations, which shrinks the standard deviation of the result to 0.0176.)
        seed: int for the same values at every call, None for new ones, which follow
            `keras.utils.set_random_seed`.
    """

    def __init__(self, stddev=0.02, seed=None):
        self.stddev = stddev
        self.seed = seed

    def __call__(self, shape, dtype=None):
        seed = random.getrandbits(64) if self.seed is None else self.seed
        values = np.random.default_rng(seed).standard_normal(shape, dtype="float32") * np.float32(self.stddev)
        return ops.convert_to_tensor(values, dtype=dtype or keras.config.floatx())

    def get_config(self):
        return {"stddev": self.stddev, "seed": self.seed}
