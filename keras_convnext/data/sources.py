"""Where the images of a data set lie: one index of byte ranges for every layout.

`open_source` lists the images under a path without decoding, unpacking or copying them. Each example is a
file, a first byte, a number of bytes and a label, so that a pipeline reads any example at random.
Only NumPy and the standard library are used; neither TensorFlow nor TensorFlow Datasets is imported.
"""

import array
import csv
import dataclasses
import difflib
import glob
import hashlib
import importlib.util
import json
import math
import mmap
import os
import re
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from keras_convnext.data import class_names
from keras_convnext.data.preprocess import IMAGE_SUFFIXES
from keras_convnext.data.tfrecords import Range, find_records, parse_example
from keras_convnext.files import replacing_file
from keras_convnext.quiet import is_set

INDEX_VERSION = 1
MANIFEST = "manifest.json"  # of a folder that `prepare` wrote
CACHED_BYTES = 1 << 30  # files below this size are scanned in about a second, so their index is not kept
MAX_NUMBERED_CLASSES = 100_000  # larger folder names made of digits are names (dates, ids), not class numbers

# The splits and the other names they go by. What was asked first is looked for first.
SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test",)}

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
# torchvision 0.28.0, torchvision/datasets/imagenet.py
_TAR_MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
}
_ARRAYS = ("file_numbers", "offsets", "lengths", "labels", "name_text", "name_ends")
_SHARD_NAME = re.compile(
    r"(?P<split>.*?)[-.]?(?:tfrecords?-)?(?P<number>\d{5})-of-(?P<count>\d{5})(?:\.tfrecords?)?"
)


class SourceError(ValueError):
    """A data set could not be used: which, why and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Where N encoded images lie, and their labels.

    Attributes:
        path: the folder or file that was indexed.
        kind: "folder", "tar", "tfds", "tfrecord" or "prepared".
        files: paths of the files that hold the images.
        file_numbers: int32 (N,), which of `files` holds the example.
        offsets: int64 (N,), first byte of the encoded image in its file.
        lengths: int64 (N,), bytes of the encoded image; -1 for the whole file (class folders, whose files
            are listed without asking for their sizes).
        labels: int32 (N,), class numbers, 0 to len(classes) - 1.
        classes: names of the classes: WordNet ids for ImageNet, names of the folders otherwise.
        name_text: uint8 (characters,), UTF-8, the names of all examples without separators; empty when
            the files are named like the examples.
        name_ends: int64 (N,), where each name ends in `name_text`, or (0,).
    """

    path: str
    kind: str
    files: list[str]
    file_numbers: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    classes: list[str]
    name_text: np.ndarray
    name_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        """Names example `number` for reports, such as "n01440764/n01440764_18.JPEG"."""
        if len(self.name_ends):
            start = self.name_ends[number - 1] if number else 0
            return self.name_text[start : self.name_ends[number]].tobytes().decode("utf-8", "surrogateescape")
        relative = os.path.relpath(self.files[self.file_numbers[number]], self.path)
        return relative.replace(os.sep, "/")

    def read(self, number: int) -> bytes:
        """Reads the encoded image of example `number`.

        Raises:
            SourceError: the file ends before the image does, so it changed since it was indexed.
            OSError: the file cannot be read.
        """
        path, length = self.files[self.file_numbers[number]], int(self.lengths[number])
        with open(path, "rb", buffering=0) as file:
            file.seek(self.offsets[number])
            content = file.read(length)
        if length >= 0 and len(content) != length:
            raise SourceError(
                f"Expected {length} bytes of '{self.name(number)}' at byte {self.offsets[number]} of "
                f"'{path}', received {len(content)}: the file changed. Open the data set again."
            )
        return content


def open_source(
    path: str | os.PathLike[str],
    split: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    first_label: int | None = None,
) -> Source:
    """Indexes the images of one split of a data set.

    What is at the path decides; the first that fits is taken:

    - `manifest.json`: a folder that `prepare` wrote. Classes as in the source it was made from.
    - ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar or a folder with one or both: ImageNet as published,
      read without unpacking. Classes: WordNet ids.
    - `dataset_info.json`, in the folder or up to three levels below it (name, configuration, version; the
      newest version is taken): a set that TensorFlow Datasets prepared as tfrecord, with one image and one
      class an example: ImageNet, its V2, A, R, Sketch, ReaL and subsets, and others. Classes: its label file.
    - files `*.tfrecord` or `*-00000-of-00128`, in a folder or by a pattern such as "x/train*": records of
      tf.train.Example with "image/encoded" and "image/class/label", or "image" and "label". Classes:
      "image/class/synset" where records have it, else numbers.
    - folders: one folder a class, images at any depth in it. Classes: names of the folders, sorted; if all
      are decimal numbers, the number is the label (ImageNetV2 as published).
    - files ILSVRC2012_val_*.JPEG: ImageNet's validation images, unpacked. Classes: WordNet ids.
    - other images, with `labels`: a flat folder. Classes: from the label file.

    A folder is divided into splits when all its folders are named after splits, such as "train" and "val", or
    two of them are.

    Labels of ImageNet's validation images are those that the package tensorflow-datasets carries, by the
    number in the file name. Integer labels of plain TFRecords without "image/class/synset" count from 0, or
    from 1 (0 being the background, as in TensorFlow's build_imagenet_data.py) when they run from exactly 1 to
    1000; when no label is 0 otherwise, `first_label` must say which. Hidden files and files without
    an image suffix are ignored. An example is an image with exactly one label; ReaL's lists of labels are
    read by `read_real_labels`.

    The index of tars and TFRecords above 1 GB is kept in "~/.cache/keras_convnext/index", or the folder named
    by KERAS_CONVNEXT_INDEX_CACHE, and made again when size or time of a file change.

    Args:
        path: a local folder or file, or a pattern of TFRecord files.
        split: "train", "validation" or "test", or a name the set uses. "val", "valid" and "training" are
            understood. "validation" takes the test split where that is the only one for evaluation, as in
            ImageNetV2. Default: the only split.
        classes: the class names in the order of the labels that are wanted, such as those of the
            training split. Some may be without images. Where the source has numbers for names, they count in
            this list. Default: those of the source.
        labels: label file for a flat folder or for ImageNet's validation images: CSV ("file,label", further
            columns ignored, a header is recognised), lines "file label", or for ImageNet's validation
            images one label a line in the order of their numbers. Labels are class names, or numbers from 0.
        first_label: 0 or 1, the number of the first class in plain TFRecords. Default: found out.

    Returns:
        `Source`.

    Raises:
        SourceError: nothing usable is at the path, a file is missing, truncated or damaged, a class has no
            images, a label is missing or out of range, or the split is unknown. The message names it.
        RecordError: a TFRecord file is compressed, damaged or truncated.
    """
    path = os.fspath(path)
    kind, splits = _locate(path)
    name = _choose_split(path, splits, split)
    places = splits[name]
    if labels is not None and kind not in ("folder", "tar"):
        raise SourceError(
            f"Expected labels=None, because '{path}' has labels of its own, received labels='{labels}'. "
            "Label files are for flat folders and for ImageNet's validation images."
        )
    if first_label is not None and kind != "tfrecord":
        raise SourceError(
            f"Expected first_label=None, because '{path}' says what its labels mean, received "
            f"first_label={first_label}. It is for plain TFRecords."
        )
    if kind == "prepared":
        source = _open_prepared(path, str(name))
    elif kind == "tar":
        source = _open_tar(places[0], str(name), labels)
    elif kind == "tfds":
        source = _open_tfds(places[0], str(name))
    elif kind == "tfrecord":
        source = _open_records(path, places, first_label)
    else:
        source = _open_folder(places[0], labels)
    return source if classes is None else _with_classes(source, list(classes))


def list_splits(path: str | os.PathLike[str]) -> list[str]:
    """Lists the splits at a path under the names they have there; empty when it is not divided.

    Raises:
        SourceError: nothing usable is at the path.
    """
    return [name for name in _locate(os.fspath(path))[1] if name is not None]


def take(source: Source, numbers: Sequence[int] | np.ndarray) -> Source:
    """Returns a source with some of the examples, under the same names and classes.

    Args:
        source: what `open_source` returns.
        numbers: int (n,), places in `source`, 0 to len(source) - 1, in the order that is wanted.

    Returns:
        `Source` of n examples. Its `classes` are those of `source`, whether or not they have images left.

    Raises:
        ValueError: `numbers` is not a list of whole numbers, or one of them is out of range.

    Example:
        take(source, np.flatnonzero(source.labels == 0))     # the images of the first class
    """
    chosen = np.asarray(numbers)
    if chosen.size == 0:
        chosen = chosen.astype(np.int64)
    if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"Expected numbers of shape (n,) and an integer dtype, received {chosen.shape} and "
            f"{chosen.dtype}. Pass the places of the examples, for a mask np.flatnonzero(mask)."
        )
    outside = chosen[(chosen < 0) | (chosen >= len(source))]
    if len(outside):
        raise ValueError(
            f"Expected numbers from 0 to {len(source) - 1}, the places of the {len(source)} examples, "
            f"received {outside[0]}."
        )
    fields = {
        name: getattr(source, name)[chosen] for name in ("file_numbers", "offsets", "lengths", "labels")
    }
    if len(source.name_ends):  # else the names are those of the files
        names = [source.name(int(number)).encode("utf-8", "surrogateescape") for number in chosen]
        fields["name_text"] = np.frombuffer(b"".join(names), np.uint8)
        fields["name_ends"] = np.cumsum([len(name) for name in names], dtype=np.int64)
    return dataclasses.replace(source, **fields)


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Divides a source into one to train on and one to choose settings by, class by class.

    Of a class with n images, round(fraction * n) are held out, but at least one and at most n - 1; a class
    with a single image stays in training. Which ones depends on the seed, the name of the class and the names
    of its images alone: neither on the order of the examples nor on other classes.

    Args:
        source: what `open_source` returns.
        fraction: share that is held out, in (0, 1).
        seed: int, another seed holds out other images.

    Returns:
        (train source, held out source), each in the order of `source`. Both have all its `classes`.

    Raises:
        ValueError: `fraction` is not in (0, 1), or `seed` is not a whole number.
        SourceError: no class has two images.

    Example:
        train, validation = hold_out(open_source("flowers"), 0.1, seed=0)
    """
    is_held_out = held_out_mask(source, fraction, seed)
    return take(source, np.flatnonzero(~is_held_out)), take(source, np.flatnonzero(is_held_out))


def held_out_mask(source: Source, fraction: float, seed: int) -> np.ndarray:
    """Tells which examples `hold_out` holds out: bool (N,), in the order of `source`."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ValueError(
            f"Expected fraction between 0 and 1, both excluded, received {fraction!r}. Pass the share of the "
            "images that is held out, such as 0.1."
        )
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"Expected seed to be a whole number, received {seed!r}. Pass one, such as 0.")
    is_held_out = np.zeros(len(source), bool)
    for label in np.unique(source.labels).tolist():
        members = np.flatnonzero(source.labels == label).tolist()
        count = min(max(math.floor(fraction * len(members) + 0.5), 1), len(members) - 1)
        prefix = f"{int(seed)}\0{source.classes[label]}\0"
        keys = {number: _name_digest(prefix, source.name(number)) for number in members}
        is_held_out[sorted(members, key=keys.__getitem__)[:count]] = True
    if not is_held_out.any():
        raise SourceError(
            f"Expected a class with two images or more in '{source.path}', to hold one out, received "
            f"{len(source)} images of {len(np.unique(source.labels))} classes. Add images, or pass a "
            "validation split."
        )
    return is_held_out


def _name_digest(prefix: str, name: str) -> bytes:
    return hashlib.sha256((prefix + name).encode("utf-8", "surrogateescape")).digest()


def imagenet_class_numbers(classes: Sequence[str], num_classes: int) -> np.ndarray | None:
    """Finds the outputs of an ImageNet classifier that stand for some classes.

    ImageNet-A and -R have images of 200 of the 1000 classes.

    Args:
        classes: names of classes.
        num_classes: width of the classifier, such as 1000.

    Returns:
        int64 (len(classes),), position of each name in `class_names.synset_ids(num_classes)`; None when
        there is no such list or a name is not in it.
    """
    try:
        positions = {synset: number for number, synset in enumerate(class_names.synset_ids(num_classes))}
    except ValueError:
        return None
    if not all(name in positions for name in classes):
        return None
    return np.array([positions[name] for name in classes], np.int64)


def read_real_labels(source: Source, path: str | os.PathLike[str] | None = None) -> list[tuple[int, ...]]:
    """Reads the ReaL labels of ImageNet's validation images.

    Reference: Beyer et al., Are we done with ImageNet? (arXiv 2006.07159);
    github.com/google-research/reassessed-imagenet, real.json. Images with an empty tuple do not count.

    Args:
        source: the validation images, or the set imagenet2012_real of TensorFlow Datasets.
        path: real.json: one list of class numbers (0 to 999) an image, in the order of the numbers in the
            names. None: the lists are in `source`.

    Returns:
        list of N tuples in the order of `source`.

    Raises:
        SourceError: the file does not fit the images, or `source` has no lists.
    """
    if path is None:
        if source.kind != "tfds":
            raise SourceError(
                f"Expected the ReaL labels of '{source.path}' in a file, received path=None. Pass real.json, "
                "or open the set imagenet2012_real."
            )
        return [
            tuple(_values(features, "real_label", path)) for _, path, _, features in _examples(source.files)
        ]
    with open(path, encoding="utf-8") as file:
        lists = json.load(file)
    if not isinstance(lists, list) or not all(isinstance(item, list) for item in lists):
        raise SourceError(f"Expected a list of lists of class numbers in '{path}'. Pass ReaL's real.json.")
    if len(lists) != len(source):
        raise SourceError(
            f"Expected one list of labels for each of the {len(source)} images of '{source.path}', received "
            f"{len(lists)} in '{path}'. Pass the real.json of the same images."
        )
    numbers = [_validation_number(source.name(number), len(lists), path) for number in range(len(source))]
    return [tuple(lists[number - 1]) for number in numbers]


def _locate(path: str) -> tuple[str, dict[str | None, list[str]]]:
    """Returns the kind and, for each split, its files or folder; the split is None when there are none."""
    if not os.path.exists(path):
        files = sorted(glob.glob(path)) if glob.has_magic(path) else []
        if files:
            return "tfrecord", {None: files}
        hint = "Copy or mount it: only local paths are read." if "://" in path else "Check the path."
        raise SourceError(f"Expected a data set at '{path}', but nothing is there. {hint}")
    if os.path.isfile(path):
        if _SHARD_NAME.fullmatch(os.path.basename(path)) or ".tfrecord" in os.path.basename(path):
            return "tfrecord", {None: [path]}
        return "tar", {_split_of_tar(path): [path]}
    if os.path.exists(os.path.join(path, MANIFEST)):
        return "prepared", {name: [path] for name in read_manifest(path)["splits"]}
    tars: dict[str | None, list[str]] = {
        split: [file] for split, name in _TARS.items() if os.path.exists(file := os.path.join(path, name))
    }
    if tars:
        return "tar", tars
    folder = _find_tfds(path)
    if folder is not None:
        return "tfds", {item["name"]: [folder] for item in _read_json(folder, "dataset_info.json")["splits"]}
    shards = _find_shards(path)
    if shards:
        return "tfrecord", shards
    folders, _ = _list_folder(path)
    known = {name for names in SPLITS.values() for name in names}
    named = [name for name in folders if name in known]
    # A folder "train" among others is a class, unless there is one for evaluation as well.
    if len({canonical_split(name) for name in named}) > 1 or (named and named == folders):
        return "folder", {name: [os.path.join(path, name)] for name in named}
    return "folder", {None: [path]}


def _choose_split(path: str, splits: dict[str | None, list[str]], split: str | None) -> str | None:
    known = ", ".join(str(name) for name in splits)
    if split is None:
        if len(splits) == 1:
            return next(iter(splits))
        raise SourceError(f"'{path}' has several splits, and split is None. Pass one of: {known}.")
    if split in splits:
        return split
    canonical = canonical_split(split)
    if None in splits:
        # ".../val" and split="validation" agree.
        if canonical is not None and canonical_split(os.path.basename(os.path.abspath(path))) == canonical:
            return None
        raise SourceError(
            f"'{path}' is not divided into splits: expected split=None, or a folder named '{split}' in it, "
            f"received split='{split}'."
        )
    for name in splits:
        if canonical is not None and canonical_split(str(name)) == canonical:
            return name
    if canonical == "validation" and "test" in splits:
        return "test"
    names = [*map(str, splits), *SPLITS]
    near = difflib.get_close_matches(split, names, 1) if canonical is None else []
    suggestion = f" Did you mean '{near[0]}'?" if near else ""
    missing = (
        f" Put {_TARS[canonical]} there." if canonical in _TARS and splits.keys() <= _TARS.keys() else ""
    )
    raise SourceError(f"No split '{split}' in '{path}'.{suggestion} Known: {known}.{missing}")


def canonical_split(name: str) -> str | None:
    """Returns "train", "validation" or "test" for a split's name or one it goes by, else None."""
    return next((split for split, names in SPLITS.items() if name in names), None)


def _list_folder(path: str) -> tuple[list[str], list[str]]:
    """Returns the sorted names of the folders and images in a folder; links count as what they lead to."""
    folders, images = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif _is_image(entry.name):
                images.append(entry.name)
    return sorted(folders), sorted(images)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _images_below(folder: str) -> list[str]:
    """Returns the sorted paths of the images at any depth below a folder."""

    def stop(error: OSError) -> None:
        raise error  # os.walk would skip a folder it cannot list

    images = []
    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [os.path.join(parent, name) for name in names if _is_image(name)]
    return sorted(images)


def _find_tfds(path: str) -> str | None:
    """Returns the folder of the newest version of the one set of TensorFlow Datasets at a path, if any."""
    found = list(_tfds_folders(path, 3))
    sets = sorted(
        {
            os.path.dirname(os.path.abspath(folder))
            for folder in found
            if os.path.abspath(folder) != os.path.abspath(path)
        }
    )
    if len(sets) > 1:
        raise SourceError(
            f"'{path}' holds {len(sets)} prepared sets: pass the folder of one: {', '.join(sets)}."
        )
    return max(found, key=_version, default=None)


def _tfds_folders(path: str, depth: int) -> Iterator[str]:
    # Sets of Hugging Face have the first file as well.
    if all(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "features.json")):
        yield path
    elif depth:
        folders = []
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_image(entry.name):
                    return  # a class folder; TensorFlow Datasets keeps no images as files
                if entry.is_dir() and not entry.name.startswith((".", "incomplete")):
                    folders.append(entry.path)
        for folder in folders:
            yield from _tfds_folders(folder, depth - 1)


def _version(folder: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", os.path.basename(folder)))


def _find_shards(path: str) -> dict[str | None, list[str]]:
    """Returns the TFRecord files of a folder by the split that is part of their names."""
    shards: dict[str | None, list[str]] = {}
    counts: dict[str | None, set[str]] = {}
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    for name in names:
        match = _SHARD_NAME.fullmatch(name)
        if match is None and not name.endswith((".tfrecord", ".tfrecords")):
            continue
        parts = re.split(r"[-_.]", name)
        split = next((part for part in parts if canonical_split(part)), match["split"] if match else None)
        shards.setdefault(split, []).append(os.path.join(path, name))
        if match:
            counts.setdefault(split, set()).add(match["count"])
    for split, totals in counts.items():
        if len(totals) > 1 or len(shards[split]) != int(max(totals)):
            raise SourceError(
                f"Expected all of the {' or '.join(sorted(totals))} TFRecord files of split '{split}' in "
                f"'{path}', received {len(shards[split])}. Copy the missing ones."
            )
    if None in shards and len(shards) > 1:
        raise SourceError(
            f"Expected a split in the name of every TFRecord file of '{path}', received none in "
            f"'{os.path.basename(shards[None][0])}'. Pass a pattern that fits one split."
        )
    return shards


def _read_json(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise SourceError(
            f"Expected JSON in '{path}', which is damaged: {error}. Prepare the set again."
        ) from error


class _Columns:
    """An index that grows by one example at a time."""

    def __init__(self) -> None:
        self.file_numbers = array.array("i")
        self.offsets = array.array("q")
        self.lengths = array.array("q")
        self.labels = array.array("q")
        self.name_text = bytearray()
        self.name_ends = array.array("q")

    def add(self, file_number: int, offset: int, length: int, label: int, name: str) -> None:
        self.file_numbers.append(file_number)
        self.offsets.append(offset)
        self.lengths.append(length)
        self.labels.append(label)
        self.name_text += name.encode("utf-8", "surrogateescape")
        self.name_ends.append(len(self.name_text))

    def source(self, path: str, kind: str, files: list[str], classes: list[str]) -> Source:
        return Source(
            path=path,
            kind=kind,
            files=files,
            file_numbers=np.array(self.file_numbers, np.int32),
            offsets=np.array(self.offsets, np.int64),
            lengths=np.array(self.lengths, np.int64),
            labels=np.array(self.labels, np.int32),
            classes=classes,
            name_text=np.frombuffer(bytes(self.name_text), np.uint8),
            name_ends=np.array(self.name_ends, np.int64),
        )


def _open_folder(path: str, labels: str | os.PathLike[str] | None) -> Source:
    folders, flat = _list_folder(path)
    is_validation = bool(flat) and not folders and all(_VALIDATION_NAME.fullmatch(name) for name in flat)
    if labels is not None or is_validation:
        files = [os.path.join(path, name) for name in flat] if is_validation else _images_below(path)
        if not files:
            raise SourceError(f"Expected images below the folder '{path}', found none.")
        source = _files_source(path, files, np.zeros(len(files), np.int32), [])
        return _labelled(source, labels)
    if not folders and flat:
        raise SourceError(
            f"Expected one folder a class in '{path}', received {len(flat)} images without folders, such as "
            f"'{flat[0]}'. Move them to folders named by their class, or pass labels, a file with "
            "'file,label' lines."
        )
    images = [_images_below(os.path.join(path, name)) for name in folders]
    if not any(images):
        raise SourceError(
            f"Expected one folder of images a class in '{path}', found {len(folders)} folders and no image. "
            f"Known suffixes: {', '.join(IMAGE_SUFFIXES)}."
        )
    empty = [name for name, found in zip(folders, images, strict=True) if not found]
    if empty:
        raise SourceError(
            f"Expected images in every class folder of '{path}', found none in {len(empty)}: {_some(empty)}. "
            "Remove the folders that are no classes, or add their images."
        )
    classes, numbers = _number_classes(path, folders)
    files = [file for found in images for file in found]
    return _files_source(path, files, np.repeat(numbers, [len(found) for found in images]), classes)


def _number_classes(path: str, folders: list[str]) -> tuple[list[str], list[int]]:
    """Returns the class names, and the class number of each folder."""
    if not all(name.isascii() and name.isdecimal() for name in folders):
        return folders, list(range(len(folders)))
    numbers = [int(name) for name in folders]
    if max(numbers) >= MAX_NUMBERED_CLASSES:
        return folders, list(range(len(folders)))
    if len(set(numbers)) < len(numbers):
        raise SourceError(
            f"Two class folders of '{path}' stand for one number: {_some(folders)}. Rename one."
        )
    classes = [str(number) for number in range(max(numbers) + 1)]
    for name, number in zip(folders, numbers, strict=True):
        classes[number] = name
    return classes, numbers


def _files_source(path: str, files: list[str], labels: np.ndarray, classes: list[str]) -> Source:
    count = len(files)
    return Source(
        path=path,
        kind="folder",
        files=files,
        file_numbers=np.arange(count, dtype=np.int32),
        offsets=np.zeros(count, np.int64),
        lengths=np.full(count, -1, np.int64),
        labels=np.asarray(labels, np.int32),
        classes=classes,
        name_text=np.zeros(0, np.uint8),
        name_ends=np.zeros(0, np.int64),
    )


def _split_of_tar(path: str) -> str:
    """Tells ImageNet's two tars apart by their first member."""
    with open(path, "rb", buffering=0) as file:
        if file.read(2) == b"\x1f\x8b":
            raise SourceError(
                f"Expected an uncompressed tar, but '{path}' is compressed with GZIP. Run gunzip on it."
            )
        for member in _members(file, 0, os.fstat(file.fileno()).st_size, path):
            name = os.path.basename(member.name)
            if name.endswith(".tar"):
                return "train"
            if _VALIDATION_NAME.fullmatch(name):
                return "validation"
            raise SourceError(
                "Expected ILSVRC2012_img_train.tar (a tar of class tars) or ILSVRC2012_img_val.tar, but "
                f"'{path}' begins with '{member.name}'. Unpack other archives and pass the folder."
            )
    raise SourceError(f"Expected images in '{path}', which is an empty archive. Download it again.")


def _members(file: BinaryIO, start: int, end: int, path: str) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of the tar that lies between two bytes of a file, but hidden ones.

    `tarfile` counts from where the file stands, so offsets are those of the whole file. It takes a damaged
    header for the end of the archive: the zeros that end an archive are looked for here.
    """
    again = "Download it again"
    md5 = _TAR_MD5.get(os.path.basename(path))
    again += f" (the MD5 sum of the published file is {md5})." if md5 else "."
    file.seek(start)
    try:
        archive = tarfile.TarFile(fileobj=file)
        for member in archive:
            if member.offset_data + member.size > end:
                raise SourceError(
                    f"Expected '{member.name}' in '{path}' to end at byte "
                    f"{member.offset_data + member.size}, but the archive ends at byte {end}: it is "
                    f"truncated. {again}"
                )
            if member.islnk() or member.issym():
                raise SourceError(f"Expected files in '{path}', received the link '{member.name}'. {again}")
            if member.isreg() and not os.path.basename(member.name).startswith("."):
                yield member
    except tarfile.TarError as error:
        raise SourceError(f"Expected a tar archive at byte {start} of '{path}': {error}. {again}") from error
    file.seek(archive.offset)
    if archive.offset + tarfile.BLOCKSIZE > end or file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise SourceError(
            f"Expected the zeros that end a tar archive at byte {archive.offset} of '{path}', received "
            f"something else: it is truncated or damaged there. {again}"
        )


def _open_tar(path: str, split: str, labels: str | os.PathLike[str] | None) -> Source:
    if split == "train":
        if labels is not None:
            raise SourceError(
                f"Expected labels=None for '{path}', whose class tars are the labels, received '{labels}'."
            )
        return _cached(path, "tar", split, [path], lambda: _scan_train_tar(path))
    return _labelled(_cached(path, "tar", split, [path], lambda: _scan_validation_tar(path)), labels)


def _scan_train_tar(path: str) -> Source:
    columns = _Columns()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        tars = list(_members(file, 0, size, path))
        wrong = [tar.name for tar in tars if not re.fullmatch(r"n\d{8}\.tar", os.path.basename(tar.name))]
        if wrong or not tars:
            raise SourceError(
                f"Expected one tar a class in '{path}', such as n01440764.tar, received "
                f"{_some(wrong) or 'an empty archive'}. Pass ILSVRC2012_img_train.tar as published."
            )
        synsets = [os.path.basename(tar.name).removesuffix(".tar") for tar in tars]
        classes = sorted(set(synsets))
        progress = Progress(f"Indexing {path}", size)
        for synset, tar in zip(synsets, tars, strict=True):
            label, before = classes.index(synset), len(columns.labels)
            for member in _members(file, tar.offset_data, tar.offset_data + tar.size, path):
                name = os.path.basename(member.name)
                if not name.startswith(f"{synset}_"):
                    raise SourceError(
                        f"Expected images named '{synset}_...' in {synset}.tar of '{path}', received "
                        f"'{name}'. Its label would be a guess: pass ILSVRC2012_img_train.tar as published."
                    )
                columns.add(0, member.offset_data, member.size, label, f"{synset}/{name}")
                progress.show(member.offset_data, len(columns.labels))
            if len(columns.labels) == before:
                raise SourceError(
                    f"Expected images in {synset}.tar of '{path}', found none. Download it again."
                )
        progress.close()
    return columns.source(path, "tar", [path], classes)


def _scan_validation_tar(path: str) -> Source:
    columns = _Columns()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        progress = Progress(f"Indexing {path}", size)
        for member in _members(file, 0, size, path):
            columns.add(0, member.offset_data, member.size, 0, os.path.basename(member.name))
            progress.show(member.offset_data, len(columns.labels))
        progress.close()
    if not columns.labels:
        raise SourceError(f"Expected images in '{path}', which is an empty archive. Download it again.")
    return columns.source(path, "tar", [path], [])


def _validation_number(name: str, count: int, labels: str | os.PathLike[str]) -> int:
    """Returns the number in the name of a validation image, 1 to `count`."""
    match = _VALIDATION_NAME.fullmatch(os.path.basename(name))
    if match is None:
        raise SourceError(
            f"Expected an image named ILSVRC2012_val_00000001.JPEG or the like, received '{name}'."
        )
    number = int(match[1])
    if not 1 <= number <= count:
        raise SourceError(
            f"Expected image numbers from 1 to {count}, which is how many labels '{labels}' has, received "
            f"'{name}'."
        )
    return number


def _published_validation_labels() -> tuple[list[str], str]:
    """Returns the WordNet id of each validation image in the order of their numbers, and the file."""
    package = importlib.util.find_spec("tensorflow_datasets")
    folders = package.submodule_search_locations if package is not None else None
    for folder in folders or ():
        path = os.path.join(folder, "datasets", "imagenet2012", "validation_labels.txt")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return file.read().split(), path
    raise SourceError(
        "Expected the labels of ImageNet's validation images, which the package tensorflow-datasets "
        "carries, but it is not installed. Run pip install 'keras-convnext[data]', or pass labels."
    )


def _labelled(source: Source, path: str | os.PathLike[str] | None) -> Source:
    """Returns a source with labels from a label file or, for validation images, the published ones."""
    names = [source.name(number) for number in range(len(source))]
    is_validation = all(_VALIDATION_NAME.fullmatch(os.path.basename(name)) for name in names)
    if path is None:
        by_number, origin = _published_validation_labels()
        values = [by_number[_validation_number(name, len(by_number), origin) - 1] for name in names]
    else:
        values = _labels_from_file(path, names, is_validation)
    if all(value.isascii() and value.isdecimal() for value in values):
        numbers = [int(value) for value in values]
        if is_validation and max(numbers) >= 1000:
            raise SourceError(
                f"Expected class numbers from 0 to 999 in '{path}', received {max(numbers)}. The numbers of "
                "ImageNet's development kit (1 to 1000) are in another order: pass WordNet ids."
            )
        if max(numbers) >= MAX_NUMBERED_CLASSES:
            raise SourceError(
                f"Expected class numbers below {MAX_NUMBERED_CLASSES} in '{path}', received {max(numbers)}."
            )
        classes = class_names.synset_ids(1000) if is_validation else [str(n) for n in range(max(numbers) + 1)]
    else:
        known = set(class_names.synset_ids(1000))
        classes = sorted(known if is_validation and known.issuperset(values) else set(values))
        positions = {name: number for number, name in enumerate(classes)}
        numbers = [positions[value] for value in values]
    return dataclasses.replace(source, labels=np.array(numbers, np.int32), classes=classes)


def _labels_from_file(path: str | os.PathLike[str], names: list[str], is_validation: bool) -> list[str]:
    """Returns the label of each name, as it is written in a label file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = [line for line in file.read().splitlines() if line.strip()]
    if not lines:
        raise SourceError(f"Expected labels in '{path}', which is empty.")
    if "\t" in lines[0] or "," in lines[0]:
        rows = list(csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ","))
    else:
        rows = [line.strip().rsplit(maxsplit=1) for line in lines]
    if all(len(row) == 1 for row in rows):
        if not is_validation:
            raise SourceError(
                f"Expected lines 'file,label' in '{path}', received one word a line. Only ImageNet's "
                "validation images have numbers that order such labels."
            )
        if len(rows) not in (len(names), 50_000):
            raise SourceError(
                f"Expected a line for each of {len(names)} images in '{path}', received {len(rows)} lines."
            )
        return [rows[_validation_number(name, len(rows), path) - 1][0].strip() for name in names]
    short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
    if short is not None:
        raise SourceError(
            f"Expected 'file,label' in line {short} of '{path}', received {rows[short - 1][0]!r}."
        )
    if not _is_image(os.path.basename(rows[0][0].strip())):
        rows = rows[1:]  # the header
    given = {row[0].strip().removeprefix("./"): row[1].strip() for row in rows}
    # A list names its files from the folder, or by their last part.
    labels = [given.get(name, given.get(os.path.basename(name))) for name in names]
    missing = [name for name, label in zip(names, labels, strict=True) if label is None]
    if missing:
        raise SourceError(
            f"Expected a label for every image, but '{path}' has none for {len(missing)}: {_some(missing)}."
        )
    unknown = sorted(given.keys() - set(names) - set(map(os.path.basename, names)))
    if unknown:
        raise SourceError(
            f"'{path}' has labels for {len(unknown)} files that are not there: {_some(unknown)}."
        )
    return [label for label in labels if label is not None]


def _open_tfds(folder: str, split: str) -> Source:
    info = _read_json(folder, "dataset_info.json")
    format_name = info.get("fileFormat", "tfrecord")
    if format_name != "tfrecord":
        raise SourceError(
            f"Expected the files of '{folder}' to be tfrecord, received {format_name}, whose records are "
            "compressed, so that images have no place in the file. Run tfds convert_format "
            "--dataset_version_dir FOLDER --out_file_format tfrecord --out_dir OTHER, or build it with "
            "file_format='tfrecord'."
        )
    entry = next(item for item in info["splits"] if item["name"] == split)
    counts = [int(length) for length in entry["shardLengths"]]
    template = entry.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    files = []
    for number in range(len(counts)):
        parts = {
            "DATASET": info["name"],
            "SPLIT": split,
            "FILEFORMAT": format_name,
            "SHARD_X_OF_Y": f"{number:05d}-of-{len(counts):05d}",
            "SHARD_INDEX": f"{number:05d}",
            "NUM_SHARDS": f"{len(counts):05d}",
        }
        name = template
        for part, value in parts.items():
            name = name.replace(f"{{{part}}}", value)
        files.append(os.path.join(folder, name))
    missing = [os.path.basename(file) for file in files if not os.path.exists(file)]
    if missing:
        raise SourceError(
            f"Expected {len(files)} files of split '{split}' in '{folder}', missing: {_some(missing)}."
        )
    image, label, name = _tfds_features(folder)
    classes = _tfds_classes(folder, label)
    source = _cached(
        folder, "tfds", split, files, lambda: _scan_records(folder, "tfds", files, image, label, name)
    )
    found = np.bincount(source.file_numbers, minlength=len(files)).tolist()
    if found != counts:
        number = next(number for number in range(len(files)) if found[number] != counts[number])
        raise SourceError(
            f"Expected {counts[number]} records in '{files[number]}', received {found[number]}. Prepare the "
            "set again."
        )
    _check_labels(source, len(classes))
    return dataclasses.replace(source, classes=classes)


def _tfds_features(folder: str) -> tuple[str, str, str | None]:
    """Returns the names of the image, the label and, if there is one, the file name."""
    features = _read_json(folder, "features.json").get("featuresDict", {}).get("features", {})
    kinds = {
        name: feature.get("pythonClassName", "").rpartition(".")[2] for name, feature in features.items()
    }
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    # ImageNet-ReaL and its kin carry the label of ILSVRC2012 beside lists of others.
    label = next((name for name in ("label", "original_label", *labels) if name in labels), None)
    if label is None or len(images) != 1 or (len(labels) > 1 and label not in ("label", "original_label")):
        raise SourceError(
            f"Expected one Image and one ClassLabel in '{folder}', received "
            f"{', '.join(f'{name} ({kind})' for name, kind in kinds.items())}. Only classification sets can "
            "be read."
        )
    names = [name for name in ("file_name", "filename", "image/filename") if kinds.get(name) == "Text"]
    return images[0], label, names[0] if names else None


def _tfds_classes(folder: str, label: str) -> list[str]:
    path = os.path.join(folder, f"{label}.labels.txt")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    feature = _read_json(folder, "features.json")["featuresDict"]["features"][label]
    return [str(number) for number in range(int(feature["classLabel"]["numClasses"]))]


def _open_records(path: str, files: list[str], first_label: int | None) -> Source:
    """Opens TFRecords that nothing describes."""
    source = _cached(path, "tfrecord", "", files, lambda: _scan_records(path, "tfrecord", files))
    if source.classes:  # the records have image/class/synset
        return source
    labels = source.labels
    low, high = int(labels.min()), int(labels.max())
    _check_labels(source, high + 1)
    if first_label is None:
        if low == 1 and high != 1000:
            raise SourceError(
                f"The labels of '{path}' run from 1 to {high}: expected first_label=1 if class numbers begin "
                "at 1 there, or first_label=0 if the class 0 has no images, received None."
            )
        first_label = low if low == 1 else 0
    if first_label not in (0, 1) or low < first_label:
        raise SourceError(
            f"Expected first_label=0 for '{path}', whose labels begin at {low}, received {first_label}."
        )
    is_imagenet = (low, high, first_label) == (1, 1000, 1)
    classes = class_names.synset_ids(1000) if is_imagenet else [str(n) for n in range(high - first_label + 1)]
    return dataclasses.replace(source, labels=labels - np.int32(first_label), classes=classes)


def _examples(files: list[str]) -> Iterator[tuple[int, str, mmap.mmap, dict[str, list[Range] | list[int]]]]:
    """Yields number and path of the file, the mapped file and the features of every record."""
    for number, path in enumerate(files):
        if not os.path.getsize(path):
            continue  # cannot be mapped
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if hasattr(content, "madvise"):
                content.madvise(mmap.MADV_RANDOM)  # only headers are read: nothing ahead of them is needed
            for start, length in find_records(content, path):
                yield number, path, content, parse_example(content, start, length, path)


def _values(features: dict, name: str, path: str) -> list:
    if name not in features:
        raise SourceError(
            f"Expected the feature '{name}' in every record of '{path}', received "
            f"{', '.join(sorted(features))}."
        )
    return features[name]


def _scan_records(
    path: str,
    kind: str,
    files: list[str],
    image: str | None = None,
    label: str | None = None,
    name: str | None = None,
) -> Source:
    """Indexes TFRecords; without names of features, those in common use are looked for in each record.

    Classes are given where records have "image/class/synset".
    """
    columns = _Columns()
    synsets: dict[str, int] = {}
    sizes = np.cumsum([0, *map(os.path.getsize, files)])
    progress = Progress(f"Indexing {path}", int(sizes[-1]))
    for number, file, content, features in _examples(files):
        has_synset = image is None and "image/class/synset" in features
        image_name = image or ("image/encoded" if "image/encoded" in features else "image")
        label_name = label or ("image/class/label" if "image/class/label" in features else "label")
        text_name = name or ("image/filename" if "image/filename" in features else "file_name")
        start, length = _one(_values(features, image_name, file), tuple, image_name, file)
        value = _one(_values(features, label_name, file), int, label_name, file)
        if columns.labels and has_synset != bool(synsets):
            raise SourceError(
                f"Expected the feature 'image/class/synset' in every record of '{path}', or in none."
            )
        if has_synset:
            first, size = _one(features["image/class/synset"], tuple, "image/class/synset", file)
            value = synsets.setdefault(content[first : first + size].decode("utf-8"), len(synsets))
        if not -1 <= value < 1 << 31:
            raise SourceError(f"Expected labels from 0 to {2**31 - 1} in '{file}', received {value}.")
        text = f"{os.path.basename(file)}@{start}"
        if text_name in features:
            first, size = _one(features[text_name], tuple, text_name, file)
            text = content[first : first + size].decode("utf-8", "surrogateescape")
        columns.add(number, start, length, value, text)
        progress.show(int(sizes[number]) + start, len(columns.labels))
    progress.close()
    if not columns.labels:
        raise SourceError(f"Expected images in '{path}', found no record in {len(files)} files.")
    classes = sorted(synsets)
    source = columns.source(path, kind, files, classes)
    if not classes:
        return source
    positions = np.array([classes.index(synset) for synset in synsets], np.int32)
    return dataclasses.replace(source, labels=positions[source.labels])


def _one(values: list, kind: type, name: str, path: str) -> Any:
    if len(values) != 1 or not isinstance(values[0], kind):
        wanted = "an integer" if kind is int else "bytes"
        raise SourceError(
            f"Expected one value, {wanted}, for '{name}' in every record of '{path}', received {len(values)}."
        )
    return values[0]


def _check_labels(source: Source, count: int) -> None:
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


def _with_classes(source: Source, classes: list[str]) -> Source:
    """Returns a source whose labels are positions in another list of class names."""
    present = np.unique(source.labels)
    positions = {name: number for number, name in enumerate(classes)}
    unknown = [source.classes[number] for number in present if source.classes[number] not in positions]
    are_numbers = all(name.isdecimal() and int(name) == n for n, name in enumerate(source.classes))
    if unknown and are_numbers and len(source.classes) <= len(classes):
        return dataclasses.replace(source, classes=classes)
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, 1)
        suggestion = f" Near '{unknown[0]}' is '{near[0]}'." if near else ""
        raise SourceError(
            f"Expected the classes of '{source.path}' among the {len(classes)} given, such as "
            f"{_some(classes)}; {len(unknown)} are not: {_some(unknown)}.{suggestion}"
        )
    numbers = np.full(len(source.classes), -1, np.int32)
    numbers[present] = [positions[source.classes[number]] for number in present]
    return dataclasses.replace(source, labels=numbers[source.labels], classes=classes)


def read_manifest(folder: str) -> dict:
    """Reads the manifest of a folder that `prepare` wrote.

    Raises:
        SourceError: it is damaged or of another version.
    """
    manifest = _read_json(folder, MANIFEST)
    if manifest.get("format") != "keras_convnext" or manifest.get("version") != INDEX_VERSION:
        raise SourceError(
            "Expected a folder written by this version of prepare (format keras_convnext, version "
            f"{INDEX_VERSION}), but '{folder}' has format {manifest.get('format')!r}, version "
            f"{manifest.get('version')!r}. Prepare it again into another folder."
        )
    return manifest


def _open_prepared(folder: str, split: str) -> Source:
    entry = read_manifest(folder)["splits"][split]
    for shard in [*entry["shards"], entry["index"]]:
        path = os.path.join(folder, shard["name"])
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != shard["size"]:
            raise SourceError(
                f"Expected {shard['size']} bytes in '{path}', received {size}. Run prepare again: it writes "
                "what is missing."
            )
    files = [os.path.join(folder, shard["name"]) for shard in entry["shards"]]
    return read_index(os.path.join(folder, entry["index"]["name"]), folder, "prepared", files)


def write_index(path: str, source: Source, stamp: str = "") -> None:
    """Writes all of a source but its paths to an .npz file, in one step.

    Args:
        path: the file.
        source: the source.
        stamp: text that `read_index` compares, such as a hash of what was indexed.
    """
    texts = {"stamp": stamp, "classes": json.dumps(source.classes)}
    arrays = {name: np.frombuffer(text.encode("utf-8"), np.uint8) for name, text in texts.items()}
    arrays |= {name: getattr(source, name) for name in _ARRAYS}
    with replacing_file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_index(path: str, source_path: str, kind: str, files: list[str], stamp: str = "") -> Source:
    """Reads what `write_index` wrote.

    Raises:
        SourceError: the file is damaged or has another stamp.
        FileNotFoundError: it is not there.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in _ARRAYS}
            found = content["stamp"].tobytes().decode("utf-8")
            classes = json.loads(content["classes"].tobytes())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(
            f"Expected an index in '{path}', which is damaged: {error}. Make it again."
        ) from error
    if found != stamp:
        raise SourceError(
            f"Expected the stamp {stamp!r} in the index '{path}', received {found!r}. Make it again."
        )
    return Source(path=source_path, kind=kind, files=files, classes=classes, **arrays)


def _cached(path: str, kind: str, split: str, files: list[str], scan: Callable[[], Source]) -> Source:
    """Returns what `scan` finds in some files, from the cache when they have not changed."""
    paths = [os.path.abspath(file) for file in files]
    states = [os.stat(path) for path in paths]
    if sum(state.st_size for state in states) < CACHED_BYTES:
        return scan()
    folder = os.environ.get("KERAS_CONVNEXT_INDEX_CACHE") or os.path.join(
        os.path.expanduser("~"), ".cache", "keras_convnext", "index"
    )
    index = os.path.join(folder, f"{_digest([INDEX_VERSION, kind, split, paths])[:32]}.npz")
    stamp = _digest([[state.st_size, state.st_mtime_ns] for state in states])
    try:
        cached = read_index(index, path, kind, files, stamp)
    except (OSError, SourceError):
        cached = None
    if cached is not None:
        return cached
    source = scan()
    try:
        os.makedirs(folder, exist_ok=True)
        write_index(index, source, stamp)
    except OSError as error:
        print(
            f"The index of '{files[0]}' is not kept, and will be made again: '{folder}' cannot be written "
            f"({error.strerror}). Set KERAS_CONVNEXT_INDEX_CACHE to a folder that can.",
            file=sys.stderr,
        )
    return source


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()


def _some(names: Sequence[str]) -> str:
    """Lists the first names of many."""
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


class Progress:
    """One line on stderr, rewritten as work goes on; nothing when nobody watches."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self.title = title
        self.total_bytes = total_bytes
        self.begin = self.shown = time.monotonic()
        self.is_watched = sys.stderr.isatty() and not is_set("KERAS_CONVNEXT_QUIET")

    def show(self, done_bytes: int, images: int) -> None:
        now = time.monotonic()
        if not self.is_watched or now - self.shown < 0.5:
            return
        self.shown = now
        seconds = now - self.begin
        left = seconds * (self.total_bytes / max(done_bytes, 1) - 1)
        print(
            f"\r{self.title}: {done_bytes / max(self.total_bytes, 1):4.0%}, {images} images, "
            f"{images / seconds:.0f} images/s, {done_bytes / seconds / 1e6:.0f} MB/s, {left / 60:.0f} min "
            "left \033[K",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self.is_watched and self.shown > self.begin:
            print(file=sys.stderr)
