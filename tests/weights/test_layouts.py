"""Checkpoints as people have them: prefixes of wrappers, keys of scripts, heads and losses of their own."""

import keras
import numpy as np
import peers
import pytest
import timm
import torch

import keras_convnext
from keras_convnext.weights import layouts, torch_files
from keras_convnext.weights.arrays import FileFormatError

pytestmark = pytest.mark.one_backend

ARCHITECTURE = "test_convnext2"
EXTRAS = {
    "criterion.weight": torch.ones(7),
    "train_acc.tp": torch.ones(7),
    "val_loss.mean_value": torch.tensor(1.0),
}


@pytest.fixture(scope="module")
def timm_state():
    return peers.randomise(timm.create_model(ARCHITECTURE, num_classes=7)).state_dict()


@pytest.fixture(scope="module")
def expected(timm_state, tmp_path_factory):
    path = peers.save(timm_state, tmp_path_factory.mktemp("plain") / "x.safetensors")
    return keras_convnext.state_dict(load(path))


def load(path, **arguments):
    return keras_convnext.load(path, **{"input_shape": (32, 32, 3), **arguments})


def transformers_state(version, prefix):
    """A classifier of `transformers` with one block a stage, behind a prefix."""
    import transformers

    words = {1: "ConvNext", 2: "ConvNextV2"}[version]
    config = getattr(transformers, f"{words}Config")(
        hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3], num_labels=5
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{words}ForImageClassification")(config)
    return {prefix + name: np.zeros(value.shape, "float32") for name, value in model.state_dict().items()}


WRAPPERS = ("", "module.", "model.", "_orig_mod.", "backbone.", "model.model.", "model._orig_mod.", "net.0.")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_any_prefix_of_a_classifier_of_transformers_is_stripped(version, prefix):
    state = (
        transformers_state(version, prefix) | {"criterion.weight": np.zeros(5, "float32")} if prefix else None
    )
    state = state or transformers_state(version, prefix)
    contents = layouts.inspect(state)
    assert (contents.layout, contents.classes) == ("huggingface", 5)
    assert contents.others == (("criterion.weight",) if prefix else ())
    variant = layouts.find_variant(state)
    assert variant.name == ("convnext_tiny" if version == 1 else "convnextv2_tiny")
    shapes = layouts.weight_shapes(variant, 5)
    assert set(layouts.read(state, shapes)) == set(shapes)


@pytest.mark.parametrize("prefix", [*WRAPPERS, "a.b.c."])
@pytest.mark.parametrize("head", ["proj", "mlp"])
def test_any_prefix_of_open_clip_is_stripped(prefix, head):
    variant = layouts.VARIANTS["convnext_base" if head == "proj" else "convnext_large_mlp"]
    shapes = layouts.weight_shapes(variant, 640)
    state = {}
    for name, shape in shapes.items():
        full = f"visual.trunk.{layouts.rename(name, 'open_clip')}"
        if name.startswith(("head.", "pre_logits.")):
            if name == "head.bias":
                continue
            where = "proj" if head == "proj" else "mlp.fc2" if name.startswith("head") else "mlp.fc1"
            full = f"visual.head.{where}.{name.partition('.')[2]}"
        state[prefix + full] = np.zeros(shape, "float32")
    state[f"{prefix}transformer.resblocks.0.weight"] = state[f"{prefix}logit_scale"] = np.zeros(1, "float32")
    contents = layouts.inspect(state)
    assert (contents.layout, contents.classes, contents.others) == ("open_clip", 640, ())
    assert set(layouts.read(state, shapes)) == set(shapes)


@pytest.mark.parametrize("prefix", WRAPPERS[1:])
def test_what_a_training_program_keeps_beside_the_network_is_left_out_with_a_word(
    prefix, timm_state, expected, tmp_path, caplog
):
    state = {prefix + name: value for name, value in timm_state.items()} | EXTRAS
    path = peers.save(state, tmp_path / "x.pth")
    actual = keras_convnext.state_dict(load(path))
    assert all(np.array_equal(actual[name], array) for name, array in expected.items())
    assert "criterion.weight, train_acc.tp" in caplog.text
    assert load(path, include_top=False).output_shape[-1] == 128
    assert load(path, classes=3, new_head=True).output_shape == (None, 3)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        *(("", head) for head in ("fc", "classifier.1")),
        *(("backbone.", head) for head in ("fc", "classifier.1", "head")),
        *(("model.backbone.", head) for head in ("my_head.0.linear", "head", "stages")),
    ],
)
def test_a_head_of_ones_own_is_named_and_the_body_loads(prefix, head, timm_state, tmp_path, caplog):
    outer = prefix.replace("backbone.", "")
    state = {prefix + name: value for name, value in timm_state.items() if not name.startswith("head.fc")}
    state |= {f"{outer}{head}.weight": torch.ones(5, 128), f"{outer}{head}.bias": torch.ones(5)}
    path = peers.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"Beside the network it holds .*{outer}{head}.weight"):
        load(path)
    with pytest.raises(ValueError, match=rf"Left over \(2\): .*{outer}{head}.weight"):
        keras_convnext.convert(path, tmp_path / "y.safetensors", "timm")
    assert load(path, include_top=False).output_shape[-1] == 128
    assert "no part of the network" in caplog.text and f"{outer}{head}.weight" in caplog.text
    assert load(path, classes=3, new_head=True).output_shape == (None, 3)


def test_without_a_prefix_a_loss_is_refused_with_the_way_on(timm_state, tmp_path):
    path = peers.save(timm_state | EXTRAS, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"Left over \(3\): .*include_top=False or new_head=True; or take it out"
    ):
        load(path)
    assert load(path, classes=3, new_head=True).output_shape == (None, 3)


def test_an_extra_block_is_refused_whatever_is_asked_for(timm_state, tmp_path):
    state = timm_state | {"stages.3.blocks.7.norm.weight": torch.ones(128)}
    path = peers.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"Left over .1.: stages.3.blocks.7.norm.weight"):
        keras_convnext.load(ARCHITECTURE, weights=path, include_top=False)


def test_two_networks_in_one_file_are_named(timm_state, tmp_path):
    state = {
        f"{side}.{name}": value.clone()
        for side in ("student", "teacher")
        for name, value in timm_state.items()
    }
    with pytest.raises(ValueError, match=r"one ConvNeXt, received 2, .*'student.', 'teacher.'"):
        load(peers.save(state, tmp_path / "x.pth"))


def test_two_networks_of_two_layouts_are_named(timm_state, expected, tmp_path):
    state = {f"student.{name}": value.clone() for name, value in timm_state.items()}
    state |= {f"teacher.{name}": torch.from_numpy(array) for name, array in expected.items()}
    with pytest.raises(ValueError, match=r"one ConvNeXt, received 2, .*'student.', 'teacher.'"):
        load(peers.save(state, tmp_path / "x.pth"))


@pytest.mark.once
def test_of_two_networks_the_advice_takes_one_with_a_prefix():
    """Every name starts with "", so that would leave both."""
    with pytest.raises(layouts.StateDictError, match=r"with '', 'teacher\.'\..*startswith\('teacher\.'\)"):
        layouts.detect_layout(["stem.0.weight", "teacher.stem.0.weight"])


HEADS = {
    "a hidden layer": ("timm", {"head.pre_logits.fc1.weight": (64, 128), "head.fc2.weight": (5, 64)}),
    "weight norm": ("timm", {"head.fc.weight_g": (5, 1), "head.fc.weight_v": (5, 128), "head.fc.bias": (5,)}),
    "LoRA": ("timm", {"head.fc.base_layer.weight": (5, 128), "head.fc.lora_A.default.weight": (4, 128)}),
    "no Sequential": ("timm", {"head.weight": (5, 128), "head.bias": (5,)}),
    "each place": ("timm", {"head.fc.weight": (5, 128, 1, 1), "head.fc.bias": (5,)}),
    "a Linear": ("torchvision", {"classifier.weight": (5, 768), "classifier.bias": (5,)}),
    "a fourth": ("torchvision", {"classifier.3.weight": (5, 768), "classifier.3.bias": (5,)}),
    "two": ("torchvision", {"classifier.2.weight": (8, 768), "classifier.3.weight": (5, 8)}),
    "a Sequential": ("huggingface", {"classifier.0.weight": (8, 768), "classifier.2.weight": (5, 8)}),
    "official": ("official", {"head.0.weight": (8, 768), "head.2.weight": (5, 8)}),
}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_another_kind_is_named(kind, prefix, caplog):
    layout, head = HEADS[kind]
    variant = layouts.VARIANTS["test_convnext2" if layout == "timm" else "convnext_tiny"]
    shapes = layouts.weight_shapes(variant, 0)
    state = {prefix + layouts.rename(key, layout): np.zeros(shape, "f4") for key, shape in shapes.items()}
    state |= {prefix + name: np.zeros(shape, "f4") for name, shape in head.items()}
    contents = layouts.inspect(state)
    if kind != "two":  # of which one looks like the classifier
        assert contents.classes == 0 and contents.others
    with pytest.raises(ValueError, match=r"Left over|Missing"):
        layouts.read(state, layouts.weight_shapes(variant, contents.classes or 5))
    assert not caplog.records
    assert layouts.read(state, shapes, may_hold=("head", "pre_logits")).keys() == shapes.keys()
    named = [name for name in head if not name.startswith(layouts.rename("head.", layout))]  # not a head's
    assert all(f"{prefix}{name}" in caplog.text for name in named), caplog.text


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("decode_head.conv_seg.weight", "detection and segmentation heads"),
        ("neck.gap.p", "detection and segmentation heads"),
        ("logit_scale", "text tower of CLIP"),
        ("decoder.0.weight", "FCMAE mask token and decoder"),
    ],
)
def test_networks_beside_are_said(beside, said, timm_state, tmp_path, caplog):
    state = {f"backbone.{name}": value for name, value in timm_state.items()} | {beside: torch.ones(5)}
    load(peers.save(state, tmp_path / "x.pth"))
    assert f"x.pth the ConvNeXt is taken, not: {said}." in caplog.text


def test_of_several_networks_the_one_that_is_taken_is_said(timm_state, expected, tmp_path, caplog):
    other = {name: value + 1 for name, value in timm_state.items()}

    def written(content):
        torch.save(content, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    actual = keras_convnext.state_dict(load(written({"state_dict": timm_state, "best_state_dict": other})))
    assert all(np.array_equal(actual[name], array) for name, array in expected.items())
    assert "under 'state_dict' is taken, not ['best_state_dict']" in caplog.text
    caplog.clear()
    load(written({"model": timm_state, "optimizer": {"state": {}}}))
    assert "is taken" not in caplog.text


@pytest.mark.parametrize("layout", ["timm", "torchvision", "huggingface"])
def test_a_classifier_behind_dropout_is_read(layout, timm_state, tmp_path):
    name = "convnext_tiny"
    shapes = layouts.weight_shapes(layouts.VARIANTS[name], 7)
    state = {layouts.rename(key, layout): np.zeros(shape, "float32") for key, shape in shapes.items()}
    head = layouts.rename("head.", layout)
    for leaf in ("weight", "bias"):
        state[f"{head}1.{leaf}"] = state.pop(f"{head}{leaf}")
    assert layouts.inspect(state).classes == 7
    assert set(layouts.read(state, shapes)) == set(shapes)
    state |= {
        f"{head}0.{leaf}": state[f"{head}1.{leaf}"] for leaf in ("weight", "bias")
    }  # two are no classifier
    assert layouts.inspect(state).classes == 0


def test_flattened_stages_of_timm_are_read(timm_state, tmp_path, caplog):
    peer = timm.create_model(ARCHITECTURE, features_only=True)
    state = {f"encoder.model.{name}": value for name, value in peer.state_dict().items()}
    state["decoder.weight"] = torch.ones(3)
    assert any("stages_0.blocks" in name for name in state)
    model = load(peers.save(state, tmp_path / "x.pth"), include_top=False)
    actual = keras_convnext.state_dict(model)["stages.1.0.dwconv.weight"]
    assert np.array_equal(actual, peer.state_dict()["stages_1.blocks.0.conv_dw.weight"])


# Keys and endings of checkpoints.

OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(4, 3, 2, 2)}}, "param_groups": []}


@pytest.mark.parametrize(
    "key", ["model_state_dict", "model_state", "net", "weights", "params", "teacher", "network", "anything"]
)
def test_the_network_of_a_checkpoint_is_found_under_any_key(key, timm_state, expected, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"epoch": 3, key: timm_state, "optimizer_state_dict": OPTIMIZER, "loss": EXTRAS}, path)
    actual = keras_convnext.state_dict(load(path))
    assert all(np.array_equal(actual[name], array) for name, array in expected.items())


@pytest.mark.once
def test_averaged_weights_come_first_and_two_networks_are_named(timm_state, tmp_path):
    averaged = {name: value + 1 for name, value in timm_state.items()}
    torch.save({"model_state_dict": timm_state, "model_ema_state_dict": averaged}, tmp_path / "x.pth")
    read = torch_files.read_state_dict(tmp_path / "x.pth")
    assert np.array_equal(read["stem.0.bias"], averaged["stem.0.bias"])
    torch.save({"model": timm_state, "cinema": timm_state, "ema_model": averaged}, tmp_path / "x.pth")
    read = torch_files.read_state_dict(tmp_path / "x.pth")
    assert np.array_equal(read["stem.0.bias"], averaged["stem.0.bias"])
    torch.save({"net": timm_state, "loss": torch.tensor(3.0), "epoch": torch.tensor(1)}, tmp_path / "x.pth")
    read = torch_files.read_state_dict(tmp_path / "x.pth")
    assert np.array_equal(read["stem.0.bias"], timm_state["stem.0.bias"])
    ring: dict = {}
    ring |= {str(number): ring for number in range(3000)}
    torch.save(ring, tmp_path / "x.pth")
    with pytest.raises(FileFormatError, match="received a dict with the keys"):
        torch_files.read_state_dict(tmp_path / "x.pth")
    torch.save({"student": timm_state, "teacher": averaged}, tmp_path / "x.pth")
    with pytest.raises(FileFormatError, match=r"one under each of student, teacher"):
        torch_files.read_state_dict(tmp_path / "x.pth")
    torch.save({"epoch": 1, "optimizer": OPTIMIZER, "loss": EXTRAS}, tmp_path / "x.pth")
    with pytest.raises(FileFormatError, match=r"received a dict with the keys"):
        torch_files.read_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["model_best.pth.tar", "last.ckpt", "x.model", "checkpoint_final"])
@pytest.mark.parametrize("is_old", [False, True])
def test_the_ending_of_a_file_of_torch_is_free(name, is_old, timm_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": timm_state}, name, _use_new_zipfile_serialization=not is_old)
    for path in (name, tmp_path / name):
        assert load(path).output_shape == (None, 7)
    built = keras_convnext.TestConvNeXt2(weights=name, classes=7, input_shape=(32, 32, 3))
    assert built.output_shape == (None, 7)


@pytest.mark.parametrize("classes", [2**33, 2**60])
def test_a_classifier_that_repeats_a_few_numbers_is_refused(classes, timm_state, tmp_path, refused):
    state = timm_state | {
        "head.fc.weight": torch.ones(1, 128).expand(classes, 128) if classes < 2**40 else torch.ones(1, 1),
        "head.fc.bias": torch.ones(1).expand(classes),
    }
    if classes > 2**40:
        state["head.fc.weight"] = torch.ones(1, 1).expand(classes, 1)
    torch.save(state, tmp_path / "x.pth")
    for command in ("info", "convert"):
        target = [tmp_path / "y.safetensors"] * (command == "convert")
        assert "that repeats a few" in refused(command, tmp_path / "x.pth", *target)


# Other channels than three.


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_file_for_other_channels_builds_a_model_for_them(channels, named, tmp_path):
    state = timm.create_model(ARCHITECTURE, num_classes=7, in_chans=channels).state_dict()
    path = peers.save(state, tmp_path / "x.pth")
    model = keras_convnext.load(ARCHITECTURE, weights=path) if named else keras_convnext.load(path)
    assert model.input_shape[-1] == channels
    actual = keras_convnext.state_dict(model)["downsample_layers.0.0.weight"]
    assert np.array_equal(actual, state["stem.0.weight"])
    assert keras_convnext.TestConvNeXt2(weights=path, classes=7).input_shape[-1] == channels


def twins(name, channels, tmp_path, include_preprocessing=True):
    """The model of three channels and the one of other `channels`, of one file with random weights."""
    path = peers.save(
        peers.randomise(timm.create_model(name, num_classes=7)).state_dict(), tmp_path / "x.pth"
    )
    settings = {"include_preprocessing": include_preprocessing, "classifier_activation": None}
    return [
        keras_convnext.load(name, weights=path, input_shape=(32, 32, each), **settings)
        for each in (3, channels)
    ]


@pytest.mark.every_backend
@pytest.mark.parametrize("include_preprocessing", [True, False])
def test_a_gray_picture_gives_what_its_three_equal_channels_give(include_preprocessing, tmp_path):
    color, gray = twins(ARCHITECTURE, 1, tmp_path, include_preprocessing)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1)).astype("float32")
    images = images if include_preprocessing else images / 255 - 0.5
    expected = color.predict_on_batch(np.repeat(images, 3, -1))
    np.testing.assert_allclose(gray.predict_on_batch(images), expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected, 0).max() > 0.1


def test_a_gray_picture_differs_at_the_border_of_an_overlapping_stem_only(tmp_path):
    color, gray = twins("convnext_atto_ols", 1, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 1)).astype("float32")
    place = "downsample_layers_0_0"
    maps = [
        keras.Model(model.input, model.get_layer(place).output).predict_on_batch(pictures)
        for model, pictures in ((color, np.repeat(images, 3, -1)), (gray, images))
    ]
    difference = np.abs(maps[0] - maps[1]).max((0, 3))
    assert difference[1:, 1:].max() < 1e-5 and difference.max() < 0.5


@pytest.mark.parametrize("include_preprocessing", [True, False])
@pytest.mark.parametrize("alpha", [0, 255])
def test_a_fourth_channel_changes_nothing_at_the_start(alpha, include_preprocessing, tmp_path):
    color, rgba = twins(ARCHITECTURE, 4, tmp_path, include_preprocessing)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32")
    with_alpha = np.concatenate([images, np.full((2, 32, 32, 1), alpha, "float32")], -1)
    expected = color.predict_on_batch(images)
    np.testing.assert_allclose(rgba.predict_on_batch(with_alpha), expected, rtol=1e-5, atol=1e-5)


def test_channels_adapt_with_a_new_head_too_and_a_gray_file_stays_as_it_is(timm_state, tmp_path):
    path = peers.save(timm_state, tmp_path / "x.pth")
    settings = {"input_shape": (32, 32, 1), "include_top": False, "pooling": "avg"}
    features = keras_convnext.load(ARCHITECTURE, weights=path, **settings)
    fresh = keras_convnext.load(ARCHITECTURE, weights=path, input_shape=(32, 32, 1), classes=3, new_head=True)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1)).astype("float32")
    inner = keras.Model(fresh.input, fresh.get_layer("norm").output)
    np.testing.assert_allclose(inner.predict_on_batch(images), features.predict_on_batch(images), atol=1e-5)
    gray = keras_convnext.save_weights(fresh, tmp_path / "gray.safetensors", "timm")
    again = keras_convnext.load(ARCHITECTURE, weights=gray, input_shape=(32, 32, 1))
    np.testing.assert_allclose(again.predict_on_batch(images), fresh.predict_on_batch(images), atol=1e-6)
