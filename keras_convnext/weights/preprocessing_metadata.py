"""Stores in a weight file how its images are prepared, and reads it back.

A `.safetensors` file has it in its metadata, an `.h5` file in an attribute, a `.keras` file in a member of
its archive; each as the same JSON under the same name. Other programs ignore it.
"""

import dataclasses
import json
import math
import os
import pathlib
import zipfile
from typing import Any

from keras_convnext.weights import arrays, safetensors_files
from keras_convnext.weights.published import IMAGENET_MEAN, IMAGENET_STD, Checkpoint

KEY = "keras_convnext.images"
DESCRIBED_SUFFIXES = (".safetensors", ".h5", ".keras")
_RESIZE_MODES = ("shorter_side", "squash")
_INTERPOLATIONS = ("bicubic", "bilinear")


@dataclasses.dataclass(frozen=True)
class ImageDescription:
    """How the images of a model are prepared: resized, cut to the centre, normalised.

    The defaults are those of `preprocess.preprocess_image`, and ImageNet's mean and standard deviation.

    Args:
        image_size: side in pixels of the square the model sees, at least 32.
        crop: float in (0, 1], `image_size` / size after the resize.
        resize_mode: "shorter_side", or "squash" to resize both sides, which loses the aspect ratio.
        resize_size: pixels after the resize; None for floor(image_size / crop).
        interpolation: "bicubic" or "bilinear", both antialiased as in Pillow.
        mean: of R, G and B, for pixels in 0..1.
        std: of R, G and B, above 0, for pixels in 0..1.

    Raises:
        ValueError: a value is out of range; the message names it.

    Example:
        ImageDescription(image_size=64, crop=1.0).mean        # (0.485, 0.456, 0.406)
    """

    image_size: int
    crop: float = 0.875
    resize_mode: str = "shorter_side"
    resize_size: int | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check(
            _is_whole(self.image_size) and self.image_size >= 32,
            "image_size to be a whole number from 32 up",
            self.image_size,
        )
        _check(_is_number(self.crop) and 0 < self.crop <= 1, "crop above 0, up to 1", self.crop)
        _check(
            self.resize_mode in _RESIZE_MODES,
            f"resize_mode to be one of {', '.join(_RESIZE_MODES)}",
            self.resize_mode,
        )
        _check(
            self.resize_size is None or (_is_whole(self.resize_size) and self.resize_size >= 1),
            "resize_size to be None or a whole number from 1 up",
            self.resize_size,
        )
        _check(
            self.interpolation in _INTERPOLATIONS,
            f"interpolation to be one of {', '.join(_INTERPOLATIONS)}",
            self.interpolation,
        )
        _check(_is_colour(self.mean), "mean to be three numbers", self.mean)
        _check(
            _is_colour(self.std) and min(self.std) > 0,
            "std to be three numbers above 0",
            self.std,
        )


def describe(row: Checkpoint) -> ImageDescription:
    """Returns how the images of published weights are prepared.

    Args:
        row: a row of the catalog, see `catalog.find_checkpoint`.

    Returns:
        `ImageDescription`, of the size of the published scores.

    Example:
        describe(find_checkpoint("convnext_tiny.fb_in22k_ft_in1k_384")).image_size      # 384
    """
    names = [field.name for field in dataclasses.fields(ImageDescription)]
    return ImageDescription(**{name: getattr(row, name) for name in names})


def to_json(images: ImageDescription) -> str:
    """Returns the text that is stored in a file, the same for the same description.

    Args:
        images: how images are prepared.

    Returns:
        One line of JSON with all fields by name.

    Example:
        to_json(ImageDescription(64))[:15]        # '{"crop": 0.875,'
    """
    return json.dumps(dataclasses.asdict(images), sort_keys=True)


def from_json(text: str, file: str | os.PathLike[str]) -> ImageDescription:
    """Reads what `to_json` wrote.

    Args:
        text: of the file.
        file: what the text is from, for the message.

    Returns:
        `ImageDescription`.

    Raises:
        ValueError: the text is damaged, or a value of it is unknown; file, key, what was expected and what
            was received are named.

    Example:
        from_json(to_json(ImageDescription(64)), "x.safetensors").image_size        # 64
    """
    names = sorted(field.name for field in dataclasses.fields(ImageDescription))
    try:
        try:
            values: dict[str, Any] = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"Expected JSON, received {_shortened(text)}.") from None
        _check(isinstance(values, dict), "an object", values)
        _check(sorted(values) == names, f"the values {', '.join(names)}", sorted(values))
        colours = {name: tuple(values[name]) for name in ("mean", "std") if isinstance(values[name], list)}
        return ImageDescription(**values | colours)
    except ValueError as error:
        raise ValueError(
            f"{file} does not say how its images are prepared: {KEY!r} is damaged. {error} Write the file "
            "again, or pass the tag of weights whose images are prepared in the same way."
        ) from None


def read_images(path: str | os.PathLike[str]) -> ImageDescription | None:
    """Reads from a weight file how its images are prepared.

    Args:
        path: a weight file of any format.

    Returns:
        `ImageDescription`; None where the file does not say, as those of other projects.

    Raises:
        ValueError: what the file says is damaged.
        FileNotFoundError: there is no such file.

    Example:
        read_images("runs/flowers/final.safetensors").image_size
    """
    path = pathlib.Path(path)
    text: Any = None
    try:
        if path.suffix == ".h5":
            import h5py  # here, as the command line's `list` is not to wait for it

            with h5py.File(path, "r") as file:
                text = file.attrs.get(KEY)
        elif path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                text = archive.read(KEY).decode(errors="replace") if KEY in archive.namelist() else None
        else:
            text = safetensors_files.read_safetensors_metadata(path).get(KEY)
    except FileNotFoundError:
        raise
    except (arrays.FileFormatError, zipfile.BadZipFile, OSError):
        return None  # another format or a damaged file, which the reader of its weights tells
    return None if text is None else from_json(str(text), path)


def add_images(path: str | os.PathLike[str], images: ImageDescription) -> None:
    """Writes into an `.h5` or `.keras` file that has none how its images are prepared.

    Args:
        path: a file that Keras has written, under a temporary name still: a stop in between damages it.
        images: how images are prepared.

    Raises:
        ValueError: the file has another ending.
        OSError: the file cannot be written.

    Example:
        model.save_weights("x.weights.h5")
        add_images("x.weights.h5", ImageDescription(64))
    """
    path = pathlib.Path(path)
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path, "r+") as file:
            file.attrs[KEY] = to_json(images)
    elif path.suffix == ".keras":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(zipfile.ZipInfo(KEY), to_json(images))  # with a fixed date: the same bytes again
    else:
        raise ValueError(f"Expected a file ending in .h5 or .keras, received '{path}'.")


def _check(is_right: bool, expected: str, received: object) -> None:
    if not is_right:
        raise ValueError(f"Expected {expected}, received {_shortened(repr(received))}.")


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_colour(values: object) -> bool:
    return isinstance(values, tuple) and len(values) == 3 and all(map(_is_number, values))
