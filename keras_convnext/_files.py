"""Reads files that may be anything, writes them in one step, so that none is half there, and locks them.

Every writer of this package asks `check_target` what it may replace.
"""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from keras_convnext._messages import one_line, shortened, size_text

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
PNG_MARK = b"Software\0keras_convnext"  # of the pictures that this package draws, see `check_target`
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
MAX_TEXT_BYTES = 1 << 26  # of JSON, TOML, CSV and other text that is read at once

StrPath = str | os.PathLike[str]

_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


class FileFormatError(ValueError):
    """A file is truncated, damaged or of a kind that cannot be read."""


def regular_size(path: StrPath) -> int:
    """Returns the bytes of a file; an OSError tells what has no end or none of its own: a pipe, a device."""
    state = os.stat(path)
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Expected a file, received the folder", os.fspath(path))
    if not stat.S_ISREG(state.st_mode):
        kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(state.st_mode), "device")
        raise OSError(errno.EINVAL, f"Expected a file, received the {kind}", os.fspath(path))
    return state.st_size


def open_regular(path: StrPath) -> BinaryIO:
    """Opens a file to read its bytes; the errors are those of `regular_size`, before it is opened."""
    regular_size(path)
    return open(path, "rb")


def read_bytes(path: StrPath, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Returns the content of a file; FileFormatError where it is longer than `limit`."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FileFormatError(
            f"Expected at most {size_text(limit)} in '{path}', received {size_text(regular_size(path))}. "
            "Is it the file that you meant?"
        )
    return content


def read_text(path: StrPath) -> str:
    """The text of a UTF-8 file, without a byte order mark; a ValueError names a file in another encoding."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected text in UTF-8 in '{path}', received {error}. Save it as UTF-8.") from None


@contextlib.contextmanager
def reading(
    path: StrPath, expected: str, remedy: str, error: type[Exception] = FileFormatError
) -> Iterator[None]:
    """Tells whatever the content of a file does to the block that takes it apart in one sentence.

    That names the file, what was `expected` in it, and the `remedy`, and is raised as `error`. An `error` of
    the block's own, an ImportError and errors of the system go on as they are.

    Example:
        with reading(path, "the list of splits", "Prepare the set again."):
            names = [item["name"] for item in read_json(path)["splits"]]
    """
    try:
        yield
    except (error, FileFormatError, ImportError):
        raise
    except Exception as problem:
        is_system = isinstance(problem, OSError) and problem.errno not in (None, errno.EINVAL)
        if is_system or getattr(problem, "filename", None) is not None:
            raise  # EINVAL without a name is a seek to a place that the content gave
        what = f"{problem} is missing" if isinstance(problem, KeyError) else one_line(problem)
        raise error(
            f"Expected {expected} in '{path}', which is damaged or something else: "
            f"{shortened(what, 200)}. {remedy}"
        ) from problem


def read_json(path: StrPath, kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Reads the object in a JSON file, see `json_object`; FileFormatError where it is another."""
    with reading(path, "JSON", "Write it again."):
        return json_object(read_bytes(path), kinds)


def json_object(text: str | bytes, kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Returns the object of a JSON text, which must have the keys of `kinds` with values of these types.

    The types are dict, list, str and int. Errors are of many classes: call it within `reading`.
    """
    found = json.loads(text)
    wanted: dict[str, type] = {"": dict, **(kinds or {})}
    for name, kind in wanted.items():
        value = found[name] if name else found
        if not isinstance(value, kind) or isinstance(value, bool):
            where = f" as {name!r}" if name else ""
            raise TypeError(f"expected {_KINDS[kind]}{where}, received {shortened(repr(value), 80)}")
    return found


def check_target(path: StrPath, replace: bool = True, mark: bytes = b"") -> None:
    """Refuses to write a file where something is that this package does not replace.

    That is a folder (IsADirectoryError), and by a FileExistsError a link, whatever it leads to, a pipe and a
    device; without `replace` every file; and with a `mark` a file that does not have it in its first 4 kB, as
    another program wrote that one. FileNotFoundError: there is no folder for the file.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{path.parent}'. Create it first.")
    if not os.path.lexists(path):
        return
    state = path.lstat()
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(
            f"Expected the path of a file to write, received the directory '{path}'. Add a file name."
        )
    if not stat.S_ISREG(state.st_mode):
        kind = f"a link to '{os.readlink(path)}'" if path.is_symlink() else "a pipe, a socket or a device"
        raise FileExistsError(
            f"'{path}' is there already: {kind}, which is not replaced. Name another path, or remove it."
        )
    if not replace:
        raise FileExistsError(f"'{path}' is there already. Pass replace=True (--force) to write over it.")
    if mark and state.st_size:
        with open(path, "rb") as file:
            if mark not in file.read(4096):
                raise FileExistsError(
                    f"'{path}' is there already, and keras_convnext did not write it. Name another path, or "
                    "move it."
                )


def prepare_folder(folder: StrPath, marks: Mapping[str, bytes]) -> None:
    """Makes the folder of some files, and refuses those that another program wrote; see `check_target`."""
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(
            f"Expected a folder to write to, received '{folder}', which is a file or lies below one. Name "
            "another folder."
        ) from error
    for name, mark in marks.items():
        check_target(pathlib.Path(folder) / name, mark=mark)


@contextlib.contextmanager
def replacing_file(path: StrPath, mark: bytes = b"") -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the path's place when the block ends well; see `replacing_path`."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with replacing_path(path, mark, temporary), open(temporary, "xb") as file:
        yield file


@contextlib.contextmanager
def replacing_path(
    path: StrPath, mark: bytes = b"", temporary: pathlib.Path | None = None
) -> Iterator[pathlib.Path]:
    """Gives a path for a library to write to, which takes the place of another when the block ends well.

    Else, or where `check_target` refuses it, what is there stands. By default the name ends in that of the
    file, as libraries tell the format from it. FileNotFoundError: the block wrote nothing.
    """
    path = pathlib.Path(path)
    temporary = temporary or path.with_name(f".tmp-{secrets.token_hex(8)}-{path.name}")
    check_target(path, mark=mark)
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(path: StrPath, content: bytes, mark: bytes = b"") -> None:
    """Writes the content of a file in one step; see `replacing_file`."""
    with replacing_file(path, mark) as file:
        file.write(content)


def disk_error_text(
    error: OSError, folder: StrPath, if_full: str, if_refused: str, needed: int | None = None
) -> str:
    """Returns why nothing could be written to a folder, and what to do: `if_full` where there is no space,
    `if_refused` for another reason. `needed` are the bytes that must fit, None where that is not known.
    """
    reason = error.strerror or str(error)
    if error.errno not in NO_SPACE:
        return f"'{folder}' cannot be written ({reason}). {if_refused}"
    facts = [] if needed is None else [f"expected {size_text(needed)} free"]
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        facts.append(f"received {size_text(free)}")
        if needed is not None and needed > free:  # a quota does not show in the free space
            facts.append(f"{size_text(needed - free)} are missing")
    return f"No space at '{folder}' ({reason}): {', '.join(facts)}. {if_full}"


def open_to_lock(path: StrPath) -> BinaryIO:
    """Opens a file for `try_lock`, without a buffer; what is in it stays. OSError: see `check_target`."""
    check_target(path)
    return pathlib.Path(path).open("a+b", buffering=0)  # closing a buffer would fail on a full disk


def try_lock(file: BinaryIO) -> bool:
    """Takes the lock if it is free; closing the file, or the end of the process, releases it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_for_lock(file: BinaryIO) -> None:
    """Waits until the lock is taken; returns at once where the file system has none."""
    try:
        while not try_lock(file):
            time.sleep(0.05)
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            raise


def sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename survive a power cut, where the system can."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
