"""UPerNet: logits of both heads against transformers, its graph, files and errors."""

import dataclasses
import functools
import os
import pathlib

import keras
import numpy as np
import peers
import pytest
import segmenters
import torch
import transformers

import keras_convnext
from keras_convnext import segmentation
from keras_convnext.architecture import Heads, head_layers_of, layers_of
from keras_convnext.layers import resizing
from keras_convnext.segmentation import UPerNet
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import layouts

TOLERANCE = 2e-5
V1, V2 = "convnext_atto", "convnextv2_atto"
SIZES = ((64, 64), (96, 160), (100, 76))  # in the last one no map divides another


@pytest.fixture(autouse=True, scope="module")
def reduced_table():
    with pytest.MonkeyPatch.context() as patch:
        segmenters.one_block_a_stage(patch, V1, V2, "convnext_tiny")
        yield


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(model of transformers, its file) of an architecture, each made once."""
    folder = tmp_path_factory.mktemp("peers")

    @functools.cache
    def made(name):
        model = segmenters.transformers_model(name)
        return model, peers.save(model.state_dict(), folder / f"{name}.safetensors")

    return made


@pytest.fixture(scope="module")
def ours(peer):
    """Our model of that file, each made once; normalised images."""
    return functools.cache(lambda name: keras_convnext.load(peer(name)[1], include_preprocessing=False))


@pytest.fixture(scope="module")
def body():
    """A small backbone of each paper, random."""

    @functools.cache
    def made(constructor="TestConvNeXt2", **arguments):
        build = getattr(keras_convnext, constructor)
        return build(weights=None, include_top=False, pyramid_norms=True, **arguments)

    return made


def errors(model, peer, size):
    """The largest error of each head's logits over the largest logit."""
    images = peers.images(size)
    received = segmentation.with_auxiliary(model).predict(images, verbose=0)
    expected = segmenters.transformers_logits(peer, images)
    assert received["logits"].shape == (2, *size, segmenters.CLASSES)
    return [peers.relative_error(received[name], expected[name]) for name in ("logits", "auxiliary")]


# Logits.


# JAX compiles each for seconds: four of the six in its second tier.
CASES = [
    pytest.param(
        name,
        size,
        marks=[pytest.mark.slow]
        * (keras.backend.backend() == "jax" and (name, size) not in ((V1, SIZES[2]), (V2, SIZES[0]))),
    )
    for name in (V1, V2)
    for size in SIZES
]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_logits_equal_transformers(name, size, peer, ours):
    assert max(errors(ours(name), peer(name)[0], size)) <= TOLERANCE


@pytest.mark.one_backend
@pytest.mark.parametrize("size", SIZES)
def test_static_sizes_give_the_same(size, peer):
    model = keras_convnext.load(peer(V1)[1], include_preprocessing=False, input_shape=(*size, 3))
    assert max(errors(model, peer(V1)[0], size)) <= TOLERANCE


@pytest.mark.one_backend
def test_control_aligned_corners_fail(peer, ours, monkeypatch):
    def call(self, inputs):
        x, like = inputs
        y = torch.nn.functional.interpolate(
            x.permute(0, 3, 1, 2), size=tuple(like.shape[1:3]), mode="bilinear", align_corners=True
        )
        return y.permute(0, 2, 3, 1)

    monkeypatch.setattr(resizing.ResizeLike, "call", call)
    assert min(errors(ours(V1), peer(V1)[0], SIZES[2])) > 100 * TOLERANCE


@pytest.mark.one_backend
def test_control_keras_epsilon_fails(peer, monkeypatch):
    changed = functools.partial(segmentation.BatchNormalization, epsilon=1e-3)
    monkeypatch.setattr(segmentation, "BatchNormalization", changed)
    model = keras_convnext.load(peer(V1)[1], include_preprocessing=False)
    assert min(errors(model, peer(V1)[0], SIZES[2])) > 5 * TOLERANCE


@pytest.mark.one_backend
def test_control_cells_that_do_not_overlap_fail_where_sizes_do_not_divide(peer, ours, monkeypatch):
    def plain(size, cells, dtype):
        start, position = np.arange(cells)[:, None] * size // cells, np.arange(size)
        end = np.maximum(np.arange(1, cells + 1)[:, None] * size // cells, start + 1)
        inside = (position >= start) & (position < end)
        return keras.ops.convert_to_tensor(inside / inside.sum(1, keepdims=True), dtype=dtype)

    monkeypatch.setattr(resizing, "_averages", plain)
    model = ours(V1)
    assert max(errors(model, peer(V1)[0], (192, 192))) <= TOLERANCE  # 6 x 6 at the end: all sizes divide it
    assert errors(model, peer(V1)[0], SIZES[2])[0] > 100 * TOLERANCE


@pytest.mark.one_backend
def test_control_exchanged_statistics_fail(peer, ours, tmp_path):
    state = dict(peer(V1)[0].state_dict())
    key = "decode_head.fpn_bottleneck.batch_norm.running_mean"
    state[key] = state[key].flip(0)
    model = keras_convnext.load(peers.save(state, tmp_path / "x.safetensors"), include_preprocessing=False)
    assert errors(model, peer(V1)[0], SIZES[0])[0] > 100 * TOLERANCE


# Keys, shapes and totals.

TINY = (96, 192, 384, 768)


def heads_as_published(dims, classes=150):
    """Every key of the heads in Facebook's files with its shape, by hand."""
    convolutions = {
        **{f"decode_head.psp_modules.{place}.1": (512, dims[3], 1, 1) for place in range(4)},
        "decode_head.bottleneck": (512, dims[3] + 2048, 3, 3),
        **{f"decode_head.lateral_convs.{place}": (512, dims[place], 1, 1) for place in range(3)},
        **{f"decode_head.fpn_convs.{place}": (512, 512, 3, 3) for place in range(3)},
        "decode_head.fpn_bottleneck": (512, 2048, 3, 3),
        "auxiliary_head.convs.0": (256, dims[2], 3, 3),
    }
    shapes = {
        "decode_head.conv_seg.weight": (classes, 512, 1, 1),
        "decode_head.conv_seg.bias": (classes,),
        "auxiliary_head.conv_seg.weight": (classes, 256, 1, 1),
        "auxiliary_head.conv_seg.bias": (classes,),
    }
    for place, shape in convolutions.items():
        shapes[f"{place}.conv.weight"] = shape
        shapes |= {
            f"{place}.bn.{leaf}": shape[:1] for leaf in ("weight", "bias", "running_mean", "running_var")
        }
        shapes[f"{place}.bn.num_batches_tracked"] = ()
    return shapes


@pytest.mark.once
def test_keys_and_shapes_of_the_heads_are_the_published_ones():
    shapes = layouts.head_shapes(VARIANTS["convnext_tiny"], Heads(150))
    assert len(shapes) == 82
    assert shapes == heads_as_published(TINY)


@pytest.mark.once
def test_keys_and_shapes_of_a_whole_file_are_those_of_transformers():
    layout, variant = "huggingface", VARIANTS["convnext_tiny"]
    shapes = layouts.weight_shapes(variant, 0, pyramid_norms=True)
    ours = {f"backbone.{layouts.rename(name, layout)}": shape for name, shape in shapes.items()}
    ours |= {
        layouts.rename(name, layout): shape
        for name, shape in layouts.head_shapes(variant, Heads(150)).items()
    }
    with torch.device("meta"):
        theirs = transformers.UperNetForSemanticSegmentation(
            segmenters.transformers_config(variant, 150, 512)
        )
    assert {name: tuple(value.shape) for name, value in theirs.state_dict().items()} == ours


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "depths", "parameters"),
    [
        ("tiny", (3, 3, 9, 3), 60_242_636),
        ("small", (3, 3, 27, 3), 81_877_196),
        ("base", (3, 3, 27, 3), 122_102_956),
        ("large", (3, 3, 27, 3), 234_994_796),
        ("xlarge", (3, 3, 27, 3), 391_140_396),
    ],
)
def test_parameters_are_the_published_totals(name, depths, parameters):
    variant = dataclasses.replace(VARIANTS[f"convnext_{name}"], depths=depths)
    layers = layers_of(variant, 512, 0, pyramid_norms=True) + head_layers_of(variant, Heads(150))
    assert sum(layer.num_weights for layer in layers) == parameters


@pytest.mark.one_backend
@pytest.mark.parametrize("auxiliary", [True, False])
def test_description_names_every_weight_of_the_model(auxiliary, body):
    model = UPerNet(body(), 5, channels=8, auxiliary=auxiliary)
    variant, heads = VARIANTS["test_convnext2"], Heads(5, 8, auxiliary)
    layers = layers_of(variant, 512, 0, pyramid_norms=True) + head_layers_of(variant, heads)
    state = keras_convnext.state_dict(model)
    described = {name: shape for layer in layers for name, shape in layer.weights.items()}
    received = {name.removeprefix("backbone."): array.shape for name, array in state.items()}
    assert received == described
    trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert trained == sum(layer.num_weights for layer in layers)


# The graph.


@pytest.mark.one_backend
def test_model_has_one_output_at_the_size_of_the_image(body):
    model = UPerNet(body(), 5, channels=8)
    assert (model.output_shape, model.classes, model.has_auxiliary) == ((None, None, None, 5), 5, True)
    assert model(np.zeros((1, 45, 70, 3), "float32")).shape == (1, 45, 70, 5)
    small = UPerNet(body(), 5, channels=8, upsample=False)
    assert small(np.zeros((1, 64, 100, 3), "float32")).shape == (1, 16, 25, 5)


@pytest.mark.one_backend
def test_auxiliary_logits_share_the_layers_and_can_be_left_out(body):
    model = UPerNet(body(), 5, channels=8)
    pixels = 255 * np.random.default_rng(0).random((1, 64, 64, 3), "float32")
    both = segmentation.with_auxiliary(model)(pixels)
    alone = segmentation.without_auxiliary(model)
    assert isinstance(alone, segmentation.Segmenter) and not alone.has_auxiliary
    expected = keras.ops.convert_to_numpy(model(pixels))
    assert tuple(both["auxiliary"].shape) == tuple(both["logits"].shape) == (1, 64, 64, 5)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(both["logits"]), expected)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(alone(pixels)), expected)
    assert segmentation.without_auxiliary(alone) is alone
    with pytest.raises(ValueError, match=r"auxiliary=True\) builds it. Received 'upernet', which has none"):
        segmentation.with_auxiliary(alone)


@pytest.mark.one_backend
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_logits_are_float32_under_16_bit_policies(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        body = keras_convnext.TestConvNeXt2(weights=None, include_top=False, pyramid_norms=True)
        model = UPerNet(body, 5, channels=8)
        logits = segmentation.with_auxiliary(model)(np.zeros((1, 64, 64, 3), "float32"))
    finally:
        keras.config.set_dtype_policy(before)
    assert {keras.backend.standardize_dtype(each.dtype) for each in logits.values()} == {"float32"}
    assert model.get_layer("decode_head_bottleneck_conv").compute_dtype == "bfloat16"


@pytest.mark.one_backend
def test_two_segmenters_fit_into_one_graph():
    bodies = [
        keras_convnext.TestConvNeXt2(weights=None, include_top=False, pyramid_norms=True, name=name)
        for name in ("a", "b")
    ]
    models = [UPerNet(each, 5, channels=8, name=name) for each, name in zip(bodies, "ab", strict=True)]
    image = keras.Input((64, 64, 3))
    joined = keras.Model(image, models[0](image) + models[1](image))
    assert joined.output_shape == (None, 64, 64, 5)
    assert keras_convnext.state_dict(models[1])["decode_head.conv_seg.weight"].shape == (5, 8, 1, 1)


@pytest.mark.one_backend
def test_training_moves_weights_and_statistics_of_both_heads(body):
    keras.utils.set_random_seed(0)
    model = UPerNet(keras_convnext.TestConvNeXt2(weights=None, include_top=False, pyramid_norms=True), 3, 8)
    trained = segmentation.with_auxiliary(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile(
        keras.optimizers.SGD(0.1),
        loss={"logits": loss, "auxiliary": loss},
        loss_weights={"logits": 1.0, "auxiliary": 0.4},
    )
    before = keras_convnext.state_dict(model)
    rng = np.random.default_rng(0)
    # Four images: between two, the batch norm behind the mean of a map leaves only signs.
    images, maps = 255 * rng.random((4, 64, 64, 3), "float32"), rng.integers(0, 3, (4, 64, 64))
    trained.train_on_batch(images, {"logits": maps, "auxiliary": maps})
    after = keras_convnext.state_dict(model)
    same = [name for name, array in after.items() if np.array_equal(array, before[name])]
    in_heads = [name for name in same if name.startswith(("decode_head.", "auxiliary_head."))]
    assert all(name.endswith("num_batches_tracked") for name in in_heads), in_heads
    assert "backbone.downsample_layers.0.0.weight" not in same


@pytest.mark.one_backend
@pytest.mark.parametrize("upsample", [True, False])
def test_keras_file_keeps_the_model(upsample, body, tmp_path):
    model = UPerNet(body(), 5, channels=8, upsample=upsample)
    model.save(tmp_path / "x.keras")
    pixels = 255 * np.random.default_rng(0).random((1, 64, 96, 3), "float32")
    expected = keras.ops.convert_to_numpy(model(pixels))
    for again in (keras.saving.load_model(tmp_path / "x.keras"), keras_convnext.load(tmp_path / "x.keras")):
        assert isinstance(again, segmentation.Segmenter)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(again(pixels)), expected)


# Arguments.


@pytest.mark.one_backend
def test_a_name_is_opened_with_its_weights(monkeypatch):
    monkeypatch.setitem(VARIANTS, V2, dataclasses.replace(VARIANTS[V2], depths=(2, 2, 6, 2)))
    model = UPerNet("convnextv2_atto.tiny_imagenet200", 5, channels=8)
    state = keras_convnext.state_dict(model)
    source = keras_convnext.state_dict(keras_convnext.load("convnextv2_atto.tiny_imagenet200"))
    for name in ("stages.2.0.dwconv.weight", "downsample_layers.0.0.weight"):
        np.testing.assert_array_equal(state[f"backbone.{name}"], source[name])


@pytest.mark.one_backend
def test_wrong_arguments_are_refused(body):
    plain = keras_convnext.TestConvNeXt2(weights=None, include_top=False)
    with pytest.raises(
        ValueError, match=r"include_top=False, pyramid_norms=True. Received: 'test_convnext2'"
    ):
        UPerNet(plain, 5)
    for arguments, message in (
        ({"classes": 0}, r"classes must be a whole number from 1 up. Received: classes=0"),
        ({"classes": 5, "channels": 1}, r"channels must be a whole number from 2 up. Received: channels=1"),
        ({"classes": 5, "dropout": 1.0}, r"dropout must be in \[0, 1\), .* Received: dropout=1.0"),
        ({"classes": 5, "dropout": "a"}, r"dropout must be in .* Received: dropout='a'"),
    ):
        with pytest.raises(ValueError, match=message):
            UPerNet(body(), **arguments)
    with pytest.raises(ValueError, match="Did you mean 'convnext_tiny'"):
        UPerNet("convnext_tinny", 5)


# A published file, for those who have it.

FILE = os.environ.get("KERAS_CONVNEXT_UPERNET_TINY")  # model.safetensors of openmmlab/upernet-convnext-tiny
PHOTO = os.environ.get("KERAS_CONVNEXT_ADE_VAL_1")  # ADE_val_00000001.jpg


@pytest.mark.slow
@pytest.mark.skipif(not (FILE and PHOTO), reason="KERAS_CONVNEXT_UPERNET_TINY and _ADE_VAL_1 name no files")
def test_published_weights_give_the_golden_logits():
    """The slice that transformers asserts in tests/models/upernet/test_modeling_upernet.py."""
    import PIL.Image

    with PIL.Image.open(pathlib.Path(PHOTO)) as image:
        pixels = np.asarray(image.convert("RGB").resize((512, 512), PIL.Image.Resampling.BILINEAR), "float32")
    with pytest.MonkeyPatch.context() as patch:
        row = VARIANTS["convnext_tiny"]
        patch.setitem(VARIANTS, "convnext_tiny", dataclasses.replace(row, depths=(3, 3, 9, 3)))
        model = keras_convnext.load(FILE)
        logits = keras.ops.convert_to_numpy(model(pixels[None]))
    expected = [[-8.8110, -8.8110, -8.6521], [-8.8110, -8.8110, -8.6521], [-8.7746, -8.7746, -8.6130]]
    assert logits.shape == (1, 512, 512, 150)
    np.testing.assert_allclose(logits[0, :3, :3, 0], expected, rtol=0, atol=1e-4)
