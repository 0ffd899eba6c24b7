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


# Models around a body.


def wrapper(wrap, pooling="avg"):
    """A model that `wrap(body, classes)` makes, with the same weights in each."""
    body = build(V2, include_top=False, pooling=pooling, input_shape=(64, 64, 3))
    classes = keras.layers.Dense(3, activation="softmax", name="classes")
    model = wrap(body, classes)
    randomize(body, seed=1, scale=0.2)
    randomize(classes, seed=2)
    return model


def flat(body, classes):
    return keras.Model(body.input, classes(body.output))


def nested(body, classes, front=lambda x: x):
    image = keras.Input((64, 64, 3))
    return keras.Model(image, classes(body(front(image))))


def sequential(*front):
    return lambda body, classes: keras.Sequential([keras.Input((64, 64, 3)), *front, body, classes])


def with_a_table(body, classes, is_flat=False):
    image, x = (body.input, body.output) if is_flat else (keras.Input((64, 64, 3), name="photo"),) * 2
    table = keras.Input((4,), name="table")
    features = keras.layers.Concatenate()([x if is_flat else body(x), keras.layers.Dense(2)(table)])
    model = keras.Model([image, table], classes(features))
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense) and layer is not classes:
            randomize(layer, seed=3)
    return model


WRAPPERS = {
    "nested": nested,
    "nested, in inference": lambda body, classes: nested(lambda x: body(x, training=False), classes),
    "sequential": sequential(),
    "augmentation": sequential(keras.layers.RandomFlip(), keras.layers.RandomRotation(0.5)),
    "augmentation inside": lambda body, classes: nested(
        body, classes, keras.Sequential([keras.layers.RandomFlip(), keras.layers.RandomRotation(0.5)])
    ),
    "rescaling": sequential(keras.layers.Rescaling(1 / 255), keras.layers.Rescaling(255.0)),
    "head inside": lambda body, classes: nested(body, keras.Sequential([keras.layers.Dropout(0.5), classes])),
    "all inside": lambda body, classes: keras.Sequential([keras.Input((64, 64, 3)), nested(body, classes)]),
    "softmax behind": lambda body, classes: keras.Sequential(
        [keras.Input((64, 64, 3)), body, keras.layers.Dense(3, name="logits"), keras.layers.Softmax()]
    ),
}


@functools.cache
def heat_of_flat(**settings):
    return gradcam.grad_cam(wrapper(flat), IMAGES, **settings)


@pytest.mark.every_backend
@pytest.mark.parametrize("name", ["nested", "augmentation"])
def test_a_model_around_a_body_has_the_heat_of_the_flat_one(name):
    np.testing.assert_allclose(
        gradcam.grad_cam(wrapper(WRAPPERS[name]), IMAGES, 1), heat_of_flat(class_index=1), atol=1e-5
    )


@pytest.mark.parametrize("name", WRAPPERS)
def test_any_model_around_a_body_has_the_heat_of_the_flat_one(name):
    model = wrapper(WRAPPERS[name])
    if name == "softmax behind":
        randomize(model.get_layer("logits"), seed=2)
    for level in (None, "stages_2_1", "stages_1_0"):
        expected = heat_of_flat(class_index=1, layer=level)
        assert expected.max() == 1
        np.testing.assert_allclose(gradcam.grad_cam(model, IMAGES, 1, level), expected, atol=1e-5)


def test_grad_cam_takes_the_last_stage_in_front_of_a_norm_and_a_pooling_of_the_user():
    pool = keras.layers.GlobalAveragePooling2D()
    models = [
        wrapper(lambda body, classes, wrap=wrap: wrap(body, lambda x: classes(pool(x))), pooling=None)
        for wrap in (flat, nested)
    ]
    for layer in (None, "stages_3_0"):
        heat, other = (gradcam.grad_cam(model, IMAGES, 1, layer) for model in models)
        np.testing.assert_allclose(heat, other, atol=1e-5)


def test_other_inputs_are_given_beside_the_images():
    table = np.random.default_rng(4).normal(size=(2, 4)).astype("float32")
    model, joined = wrapper(with_a_table), wrapper(functools.partial(with_a_table, is_flat=True))
    expected = gradcam.grad_cam(joined, [IMAGES, table], 1)
    for inputs in ([IMAGES, table], (IMAGES.astype("uint8"), table), {"table": table, "photo": IMAGES}):
        np.testing.assert_allclose(gradcam.grad_cam(model, inputs, 1), expected, atol=1e-5)
    likely = model.predict_on_batch([IMAGES, table]).argmax(-1)
    heat = gradcam.grad_cam(model, [IMAGES, table])
    np.testing.assert_array_equal(heat, gradcam.grad_cam(model, [IMAGES, table], likely.tolist()))
    with pytest.raises(
        ValueError, match=r"Expected inputs in a list or by name: photo, table. Received: ndarray of 2"
    ):
        gradcam.grad_cam(model, IMAGES)


def test_gray_images_repeated_for_a_body_have_the_heat_of_the_colour_ones():
    def repeated(body, classes):
        gray = keras.Input((64, 64, 1))
        return keras.Model(gray, classes(body(keras.layers.Concatenate()([gray, gray, gray]))))

    gray = IMAGES[..., :1]
    expected = gradcam.grad_cam(wrapper(flat), np.repeat(gray, 3, axis=-1), 1)
    np.testing.assert_allclose(gradcam.grad_cam(wrapper(repeated), gray, 1), expected, atol=1e-5)


def two_bodies(names):
    keras.utils.set_random_seed(1)
    images = [keras.Input((64, 64, 3), name=name) for name in ("left", "right")]
    bodies = {
        name: build(V2, include_top=False, pooling="avg", name=name, input_shape=(64, 64, 3))
        for name in names
    }
    features = [bodies[name](image) for name, image in zip(names, images, strict=True)]
    return keras.Model(images, keras.layers.Dense(3)(keras.layers.Subtract()(features)), name="pair")


def test_two_bodies_are_told_apart_and_of_one_the_last_call_counts():
    model, shared = two_bodies("ab"), two_bodies("aa")
    images = [IMAGES, IMAGES[::-1]]
    for body in ("a", "b"):
        model.get_layer(body).set_weights(shared.get_layer("a").get_weights())
    model.layers[-1].set_weights(shared.layers[-1].get_weights())
    heats = [gradcam.grad_cam(model, images, 1, layer=f"{name}/P5") for name in "ab"]
    assert abs(heats[0] - heats[1]).max() > 0.1
    np.testing.assert_allclose(gradcam.grad_cam(shared, images, 1), heats[1], atol=1e-5)
    np.testing.assert_allclose(gradcam.grad_cam(shared, images, 1, "P5"), heats[1], atol=1e-5)
    with pytest.raises(ValueError, match="Several layers 'P5' with maps in 'pair'"):
        gradcam.grad_cam(model, images, 1, layer="P5")


def test_deep_models_of_others_have_a_heat():
    x = image = keras.Input((8, 8, 1))
    for _ in range(400):
        x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dense(2)(x))
    assert gradcam.grad_cam(model, pixels(1, 8, 8, 1), 0).shape == (1, 8, 8)


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
