"""The end of an epoch: its row of the log, its scores, and whether it is the best one so far."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from keras import ops

from keras_convnext.distribution.engine import Engine
from keras_convnext.training import logs, optimizer
from keras_convnext.training.checkpoints import Counts
from keras_convnext.training.failure import Signalled, Signals
from keras_convnext.training.run_folder import RunFolder
from keras_convnext.training.run_state import LOG_FILE
from keras_convnext.training.tasks import Datasets, Task, TaskModel


class RunLog:
    """log.csv, the events for TensorBoard and the pictures of a run."""

    def __init__(self, folder: RunFolder, task: Task) -> None:
        self.folder, self.task = folder, task
        self.csv = logs.CsvLog(folder.path / LOG_FILE)
        self.events: Any = None

    def begin(self, counts: Counts) -> None:
        """Forgets what an interrupted run is about to repeat."""
        self.csv.resume(before_epoch=counts.epochs_logged + 1)
        self.events = logs.TensorBoardLog(
            self.folder.path / "tensorboard", purge_step=counts.step + 1 if counts.done else None
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self.csv.write(row)
        scalars = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        self.events.write(row["step"], scalars)
        self.task.draw(self.csv.rows, self.folder)


def training_row(counts: Counts, model: Any, skips_batches: bool) -> dict[str, Any]:
    """Returns the columns of an epoch's training; the optimizer in float16 `skips_batches` that overflow."""
    inner = optimizer.inner_optimizer(model.optimizer)
    # `int` fails for TensorFlow's variables on several devices.
    updates, batches = (int(ops.convert_to_numpy(each)) for each in (inner.iterations, inner._iterations))
    row = {
        "epoch": counts.epoch,
        "step": counts.step,
        **{name: total / counts.plan.micro_batches_per_epoch for name, total in counts.sums.items()},
        "learning_rate": float(inner._learning_rate(max(updates - 1, 0))),
    }
    if skips_batches:
        row["skipped_batches"] = counts.done - batches
    return row


def validation_row(
    task: Task, built: TaskModel, data: Datasets, engine: Engine, signals: Signals
) -> dict[str, float]:
    """Returns the scores of the weights, "val_...", and of their average, "ema_val_..."; a signal ends it."""
    row: dict[str, float] = {}
    with contextlib.suppress(Signalled):
        for prefix, weights in (("val", contextlib.nullcontext), ("ema_val", optimizer.ema_weights)):
            if prefix == "val" or optimizer.has_ema(built.model):
                with weights(built.model):
                    scores = task.evaluate(built.student, data, engine, signals.raise_if_received)
                row |= {f"{prefix}_{name}": value for name, value in scores.items()}
    return row


def note_best(counts: Counts, row: Mapping[str, Any], best: str) -> str | None:
    """Notes in `counts` whether an epoch is the best so far, by its column `best` or that of the average.

    The largest value is the best, of a loss the smallest. Returns the column that decided; None when an
    earlier epoch was as good, or nothing was evaluated.
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
