"""Layers of the residual branch: LayerScale and stochastic depth."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_convnext.layers.casting import cast, float32_or_wider
from keras_convnext.layers.normalization import SameShape

_register = keras.saving.register_keras_serializable(package="keras_convnext")


@_register
class LayerScale(SameShape):
    """Multiplies each channel of a residual branch by a learned number.

    `y = gamma * x` for x (..., C) of any float dtype, in the compute dtype. The product is taken in float32:
    the usual start of 1e-6 has four bits left in float16.
    Reference: Touvron et al. 2021 (arXiv:2103.17239), equation 4; Liu et al. 2022, appendix A.1.

    Args:
        init_value: float, start of gamma. Default 1e-6, as in the ConvNeXt paper.
    """

    def __init__(self, init_value=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.init_value = init_value

    def build(self, input_shape):
        start = keras.initializers.Constant(self.init_value)
        self.gamma = self.add_channel_weight(input_shape, start, "gamma")

    def call(self, x):
        return cast(float32_or_wider(x) * float32_or_wider(self.gamma), self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "init_value": self.init_value}


@_register
class StochasticDepth(SameShape):
    """Drops a residual branch for a random part of the samples while training ("drop path").

    Each sample of x (N, ...) is kept with probability `1 - rate`, independently, and then divided by it, so
    that the expected value stays the same, and the dtype. Outside training the layer is the identity. In
    `divided_batch` the draws are those of the whole batch.
    Reference: Huang et al. 2016 (arXiv:1603.09382), section 3; timm layers/drop.py, `drop_path`.

    Args:
        rate: float in [0, 1), else a ValueError; probability of dropping a sample's branch.
        seed: int or None, for the layer's own `keras.random.SeedGenerator`; None draws from the seed that
            `keras.utils.set_random_seed` sets.
    """

    def __init__(self, rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(
                f"StochasticDepth needs a rate in [0, 1): the share of samples to drop. Received: rate={rate}"
            )
        self.rate = rate
        self.seed = seed
        if rate > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, x, training=False):
        if not training or self.rate == 0:
            return x
        keep = 1.0 - self.rate
        num_parts, part = _part_of_batch()
        count, ones = ops.shape(x)[0], (1,) * (len(x.shape) - 1)
        total = count if num_parts == 1 else num_parts * count
        draw = keras.random.uniform((total, *ones), dtype="float32", seed=self.seed_generator)
        if num_parts > 1:
            draw = ops.slice(draw, (part * count, *(0 for _ in ones)), (count, *ones))
        scale = ops.where(draw < keep, 1.0 / keep, 0.0)
        return x * cast(scale, x.dtype)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@contextlib.contextmanager
def divided_batch(part: Callable[[], tuple[int, Any]]) -> Iterator[None]:
    """Sets which slice of the global batch this replica holds, so that drop path equals that of one device.

    The layers then draw for the whole batch and take the draws of their slice. `part` is called where a layer
    is called; it returns the number of equal slices of the batch and, from 0, that of this replica, an int or
    an integer scalar tensor. JAX divides the batch itself and needs none of this.
    """
    global _part_of_batch
    before, _part_of_batch = _part_of_batch, part
    try:
        yield
    finally:
        _part_of_batch = before


def _whole_batch() -> tuple[int, Any]:
    return 1, 0


_part_of_batch: Callable[[], tuple[int, Any]] = _whole_batch
