"""ImageNet as it is downloaded: its two tar files, the labels of its validation images, ReaL's labels.

The tars are indexed without unpacking them.
"""

import collections
import csv
import dataclasses
import importlib.util
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from keras_convnext._files import StrPath, read_bytes, read_text, reading
from keras_convnext._messages import shortened
from keras_convnext.data import array_records, class_names, index
from keras_convnext.data.index import Found, Source, SourceError, first_few
from keras_convnext.data.records import examples, feature_values

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
_LABEL_NAMES = ("label", "labels", "class", "classes", "class_name", "category", "target", "wnid", "synset")
_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]*(e[-+]?[0-9]+)?", re.IGNORECASE)
_NO_LABELS = ("", "nan", "<na>", "n/a", "#n/a", "null")  # as tables write that there is none
_MAX_TAR_HEADER_BYTES = 1 << 16  # of a name or of attributes
# torchvision 0.28.0, torchvision/datasets/imagenet.py
_TAR_MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
}


def are_validation(names: Iterable[str]) -> bool:
    """Tells whether all files are named as ImageNet's validation images are."""
    return all(VALIDATION_NAME.fullmatch(os.path.basename(name)) for name in names)


def split_of_tar(path: str) -> str:
    """Tells ImageNet's two tars apart by their first member."""
    with open(path, "rb", buffering=0) as file:
        if file.read(2) == b"\x1f\x8b":
            raise SourceError(
                f"Expected an uncompressed tar, but '{path}' is compressed with GZIP. Run gunzip on it."
            )
    name = next(_members(path)).name
    if name.endswith(".tar"):
        return "train"
    if are_validation([name]):
        return "validation"
    raise SourceError(
        "Expected ILSVRC2012_img_train.tar (a tar of class tars) or ILSVRC2012_img_val.tar, but "
        f"'{path}' begins with '{name}'. Unpack other archives and pass the folder."
    )


def open_tar(path: str, split: str, labels: StrPath | None) -> Source:
    """Indexes one of ImageNet's two tars; `labels` is a label file for the validation images, or None."""
    scan = _scan_train_tar if split == "train" else _scan_validation_tar
    source = index.cached_index(path, "tar", split, [path], lambda: scan(path))
    return source if split == "train" else with_labels(source, labels)


def with_labels(source: Source, path: StrPath | None, prefix: str = "", beside: Sequence[str] = ()) -> Source:
    """Returns a source with labels from a label file or, for validation images, the published ones.

    The file may name the images `beside` too, of other splits; `prefix` is the folder of the own ones there.
    """
    names = [prefix + source.name(number) for number in range(len(source))]
    is_validation = are_validation(names)
    file = _published_validation_labels() if path is None else path
    values = _labels_from_file(file, names, is_validation or path is None, beside)
    known = class_names.synset_ids(1000)
    if is_validation and index.are_numbers(values):
        wrong = next((value for value in values if int(value) >= 1000), None)
        if wrong is not None:
            raise SourceError(
                f"Expected class numbers from 0 to 999 in '{path}', received {wrong}. The numbers of "
                "ImageNet's development kit (1 to 1000) are in another order: pass WordNet ids."
            )
        values = [known[int(value)] for value in values]
    classes = known if is_validation and set(known).issuperset(values) else index.in_order(values, file)
    positions = {name: number for number, name in enumerate(classes)}
    labels = np.array([positions[value] for value in values], np.int32)
    return dataclasses.replace(source, labels=labels, classes=classes)


def read_real_labels(source: Source, path: StrPath | None = None) -> list[tuple[int, ...]]:
    """Reads the ReaL labels of ImageNet's validation images: for each, a tuple of class numbers.

    The path is that of real.json: one list of class numbers (0 to 999) an image, in the order of the numbers
    in the names. None: the lists are in `source`, the set imagenet2012_real of TensorFlow Datasets. Images
    with an empty tuple do not count.

    Reference: Beyer et al., Are we done with ImageNet? (arXiv 2006.07159);
    github.com/google-research/reassessed-imagenet, real.json.
    """
    if path is None:
        if source.kind not in ("tfds", "array_record"):
            raise SourceError(
                f"Expected the ReaL labels of '{source.path}' in a file, received path=None. Pass real.json, "
                "or open the set imagenet2012_real."
            )
        records = (examples if source.kind == "tfds" else array_records.examples)(source.files)
        return [tuple(feature_values(features, "real_label", file)) for _, file, _, features, _ in records]
    with reading(path, "ReaL's real.json", "Download it again.", SourceError):
        lists = json.loads(read_bytes(path))
    if not isinstance(lists, list) or not all(isinstance(item, list) for item in lists):
        raise SourceError(f"Expected a list of lists of class numbers in '{path}'. Pass ReaL's real.json.")
    if len(lists) != len(source):
        raise SourceError(
            f"Expected one list of labels for each of the {len(source)} images of '{source.path}', received "
            f"{len(lists)} in '{path}'. Pass the real.json of the same images."
        )
    numbers = [_validation_number(source.name(number), len(lists), path) for number in range(len(source))]
    return [tuple(lists[number - 1]) for number in numbers]


class _Member(tarfile.TarInfo):
    """A member of a tar whose bytes are at least 0, else `tarfile` goes back for ever, and few for a name."""

    def _block(self, count: int) -> int:  # CPython has this bound since CVE-2025-8194
        of_header = self.type in (b"L", b"K", b"x", b"g", b"X")
        if count < 0 or (of_header and count > _MAX_TAR_HEADER_BYTES):
            raise ValueError(f"a member or header of {count} bytes")
        return super()._block(count)  # type: ignore[misc]


def _members(path: str, within: tarfile.TarInfo | None = None) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of a tar, or of one that is a member of it, but hidden ones; at least one.

    `tarfile` counts from where the file stands, so offsets are those of the whole file. It takes a damaged
    header for the end of the archive: the zeros that end an archive are looked for here.
    """
    md5 = _TAR_MD5.get(os.path.basename(path))
    again = f"Download it again{f' (the MD5 sum of the published file is {md5})' if md5 else ''}."
    start, size = (within.offset_data, within.size) if within else (0, os.path.getsize(path))
    end, is_empty = start + size, True
    expected = f"a tar archive at byte {start}"
    with open(path, "rb", buffering=0) as file, reading(path, expected, again, SourceError):
        file.seek(start)
        archive = tarfile.TarFile(fileobj=file, tarinfo=_Member)
        for member in archive:
            if member.issparse():
                raise SourceError(
                    f"Expected whole files in '{path}', received '{member.name}' with holes, as tar -S "
                    "writes them. Write the archive without -S."
                )
            last = member.offset_data + member.size
            if last > end:
                raise SourceError(
                    f"Expected '{member.name}' in '{path}' to end at byte {last}, but the archive ends at "
                    f"byte {end}: it is truncated. {again}"
                )
            if member.islnk() or member.issym():
                raise SourceError(f"Expected files in '{path}', received the link '{member.name}'. {again}")
            if member.isreg() and not os.path.basename(member.name).startswith("."):
                is_empty = False
                yield member
        file.seek(archive.offset)
        zeros = bytes(tarfile.BLOCKSIZE)
        if archive.offset + len(zeros) > end or file.read(len(zeros)) != zeros:
            raise SourceError(
                f"Expected the zeros that end a tar archive at byte {archive.offset} of '{path}', received "
                f"something else: it is truncated or damaged there. {again}"
            )
    if is_empty:
        inner = f"{os.path.basename(within.name)} of " if within else ""
        raise SourceError(f"Expected images in {inner}'{path}', found none: it is an empty archive. {again}")


def _scan_train_tar(path: str) -> Iterator[Found]:
    tars = list(_members(path))
    wrong = [tar.name for tar in tars if not re.fullmatch(r"n\d{8}\.tar", os.path.basename(tar.name))]
    if wrong:
        raise SourceError(
            f"Expected one tar a class in '{path}', such as n01440764.tar, received {first_few(wrong)}. Pass "
            "ILSVRC2012_img_train.tar as published."
        )
    for tar in tars:
        synset = os.path.basename(tar.name).removesuffix(".tar")
        for member in _members(path, tar):
            name = os.path.basename(member.name)
            if not name.startswith(f"{synset}_"):
                raise SourceError(
                    f"Expected images named '{synset}_...' in {synset}.tar of '{path}', received '{name}'. "
                    "Its label would be a guess: pass ILSVRC2012_img_train.tar as published."
                )
            yield 0, member.offset_data, member.size, synset, f"{synset}/{name}"


def _scan_validation_tar(path: str) -> Iterator[Found]:
    for member in _members(path):
        yield 0, member.offset_data, member.size, 0, os.path.basename(member.name)


def _validation_number(name: str, count: int, labels: StrPath) -> int:
    """Returns the number in the name of a validation image, 1 to `count`."""
    match = VALIDATION_NAME.fullmatch(os.path.basename(name))
    if match is None or not 1 <= int(match[1]) <= count:
        raise SourceError(
            "Expected an image named ILSVRC2012_val_00000001.JPEG or the like, with one of the numbers from "
            f"1 to {count}, as '{labels}' has so many labels, received '{name}'."
        )
    return int(match[1])


def _published_validation_labels() -> str:
    """Returns the file with the WordNet id of each validation image, in the order of their numbers."""
    package = importlib.util.find_spec("tensorflow_datasets")
    for folder in (package and package.submodule_search_locations) or ():
        path = os.path.join(folder, "datasets", "imagenet2012", "validation_labels.txt")
        if os.path.exists(path):
            return path
    raise SourceError(
        "Expected the labels of ImageNet's validation images, which the package tensorflow-datasets carries, "
        "but it is not installed. Run pip install tensorflow-datasets importlib_resources, or pass labels."
    )


def _labels_from_file(
    path: StrPath, names: list[str], is_validation: bool, beside: Sequence[str]
) -> list[str]:
    """Returns the label of each name, as it is written in a label file, which may have those `beside` too."""
    rows = _rows(path, any(os.path.basename(name).startswith("#") for name in names))
    if len(rows[0][1]) == 1:
        if not is_validation:
            raise SourceError(
                f"Expected lines 'file,label' in '{path}', received one word a line. Only ImageNet's "
                "validation images have numbers that order such labels."
            )
        if len(rows) not in (len(names), 50_000):
            raise SourceError(
                f"Expected a line for each of {len(names)} images in '{path}', received {len(rows)} lines."
            )
        return [rows[_validation_number(name, len(rows), path) - 1][1][0] for name in names]
    find, own = _finder([*names, *beside]), set(names)
    columns = list(zip(*(row for _, row in rows), strict=True))
    first = rows[0][1]
    # By the images that a column names; those named by suffix too are surer.
    named = [
        sum(1 + index.is_image(os.path.basename(field)) for field in column if find(field))
        for column in columns
    ]
    ranks = [(title.casefold() not in _LABEL_NAMES, count) for title, count in zip(first, named, strict=True)]
    best = max(ranks)
    if best[1] and len({column for column, rank in zip(columns, ranks, strict=True) if rank == best}) > 1:
        raise SourceError(
            f"Expected one column of files in '{path}', received two that name as many images. Name them in "
            "the first line: file,label."
        )
    file_column = ranks.index(best)
    header = [] if find(first[file_column]) or index.is_image(os.path.basename(first[file_column])) else first
    rows = rows[1:] if header else rows
    label_column = _label_column(header, columns, file_column, path)
    # Kaggle's LOC_val_solution.csv: WordNet id and boxes.
    has_boxes = bool(header) and header[label_column].casefold() == "predictionstring"
    given: dict[str, str] = {}
    strange = []
    for line, row in rows:
        file, label = row[file_column], row[label_column]
        if has_boxes:
            label = label.partition(" ")[0]
        meant = find(file)
        meant = meant & own or meant
        strange += [] if meant else [file]
        problem = ""
        if label.casefold() in _NO_LABELS:
            problem = f"a label for '{file}', received {label!r}"
        elif len(meant) > 1:
            problem = f"the path of one image for '{file}', found {first_few(sorted(meant))}"
        elif any(given.setdefault(name, label) != label for name in meant):
            problem = f"one label for '{file}', received '{given[min(meant)]}' before and '{label}'"
        if problem:
            raise SourceError(f"Expected {problem} in line {line} of '{path}'. Correct it.")
    missing = [name for name in names if name not in given]
    if missing:
        there = f" It has {first_few(strange)}, which are not there." if strange else ""
        raise SourceError(
            f"Expected a label for every image, but '{path}' has none for {len(missing)}: "
            f"{first_few(missing)}.{there}"
        )
    if strange:
        raise SourceError(
            f"'{path}' has labels for {len(strange)} files that are not there: {first_few(strange)}."
        )
    return [given[name] for name in names]


def _rows(path: StrPath, has_hashes: bool) -> list[tuple[int, list[str]]]:
    """Returns the number and the fields of each line of a label file, all of as many fields.

    Lines that begin with "#" are comments, unless images do (`has_hashes`).
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise SourceError(str(error)) from error
    if "\0" in text:
        raise SourceError(f"Expected text in UTF-8 in '{path}', received zero bytes. Save it as UTF-8.")
    lines = [
        (number, line)
        for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1)
        if line.strip() and (has_hashes or not line.startswith("#"))
    ]
    if not lines:
        raise SourceError(f"Expected labels in '{path}', which is empty.")
    separator = next((mark for mark in "\t,;" if mark in lines[0][1]), None)
    rows = []
    for number, line in lines:
        fields = line.strip().rsplit(maxsplit=1)
        try:
            if separator:
                fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise SourceError(f"Expected 'file,label' in line {number} of '{path}': {error}.") from error
        rows.append((number, [field.strip() for field in fields]))
        if len(fields) != len(rows[0][1]):
            raise SourceError(
                f"Expected {len(rows[0][1])} fields in line {number} of '{path}', as in its first, received "
                f"{len(fields)}: {shortened(line, 80)!r}. Put fields that hold a separator in quotes."
            )
    return rows


def _finder(names: list[str]) -> Callable[[str], set[str]]:
    """Returns a function that tells which images a label file may mean by a name, with suffix or without."""
    meant: dict[str, set[str]] = collections.defaultdict(set)
    whole = {path for name in names for path in (name, os.path.splitext(name)[0])}
    for name in names:
        for path in (name, os.path.splitext(name)[0]):
            meant[path].add(name)
            meant[os.path.basename(path)].add(name)
    meant.update({name: {name} for name in names})

    def find(text: str) -> set[str]:
        text = text if text in meant else text.replace("\\", "/")
        found = meant.get(text, set())
        while not found and "/" in text:  # a path from elsewhere that ends in one from the folder
            text = text.partition("/")[2]
            found = meant[text] if text in whole else found
        return found

    return find


def _label_column(header: list[str], columns: list[tuple[str, ...]], file_column: int, path: StrPath) -> int:
    """Returns the column of labels: the only one beside the files, that of this name, or that of words."""
    names = [name.casefold() for name in header]
    others = [number for number in range(len(columns)) if number != file_column]
    named = [number for number in others if header and names[number] in _LABEL_NAMES]
    exact = [number for number in named if names[number] == "label"]
    words = [n for n in others if not all(map(_NUMBER.fullmatch, columns[n][bool(header) :]))]
    for found in (others, exact, named, words):
        if len(found) == 1:
            return found[0]
    raise SourceError(
        f"Expected one column of labels in '{path}', received "
        f"{first_few(header) if header else f'{len(columns)} columns'}, of which several could be it. Keep "
        "file and label, or name its column 'label' in the first line."
    )
