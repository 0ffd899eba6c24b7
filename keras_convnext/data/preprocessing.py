"""`Preprocessing`: how images are prepared, in the words of `keras_convnext.data.eval_image`."""

import dataclasses
import math
import numbers
from typing import Any

from keras_convnext._messages import short_repr

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_MODES = ("center", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")

# Weight files, the catalog, recipes and results.csv have names of their own for two fields and one value.
_STORED_NAMES = {"crop_fraction": "crop", "crop_mode": "resize_mode"}
_STORED_MODES = {"center": "shorter_side", "squash": "squash"}
RESIZE_MODES = tuple(_STORED_MODES.values())

# What files may ask for: larger pictures take the memory, and other normalisers the digits, of the machine.
MAX_SIDE = 16_384
MIN_CROP_FRACTION = 0.01


def preprocess_input(x: Any, data_format: str | None = None) -> Any:
    """Returns pixels in 0..255 as they are, as in keras.applications: the models normalise by themselves.

    ValueError for a `data_format` other than "channels_last".
    """
    if data_format not in (None, "channels_last"):
        raise ValueError(
            f"Expected images (N, H, W, 3), channels last. Received: data_format={data_format!r}"
        )
    return x


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the pixels of a model: resized, cut to its centre, normalised.

    The image is resized to the scale size, `resize_size` or floor(`image_size` / `crop_fraction`), by
    Pillow's antialiased filter, and the central `image_size` is cut out. The models normalise by themselves.

    Args:
        image_size: pixels of the result, one side of a square or (height, width), each at most 16,384; equal
            sides become one.
        crop_fraction: part of the scale size that the crop keeps along each side, 0.01 to 1. The default is
            timm's `DEFAULT_CROP_PCT`.
        interpolation: "bicubic" or "bilinear", Pillow's filter of that name.
        crop_mode: "center" keeps the aspect ratio and lets the image cover the scale size; "squash" stretches
            the image to it (as published weights are evaluated at 384 px). timm's words.
        resize_size: the scale size of both sides in pixels, at most 16,384, in place of `crop_fraction`,
            which then has no effect. torchvision's ConvNeXt weights give it, such as 236 for 224.
        mean, std: of R, G and B, for pixels in 0..1; from -1000 and 1e-6 to 1000. Default: ImageNet's.

    Raises:
        ValueError: a value is out of range or a name unknown; the message has the value and the allowed ones.

    Example:
        >>> Preprocessing(224, crop_fraction=0.95).scale_size
        (235, 235)
    """

    image_size: int | tuple[int, int]
    crop_fraction: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    resize_size: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        size = self.image_size
        sides = list(size) if isinstance(size, tuple | list) else [size, size]
        if len(sides) != 2 or not all(map(_is_side, sides)):
            raise ValueError(
                f"Expected image_size to be a positive integer or (height, width), at most {MAX_SIDE:,}, "
                f"received {short_repr(size)}. Pass a number of pixels, such as 224 or (224, 320)."
            )
        if not _is_number(self.crop_fraction) or not MIN_CROP_FRACTION <= self.crop_fraction <= 1:
            raise ValueError(
                f"Expected crop_fraction from {MIN_CROP_FRACTION} to 1, received "
                f"{short_repr(self.crop_fraction)}. Pass the fraction of the resized image that is kept, "
                "such as 0.875."
            )
        if self.resize_size is not None and not _is_side(self.resize_size):
            raise ValueError(
                f"Expected resize_size to be a positive integer, at most {MAX_SIDE:,}, or None, received "
                f"{short_repr(self.resize_size)}. Pass a number of pixels, such as 236."
            )
        for name, known in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
            _check_known(name, getattr(self, name), known)
        for name, least, most in (("mean", -1000, 1000), ("std", 1e-6, 1000)):
            values = getattr(self, name)
            are_three = isinstance(values, tuple | list) and len(values) == 3
            if not are_three or not all(_is_number(value) and least <= value <= most for value in values):
                raise ValueError(
                    f"Expected {name} to be three numbers from {least} to {most}, received "
                    f"{short_repr(values)}."
                )
            object.__setattr__(self, name, tuple(map(float, values)))
        height, width = map(int, sides)
        object.__setattr__(self, "image_size", height if height == width else (height, width))
        object.__setattr__(self, "crop_fraction", float(self.crop_fraction))
        if self.resize_size is not None:
            object.__setattr__(self, "resize_size", int(self.resize_size))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2

    @property
    def scale_size(self) -> tuple[int, int]:
        """(height, width) that the image is resized to, or to cover, before the crop."""
        if self.resize_size is not None:
            return self.resize_size, self.resize_size
        height, width = self.size
        return math.floor(height / self.crop_fraction), math.floor(width / self.crop_fraction)

    def at(self, image_size: int | tuple[int, int] | None) -> "Preprocessing":
        """The same at another image size, where `resize_size` no longer holds; None for its own."""
        other = dataclasses.replace(self, image_size=image_size or self.image_size, resize_size=None)
        return self if other.size == self.size else other

    def stored(self) -> dict[str, Any]:
        """The fields under the names of files, as `from_stored` reads them."""
        fields = {_STORED_NAMES.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        return fields | {"resize_mode": _STORED_MODES[self.crop_mode]}

    @classmethod
    def from_stored(cls, **values: Any) -> "Preprocessing":
        """Reads fields under the names of files: crop, and resize_mode "shorter_side" or "squash"."""
        named = {field.name: _STORED_NAMES.get(field.name, field.name) for field in dataclasses.fields(cls)}
        fields = {name: values[stored] for name, stored in named.items() if stored in values}
        mode = values.get("resize_mode", "shorter_side")
        _check_known("resize_mode", mode, RESIZE_MODES)
        return cls(**fields | {"crop_mode": CROP_MODES[RESIZE_MODES.index(mode)]})


def _check_known(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {short_repr(value)}. Known: {', '.join(known)}.")


def is_positive_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def _is_side(value: object) -> bool:
    return is_positive_integer(value) and value <= MAX_SIDE  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
