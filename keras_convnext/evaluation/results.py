"""The result of an evaluation, which has what was predicted for each image, and the table of results."""

import csv
import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from keras_convnext._files import read_text, reading, wait_for_lock
from keras_convnext._messages import shortened
from keras_convnext._terminal import csv_text
from keras_convnext.data.index import Source

# Of these a row has those of its task.
SCORES = ("top1", "top5", "real", "mode", "miou", "aacc", "macc")
COLUMNS = (
    "time", "model", "architecture", "weights", "weights_sha256", "licence",
    "keras_convnext", "commit", "keras", "backend", "backend_version", "tensorflow", "numpy", "pillow",
    "python", "cpu", "cores", "accelerators",
    "data_kind", "data", "split", "data_sha256", "outputs", "n", "skipped",
    "image_size", "crop", "resize_mode", "resize_size", "interpolation", "dtype_policy", "batch_size",
    *SCORES, "seconds", "images_per_second",
)  # fmt: skip
# Fingerprint of ImageNet's 50,000 validation images with their published labels.
IMAGENET_VALIDATION = "b0ac1bf119f3c8a8ad32e56c6e37727a179138865155ab81d666b3b1cde5f1c6"


class Scored(Protocol):
    """What a row of results is made of, whatever the task."""

    @property
    def settings(self) -> dict[str, str]: ...

    @property
    def source(self) -> Any: ...

    @property
    def numbers(self) -> np.ndarray: ...

    @property
    def faults(self) -> dict[str, str]: ...

    @property
    def num_skipped(self) -> int: ...

    @property
    def num_images(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def images_per_second(self) -> float: ...

    def columns(self) -> dict[str, str]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The predictions of a model for each of n images; every figure is computed from these."""

    settings: dict[str, str]  # text of the columns of `COLUMNS` that are not scores
    source: Source
    numbers: np.ndarray  # int64 (n,), places in `source`, ascending; without the images left out
    labels: np.ndarray  # int32 (n,), class numbers of the data
    ranks: np.ndarray  # int32 (n,), classes that came before the label; 0 where the model is right
    predictions: np.ndarray  # int32 (n, 5), the first five classes, or all when there are fewer
    # int8 (n,): 1 where the first class is a ReaL label, 0 where not, -1 for an image without ReaL labels
    real: np.ndarray | None
    faults: dict[str, str]  # reason by the name of each image that could not be decoded
    num_skipped: int  # number of these
    seconds: float  # for all, from the first file that was read
    images_per_second: float  # after the first batch, in which the model is compiled

    @property
    def top1(self) -> float:
        """Percentage of the images whose label came first; NaN without images."""
        return percentage(self.ranks < 1)

    @property
    def top5(self) -> float:
        """Percentage of the images whose label was among the first five; NaN without images."""
        return percentage(self.ranks < 5)

    @property
    def real_accuracy(self) -> float | None:
        """ReaL accuracy in percent, over the images with ReaL labels; None when it was not asked for."""
        return None if self.real is None else percentage(self.real[self.real >= 0])

    @property
    def num_images(self) -> int:
        """Images that were asked for."""
        return len(self.source)

    def columns(self) -> dict[str, str]:
        """Returns the text of the scores' columns; accuracies in percent."""
        return {
            "top1": f"{self.top1:.4f}",
            "top5": f"{self.top5:.4f}",
            "real": "" if self.real_accuracy is None else f"{self.real_accuracy:.4f}",
        }


def combine(parts: Sequence[Result]) -> Result:
    """Puts the results of all hosts, in any order, together to that of one, by joining their images.

    `seconds` is then the longest, and `images_per_second` the sum. A `Result` can be pickled. Raises a
    ValueError when they are of other models or data, or do not hold every image once.
    """
    if not parts:
        raise ValueError("Expected the results of all hosts, received none.")
    same = (
        "model", "weights_sha256", "data_sha256", "outputs",
        "image_size", "crop", "resize_mode", "resize_size", "interpolation",
    )  # fmt: skip
    for name in same:
        values = sorted({part.settings[name] for part in parts})
        if len(values) > 1:
            raise ValueError(
                f"Expected results of one evaluation, received different ones of {name}: {', '.join(values)}."
            )
    numbers = np.concatenate([part.numbers for part in parts])
    order = np.argsort(numbers, kind="stable")
    twice = np.flatnonzero(np.diff(numbers[order]) == 0)
    if len(twice):
        name = parts[0].source.name(int(numbers[order][twice[0]]))
        raise ValueError(
            f"Expected each image in one result, received {len(twice)} in two, such as '{name}'. Pass the "
            "result of each host once."
        )

    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("numbers", "labels", "ranks", "predictions", "real")
        if getattr(parts[0], name) is not None
    }
    result = dataclasses.replace(
        parts[0],
        **joined,
        faults={name: reason for part in parts for name, reason in part.faults.items()},
        num_skipped=sum(part.num_skipped for part in parts),
        seconds=max(part.seconds for part in parts),
        images_per_second=sum(part.images_per_second for part in parts),
    )
    check_complete(result)
    return result


def fingerprint(source: Source) -> str:
    """Returns a SHA-256 of the file names and classes of all images, whatever their order and container."""
    lines = sorted(
        f"{source.name(number).rpartition('/')[2]}\t{source.classes[label]}\n"
        for number, label in enumerate(source.labels.tolist())
    )
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def read_results(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Reads the rows that `append_result` wrote: the text of each column of `COLUMNS` by its name."""
    check_results_file(path)
    with reading(path, "a table of results", "Pass another file."):
        return list(csv.DictReader(io.StringIO(read_text(path), newline="")))


def append_result(path: str | os.PathLike[str], result: Scored) -> None:
    """Adds one row with all columns of `COLUMNS` to a CSV file, which is made when it is not there.

    The row is written at once, after those of other processes that write at the same time; a file that cannot
    be written is left as it was. The errors are those of `check_results_file` and `check_complete`.
    """
    row = list(result_row(result).values())
    check_results_file(path)  # before it is opened: a pipe would wait for a reader
    with open(path, "ab", buffering=0) as file:
        wait_for_lock(file)
        check_results_file(path)
        size = os.fstat(file.fileno()).st_size
        content = csv_text([row] if size else [COLUMNS, row]).encode("utf-8", "backslashreplace")
        written = file.write(content)
        if written != len(content):
            file.truncate(size)
            raise OSError(f"{path} cannot take another row: the disk is full. Free some space.")
        os.fsync(file.fileno())


def check_results_file(path: str | os.PathLike[str]) -> None:
    """Checks that a row can be added to a file, before hours are spent on it.

    Raises a ValueError for other columns or a last line without end, an OSError without the folder.
    """
    path = pathlib.Path(path)
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"Expected the folder of the results file '{path}'. Make it first.")
        return
    with reading(path, "a table of results", "Pass another file."):
        text = read_text(path)
        if not text:
            return
        found = next(csv.reader(io.StringIO(text, newline="")))
    if tuple(found) != COLUMNS:
        missing = ", ".join(name for name in COLUMNS if name not in found) or "none"
        unknown = shortened(", ".join(name for name in found if name not in COLUMNS), 200) or "none"
        raise ValueError(
            f"Expected the columns of this version in '{path}', received others: missing {missing}; unknown "
            f"{unknown}. Pass another file."
        )
    if not text.endswith("\n"):
        raise ValueError(
            f"Expected '{path}' to end in a complete line, received {text.splitlines()[-1][:40]!r}... Remove "
            "that line or end it."
        )


def result_row(result: Scored) -> dict[str, str]:
    """Returns the text of every column of `COLUMNS`, "" for the scores of other tasks."""
    check_complete(result)
    values = dict.fromkeys(SCORES, "") | result.settings | result.columns()
    values |= {
        "n": str(len(result.numbers)),
        "skipped": str(result.num_skipped),
        "seconds": f"{result.seconds:.2f}",
        "images_per_second": f"{result.images_per_second:.2f}",
    }
    return {name: values[name] for name in COLUMNS}


def check_complete(result: Scored) -> None:
    """Checks that every image of the data was evaluated or left out for a reason, and not all left out."""
    expected, received = result.num_images, len(result.numbers) + result.num_skipped
    if received != expected:
        raise ValueError(
            f"Expected the {expected} images of the data, received {received}: the result of one of several "
            "hosts, or a host's is missing. Pass those of all hosts to combine."
        )
    if not len(result.numbers):
        name, reason = next(iter(result.faults.items()))
        raise ValueError(
            f"Expected an image that can be decoded, but none of {expected} can. First, '{name}': {reason}"
        )


def percentage(is_right: np.ndarray) -> float:
    """Returns the percentage of True; NaN for an empty array."""
    return 100 * float(np.mean(is_right)) if len(is_right) else float("nan")
