"""Opens photographs with a label map for each, of any layout, without decoding or copying them."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from keras_convnext._environment import available_cores
from keras_convnext._files import StrPath
from keras_convnext._messages import near_names
from keras_convnext._terminal import Progress
from keras_convnext.data import preprocess, records
from keras_convnext.data import sources as photos
from keras_convnext.data.index import Source, SourceError, counted, first_few, images_below, list_folder
from keras_convnext.data.segmentation import coco, label_maps, layouts
from keras_convnext.data.segmentation.label_maps import LabelMapError
from keras_convnext.data.segmentation.labels import IGNORED, Labels, are_default
from keras_convnext.data.segmentation.pictures import default_labels

SAMPLE = 200  # maps that `described` reads, evenly spaced
_SHOWN = 24  # classes that `described` names with their shares


class Maps(Protocol):
    """What gives the encoded label maps, in the order of the images: an `index.Source`, or annotations."""

    @property
    def path(self) -> str: ...

    def __len__(self) -> int: ...

    def name(self, number: int) -> str: ...

    def read(self, number: int) -> bytes: ...


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentationSource:
    """Where N photographs and their label maps lie, and what the numbers in the maps mean."""

    path: str  # the folder or file that was opened
    layout: str  # in words
    images: Source  # its labels are without meaning
    maps: Maps
    labels: Labels
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def kind(self) -> str:
        """What holds the images, as `index.Source` names it."""
        return self.images.kind

    @property
    def classes(self) -> list[str]:
        return list(self.labels.names)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        return label_maps.table(self.labels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images' file names and of the labels, whatever their order and container."""
        lines = sorted(self.name(number).rpartition("/")[2] for number in range(len(self)))
        lines += [*self.labels.names, *map(str, self.labels.ignored_values)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def name(self, number: int) -> str:
        """Names example `number` for reports, such as "train/images/0001.jpg"."""
        return self.images.name(number)

    def read(self, number: int) -> tuple[bytes, bytes]:
        """Reads the encoded image and the encoded label map of example `number`."""
        return self.images.read(number), self.maps.read(number)

    def load_map(self, number: int) -> np.ndarray:
        """Reads the label map of example `number`: uint8 (H, W), class numbers and 255 for ignored."""
        name = self.maps.name(number)
        values = label_maps.decode(self.maps.read(number), name)
        return label_maps.class_numbers(values, self._table, self.labels, name)

    def load(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads an example: uint8 (H, W, 3), RGB, as `preprocess.read_image`, and its map, uint8 (H, W).

        ImageError: the image cannot be decoded. LabelMapError: the map cannot, has another size than the
        image, or values that are neither classes nor ignored.
        """
        image = preprocess.decode_image(self.images.read(number), self.name(number))
        label_map = self.load_map(number)
        check_sizes(image.shape[:2], label_map.shape, self.name(number), self.maps.name(number))
        return image, label_map

    def check(self, number: int) -> np.ndarray:
        """Returns the map of an example after the checks of `load`, without decoding the image."""
        label_map = self.load_map(number)
        size = preprocess.image_size(self.images.read(number), self.name(number))
        check_sizes(size, label_map.shape, self.name(number), self.maps.name(number))
        return label_map


def check_sizes(image: tuple[int, ...], label_map: tuple[int, ...], name: str, map_name: str) -> None:
    """Refuses a map of another size than its image, and images of one pixel a side; sizes are (H, W)."""
    if image != label_map:
        turned = " The photograph may be stored turned: turn its file." if image == label_map[::-1] else ""
        raise LabelMapError(
            f"Expected a label map of the size of its image, received {label_map[1]} x {label_map[0]} pixels "
            f"in '{map_name}' for {image[1]} x {image[0]} in '{name}'.{turned} Export it again at that size."
        )
    if min(image) < 2:
        raise LabelMapError(
            f"Expected images of at least 2 x 2 pixels, received {image[1]} x {image[0]} in '{name}'. Remove "
            "it, or export it again."
        )


def is_segmentation(path: StrPath) -> bool:
    """Tells whether a path has photographs with label maps; SourceError where it may be class folders too."""
    path = os.fspath(path)
    if not os.path.exists(path):
        return False
    if records.is_prepared(path):
        return any("maps" in entry for entry in records.read_manifest(path)["splits"].values())
    found = layouts.find(path)
    if not found and layouts.is_cityscapes(path):
        layouts.find_one(path)  # raises what to do, where folders of classes would be looked for
    if not found or layouts.COCO in found:
        return bool(found)
    used = set().union(*(layouts.used_folders(layout, places, path) for layout, places in found.items()))
    others = [
        name
        for name in list_folder(path)[0]
        if name not in used and images_below(os.path.join(path, name))[0]
    ]
    if others:
        raise SourceError(
            f"Expected one data set in '{path}', but two readings fit: images with label maps "
            f"({next(iter(found))}), or folders of classes ({first_few([*sorted(used), *others])}). Move the "
            f"folders that are not of the set away: {first_few(others)}."
        )
    return True


def refuse_label_maps(path: StrPath) -> None:
    """Refuses photographs with label maps where classes are meant, as their two folders look like such."""
    if is_segmentation(path):
        raise SourceError(
            f"Expected folders of classes in '{os.fspath(path)}', received photographs with label maps. "
            "Train them by a recipe of segmentation, such as fine_tune_segmentation."
        )


def list_splits(path: StrPath) -> list[str]:
    """Lists the splits at a path under the names they have there; empty when it is not divided."""
    path = os.fspath(path)
    if records.is_prepared(path):
        return list(records.read_manifest(path)["splits"])
    return [split for split in layouts.find_one(path)[1] if split is not None]


def open_source(
    path: StrPath,
    split: str | None = None,
    *,
    labels: Labels | Sequence[str] | None = None,
    ignored_values: Sequence[int] | None = None,
) -> SegmentationSource:
    """Finds the photographs and label maps of one split of a data set.

    What is at the path decides:

    - folders of images and of PNG maps with the same names: `SPLIT/images + SPLIT/masks` (or `labels`,
      `annotations`), `images/SPLIT + annotations/SPLIT` as in ADE20K, `img_dir/SPLIT + ann_dir/SPLIT` as in
      mmsegmentation, `SPLIT + SPLITannot` as in CamVid, `images + masks` without splits;
    - a COCO-style JSON of polygons or run lengths beside its images, see `coco.Annotations`, or a folder
      with one, or one for each split;
    - `manifest.json`: a folder that `prepare` wrote.

    The names of the classes are those of `labels`; else of `classes.txt` or `labels.txt` in the folder, a
    name a line, or ADE20K's `objectInfo150.txt`; else "class 0", "class 1" and so on, up to the largest value
    of all maps, which are read for that. Colours are those of `labels`, else of the palette of the maps, else
    made.

    Args:
        path: folder, or a COCO-style JSON.
        split: a name the set uses, or "train", "validation" or "test" for what these go by. Default: the only
            one.
        labels: of the model, or names of classes in their order. Where the data name their own classes, these
            must be the same, or as many without names, "class 0" and so on.
        ignored_values: that stand for "not labelled" in the maps, such as (255,), or (0,) for ADE20K. Classes
            are the other values, counted from the smallest. Default: those of `labels`, else none.

    Raises:
        SourceError: nothing usable is there, two layouts fit, an image has no map, the classes differ from
            `labels`, or the split is unknown or could be several.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise SourceError(f"Expected a data set at '{path}', but nothing is there. Check the path.")
    ignored = None if ignored_values is None else label_maps.check_ignored(ignored_values)
    if records.is_prepared(path):
        return _open_prepared(path, split, labels, ignored)
    layout, places = layouts.find_one(path)
    name = photos.choose_split(path, "folder", {key: list(pair) for key, pair in places.items()}, split)
    left_out: collections.Counter[str] = collections.Counter()
    maps: Any
    if layout is layouts.COCO:
        maps = annotations = coco.Annotations(places[name][1])
        chosen = _labels_of_annotations(path, annotations, labels, ignored)
        annotations.number_as(list(chosen.names))
        annotations.leave_out_empty()
        files, left_out = annotations.files(name), annotations.left_out
        root = os.path.dirname(os.path.abspath(path)) if os.path.isfile(path) else path
        images = _files_source(root, files)
    else:
        pairs, left_out = layouts.pairs(*places[name])
        images, maps = (_files_source(path, list(files)) for files in zip(*pairs, strict=True))
        chosen = _labels_of_files(path, maps, labels, ignored)
    return SegmentationSource(path, str(layout), images, maps, chosen, left_out)


def take(source: SegmentationSource, numbers: Sequence[int] | np.ndarray) -> SegmentationSource:
    """Returns a source with the examples at some places, in that order."""
    chosen = np.asarray(numbers, np.int64)
    maps = source.maps
    taken: Maps = photos.take(maps, chosen) if isinstance(maps, Source) else maps.take(chosen.tolist())  # type: ignore[attr-defined]
    return dataclasses.replace(source, images=photos.take(source.images, chosen), maps=taken)


def described(source: SegmentationSource, title: str = "data") -> list[str]:
    """Says in a few lines what was found: images, classes with their share of pixels, what was left out.

    The shares are of at most `SAMPLE` maps, evenly spaced, which are read with the sizes of their images; an
    error in one of the maps is raised. Damaged images are told when they are used.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(int)).tolist()
    counts = sum(ahead(functools.partial(_counts, source), chosen), np.zeros(256, np.int64))
    total, labelled = int(counts.sum()), max(1, int(counts[:IGNORED].sum()))
    names = source.classes
    shares = [f"{name} {counts[place] / labelled:.1%}" for place, name in enumerate(names) if counts[place]]
    if len(shares) > _SHOWN:
        largest = np.argsort(-counts[: len(names)], kind="stable")[:_SHOWN]
        shares = [f"{names[place]} {counts[place] / labelled:.1%}" for place in largest.tolist()] + ["..."]
    of = "all maps" if len(chosen) == len(source) else f"{len(chosen)} maps, evenly spaced"
    lines = [
        f"{title}: {len(source):,} images with label maps of {len(names)} classes in '{source.path}' "
        f"({source.layout})",
        f"  share of labelled pixels, of {of}: {', '.join(shares)}",
    ]
    absent = [name for place, name in enumerate(names) if not counts[place]]
    if absent:
        lines.append(f"  no pixels: {len(absent)} of these classes: {first_few(absent)}")
    if source.labels.ignored_values:
        values = ", ".join(map(str, source.labels.ignored_values))
        lines.append(f"  ignored: {counts[IGNORED] / max(1, total):.1%} of all pixels (value {values})")
    return lines + [f"  left out: {counted(source.left_out)}"] * bool(source.left_out)


def _counts(source: SegmentationSource, number: int) -> np.ndarray:
    try:
        label_map = source.check(number)
    except preprocess.ImageError:
        label_map = source.load_map(number)
    return np.bincount(label_map.reshape(-1), minlength=256)


def ahead(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """Yields the result for each number, in order; a few are computed ahead, by a thread for each core.

    Decoders work without Python's lock.
    """
    workers = available_cores()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for number in numbers:
            waiting.append(pool.submit(function, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _files_source(root: str, files: list[str]) -> Source:
    return photos.files_source(root, files, np.zeros(len(files)), [""], collections.Counter())


def _labels_of_files(
    path: str, maps: Source, given: Labels | Sequence[str] | None, ignored: tuple[int, ...] | None
) -> Labels:
    """Returns the labels of a folder of maps: given, named in a file, or found as values."""
    named = label_maps.read_names(path)
    if named is not None and given is not None:
        _check_same(f"'{path}' ({named[0]})", named[1], _names_of(given))
    labels = _given_labels(given, ignored)
    if labels is not None:
        return labels if named is None else _named(labels, [one[0] for one in named[1]])
    ignored = ignored or ()
    if named is not None:
        if named[0] == "objectInfo150.txt" and 0 not in ignored:
            raise SourceError(
                f"Expected ignored_values=(0,) for '{path}', as its objectInfo150.txt counts classes from 1 "
                f"and 0 is what has none, received {ignored}. Pass {label_maps.passing({*ignored, 0})}."
            )
        names = label_maps.check_names([one[0] for one in named[1]], f"'{path}', {named[0]}")
    else:
        names = _names_found(maps, ignored)
    blank = Labels(names, default_labels(len(names)).palette, ignored)
    palette = label_maps.file_palette(maps.read(0), blank.values)
    return blank if palette is None else dataclasses.replace(blank, palette=palette)


def _names_found(maps: Source, ignored: tuple[int, ...]) -> tuple[str, ...]:
    """Returns names for the values of all maps, after reading them."""

    def values(number: int) -> tuple[np.ndarray, str]:
        return np.unique(label_maps.decode(maps.read(number), maps.name(number))), maps.name(number)

    found: dict[int, str] = {}  # value -> the first map with it
    with Progress("Reading label maps", len(maps)) as progress:
        for number, (some, name) in enumerate(ahead(values, range(len(maps)))):
            for value in some.tolist():
                found.setdefault(value, name)
            progress.show(number + 1)
    labelled = sorted(found.keys() - set(ignored))
    if not labelled:
        raise LabelMapError(
            f"Expected labelled pixels in '{maps.path}', received only the ignored values {sorted(found)}. "
            "Pass other ignored_values."
        )
    last = labelled[-1]
    count = last + 1 - sum(value < last for value in ignored)
    if count > label_maps.MAX_CLASSES or (last == 255 and 254 not in found):
        below = [value for value in labelled if value < 255]
        two = " If it is a class, as in a black and white mask, write 1 for it." if below in ([], [0]) else ""
        raise LabelMapError(
            f"Expected values from 0 to {label_maps.MAX_CLASSES - 1} in '{found[last]}', received {last}; "
            f"the largest below 255 is {max(below, default='none')}. If {last} means not labelled, pass "
            f"{label_maps.passing({*ignored, last})}.{two}"
        )
    return default_labels(count).names


def _labels_of_annotations(
    path: str,
    annotations: coco.Annotations,
    given: Labels | Sequence[str] | None,
    ignored: tuple[int, ...] | None,
) -> Labels:
    """Returns the labels of a COCO-style JSON, whose drawn maps have 255 for what is not labelled."""
    if ignored not in (None, (), (IGNORED,)):
        raise SourceError(
            f"Expected no ignored_values for '{annotations.path}', in which pixels without an annotation are "
            f"not labelled, received {ignored}."
        )
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    named = label_maps.read_names(folder)
    names = [one[0] for one in named[1]] if named else None
    if given is not None and not are_default(_names_of(given)):
        names = _names_of(given)
    names = list(label_maps.check_names(names or annotations.classes, f"'{annotations.path}'"))
    palette = given.palette if isinstance(given, Labels) else default_labels(len(names)).palette
    return Labels(tuple(names), palette, (IGNORED,))


def _names_of(given: Labels | Sequence[str]) -> list[str]:
    return list(given.names if isinstance(given, Labels) else given)


def _given_labels(given: Labels | Sequence[str] | None, ignored: tuple[int, ...] | None) -> Labels | None:
    if given is None or isinstance(given, Labels):
        return (
            given if given is None or ignored is None else dataclasses.replace(given, ignored_values=ignored)
        )
    names = label_maps.check_names(list(given), "labels")
    return Labels(names, default_labels(len(names)).palette, ignored or ())


def _named(labels: Labels, names: Sequence[str]) -> Labels:
    """Gives names to the classes of labels that have none."""
    return dataclasses.replace(labels, names=tuple(names)) if are_default(labels.names) else labels


def _check_same(where: str, own: list[list[str]], given: list[str]) -> None:
    """Refuses labels that are not the classes that the data name; ADE20K's file has several names of each."""
    if len(own) == len(given) and (are_default(given) or are_default([one[0] for one in own])):
        return
    for number, name in enumerate(given[: len(own)]):
        if name.strip().casefold() not in (one.casefold() for one in own[number]):
            near = near_names(name, [one[0] for one in own], 1)
            raise SourceError(
                f"Expected the classes of {where}, but class {number} is '{own[number][0]}' there and "
                f"'{name}' in labels.{near} Both must have the same classes in the same order."
            )
    if len(own) != len(given):
        raise SourceError(f"Expected the {len(own)} classes of {where}, received {len(given)} in labels.")


def stored_labels(stored: dict) -> Labels:
    """Returns the labels that a manifest holds as an object."""
    palette = tuple((red, green, blue) for red, green, blue in stored["palette"])
    return Labels(tuple(stored["names"]), palette, tuple(stored["ignored_values"]))


def _open_prepared(
    path: str, split: str | None, given: Labels | Sequence[str] | None, ignored: tuple[int, ...] | None
) -> SegmentationSource:
    """Opens what `prepare` wrote of a data set with label maps."""
    splits = records.read_manifest(path)["splits"]
    name = str(photos.choose_split(path, "prepared", {key: [path] for key in splits}, split))
    images, maps, stored = records.open_prepared_maps(path, name)
    labels = stored_labels(stored)
    if given is not None:
        _check_same(f"'{path}'", [[one] for one in labels.names], _names_of(given))
        labels = _named(labels, _names_of(given))
    if ignored is not None and ignored != labels.ignored_values:
        raise SourceError(
            f"Expected ignored_values={labels.ignored_values}, with which '{path}' was prepared, received "
            f"{ignored}. Leave them out, or prepare the set again."
        )
    return SegmentationSource(path, "prepared", images, maps, labels)
