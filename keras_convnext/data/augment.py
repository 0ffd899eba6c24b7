"""Training augmentation in TensorFlow graph operations, equal to Pillow's.

Three layers. The pixel operations (`autocontrast` to `rotate`) map uint8 (H, W, 3) to the same, and every
bit of the result is what Pillow 13.0.0 computes on x86-64. The plans (`plan_augment`, `plan_jitter`,
`plan_erase`, `plan_mix`) turn random numbers into decisions, for many examples at once. `apply_augment`,
`apply_jitter`, `apply_erase` and `mix` carry a plan out. No pixel operation draws a random number, so an
example is a pure function of its image and its row of the plan.

The geometric operations compute in float64, as Pillow does: with a slope such as 0.27 one pixel in a hundred
lies exactly on a level, and the rounding of the last bit decides between it and the one below.

Facts carried over: Pillow 13.0.0 (src/libImaging: Geometry.c, Blend.c, Convert.c, Filter.c; src/PIL:
ImageOps.py, ImageEnhance.py), timm 1.0.31 (timm/data: auto_augment.py, random_erasing.py, mixup.py) and
torchvision 0.28.0 (transforms/autoaugment.py, transforms.py).
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")

# timm paints what a geometric operation uncovers with the mean colour of ImageNet, round(255 * mean).
IMAGENET_FILL = (124, 116, 104)

# Luma of ITU-R 601-2 in units of 2^-16, as Pillow's Convert.c has it. All its sums fit the 24 bits of
# float32, so a matrix product is exact in any order.
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)

_FIXED = 65536.0  # Pillow's nearest neighbour walks in 16.16 fixed point


Plan = dict[str, tf.Tensor]


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretch each channel to the full range, as `PIL.ImageOps.autocontrast`.

    A channel with one level stays as it is.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (H, W, 3).
    """
    height, width = _size(image)
    rows = tf.cast(tf.reshape(image, [height, 3 * width]), tf.float64)
    low = tf.reduce_min(tf.reshape(tf.reduce_min(rows, 0), [width, 3]), 0)
    high = tf.reduce_max(tf.reshape(tf.reduce_max(rows, 0), [width, 3]), 0)
    scale = tf.where(high > low, 255.0 / tf.maximum(high - low, 1.0), 1.0)
    offset = tf.where(high > low, -low * scale, 0.0)
    # Tiled to a row: broadcasting over an innermost axis of 3 costs more than everything else here.
    rows = rows * tf.tile(scale, [width]) + tf.tile(offset, [width])
    return tf.reshape(_to_uint8(rows), [height, width, 3])


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Flatten the histogram of each channel, as `PIL.ImageOps.equalize`.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (H, W, 3).
    """
    height, width = _size(image)
    rows = tf.cast(tf.reshape(image, [height, 3 * width]), tf.int32)
    index = rows + tf.tile([0, 256, 512], [width])  # (H, 3W): channel and level
    counts = tf.raw_ops.DenseBincount(  # tf.math.bincount reads the image once more for its largest level
        input=tf.reshape(index, [-1]), size=768, weights=tf.zeros([0], tf.int32)
    )
    counts = tf.reshape(counts, [3, 256])
    levels = tf.range(256)
    brightest = tf.reduce_max(tf.where(counts > 0, levels, 0), 1)
    others = height * width - tf.gather(counts, brightest, batch_dims=1)
    step = others[:, None] // 255
    table = (step // 2 + tf.cumsum(counts, 1, exclusive=True)) // tf.maximum(step, 1)
    table = tf.cast(tf.where(step > 0, tf.minimum(table, 255), levels), tf.uint8)
    return tf.reshape(tf.gather(tf.reshape(table, [-1]), index), [height, width, 3])


def invert(image: tf.Tensor) -> tf.Tensor:
    """Return 255 - level, as `PIL.ImageOps.invert`: uint8 (H, W, 3) to the same."""
    return tf.bitwise.invert(image)


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keep the highest bits of every level, as `PIL.ImageOps.posterize`.

    Zero bits give a black image. That is what Pillow did when the recipes were trained; since version 13 it
    raises for 0 bits, and timm 1.0.31 on it with "PosterizeIncreasing" at magnitude 10.

    Args:
        image: uint8 (H, W, 3).
        bits: scalar, 0 to 8.

    Returns:
        uint8 (H, W, 3).
    """
    mask = tf.bitwise.left_shift(255, 8 - tf.cast(bits, tf.int32)) % 256
    return tf.bitwise.bitwise_and(image, tf.cast(mask, tf.uint8))


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Invert the levels from a threshold on, as `PIL.ImageOps.solarize`.

    Args:
        image: uint8 (H, W, 3).
        threshold: scalar, a whole number from 0 (all are inverted) to 256 (none is).

    Returns:
        uint8 (H, W, 3).
    """
    threshold = tf.cast(threshold, tf.int32)
    bright = tf.cast(image >= tf.cast(tf.minimum(threshold, 255), tf.uint8), tf.uint8)
    mask = tf.cast(tf.where(threshold < 256, 255, 0), tf.uint8)
    return tf.bitwise.bitwise_xor(image, bright * mask)  # tf.where on uint8 takes eight times as long


def solarize_add(image: tf.Tensor, addend: tf.Tensor) -> tf.Tensor:
    """Add to the levels below 128, as timm's `solarize_add`.

    Args:
        image: uint8 (H, W, 3).
        addend: scalar, a whole number from 0 to 128.

    Returns:
        uint8 (H, W, 3).
    """
    return image + tf.cast(image < 128, tf.uint8) * tf.cast(addend, tf.uint8)


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Move each pixel away from its gray, as `PIL.ImageEnhance.Color` (torchvision's saturation).

    Args:
        image: uint8 (H, W, 3).
        factor: scalar, 0 (gray) or more; 1 changes nothing.

    Returns:
        uint8 (H, W, 3).
    """
    values = tf.cast(image, tf.float32)
    return _blend(tf.reshape(_luma(values, 3), tf.shape(image)), values, factor)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Move each level away from the mean gray, as `PIL.ImageEnhance.Contrast`.

    Args:
        image: uint8 (H, W, 3).
        factor: scalar, 0 (the mean gray) or more; 1 changes nothing.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = _size(image)
    values = tf.cast(image, tf.float32)
    # A row's sum is exact in float32, the sum of all rows is not.
    row_sums = tf.reduce_sum(tf.reshape(_luma(values, 1), [height, width]), 1)
    total = tf.reduce_sum(tf.cast(row_sums, tf.float64))
    mean = tf.floor(total / tf.cast(height * width, tf.float64) + 0.5)
    return _blend(tf.cast(mean, tf.float32), values, factor)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Multiply every level, as `PIL.ImageEnhance.Brightness`.

    Args:
        image: uint8 (H, W, 3).
        factor: scalar, 0 (black) or more; 1 changes nothing.

    Returns:
        uint8 (H, W, 3).
    """
    return _blend(0.0, tf.cast(image, tf.float32), factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Move each level away from a smoothed image, as `PIL.ImageEnhance.Sharpness`.

    The smoothing is 3 x 3 with 5/13 in the centre and 1/13 around it. The outermost pixels stay as they are.

    Args:
        image: uint8 (H, W, 3).
        factor: scalar, 0 (smoothed) or more; 1 changes nothing.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = _size(image)
    rows = tf.reshape(tf.cast(image, tf.float32), [height, 3 * width])
    total = rows[:-2] + rows[1:-1] + rows[2:]
    total = total[:, :-6] + total[:, 3:-3] + total[:, 6:] + 4.0 * rows[1:-1, 3:-3]
    # n / 13 + 1/2 is at least 1/26 away from a whole number, so any order of summation rounds alike.
    smooth = tf.floor(total * (1 / 13) + 0.5)
    smooth = tf.concat([rows[1:-1, :3], smooth, rows[1:-1, 3:][:, -3:]], 1)
    smooth = tf.concat([rows[:1], smooth, rows[1:][-1:]], 0)
    return tf.reshape(_blend(smooth, rows, factor), [height, width, 3])


def hue(image: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """Turn the hue, as torchvision's `adjust_hue` on a Pillow image.

    Hue, saturation and value are rounded down to 8 bits on the way, as Pillow's mode "HSV" does.

    Args:
        image: uint8 (H, W, 3).
        shift: scalar, a whole number of 1/255 turns, -128 to 127.

    Returns:
        uint8 (H, W, 3).
    """
    red, green, blue = tf.unstack(tf.reshape(tf.transpose(image, [2, 0, 1]), [3, -1]))
    angle, saturation, value = _to_hsv(*(tf.cast(plane, tf.float32) for plane in (red, green, blue)))
    angle = tf.math.floormod(angle + tf.cast(shift, tf.float32), 256.0)
    return tf.reshape(_to_uint8(tf.stack(_from_hsv(angle, saturation, value), 1)), tf.shape(image))


def shear_x(image: tf.Tensor, factor: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Shear along the rows, as `Image.transform` with the matrix (1, factor, 0, 0, 1, 0).

    The result at (x, y) is the image at (x + factor * y, y), pixel centres being at halves.

    Args:
        image: uint8 (H, W, 3).
        factor: float64 scalar, pixels to the side for each pixel down.
        interpolation: "nearest", "bilinear" or "bicubic" (Pillow's, a = -1).
        fill: colour of what lies outside the image, three levels.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = _size(image)
    factor = tf.cast(factor, tf.float64)
    if interpolation == "nearest":
        # Pillow walks in 16.16 fixed point here.
        start, slope = _fixed_point(0.5 + factor * 0.5), _fixed_point(factor)
        x = (start + tf.range(width) * int(_FIXED) + slope * tf.range(height)[:, None]) // int(_FIXED)
        return _pick(image, x, tf.range(height)[:, None], fill)
    return _move_rows(image, factor * _centres(height)[:, None], interpolation, fill)


def shear_y(image: tf.Tensor, factor: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Shear along the columns: `shear_x` with rows and columns exchanged."""
    return _transpose(shear_x(_transpose(image), factor, interpolation, fill))


def translate_x(image: tf.Tensor, pixels: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Move along the rows, as `Image.transform` with the matrix (1, 0, pixels, 0, 1, 0).

    The result at (x, y) is the image at (x + pixels, y): a positive number moves the content to the left.

    Args:
        image: uint8 (H, W, 3).
        pixels: float64 scalar.
        interpolation: "nearest", "bilinear" or "bicubic" (Pillow's, a = -1).
        fill: colour of what lies outside the image, three levels.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = _size(image)
    pixels = tf.cast(pixels, tf.float64)
    if interpolation == "nearest":
        x = tf.cast(tf.floor(_centres(width) + pixels), tf.int32)
        return _pick(image, x, tf.range(height)[:, None], fill)
    return _move_rows(image, tf.fill([height, 1], pixels), interpolation, fill)


def translate_y(image: tf.Tensor, pixels: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Move along the columns: `translate_x` with rows and columns exchanged."""
    return _transpose(translate_x(_transpose(image), pixels, interpolation, fill))


def rotate(image: tf.Tensor, angle: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Rotate around the centre without changing the size, as `Image.rotate`.

    Args:
        image: uint8 (H, W, 3).
        angle: float64 scalar, degrees, counter-clockwise.
        interpolation: "nearest", "bilinear" or "bicubic" (Pillow's, a = -1).
        fill: colour of what lies outside the image, three levels.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = _size(image)
    radians = -tf.math.floormod(tf.cast(angle, tf.float64), 360.0) * (math.pi / 180)
    cosine, sine = _to_15_decimals(tf.cos(radians)), _to_15_decimals(tf.sin(radians))
    centre_x, centre_y = tf.cast(width, tf.float64) / 2, tf.cast(height, tf.float64) / 2
    move_x = (cosine * -centre_x + sine * -centre_y) + centre_x
    move_y = (-sine * -centre_x + cosine * -centre_y) + centre_y
    if interpolation == "nearest":
        steps = [_fixed_point(value) for value in (cosine, sine, -sine)]
        starts = (
            _fixed_point(move_x + cosine * 0.5 + sine * 0.5),
            _fixed_point(move_y - sine * 0.5 + cosine * 0.5),
        )
        columns, rows = tf.range(width), tf.range(height)[:, None]
        x = (starts[0] + columns * steps[0] + rows * steps[1]) // int(_FIXED)
        y = (starts[1] + columns * steps[2] + rows * steps[0]) // int(_FIXED)
        return _pick(image, x, y, fill)
    columns, rows = _centres(width), _centres(height)[:, None]
    x = (cosine * columns + sine * rows) + move_x
    y = (-sine * columns + cosine * rows) + move_y
    return _interpolate(image, x, y, interpolation, fill)


def _size(image: tf.Tensor) -> tuple:
    """Return (height, width), numbers where they are known while tracing and scalars otherwise."""
    dynamic = tf.shape(image)
    return tuple(dynamic[axis] if image.shape[axis] is None else image.shape[axis] for axis in (0, 1))


def _transpose(image: tf.Tensor) -> tf.Tensor:
    return tf.transpose(image, [1, 0, 2])


def _to_uint8(values: tf.Tensor) -> tf.Tensor:
    """Clip to 0..255 and drop the fraction, as Pillow does."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _blend(degenerate: tf.Tensor | float, values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return _to_uint8(degenerate + tf.cast(factor, tf.float32) * (values - degenerate))


def _luma(values: tf.Tensor, copies: int) -> tf.Tensor:
    """Gray of float32 (..., 3) as whole numbers in float32 (pixels, copies)."""
    weights = tf.constant([[weight] * copies for weight in _LUMA])
    return tf.floor(tf.matmul(tf.reshape(values, [-1, 3]), weights) + 0.5)


def _to_hsv(red: tf.Tensor, green: tf.Tensor, blue: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Hue, saturation and value, whole numbers 0 to 255 in float32, with the mixed precision of Convert.c."""
    value = tf.maximum(tf.maximum(red, green), blue)
    spread = value - tf.minimum(tf.minimum(red, green), blue)
    safe = tf.maximum(spread, 1.0)
    red_gap, green_gap, blue_gap = ((value - plane) / safe for plane in (red, green, blue))
    red_wide, green_wide, blue_wide = (tf.cast(gap, tf.float64) for gap in (red_gap, green_gap, blue_gap))
    angle = tf.where(
        red == value,
        blue_gap - green_gap,
        tf.where(
            green == value,
            tf.cast(2.0 + red_wide - blue_wide, tf.float32),
            tf.cast(4.0 + green_wide - red_wide, tf.float32),
        ),
    )
    angle = tf.cast(tf.math.floormod(tf.cast(angle, tf.float64) / 6.0 + 1.0, 1.0), tf.float32)
    saturation = spread / tf.maximum(value, 1.0)
    angle, saturation = (
        tf.cast(tf.floor(tf.cast(part, tf.float64) * 255.0), tf.float32) for part in (angle, saturation)
    )
    return tf.where(spread > 0.0, angle, 0.0), saturation, value


def _from_hsv(angle: tf.Tensor, saturation: tf.Tensor, value: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Red, green and blue, whole numbers 0 to 255 in float64, with the mixed precision of Convert.c."""
    turns = tf.cast(angle, tf.float64) * 6.0 / 255.0
    sector = tf.floor(turns)
    part = tf.cast(turns - sector, tf.float32)
    strength = tf.cast(tf.cast(saturation, tf.float64) / 255.0, tf.float32)
    value = tf.cast(value, tf.float64)
    low = tf.floor(value * (1.0 - tf.cast(strength, tf.float64)) + 0.5)
    falling = tf.floor(value * (1.0 - tf.cast(strength * part, tf.float64)) + 0.5)
    rest = tf.cast(strength, tf.float64) * (1.0 - tf.cast(part, tf.float64))
    rising = tf.floor(value * (1.0 - rest) + 0.5)
    sector = tf.cast(sector, tf.int32) % 6

    def choose(at_value: tuple[int, int], at_falling: int, at_rising: int) -> tf.Tensor:
        others = tf.where(sector == at_falling, falling, tf.where(sector == at_rising, rising, low))
        return tf.where((sector == at_value[0]) | (sector == at_value[1]), value, others)

    return choose((5, 0), 1, 4), choose((1, 2), 3, 0), choose((3, 4), 5, 2)


def _centres(length: int | tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.range(length), tf.float64) + 0.5


def _to_15_decimals(value: tf.Tensor) -> tf.Tensor:
    """Python's round(value, 15) for -1 to 1, which Pillow applies to cosine and sine.

    value * 1e15 alone is rounded to an eighth: it takes sin(45 degrees) for a tie. 1e15 has 35 significant
    bits, so its products with parts of 18 bits are exact.
    """
    decimals = tf.round(value * 1e15)
    first = tf.round(value * 2.0**17) / 2.0**17
    second = tf.round((value - first) * 2.0**35) / 2.0**35
    rest = (first * 1e15 - decimals) + second * 1e15 + (value - first - second) * 1e15
    return (decimals + tf.round(rest)) / 1e15


def _fixed_point(value: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.floor(value * _FIXED + 0.5), tf.int32)


def _pick(image: tf.Tensor, x: tf.Tensor, y: tf.Tensor, fill: Sequence[int]) -> tf.Tensor:
    """Take the pixels at columns x and rows y, int32 that broadcast to (H, W); fill where there is none."""
    height, width = _size(image)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixels = tf.concat([tf.reshape(image, [-1, 3]), tf.constant([fill], tf.uint8)], 0)
    return tf.gather(pixels, tf.where(inside, y * width + x, height * width))


def _move_rows(image: tf.Tensor, offset: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Bilinear or bicubic values at source columns x + offset, offset float64 (H, 1) in pixels."""
    height, width = _size(image)
    # Three equal columns for the channels: nothing here has an innermost axis of 3, which broadcasts slowly.
    centres = tf.repeat(_centres(width), 3)
    x = centres + offset  # (H, 3W)
    inside = (x >= 0.0) & (x < tf.cast(width, tf.float64))
    shift = tf.floor(x[:, :1] - 0.5)  # the same for all columns, up to rounding, which the cubic bridges
    part = (x - 0.5) - (centres - 0.5 + shift)

    # Edges are repeated by two pixels. What is read further out lies in other rows and is filled later.
    wide = tf.concat([tf.tile(image[:, :1], [1, 2, 1]), image, tf.tile(image[:, -1:], [1, 2, 1])], 1)
    tall = tf.concat([wide[:1], wide, wide[-1:]], 0)
    steps = tf.cast(
        tf.clip_by_value(shift[:, 0], -tf.cast(width, tf.float64), tf.cast(width, tf.float64)), tf.int32
    )
    starts = (tf.range(height) + 1) * (width + 4) + 1 + steps
    # A row is one copy as a substring; tf.gather would copy pixel by pixel. The levels are the last bytes
    # of a serialized tensor, so positions count from its end.
    content = tf.io.serialize_tensor(tall)
    starts = 3 * (starts - (height + 2) * (width + 4))
    rows = tf.strings.substr(content, starts, tf.fill([height], 3 * (width + 3)))
    rows = tf.cast(tf.io.decode_raw(rows, tf.uint8), tf.float32)
    levels = [rows[:, 3 * tap : 3 * (tap + width)] for tap in range(4)]
    values = _to_uint8(_along_x(levels, part, interpolation))

    color = tf.tile(tf.constant(fill, tf.uint8), [width])
    values = (values - color) * tf.cast(inside, tf.uint8) + color  # wraps, and unwraps
    return tf.reshape(values, [height, width, 3])


def _interpolate(
    image: tf.Tensor, x: tf.Tensor, y: tf.Tensor, interpolation: str, fill: Sequence[int]
) -> tf.Tensor:
    """Bilinear or bicubic values of the image at source coordinates.

    A gather costs the same for one pixel as for four, so the four neighbours in a row are gathered at once:
    the image is laid out as groups of four pixels, four times, shifted by 0 to 3 pixels.

    Args:
        image: uint8 (H, W, 3).
        x, y: float64 (H, W), in pixels, centres at halves.
        interpolation: "bilinear" or "bicubic".
        fill: colour where (x, y) is outside the image.
    """
    height, width = _size(image)
    inside = (x >= 0.0) & (x < tf.cast(width, tf.float64)) & (y >= 0.0) & (y < tf.cast(height, tf.float64))
    column, x_part = _split(x)
    row, y_part = _split(y)

    # Edges are repeated by two pixels; below come four rows of the fill colour, for the pixels from outside.
    groups = (width + 7) // 4
    after = 4 * groups - width - 2
    wide = tf.concat([tf.tile(image[:, :1], [1, 2, 1]), image, tf.tile(image[:, -1:], [1, after, 1])], 1)
    below = tf.tile(tf.constant(fill, tf.uint8, [1, 1, 3]), [4, 4 * groups, 1])
    tall = tf.concat([wide[:1], wide[:1], wide, wide[-1:], wide[-1:], below], 0)
    flat = tf.concat([tf.reshape(tall, [-1]), tf.zeros([9], tf.uint8)], 0)
    num_groups = (height + 8) * groups
    quads = tf.concat([flat[3 * shift : 3 * shift + 12 * num_groups] for shift in range(4)], 0)
    quads = tf.reshape(quads, [-1, 12])

    # The pixel before, in the padded image, is one further to the right and below.
    column += 1
    index = tf.bitwise.right_shift(column, 2) + tf.bitwise.bitwise_and(column, 3) * num_groups
    index = tf.where(tf.reshape(inside, [-1]), index + (row + 1) * groups, (height + 4) * groups)
    values: list[tf.Tensor] = []
    for number in range(4) if interpolation == "bicubic" else (1, 2):
        with tf.control_dependencies(values[-1:]):  # one row after the other stays in the cache
            quad = tf.gather(quads, index + number * groups)
        quad = tf.transpose(tf.cast(quad, tf.float32))
        levels = [quad[3 * tap : 3 * tap + 3] for tap in range(4)]  # (3, H * W) each
        values.append(_along_x(levels, x_part, interpolation))
    values = _polynomial(_cubic(*values) if interpolation == "bicubic" else _linear(*values), y_part)
    return tf.reshape(tf.transpose(_to_uint8(values)), [height, width, 3])


def _along_x(levels: list[tf.Tensor], part: tf.Tensor, interpolation: str) -> tf.Tensor:
    """Interpolate four neighbours, whole numbers in float32, whose sums are exact in any order."""
    before, first, second, after = levels
    if interpolation == "bicubic":
        rise, last_rise = first - before, after - second
        third = rise + last_rise
        coefficients = [first, second - before, -rise - third, third]
    else:
        coefficients = _linear(first, second)
    return _polynomial([tf.cast(coefficient, tf.float64) for coefficient in coefficients], part)


def _split(position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The pixel whose centre lies at or before a position, int32 (H * W), and the distance from it."""
    position = tf.reshape(position - 0.5, [-1])
    whole = tf.floor(position)
    return tf.cast(whole, tf.int32), position - whole


def _linear(first: tf.Tensor, second: tf.Tensor) -> list[tf.Tensor]:
    return [first, second - first]


def _cubic(before: tf.Tensor, first: tf.Tensor, second: tf.Tensor, after: tf.Tensor) -> list[tf.Tensor]:
    """Coefficients of Pillow's cubic, in the order of operations of Geometry.c."""
    return [
        first,
        second - before,
        2.0 * (before - first) + second - after,
        first - before - second + after,
    ]


def _polynomial(coefficients: list[tf.Tensor], part: tf.Tensor) -> tf.Tensor:
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = coefficient + part * value
    return value


# What the numbers in a plan stand for. All but the first and the last are what timm's RandAugment draws from,
# in the order of its _RAND_TRANSFORMS.
OPERATIONS = (
    *("identity", "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add"),
    *("color", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "hue"),
)
_RAND_LEVELS = OPERATIONS[1:-1]
# timm's _RAND_INCREASING_TRANSFORMS, for "inc1".
_CHANGED = ("posterize", "solarize", "color", "contrast", "brightness", "sharpness")
_RAND_INCREASING_LEVELS = tuple(f"{name}_increasing" if name in _CHANGED else name for name in _RAND_LEVELS)

# AutoAugment's sub-policies for ImageNet, (level, probability, magnitude): Cubuk et al., arXiv 1805.09501,
# table 9, as timm's auto_augment_policy_original has them.
_ORIGINAL = (
    (("posterize_original", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize_original", 0.6, 7), ("posterize_original", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize_original", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize_original", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
# timm's auto_augment_policy_v0, which comes from the EfficientNet code for TPU.
_V0 = (
    (("equalize", 0.8, 1), ("shear_y", 0.8, 4)),
    (("color", 0.4, 9), ("equalize", 0.6, 3)),
    (("color", 0.4, 1), ("rotate", 0.6, 8)),
    (("solarize", 0.8, 3), ("equalize", 0.4, 7)),
    (("solarize", 0.4, 2), ("solarize", 0.6, 2)),
    (("color", 0.2, 0), ("equalize", 0.8, 8)),
    (("equalize", 0.4, 8), ("solarize_add", 0.8, 3)),
    (("shear_x", 0.2, 9), ("rotate", 0.6, 8)),
    (("color", 0.6, 1), ("equalize", 1.0, 2)),
    (("invert", 0.4, 9), ("rotate", 0.6, 0)),
    (("equalize", 1.0, 9), ("shear_y", 0.6, 3)),
    (("color", 0.4, 7), ("equalize", 0.6, 0)),
    (("posterize", 0.4, 6), ("autocontrast", 0.4, 7)),
    (("solarize", 0.6, 8), ("color", 0.6, 9)),
    (("solarize", 0.2, 4), ("rotate", 0.8, 9)),
    (("rotate", 1.0, 7), ("translate_y", 0.8, 9)),
    (("shear_x", 0.0, 0), ("solarize", 0.8, 4)),
    (("shear_y", 0.8, 0), ("color", 0.6, 4)),
    (("color", 1.0, 0), ("rotate", 0.6, 2)),
    (("equalize", 0.8, 4), ("equalize", 0.0, 8)),
    (("equalize", 1.0, 4), ("autocontrast", 0.6, 2)),
    (("shear_y", 0.4, 7), ("solarize_add", 0.6, 7)),
    (("posterize", 0.8, 2), ("solarize", 0.6, 10)),
    (("solarize", 0.6, 8), ("equalize", 0.6, 1)),
    (("color", 0.8, 6), ("rotate", 0.4, 5)),
)

# The keys of torchvision's TrivialAugmentWide._augmentation_space.
_TRIVIAL_OPERATIONS = tuple(name for name in OPERATIONS if name not in ("invert", "solarize_add", "hue"))
# Largest magnitudes in torchvision's _augmentation_space of TrivialAugmentWide and of AutoAugment; for
# posterize the number of bits that are dropped.
_TRIVIAL_RANGES = {"shear": 0.99, "translate": 32.0, "rotate": 135.0, "factor": 0.99, "bits": 6.0}
_AUTO_RANGES = {"shear": 0.3, "rotate": 30.0, "factor": 0.9, "bits": 4.0}

SubPolicies = tuple[tuple[tuple[str, float, int], ...], ...]


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment: operations drawn uniformly with replacement, each carried out with a probability.

    Reference: Cubuk et al., arXiv 1909.13719; timm 1.0.31, timm/data/auto_augment.py, `RandAugment`.

    Args:
        levels: names of what is drawn from: an operation, and "_increasing" or "_original" after it where
            timm has several meanings of its magnitude.
        num_operations: draws for one image.
        magnitude: mean of the magnitude, 0 to 10.
        magnitude_std: deviation of the normal magnitude; inf draws it uniformly from 0 to `magnitude`.
        magnitude_max: largest magnitude.
        probability: of carrying a drawn operation out.
    """

    levels: tuple[str, ...] = _RAND_LEVELS
    num_operations: int = 2
    magnitude: float = 10.0
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    probability: float = 0.5


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """AutoAugment: one of 25 sub-policies of two operations, each with its probability and magnitude.

    Args:
        sub_policies: for each, (level, probability, magnitude) of its operations; levels as in `RandAugment`.
        magnitude_std: deviation of the normal magnitude.
        torchvision: whether magnitudes are torchvision's ten bins instead of timm's scale from 0 to 10.
    """

    sub_policies: SubPolicies
    magnitude_std: float = 0.0
    torchvision: bool = False
    num_operations: int = 2
    magnitude_max: float = 10.0


@dataclasses.dataclass(frozen=True)
class TrivialAugment:
    """torchvision's `TrivialAugmentWide`: one of 14 operations with one of 31 magnitudes.

    torchvision carries it out with nearest neighbours and a black fill.

    Reference: Mueller and Hutter, arXiv 2103.10158; torchvision 0.28.0, transforms/autoaugment.py.
    """

    num_bins: int = 31
    num_operations: int = 1


Policy = RandAugment | AutoAugment | TrivialAugment

POLICIES = ("rand", "original", "originalr", "v0", "v0r", "imagenet", "ta_wide", "none")

# What a plan needs for each operation: which one, whether, how strong, which sign.
UNIFORMS_PER_OPERATION = 4


def parse_policy(text: str) -> Policy | None:
    """Read the name of a published augmentation.

    - "rand-m9-mstd0.5-inc1", timm's RandAugment. m: magnitude (10), n: operations for one image (2), p:
      probability of each (0.5), mstd: deviation of the magnitude (0; above 100 it is uniform), mmax: largest
      magnitude (10), inc: 1 for operations that all grow with the magnitude (0).
    - "original" and "v0", timm's AutoAugment; "originalr" and "v0r" posterize more, not less, with the
      magnitude. "-mstd0.5" may follow.
    - "imagenet": torchvision's AutoAugment, whose magnitudes differ from timm's.
    - "ta_wide": torchvision's TrivialAugmentWide.
    - "none".

    Args:
        text: one of these names.

    Returns:
        The policy, or None for "none".

    Raises:
        ValueError: the name or one of its settings is unknown; tells the known ones.

    Example:
        parse_policy("rand-m9-mstd0.5-inc1").magnitude_std     # 0.5
    """
    name, *sections = text.split("-")
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, 1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown augmentation {text!r}.{suggestion} Known: {', '.join(POLICIES)}.")
    known: tuple[str, ...] = ("mstd",) if name.startswith(("original", "v0")) else ()
    if name == "rand":
        known = ("m", "n", "p", "mstd", "mmax", "inc")
    settings = {}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        if match is None or match[1] not in known:
            allowed = f"Known: {', '.join(known)}, each followed by a number." if known else "It takes none."
            raise ValueError(f"Unknown setting {section!r} of augmentation {text!r}. {allowed}")
        settings[match[1]] = float(match[2])
    std = settings.get("mstd", 0.0)
    if name == "rand":
        return RandAugment(
            levels=_RAND_INCREASING_LEVELS if settings.get("inc") else _RAND_LEVELS,
            num_operations=int(settings.get("n", 2)),
            magnitude=settings.get("m", 10.0),
            magnitude_std=math.inf if std > 100 else std,
            magnitude_max=settings.get("mmax", 10.0),
            probability=settings.get("p", 0.5),
        )
    if name == "ta_wide":
        return TrivialAugment()
    if name == "none":
        return None
    sub_policies: SubPolicies = _V0 if name.startswith("v0") else _ORIGINAL
    if name.endswith("r"):
        sub_policies = tuple(tuple(map(_increase_posterize, sub_policy)) for sub_policy in sub_policies)
    return AutoAugment(sub_policies, std, torchvision=name == "imagenet")


def plan_augment(policy: Policy, uniforms: tf.Tensor, image_size: tuple[int, int]) -> Plan:
    """Decide the operations of many examples.

    Args:
        policy: as `parse_policy` returns it.
        uniforms: float32 or float64 (N, UNIFORMS_PER_OPERATION * policy.num_operations), in [0, 1). For each
            operation in turn: which one (in AutoAugment the first column chooses the sub-policy), whether,
            how strong, and the sign, negative from 0.5 on.
        image_size: (height, width) of the images, in pixels, which scales timm's translations.

    Returns:
        "operation": int32 (N, num_operations), positions in `OPERATIONS`; "argument": float64, the same
        shape, what the operation is given: a factor, a threshold, bits, pixels, degrees.
    """
    uniforms = tf.cast(uniforms, tf.float64)
    uniforms = tf.reshape(uniforms, [-1, policy.num_operations, UNIFORMS_PER_OPERATION])
    choice, applied, strength, sign = tf.unstack(uniforms, axis=2)  # (N, num_operations) each
    negative = tf.cast(sign >= 0.5, tf.int32)
    if isinstance(policy, TrivialAugment):
        number = _whole(choice, len(_TRIVIAL_OPERATIONS))
        table = [
            [
                _torchvision_arguments(name, bin_, policy.num_bins, _TRIVIAL_RANGES)
                for bin_ in range(policy.num_bins)
            ]
            for name in _TRIVIAL_OPERATIONS
        ]
        place = tf.stack([number, _whole(strength, policy.num_bins), negative], 2)
        return {
            "operation": tf.gather(_numbers(_TRIVIAL_OPERATIONS), number),
            "argument": tf.gather_nd(np.array(table, np.float64), place),
        }

    if isinstance(policy, RandAugment):
        rows = [[(level, policy.probability, policy.magnitude)] for level in policy.levels]
        number = _whole(choice, len(rows))
        place = tf.stack([number, tf.zeros_like(number)], 2)
    else:
        rows = [list(sub_policy) for sub_policy in policy.sub_policies]
        number = tf.repeat(_whole(choice[:, :1], len(rows)), policy.num_operations, 1)
        place = tf.stack([number, tf.zeros_like(number) + tf.range(policy.num_operations)], 2)
    levels = [[level for level, _, _ in row] for row in rows]
    probability = tf.gather_nd(np.array([[entry[1] for entry in row] for row in rows], np.float64), place)
    operation = tf.gather_nd(np.stack([_numbers(row) for row in levels]), place)
    operation = tf.where(applied < probability, operation, 0)
    if isinstance(policy, AutoAugment) and policy.torchvision:
        table = [
            [_torchvision_arguments(level, bin_, 10, _AUTO_RANGES) for level, _, bin_ in row] for row in rows
        ]
        argument = tf.gather_nd(np.array(table, np.float64), tf.concat([place, negative[..., None]], 2))
        return {"operation": operation, "argument": argument}

    magnitude = tf.gather_nd(np.array([[entry[2] for entry in row] for row in rows], np.float64), place)
    if math.isinf(policy.magnitude_std):
        magnitude *= strength
    elif policy.magnitude_std > 0:
        magnitude += policy.magnitude_std * tf.math.ndtri(strength)
    magnitude = tf.clip_by_value(magnitude, 0.0, policy.magnitude_max)
    arguments = _timm_arguments(magnitude, 1.0 - 2.0 * tf.cast(negative, tf.float64), image_size)
    names = list(arguments)
    column = tf.gather_nd(np.array([[names.index(level) for level in row] for row in levels]), place)
    return {
        "operation": operation,
        "argument": tf.gather(tf.stack(list(arguments.values()), 2), column, batch_dims=2),
    }


def apply_augment(
    image: tf.Tensor, plan: Plan, interpolation: str = "bicubic", fill: Sequence[int] = IMAGENET_FILL
) -> tf.Tensor:
    """Carry out the operations planned for one image.

    Args:
        image: uint8 (H, W, 3).
        plan: one row of `plan_augment`: "operation" int32 and "argument" float64, both (num_operations,), the
            number known while tracing.
        interpolation: "nearest" (torchvision's default), "bilinear" or "bicubic", for shears, translations
            and rotations.
        fill: colour that these uncover, three levels; the default is timm's, torchvision's is (0, 0, 0).

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: `interpolation` is unknown; tells the known ones.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"Unknown interpolation {interpolation!r}. Known: {', '.join(INTERPOLATIONS)}.")
    functions = _functions(interpolation, tuple(fill))
    if tf.executing_eagerly():
        for number, argument in zip(plan["operation"], plan["argument"], strict=True):
            image = functions[int(number)](image, argument)
        return image
    shape = image.shape
    specification = tf.TensorSpec(shape, tf.uint8), tf.TensorSpec([], tf.float64)
    branches = [
        tf.function(function, autograph=False).get_concrete_function(*specification) for function in functions
    ]
    for number, argument in zip(tf.unstack(plan["operation"]), tf.unstack(plan["argument"]), strict=True):
        # tf.switch_case would merge all branches into this graph, and pass a dead value through each node
        # of those not taken: 80 us an image. This calls the chosen function.
        [image] = tf.raw_ops.StatelessCase(
            branch_index=number,
            input=[image, argument],
            Tout=[tf.uint8],
            branches=branches,
            output_shapes=[shape],
        )
        image.set_shape(shape)
    return image


NUM_JITTER_UNIFORMS = 8


def plan_jitter(uniforms: tf.Tensor, strength: float | Sequence[float]) -> Plan:
    """Decide the colour jitter of many examples: torchvision's ColorJitter, in random order.

    Args:
        uniforms: float32 or float64 (N, NUM_JITTER_UNIFORMS), in [0, 1): four order the operations, then one
            for each chooses its factor.
        strength: s, for factors of brightness, contrast and saturation from max(0, 1 - s) to 1 + s, as timm's
            `color_jitter`; or three strengths, or four, the last up to 0.5 turns the hue by -s to s.

    Returns:
        A plan for `apply_jitter`, as `plan_augment` returns it, of four operations. Those of strength 0 are
        "identity".

    Raises:
        ValueError: there are not one, three or four strengths, one is negative, or the last exceeds 0.5.
    """
    strengths = np.ravel(np.array(strength, np.float64))
    strengths = np.repeat(strengths, 3) if len(strengths) == 1 else strengths
    if len(strengths) not in (3, 4) or strengths.min() < 0 or strengths[3:].sum() > 0.5:
        raise ValueError(
            "Expected the strength of colour jitter as one number of 0 or more, three (brightness, contrast, "
            f"saturation) or four (then hue, up to 0.5), received {strength!r}."
        )
    strengths = np.append(strengths, 0.0)[:4]
    names = [
        name if value > 0 else "identity"
        for name, value in zip(("brightness", "contrast", "color", "hue"), strengths, strict=True)
    ]
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(neutral - strengths, [0.0, 0.0, 0.0, -0.5])
    uniforms = tf.cast(uniforms, tf.float64)
    argument = low + (neutral + strengths - low) * uniforms[:, 4:]
    turns = tf.cast(tf.cast(argument[:, 3:] * 255.0, tf.int32), tf.float64)  # torchvision drops the fraction
    argument = tf.concat([argument[:, :3], turns], 1)
    order = tf.argsort(uniforms[:, :4], 1)
    return {
        "operation": tf.gather(_numbers(names), order),
        "argument": tf.gather(argument, order, batch_dims=1),
    }


def apply_jitter(image: tf.Tensor, plan: Plan) -> tf.Tensor:
    """Carry out the colour jitter planned for one image: uint8 (H, W, 3), and one row of `plan_jitter`."""
    return apply_augment(image, plan)


NUM_ERASE_UNIFORMS = 41
ERASE_MODES = ("pixel", "rand", "const")


def plan_erase(
    uniforms: tf.Tensor,
    probability: float,
    image_size: tuple[int, int],
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> tf.Tensor:
    """Decide the box that is erased in each of many examples, as timm's RandomErasing.

    A box has an area drawn uniformly and a ratio of height to width drawn uniformly in its logarithm. Of ten
    attempts the first that is smaller than the image in both directions counts; if none is, there is no box.

    Reference: Zhong et al., arXiv 1708.04896; timm 1.0.31, timm/data/random_erasing.py, `_erase`.

    Args:
        uniforms: float32 or float64 (N, NUM_ERASE_UNIFORMS), in [0, 1): whether, then ten times area, ratio,
            top and left.
        probability: of erasing a box.
        image_size: (height, width) in pixels.
        area: smallest and largest area of a box, as a fraction of the image's.
        aspect: smallest and largest ratio of height to width.

    Returns:
        int32 (N, 4): top, left, height and width in pixels, all 0 where nothing is erased.
    """
    height, width = image_size
    uniforms = tf.cast(uniforms, tf.float64)
    size, ratio, top, left = tf.unstack(tf.reshape(uniforms[:, 1:], [-1, 10, 4]), axis=2)
    size = (area[0] + (area[1] - area[0]) * size) * (height * width)
    low, high = map(math.log, aspect)
    ratio = tf.exp(low + (high - low) * ratio)
    box_height = tf.cast(tf.round(tf.sqrt(size * ratio)), tf.int32)
    box_width = tf.cast(tf.round(tf.sqrt(size / ratio)), tf.int32)
    top, left = _whole(top, height - box_height + 1), _whole(left, width - box_width + 1)
    fits = (box_height < height) & (box_width < width)  # (N, 10)
    first = tf.argmax(tf.cast(fits, tf.int32), 1)
    boxes = tf.gather(tf.stack([top, left, box_height, box_width], 2), first, batch_dims=1)
    erased = tf.reduce_any(fits, 1) & (uniforms[:, 0] < probability)
    return tf.where(erased[:, None], boxes, 0)


def apply_erase(
    image: tf.Tensor,
    box: tf.Tensor,
    seed: tf.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str = "pixel",
) -> tf.Tensor:
    """Fill the box planned for one image with noise.

    timm erases after it normalises, with N(0, 1) for each pixel and channel. Before normalisation that is
    255 * (mean + std * N(0, 1)).

    Args:
        image: uint8 (H, W, 3), or float32 in levels 0 to 255. Floats keep noise outside that range, as timm
            does; uint8 rounds and clips it.
        box: int32 (4,), one row of `plan_erase`.
        seed: int32 or int64 (2,), the example's key. The noise is a function of it and of the box's size.
        mean, std: of the normalisation, for each channel, in [0, 1].
        mode: "pixel" for noise in every pixel, "rand" for one random colour, "const" for the mean.

    Returns:
        The type and shape of `image`.

    Raises:
        ValueError: `mode` is unknown; tells the known ones.
    """
    if mode not in ERASE_MODES:
        raise ValueError(f"Unknown mode {mode!r} of erasing. Known: {', '.join(ERASE_MODES)}.")
    top, left, height, width = tf.unstack(box)

    def erase() -> tf.Tensor:
        shape = [height, width, 3]
        noise = tf.zeros([1, 1, 3])
        if mode != "const":
            noise = tf.random.stateless_normal(shape if mode == "pixel" else [1, 1, 3], seed)
        patch = 255.0 * (tf.constant(mean, tf.float32) + tf.constant(std, tf.float32) * noise)
        if image.dtype == tf.uint8:
            patch = _to_uint8(tf.round(patch))
        return tf.ensure_shape(_paste(image, tf.broadcast_to(patch, shape), top, left, 0), image.shape)

    return tf.cond(height > 0, erase, lambda: tf.identity(image))


def plan_mix(
    seed: tf.Tensor,
    num_groups: int,
    image_size: tuple[int, int],
    mixup_alpha: float,
    cutmix_alpha: float,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> Plan:
    """Decide mixup or CutMix for one batch, as timm's `Mixup` in mode "batch".

    Each group of images shares one decision: CutMix with `switch_probability` where both are on, and lambda
    from Beta(alpha, alpha). CutMix takes a box of the fraction 1 - lambda of the area around a uniform
    centre; lambda is then what the box leaves, the border having cut it.

    Reference: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; timm 1.0.31, timm/data/mixup.py.

    Args:
        seed: int32 or int64 (2,), the batch's key.
        num_groups: groups in the batch; 1 mixes the batch as a whole. A recipe trained on many devices mixed
            the images of each device by themselves.
        image_size: (height, width) in pixels.
        mixup_alpha, cutmix_alpha: of the Beta distributions; 0 switches one off.
        probability: of mixing a group at all.
        switch_probability: of CutMix where both are on.

    Returns:
        "lam": float64 (num_groups,), the weight of an image's own label, 1 where nothing is mixed. "box":
        int32 (num_groups, 4), top, left, height and width in pixels of what CutMix takes from the partner,
        all 0 where images are blended or nothing is mixed.

    Raises:
        ValueError: an alpha is negative or none is positive; gives the values received.
    """
    if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
        raise ValueError(
            "Expected mixup_alpha and cutmix_alpha of 0 or more, one of them positive, received "
            f"{mixup_alpha!r} and {cutmix_alpha!r}. To mix nothing pass no plan to `mix`."
        )
    height, width = image_size
    seeds = tf.unstack(tf.random.split(seed, 2))
    mixed, switch, centre_y, centre_x = tf.unstack(
        tf.random.stateless_uniform([4, num_groups], seeds[0], dtype=tf.float64)
    )
    use_cutmix = switch < switch_probability
    if mixup_alpha == 0 or cutmix_alpha == 0:
        use_cutmix = tf.fill([num_groups], cutmix_alpha > 0)
    alpha = tf.where(use_cutmix, tf.constant(cutmix_alpha, tf.float64), tf.constant(mixup_alpha, tf.float64))
    own, other = tf.unstack(tf.random.stateless_gamma([2, num_groups], seeds[1], alpha, dtype=tf.float64))
    lam = own / tf.maximum(own + other, np.finfo(np.float64).tiny)  # a tiny alpha can underflow both
    lam = tf.where(mixed < probability, lam, 1.0)

    side = tf.sqrt(1.0 - lam)
    top, box_height = _cut(height, side, centre_y)
    left, box_width = _cut(width, side, centre_x)
    box_area = box_height * box_width
    box = tf.stack([top, left, box_height, box_width], 1)
    return {
        "lam": tf.where(use_cutmix, 1.0 - tf.cast(box_area, tf.float64) / (height * width), lam),
        "box": tf.where((use_cutmix & (box_area > 0))[:, None], box, 0),
    }


def mix(
    images: tf.Tensor, labels: tf.Tensor, plan: Plan | None, num_classes: int, label_smoothing: float = 0.0
) -> tuple[tf.Tensor, tf.Tensor]:
    """Carry out the mixing planned for one batch.

    An image's partner is the one at the same place from the end of its group, as in timm.

    Args:
        images: float32 or uint8 (N, H, W, 3). uint8 is rounded to the nearest level, as timm's
            `FastCollateMixup` does.
        labels: integers (N,), from 0 to num_classes - 1.
        plan: as `plan_mix` returns it, its number of groups a divisor of N, or None to mix nothing.
        num_classes: width of the targets.
        label_smoothing: s of the targets 1 - s + s / num_classes and s / num_classes.

    Returns:
        The images, in their type and shape, and the targets: float32 (N, num_classes), rows that sum to 1.
    """
    off = label_smoothing / num_classes
    targets = tf.one_hot(labels, num_classes, 1.0 - label_smoothing + off, off, dtype=tf.float32)
    if plan is None:
        return images, targets
    num_groups = plan["lam"].shape[0]
    lam = plan["lam"][:, None, None]
    grouped = tf.reshape(targets, [num_groups, -1, num_classes])
    targets = grouped * tf.cast(lam, tf.float32) + tf.reverse(grouped, [1]) * tf.cast(1.0 - lam, tf.float32)
    groups = tf.split(images, num_groups) if num_groups > 1 else [images]
    groups = [_mix_group(group, plan["lam"][i], plan["box"][i]) for i, group in enumerate(groups)]
    mixed = tf.concat(groups, 0) if num_groups > 1 else groups[0]
    return tf.ensure_shape(mixed, images.shape), tf.reshape(targets, [-1, num_classes])


def _mix_group(images: tf.Tensor, lam: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    def keep() -> tf.Tensor:
        return tf.identity(images)

    def blend() -> tf.Tensor:
        values = tf.cast(images, tf.float32)
        partners = tf.reverse(values, [0])  # ten times as fast as values[::-1]
        values = values * tf.cast(lam, tf.float32) + partners * tf.cast(1.0 - lam, tf.float32)
        return tf.cast(tf.round(values), tf.uint8) if images.dtype == tf.uint8 else values

    def cut() -> tf.Tensor:
        top, left, height, width = tf.unstack(box)
        patch = tf.reverse(images[:, top : top + height, left : left + width], [0])
        return _paste(images, patch, top, left, 1)

    return tf.switch_case(tf.where(box[2] > 0, 2, tf.where(lam < 1.0, 1, 0)), [keep, blend, cut])


def _paste(image: tf.Tensor, patch: tf.Tensor, top: tf.Tensor, left: tf.Tensor, axis: int) -> tf.Tensor:
    """Put a patch into images whose rows are at `axis` and columns at the next."""
    bottom, right = top + tf.shape(patch)[axis], left + tf.shape(patch)[axis + 1]
    outer = (slice(None),) * axis
    rows = image[(*outer, slice(top, bottom))]
    columns = [rows[(*outer, slice(None), part)] for part in (slice(0, left), slice(right, None))]
    rows = tf.concat([columns[0], patch, columns[1]], axis + 1)
    return tf.concat([image[(*outer, slice(0, top))], rows, image[(*outer, slice(bottom, None))]], axis)


def _cut(length: int, side: tf.Tensor, centre: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Where a CutMix box begins along one axis, and how long it is within the image."""
    cut = tf.cast(length * side, tf.int32)
    middle = _whole(centre, length)
    start = tf.maximum(middle - cut // 2, 0)
    return start, tf.minimum(middle + (cut + 1) // 2, length) - start


def _timm_arguments(
    magnitude: tf.Tensor, sign: tf.Tensor, image_size: tuple[int, int]
) -> dict[str, tf.Tensor]:
    """What a magnitude from 0 to 10 means for each level: LEVEL_TO_ARG of timm/data/auto_augment.py."""
    height, width = image_size
    level = magnitude / 10.0
    bits, threshold = tf.floor(level * 4.0), tf.minimum(tf.floor(level * 256.0), 256.0)
    arguments = {
        "rotate": sign * (level * 30.0),
        "posterize": bits,
        "posterize_increasing": 4.0 - bits,
        "posterize_original": bits + 4.0,
        "solarize": threshold,
        "solarize_increasing": 256.0 - threshold,
        "solarize_add": tf.minimum(tf.floor(level * 110.0), 128.0),
        "translate_x": sign * (level * 0.45) * width,
        "translate_y": sign * (level * 0.45) * height,
    }
    arguments |= dict.fromkeys(("autocontrast", "equalize", "invert"), tf.zeros_like(level))
    arguments |= dict.fromkeys(("shear_x", "shear_y"), sign * (level * 0.3))
    for name in ("color", "contrast", "brightness", "sharpness"):
        arguments[name] = level * 1.8 + 0.1
        arguments[f"{name}_increasing"] = tf.maximum(1.0 + sign * (level * 0.9), 0.1)
    return arguments


def _torchvision_arguments(
    level: str, number: float, num_bins: int, ranges: dict[str, float]
) -> tuple[float, float]:
    """What torchvision gives Pillow for one of its magnitudes, and for its negative.

    torchvision 0.28.0, transforms/autoaugment.py, `_augmentation_space` and `_apply_op`.
    """
    name, number = _operation(level), int(number)
    if name in ("shear_x", "shear_y"):
        # torchvision goes through degrees, and through another formula for each axis.
        magnitude = math.atan(_linspace(0.0, ranges["shear"], num_bins)[number])
        angle = math.radians(math.degrees(magnitude))
        shear = math.tan(angle) if name == "shear_x" else math.sin(angle) / math.cos(angle)
        return shear, -shear
    if name in ("translate_x", "translate_y"):
        pixels = float(int(_linspace(0.0, ranges["translate"], num_bins)[number]))
        return -pixels, pixels
    if name == "rotate":
        degrees = _linspace(0.0, ranges["rotate"], num_bins)[number]
        return degrees, -degrees
    if name in ("brightness", "color", "contrast", "sharpness"):
        change = _linspace(0.0, ranges["factor"], num_bins)[number]
        return 1.0 + change, 1.0 - change
    argument = 0.0
    if name == "posterize":
        argument = 8.0 - round(float(np.float32(number / ((num_bins - 1) / ranges["bits"]))))
    elif name == "solarize":
        argument = math.ceil(_linspace(255.0, 0.0, num_bins)[number])
    return argument, argument


def _linspace(start: float, stop: float, num: int) -> list[float]:
    """The values of torch.linspace: float32, counted from the nearer end."""
    step = float((np.float32(stop) - np.float32(start)) / np.float32(num - 1))
    stop = float(np.float32(stop))
    values = [start + step * i if i < num // 2 else stop - step * (num - 1 - i) for i in range(num)]
    return [float(np.float32(value)) for value in values]


def _increase_posterize(entry: tuple[str, float, int]) -> tuple[str, float, int]:
    level, probability, magnitude = entry
    return "posterize_increasing" if level.startswith("posterize") else level, probability, magnitude


def _operation(level: str) -> str:
    return level.removesuffix("_increasing").removesuffix("_original")


def _numbers(levels: Sequence[str]) -> np.ndarray:
    return np.array([OPERATIONS.index(_operation(level)) for level in levels], np.int32)


def _whole(uniform: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """Turn [0, 1) into 0 ... count - 1."""
    return tf.cast(tf.floor(uniform * tf.cast(count, tf.float64)), tf.int32)


def _functions(
    interpolation: str, fill: tuple[int, ...]
) -> list[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]]:
    """The functions of (image, argument) behind `OPERATIONS`."""

    def plain(operation: Callable) -> Callable:
        return lambda image, argument: operation(image)

    def geometric(operation: Callable) -> Callable:
        return lambda image, argument: operation(image, argument, interpolation, fill)

    return [
        *map(plain, (tf.identity, autocontrast, equalize, invert)),
        *(geometric(rotate), posterize, solarize, solarize_add, color, contrast, brightness, sharpness),
        *map(geometric, (shear_x, shear_y, translate_x, translate_y)),
        hue,
    ]
