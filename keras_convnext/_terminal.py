"""Silences the output of a process, of Python and of native libraries."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator


class _Silence(io.TextIOBase):
    """Stands for a stream of `sys`: nothing passes while it is silent, everything afterwards.

    Loggers keep the stream that they found when they were made, TensorFlow's for example.
    """

    def __init__(self, number: int):
        self.number = number
        self.name = {1: "stdout", 2: "stderr"}[number]
        self.is_silent = True

    def fileno(self) -> int:
        return self.number

    def write(self, text: str) -> int:
        return len(text) if self.is_silent else getattr(sys, self.name).write(text)

    def flush(self) -> None:
        if not self.is_silent:
            getattr(sys, self.name).flush()


@contextlib.contextmanager
def silenced(*, stdout: bool = False) -> Iterator[None]:
    """Sends stderr, and stdout where asked, nowhere: what Python writes, and what native libraries do.

    TensorFlow's start-up lines, for example, obey none of its settings. Exceptions pass.

    Args:
        stdout: bool, whether standard output too.
    """
    numbers = (1, 2) if stdout else (2,)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in numbers]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    silences = [_Silence(number) for number in numbers]
    try:
        for number in numbers:
            os.dup2(nowhere, number)
        # Python's streams are not those two in a notebook, for example.
        with contextlib.ExitStack() as redirected:
            redirected.enter_context(contextlib.redirect_stderr(silences[-1]))
            if stdout:
                redirected.enter_context(contextlib.redirect_stdout(silences[0]))
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for silence in silences:
            silence.is_silent = False
        for number, copy in zip(numbers, kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
