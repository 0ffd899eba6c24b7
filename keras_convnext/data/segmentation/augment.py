"""What training does to a photograph and its label map, in TensorFlow: both move together.

The steps are those of mmsegmentation's pipeline, with the arithmetic of OpenCV in integers, so that equal
draws give equal pixels: resize by a random ratio, crop, flip, photometric distortion, pad.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from keras_convnext.data.blocks import Rows
from keras_convnext.data.segmentation.labels import IGNORED
from keras_convnext.data.segmentation.train_transform import SegmentationAugmentation
from keras_convnext.data.stream import Draws

TRIES = 10  # crops that are looked at; the one after them is taken as it is
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18  # the published ranges
_BITS = 11  # after the point of OpenCV's weights of bilinear interpolation

# OpenCV's division in fixed point, 12 bits after the point: of the saturation by the largest channel and of
# the hue, 180 to the circle, by the range of the channels.
_DIVISORS = np.arange(1, 256)
_SATURATION = np.concatenate([[0], np.rint((255 << 12) / _DIVISORS)]).astype(np.int32)
_HUE = np.concatenate([[0], np.rint((180 << 12) / (6.0 * _DIVISORS))]).astype(np.int32)
# Of each sixth of the circle: which of (value, and value less saturation in three forms) is red, green, blue.
_SECTORS = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]], np.int32)


@dataclasses.dataclass
class SegmentationTransform:
    """The steps of a `SegmentationAugmentation`: `plan` draws for many examples, `make` carries out one."""

    augmentation: SegmentationAugmentation
    crop_size: tuple[int, int]  # (height, width) of the result
    mean: tuple[float, ...]  # colour of the padding, 0 to 255: 0 after normalisation
    dtype: str  # of the images, "float32" or "uint8"

    def plan(self, draws: Draws) -> Rows:
        """Draws for examples: a dict of tensors with one row for each place."""
        chosen = self.augmentation
        low, high = chosen.scale
        rows = {
            "ratio": draws.uniforms(1)[:, 0] * (high - low) + low,
            "crops": draws.uniforms(2 * (TRIES + 1)),
            "flip": draws.uniforms(1)[:, 0] < chosen.flip,
        }
        return rows | plan_photometric(draws.uniforms(9), chosen.photometric)

    def make(self, image: Any, label_map: Any, row: Rows) -> tuple[Any, Any]:
        """Makes `dtype` (height, width, 3) and int32 (height, width) of uint8 (H, W, 3) and uint8 (H, W)."""
        size = tf.unstack(tf.shape(image)[:2])
        resized = resized_size(size, self.augmentation.base_size, row["ratio"])
        box = choose_crop(
            label_map, size, resized, self.crop_size, row["crops"], self.augmentation.max_class_share
        )
        image = resize_image(image, size, resized, box)
        label_map = resize_map(label_map, size, resized, box)
        image, label_map = tf.cond(
            row["flip"], lambda: (image[:, ::-1], label_map[:, ::-1]), lambda: (image, label_map)
        )
        if self.augmentation.photometric:
            image = distort(image, row)
        return self._padded(image, label_map)

    def _padded(self, image: Any, label_map: Any) -> tuple[Any, Any]:
        """Pads to the right and below, with the mean colour and with ignored."""
        (height, width), shape = self.crop_size, tf.shape(image)
        paddings = [[0, height - shape[0]], [0, width - shape[1]]]
        mean = tf.constant(self.mean, tf.float32)
        if self.dtype == "uint8":
            image, mean = tf.cast(image, tf.int32), tf.cast(tf.round(mean), tf.int32)
        image = tf.cast(image, mean.dtype) - mean  # so that the padding is 0
        image = tf.cast(tf.pad(image, [*paddings, [0, 0]]) + mean, self.dtype)
        label_map = tf.pad(tf.cast(label_map, tf.int32), paddings, constant_values=IGNORED)
        return tf.ensure_shape(image, (height, width, 3)), tf.ensure_shape(label_map, (height, width))


def resized_size(size: Any, base_size: tuple[int, int], ratio: Any) -> tuple[Any, Any]:
    """Returns (height, width), the largest of an image's aspect in the box `base_size` times the ratio.

    The long side of the box bounds the long side of the image. Both sides of the box are rounded down, and
    those of the result to the nearest, halves up.
    """
    height, width = (tf.cast(side, tf.float64) for side in size)
    long, short = (tf.floor(side * tf.cast(ratio, tf.float64)) for side in (max(base_size), min(base_size)))
    scale = tf.minimum(long / tf.maximum(height, width), short / tf.minimum(height, width))
    rounded = (tf.cast(tf.floor(side * scale + 0.5), tf.int32) for side in (height, width))
    resized_height, resized_width = (tf.maximum(side, 1) for side in rounded)
    return resized_height, resized_width


def choose_crop(
    label_map: Any, size: Any, resized: Any, crop_size: tuple[int, int], uniforms: Any, max_share: float
) -> Any:
    """Returns int32 (top, left, height, width) in the resized image.

    Of ten crops the first is taken that has two classes or more, none with `max_share` of the labelled pixels
    or more; without one it is the eleventh.
    """
    sides = tf.minimum(tf.stack(resized), crop_size)
    margins = tf.stack(resized) - sides
    corners = tf.cast(tf.reshape(uniforms, (TRIES + 1, 2)) * tf.cast(margins + 1, tf.float64), tf.int32)
    corners = tf.minimum(corners, margins)

    def is_refused(attempt: Any) -> Any:
        crop = resize_map(label_map, size, resized, tf.concat([corners[attempt], sides], 0))
        counts = tf.raw_ops.DenseBincount(
            input=tf.reshape(tf.cast(crop, tf.int32), [-1]), size=256, weights=tf.zeros([0], tf.int32)
        )[:IGNORED]
        share = tf.reduce_max(counts) / tf.maximum(tf.reduce_sum(counts), 1)  # float64
        return (tf.reduce_sum(tf.cast(counts > 0, tf.int32)) < 2) | (share >= max_share)

    attempt = tf.constant(0)
    if max_share < 1:
        attempt = tf.while_loop(
            lambda attempt: tf.cond(attempt < TRIES, lambda: is_refused(attempt), lambda: False),
            lambda attempt: [attempt + 1],
            [attempt],
        )[0]
    return tf.concat([corners[attempt], sides], 0)


def resize_map(label_map: Any, size: Any, resized: Any, box: Any) -> Any:
    """Returns the part `box` of a resized map: nearest, as OpenCV's, which takes the pixel at or before."""
    places = [
        tf.minimum(_places(box, resized, size, axis, 0.0), tf.cast(size[axis], tf.float64) - 1)
        for axis in (0, 1)
    ]
    rows, columns = (tf.cast(tf.floor(place), tf.int32) for place in places)
    return tf.gather(tf.gather(label_map, rows), columns, axis=1)


def resize_image(image: Any, size: Any, resized: Any, box: Any) -> Any:
    """Returns the part `box` of a resized image, uint8: bilinear without antialias, as OpenCV's.

    Weights have 11 bits after the point. Columns are resized first, in whole numbers; of their sums the
    lowest four bits are dropped before rows are, as `cv2.resize` does.
    """
    (above, below, *row_weights), (left, right, *column_weights) = (
        _neighbours(box, resized, size, axis) for axis in (0, 1)
    )
    first, end = above[0], below[-1] + 1
    strip = tf.transpose(image[first:end], [1, 0, 2])  # rows of columns, as gathering rows is faster
    shape = tf.shape(strip)
    strip = tf.reshape(strip, (shape[0], -1))
    near, far = (tf.cast(tf.gather(strip, places), tf.int32) for places in (left, right))
    sums = near * column_weights[0][:, None] + far * column_weights[1][:, None]  # (width, rows * 3)
    sums = tf.transpose(tf.reshape(sums, (-1, shape[1], 3)), [1, 0, 2])
    sums = tf.reshape(tf.bitwise.right_shift(sums, 4), (shape[1], -1))
    parts = [
        tf.bitwise.right_shift(tf.gather(sums, places - first) * weights[:, None], 16)
        for places, weights in zip((above, below), row_weights, strict=True)
    ]
    made = tf.bitwise.right_shift(parts[0] + parts[1] + 2, 2)
    return tf.reshape(tf.cast(tf.clip_by_value(made, 0, 255), tf.uint8), (box[2], box[3], 3))


def _places(box: Any, resized: Any, size: Any, axis: int, centre: float) -> Any:
    """Returns where the rows or columns of a box lie in the image before it was resized, float64."""
    inverse = tf.cast(resized[axis], tf.float64) / tf.cast(size[axis], tf.float64)
    return (tf.cast(box[axis] + tf.range(box[2 + axis]), tf.float64) + centre) * (1.0 / inverse)


def _neighbours(box: Any, resized: Any, size: Any, axis: int) -> tuple[Any, Any, Any, Any]:
    """Returns int32 places of two neighbours of each row or column of a box, and their weights of 11 bits."""
    places = tf.cast(_places(box, resized, size, axis, 0.5) - 0.5, tf.float32)
    first = tf.floor(places)
    part = places - first
    first = tf.cast(first, tf.int32)
    last = size[axis] - 1
    if axis == 1:  # beyond the edge OpenCV takes one column as it is, but a row in two parts, each rounded
        part = tf.where((first < 0) | (first >= last), 0.0, part)
    weights = (tf.cast(tf.round(weight * 2.0**_BITS), tf.int32) for weight in (1.0 - part, part))
    near, far = weights
    return tf.clip_by_value(first, 0, last), tf.clip_by_value(first + 1, 0, last), near, far


def plan_photometric(uniforms: Any, probability: float) -> Rows:
    """Draws brightness, contrast, saturation and hue from float64 (n, 9); what is left out is neutral."""
    uniforms = tf.convert_to_tensor(uniforms)
    done = uniforms[:, :4] < probability

    def between(column: int, bounds: tuple[float, float], place: int, neutral: float) -> Any:
        drawn = uniforms[:, column] * (bounds[1] - bounds[0]) + bounds[0]
        return tf.cast(tf.where(done[:, place], drawn, neutral), tf.float32)

    return {
        "brightness": between(4, (-BRIGHTNESS, BRIGHTNESS), 0, 0.0),
        "contrast": between(5, CONTRAST, 1, 1.0),
        "saturation": between(6, SATURATION, 2, 1.0),
        "is_saturated": done[:, 2],  # as a turn through whole numbers of hue changes levels in itself
        "hue": tf.cast(tf.floor(between(7, (-HUE, HUE), 3, 0.0)), tf.int32),  # -18 to 17
        "is_turned": done[:, 3],
        "contrast_first": uniforms[:, 8] < 0.5,
    }


def distort(image: Any, row: Rows) -> Any:
    """Changes brightness, contrast, saturation and hue of an image, uint8 (H, W, 3), RGB, as planned."""

    def contrasted(image: Any) -> Any:
        return scaled(image, row["contrast"], 0.0)

    image = tf.cond(row["brightness"] != 0, lambda: scaled(image, 1.0, row["brightness"]), lambda: image)
    image = tf.cond(row["contrast_first"], lambda: contrasted(image), lambda: image)
    image = tf.cond(row["is_saturated"], lambda: _with_saturation(image, row["saturation"]), lambda: image)
    image = tf.cond(row["is_turned"], lambda: _with_hue(image, row["hue"]), lambda: image)
    return tf.cond(row["contrast_first"], lambda: image, lambda: contrasted(image))


def scaled(levels: Any, factor: Any, offset: Any) -> Any:
    """Returns levels * factor + offset in float32, clipped to 0..255, without the fraction."""
    values = tf.cast(levels, tf.float32) * factor + offset
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), levels.dtype)


def _with_saturation(image: Any, factor: Any) -> Any:
    hue, saturation, value = to_hsv(image)
    return to_rgb(hue, scaled(saturation, factor, 0.0), value)


def _with_hue(image: Any, turn: Any) -> Any:
    hue, saturation, value = to_hsv(image)
    return to_rgb((hue + turn) % 180, saturation, value)


def to_hsv(image: Any) -> tuple[Any, Any, Any]:
    """Returns hue, 0 to 179, saturation and value, 0 to 255, of uint8 RGB as int32 (H, W): OpenCV's."""
    red, green, blue = tf.unstack(tf.cast(image, tf.int32), axis=-1)
    value = tf.maximum(tf.maximum(red, green), blue)
    spread = value - tf.minimum(tf.minimum(red, green), blue)

    def divided(number: Any, divisors: np.ndarray, divisor: Any) -> Any:
        return tf.bitwise.right_shift(number * tf.gather(divisors, divisor) + (1 << 11), 12)

    saturation = divided(spread, _SATURATION, value)
    hue = tf.where(
        value == red,
        green - blue,
        tf.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = divided(hue, _HUE, spread)
    return tf.where(hue < 0, hue + 180, hue), saturation, value


def to_rgb(hue: Any, saturation: Any, value: Any) -> Any:
    """Returns uint8 (H, W, 3) of what `to_hsv` gives: OpenCV's, in float32 with fused products, cut off.

    OpenCV rounds in place of that in the columns beyond the last multiple of its vectors, 32 pixels with
    AVX2: in none of the crops of 512 and 640 pixels.
    """
    sixths = tf.cast(hue, tf.float32) * tf.constant(6 / 180, tf.float32)
    sector = tf.floor(sixths)
    part = sixths - sector
    level, share = (
        tf.cast(channel, tf.float32) * tf.constant(1 / 255, tf.float32) for channel in (value, saturation)
    )

    def less(part: Any) -> Any:  # 1 - share * part, rounded once
        product = tf.cast(share, tf.float64) * tf.cast(part, tf.float64)
        return level * tf.cast(1.0 - product, tf.float32)

    levels = tf.stack([level, level * (1.0 - share), less(part), less(1.0 - part)], -1)
    chosen = tf.gather(levels, tf.gather(_SECTORS, tf.cast(sector, tf.int32) % 6), batch_dims=2)
    return tf.cast(tf.clip_by_value(chosen * 255.0, 0.0, 255.0), tf.uint8)
