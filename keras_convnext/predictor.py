"""`open_predictor`: a trained classifier by name or by file, with the preparation of its images."""

import dataclasses
import os
import pathlib
from typing import Any

import keras
import numpy as np
import PIL.Image

from keras_convnext import _messages, models
from keras_convnext.data import class_names
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import catalog, keras_files, layouts, locate, preprocessing_metadata, resolve
from keras_convnext.weights.preprocessing_metadata import ImageDescription
from keras_convnext.weights.published import Checkpoint, names_file

DEFAULT_SIZE = 224  # pixels, for a model that takes images of any size


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model and how its images are prepared.

    Attributes:
        model: `keras.Model`, (N, H, W, 3 or 1) pixels in 0..255 to (N, classes).
        preparation: arguments of `preprocess.preprocess_image`.
        row: the published weights that it has; None for other weights.
        file: the weight file; None when it cannot be told.
    """

    model: Any
    preparation: dict[str, Any]
    row: Checkpoint | None
    file: pathlib.Path | None

    @property
    def class_list(self) -> int | str | None:
        """What `class_names.class_names` takes for the outputs; None when their names are not known."""
        dataset = "" if self.row is None else self.row.dataset
        return class_names.find_class_list(dataset, self.model.output_shape[-1])


def open_predictor(
    name: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    classes: int | None = None,
    classifier_activation: str | None = "softmax",
) -> Predictor:
    """Builds the model that a tag, an architecture or a file means.

    A tag decides how images are prepared; without one a file that says it (`save_weights`, the files of
    training), else the tag of the architecture's ImageNet weights. A weight file says which architecture it
    holds; a `.keras` file brings a whole model, and for its images the defaults of
    `preprocess.preprocess_image` hold when it does not say more and no name is given.

    Args:
        name: tag or architecture, or the path of a weight file.
        weights: a weight file or a `.keras` file; then a tag in `name` says only how images are prepared
            and normalised. Also "imagenet" or a short tag, where `name` is an architecture. Default: the
            weights of the tag, or the architecture's ImageNet weights.
        image_size: side of the images in pixels. Default: that of the tag or the file.
        classes: classes of an `.h5` file of this package, which does not say how many it has.
        classifier_activation: "softmax", or None for logits; a `.keras` file keeps its own.

    Returns:
        `Predictor`.

    Raises:
        ValueError: the name is unknown, has no classifier, or the file does not fit; the message tells.
        FileNotFoundError: no such file.

    Example:
        open_predictor("convnext_tiny.fb_in22k_ft_in1k_384").preparation["crop"]   # 1.0
    """
    name = None if name is None else os.fspath(name)
    if weights is None and name is not None and names_file(name):
        name, weights = None, name
    if weights is None and name is None:
        raise ValueError("Expected a tag, an architecture or a weight file, received None.")
    if weights is not None and not isinstance(weights, os.PathLike) and not names_file(weights):
        if name not in VARIANTS:
            raise ValueError(
                f"Expected an architecture beside weights={weights!r}, received {name!r}. Pass the full tag "
                "alone, or a file as weights."
            )
        name, weights = catalog.find_checkpoint(weights, architecture=name).tag, None
    if weights is not None and os.fspath(weights).endswith(".keras"):
        return _open_keras_model(resolve.existing_file(weights), name, image_size)

    path = images = None
    if weights is not None:
        path = resolve.existing_file(weights)
        images = described(path, name)
        if keras_files.is_bare(path):
            if name is None:
                raise ValueError(f"{path} does not say which architecture it holds. Pass its name too.")
        else:
            state = resolve.read_file(path)
            with resolve.naming(path):
                classes = layouts.inspect(state).classes
                name = name or layouts.find_variant(state).name
            if classes == 0:
                raise ValueError(f"{path} has no classifier. Pass weights that have one.")
    row = row_for(str(name), needs_classes=path is None)
    size = image_size or (images or row).image_size
    model = models.load(
        str(name),
        weights=path or "default",
        classes=classes if path is not None else None,
        input_shape=(size, size, 3),
        classifier_activation=classifier_activation,
    )
    if path is not None:
        return Predictor(model, preparation(images or row, size), None, path)
    return Predictor(model, preparation(row, size), row, locate.find_local(row))


def row_for(name: str, needs_classes: bool = False) -> Checkpoint:
    """Finds the published weights that a tag or an architecture means.

    Raises:
        ValueError: the name is unknown, or `needs_classes` and they do not end in ImageNet's classes.
    """
    if name in VARIANTS:
        return catalog.default_checkpoint(name)
    if "." not in name and name not in catalog.ALIASES:
        raise ValueError(_messages.unknown("architecture", name, VARIANTS))
    row = catalog.find_checkpoint(name)
    if needs_classes and (row.is_projection or not row.classes):
        instead = catalog.IMAGENET[row.architecture] or catalog.IMAGENET["convnext_tiny"]
        what = f"gives {row.classes} features of CLIP, not classes" if row.classes else "has no classifier"
        raise ValueError(f"{row.tag!r} {what}. Use weights that have one, for example {instead}.")
    return row


def described(path: pathlib.Path, name: str | None) -> ImageDescription | None:
    """Returns how a file says that its images are prepared; None with a tag as name, which says it instead.

    Raises:
        ValueError: what the file says is damaged.
    """
    return preprocessing_metadata.read_images(path) if not name or name in VARIANTS else None


def preparation(
    row: Checkpoint | ImageDescription, image_size: int | tuple[int, int] | None = None
) -> dict[str, Any]:
    """Returns the arguments of `preprocess.preprocess_image` for published weights or a described file.

    Args:
        row: the published weights, or what a weight file says of its images.
        image_size: side in pixels, or (height, width). At the size that timm recommends for testing, its
            crop for that size is used. Default: the size of the published scores.
    """
    size = image_size or row.image_size
    is_published_size = size in (row.image_size, (row.image_size, row.image_size))
    crop: float | None = row.crop
    if isinstance(row, Checkpoint) and not is_published_size:
        is_test_size = size in (row.test_image_size, (row.test_image_size, row.test_image_size))
        crop = row.test_crop if is_test_size else row.crop
    return {
        "image_size": size,
        "crop": crop,
        "resize_mode": row.resize_mode,
        "resize_size": row.resize_size if is_published_size else None,
        "interpolation": row.interpolation,
    }


def for_channels(images: np.ndarray, model: Any) -> np.ndarray:
    """Turns uint8 images (N, H, W, 3), RGB, into gray (N, H, W, 1) for a model of one channel."""
    if model.input_shape[-1] != 1:
        return images
    return np.stack([np.asarray(PIL.Image.fromarray(image).convert("L")) for image in images])[..., None]


def check_model(
    model: Any, image_size: int | tuple[int, int] | None, name: str, default_size: int = DEFAULT_SIZE
) -> tuple[int, int]:
    """Returns the (height, width) of the images that a model is fed: its own, `image_size` or the default.

    Raises:
        ValueError: the model does not end in (N, classes), or takes images of another size.
    """
    shape = getattr(model, "output_shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 2):
        raise ValueError(
            f"Expected a model that ends in (N, classes). Received {name}, with outputs {shape}."
        )
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    height, width = (
        own or wanted or default_size for own, wanted in zip(model.input_shape[1:3], sides, strict=True)
    )
    if sides[0] not in (None, height) or sides[1] not in (None, width):
        raise ValueError(
            f"{name} takes images of {height} x {width}. Received: image size {image_size}. Leave it out."
        )
    return height, width


def _open_keras_model(path: pathlib.Path, name: str | None, image_size: int | None) -> Predictor:
    """A whole model, with the input size and the classes it was saved with."""
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # damaged archives and unknown layers raise of many classes
        raise ValueError(f"{path} could not be opened as a Keras model: {error}") from error
    row = described(path, name) or (None if name is None else row_for(name))
    if row is None:
        size = check_model(model, image_size, str(path))
        return Predictor(model, {"image_size": size}, None, path)
    size = check_model(model, image_size, str(path), row.image_size)
    return Predictor(model, preparation(row, size), None, path)
