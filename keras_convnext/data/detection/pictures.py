"""Pictures of what a detector found: boxes, masks and names over the photo."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from keras_convnext.data.segmentation.pictures import default_labels, font

_OPACITY = 0.45  # of masks


def drawn(image: np.ndarray, found: list[dict[str, Any]], classes: int) -> Image.Image:
    """A photo uint8 (H, W, 3) with what `DetectionPredictor.detect` found on it, the best on top."""
    palette = default_labels(classes).palette
    shown = image.astype(np.float32)
    for one in reversed(found):
        if "mask" in one:
            pixels = shown[one["mask"]]
            shown[one["mask"]] = pixels + (np.array(palette[one["class_index"]]) - pixels) * _OPACITY
    picture = Image.fromarray(np.rint(shown).astype(np.uint8))
    pen, width = ImageDraw.Draw(picture), max(round(max(image.shape[:2]) / 400), 1)
    letters = font(max(round(max(image.shape[:2]) / 50), 11))
    for one in reversed(found):
        colour, box = palette[one["class_index"]], [float(side) for side in one["box"]]
        pen.rectangle(box, outline=colour, width=width)
        text = f" {one['name']} {100 * one['score']:.0f} % "
        left, _, right, bottom = pen.textbbox((0, 0), text, letters)
        x = max(min(box[0], image.shape[1] - right), 0)
        y = box[1] - bottom if box[1] >= bottom else box[1]
        pen.rectangle((x + left, y, x + right, y + bottom), colour)
        is_dark = np.dot(colour, (0.299, 0.587, 0.114)) < 140
        pen.text((x, y), text, "white" if is_dark else "black", letters)
    return picture
