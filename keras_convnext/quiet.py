"""Silences what writes to a process's output, from Python and from outside it."""

import contextlib
import os
import sys
from collections.abc import Iterator


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
    try:
        for number in numbers:
            os.dup2(nowhere, number)
        # Python's streams are not those two in a notebook, for example.
        with open(os.devnull, "w") as sink, contextlib.ExitStack() as redirected:
            redirected.enter_context(contextlib.redirect_stderr(sink))
            if stdout:
                redirected.enter_context(contextlib.redirect_stdout(sink))
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip(numbers, kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
