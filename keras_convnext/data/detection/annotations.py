"""Boxes and masks of a COCO-style JSON file, checked, as pycocotools takes them."""

import json
import os
from typing import Any

from keras_convnext._files import StrPath, read_bytes, reading
from keras_convnext.data.detection.categories import Categories
from keras_convnext.data.index import SourceError, first_few

_MAX_BYTES = 1 << 31  # of a JSON; COCO's own have 0.5 GB


class Annotations:
    """What a COCO-style JSON says of objects: categories of any ids, images, boxes and, where drawn, masks.

    Annotations get numbers of their own from 1 up: a file may lack or repeat them, and pycocotools takes 0
    for none. An area that is missing is that of the box, `iscrowd` 0. SourceError tells what is wrong.

    Attributes:
        content: the JSON, with these changes.
        categories: in the order of their ids.
        has_masks: whether each annotation has polygons or run lengths.
    """

    def __init__(self, path: StrPath, images: StrPath | None = None) -> None:
        self.path = os.fspath(path)
        with reading(self.path, "COCO-style annotations", "Export it again.", SourceError):
            content = json.loads(read_bytes(self.path, _MAX_BYTES))
            ordered = sorted(content["categories"], key=lambda one: one["id"])
            self.categories = Categories(
                tuple(str(one["name"]) for one in ordered), tuple(one["id"] for one in ordered)
            )
            self.images = sorted(content["images"], key=lambda one: str(one["file_name"]))
            known = {"category_id": set(self.categories.ids), "image_id": {one["id"] for one in self.images}}
            content["annotations"] = [
                self._checked(one, number, known) for number, one in enumerate(content["annotations"], 1)
            ]
        if len(known["image_id"]) < len(self.images):
            raise SourceError(f"Expected an id of its own for each image of '{self.path}'. Export it again.")
        self.content = content
        self.has_masks = all(one.get("segmentation") for one in content["annotations"])
        self._folder = self._found(images)

    def _checked(self, one: dict[str, Any], number: int, known: dict[str, set]) -> dict[str, Any]:
        for key, ids in known.items():
            if one[key] not in ids:
                raise SourceError(
                    f"Expected the {key} of each annotation among those of '{self.path}', received "
                    f"{one[key]!r} in annotation {one.get('id')!r}. Export the file again."
                )
        x, y, width, height = (float(value) for value in one["bbox"])
        if not (width >= 0 and height >= 0):
            raise SourceError(
                f"Expected x, y, width and height of each box of '{self.path}', received {one['bbox']} in "
                f"annotation {one.get('id')!r}. Export the file again."
            )
        changes = {"id": number, "bbox": [x, y, width, height], "iscrowd": int(one.get("iscrowd") or 0)}
        return {**one, **changes, "area": float(one.get("area", width * height))}

    def _found(self, images: StrPath | None) -> str:
        """The folder of the photos: the one that is named, or that of the JSON, or `images` in it."""
        here = os.path.dirname(os.path.abspath(self.path))
        folders = [here, os.path.join(here, "images")] if images is None else [os.fspath(images)]
        names = [str(one["file_name"]) for one in self.images]
        if not names:
            raise SourceError(f"Expected images in '{self.path}', received none.")
        for folder in folders:
            if os.path.isfile(os.path.join(folder, names[0])):
                break
        missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if missing:
            raise SourceError(
                f"Expected the {len(names)} images of '{self.path}' in '{folder}', missing: "
                f"{first_few(missing)}. Name their folder with --images."
            )
        return folder

    def file(self, number: int) -> str:
        """The path of an image."""
        return os.path.join(self._folder, str(self.images[number]["file_name"]))

    def name(self, number: int) -> str:
        return str(self.images[number]["file_name"])

    def __len__(self) -> int:
        return len(self.images)
