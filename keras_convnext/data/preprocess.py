"""From an image file to the uint8 array a ConvNeXt is fed, as timm and torchvision evaluate.

Only NumPy and Pillow are imported, so reading images needs no Keras backend.
"""

import contextlib
import io
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from keras_convnext._files import regular_size
from keras_convnext._messages import one_line, shortened
from keras_convnext._terminal import say, say_once
from keras_convnext.data.index import IMAGE_SUFFIXES, check_bytes, counted, images_below
from keras_convnext.data.preprocessing import Preprocessing

# Pillow goes by the content: a closed list, as some formats start programs (EPS). JPEG opens MPO too.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
LARGE = 1 << 24  # pixels; a larger JPEG is left to Pillow, a larger resized image is not made as a whole

# Bytes a pixel that decoding and the image in RGB take at most, as measured with Pillow 13 by
# benchmarks/image_memory.py: by format, else by mode, else 9.
_BYTES_A_PIXEL = {"WEBP": 18, "TIFF": 12, "RGB": 4, "L": 6, "P": 6, "1": 6}
_MOST_PASSED = 1 << 31  # pixels, in all scans of a JPEG; some seconds
_ONE_LARGE = threading.Lock()


class ImageError(ValueError):
    """A file or folder that should hold images could not be used: which, why and what to do."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as RGB.

    Decodes with Pillow and calls `convert("RGB")`, as timm's dataset does, so the pixels are the ones the
    published scores were measured on. For files that are not plain RGB that means, wherever images are read:

    - grayscale is repeated in the three channels; a palette is looked up; CMYK is converted without
      its colour profile; of an animation the first frame is taken;
    - an alpha channel is dropped, not blended, so that the colours below it show;
    - the EXIF orientation is not applied: a photograph stored sideways stays sideways;
    - other than in timm, which clips them, 16-bit and 32-bit grayscale and floating-point numbers are
      scaled by the range of their type: 0 to 65535, to 2**31 - 1 (signed) or 2**32 - 1, and 0.0 to 1.0;
      numbers outside of it, or so small that the image would be black, are an error.

    The last three are told on stderr when the first such file is met.

    Args:
        path: a JPEG, PNG, WebP, BMP, GIF or TIFF file, whatever its suffix.

    Returns:
        uint8 (H, W, 3), RGB, 0 to 255.

    Raises:
        ImageError: as for `read_file` and `decode_image`; the message names the file.
    """
    return decode_image(read_file(path), str(path))


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read the bytes of an image file.

    ImageError names a file that is missing, a folder or a device, not readable, or larger than 512 MB.
    """
    path = Path(path)
    try:
        check_bytes(regular_size(path), f"'{path}'", ImageError)
        return path.read_bytes()
    except IsADirectoryError as error:
        raise ImageError(
            f"Expected an image file, received the folder '{path}'. List the images in it with find_images."
        ) from error
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


def reduced(image: Image.Image) -> np.ndarray:
    """The pixels of an image for training: one of more than `LARGE` is reduced to at most as many."""
    factor = _factor(image)
    return _pixels(image if factor == 1 else image.reduce(factor))


def _factor(image: Image.Image) -> int:
    pixels = image.width * image.height
    return 1 if pixels <= LARGE else math.ceil(math.sqrt(2 * pixels / LARGE))


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, band in _bands(image):
        pixels[rows] = band
    return pixels


def decode_image(
    content: bytes, name: str, transform: Callable[[Image.Image], np.ndarray] = _pixels
) -> np.ndarray:
    """Decode the bytes of an image file as RGB, uint8 (H, W, 3), as `read_image` does.

    Args:
        content: the encoded image: JPEG, PNG, WebP, BMP, GIF or TIFF.
        name: what errors call it.
        transform: from Pillow's image, in RGB, to what is returned, such as `prepared`: the whole image as an
            array takes twice the memory.

    Raises:
        ImageError: the bytes are empty, not an image (the message shows the first), truncated or corrupt, so
            many pixels that Pillow takes them for a decompression bomb, or would take more than 512 MB of
            memory (six bytes for each of `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image, _admitted(image, content, name):
            if transform is reduced:  # a JPEG is decoded so, in less memory; nothing for other formats
                factor = _factor(image)
                image.draft(None, (image.width // factor, image.height // factor))
            return transform(_as_rgb(image, name))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"Expected an image, but '{name}' is not one or its header is damaged: "
            f"{_describe_start(content[:40])}. Pass a JPEG, PNG, WebP, BMP, GIF or TIFF file."
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(
            f"Expected an image of at most {limit} pixels, but '{name}' declares more and may be a "
            "decompression bomb. Reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is trusted. "
            f"Pillow says: {error}"
        ) from error
    except Exception as error:  # decoders raise of many classes on damaged data, MemoryError among them
        raise ImageError(
            f"Expected a complete image, but '{name}' is truncated or corrupt: "
            f"{shortened(one_line(error), 200)}. Download or export it again."
        ) from error


@contextlib.contextmanager
def _admitted(image: Image.Image, content: bytes, name: str) -> Iterator[None]:
    """Refuses an image that would take too much memory; of large ones one is decoded at a time."""
    a_pixel = _BYTES_A_PIXEL.get(image.format or "", _BYTES_A_PIXEL.get(image.mode, 9))
    if image.format in ("JPEG", "MPO") and check_scans(content, name) > 1:
        a_pixel += 2 * len(image.getbands())
    needed = len(content) + image.width * image.height * a_pixel + image.height * 16
    what = f"'{name}' of {image.width} x {image.height} pixels ({image.format}, {image.mode})"
    check_bytes(needed, what, ImageError)
    with _ONE_LARGE if needed > 4 * LARGE else contextlib.nullcontext():
        yield


def image_size(content: bytes, name: str) -> tuple[int, int]:
    """Reads (height, width) from the header of an encoded image; ImageError as of `decode_image`."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return image.height, image.width
    height, width = decode_image(content, name).shape[:2]  # says what is wrong
    return height, width


def check_scans(content: bytes, name: str) -> int:
    """Returns how many scans a JPEG has, and refuses many, as in each all its pixels may change.

    A camera's file has one, a progressive one about ten. All marks of a scan count behind the first.
    """
    place, frame = 2, b""
    while content[place : place + 1] == b"\xff":
        marker, size = content[place + 1 : place + 2], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == b"\xda":
            if frame[:1] in (b"\xc0", b"\xc1") and frame[8:9] == content[place + 4 : place + 5]:
                return 1
            break
        if marker in (b"\xc0", b"\xc1", b"\xc2"):
            frame = content[place + 1 : place + 11]
        place += 2 + size
    scans = max(2, content.count(b"\xff\xda", place))
    pixels = int.from_bytes(frame[4:6], "big") * int.from_bytes(frame[6:8], "big")
    if scans > min(200, max(20, _MOST_PASSED // max(pixels, 1))):
        raise ImageError(
            f"Expected some ten scans in '{name}', received {scans}: each is a pass over all pixels. "
            "Save it again, as a JPEG of one scan."
        )
    return scans


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    # Pillow keeps 8 of a colour.
    has_16_bits = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    tell_orientation(image.info.get("exif", b""), lambda: name)
    opacity = image.getchannel("A").getextrema() if "A" in image.getbands() else None
    if image.has_transparency_data and opacity != (255, 255):
        say_once(
            "transparency",
            f"note: '{name}' has transparent pixels. The alpha channel is dropped, as published scores were "
            "measured: the colours below it show. Blend such files with a background to change that.",
        )
    if image.mode[0] in "IF":
        return _scaled(image, name).convert("RGB")
    image = image if image.mode == "RGB" else image.convert("RGB")
    if has_16_bits:
        if not np.any(image.getextrema()):
            raise ImageError(
                f"Expected colours from 0 to 65535 in '{name}', received none above 255: their scale is not "
                "known. Save it with 8 bits, or scaled to 0 to 65535."
            )
        say_once("scale", f"note: '{name}' has 16-bit colours: they are scaled from 0 to 65535 to 0 to 255.")
    return image


def tell_orientation(exif: bytes, name: Callable[[], str]) -> None:
    """Says once that an image is stored turned; `exif` is the EXIF data, or the start of a JPEG file."""
    start = exif.find(b"Exif\0\0", 0, 1 << 16)
    if start < 0 and exif[:2] not in (b"II", b"MM"):
        return
    tiff = exif[start + 6 if start >= 0 else 0 :][: 1 << 16]

    def number(place: int, size: int) -> int:
        return int.from_bytes(tiff[place : place + size], "little" if tiff[:2] == b"II" else "big")

    first = number(4, 4) + 2
    entries = range(first, min(first + 12 * number(first - 2, 2), len(tiff)), 12)
    turned = next((number(entry + 8, 2) for entry in entries if number(entry, 2) == 0x0112), 1)
    if 1 < turned < 9:
        say_once(
            "orientation",
            f"note: '{name()}' is stored turned or mirrored (EXIF orientation {turned}) and taken as it is "
            "stored, as published scores were measured. Turn such files with PIL.ImageOps.exif_transpose.",
        )


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Scales numbers of 16 or 32 bits, or floating-point ones, by the range of their type: to mode "L"."""
    tags = getattr(image, "tag_v2", {})  # of TIFF; 16-bit PNG has no sign
    bits, kind = tags.get(258, (16,))[0], tags.get(339, (1,))[0]  # bits per sample; unsigned, signed, float
    is_float = image.mode == "F"
    top_bits = bits - 1 if kind == 2 else bits
    highest = 1 if is_float else 2**top_bits - 1
    levels = np.empty((image.height, image.width), np.uint8)
    low, high = math.inf, -math.inf
    for rows, band in _bands(image):
        band = band.view(np.uint32) if bits == 32 and kind == 1 and not is_float else band
        low, high = np.minimum(low, band.min()), np.maximum(high, band.max())  # NaN stays
        with np.errstate(all="ignore"):
            levels[rows] = np.rint(band * 255) if is_float else band >> (top_bits - 8)
    if not (low >= 0 and high <= highest) or (high > 0 and not levels.any()):
        raise ImageError(
            f"Expected numbers from 0 to {highest} in '{name}', the range of its type, received {low:g} to "
            f"{high:g}: its scale is not known. Save it with 8 bits, or scaled to 0 to {highest}."
        )
    say_once(
        "scale",
        f"note: '{name}' has {'floating-point' if is_float else f'{bits}-bit'} numbers, here from {low:g} to "
        f"{high:g}: they are scaled from 0 to {highest} to 0 to 255.",
    )
    return Image.fromarray(levels if tags.get(262, 1) else 255 - levels)  # 0: white is zero


def _bands(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields an image in bands of rows, since Pillow copies twice what it turns into an array."""
    count = max(1, (LARGE >> 2) // image.width)
    for top in range(0, image.height, count):
        bottom = min(top + count, image.height)
        yield slice(top, bottom), np.asarray(image.crop((0, top, image.width, bottom)))


def preprocess_image(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resize an image and crop its centre, as the evaluation that a weight file was scored with.

    The result equals, in every bit, what `timm.data.create_transform(is_training=False)` (timm 1.0.31) and
    torchvision's `ImageClassification` preset (0.28.0) hold before they convert to a tensor. Where the
    resized image is smaller than the crop it is padded with zeros (black).

    Args:
        image: uint8 (H, W, 3), RGB, 0 to 255, as `read_image` returns it; a ValueError says what else it is.
        preprocessing: sizes, filter and crop; its mean and std have no effect here.

    Returns:
        uint8 (height, width, 3), RGB, 0 to 255.
    """
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        received = f"{image.dtype} {image.shape}" if is_array else f"an object of type {type(image).__name__}"
        raise ValueError(
            f"Expected an image as a uint8 array of shape (H, W, 3), RGB, 0 to 255, received {received}. "
            "Read files with read_image; convert other images to 8-bit RGB first."
        )
    return prepared(Image.fromarray(image), preprocessing)


def prepared(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """What `preprocess_image` does, of Pillow's image in RGB.

    Where the resized image would be large, as of a picture of 1 x 40,000, only the part that is cut out is
    made, within a level on average: Pillow may then take rows and columns in another order.
    """
    in_size = (image.height, image.width)
    out_size, box = resized_size(in_size, preprocessing), None
    if out_size[0] * out_size[1] > LARGE:
        sides = np.minimum(out_size, preprocessing.size)
        starts = np.rint((np.array(out_size) - sides) / 2)
        scales = np.array(in_size) / out_size
        (top, left), (bottom, right) = starts * scales, np.minimum((starts + sides) * scales, in_size)
        out_size, box = tuple(sides.tolist()), (left, top, right, bottom)
    resized = image.resize(out_size[::-1], INTERPOLATIONS[preprocessing.interpolation], box)
    return _crop_center(np.asarray(resized), preprocessing.size)


def decode_prepared(content: bytes, name: str, preprocessing: Preprocessing) -> np.ndarray:
    """Decode the bytes of an image file to what `preprocess_image` gives; errors as of `decode_image`."""
    return decode_image(content, name, lambda image: prepared(image, preprocessing))


def find_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List the image files that some paths stand for, in their order; each begins with its path.

    A file stands for itself, whatever its name. A folder stands for the images at any depth in it, sorted by
    path, as `index.images_below` lists them for training and evaluation too: by suffix, without hidden ones.
    Files are not opened. What is left out of a folder is said on stderr.

    ImageError names a path that is missing, a folder without images, or one that this user may not list.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    images: list[Path] = []
    for path in map(Path, paths):
        try:
            path.stat()
            if not path.is_dir():
                images.append(path)
                continue
            files, left_out = images_below(os.fspath(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ImageError(
                f"Expected an image file or a folder at '{path}', but nothing is there. Check the path."
            ) from error
        except PermissionError as error:
            raise ImageError(
                f"Expected a readable file or folder, but this user may not look into '{error.filename}'. "
                "Change its permissions or leave it out."
            ) from error
        others = counted(left_out)
        if not files:
            raise ImageError(
                f"Expected images in the folder '{path}', found none: {others or 'it is empty'}. "
                f"Known suffixes: {', '.join(IMAGE_SUFFIXES)}."
            )
        if others:
            say(f"{path}: left out {others}")
        images += sorted(map(Path, files))
    return images


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
