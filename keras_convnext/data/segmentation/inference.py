"""From a photo of any size to a label map of that size: whole, by a sliding window, or at several scales.

NumPy alone: `predict` is whatever turns pixels uint8 (n, h, w, 3) into logits float32 (n, h, w, classes).
All resizing is bilinear with half-pixel centres, without antialiasing, as OpenCV's and PyTorch's default.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from keras_convnext._messages import unknown

MODES = ("whole", "slide", "multi_scale")

Predict = Callable[[np.ndarray], np.ndarray]
Size = tuple[int, int]

# Reference: BEiT's tools/test.py, which ConvNeXt's scores "ms" come from (microsoft/unilm, 768a3c8).
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
_LONGEST = 4  # times the short side: (2048, 512) and (2560, 640) in the published configurations
_LEAST_SIDE = 32  # of a model with stride 32
_STRIP_BYTES = 1 << 26  # of logits that are resized at a time


def prepared_size(size: Size, short_side: float) -> Size:
    """The (height, width) at which a photo is tested: the shorter side is `short_side`, the aspect is kept.

    The longer side is at most four times that, and no side is below 32. Reference: mmcv's `rescale_size`.
    """
    scale = min(_LONGEST * short_side / max(size), short_side / min(size))
    height, width = (max(int(side * scale + 0.5), _LEAST_SIDE) for side in size)
    return height, width


def prepared(image: np.ndarray, short_side: float) -> np.ndarray:
    """Resizes a photo uint8 (H, W, 3) to its `prepared_size`."""
    return resized_pixels(image, prepared_size(image.shape[:2], short_side))


def resized_pixels(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes a photo to uint8 (*size, 3)."""
    return image if size == image.shape[:2] else np.rint(resized(image, size)).astype(np.uint8)


def segment(
    predict: Predict,
    image: np.ndarray,
    short_side: int,
    mode: str = "whole",
    crop: Size | None = None,
    batch_size: int = 1,
) -> np.ndarray:
    """Returns the class of each pixel of a photo uint8 (H, W, 3), uint8 (H, W); arguments as of `outputs`."""
    return label_map(outputs(predict, image, short_side, mode, crop, batch_size), image.shape[:2])


def outputs(
    predict: Predict,
    image: np.ndarray,
    short_side: int,
    mode: str = "whole",
    crop: Size | None = None,
    batch_size: int = 1,
) -> np.ndarray:
    """Returns float32 (h, w, classes) of a photo uint8 (H, W, 3), of which `label_map` takes the largest.

    "whole" gives the model the prepared photo; "slide" windows of it of `crop`, by default square with the
    side `short_side`, at distances of two thirds (341 of 512, 426 of 640), `batch_size` at a time; both
    return logits of the prepared photo. "multi_scale" returns the softmax averaged over six scales, each also
    mirrored, of the photo. Reference: whole_inference and slide_inference of mmsegmentation's
    encoder_decoder.py, and its `SegTTAModel`.
    """
    if mode == "multi_scale":
        return probabilities(predict, image, short_side)
    pixels = prepared(image, short_side)
    if mode == "whole":
        return predict(pixels[None])[0]
    if mode != "slide":
        raise ValueError(unknown("mode", mode, MODES))
    return sliding_window(predict, pixels, crop or (short_side, short_side), batch_size=batch_size)


def sliding_window(
    predict: Predict, image: np.ndarray, crop: Size, stride: Size | None = None, batch_size: int = 1
) -> np.ndarray:
    """Returns logits float32 (h, w, classes) of pixels (h, w, 3): the mean of the windows over each pixel.

    Windows begin at multiples of `stride`, by default two thirds of `crop`; one that would leave the image is
    moved back into it, and an image smaller than `crop` has a single window of its own size.
    """
    size = image.shape[:2]
    stride = stride or (max(crop[0] * 2 // 3, 1), max(crop[1] * 2 // 3, 1))
    height, width = (min(pair) for pair in zip(crop, size, strict=True))
    places = [*itertools.product(*map(starts, size, crop, stride))]
    total, count = np.zeros((*size, 1), np.float32), np.zeros((*size, 1), np.float32)
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        logits = predict(np.stack([image[y : y + height, x : x + width] for y, x in some]))
        if first == 0:
            total = np.zeros((*size, logits.shape[-1]), np.float32)
        for (y, x), one in zip(some, logits, strict=True):
            total[y : y + height, x : x + width] += one
            count[y : y + height, x : x + width] += 1
    return total / count


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Returns where the windows along an axis begin."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(number * stride + crop, length) - crop, 0) for number in range(count)]


def probabilities(predict: Predict, image: np.ndarray, short_side: int) -> np.ndarray:
    """Returns the mean softmax float32 (H, W, classes) over the `SCALES`, each as it is and mirrored.

    The logits are resized to the photo first. All of them at the photo's size are held once.
    """
    size, total = image.shape[:2], np.zeros(())
    for scale, is_mirrored in itertools.product(SCALES, (False, True)):
        pixels = prepared(image, scale * short_side)
        logits = predict(pixels[None, :, ::-1] if is_mirrored else pixels[None])[0]
        logits = logits[:, ::-1] if is_mirrored else logits
        if not total.shape:
            total = np.zeros((*size, logits.shape[-1]), np.float32)
        for rows, strip in strips(logits, size):
            strip = np.exp(strip - strip.max(-1, keepdims=True))
            total[rows] += strip / strip.sum(-1, keepdims=True)
    return total / (2 * len(SCALES))


def label_map(logits: np.ndarray, size: Size) -> np.ndarray:
    """Returns the largest class at each pixel of logits (h, w, classes) resized to `size`, uint8 (H, W)."""
    if logits.shape[:2] == tuple(size):
        return np.argmax(logits, -1).astype(np.uint8)
    result = np.empty(size, np.uint8)
    for rows, strip in strips(logits, size):
        result[rows] = np.argmax(strip, -1)
    return result


def resized(array: np.ndarray, size: Size, rows: slice = slice(None)) -> np.ndarray:
    """Resizes (h, w, channels) to `size`, float32; `rows` of the result only."""
    for axis, wanted in enumerate(size):
        length = array.shape[axis]
        places = (np.arange(wanted) + 0.5) * (length / wanted) - 0.5
        places = np.clip(places, 0, length - 1)[rows if axis == 0 else slice(None)]
        before = places.astype(np.int64)
        share = (places - before).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        low = np.take(array, before, axis).astype(np.float32)
        high = np.take(array, np.minimum(before + 1, length - 1), axis).astype(np.float32)
        array = low + share * (high - low)
    return array


def strips(logits: np.ndarray, size: Size) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices of rows and the logits resized to `size` there, some megabytes at a time."""
    height = max(_STRIP_BYTES // (4 * size[1] * logits.shape[-1]), 1)
    for begin in range(0, size[0], height):
        rows = slice(begin, begin + height)
        yield rows, resized(logits, size, rows)
