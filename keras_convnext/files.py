"""Writing a file in one step, so that neither a kill nor a full disk leaves half of it."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the path's place when the block ends without an error.

    Args:
        path: the file; its folder must be there.

    Raises:
        IsADirectoryError: a folder is at the path.
        FileNotFoundError: there is no folder for the file.
        OSError: the file cannot be written; one that was there stands.

    Example:
        with replacing_file("log.csv") as file:
            file.write(b"epoch,loss")
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"Expected the path of a file to write, received the directory '{path}'. Add a file name."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{path.parent}'. Create it first.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
