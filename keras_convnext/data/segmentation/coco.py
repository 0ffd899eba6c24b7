"""COCO-style JSON files as label maps: polygons and run lengths, of things and of stuff, drawn when read."""

import collections
import glob
import json
import mmap
import os
from typing import Any

import numpy as np

from keras_convnext._files import read_bytes, reading, regular_size
from keras_convnext.data.index import SourceError, first_few
from keras_convnext.data.segmentation import label_maps
from keras_convnext.data.segmentation.labels import IGNORED

BACKGROUND = "background"  # the class of pixels under no annotation, where the user's classes have it
_MAX_BYTES = 1 << 31  # of a JSON; COCO's own have 0.5 GB
_KEYS = (b'"images"', b'"annotations"', b'"categories"')


class Annotations:
    """What a COCO-style JSON says: its classes, its images, and the maps that its annotations draw.

    Classes are the categories in the order of their ids. Where annotations of an image overlap, the smaller
    one is on top, as it is when each is drawn over those with more pixels. Pixels under none are not
    labelled, unless `classes` has one named "background". Images without any annotation are left out then.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.left_out: collections.Counter[str] = collections.Counter()
        with reading(path, "COCO-style annotations", "Export it again.", SourceError):
            content = json.loads(read_bytes(path, _MAX_BYTES))
            categories = sorted(content["categories"], key=lambda one: one["id"])
            self.classes = [str(one["name"]) for one in categories]
            self._places = {one["id"]: place for place, one in enumerate(categories)}
            self._images = sorted(content["images"], key=lambda one: str(one["file_name"]))
            self._objects: dict[Any, list[dict]] = {one["id"]: [] for one in self._images}
            self._check_images()
            for one in content["annotations"]:
                self._check(one)
                self._objects[one["image_id"]].append(one)
        self._numbers = np.arange(len(self.classes))
        self._outside = IGNORED

    def _check_images(self) -> None:
        if len(self._objects) < len(self._images):
            counts = collections.Counter(one["id"] for one in self._images)
            (twice, count), *_ = counts.most_common(1)
            raise SourceError(
                f"Expected an id of its own for each image of '{self.path}', received {twice!r} for {count} "
                "of them. Export the file again."
            )

    def _check(self, one: dict) -> None:
        if one["category_id"] not in self._places or one["image_id"] not in self._objects:
            key = "category_id" if one["category_id"] not in self._places else "image_id"
            raise SourceError(
                f"Expected the {key} of each annotation among those of '{self.path}', received {one[key]!r} "
                f"in annotation {one.get('id')!r}. Export the file again."
            )
        if not one.get("segmentation"):
            raise SourceError(
                f"Expected polygons or run lengths in each annotation of '{self.path}', annotation "
                f"{one.get('id')!r} has only a box. Export it with masks."
            )

    def number_as(self, classes: list[str]) -> None:
        """Numbers the categories as positions in a list of names; SourceError where one is not in it."""
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise SourceError(
                f"Expected the categories of '{self.path}' among the {len(classes)} classes given "
                f"({first_few(classes)}); {len(unknown)} are not: {first_few(unknown)}."
            )
        self._numbers = np.array([classes.index(name) for name in self.classes])
        self._outside = classes.index(BACKGROUND) if BACKGROUND in classes else IGNORED

    def leave_out_empty(self) -> None:
        """Leaves out images of which no pixel is labelled."""
        if self._outside == IGNORED:
            kept = [one for one in self._images if self._objects[one["id"]]]
            if not kept:
                raise SourceError(
                    f"Expected annotations of images in '{self.path}', received none for its "
                    f"{len(self._images)} images. Export the file with its annotations."
                )
            self.left_out += collections.Counter(
                {"images without annotations": len(self._images) - len(kept)}
            )
            self._images = kept

    def files(self, split: str | None) -> list[str]:
        """Returns the path of each image: beside the JSON, or in one of the usual folders near it."""
        names = [str(one["file_name"]) for one in self._images]
        here = os.path.dirname(os.path.abspath(self.path))
        inner = [part for part in ("images", split, f"images/{split}") if part]
        roots = [
            os.path.join(place, part) for place in (here, os.path.dirname(here)) for part in ("", *inner)
        ]
        root = next((root for root in roots if names and os.path.isfile(os.path.join(root, names[0]))), None)
        missing = [name for name in names if not root or not os.path.isfile(os.path.join(root, name))]
        if root is None or missing:
            where = f"'{root}'" if root else f"'{here}', its folder 'images' or beside it"
            raise SourceError(
                f"Expected the {len(names)} images of '{self.path}' in {where}, missing: {first_few(missing)}"
                ". Put the file beside the images."
            )
        return [os.path.join(root, name) for name in names]

    def take(self, numbers: list[int]) -> "Annotations":
        """Returns the maps at some places, in that order."""
        other = object.__new__(Annotations)
        other.__dict__ |= self.__dict__
        other._images = [self._images[number] for number in numbers]
        return other

    def __len__(self) -> int:
        return len(self._images)

    def name(self, number: int) -> str:
        return f"{os.path.basename(self.path)}, {self._images[number]['file_name']}"

    def read(self, number: int) -> bytes:
        """Draws the label map of an image: a PNG of class numbers and 255 for not labelled."""
        with reading(self.path, f"annotations of '{self.name(number)}'", "Export it again.", SourceError):
            one = self._images[number]
            size = int(one["height"]), int(one["width"])
            drawn = []
            for each in self._objects[one["id"]]:
                mask = draw(each["segmentation"], size)
                drawn.append((int(mask.sum()), self._numbers[self._places[each["category_id"]]], mask))
            label_map = np.full(size, self._outside, np.uint8)
            for _, label, mask in sorted(drawn, key=lambda item: -item[0]):  # stable: of equal ones the later
                label_map[mask] = label
        return label_maps.encode(label_map)


def is_annotations(path: str) -> bool:
    """Tells whether a file is a JSON that has images, annotations and categories, without parsing it."""
    if not path.lower().endswith(".json") or not regular_size(path):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(content.find(key) >= 0 for key in _KEYS)


def find_annotations(path: str) -> dict[str | None, str]:
    """Returns the COCO-style JSON files of a folder by split, which is in the file's or its folder's name."""
    from keras_convnext.data.sources import canonical_split

    found: dict[str | None, str] = {}
    for pattern in ("*.json", "annotations/*.json", "*/_annotations.coco.json"):
        for file in sorted(glob.glob(os.path.join(glob.escape(path), pattern))):
            if not os.path.isfile(file) or not is_annotations(file) or file in found.values():
                continue
            folder = os.path.basename(os.path.dirname(file)) if pattern.startswith("*/") else ""
            stem = os.path.splitext(os.path.basename(file))[0]
            split = folder or next((part for part in stem.split("_") if canonical_split(part)), None)
            if split in found:
                raise SourceError(
                    f"Expected one COCO-style JSON for each split in '{path}', received "
                    f"'{os.path.basename(found[split])}' and '{os.path.basename(file)}'. Pass one of them."
                )
            found[split] = file
    return found


def draw(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Draws an annotation, bool (height, width): a list of polygons [x0, y0, x1, ...] or run lengths.

    Run lengths are of columns, beginning with what is outside: {"size": [height, width], "counts": ...}, the
    counts a list, or a text in which COCO's tools pack them.
    """
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"run lengths of size {segmentation['size']} in an image of {list(size)}")
        counts = segmentation["counts"]
        counts = unpacked(counts) if isinstance(counts, str) else counts
        if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
            raise ValueError(f"run lengths of {sum(counts)} pixels in an image of {size[0] * size[1]}")
        values = np.arange(len(counts)) % 2 == 1
        return np.repeat(values, counts).reshape(size[::-1]).T
    mask = np.zeros(size, bool)
    for polygon in segmentation:
        mask |= filled(np.reshape(np.asarray(polygon, np.float64), (-1, 2)), size)
    return mask


def filled(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fills a polygon, float64 (n, 2) of x and y: pixels whose centres are inside, even-odd."""
    height, width = size
    toggled = np.zeros((height, width + 1), bool)  # where a row enters or leaves the polygon
    for (x0, y0), (x1, y1) in zip(points.tolist(), np.roll(points, -1, 0).tolist(), strict=True):
        first, last = (int(np.clip(np.ceil(y - 0.5), 0, height)) for y in sorted((y0, y1)))
        if first < last:
            rows = np.arange(first, last)
            crossings = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(np.int64)
            toggled[rows, columns] ^= True
    return np.logical_xor.accumulate(toggled, axis=1)[:, :width]


def unpacked(text: str) -> list[int]:
    """Returns the run lengths in COCO's text form.

    Each has characters of five bits, the lowest first, from "0" up, bit 5 set where more follow, and is in
    two's complement; from the fourth on they are differences to the one before the last.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (1 << shift) if bits & 16 else 0
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """The run lengths of a mask bool (height, width), as `draw` reads them and COCO's tools write them."""
    pixels = np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])
    ends = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(ends, prepend=0).tolist()
    return {"size": list(mask.shape), "counts": packed(counts)}


def packed(counts: list[int]) -> str:
    """Returns run lengths as the text that `unpacked` reads."""
    text = bytearray()
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        is_last = False
        while not is_last:
            bits, value = value & 31, value >> 5
            is_last = value == (-1 if bits & 16 else 0)
            text.append(48 + bits + 32 * (not is_last))
    return text.decode("ascii")
