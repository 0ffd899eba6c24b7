"""The ways to compute the depthwise convolution of the blocks; see `candidates`."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from benchmarks.speed import candidates
from benchmarks.speed.candidates import Candidate
from keras_convnext._environment import tensorflow_has_onednn
from keras_convnext.architecture import layers_of
from keras_convnext.variants import VARIANTS

TITLE = "Depthwise convolution"
KERNEL_SIZE = 7
ARCHITECTURE = "convnext_tiny"  # whose stages give the shapes

run = functools.partial(candidates.run, "depthwise")


def shapes(batch: int, image_size: int = 224) -> list[tuple[int, int, int, int]]:
    """(N, H, W, C) of the four stages of `ARCHITECTURE` for square images of `image_size` pixels."""
    layers = layers_of(VARIANTS[ARCHITECTURE], image_size)
    firsts = [layer for layer in layers if layer.name.endswith(".0.dwconv")]
    if firsts[-1].side == 0:
        raise ValueError(f"Expected images of 32 pixels or more, which leave a map. Received: {image_size}")
    return [(batch, layer.side, layer.side, layer.outputs) for layer in firsts]


def inputs(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Map, kernel, bias and gradient of the result."""
    draw = np.random.default_rng(0)
    channels = shape[3]
    sizes = (shape, (KERNEL_SIZE, KERNEL_SIZE, channels, 1), (channels,), shape)
    return [draw.standard_normal(size, "float32") for size in sizes]


def further(shape: tuple[int, ...]) -> tuple[int]:
    """The dilation."""
    return (1,)


def chosen(backend: str, device: str, shape: tuple[int, ...], mode: str) -> str:
    from keras_convnext.layers.depthwise import chosen_path

    return chosen_path(backend, device)


def expected(x, kernel, bias, gradient, dilation) -> list[np.ndarray]:
    """Result and the gradients of map and kernel, by definition, at dilation 1."""
    kernel = kernel[..., 0]
    size, (height, width) = len(kernel), x.shape[1:3]
    margin = size // 2
    border = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    padded = np.pad(x, border)
    result, padded_gradient = np.zeros_like(x), np.zeros_like(padded)
    kernel_gradient = np.zeros_like(kernel)
    for row in range(size):
        for column in range(size):
            window = np.s_[:, row : row + height, column : column + width]
            result += padded[window] * kernel[row, column]
            padded_gradient[window] += gradient * kernel[row, column]
            kernel_gradient[row, column] = np.einsum("nhwc,nhwc->c", padded[window], gradient)
    x_gradient = padded_gradient[:, margin : margin + height, margin : margin + width]
    return [result + bias, x_gradient, kernel_gradient[..., None]]


def candidates_of(backend: str, device: str) -> list[Candidate]:
    """The candidates of a backend on a device: those of the package first, then the others."""
    from keras_convnext.layers.depthwise import PATHS

    found = [Candidate(name, function) for name, function in PATHS[backend].items()]
    names = {candidate.name for candidate in found}
    return found + [candidate for candidate in _OTHERS[backend](device) if candidate.name not in names]


def shifted_products(x, kernel, bias, dilation, pad):
    """The convolution as the sum of K * K products of the shifted map with one row of weights.

    Args:
        x: (N, H, W, C).
        kernel: (K, K, C, 1).
        bias: (C,); its dtype is that of the sum when it is the wider one.
        dilation: int, distance between the taps.
        pad: function (x, margin) -> x with that many zeros around height and width.
    """
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    source, total = pad(x, (size - 1) * dilation // 2), bias
    for row in range(0, size * dilation, dilation):
        for column in range(0, size * dilation, dilation):
            window = source[:, row : row + height, column : column + width]
            total = total + window * kernel[row // dilation, column // dilation, :, 0]
    return total


def _tensorflow_candidates(device: str) -> list[Candidate]:
    import tensorflow as tf

    def library(x, kernel, bias, dilation):
        return tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME", dilations=[dilation, dilation]) + bias

    def grouped(x, kernel, bias, dilation):
        return tf.nn.conv2d(x, tf.transpose(kernel, [0, 1, 3, 2]), 1, "SAME", dilations=dilation) + bias

    def pad(x, margin):
        return tf.pad(x, [[0, 0], [margin, margin], [margin, margin], [0, 0]])

    shifted = functools.partial(shifted_products, pad=pad)
    functions: dict[str, Callable] = {
        "library": library,
        "grouped Conv2D": grouped,
        "shifted products": shifted,
    }
    found = [
        Candidate(f"{name}, XLA" if compiler else name, function, compiler=compiler)
        for name, function in functions.items()
        for compiler in ("", "xla")
    ]
    if device == "cpu" and not tensorflow_has_onednn():  # TensorFlow's own kernels lack that gradient
        found = [dataclasses.replace(each, has_gradient=each.name != "grouped Conv2D") for each in found]
    return found


def _jax_candidates(device: str) -> list[Candidate]:
    import jax
    import jax.numpy as jnp

    def pad(x, margin):
        return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    def channels_first(x, kernel, bias, dilation):
        y = jax.lax.conv_general_dilated(
            x,
            kernel.transpose(2, 3, 0, 1),  # (C, 1, K, K)
            (1, 1),
            "SAME",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=kernel.shape[2],
        )
        return y + bias[:, None, None]

    def widened(bias):
        return bias.astype(jnp.promote_types(bias.dtype, jnp.float32))

    def shifted(x, kernel, bias, dilation):
        return shifted_products(x, kernel, widened(bias), dilation, pad).astype(x.dtype)

    def row_loop(x, kernel, bias, dilation):
        size, (height, width) = kernel.shape[0], x.shape[1:3]
        source = pad(x, (size - 1) * dilation // 2)

        def add_row(total, row):
            rows = jax.lax.dynamic_slice_in_dim(source, row * dilation, height, axis=1)
            for column in range(size):
                left = column * dilation
                total = total + rows[:, :, left : left + width] * kernel[row, column, :, 0]
            return total, None

        start = jnp.broadcast_to(widened(bias), x.shape)
        return jax.lax.scan(add_row, start, jnp.arange(size))[0].astype(x.dtype)

    return [
        Candidate("library, NCHW", channels_first, layout="NCHW"),
        Candidate("shifted products, JAX's gradient", shifted),
        Candidate("loop over the kernel's rows", row_loop),
    ]


def _torch_candidates(device: str) -> list[Candidate]:
    import torch
    import torch.nn.functional as F

    def channels_first(x, kernel, bias, dilation):
        margin = (kernel.shape[0] - 1) * dilation // 2
        weight = kernel.permute(2, 3, 0, 1)  # (C, 1, K, K)
        return F.conv2d(x, weight, bias, padding=margin, dilation=dilation, groups=x.shape[1])

    def without_library(x, kernel, bias, dilation):
        with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
            # The permuted view is PyTorch's channels-last format: nothing is copied.
            return channels_first(x.permute(0, 3, 1, 2), kernel, bias, dilation).permute(0, 2, 3, 1)

    def one_dnn(x, kernel, bias, dilation):
        margin = (kernel.shape[0] - 1) * dilation // 2
        y = torch.ops.mkldnn._convolution_pointwise(
            x.permute(0, 3, 1, 2),
            kernel.permute(2, 3, 0, 1),
            bias,
            [margin, margin],
            [1, 1],
            [dilation, dilation],
            x.shape[3],
            "none",
            [],
            "",
        )
        return y.permute(0, 2, 3, 1)

    shifted = functools.partial(
        shifted_products, pad=lambda x, margin: F.pad(x, (0, 0, margin, margin, margin, margin))
    )
    found = [
        Candidate("library, channels-first", channels_first, layout="NCHW"),
        Candidate(f"{'cuDNN' if device == 'gpu' else 'oneDNN'} off", without_library),
        Candidate("shifted products", shifted),
        Candidate("shifted products, torch.compile", shifted, compiler="torch.compile"),
    ]
    if device == "cpu":
        found.append(Candidate("oneDNN, called directly", one_dnn, has_gradient=False))
    return found


_OTHERS = {"tensorflow": _tensorflow_candidates, "jax": _jax_candidates, "torch": _torch_candidates}
