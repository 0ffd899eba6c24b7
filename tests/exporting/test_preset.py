"""Preset folders: what the command writes, what `load` makes of them, what it refuses to touch."""

import json
import pathlib

import keras
import numpy as np
import pytest

import keras_convnext
from keras_convnext import Preprocessing
from keras_convnext.exporting.preset import NAMES, write_preset
from keras_convnext.weights import repositories

pytestmark = pytest.mark.one_backend

PREPARED = Preprocessing(64, crop_fraction=0.95, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def weight_file(path, name="test_convnext2", classes=7):
    """A file of a random model whose logits are far apart."""
    keras.utils.set_random_seed(3)
    model = keras_convnext.load(name, weights=None, classes=classes, input_shape=(64, 64, 3))
    for variable in model.weights:
        if variable.path.endswith(("gamma", "beta", "bias")):
            variable.assign(np.random.default_rng(1).normal(0.5, 0.3, variable.shape))
    arrays = keras_convnext.state_dict(model)
    from keras_convnext.weights import preprocessing_metadata, safetensors_files

    safetensors_files.write_safetensors(
        path, arrays, {preprocessing_metadata.KEY: preprocessing_metadata.to_json(PREPARED)}
    )
    return path


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """(weight file, preset folder of it)."""
    folder = tmp_path_factory.mktemp("presets")
    file = weight_file(folder / "weights.safetensors")
    write_preset(file, folder / "preset")
    return file, folder / "preset"


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype="uint8")


def logits(name):
    return np.asarray(keras_convnext.load(name, classifier_activation=None).predict(IMAGES, verbose=0))


def test_load_opens_a_preset_folder_bit_for_bit_and_knows_its_images(preset):
    file, folder = preset
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    expected = logits(file)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(logits(folder), expected)
    resolved = keras_convnext.weights.resolve.resolve(folder)
    assert (resolved.preprocessing, resolved.classes) == (PREPARED, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["test_convnext", "test_convnext3", "convnextv2_atto", "convnext_atto_ols", "convnext_zepto_rms_ols",
     "convnext_isotropic_small"],
)  # fmt: skip
def test_every_kind_of_layer_is_read_back_in_its_place(name, tmp_path):
    file = weight_file(tmp_path / "weights.safetensors", name)
    write_preset(file, tmp_path / "preset")
    source = keras_convnext.weights.resolve.resolve(file)
    found = keras_convnext.weights.resolve.resolve(tmp_path / "preset")
    assert found.variant.name == name
    expected, read = source.canonical(), found.canonical()
    assert expected.keys() == read.keys()
    for key in expected:
        np.testing.assert_array_equal(read[key], expected[key], err_msg=key)


def test_a_body_has_no_task_and_loads_as_features(tmp_path):
    file = weight_file(tmp_path / "weights.safetensors")
    body = keras_convnext.load(file, include_top=False)
    keras_convnext.save_weights(body, tmp_path / "body.safetensors", "timm")
    write_preset(tmp_path / "body.safetensors", tmp_path / "preset")
    assert not {"task.json", "task.weights.h5"} & {path.name for path in (tmp_path / "preset").iterdir()}
    model = keras_convnext.load(tmp_path / "preset", pyramid_norms=False)
    assert model.output_shape == (None, None, None, 128)


def test_card_names_licence_numbers_and_source(tmp_path, run):
    code, out, _ = run("preset", "convnextv2_atto.tiny_imagenet200", "preset")
    assert code == 0 and "8 files, written" in out
    text = pathlib.Path("preset/README.md").read_text()
    for expected in (
        'license: "other"\nlicense_name: "research-only"',
        "**Not for commercial use**",
        "| architecture | convnextv2_atto, 3,451,600 weights |",
        "| top-1 | 40.22 % at 64 pixels: measured here on tiny_imagenet200",
        "| source | in the package keras_convnext",
        "resized to 64x64 (center, bicubic), of which the central 64x64",
    ):
        assert expected in text
    assert json.loads(pathlib.Path("preset/metadata.json").read_text())["tasks"] == ["ImageClassifier"]
    repository = repositories.open_repository("preset")
    assert (repository.licence, repository.is_preset) == ("research-only", True)


def test_folders_of_others_and_without_force_are_not_touched(tmp_path, run, refused):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    error = refused("preset", "convnextv2_atto.tiny_imagenet200", "mine")
    assert "'mine' holds files that keras_convnext did not write" in error
    error = refused("preset", "convnextv2_atto.tiny_imagenet200", "mine", "--force")
    assert "did not write" in error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    (tmp_path / "file").write_text("mine")
    assert "where something else is" in refused("preset", "convnextv2_atto.tiny_imagenet200", "file")
    assert run("preset", "convnextv2_atto.tiny_imagenet200", "new")[0] == 0
    (tmp_path / "new" / "notes.txt").write_text("mine")
    (tmp_path / "new" / "config.json").write_text("{}")
    assert "--force" in refused("preset", "convnextv2_atto.tiny_imagenet200", "new")
    assert run("preset", "convnextv2_atto.tiny_imagenet200", "new", "--force")[0] == 0
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"
    assert "architecture" in (tmp_path / "new" / "config.json").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_weights_that_keras_hub_cannot_express_are_refused(tmp_path, refused):
    error = refused("preset", "convnext_tiny.fb_ade20k_512", "preset")
    assert "received a segmenter's" in error
    assert "received a detector's" in refused("preset", "convnext_tiny.fb_coco_mask_rcnn", "preset")
    assert "Expected hf://user/name beside --dry-run" in refused("preset", "x.fb", "preset", "--dry-run")
    assert not (tmp_path / "preset").exists()
