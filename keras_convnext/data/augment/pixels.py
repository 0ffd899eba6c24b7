"""Image operations in TensorFlow that equal Pillow's bit for bit.

Images are uint8 (H, W, 3) and stay so; factors and the like are scalars. The geometric operations compute in
float64, as Pillow does: with a slope such as 0.27 one pixel in a hundred lies exactly on a level, and the
rounding of the last bit decides between it and the one below. They take `interpolation`, "bilinear" or
"bicubic" (Pillow's, a = -1), and `fill`, the three levels of what lies outside the image. Coordinates are in
pixels, with pixel centres at halves.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

# timm paints what a geometric operation uncovers with the mean colour of ImageNet, round(255 * mean).
IMAGENET_FILL = (124, 116, 104)

# Luma of ITU-R 601-2 in units of 2^-16, as Pillow's Convert.c has it. All its sums fit the 24 bits of
# float32, so a matrix product is exact in any order.
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretch each channel to the full range, as `PIL.ImageOps.autocontrast`; one of a single level stays."""
    height, width = _size(image)
    rows = tf.cast(tf.reshape(image, [height, 3 * width]), tf.float64)
    low = tf.reduce_min(tf.reshape(tf.reduce_min(rows, 0), [width, 3]), 0)
    high = tf.reduce_max(tf.reshape(tf.reduce_max(rows, 0), [width, 3]), 0)
    scale = tf.where(high > low, 255.0 / tf.maximum(high - low, 1.0), 1.0)
    offset = tf.where(high > low, -low * scale, 0.0)
    # Tiled to a row: broadcasting over an innermost axis of 3 costs more than everything else here.
    rows = rows * tf.tile(scale, [width]) + tf.tile(offset, [width])
    return tf.reshape(to_uint8(rows), [height, width, 3])


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Flatten the histogram of each channel, as `PIL.ImageOps.equalize`."""
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
    """Return 255 - level, as `PIL.ImageOps.invert`."""
    return tf.bitwise.invert(image)


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keep the highest `bits`, 0 to 8, of every level, as `PIL.ImageOps.posterize`.

    Zero bits give a black image. That is what Pillow did when the recipes were trained; since version 13 it
    raises for 0 bits, and timm 1.0.31 on it with "PosterizeIncreasing" at magnitude 10.
    """
    mask = tf.bitwise.left_shift(255, 8 - tf.cast(bits, tf.int32)) % 256
    return tf.bitwise.bitwise_and(image, tf.cast(mask, tf.uint8))


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Invert the levels from a threshold on, 0 (all) to 256 (none), as `PIL.ImageOps.solarize`."""
    threshold = tf.cast(threshold, tf.int32)
    bright = tf.cast(image >= tf.cast(tf.minimum(threshold, 255), tf.uint8), tf.uint8)
    mask = tf.cast(tf.where(threshold < 256, 255, 0), tf.uint8)
    return tf.bitwise.bitwise_xor(image, bright * mask)  # tf.where on uint8 takes eight times as long


def solarize_add(image: tf.Tensor, addend: tf.Tensor) -> tf.Tensor:
    """Add a whole number from 0 to 128 to the levels below 128, as timm's `solarize_add`."""
    return image + tf.cast(image < 128, tf.uint8) * tf.cast(addend, tf.uint8)


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Move each pixel away from its gray, as `PIL.ImageEnhance.Color`: factor 0 is gray, 1 as it was."""
    values = tf.cast(image, tf.float32)
    return _blend(tf.reshape(_luma(values, 3), tf.shape(image)), values, factor)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Move each level away from the mean gray, which is factor 0, as `PIL.ImageEnhance.Contrast`."""
    height, width = _size(image)
    values = tf.cast(image, tf.float32)
    # A row's sum is exact in float32, the sum of all rows is not.
    row_sums = tf.reduce_sum(tf.reshape(_luma(values, 1), [height, width]), 1)
    total = tf.reduce_sum(tf.cast(row_sums, tf.float64))
    mean = tf.floor(total / tf.cast(height * width, tf.float64) + 0.5)
    return _blend(tf.cast(mean, tf.float32), values, factor)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Multiply every level, as `PIL.ImageEnhance.Brightness`."""
    return _blend(0.0, tf.cast(image, tf.float32), factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Move each level away from a smoothed image, which is factor 0, as `PIL.ImageEnhance.Sharpness`.

    The smoothing is 3 x 3 with 5/13 in the centre and 1/13 around it. The outermost pixels stay as they are.
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


def shear_x(image: tf.Tensor, factor: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Shear along the rows, as `Image.transform` does: (x, y) of the result is (x + factor * y, y)."""
    offset = tf.cast(factor, tf.float64) * _centres(_size(image)[0])[:, None]
    return _move_rows(image, offset, interpolation, fill)


def shear_y(image: tf.Tensor, factor: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Shear along the columns: `shear_x` with rows and columns exchanged."""
    return _transpose(shear_x(_transpose(image), factor, interpolation, fill))


def translate_x(image: tf.Tensor, pixels: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Move along the rows, as `Image.transform` does: (x, y) of the result is (x + pixels, y)."""
    offset = tf.fill([_size(image)[0], 1], tf.cast(pixels, tf.float64))
    return _move_rows(image, offset, interpolation, fill)


def translate_y(image: tf.Tensor, pixels: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Move along the columns: `translate_x` with rows and columns exchanged."""
    return _transpose(translate_x(_transpose(image), pixels, interpolation, fill))


def rotate(image: tf.Tensor, angle: tf.Tensor, interpolation: str, fill: Sequence[int]) -> tf.Tensor:
    """Rotate around the centre by degrees, counter-clockwise, in the same size, as `Image.rotate`."""
    height, width = _size(image)
    radians = -tf.math.floormod(tf.cast(angle, tf.float64), 360.0) * (math.pi / 180)
    cosine, sine = _to_15_decimals(tf.cos(radians)), _to_15_decimals(tf.sin(radians))
    centre_x, centre_y = tf.cast(width, tf.float64) / 2, tf.cast(height, tf.float64) / 2
    move_x = (cosine * -centre_x + sine * -centre_y) + centre_x
    move_y = (-sine * -centre_x + cosine * -centre_y) + centre_y
    columns, rows = _centres(width), _centres(height)[:, None]
    x = (cosine * columns + sine * rows) + move_x
    y = (-sine * columns + cosine * rows) + move_y
    return _interpolate(image, x, y, interpolation, fill)


def to_uint8(values: tf.Tensor) -> tf.Tensor:
    """Clip to 0..255 and drop the fraction, as Pillow does."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _size(image: tf.Tensor) -> tuple:
    """Return (height, width), numbers where they are known while tracing and scalars otherwise."""
    dynamic = tf.shape(image)
    return tuple(dynamic[axis] if image.shape[axis] is None else image.shape[axis] for axis in (0, 1))


def _transpose(image: tf.Tensor) -> tf.Tensor:
    return tf.transpose(image, [1, 0, 2])


def _blend(degenerate: tf.Tensor | float, values: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return to_uint8(degenerate + tf.cast(factor, tf.float32) * (values - degenerate))


def _luma(values: tf.Tensor, copies: int) -> tf.Tensor:
    """Gray of float32 (..., 3) as whole numbers in float32 (pixels, copies)."""
    weights = tf.constant([[weight] * copies for weight in _LUMA])
    return tf.floor(tf.matmul(tf.reshape(values, [-1, 3]), weights) + 0.5)


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
    most = tf.cast(width, tf.float64)
    steps = tf.cast(tf.clip_by_value(shift[:, 0], -most, most), tf.int32)
    starts = (tf.range(height) + 1) * (width + 4) + 1 + steps
    # A row is one copy as a substring; tf.gather would copy pixel by pixel. The levels are the last bytes
    # of a serialized tensor, so positions count from its end.
    content = tf.io.serialize_tensor(tall)
    starts = 3 * (starts - (height + 2) * (width + 4))
    rows = tf.strings.substr(content, starts, tf.fill([height], 3 * (width + 3)))
    rows = tf.cast(tf.io.decode_raw(rows, tf.uint8), tf.float32)
    levels = [rows[:, 3 * tap : 3 * (tap + width)] for tap in range(4)]
    values = to_uint8(_along_x(levels, part, interpolation))

    color = tf.tile(tf.constant(fill, tf.uint8), [width])
    values = (values - color) * tf.cast(inside, tf.uint8) + color  # wraps, and unwraps
    return tf.reshape(values, [height, width, 3])


def _interpolate(
    image: tf.Tensor, x: tf.Tensor, y: tf.Tensor, interpolation: str, fill: Sequence[int]
) -> tf.Tensor:
    """Bilinear or bicubic values of the image at source coordinates x, y, float64 (H, W).

    A gather costs the same for one pixel as for four, so the four neighbours in a row are gathered at once:
    the image is laid out as groups of four pixels, four times, shifted by 0 to 3 pixels.
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
    return tf.reshape(tf.transpose(to_uint8(values)), [height, width, 3])


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
    return [first, second - before, 2.0 * (before - first) + second - after, first - before - second + after]


def _polynomial(coefficients: list[tf.Tensor], part: tf.Tensor) -> tf.Tensor:
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = coefficient + part * value
    return value
