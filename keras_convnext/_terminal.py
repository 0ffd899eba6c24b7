"""What is shown on the terminal: progress, tables, and nothing while libraries are silenced."""

import collections
import contextlib
import csv
import datetime
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

from keras_convnext._environment import is_set

_REDRAW_SECONDS = 0.2
_PLAIN_LINE_SECONDS = 300
_NOTEBOOK_LINE_SECONDS = 30
_RATE_SECONDS = 10
_said: set[str] = set()  # kinds of `say_once`


def say(line: str) -> None:
    """Prints a line on stderr, unless KERAS_CONVNEXT_QUIET is set."""
    if not is_set("KERAS_CONVNEXT_QUIET"):
        print_line(line, sys.stderr)


def print_line(line: str, stream: TextIO | None) -> None:
    """Prints a line beside the work, which goes on where nobody reads it or the disk of a log is full."""
    with contextlib.suppress(OSError):
        if stream is not None:  # it is in a process without a console
            print(line, file=stream, flush=True)


def drop_unwritten(stream: TextIO) -> None:
    """Forgets what cannot be written: Python would try once more when it ends, and end with another code."""
    try:
        with contextlib.suppress(ValueError):  # it is closed
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_once(kind: str, line: str) -> None:
    """Says a line unless one of its kind was said since the start of the process."""
    if kind not in _said:
        _said.add(kind)
        say(line)


class Progress(contextlib.AbstractContextManager):
    """Shows on stderr what is done of some work, how fast, and how long the rest takes.

    On a terminal there is a bar, redrawn at most five times a second, which `close` removes. Elsewhere, as in
    the log of a batch system, there is a line every five minutes, in a notebook every 30 seconds. Nothing is
    shown where KERAS_CONVNEXT_QUIET is set. A `total` of None is unknown; "MB" divides counts of bytes.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str = "images",
        *,
        is_wanted: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_quiet = not is_wanted or is_set("KERAS_CONVNEXT_QUIET") or self._stream is None
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._line_seconds = _NOTEBOOK_LINE_SECONDS if "ipykernel" in sys.modules else _PLAIN_LINE_SECONDS
        self._samples: collections.deque[tuple[float, int]] = collections.deque()  # (time, done)
        self._last = (clock(), 0)
        self._next_sample = self._last[0]
        self._next_line = self._last[0] + self._line_seconds
        self._bar: Any = None

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rate(self) -> float | None:
        """Units a second over the last ten seconds; None before the second call of `show`."""
        if not self._samples or self._last[0] <= self._samples[0][0]:
            return None
        (begin, first), (end, last) = self._samples[0], self._last
        return (last - first) / (end - begin)

    def show(self, done: int, describe: Callable[[], str] | None = None) -> None:
        """Says how much is done of the total. Cheap: most calls only read the clock.

        `describe`, by default `text`, gives what is shown after the title and the bar, when that is drawn.
        """
        now = self._clock()
        self._last = (now, done)
        if now < self._next_sample:
            return
        self._next_sample = now + _REDRAW_SECONDS
        self._samples.append(self._last)
        while len(self._samples) > 2 and now - self._samples[1][0] >= _RATE_SECONDS:
            self._samples.popleft()
        if self._is_quiet:
            return
        if self._is_terminal:
            self.draw((describe or self.text)())
        elif now >= self._next_line:
            self._next_line = now + self._line_seconds
            self.say(f"{self.title}, {(describe or self.text)()}")

    def text(self) -> str:
        """Returns what is done, the rate and the time left, as far as they are known."""
        done, rate = self._last[1], self.rate
        scale = 1e6 if self.unit == "MB" else 1
        of_total = "" if self.total is None else f"/{self.total / scale:,.0f}"
        parts = [f"{done / scale:,.0f}{of_total} {self.unit}"]
        if rate:
            parts.append(rate_text(rate / scale, self.unit))
            if self.total is not None:
                parts.append(f"{duration_text((self.total - done) / rate)} left")
        return ", ".join(parts)

    def draw(self, text: str) -> None:
        """Redraws the bar at once, with this text after it; on a terminal only."""
        if self._is_quiet or not self._is_terminal:
            return
        with contextlib.suppress(OSError):  # the terminal has gone
            if self._bar is None:
                self._bar = _started_bar(self._stream)
            self._bar.update(
                self._bar.task_ids[0],
                description=f"{self.title}, {text}",
                total=self.total,
                completed=self._last[1],
                refresh=True,
            )

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self.close()
        if not self._is_quiet:
            print_line(line, self._stream)

    def close(self) -> None:
        """Removes the bar; the next call of `show` draws it again."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None


def _started_bar(stream: TextIO) -> Any:
    from rich import console, progress

    shown: Any = console.Console(file=stream, force_terminal=True)
    shown.on_broken_pipe = lambda: None  # rich's own ends the process
    bar = progress.Progress(
        progress.BarColumn(20),  # gives way to the text where the terminal is narrow
        progress.TextColumn("{task.description}", markup=False),
        console=shown,
        auto_refresh=False,  # no thread
        transient=True,
        redirect_stdout=False,  # it may be a file
    )
    if shown.width > 1000:  # what COLUMNS says is filled with blanks
        shown.width = 1000
    bar.add_task("")
    bar.start()
    shown.show_cursor(True)  # a killed process would leave it hidden
    return bar


def duration_text(seconds: float) -> str:
    seconds = max(seconds, 0)  # more than was expected is done, or a clock was set back
    hours = round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return str(datetime.timedelta(seconds=round(seconds)))


def rate_text(rate: float, unit: str) -> str:
    return f"{rate:.{0 if rate >= 10 else 1}f} {unit}/s"


def table_lines(titles: Sequence[str], alignments: str, rows: Sequence[Sequence[object]]) -> list[str]:
    """Returns the lines of a table, the titles first; "<" or ">" aligns each column."""
    texts = [list(titles), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, alignments, widths, strict=True)
        ).rstrip()
        for row in texts
    ]


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Returns the rows of a table, the titles first, as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def markdown_table(titles: Sequence[str], alignments: str, rows: Sequence[Sequence[object]]) -> list[str]:
    """Returns the lines of a Markdown table; the arguments are those of `table_lines`."""
    rules = ["---:" if side == ">" else "---" for side in alignments]
    cells = [[str(cell).replace("|", "/") for cell in row] for row in (titles, rules, *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


@contextlib.contextmanager
def silenced(*, stdout: bool = False) -> Iterator[None]:
    """Sends stderr, and stdout where asked, nowhere: what Python writes, and what native libraries do.

    TensorFlow's start-up lines, for example, obey none of its settings. Exceptions pass. `sys` has meanwhile
    the streams of the process, which are others in a notebook: a logger that keeps one is heard afterwards.
    """
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "wb"))
        _flush()
        for number in (1, 2) if stdout else (2,):
            with contextlib.suppress(OSError):  # a process without a console has none
                copy = os.dup(number)
                stack.callback(os.close, copy)
                stack.callback(os.dup2, copy, number)
                os.dup2(nowhere.fileno(), number)
        stack.callback(_flush)
        stack.enter_context(contextlib.redirect_stderr(sys.__stderr__))
        if stdout:
            stack.enter_context(contextlib.redirect_stdout(sys.__stdout__))
        yield


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
