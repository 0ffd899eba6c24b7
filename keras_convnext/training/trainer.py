"""Trains a model by a recipe, in a run that can be killed at any time and is resumed by the same call.

What happens in step n is a function of the recipe, of n and of the arrays of a checkpoint alone. So a run
that was interrupted ends with the weights of one that was not, bit for bit on one backend and machine.
"""

import contextlib
import gc
import logging
import math
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_convnext._environment import require
from keras_convnext.distribution import choose
from keras_convnext.distribution.engine import Engine
from keras_convnext.evaluation import result_columns
from keras_convnext.training import failure, logs, optimizer, run_folder, run_state
from keras_convnext.training.checkpoints import Checkpoints, Counts
from keras_convnext.training.derived import choose_recipe
from keras_convnext.training.recipes.classification import Recipe
from keras_convnext.training.recipes.files import AnyRecipe
from keras_convnext.training.recipes.pretraining import PretrainingRecipe
from keras_convnext.training.recipes.segmentation import SegmentationRecipe
from keras_convnext.training.run_state import TrainingResult
from keras_convnext.training.tasks import Datasets, Task, TaskModel
from keras_convnext.training.tasks.classification import Classification
from keras_convnext.training.tasks.pretraining import Pretraining
from keras_convnext.training.tasks.segmentation import Segmentation

_logger = logging.getLogger("keras_convnext")

TASKS: dict[type, Any] = {
    Recipe: Classification,
    SegmentationRecipe: Segmentation,
    PretrainingRecipe: Pretraining,
}
_SECONDS_BETWEEN_EPOCH_CHECKPOINTS = 10.0


def train(
    recipe: AnyRecipe | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: bool = True,
    task: Callable[[Any, int | None], Task] | None = None,
) -> TrainingResult:
    """Trains a model as a recipe says, or resumes where an earlier call with the same recipe was stopped.

    Into the folder go recipe.toml (all values, after `overrides`), environment.json, log.csv (one row an
    epoch), curves.png, tensorboard/, checkpoints/, and weights: best.weights.h5 (of the epoch with the best
    top-1), final.weights.h5, and final_ema.weights.h5 where the recipe has an average; final.safetensors
    (the average, if any) and final.labels.txt are what `load` and `keras-convnext predict` open. The same
    call writes what is missing of a run that has ended. An image that cannot be decoded is replaced by
    another; more than 1 % of such images are an error.

    Args:
        recipe: a `Recipe`, `SegmentationRecipe` or `PretrainingRecipe`, the path of a TOML file or the name
            of a published one.
        output: folder of the run; made when it is not there.
        data: in place of the recipe's, see `data.sources.open_source`.
        overrides: values in place of the recipe's, by key; other `weights` bring along what follows from
            them and is not set, see recipes/README.md.
        workers: threads of the input pipeline, by default the CPU cores; they change no result.
        progress: whether to show progress on stderr.
        task: makes of the recipe and `workers` what is trained, by default that of the recipe's task.

    Raises:
        ValueError: a value of the recipe is out of range or does not fit the data or the weights.
        SourceError: the data cannot be used.
        RunFolderError: the folder is another run's, cannot be written, or the disk is too small.
        NonFiniteError: the loss or a weight is NaN or infinite; a folder `nonfinite-step-...` has the images
            of the step and a report. The last checkpoint is from before.
        Interrupted: SIGTERM or Ctrl-C ended the run after its step, with a checkpoint to resume from.
        ImportError: TensorFlow, which reads the images, or matplotlib is not installed.

    Example:
        result = train("smoke", "out/smoke")
        result.scores["ema_val_top1"]
    """
    begin = time.monotonic()
    require("matplotlib", "The picture of the curves")
    chosen, derived = choose_recipe(recipe, data, overrides, output)
    trained = (task or TASKS[type(chosen)])(chosen, workers)
    engine = choose.choose(chosen.distribution.engine, chosen.distribution.model_devices)
    with engine.group, run_state.settings_of(chosen), engine.scope(), contextlib.ExitStack() as stack:
        engine.check_batch(chosen.optimizer.batch_size, chosen.optimizer.accumulation_steps)
        datasets = trained.open_data()
        built = trained.build_model(datasets)
        engine.prepare(built.model, built.batch)
        path = pathlib.Path(os.path.expanduser(output)).absolute()
        folder = _open_folder(path, chosen, datasets, built, engine)
        if folder:
            stack.enter_context(folder)
        finals = run_state.FINAL_WEIGHTS[0 if chosen.optimizer.ema_decay else 1 :]
        names = (*finals, *getattr(trained, "files", ()))
        scores = engine.group.gathered(run_state.ended_result(path, names) if folder else None)[0]
        if scores is None:
            run = Run(chosen, trained, datasets, built, engine, folder, is_shown=progress)
            with run.signals.noted():
                run.begin(derived)
                run.fit()
                scores = run.finish()
        elif folder:
            _logger.warning("The run in %s has ended; nothing is left to do.", path)
        steps, seconds = datasets.plan.total_steps, time.monotonic() - begin
        return TrainingResult(path, path / finals[0], steps, scores, seconds, engine.group.rank)


def _open_folder(
    path: pathlib.Path, recipe: AnyRecipe, data: Datasets, built: TaskModel, engine: Engine
) -> run_folder.RunFolder | None:
    """Opens the folder of the run, in the process that writes; None in the others."""
    identity = run_state.run_identity(recipe) | data.identity
    if len(engine.group) > 1:
        choose.check_agreement(engine.group, run_state.shared_facts(identity, engine, built.model))
    if not engine.group.is_writer:
        return None
    variables = run_state.state_variables(built.model, built.student).values()
    weights = sum(map(run_state.variable_bytes, built.student.weights))
    return run_folder.open_run(
        path,
        identity,
        checkpoint_bytes=sum(map(run_state.variable_bytes, variables)),
        keep=recipe.run.keep_checkpoints,
        weights_bytes=4 * weights,  # the best, the final ones, their average, and .safetensors
    )


class Run:
    """A run in progress; `folder` is None in the processes that do not write."""

    def __init__(
        self,
        recipe: AnyRecipe,
        task: Task,
        data: Datasets,
        built: TaskModel,
        engine: Engine,
        folder: run_folder.RunFolder | None,
        is_shown: bool = True,
    ) -> None:
        self.recipe, self.task, self.data, self.built = recipe, task, data, built
        self.engine, self.folder, self.plan = engine, folder, data.plan
        self.counts = Counts(data.plan)
        self.checkpoints = Checkpoints(folder, engine, built.model, built.student, self.counts)
        self.signals = failure.Signals(engine.group)
        self.has_average = recipe.optimizer.ema_decay > 0
        self.progress = logs.Progress(
            data.plan.epochs,
            data.plan.steps_per_epoch,
            recipe.optimizer.batch_size,
            quiet=not (is_shown and folder),
        )
        engine.group.set_advice(self.checkpoints.advice)

    def begin(self, lines: Sequence[str] = ()) -> None:
        """Prints the devices, `lines` and what the task says, and takes up the newest checkpoint."""
        described = self.engine.describe(self.plan.micro_batch_size)
        self.progress.say("\n".join([described, *lines]))
        for warning in self.built.warnings if self.folder else ():
            _logger.warning("%s", warning)
        for note in self.built.notes:
            self.progress.say(note)
        is_resumed = self.checkpoints.restore()
        if self.folder:
            kept = [name for name in run_state.FINAL_WEIGHTS if (self.folder.path / name).exists()]
            if kept and not is_resumed:
                raise run_folder.RunFolderError(
                    f"Expected the last checkpoint of the run in '{self.folder.path}', which has ended, to "
                    f"write missing files from. Pass another folder, or remove {kept[0]} to train again."
                )
            environment = {**result_columns.environment(), "command": sys.argv, "engine": described}
            self.folder.write_text(run_folder.RECIPE_FILE, self.recipe.to_toml())
            self.folder.write_json(run_state.ENVIRONMENT_FILE, environment | self.data.facts)
            self.csv = logs.CsvLog(self.folder.path / run_state.LOG_FILE)
            self.csv.resume(before_epoch=self.counts.epochs_logged + 1)  # drops what is about to be repeated
            purged = self.counts.step + 1 if is_resumed else None
            self.events = logs.TensorBoardLog(self.folder.path / "tensorboard", purged)
        if is_resumed:
            self.progress.say(f"resumes after step {self.counts.step} of {self.plan.total_steps}")

    def fit(self) -> None:
        """Trains the steps that are left. The rest of an interrupted epoch is a `fit` of its own."""
        counts = self.counts
        if counts.epoch > counts.epochs_logged:
            self.end_epoch()  # the run was stopped after the last step of an epoch
        while counts.epoch < self.plan.epochs:
            per_epoch = self.plan.micro_batches_per_epoch
            left = per_epoch - counts.done % per_epoch
            try:
                self.built.model.fit(
                    self.engine.for_fit(self.task.train_batches(self.data, counts.done, self.engine)),
                    steps_per_epoch=left,
                    shuffle=False,  # the pipeline does
                    initial_epoch=counts.epoch,
                    epochs=counts.epoch + 1 if left < per_epoch else self.plan.epochs,
                    verbose=0,
                    callbacks=[BetweenSteps(self)],
                )
            except BaseException as error:
                # Free the iterator: if one of tf.data lives until Python ends, both wait for each other.
                traceback.clear_frames(error.__traceback__)
                gc.collect()
                raise

    def end_batch(self, in_fit: int, means: Mapping[str, float]) -> None:
        """Does what is due after a micro-batch; `means` are over the `in_fit` ones of this `fit`."""
        counts, plan = self.counts, self.plan
        counts.add(in_fit, means)
        failure.check_faults(self.data.faults, "train", self.folder)
        if not math.isfinite(means["loss"]):
            raise self._non_finite(f"a loss of {means['loss']}")
        if counts.done % plan.accumulation_steps == 0:
            epoch, in_epoch = divmod(counts.done - 1, plan.micro_batches_per_epoch)
            step = (in_epoch + 1) // plan.accumulation_steps
            self.progress.show(epoch + 1, step, counts.sums["loss"] / (in_epoch + 1))
        if number := self.signals.after_step(counts.done):
            self._stop(number)
        minutes = self.recipe.run.checkpoint_minutes
        if minutes and time.monotonic() - self.checkpoints.saved_at >= 60 * minutes:
            self.save()

    def _stop(self, number: int) -> None:
        self.save()
        self.progress.close()
        self.engine.group.close()
        raise failure.Interrupted(
            number,
            f"{signal.Signals(number).name} received: stopped after step {self.counts.step} of "
            f"{self.plan.total_steps}, with a checkpoint. The same command resumes from there.",
        )

    def end_epoch(self) -> None:
        """Evaluates, logs, draws the curves, writes the best weights and a checkpoint."""
        counts, best = self.counts, self.task.best
        row = self._training_row()
        if row.get("skipped_batches") == counts.done:
            raise self._non_finite("an overflow in float16 in every batch since the beginning")
        if self.data.validation is not None:
            self.progress.status("validation")
            row |= self._validation_row()
            failure.check_faults(self.data.faults, "validation", self.folder)
        if number := self.signals.agreed(counts.done):  # received while it was validated, which is repeated
            self._stop(number)
        if self.progress.images_per_second is not None:
            row["images_per_second"] = self.progress.images_per_second
        if self.folder:
            self.csv.write(row)
            scalars = {name: value for name, value in row.items() if name not in ("epoch", "step")}
            self.events.write(counts.step, scalars)
            self.task.draw(self.csv.rows, self.folder)
        shown = dict.fromkeys(("loss", "val_loss", best, f"ema_{best}"))
        self.progress.end_epoch(counts.epoch, {name: row[name] for name in shown if name in row})
        counts.end_epoch()
        if column := note_best(counts, row, best):
            with self._averaged(column.startswith("ema_")):
                self._write_weights("best.weights.h5")
        is_due = time.monotonic() - self.checkpoints.saved_at >= _SECONDS_BETWEEN_EPOCH_CHECKPOINTS
        if column or is_due or counts.epoch == self.plan.epochs:
            self.save()

    def _training_row(self) -> dict[str, Any]:
        counts, inner = self.counts, optimizer.inner_optimizer(self.built.model.optimizer)
        # `int` fails for TensorFlow's variables on several devices.
        updates, batches = (int(ops.convert_to_numpy(each)) for each in (inner.iterations, inner._iterations))
        row = {
            "epoch": counts.epoch,
            "step": counts.step,
            **{name: total / self.plan.micro_batches_per_epoch for name, total in counts.sums.items()},
            "learning_rate": float(inner._learning_rate(max(updates - 1, 0))),
        }
        if self.recipe.model.precision == "mixed_float16":  # batches that overflow are skipped
            row["skipped_batches"] = counts.done - batches
        return row

    def _validation_row(self) -> dict[str, float]:
        """Returns "val_..." scores of the weights, "ema_val_..." of their average; a signal ends it."""
        row: dict[str, float] = {}
        with contextlib.suppress(failure.Signalled):
            for prefix in ("val", "ema_val")[: 1 + self.has_average]:
                with self._averaged(prefix == "ema_val"):
                    scores = self.task.evaluate(
                        self.built.student, self.data, self.engine, self.signals.raise_if_received
                    )
                row |= {f"{prefix}_{name}": value for name, value in scores.items()}
        return row

    def save(self) -> None:
        """Writes a checkpoint; NonFiniteError: it is not written, as a weight is NaN or infinite."""
        if broken := self.checkpoints.save():
            raise self._non_finite(f"{len(broken)} arrays that are not finite, such as {broken[0]}")

    def finish(self) -> dict[str, Any]:
        """Writes the final weights and what is needed to use them; returns the scores."""
        self._write_weights(run_state.FINAL_WEIGHTS[1])
        with self._averaged(self.has_average), self.engine.whole(self.built.student):
            if self.has_average:
                self._write_weights(run_state.FINAL_WEIGHTS[0])
            if self.folder:
                self.task.save(self.built.student, self.data, self.folder)
        scores = {}
        if self.folder:
            failure.write_faults(self.data.faults, self.folder)
            best = {f"best_{name}": value for name, value in self.counts.best.items()}
            rows = self.csv.rows or [{"epoch": self.counts.epoch, "step": self.counts.step}]
            scores = {**rows[-1], **best}
            self.folder.write_json(run_state.RESULT_FILE, scores)
            self.events.close()
        self.progress.close()
        return self.engine.group.gathered(scores)[0]

    def _averaged(self, is_wanted: bool) -> contextlib.AbstractContextManager[None]:
        return optimizer.ema_weights(self.built.model) if is_wanted else contextlib.nullcontext()

    def _write_weights(self, name: str) -> None:
        if self.folder:
            with self.engine.whole(self.built.student):
                self.folder.write_with(name, lambda path: self.task.save_weights(self.built.student, path))

    def _non_finite(self, what: str) -> failure.NonFiniteError:
        self.progress.close()
        return failure.non_finite_error(
            what,
            self.checkpoints,
            lambda: self.task.train_batches(self.data, self.counts.done - 1, self.engine),
        )


def note_best(counts: Counts, row: Mapping[str, Any], best: str) -> str | None:
    """Notes in `counts` whether an epoch is the best so far, by its column `best` or that of the average.

    Returns the column that decided; None when an earlier epoch was as good, or nothing was evaluated.
    """
    sign = -1 if best.endswith("loss") else 1
    name = best.removeprefix("val_")
    values = {column: sign * row[column] for column in (best, f"ema_{best}") if column in row}
    column = max(values, key=values.__getitem__, default=None)
    before = sign * counts.best[name] if counts.best else -math.inf
    if column is None or not values[column] > before:
        return None
    counts.best = {name: row[column], "epoch": row["epoch"]}
    return column


class BetweenSteps(keras.callbacks.Callback):
    """Keras callback that hands batch and epoch ends to a run."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def on_epoch_begin(self, epoch, logs=None):
        self.run.checkpoints.restore_metrics()

    def on_train_batch_end(self, batch, logs=None):
        if self.run.checkpoints.restore_metrics():
            logs = {name: float(value) for name, value in self.model.get_metrics_result().items()}
        self.run.end_batch(batch + 1, logs)

    def on_epoch_end(self, epoch, logs=None):
        self.run.end_epoch()
