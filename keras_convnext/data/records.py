"""Data sets of TFRecord files: those that `prepare` writes, those of TensorFlow Datasets, and plain ones.

Each image keeps its place inside its file, so that it is read without reading the records before it.
"""

import contextlib
import dataclasses
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_convnext._files import read_text, reading, regular_size
from keras_convnext._terminal import Progress
from keras_convnext.data import class_names
from keras_convnext.data.index import (
    INDEX_VERSION,
    MANIFEST,
    MAX_CLASSES,
    IndexBuilder,
    Source,
    SourceError,
    cached_index,
    check_labels,
    file_in,
    first_few,
    is_folder,
    read_index,
    read_json,
)
from keras_convnext.data.tfrecords import Range, find_records, parse_example


def open_prepared(folder: str, split: str) -> Source:
    """Opens a split that `prepare` wrote, by its own index."""
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


def is_prepared(folder: str) -> bool:
    """Tells whether a folder has a manifest of `prepare`, also a damaged one; others write some too."""
    if not os.path.exists(os.path.join(folder, MANIFEST)):
        return False
    with contextlib.suppress(SourceError):
        if {"format", "splits"} <= read_json(folder, MANIFEST, {}).keys():
            return True
    return not any(map(is_folder, os.scandir(folder)))


def read_manifest(folder: str) -> dict:
    """Reads the manifest of a folder; SourceError where it is damaged or of another version."""
    manifest = read_json(folder, MANIFEST, {})
    if manifest.get("format") != "keras_convnext" or manifest.get("version") != INDEX_VERSION:
        raise SourceError(
            "Expected a folder written by this version of prepare (format keras_convnext, version "
            f"{INDEX_VERSION}), but '{folder}' has format {manifest.get('format')!r}, version "
            f"{manifest.get('version')!r}. Prepare it again into another folder."
        )
    with _describing(folder, MANIFEST):
        for entry in manifest["splits"].values():
            entry["settings"].keys(), list(entry["classes"])
            for record in (*entry["shards"], entry["index"]):
                file_in(folder, record["name"]), record["sha256"], int(record["size"])
    return manifest


def tfds_splits(folder: str) -> list[str]:
    """Returns the names of the splits that TensorFlow Datasets prepared in a folder."""
    info = read_json(folder, "dataset_info.json", {"splits": list})
    with _describing(folder, "dataset_info.json"):
        return [str(item["name"]) for item in info["splits"]]


def open_tfds(folder: str, split: str) -> Source:
    """Opens a split that TensorFlow Datasets prepared as tfrecord."""
    info = read_json(folder, "dataset_info.json", {"name": str, "splits": list})
    format_name = info.get("fileFormat", "tfrecord")
    if format_name != "tfrecord":
        raise SourceError(
            f"Expected the files of '{folder}' to be tfrecord, received {format_name}, whose records are "
            "compressed, so that images have no place in the file. Run tfds convert_format "
            "--dataset_version_dir FOLDER --out_file_format tfrecord --out_dir OTHER, or build it with "
            "file_format='tfrecord'."
        )
    with _describing(folder, "dataset_info.json"):
        entry = next(item for item in info["splits"] if item["name"] == split)
        counts = [int(length) for length in entry["shardLengths"]]
        template = entry.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        template = template.replace("{SHARD_X_OF_Y}", "{SHARD_INDEX}-of-{NUM_SHARDS}")
        parts = {"DATASET": info["name"], "SPLIT": split, "FILEFORMAT": format_name}
        parts["NUM_SHARDS"] = f"{len(counts):05d}"
        for part, value in parts.items():
            template = template.replace(f"{{{part}}}", value)
        names = [template.replace("{SHARD_INDEX}", f"{number:05d}") for number in range(len(counts))]
        files = [file_in(folder, name) for name in names]
    missing = [os.path.basename(file) for file in files if not os.path.exists(file)]
    if missing:
        raise SourceError(
            f"Expected {len(files)} files of split '{split}' in '{folder}', missing: {first_few(missing)}."
        )
    image, label, name, classes = _tfds_features(folder)
    source = cached_index(
        folder, "tfds", split, files, lambda: _scan_records(folder, "tfds", files, image, label, name)
    )
    found = np.bincount(source.file_numbers, minlength=len(files)).tolist()
    if found != counts:
        number = next(number for number in range(len(files)) if found[number] != counts[number])
        raise SourceError(
            f"Expected {counts[number]} records in '{files[number]}', received {found[number]}. Prepare the "
            "set again."
        )
    check_labels(source, len(classes))
    return dataclasses.replace(source, classes=classes)


def open_records(path: str, files: list[str], first_label: int | None) -> Source:
    """Opens TFRecords without a description; `first_label` as for `sources.open_source`."""
    source = cached_index(path, "tfrecord", "", files, lambda: _scan_records(path, "tfrecord", files))
    if source.classes:  # the records have image/class/synset
        return source
    labels = source.labels
    low, high = int(labels.min()), int(labels.max())
    check_labels(source, min(high + 1, MAX_CLASSES))
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


def examples(files: list[str]) -> Iterator[tuple[int, str, mmap.mmap, dict[str, list[Range] | list[int]]]]:
    """Yields number and path of the file, the mapped file and the features of every record."""
    for number, path in enumerate(files):
        if not regular_size(path):
            continue  # cannot be mapped
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if hasattr(content, "madvise"):
                content.madvise(mmap.MADV_RANDOM)  # only headers are read: nothing ahead of them is needed
            for start, length in find_records(content, path):
                yield number, path, content, parse_example(content, start, length, path)


def feature_values(features: dict, name: str, path: str) -> list:
    """Returns the values of a feature of a record, which must have it."""
    if name not in features:
        raise SourceError(
            f"Expected the feature '{name}' in every record of '{path}', received "
            f"{', '.join(sorted(features))}."
        )
    return features[name]


def _tfds_features(folder: str) -> tuple[str, str, str | None, list[str]]:
    """Returns the features that are the image, the label and, if there is one, the file name; the classes."""
    content = read_json(folder, "features.json", {})
    with _describing(folder, "features.json"):
        features = content.get("featuresDict", {}).get("features", {})
        kinds = {
            name: feature.get("pythonClassName", "").rpartition(".")[2] for name, feature in features.items()
        }
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    # ImageNet-ReaL and its kin carry the label of ILSVRC2012 next to lists of others.
    label = next((name for name in ("label", "original_label", *labels) if name in labels), None)
    if label is None or len(images) != 1 or (len(labels) > 1 and label not in ("label", "original_label")):
        raise SourceError(
            f"Expected one Image and one ClassLabel in '{folder}', received "
            f"{', '.join(f'{name} ({kind})' for name, kind in kinds.items())}. Only classification sets can "
            "be read."
        )
    names = [name for name in ("file_name", "filename", "image/filename") if kinds.get(name) == "Text"]
    path = os.path.join(folder, f"{label}.labels.txt")
    if os.path.exists(path):
        classes = read_text(path).removesuffix("\n").split("\n")  # other line ends may be part of a name
    else:
        with _describing(folder, "features.json"):
            count = int(features[label]["classLabel"]["numClasses"])
            if not 0 < count <= MAX_CLASSES:
                raise ValueError(f"numClasses is {count}")
        classes = [str(number) for number in range(count)]
    return images[0], label, names[0] if names else None, classes


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
    columns = IndexBuilder()
    synsets: dict[str, int] = {}
    sizes = np.cumsum([0, *map(os.path.getsize, files)])
    with Progress(f"Indexing {os.path.basename(path)}", int(sizes[-1]), "MB") as progress:
        for number, file, content, features in examples(files):
            has_synset = image is None and "image/class/synset" in features
            image_name = image or ("image/encoded" if "image/encoded" in features else "image")
            label_name = label or ("image/class/label" if "image/class/label" in features else "label")
            text_name = name or ("image/filename" if "image/filename" in features else "file_name")
            start, length = _one(feature_values(features, image_name, file), tuple, image_name, file)
            value = _one(feature_values(features, label_name, file), int, label_name, file)
            if columns.labels and has_synset != bool(synsets):
                raise SourceError(
                    f"Expected the feature 'image/class/synset' in every record of '{path}', or in none."
                )
            if has_synset:
                first, size = _one(features["image/class/synset"], tuple, "image/class/synset", file)
                value = synsets.setdefault(
                    content[first : first + size].decode("utf-8", "surrogateescape"), len(synsets)
                )
            if not -1 <= value < 1 << 31:
                raise SourceError(f"Expected labels from 0 to {2**31 - 1} in '{file}', received {value}.")
            text = f"{os.path.basename(file)}@{start}"
            if text_name in features:
                first, size = _one(features[text_name], tuple, text_name, file)
                text = content[first : first + size].decode("utf-8", "surrogateescape")
            columns.add(number, start, length, value, text)
            progress.show(
                int(sizes[number]) + start, lambda: f"{len(columns.labels)} images, {progress.text()}"
            )
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


def _describing(folder: str, name: str) -> contextlib.AbstractContextManager[None]:
    """Names the description in a folder in whatever its content does to the block."""
    remedy = "Prepare the set again."
    return reading(os.path.join(folder, name), "a description of data", remedy, SourceError)
