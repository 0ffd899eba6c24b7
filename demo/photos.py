"""The photos that the demo learns: read, divided, drawn in batches."""

import collections
import csv
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from keras_convnext.data import index, preprocess, sources
from keras_convnext.data.preprocessing import Preprocessing

FLOWERS = pathlib.Path(__file__).parents[1] / "recipes" / "flowers"
SIDE = 96  # pixels, of the photos that are learned
PREPROCESSING = Preprocessing(SIDE, crop_fraction=1.0)
HELD_OUT_EVERY = 5  # photos of a class


@dataclasses.dataclass(frozen=True)
class PhotoSet:
    """Photos to learn, and those held out.

    Attributes:
        title: what reports call it.
        classes: their names.
        images: uint8 (N, 96, 96, 3).
        labels: int32 (N,).
        names: of the files, (N,).
        training, held_out: int (n,), places in `images`; none is in both.
        credits: file -> {"photographer": ..., "address": ...}, of the flowers.
    """

    title: str
    classes: list[str]
    images: np.ndarray
    labels: np.ndarray
    names: list[str]
    training: np.ndarray
    held_out: np.ndarray
    credits: dict[str, dict[str, str]]


def read_photos(folder: pathlib.Path | None, limit: int, seed: int) -> PhotoSet:
    """Reads a folder of class folders and holds every fifth photo of a class out, by name.

    Data that is divided into train and validation stays so. Photos that cannot be read are named on standard
    error and left out.

    Args:
        folder: the folder; None for the flowers of the repository.
        limit: most photos, drawn by `seed`, the same number of each class.
        seed: of the draw.

    Raises:
        ValueError: nothing usable is at the path, there is one class only, or a class has fewer than two
            photos.
    """
    path = folder or FLOWERS
    splits = {sources.canonical_split(name) or name for name in sources.list_splits(path)}
    if "train" in splits:
        training = sources.open_source(path, "train")
        parts = [training, sources.open_source(path, "validation", classes=training.classes)]
    else:
        parts = [sources.open_source(path)]
    classes = parts[0].classes
    if len(classes) < 2:
        raise ValueError(f"Expected a folder for each of several classes in '{path}', found {classes}.")
    share = max(limit // len(classes) // len(parts), 1)
    kept = [_read_source(part, share, seed) for part in parts]
    images, labels, names = ([value for part in kept for value in part[field]] for field in range(3))
    is_held_out = np.arange(len(labels)) >= len(kept[0][1])
    if len(parts) == 1:
        order: collections.Counter[int] = collections.Counter()
        for place in sorted(range(len(names)), key=names.__getitem__):
            is_held_out[place] = order[labels[place]] % HELD_OUT_EVERY == 0
            order[labels[place]] += 1
    numbers = np.array(labels, "int32")
    for number, name in enumerate(classes):
        counts = [int((numbers[chosen] == number).sum()) for chosen in (~is_held_out, is_held_out)]
        if 0 in counts:
            raise ValueError(
                f"Expected two photos or more of each class, to learn one and hold one out. Received: "
                f"{sum(counts)} of {name!r} in '{path}', with --limit {limit}. Add photos or raise --limit."
            )
    return PhotoSet(
        "flowers" if folder is None else path.resolve().name,
        classes,
        np.stack(images),
        numbers,
        names,
        np.flatnonzero(~is_held_out),
        np.flatnonzero(is_held_out),
        _read_credits(path / "CREDITS.csv") if folder is None else {},
    )


def _read_credits(path: pathlib.Path) -> dict[str, dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return {row.pop("file"): row for row in csv.DictReader(file)}


def _read_source(source: index.Source, share: int, seed: int) -> tuple[list, list, list]:
    """Pixels, labels and names of at most `share` photos of each class."""
    images, labels, names, faults = [], [], [], []
    transform = functools.partial(preprocess.prepared, preprocessing=PREPROCESSING)
    generator = np.random.default_rng(seed)
    for label in range(len(source.classes)):
        numbers = np.flatnonzero(source.labels == label)
        for number in sorted(generator.permutation(numbers)[:share].tolist()):
            name = source.name(number)
            try:
                image = preprocess.decode_image(source.read(number), name, transform)
            except (preprocess.ImageError, OSError) as error:
                faults.append(str(error))
                continue
            images.append(image)
            labels.append(label)
            names.append(name)
    for fault in faults[:5]:
        print(f"left out: {fault}", file=sys.stderr)
    if len(faults) > 5:
        print(f"left out: {len(faults) - 5} more photos", file=sys.stderr)
    return images, labels, names


def batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Makes shuffled batches without end, images shifted by up to a tenth, half of them mirrored.

    Yields:
        uint8 (batch_size, H, W, C), int32 (batch_size,). The incomplete last batch of an epoch is left out:
        JAX would compile the training step once more for it.
    """
    generator = np.random.default_rng(seed)
    height, width = images.shape[1:3]
    margin = height // 10
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            padded = np.pad(images[chosen], ((0, 0), (margin, margin), (margin, margin), (0, 0)), "reflect")
            corners = generator.integers(0, 2 * margin + 1, (batch_size, 2))
            steps = generator.choice((-1, 1), batch_size)
            crops = [
                image[top : top + height, left : left + width][:, ::step]
                for image, (top, left), step in zip(padded, corners, steps, strict=True)
            ]
            yield np.stack(crops), labels[chosen]
