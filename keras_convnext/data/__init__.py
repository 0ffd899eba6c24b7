"""Images on disk, prepared for a ConvNeXt: sources, evaluation and training batches.

TensorFlow is imported by what needs it, not with this package.
"""

import os

from keras_convnext._environment import is_installed
from keras_convnext.data.preprocessing import Preprocessing


def eval_image(
    path_or_bytes: str | os.PathLike[str] | bytes,
    image_size: int | tuple[int, int],
    crop_fraction: float = 0.875,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
    resize_size: int | None = None,
):  # type: ignore[no-untyped-def]
    """Prepares one image as the evaluation pipeline does: the same graph as `batches.eval_batches`.

    The pixels equal those of Pillow with timm's evaluation transform before it converts to a tensor. Where
    TensorFlow is not installed, Pillow makes them.

    Args:
        path_or_bytes: an image file, or the bytes of one.
        image_size, crop_fraction, interpolation, crop_mode, resize_size: as in `Preprocessing`.

    Returns:
        NumPy uint8 (height, width, 3), RGB, 0 to 255.

    Raises:
        ImageError: the image is missing or cannot be decoded; the message names it.
        ValueError: an argument is outside its range or a name is unknown.

    Example:
        >>> eval_image("tests/images/coffee.jpg", 224).shape
        (224, 224, 3)
    """
    from keras_convnext.data import preprocess

    preprocessing = Preprocessing(image_size, crop_fraction, interpolation, crop_mode, resize_size)
    if isinstance(path_or_bytes, bytes):
        content, name = path_or_bytes, f"{len(path_or_bytes)} bytes"
    else:
        content, name = preprocess.read_file(path_or_bytes), os.fspath(path_or_bytes)
    pixels = None
    if is_installed("tensorflow"):
        from keras_convnext.data import jpeg

        pixels = jpeg.eval_image(content, preprocessing)
    return preprocess.decode_prepared(content, name, preprocessing) if pixels is None else pixels
