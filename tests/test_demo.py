"""The demo, run as a newcomer runs it: in a process of its own, on the backend of this test process."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

import keras_convnext  # noqa: F401  registers the layers for load_model

DEMO = pathlib.Path(__file__).parents[1] / "demo" / "train_and_look.py"
SMALL = ("--architecture", "test_convnext2", "--epochs", "1")


def trains(test):
    """Marks a test slow except on PyTorch: test_trainer.py shows that training works on each backend."""
    return test if keras.backend.backend() == "torch" else pytest.mark.slow(test)


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("train_and_look", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments, **environment):
    command = [sys.executable, str(DEMO), *map(str, arguments)]
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend(), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def write_photos(folder, colors, number, size=(90, 70)):
    """One folder per name in `colors`, `number` noisy JPEGs of its colour in each."""
    generator = np.random.default_rng(0)
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for i in range(number):
            noise = generator.integers(-30, 31, (size[1], size[0], 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")


def check_output(folder, classes):
    """The files of a finished run; returns the model."""
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.keras",
        "model.labels.txt",
        "model.history.json",
        "model.held_out.npz",
        "predictions.png",
    }  # and no temporary file
    assert (folder / "model.labels.txt").read_text().splitlines() == classes
    assert len(json.loads((folder / "model.history.json").read_text())["val_accuracy"]) == 1
    with Image.open(folder / "predictions.png") as picture:
        picture.load()
        assert picture.size == (1500, 960)
        assert len(picture.convert("L").getcolors()) > 50  # something is drawn
    return keras.saving.load_model(folder / "model.keras")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "new" / "out"
    return run("--out", folder, "--limit", 200, *SMALL), folder


@trains
def test_digits_are_trained_saved_and_classified_in_a_new_process(digits_run):
    result, folder = digits_run
    assert "200 images of 10 classes: 132 to train, 18 to watch the training, 50 held out" in result.stdout
    assert f"backend            {keras.backend.backend()}\n" in result.stdout
    assert f"In a new process {folder / 'model.keras'} gives " in result.stdout
    assert f"Look at {folder / 'predictions.png'}" in result.stdout
    model = check_output(folder, [str(i) for i in range(10)])
    assert model.input_shape == (None, 32, 32, 1)
    with np.load(folder / "model.held_out.npz") as file:
        assert file["images"].dtype == np.uint8
        assert file["images"].shape == (50, 32, 32, 1)
        probabilities = model.predict(file["images"], verbose=0)
        np.testing.assert_allclose(probabilities, file["probabilities"], atol=1e-5)


@trains
def test_digits_below_the_target_end_with_status_1(digits_run):
    result, _ = digits_run
    assert result.returncode == 1, result.stderr
    assert "of the held-out digits are right, expected more than 95%; train longer" in result.stderr
    assert "Traceback" not in result.stderr


@trains
def test_own_photos_are_learned_without_a_target(demo, tmp_path, capfd):
    photos = tmp_path / "photos"
    write_photos(photos, {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}, 8)
    (photos / "red" / "broken.jpg").write_bytes(b"no picture")
    (photos / ".hidden").mkdir()
    assert demo.main(["--data", str(photos), "--out", str(tmp_path / "out"), *SMALL]) == 0
    written = capfd.readouterr()
    assert f"skipped 1 unreadable image(s): {photos / 'red' / 'broken.jpg'}\n" in written.err
    assert "24 images of 3 classes: 15 to train, 3 to watch the training, 6 held out" in written.out
    assert "In a new process " in written.out
    assert check_output(tmp_path / "out", ["blue", "green", "red"]).input_shape == (None, 64, 64, 3)


def empty_class(folder):
    write_photos(folder, {"cats": (9, 9, 9)}, 3)
    (folder / "dogs").mkdir()


def unreadable_class(folder):
    write_photos(folder, {"cats": (9, 9, 9)}, 3)
    (folder / "dogs").mkdir()
    for i in range(7):
        (folder / "dogs" / f"{i}.png").write_bytes(b"")


@pytest.mark.once
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no folder {folder}"),
        (lambda folder: folder.mkdir(), "{folder} has no folders in it; expected one per class"),
        (
            lambda folder: write_photos(folder, {"cats": (9, 9, 9)}, 3),
            "{folder} has one class only, 'cats'; there is nothing to tell apart",
        ),
        (empty_class, "class 'dogs' is empty: no .jpg, .jpeg, .png, .webp, .bmp in {folder}/dogs"),
        (unreadable_class, "class 'dogs' has 0 usable image(s); 3 are the least"),
    ],
)
def test_unusable_data_is_named_in_one_line(demo, tmp_path, prepare, message):
    folder = tmp_path / "photos"
    prepare(folder)
    with pytest.raises(demo.UnusableError) as raised:
        demo.read_folder(folder, 1000, 0)
    assert str(raised.value).startswith(message.format(folder=folder))
    assert "\n" not in str(raised.value)


@pytest.mark.once
def test_unreadable_images_are_counted_and_the_first_five_named(demo, tmp_path, capsys):
    unreadable_class(tmp_path / "photos")
    with pytest.raises(demo.UnusableError):
        demo.read_folder(tmp_path / "photos", 1000, 0)
    error = capsys.readouterr().err
    assert "skipped 7 unreadable image(s): " in error
    assert error.count(".png") == 5 and error.endswith(", ...\n")


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--data", "absent"], {}, "train_and_look: no folder absent\n"),
        (
            ["--out", "file/out"],
            {},
            "train_and_look: cannot write to file/out: Not a directory; choose another",
        ),
        (
            ["--classify", "absent.keras"],
            {},
            "train_and_look: no file absent.keras; train first, without --c",
        ),
        (["--limit", "10"], {}, "train_and_look: 10 images of 10 classes are too few; raise --limit\n"),
        ([], {"KERAS_BACKEND": "theano"}, "train_and_look: KERAS_BACKEND is 'theano'; installed here: "),
    ],
)
def test_wrong_usage_ends_with_status_2_and_one_line(tmp_path, monkeypatch, arguments, environment, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_unknown_architecture_ends_with_status_2_and_near_names(demo, tmp_path, capsys):
    assert demo.main(["--architecture", "convnext_tinny", "--out", str(tmp_path)]) == 2
    assert "train_and_look: Unknown architecture 'convnext_tinny'. Did you mean" in capsys.readouterr().err


@pytest.mark.once
def test_epochs_must_be_positive():
    result = run("--epochs", "0")
    assert result.returncode == 2
    assert "argument --epochs: expected a whole number from 1, got '0'" in result.stderr


@pytest.mark.once
def test_help_shows_examples():
    result = run("--help")
    assert result.returncode == 0
    assert "python demo/train_and_look.py --data photos" in result.stdout


@pytest.mark.once
def test_large_folder_is_cut_to_the_limit(demo, tmp_path, capsys):
    write_photos(tmp_path / "photos", {"cats": (9, 9, 9), "dogs": (99, 9, 9)}, 20)
    images, labels, names = demo.read_folder(tmp_path / "photos", 30, 0)
    assert images.shape == (30, 64, 64, 3) and images.dtype == np.uint8
    assert len(labels) == 30 and names == ["cats", "dogs"]
    assert "40 images found; 30 of them, drawn with seed 0, are used (--limit)" in capsys.readouterr().out


@pytest.mark.once
def test_split_is_stratified_complete_and_disjoint(demo):
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    parts = demo.split(labels, 0)
    assert sorted(np.concatenate(parts)) == list(range(143))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[67, 27, 1], [8, 3, 1], [25, 10, 1]]


@pytest.mark.once
def test_batches_shift_and_mirror_without_changing_labels(demo):
    images = np.zeros((8, 20, 20, 1), "uint8")
    images[:, 10, 4] = np.arange(1, 9)[:, None]  # one dot, as bright as the label
    columns = set()
    generator = demo.batches(images, np.arange(1, 9), 4, flip=True, seed=0)
    for _ in range(50):
        pixels, labels = next(generator)
        assert pixels.shape == images[:4].shape and pixels.dtype == np.uint8
        assert pixels.max(axis=(1, 2, 3)).tolist() == labels.tolist()
        columns.update(np.nonzero(pixels)[2].tolist())
    assert columns == {2, 3, 4, 5, 6, 13, 14, 15, 16, 17}


@pytest.mark.once
def test_interrupted_write_leaves_no_file(demo, tmp_path):
    with pytest.raises(KeyboardInterrupt), demo.replacing(tmp_path / "model.keras") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
