"""Stores in a weight file which classes its segmenter or detector tells apart, and reads them back.

As `preprocessing_metadata` does, under another key; OpenMMLab's files say it in "meta".
"""

import dataclasses
import json
import pathlib
from typing import Any

from keras_convnext._files import FileFormatError, StrPath
from keras_convnext._messages import short_repr
from keras_convnext.data.detection.categories import Categories, coco
from keras_convnext.data.segmentation.ade20k import ade20k
from keras_convnext.data.segmentation.labels import Labels
from keras_convnext.weights import torch_files
from keras_convnext.weights.preprocessing_metadata import add_text, read_text
from keras_convnext.weights.published import KERAS_SUFFIXES

KEY = "keras_convnext.labels"


def to_json(labels: Labels | Categories) -> str:
    """The text that is stored in a file: one line, the same for the same labels."""
    return json.dumps(dataclasses.asdict(labels), sort_keys=True)


def from_json(text: str, file: StrPath) -> Labels | Categories:
    """Reads what `to_json` wrote into `file`; a ValueError names it and says what is damaged."""
    try:
        values = json.loads(text)
        if "ids" in values:
            return Categories(*map(tuple, (values["names"], values["ids"])))
        return _labels(values["names"], values["palette"], values["ignored_values"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"{file} does not say which classes it has: {KEY!r} is damaged. Expected names, and palette and "
            f"ignored_values or ids, received {short_repr(text)}. Write the file again."
        ) from None


def read_labels(path: StrPath, task: str = "segmentation") -> Labels | Categories | None:
    """Reads the classes from a weight file of any format; None where it does not say them.

    OpenMMLab's files have them under "CLASSES" and "PALETTE", later in "dataset_meta". They do not say which
    values of label maps are ignored, nor the ids of categories: those with ADE20K's or COCO's names have
    theirs, other categories are counted from 1.
    """
    path = pathlib.Path(path)
    text = read_text(path, KEY)
    if text is not None:
        labels = from_json(text, path)
        return labels if isinstance(labels, Categories) == (task == "detection") else None
    if path.suffix in (*KERAS_SUFFIXES, ".safetensors"):
        return None
    try:
        meta = torch_files.read_meta(path)
    except FileFormatError:
        return None  # which the reader of its weights tells
    meta = {str(name).lower(): value for name, value in (meta.get("dataset_meta") or meta).items()}
    try:
        names = [name.strip() for name in meta["classes"]]  # "bed " is there
        if task == "detection":
            categories = Categories(tuple(names), tuple(range(1, len(names) + 1)))
            return coco() if categories.names == coco().names else categories
        labels = _labels(names, meta["palette"], ())
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # of another program: not said, or not in this way
    return ade20k() if labels.names == ade20k().names else labels


def add_labels(path: StrPath, labels: Labels | Categories) -> None:
    """Writes the classes into an `.h5` or `.keras` file, as `preprocessing_metadata.add_text` does."""
    add_text(path, KEY, to_json(labels))


def _labels(names: Any, palette: Any, ignored_values: Any) -> Labels:
    """Checked labels of lists; a ValueError or TypeError where they are none."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError("names are no texts")
    colours = [tuple(map(int, colour)) for colour in palette]
    is_colour = all(len(colour) == 3 and 0 <= min(colour) <= max(colour) <= 255 for colour in colours)
    if not names or not is_colour or len(colours) != len(names):
        raise ValueError("not a colour for each name")
    return Labels(tuple(names), tuple(colours), tuple(map(int, ignored_values)))  # type: ignore[arg-type]
