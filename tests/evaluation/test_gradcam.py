"""Grad-CAM against finite differences, and against a derivation of its own in PyTorch."""

import functools

import keras
import numpy as np
import pytest
from layer_contract import BACKEND, as_numpy, randomize
from test_models import ISOTROPIC, V1, V2, build, pixels

from keras_convnext.evaluation import gradcam

pytestmark = pytest.mark.one_backend

IMAGES = pixels(2, 64, 64, 3)
TOLERANCE = 2e-3


@functools.cache
def model_of(architecture, activation="softmax"):
    model = build(architecture, input_shape=(64, 64, 3), classifier_activation=activation)
    randomize(model, seed=1, scale=0.2)
    return model


def run(model, images):
    """Not compiled: JAX then uses the kernels that `grad_cam` has compiled."""
    return as_numpy(model(keras.ops.convert_to_tensor(images)))


@functools.cache
def heat_of(architecture):
    return gradcam.grad_cam(model_of(architecture), IMAGES, class_index=[3, 7])


def enlarge(heat, size):
    """Bilinear, in NumPy: each axis between the centres of its cells."""
    for axis in (1, 2):
        count = heat.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
        low = np.minimum(place.astype(int), max(count - 2, 0))
        share = (place - low).reshape([-1 if axis == each else 1 for each in range(3)])
        high = np.minimum(low + 1, count - 1)
        heat = (1 - share) * heat.take(low, axis) + share * heat.take(high, axis)
    return heat


def heat_from(maps, gradient):
    heat = np.maximum((gradient.mean((1, 2), keepdims=True) * maps).sum(-1), 0)
    heat = enlarge(heat, 64)
    highest = heat.max((1, 2), keepdims=True)
    return heat / np.where(highest > 0, highest, 1)


def numeric_gradient(model, maps, classes, activation):
    """dy / d(mean of channel k) by central differences: what the mean of the gradient weighs."""
    dense, norm = model.get_layer("head"), model.get_layer("norm")
    gamma, beta, kernel, bias = (
        as_numpy(weight.value).astype("float64")
        for weight in (norm.gamma, norm.beta, dense.kernel, dense.bias)
    )

    def outputs(pooled):
        centred = pooled - pooled.mean(-1, keepdims=True)
        normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        logits = (gamma * normalised + beta) @ kernel + bias
        if activation == "softmax":
            logits = np.exp(logits - logits.max(-1, keepdims=True))
            logits /= logits.sum(-1, keepdims=True)
        return logits

    pooled = maps.astype("float64").mean((1, 2))
    gradient = np.zeros_like(pooled)
    for channel in range(pooled.shape[-1]):
        step = np.zeros_like(pooled)
        step[:, channel] = 1e-5
        change = (outputs(pooled + step) - outputs(pooled - step)) / 2e-5
        gradient[:, channel] = change[np.arange(len(classes)), classes]
    return gradient[:, None, None] / maps[0, ..., 0].size


@pytest.mark.every_backend
@pytest.mark.parametrize("architecture", [V1, V2])
def test_heat_is_that_of_finite_differences_of_the_logit(architecture):
    model = model_of(architecture)
    maps = run(keras.Model(model.input, model.pyramid_outputs["P5"]), IMAGES)
    expected = heat_from(maps, numeric_gradient(model, maps, [3, 7], None))
    np.testing.assert_allclose(heat_of(architecture), expected, atol=TOLERANCE)
    # Other classes, or the probability in place of the logit, give other maps.
    for classes, activation in (([4, 7], None), ([3, 7], "softmax")):
        other = heat_from(maps, numeric_gradient(model, maps, classes, activation))
        assert abs(other - expected).max() > 10 * TOLERANCE


def test_heat_is_a_float32_map_in_0_to_1_of_the_size_of_the_images():
    heat = heat_of(V1)
    assert heat.shape == (2, 64, 64) and heat.dtype == np.float32
    assert heat.min() >= 0 and heat.max(axis=(1, 2)).tolist() == [1.0, 1.0]


def test_softmax_and_logit_models_have_the_same_heat():
    with_logits = model_of(V1, None)
    for source, target in zip(model_of(V1).weights, with_logits.weights, strict=True):
        target.assign(source)
    heat = gradcam.grad_cam(with_logits, IMAGES.astype("uint8"), class_index=[3, 7])
    np.testing.assert_allclose(heat, heat_of(V1), atol=1e-5)
    stacked = keras.Model(with_logits.input, keras.layers.Softmax()(with_logits.output))
    heat = gradcam.grad_cam(stacked, IMAGES, class_index=[3, 7], layer="stages_3_0")
    np.testing.assert_allclose(heat, heat_of(V1), atol=1e-5)


def test_the_default_class_is_the_most_likely_one_and_one_class_does_for_all():
    model = model_of(V1)
    likely = run(model, IMAGES).argmax(-1)
    np.testing.assert_array_equal(
        gradcam.grad_cam(model, IMAGES), gradcam.grad_cam(model, IMAGES, class_index=likely.tolist())
    )
    heat = gradcam.grad_cam(model, IMAGES, class_index=7)
    np.testing.assert_allclose(heat[1], heat_of(V1)[1], atol=1e-5)
    assert abs(heat[0] - heat_of(V1)[0]).max() > 0.1


def test_grad_cam_leaves_the_model_as_it_was():
    model = model_of(V1)
    before, nodes = run(model, IMAGES), len(model.get_layer("head")._inbound_nodes)
    gradcam.grad_cam(model, IMAGES, class_index=0)
    assert model.get_layer("head").activation is keras.activations.softmax
    assert len(model.get_layer("head")._inbound_nodes) == nodes
    np.testing.assert_array_equal(run(model, IMAGES), before)


@pytest.mark.once
def test_heat_of_a_model_that_is_not_finite_is_an_error():
    model = build(V1, input_shape=(64, 64, 3))
    kernel, bias = model.get_layer("head").get_weights()
    model.get_layer("head").set_weights([np.full_like(kernel, np.nan), bias])
    with pytest.raises(ValueError, match="received infinite ones or NaN for 2 of 2 images"):
        gradcam.grad_cam(model, IMAGES, class_index=0)


def test_frozen_models_have_the_same_heat():
    model = model_of(V1)
    model.trainable = False
    try:
        heat = gradcam.grad_cam(model, IMAGES, class_index=[3, 7])
    finally:
        model.trainable = True
    np.testing.assert_allclose(heat, heat_of(V1), atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="the derivation is PyTorch's autograd")
@pytest.mark.parametrize("level", ["P3", "P4", "P5"])
def test_any_level_has_the_heat_of_autograd_through_the_whole_model(level):
    import torch

    model = model_of(V2)
    kept = {}

    def keep(_, __, output):
        output.retain_grad()
        kept["map"] = output

    names = {"P3": "stages_1_0", "P4": "stages_2_1", "P5": "stages_3_0"}
    # Up to the classifier, then its product by hand: the softmax is not in it.
    features = keras.Model(model.input, model.get_layer("head").input)
    hook = model.get_layer(names[level]).register_forward_hook(keep)
    try:
        logits = features(torch.from_numpy(IMAGES)) @ model.get_layer("head").kernel.value
    finally:
        hook.remove()
    (logits[0, 3] + logits[1, 7]).backward()
    expected = heat_from(as_numpy(kept["map"].detach()), as_numpy(kept["map"].grad))
    heat = gradcam.grad_cam(model, IMAGES, class_index=[3, 7], layer=level)
    np.testing.assert_allclose(heat, expected, atol=TOLERANCE)
    other = gradcam.grad_cam(model, IMAGES, class_index=[3, 7], layer="P2")
    assert abs(other - expected).max() > 10 * TOLERANCE


def test_isotropic_models_have_a_default_layer():
    assert gradcam.grad_cam(model_of(ISOTROPIC), IMAGES).shape == (2, 64, 64)


def gray_model(dtype):
    inputs = keras.Input((16, 16, 1))
    x = keras.layers.Conv2D(8, 3, dtype=dtype)(inputs)
    x = keras.layers.GlobalAveragePooling2D(dtype=dtype)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="sigmoid", dtype=dtype)(x))
    randomize(model)
    return model


def test_other_models_have_a_default_layer_and_16_bit_ones_nearly_the_same_heat():
    images = pixels(2, 16, 16, 1) / 255
    exact, rounded = (
        gradcam.grad_cam(gray_model(dtype), images, 0) for dtype in ("float32", "mixed_bfloat16")
    )
    assert exact.shape == (2, 16, 16) and rounded.dtype == np.float32
    assert exact.max(axis=(1, 2)).tolist() == [1.0, 1.0]
    np.testing.assert_allclose(rounded, exact, atol=0.02)
    assert abs(rounded - exact).max() > 0


def test_a_class_that_nothing_speaks_for_has_no_heat():
    model = gray_model("float32")
    model.layers[-1].kernel.assign(np.zeros((8, 3)))
    assert not gradcam.grad_cam(model, pixels(2, 16, 16, 1), 0).any()


def test_lora_is_part_of_the_logits():
    model = gray_model("float32")
    without = gradcam.grad_cam(model, pixels(2, 16, 16, 1), 0)
    model.layers[-1].enable_lora(2)
    model.layers[-1].lora_kernel_b.assign(np.ones((2, 3)))
    assert abs(gradcam.grad_cam(model, pixels(2, 16, 16, 1), 0) - without).max() > 0.01


def quantized_model():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 1)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="head")(x), name="small")
    model.quantize("int8")
    return model


def residual_model():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 1, name="stem")(inputs)
    branch = keras.layers.Conv2D(4, 1, name="branch")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add(name="sum")([x, branch]))
    return keras.Model(inputs, keras.layers.Dense(3)(x), name="small")


def subclassed_model():
    class Subclassed(keras.Model):
        pass

    return Subclassed()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (residual_model, {"layer": "stim"}, r"No layer 'stim' with maps in 'small'. Did you mean 'stem'\?"),
        (residual_model, {"layer": "branch"}, "'branch' is not on the only way from the image to the class"),
        (residual_model, {"class_index": 3}, "Expected class numbers from 0 to 2. Received: 3"),
        (residual_model, {"class_index": -1}, "from 0 to 2. Received: -1"),
        (residual_model, {"class_index": [1, 2, 0]}, r"one for each of 2 images. Received: \[1, 2, 0\]"),
        (residual_model, {"class_index": 1.5}, "Expected one class number.* Received: 1.5"),
        (residual_model, {"images": np.zeros((8, 8, 3))}, r"Expected images \(N, H, W, C\).*: \(8, 8, 3\)"),
        (subclassed_model, {}, "Expected a functional model"),
        (quantized_model, {}, "not quantised, or in logits. 'small' ends in 'head', a Dense"),
        (
            lambda: keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 1)]),
            {},
            r"to classes \(N, K\). Received: inputs \[\(None, 8, 8, 3\)\], outputs \[\(None, 8, 8, 2\)\]",
        ),
        (
            lambda: keras.Sequential(
                [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)], name="flat"
            ),
            {},
            "'flat' has none",
        ),
    ],
)
def test_wrong_arguments_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        gradcam.grad_cam(model(), **{"images": pixels(2, 8, 8, 3), **settings})


@pytest.mark.once
def test_overlay_paints_the_hot_and_leaves_the_cold():
    image = pixels(4, 6, 3)
    heat = np.zeros((4, 6))
    heat[1, 2] = 1
    heat[2, 2] = 0.5
    painted = gradcam.overlay(image, heat, opacity=1.0)
    assert painted.dtype == np.uint8 and painted[1, 2].tolist() == [190, 0, 40]
    assert (painted[2, 2] != image[2, 2]).any()
    cold = heat == 0
    np.testing.assert_array_equal(painted[cold], image[cold])
    np.testing.assert_array_equal(gradcam.overlay(image, heat, opacity=0), image.astype("uint8"))
    gray = gradcam.overlay(image[..., :1], np.zeros((4, 6)))
    np.testing.assert_array_equal(gray, np.repeat(image[..., :1], 3, axis=-1))
    with pytest.raises(ValueError, match=r"Received: \(4, 6, 3\) and \(6, 4\)"):
        gradcam.overlay(image, heat.T)
