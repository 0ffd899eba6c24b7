"""The constructors: signatures and tables of all architectures, behaviour of reduced ones."""

import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from unittest import mock

import keras
import numpy as np
import pytest
from layer_contract import as_numpy, forward, learning, randomize, relative_error

import keras_convnext
from keras_convnext.convnext import drop_path_rates
from keras_convnext.training import finetune
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import assign, catalog, layouts

pytestmark = pytest.mark.one_backend

TOLERANCE = 1e-5
OTHER_BACKEND = "tensorflow" if keras.backend.backend() == "torch" else "torch"

# Rows cut down to what compiles fast: narrow, and with 3x3 kernels where the name allows (JAX unrolls 7x7).
REDUCED = {
    name: dataclasses.replace(VARIANTS[name], **changes)
    for name, changes in {
        "test_convnext2": {"depths": (1, 1, 2, 1)},
        "convnextv2_atto": {"depths": (1, 1, 2, 1)},
        "convnext_tiny_hnf": {"depths": (1, 1, 1, 1)},
        "convnext_large_mlp": {"depths": (1, 1, 1, 1)},
        "convnext_isotropic_large": {"depths": (2,), "dims": (16,), "kernel_sizes": (3,)},
    }.items()
}
for _name, _row in REDUCED.items():
    if not _row.isotropic:
        REDUCED[_name] = dataclasses.replace(_row, dims=(8, 16, 24, 32), kernel_sizes=(3, 3, 3, 3))
V1, V2, ISOTROPIC = "test_convnext2", "convnextv2_atto", "convnext_isotropic_large"


def build(architecture, weights=None, random=True, **settings):
    """A reduced model; by default 32x32 images, ten classes, and every weight random."""
    settings = {"input_shape": (32, 32, 3)} | settings
    if settings.get("include_top", True):
        settings = {"classes": 10} | settings
    with mock.patch.dict(VARIANTS, REDUCED):
        model = keras_convnext.load(architecture, weights, **settings)
    if weights is None and random:
        randomize(model, scale=0.2)
    return model


def share_weights(source, target):
    """Gives `target` the weights of `source` by name; those that only one of them has are left alone."""
    values = {weight.path: as_numpy(weight.value) for weight in source.weights}
    for weight in target.weights:
        if weight.path in values:
            weight.assign(values[weight.path])
    return target


def pixels(*shape, seed=3):
    return np.random.default_rng(seed).integers(0, 256, shape).astype("float32")


def layer_norm(x, model, name, epsilon):
    layer = model.get_layer(name)
    gamma, beta = (as_numpy(weight.value).astype("float64") for weight in (layer.gamma, layer.beta))
    x = x.astype("float64")
    return gamma * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) + beta


IMAGES = pixels(2, 32, 32, 3)


@functools.cache
def base(name):
    return build(name)


@functools.cache
def maps(name):
    """The stage outputs of the base model for IMAGES."""
    model = base(name)
    return forward(keras.Model(model.input, model.pyramid_outputs), IMAGES)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")


# All architectures

ARCHITECTURES = pytest.mark.parametrize("architecture", VARIANTS)
_WORDS = {
    "convnext": "ConvNeXt",
    "convnextv2": "ConvNeXtV2",
    "convnext2": "ConvNeXt2",
    "convnext3": "ConvNeXt3",
    "xlarge": "XLarge",
    "xxlarge": "XXLarge",
}


def constructor_name(architecture):
    return "".join(_WORDS.get(word, word.capitalize()) for word in architecture.split("_"))


def constructor_of(architecture):
    return getattr(keras_convnext, constructor_name(architecture))


def declare(make, *arguments, **settings):
    """A model whose weights are declared and never allocated."""
    with keras.StatelessScope(initialize_variables=False):
        model = make(*arguments, **settings)
    # Keras keeps a list of what is declared, and the end of the next scope would allocate all of it.
    keras.utils.clear_session(free_memory=False)
    return model


@functools.cache
def declared(architecture):
    """The full architecture, declared."""
    return declare(constructor_of(architecture), weights=None)


def test_there_are_34_architectures():
    assert len(VARIANTS) == 34
    assert all(name == row.name for name, row in VARIANTS.items())


def test_every_public_constructor_is_of_one_architecture():
    public = {
        name
        for name in dir(keras_convnext)
        if re.match(r"(Test)?ConvNeXt", name) and not name.endswith("Block")
    }
    assert public - {"ConvNeXt"} == {constructor_name(architecture) for architecture in VARIANTS}


@ARCHITECTURES
def test_signature_is_that_of_keras_applications(architecture):
    constructor = constructor_of(architecture)
    assert constructor.__name__ == constructor.__qualname__ == constructor_name(architecture)
    ours = list(inspect.signature(constructor).parameters.values())
    theirs = list(inspect.signature(keras.applications.ConvNeXtTiny).parameters.values())
    shared, further = ours[: len(theirs)], ours[len(theirs) :]
    assert [(one.name, one.kind) for one in shared] == [(one.name, one.kind) for one in theirs]
    for one, other in zip(shared, theirs, strict=True):
        assert one.default == (architecture if one.name == "name" else other.default), one.name
    assert [(one.name, one.default) for one in further] == [
        ("drop_path_rate", 0.0),
        ("layer_scale_init_value", None),
        ("output_stride", 32),
        ("pyramid_norms", False),
        ("rematerialize", False),
        ("seed", None),
        ("new_head", None),
    ]
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in further)


def test_name_default_of_tiny_is_that_of_keras_applications():
    theirs = inspect.signature(keras.applications.ConvNeXtTiny).parameters["name"].default
    assert inspect.signature(keras_convnext.ConvNeXtTiny).parameters["name"].default == theirs


def test_load_takes_every_argument_of_a_constructor():
    ours = inspect.signature(keras_convnext.load).parameters
    wanted = set(inspect.signature(keras_convnext.ConvNeXtTiny).parameters)
    assert set(ours) - wanted == {"architecture_or_tag"}
    assert wanted <= set(ours)


@ARCHITECTURES
def test_docstring_states_parameters_and_what_imagenet_means(architecture):
    text = inspect.getdoc(constructor_of(architecture))
    row, tag = VARIANTS[architecture], catalog.IMAGENET[architecture]
    assert f"{row.parameters:,} weights at 1000 classes" in text
    assert f"depths {row.depths}, dims {row.dims}" in text
    if tag is None:
        assert '"imagenet" for nothing: no ImageNet file was published;' in text
    else:
        assert f'"imagenet" for the tag "{tag}";' in text
    arxiv = {1: "2201.03545", 2: "2301.00808"}
    assert arxiv[row.version] in text and arxiv[3 - row.version] not in text
    assert f"{constructor_name(architecture)}(weights=None" in text
    for name in inspect.signature(constructor_of(architecture)).parameters:
        assert f"\n    {name}: " in text, name
    assert not re.search(r"[{}]", text.replace('{"P2": ..., "P5": ...}', ""))


# Liu et al. 2022, appendix A.4 (tiny to xlarge) and table 2 (isotropic); Woo et al. 2023, appendix A.1.
PAPERS = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "convnext_isotropic_small": ((18,), (384,)),
    "convnext_isotropic_base": ((18,), (768,)),
    "convnext_isotropic_large": ((36,), (1024,)),
    "convnextv2_atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnextv2_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


@pytest.mark.parametrize("architecture", PAPERS)
def test_depths_and_dims_are_those_of_the_paper(architecture):
    row = VARIANTS[architecture]
    assert (row.depths, row.dims) == PAPERS[architecture]
    assert (row.epsilon, row.norm, row.activation, set(row.kernel_sizes)) == (1e-6, "layer_norm", "gelu", {7})


@pytest.mark.parametrize("architecture", [name for name, row in VARIANTS.items() if row.stem != "isotropic"])
@pytest.mark.once
def test_depths_dims_and_parameters_are_those_of_timm(architecture):
    import timm
    import torch

    with torch.device("meta"):
        theirs = timm.create_model(architecture)
    row = VARIANTS[architecture]
    assert tuple(len(stage.blocks) for stage in theirs.stages) == row.depths
    assert tuple(info["num_chs"] for info in theirs.feature_info) == row.dims
    if theirs.num_classes == 1000:
        assert sum(parameter.numel() for parameter in theirs.parameters()) == row.parameters


@ARCHITECTURES
def test_parameter_count_is_that_of_the_table(architecture):
    weights = declared(architecture).weights
    assert sum(int(np.prod(weight.shape)) for weight in weights) == VARIANTS[architecture].parameters


@ARCHITECTURES
def test_names_and_shapes_of_weights_are_those_a_file_must_have(architecture):
    ours = {}
    for weight in declared(architecture).weights:
        shape = assign._to_torch(np.broadcast_to(np.float32(0), weight.shape), weight.path).shape
        ours[assign._canonical_name(weight.path)] = shape
    assert ours == layouts.weight_shapes(VARIANTS[architecture])


@ARCHITECTURES
def test_image_size_and_classes_default_to_those_of_the_weights(architecture):
    tag = catalog.IMAGENET[architecture]
    if tag is not None:
        side = catalog.CHECKPOINTS[tag].image_size
        assert declared(architecture).input_shape == (None, side, side, 3)
    assert declared(architecture).output_shape == (None, 1000)
    assert declared(architecture).name == architecture


# What the arguments do


@pytest.mark.every_backend
@pytest.mark.parametrize("name", [V1, V2, ISOTROPIC])
def test_top_is_norm_of_the_mean_map_and_a_softmax_classifier(name):
    model = base(name)
    last = maps(name)["P4" if name == ISOTROPIC else "P5"].astype("float64")
    features = layer_norm(last.mean((1, 2)), model, "norm", REDUCED[name].epsilon)
    kernel, bias = (weight.astype("float64") for weight in model.get_layer("head").get_weights())
    logits = features @ kernel + bias
    expected = np.exp(logits - logits.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    probabilities = forward(model, IMAGES)
    assert probabilities.shape == (2, 10) and probabilities.dtype == "float32"
    assert relative_error(probabilities, expected) < TOLERANCE
    assert relative_error(forward(build(name, classifier_activation=None), IMAGES), logits) < TOLERANCE
    assert relative_error(probabilities, logits) > 0.1


@pytest.mark.every_backend
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pooled_features_are_the_norm_of_the_pooled_map(pooling):
    model = share_weights(base(V1), build(V1, include_top=False, pooling=pooling))
    last = maps(V1)["P5"].astype("float64")
    pooled = {"avg": last.mean((1, 2)), "max": last.max((1, 2))}
    features = forward(model, IMAGES)
    expected = {kind: layer_norm(one, model, "norm", 1e-5) for kind, one in pooled.items()}
    assert model.output_shape == (None, 32) and "convnext_head" not in [layer.name for layer in model.layers]
    assert relative_error(features, expected[pooling]) < TOLERANCE
    # On a 1x1 map mean and maximum are one; on a larger map they are not.
    wide = pixels(1, 64, 64, 3)
    open_model = share_weights(model, build(V1, include_top=False, pooling=pooling, input_shape=(64, 64, 3)))
    open_map = forward(keras.Model(open_model.input, open_model.pyramid_outputs["P5"]), wide)
    wide_pooled = {"avg": open_map.mean((1, 2)), "max": open_map.max((1, 2))}
    wide_features = forward(open_model, wide)
    other = "max" if pooling == "avg" else "avg"
    assert relative_error(wide_features, layer_norm(wide_pooled[pooling], model, "norm", 1e-5)) < TOLERANCE
    assert relative_error(wide_features, layer_norm(wide_pooled[other], model, "norm", 1e-5)) > 10 * TOLERANCE


@pytest.mark.every_backend
def test_features_without_pooling_are_the_norm_of_each_position():
    model = share_weights(base(V1), build(V1, include_top=False))
    features = forward(model, IMAGES)
    assert model.output_shape == (None, 1, 1, 32)
    assert relative_error(features, layer_norm(maps(V1)["P5"], model, "norm", 1e-5)) < TOLERANCE
    assert relative_error(features, maps(V1)["P5"]) > 0.1


@pytest.mark.every_backend
def test_norm_first_head_normalises_before_it_pools():
    settings = {"include_top": False, "input_shape": (64, 64, 3)}
    model = build("convnext_tiny_hnf", pooling="avg", **settings)
    images = pixels(1, 64, 64, 3)
    both = keras.Model(model.input, {"map": model.pyramid_outputs["P5"], "features": model.output})
    result = forward(both, images)
    expected = layer_norm(result["map"], model, "norm_pre", 1e-6).mean((1, 2))
    swapped = layer_norm(result["map"].mean((1, 2)), model, "norm_pre", 1e-6)
    assert relative_error(result["features"], expected) < TOLERANCE
    assert relative_error(result["features"], swapped) > 10 * TOLERANCE


def test_mlp_head_has_a_hidden_layer_only_with_the_top():
    model = build("convnext_large_mlp")
    assert model.get_layer("pre_logits").kernel.shape == (32, 32)
    names = [layer.name for layer in model.layers]
    assert names[-3:] == ["convnext_norm", "convnext_pre_logits", "convnext_head"]
    bare = build("convnext_large_mlp", include_top=False, pooling="avg")
    assert "pre_logits" not in [layer.name for layer in bare.layers]
    features = forward(share_weights(model, bare), IMAGES).astype("float64")
    kernel, bias = model.get_layer("pre_logits").get_weights()
    hidden = as_numpy(keras.activations.gelu(features.astype("float32") @ kernel + bias, approximate=False))
    kernel, bias = model.get_layer("head").get_weights()
    probabilities = forward(model, IMAGES)
    expected = as_numpy(keras.ops.softmax(hidden @ kernel + bias))
    assert relative_error(probabilities, expected) < TOLERANCE


@pytest.mark.every_backend
def test_images_need_not_be_square_or_divisible_by_32():
    model = share_weights(base(V1), build(V1, include_top=False, input_shape=(33, 47, 3)))
    assert model.output_shape == (None, 1, 1, 32)
    images = pixels(2, 33, 47, 3)
    features = forward(model, images)
    assert features.shape == (2, 1, 1, 32)
    # Strided patches leave the rest of the image unseen.
    cut = images.copy()
    cut[:, 32:] = 0
    np.testing.assert_array_equal(forward(model, cut), features)


@pytest.mark.every_backend
@pytest.mark.every_backend
def test_images_below_32_pixels_end_in_the_same_sentence_as_an_input_shape():
    sentence = "Images must be at least 32x32: five halvings leave nothing of smaller ones"
    with pytest.raises(ValueError, match=sentence):
        build(V1, input_shape=(28, 28, 3), random=False)
    model = build(V1, input_shape=(None, None, 3))
    small = np.zeros((1, 28, 64, 3), "float32")
    # On JAX an error in Keras's `predict` costs the model its weights; in `predict_on_batch` it does not.
    for _ in range(2):  # the second time with a graph for any size, on TensorFlow
        for call in (model, lambda x: model.predict_on_batch(x), lambda x: model(keras.Input(x.shape[1:]))):
            with pytest.raises(Exception, match=sentence):
                call(small)
        for side in (32, 40):
            assert np.isfinite(model.predict_on_batch(np.zeros((1, side, 33, 3)))).all()


@pytest.mark.every_backend
@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="its convolutions of no images have the shape of the input",
)
@pytest.mark.parametrize("name", [V1, V2])
def test_a_batch_of_no_images_gives_no_results(name):
    model = base(name)
    for images in (np.zeros((0, *IMAGES.shape[1:]), "float32"), np.zeros((0, *IMAGES.shape[1:]), "uint8")):
        assert (
            tuple(model(images).shape)
            == tuple(model.predict_on_batch(images).shape)
            == (0, *model.output_shape[1:])
        )


def test_open_input_shape_takes_images_of_several_sizes():
    model = share_weights(base(V1), build(V1, include_top=False, input_shape=(None, None, 3)))
    assert model.output_shape == (None, None, None, 32)
    assert forward(model, pixels(1, 64, 96, 3)).shape == (1, 2, 3, 32)
    features = forward(model, IMAGES)
    assert (
        relative_error(features, forward(share_weights(base(V1), build(V1, include_top=False)), IMAGES))
        < TOLERANCE
    )


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_any_number_of_channels_builds_and_is_normalised(channels):
    model = build(V2, input_shape=(32, 32, channels))
    assert model.get_layer("downsample_layers_0_0").kernel.shape == (4, 4, channels, 8)
    means, stds = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    if channels == 1:
        means, stds = means.mean(keepdims=True), stds.mean(keepdims=True)
    order = np.arange(channels) % 3
    images = pixels(1, 32, 32, channels)
    normaliser = keras.Model(model.input, model.get_layer("normalization").output)
    expected = (images / 255 - means[order]) / stds[order]
    assert relative_error(forward(normaliser, images), expected) < TOLERANCE
    assert np.all(np.isfinite(forward(model, images)))


@pytest.mark.every_backend
def test_uint8_pixels_give_the_same_as_float_pixels():
    model = base(V1)
    as_bytes = IMAGES.astype("uint8")
    result = as_numpy(model.predict(as_bytes, verbose=0))
    np.testing.assert_array_equal(result, model.predict(IMAGES, verbose=0))
    assert relative_error(forward(model, IMAGES), result) < TOLERANCE


@pytest.mark.every_backend
def test_without_preprocessing_the_caller_normalises():
    bare = share_weights(base(V1), build(V1, include_preprocessing=False))
    assert "convnext_normalization" not in [layer.name for layer in bare.layers]
    row = catalog.CHECKPOINTS[catalog.IMAGENET[V1]]
    normalised = ((IMAGES / 255 - np.array(row.mean)) / np.array(row.std)).astype("float32")
    expected = forward(base(V1), IMAGES)
    assert relative_error(forward(bare, normalised), expected) < TOLERANCE
    assert relative_error(forward(bare, IMAGES), expected) > 10 * TOLERANCE


@pytest.mark.every_backend
def test_input_tensor_joins_layers_in_front(tmp_path):
    image = keras.Input((32, 32, 1), name="grey")
    rgb = keras.layers.Concatenate(name="to_rgb")([image, image, image])
    scaled = keras.layers.Rescaling(255, name="to_255")(rgb)
    model = share_weights(base(V1), build(V1, input_tensor=scaled, input_shape=None, random=False))
    grey = (pixels(2, 32, 32, 1) / 255).astype("float32")
    expected = forward(base(V1), np.repeat(grey * 255, 3, -1))
    assert model.input_shape == (None, 32, 32, 1)
    assert relative_error(forward(model, grey), expected) < TOLERANCE
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, keras_convnext.ConvNeXt)
    assert relative_error(forward(loaded, grey), expected) < TOLERANCE
    assert set(keras_convnext.state_dict(loaded)) == set(keras_convnext.state_dict(base(V1)))


def test_input_tensor_may_be_a_bare_input():
    image = keras.Input((32, 32, 3), name="mine")
    model = build(V1, input_tensor=image, input_shape=None)
    assert model.input is image
    assert relative_error(forward(model, IMAGES), forward(base(V1), IMAGES)) < TOLERANCE


def test_name_is_free_and_changes_no_weight_name():
    model = keras_convnext.TestConvNeXt2(weights=None, name="my.model-1", input_shape=(32, 32, 3), classes=2)
    assert model.name == "my.model-1"
    assert build(V1, name="my.model-1").name == "my.model-1"
    expected = layouts.weight_shapes(VARIANTS[V1], classes=2)
    assert {name: one.shape for name, one in keras_convnext.state_dict(model).items()} == expected


def test_constructor_and_load_build_the_same():
    one = declare(keras_convnext.TestConvNeXt2, False, False, None, None, (None, None, 3), "max")
    other = declare(
        keras_convnext.load,
        "test_convnext2",
        None,
        include_top=False,
        include_preprocessing=False,
        pooling="max",
    )
    assert one.output_shape == other.output_shape == (None, 128)
    assert [weight.path for weight in one.weights] == [weight.path for weight in other.weights]
    assert [layer.name for layer in one.layers][1:] == [layer.name for layer in other.layers][1:]


def test_tag_sets_image_size_classes_and_normaliser():
    model = declare(keras_convnext.load, "convnext_tiny.fb_in22k", None)
    clip = declare(keras_convnext.load, "convnext_base.clip_laion2b", None)
    assert model.output_shape == (None, 21841)
    row = catalog.CHECKPOINTS["convnext_base.clip_laion2b"]
    assert clip.input_shape[1] == row.image_size and clip.output_shape == (None, row.classes)
    mean = as_numpy(keras.ops.convert_to_tensor(clip.get_layer("normalization").input_mean)).ravel()
    np.testing.assert_allclose(mean, [255 * value for value in row.mean])


# Stage outputs and output strides, against timm


def timm_model(architecture, path, **settings):
    """timm's model of a reduced row with random weights, which it writes to `path`."""
    import safetensors.torch
    import timm
    import torch

    row = REDUCED[architecture]
    theirs = timm.create_model(
        architecture,
        depths=row.depths,
        dims=row.dims,
        kernel_sizes=row.kernel_sizes,
        num_classes=10,
        **settings,
    ).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    safetensors.torch.save_file(theirs.state_dict(), path)
    return theirs


def timm_maps(theirs, images):
    import torch

    with torch.no_grad():
        stages = theirs.forward_intermediates(
            torch.tensor(images.transpose(0, 3, 1, 2).copy()), intermediates_only=True
        )
    return [stage.numpy().transpose(0, 2, 3, 1) for stage in stages]


@pytest.mark.every_backend
@pytest.mark.parametrize("name", [V1, V2])
def test_pyramid_outputs_equal_the_stages_of_timm(name, tmp_path):
    theirs = timm_model(name, tmp_path / "weights.safetensors")
    model = build(
        name,
        tmp_path / "weights.safetensors",
        include_top=False,
        include_preprocessing=False,
        input_shape=(64, 32, 3),
    )
    images = np.random.default_rng(4).normal(size=(1, 64, 32, 3)).astype("float32")
    ours = forward(keras.Model(model.input, model.pyramid_outputs), images)
    expected = timm_maps(theirs, images)
    assert list(model.pyramid_outputs) == ["P2", "P3", "P4", "P5"]
    for level, one in zip(ours.values(), expected, strict=True):
        assert relative_error(level, one) < TOLERANCE
    wrong = timm_maps(theirs, images[:, :, ::-1])  # the control: the image mirrored
    assert relative_error(ours["P5"], wrong[3]) > 10 * TOLERANCE


@pytest.mark.every_backend
@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride_equals_that_of_timm(stride, tmp_path):
    import torch

    path = tmp_path / "weights.safetensors"
    theirs = timm_model(V1, path, output_stride=stride)
    settings = {"include_top": False, "include_preprocessing": False, "input_shape": (64, 96, 3)}
    model = build(V1, path, output_stride=stride, **settings)
    images = np.random.default_rng(4).normal(size=(1, 64, 96, 3)).astype("float32")
    ours = forward(keras.Model(model.input, model.pyramid_outputs), images)
    expected = timm_maps(theirs, images)
    for level, one in zip(ours.values(), expected, strict=True):
        assert relative_error(level, one) < TOLERANCE
    assert ours["P5"].shape == (1, 64 // stride, 96 // stride, 32)
    for module in theirs.modules():  # the control: no dilation
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.dilation, module.padding = (1, 1), (1, 1)
    assert relative_error(ours["P5"], timm_maps(theirs, images)[3]) > 10 * TOLERANCE


@pytest.mark.parametrize(("stride", "side"), [(8, 8), (16, 4), (32, 2)])
def test_output_stride_sets_the_size_of_the_last_map_and_no_weight(stride, side):
    model = build(V1, include_top=False, input_shape=(64, 64, 3), output_stride=stride, random=False)
    assert model.output_shape == (None, side, side, 32)
    sides = [tensor.shape[1] for tensor in model.pyramid_outputs.values()]
    assert sides == [16, 8, max(4, side), side]
    usual = build(V1, include_top=False, random=False)
    assert [(one.path, one.shape) for one in model.weights] == [
        (one.path, one.shape) for one in usual.weights
    ]


def test_isotropic_model_has_one_level_of_stride_16():
    model = build(ISOTROPIC, include_top=False, input_shape=(64, 32, 3))
    assert {level: tensor.shape for level, tensor in model.pyramid_outputs.items()} == {
        "P4": (None, 4, 2, 16)
    }
    assert model.output_shape == (None, 4, 2, 16)


def test_pyramid_norms_normalise_each_level(tmp_path):
    model = build(V1, include_top=False, pyramid_norms=True)
    share_weights(base(V1), model)
    names = [layer.name for layer in model.layers]
    assert names[-4:] == [f"convnext_norm{level}" for level in range(4)] and "convnext_norm" not in names
    assert {level: tensor.shape for level, tensor in model.output.items()} == {
        "P2": (None, 8, 8, 8),
        "P3": (None, 4, 4, 16),
        "P4": (None, 2, 2, 24),
        "P5": (None, 1, 1, 32),
    }
    result = forward(model, IMAGES)
    for stage, (level, values) in enumerate(maps(V1).items()):
        expected = layer_norm(values, model, f"norm{stage}", 1e-6)
        assert relative_error(result[level], expected) < 3 * TOLERANCE
        assert relative_error(result[level], values) > 0.1
    expected = layouts.weight_shapes(REDUCED[V1], classes=0, pyramid_norms=True)
    assert {name: one.shape for name, one in keras_convnext.state_dict(model).items()} == expected
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = forward(loaded, IMAGES)
    assert list(again) == ["P2", "P3", "P4", "P5"]
    for level in result:
        np.testing.assert_array_equal(again[level], result[level])
    assert [tensor.name for tensor in loaded.pyramid_outputs.values()] == [
        tensor.name for tensor in loaded.output.values()
    ]


# Files that Keras writes


@pytest.mark.every_backend
@pytest.mark.parametrize(("name", "settings"), [(V1, {}), (V2, {}), (V1, {"drop_path_rate": 0.3, "seed": 1})])
def test_saved_model_loads_with_the_same_outputs_and_pyramid(name, settings, tmp_path):
    model = build(name, **settings)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is keras_convnext.ConvNeXt and loaded.name == name
    np.testing.assert_array_equal(forward(loaded, IMAGES), forward(model, IMAGES))
    assert json.dumps(loaded.get_config()) == json.dumps(model.get_config())  # lists and tuples are one
    levels = forward(keras.Model(loaded.input, loaded.pyramid_outputs), IMAGES)
    assert relative_error(levels["P5"], maps(name)["P5"]) < TOLERANCE
    rates = [layer.config["drop_path_rate"] for layer in loaded.layers if hasattr(layer, "config")]
    assert rates == drop_path_rates(settings.get("drop_path_rate", 0.0), 5)


def test_saved_model_loads_on_another_backend(tmp_path):
    model = build(V2)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", IMAGES)
    code = (
        "import sys, numpy as np, keras, keras_convnext; "
        "folder = sys.argv[1]; model = keras.saving.load_model(folder + '/model.keras'); "
        "np.save(folder + '/outputs.npy', model.predict(np.load(folder + '/images.npy'), verbose=0)); "
        "print(keras.backend.backend())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": OTHER_BACKEND},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-1] == OTHER_BACKEND
    outputs = np.load(tmp_path / "outputs.npy")
    assert relative_error(outputs, forward(model, IMAGES)) < TOLERANCE
    assert relative_error(outputs, forward(build(V2, random=False), IMAGES)) > 10 * TOLERANCE


# Frozen blocks


def freeze_stem_and_two_stages(body):
    for layer in body.layers[: [layer.name for layer in body.layers].index("downsample_layers_2_0")]:
        layer.trainable = False


def freeze_norms(body):
    for layer in body._flatten_layers(include_self=False):
        if "norm" in layer.name:
            layer.trainable = False


def freeze_all_but_norms(body):
    for layer in body._flatten_layers(include_self=False):
        layer.trainable = "norm" in layer.name


def freeze_body(body):
    body.trainable = False


FREEZINGS = [
    pytest.param(freeze_stem_and_two_stages, marks=pytest.mark.every_backend),
    freeze_norms,
    freeze_all_but_norms,
    pytest.param(freeze_body, marks=pytest.mark.every_backend),
]


def classifier_around(body, nested):
    """The body with three classes, as one layer of the model or as its layers."""
    if not nested:
        return keras.Model(
            body.input, keras.layers.Dense(3, activation="softmax", name="classes")(body.output)
        )
    image = keras.Input((32, 32, 3))
    return keras.Model(image, keras.layers.Dense(3, activation="softmax", name="classes")(body(image)))


def step(model):
    """The paths of the weights that a step of training changes."""
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    model.fit(IMAGES, np.array([0, 2]), batch_size=2, verbose=0)
    pairs = zip(before, model.weights, strict=True)
    return {weight.path for old, weight in pairs if not np.array_equal(old, as_numpy(weight.value))}


@pytest.mark.parametrize("freeze", FREEZINGS)
@pytest.mark.parametrize(("name", "nested"), [(V1, False), (V2, True)])
def test_a_model_learns_the_same_weights_after_it_was_saved_or_cloned(name, nested, freeze, tmp_path):
    body = build(name, include_top=False, pooling="avg")
    freeze(body)
    model = classifier_around(body, nested)
    expected = learning(model)
    assert 0 < sum(expected.values()) < len(expected) == len(model.weights)
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    custom = keras.saving.get_custom_objects()
    known = {name.split(">")[-1]: each for name, each in custom.items() if isinstance(each, type)}
    copies = {
        ".keras": keras.saving.load_model(tmp_path / "model.keras"),
        ".h5": keras.saving.load_model(tmp_path / "model.h5", custom_objects=known),
        "clone": keras.models.clone_model(model),
        "configuration": type(model).from_config(model.get_config()),
    }
    for how, copy in copies.items():
        assert learning(copy) == expected, how
    for how in (".keras", ".h5"):
        np.testing.assert_array_equal(forward(copies[how], IMAGES), forward(model, IMAGES), err_msg=how)


@pytest.mark.every_backend
@pytest.mark.parametrize("nested", [False, True])
def test_fine_tuning_in_two_stages_goes_on_after_a_restart(nested, tmp_path):
    """The head alone, then the last stages too: each from a file, and what is frozen keeps its bits."""
    body = build(V2, include_top=False, pooling="avg")
    freeze_body(body)
    model = classifier_around(body, nested)
    model.save(tmp_path / "first.keras")
    model = keras.saving.load_model(tmp_path / "first.keras")
    assert {path.split("/")[-2] for path in step(model)} == {"classes"}

    body = next((layer for layer in model.layers if isinstance(layer, keras.Model)), model)
    body.trainable = True
    freeze_stem_and_two_stages(body)
    expected = {path for path, flag in learning(model).items() if flag}
    model.save(tmp_path / "second.keras")
    model = keras.saving.load_model(tmp_path / "second.keras")
    assert step(model) == expected


@pytest.mark.every_backend
def test_a_backbone_that_is_frozen_by_a_word_is_frozen_after_a_restart(tmp_path):
    model = build(V2)
    finetune.choose_trainable(model, "head")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [weight.path for weight in loaded.trainable_weights] == [
        "convnext_head/kernel",
        "convnext_head/bias",
    ]


# Precision and training


@pytest.fixture
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def fit(model, steps=2, **compile_settings):
    """Losses of the first steps on two images, SGD, default compilation."""
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", **compile_settings)
    history = model.fit(IMAGES, np.array([1, 7]), batch_size=2, epochs=steps, shuffle=False, verbose=0)
    return history.history["loss"]


@pytest.mark.parametrize(
    "policy",
    [
        "float16",
        pytest.param("mixed_bfloat16", marks=pytest.mark.every_backend),
        "bfloat16",
        "mixed_float16",
    ],
    indirect=True,
)
def test_16_bit_policy_gives_float32_probabilities_and_a_finite_loss(policy, caplog):
    model = build(V1 if "bfloat16" in policy else V2, random=False)
    is_slow = keras.backend.backend() == "jax" and "bfloat16" in policy  # no accelerator here
    assert ("JAX takes longer in bfloat16" in caplog.text) == is_slow
    blocks = [layer for layer in model.layers if layer.name.startswith("stages_")]
    assert {layer.compute_dtype for layer in blocks} == {policy.removeprefix("mixed_")}
    assert (
        model.get_layer("head").compute_dtype == model.get_layer("normalization").compute_dtype == "float32"
    )
    probabilities = forward(model, IMAGES)
    assert probabilities.dtype == "float32" == model.output.dtype
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    assert np.all(np.isfinite(fit(model, steps=1)))


@functools.cache
def losses(rate=0.5, seed=1, rematerialize=False):
    keras.utils.set_random_seed(11)
    model = build(
        V1,
        random=False,
        drop_path_rate=rate,
        seed=seed,
        rematerialize=rematerialize,
        layer_scale_init_value=1.0,
    )
    randomize(model)
    return tuple(fit(model))


@pytest.mark.every_backend
def test_training_with_drop_path_repeats_with_the_seed():
    first = losses(seed=1)
    losses.cache_clear()
    assert losses(seed=1) == first
    assert np.all(np.isfinite(first))


@pytest.mark.every_backend
def test_training_with_drop_path_changes_with_the_seed():
    assert losses(seed=1) != losses(seed=2)


@pytest.mark.every_backend
def test_training_without_drop_path_does_not_depend_on_the_seed_and_lowers_the_loss():
    first, second = losses(rate=0.0)
    assert second != first and np.isfinite(second)
    assert losses(rate=0.5)[0] != first


@pytest.mark.every_backend
def test_rematerialised_model_trains_with_the_same_losses():
    np.testing.assert_allclose(losses(rate=0.0, rematerialize=True), losses(rate=0.0), rtol=1e-4)


@pytest.mark.every_backend
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a rule for XLA on a CPU")
def test_tensorflow_on_a_cpu_leaves_xla_out():
    """Keras does that; under XLA the depthwise convolution would be a hundred times slower."""
    model = build(V1, random=False)
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert model.jit_compile is False


@pytest.mark.every_backend
def test_no_layer_is_left_to_build_at_the_first_call():
    """On JAX an unbuilt layer costs an eager pass before the first step."""
    for architecture in (V1, V2, ISOTROPIC):
        model = build(architecture, drop_path_rate=0.1, random=False)
        assert [layer.name for layer in model._flatten_layers() if not layer.built] == []


def test_drop_path_rates_rise_linearly_to_the_last_block():
    model = build(V2, drop_path_rate=0.4, random=False)
    blocks = [layer for layer in model.layers if layer.name.startswith("stages_")]
    assert len(blocks) == 5
    np.testing.assert_allclose([block.drop_path.rate for block in blocks], [0, 0.1, 0.2, 0.3, 0.4])
    assert blocks[-1].drop_path.rate == blocks[-1].config["drop_path_rate"] == 0.4
    isotropic = build(ISOTROPIC, drop_path_rate=0.4, random=False)
    assert [isotropic.get_layer(f"blocks_{index}").drop_path.rate for index in range(2)] == [0, 0.4]


def test_drop_path_rates_are_those_of_the_official_code():
    import torch

    for rate, depth in ((0.1, 18), (0.5, 36), (0.3, 12)):
        np.testing.assert_allclose(
            drop_path_rates(rate, depth), torch.linspace(0, rate, depth).numpy(), atol=1e-7
        )
    assert drop_path_rates(0.5, 1) == [0.0]
    assert all(type(one) is float for one in drop_path_rates(0.5, 3))


def test_each_block_draws_from_a_seed_of_its_own():
    model = build(V1, drop_path_rate=0.4, seed=7, random=False)
    blocks = [layer for layer in model.layers if layer.name.startswith("stages_")]
    assert [block.config["seed"] for block in blocks] == [7, 8, 9, 10, 11]
    assert len(model.weights) == len(base(V1).weights)  # seeds are no weights


def test_layer_scale_init_value_sets_gamma_and_zero_leaves_it_out():
    def gammas(value):
        state = keras_convnext.state_dict(build(V1, layer_scale_init_value=value, random=False))
        return {name: set(array.tolist()) for name, array in state.items() if name.endswith(".gamma")}

    assert len(gammas(0.5)) == 5
    assert all(values == {0.5} for values in gammas(0.5).values())
    assert all(values == {float(np.float32(1e-6))} for values in gammas(None).values())
    assert gammas(0) == {}


def test_isotropic_large_has_layer_scale_and_the_smaller_do_not():
    assert VARIANTS["convnext_isotropic_large"].layer_scale_init_value == 1e-6
    assert VARIANTS["convnext_isotropic_small"].layer_scale_init_value is None
    assert VARIANTS["convnext_isotropic_base"].layer_scale_init_value is None


# Errors


def refused(error, text, function=keras_convnext.ConvNeXtTiny, /, *arguments, **settings):
    with pytest.raises(error) as caught:
        function(*arguments, **settings)
    message = str(caught.value)
    for part in [text] if isinstance(text, str) else text:
        assert part in message, message
    return message


def test_unknown_architecture_comes_with_near_names():
    refused(
        ValueError,
        (
            "Unknown architecture 'convnext_tinny'.",
            "Did you mean 'convnext_tiny'",
            "Known: ",
            "convnextv2_huge",
        ),
        keras_convnext.load,
        "convnext_tinny",
        None,
    )


def test_unknown_tag_comes_with_near_names():
    refused(
        ValueError,
        ("Unknown weights 'convnext_tiny.fb_in1kk'.", "'convnext_tiny.fb_in1k'"),
        keras_convnext.load,
        "convnext_tiny.fb_in1kk",
    )
    refused(ValueError, ("Unknown weights 'fb_in1kk'", "Did you mean 'fb_in1k'"), weights="fb_in1kk")


def test_tag_of_another_architecture_is_refused():
    refused(
        ValueError,
        ("'convnext_base.fb_in1k'", "'convnext_base'", "'convnext_tiny'"),
        weights="convnext_base.fb_in1k",
    )


def test_imagenet_with_other_classes_tells_how_to_start_a_new_head():
    refused(
        ValueError,
        (
            "have a classifier for 1000 classes",
            "Received: classes=10.",
            "classes=1000",
            "new_head=True",
            "include_top=False",
        ),
        classes=10,
    )


def test_in22k_tag_with_default_classes_tells_how_many_it_has():
    refused(
        ValueError,
        (
            "'convnext_tiny.fb_in22k'",
            "21841 classes",
            "Received: classes=1000.",
            "classes=21841",
            "new_head=True",
        ),
        weights="fb_in22k",
    )


def test_new_head_false_with_other_classes_is_refused():
    refused(ValueError, ("1000 classes", "classes=7"), weights="fb_in1k", classes=7, new_head=False)


def test_architecture_without_an_imagenet_file_is_refused():
    refused(
        ValueError,
        ("No ImageNet weights have been published for architecture 'convnextv2_small'", "convnextv2_small"),
        keras_convnext.ConvNeXtV2Small,
    )


@pytest.mark.parametrize("pooling", ["mean", "", True])
def test_unknown_pooling_is_refused(pooling):
    refused(
        ValueError,
        f"pooling must be None, 'avg' or 'max'. Received: pooling={pooling!r}",
        weights=None,
        include_top=False,
        pooling=pooling,
    )


@pytest.mark.parametrize("classes", [0, -1, 2.5, "10"])
def test_number_of_classes_must_be_a_whole_number_from_1(classes):
    refused(
        ValueError,
        f"classes must be a whole number from 1 up. Received: classes={classes!r}",
        weights=None,
        classes=classes,
    )


def test_a_softmax_over_one_class_is_refused():
    received = "Received: classes=1, classifier_activation='softmax'. Pass classifier_activation='sigmoid'"
    refused(ValueError, ("always 1", received), weights=None, classes=1, classifier_activation="softmax")
    refused(ValueError, received, weights=None, classes=1)


@pytest.mark.parametrize("rate", [1.0, -0.1, 2])
def test_drop_path_rate_outside_0_to_1_is_refused(rate):
    refused(
        ValueError,
        ("drop_path_rate must be in [0, 1)", f"Received: drop_path_rate={rate}"),
        weights=None,
        drop_path_rate=rate,
    )


def test_unknown_output_stride_is_refused():
    refused(
        ValueError,
        "output_stride must be 8, 16 or 32. Received: output_stride=4",
        weights=None,
        output_stride=4,
    )


def test_isotropic_model_takes_no_output_stride():
    refused(
        ValueError,
        ("'convnext_isotropic_small' has stride 16 throughout", "Received: output_stride=16"),
        keras_convnext.ConvNeXtIsotropicSmall,
        weights=None,
        output_stride=16,
    )


@pytest.mark.parametrize(
    ("input_shape", "reason"),
    [
        ((32, 32), "input_shape must be (height, width, channels)"),
        ((1, 32, 32, 3), "input_shape must be (height, width, channels)"),
        ((16, 16, 3), "Images must be at least 32x32"),
        ((None, 31, 3), "Images must be at least 32x32"),
        ((32, 32, 0), "The number of channels must be a whole number from 1 up"),
        ((32, 32, None), "The number of channels must be a whole number from 1 up"),
    ],
)
def test_impossible_input_shape_is_refused(input_shape, reason):
    refused(
        ValueError, (reason, f"Received: input_shape={input_shape}"), weights=None, input_shape=input_shape
    )


def test_input_tensor_must_fit_like_an_input_shape():
    refused(
        ValueError,
        ("Images must be at least 32x32", "input_shape=(16, 16, 3)"),
        weights=None,
        input_tensor=keras.Input((16, 16, 3)),
    )


@pytest.mark.parametrize("value", [np.zeros((1, 32, 32, 3), "float32"), "image"])
def test_input_tensor_must_be_a_keras_tensor(value):
    refused(
        ValueError,
        ("input_tensor must be a Keras tensor", f"Received: {type(value).__name__}"),
        weights=None,
        input_tensor=value,
    )


@pytest.mark.parametrize(
    ("architecture", "settings", "received"),
    [
        ("convnext_tiny", {}, "include_top=True, pooling=None"),
        ("convnext_tiny", {"include_top": False, "pooling": "avg"}, "include_top=False, pooling='avg'"),
        ("convnext_isotropic_small", {"include_top": False}, "architecture 'convnext_isotropic_small'"),
    ],
)
def test_pyramid_norms_need_stages_and_no_top(architecture, settings, received):
    refused(
        ValueError,
        ("pyramid_norms=True returns the four normalised stage maps", received),
        constructor_of(architecture),
        weights=None,
        pyramid_norms=True,
        **settings,
    )


def test_v2_has_no_layer_scale_to_set():
    refused(
        ValueError,
        ("'convnextv2_atto' is a ConvNeXt V2", "Received: layer_scale_init_value=1e-06"),
        keras_convnext.ConvNeXtV2Atto,
        weights=None,
        layer_scale_init_value=1e-6,
    )


@pytest.mark.parametrize("weights", [123, b"imagenet", ["imagenet"]])
def test_weights_of_another_type_are_refused(weights):
    refused(
        TypeError,
        (
            "weights must be None, 'imagenet', a tag or a path.",
            f"Received: {type(weights).__name__} {weights!r}",
        ),
        weights=weights,
    )


def test_missing_file_comes_with_near_names(tmp_path):
    (tmp_path / "tiny_weights.safetensors").touch()
    missing = tmp_path / "tiny_weight.safetensors"
    refused(
        FileNotFoundError,
        (f"No such weight file: {missing}.", "Near names in that folder: tiny_weights.safetensors."),
        weights=str(missing),
    )
    nowhere = tmp_path / "none" / "tiny.pth"
    message = refused(FileNotFoundError, f"No such weight file: {nowhere}.", weights=nowhere)
    assert "Near names" not in message


def test_folder_as_weights_is_refused(tmp_path):
    refused(IsADirectoryError, f"Expected a weight file. Received a folder: {tmp_path}", weights=tmp_path)


def test_file_with_another_ending_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    path.touch()
    refused(
        ValueError,
        ("Expected a weight file ending in .safetensors, .pth, .pt, .bin, .pth.tar, ", f"Received: {path}"),
        weights=path,
    )


def test_file_with_other_classes_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    timm_model(V1, path)
    refused(
        ValueError,
        (str(path), "a classifier for 10 classes", "Received: classes=7.", "new_head=True"),
        build,
        V1,
        path,
        classes=7,
    )
    assert build(V1, path, classes=7, new_head=True).output_shape == (None, 7)


def test_file_without_a_classifier_is_refused_with_the_top(tmp_path):
    path = tmp_path / "weights.safetensors"
    keras_convnext.save_weights(keras_convnext.TestConvNeXt2(False, weights=None), path, layout="timm")
    refused(
        ValueError,
        (f"{path} has no classifier", "include_top=False", "new_head=True"),
        keras_convnext.TestConvNeXt2,
        weights=path,
    )


def test_file_of_another_architecture_is_refused_with_its_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    keras_convnext.save_weights(keras_convnext.TestConvNeXt2(weights=None), path, layout="timm")
    refused(
        ValueError,
        (str(path), "does not fit the model", "Missing", "those of 'test_convnext2'"),
        keras_convnext.TestConvNeXt,
        weights=path,
    )


def test_keras_file_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "model.weights.h5"
    build(V1).save_weights(path)
    refused(
        ValueError,
        (f"{path} does not fit 'test_convnext2'", "Build the model with the arguments it was saved with."),
        build,
        V1,
        path,
        classes=7,
    )
    refused(
        ValueError,
        ("holds weights for images of 3 channels", "input_shape=(32, 32, 1)", "whose stem is adapted"),
        build,
        V1,
        path,
        input_shape=(32, 32, 1),
    )


def test_state_dict_of_another_model_is_refused():
    image = keras.Input((4,))
    other = keras.Model(image, keras.layers.Dense(2, name="mine")(image), name="other")
    refused(
        ValueError,
        ("Expected a model made by keras_convnext.", "'other'", "mine"),
        keras_convnext.state_dict,
        other,
    )
