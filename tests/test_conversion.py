"""Conversion there and back: bit-exact, and loaded strictly by the projects it is written for."""

import dataclasses

import keras
import numpy as np
import peers
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.models.convnext import checkpoint_filter_fn
from torchvision.models import convnext as torchvision_convnext

import keras_convnext
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import assign, layouts, resolve, torch_files
from keras_convnext.weights.layouts import StateDictError

pytestmark = pytest.mark.one_backend

CLASSES = 7
SMALL = ("convnext_atto", "convnextv2_atto", "convnext_zepto_rms_ols", "convnext_tiny_hnf", "test_convnext3")


def timm_model(name, **arguments):
    return peers.randomise(timm.create_model(name, num_classes=CLASSES, **arguments))


def keras_model(name, path, **arguments):
    arguments = {"classes": CLASSES, "classifier_activation": None, **arguments}
    return keras_convnext.load(
        name, weights=path, include_preprocessing=False, input_shape=(64, 64, 3), **arguments
    )


@pytest.fixture
def small_tiny(monkeypatch):
    """convnext_tiny and convnextv2_tiny with one block a stage."""
    for name in ("convnext_tiny", "convnextv2_tiny"):
        row = dataclasses.replace(VARIANTS[name], depths=(1, 1, 1, 1))
        monkeypatch.setitem(VARIANTS, name, row)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", SMALL)
def test_timm_to_keras_to_timm_is_bit_exact(name, ending, tmp_path):
    peer = timm_model(name)
    model = keras_model(name, peers.save(peer.state_dict(), tmp_path / "in.safetensors"))
    path = keras_convnext.save_weights(model, tmp_path / f"out{ending}", layout="timm")
    state = load_file(path) if ending == ".safetensors" else torch.load(path, weights_only=True)
    again = timm.create_model(name, num_classes=CLASSES)
    again.load_state_dict(state, strict=True)
    for key, value in peer.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "convnext_isotropic_small"])
def test_official_to_keras_to_official_is_bit_exact(name, tmp_path, monkeypatch):
    if "isotropic" in name:
        monkeypatch.setitem(VARIANTS, name, dataclasses.replace(VARIANTS[name], depths=(2,)))
    peer = peers.randomise(peers.OfficialConvNeXt(VARIANTS[name], classes=CLASSES))
    torch.save({"model": peer.state_dict()}, tmp_path / "in.pth")
    model = keras_model(name, tmp_path / "in.pth")
    path = keras_convnext.save_weights(model, tmp_path / "out.pth")
    state = torch.load(path, weights_only=True)["model"]
    assert list(state) == list(layouts.weight_shapes(VARIANTS[name], CLASSES))
    again = peers.OfficialConvNeXt(VARIANTS[name], classes=CLASSES)
    again.load_state_dict(state, strict=True)
    for key, value in peer.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_timm_reads_our_official_files_and_agrees(name, tmp_path):
    peer = timm_model(name)
    source = peers.save(peer.state_dict(), tmp_path / "in.safetensors")
    keras_convnext.convert(source, tmp_path / "official.safetensors", layout="official")
    again = timm.create_model(name, num_classes=CLASSES).eval()
    state = checkpoint_filter_fn(load_file(tmp_path / "official.safetensors"), again)
    again.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), peer(x))


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny"])
@torch.no_grad()
def test_transformers_loads_our_files_strictly_and_agrees(name, tmp_path, small_tiny):
    variant = VARIANTS[name]
    peer = timm_model(name, depths=variant.depths)
    model = keras_model(name, peers.save(peer.state_dict(), tmp_path / "in.safetensors"))
    path = keras_convnext.save_weights(model, tmp_path / "model.safetensors", layout="huggingface")
    settings = {
        "hidden_sizes": list(variant.dims),
        "depths": list(variant.depths),
        "num_labels": CLASSES,
        "layer_norm_eps": 1e-6,
    }
    if variant.version == 2:
        theirs = transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**settings))
    else:
        theirs = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**settings))
    theirs.load_state_dict(load_file(path), strict=True)
    x = peers.images()
    logits = theirs.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).logits
    assert peers.relative_error(keras.ops.convert_to_numpy(model(x)), logits.numpy()) <= 2e-5


@torch.no_grad()
def test_torchvision_loads_our_files_strictly_and_agrees(tmp_path, small_tiny):
    variant = VARIANTS["convnext_tiny"]
    peer = timm_model("convnext_tiny", depths=variant.depths)
    source = peers.save(peer.state_dict(), tmp_path / "in.safetensors")
    path = keras_convnext.convert(source, tmp_path / "out.pth", layout="torchvision")
    settings = [
        torchvision_convnext.CNBlockConfig(dim, end, 1)
        for dim, end in zip(variant.dims, (*variant.dims[1:], None), strict=True)
    ]
    theirs = torchvision_convnext.ConvNeXt(settings, num_classes=CLASSES)
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert peers.relative_error(theirs.eval()(x).numpy(), peer(x).numpy()) <= 2e-5


@pytest.mark.every_backend
@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_conversion_to_keras_keeps_every_bit(ending, tmp_path):
    peer = timm_model("test_convnext2")
    source = peers.save(peer.state_dict(), tmp_path / "in.safetensors")
    target = keras_convnext.convert(source, tmp_path / f"out{ending}")
    if ending == ".keras":
        model = keras.saving.load_model(target)
        again = keras_convnext.convert(target, tmp_path / "back.safetensors", layout="timm")
        assert all(torch.equal(value, peer.state_dict()[key]) for key, value in load_file(again).items())
    else:
        model = keras_convnext.load("test_convnext2", weights=target, classes=CLASSES)
    expected = keras_convnext.state_dict(keras_model("test_convnext2", source))
    for name, array in keras_convnext.state_dict(model).items():
        assert np.array_equal(array, expected[name]), name


def test_half_precision_files_load_as_float32(tmp_path):
    peer = timm_model("test_convnext2")
    state = {key: value.half() for key, value in peer.state_dict().items()}
    model = keras_model("test_convnext2", peers.save(state, tmp_path / "half.safetensors"))
    assert {variable.dtype for variable in model.weights} == {"float32"}
    head = keras_convnext.state_dict(model)["head.weight"]
    assert np.array_equal(head, state["head.fc.weight"].float().numpy())


@pytest.mark.every_backend
def test_bfloat16_files_load_into_a_bfloat16_model(tmp_path):
    peer = timm_model("test_convnext2")
    state = {key: value.bfloat16() for key, value in peer.state_dict().items()}
    path = peers.save(state, tmp_path / "bfloat16.safetensors")
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = keras_model("test_convnext2", path)
    finally:
        keras.config.set_dtype_policy("float32")
    kernel = next(variable for variable in model.weights if variable.path.endswith("pwconv1/kernel"))
    assert kernel.dtype == "bfloat16"
    expected = state["stages.0.blocks.0.mlp.fc1.weight"].float().numpy().T
    assert np.array_equal(keras.ops.convert_to_numpy(keras.ops.cast(kernel, "float32")), expected)


@pytest.mark.parametrize("channels", [1, 2, 5, 6, 8])
def test_stem_is_adapted_to_other_channels_as_timm_does(channels, tmp_path):
    """But for four, where alpha is to change nothing (tests/weights/test_layouts.py)."""
    from timm.models._manipulate import adapt_input_conv

    peer = timm_model("test_convnext2")
    path = peers.save(peer.state_dict(), tmp_path / "in.safetensors")
    model = keras_convnext.load(
        "test_convnext2", weights=path, include_preprocessing=False, input_shape=(64, 64, channels)
    )
    expected = adapt_input_conv(channels, peer.state_dict()["stem.0.weight"]).numpy()
    actual = keras_convnext.state_dict(model)["downsample_layers.0.0.weight"]
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


# What does not fit is refused, with the names that do not.


@pytest.fixture
def good_state():
    return {key: value.clone() for key, value in timm_model("test_convnext2").state_dict().items()}


def refused(state, tmp_path, **arguments):
    path = peers.save(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError) as raised:
        keras_model("test_convnext2", path, **arguments)
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_missing_key_is_named(good_state, tmp_path):
    del good_state["stages.2.blocks.0.norm.weight"]
    message = refused(good_state, tmp_path)
    assert "Missing (1): stages.2.blocks.0.norm.weight (96,)" in message


def test_missing_final_norm_of_a_classifier_is_named(good_state, tmp_path):
    del good_state["head.norm.weight"], good_state["head.norm.bias"]
    assert "Missing (2): head.norm.weight" in refused(good_state, tmp_path)


def test_extra_key_is_named(good_state, tmp_path):
    good_state["stages.0.blocks.1.gamma"] = torch.ones(32)
    assert "Left over (1): stages.0.blocks.1.gamma" in refused(good_state, tmp_path)


def test_mis_shaped_key_is_named_with_both_shapes(good_state, tmp_path):
    good_state["stages.1.blocks.0.conv_dw.weight"] = torch.ones(64, 1, 5, 5)
    message = refused(good_state, tmp_path)
    assert "stages.1.blocks.0.conv_dw.weight: expected (64, 1, 7, 7), received (64, 1, 5, 5)" in message


def test_file_of_another_architecture_is_recognised(tmp_path):
    state = timm_model("convnext_atto").state_dict()
    assert "are those of 'convnext_atto'" in refused(state, tmp_path)


def test_head_of_another_size_is_refused_and_new_head_keeps_the_body(good_state, tmp_path):
    message = refused(good_state, tmp_path, classes=5)
    assert "classifier for 7 classes" in message and "classes=5" in message and "new_head=True" in message
    model = keras_model("test_convnext2", tmp_path / "bad.safetensors", classes=5, new_head=True)
    state = keras_convnext.state_dict(model)
    assert state["head.weight"].shape == (5, 128)
    expected = good_state["stages.3.blocks.0.mlp.fc1.weight"].numpy()
    assert np.array_equal(state["stages.3.0.pwconv1.weight"], expected)


def test_file_without_a_classifier_is_refused_where_one_is_asked_for(good_state, tmp_path):
    state = {key: value for key, value in good_state.items() if not key.startswith("head.fc")}
    assert "has no classifier" in refused(state, tmp_path)


def test_stem_for_a_third_number_of_channels_is_refused(good_state, tmp_path):
    good_state["stem.0.weight"] = torch.ones(32, 5, 4, 4)
    assert "for 5 channels" in refused(good_state, tmp_path)


def test_another_network_is_refused(tmp_path):
    message = refused({"conv1.weight": torch.ones(3, 3), "fc.bias": torch.ones(3)}, tmp_path)
    assert "in one of the layouts official, timm" in message and "conv1.weight" in message


@pytest.mark.once
@pytest.mark.parametrize(
    "name, layout, reason",
    [
        ("convnext_isotropic_small", "timm", "timm has no isotropic"),
        ("convnext_isotropic_small", "huggingface", "no isotropic"),
        ("convnext_atto_ols", "official", "stem 'overlap_tiered'"),
        ("convnext_atto_rms", "huggingface", "norm 'rms_norm'"),
        ("convnext_tiny_hnf", "torchvision", "head 'norm_first'"),
        ("convnext_xxlarge", "official", "epsilon 1e-05"),
        ("convnextv2_tiny", "torchvision", "no ConvNeXt V2"),
        ("convnext_tiny", "tim", "Did you mean 'timm'"),
    ],
)
def test_layouts_that_would_compute_something_else_are_refused(name, layout, reason):
    with pytest.raises(ValueError, match=reason):
        layouts.write({}, VARIANTS[name], layout)


@pytest.mark.once
def test_convert_refuses_a_wrong_architecture_and_endings(good_state, tmp_path):
    source = peers.save(good_state, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"holds a 'test_convnext2'.*'convnext_tiny'"):
        keras_convnext.convert(source, tmp_path / "out.pth", architecture="convnext_tiny")
    with pytest.raises(ValueError, match="Did you mean 'convnext_tiny'"):
        keras_convnext.convert(source, tmp_path / "out.pth", architecture="convnext_tinny")
    with pytest.raises(ValueError, match=r"must end in .*\.onnx"):
        keras_convnext.convert(source, tmp_path / "out.onnx")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        keras_convnext.convert(source, tmp_path / "nowhere" / "out.pth")
    with pytest.raises(FileNotFoundError, match=r"Near names in that folder: in\.safetensors"):
        keras_convnext.convert(tmp_path / "inn.safetensors", tmp_path / "out.pth")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.once
@pytest.mark.parametrize("name", list(VARIANTS))
def test_architecture_is_recognised_from_its_official_names(name):
    shapes = layouts.weight_shapes(VARIANTS[name], classes=3, channels=1)
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    assert layouts.find_variant(state).name == name
    contents = layouts.inspect(state)
    assert (contents.layout, contents.classes, contents.channels) == ("official", 3, 1)
    assert sum(np.prod(shape) for shape in layouts.weight_shapes(VARIANTS[name]).values()) == (
        VARIANTS[name].parameters
    )


@pytest.mark.once
def test_nearest_architecture_is_named_when_none_fits():
    shapes = layouts.weight_shapes(VARIANTS["convnext_atto"])
    shapes["stages.1.0.pwconv1.weight"] = (3, 3)
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    with pytest.raises(StateDictError, match=r"nearest is 'convnext_atto'.*stages\.1\.0\.pwconv1\.weight"):
        layouts.find_variant(state)


@pytest.mark.every_backend
def test_loading_draws_no_random_numbers(good_state, tmp_path, monkeypatch):
    path = peers.save(good_state, tmp_path / "in.safetensors")

    def forbidden(*arguments, **keywords):
        raise AssertionError("a random number was drawn")

    monkeypatch.setattr(keras_convnext.layers.initializers.RandomNormal, "__call__", forbidden)
    keras_model("test_convnext2", path)
    with pytest.raises(AssertionError, match="random number"):
        keras_model("test_convnext2", None)


@pytest.mark.every_backend
def test_every_weight_has_its_value_after_loading(good_state, tmp_path):
    """Guards the private Keras attribute that `assign.filled` sets."""
    model = keras_model("test_convnext2", peers.save(good_state, tmp_path / "in.safetensors"))
    canonical = keras_convnext.state_dict(model)
    written = layouts.write(canonical, VARIANTS["test_convnext2"], "timm")
    assert written.keys() == good_state.keys()
    for key, value in good_state.items():
        assert np.array_equal(written[key], value.numpy()), key


def test_failed_conversion_leaves_an_earlier_file_alone(good_state, tmp_path, monkeypatch):
    source = peers.save(good_state, tmp_path / "in.safetensors")
    target = tmp_path / "out.keras"
    target.write_bytes(b"earlier")

    def fail(self, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(keras.Model, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        keras_convnext.convert(source, target)
    assert target.read_bytes() == b"earlier"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.safetensors", "out.keras"]


def test_ema_weights_are_preferred_in_training_checkpoints(good_state, tmp_path):
    raw = {key: value + 1 for key, value in good_state.items()}
    torch.save({"state_dict": raw, "state_dict_ema": good_state, "epoch": 3}, tmp_path / "last.pth.tar.pth")
    state = torch_files.read_state_dict(tmp_path / "last.pth.tar.pth")
    assert np.array_equal(state["head.fc.weight"], good_state["head.fc.weight"].numpy())


def test_load_takes_the_number_of_classes_from_the_file(good_state, tmp_path):
    path = peers.save(good_state, tmp_path / "in.safetensors")
    assert keras_convnext.load("test_convnext2", weights=path).output_shape == (None, CLASSES)
    body = {key: value for key, value in good_state.items() if not key.startswith("head.")}
    path = peers.save(body, tmp_path / "body.safetensors")
    assert keras_convnext.load("test_convnext2", weights=path, name="x").output_shape == (
        None,
        None,
        None,
        128,
    )


def test_converting_with_a_tag_gives_the_keras_model_its_normaliser(good_state, tmp_path):
    """The architecture's own normaliser has mean and spread 0.5; a tag may say otherwise."""
    source = peers.save(timm_model("convnext_nano").state_dict(), tmp_path / "in.safetensors")
    tag = "convnext_nano.r384_in12k_ft_in1k"
    keras_convnext.convert(source, tmp_path / "nano.keras", architecture=tag)
    model = keras.saving.load_model(tmp_path / "nano.keras")
    assert model.input_shape == (None, 384, 384, 3)
    with pytest.raises(ValueError, match="holds a 'convnext_nano'"):
        keras_convnext.convert(source, tmp_path / "x.keras", architecture="convnext_tiny.fb_in1k")


# Files that are nearly right: each must be read in full or refused, never in part.


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_huggingface_backbone_brings_its_per_level_norms(version, tmp_path):
    levels = [f"stage{level}" for level in range(1, 5)]
    settings = {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2], "out_features": levels}
    if version == 2:
        name, peer = (
            "convnextv2_atto",
            transformers.ConvNextV2Backbone(transformers.ConvNextV2Config(**settings)),
        )
    else:
        name, peer = "convnext_atto", transformers.ConvNextBackbone(transformers.ConvNextConfig(**settings))
    peers.randomise(peer)
    path = peers.save(peer.state_dict(), tmp_path / "backbone.safetensors")
    model = keras_convnext.load(
        name, weights=path, pyramid_norms=True, include_preprocessing=False, input_shape=(64, 64, 3)
    )
    x = peers.images()
    expected = peer(torch.from_numpy(x).permute(0, 3, 1, 2)).feature_maps
    for level, maps in zip(("P2", "P3", "P4", "P5"), expected, strict=True):
        actual = keras.ops.convert_to_numpy(model(x)[level])
        assert peers.relative_error(actual, maps.permute(0, 2, 3, 1)) <= 2e-5
    with pytest.raises(ValueError, match="timm has no place for"):
        keras_convnext.save_weights(model, tmp_path / "x.safetensors", layout="timm")


def test_half_a_final_norm_is_refused(good_state, tmp_path):
    state = {key: value for key, value in good_state.items() if not key.startswith("head.fc")}
    del state["head.norm.weight"]
    assert "Missing (1): head.norm.weight" in refused(state, tmp_path, include_top=False, classes=None)


def test_some_per_level_norms_are_refused(good_state, tmp_path):
    state = {key: value for key, value in good_state.items() if not key.startswith("head.")}
    for level, dim in enumerate((32, 64, 96)):
        state |= {f"norm{level}.weight": torch.ones(dim), f"norm{level}.bias": torch.ones(dim)}
    message = refused(state, tmp_path, include_top=False, classes=None, pyramid_norms=True)
    assert "Missing (2): norm3.weight" in message


def test_weights_under_two_names_are_refused(good_state, tmp_path):
    state = {f"model.{key}": value for key, value in good_state.items()}
    state["head.fc.weight"] = good_state["head.fc.weight"] + 1
    assert "twice, with and without the prefix 'model.'" in refused(state, tmp_path)


def test_integers_are_refused(good_state, tmp_path):
    good_state["stages.0.blocks.0.gamma"] = torch.ones(32, dtype=torch.int32)
    assert "gamma: expected floating point numbers, received int32" in refused(good_state, tmp_path)


def test_scalar_head_is_refused(good_state, tmp_path):
    good_state["head.fc.weight"] = torch.tensor(1.0)
    assert "has no classifier" in refused(good_state, tmp_path)


def test_keras_model_file_takes_a_new_head_and_other_channels(good_state, tmp_path):
    source = peers.save(good_state, tmp_path / "in.safetensors")
    keras_convnext.convert(source, tmp_path / "in.keras")
    keras_convnext.load("test_convnext2", weights=source).save_weights(tmp_path / "in.weights.h5")
    assert keras_convnext.load("test_convnext2", weights=tmp_path / "in.keras").output_shape == (
        None,
        CLASSES,
    )
    model = keras_convnext.load(
        "test_convnext2", weights=tmp_path / "in.keras", classes=3, new_head=True, input_shape=(64, 64, 1)
    )
    expected = good_state["stages.3.blocks.0.mlp.fc1.weight"].numpy()
    assert np.array_equal(keras_convnext.state_dict(model)["stages.3.0.pwconv1.weight"], expected)
    with pytest.raises(ValueError, match="a new classifier cannot take the place"):
        keras_convnext.load("test_convnext2", weights=tmp_path / "in.weights.h5", classes=3, new_head=True)


def test_wrapped_keras_applications_model_is_refused(tmp_path):
    from keras.src.applications import convnext as applications

    inner = applications.ConvNeXt(
        [1, 1, 1, 1], [8, 16, 24, 32], input_shape=(32, 32, 3), name="convnext_tiny"
    )
    keras.Sequential([inner, keras.layers.Dense(2)]).save(tmp_path / "wrapped.keras")
    with pytest.raises(ValueError, match=r"Expected a plain ConvNeXt of keras.*save it by itself"):
        keras_convnext.load("convnext_tiny", weights=tmp_path / "wrapped.keras", include_top=False)


def test_lora_is_merged(good_state, tmp_path):
    path = peers.save(good_state, tmp_path / "in.safetensors")
    model = keras_model("test_convnext2", path)
    dense = model.get_layer("stages_0_0").pwconv1
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(keras.ops.ones(dense.lora_kernel_b.shape))
    expected = keras.ops.convert_to_numpy(dense.kernel)
    keras_convnext.save_weights(model, tmp_path / "merged.safetensors", layout="timm")
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == good_state.keys()
    np.testing.assert_allclose(merged["stages.0.blocks.0.mlp.fc1.weight"].numpy().T, expected, rtol=1e-6)
    assert not np.allclose(expected.T, good_state["stages.0.blocks.0.mlp.fc1.weight"].numpy())


def test_quantised_model_saves_and_loads_whole_and_its_weights_are_refused(good_state, tmp_path):
    model = keras_model("test_convnext2", peers.save(good_state, tmp_path / "in.safetensors"))
    x = peers.images()
    before = keras.ops.convert_to_numpy(model(x))
    model.quantize("int8")
    quantised = keras.ops.convert_to_numpy(model(x))
    model.save(tmp_path / "int8.keras")
    again = keras.ops.convert_to_numpy(keras.saving.load_model(tmp_path / "int8.keras")(x))
    np.testing.assert_allclose(again, quantised, rtol=1e-4, atol=1e-5)
    assert 1e-4 < peers.relative_error(quantised, before) < 0.2
    with pytest.raises(ValueError, match=r"is quantised: .* before quantize\(\)"):
        keras_convnext.save_weights(model, tmp_path / "x.safetensors", layout="timm")


def test_tag_with_another_tags_weights_takes_that_tags_classes(good_state, tmp_path, monkeypatch, caplog):
    """Files of two tags in the weights folder; no network."""
    folder = tmp_path / "weights"
    folder.mkdir()
    state = timm.create_model("convnext_atto").state_dict()
    peers.save(state, folder / "convnext_atto.d2_in1k.safetensors")
    peers.save(
        {
            key: value
            for key, value in timm.create_model("convnextv2_atto").state_dict().items()
            if "head." not in key
        },
        folder / "convnextv2_atto.fcmae.safetensors",
    )
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(folder))
    monkeypatch.setattr(resolve, "_announced_licences", set())
    model = keras_convnext.load("convnext_atto.d2_in1k", weights="imagenet")
    assert model.output_shape == (None, 1000)
    assert keras_convnext.ConvNeXtV2Atto(weights="fcmae", classes=10).output_shape == (None, 10)
    assert "a new classifier for 10 classes" in caplog.text and "not for commercial use" in caplog.text
    assert keras_convnext.load("convnextv2_atto.fcmae", input_shape=(64, 64, 3)).output_shape == (
        None,
        2,
        2,
        320,
    )
    assert keras_convnext.ConvNeXtAtto(weights="d2_in1k", classes=10).output_shape == (None, 10)
    with pytest.raises(ValueError, match="classifier for 1000 classes"):
        keras_convnext.ConvNeXtAtto(weights="imagenet", classes=10)


def test_keras_model_file_keeps_its_normaliser_and_size(tmp_path, caplog):
    """They are in the model alone; the architecture's are mean and spread of ImageNet and 224 pixels."""

    def saved(name, **arguments):
        model = keras_convnext.load("test_convnext2", None, classes=CLASSES, **arguments)
        model.save(tmp_path / name)
        return model, tmp_path / name

    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    bare, source = saved("bare.keras", include_preprocessing=False, input_shape=(64, 64, 3))
    keras_convnext.convert(source, tmp_path / "again.keras")
    for copy in (keras_convnext.load(source), keras.saving.load_model(tmp_path / "again.keras")):
        assert copy.input_shape == (None, 64, 64, 3) and assign.around(copy).normaliser is None
        assert np.array_equal(copy.predict_on_batch(images / 255), bare.predict_on_batch(images / 255))
    assert "bare.keras has no normaliser, so its model takes normalised images" in caplog.text
    keras_convnext.convert(source, tmp_path / "bare.safetensors", "timm")
    assert "bare.safetensors cannot say. Load that with include_preprocessing=False" in caplog.text
    named = keras_convnext.load("test_convnext2", source)  # the arguments say what is built
    assert assign.around(named).normaliser is not None and named.input_shape == (None, 64, 64, 3)

    clip = peers.save(timm_model("convnext_nano").state_dict(), tmp_path / "nano.safetensors")
    other = keras_convnext.load("convnext_nano.r384_in12k_ft_in1k", clip, input_shape=(None, None, 3))
    source = tmp_path / "other.keras"
    other.save(source)
    for target in ("again.keras", "again.safetensors"):
        keras_convnext.convert(source, tmp_path / target, "timm")
        copy = keras_convnext.load(tmp_path / target)
        np.testing.assert_allclose(
            assign.around(copy).normaliser, assign.around(other).normaliser, rtol=0, atol=1e-7
        )
        assert copy.input_shape[1:] == ((None, None, 3) if target == "again.keras" else (224, 224, 3))
    _, plain = saved("plain.keras", input_shape=(None, None, 3))
    caplog.clear()
    keras_convnext.convert(plain, tmp_path / "plain.pth", "timm")
    assert not caplog.records  # the control: what is the architecture's need not be said


def test_gray_files_build_gray_models(tmp_path):
    from keras_convnext import predictor

    model = keras_convnext.load("test_convnext2", None, classes=CLASSES, input_shape=(64, 64, 1))
    keras_convnext.save_weights(model, tmp_path / "gray.safetensors", "timm")
    model.save(tmp_path / "gray.keras")
    model.save_weights(tmp_path / "gray.weights.h5")
    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 1)).astype("float32")
    for name in ("gray.safetensors", "gray.keras", "gray.weights.h5"):
        copy = keras_convnext.load("test_convnext2", tmp_path / name)
        assert copy.input_shape[-1] == 1 and copy.output_shape == (None, CLASSES)
        if name != "gray.weights.h5":
            opened = predictor.open_predictor(tmp_path / name)
            assert opened.predict([np.zeros((80, 90, 3), np.uint8)]).shape == (1, CLASSES)
    copy = keras_convnext.load(tmp_path / "gray.keras")
    np.testing.assert_allclose(copy.predict_on_batch(images), model.predict_on_batch(images), atol=1e-6)
