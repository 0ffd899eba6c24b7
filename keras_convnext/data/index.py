"""The index of a data set: where each image lies and which label it has; and the listing of folders."""

import array
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from keras_convnext._files import StrPath, open_regular, reading, regular_size, replacing_file
from keras_convnext._messages import listed, near_names, shortened, size_text
from keras_convnext._terminal import Progress, print_line
from keras_convnext.data import array_records

# Of the formats that `preprocess.decode_image` reads; those of other formats are told as left out.
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
IMAGE_SUFFIXES = (*_JPEG, ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff")
INDEX_VERSION = 1
MANIFEST = "manifest.json"  # of a folder that `prepare` wrote
CACHED_BYTES = 1 << 30  # files below this size are scanned in about a second, so their index is not kept
MAX_CLASSES = 1_000_000  # that a number in a file may ask for

# Folders that systems and archives add to folders of images, thumbnails among them.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
_SHOWN = 12  # classes that `described` names with their counts, and reasons
_COLUMNS = {  # of a `Source` and of its file, in this order
    "file_numbers": np.int32,
    "offsets": np.int64,
    "lengths": np.int64,
    "labels": np.int32,
    "name_text": np.uint8,
    "name_ends": np.int64,
}


class SourceError(ValueError):
    """A data set could not be used: which, why and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Where N encoded images lie, and their labels."""

    path: str  # the folder or file that was indexed
    kind: str  # "folder", "tar", "tfds", "array_record", "tfrecord" or "prepared"
    files: list[str]  # that hold the images
    file_numbers: np.ndarray  # int32 (N,), which of `files` holds the example
    offsets: np.ndarray  # int64 (N,), first byte of the encoded image in its file; or `array_records.place`
    lengths: np.ndarray  # int64 (N,), bytes of the encoded image; -1 for the whole file, of unknown size
    labels: np.ndarray  # int32 (N,), class numbers, 0 to len(classes) - 1
    classes: list[str]  # WordNet ids for ImageNet, names of the folders otherwise
    name_text: np.ndarray  # uint8 (characters,), UTF-8, the names of all examples without separators
    name_ends: np.ndarray  # int64 (N,), where each ends
    # What lies beside the images, by the reason to leave it out, see `list_folder`.
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        """Names example `number` for reports, such as "n01440764/n01440764_18.JPEG"."""
        start = self.name_ends[number - 1] if number else 0
        return self.name_text[start : self.name_ends[number]].tobytes().decode("utf-8", "surrogateescape")

    def read(self, number: int) -> bytes:
        """Reads the encoded image of example `number`, of a regular file and not of any size."""
        path, length = self.files[self.file_numbers[number]], int(self.lengths[number])
        size = regular_size(path)
        check_bytes(size if length < 0 else length, f"'{self.name(number)}'")
        if self.kind == "array_record":
            return array_records.read(path, int(self.offsets[number]), length)
        with open(path, "rb", buffering=0) as file:
            file.seek(self.offsets[number])
            content = file.read(length)
        if length >= 0 and len(content) != length:
            raise SourceError(
                f"Expected {length} bytes of '{self.name(number)}' at byte {self.offsets[number]} of "
                f"'{path}', received {len(content)}: the file changed. Open the data set again."
            )
        return content


def check_bytes(count: int, what: str, error: type[ValueError] = SourceError) -> None:
    """Refuses an image that takes more memory than one may, its file with its pixels: 512 MB by default."""
    most = 6 * max(Image.MAX_IMAGE_PIXELS, 1 << 20) if Image.MAX_IMAGE_PIXELS else count
    if count > most:
        raise error(
            f"Expected an image that takes at most {size_text(most)} of memory, but {what} takes "
            f"{size_text(count)}. Reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is trusted."
        )


def with_classes(source: Source, classes: list[str]) -> Source:
    """Returns a source whose labels are positions in another list of class names."""
    positions = {name: number for number, name in enumerate(classes)}
    if are_numbers(source.classes) and not any(map(str.isdecimal, classes)):
        numbered = {name: int(name) for name in source.classes}
        positions = numbered if max(numbered.values(), default=0) < len(classes) else positions
    unknown = [name for n in np.unique(source.labels) if (name := source.classes[n]) not in positions]
    if unknown:
        raise SourceError(
            f"Expected the classes of '{source.path}' among the {len(classes)} given, such as "
            f"{first_few(classes)}; {len(unknown)} are not: {first_few(unknown)}."
            f"{near_names(unknown[0], classes, 1)}"
        )
    numbers = np.array([positions.get(name, -1) for name in source.classes], np.int32)
    return dataclasses.replace(source, labels=numbers[source.labels], classes=classes)


def check_labels(source: Source, count: int) -> None:
    """Raises SourceError unless all labels lie from 0 to `count` - 1."""
    if source.labels.min() == -1:
        raise SourceError(
            f"Expected labels in '{source.path}', received -1: the split has none, as a test split."
        )
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= count))
    if len(wrong):
        raise SourceError(
            f"Expected labels from 0 to {count - 1} in '{source.path}', received {source.labels[wrong[0]]} "
            f"for '{source.name(int(wrong[0]))}'."
        )


# An image: the number of its file, first byte, bytes, number or name of its class, its own name.
Found = tuple[int, int, int, int | str, str]


def scanned(path: str, kind: str, files: list[str], images: Iterable[Found]) -> Source:
    """Indexes images as they are found in files, and shows how far that is; classes are sorted."""
    names = ("file_numbers", "offsets", "lengths", "labels", "name_ends")
    numbers, text, found = array.array("q"), bytearray(), dict[str, int]()
    sizes = np.cumsum([0, *map(os.path.getsize, files)])
    with Progress(f"Indexing {os.path.basename(path)}", int(sizes[-1]), "MB") as progress:
        for number, offset, length, label, name in images:
            label = found.setdefault(label, len(found)) if isinstance(label, str) else label
            text += name.encode("utf-8", "surrogateescape")
            numbers.extend((number, offset, length, label, len(text)))
            progress.show(
                int(min(sizes[number] + offset, sizes[min(number + 1, len(files))])),
                lambda: f"{len(numbers) // 5} images, {progress.text()}",
            )
    table = zip(names, np.array(numbers, np.int64).reshape(-1, len(names)).T, strict=True)
    columns: dict[str, Any] = {name: values.astype(_COLUMNS[name]) for name, values in table}
    classes = sorted(found)
    if classes:
        positions = np.argsort([found[name] for name in classes]).astype(np.int32)
        columns["labels"] = positions[columns["labels"]]
    return Source(path, kind, files, classes=classes, name_text=np.frombuffer(text, np.uint8), **columns)


def name_columns(names: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a `Source` that hold the names of its examples."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    return {
        "name_text": np.frombuffer(b"".join(encoded), np.uint8),
        "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
    }


def write_index(path: str, source: Source, stamp: str = "") -> None:
    """Writes all but the paths of a source to an .npz file in one step; `read_index` compares the stamp."""
    texts = {"stamp": stamp, "classes": json.dumps(source.classes)}
    arrays = {name: np.frombuffer(text.encode("utf-8"), np.uint8) for name, text in texts.items()}
    arrays |= {name: getattr(source, name) for name in _COLUMNS}
    with replacing_file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_index(path: str, source_path: str, kind: str, files: list[str], stamp: str = "") -> Source:
    """Reads what `write_index` wrote; SourceError where the file is damaged or has another stamp."""
    with reading(path, "an index", "Make it again.", SourceError):
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > regular_size(path):
                raise ValueError("its arrays are compressed, or longer than the file")
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in _COLUMNS}
            found = content["stamp"].tobytes().decode("utf-8")
            classes = json.loads(content["classes"].tobytes())
        if found != stamp:
            raise ValueError(f"its stamp is {shortened(found, 80)!r}")
        _check_columns(arrays, len(files), classes)
    return Source(path=source_path, kind=kind, files=files, classes=classes, **arrays)


def _check_columns(arrays: dict[str, np.ndarray], num_files: int, classes: list[str]) -> None:
    """Raises a ValueError unless each image lies in one of the files and has one of the classes."""
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no list of names")
    ranges = {
        "file_numbers": (0, num_files - 1),
        "offsets": (0, sys.maxsize),
        "lengths": (-1, sys.maxsize),
        "labels": (-1, len(classes) - 1 if classes else sys.maxsize),
        "name_ends": (0, len(arrays["name_text"])),
    }
    for name, (low, high) in ranges.items():
        values = arrays[name]
        if values.shape != (len(arrays["labels"]),) or values.dtype.kind != "i":
            raise ValueError(f"{name} has the shape {values.shape} and the type {values.dtype}")
        if len(values) and not low <= values.min() <= values.max() <= high:
            raise ValueError(f"{name} has numbers from {values.min()} to {values.max()}")
    if (np.diff(arrays["name_ends"]) < 0).any():
        raise ValueError("name_ends does not rise")


def cached_index(
    path: str, kind: str, split: str, files: list[str], scan: Callable[[], Iterable[Found]]
) -> Source:
    """Returns what `scan` finds in some files, from the cache when they have not changed."""
    if sum(map(regular_size, files)) < CACHED_BYTES:
        return scanned(path, kind, files, scan())
    default = os.path.expanduser("~/.cache/keras_convnext/index")
    folder = os.environ.get("KERAS_CONVNEXT_INDEX_CACHE") or default
    paths = [os.path.abspath(file) for file in files]
    index = os.path.join(folder, f"{_digest([INDEX_VERSION, kind, split, paths])[:32]}.npz")
    states = [os.stat(path) for path in paths]
    stamp = _digest([[state.st_size, state.st_mtime_ns] for state in states])
    with contextlib.suppress(OSError, SourceError):
        return read_index(index, path, kind, files, stamp)
    source = scanned(path, kind, files, scan())
    try:
        os.makedirs(folder, exist_ok=True)
        write_index(index, source, stamp)
    except OSError as error:
        print_line(
            f"The index of '{files[0]}' is not kept, and will be made again: '{folder}' cannot be written "
            f"({error.strerror or error}). Set KERAS_CONVNEXT_INDEX_CACHE to a folder that can.",
            sys.stderr,
        )
    return source


def is_image(name: str) -> bool:
    """Tells whether a file counts as an image: by its suffix, and hidden files do not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tells a folder or a link to one; no links in a ring, at which `DirEntry.is_dir` raises."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def list_folder(path: str) -> tuple[list[str], list[str], collections.Counter[str]]:
    """Returns the sorted names of the folders and images in a folder, and how much is left out, by reason.

    Links count as what they lead to. Hidden names, folders that systems add, such as "__MACOSX", and what is
    no regular file (a pipe, a device, a broken link) are left out.
    """
    folders, images = [], []
    left_out: collections.Counter[str] = collections.Counter()
    with os.scandir(path) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif entry.name.casefold() in _SYSTEM_FOLDERS:
                left_out[entry.name] += 1
            elif is_folder(entry):
                folders.append(entry.name)
            elif suffix not in IMAGE_SUFFIXES:
                left_out[suffix or "without suffix"] += 1
            elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):
                images.append(entry.name)
            else:
                left_out["no regular file"] += 1
    return sorted(folders), sorted(images), left_out


def images_below(
    folder: str, seen: set[tuple[int, int]] | None = None
) -> tuple[list[str], collections.Counter[str]]:
    """Returns the sorted paths of the images at any depth below a folder, and how much is left out.

    Links to folders are followed, each folder is listed once, and those `seen` before not again. OSError: a
    folder cannot be listed, as a part of the images would give another score.
    """
    images, waiting = [], [folder]
    seen = set() if seen is None else seen
    left_out: collections.Counter[str] = collections.Counter()
    while waiting:
        path = waiting.pop()
        state = os.stat(path)
        if (state.st_dev, state.st_ino) in seen:
            left_out["link to a folder that is listed already"] += 1
            continue
        seen.add((state.st_dev, state.st_ino))
        folders, names, others = list_folder(path)
        left_out += others
        images += [os.path.join(path, name) for name in names]
        waiting += [os.path.join(path, name) for name in reversed(folders)]
    return sorted(images), left_out


def counted(left_out: collections.Counter[str]) -> str:
    """Says how much was left out and why, the most first: "12 .txt, 3 hidden"; "" for nothing."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count:,} {_printable(reason)}" for reason, count in ranked[:_SHOWN]]
    rest = sum(count for _, count in ranked[_SHOWN:])
    return ", ".join(words + [f"{rest:,} others"] * bool(rest))


def described(source: Source, title: str = "data") -> list[str]:
    """Says in a few lines what was found: images, classes and their counts, what was left out."""
    counts = np.bincount(source.labels, minlength=len(source.classes)).tolist()
    names = [f"{_printable(name)} ({count:,})" for name, count in zip(source.classes, counts, strict=True)]
    shown = ", ".join(names)
    if len(names) > _SHOWN:
        shown = f"{', '.join(names[:5])}, ...; {min(counts):,} to {max(counts):,} a class"
    lines = [f"{title}: {len(source):,} images of {len(names):,} classes in '{source.path}': {shown}"]
    if 0 in counts:
        lines.append(f"  no images: {counts.count(0):,} of these classes")
    if are_numbers(source.classes) and set(map(int, source.classes)) != set(range(len(names))):
        lines.append(f"  the numbers are names, not labels: class 0 is '{source.classes[0]}'")
    return lines + [f"  left out: {counted(source.left_out)}"] * bool(source.left_out)


def are_numbers(names: Iterable[str]) -> bool:
    """Tells whether all names of classes are whole numbers; longer ones are dates and ids."""
    return all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names)


def in_order(names: Iterable[str], path: StrPath) -> list[str]:
    """Returns the names of classes in the order of their labels: sorted, but the numbers 0 to n - 1 by value.

    SourceError: two names stand for one number.
    """
    found = sorted(set(names))
    if not are_numbers(found):
        return found
    numbers = set(map(int, found))
    if len(numbers) < len(found):
        raise SourceError(f"Two classes of '{path}' stand for one number: {first_few(found)}. Rename one.")
    return sorted(found, key=int) if numbers == set(range(len(found))) else found


def _printable(name: str) -> str:
    """A name as a terminal can show it: short, without line ends and control characters."""
    return shortened(name if name.isprintable() else ascii(name), 60)


def first_few(names: Iterable[str]) -> str:
    return listed(map(_printable, names), 5)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()
