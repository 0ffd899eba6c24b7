"""Silences what writes to a process's output from outside Python."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def silenced(*, stdout: bool = False) -> Iterator[None]:
    """Sends stderr, and stdout where asked, nowhere: also what native libraries write.

    TensorFlow's start-up lines, for example, obey none of its settings. Exceptions pass.

    Args:
        stdout: bool, whether standard output too.
    """
    numbers = (1, 2) if stdout else (2,)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in numbers]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in numbers:
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip(numbers, kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
