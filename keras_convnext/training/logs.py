"""Reports a run while it trains: a CSV, events for TensorBoard and a line on stderr.

The names of the columns, in the CSV and in TensorBoard:

- epoch: number of finished epochs, from 1; step: optimizer steps since the beginning of the run;
- loss, val_loss, ema_val_loss: means over an epoch, of training, of validation, of validation with the
  averaged weights (EMA);
- val_..., ema_val_...: the scores of the task, such as val_top1, in percent;
- learning_rate: of the last step; images_per_second: of training.
"""

import collections
import csv
import datetime
import io
import math
import numbers
import os
import pathlib
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from keras_convnext._environment import is_set
from keras_convnext._files import replace_file

Value = float | int | str

_INTEGER = re.compile(r"[+-]?[0-9]+")

_REDRAW_SECONDS = 0.2
_PLAIN_LINE_SECONDS = 300
_SPEED_SECONDS = 10  # images/s is the mean over these
_SHORTEST_BAR, _LONGEST_BAR = 8, 40  # characters


class CsvLog:
    """A CSV with one row an epoch, which is whole at any time.

    The file is written anew for each row and put in place in one step. Its columns are those of all rows, in
    the order in which they first appeared. A float is written with all its digits and reads back equal; NaN
    and infinity are written nan, inf and -inf.

    Args:
        path: of the file. Rows that it holds already are kept, see `resume`.

    Raises:
        ValueError: the file there is not a CSV with a column "epoch".
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
        """Appends a row: value by column, with "epoch" above that of the previous row.

        Raises:
            OSError: the file cannot be written; the one that was there stands.
        """
        self._save([*self.rows, {column: _plain(value) for column, value in row.items()}])

    def _save(self, rows: list[dict[str, Value]]) -> None:
        columns = dict.fromkeys(column for row in rows for column in row)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns or ["epoch"])
        for row in rows:
            writer.writerow([_text(row[column]) if column in row else "" for column in columns])
        replace_file(self.path, text.getvalue().encode())
        self.rows = rows


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, Value]]:
    """Reads the rows that `CsvLog` wrote.

    Returns:
        One dictionary a row, without its empty fields. What reads as a whole number is an int, what reads as
        another number (nan and inf too) is a float, the rest is text.

    Raises:
        ValueError: the file is not a CSV with a column "epoch".
        OSError: the file cannot be read.
    """
    try:
        lines = list(csv.reader(io.StringIO(pathlib.Path(path).read_text("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"Expected the CSV of a run, received '{path}': {error}.") from error
    columns = lines[0] if lines else []
    if "epoch" not in columns:
        raise ValueError(
            f"Expected a CSV with a column 'epoch', received '{path}' with the columns {columns}. Move it "
            "away."
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

    Each call of `write` is in the file when it returns, so a killed process loses nothing. (It may leave an
    incomplete last record, which readers pass over.) The tensorboard package is needed to look at the file,
    not to write it; TensorFlow writes it, without touching a device.

    Args:
        folder: made when it is not there.
        purge_step: first step that a resumed run repeats: TensorBoard then forgets what older files say from
            this step on. None for a run from the beginning.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int | None = None) -> None:
        import tensorflow as tf

        self._protos = tf.compat.v1
        self._error = tf.errors.OpError
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = pathlib.Path(folder) / name
        self._writer = tf.io.TFRecordWriter(str(self.path))
        self._append(file_version="brain.Event:2")  # from this version on a restart purges by its step
        if purge_step is not None:
            start = self._protos.SessionLog(status=self._protos.SessionLog.START)
            self._append(step=purge_step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends scalars, as float32, at an optimizer step of the run.

        Raises:
            OSError: the file cannot be written, such as on a full disk.
        """
        values = [
            self._protos.Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()
        ]
        self._append(step=int(step), summary=self._protos.Summary(value=values))

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._writer.close()

    def _append(self, **fields: Any) -> None:
        event = self._protos.Event(wall_time=time.time(), **fields)
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except self._error as error:
            raise OSError(f"'{self.path}' cannot be written: {error.message}. Free some space.") from None


class Progress:
    """The line on stderr that says how far a run is, how fast, and how long it will take.

    On a terminal it is rewritten up to five times a second, and one line of each epoch stays. Elsewhere,
    as in the log of a batch system, there is one line an epoch, and one every five minutes within it.
    `KERAS_CONVNEXT_QUIET` in the environment has the effect of `quiet`.

    Args:
        epochs: in the whole run.
        steps: optimizer steps in an epoch.
        batch_size: images in a step.
        quiet: print nothing.
        stream: where lines go; None for stderr.
        clock: returns seconds.

    Example:
        >>> progress = Progress(epochs=30, steps=400, batch_size=256)  # doctest: +SKIP
        >>> progress.show(1, 1, loss)  # doctest: +SKIP
        >>> progress.end_epoch(1, {"loss": 6.91, "val_top1": 0.12})  # doctest: +SKIP
        >>> progress.close()  # doctest: +SKIP
    """

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
        self.epochs = epochs
        self.steps = steps
        self.batch_size = batch_size
        self.images_per_second: float | None = None
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_quiet = quiet or is_set("KERAS_CONVNEXT_QUIET")
        self._is_terminal = self._stream.isatty()
        self._samples: collections.deque[tuple[float, int]] = collections.deque()  # (time, step of the epoch)
        self._epoch = 0
        self._step = 0
        self._next_sample = -math.inf
        self._next_line = clock() + _PLAIN_LINE_SECONDS
        self._step_end = clock()
        self._seconds_between_epochs = 0.0
        self._has_open_line = False

    def show(self, epoch: int, step: int, loss: Any) -> None:
        """Says that a step is done. Cheap: most calls only read the clock.

        Args:
            epoch: the current one, from 1.
            step: steps done in this epoch, from 1.
            loss: a number, or a scalar tensor, which is read only when a line is printed.
        """
        now = self._clock()
        self._step, self._step_end = step, now
        if epoch != self._epoch:
            # Speed is not measured across the end of an epoch: there is validation, and at first compilation.
            self._epoch = epoch
            self._samples.clear()
        elif now < self._next_sample:
            return
        self._next_sample = now + _REDRAW_SECONDS
        self._measure(now, step)
        if self._is_quiet:
            return
        if self._is_terminal:
            self._rewrite(self._line(float(loss)))
        elif now >= self._next_line:
            self._next_line = now + _PLAIN_LINE_SECONDS
            self._print(self._line(float(loss), has_bar=False))

    def status(self, text: str) -> None:
        """Puts a text in the place of the line, such as "validation"; on a terminal only."""
        if self._is_terminal and not self._is_quiet:
            self._rewrite(f"epoch {self._epoch}/{self.epochs}, {text}"[: self._width()])

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if not self._is_quiet:
            self._print(text)

    def end_epoch(self, epoch: int, scalars: Mapping[str, float]) -> None:
        """Prints the line of an epoch, after its validation.

        Args:
            epoch: from 1.
            scalars: what to say of it, value by name.
        """
        now = self._clock()
        if epoch == self._epoch and self._step_end > self._samples[-1][0]:
            self._measure(self._step_end, self._step)
        self._epoch, self._step = epoch, self.steps
        self._seconds_between_epochs = now - self._step_end
        self._next_line = now + _PLAIN_LINE_SECONDS
        parts = [f"epoch {epoch}/{self.epochs}"]
        parts += [f"{name} {value:.5g}" for name, value in scalars.items()]
        if self.images_per_second is not None:
            parts += [_speed(self.images_per_second)]
            if epoch < self.epochs:
                parts += [f"{_duration(self._seconds_left()[1])} left"]
        self.say(", ".join(parts))

    def close(self) -> None:
        """Ends the line that is being rewritten, if there is one."""
        if self._has_open_line:
            self._has_open_line = False
            print(file=self._stream, flush=True)

    def _measure(self, now: float, step: int) -> None:
        samples = self._samples
        samples.append((now, step))
        while len(samples) > 2 and now - samples[1][0] >= _SPEED_SECONDS:
            samples.popleft()
        (begin, first), (end, last) = samples[0], samples[-1]
        if end > begin:
            self.images_per_second = (last - first) * self.batch_size / (end - begin)

    def _seconds_left(self) -> tuple[float, float]:
        """Returns the seconds left of the epoch's training and of the run."""
        epoch_seconds = self.steps * self.batch_size / max(self.images_per_second or 0, 1e-9)
        left = (1 - self._step / self.steps) * epoch_seconds
        return left, left + (self.epochs - self._epoch) * (epoch_seconds + self._seconds_between_epochs)

    def _line(self, loss: float, has_bar: bool = True) -> str:
        parts = [f"epoch {self._epoch}/{self.epochs}, step {self._step}/{self.steps}", f"loss {loss:.4f}"]
        if self.images_per_second is not None:
            of_epoch, of_run = map(_duration, self._seconds_left())
            parts += [_speed(self.images_per_second), f"epoch {of_epoch} left", f"run {of_run} left"]
        if not has_bar:
            return ", ".join(parts)
        width = self._width()
        for unwanted in (3, 3, 2, 1):  # the epoch's time, the run's, speed, loss
            if len(", ".join(parts)) > width:
                del parts[unwanted : unwanted + 1]
        bar_width = min(width - len(", ".join(parts)) - 3, _LONGEST_BAR)
        if bar_width >= _SHORTEST_BAR:
            full = min(int(bar_width * self._step / self.steps), bar_width)
            parts[0] += f" [{'#' * full}{'.' * (bar_width - full)}]"
        return ", ".join(parts)[:width]

    def _width(self) -> int:
        """Returns the characters of a line, without the last column, where some terminals wrap."""
        try:
            return max(os.get_terminal_size(self._stream.fileno()).columns, 20) - 1
        except (OSError, ValueError):  # a terminal that does not know, or no file
            return shutil.get_terminal_size().columns - 1

    def _rewrite(self, line: str) -> None:
        self._has_open_line = True
        print(f"\r{line}\033[K", end="", file=self._stream, flush=True)

    def _print(self, line: str) -> None:
        begin = "\r\033[K" if self._has_open_line else ""
        self._has_open_line = False
        print(f"{begin}{line}", file=self._stream, flush=True)


def _plain(value: Any) -> Value:
    """Returns a value as Python's own type, so that it is written alike whatever computed it."""
    if isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _text(value: Value) -> str:
    return value if isinstance(value, str) else repr(value)


def _number(field: str) -> Value:
    if _INTEGER.fullmatch(field):
        return int(field)
    try:
        return float(field)
    except ValueError:
        return field


def _duration(seconds: float) -> str:
    hours = round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return str(datetime.timedelta(seconds=round(seconds)))


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:.{0 if images_per_second >= 10 else 1}f} images/s"
