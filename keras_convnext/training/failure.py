"""The exceptions that end a run early, and what helps to find numbers that are not finite."""

import io
import math
from collections.abc import Mapping

import numpy as np
import PIL.Image


class Interrupted(Exception):  # noqa: N818 - not an error: the run can be resumed
    """A signal asked the run to stop; a checkpoint of the last step is written.

    Attributes:
        signal_number: of SIGTERM or SIGINT.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Signalled(Exception):  # noqa: N818 - not an error
    """A signal was received while the model was validated."""


class NonFiniteError(ValueError):
    """The loss or a weight is NaN or infinite: in which step, and where to look."""


def non_finite_names(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Lists the arrays that hold NaN or infinity."""
    return [
        name
        for name, array in arrays.items()
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()
    ]


def contact_picture(images: np.ndarray) -> bytes:
    """A PNG of images (N, H, W, 3) in 0..255, side by side; what is not finite is black."""
    columns = math.ceil(math.sqrt(len(images)))
    height, width = images.shape[1:3]
    sheet = np.zeros((math.ceil(len(images) / columns) * height, columns * width, 3), np.uint8)
    for number, image in enumerate(np.nan_to_num(images, nan=0, posinf=0, neginf=0)):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = np.clip(image, 0, 255)
    content = io.BytesIO()
    PIL.Image.fromarray(sheet).save(content, "png")
    return content.getvalue()
