"""Keeps a training run on the disk so that a kill, a full disk or a damaged file loses as little as possible.

A run folder holds run.json, the recipe and data of the run; checkpoints/step-00001234.safetensors, all arrays
and the state of a step, with a checksum of both; .lock, held by the process that trains; and what the caller
writes. A file has its name when it is complete. No Keras is needed.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_convnext._files import (
    LOCKS_UNSUPPORTED,
    disk_error_text,
    open_to_lock,
    read_bytes,
    replace_file,
    replacing_path,
    sync_folder,
    try_lock,
)
from keras_convnext._messages import differences, listed, one_line, short_repr, size_text
from keras_convnext.weights.arrays import FileFormatError, little_endian_bytes
from keras_convnext.weights.safetensors_files import read_safetensors_metadata, write_safetensors
from keras_convnext.weights.torch_files import read_state_dict

_logger = logging.getLogger("keras_convnext")

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.toml"
CHECKPOINT_FOLDER = "checkpoints"

_FORMAT = "keras_convnext run 1"
_LOCK_FILE = ".lock"
_CHECKPOINT_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})\.safetensors")
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\.tmp-[0-9a-f]{16}-.+")
_MOST_LISTED = 20  # arrays or settings in one message

Arrays = dict[str, np.ndarray]


class RunFolderError(OSError):
    """A run folder cannot be used, or a file in it cannot be written: where, why and what to do."""


def open_run(
    path: str | os.PathLike[str],
    identity: Mapping[str, object],
    *,
    checkpoint_bytes: int,
    keep: int = 2,
    weights_bytes: int = 0,
) -> "RunFolder":
    """Makes or takes up the folder of a training run, and holds it until `close` or the end of the process.

    A `RunFolderError` refuses what would stop the run later: the folder of a run of another `identity` (JSON
    values) or of something else, another process in it, no permission, no space for `keep` + 2 checkpoints of
    `checkpoint_bytes` (the newest, the best and the one that is being written) and for `weights_bytes`; what
    is there counts. What a killed process was writing is removed. A folder with hidden files only is a new
    one. On a file system without locks one in the machine's temporary folder stands in.
    """
    given = json.loads(json.dumps(dict(identity)))
    folder = pathlib.Path(path).absolute()
    _take_folder(folder)
    with contextlib.ExitStack() as stack:
        _lock(folder, stack)
        stored = _read_identity(folder)
        if stored is not None:
            _refuse_other_run(folder, stored, given)
        with _writing(folder):
            for leftover in folder.rglob(".*"):  # of a killed process
                if _TEMPORARY_NAME.fullmatch(leftover.name) and leftover.is_file():
                    leftover.unlink()
        _refuse_small_disk(folder, checkpoint_bytes, keep, weights_bytes)
        with _writing(folder):
            # In any case: a disk that is there and takes no more files shows here.
            content = _json_text({"format": _FORMAT, "identity": stored or given})
            replace_file(folder / RUN_FILE, content.encode())
            (folder / CHECKPOINT_FOLDER).mkdir(exist_ok=True)
            sync_folder(folder)
        return RunFolder(folder, keep, stack.pop_all())


class RunFolder(contextlib.AbstractContextManager):
    """The folder of one training run, made by `open_run`; keeps the best and some newest checkpoints."""

    def __init__(self, path: pathlib.Path, keep: int, locks: contextlib.ExitStack):
        self.path, self.keep, self._locks = path, keep, locks
        self._damaged: set[int] = set()  # steps whose checkpoint `latest` could not read

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes have the folder; closing twice does nothing."""
        self._locks.close()

    def save(self, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> pathlib.Path:
        """Writes the checkpoint of a step in place of an earlier one, then removes old ones.

        `state` has JSON values: "step", the number of finished steps, and where one is the best "best_step".
        That one, this one and the newest `keep` stay; those that `latest` found damaged go.
        """
        step, text = int(state["step"]), json.dumps(dict(state))
        path = self._checkpoint_path(step)
        metadata = {"format": _FORMAT, "state": text, "crc32": _checksum(arrays, text)}
        with _writing(path.parent, sum(array.nbytes for array in arrays.values())):
            write_safetensors(path, arrays, metadata)
            sync_folder(path.parent)
        self._damaged.discard(step)
        self.remove_old(state)
        return path

    def remove_old(self, state: Mapping[str, Any]) -> None:
        """Removes what `save` of a state removes, where a kill came before that."""
        whole = [number for number in self.steps() if number not in self._damaged]
        kept = {state["step"], state.get("best_step")}
        for number in sorted({*self._damaged, *whole[: -self.keep]} - kept):
            try:
                self._checkpoint_path(number).unlink(missing_ok=True)
            except OSError as error:  # such as a file that another program reads on Windows
                _logger.warning("The old checkpoint of step %d stays: %s", number, error)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint file, whole or damaged, in rising order."""
        names = os.listdir(self.path / CHECKPOINT_FOLDER)
        matches = [match for match in map(_CHECKPOINT_NAME.fullmatch, names) if match]
        return sorted(int(match[1]) for match in matches)

    def read(self, step: int) -> tuple[Arrays, dict]:
        """Reads the arrays of a step, as copies, and its state; FileFormatError: the checksum differs."""
        path = self._checkpoint_path(step)
        metadata = read_safetensors_metadata(path)
        if metadata.get("format") != _FORMAT or not {"state", "crc32"} <= metadata.keys():
            raise FileFormatError(
                f"Expected a state, a CRC-32 and the format {_FORMAT!r} in the header of '{path}', received "
                f"the format {metadata.get('format')!r} and {listed(metadata) or 'nothing'}."
            )
        # Copies, because JAX would take aligned views for its own memory, and a later change of the file
        # for weights. What is checked is what is returned.
        arrays = {name: view.copy() for name, view in read_state_dict(path).items()}
        expected, received = metadata["crc32"], _checksum(arrays, metadata["state"])
        if expected != received:
            raise FileFormatError(f"Expected the CRC-32 {expected} of '{path}', received {received}.")
        return arrays, json.loads(metadata["state"])

    def latest(self) -> tuple[Arrays, dict] | None:
        """Reads the newest checkpoint that is whole; returns None when the run has none yet.

        A damaged one is named in a warning, and removed by the next `save`; RunFolderError: all are damaged.
        An OSError goes on, as the disk may give the file at another time.
        """
        steps = self.steps()
        reasons = []
        for step in reversed(steps):
            try:
                return self.read(step)
            except FileFormatError as error:
                reasons.append(f"step {step} ({error})")
                self._damaged.add(step)
                _logger.warning("Skipping the damaged checkpoint of %s", reasons[-1])
        if not steps:
            return None
        raise RunFolderError(
            f"Expected a whole checkpoint in '{self.path / CHECKPOINT_FOLDER}', but all {len(steps)} are "
            f"damaged: {listed(reasons)}. Bring one back from a copy, or remove them to begin again."
        )

    def write_json(self, name: str, values: object) -> pathlib.Path:
        return self.write_text(name, _json_text(values))

    def write_text(self, name: str, text: str) -> pathlib.Path:
        """Writes a UTF-8 file under a name in the folder; after a RunFolderError an earlier one stands."""
        return self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> pathlib.Path:
        return self.write_with(name, lambda path: path.write_bytes(content), len(content))

    def write_with(
        self, name: str, function: Callable[[pathlib.Path], object], needed: int | None = None
    ) -> pathlib.Path:
        """Has a function write a file, to a path that ends in `name`, and gives it the name when it returns.

        Its OSErrors become a RunFolderError, with the bytes `needed` where the disk is full.
        """
        path = self.path / name
        with _writing(path.parent, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing_path(path) as temporary:
                function(temporary)
            sync_folder(path.parent)
        return path

    def _checkpoint_path(self, step: int) -> pathlib.Path:
        return self.path / CHECKPOINT_FOLDER / f"step-{step:08d}.safetensors"


def check_arrays(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[tuple[int, ...], str]], source: str
) -> None:
    """Refuses arrays that are not those of the model and optimizer at hand: the message lists them.

    `expected` has (shape, dtype name) by name, such as ((96,), "float32"); `source` begins the message.
    """
    wanted = {name: _array_text(*kind) for name, kind in expected.items()}
    found = {name: _array_text(array.shape, array.dtype) for name, array in arrays.items()}
    if changes := differences(wanted, found):
        kinds = {
            "missing": [name for name, _, received in changes if received is None],
            "unexpected": [name for name, expected, _ in changes if expected is None],
            "different": [
                f"{name} expected {one}, received {other}" for name, one, other in changes if one and other
            ],
        }
        facts = [f"{len(each)} {kind}: {listed(each, _MOST_LISTED)}" for kind, each in kinds.items() if each]
        raise ValueError(
            f"{source} is a checkpoint of another architecture, optimizer or precision. Expected "
            f"{len(expected)} arrays, received {len(arrays)}. {'. '.join(facts)}. Continue with the recipe "
            "it was made with, or begin again in another folder."
        )


def _take_folder(folder: pathlib.Path) -> None:
    """Makes a folder that is not there, and refuses one of something else."""
    with _writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunFolderError(
                f"Expected a folder or a free name at '{folder}', but a part of it is a file. Pass another."
            ) from error
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if names and RUN_FILE not in names:
        raise RunFolderError(
            f"Expected an empty folder or one of a training run (with {RUN_FILE}) at '{folder}', received "
            f"one with {listed(names)}. Pass another folder."
        )


def _lock(folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Holds the lock of a folder until the stack is closed or the process ends."""
    with _writing(folder):
        # The file stays: removing it would let a process lock a file that others no longer see.
        file = stack.enter_context(open_to_lock(folder / _LOCK_FILE))
        try:
            is_free = try_lock(file)
        except OSError as error:
            if error.errno not in LOCKS_UNSUPPORTED:
                raise
            file = stack.enter_context(open_to_lock(_local_lock(folder)))
            is_free = try_lock(file)
    holder = "unknown"
    with contextlib.suppress(OSError):  # Windows locks the bytes too
        file.seek(0)
        holder = file.read(300).decode("utf-8", "replace") or "unknown"
    if not is_free:
        raise RunFolderError(
            f"Another process trains in '{folder}' ({holder}). Wait for it, end it, or pass another folder."
        )
    if not holder.startswith(("process ", "unknown")):
        raise RunFolderError(
            f"Expected the lock of a run in '{file.name}', received another file, which is not written over. "
            "Move it, or pass another folder."
        )
    with _writing(folder):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


def _local_lock(folder: pathlib.Path) -> pathlib.Path:
    """Returns a file of this user on a disk of this machine that stands for a folder."""
    name = hashlib.sha256(os.fsencode(f"{pathlib.Path.home()}\n{folder.resolve()}")).hexdigest()
    return pathlib.Path(tempfile.gettempdir()) / f"keras_convnext-{name[:32]}.lock"


def _read_identity(folder: pathlib.Path) -> dict | None:
    path = folder / RUN_FILE
    try:
        content = json.loads(read_bytes(path))
        if content["format"] != _FORMAT:
            raise ValueError(f"expected the format {_FORMAT!r}, received {content['format']!r}")
        return dict(content["identity"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunFolderError(
            f"'{path}' cannot be read as the description of a run ({one_line(error)}), so it is not known "
            "which run the folder holds. Bring the file back from a copy, or pass another folder."
        ) from error


def _refuse_other_run(
    folder: pathlib.Path, stored: Mapping[str, object], given: Mapping[str, object]
) -> None:
    changes = [f"{key}: {_shown(old)} -> {_shown(new)}" for key, old, new in differences(stored, given)]
    if changes:
        raise RunFolderError(
            f"'{folder}' holds another run. Expected the settings it was begun with, received "
            f"{len(changes)} changed: {listed(changes, _MOST_LISTED)}. Pass these, or another folder."
        )


def _refuse_small_disk(folder: pathlib.Path, checkpoint_bytes: int, keep: int, weights_bytes: int) -> None:
    files = itertools.chain(folder.glob("*.h5"), folder.rglob("*.safetensors"))
    present, free = sum(path.stat().st_size for path in files), shutil.disk_usage(folder).free
    needed = (keep + 2) * checkpoint_bytes + weights_bytes - present
    if needed > free:
        raise RunFolderError(
            f"Expected {size_text(needed)} free at '{folder}' for {keep + 2} checkpoints of "
            f"{size_text(checkpoint_bytes)}{' and weights' * (weights_bytes > 0)}, received "
            f"{size_text(free)}: {size_text(needed - free)} are missing. Free some, or take another disk."
        )


@contextlib.contextmanager
def _writing(folder: pathlib.Path, needed: int | None = None) -> Iterator[None]:
    """Says in our words that something could not be written to a folder."""
    try:
        yield
    except RunFolderError:
        raise
    except OSError as error:
        kept = "What was there before is kept."
        if_full = f"{kept} Free some, and start the same run again: it continues from the last checkpoint."
        if_refused = f"{kept} Make it writable, or pass another folder."
        raise RunFolderError(disk_error_text(error, folder, if_full, if_refused, needed)) from error


def _checksum(arrays: Mapping[str, np.ndarray], state: str) -> str:
    """Returns the CRC-32 of a state and of all that is in arrays; it finds every single flipped bit."""
    crc = zlib.crc32(state.encode("utf-8"))
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"\n{name} {_array_text(array.shape, array.dtype)}\n".encode(), crc)
        crc = zlib.crc32(little_endian_bytes(array), crc)
    return f"{crc:08x}"


def _array_text(shape: tuple[int, ...], dtype: object) -> str:
    return f"{np.dtype(dtype).name}{list(shape)}"  # type: ignore[call-overload]


def _shown(value: object) -> str:
    return "absent" if value is None else short_repr(value)


def _json_text(values: object) -> str:
    return json.dumps(values, indent=1) + "\n"
