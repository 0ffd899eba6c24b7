"""From a photo of any size to what a detector takes, and from what it gives to boxes and masks of the photo.

NumPy alone. Reference: mmdetection 3.3.0, the test pipeline of configs/convnext/ and `_do_paste_mask` of
mmdet/models/roi_heads/mask_heads/fcn_mask_head.py; mmcv 2.1.0, `rescale_size`.
"""

from typing import Any

import numpy as np

from keras_convnext.data.segmentation.inference import resized_pixels

LONGEST = 5 / 3  # of the longer side over the shorter one: 800 and 1333 pixels
STRIDE = 32  # sides are padded to multiples of it

Size = tuple[int, int]


def prepared_size(size: Size, short_side: int, within: Size | None = None) -> Size:
    """The (height, width) at which a photo is looked at, with its own aspect.

    The shorter side is `short_side` and the longer one at most 5/3 of that, 1333 pixels of 800; or as large
    as fits `within` a size.
    """
    scale = min(int(LONGEST * short_side) / max(size), short_side / min(size))
    if within is not None:
        scale = min(within[0] / size[0], within[1] / size[1])
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width


def prepared(image: np.ndarray, short_side: int, mean, within: Size | None = None) -> tuple[np.ndarray, Size]:
    """A photo uint8 (H, W, 3) as float32 (h, w, 3), and how much of that it fills, (height, width).

    Resized to its `prepared_size`, and padded below and on the right with the `mean` of pixels in 0..1, which
    a normaliser turns into zeros: to multiples of 32, or to the size `within`.
    """
    height, width = prepared_size(image.shape[:2], short_side, within)
    outer = within or (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE)
    padded = np.empty((*outer, image.shape[2]), np.float32)
    padded[...] = np.float32(255) * np.asarray(mean, np.float32)
    padded[:height, :width] = resized_pixels(image, (height, width))
    return padded, (height, width)


def on_photo(outputs: dict[str, np.ndarray], inner: Size, size: Size) -> list[dict[str, Any]]:
    """What a detector found on one photo of (height, width) `size` that filled `inner`, the best first.

    Of each detection: "class_index", "score", "box" float32 (4,) in pixels of the photo, and where the model
    draws masks "mask", bool (H, W).
    """
    found = []
    scale = np.array([size[1] / inner[1], size[0] / inner[0]] * 2, np.float32)
    limits = np.array([size[1], size[0]] * 2, np.float32)
    for number in range(int(outputs["count"])):
        box = np.clip(outputs["boxes"][number] * scale, 0, limits)
        one: dict[str, Any] = {
            "class_index": int(outputs["classes"][number]),
            "score": float(outputs["scores"][number]),
            "box": box,
        }
        if "masks" in outputs:
            one["mask"] = pasted(outputs["masks"][number], box, size) >= 0.5
        found.append(one)
    return found


def pasted(mask: np.ndarray, box: np.ndarray, size: Size) -> np.ndarray:
    """Draws a mask (h, w) over its box in an image: float32 `size`, 0 outside.

    At the centre of each pixel, bilinearly between the centres of the mask's cells, with zeros around it, as
    PyTorch's `grid_sample(align_corners=False)`.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    result = np.zeros(size, np.float32)
    rows, top = _weights(y0, y1, mask.shape[0], size[0])
    columns, left = _weights(x0, x1, mask.shape[1], size[1])
    drawn = rows @ mask.astype(np.float32) @ columns.T
    result[top : top + len(rows), left : left + len(columns)] = drawn
    return result


def _weights(low: float, high: float, cells: int, length: int) -> tuple[np.ndarray, int]:
    """Share of each cell in each pixel that a box reaches along an axis, (pixels, cells), and the first."""
    reach = (high - low) / cells
    first, end = (int(np.clip(np.floor(value), 0, length)) for value in (low - reach, high + reach + 1))
    centres = np.arange(first, end) + 0.5
    places = (centres - low) / max(high - low, 1e-9) * cells - 0.5
    weights = np.maximum(1 - np.abs(places[:, None] - np.arange(cells)), 0)
    return weights.astype(np.float32), first
