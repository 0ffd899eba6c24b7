"""What a name means: a tag, an architecture or a file, told in one place; and how often a file is read."""

import zipfile

import numpy as np
import pytest

import keras_convnext
from keras_convnext import predictor
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.evaluation import classification
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import catalog, resolve, safetensors_files, torch_files

pytestmark = pytest.mark.once

NAME = "test_convnext2"
TAG = "test_convnext2.r160_in1k"
STORED = Preprocessing(48, 0.9, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))


@pytest.fixture
def file(tmp_path):
    model = keras_convnext.load(NAME, None, classes=5, include_preprocessing=False)
    return keras_convnext.save_weights(model, tmp_path / "mine.safetensors", "timm", STORED)


def test_a_name_means_an_architecture_a_row_or_a_file():
    assert resolve.meaning(NAME) is VARIANTS[NAME]
    assert resolve.meaning(VARIANTS[NAME]) is VARIANTS[NAME]
    assert resolve.meaning(TAG) is catalog.CHECKPOINTS[TAG]
    assert resolve.meaning("convnext_tiny_in22k").tag == "convnext_tiny.fb_in22k"
    for path in ("x.safetensors", "x.weights.h5", "folder/x", "./x", "~/x"):
        assert str(resolve.meaning(path)) == path.removeprefix("./")
    with pytest.raises(ValueError, match=r"Unknown architecture 'convnext_tinny'.*Did you mean 'convnext_ti"):
        resolve.meaning("convnext_tinny")


def test_a_name_that_is_a_tag_and_a_model_is_refused_with_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (NAME, TAG, "r160_in1k"):
        (tmp_path / name).touch()  # a log or a note: no weights, without a suffix
        words = [name] if name in (NAME, TAG) else [VARIANTS[NAME], name]
        assert resolve.resolve(*words).variant is VARIANTS[NAME]
        (tmp_path / name).unlink()
    (tmp_path / NAME).mkdir()
    assert resolve.meaning(NAME) is VARIANTS[NAME]  # the control: a folder is no model
    (tmp_path / NAME / "saved_model.pb").touch()
    with pytest.raises(ValueError, match=rf"'{NAME}' means two things"):
        classification._open_model(NAME, None)
    keras_convnext.TestConvNeXt2(weights=None)  # names the architecture, whatever lies here


def test_the_file_says_what_the_name_leaves_open(file):
    for found in (resolve.resolve(file), resolve.resolve(str(file)), resolve.resolve(None, file)):
        assert (found.variant.name, found.classes, found.preprocessing) == (NAME, 5, STORED)
        assert (found.path, found.published, found.is_random, found.is_described) == (file, None, False, True)
    tagged = resolve.resolve(TAG, file)
    assert tagged.preprocessing == catalog.CHECKPOINTS[TAG].preprocessing and tagged.classes == 5
    assert tagged.stored is None and tagged.published is None
    with pytest.raises(
        ValueError, match=r"beside weights='fb_in1k', received the file '.*mine\.safetensors'"
    ):
        resolve.resolve(file, "fb_in1k")
    with pytest.raises(ValueError, match="a tag, an architecture or a weight file, received None"):
        resolve.resolve(None)


def test_random_weights_are_those_of_the_tag_or_of_imagenet():
    plain, tagged = resolve.resolve(NAME, None), resolve.resolve("convnext_tiny.fb_in22k", None)
    assert (plain.classes, plain.is_random, plain.is_described) == (1000, True, False)
    assert (tagged.classes, tagged.is_random, tagged.is_described) == (21841, True, True)
    clip = resolve.resolve("convnext_base.clip_laion2b", None)
    assert (clip.activation(clip.classes), clip.activation(7)) == (None, "softmax")


def test_odd_names_are_refused_in_words(monkeypatch):
    for name, weights in (("", "default"), (None, "")):
        with pytest.raises(ValueError, match=r"received ''|Unknown architecture ''"):
            resolve.resolve(name, weights)
    with pytest.raises(IsADirectoryError, match=r"Expected a weight file\. Received a folder: \."):
        resolve.resolve(None, ".")
    with pytest.raises(FileNotFoundError, match=r"No such weight file: ~nobody-here/x\.pth"):
        resolve.resolve("~nobody-here/x.pth")
    with pytest.raises(ValueError, match=r"Unknown task 'feature'\. Did you mean 'features'\?"):
        resolve.resolve(NAME, None, "feature")


def test_a_task_decides_which_weights_will_do(monkeypatch, tmp_path, file):
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("KERAS_CONVNEXT_CACHE", str(tmp_path / "cache"))
    assert resolve.resolve("convnext_tiny", "imagenet").published.tag.endswith(".keras_applications")
    for features in (resolve.resolve("convnext_tiny", task="features"),):
        assert features.published.tag == "convnext_tiny.keras_applications_notop" and features.classes == 0
    with pytest.raises(ValueError, match=r"'convnextv2_tiny\.fcmae' has no classifier\. Use weights that"):
        resolve.resolve("convnextv2_tiny.fcmae", task="classification")
    resolve.resolve(file, task="classification")


def test_a_size_takes_the_crop_that_is_recommended_for_it():
    found = resolve.resolve("convnext_tiny.fb_in1k", None)
    assert found.preprocessing_at(288) == Preprocessing(288, 1.0)
    assert found.preprocessing_at((256, 288)) == Preprocessing((256, 288), 0.875)
    assert found.preprocessing == found.preprocessing_at(224) == Preprocessing(224, 0.875)


def test_a_file_is_read_once_by_all_that_open_it(file, monkeypatch, run, tmp_path):
    read = []
    once = torch_files.read_state_dict
    monkeypatch.setattr(torch_files, "read_state_dict", lambda path: read.append(path) or once(path))
    for opening in (
        lambda: keras_convnext.load(NAME, file),
        lambda: keras_convnext.load(file),
        lambda: keras_convnext.TestConvNeXt2(weights=file, classes=5),
        lambda: predictor.open_predictor(file),
        lambda: predictor.open_predictor(weights=file, task="features"),
        lambda: keras_convnext.convert(file, tmp_path / "x.keras"),
        lambda: run("info", file),
        lambda: run("convert", file, tmp_path / "x.pth"),
    ):
        read.clear()
        opening()
        assert read == [file]


def test_load_takes_a_file_by_itself(file):
    images = np.random.default_rng(0).uniform(0, 255, (1, 48, 48, 3)).astype("float32")
    model = keras_convnext.load(file)
    assert model.name == NAME and model.output_shape == (None, 5) and model.input_shape == (None, 48, 48, 3)
    expected = keras_convnext.load(NAME, file).predict_on_batch(images)
    np.testing.assert_array_equal(model.predict_on_batch(images), expected)


def test_a_file_without_its_architecture_is_refused_alone(tmp_path):
    keras_convnext.TestConvNeXt2(weights=None).save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(
        ValueError, match=r"x\.weights\.h5 does not say which architecture.*load\(architecture"
    ):
        keras_convnext.load(tmp_path / "x.weights.h5")
    keras_convnext.load(NAME, tmp_path / "x.weights.h5", input_shape=(None, None, 3))


def test_the_packaged_file_reads_as_before():
    row = catalog.CHECKPOINTS["convnextv2_atto.tiny_imagenet200"]
    found = resolve.resolve(row.tag)
    metadata = safetensors_files.read_safetensors_metadata(found.path)
    assert '"resize_mode": "shorter_side"' in metadata["keras_convnext.images"]
    assert resolve.resolve(found.path).preprocessing == found.preprocessing == Preprocessing(64, 1.0)


def test_a_damaged_keras_file_is_one_error(tmp_path):
    path = tmp_path / "x.keras"
    keras_convnext.load(NAME, None, classes=5).save(path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("model.weights.h5").header_offset + 5000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.keras', which is damaged .*: BadZipFile: Bad CRC-32"):
        _ = resolve.resolve(path).contents
