"""Reports a run while it trains: a CSV, events for TensorBoard and a line on stderr.

The columns are epoch, from 1; step, optimizer steps of the run; loss, mean over the epoch's training; val_...
and ema_val_..., loss and scores, such as top1 in percent, of the weights and of their average (EMA);
learning_rate of the last step; images_per_second of training.
"""

import contextlib
import csv
import functools
import io
import numbers
import os
import pathlib
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from keras_convnext import _terminal
from keras_convnext._files import replace_file

Value = float | int | str


class CsvLog:
    """A CSV with one row an epoch, which is whole at any time.

    It is written anew for each row, with the rows that it held (see `resume`) and the columns of all, in the
    order in which they first appeared. A float has all its digits; NaN and infinity are nan, inf and -inf.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.rows = read_csv(path) if self.path.exists() else []

    def resume(self, before_epoch: int) -> None:
        """Drops the rows from an epoch on: what an interrupted run is about to repeat; 1 drops all."""
        kept = [row for row in self.rows if int(row["epoch"]) < before_epoch]
        if len(kept) < len(self.rows):
            self._save(kept)

    def write(self, row: Mapping[str, Value]) -> None:
        """Appends a row, with "epoch" above that of the previous one; after an OSError the file stands."""
        self._save([*self.rows, {column: _plain(value) for column, value in row.items()}])

    def _save(self, rows: list[dict[str, Value]]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row)) or ["epoch"]
        table: list[list] = [columns, *([row.get(column, "") for column in columns] for row in rows)]
        replace_file(self.path, _terminal.csv_text(table).encode())
        self.rows = rows


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, Value]]:
    """Reads the rows that `CsvLog` wrote, without empty fields; ValueError: the file is not such a CSV."""
    try:
        lines = list(csv.reader(io.StringIO(pathlib.Path(path).read_text("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"Expected the CSV of a run, received '{path}': {error}.") from error
    columns = lines[0] if lines else []
    if "epoch" not in columns:
        raise ValueError(
            f"Expected a column 'epoch', received '{path}' with the columns {columns}. Move it away."
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        row = {column: _number(field) for column, field in zip(columns, line, strict=False) if field != ""}
        if len(line) != len(columns) or not isinstance(row.get("epoch"), int):
            raise ValueError(
                f"Expected {len(columns)} fields and a whole number 'epoch' in row {number} of '{path}', "
                f"received {line}. Move the file away."
            )
        rows.append(row)
    return rows


class TensorBoardLog:
    """Scalars for TensorBoard, in an event file of their own for each start of a run.

    TensorFlow writes it, without touching a device. From `purge_step` on, the first step that a resumed run
    repeats, TensorBoard forgets older files.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int | None = None) -> None:
        import tensorflow as tf

        self._protos = tf.compat.v1
        self._error = tf.errors.OpError
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = pathlib.Path(folder) / name
        self._writer = tf.io.TFRecordWriter(os.fsencode(self.path))
        self._append(file_version="brain.Event:2")  # from this version on a restart purges by its step
        if purge_step is not None:
            start = self._protos.SessionLog(status=self._protos.SessionLog.START)
            self._append(step=purge_step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends scalars, as float32, at an optimizer step of the run; OSError on a full disk."""
        summary = self._protos.Summary()
        for name, value in scalars.items():
            summary.value.add(tag=name, simple_value=float(value))
        self._append(step=int(step), summary=summary)

    def close(self) -> None:
        self._writer.close()

    def _append(self, **fields: Any) -> None:
        event = self._protos.Event(wall_time=time.time(), **fields)
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except self._error as error:
            raise OSError(f"'{self.path}' cannot be written: {error.message}. Free some space.") from None


class Progress:
    """Says on stderr how far a run of so many epochs and steps an epoch is; see `_terminal.Progress`."""

    def __init__(
        self,
        epochs: int,
        steps: int,
        batch_size: int,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self._clock = clock
        # Speed is not measured across the end of an epoch: there is validation, and at first compilation.
        self._new_line = functools.partial(
            _terminal.Progress, "", steps, "steps", is_wanted=not quiet, stream=stream, clock=clock
        )
        self._line = self._new_line()
        self._step_end = clock()
        self._seconds_between_epochs = 0.0

    @property
    def images_per_second(self) -> float | None:
        """The mean over the last ten seconds of this epoch; None before its second step."""
        rate = self._line.rate
        return None if rate is None else rate * self.batch_size

    def show(self, epoch: int, step: int, loss: Any) -> None:
        """Says how many steps of an epoch, from 1, are done; a tensor `loss` is read when it is printed."""
        self._line.title = f"epoch {epoch}/{self.epochs}"
        self._line.show(step, lambda: self._text(epoch, step, float(loss)))
        self._step_end = self._clock()

    def status(self, text: str) -> None:
        """Puts a text in the place of the line, such as "validation"; on a terminal only."""
        self._line.draw(text)

    def say(self, text: str) -> None:
        self._line.say(text)

    def end_epoch(self, epoch: int, scalars: Mapping[str, float]) -> None:
        """Prints the line of an epoch, after its validation."""
        self._seconds_between_epochs = self._clock() - self._step_end
        parts = [f"epoch {epoch}/{self.epochs}"]
        parts += [f"{name} {value:.5g}" for name, value in scalars.items()]
        if speed := self.images_per_second:
            parts.append(_terminal.rate_text(speed, "images"))
            if epoch < self.epochs:
                parts.append(f"{self._left(epoch, self.steps, speed)[1]} left")
        self.say(", ".join(parts))
        self._line = self._new_line()

    def close(self) -> None:
        self._line.close()

    def _left(self, epoch: int, step: int, images_per_second: float) -> tuple[str, str]:
        """Returns the time left of the epoch's training and of the run."""
        epoch_seconds = self.steps * self.batch_size / images_per_second
        of_epoch = (1 - step / self.steps) * epoch_seconds
        of_run = of_epoch + (self.epochs - epoch) * (epoch_seconds + self._seconds_between_epochs)
        return _terminal.duration_text(of_epoch), _terminal.duration_text(of_run)

    def _text(self, epoch: int, step: int, loss: float) -> str:
        """Returns what is shown of a step: the first parts are those that a narrow terminal shows too."""
        parts = [f"step {step}/{self.steps}", f"loss {loss:.4f}"]
        if speed := self.images_per_second:
            of_epoch, of_run = self._left(epoch, step, speed)
            parts += [_terminal.rate_text(speed, "images"), f"run {of_run} left", f"epoch {of_epoch} left"]
        return ", ".join(parts)


def _plain(value: Any) -> Value:
    """Returns a value as Python's own type, so that it is written alike whatever computed it."""
    if isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _number(field: str) -> Value:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(field)
    return field
