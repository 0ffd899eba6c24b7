"""Convolutions of channels-last maps: without copies on PyTorch, and of maps of several sizes."""

import functools
import itertools

import keras
import numpy as np
from keras import ops

from keras_convnext.layers.resizing import resize


@keras.saving.register_keras_serializable(package="keras_convnext")
class Convolution2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D`, without the two copies of each map that Keras makes on PyTorch.

    Keras turns a channels-last map into a channels-first one and back in front of the library's kernel, which
    takes it as it is. Arguments, weights and result are those of `keras.layers.Conv2D`.
    """

    def convolution_op(self, inputs, kernel):
        is_plain = self.padding == "same" and self.strides == (1, 1) and self.data_format == "channels_last"
        is_odd = all(size % 2 for size in self.kernel_size)  # as much in front as behind
        if keras.backend.backend() != "torch" or not (is_plain and is_odd):
            return super().convolution_op(inputs, kernel)
        import torch

        kernel = keras.ops.convert_to_tensor(kernel)
        padding = [
            rate * (size // 2) for rate, size in zip(self.dilation_rate, self.kernel_size, strict=True)
        ]
        y = torch.nn.functional.conv2d(
            inputs.permute(0, 3, 1, 2),
            kernel.permute(3, 2, 0, 1),
            padding=padding,
            dilation=self.dilation_rate,
            groups=self.groups,
        )
        return y.permute(0, 2, 3, 1)


@keras.saving.register_keras_serializable(package="keras_convnext")
class ConvolutionOfMaps(Convolution2D):
    """A convolution of several maps: those after the first are resized to its size and joined behind it.

    Result and kernel are those of `ResizeLike` for each map, `Concatenate` and `Convolution2D` with
    padding "same" and stride 1. As resizing and the products with a tap's kernel can change places, the
    products are taken at each map's own size, and a matrix for each axis resizes and shifts them: UPerNet's
    last convolution, of maps of 128, 64, 32 and 16 pixels, so needs 33 % of the multiply-adds. That is done
    where sizes are known and each further map has at most half the positions of the first.

    Args:
        splits: bool. False: join the maps in every case, for files of other runtimes.
        Others: of `keras.layers.Conv2D`.

    Call arguments:
        maps: list of (N, H, W, C), (N, h, w, D), ...

    Returns:
        (N, H, W, filters).
    """

    def __init__(self, filters, kernel_size, splits=True, **kwargs):
        super().__init__(filters, kernel_size, **{"padding": "same", "data_format": "channels_last"} | kwargs)
        self.splits = splits
        self.input_spec = None  # a list, which Keras's own does not describe

    def build(self, input_shape):
        super().build(_joined_shape(input_shape))
        self.input_spec = None

    def call(self, inputs):
        first, *others = inputs
        size = tuple(ops.shape(first)[1:3])
        small = [tuple(ops.shape(each)[1:3]) for each in others]
        are_known = all(isinstance(side, int) for side in (*size, *itertools.chain(*small)))
        if not (self.splits and are_known and all(2 * h * w <= size[0] * size[1] for h, w in small)):
            resized = [resize(each, size) for each in others]
            return super().call(ops.concatenate([first, *resized], axis=-1))
        kernels = []  # of each map
        start = 0
        for each in inputs:
            kernels.append(self.kernel[:, :, start : start + each.shape[-1]])
            start += each.shape[-1]
        y = self.convolution_op(first, kernels[0])
        for each, kernel in zip(others, kernels[1:], strict=True):
            y = y + _convolved_after_resizing(each, kernel, size)
        if self.use_bias:
            y = y + self.bias
        return self.activation(y)

    def compute_output_shape(self, input_shape):
        return super().compute_output_shape(_joined_shape(input_shape))

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(
            self.compute_output_shape([each.shape for each in inputs]), dtype=self.compute_dtype
        )

    def get_config(self):
        return {**super().get_config(), "splits": self.splits}


def _joined_shape(shapes):
    if not isinstance(shapes[0], tuple | list):
        return shapes  # of the joined maps: Keras's own `build` asks for theirs
    return (*shapes[0][:3], sum(shape[3] for shape in shapes))


def _convolved_after_resizing(x, kernel, size):
    """The convolution (N, H, W, D) of a map (N, h, w, C) that is resized to `size` = (H, W), each an int."""
    batch, height, width, channels = ops.shape(x)
    rows, columns, _, filters = kernel.shape
    down = _resize_and_shift(height, size[0], rows).reshape(size[0], rows * height)
    across = _resize_and_shift(width, size[1], columns).swapaxes(1, 2).reshape(size[1], width * columns)
    down, across = (ops.convert_to_tensor(matrix, dtype=x.dtype) for matrix in (down, across))
    products = []
    for row in range(rows):
        taps = ops.reshape(ops.transpose(kernel[row], (1, 0, 2)), (channels, columns * filters))
        y = ops.reshape(ops.matmul(x, taps), (batch, height, width * columns, filters))
        products.append(ops.matmul(across, y))  # (N, h, W, D)
    y = ops.reshape(ops.concatenate(products, axis=1), (batch, rows * height, size[1] * filters))
    return ops.reshape(ops.matmul(down, y), (batch, *size, filters))


@functools.lru_cache(maxsize=64)
def _resize_and_shift(own, target, taps):
    """(target, taps, own): what resizes an axis bilinearly from `own` to `target` positions.

    Pixel centres are half-way. Tap t reads t - taps // 2 positions further, and zeros beyond the ends.
    """
    place = np.clip((np.arange(target) + 0.5) * own / target - 0.5, 0, own - 1)
    low = np.floor(place).astype(int)
    resize = np.zeros((target, own))
    np.add.at(resize, (np.arange(target), low), 1 - (place - low))
    np.add.at(resize, (np.arange(target), np.minimum(low + 1, own - 1)), place - low)
    padded = np.pad(resize, ((taps // 2, taps // 2), (0, 0)))
    return np.stack([padded[tap : tap + target] for tap in range(taps)], axis=1)
