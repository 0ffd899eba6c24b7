"""Maps of another size: average pooling to a number of cells, and bilinear resizing to the size of a map."""

import keras
import numpy as np
from keras import ops

from keras_convnext.layers.casting import cast, float32_or_wider

_register = keras.saving.register_keras_serializable(package="keras_convnext")


@_register
class AdaptiveAveragePooling2D(keras.layers.Layer):
    """Averages a map to `cells` x `cells`, whatever its size: x (N, H, W, C) to (N, cells, cells, C).

    Cell i of an axis of n positions is the mean of the positions from `floor(i n / cells)` to
    `ceil((i + 1) n / cells) - 1`. Neighbouring cells overlap where `cells` does not divide n, and there plain
    pooling gives something else. Computed as one matrix product for each axis, in float32 or wider: the
    matrix is a constant where the size is known, so that each export format has it.
    Reference: `torch.nn.AdaptiveAvgPool2d`; Zhao et al. 2017 (arXiv:1612.01105), section 3.2.

    Args:
        cells: int from 1 up, number of cells of each axis.
    """

    def __init__(self, cells, **kwargs):
        super().__init__(**kwargs)
        self.cells = cells

    def call(self, x):
        height, width = ops.shape(x)[1:3]
        y = float32_or_wider(x)
        y = ops.einsum("sh,nhwc->nswc", _averages(height, self.cells, y.dtype), y)
        y = ops.einsum("tw,nswc->nstc", _averages(width, self.cells, y.dtype), y)
        return cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.cells, self.cells, input_shape[3])

    def get_config(self):
        return {**super().get_config(), "cells": self.cells}


@_register
class ResizeLike(keras.layers.Layer):
    """Resizes the first of two maps to the height and width of the second, bilinearly.

    Pixel centres are half-way (`align_corners=False`), without antialiasing: (N, h, w, C) and (N, H, W, D) to
    (N, H, W, C).
    """

    def call(self, inputs):
        x, like = inputs
        return resize(x, tuple(ops.shape(like)[1:3]))

    def compute_output_shape(self, input_shape):
        shape, like = input_shape
        return (shape[0], *like[1:3], shape[3])


def resize(x, size):
    """Resizes a map (N, h, w, C) as `ResizeLike` does, to `size` = (H, W), each an int or a tensor of one."""
    own = tuple(ops.shape(x)[1:3])
    # Only where both are numbers: a comparison of free sizes would fix them in what `torch.export` makes.
    are_known = all(isinstance(side, int) for side in own + size)
    if are_known and own == size:
        return x
    if not are_known and keras.backend.backend() == "tensorflow":
        import tensorflow as tf  # Keras asks whether a side is positive, which a graph cannot tell

        return cast(tf.image.resize(x, size, "bilinear"), x.dtype)
    return ops.image.resize(x, size, interpolation="bilinear", antialias=False, data_format="channels_last")


def _averages(size, cells, dtype):
    """(cells, size): row i averages the positions of cell i. `size` is an int, or a tensor of one."""
    library = np if isinstance(size, int) else ops
    # With a dtype, which Keras does not find out of the sizes that `torch.export` leaves free.
    cell, position = (library.arange(n, dtype="int32") for n in (cells, size))
    cell, position = cell[:, None], position[None, :]
    start, end = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
    is_inside = (position >= start) & (position < end)
    if library is np:
        return ops.convert_to_tensor(is_inside / (end - start), dtype=dtype)
    return ops.cast(is_inside, dtype) / ops.cast(end - start, dtype)
