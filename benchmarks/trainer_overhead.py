"""Time of a training step by the trainer, against the bare step of Keras, in one process on the same batch.

The trainer adds what goes on between two steps: progress, the check of the loss, the callbacks of `fit`, the
checkpoint by time. Both are timed in turns on the same compiled model; the medians are compared. The batch is
in memory, so that the input pipeline is not what is measured.

    KERAS_BACKEND=torch python benchmarks/trainer_overhead.py --rounds 7 --steps 10
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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import keras
import numpy as np
import tensorflow as tf

from keras_convnext import evaluate
from keras_convnext.training import run_folder, trainer
from keras_convnext.training.recipe import load_recipe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each, default 7")
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn, default 10")
    parser.add_argument("--batch-size", type=int, default=32, help="default 32")
    parser.add_argument("--image-size", type=int, default=64, help="pixels, default 64")
    parser.add_argument("--architecture", default="convnext_atto", help="default convnext_atto")
    options = parser.parse_args(arguments)

    recipe = dataclasses.replace(
        load_recipe("smoke"),
        architecture=options.architecture,
        batch_size=options.batch_size,
        image_size=options.image_size,
        eval_image_size=options.image_size,
        epochs=10**6,
        ema_decay=0.9999,
        checkpoint_minutes=10.0,
    )
    batch = (
        np.random.default_rng(0).uniform(0, 255, (options.batch_size, *2 * [options.image_size], 3)),
        np.eye(10)[np.arange(options.batch_size) % 10],
    )
    images, targets = (array.astype("float32") for array in batch)
    dataset = tf.data.Dataset.from_tensors((images, targets)).repeat().prefetch(2)

    training, _ = trainer.open_data(recipe)
    plan = dataclasses.replace(
        trainer.Plan.of(recipe, training), steps_per_epoch=10**6, total_steps=10**9, warmup_steps=0
    )
    student, _ = trainer.build_model(recipe, 10)
    model = trainer._compiled(recipe, student, plan)
    with (
        tempfile.TemporaryDirectory() as folder,
        run_folder.open_run(f"{folder}/run", {}, checkpoint_bytes=0) as opened,
    ):
        run = trainer._Run(
            recipe, plan, opened, model, student, evaluate.import_batches(), training, None, 1, True
        )

        def by_trainer(steps: int) -> None:
            model.fit(dataset, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[Between(run)])

        ways = {"bare step": lambda steps: bare_steps(model, dataset, steps), "trainer": by_trainer}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way(2)
        for number in range(options.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                # Iterators and threads are started in both; the difference of two lengths is without that.
                begin = time.perf_counter()
                ways[name](2)
                middle = time.perf_counter()
                ways[name](2 + options.steps)
                seconds[name].append((time.perf_counter() - middle - (middle - begin)) / options.steps)
    backend = importlib.import_module(keras.backend.backend())
    print(
        f"{options.architecture}, batch {options.batch_size}, {options.image_size} pixels; "
        f"{keras.backend.backend()} {backend.__version__}, Keras {keras.__version__}, Python "
        f"{platform.python_version()}, {evaluate.environment()['cpu']}, {os.cpu_count()} cores; "
        f"{options.rounds} rounds of {options.steps} steps, medians"
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"  {name:<10} {1000 * median:8.2f} ms a step (lowest {1000 * min(seconds[name]):.2f})")
    lowest = min(seconds["trainer"]) / min(seconds["bare step"]) - 1
    ratio = medians["trainer"] / medians["bare step"] - 1
    print(f"  overhead   {100 * ratio:+8.2f} % by medians, {100 * lowest:+.2f} % by minima")
    return 0


class Between(trainer._BetweenSteps):
    """The trainer's callback without the end of the epoch, which is not part of a step."""

    def on_epoch_end(self, epoch, logs=None):
        pass


def bare_steps(model, dataset, steps: int) -> None:
    """Calls the compiled train step of Keras, and nothing else."""
    backend = keras.backend.backend()
    model.make_train_function()
    if backend == "tensorflow":
        iterator = iter(dataset)
        for _ in range(steps):
            logs = model.train_function(iterator)
        float(logs["loss"])
        return
    batches = dataset.as_numpy_iterator()
    if backend == "torch":
        import torch

        for _ in range(steps):
            model.train_function([tuple(torch.tensor(array) for array in next(batches))])
        return
    import jax

    names = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
    state = model._get_jax_state(**dict.fromkeys(names, True), purge_model_variables=True)
    for _ in range(steps):
        logs, state = model.train_function(state, iter([jax.device_put(next(batches))]))
        float(logs["loss"])
    model._jax_state = dict(zip(names, state, strict=True))
    model._jax_state_synced = False
    model.jax_state_sync()


if __name__ == "__main__":
    sys.exit(main())
