"""Opens a data set of any layout as one index of byte ranges.

`open_source` lists the images under a path without decoding, unpacking or copying them. Each example is a
file, a first byte, a number of bytes and a label, so that a pipeline reads any example at random.
Only NumPy and the standard library are used; neither TensorFlow nor TensorFlow Datasets is imported.
"""

import dataclasses
import glob
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from keras_convnext._messages import near_names
from keras_convnext.data.imagenet import TARS, VALIDATION_NAME, open_tar, split_of_tar, with_labels
from keras_convnext.data.index import (
    MANIFEST,
    MAX_NUMBERED_CLASSES,
    Source,
    SourceError,
    first_few,
    is_image,
    with_classes,
)
from keras_convnext.data.preprocess import IMAGE_SUFFIXES
from keras_convnext.data.records import open_prepared, open_records, open_tfds, read_manifest, tfds_splits

# The splits and the other names they go by. What was asked first is looked for first.
SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test",)}

_SHARD_NAME = re.compile(
    r"(?P<split>.*?)[-.]?(?:tfrecords?-)?(?P<number>\d{5})-of-(?P<count>\d{5})(?:\.tfrecords?)?"
)


def open_source(
    path: str | os.PathLike[str],
    split: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    first_label: int | None = None,
) -> Source:
    """Indexes the images of one split of a data set.

    What is at the path, a local folder or file or a pattern of TFRecord files, decides; the first that fits
    is taken:

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
    two of them are. Hidden files and files without an image suffix are ignored.

    The index of tars and TFRecords above 1 GB is kept in "~/.cache/keras_convnext/index", or the folder named
    by KERAS_CONVNEXT_INDEX_CACHE, and made again when size or time of a file change.

    Args:
        split: "train", "validation" or "test", another name that these go by ("val", "valid", "training"),
            or one the set uses. "validation" takes the test split where that is the only one for evaluation,
            as in ImageNetV2. Default: the only split.
        classes: the class names in the order of the labels that are wanted, such as those of the training
            split. Some may be without images. Where the source has numbers for names, they count here.
        labels: label file for a flat folder or for ImageNet's validation images: CSV ("file,label", further
            columns ignored, a header is recognised), lines "file label", or for ImageNet's validation images
            one label a line in the order of their numbers. Labels are class names, or numbers from 0.
            Default for ImageNet's validation images: what the package tensorflow-datasets carries.
        first_label: 0 or 1, the number of the first class in plain TFRecords without "image/class/synset".
            Default: 1 when labels run from exactly 1 to 1000 (0 being the background, as in TensorFlow's
            build_imagenet_data.py), else 0; where no label is 0 otherwise, it must be given.

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
        source = open_prepared(path, str(name))
    elif kind == "tar":
        source = open_tar(places[0], str(name), labels)
    elif kind == "tfds":
        source = open_tfds(places[0], str(name))
    elif kind == "tfrecord":
        source = open_records(path, places, first_label)
    else:
        source = _open_folder(places[0], labels)
    return source if classes is None else with_classes(source, list(classes))


def list_splits(path: str | os.PathLike[str]) -> list[str]:
    """Lists the splits at a path under the names they have there; empty when it is not divided."""
    return [name for name in _locate(os.fspath(path))[1] if name is not None]


def canonical_split(name: str) -> str | None:
    """Returns "train", "validation" or "test" for a split's name or one it goes by, else None."""
    return next((split for split, names in SPLITS.items() if name in names), None)


def check_outside(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Refuses an output in a folder of class folders, which would be taken for a class the next time."""
    kind, splits = _locate(os.fspath(path)) if os.path.isdir(path) else ("", {})
    roots = [path] if len(splits) < 2 else [folder for places in splits.values() for folder in places]
    for root in roots if kind == "folder" else ():
        inside = os.path.relpath(os.path.realpath(output), os.path.realpath(root))
        if not any(name.startswith(".") for name in inside.split(os.sep)):  # neither above nor hidden
            raise SourceError(
                f"Expected an output outside of the images in '{root}', received '{output}', which would be "
                "taken for a part of them. Pass another path."
            )


def take(source: Source, numbers: Sequence[int] | np.ndarray) -> Source:
    """Returns a source with the examples at some places, in that order, under the same names and classes."""
    chosen = np.asarray(numbers, np.int64)
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
    of its images alone: neither on the order of the examples nor on other classes. Both sources are in the
    order of `source` and have all its `classes`.

    Raises ValueError where `fraction` is not in (0, 1) or `seed` is not a whole number, and SourceError where
    no class has two images.
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
    is_held_out = np.zeros(len(source), bool)
    for label in np.unique(source.labels).tolist():
        members = np.flatnonzero(source.labels == label).tolist()
        count = min(max(math.floor(fraction * len(members) + 0.5), 1), len(members) - 1)
        prefix = f"{int(seed)}\0{source.classes[label]}\0"
        keys = {}
        for number in members:
            text = prefix + source.name(number)
            keys[number] = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        is_held_out[sorted(members, key=keys.__getitem__)[:count]] = True
    if not is_held_out.any():
        raise SourceError(
            f"Expected a class with two images or more in '{source.path}', to hold one out, received "
            f"{len(source)} images of {len(np.unique(source.labels))} classes. Add images, or pass a "
            "validation split."
        )
    return is_held_out


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
        return "tar", {split_of_tar(path): [path]}
    if os.path.exists(os.path.join(path, MANIFEST)):
        return "prepared", {name: [path] for name in read_manifest(path)["splits"]}
    tars: dict[str | None, list[str]] = {
        split: [file] for split, name in TARS.items() if os.path.exists(file := os.path.join(path, name))
    }
    if tars:
        return "tar", tars
    folder = _find_tfds(path)
    if folder is not None:
        return "tfds", {name: [folder] for name in tfds_splits(folder)}
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
    near = near_names(split, [*map(str, splits), *SPLITS], 1) if canonical is None else ""
    missing = f" Put {TARS[canonical]} there." if canonical in TARS and splits.keys() <= TARS.keys() else ""
    raise SourceError(f"No split '{split}' in '{path}'.{near} Known: {known}.{missing}")


def _list_folder(path: str) -> tuple[list[str], list[str]]:
    """Returns the sorted names of the folders and images in a folder; links count as what they lead to."""
    folders, images = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif is_image(entry.name):
                images.append(entry.name)
    return sorted(folders), sorted(images)


def _images_below(folder: str) -> list[str]:
    """Returns the sorted paths of the images at any depth below a folder."""

    def stop(error: OSError) -> None:
        raise error  # os.walk would skip a folder it cannot list

    images = []
    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [os.path.join(parent, name) for name in names if is_image(name)]
    return sorted(images)


def _find_tfds(path: str) -> str | None:
    """Returns the folder of the newest version of the one set of TensorFlow Datasets at a path, if any."""
    found = list(_tfds_folders(path, 3))
    below = {os.path.abspath(folder) for folder in found} - {os.path.abspath(path)}
    sets = sorted(set(map(os.path.dirname, below)))
    if len(sets) > 1:
        raise SourceError(
            f"'{path}' holds {len(sets)} prepared sets: pass the folder of one: {', '.join(sets)}."
        )
    versions = {
        folder: [int(part) for part in re.findall(r"\d+", os.path.basename(folder))] for folder in found
    }
    return max(found, key=versions.__getitem__, default=None)


def _tfds_folders(path: str, depth: int) -> Iterator[str]:
    # Sets of Hugging Face have the first file as well.
    if all(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "features.json")):
        yield path
    elif depth:
        folders = []
        with os.scandir(path) as entries:
            for entry in entries:
                if is_image(entry.name):
                    return  # a class folder; TensorFlow Datasets keeps no images as files
                if entry.is_dir() and not entry.name.startswith((".", "incomplete")):
                    folders.append(entry.path)
        for folder in folders:
            yield from _tfds_folders(folder, depth - 1)


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


def _open_folder(path: str, labels: str | os.PathLike[str] | None) -> Source:
    folders, flat = _list_folder(path)
    is_validation = bool(flat) and not folders and all(VALIDATION_NAME.fullmatch(name) for name in flat)
    if labels is not None or is_validation:
        files = [os.path.join(path, name) for name in flat] if is_validation else _images_below(path)
        if not files:
            raise SourceError(f"Expected images below the folder '{path}', found none.")
        source = _files_source(path, files, np.zeros(len(files), np.int32), [])
        return with_labels(source, labels)
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
            f"Expected images in every class folder of '{path}', found none in {len(empty)}: "
            f"{first_few(empty)}. Remove the folders that are no classes, or add their images."
        )
    classes, numbers = _number_classes(path, folders)
    files = [file for found in images for file in found]
    return _files_source(path, files, np.repeat(numbers, [len(found) for found in images]), classes)


def _number_classes(path: str, folders: list[str]) -> tuple[list[str], list[int]]:
    """Returns the class names, and the class number of each folder."""
    numbers = [int(name) for name in folders if name.isascii() and name.isdecimal()]
    if len(numbers) < len(folders) or max(numbers) >= MAX_NUMBERED_CLASSES:
        return folders, list(range(len(folders)))
    if len(set(numbers)) < len(numbers):
        raise SourceError(
            f"Two class folders of '{path}' stand for one number: {first_few(folders)}. Rename one."
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
