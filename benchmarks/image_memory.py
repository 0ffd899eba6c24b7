"""What one picture takes of memory and time: those of a few bytes that decode to much, and a photo's size.

    python benchmarks/image_memory.py             # pictures that should be refused or cheap
    python benchmarks/image_memory.py --formats   # bytes a pixel of each format

Each is decoded and prepared at 224 px as `predict` does, in a process of its own, made by fork.
"""

import argparse
import io
import os
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from keras_convnext.data import preprocess
from keras_convnext.data.preprocessing import Preprocessing

Image.MAX_IMAGE_PIXELS = None
PREPROCESSING = Preprocessing(224)
LIMIT = 89_478_485  # Pillow's own, twice of which it opens
PHOTO = (5000, 4000)

Size = tuple[int, int]
BOMBS: dict[str, tuple[str, str, Size, dict]] = {
    "PNG 1 x 10,000": ("PNG", "RGB", (1, 10_000), {}),
    "PNG 1 x 40,000": ("PNG", "RGB", (1, 40_000), {}),
    "JPEG 1 x 65,500": ("JPEG", "RGB", (1, 65_500), {}),
    "WebP 16,383 x 2": ("WEBP", "RGB", (16_383, 2), {}),
    "PNG 3 x 1,000,001": ("PNG", "L", (3, 1_000_001), {}),
    "PNG 13,300 x 13,300": ("PNG", "RGB", (13_300, 13_300), {}),
    "PNG 13,300 x 13,300, RGBA": ("PNG", "RGBA", (13_300, 13_300), {}),
    "PNG 13,300 x 13,300, 1 bit": ("PNG", "1", (13_300, 13_300), {}),
    "JPEG 12,000 x 9,000": ("JPEG", "RGB", (12_000, 9_000), {}),
    "JPEG 13,300 x 13,300, progressive": ("JPEG", "RGB", (13_300, 13_300), {"progressive": True}),
    "WebP 16,383 x 10,900": ("WEBP", "RGB", (16_383, 10_900), {"method": 0}),
    "GIF 13,300 x 13,300": ("GIF", "P", (13_300, 13_300), {}),
}
STRIP: dict = {"compression": "tiff_deflate", "strip_size": 1 << 31}
KINDS: list[tuple[str, tuple[str, ...], str, dict]] = [
    ("JPEG", ("L", "RGB", "CMYK"), "", {}),
    ("JPEG", ("L", "RGB", "CMYK"), "progressive", {"progressive": True, "subsampling": 0}),
    ("PNG", ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"), "", {}),
    ("WEBP", ("RGB", "RGBA"), "", {"method": 0}),
    ("WEBP", ("RGB", "RGBA"), "lossless", {"method": 0, "lossless": True}),
    ("BMP", ("1", "L", "P", "RGB", "RGBA"), "", {}),
    ("GIF", ("L", "P"), "", {}),
    ("TIFF", ("L", "RGB", "RGBA", "CMYK", "I;16", "I", "F"), "", {}),
    ("TIFF", ("L", "RGB", "RGBA", "CMYK", "I;16"), "one strip", STRIP),
    ("TIFF", ("RGB",), "JPEG", {"compression": "jpeg"}),
]
FORMATS: dict[str, tuple[str, str, Size, dict]] = {
    f"{name}, {mode} {words}": (name, mode, PHOTO, options)
    for name, modes, words, options in KINDS
    for mode in modes
}


def encoded(format_name: str, mode: str, size: Size, options: dict) -> bytes:
    if mode == "F":
        image = Image.fromarray(np.full(size[::-1], 0.5, np.float32))
    elif mode[0] == "I":
        kind = (np.uint16, 30_000) if mode == "I;16" else (np.int32, 2**30)
        image = Image.fromarray(np.full(size[::-1], kind[1], kind[0]))
    else:
        image = Image.new(mode, size)
    content = io.BytesIO()
    image.save(content, format_name, **options)
    return content.getvalue()


def in_child(work: Callable[[], bytes]) -> bytes:
    """What `work` returns in a process of its own, whose memory is its own too; b"" where it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(writer, "wb") as file:
                file.write(work())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        result = file.read()
    os.waitpid(child, 0)
    return result


def peak() -> int:
    """The most bytes that this process has held."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def measured(content: bytes, limit: int | None, pixels: int) -> bytes:
    Image.MAX_IMAGE_PIXELS = limit
    before, begin = peak(), time.perf_counter()
    try:
        preprocess.decode_image(content, "it", lambda image: preprocess.prepared(image, PREPROCESSING))
        result = "read"
    except (preprocess.ImageError, MemoryError) as error:
        result = f"{type(error).__name__}: {str(error)[:60]}"
    more = peak() - before
    seconds = time.perf_counter() - begin
    return f"{more / 1e6:7.0f} MB {more / pixels:8.1f} a pixel {seconds:7.2f} s  {result}".encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--formats", action="store_true", help="bytes a pixel, without a limit")
    is_formats = parser.parse_args().formats
    os.environ["KERAS_CONVNEXT_QUIET"] = "1"
    for name, (format_name, mode, size, options) in (FORMATS if is_formats else BOMBS).items():
        content = in_child(lambda: encoded(format_name, mode, size, options))  # noqa: B023
        limit = None if is_formats else LIMIT
        result = in_child(lambda: measured(content, limit, size[0] * size[1]))  # noqa: B023
        print(f"{name:34} {len(content):>9} bytes {result.decode() or 'killed'}", flush=True)


if __name__ == "__main__":
    main()
