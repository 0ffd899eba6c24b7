"""Trains a model by a recipe, in a run that can be killed at any time and is resumed by the same call.

recipe --> data, model, optimizer --> compile --> fit, with one callback between the steps:
after each step: is the loss finite, is a checkpoint due, was a signal received
after each epoch: validation with the weights and with their average (EMA), log, curves, best weights

What happens in step n is a function of the recipe, of n and of the arrays of a checkpoint alone. So a run
that was interrupted ends with the weights of one that was not, bit for bit on one backend and machine.
"""

import contextlib
import gc
import io
import json
import logging
import math
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_convnext.conversion import save_weights
from keras_convnext.data.faults import MAX_FAULT_SHARE, Faults
from keras_convnext.data.index import Source
from keras_convnext.distribution import choose
from keras_convnext.evaluation import classification, forward, result_columns
from keras_convnext.evaluation.results import fingerprint
from keras_convnext.training import curves, logs, optimizer, run_folder
from keras_convnext.training.advice import warnings_for
from keras_convnext.training.failure import (
    Interrupted,
    NonFiniteError,
    Signalled,
    contact_picture,
    non_finite_names,
)
from keras_convnext.training.recipe import Recipe
from keras_convnext.training.recipe_files import load_recipe, replaced, to_toml
from keras_convnext.training.run_state import (
    CURVES_FILE,
    ENVIRONMENT_FILE,
    FAULTS_FILE,
    FINAL_WEIGHTS,
    LOG_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    Plan,
    TrainingResult,
    as_integer,
    as_integers,
    data_fingerprint,
    ended_result,
    result,
    run_identity,
    settings_of,
    shared_facts,
    state_variables,
    variable_bytes,
)
from keras_convnext.training.tasks.classification import (
    build_model,
    compile_model,
    describe_weights,
    evaluated_images,
    open_data,
)
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import preprocessing_metadata

_logger = logging.getLogger("keras_convnext")

_SECONDS_BETWEEN_EPOCH_CHECKPOINTS = 10.0
_SECONDS_TO_AGREE, _MAX_STEPS_TO_AGREE = 1.0, 1000
_BATCHES_TO_TIME = 4
_MAX_DUMPED = 64  # images of a batch that gave NaN
_SCORES = ("loss", "top1", "top5")


def train(
    recipe: Recipe | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Trains a model as a recipe says, or resumes where an earlier call with the same recipe was stopped.

    Into the folder go recipe.toml (all values, after `overrides`), environment.json, log.csv (one row an
    epoch), curves.png, tensorboard/, checkpoints/, and weights: best.weights.h5 (of the epoch with the best
    top-1), final.weights.h5, and final_ema.weights.h5 where the recipe has an average; final.safetensors
    (the average, if any) and final.labels.txt are what `load` and `keras-convnext predict` open. Each weight
    file says at which size and crop its images are evaluated.

    SIGTERM and Ctrl-C end the run after the step that is being made, with a checkpoint. Where an image
    cannot be decoded another takes its place; more than 1 % of such images are an error.

    Args:
        recipe: a `Recipe`, the path of a TOML file or the name of a published one.
        output: folder of the run; made when it is not there.
        data: in place of the recipe's, see `data.sources.open_source`.
        overrides: values in place of the recipe's, by key.
        workers: threads of the input pipeline, the default is the number of CPU cores. Does not change what
            they make.
        progress: whether to show progress on stderr.

    Returns:
        `TrainingResult`.

    Raises:
        ValueError: a value of the recipe is out of range or does not fit the data or the weights.
        SourceError: the data cannot be used.
        RunFolderError: the folder is another run's, cannot be written, or the disk is too small.
        NonFiniteError: the loss is NaN or infinite. The step, its images and a list of the weights that are
            not finite are in a folder `nonfinite-step-...`; the last checkpoint is from before.
        Interrupted: by a signal; the same call resumes the run.
        ImportError: TensorFlow, which reads the images, or matplotlib, which draws the curves, is not
            installed.

    Example:
        result = train("smoke", "out/smoke")
        result.scores["ema_val_top1"]
    """
    begin = time.monotonic()
    batches = classification.import_batches()
    curves.check_drawing()
    chosen = _chosen_recipe(recipe, data, overrides)
    engine = choose.choose(chosen.distribution.engine, chosen.distribution.model_devices)
    with engine.group, settings_of(chosen), engine.scope(), contextlib.ExitStack() as stack:
        engine.check_batch(chosen.batch_size, chosen.accumulation_steps)
        training, validation = open_data(chosen)
        plan = Plan.of(chosen, training)
        trained, available = describe_weights(chosen)
        images = evaluated_images(chosen, trained)
        student, new_head = build_model(chosen, len(training.classes), available)
        model = compile_model(chosen, student, plan)
        engine.prepare(model)
        identity = run_identity(chosen) | {
            "data": fingerprint(training),
            "validation": data_fingerprint(validation),
        }
        if len(engine.group) > 1:
            choose.check_agreement(engine.group, shared_facts(identity, engine, model))
        path, folder, ended = pathlib.Path(os.path.expanduser(output)).absolute(), None, None
        if engine.group.is_writer:
            size = sum(variable_bytes(v) for v in state_variables(model, student).values())
            folder = run_folder.open_run(path, identity, checkpoint_bytes=size, keep=chosen.keep_checkpoints)
            stack.enter_context(folder)
            ended = ended_result(path)
        ended = engine.group.gathered(ended)[0]
        if ended is not None:
            if folder:
                _logger.warning("The run in %s has ended; nothing is left to do.", path)
            return result(path, chosen, plan, engine, ended, begin)
        run = _Run(
            chosen,
            plan,
            engine,
            folder,
            model,
            student,
            batches,
            training,
            validation,
            images,
            workers,
            progress,
        )
        if folder:
            run.progress.say(engine.describe(plan.micro_batch_size))
            notes = warnings_for(
                chosen,
                has_weights=bool(chosen.weights),
                is_self_supervised=bool(chosen.weights) and available == 0,
                trained_size=trained.preprocessing.size[0] if trained.is_described else None,
                has_new_head=new_head,
                num_steps=plan.total_steps,
            )
            if validation is None:
                notes = [
                    *notes,
                    "Nothing is evaluated: the data has no validation split, and validation_fraction is 0.",
                ]
            for note in notes:
                _logger.warning("%s", note)
            if chosen.weights and not new_head:
                run.progress.say(
                    f"The classifier of the weights is kept, for {len(training.classes)} classes."
                )
        with _signals_noted(run):
            run.resume()
            if len(engine.group) > 1:
                run.look_for_slow_processes()
            run.fit()
            scores = run.finish()
        return result(path, chosen, plan, engine, scores, begin)


def _chosen_recipe(given, data, overrides) -> Recipe:
    changes = dict(overrides or {})
    if data is not None:
        changes["data"] = os.path.abspath(os.path.expanduser(data))
    chosen = replaced(given, changes) if isinstance(given, Recipe) else load_recipe(given, changes)
    if not chosen.data:
        raise ValueError(
            "Expected data to train on: the recipe names none. Pass data=..., or --data on the command line."
        )
    return chosen


class _Run:
    """A run in progress: its model and data, what is done, and what is due between two steps."""

    def __init__(
        self,
        recipe,
        plan,
        engine,
        folder,
        model,
        student,
        batches,
        training,
        validation,
        images,
        workers,
        progress,
    ):
        self.recipe = recipe
        self.plan = plan
        self.engine = engine
        self.folder = folder
        self.model = model
        self.student = student
        # The same layers without an optimizer, which Keras would save along.
        self.bare = type(student)(student.inputs, student.outputs, name=student.name)
        self.batches = batches
        self.training = training
        self.images = images
        self.workers = workers
        # All are allowed to the pipeline, whose own error would come wrapped in TensorFlow's.
        self.faults = {"train": Faults(training, max_share=1.0)}
        if validation is not None:
            self.faults["validation"] = Faults(validation, max_share=1.0)
        self.progress = logs.Progress(
            recipe.epochs, plan.steps_per_epoch, recipe.batch_size, quiet=not (progress and folder)
        )
        self.log: Any = logs.CsvLog(folder.path / LOG_FILE) if folder else None
        self.validation = None if validation is None else self._eval_batches(validation)
        self.done = 0  # micro-batches
        self.carried: dict[str, float] = {}  # sums over the part of the epoch before an interruption
        self.sums: dict[str, float] = {}  # over all of the epoch so far
        self.best: dict[str, float] = {}
        self.received_signal = 0  # by this process
        self.stop_signal = 0  # by one of all, after which all stop
        self.agree_at = 0  # micro-batches after which the processes agree on what is due
        self.agreed = (0, time.monotonic())  # micro-batches and time of the last agreement
        self.epochs_logged = 0
        self.saved_at = time.monotonic()
        self.saved = -1  # micro-batches that the last checkpoint is of
        engine.group.set_advice(self._advice)
        # Within an epoch JAX keeps the weights out of the variables, and Callback.model brings them back.
        self.bring_weights: Callable[[], Any] = lambda: None

    def _advice(self) -> str:
        step = self.saved // self.plan.accumulation_steps
        stands = f"the checkpoint of step {step}" if self.saved > 0 else "the beginning"
        stands = f"{stands} in {self.folder.path}" if self.folder else "the last checkpoint"
        return f"This process ends too. The same command on all machines goes on from {stands}."

    def _eval_batches(self, source: Source):
        return self.batches.eval_batches(
            source,
            self.images,
            batch_size=self.engine.share(self.engine.filled(min(self.plan.micro_batch_size, len(source)))),
            host=self.engine.group.rank,
            num_hosts=len(self.engine.group),
            faults=self.faults["validation"],
            workers=self.workers,
        )

    def _train_batches(self, start_batch: int):
        recipe = self.recipe
        return self.batches.train_batches(
            self.training,
            batch_size=self.plan.micro_batch_size,
            host=self.engine.group.rank,
            num_hosts=len(self.engine.group),
            image_size=recipe.image_size,
            seed=recipe.seed,
            start_batch=start_batch,
            batches_per_epoch=self.plan.micro_batches_per_epoch,
            scale=recipe.crop_scale,
            ratio=recipe.crop_ratio,
            interpolation=recipe.interpolation,
            flip=recipe.flip,
            policy=recipe.policy,
            color_jitter=recipe.color_jitter,
            erase=recipe.erase,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            mix_probability=recipe.mix_probability,
            switch_probability=recipe.switch_probability,
            label_smoothing=recipe.label_smoothing,
            repeats=recipe.repeats,
            mean=self.images.mean,
            std=self.images.std,
            faults=self.faults["train"],
            workers=self.workers,
        )

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.done // self.plan.accumulation_steps

    @property
    def epoch(self) -> int:
        """Epochs that are done, with all of their micro-batches."""
        return self.done // self.plan.micro_batches_per_epoch

    def resume(self) -> None:
        """Loads the newest checkpoint, or writes what a new run begins with."""
        arrays, state = self._latest()
        if state is None:
            if self.folder:
                self.folder.write_text(RECIPE_FILE, to_toml(self.recipe))
                self.folder.write_text(ENVIRONMENT_FILE, self._environment())
                self.log.resume(before_epoch=1)
            return
        variables = state_variables(self.model, self.student)
        expected = {
            name: (tuple(v.shape), keras.backend.standardize_dtype(v.dtype)) for name, v in variables.items()
        }
        if state["backend"] != keras.backend.backend():
            _logger.warning(
                "The run was begun on %s and goes on on %s: it will not end with the same digits.",
                state["backend"],
                keras.backend.backend(),
            )
            # Counters and random states have other integer types there.
            arrays = {name: as_integers(array, expected.get(name)) for name, array in arrays.items()}
        run_folder.check_arrays(arrays, expected, f"the checkpoint of step {state['step']}")
        for name, variable in variables.items():
            variable.assign(arrays[name])
        self.done, self.saved = state["micro_batches"], state["micro_batches"]
        self.carried, self.best = state["sums"], state["best"]
        self.sums = dict(self.carried)
        self.epochs_logged = state["epochs_logged"]
        if self.folder:
            self.folder.write_text(RECIPE_FILE, to_toml(self.recipe))
            self.folder.write_text(ENVIRONMENT_FILE, self._environment())
            if state["is_best"]:  # a kill may have come before this was noted
                self.folder.mark_best(state["step"], state["best"]["top1"])
            self.log.resume(before_epoch=self.epochs_logged + 1)
        self.progress.say(f"goes on after step {self.step} of {self.plan.total_steps}")

    def _latest(self) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
        """Returns the newest checkpoint, as the process that writes finds it, to all processes."""
        arrays, state = (self.folder and self.folder.latest()) or ({}, None)
        state = self.engine.group.gathered(state)[0]
        return self.engine.group.shared_arrays(arrays), state

    def _environment(self) -> str:
        facts = {
            **result_columns.environment(),
            "command": sys.argv,
            "engine": self.engine.describe(self.plan.micro_batch_size),
            "data": str(self.training.path),
            "training_images": len(self.training),
            "classes": len(self.training.classes),
        }
        return json.dumps(facts, indent=1) + "\n"

    def look_for_slow_processes(self) -> None:
        """Warns of a process that all others would wait for."""
        batches = iter(self._train_batches(0))
        next(batches)  # takes the time of the pipeline's start
        begin = time.monotonic()
        for _ in range(_BATCHES_TO_TIME):
            next(batches)
        slow = choose.slow_processes(self.engine.group, time.monotonic() - begin)
        if slow and self.folder:
            _logger.warning("%s", slow)

    def fit(self) -> None:
        """Trains the steps that are left. The rest of an interrupted epoch is a `fit` of its own."""
        if self.folder:
            self.tensorboard = logs.TensorBoardLog(
                self.folder.path / "tensorboard", purge_step=self.step + 1 if self.done else None
            )
        if self.epoch > self.epochs_logged:
            self.end_epoch()  # the run was stopped after the last step of an epoch
        while self.epoch < self.recipe.epochs:
            per_epoch = self.plan.micro_batches_per_epoch
            left = per_epoch - self.done % per_epoch
            try:
                self.model.fit(
                    self.engine.for_fit(self._train_batches(self.done)),
                    steps_per_epoch=left,
                    shuffle=False,  # the pipeline does
                    initial_epoch=self.epoch,
                    epochs=self.epoch + 1 if left < per_epoch else self.recipe.epochs,
                    verbose=0,
                    callbacks=[_BetweenSteps(self)],
                )
            except BaseException as error:
                # Free the iterator: if one of tf.data lives until Python ends, both wait for each other.
                traceback.clear_frames(error.__traceback__)
                gc.collect()
                raise

    def end_batch(self, in_fit: int, means: Mapping[str, float]) -> None:
        """Does what is due after a micro-batch: checks, progress, signals, a checkpoint.

        Args:
            in_fit: micro-batches of the epoch that this `fit` has made.
            means: of loss and metrics over these.
        """
        self.done += 1
        self.sums = {name: self.carried.get(name, 0.0) + in_fit * value for name, value in means.items()}
        self._check_faults("train")
        if not math.isfinite(means["loss"]):
            raise self._non_finite(f"a loss of {means['loss']}")
        in_epoch = (self.done - 1) % self.plan.micro_batches_per_epoch + 1
        if self.done % self.plan.accumulation_steps == 0:
            epoch = (self.done - 1) // self.plan.micro_batches_per_epoch + 1
            loss = self.sums["loss"] / in_epoch
            self.progress.show(epoch, in_epoch // self.plan.accumulation_steps, loss)
        if self.done >= self.agree_at:
            self._agree_on_signals()
        if self.stop_signal:
            self._stop()
        minutes = self.recipe.checkpoint_minutes
        if minutes and time.monotonic() - self.saved_at >= 60 * minutes:
            self.save()

    def _agree_on_signals(self) -> None:
        """Notes a signal that any process received, after which all stop at the same step.

        Several processes then make as many steps as fit into a second before they ask again, since each of
        them waits here for the slowest.
        """
        now, (done, then) = time.monotonic(), self.agreed
        pause = round((self.done - done) * _SECONDS_TO_AGREE / max(now - then, 1e-3))
        noted = self.engine.group.gathered([self.received_signal, pause])
        self.stop_signal = max(received for received, _ in noted)
        self.agreed = self.done, now
        if len(noted) > 1:
            self.agree_at = self.done + min(max(noted[0][1], 1), _MAX_STEPS_TO_AGREE)

    def _stop(self) -> None:
        self.save()
        self.progress.close()
        self.engine.group.close()
        name = signal.Signals(self.stop_signal).name
        raise Interrupted(
            self.stop_signal,
            f"{name} received: stopped after step {self.step} of {self.plan.total_steps}, with a checkpoint. "
            "The same command goes on from there.",
        )

    def end_epoch(self) -> None:
        """Evaluates, logs, draws the curves, writes the best weights and a checkpoint."""
        epoch, count = self.epoch, self.plan.micro_batches_per_epoch
        inner = optimizer.inner_optimizer(self.model.optimizer)
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            **{name: total / count for name, total in self.sums.items()},
            "learning_rate": float(inner._learning_rate(max(as_integer(inner.iterations) - 1, 0))),
        }
        if self.recipe.precision == "mixed_float16":
            row["skipped_batches"] = self.done - as_integer(inner._iterations)
            if row["skipped_batches"] == self.done:
                raise self._non_finite("an overflow in float16 in every batch since the beginning")
        if self.validation is not None:
            self.progress.status("validation")
            with contextlib.suppress(Signalled):
                row |= self._scores("val", self.student)
                if self.recipe.ema_decay:
                    with optimizer.ema_weights(self.model):
                        row |= self._scores("ema_val", self.student)
            self._check_faults("validation")
        self._agree_on_signals()
        if self.stop_signal:  # while it was validated, which is done again
            self._stop()
        if self.progress.images_per_second is not None:
            row["images_per_second"] = self.progress.images_per_second
        if self.folder:
            self.log.write(row)
            scalars = {name: value for name, value in row.items() if name not in ("epoch", "step")}
            self.tensorboard.write(self.step, scalars)
            curves.draw_curves(self.log.rows, self.folder.path / CURVES_FILE, self.recipe.title)
        self.epochs_logged = epoch
        shown = ("loss", "val_loss", "val_top1", "ema_val_top1")
        self.progress.end_epoch(epoch, {name: row[name] for name in shown if name in row})
        self.carried, self.sums = {}, {}
        is_best = self._note_best(row)
        is_due = time.monotonic() - self.saved_at >= _SECONDS_BETWEEN_EPOCH_CHECKPOINTS
        if is_best or is_due or epoch == self.recipe.epochs:
            self.save(is_best)

    def _scores(self, prefix: str, model: Any) -> dict[str, float]:
        group = self.engine.group
        # Several processes would not stop at the same image.
        after_batch = self._raise_if_signalled if len(group) == 1 else lambda: None
        scores = forward.validate(model, self.validation, after_batch, group.gathered_arrays)
        return {f"{prefix}_{name}": scores[name] for name in _SCORES}

    def _raise_if_signalled(self) -> None:
        if self.received_signal:
            raise Signalled

    def _check_faults(self, split: str) -> None:
        """Stops when too many images of a split cannot be decoded, with a list of them in the folder."""
        faults = self.faults[split]
        if len(faults) > MAX_FAULT_SHARE * len(faults.source):
            self._write_faults()
            faults.max_share = MAX_FAULT_SHARE
            faults.check()

    def _write_faults(self) -> None:
        reports = {split: faults.report() for split, faults in self.faults.items() if len(faults)}
        if reports and self.folder:
            self.folder.write_text(FAULTS_FILE, json.dumps(reports, indent=1) + "\n")

    def _note_best(self, row: Mapping[str, Any]) -> bool:
        """Writes the weights of the best epoch so far, of the average or not, whichever is better."""
        tops = {name: row[name] for name in ("val_top1", "ema_val_top1") if name in row}
        if not tops:
            return False
        name = max(tops, key=lambda key: tops[key])
        if not tops[name] > self.best.get("top1", -1.0):
            return False
        self.best = {"top1": tops[name], "epoch": row["epoch"]}
        is_average = name == "ema_val_top1"
        with optimizer.ema_weights(self.model) if is_average else contextlib.nullcontext():
            self._write_weights("best.weights.h5")
        return True

    def _write_weights(self, name: str) -> None:
        if self.folder:
            with self.engine.whole(self.bare):
                self.folder.write_with(name, self._save_weights)

    def _save_weights(self, path: pathlib.Path) -> None:
        self.bare.save_weights(path)
        preprocessing_metadata.add_preprocessing(path, self.images)

    def save(self, is_best: bool = False) -> None:
        """Writes a checkpoint, unless a weight is not finite."""
        if self.folder is None:
            return
        arrays = self._arrays()
        broken = non_finite_names(arrays)
        if broken:
            raise self._non_finite(f"{len(broken)} arrays that are not finite, such as {broken[0]}")
        state = {
            "micro_batches": self.done,
            "step": self.step,
            "epochs_logged": self.epochs_logged,
            "sums": self.sums,
            "best": self.best,
            "is_best": is_best,
            "backend": keras.backend.backend(),
        }
        self.folder.save(arrays, state)
        if is_best:
            self.folder.mark_best(self.step, self.best["top1"])
        self.saved, self.saved_at = self.done, time.monotonic()

    def _arrays(self) -> dict[str, np.ndarray]:
        self.bring_weights()
        variables = state_variables(self.model, self.student)
        return {name: self.engine.read(v) for name, v in variables.items()}

    def _non_finite(self, what: str) -> NonFiniteError:
        """Writes the batch and a report that help to find the cause, and returns the error to raise."""
        step = (self.done - 1) // self.plan.accumulation_steps + 1
        name = f"nonfinite-step-{step:08d}"
        self.progress.close()
        if self.folder is None:
            return NonFiniteError(f"Expected finite numbers, received {what} in step {step}.")
        images, targets = next(iter(self._train_batches(self.done - 1).as_numpy_iterator()))
        arrays = self._arrays()
        content = io.BytesIO()
        np.savez(content, images=images[:_MAX_DUMPED], targets=targets[:_MAX_DUMPED])
        report = {
            "step": step,
            "micro_batch": self.done - 1,
            "what": what,
            "learning_rate": float(optimizer.inner_optimizer(self.model.optimizer)._learning_rate(step - 1)),
            "last_checkpoint_step": max(self.saved, 0) // self.plan.accumulation_steps,
            "images_finite": bool(np.isfinite(images).all()),
            "targets_finite": bool(np.isfinite(targets).all()),
            "arrays_not_finite": non_finite_names(arrays),
        }
        self.folder.write_bytes(f"{name}/batch.npz", content.getvalue())
        self.folder.write_bytes(f"{name}/images.png", contact_picture(images[:_MAX_DUMPED]))
        self.folder.write_text(f"{name}/report.json", json.dumps(report, indent=1) + "\n")
        stands = f"step {report['last_checkpoint_step']}" if self.saved > 0 else "none was written yet"
        return NonFiniteError(
            f"Expected finite numbers, received {what} in step {step} of {self.plan.total_steps}. Its images "
            f"and a report are in {self.folder.path / name}; the last checkpoint stands: {stands}. Lower "
            "learning_rate, set clip_norm = 1.0, or with float16 use mixed_bfloat16."
        )

    def finish(self) -> dict[str, Any]:
        """Writes the final weights and what is needed to use them."""
        self._write_weights(FINAL_WEIGHTS[1])
        with optimizer.ema_weights(self.model) if self.recipe.ema_decay else contextlib.nullcontext():
            if self.recipe.ema_decay:
                self._write_weights(FINAL_WEIGHTS[0])
            with self.engine.whole(self.student):
                self._write_safetensors()
        scores = {}
        if self.folder:
            self.folder.write_text("final.labels.txt", "".join(f"{name}\n" for name in self.training.classes))
            self._write_faults()
            scores = dict(self.log.rows[-1]) | {f"best_{name}": value for name, value in self.best.items()}
            self.folder.write_text(RESULT_FILE, json.dumps(scores, indent=1) + "\n")
            self.tensorboard.close()
        self.progress.close()
        return self.engine.group.gathered(scores)[0]

    def _write_safetensors(self) -> None:
        if self.folder is None:
            return
        # timm's layout has all architectures but the isotropic ones.
        layout = "official" if VARIANTS[self.recipe.architecture].isotropic else "timm"
        self.folder.write_with(
            "final.safetensors", lambda path: save_weights(self.student, path, layout, self.images)
        )


class _BetweenSteps(keras.callbacks.Callback):
    """Keras callback that hands batch and epoch ends to the run."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def on_train_batch_end(self, batch, logs=None):
        run = self.run
        run.bring_weights = lambda: self.model
        run.end_batch(batch + 1, logs)

    def on_epoch_end(self, epoch, logs=None):
        self.run.end_epoch()


@contextlib.contextmanager
def _signals_noted(run: _Run) -> Iterator[None]:
    """Notes SIGTERM and Ctrl-C for the run to act on after its step; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number, frame):
        if run.received_signal == signal.SIGINT == number:  # Ctrl-C for the second time
            raise KeyboardInterrupt
        run.received_signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
