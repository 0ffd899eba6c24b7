"""Data sets of TFRecord files: those that `prepare` writes, those of TensorFlow Datasets, and plain ones."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_convnext._files import json_object, read_bytes, read_text, reading, regular_size
from keras_convnext._messages import shortened
from keras_convnext._terminal import Progress
from keras_convnext.data import array_records, class_names, index
from keras_convnext.data.index import MANIFEST, Found, Source, SourceError, first_few
from keras_convnext.data.tfrecords import Buffer, Features, find_records, parse_example

# Names of the image, the label, the file name and the class in plain records, which may lack the last two.
Names = tuple[Sequence[str], Sequence[str], Sequence[str], Sequence[str]]
_NAMES: Names = (
    ("image/encoded", "image"),
    ("image/class/label", "label"),
    ("image/filename", "file_name"),
    ("image/class/synset",),
)


def open_prepared(folder: str, split: str) -> Source:
    """Opens a split that `prepare` wrote, by its own index."""
    entry = read_manifest(folder)["splits"][split]
    if "maps" in entry:
        raise SourceError(
            f"Expected a classification set in '{folder}', which was prepared with label maps: open it with "
            "keras_convnext.data.segmentation.sources.open_source."
        )
    return _open_index(folder, entry, "index")


def _open_index(folder: str, entry: dict, name: str) -> Source:
    """Opens an index of a split, "index" or "maps", after a check that all its files are there."""
    for shard in _file_records(entry):
        path = os.path.join(folder, shard["name"])
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != shard["size"]:
            raise SourceError(
                f"Expected {shard['size']} bytes in '{path}', received {size}. Run prepare again: it writes "
                "what is missing."
            )
    files = [os.path.join(folder, shard["name"]) for shard in entry["shards"]]
    return index.read_index(os.path.join(folder, entry[name]["name"]), folder, "prepared", files)


def open_prepared_maps(folder: str, split: str) -> tuple[Source, Source, dict]:
    """Opens a split that `prepare` wrote with label maps: images, maps, and what the numbers in these mean.

    That is {"names": [...], "palette": [...], "ignored_values": [...]}, see `segmentation.labels.Labels`.
    """
    entry = read_manifest(folder)["splits"][split]
    if "maps" not in entry:
        raise SourceError(
            f"Expected label maps in '{folder}', which was prepared for classification: it has none. Prepare "
            "a set of images and label maps."
        )
    return _open_index(folder, entry, "index"), _open_index(folder, entry, "maps"), entry["segmentation"]


def is_prepared(folder: str) -> bool:
    """Tells whether a folder has a manifest of `prepare`, also a damaged one; others write some too."""
    if not os.path.exists(os.path.join(folder, MANIFEST)):
        return False
    with contextlib.suppress(SourceError), _description(folder, MANIFEST) as manifest:
        if {"format", "splits"} <= manifest.keys():
            return True
    return not any(map(index.is_folder, os.scandir(folder)))


def read_manifest(folder: str) -> dict:
    """Reads the manifest of a folder; SourceError where it is damaged or of another version."""
    with _description(folder, MANIFEST) as manifest:
        if manifest.get("format") != "keras_convnext" or manifest.get("version") != index.INDEX_VERSION:
            raise SourceError(
                "Expected a folder written by this version of prepare (format keras_convnext, version "
                f"{index.INDEX_VERSION}), but '{folder}' has format {manifest.get('format')!r}, version "
                f"{manifest.get('version')!r}. Prepare it again into another folder."
            )
        for entry in manifest["splits"].values():
            entry["settings"].keys(), list(entry["classes"])
            for record in _file_records(entry):
                _file_in(folder, record["name"]), record["sha256"], int(record["size"])
    return manifest


def verify(output: str | os.PathLike[str], workers: int | None = None) -> list[str]:
    """Compares a prepared folder with its manifest; returns the names of missing and differing files.

    Raises SourceError where the folder has no manifest, or a damaged one.
    """
    output = os.fspath(output)
    if not os.path.exists(os.path.join(output, MANIFEST)):
        raise SourceError(f"Expected {MANIFEST} in '{output}', found none. Run prepare to its end.")
    entries = read_manifest(output)["splits"].values()
    records = [record for entry in entries for record in _file_records(entry)]
    checked = checked_files(f"Verifying {output}", output, records, workers or os.cpu_count())
    return [record["name"] for record, is_intact in checked if not is_intact]


def checked_files(
    title: str, folder: str, records: list[dict], workers: int | None
) -> Iterator[tuple[dict, bool]]:
    """Yields the records of files, and whether each file has the size and the SHA-256 of its record."""

    def is_intact(record: dict) -> bool:
        path = os.path.join(folder, record["name"])
        return os.path.isfile(path) and file_record(path).items() <= record.items()

    done = 0
    with (
        Progress(title, sum(record["size"] for record in records), "MB") as progress,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        for record, result in zip(records, pool.map(is_intact, records), strict=True):
            done += record["size"]
            progress.show(done)
            yield record, result


def file_record(path: str) -> dict:
    """Returns name, size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": os.path.basename(path), "size": os.path.getsize(path), "sha256": digest}


def _file_records(entry: dict) -> list[dict]:
    """Returns the records of all files of a split in a manifest."""
    return [*entry["shards"], entry["index"], *([entry["maps"]] if "maps" in entry else [])]


def tfds_splits(folder: str) -> list[str]:
    """Returns the names of the splits that TensorFlow Datasets prepared in a folder."""
    with _description(folder, "dataset_info.json", {"splits": list}) as info:
        return [str(item["name"]) for item in info["splits"]]


def open_tfds(folder: str, split: str) -> Source:
    """Opens a split that TensorFlow Datasets prepared as tfrecord or array_record."""
    with _description(folder, "dataset_info.json", {"name": str, "splits": list}) as info:
        format_name = info.get("fileFormat", "tfrecord")
        if format_name not in ("tfrecord", "array_record"):
            raise SourceError(
                f"Expected tfrecord or array_record files in '{folder}', received {format_name}. Run tfds "
                "convert_format --dataset_version_dir FOLDER --out_file_format tfrecord --out_dir OTHER, or "
                "build it with file_format='tfrecord'."
            )
        entry = next(item for item in info["splits"] if item["name"] == split)
        counts = [int(length) for length in entry["shardLengths"]]
        template = entry.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        parts = {"SHARD_X_OF_Y": "{SHARD_INDEX}-of-{NUM_SHARDS}", "NUM_SHARDS": f"{len(counts):05d}"}
        parts |= {"DATASET": info["name"], "SPLIT": split, "FILEFORMAT": format_name}
        for part, value in parts.items():
            template = template.replace(f"{{{part}}}", value)
        numbers = [f"{number:05d}" for number in range(len(counts))]
        files = [_file_in(folder, template.replace("{SHARD_INDEX}", number)) for number in numbers]
    missing = [os.path.basename(file) for file in files if not os.path.exists(file)]
    if missing:
        raise SourceError(
            f"Expected {len(files)} files of split '{split}' in '{folder}', missing: {first_few(missing)}."
        )
    names, classes = _tfds_features(folder)
    kind, found_in = "tfds", examples
    if format_name == "array_record":
        kind, found_in = format_name, array_records.examples
    source = index.cached_index(
        folder, kind, split, files, lambda: _scan_records(folder, found_in(files), names)
    )
    found = np.bincount(source.file_numbers, minlength=len(files)).tolist()
    for file, expected, received in zip(files, counts, found, strict=True):
        if received != expected:
            raise SourceError(
                f"Expected {expected} records in '{file}', received {received}. Prepare the set again."
            )
    index.check_labels(source, len(classes))
    return dataclasses.replace(source, classes=classes)


def open_records(path: str, files: list[str], first_label: int | None) -> Source:
    """Opens TFRecords without a description; `first_label` as for `sources.open_source`."""
    source = index.cached_index(
        path, "tfrecord", "", files, lambda: _scan_records(path, examples(files), _NAMES)
    )
    if source.classes:  # the records have image/class/synset
        return source
    labels = source.labels
    low, high = int(labels.min()), int(labels.max())
    index.check_labels(source, min(high + 1, index.MAX_CLASSES))
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


# Number and path of a file, what holds the record, its features there, and what to add to their places.
Example = tuple[int, str, Buffer, Features, int]


def examples(files: list[str]) -> Iterator[Example]:
    """Yields all records of TFRecord files, each in its mapped file."""
    for number, path in enumerate(files):
        if not regular_size(path):
            continue  # cannot be mapped
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if hasattr(content, "madvise"):
                content.madvise(mmap.MADV_RANDOM)  # only headers are read: nothing ahead of them is needed
            for start, length in find_records(content, path):
                yield number, path, content, parse_example(content, start, length, path), 0


def feature_values(features: Features, name: str, path: str) -> list:
    """Returns the values of a feature of a record, which must have it."""
    if name not in features:
        raise SourceError(
            f"Expected the feature '{name}' in every record of '{path}', received "
            f"{', '.join(sorted(features))}."
        )
    return features[name]


def _tfds_features(folder: str) -> tuple[Names, list[str]]:
    """Returns the names of image, label and file name, as `_scan_records` takes them; and the classes."""
    with _description(folder, "features.json") as content:
        features = content.get("featuresDict", {}).get("features", {})
        kinds = {
            name: feature.get("pythonClassName", "").rpartition(".")[2] for name, feature in features.items()
        }
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    # ImageNet-ReaL and its kin carry the label of ILSVRC2012 next to lists of others.
    labels = [name for name in ("label", "original_label") if name in labels][:1] or labels
    if len(images) != 1 or len(labels) != 1:
        raise SourceError(
            f"Expected one Image and one ClassLabel in '{folder}', received "
            f"{', '.join(f'{name} ({kind})' for name, kind in kinds.items())}. Only classification sets can "
            "be read."
        )
    path = os.path.join(folder, f"{labels[0]}.labels.txt")
    if os.path.exists(path):
        classes = read_text(path).removesuffix("\n").split("\n")  # other line ends may be part of a name
    else:
        with _description(folder, "features.json"):
            count = int(features[labels[0]]["classLabel"]["numClasses"])
            if not 0 < count <= index.MAX_CLASSES:
                raise ValueError(f"numClasses is {count}")
        classes = [str(number) for number in range(count)]
    names = [name for name in ("file_name", "filename", "image/filename") if kinds.get(name) == "Text"]
    return (images, labels, names[:1] or _NAMES[2], ()), classes


def _scan_records(path: str, records: Iterable[Example], names: Names) -> Iterator[Found]:
    """Finds the images of records by the first of the names of each feature that a record has."""
    images, labels, file_names, synsets = names
    are_named = None
    for number, file, content, features, base in records:
        start, length = _one(features, images, tuple, file)
        label = _one(features, labels, int, file)
        has_synset = any(name in features for name in synsets)
        are_named = has_synset if are_named is None else are_named
        if has_synset != are_named:
            raise SourceError(f"Expected the feature '{synsets[0]}' in every record of '{path}', or in none.")
        if has_synset:
            label = _text(content, *_one(features, synsets, tuple, file))
        elif not -1 <= label < 1 << 31:
            raise SourceError(f"Expected labels from 0 to {2**31 - 1} in '{file}', received {label}.")
        name = f"{os.path.basename(file)}@{base + start}"
        if any(name in features for name in file_names):
            name = _text(content, *_one(features, file_names, tuple, file))
        yield number, base + start, length, label, name
    if are_named is None:
        raise SourceError(f"Expected images in '{path}', found no record in its files.")


def _text(content: Buffer, first: int, size: int) -> str:
    return content[first : first + size].decode("utf-8", "surrogateescape")


def _one(features: Features, names: Sequence[str], kind: type, path: str) -> Any:
    """Returns the one value of the first of some features that a record has."""
    name = next((name for name in names if name in features), names[-1])
    values = feature_values(features, name, path)
    if len(values) != 1 or not isinstance(values[0], kind):
        wanted = "an integer" if kind is int else "bytes"
        raise SourceError(
            f"Expected one value, {wanted}, for '{name}' in every record of '{path}', received {len(values)}."
        )
    return values[0]


@contextlib.contextmanager
def _description(folder: str, name: str, kinds: Mapping[str, type] | None = None) -> Iterator[dict]:
    """Gives a JSON file that describes a set, see `json_object`; whatever it does to the block names it."""
    path = os.path.join(folder, name)
    with reading(path, "JSON", "Prepare the set again.", SourceError):
        yield json_object(read_bytes(path), kinds)


def _file_in(folder: str, name: str) -> str:
    """Returns the path of a file that a description names; ValueError for the name of a place elsewhere."""
    if not name or os.path.basename(name) != name:
        raise ValueError(f"expected the name of a file in the folder, received {shortened(name, 80)!r}")
    return os.path.join(folder, name)
