"""A run of pre-training: what it learns and leaves, that it resumes, and what its weights are for."""

import csv
import dataclasses
import signal

import keras
import numpy as np
import PIL.Image
import pytest

import keras_convnext
from keras_convnext.analysis import memory
from keras_convnext.cli import main
from keras_convnext.data import batches as photos
from keras_convnext.distribution import choose
from keras_convnext.evaluation.nearest_neighbours import NearestNeighbours, nearest_neighbours
from keras_convnext.training import failure, run_folder, run_state, trainer
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.training.schedule import WarmupCosine
from keras_convnext.training.tasks import pretraining as task
from keras_convnext.variants import VARIANTS
from keras_convnext.weights.torch_files import read_state_dict

pytestmark = pytest.mark.one_backend

# All that has a state: drop path, accumulation, EMA.
SMALL = {
    "architecture": "convnextv2_atto",
    "weights": "",
    "image_size": 64,
    "eval_image_size": 64,
    "mask_ratio": 0.5,
    "decoder_width": 8,
    "batch_size": 4,
    "accumulation_steps": 2,
    "epochs": 2,
    "warmup_epochs": 0.5,
    "validation_fraction": 0.25,
    "drop_path_rate": 0.2,
    "ema_decay": 0.8,
    "learning_rate": 3e-3,
    "checkpoint_minutes": 0.0,
}


@pytest.fixture(scope="module", autouse=True)
def one_block_a_stage():
    with pytest.MonkeyPatch.context() as patch:
        small = dataclasses.replace(VARIANTS["convnextv2_atto"], depths=(1, 1, 1, 1))
        patch.setitem(VARIANTS, "convnextv2_atto", small)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(12):
        place = folder / f"camera {number % 3}" / f"{number % 3} day {number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)  # smooth, so that neighbours tell of a cell
        PIL.Image.fromarray(coarse).resize((80, 70)).save(place)
    return folder


def small(data, **changes):
    return load_recipe("pretrain").replaced({"data": str(data)} | SMALL | changes)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    result = trainer.train(small(data), folder, progress=False)
    assert result.steps == 4  # 9 of 12 images are trained on, 2 steps of 4 an epoch
    return folder


@pytest.fixture(scope="module")
def opened(data):
    """The task, its data and its model."""
    recipe = small(data)
    made = task.Pretraining(recipe)
    with run_state.settings_of(recipe):
        datasets = made.open_data()
        return made, datasets, made.build_model(datasets)


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def arrays_of(folder):
    return {name: np.array(a) for name, a in read_state_dict(max(folder.glob("checkpoints/step-*"))).items()}


def batches(opened, start, count, task=None):
    made, datasets, _ = opened
    stream = (task or made).train_batches(datasets, start, choose.choose("none", 1))
    return [batch for (batch,) in stream.take(count).as_numpy_iterator()]


def test_a_run_leaves_what_every_run_does_and_reconstructions(trained):
    names = {path.name for path in trained.iterdir() if not path.name.startswith(".")}
    assert names == {
        "best.json", "best.weights.h5", "checkpoints", "curves.png", "environment.json", "final.safetensors",
        "final.weights.h5", "final_ema.weights.h5", "log.csv", "reconstructions", "recipe.toml",
        "result.json", "run.json", "tensorboard",
    }  # fmt: skip
    rows = rows_of(trained)
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[0]["val_loss"]) == pytest.approx(1, abs=0.25)  # 0.9997 for a prediction of zeros
    assert 0.5 < float(rows[-1]["loss"]) < 1.5
    assert {"loss", "val_loss", "ema_val_loss", "learning_rate"} <= rows[0].keys()
    assert float(rows[-1]["learning_rate"]) < SMALL["learning_rate"]


def test_the_picture_has_images_what_is_seen_of_them_and_reconstructions(trained):
    names = sorted(path.name for path in (trained / "reconstructions").iterdir())
    assert names == ["epoch-0001.png", "epoch-0002.png"]
    pixels = np.asarray(PIL.Image.open(trained / "reconstructions" / names[-1]))
    assert pixels.shape == (3 * 64, 3 * 64, 3)  # three images, all that are held out
    image, masked, made = np.split(pixels[:64], 3, axis=1)
    cells = (masked == 128).all(axis=2).reshape(2, 32, 2, 32).all(axis=(1, 3))
    assert cells.sum() == 2  # of four
    hidden = np.repeat(np.repeat(cells, 32, 0), 32, 1)
    np.testing.assert_array_equal(masked[~hidden], image[~hidden])
    np.testing.assert_array_equal(made[~hidden], image[~hidden])
    assert (made[hidden] != image[hidden]).any()


def test_final_weights_open_as_a_classifier_and_as_features(trained, opened, data):
    final = read_state_dict(trained / "final.safetensors")
    assert not [name for name in final if "decoder" in name or "mask_token" in name or "pred" in name]
    model = keras_convnext.load("convnextv2_atto", weights=trained / "final.safetensors", classes=3)
    assert model.output_shape == (None, 3)
    _, _, built = opened
    built.student.body.load_weights(trained / "final_ema.weights.h5")
    received = {variable.path: keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables}
    for variable in built.student.body.trainable_variables:
        expected = keras.ops.convert_to_numpy(variable)
        np.testing.assert_array_equal(expected, received[variable.path], err_msg=variable.path)
    settings = NearestNeighbours(
        model=str(trained / "final.safetensors"), data=str(data), validation_fraction=0.5, neighbours=(2,)
    )
    result = nearest_neighbours(settings, progress=False)
    assert result.n == 6 and result.environment["image_size"] == "64"


@pytest.mark.slow
def test_fine_tuning_begins_with_final_weights(trained, data, tmp_path):
    changes = {"weights": str(trained / "final.safetensors"), "batch_size": 4, "accumulation_steps": 1}
    changes |= {"epochs": 1, "warmup_epochs": 0.0, "image_size": 64, "eval_image_size": 64}
    result = trainer.train("fine_tune", tmp_path / "run", data=data, overrides=changes, progress=False)
    assert result.steps > 0 and (tmp_path / "run" / "final.safetensors").exists()


def test_a_stopped_run_resumes_to_the_same_bits(trained, data, tmp_path, monkeypatch):
    save, often = run_folder.RunFolder.save, small(data, checkpoint_minutes=1e-9)  # after every step

    def interrupted_save(self, arrays, state):
        if state["step"] == 3:
            signal.raise_signal(signal.SIGTERM)
        return save(self, arrays, state)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "save", interrupted_save)
        with pytest.raises(failure.Interrupted, match=r"stopped after step [34] of 4"):
            trainer.train(often, tmp_path / "run", progress=False)
    trainer.train(often, tmp_path / "run", progress=False)
    expected, received = arrays_of(trained), arrays_of(tmp_path / "run")
    assert expected.keys() == received.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, received[name], err_msg=name, strict=True)
    for column in ("loss", "val_loss", "ema_val_loss"):
        assert [row[column] for row in rows_of(trained)] == [row[column] for row in rows_of(tmp_path / "run")]


@pytest.mark.slow
def test_a_batch_and_its_masks_are_a_function_of_its_number(opened, data):
    whole = batches(opened, 0, 4)
    for expected, received in zip(whole[2:], batches(opened, 2, 2), strict=True):
        for one, other in zip(expected, received, strict=True):
            np.testing.assert_array_equal(one, other)
    images, visible = whole[0]
    assert images.shape == (2, 64, 64, 3) and visible.shape == (2, 2, 2) and visible.dtype == bool
    assert (visible.sum(axis=(1, 2)) == 2).all()
    masks = np.stack([visible for _, visible in whole])
    assert len(np.unique(masks.reshape(-1, 4), axis=0)) > 1
    other = task.Pretraining(small(data, seed=1))
    assert any((a != b).any() for (_, a), (_, b) in zip(whole, batches(opened, 0, 4, other), strict=True))


@pytest.mark.slow
def test_processes_together_have_the_masks_of_one(opened):
    made, datasets, _ = opened
    (_, expected), *_ = batches(opened, 1, 1)
    engine = choose.choose("none", 1)
    parts = []
    for rank in range(2):
        group = type("Group", (), {"rank": rank, "__len__": lambda self: 2})()
        stream = made.train_batches(datasets, 1, dataclasses.replace(engine, group=group))
        ((_, visible),) = next(stream.as_numpy_iterator())
        parts.append(visible)
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_what_decays_is_what_the_official_pre_training_decays(opened, data):
    _, datasets, built = opened
    names = [variable.path for variable in built.model.trainable_variables]
    assert len(set(names)) == len(names)

    def decayed(optimizer):
        return {name for name, decays in zip(names, optimizer._decays, strict=True) if decays}

    expected = {name for name in names if name.endswith(("kernel", *task.DECAYED))}
    received = decayed(built.model.optimizer)
    assert received == expected
    assert sum("grn" in name for name in received) == 2 * (4 + 1)
    assert sum("mask_token" in name for name in received) == 1
    assert not [name for name in received if name.endswith("bias") or "/norm/" in name]
    plain = task.adamw(small(data).optimizer, 1e-3, datasets.plan, 1.0)
    plain.build(built.model.trainable_variables)
    assert decayed(plain) == {name for name in names if name.endswith("kernel")}  # as in fine-tuning


def test_the_first_update_has_no_rate_and_the_last_hardly_one(opened):
    *_, built = opened
    rate = built.model.optimizer._learning_rate
    assert isinstance(rate, WarmupCosine)
    rates = [float(rate(step)) for step in range(5)]
    assert rates[0] == 0 and rates[1] == pytest.approx(3e-3) and rates[4] == 0


def test_the_plan_counts_the_weights_of_the_model(opened):
    _, _, built = opened
    step = memory.Step(VARIANTS["convnextv2_atto"], 2, 64, 0, decoder=(8, 1), seen=0.5)
    trained = sum(int(np.prod(v.shape)) for v in built.model.trainable_variables)
    assert memory.count_weights(step) == (trained, trained)


@pytest.mark.slow
def test_the_loss_of_the_evaluation_is_that_of_its_masks(opened):
    made, datasets, built = opened
    engine = choose.choose("none", 1)
    first = made.evaluate(built.student, datasets, engine, lambda: None)
    assert first == made.evaluate(built.student, datasets, engine, lambda: None)
    losses = []
    for number in range(len(datasets.validation)):
        source = photos.eval_batches(datasets.validation, made.preprocessing, batch_size=1)
        image = [batch["images"] for batch in source.as_numpy_iterator()][number]
        visible = made._masks(task._EVALUATION, number, 1, 2)
        prediction = keras.ops.convert_to_numpy(built.student((image, visible))["prediction"])
        x = (image / 255 - np.array(made.preprocessing.mean)) / np.array(made.preprocessing.std)
        x = x.reshape(2, 32, 2, 32, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1)
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, ddof=1, keepdims=True) + 1e-6)
        losses.append(((prediction[0] - x) ** 2).mean(1)[~visible.ravel()].mean())
    assert first["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_without_a_held_out_part_there_are_pictures_and_no_loss_of_validation(data):
    made = task.Pretraining(small(data, validation_fraction=0.0))
    datasets = made.open_data()
    assert len(datasets.training) == 12 and len(datasets.validation) == task.SHOWN_IMAGES
    assert datasets.identity["validation"] == ""
    with run_state.settings_of(made.recipe):
        built = made.build_model(datasets)
    assert made.evaluate(built.student, datasets, choose.choose("none", 1), lambda: None) == {}
    assert len(made._shown) == task.SHOWN_IMAGES
    assert built.warnings[0].startswith("No loss is evaluated")


def test_a_recipe_with_labels_is_refused():
    with pytest.raises(
        ValueError, match=r"pre-training, which has no labels, received one of classification"
    ):
        task.Pretraining(load_recipe("smoke"))


def test_the_command_refuses_a_folder_without_images(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = ["train", "pretrain", "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "run")]
    assert main.main([*words, "--set", "weights="]) == 2
    assert "Expected images in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
