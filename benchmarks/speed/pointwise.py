"""The ways to compute the products of the blocks, with bias and on the way up GELU; see `candidates`.

A shape is (N, H, W, C, D): the map, and the channels of the result. Where D is larger, GELU follows.
"""

import functools
import math
from collections.abc import Callable

import numpy as np

from benchmarks.speed import candidates, depthwise
from benchmarks.speed.candidates import Candidate

TITLE = "Pointwise product"

run = functools.partial(candidates.run, "pointwise")


def shapes(batch: int, image_size: int = 224) -> list[tuple[int, int, int, int, int]]:
    """Both products of a block of each of the four stages of `depthwise.ARCHITECTURE`."""
    maps = depthwise.shapes(batch, image_size)
    return [
        (*map_[:3], inputs, outputs)
        for map_ in maps
        for inputs, outputs in ((map_[3], 4 * map_[3]), (4 * map_[3], map_[3]))
    ]


def inputs(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Map, kernel, bias and gradient of the result."""
    draw = np.random.default_rng(0)
    *positions, narrow, wide = shape
    sizes = ((*positions, narrow), (narrow, wide), (wide,), (*positions, wide))
    x, kernel, bias, gradient = (draw.standard_normal(size, "float32") for size in sizes)
    return [x, kernel / math.sqrt(narrow), bias, gradient]


def further(shape: tuple[int, ...]) -> tuple[str]:
    """The activation, "gelu" or "none"."""
    return ("gelu" if shape[4] > shape[3] else "none",)


def expected(x, kernel, bias, gradient, activation) -> list[np.ndarray]:
    """Result and the gradients of map and kernel, by definition."""
    y = x @ kernel + bias
    if activation == "gelu":
        share = 0.5 * (1 + np.frompyfunc(math.erf, 1, 1)(y / math.sqrt(2)).astype("float64"))
        gradient = gradient * (share + y * np.exp(-0.5 * y**2) / math.sqrt(2 * math.pi))
        y = y * share
    return [y, gradient @ kernel.T, np.einsum("nhwc,nhwd->cd", x, gradient, optimize=True)]


def chosen(backend: str, device: str, shape: tuple[int, ...], mode: str) -> str:
    from keras_convnext.layers import pointwise

    if backend == "torch" and device == "cpu":
        return "oneDNN" if pointwise.takes_onednn(shape[-1], mode == "both") else "linear"
    return "two axes" if backend == "tensorflow" or (backend, device) == ("jax", "cpu") else _PLAIN[backend]


def candidates_of(backend: str, device: str) -> list[Candidate]:
    """The candidates of a backend: those of the package first."""
    return _CANDIDATES[backend](device)


def _of_package(function: Callable) -> Callable:
    def product(x, kernel, bias, activation):
        import keras

        return function(x, kernel, bias, keras.activations.gelu if activation == "gelu" else None)

    return product


def _tensorflow_candidates(device: str) -> list[Candidate]:
    import tensorflow as tf

    from keras_convnext.layers import pointwise

    def activated(y, activation):
        return tf.nn.gelu(y) if activation == "gelu" else y

    def four_axes(x, kernel, bias, activation):
        return activated(tf.matmul(x, kernel) + bias, activation)

    def convolution(x, kernel, bias, activation):
        return activated(tf.nn.bias_add(tf.nn.conv2d(x, kernel[None, None], 1, "SAME"), bias), activation)

    functions = {
        "two axes": _of_package(pointwise.tensorflow_product),
        "four axes": four_axes,
        "1x1 convolution": convolution,
    }
    return [
        Candidate(f"{name}, XLA" if compiler else name, function, compiler=compiler)
        for name, function in functions.items()
        for compiler in ("", "xla")
    ]


def _jax_candidates(device: str) -> list[Candidate]:
    import jax

    from keras_convnext.layers import pointwise

    def gelu_of_jax(x, kernel, bias, activation):
        y = x.reshape(-1, x.shape[-1]) @ kernel + bias
        y = jax.nn.gelu(y, approximate=False) if activation == "gelu" else y
        return y.reshape(*x.shape[:-1], -1)

    return [
        Candidate("two axes", _of_package(pointwise.jax_product)),
        Candidate("four axes", _of_package(pointwise.plain_product)),
        Candidate("two axes, JAX's GELU", gelu_of_jax),
    ]


def _torch_candidates(device: str) -> list[Candidate]:
    import torch

    from keras_convnext.layers import pointwise

    def matmul(x, kernel, bias, activation):
        y = x @ kernel + bias
        return torch.nn.functional.gelu(y) if activation == "gelu" else y

    linear = _of_package(pointwise.linear_product)
    found = [
        Candidate("linear", linear),
        Candidate("matmul", matmul),
        Candidate("linear, torch.compile", linear, compiler="torch.compile"),
    ]
    if device == "cpu":
        found.insert(0, Candidate("oneDNN", _of_package(pointwise.onednn_product)))
    return found


_PLAIN = {"jax": "four axes", "torch": "linear"}
_CANDIDATES: dict[str, Callable[[str], list[Candidate]]] = {
    "tensorflow": _tensorflow_candidates,
    "jax": _jax_candidates,
    "torch": _torch_candidates,
}
