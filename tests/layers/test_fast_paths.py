"""Each fast path gives the value and the gradients of the plain computation.

The plain computation is a formula in float64, differentiated by PyTorch, or Keras's own layer with the same
weights. Values are compared elementwise, and each comparison has a mistake that it must find.
"""

import collections
import csv
import functools
import math
import os
import pathlib
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
import torch
from layer_contract import BACKEND, as_numpy, forward, gradients, randomize, relative_error

from benchmarks.speed import candidates
from keras_convnext import (
    ConvNeXtBlock,
    ConvNeXtV2Block,
    DepthwiseConv2D,
    GlobalResponseNormalization,
    LayerNormalization,
    _environment,
    load,
)
from keras_convnext.convnext import ACTIVATIONS
from keras_convnext.layers import bfloat16, chunking, depthwise
from keras_convnext.layers import pointwise as pointwise_module
from keras_convnext.layers.initializers import RandomNormal
from keras_convnext.layers.pointwise import PatchConv2D, _product, pointwise

# Of the largest value. bfloat16 rounds by up to 2^-9; product, bias and activation do so one after the other.
TOLERANCES = {"float32": 2e-6, "bfloat16": 2**-7}
TOLERANCE = TOLERANCES["float32"]
# TensorFlow and XLA on a CPU add up the gradient of a bias in bfloat16, in Keras's own layers too; the maps
# here are small enough for its sign and first digit.
BIAS_TOLERANCES = {"float32": 2e-6, "bfloat16": 2**-7 if BACKEND == "torch" else 2**-4}

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")


def sample(shape, dtype="float32", seed=1):
    """A tensor of normal values."""
    values = np.random.default_rng(seed).normal(size=shape).astype("float32")
    return keras.ops.cast(keras.ops.convert_to_tensor(values), dtype)


def with_random_weights(layer, shape):
    """The layer, built; weights that bfloat16 holds exactly, so that only the arithmetic rounds."""
    if not layer.built:
        layer.build(shape)
    randomize(layer)
    layer.set_weights(
        [weight.astype(ml_dtypes.bfloat16).astype(weight.dtype) for weight in layer.get_weights()]
    )
    return layer


class Calls(keras.layers.Layer):
    """`function(layer, x)`, in the layer's compute dtype."""

    def __init__(self, layer, function):
        super().__init__(dtype=layer.compute_dtype)
        self.layer, self.function = layer, function
        self.built = True

    def call(self, x):
        return self.function(self.layer, x)


def computed(layer, x, upstream):
    """[output, gradient of x, gradient of each weight] of `sum(layer(x) * upstream)`."""
    y, dx, dweights = gradients(layer, x, upstream)
    return [y, dx, *dweights]


def derived(function, x, weights, upstream):
    """The same of `function(x, *weights)`, in float64."""
    x, upstream = (as_numpy(value) for value in (x, upstream))
    inputs = [torch.tensor(np.array(value, "float64"), requires_grad=True) for value in (x, *weights)]
    y = function(*inputs)
    slopes = torch.autograd.grad((y * torch.tensor(upstream.astype("float64"))).sum(), inputs)
    return [value.detach().numpy() for value in (y, *slopes)]


def errors(actual, expected):
    return [relative_error(one, other) for one, other in zip(actual, expected, strict=True)]


def assert_equal_but_for_rounding(actual, expected, dtype):
    *rest, bias = errors(actual, expected)
    assert max(rest) < TOLERANCES[dtype]
    assert bias < BIAS_TOLERANCES[dtype]


def erf_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    None: lambda x: x,
    "gelu": erf_gelu,
    "gelu_tanh": tanh_gelu,
    "silu": lambda x: x * torch.sigmoid(x),
}


def sum_over_taps(x, kernel, bias, dilation=1):
    """The depthwise convolution: x (N, H, W, C), kernel (K, K, C, 1)."""
    height, width = x.shape[1:3]
    size = kernel.shape[0]
    margin = (size - 1) * dilation // 2
    source = torch.nn.functional.pad(x, (0, 0, margin, margin, margin, margin))
    total = torch.zeros_like(x)
    for row in range(size):
        for column in range(size):
            top, left = row * dilation, column * dilation
            total = total + source[:, top : top + height, left : left + width] * kernel[row, column, :, 0]
    return total + bias


def patch_product(x, kernel, bias):
    """The convolution of patches side by side; what is left over at the end is not looked at."""
    size, _, channels, _ = kernel.shape
    height, width = x.shape[1] // size, x.shape[2] // size
    x = x[:, : height * size, : width * size].reshape(-1, height, size, width, size, channels)
    return torch.einsum("nhawbc,abcd->nhwd", x, kernel) + bias


def layer_norm(x, gamma, beta, epsilon=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return gamma * x / torch.sqrt((x**2).mean(-1, keepdim=True) + epsilon) + beta


def respond(x, gamma, beta, epsilon=1e-6):
    norm = torch.sqrt((x**2).sum((1, 2), keepdim=True))
    return gamma * (x * (norm / (norm.mean(-1, keepdim=True) + epsilon))) + beta + x


# Depthwise convolution. Where dilation is 4, a 7x7 kernel reaches far beyond the map on every side.

SHAPE_OF_DILATION = {1: (1, 7, 10, 4), 2: (3, 5, 8, 3), 4: (1, 10, 7, 2)}
CONVOLUTIONS = [
    (path, size, dilation, "float32")
    for path in depthwise.PATHS[BACKEND]
    for size in (3, 5, 7)
    for dilation in (1, 2, 4)
] + [
    (path, size, dilation, "bfloat16")
    for path in depthwise.PATHS[BACKEND]
    for size, dilation in ((7, 1), (3, 2))
]


@functools.cache
def convolved(path, size, dilation, dtype="float32"):
    """(what the layer computes on a path, its weights, x, upstream)."""
    shape = SHAPE_OF_DILATION[dilation]
    policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
    layer = with_random_weights(DepthwiseConv2D(size, dilation, dtype=policy), shape)
    x, upstream = sample(shape, dtype), sample(shape, dtype, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "chosen_path", lambda *_: path)
        return computed(layer, x, upstream), layer.get_weights(), x, upstream


@pytest.mark.parametrize(("path", "size", "dilation", "dtype"), CONVOLUTIONS)
def test_every_depthwise_path_equals_the_sum_over_taps(path, size, dilation, dtype):
    actual, (kernel, bias), x, upstream = convolved(path, size, dilation, dtype)
    formula = functools.partial(sum_over_taps, dilation=dilation)
    assert_equal_but_for_rounding(actual, derived(formula, x, (kernel, bias), upstream), dtype)
    mistakes = {
        "transposed": (kernel.transpose(1, 0, 2, 3), bias),
        "flipped": (kernel[::-1, ::-1], bias),
        "no bias": (kernel, 0 * bias),
    }
    for name, weights in mistakes.items():
        wrong = derived(formula, x, weights, upstream)
        assert relative_error(actual[0], wrong[0]) > 10 * TOLERANCES[dtype], name
        if name != "no bias":  # of which the gradients know nothing
            assert relative_error(actual[1], wrong[1]) > 10 * TOLERANCES[dtype], name
    assert relative_error(actual[2][::-1, ::-1], actual[2]) > 10 * TOLERANCES[dtype]  # else order hides


@pytest.mark.parametrize("dilation", [1, 2])
def test_depthwise_paths_equal_the_layer_of_keras(dilation):
    path = depthwise.chosen_path(BACKEND, "cpu")
    actual, weights, x, upstream = convolved(path, 5, dilation)
    plain = keras.layers.DepthwiseConv2D(
        5, padding="same", dilation_rate=dilation, data_format="channels_last"
    )
    plain.build(x.shape)
    plain.set_weights(weights)
    assert max(errors(actual, computed(plain, x, upstream))) < TOLERANCE


def test_the_layer_takes_the_chosen_path_which_exists(monkeypatch):
    for device in ("cpu", "gpu", "tpu"):
        assert depthwise.chosen_path(BACKEND, device) in depthwise.PATHS[BACKEND]
    taken = []
    for name in depthwise.PATHS[BACKEND]:
        monkeypatch.setitem(
            depthwise.PATHS[BACKEND],
            name,
            lambda x, kernel, bias, dilation, name=name: taken.append(name) or x,
        )
    DepthwiseConv2D(3)(sample((1, 4, 5, 2)))
    assert taken == [depthwise.chosen_path(BACKEND, "cpu")]


@pytest.fixture(params=["oneDNN", "linear"] if BACKEND == "torch" else ["the only one"])
def either_product(request, monkeypatch):
    """PyTorch's two products in turn, whichever this processor takes."""
    monkeypatch.setattr(pointwise_module, "takes_onednn", lambda *_: request.param == "oneDNN")


of_either_product = pytest.mark.usefixtures("either_product")


MEASURED = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed" / "results"


@pytest.mark.once
@pytest.mark.parametrize(
    "table",
    ["pointwise_avx2", "pointwise_avx512", "pointwise_avx512_intel", "depthwise_avx2", "depthwise_avx512"],
)
def test_what_the_package_takes_is_within_a_tenth_of_the_fastest_that_was_measured(table, monkeypatch):
    operation, capability = table.split("_")[:2]
    processor = (MEASURED / f"{table}.md").read_text().splitlines()[0]
    assert ("Intel" in processor) == table.endswith("intel")
    monkeypatch.setattr(_environment, "cpu_name", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", capability.upper)
    monkeypatch.setattr(_environment, "has_bfloat16", lambda backend: True)  # as where it was measured
    monkeypatch.setattr(pointwise_module, "takes_onednn", pointwise_module.takes_onednn.__wrapped__)
    milliseconds = collections.defaultdict(collections.Counter)  # case -> candidate -> sum of the shapes
    with open(MEASURED / f"{table}.csv", newline="") as file:
        for row in csv.DictReader(file):
            backend, name = row["backend"], row["candidate"]
            for mode in ("forward", "both"):
                times = milliseconds[backend, row["shape"].partition("x")[0], mode]
                shape = tuple(map(int, row["shape"].split("x")))
                is_taken = name == candidates.module_of(operation).chosen(backend, "cpu", shape, mode)
                assert (mode in row["chosen"].split()) == is_taken
                if is_taken:
                    times["taken"] += float(row[mode])
                # Compilers and the layout are of the whole model: a user's choice, XLA's convolution is slow.
                others = ("compile", "XLA", "NCHW", "channels-first")
                if row[mode] and not any(word in name for word in others):
                    times[name] += float(row[mode])
    assert milliseconds.keys() == {
        (backend, batch, mode)
        for backend in (["torch"] if table.endswith("intel") else depthwise.PATHS)
        for batch in ("18" if operation == "pointwise" or backend == "torch" else "8")
        for mode in ("forward", "both")
    }
    if operation == "depthwise":
        del milliseconds["torch", "8", "forward"]  # which runs in chunks of a sample or two
    for case, times in milliseconds.items():
        assert 0 < times["taken"] <= 1.1 * min(times.values()), (case, times)


# The products of the blocks. Wider and narrower, as in a block; kernel gradients take a way each.

WIDTHS = {"wider": (6, 24), "narrower": (24, 6)}
POINTWISE = [
    *((activation, "wider", (1, 7, 10), "float32") for activation in FORMULAS),
    (None, "narrower", (3, 5, 7), "float32"),
    (None, "narrower", (1, 7, 10), "bfloat16"),
    ("gelu", "wider", (3, 5, 7), "bfloat16"),
    ("silu", "wider", (3, 5, 7), "bfloat16"),
]


def dense(widths, dtype="float32"):
    inputs, units = WIDTHS[widths]
    policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
    return with_random_weights(
        keras.layers.Dense(units, kernel_initializer=RandomNormal(), dtype=policy), (None, inputs)
    )


def applied(layer, activation):
    """`pointwise` of the layer, as a layer."""
    return Calls(layer, lambda layer, x: pointwise(layer, x, ACTIVATIONS.get(activation)))


def plainly(layer, activation):
    """What `pointwise` stands for, in Keras's own words."""
    activate = ACTIVATIONS.get(activation, lambda x: x)
    return Calls(layer, lambda layer, x: activate(layer(x)))


def operands(widths, positions, dtype="float32"):
    inputs, units = WIDTHS[widths]
    return sample((*positions, inputs), dtype), sample((*positions, units), dtype, seed=2)


def product_formula(activation):
    return lambda x, kernel, bias: FORMULAS[activation](x @ kernel + bias)


@of_either_product
@pytest.mark.parametrize(("activation", "widths", "positions", "dtype"), POINTWISE)
def test_pointwise_equals_the_product_in_float64(activation, widths, positions, dtype):
    layer = dense(widths, dtype)
    x, upstream = operands(widths, positions, dtype)
    kernel, bias = layer.get_weights()
    actual = computed(applied(layer, activation), x, upstream)
    formula = product_formula(activation)
    assert_equal_but_for_rounding(actual, derived(formula, x, (kernel, bias), upstream), dtype)

    wrong = derived(formula, x, (kernel, 0 * bias), upstream)
    assert relative_error(actual[0], wrong[0]) > 10 * TOLERANCES[dtype]
    if activation is not None:  # else a gradient knows nothing of the bias
        assert min(errors(actual, wrong)[:3]) > 10 * TOLERANCES[dtype]
    if dtype == "float32":
        other = "gelu_tanh" if activation == "gelu" else "gelu"
        wrong = derived(product_formula(other), x, (kernel, bias), upstream)
        assert min(errors(actual, wrong)[:2]) > 10 * TOLERANCES[dtype]


@of_either_product
@pytest.mark.parametrize("positions", [(5,), (1, 1, 1), (3, 1, 1), (1, 9, 1)])
def test_pointwise_takes_vectors_and_maps_of_one_pixel(positions):
    layer = dense("wider")
    x, upstream = operands("wider", positions)
    formula = product_formula("gelu")
    expected = derived(formula, x, layer.get_weights(), upstream)
    assert max(errors(computed(applied(layer, "gelu"), x, upstream), expected)) < TOLERANCE
    assert relative_error(forward(applied(layer, "gelu"), x), expected[0]) < TOLERANCE  # without a gradient
    assert relative_error(forward(applied(layer, "gelu_tanh"), x), expected[0]) > 10 * TOLERANCE


@of_either_product
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_pointwise_gives_the_same_value_without_a_gradient(activation, dtype):
    layer = dense("wider", dtype)
    x, upstream = operands("wider", (1, 7, 10), dtype)
    with_gradient = computed(applied(layer, activation), x, upstream)[0]
    without = forward(applied(layer, activation), x)
    assert relative_error(without, with_gradient) < TOLERANCES[dtype]
    expected = derived(product_formula(activation), x, layer.get_weights(), upstream)[0]
    assert relative_error(without, expected) < TOLERANCES[dtype]


@of_either_product
def test_pointwise_of_a_layer_with_lora_has_its_update_and_gradients():
    layer = dense("wider")
    layer.enable_lora(2, lora_alpha=3)
    with_random_weights(layer, (None, 6))
    x, upstream = operands("wider", (1, 7, 10))
    values = {weight.name: as_numpy(weight.value) for weight in layer.trainable_weights}
    kernel = as_numpy(layer._kernel.value)
    assert list(values) == ["bias", "lora_kernel_a", "lora_kernel_b"]

    def formula(x, bias, a, b, share=3 / 2):
        return erf_gelu(x @ (torch.tensor(kernel.astype("float64")) + share * a @ b) + bias)

    actual = computed(applied(layer, "gelu"), x, upstream)
    assert max(errors(actual, derived(formula, x, values.values(), upstream))) < TOLERANCE
    without = derived(functools.partial(formula, share=0), x, values.values(), upstream)
    assert relative_error(actual[0], without[0]) > 10 * TOLERANCE


@pytest.mark.parametrize("lora", [False, True])
def test_pointwise_of_a_quantised_layer_is_the_layers_own(monkeypatch, lora):
    layer = dense("wider")
    x, _ = operands("wider", (1, 7, 10))
    float32 = forward(applied(layer, "gelu"), x)
    layer.quantize("int8")
    if lora:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(np.full((2, 24), 0.1))

    def refuse(*_):
        raise AssertionError("a quantised kernel was multiplied as it stands")

    monkeypatch.setattr(pointwise_module, "_product", refuse)
    quantised = forward(applied(layer, "gelu"), x)
    assert relative_error(quantised, forward(plainly(layer, "gelu"), x)) < TOLERANCE
    assert relative_error(quantised, float32) > 1e-3  # it is quantised
    assert lora or relative_error(quantised, float32) < 0.02
    assert quantised.dtype == np.float32


# The stem and the layers between the stages. No size is a multiple of the stride.

LAYOUT = {"data_format": "channels_last", "kernel_initializer": RandomNormal()}
PATCHES = [
    (2, (3, 9, 13, 5), "float32"),
    (4, (1, 18, 23, 3), "float32"),
    (16, (1, 35, 50, 3), "float32"),
    (2, (1, 7, 10, 6), "bfloat16"),
    (4, (3, 9, 14, 3), "bfloat16"),
]
OTHER_CONVOLUTIONS = {
    "same": {"kernel_size": 2, "strides": 2, "padding": "same"},
    "same, dilated": {"kernel_size": 2, "padding": "same", "dilation_rate": 2},
    "overlapping": {"kernel_size": 3, "strides": 2},
    "apart": {"kernel_size": 2, "strides": 3},
    "not square": {"kernel_size": (2, 4), "strides": (2, 4)},
}


@pytest.fixture
def products_taken(monkeypatch):
    """The shapes of what `_product` is given."""
    taken = []
    original = _product
    monkeypatch.setattr(
        pointwise_module, "_product", lambda x, *rest: taken.append(tuple(x.shape)) or original(x, *rest)
    )
    return taken


@of_either_product
@pytest.mark.parametrize(("size", "shape", "dtype"), PATCHES)
def test_patches_equal_the_sum_over_each_patch(products_taken, size, shape, dtype):
    policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
    layer = with_random_weights(PatchConv2D(7, size, size, **LAYOUT, dtype=policy), shape)
    kernel, bias = layer.get_weights()
    x = sample(shape, dtype)
    upstream = sample(layer.compute_output_shape(shape), dtype, seed=2)
    actual = computed(layer, x, upstream)
    batch, height, width, channels = shape
    patches = (batch, height // size, width // size, size * size * channels)
    assert products_taken == ([] if BACKEND == "tensorflow" else [patches])

    expected = derived(patch_product, x, (kernel, bias), upstream)
    assert_equal_but_for_rounding(actual, expected, dtype)
    assert not np.any(actual[1][:, height // size * size :])  # the rest has no part in it
    assert relative_error(forward(layer, x), expected[0]) < TOLERANCES[dtype]
    transposed = derived(patch_product, x, (kernel.transpose(1, 0, 2, 3), bias), upstream)
    assert min(errors(actual, transposed)[:2]) > 10 * TOLERANCES[dtype]
    without_bias = derived(patch_product, x, (kernel, 0 * bias), upstream)
    assert relative_error(actual[0], without_bias[0]) > 5 * TOLERANCES[dtype]


@pytest.mark.parametrize(("size", "shape", "dtype"), PATCHES[:2])
def test_patches_equal_the_layer_of_keras(size, shape, dtype):
    layer, plain = (
        with_random_weights(make(7, size, size, **LAYOUT), shape)
        for make in (PatchConv2D, keras.layers.Conv2D)
    )
    x, upstream = sample(shape), sample(layer.compute_output_shape(shape), seed=2)
    assert [w.path.split("/")[-1] for w in layer.weights] == [w.path.split("/")[-1] for w in plain.weights]
    assert max(errors(computed(layer, x, upstream), computed(plain, x, upstream))) < TOLERANCE


@pytest.mark.parametrize("name", OTHER_CONVOLUTIONS)
def test_other_convolutions_are_left_to_keras(products_taken, name):
    shape = (2, 7, 10, 3)
    layer, plain = (
        with_random_weights(make(5, **LAYOUT, **OTHER_CONVOLUTIONS[name]), shape)
        for make in (PatchConv2D, keras.layers.Conv2D)
    )
    x = sample(shape)
    np.testing.assert_array_equal(forward(layer, x), forward(plain, x))
    assert products_taken == []


# The product of the patches knows a bias, no groups and no activation.
OTHER_ARGUMENTS = {
    "no bias": {"use_bias": False},
    "activation": {"activation": "gelu"},
    "groups": {"groups": 2},
}


@pytest.mark.parametrize("name", OTHER_ARGUMENTS)
def test_patches_know_every_argument_of_keras(name):
    shape = (2, 4, 6, 4)
    layer, plain = (
        with_random_weights(make(6, 2, 2, **LAYOUT, **OTHER_ARGUMENTS[name]), shape)
        for make in (PatchConv2D, keras.layers.Conv2D)
    )
    x = sample(shape)
    assert relative_error(forward(layer, x), forward(plain, x)) < TOLERANCE


# bfloat16 where the processor has no arithmetic for it: in float32, rounded once. XLA does so by itself.


def assert_rounded_once(actual, expected):
    """Each element is off by half of the last of its 8 bits at most; float32's own error comes on top."""
    for one, other in zip(actual, expected, strict=True):
        allowed = 2**-8 * np.abs(other) + TOLERANCE * np.max(np.abs(other))
        assert np.max(np.abs(one - other) / allowed) < 1


not_on_jax = pytest.mark.skipif(BACKEND == "jax", reason="of TensorFlow and PyTorch")


@pytest.fixture
def no_bfloat16(monkeypatch):
    monkeypatch.setattr(_environment, "has_bfloat16", lambda backend: False)


@not_on_jax
def test_depthwise_rounds_once_without_bfloat16_arithmetic(no_bfloat16):
    shape = (3, 9, 14, 8)
    layer = with_random_weights(DepthwiseConv2D(7, dtype="mixed_bfloat16"), shape)
    x, upstream = sample(shape, "bfloat16"), sample(shape, "bfloat16", seed=2)
    assert_rounded_once(
        computed(layer, x, upstream), derived(sum_over_taps, x, layer.get_weights(), upstream)
    )


@of_either_product
@not_on_jax
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_pointwise_rounds_once_without_bfloat16_arithmetic(no_bfloat16, activation):
    layer = dense("wider", "bfloat16")
    x, upstream = operands("wider", (3, 9, 14), "bfloat16")
    expected = derived(product_formula(activation), x, layer.get_weights(), upstream)
    called = applied(layer, activation)
    assert_rounded_once(computed(called, x, upstream), expected)
    assert_rounded_once([forward(called, x)], expected[:1])  # without a gradient


@of_either_product
@not_on_jax
def test_patches_are_multiplied_in_float32_without_bfloat16_arithmetic(no_bfloat16, monkeypatch):
    seen = []
    owner, name = (
        (keras.layers.Conv2D, "convolution_op")
        if BACKEND == "tensorflow"
        else (pointwise_module, "_torch_product")
    )
    original = getattr(owner, name)

    def record(*tensors, **settings):
        seen.extend(
            keras.backend.standardize_dtype(value.dtype) for value in tensors if hasattr(value, "shape")
        )
        return original(*tensors, **settings)

    monkeypatch.setattr(owner, name, record)
    layer = with_random_weights(PatchConv2D(7, 2, 2, **LAYOUT, dtype="mixed_bfloat16"), (1, 8, 10, 6))
    assert keras.backend.standardize_dtype(layer(sample((1, 8, 10, 6), "bfloat16")).dtype) == "bfloat16"
    assert set(seen) == {"float32"}


@not_on_jax
@pytest.mark.parametrize("shape", [(1, 8, 12, 6), (3, 14, 16, 3)])
def test_patches_and_their_bias_are_rounded_once_without_bfloat16_arithmetic(no_bfloat16, shape):
    layer = with_random_weights(PatchConv2D(7, 2, 2, **LAYOUT, dtype="mixed_bfloat16"), shape)
    plain = keras.layers.Conv2D(7, 2, 2, **LAYOUT, dtype="float32")
    plain.build(shape)
    plain.set_weights(layer.get_weights())
    x = sample(shape, "bfloat16")
    assert_rounded_once([forward(layer, x)], [forward(plain, keras.ops.cast(x, "float32"))])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_only_bfloat16_without_arithmetic_is_computed_in_float32(monkeypatch, has_bfloat16, dtype):
    """Elsewhere the function is given the very tensors, so that its result stays what it is, bit for bit."""
    monkeypatch.setattr(_environment, "has_bfloat16", lambda backend: has_bfloat16)
    seen = []
    x = sample((2, 3), dtype)
    y = bfloat16.rounded_once(lambda *values: seen.extend(values) or values[0], x, x)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    widens = BACKEND != "jax" and dtype == "bfloat16" and not has_bfloat16
    assert [value is x for value in seen] == [not widens] * 2
    assert {keras.backend.standardize_dtype(value.dtype) for value in seen} == {
        "float32" if widens else dtype
    }


@on_torch
def test_other_devices_compute_in_bfloat16_on_torch(no_bfloat16):
    seen = []
    x = torch.empty((2, 3), dtype=torch.bfloat16, device="meta")
    bfloat16.rounded_once(lambda value: seen.append(value) or value, x)
    assert seen[0] is x


@on_tensorflow
def test_graphs_for_an_accelerator_compute_in_bfloat16_on_tensorflow(no_bfloat16, monkeypatch):
    import tensorflow as tf

    seen = []

    def record(value):
        seen.append(value.dtype.name)
        return value

    def trace():
        tf.function(lambda x: bfloat16.rounded_once(record, x))(tf.zeros((2, 3), "bfloat16"))

    trace()
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    devices = tf.config.list_logical_devices()
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda *_: [*devices, gpu])
    trace()
    assert seen == ["float32", "bfloat16"]


@on_tensorflow
def test_tensorflow_has_bfloat16_where_onednn_and_the_processor_have_it(monkeypatch):
    for onednn, flags, cap, expected in (
        (True, {"avx2", "avx512f", "avx512_bf16"}, "", True),
        (True, {"avx2", "avx512f"}, "AVX512_CORE_VNNI", True),
        (True, {"avx2", "avx512f", "avx512_bf16"}, "avx2", False),
        (False, {"avx2", "avx512f", "avx512_bf16"}, "", False),
        (True, {"avx2"}, "", False),
        (True, {"asimd", "bf16"}, "", True),
        (True, set(), "", True),  # a system that does not tell
    ):
        monkeypatch.setattr(_environment, "tensorflow_has_onednn", lambda onednn=onednn: onednn)
        monkeypatch.setattr(_environment, "cpu_flags", lambda flags=flags: frozenset(flags))
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
        assert _environment.has_bfloat16.__wrapped__("tensorflow") == expected, (onednn, flags, cap)


@not_on_jax
@pytest.mark.skipif("avx512f" not in _environment.cpu_flags(), reason="the processor has no AVX-512")
def test_the_limit_of_onednn_is_heeded():
    code = f"from keras_convnext import _environment; print(_environment.has_bfloat16({BACKEND!r}))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split()[-1] == "False"
    if not {"ONEDNN_MAX_CPU_ISA", "TF_ENABLE_ONEDNN_OPTS"} & set(os.environ):
        assert _environment.has_bfloat16(BACKEND) == (
            BACKEND == "torch" or _environment.tensorflow_has_onednn()
        )


# Layer norm and GRN.

NORMS = {LayerNormalization: layer_norm, GlobalResponseNormalization: respond}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 7, 10, 6), (3, 5, 4, 9)])
@pytest.mark.parametrize("make", NORMS)
def test_norms_equal_their_formula(make, shape, dtype):
    policy = "mixed_bfloat16" if dtype == "bfloat16" else dtype
    layer = with_random_weights(make(dtype=policy), shape)
    x, upstream = sample(shape, dtype), sample(shape, dtype, seed=2)
    gamma, beta = layer.get_weights()
    actual = computed(layer, x, upstream)
    assert max(errors(actual, derived(NORMS[make], x, (gamma, beta), upstream))) < TOLERANCES[dtype]
    swapped = derived(NORMS[make], x, (beta, gamma), upstream)
    assert min(errors(actual, swapped)[:2]) > 10 * TOLERANCES[dtype]
    far = derived(functools.partial(NORMS[make], epsilon=1), x, (gamma, beta), upstream)
    assert min(errors(actual, far)[:3]) > 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("zero", ["a channel", "a sample"])
def test_grn_of_zeros_has_the_slope_of_the_limit(zero):
    where = np.s_[..., 1] if zero == "a channel" else np.s_[1]
    shape = (3, 5, 4, 6)
    values = np.array(as_numpy(sample(shape)))
    values[where] = 0
    upstream = sample(shape, seed=2)
    layer = with_random_weights(GlobalResponseNormalization(), shape)
    gamma, beta = layer.get_weights()
    y, dx, dgamma, dbeta = computed(layer, values, upstream)
    np.testing.assert_array_equal(y[where], np.broadcast_to(beta, shape)[where])
    # The response is 0 there, and what it adds to the slope; the residual's slope of 1 is left.
    np.testing.assert_allclose(dx[where], as_numpy(upstream)[where], rtol=1e-6)

    if zero == "a channel":  # its norm has no slope at 0, in the mean of the norms either
        assert dgamma[1] == 0
        others = np.flatnonzero(np.arange(6) != 1)
        plain = functools.partial(respond_next_to_a_zero_channel, channels=6)
        keep = np.ix_(range(3), range(5), range(4), others)
        weights = (gamma[others], beta[others])
    else:
        others, plain, keep, weights = np.arange(6), respond, np.s_[[0, 2]], (gamma, beta)
    source = keras.ops.convert_to_tensor(values[keep])
    expected = derived(plain, source, weights, as_numpy(upstream)[keep])
    assert max(errors((y[keep], dx[keep], dgamma[others]), expected[:3])) < TOLERANCE
    np.testing.assert_allclose(dbeta, as_numpy(upstream).sum((0, 1, 2)), rtol=1e-4)


def respond_next_to_a_zero_channel(x, gamma, beta, channels, epsilon=1e-6):
    norm = torch.sqrt((x**2).sum((1, 2), keepdim=True))
    return gamma * (x * (norm / (norm.sum(-1, keepdim=True) / channels + epsilon))) + beta + x


# A few samples at a time. Two maps of (7, 10, 16) in float32 make a chunk here.

SAMPLE_BYTES = 7 * 10 * 16 * 4
CHUNKS = {  # N: samples in each chunk
    "jax": {1: {1}, 3: {1}, 4: {2}, 5: {1}, 6: {2}},  # one program, so chunks of one size
    "torch": {1: [1], 3: [2, 1], 4: [2, 2], 5: [2, 2, 1], 6: [2, 2, 2]},
    "tensorflow": {1: [1], 3: [3], 4: [4], 5: [5], 6: [6]},
}


@pytest.fixture
def small_chunks(monkeypatch):
    take_chunks_of(2, monkeypatch)


def take_chunks_of(samples, monkeypatch):
    """Sets the limits so that maps of (7, 10, 16) in float32 are run that many samples at a time."""
    monkeypatch.setattr(chunking, "WHOLE_BYTES", 0)
    monkeypatch.setattr(chunking, "CHUNK_BYTES", samples * SAMPLE_BYTES + 100)
    monkeypatch.setattr(chunking, "POSITIONS", samples * 70 + 10)


class Recorder:
    """A function of each sample, and how many samples it was given."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x):
        self.sizes.append(x.shape[0])
        return x * keras.ops.mean(x, axis=(1, 2), keepdims=True)


def chunked(recorder, training, dtype="float32"):
    layer = keras.layers.Identity(dtype=dtype)
    return Calls(layer, lambda _, x: chunking.in_chunks(recorder, x, 16, training=training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("samples", CHUNKS["torch"])
def test_chunks_give_the_result_and_gradient_of_the_whole(small_chunks, samples, training):
    recorder = Recorder()
    x, upstream = sample((samples, 7, 10, 4)), sample((samples, 7, 10, 4), seed=2)
    actual = computed(chunked(recorder, training), x, upstream)
    wanted = [samples] if BACKEND == "torch" and training else CHUNKS[BACKEND][samples]
    assert type(wanted)(recorder.sizes) == wanted
    expected = derived(lambda x: x * x.mean((1, 2), keepdim=True), x, (), upstream)
    assert max(errors(actual, expected)) < TOLERANCE
    if samples > 1:
        swapped = [np.roll(array, 1, axis=0) for array in expected]
        assert min(errors(actual, swapped)) > 10 * TOLERANCE


def test_a_map_of_bfloat16_is_half_as_large_on_torch_and_has_as_many_positions_on_jax(small_chunks):
    recorder = Recorder()
    forward(chunked(recorder, False, "bfloat16"), sample((8, 7, 10, 4), "bfloat16"))
    assert set(recorder.sizes) == {{"tensorflow": 8, "jax": 2, "torch": 4}[BACKEND]}


def test_what_is_small_stays_whole(monkeypatch):
    recorder = Recorder()
    x = sample((5, 7, 10, 4))
    forward(chunked(recorder, False), x)
    assert set(recorder.sizes) == {5}
    take_chunks_of(1, monkeypatch)
    for whole, positions in ((5 * SAMPLE_BYTES, 5 * 70), (5 * SAMPLE_BYTES - 1, 5 * 70 - 1)):
        recorder.sizes.clear()
        monkeypatch.setattr(chunking, "WHOLE_BYTES", whole)
        monkeypatch.setattr(chunking, "POSITIONS", positions)
        forward(chunked(recorder, False), x)
        splits = whole % SAMPLE_BYTES and BACKEND != "tensorflow"
        assert set(recorder.sizes) == ({1} if splits else {5})


BLOCKS = {
    "v1": functools.partial(ConvNeXtBlock, 4, kernel_size=3, layer_scale_init_value=0.5),
    "v2": functools.partial(ConvNeXtV2Block, 4, kernel_size=3),
}


def block_called(version, training, **settings):
    """[output, gradients] of a block with the same weights and input every time."""
    shape = (6, 7, 10, 4)
    block = with_random_weights(BLOCKS[version](**settings), shape)
    called = Calls(block, lambda block, x: block(x, training=training))
    return computed(called, sample(shape), sample(shape, seed=2))


@functools.cache
def block_in_one(version):
    return block_called(version, training=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("version", BLOCKS)
def test_block_in_chunks_equals_the_block_in_one_in_inference_and_training(monkeypatch, version, training):
    expected = block_in_one(version)
    sizes = samples_of_branches(monkeypatch)
    take_chunks_of(2, monkeypatch)
    actual = block_called(version, training)
    splits = BACKEND == "jax" or (BACKEND == "torch" and not training)
    assert set(sizes) == {2 if splits else 6}
    assert max(errors(actual, expected)) < 2 * TOLERANCE
    assert relative_error(actual[0], np.roll(expected[0], 2, axis=0)) > 10 * TOLERANCE


def samples_of_branches(monkeypatch):
    """How many samples each call of a block's branch is given."""
    sizes = []
    for block in (ConvNeXtBlock, ConvNeXtV2Block):

        def branch(self, x, original=block.branch):
            sizes.append(x.shape[0])
            return original(self, x)

        monkeypatch.setattr(block, "branch", branch)
    return sizes


def test_rematerialised_block_in_chunks_has_the_same_gradients(monkeypatch):
    expected = block_in_one("v1")
    take_chunks_of(2, monkeypatch)
    assert max(errors(block_called("v1", True, rematerialize=True), expected)) < 2 * TOLERANCE


def test_small_model_in_chunks_equals_training_without_drop_path(monkeypatch):
    model = load(
        "test_convnext", weights=None, classes=5, input_shape=(64, 64, 3), classifier_activation=None
    )
    randomize(model, scale=0.2)
    pixels = np.random.default_rng(1).uniform(0, 255, (3, 64, 64, 3)).astype("float32")
    sizes = samples_of_branches(monkeypatch)
    trained = forward(model, pixels, training=True)
    assert set(sizes) == {3}
    sizes.clear()
    take_chunks_of(0, monkeypatch)
    in_chunks = forward(model, pixels, training=False)
    assert set(sizes) == {3 if BACKEND == "tensorflow" else 1}
    assert relative_error(in_chunks, trained) < 10 * TOLERANCE  # some twenty layers
    assert relative_error(np.roll(in_chunks, 1, axis=0), trained) > 100 * TOLERANCE


# What holds on one backend only.


@pytest.mark.parametrize("activation", FORMULAS)
def test_pointwise_of_nothing_is_nothing(activation):
    assert forward(applied(dense("wider"), activation), np.zeros((0, 7, 10, 6), "float32")).shape == (
        0,
        7,
        10,
        24,
    )


@on_jax
def test_only_training_is_rematerialised_on_jax(small_chunks):
    import jax

    def program(training):
        loss = jax.grad(lambda x: chunking.in_chunks(Recorder(), x, 16, training=training).sum())
        return str(jax.make_jaxpr(loss)(np.zeros((6, 7, 10, 4), "float32")))

    assert "remat" in program(True) or "checkpoint" in program(True)
    assert "remat" not in program(False) and "checkpoint" not in program(False)


@on_jax
def test_program_of_unknown_sizes_takes_the_whole_on_jax(monkeypatch):
    import jax
    from jax import export

    take_chunks_of(0, monkeypatch)
    shape = (3, 8, 12, 3)
    patches = with_random_weights(PatchConv2D(4, 2, 2, **LAYOUT), shape)
    block = with_random_weights(BLOCKS["v1"](), (3, 4, 6, 4))

    def network(x):
        return block(patches(x))

    x = sample(shape)
    for sizes in ("b, 8, 12, 3", "b, 2*h, 2*w, 3"):
        symbols = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), "float32")
        program = export.export(jax.jit(network))(symbols)
        assert "while" not in program.mlir_module()  # what a loop over chunks would be
        assert relative_error(program.call(x), jax.jit(network)(x)) < TOLERANCE
    assert "while" in jax.jit(network).lower(x).as_text()


@on_tensorflow
@pytest.mark.parametrize("compiled", [False, True])
def test_graph_of_unknown_sizes_has_the_same_value_on_tensorflow(compiled):
    import tensorflow as tf

    shape = (3, 8, 12, 3)
    patches = with_random_weights(PatchConv2D(4, 2, 2, **LAYOUT), shape)
    block = with_random_weights(BLOCKS["v2"](dilation_rate=2), (3, 4, 6, 4))
    announced = []

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3))], jit_compile=compiled)
    def network(x):
        x = pointwise(block.pwconv1, block(patches(x)), keras.activations.gelu)
        announced.append(x.shape[1:].as_list())
        return x

    x = sample(shape)
    hidden = plainly(block.pwconv1, "gelu")(block(patches(x)))
    assert relative_error(network(x), hidden) < TOLERANCE
    assert announced == [[None, None, 16]]


@of_either_product
@on_torch
@pytest.mark.parametrize("widths", WIDTHS)
def test_second_derivatives_of_pointwise_on_torch(widths):
    layer = dense(widths)
    x, upstream = operands(widths, (3, 2, 5))
    directions = [
        torch.randn(shape, generator=torch.Generator().manual_seed(3))
        for shape in (x.shape, *(w.shape for w in layer.weights))
    ]

    def second(function, inputs, upstream, directions):
        first = torch.autograd.grad((function(*inputs) * upstream).sum(), inputs, create_graph=True)
        along = sum((slope * direction).sum() for slope, direction in zip(first, directions, strict=True))
        return [slope.numpy() for slope in torch.autograd.grad(along, inputs)]

    kernel, bias = (weight.value for weight in layer.weights)
    inputs = [x.requires_grad_(), kernel, bias]
    actual = second(lambda x, *_: pointwise(layer, x, keras.activations.gelu), inputs, upstream, directions)
    doubles = [value.detach().double().requires_grad_() for value in inputs]
    others = upstream.double(), [direction.double() for direction in directions]
    assert max(errors(actual, second(product_formula("gelu"), doubles, *others))) < TOLERANCE
    assert min(errors(actual, second(product_formula("gelu_tanh"), doubles, *others))) > 10 * TOLERANCE


@of_either_product
@on_torch
def test_pointwise_takes_strided_operands_and_gradients_on_torch():
    layer = dense("wider")
    x = sample((2, 6, 7, 5)).permute(0, 2, 3, 1)  # (N, H, W, C) over channels-first memory
    assert not x.is_contiguous()
    ones = torch.ones(2, 7, 5, 24)
    expected = derived(product_formula(None), x, layer.get_weights(), ones)
    assert relative_error(forward(applied(layer, None), x), expected[0]) < TOLERANCE
    x = x.detach().requires_grad_()
    weights = [weight.value for weight in layer.weights]
    slopes = torch.autograd.grad(pointwise(layer, x).sum(), [x, *weights])  # of one number, expanded
    assert max(errors([slope.numpy() for slope in slopes], expected[1:])) < TOLERANCE


@of_either_product
@on_torch
def test_pointwise_of_a_frozen_layer_has_the_gradient_of_its_input_on_torch():
    layer = dense("narrower")
    layer.trainable = False
    x, upstream = operands("narrower", (1, 7, 10))
    expected = derived(product_formula("gelu"), x, layer.get_weights(), upstream)
    actual = computed(applied(layer, "gelu"), x, upstream)
    assert len(actual) == 2
    assert max(errors(actual, expected[:2])) < TOLERANCE


@on_torch
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_dtypes_are_left_to_keras_on_torch(products_taken, dtype):
    layer = with_random_weights(keras.layers.Dense(24, dtype=dtype), (None, 6))
    x, upstream = operands("wider", (1, 7, 10), dtype)
    expected = derived(product_formula("gelu"), x, [as_numpy(w.value) for w in layer.weights], upstream)
    tolerance = {"float64": TOLERANCE, "float16": 2**-10}[dtype]  # Keras has float32's digits in float64
    assert max(errors(computed(applied(layer, "gelu"), x, upstream), expected)) < tolerance
    assert products_taken == []


@on_torch
def test_traced_and_compiled_programs_hold_plain_operators_on_torch(monkeypatch):
    take_chunks_of(0, monkeypatch)
    monkeypatch.setattr(pointwise_module, "takes_onednn", lambda *_: True)
    shape = (3, 8, 12, 3)
    patches = with_random_weights(PatchConv2D(4, 2, 2, **LAYOUT), shape)
    block = with_random_weights(BLOCKS["v1"](), (3, 4, 6, 4))
    patches.trainable = block.trainable = False  # tracing refuses constants with a gradient
    graphs = []

    def network(x):
        return block(patches(x))

    def record(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    x = sample(shape)
    with torch.no_grad():
        expected = network(x)
        traced = torch.jit.trace(network, x, check_trace=False)
        compiled = torch.compile(network, backend=record)
        assert relative_error(traced(x), expected) < TOLERANCE
        assert relative_error(compiled(x), expected) < TOLERANCE
        for text in (str(traced.inlined_graph), *graphs):
            assert "_linear_pointwise" not in text and "split" not in text
        assert "conv" in "".join(graphs)
        eager = torch.profiler.profile()
        with eager:
            network(x)
        names = {event.key for event in eager.key_averages()}
        assert "mkldnn::_linear_pointwise" in names and "aten::split" in names  # outside they are taken
