"""Images that a quantised file is calibrated with and every exported file is checked on."""

import importlib.resources
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from keras_convnext.data import preprocess, sources
from keras_convnext.data.index import IMAGE_SUFFIXES, images_below
from keras_convnext.data.preprocessing import Preprocessing

PHOTOS = ("cat.jpg", "coffee.jpg", "rocket.jpg")  # free to use, see photos/README.md
DEFAULT_COUNT = 32


def calibration_images(
    source: str | os.PathLike[str] | None = None,
    *,
    preprocessing: Preprocessing,
    count: int = DEFAULT_COUNT,
    channels: int = 3,
    split: str | None = None,
) -> np.ndarray:
    """Loads a representative set of images, uint8 (n, height, width, channels).

    Args:
        source: a folder of images, at any depth; one image; or a data set as `evaluate` takes it. Images are
            taken at even distances from it and prepared as for evaluation. None for random crops of three
            photographs that come with the package, the same at each call: enough to check a file and to
            calibrate it roughly; images of your own kind calibrate better.
        preprocessing: how images are prepared; the random crops have its image size alone.
        count: number of images; fewer where the source has fewer.
        channels: 3 for RGB, 1 for gray.
        split: of a data set that has several.

    Raises:
        ValueError: an image cannot be read or is not there, `count` or `channels` is out of range.

    Example:
        >>> calibration_images(preprocessing=Preprocessing(64), count=2).shape
        (2, 64, 64, 3)
    """
    if count < 1:
        raise ValueError(f"Expected a count of calibration images from 1 up, received {count}.")
    if channels not in (1, 3):
        raise ValueError(
            f"Expected a model of 1 or 3 channels, received one of {channels}: pass images of your own as an "
            "array (n, H, W, C), or check=False (--no-check)."
        )
    if source is None:
        images = _crops(preprocessing.size, count)
    else:
        images = _prepared(source, preprocessing, count, split)
    if channels == 1:
        return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    return np.stack(images)


def _crops(image_size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Crops of a fifth of the photographs' area or more, every other one mirrored."""
    folder = importlib.resources.files("keras_convnext.data") / "photos"
    pixels = [preprocess.decode_image((folder / name).read_bytes(), name) for name in PHOTOS]
    photos = [Image.fromarray(image) for image in pixels]
    generator = np.random.default_rng(0)
    height, width = image_size
    images = []
    for number in range(count):
        photo = photos[number % len(photos)]
        share = generator.uniform(0.45, 1.0)  # of the largest box with the wanted ratio of sides
        zoom = share * min(photo.width / width, photo.height / height)
        box_width, box_height = zoom * width, zoom * height
        left = generator.uniform(0, photo.width - box_width)
        top = generator.uniform(0, photo.height - box_height)
        box = (left, top, left + box_width, top + box_height)
        image = photo.resize((width, height), Image.Resampling.BICUBIC, box)
        images.append(np.asarray(image)[:, :: -1 if number % 2 else 1])
    return images


def _prepared(
    source: str | os.PathLike[str], preprocessing: Preprocessing, count: int, split: str | None
) -> list[np.ndarray]:
    path = pathlib.Path(source)
    holds_images = path.is_dir() and split is None and images_below(os.fspath(path))[0]
    if holds_images or path.suffix.lower() in IMAGE_SUFFIXES:
        files = preprocess.find_images(path)
        found = ((preprocess.read_file(file), str(file)) for file in _evenly(files, count))
    else:
        data = sources.open_source(source, split)
        found = ((data.read(number), data.name(number)) for number in _evenly(range(len(data)), count))
    return [preprocess.decode_prepared(content, name, preprocessing) for content, name in found]


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, or all, at even distances."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]
