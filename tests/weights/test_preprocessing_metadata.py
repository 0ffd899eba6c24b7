"""Weight files say how their images are prepared: written, read by all that open them, refused damaged."""

import dataclasses
import json
import logging
import pathlib
import zipfile

import h5py
import keras
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_safetensors

import keras_convnext
from keras_convnext import predictor
from keras_convnext._files import FileFormatError
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.evaluation import classification
from keras_convnext.weights import assign, preprocessing_metadata, safetensors_files
from keras_convnext.weights.catalog import CHECKPOINTS, default_checkpoint, find_checkpoint
from keras_convnext.weights.preprocessing_metadata import (
    KEY,
    from_json,
    read_preprocessing,
    to_json,
)

PHOTO = pathlib.Path(__file__).parents[1] / "images" / "coffee.jpg"
NAME = "test_convnext2"
TAG = "test_convnext2.r160_in1k"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
IMAGES = Preprocessing(48, 0.9, "bilinear", "squash", resize_size=50, mean=MEAN, std=STD)
STORED = {
    "image_size": 48,
    "crop": 0.9,
    "resize_mode": "squash",
    "resize_size": 50,
    "interpolation": "bilinear",
    "mean": list(MEAN),
    "std": list(STD),
}
DEFAULT_ROW = default_checkpoint(NAME)


@pytest.fixture(scope="module")
def model():
    """A classifier with logits far enough apart that a wrong normaliser shows, and without one of its own."""
    keras.utils.set_random_seed(0)
    built = keras_convnext.load(NAME, None, classes=5, input_shape=(48, 48, 3), include_preprocessing=False)
    head = built.get_layer("head")
    head.set_weights([np.random.default_rng(0).normal(0, 1, value.shape) for value in head.get_weights()])
    return built


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The same weights with and without the key."""
    folder = tmp_path_factory.mktemp("files")
    keras_convnext.save_weights(model, folder / "said.safetensors", "timm", IMAGES)
    keras_convnext.save_weights(model, folder / "unsaid.safetensors", "timm")
    return folder / "said.safetensors", folder / "unsaid.safetensors"


def open_backbone(*arguments, **settings):
    return predictor.open_predictor(*arguments, **settings, task="features")


def pixels(size=48):
    return np.random.default_rng(1).integers(0, 256, (2, size, size, 3)).astype("float32")


def normalised(images, mean, std):
    return ((images / 255 - mean) / std).astype("float32")


def outputs(model, images):
    return keras.ops.convert_to_numpy(model(images))


# The text


@pytest.mark.once
def test_descriptions_come_back_from_their_text():
    assert from_json(to_json(IMAGES), "x") == IMAGES
    assert from_json(to_json(Preprocessing(32)), "x") == Preprocessing(32) != IMAGES
    assert json.loads(to_json(IMAGES)) == STORED


@pytest.mark.once
def test_every_row_of_the_table_can_be_described():
    for row in CHECKPOINTS.values():
        prepared = row.preprocessing
        assert from_json(to_json(prepared), "x") == prepared
        for name, value in json.loads(to_json(prepared)).items():
            assert value == (list(getattr(row, name)) if name in ("mean", "std") else getattr(row, name))


DAMAGED = [
    (
        "image_size",
        0,
        r"image_size to be a positive integer or \(height, width\), at most 16,384, received 0\.",
    ),
    ("image_size", 64.0, r"image_size to be .*, received 64\.0\."),
    ("image_size", True, r"image_size to be .*, received True\."),
    ("crop", 0, r"crop_fraction from 0\.01 to 1, received 0\."),
    ("crop", 1.5, r"crop_fraction from 0\.01 to 1, received 1\.5\."),
    ("crop", "0.9", r"crop_fraction from 0\.01 to 1, received '0\.9'\."),
    ("crop", float("nan"), r"crop_fraction from 0\.01 to 1, received nan\."),
    ("image_size", 1_000_000, "image_size to be .*, at most 16,384, received 1000000"),
    ("image_size", [64, 10**400], r"image_size to be .*, received \[64, 1000.*\.\.\.\."),
    ("resize_size", 10**9, "resize_size to be .*, at most 16,384, or None, received 1000000000"),
    ("crop", 1e-300, "crop_fraction from 0.01 to 1, received 1e-300"),
    ("crop", 10**400, r"crop_fraction from 0.01 to 1, received 1000.*\.\.\.\."),
    ("mean", [0, 1e308, 0], r"mean to be three numbers from -1000 to 1000, received \[0, 1e\+308, 0\]"),
    ("mean", [0, 10**400, 0], r"mean to be three numbers .*, received \[0, 1000.*\.\.\.\."),
    ("std", [1, 1, 1e-300], r"std to be three numbers from 1e-06 to 1000, received \[1, 1, 1e-300\]"),
    ("resize_mode", "stretch", r"resize_mode 'stretch'\. Known: shorter_side, squash\."),
    ("resize_mode", ["squash"], r"resize_mode \['squash'\]\. Known: "),
    ("resize_size", 0, r"resize_size to be a positive integer, at most 16,384, or None, received 0\."),
    ("interpolation", "nearest", r"interpolation 'nearest'\. Known: bicubic, bilinear\."),
    ("mean", [0.5, 0.5], r"mean to be three numbers from -1000 to 1000, received \[0\.5, 0\.5\]\."),
    ("mean", 0.5, r"mean to be three numbers from -1000 to 1000, received 0\.5\."),
    ("std", [0.5, 0, 0.5], r"std to be three numbers from 1e-06 to 1000, received \[0\.5, 0, 0\.5\]\."),
    ("gamma", 2.2, r"the values crop, .*, std, received \['crop', 'gamma', "),
]


@pytest.mark.once
@pytest.mark.parametrize(("name", "value", "message"), DAMAGED, ids=[f"{n}={v}" for n, v, _ in DAMAGED])
def test_a_damaged_value_is_named_with_its_file_and_key(name, value, message, tmp_path):
    right = json.loads(to_json(IMAGES))
    path = tmp_path / "x.safetensors"
    save_safetensors({"a": np.zeros(1, "float32")}, path, {KEY: json.dumps(right)})
    assert read_preprocessing(path) == IMAGES  # the control
    save_safetensors({"a": np.zeros(1, "float32")}, path, {KEY: json.dumps(right | {name: value})})
    with pytest.raises(
        ValueError, match=rf"x\.safetensors .*'{KEY}' is damaged\. (Expected|Unknown) {message}.* tag"
    ):
        read_preprocessing(path)


@pytest.mark.once
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "64", '{"image_size": 64}', "[" * 5000])
def test_a_damaged_text_is_named_with_its_file_and_key(text):
    with pytest.raises(
        ValueError, match=rf"^x\.h5 .*'{KEY}' is damaged\. Expected .*received .{{0,90}} Write"
    ):
        from_json(text, "x.h5")


# Files


@pytest.mark.once
def test_files_of_others_say_nothing(tmp_path):
    save_safetensors({"a": np.zeros(1, "float32")}, tmp_path / "plain.safetensors", {"format": "pt"})
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.safetensors").write_bytes(b"no such file")
    h5py.File(tmp_path / "plain.h5", "w").close()
    for path in tmp_path.iterdir():
        assert read_preprocessing(path) is None, path
    for name in ("x.keras", "x.h5"):
        (tmp_path / name).write_bytes(b"neither an archive nor HDF5")
        with pytest.raises(FileFormatError, match=name):
            read_preprocessing(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "y.keras", "w") as archive:  # a description that cannot be read
        archive.writestr(KEY, to_json(IMAGES))
    content = (tmp_path / "y.keras").read_bytes()
    (tmp_path / "y.keras").write_bytes(content.replace(b"0.", b"0,", 1))
    with pytest.raises(FileFormatError, match=r"Bad CRC-32 for file 'keras_convnext\.images'"):
        read_preprocessing(tmp_path / "y.keras")
    for name in ("none.safetensors", "none.h5", "none.keras"):
        with pytest.raises(FileNotFoundError):
            read_preprocessing(tmp_path / name)
    with pytest.raises(ValueError, match=r"ending in \.h5 or \.keras, received '.*x\.pth'"):
        preprocessing_metadata.add_preprocessing(tmp_path / "x.pth", IMAGES)


@pytest.mark.once
def test_the_key_changes_no_weight_and_is_the_same_each_time(files, model, tmp_path):
    said, unsaid = files
    arrays, others = load_file(said), load_file(unsaid)
    assert arrays.keys() == others.keys()
    assert all(np.array_equal(array, others[name]) for name, array in arrays.items())
    assert safetensors_files.read_safetensors_metadata(unsaid) == {"format": "pt"}
    again = keras_convnext.save_weights(model, tmp_path / "again.safetensors", "timm", IMAGES)
    assert again.read_bytes() == said.read_bytes() != unsaid.read_bytes()


@pytest.mark.once
def test_save_weights_refuses_what_would_be_lost_or_wrong(model, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a \.safetensors file.*Received: .*x\.pth"):
        keras_convnext.save_weights(model, tmp_path / "x.pth", preprocessing=IMAGES)
    with pytest.raises(ValueError, match=r"preprocessing to be a Preprocessing, received 64\."):
        keras_convnext.save_weights(model, tmp_path / "x.safetensors", "timm", preprocessing=64)
    for channels in (3, 1):
        own = keras_convnext.load(NAME, None, classes=5, input_shape=(48, 48, channels))
        with pytest.raises(
            ValueError, match=r"normalises with, \[0\.5.*received preprocessing with \[0\.5, 0\.4, 0"
        ):
            keras_convnext.save_weights(own, tmp_path / "x.safetensors", "timm", preprocessing=IMAGES)
        assert not (tmp_path / "x.safetensors").exists()
        images = dataclasses.replace(IMAGES, mean=DEFAULT_ROW.mean, std=DEFAULT_ROW.std)
        keras_convnext.save_weights(own, tmp_path / "x.safetensors", "timm", preprocessing=images)
        assert read_preprocessing(tmp_path / "x.safetensors") == images
        (tmp_path / "x.safetensors").unlink()


# Those that open files


def test_a_model_takes_normaliser_and_size_from_its_file_where_no_tag_says_more(files, model):
    said, unsaid = files
    expected = outputs(model, normalised(pixels(), MEAN, STD))
    others = outputs(model, normalised(pixels(), DEFAULT_ROW.mean, DEFAULT_ROW.std))
    assert np.abs(expected - others).max() > 0.01
    loaded = keras_convnext.load(NAME, said)
    assert loaded.input_shape == (None, 48, 48, 3)
    np.testing.assert_allclose(outputs(loaded, pixels()), expected, atol=1e-5)
    shaped = keras_convnext.TestConvNeXt2(weights=str(said), classes=5, input_shape=(None, None, 3))
    np.testing.assert_allclose(outputs(shaped, pixels()), expected, atol=1e-5)

    plain = keras_convnext.load(NAME, unsaid)  # the control
    assert plain.input_shape == (None, DEFAULT_ROW.image_size, DEFAULT_ROW.image_size, 3)
    for other in (unsaid, said):
        tagged = keras_convnext.load(TAG if other is said else NAME, other, input_shape=(48, 48, 3))
        np.testing.assert_allclose(outputs(tagged, pixels()), others, atol=1e-5)


@pytest.mark.once
def test_open_predictor_prepares_images_as_the_file_says(files):
    said, unsaid = files
    for name in (None, NAME):
        opened = predictor.open_predictor(name, said)
        assert opened.preprocessing == IMAGES and opened.row is None
        assert opened.model.input_shape == (None, 48, 48, 3)
        np.testing.assert_allclose(assign.around(opened.model).normaliser, (MEAN, STD), rtol=1e-6)
    assert predictor.open_predictor(str(said)).preprocessing == IMAGES
    assert predictor.open_predictor(said).preprocessing == IMAGES
    larger = predictor.open_predictor(weights=said, image_size=64)
    assert larger.preprocessing == dataclasses.replace(IMAGES, image_size=64, resize_size=None)
    assert larger.model.input_shape == (None, 64, 64, 3)
    tagged = predictor.open_predictor(TAG, said)
    assert tagged.preprocessing == find_checkpoint(TAG).preprocessing
    np.testing.assert_allclose(assign.around(tagged.model).normaliser, (DEFAULT_ROW.mean, DEFAULT_ROW.std))
    control = predictor.open_predictor(weights=unsaid)
    assert control.preprocessing == DEFAULT_ROW.preprocessing == tagged.preprocessing


@pytest.mark.once
def test_v2_files_without_the_key_are_prepared_at_224_as_before(tmp_path):
    model = keras_convnext.load("convnextv2_atto", None, classes=3, input_shape=(64, 64, 3))
    keras_convnext.save_weights(model, tmp_path / "x.safetensors")
    opened = predictor.open_predictor(weights=tmp_path / "x.safetensors")
    assert opened.preprocessing == Preprocessing(224)
    images = Preprocessing(64, crop_fraction=1.0)
    keras_convnext.save_weights(model, tmp_path / "x.safetensors", "timm", preprocessing=images)
    opened = predictor.open_predictor(weights=tmp_path / "x.safetensors")
    assert opened.preprocessing == images


@pytest.mark.once
def test_open_backbone_prepares_images_as_the_file_says(files):
    said, unsaid = files
    opened = open_backbone(said)
    assert opened.preprocessing == IMAGES and opened.model.input_shape == (None, 48, 48, 3)
    np.testing.assert_allclose(assign.around(opened.model).normaliser, (MEAN, STD), rtol=1e-6)
    larger = open_backbone(NAME, said, image_size=64)
    assert larger.preprocessing == dataclasses.replace(IMAGES, image_size=64, resize_size=None)
    tagged = open_backbone(TAG, said)
    control = open_backbone(unsaid)
    assert tagged.preprocessing == control.preprocessing == DEFAULT_ROW.preprocessing


@pytest.mark.once
def test_a_damaged_key_is_told_by_all_but_beside_a_tag(files, tmp_path, refused):
    path = tmp_path / "damaged.safetensors"
    safetensors_files.write_safetensors(path, load_file(files[0]), {KEY: '{"image_size": 48}'})
    message = rf"damaged\.safetensors .*'{KEY}' is damaged\. Expected the values crop.*\['image_size'\]"
    for opening in (
        lambda: keras_convnext.load(NAME, path),
        lambda: predictor.open_predictor(weights=path),
        lambda: open_backbone(path),
        lambda: keras_convnext.convert(path, tmp_path / "out.safetensors", "timm"),
    ):
        with pytest.raises(ValueError, match=message):
            opening()
    assert not (tmp_path / "out.safetensors").exists()
    assert "is damaged" in refused("predict", PHOTO, "--weights", path)
    assert predictor.open_predictor(TAG, path).preprocessing == DEFAULT_ROW.preprocessing


@pytest.mark.once
def test_the_command_line_needs_no_image_size(files, run, tmp_path):
    said, unsaid = files
    predicted = {}
    for path in files:
        code, out, err = run("predict", PHOTO, "--weights", path, "--json", "--top", "5")
        assert (code, err) == (0, "")
        predicted[path] = {
            row["class_index"]: row["probability"] for row in json.loads(out)[0]["predictions"]
        }
    opened = predictor.open_predictor(weights=said)
    image = prepared(PHOTO)
    expected = outputs(opened.model, image)[0]
    np.testing.assert_allclose([predicted[said][number] for number in range(5)], expected, atol=1e-5)
    assert np.abs([predicted[unsaid][number] for number in range(5)] - expected).max() > 1e-3
    code, out, _ = run("info", said)
    assert "resize" in out and "both sides to 50, bilinear, then the central 48 x 48\n" in out
    assert KEY not in out
    assert json.loads(run("info", said, "--json")[1])["images"]["crop"] == 0.9
    assert "resize" not in run("info", unsaid)[1]
    assert json.loads(run("info", unsaid, "--json")[1])["images"] is None


def prepared(path):
    from keras_convnext.data import preprocess

    return preprocess.preprocess_image(preprocess.read_image(path), IMAGES)[None].astype("float32")


@pytest.mark.once
def test_evaluate_prepares_images_as_the_file_says(files, tmp_path):
    for name in "abcde":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(PHOTO.read_bytes())
    found = classification.evaluate(str(files[0]), tmp_path, batch_size=5, progress=False).settings
    columns = ("image_size", "crop", "resize_mode", "resize_size", "interpolation")
    assert [found[name] for name in columns] == ["48", "0.9", "squash", "50", "bilinear"]


# Conversion


@pytest.mark.parametrize("ending", [".safetensors", ".keras", ".weights.h5"])
def test_convert_carries_it_along_and_a_tag_wins(ending, files, model, tmp_path):
    said, unsaid = files
    target = keras_convnext.convert(said, tmp_path / f"out{ending}", "timm")
    assert read_preprocessing(target) == IMAGES
    opened = predictor.open_predictor(NAME if ending == ".weights.h5" else None, target)
    assert opened.preprocessing == IMAGES
    if ending == ".keras":
        assert open_backbone(target).preprocessing == IMAGES
        assert keras_convnext.convert(target, tmp_path / "back.safetensors", "timm").read_bytes() == (
            said.read_bytes()
        )
    expected = outputs(model, normalised(pixels(), MEAN, STD))
    np.testing.assert_allclose(outputs(opened.model, pixels()), expected, atol=1e-5)

    tagged = keras_convnext.convert(said, tmp_path / f"tagged{ending}", "timm", architecture=TAG)
    assert read_preprocessing(tagged) == find_checkpoint(TAG).preprocessing
    plain = keras_convnext.convert(unsaid, tmp_path / f"plain{ending}", "timm")
    assert read_preprocessing(plain) is None


@pytest.mark.once
def test_convert_tells_what_a_pytorch_file_has_no_place_for(files, tmp_path, caplog):
    said, unsaid = files
    with caplog.at_level(logging.WARNING, "keras_convnext"):
        keras_convnext.convert(unsaid, tmp_path / "plain.pth", "timm")
        assert not caplog.messages
        target = keras_convnext.convert(said, tmp_path / "out.pth", "timm")
    assert caplog.messages == [f"{target} has no place for how its images are prepared; .safetensors has."]
    assert read_preprocessing(target) is None
