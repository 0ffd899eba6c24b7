"""From an image file to the uint8 array a ConvNeXt is fed, as timm and torchvision evaluate.

Nothing here normalises: the models take uint8 RGB and do that in their first layer.
Only NumPy and Pillow are imported, so reading images needs no Keras backend.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from keras_convnext._terminal import say
from keras_convnext.data.index import IMAGE_SUFFIXES, counted, images_below
from keras_convnext.data.preprocessing import Preprocessing

INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}

# What Pillow's decoders raise on damaged data; which one depends on the format and the damage.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


class ImageError(ValueError):
    """A file or folder that should hold images could not be used: which, why and what to do."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as RGB.

    Decodes with Pillow and calls `convert("RGB")`, as timm's dataset does, so the pixels are the
    ones the published scores were measured on. What that means for files that are not plain RGB:
    grayscale is repeated in the three channels; a palette is looked up; CMYK is converted without
    its colour profile; an alpha channel is dropped, not blended; 16-bit grayscale is clipped at
    255, not rescaled, so such a file should be scaled to 8 bits first; of an animation the first
    frame is taken. The EXIF orientation is not applied, as timm does not apply it: a photograph
    stored sideways stays sideways.

    Args:
        path: an image file in any format that Pillow reads.

    Returns:
        uint8 (H, W, 3), RGB, 0 to 255.

    Raises:
        ImageError: the file is missing, a folder, not readable by this user, empty, not an image
            (the message shows its first bytes), truncated or corrupt, or has so many pixels that
            Pillow takes it for a decompression bomb. The message names the file.
    """
    return decode_image(read_file(path), str(path))


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read the bytes of an image file.

    Raises:
        ImageError: the file is missing, a folder, or not readable by this user. The message names it.
    """
    path = Path(path)
    try:
        # Windows reports a folder as a permission error, so the folder is looked for first.
        if path.is_dir():
            raise ImageError(
                f"Expected an image file, received the folder '{path}'. "
                "List the images in it with find_images."
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(
            f"Expected an image file at '{path}', but nothing is there. Check the path."
        ) from error
    except PermissionError as error:
        raise ImageError(
            f"Expected a readable image file, but this user may not read '{path}'. "
            "Change its permissions or those of its folder."
        ) from error
    except OSError as error:
        raise ImageError(
            f"Expected a readable image file, but reading '{path}' failed: {error.strerror}. "
            "Check the path and the disk."
        ) from error


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Decode the bytes of an image file as RGB, as `read_image` does.

    Args:
        content: the encoded image, in any format that Pillow reads.
        name: what errors call it.

    Returns:
        uint8 (H, W, 3), RGB, 0 to 255.

    Raises:
        ImageError: the bytes are not an image, truncated or corrupt, or have too many pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"Expected an image, but '{name}' is not one or its header is damaged: "
            f"{_describe_start(content[:40])}. Pass a JPEG, a PNG or another file that Pillow "
            "reads."
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(
            f"Expected an image of at most {limit} pixels, but '{name}' declares more and may be a "
            "decompression bomb. Reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is trusted. "
            f"Pillow says: {error}"
        ) from error
    except _DECODER_ERRORS as error:
        raise ImageError(
            f"Expected a complete image, but '{name}' is truncated or corrupt: {error}. "
            "Download or export it again."
        ) from error


def preprocess_image(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resize an image and crop its centre, as the evaluation that a weight file was scored with.

    The result equals, in every bit, what `timm.data.create_transform(is_training=False)` (timm
    1.0.31) and torchvision's `ImageClassification` preset (0.28.0) hold before they convert to a
    tensor. Where the resized image is smaller than the crop it is padded with zeros (black).

    Args:
        image: uint8 (H, W, 3), RGB, 0 to 255, as `read_image` returns it.
        preprocessing: sizes, filter and crop; its mean and std have no effect here.

    Returns:
        uint8 (height, width, 3), RGB, 0 to 255.

    Raises:
        ValueError: `image` is not a non-empty uint8 (H, W, 3) array. The message gives the value
            received.
    """
    _check_image(image)
    height, width = resized_size((image.shape[0], image.shape[1]), preprocessing)
    resized = Image.fromarray(image).resize((width, height), INTERPOLATIONS[preprocessing.interpolation])
    return _crop_center(np.asarray(resized), preprocessing.size)


def find_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """List the image files that some paths stand for.

    A file stands for itself, whatever its name. A folder stands for the images at any depth in it, sorted by
    path, as `index.images_below` lists them for training and evaluation too: by suffix, without hidden ones.
    The order of `paths` is kept, and a file reached twice is listed twice. Files are not opened, which is
    left to `read_image`. What is left out of a folder is said on stderr.

    Args:
        paths: one file or folder, or several.

    Returns:
        list of `Path`, each beginning with the path it was found under.

    Raises:
        ImageError: a path is missing, a folder holds no image, or a folder may not be listed by
            this user. The message names the path.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    images: list[Path] = []
    for path in map(Path, paths):
        try:
            path.stat()
            images += _images_in_folder(path) if path.is_dir() else [path]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ImageError(
                f"Expected an image file or a folder at '{path}', but nothing is there. Check the path."
            ) from error
        except PermissionError as error:
            raise ImageError(
                f"Expected a readable file or folder, but this user may not look into "
                f"'{error.filename}'. Change its permissions or leave it out."
            ) from error
    return images


def _images_in_folder(folder: Path) -> list[Path]:
    files, left_out = images_below(os.fspath(folder))
    others = counted(left_out)
    if not files:
        raise ImageError(
            f"Expected images in the folder '{folder}', found none: {others or 'it is empty'}. "
            f"Known suffixes: {', '.join(IMAGE_SUFFIXES)}."
        )
    if others:
        say(f"{folder}: left out {others}")
    return sorted(map(Path, files))


def _describe_start(start: bytes) -> str:
    """Say in words what the first bytes of a file look like."""
    if not start:
        return "the file is empty"
    # At most the last character may be cut; ignored bytes beyond that mean it was not text.
    text = start.decode("utf-8", errors="ignore")
    is_text = all(character.isprintable() or character.isspace() for character in text)
    if is_text and len(start) - len(text.encode()) < 4 and text:
        return f"it begins with the text {text!r}"
    return f"it begins with the bytes {start[:12].hex(' ')}"


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        received = f"an object of type {type(image).__name__}"
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        received = f"{image.dtype} {image.shape}"
    else:
        return
    raise ValueError(
        f"Expected an image as a uint8 array of shape (H, W, 3), RGB, 0 to 255, received "
        f"{received}. Read files with read_image; convert other images to 8-bit RGB first."
    )


def resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the (height, width) of the resized image, rounded as timm and torchvision do."""
    scale_size = preprocessing.scale_size
    if preprocessing.crop_mode == "squash":
        return scale_size
    height, width = size
    if scale_size[0] != scale_size[1]:
        # timm leaves torchvision's resize here: it divides by the ratio and rounds.
        ratio = min(height / scale_size[0], width / scale_size[1])
        return round(height / ratio), round(width / ratio)
    short = scale_size[0]
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def _crop_center(image: np.ndarray, crop_size: tuple[int, int]) -> np.ndarray:
    """Cut the central (height, width) out of an image, padded with zeros where it is smaller."""
    missing = [max(crop_size[axis] - image.shape[axis], 0) for axis in (0, 1)]
    padded = np.pad(image, [(total // 2, total - total // 2) for total in missing] + [(0, 0)])
    # Python rounds a half to the even neighbour, and so do torchvision's offsets.
    top, left = (round((padded.shape[axis] - crop_size[axis]) / 2) for axis in (0, 1))
    return padded[top : top + crop_size[0], left : left + crop_size[1]].copy()
