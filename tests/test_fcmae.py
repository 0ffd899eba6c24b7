"""FCMAE: both dense forms of the encoder against sparse arithmetic, the loss, masks, files and errors."""

import dataclasses
import functools
import math
import re

import keras
import numpy as np
import pytest
from keras import ops
from layer_contract import BACKEND, as_numpy, relative_error

import keras_convnext
from keras_convnext import fcmae
from keras_convnext.fcmae import FORMS, MaskedAutoencoder, draw_masks
from keras_convnext.layers.cells import spread
from keras_convnext.variants import VARIANTS

SMALL = dataclasses.replace(VARIANTS["convnextv2_atto"], depths=(1, 1, 1, 1), dims=(4, 6, 8, 10))
PIXELS = np.random.default_rng(5).uniform(0, 255, (2, 96, 160, 3))  # 3 x 5 cells, of which 6 are seen
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
NORMALISED = ((PIXELS / 255 - MEAN) / STD).astype("float32").astype("float64")
VISIBLE = draw_masks(np.random.default_rng(6), 2, (3, 5), 0.6)
long_on_jax = pytest.mark.slow if BACKEND == "jax" else lambda test: test  # which compiles for half a minute
long_to_compile = pytest.mark.slow if BACKEND != "torch" else lambda test: test


@pytest.fixture(autouse=True, scope="module")
def small_atto():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, SMALL.name, SMALL)
        yield


def made_body(**arguments):
    """A small V2, every weight random."""
    keras.utils.set_random_seed(0)
    body = keras_convnext.load(SMALL.name, weights=None, include_top=False, **arguments)
    rng = np.random.default_rng(0)
    values = [value + rng.normal(0, 0.3, value.shape) for value in body.get_weights()]
    body.set_weights([value.astype("float32") for value in values])  # the same in each precision
    return body


@pytest.fixture(scope="module")
def autoencoders():
    """{form: autoencoder}, of the same body and the same decoder, float32."""
    body = made_body()
    pair = {form: MaskedAutoencoder(body, decoder_width=8, encoder=form) for form in FORMS}
    pair["tall"].set_weights(pair["masked"].get_weights())
    return pair


@pytest.fixture(scope="module")
def wide():
    """The same in float64, which TensorFlow, JAX only when asked, and PyTorch have on a processor."""
    if BACKEND == "jax":
        pytest.skip("JAX computes in float64 only in a process that was started so")
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        body = made_body(include_preprocessing=False)  # the normaliser is float32
        return {form: MaskedAutoencoder(body, decoder_width=8, encoder=form) for form in FORMS}
    finally:
        keras.config.set_dtype_policy(policy)


@functools.cache
def compiled(function):
    """A function of tensors, on JAX as one program; cached, so give it the same function again."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return function


@functools.cache
def program(model):
    """A model as a function of (its variables' values, inputs)."""

    def call(trainable, fixed, inputs):
        return model.stateless_call(trainable, fixed, inputs)[0]

    return compiled(call)


def outputs(model, images, visible=None):
    """What a model gives; on JAX from one program, whose masks all have as many seen cells."""
    inputs = ops.convert_to_tensor(images, model.variable_dtype)
    if visible is not None:
        inputs = inputs, ops.convert_to_tensor(visible)
    if BACKEND != "jax":
        return as_numpy(model(inputs))
    kinds = (model.trainable_variables, model.non_trainable_variables)
    return as_numpy(program(model)(*([variable.value for variable in kind] for kind in kinds), inputs))


@functools.cache
def once_of(body):
    def masked_once(images, visible):
        x = images
        for layer in body.layers[1:]:
            x = layer(x)
            if layer.name.endswith("downsample_layers_0_1"):
                x = ops.where(spread(visible, 8), x, ops.zeros((), x.dtype))
        return x

    return compiled(masked_once)


def masked_once(body, images, visible):
    """What some ports compute: the ordinary encoder, with the map masked after the stem and never again."""
    images = ops.convert_to_tensor(images, body.variable_dtype)
    return as_numpy(once_of(body)(images, ops.convert_to_tensor(visible)))


# The encoder.


class Sparse:
    """The encoder over a dictionary {(row, column): channels} of one sample, in NumPy float64."""

    def __init__(self, body):
        self.layers = {
            layer.name: {
                variable.path.removeprefix(layer.name).split("/", 1)[-1]: np.asarray(
                    as_numpy(variable), "float64"
                )
                for variable in layer.weights
            }
            for layer in body.layers
        }

    def __call__(self, image, visible):
        stem = self.layers["downsample_layers_0_0"]
        points = {}
        for row, column in np.argwhere(visible.repeat(8, 0).repeat(8, 1)):
            patch = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            value = np.tensordot(patch, stem["kernel"], 3) + stem["bias"]
            points[row, column] = self.norm(value, self.layers["downsample_layers_0_1"])
        for stage, depth in enumerate(SMALL.depths):
            if stage:
                points = self.down(points, stage)
            for number in range(depth):
                points = self.block(points, self.layers[f"stages_{stage}_{number}"])
        return points

    @staticmethod
    def norm(x, weights, inside=""):
        x = x - x.mean()
        return x / np.sqrt((x**2).mean() + 1e-6) * weights[inside + "gamma"] + weights[inside + "beta"]

    def down(self, points, stage):
        norm, convolution = (self.layers[f"downsample_layers_{stage}_{place}"] for place in (0, 1))
        result = {}
        for (row, column), value in points.items():
            place = row // 2, column // 2
            part = self.norm(value, norm) @ convolution["kernel"][row % 2, column % 2]
            result[place] = result.get(place, convolution["bias"]) + part
        return result

    def block(self, points, w):
        hidden = {}
        for row, column in points:
            value = w["dwconv/bias"].copy()
            for i in range(7):
                for j in range(7):
                    neighbour = points.get((row + i - 3, column + j - 3))
                    if neighbour is not None:
                        value += neighbour * w["dwconv/kernel"][i, j, :, 0]
            x = self.norm(value, w, "norm/") @ w["pwconv1/kernel"] + w["pwconv1/bias"]
            hidden[row, column] = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        norm = np.sqrt(sum(value**2 for value in hidden.values()))
        scale = 1 + w["grn/gamma"] * norm / (norm.mean() + 1e-6)
        return {
            place: points[place] + (value * scale + w["grn/beta"]) @ w["pwconv2/kernel"] + w["pwconv2/bias"]
            for place, value in hidden.items()
        }


@pytest.fixture(scope="module")
def sparse_features(autoencoders):
    """The features of the seen cells of the two samples, in their order; of both, whose weights are equal."""
    reference = Sparse(autoencoders["masked"].body)
    maps = [reference(image, seen) for image, seen in zip(NORMALISED, VISIBLE, strict=True)]
    return np.array([points[place] for points in maps for place in sorted(points)])


@pytest.mark.parametrize("form", FORMS)
def test_encoder_equals_sparse_arithmetic(autoencoders, sparse_features, form):
    features = outputs(autoencoders[form], PIXELS, VISIBLE)["features"]
    assert relative_error(features[VISIBLE], sparse_features) <= 1e-5
    assert not features[~VISIBLE].any()
    once = masked_once(autoencoders[form].body, PIXELS, VISIBLE)[VISIBLE]
    assert relative_error(once, sparse_features) > 0.1


def test_both_forms_are_equal_in_float64(wide):
    """Sparse arithmetic they equal to 1e-7 there: the GELU of Keras has a constant in float32."""
    masked, tall = (outputs(wide[form], NORMALISED, VISIBLE) for form in FORMS)
    assert relative_error(tall["features"], masked["features"]) <= 1e-12


RECTANGLE = np.zeros((2, 3, 5), bool)
RECTANGLE[:, 1:3, 1:4] = True


def crop_errors(autoencoder, images):
    """Of a visible rectangle against the ordinary body on the crop; of the map that is masked once."""
    body = autoencoder.body
    crop = outputs(body, images[:, 32:96, 32:128])
    inside = outputs(autoencoder, images, RECTANGLE)["features"][:, 1:3, 1:4]
    once = masked_once(body, images, RECTANGLE)[:, 1:3, 1:4]
    return relative_error(inside, crop), relative_error(once, crop)


@long_on_jax
@pytest.mark.parametrize("form", FORMS)
def test_visible_rectangle_equals_the_ordinary_body_on_the_crop(autoencoders, form):
    error, once = crop_errors(autoencoders[form], PIXELS)
    assert error <= 1e-5
    assert once > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_visible_rectangle_equals_the_crop_in_float64(wide, form):
    error, once = crop_errors(wide[form], NORMALISED)
    assert error <= 1e-10
    assert once > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_cells_four_apart_do_not_see_each_other(autoencoders, form):
    autoencoder = autoencoders[form]
    responses = [layer.grn.gamma for layer in autoencoder.body.layers if hasattr(layer, "grn")]
    before = [as_numpy(gamma) for gamma in responses]

    def difference(column):
        visible = np.zeros((2, 3, 5), bool)
        visible[..., [0, column]] = True
        changed = PIXELS.copy()
        changed[:, :, 32 * column : 32 * column + 32] += 20
        first, second = (outputs(autoencoder, x, visible)["features"][:, :, 0] for x in (PIXELS, changed))
        return np.abs(first - second).max()

    assert difference(4) > 0  # by GRN, which sums over the whole image
    try:
        for gamma in responses:
            gamma.assign(np.zeros(gamma.shape))
        assert difference(4) == 0
        assert difference(3) > 1e-3
    finally:
        for gamma, value in zip(responses, before, strict=True):
            gamma.assign(value)


@pytest.mark.parametrize("form", FORMS)
def test_masked_pixels_change_nothing(autoencoders, form):
    huge = np.where(VISIBLE.repeat(32, 1).repeat(32, 2)[..., None], PIXELS, 1e6)
    expected = outputs(autoencoders[form], PIXELS, VISIBLE)
    received = outputs(autoencoders[form], huge, VISIBLE)
    for name, values in expected.items():
        np.testing.assert_array_equal(received[name], values)
    other = outputs(autoencoders[form], huge, VISIBLE[::-1])
    assert np.abs(other["prediction"] - expected["prediction"]).max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_each_sample_is_computed_by_itself(autoencoders, form):
    expected = outputs(autoencoders[form], PIXELS, VISIBLE)
    images, visible = PIXELS.copy(), VISIBLE.copy()
    images[1], visible[1] = 255 - PIXELS[0], RECTANGLE[0]
    received = outputs(autoencoders[form], images, visible)
    for name, values in expected.items():
        assert relative_error(received[name][0], values[0]) <= 1e-6
        assert relative_error(received[name][1], values[1]) > 0.1


@long_on_jax
def test_samples_may_see_different_numbers_of_cells(autoencoders):
    visible = VISIBLE.copy()
    visible[0] = True
    x = ops.convert_to_tensor(PIXELS, "float32"), ops.convert_to_tensor(visible)
    found = {form: as_numpy(autoencoders[form](x)) for form in FORMS}
    assert relative_error(found["tall"]["features"], found["masked"]["features"]) <= 1e-6
    assert np.abs(found["tall"]["features"][0]).min() > 0


def loss_and_gradients(autoencoder, images, visible):
    """The loss and its gradients, by the path of each trainable weight."""
    images = ops.convert_to_tensor(images, "float32")
    weights = autoencoder.trainable_variables

    def loss():
        x = (images, ops.convert_to_tensor(visible))
        return autoencoder.compute_loss(x=x, y_pred=autoencoder(x, training=True))

    if BACKEND == "jax":
        import jax

        fixed = [variable.value for variable in autoencoder.non_trainable_variables]

        def stateless(values):
            mapping = zip([*weights, *autoencoder.non_trainable_variables], [*values, *fixed], strict=True)
            with keras.StatelessScope(state_mapping=mapping):
                return loss()

        total, found = jax.jit(jax.value_and_grad(stateless))([variable.value for variable in weights])
    elif BACKEND == "torch":
        import torch

        total = loss()
        found = torch.autograd.grad(total, [variable.value for variable in weights])
        total = total.detach()
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            total = loss()
        found = tape.gradient(total, [variable.value for variable in weights])
    return float(total), {
        variable.path: as_numpy(value) for variable, value in zip(weights, found, strict=True)
    }


@long_on_jax
def test_both_forms_have_the_same_gradients(autoencoders):
    losses, found = zip(
        *(loss_and_gradients(autoencoders[form], PIXELS, VISIBLE) for form in FORMS), strict=True
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    masked, tall = (list(gradients.values()) for gradients in found)
    assert len(masked) == len(tall) == 71
    for path, one, other in zip(found[0], masked, tall, strict=True):
        assert np.abs(one).max() > 0, path
        assert relative_error(other, one) <= 1e-5, path


@long_on_jax
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_gradients_are_finite_with_a_channel_that_is_zero_where_visible(policy, form):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        body = made_body()
        autoencoder = MaskedAutoencoder(body, decoder_width=8, encoder=form)
    finally:
        keras.config.set_dtype_policy(before)
    for block in (layer for layer in body.layers if hasattr(layer, "grn")):
        kernel, bias = (as_numpy(weight) for weight in block.pwconv1.weights)
        kernel[:, 1], bias[1] = 0, 0  # GELU of 0 is 0
        block.pwconv1.set_weights([kernel, bias])
    loss, gradients = loss_and_gradients(autoencoder, PIXELS, VISIBLE)
    assert math.isfinite(loss)
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path
    result = outputs(autoencoder, PIXELS, VISIBLE)
    assert result["prediction"].dtype == "float32"


# The loss.


def loss_of(autoencoder, images, visible, prediction):
    y_pred = {"prediction": ops.convert_to_tensor(prediction, "float32")}
    x = (ops.convert_to_tensor(images, "float32"), ops.convert_to_tensor(visible))
    return float(autoencoder.compute_loss(x=x, y_pred=y_pred))


def test_loss_is_that_of_each_masked_cell_by_its_own_mean_and_unbiased_variance(autoencoders):
    autoencoder = autoencoders["masked"]
    zeros, rng = np.zeros((2, 15, 3072)), np.random.default_rng(2)
    assert loss_of(autoencoder, PIXELS, VISIBLE, zeros) == pytest.approx(3071 / 3072, abs=2e-6)
    prediction = rng.normal(size=zeros.shape)
    errors = []
    for sample, row, column in np.argwhere(~VISIBLE):
        patch = NORMALISED[sample, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32].reshape(-1)
        target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        errors.append(np.mean((prediction[sample, 5 * row + column] - target) ** 2))
    assert loss_of(autoencoder, PIXELS, VISIBLE, prediction) == pytest.approx(np.mean(errors), rel=1e-5)
    assert loss_of(autoencoder, PIXELS, ~VISIBLE, prediction) != pytest.approx(np.mean(errors), rel=1e-5)


@long_on_jax
def test_loss_begins_near_one_and_below_for_flat_cells():
    """Kernels of a standard deviation of 1, as the official code draws some, would give far more."""
    autoencoder = MaskedAutoencoder(keras_convnext.load(SMALL.name, weights=None, include_top=False))
    images = PIXELS.copy()
    assert autoencoder.pred.kernel.shape == (512, 3072)
    for weight in (autoencoder.mask_token, autoencoder.pred.kernel, autoencoder.projection.kernel):
        assert np.std(as_numpy(weight)) == pytest.approx(0.02, rel=0.1)
    y_pred = outputs(autoencoder, images, VISIBLE)["prediction"]
    assert loss_of(autoencoder, images, VISIBLE, y_pred) == pytest.approx(1, abs=0.02)
    images[:, :, :64] = 255 * MEAN
    half = np.zeros((2, 3, 5), bool)
    half[:, :, 2:4] = True  # six of the nine masked cells are flat
    assert loss_of(autoencoder, images, half, np.zeros((2, 15, 3072))) == pytest.approx(1 / 3, abs=0.01)


def test_without_norm_pix_loss_targets_are_normalised_pixels(autoencoders):
    autoencoder = MaskedAutoencoder(autoencoders["masked"].body, decoder_width=8, norm_pix_loss=False)
    target = as_numpy(autoencoder.targets(PIXELS))
    expected = NORMALISED[1, 33, 66, 2]
    assert target[1, 5 + 2, (1 * 32 + 2) * 3 + 2] == pytest.approx(expected, abs=1e-5)


def test_patches_are_ordered_row_by_row():
    images = np.random.default_rng(3).normal(size=(2, 8, 12, 3)).astype("float32")
    patches = as_numpy(fcmae.patchify(ops.convert_to_tensor(images), 4))
    assert patches.shape == (2, 6, 48)
    for a, b, i, j, channel in np.random.default_rng(4).integers(0, (2, 3, 4, 4, 3), (50, 5)):
        expected = images[1, 4 * a + i, 4 * b + j, channel]
        assert patches[1, a * 3 + b, (i * 4 + j) * 3 + channel] == expected
    back = as_numpy(fcmae.unpatchify(ops.convert_to_tensor(patches), (2, 3), 4))
    np.testing.assert_array_equal(back, images)
    transposed = as_numpy(fcmae.unpatchify(ops.convert_to_tensor(patches), (3, 2), 4))
    assert transposed.shape != images.shape


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_of_the_targets_is_the_image(autoencoders, norm_pix_loss):
    autoencoder = MaskedAutoencoder(autoencoders["masked"].body, decoder_width=8, norm_pix_loss=norm_pix_loss)
    targets = as_numpy(autoencoder.targets(PIXELS))
    picture = as_numpy(autoencoder.reconstruction(PIXELS, VISIBLE, targets))
    np.testing.assert_allclose(picture, PIXELS, atol=0.01)
    picture = as_numpy(autoencoder.reconstruction(PIXELS, VISIBLE, 0 * targets))
    seen = VISIBLE.repeat(32, 1).repeat(32, 2)
    np.testing.assert_allclose(picture[seen], PIXELS[seen], atol=1e-4)
    assert np.abs(picture - PIXELS)[~seen].mean() > 30


# Masks.


@pytest.mark.once
def test_masks_are_exact_and_every_cell_is_equally_likely():
    masks = draw_masks(np.random.default_rng(0), 10_000, (7, 7), 0.6)
    assert masks.shape == (10_000, 7, 7) and masks.dtype == bool
    assert (masks.sum((1, 2)) == 19).all()
    share = 19 / 49
    assert np.abs(masks.mean(0) - share).max() < 5 * math.sqrt(share * (1 - share) / 10_000)
    np.testing.assert_array_equal(masks, draw_masks(np.random.default_rng(0), 10_000, (7, 7), 0.6))
    assert (masks != draw_masks(np.random.default_rng(1), 10_000, (7, 7), 0.6)).any()
    assert draw_masks(np.random.default_rng(0), 1, (10, 10), 0.9).sum() == int(100 * (1 - 0.9)) == 9


@pytest.mark.once
@pytest.mark.parametrize(("cells", "ratio", "kept"), [((3, 3), 0.9, 0), ((2, 2), 0.0, 4), ((1, 1), 0.5, 0)])
def test_a_ratio_that_leaves_no_or_all_cells_is_refused(cells, ratio, kept):
    message = f"Received: mask_ratio={ratio}, which leaves {kept}."
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_masks(np.random.default_rng(0), 2, cells, ratio)


@long_on_jax
def test_the_model_draws_masks_anew(autoencoders):
    autoencoder = autoencoders["tall"]
    first, second = (as_numpy(autoencoder(ops.convert_to_tensor(PIXELS, "float32"))) for _ in range(2))
    assert (first["visible"].sum((1, 2)) == 6).all()
    assert (first["visible"] != second["visible"]).any()
    assert not first["features"][~first["visible"]].any()
    assert first["features"][first["visible"]].all()


# As any Keras model.


@long_to_compile
@pytest.mark.parametrize("form", FORMS)
def test_fit_lowers_the_loss(form):
    rng = np.random.default_rng(0)
    images = 255 * np.linspace(0, 1, 64)[None, :, None, None] * rng.uniform(0.2, 1, (8, 1, 96, 3))
    body = keras_convnext.load(SMALL.name, weights=None, include_top=False)
    autoencoder = MaskedAutoencoder(body, decoder_width=16, encoder=form, seed=0)
    autoencoder.compile(keras.optimizers.AdamW(3e-3))
    before = autoencoder.body.get_weights()
    losses = autoencoder.fit(images, batch_size=8, epochs=30, verbose=0).history["loss"]
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert losses[-1] < 0.75 * losses[0]
    for old, new in zip(before, autoencoder.body.get_weights(), strict=True):
        assert (old != new).any() or old.shape == (3,) or old.shape == ()


@long_to_compile
def test_fit_takes_given_masks_and_refuses_to_hide_wrong_ones(autoencoders):
    autoencoder = MaskedAutoencoder(autoencoders["masked"].body, decoder_width=8, encoder="tall")
    autoencoder.compile(keras.optimizers.SGD(0.0))
    images = PIXELS.astype("float32")
    expected = loss_of(autoencoder, images, VISIBLE, outputs(autoencoder, images, VISIBLE)["prediction"])
    assert autoencoder.evaluate((images, VISIBLE), verbose=0) == pytest.approx(expected, rel=1e-5)
    history = autoencoder.fit((images, VISIBLE), verbose=0).history
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)
    if BACKEND != "torch":  # which computes eagerly, with any masks
        wrong = VISIBLE.copy()
        wrong[0] = True
        assert math.isnan(autoencoder.evaluate((images, wrong), verbose=0))
        chosen = MaskedAutoencoder(
            autoencoder.body, decoder_width=8
        )  # which cannot count, and takes "masked"
        chosen.set_weights(autoencoder.get_weights())
        chosen.compile(keras.optimizers.SGD(0.0))
        expected = loss_of(chosen, images, wrong, outputs(chosen, images, wrong)["prediction"])
        assert chosen.evaluate((images, wrong), verbose=0) == pytest.approx(expected, rel=1e-5)


@long_on_jax
def test_cells_of_several_positions_and_other_channels():
    body = made_body(input_shape=(None, None, 1), include_preprocessing=False)
    pair = [MaskedAutoencoder(body, encoder=form, decoder_width=8, cell=64) for form in FORMS]
    pair[1].set_weights(pair[0].get_weights())
    images, visible = PIXELS[:, :64, :128, :1] / 255, np.array([[[True, False]]] * 2)
    inputs = ops.convert_to_tensor(images, "float32"), ops.convert_to_tensor(visible)
    masked, tall = (as_numpy(one(inputs)) for one in pair)
    assert masked["features"].shape == (2, 2, 4, 10)
    assert masked["prediction"].shape == (2, 2, 64 * 64)
    assert relative_error(tall["prediction"], masked["prediction"]) <= 1e-5
    plain = keras.Model(body.input, body.pyramid_outputs["P5"])
    crop = as_numpy(plain(ops.convert_to_tensor(images[:, :64, :64], "float32")))
    assert relative_error(tall["features"][:, :2, :2], crop) <= 1e-5


def test_a_keras_file_gives_the_same_autoencoder(autoencoders, tmp_path):
    autoencoder = autoencoders["tall"]
    autoencoder.save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")
    expected, received = (outputs(one, PIXELS, VISIBLE) for one in (autoencoder, loaded))
    for name, values in expected.items():
        np.testing.assert_array_equal(received[name], values)
    config = loaded.get_config()
    assert {name: config[name] for name in ("encoder", "cell", "decoder_width")} == {
        "encoder": "tall",
        "cell": 32,
        "decoder_width": 8,
    }


def official_remap(state):
    """What `remap_checkpoint_keys` of the official utils.py makes of names and shapes, written anew."""
    result = {}
    for name, value in state.items():
        name = name.removeprefix("encoder.")
        if name.endswith(".kernel"):
            name = name.removesuffix(".kernel") + ".weight"
            taps = value.T[:, None] if value.ndim == 2 else value.transpose(2, 1, 0)
            side = math.isqrt(taps.shape[-1])
            value = taps.reshape(*taps.shape[:2], side, side).swapaxes(2, 3)
        name = re.sub(r"\.(ln|linear)\.", ".", name)
        if name.endswith("bias") and value.ndim != 1:
            value = value.reshape(-1)
        elif "grn" in name:
            value = value[None, None]
        result[name] = value
    return result


def test_fcmae_files_are_those_that_official_fine_tuning_reads(autoencoders, tmp_path):
    from safetensors.numpy import load_file

    autoencoder = autoencoders["tall"]
    path = keras_convnext.save_weights(autoencoder, tmp_path / "x.safetensors", layout="fcmae")
    remapped = official_remap(load_file(path))
    whole = keras_convnext.load(SMALL.name, weights=None)
    keras_convnext.save_weights(whole, tmp_path / "whole.safetensors")
    shapes = {name: value.shape for name, value in load_file(tmp_path / "whole.safetensors").items()}
    lacking = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert {name: value.shape for name, value in remapped.items()} == {
        name: shape for name, shape in shapes.items() if name not in lacking
    }
    own = keras_convnext.state_dict(autoencoder.body)
    for name, value in own.items():
        np.testing.assert_array_equal(remapped[name].reshape(value.shape), value, err_msg=name)


def test_fine_tuning_starts_from_a_file_of_the_encoder(autoencoders, tmp_path):
    own = keras_convnext.state_dict(autoencoders["tall"].body)
    for name, what in (("x.pt", autoencoders["tall"]), ("y.safetensors", None)):
        if name == "y.safetensors":  # from a classifier too the body alone
            what = keras_convnext.load(SMALL.name, weights=tmp_path / "x.pt", classes=7)
        path = keras_convnext.save_weights(what, tmp_path / name, layout="fcmae")
        state = keras_convnext.state_dict(keras_convnext.load(SMALL.name, weights=path, classes=5))
        for key, value in own.items():
            np.testing.assert_array_equal(state[key], value, err_msg=key)
        assert (state["norm.weight"] == 1).all() and not state["norm.bias"].any()
        assert state["head.weight"].shape == (5, 10)
        assert not state["head.bias"].any() and 0 < np.std(state["head.weight"]) < 0.03


# Bad input.


def test_bodies_that_fcmae_cannot_train_are_refused():
    v1 = keras_convnext.TestConvNeXt2(weights=None, include_top=False)
    with pytest.raises(ValueError, match=r"FCMAE needs the blocks of ConvNeXt V2.*'test_convnext2'.*SparK"):
        MaskedAutoencoder(v1)
    with pytest.raises(ValueError, match=r"Expected a ConvNeXt V2 of this package.*Received: 'atto'"):
        MaskedAutoencoder("atto")
    dilated = keras_convnext.load(SMALL.name, weights=None, include_top=False, output_stride=16)
    with pytest.raises(ValueError, match=r"output stride 32.*with the layer 'downsample_layers_3_1'"):
        MaskedAutoencoder(dilated)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "sparse"}, "encoder must be .* Received: encoder='sparse'"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\).* Received: mask_ratio=1.0"),
        ({"decoder_width": 0}, "decoder_width must be a whole number from 1 up. Received: decoder_width=0"),
        ({"decoder_depth": 1.5}, "decoder_depth must be a whole number"),
        (
            {"cell": 48},
            "cell must be a multiple of 32, the total stride of 'convnextv2_atto'. Received: cell=48",
        ),
    ],
)
def test_settings_out_of_range_are_refused(autoencoders, settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(autoencoders["tall"].body, **settings)


def test_images_and_masks_that_do_not_fit_are_refused(autoencoders):
    autoencoder = autoencoders["tall"]
    message = r"multiples of the cell, 32 pixels\. Received: 100 x 64\. Resize them, to 96 x 64"
    with pytest.raises(ValueError, match=message):
        autoencoder(np.zeros((1, 100, 64, 3), "float32"))
    with pytest.raises(ValueError, match=r"Expected visible as \(N, 2, 3\).*Received shape \(1, 3, 2\)"):
        autoencoder((np.zeros((1, 64, 96, 3), "float32"), np.ones((1, 3, 2), bool)))
    with pytest.raises(ValueError, match=r"of 1 x 1 cells\. Received: mask_ratio=0\.6, which leaves 0"):
        autoencoder(np.zeros((1, 32, 32, 3), "float32"))


def test_only_v2_is_written_as_fcmae(tmp_path):
    v1 = keras_convnext.TestConvNeXt2(weights=None)
    with pytest.raises(ValueError, match="cannot be written in the layout 'fcmae'"):
        keras_convnext.save_weights(v1, tmp_path / "x.pt", layout="fcmae")
    assert not [*tmp_path.iterdir()]
