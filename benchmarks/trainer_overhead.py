"""Time of a training step by the trainer, against the bare step of Keras inside it.

The trainer adds work between two steps: progress, the check of the loss, the callbacks of `fit`, the
checkpoint by time. Keras's compiled step is timed within `fit`, until its results are there; what `fit` takes
beyond that is the overhead. So both are of the same steps, and other work on the machine changes neither side
alone. The batch is in memory: the input pipeline is not what is measured.

    KERAS_BACKEND=torch python benchmarks/trainer_overhead.py --rounds 5 --steps 20
"""

import argparse
import dataclasses
import importlib
import os
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_convnext  # noqa: F401, before Keras: it sets what makes the backend fast

# isort: split
import keras
import numpy as np
import tensorflow as tf

from keras_convnext.distribution import choose
from keras_convnext.evaluation import result_columns
from keras_convnext.training import run_folder, trainer
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.training.tasks.classification import Classification


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="calls of fit, default 5")
    parser.add_argument("--steps", type=int, default=20, help="steps of each, default 20")
    parser.add_argument("--batch-size", type=int, default=32, help="default 32")
    parser.add_argument("--image-size", type=int, default=64, help="pixels, default 64")
    parser.add_argument("--architecture", default="convnext_atto", help="default convnext_atto")
    options = parser.parse_args(arguments)

    changes = {
        "architecture": options.architecture,
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "eval_image_size": options.image_size,
        "epochs": 10**6,
        "ema_decay": 0.9999,
        "checkpoint_minutes": 10.0,
    }
    recipe: Any = load_recipe("smoke").replaced(changes)
    batch = (
        np.random.default_rng(0).uniform(0, 255, (options.batch_size, *2 * [options.image_size], 3)),
        np.eye(10)[np.arange(options.batch_size) % 10],
    )
    images, targets = (array.astype("float32") for array in batch)
    dataset = tf.data.Dataset.from_tensors((images, targets)).repeat().prefetch(2)

    task = Classification(recipe, workers=1)
    data = task.open_data()
    endless = dataclasses.replace(data.plan, steps_per_epoch=10**6, total_steps=10**9, warmup_steps=0)
    data = dataclasses.replace(data, plan=endless)
    built = task.build_model(data)
    model = built.model
    with (
        tempfile.TemporaryDirectory() as folder,
        run_folder.open_run(f"{folder}/run", {}, checkpoint_bytes=0) as opened,
    ):
        run = trainer.Run(recipe, task, data, built, choose.choose("none"), opened)
        overheads, bare = [], []
        for number in range(options.rounds + 1):
            watch = Watch(run)
            model.make_train_function()
            model.train_function = watch.timed(model.train_function)
            model.fit(dataset, steps_per_epoch=options.steps + 1, verbose=0, shuffle=False, callbacks=[watch])
            model.train_function = watch.function
            if number > 0:  # the first compiles
                overheads.append((watch.total - watch.inside) / options.steps)
                bare.append(watch.inside / options.steps)
    backend = importlib.import_module(keras.backend.backend())
    print(
        f"{options.architecture}, batch {options.batch_size}, {options.image_size} pixels; "
        f"{keras.backend.backend()} {backend.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {result_columns.environment()['cpu']}, {os.cpu_count()} cores; "
        f"{options.rounds} times {options.steps} steps, medians"
    )
    step, added = statistics.median(bare), statistics.median(overheads)
    print(
        f"  bare step {1000 * step:.2f} ms, trainer {1000 * added:.3f} ms more: {100 * added / step:+.2f} %"
    )
    worst = max(more / time for more, time in zip(overheads, bare, strict=True))
    print(f"  worst of {options.rounds}: {100 * worst:+.2f} %")
    return 0


class Watch(trainer.BetweenSteps):
    """The trainer's callback, without the end of the epoch, and with a clock; the first step does not count.

    Attributes:
        inside: seconds in the compiled step, until its results were there.
        total: seconds from the end of the first step to the end of the last.
    """

    def __init__(self, run):
        super().__init__(run)
        self.function = None
        self.inside = self.total = self.begin = 0.0
        self.calls = 0

    def timed(self, function):
        self.function = function

        def call(*arguments):
            begin = time.perf_counter()
            result = function(*arguments)
            if keras.backend.backend() == "jax":
                import jax

                jax.block_until_ready(result)
            elif keras.backend.backend() == "tensorflow":
                float(result["loss"])
            self.calls += 1
            if self.calls > 1:
                self.inside += time.perf_counter() - begin
            return result

        return call

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if batch == 0:
            self.begin = time.perf_counter()
        self.total = time.perf_counter() - self.begin

    def on_epoch_end(self, epoch, logs=None):
        """Nothing: no validation, no log and no checkpoint belong to a step."""


if __name__ == "__main__":
    sys.exit(main())
