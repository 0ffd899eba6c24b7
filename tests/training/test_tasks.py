"""The trainer trains what a task says, and knows nothing else of it."""

import csv
import dataclasses
import json
import pathlib
import signal

import keras
import numpy as np
import pytest
from keras.initializers import GlorotUniform

from keras_convnext.training import curves, failure, run_folder, trainer
from keras_convnext.training.checkpoints import Counts
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.training.run_state import Plan
from keras_convnext.training.tasks import Datasets, TaskModel, recipe_optimizer, without_optimizer
from keras_convnext.weights.torch_files import read_state_dict

CHANGES = {
    "batch_size": 16,
    "accumulation_steps": 2,
    "epochs": 3,
    "ema_decay": 0.8,
    "layer_decay": 1.0,
    "checkpoint_minutes": 1e-9,  # after every step
}
STEPS = 9  # 48 // 16 in each of three epochs


@dataclasses.dataclass(frozen=True)
class Photos:
    path: str
    count: int

    def __len__(self):
        return self.count


class Autoencoder:
    """What pre-training will need: no classes, no score but the loss, a picture after each epoch."""

    best = "val_loss"

    def __init__(self, recipe, workers=None):
        self.recipe = recipe
        self.reconstructed = None

    def open_data(self):
        training = Photos("photos", 48)
        return Datasets(
            training, Photos("others", 8), Plan.of(self.recipe, training), {"data": "photos"}, {"pixels": 64}
        )

    def build_model(self, data):
        inputs = keras.Input((8, 8, 3))
        x = keras.layers.Rescaling(1 / 255)(inputs)
        x = keras.layers.Conv2D(8, 2, 2, kernel_initializer=GlorotUniform(1), name="encoder")(x)
        x = keras.layers.Conv2DTranspose(3, 2, 2, kernel_initializer=GlorotUniform(2), name="decoder")(x)
        model = keras.Model(inputs, x)
        model.compile(recipe_optimizer(self.recipe, data.plan), loss="mse")
        model.optimizer.build(model.trainable_variables)
        return TaskModel(model, model, notes=["It sees no label."])

    def train_batches(self, data, start, engine):
        import tensorflow as tf

        def batch(number):
            shape = (data.plan.micro_batch_size, 8, 8, 3)
            images = tf.random.stateless_uniform(shape, tf.stack([number, 0]), 0, 255)
            return images, images / 255

        return tf.data.Dataset.counter(start).map(batch)

    def evaluate(self, model, data, engine, after_batch):
        images = np.random.default_rng(0).uniform(0, 255, (len(data.validation), 8, 8, 3)).astype("float32")
        self.reconstructed = keras.ops.convert_to_numpy(model(images))
        after_batch()
        return {"loss": float(((self.reconstructed - images / 255) ** 2).mean())}

    def draw(self, rows, folder):
        curves.draw_curves(rows, folder.path / "curves.png", {}, self.recipe.title)
        folder.write_bytes(f"pictures/{rows[-1]['epoch']}.npy", self.reconstructed.tobytes())

    def save_weights(self, model, path):
        without_optimizer(model).save_weights(path)

    def save(self, model, data, folder):
        folder.write_with("encoder.weights.h5", self.save_encoder(model))

    def save_encoder(self, model):
        return keras.Model(model.inputs, model.layers[2].output).save_weights


def train(folder):
    return trainer.train(load_recipe("smoke", CHANGES), folder, progress=False, task=Autoencoder)


def test_a_task_without_scores_is_trained_logged_drawn_and_saved(tmp_path):
    result = train(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert names == {
        "best.json", "best.weights.h5", "checkpoints", "curves.png", "encoder.weights.h5", "environment.json",
        "final.weights.h5", "final_ema.weights.h5", "log.csv", "pictures", "recipe.toml", "result.json",
        "run.json", "tensorboard",
    }  # fmt: skip
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["epoch", "step", "loss", "learning_rate", "val_loss", "ema_val_loss"]
    losses = [float(row[name]) for row in rows for name in ("val_loss", "ema_val_loss")]
    assert losses[-1] < losses[0]
    assert result.scores["best_loss"] == min(losses)
    assert json.loads((tmp_path / "run" / "best.json").read_text())["value"] == min(losses)
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 3
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["pixels"] == 64


def test_a_task_resumes_to_the_same_digits(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole)
    save = run_folder.RunFolder.save

    def interrupted_save(self, arrays, state):
        if state["step"] == 4:
            signal.raise_signal(signal.SIGTERM)
        return save(self, arrays, state)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "save", interrupted_save)
        with pytest.raises(failure.Interrupted, match=f"stopped after step [45] of {STEPS}"):
            train(stopped)
    train(stopped)
    arrays, others = (read_state_dict(max(folder.glob("checkpoints/*"))) for folder in (whole, stopped))
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name, strict=True)


@pytest.mark.once
@pytest.mark.parametrize(
    ("best", "before", "row", "expected"),
    [
        ("val_top1", {}, {"val_top1": 0.0}, "val_top1"),
        ("val_top1", {}, {"val_top1": 7.0, "ema_val_top1": 8.0}, "ema_val_top1"),
        ("val_top1", {"top1": 8.0}, {"val_top1": 8.0}, None),
        ("val_top1", {"top1": 8.0}, {"val_top1": 9.0, "ema_val_top1": 8.0}, "val_top1"),
        ("val_top1", {}, {"val_top1": float("nan")}, None),
        ("val_top1", {}, {"loss": 1.0}, None),
        ("val_loss", {}, {"val_loss": 0.3, "ema_val_loss": 0.2}, "ema_val_loss"),
        ("val_loss", {"loss": 0.2}, {"val_loss": 0.3}, None),
        ("loss", {"loss": 0.2}, {"loss": 0.1}, "loss"),
    ],
)
def test_the_best_epoch_has_the_largest_score_or_the_smallest_loss(best, before, row, expected):
    counts = Counts(Plan(1, 1, 1, 1, 0), best=dict(before))
    assert trainer.note_best(counts, row | {"epoch": 3}, best) == expected
    noted = before if expected is None else {best.removeprefix("val_"): row[expected], "epoch": 3}
    assert counts.best == noted


@pytest.mark.once
def test_the_trainer_knows_no_task():
    folder = pathlib.Path(trainer.__file__).parent
    for name in ("trainer", "checkpoints", "failure"):
        code = (folder / f"{name}.py").read_text()
        for word in ("if task", "top5", ".classes", "image_size", "Crossentropy"):
            assert word not in code, (name, word)
