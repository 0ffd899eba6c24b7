"""Names of the classes of ImageNet and of Tiny ImageNet, in the order of the classifier outputs.

Facts: the class lists and names that timm 1.0.31 carries (timm/data/_info, Apache-2.0, copyright Ross
Wightman). The names are the words of WordNet synsets: WordNet 3.0 Copyright 2006 by Princeton University. All
rights reserved. NOTICE.txt next to this file has the full notice.

imagenet_names.txt.gz holds one line a synset, sorted by id: "<synset id>\t<membership>\t<name>", where
membership is the sum of 1 (ImageNet-1k), 2 (the 12k subset of timm) and 4 (ImageNet-22k, fall 2011 release).
All class orders are that of the ids. tiny_imagenet_ids.txt holds the 200 ids of Tiny ImageNet (CS231n at
Stanford, wnids.txt), all among ImageNet-1k's.
"""

import contextlib
import functools
import gzip
import json
import os
from collections.abc import Iterable
from importlib import resources
from typing import Any

from keras_convnext._messages import printable

_MEMBERSHIP: dict[int | str, int] = {1000: 1, 11821: 2, 21841: 4}
TINY_IMAGENET = "tiny_imagenet200"


def find_class_list(dataset: str, classes: int) -> int | str | None:
    """What `class_names` takes for a classifier of so many classes; None when there is no list.

    `dataset` is what it was trained on, as `weights.catalog` says; "" where that is not known.
    """
    if dataset == TINY_IMAGENET:
        return TINY_IMAGENET
    return classes if classes in _MEMBERSHIP else None


def to_lines(names: Iterable[str]) -> str:
    """Returns the text of a labels file: a name in each line, which `from_lines` reads back.

    A name that would not come back so, as it has line ends, blanks around it, quotation marks or bytes that
    are not UTF-8, is written as JSON in ASCII.
    """
    lines = (name if from_lines(name) == [name] == [printable(name)] else json.dumps(name) for name in names)
    return "".join(f"{line}\n" for line in lines)


def from_lines(text: str) -> list[str]:
    """Returns the names in a labels file: its lines that are not blank; a text of JSON is read as that."""
    names = []
    for line in filter(None, map(str.strip, text.splitlines())):
        with contextlib.suppress(ValueError):
            line = json.loads(line) if line.startswith('"') else line
        names.append(line)
    return names


def labels_beside(path: str | os.PathLike[str] | None) -> str | None:
    """Returns the path of the labels file next to a model's file: x.labels.txt of x.keras, if it is there."""
    stems = () if path is None else (os.path.splitext(path)[0], os.fspath(path))
    return next((file for stem in stems if os.path.exists(file := f"{stem}.labels.txt")), None)


def class_names(classes: int | str) -> list[str]:
    """Names the classes of an ImageNet classifier, index i for logit i.

    `classes` is the width of the classifier: 1000 (ImageNet-1k), 11821 (ImageNet-12k) or 21841
    (ImageNet-22k); or "tiny_imagenet200" (other data have 200 classes too). A name is all words of the
    synset, separated by ", ". Names are not unique ("crane" is a bird and a machine); `synset_ids` are.
    """
    return [name for _, name in _known_synsets(classes)]


def synset_ids(classes: int | str) -> list[str]:
    """Lists the WordNet ids of the classes, such as "n01440764", in the order of `class_names`.

    ImageNet's class folders have these names, so the list also orders the folders.
    """
    return [synset_id for synset_id, _ in _known_synsets(classes)]


def decode_predictions(preds: Any, top: int = 5, classes: int | str | None = None) -> list[list[tuple]]:
    """Names the likeliest classes of each image, as `decode_predictions` of keras.applications does.

    `preds` is (N, K), probabilities as `model.predict` gives them; `classes` what `class_names` takes, by
    default K. Gives for each image a list of (WordNet id, first word of the name, probability), the likeliest
    first. ValueError for probabilities that are not finite or that have no list.

    Example:
        >>> decode_predictions(np.eye(1000)[[2]], top=1)
        [[('n01484850', 'great_white_shark', 1.0)]]
    """
    import keras
    import numpy as np

    preds = keras.ops.convert_to_numpy(preds)
    if preds.ndim != 2 or not np.isfinite(preds).all() or top < 1:
        raise ValueError(
            f"Expected finite probabilities (N, classes), and top from 1. Received: top={top}, shape "
            f"{preds.shape}, {np.isfinite(preds).sum()} of {preds.size} finite"
        )
    synsets = _known_synsets(preds.shape[1] if classes is None else classes)
    if len(synsets) != preds.shape[1]:
        raise ValueError(f"Expected probabilities of {len(synsets)} classes. Received: shape {preds.shape}")
    names = [(synset_id, name.split(", ")[0].replace(" ", "_")) for synset_id, name in synsets]
    return [[(*names[i], float(row[i])) for i in row.argsort()[::-1][:top]] for row in preds]


def _known_synsets(classes: int | str) -> tuple[tuple[str, str], ...]:
    if classes not in [*_MEMBERSHIP, TINY_IMAGENET]:
        raise ValueError(
            f"No class names for {classes!r} classes. Known: 1000 (ImageNet-1k), 11821 (ImageNet-12k), 21841 "
            "(ImageNet-22k), 'tiny_imagenet200'. Classes of other data have no list here."
        )
    return _synsets(classes)


@functools.cache
def _synsets(classes: int | str) -> tuple[tuple[str, str], ...]:
    if classes == TINY_IMAGENET:
        names = dict(_synsets(1000))
        ids = (resources.files(__package__) / "tiny_imagenet_ids.txt").read_text(encoding="utf-8").split()
        return tuple((synset_id, names[synset_id]) for synset_id in ids)
    file = resources.files(__package__) / "imagenet_names.txt.gz"
    text = gzip.decompress(file.read_bytes()).decode("utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return tuple(
        (synset_id, name) for synset_id, membership, name in rows if int(membership) & _MEMBERSHIP[classes]
    )
