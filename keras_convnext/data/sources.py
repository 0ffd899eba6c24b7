"""Opens a data set of any layout as one index of byte ranges, without decoding, unpacking or copying.

Only NumPy and the standard library are used; neither TensorFlow nor TensorFlow Datasets is imported.
"""

import collections
import dataclasses
import glob
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from keras_convnext._files import StrPath, regular_size
from keras_convnext._messages import near_names
from keras_convnext._terminal import say_once
from keras_convnext.data import imagenet, index, records
from keras_convnext.data.imagenet import TARS, are_validation
from keras_convnext.data.index import Source, SourceError, first_few, images_below, list_folder

# The splits and the other words they go by, in any case and beside words that say nothing: "TestSet".
SPLITS = {
    "train": ("train", "training", "trn", "trainval"),
    "validation": ("validation", "val", "valid", "validate", "validating", "eval", "evaluation", "dev"),
    "test": ("test", "testing", "tests", "tst"),
}
_EMPTY = r"(?:(?:data)?sets?|data|splits?|folders?|images?|imgs?|pictures?|photos?)"
_SPLITS_TEXT = "|".join(f"(?P<{split}>{'|'.join(words)})" for split, words in SPLITS.items())
_SPLIT_IN_NAME = re.compile(r"train|val|test", re.IGNORECASE)
_SPLIT_WORD = re.compile(f"{_EMPTY}?(?:{_SPLITS_TEXT}){_EMPTY}?")

_SHARD_NAME = re.compile(
    r"(?P<split>.*?)[-.]?(?:tfrecords?-)?(?P<number>\d{5})-of-(?P<count>\d{5})(?:\.tfrecords?)?"
)


def open_source(
    path: StrPath,
    split: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    labels: StrPath | None = None,
    first_label: int | None = None,
) -> Source:
    """Indexes the images of one split of a data set.

    "tfds:imagenet2012" or "tfds:NAME/CONFIGURATION:VERSION" means that set where TensorFlow Datasets prepares
    it: below the folder TFDS_DATA_DIR, by default ~/tensorflow_datasets. Else what is at the path, a local
    folder or file or a pattern of TFRecord files, decides; the first that fits:

    - `manifest.json`: a folder that `prepare` wrote. Classes as in the source it was made from.
    - ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar or a folder with one or both: ImageNet as published,
      read without unpacking. Classes: WordNet ids.
    - `dataset_info.json`, in the folder or up to three levels below it (name, configuration, version; the
      newest version is taken): a set that TensorFlow Datasets prepared as tfrecord or array_record, with one
      image and one class an example: ImageNet, its V2, A, R, Sketch, ReaL and subsets, and others. Classes:
      its label file.
    - files `*.tfrecord` or `*-00000-of-00128`, in a folder or by a pattern such as "x/train*": records of
      tf.train.Example with "image/encoded" and "image/class/label", or "image" and "label". Classes:
      "image/class/synset" where records have it, else numbers.
    - folders: one folder a class, images at any depth in it. Classes: names of the folders, sorted; if
      these are the numbers 0 to n - 1, the number is the label (ImageNetV2 as published).
    - files ILSVRC2012_val_*.JPEG: ImageNet's validation images, unpacked. Classes: WordNet ids.
    - other images, with `labels`: a flat folder. Classes: from the label file.

    A folder is divided into splits when all its folders, or two of them, are named after splits: "train" and
    "val", "Training" and "Testing", "images_train" and "images_dev". Where all folders hold sub-folders of
    the same names, and hardly an image of their own, either could be the classes: refused unless `split` or
    `classes` names the folders. What else lies there is counted in `Source.left_out`.

    The index of tars and TFRecords above 1 GB is kept in "~/.cache/keras_convnext/index", or the folder named
    by KERAS_CONVNEXT_INDEX_CACHE, and made again when size or time of a file change.

    Args:
        split: "train", "validation" or "test", another name that these go by ("val", "dev", "training"), one
            the set uses, or a folder that holds class folders. "validation" takes the test split where that
            is the only one for evaluation, as in ImageNetV2. Default: the only split.
        classes: the class names in the order of the labels that are wanted, such as those of the training
            split. Some may be without images. Where the source has numbers for names, they count here.
        labels: label file for a flat folder or for ImageNet's validation images: CSV ("file,label"; of more
            columns that with the header "label" or the like, or the only one of words), lines "file label",
            or for ImageNet's validation images one label a line in the order of their numbers. Files are
            named by their path from the folder or its end, with or without suffix; labels are names of
            classes, in the order of class folders. Default for ImageNet's validation images: what the
            package tensorflow-datasets carries.
        first_label: 0 or 1, the number of the first class in plain TFRecords without "image/class/synset".
            Default: 1 when labels run from exactly 1 to 1000 (0 being the background, as in TensorFlow's
            build_imagenet_data.py), else 0; where no label is 0 otherwise, it must be given.

    Raises:
        SourceError: nothing usable is at the path, a file is missing or damaged, a class has no images, a
            label is missing, contradicted or out of range, or the split is unknown or could be several.
        RecordError: a TFRecord file is compressed, damaged or truncated.
    """
    path = located(path)
    kind, splits = locate(path)
    folders, images = list_folder(path)[:2] if kind == "folder" else ([], [])
    if None in splits and split in folders:
        splits = {split: [os.path.join(path, split)]}
    name = choose_split(path, kind, splits, split)
    places = splits[name]
    if labels is not None and (kind, name) != ("tar", "validation") and kind != "folder":
        own = "whose class tars are the labels" if kind == "tar" else "which has labels of its own"
        raise SourceError(
            f"Expected labels=None for '{path}', {own}, received '{labels}'. Label files are for flat "
            "folders and for ImageNet's validation images."
        )
    if first_label is not None and kind != "tfrecord":
        raise SourceError(
            f"Expected first_label=None, because '{path}' says what its labels mean, received "
            f"first_label={first_label}. It is for plain TFRecords."
        )
    if kind == "prepared":
        source = records.open_prepared(path, str(name))
    elif kind == "tar":
        source = imagenet.open_tar(places[0], str(name), labels)
    elif kind == "tfds":
        source = records.open_tfds(places[0], str(name))
    elif kind == "tfrecord":
        source = records.open_records(path, places, first_label)
    else:
        beside = {place: os.path.relpath(place, path) for other in splits.values() for place in other}
        source = _open_folder(places[0], labels, classes, beside)
        if name is not None:
            others = {"folders and images beside the splits": len(folders) + len(images) - len(splits)}
            left_out = source.left_out + collections.Counter(others)  # a sum leaves zeros out
            source = dataclasses.replace(source, left_out=left_out)
    return source if classes is None else index.with_classes(source, list(classes))


def list_splits(path: StrPath, labels: StrPath | None = None) -> list[str]:
    """Lists the splits at a path under the names they have there; empty when it is not divided.

    Where others have class folders, a folder of images without any, as tests of competitions are, is left out
    and told once, unless there is a file of `labels`.
    """
    kind, splits = locate(located(path))
    names = [name for name in splits if name is not None]
    if kind != "folder" or labels is not None or not names:
        return names
    flat = {}
    for name in names:
        folders, images, _ = list_folder(splits[name][0])
        if images and not folders and not are_validation(images):
            flat[name] = len(images)
    if len(flat) == len(names):
        return names
    for name, count in flat.items():
        say_once(
            f"{path} {name}", f"'{path}': left out '{name}', {count:,} images without class folders or labels"
        )
    return [name for name in names if name not in flat]


def canonical_split(name: str, *, is_whole: bool = False) -> str | None:
    """Returns the "train", "validation" or "test" that a split's name stands for, else None.

    `is_whole`: only where nothing else is in the name, as in "val" and "TestSet", but not in "leaf_val".
    """
    split, others = _split_and_others(name)
    return None if others and is_whole else split


def _split_and_others(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Returns the split in a name, and its other words: "validation" and ("leaf",) for "LeafVal_images2"."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name))
    splits, others = set(), []
    for word in map(str.casefold, words):
        if match := _SPLIT_WORD.fullmatch(word):
            splits.add(match.lastgroup)
        elif not re.fullmatch(_EMPTY, word):
            others.append(word)
    return (splits.pop() if len(splits) == 1 else None), tuple(others)


def check_outside(path: StrPath, output: StrPath) -> None:
    """Refuses an output in a folder of class folders, which would be taken for a class the next time."""
    kind, splits = locate(os.fspath(path)) if os.path.isdir(path) else ("", {})
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
    columns = ("file_numbers", "offsets", "lengths", "labels")
    fields = {name: getattr(source, name)[chosen] for name in columns}
    names = index.name_columns(map(source.name, chosen.tolist()))
    return dataclasses.replace(source, **fields, **names)


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
        texts = [f"{int(seed)}\0{source.classes[label]}\0{source.name(number)}" for number in members]
        digests = [hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in texts]
        chosen = sorted(zip(digests, members, strict=True))[:count]
        is_held_out[[number for _, number in chosen]] = True
    if not is_held_out.any():
        raise SourceError(
            f"Expected a class with two images or more in '{source.path}', to hold one out, received "
            f"{len(source)} images of {len(np.unique(source.labels))} classes. Add images, or pass a "
            "validation split."
        )
    return is_held_out


def located(path: StrPath) -> str:
    """Returns the path of a data set, for "tfds:NAME" that of its prepared folder; SourceError names it."""
    path = os.fspath(path)
    if not path.startswith("tfds:"):
        return path
    name, _, version = path.removeprefix("tfds:").partition(":")
    home = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    folder = os.path.join(os.path.expanduser(home), *filter(None, (*name.split("/"), version)))
    if not name or not os.path.isdir(folder):
        home = os.path.expanduser(home)
        names = os.listdir(home) if os.path.isdir(home) else []
        raise SourceError(
            f"Expected a prepared set in '{folder}', found none.{near_names(name, names, 3)} Run `tfds build "
            f"{name}`, or set TFDS_DATA_DIR to the folder that has it."
        )
    return folder


def locate(path: str) -> tuple[str, dict[str | None, list[str]]]:
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
        return "tar", {imagenet.split_of_tar(path): [path]}
    if not os.path.isdir(path):
        regular_size(path)  # says what else it is
    if records.is_prepared(path):
        return "prepared", {name: [path] for name in records.read_manifest(path)["splits"]}
    tars: dict[str | None, list[str]] = {
        split: [file] for split, name in TARS.items() if os.path.exists(file := os.path.join(path, name))
    }
    if tars:
        return "tar", tars
    folder = _find_tfds(path)
    if folder is not None:
        return "tfds", {name: [folder] for name in records.tfds_splits(folder)}
    folders = list_folder(path)[0]
    shards = _find_shards(path)
    if shards and any(images_below(os.path.join(path, name))[0] for name in folders):
        raise SourceError(
            f"Expected one set in '{path}', received TFRecord files and folders of images: "
            f"{first_few(folders)}. Move one of them, or pass a pattern of the files, such as 'train*'."
        )
    if shards:
        return "tfrecord", shards
    named: dict[str | None, list[str]] = {
        name: [os.path.join(path, name)] for name in _split_folders(path, folders)
    }
    return "folder", named or {None: [path]}


def _split_folders(path: str, folders: list[str]) -> list[str]:
    """Returns the folders that are splits; none where they are classes."""
    groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for name in folders:
        split, others = _split_and_others(name)
        if split is not None:
            groups[others].append(name)
    if groups.get(()) == folders:
        return folders
    # A folder "train" among others is a class, unless there is one for evaluation as well.
    divided = {others: names for others, names in groups.items() if len(set(map(canonical_split, names))) > 1}
    if len(divided) > 1 and () not in divided:
        raise SourceError(
            f"Expected one set in '{path}', received {len(divided)} that are divided into splits: "
            f"{'; '.join(first_few(names) for names in list(divided.values())[:5])}. Pass the folder of one "
            "set. If these names are classes and splits at once, move the images to train/CLASS, test/CLASS."
        )
    return divided.get(()) or next(iter(divided.values()), [])


def choose_split(path: str, kind: str, splits: dict[str | None, list[str]], split: str | None) -> str | None:
    """Returns the name of the split that `split` means there; SourceError says which are known."""
    known = ", ".join(str(name) for name in splits)
    if split is None:
        if len(splits) == 1:
            return next(iter(splits))
        raise SourceError(f"'{path}' has several splits, and split is None. Pass one of: {known}.")
    if split in splits:
        return split
    canonical = canonical_split(split, is_whole=True)
    if None in splits:
        # ".../val" and split="validation" agree.
        folder = os.path.basename(os.path.abspath(path))
        if canonical is not None and canonical_split(folder, is_whole=True) == canonical:
            return None
        raise SourceError(
            f"'{path}' is not divided into splits: expected split=None, or a folder named '{split}' in it, "
            f"received split='{split}'."
        )
    for wanted in (canonical, "test") if canonical == "validation" else (canonical,):
        found = [name for name in map(str, splits) if wanted and canonical_split(name) == wanted]
        if len(found) > 1:
            raise SourceError(
                f"'{path}' has {len(found)} splits that '{split}' could be. Pass one of: {first_few(found)}."
            )
        if found:
            return found[0]
    near = near_names(split, [*map(str, splits), *SPLITS], 1) if canonical is None else ""
    missing = f" Put {TARS[canonical]} there." if canonical in TARS and kind == "tar" else ""
    raise SourceError(f"No split '{split}' in '{path}'.{near} Known: {known}.{missing}")


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
                if index.is_image(entry.name):
                    return  # a class folder; TensorFlow Datasets keeps no images as files
                if index.is_folder(entry) and not entry.name.startswith((".", "incomplete")):
                    folders.append(entry.path)
        for folder in folders:
            yield from _tfds_folders(folder, depth - 1)


def _find_shards(path: str) -> dict[str | None, list[str]]:
    """Returns the TFRecord files of a folder by the split that is part of their names."""
    shards: dict[str | None, list[str]] = collections.defaultdict(list)
    counts: dict[str | None, set[str]] = collections.defaultdict(set)
    for name in sorted(os.listdir(path)):
        match = _SHARD_NAME.fullmatch(name)
        is_shard = match is not None or name.endswith((".tfrecord", ".tfrecords"))
        if name.startswith(".") or not is_shard or not os.path.isfile(os.path.join(path, name)):
            continue
        parts = re.split(r"[-_.]", name)
        split = next((part for part in parts if canonical_split(part)), match["split"] if match else None)
        shards[split].append(os.path.join(path, name))
        if match:
            counts[split].add(match["count"])
    for split, totals in counts.items():
        if len(totals) > 1 or len(shards[split]) != int(max(totals)):
            raise SourceError(
                f"Expected all of the {' or '.join(sorted(totals))} TFRecord files of split '{split}' in "
                f"'{path}', received {len(shards[split])}. Copy the missing ones."
            )
    without = [os.path.basename(file) for file in shards.get(None, ())]
    if without and len(shards) > 1:
        raise SourceError(
            f"Expected a split in the name of every TFRecord file of '{path}', received none in "
            f"'{without[0]}'. Pass a pattern that fits one split."
        )
    words = {word.casefold() for name in without for word in _SPLIT_IN_NAME.findall(name)}
    if len(words) > 1:
        raise SourceError(
            f"Expected one split in the TFRecord files of '{path}', received names with "
            f"{' and '.join(sorted(words))}. Pass a pattern that fits one split, or set '-' around the word."
        )
    return dict(shards)


def _open_folder(
    path: str, labels: StrPath | None, classes: Sequence[str] | None, splits: Mapping[str, str]
) -> Source:
    """Opens class folders, or images with a label file, which may be one of all `splits`: {folder: name}."""
    folders, flat, left_out = list_folder(path)
    if labels is not None or (flat and not folders and are_validation(flat)):
        files, left_out = images_below(path)
        if not files:
            raise SourceError(f"Expected images below the folder '{path}', found none.")
        beside = [
            os.path.join(name, os.path.relpath(file, folder)).replace(os.sep, "/")
            for folder, name in splits.items()
            if folder != path and labels is not None
            for file in images_below(folder)[0]
        ]
        source = files_source(path, files, np.zeros(len(files)), [], left_out)
        return imagenet.with_labels(source, labels, f"{splits[path]}/" if beside else "", beside)
    if not folders and flat:
        raise SourceError(
            f"Expected one folder a class in '{path}', received {len(flat)} images without folders, such as "
            f"'{flat[0]}'. Move them to folders named by their class, or pass labels, a file with "
            "'file,label' lines (to train: `keras-convnext prepare FOLDER OUTPUT --labels FILE` first)."
        )
    images = []
    state = os.stat(path)
    seen = {(state.st_dev, state.st_ino)}  # a folder that is linked to from two classes has one of them
    for name in folders:
        found, others = images_below(os.path.join(path, name), seen)
        images.append(found)
        left_out += others
    if not any(images):
        but = f", but {index.counted(left_out)}" if left_out else ""
        raise SourceError(
            f"Expected one folder of images a class in '{path}', found {len(folders)} folders and no image"
            f"{but}. Known suffixes: {', '.join(index.IMAGE_SUFFIXES)}."
        )
    empty = [name for name, found in zip(folders, images, strict=True) if not found]
    if empty:
        raise SourceError(
            f"Expected images in every class folder of '{path}', found none in {len(empty)}: "
            f"{first_few(empty)}. Remove the folders that are no classes, or add their images."
        )
    if classes is None or not set(folders) <= set(classes):
        _check_depth(path, folders, images)
    left_out += collections.Counter({"images beside the class folders": len(flat)})
    names = index.in_order(folders, path)
    positions = {name: number for number, name in enumerate(names)}
    numbers = np.repeat([positions[name] for name in folders], [len(found) for found in images])
    return files_source(path, [file for found in images for file in found], numbers, names, left_out)


def _check_depth(path: str, folders: list[str], images: list[list[str]]) -> None:
    """Refuses folders that may be splits, domains or views with the class folders below them."""
    if len(folders) == 1:
        inner = os.path.commonpath(images[0])
        names, own = _sub_folders(inner, images[0])
        if len(names) > 1 and 10 * own <= len(images[0]):
            raise SourceError(
                f"Expected folders of classes or splits in '{path}', received the one folder '{folders[0]}' "
                f"around the folders {first_few(sorted(names))}. Pass '{inner}'."
            )
        return
    places = (os.path.join(path, name) for name in folders)
    below, owns = zip(*map(_sub_folders, places, images), strict=True)
    common = sorted(set.intersection(*below))
    # A few images of their own make no classes of folders, and one name for all, as "images", none below.
    if 10 * sum(owns) > sum(map(len, images)) or len(set.union(*below)) < 2 or not common:
        return
    if len(common) == 1 and 2 * len(common) < min(map(len, below)):
        return  # as a patient or a date that two classes share
    raise SourceError(
        f"Expected folders of classes in '{path}', but two readings fit: all {len(folders)} folders "
        f"({first_few(folders)}) hold the sub-folders {first_few(common)}, and hardly an image of their own. "
        "If the sub-folders are the classes, name the folders train, validation and test, or pass one of "
        "them as the split (train_split, val_split). If the folders are the classes, move their images out "
        "of the sub-folders, or write 'file,label' lines and pass them: `keras-convnext prepare FOLDER "
        "OUTPUT --labels FILE`; where these are splits, move them to train/CLASS and test/CLASS."
    )


def _sub_folders(folder: str, images: list[str]) -> tuple[set[str], int]:
    """Returns the names of the folders in a folder, and how many of the images below it lie in none."""
    start = len(os.path.join(folder, ""))
    parts = [image[start:].split(os.sep, 1) for image in images]
    return {part[0] for part in parts if len(part) > 1}, sum(len(part) == 1 for part in parts)


def files_source(
    path: str, files: list[str], labels: np.ndarray, classes: list[str], left_out: collections.Counter[str]
) -> Source:
    """Returns the source of whole files, named by their paths below `path`."""
    numbers = np.arange(len(files), dtype=np.int32)
    offsets, lengths = np.zeros(len(files), np.int64), np.full(len(files), -1, np.int64)
    labels, start = np.asarray(labels, np.int32), len(os.path.join(path, ""))
    names = index.name_columns(file[start:].replace(os.sep, "/") for file in files)
    return Source(
        path, "folder", files, numbers, offsets, lengths, labels, classes, **names, left_out=left_out
    )
