"""Weights of our own that ship with the package, and the program that makes a run into such a file."""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tomllib

import keras
import numpy as np
import programs
import pytest

import keras_convnext
from keras_convnext.cli.main import main
from keras_convnext.data import preprocess
from keras_convnext.data.class_names import class_names, find_class_list, synset_ids
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.evaluation.classification import match_classes
from keras_convnext.predictor import open_predictor
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import (
    assign,
    catalog,
    download,
    layouts,
    locate,
    preprocessing_metadata,
    safetensors_files,
    torch_files,
)

pytestmark = pytest.mark.one_backend

ROOT = pathlib.Path(__file__).parents[2]
PACKAGED_TERMS = "keras_convnext/weights/packaged/LICENSE-WEIGHTS.txt"
PHOTOS = ROOT / "keras_convnext" / "data" / "photos"
TAG = "test_convnext2.tiny_imagenet200"
SHIPPED = [row for row in catalog.CHECKPOINTS.values() if row.packaged]
CATS = {"n02123045", "n02123394", "n02124075"}  # tabby, Persian, Egyptian
RIGHT = {"cat.jpg": CATS, "coffee.jpg": {"n07920052"}, "rocket.jpg": {"n04008634"}}


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A model of random weights, its file as one that ships, and its row."""
    folder = tmp_path_factory.mktemp("package")
    keras.utils.set_random_seed(3)
    model = keras_convnext.TestConvNeXt2(weights=None, classes=200, input_shape=(64, 64, 3))
    arrays = {name: value.astype("float16") for name, value in assign.state_dict(model).items()}
    layout = layouts.write(arrays, VARIANTS["test_convnext2"], "timm")
    safetensors_files.write_safetensors(folder / f"{TAG}.safetensors", layout, {"format": "pt"})
    digest = hashlib.sha256((folder / f"{TAG}.safetensors").read_bytes()).hexdigest()
    shipped = catalog.find_checkpoint("convnextv2_atto.tiny_imagenet200")
    names = {"tag": TAG, "architecture": "test_convnext2", "packaged": f"{TAG}.safetensors"}
    row = dataclasses.replace(shipped, sha256=digest, **names)
    return model, folder / f"{TAG}.safetensors", row


@pytest.fixture
def packaged(random_weights, monkeypatch):
    """The same model and file, which ship with the package as far as the package can tell."""
    model, file, row = random_weights
    monkeypatch.setitem(catalog.CHECKPOINTS, TAG, row)
    monkeypatch.setattr(locate, "PACKAGED_WEIGHTS", file.parent)
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    return model, file


def test_packaged_weights_need_no_network_and_bring_their_classes_and_size(packaged):
    model, file = packaged
    loaded = keras_convnext.TestConvNeXt2(weights="tiny_imagenet200")
    assert loaded.input_shape == (None, 64, 64, 3) and loaded.output_shape == (None, 200)
    expected, received = assign.state_dict(model), assign.state_dict(loaded)
    assert expected.keys() == received.keys()
    for name, value in expected.items():
        assert received[name].dtype == "float32"
        np.testing.assert_array_equal(received[name], value.astype("float16"), name)
    assert any((value != value.astype("float16")).any() for value in expected.values())  # control
    assert locate.find_local(catalog.find_checkpoint(TAG)) == file
    assert keras_convnext.load(TAG).output_shape == (None, 200)
    assert keras_convnext.TestConvNeXt2(weights="tiny_imagenet200", classes=5).output_shape == (None, 5)


def test_load_refuses_another_number_of_classes_than_packaged_weights_have(packaged):
    for new_head in (None, False):
        with pytest.raises(ValueError, match=r"classifier for \d+ classes.*classes=1000"):
            keras_convnext.load(TAG, classes=1000, new_head=new_head)
    assert keras_convnext.load(TAG, classes=np.int64(1000), new_head=True).output_shape == (None, 1000)


def test_packaged_weights_are_for_research(packaged):
    row = catalog.find_checkpoint(TAG)
    assert row.licence == "research-only" and not row.commercial_use
    assert row.downloadable and not row.is_projection


def test_classes_of_packaged_weights_have_names(packaged):
    opened = open_predictor(TAG)
    assert opened.class_list == "tiny_imagenet200"
    assert opened.preprocessing == Preprocessing(64, crop_fraction=1.0)
    # Data in another order are matched by their ids, not by their numbers.
    ids = synset_ids("tiny_imagenet200")
    columns, _ = match_classes([ids[7], ids[3]], 200, opened.class_list)
    assert columns.tolist() == [7, 3]
    assert match_classes(ids, 200, opened.class_list) == (None, "all 200")
    assert match_classes([f"bird {number}" for number in range(200)], 200)[0] is None  # control: no list


def test_damaged_or_missing_packaged_file_is_told(packaged, tmp_path, monkeypatch):
    _, file = packaged
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    (tmp_path / file.name).write_bytes(content)
    monkeypatch.setattr(locate, "PACKAGED_WEIGHTS", tmp_path)
    with pytest.raises(download.ChecksumError, match=r"expected SHA-256"):
        keras_convnext.load(TAG)
    (tmp_path / file.name).unlink()
    with pytest.raises(download.WeightsNotFoundError, match="installation is incomplete"):
        keras_convnext.load(TAG)


def test_class_list_of_tiny_imagenet():
    ids, names = synset_ids("tiny_imagenet200"), class_names("tiny_imagenet200")
    assert len(ids) == len(set(ids)) == 200 and ids == sorted(ids) and set(ids) < set(synset_ids(1000))
    assert names[0] == "goldfish, Carassius auratus" and names[-1] == "acorn"
    known = dict(zip(synset_ids(1000), class_names(1000), strict=True))
    assert names == [known[synset] for synset in ids]
    assert find_class_list("", 200) is None and find_class_list("imagenet1k", 1000) == 1000
    facts = ROOT.parent / "shared" / "data" / "tiny_imagenet_200" / "classes.csv"
    if facts.exists():
        assert ids == [line.split(",")[1] for line in facts.read_text().splitlines()[1:]]


# The files that really ship.


@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row.tag)
def test_shipped_file_is_what_its_record_says(row):
    file = locate.PACKAGED_WEIGHTS / row.packaged
    content = file.read_bytes()
    record = json.loads((ROOT / "benchmarks" / "runs" / f"{row.tag}.json").read_text())
    assert len(content) == record["bytes"] < 8_000_000
    assert hashlib.sha256(content).hexdigest() == record["sha256"] == row.sha256
    assert (row.top1, row.top5) == (record["top1"], record["top5"])
    assert (row.classes, row.image_size) == (record["classes"], record["image_size"])
    metadata = safetensors_files.read_safetensors_metadata(file)
    assert metadata["tag"] == row.tag and "research" in metadata["licence"]
    assert {str(value.dtype) for value in torch_files.read_state_dict(file).values()} == {"float16"}
    for run in record["runs"]:
        for ending in ("csv", "png", "toml"):
            assert (ROOT / "benchmarks" / "runs" / f"{run['name']}.{ending}").stat().st_size
        log = (ROOT / "benchmarks" / "runs" / f"{run['name']}.csv").read_text().splitlines()
        assert log[-1].split(",")[0] == str(run["epochs"])  # a whole run
    readme = (ROOT / "README.md").read_text()
    assert f"{row.top1:.2f}" in readme and row.tag in readme


@pytest.mark.every_backend
@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row.tag)
def test_shipped_weights_know_what_the_photographs_show(row, monkeypatch):
    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
    opened = open_predictor(row.tag)
    ids = synset_ids(opened.class_list)
    first = []
    for name, right in RIGHT.items():
        image = preprocess.preprocess_image(preprocess.read_image(PHOTOS / name), opened.preprocessing)
        likeliest = np.argsort(-opened.model.predict(image[None], verbose=0)[0])[:5]
        found = [ids[number] for number in likeliest]
        assert right & set(found), (name, found)
        first.append(found[0] in right)
    assert any(first)  # the demo ends with it


def test_every_file_of_the_folder_is_in_the_table():
    files = {file.name for file in locate.PACKAGED_WEIGHTS.glob("*.safetensors")}
    assert files == {row.packaged for row in SHIPPED}


@pytest.mark.once
@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row.tag)
def test_terms_of_shipped_weights_lie_beside_them_and_are_named(row, capsys):
    terms = ROOT / PACKAGED_TERMS
    assert terms.parent == locate.PACKAGED_WEIGHTS
    text = terms.read_text(encoding="utf-8")
    assert "research" in text and row.licence in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert PACKAGED_TERMS in project["project"]["license-files"]
    shipped = project["tool"]["setuptools"]["package-data"]["keras_convnext"]
    inside = pathlib.PurePosixPath(PACKAGED_TERMS).relative_to("keras_convnext")
    assert any(inside.match(pattern) for pattern in shipped)
    assert main(["info", row.tag]) == 0
    assert PACKAGED_TERMS in capsys.readouterr().out


# benchmarks/ship_weights.py


@pytest.fixture(scope="module")
def ship_weights():
    return programs.load("ship_weights")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of smoke.toml on digits for one epoch, and what the trainer leaves of it."""
    from keras_convnext.training import train

    folder = tmp_path_factory.mktemp("runs") / "digits"
    changes = {"epochs": 1, "architecture": "test_convnext2", "warmup_epochs": 0.0, "ema_decay": 0.0}
    train("smoke", folder, overrides=changes)
    return folder


@pytest.mark.slow
def test_ship_weights_writes_file_record_and_logs(ship_weights, finished_run, tmp_path):
    runs = tmp_path / "benchmarks" / "runs"
    runs.mkdir(parents=True)
    (tmp_path / "keras_convnext").mkdir()
    record = ship_weights.ship("test_convnext2.digits", [finished_run], package=tmp_path)
    file = tmp_path / "keras_convnext" / "weights" / "packaged" / "test_convnext2.digits.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == record["sha256"]
    assert record == json.loads((runs / "test_convnext2.digits.json").read_text())
    last = (finished_run / "log.csv").read_text().splitlines()[-1].split(",")
    assert (
        abs(record["float32_top1"] - json.loads((finished_run / "result.json").read_text())["val_top1"])
        < 0.01
    )
    assert record["runs"][0]["epochs"] == int(last[0]) == 1
    described = preprocessing_metadata.read_preprocessing(file)
    half = (0.5, 0.5, 0.5)  # what the model of this architecture normalises with
    assert described == Preprocessing(record["image_size"], crop_fraction=1.0, mean=half, std=half)
    recipe = (runs / "test_convnext2.digits.toml").read_text()
    assert os.sep + "tmp" not in recipe and 'source = ""' in recipe
    columns = [field.name for field in dataclasses.fields(catalog.Checkpoint)]
    (row,) = catalog.read_rows([",".join(columns), ship_weights.row_text(record)])
    shipped = catalog.find_checkpoint("convnextv2_atto.tiny_imagenet200")
    own = ("tag", "architecture", "classes", "image_size", "dataset", "top1", "top5", "sha256", "packaged")
    assert [getattr(row, name) for name in own] == [
        "test_convnext2.digits",
        "test_convnext2",
        *(record[name] for name in ("classes", "image_size", "dataset", "top1", "top5", "sha256")),
        "test_convnext2.digits.safetensors",
    ]
    assert f"{record['parameters']:,} weights" in row.note and PACKAGED_TERMS in row.note
    same = {name: getattr(shipped, name) for name in (*own, "mean", "std", "score_source", "note")}
    assert row.mean == row.std == half
    assert dataclasses.replace(row, **same) == shipped


@pytest.mark.slow
def test_ship_weights_refuses_in_words(ship_weights, finished_run, tmp_path, monkeypatch, capsys):
    assert ship_weights.main(["test_convnext.digits", str(finished_run), "--package", str(tmp_path)]) == 1
    assert "Expected a tag 'test_convnext2.<data set>'" in capsys.readouterr().err
    assert ship_weights.main(["test_convnext2.digits", str(tmp_path / "none")]) == 1
    assert "Expected a finished run" in capsys.readouterr().err
    monkeypatch.setattr(ship_weights, "MAX_LOSS", -101.0)
    assert ship_weights.main(["test_convnext2.digits", str(finished_run), "--package", str(tmp_path)]) == 1
    assert "float16 takes top-1" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.once
def test_ship_weights_has_help():
    command = [sys.executable, ROOT / "benchmarks" / "ship_weights.py", "--help"]
    assert "float16" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
