"""From the bytes of a JPEG to a uint8 square, in TensorFlow graph ops and with Pillow's pixels.

tf.data runs it on all cores without Python: only the part of a JPEG that is used is decoded, and Pillow's
resampling is done as small matrix products. What TensorFlow does not read as Pillow does (CMYK, PNG named
.JPEG, other formats) goes through `preprocess.decode_image`.
"""

import contextlib
from typing import Any

import numpy as np
import PIL
import tensorflow as tf

from keras_convnext.data import preprocess
from keras_convnext.data.preprocessing import Preprocessing

Bounds = tuple[float, float]
Pair = tuple[Any, Any]  # of scalars, vertical and horizontal
RATIO = (3 / 4, 4 / 3)  # smallest and largest width / height of a crop

_SUPPORTS = {"bicubic": 2.0, "bilinear": 1.0}
_ONE = float(1 << 22)  # Pillow's coefficients are integers of 22 bits after the point (Resample.c)
_TILE = 8  # outputs that share a window of inputs; 8 and 16 were fastest, one window for all 5 times slower
_MARGIN = 2  # columns; chroma is interpolated across the edge of what is decoded, which reaches 1 column
# Pillow 13.0.0 began to resize rows first where that is less work (see `_Axes`).
_PILLOW_CHOOSES_ORDER = int(PIL.__version__.split(".")[0]) >= 13
_LARGE_WINDOWS = 1 << 24  # values of all tiles' windows; more are made tile by tile, which takes less memory


def eval_image(content: bytes, preprocessing: Preprocessing) -> np.ndarray | None:
    """Prepare one encoded image as `center_crop`; None where that does not give Pillow's pixels."""
    with contextlib.suppress(tf.errors.InvalidArgumentError):
        if covers(preprocessing):
            return center_crop(tf.constant(content), preprocessing).numpy()
    return None


def covers(preprocessing: Preprocessing) -> bool:
    """Tell whether the resized image is nowhere smaller than the crop, else `center_crop` does not pad it."""
    sides = zip(preprocessing.scale_size, preprocessing.size, strict=True)
    return all(resized >= side for resized, side in sides)


def plain_jpeg_size(content: Any) -> Pair:
    """Read (height, width), int32 scalars, from the header of an encoded image, a scalar string.

    When run, it and all that decodes here raise tf.errors.InvalidArgumentError where TensorFlow does not
    decode to the pixels that Pillow does: if the image is not a JPEG in grayscale or three colours of at most
    `preprocess.LARGE` pixels, or is damaged.
    """
    is_jpeg = tf.strings.substr(content, 0, 2) == b"\xff\xd8"
    # Asked first, because libjpeg complains on stderr about each file that is of another format.
    with tf.control_dependencies([tf.debugging.Assert(is_jpeg, ["not a JPEG"])]):
        content = tf.identity(content)
    shape = tf.io.extract_jpeg_shape(content)
    pixels = tf.cast(shape[0], tf.int64) * tf.cast(shape[1], tf.int64)
    is_plain = (shape[2] != 4) & (pixels <= preprocess.LARGE)
    with tf.control_dependencies([tf.debugging.Assert(is_plain, [shape])]):
        return tf.identity(shape[0]), tf.identity(shape[1])


def center_crop(content: Any, preprocessing: Preprocessing) -> Any:
    """Decode, resize and crop a JPEG for evaluation: `preprocess.preprocess_image`, bit for bit.

    Returns uint8 (height, width, 3), RGB.
    """
    height, width = plain_jpeg_size(content)
    resized = _resized_size(height, width, preprocessing)
    image_size = preprocessing.size
    # tf.round takes a half to the even neighbour, as Python and torchvision do.
    first = tuple(
        tf.cast(tf.round(_float(whole - size) / 2), tf.int32)
        for whole, size in zip(resized, image_size, strict=True)
    )
    axes = _Axes((height, width), resized, first, image_size, _SUPPORTS[preprocessing.interpolation])
    return _decode_and_resize(content, (0, 0), (height, width), axes)


def random_resized_crop(
    content: Any, crop: Any, flip: Any, *, image_size: Pair, interpolation: str, ratio: Bounds = RATIO
) -> Any:
    """Decode a random box of a JPEG, resize and flip it, as Pillow's methods in this order.

    Training takes float32 for the sums, which is faster. On 100 ImageNet samples 5 values in 100,000 differ
    from Pillow's, all by one level; where the scale is a simple fraction, ties make it a few in 1,000.

    `crop` is a row of `plan_crop`, `flip` a scalar bool. Returns uint8 (height, width, 3), RGB.
    """
    size = plain_jpeg_size(content)
    top, left, height, width = crop_box(size, crop, ratio)
    support = _SUPPORTS[interpolation]
    axes = _Axes((height, width), image_size, (0, 0), image_size, support, flip, tf.float32)
    return _decode_and_resize(content, (top, left), size, axes)


def plan_crop(uniforms: Any, scale: Bounds = (0.08, 1.0), ratio: Bounds = RATIO) -> Any:
    """Draw the boxes of random resized crops, as far as that goes without the sizes of the images.

    `scale` bounds the area of a box as a fraction of the image's, `ratio` its width / height. From
    `uniforms`, float64 (N, 22), in [0, 1), to float64 (N, 22): heights and widths of ten boxes, in units of
    the square root of the image's area, and where between the first and the last place the box lies,
    vertically and horizontally.

    Reference: Szegedy et al., "Going deeper with convolutions" (2014), section 6; timm 1.0.31,
    RandomResizedCropAndInterpolation: ten attempts at an area and the logarithm of an aspect ratio.
    """
    area = scale[0] + uniforms[:, :10] * (scale[1] - scale[0])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = tf.exp(low + uniforms[:, 10:20] * (high - low))
    return tf.concat([tf.sqrt(area / aspect), tf.sqrt(area * aspect), uniforms[:, 20:]], axis=1)


def crop_box(size: Pair, crop: Any, ratio: Bounds = RATIO) -> tuple[Any, Any, Any, Any]:
    """Choose the box of a random resized crop: the first of ten that fits, or else a central one.

    From (height, width) of the image and a row of `plan_crop` to (top, left, height, width), int32 scalars,
    in pixels. `ratio` bounds the width / height of the central box.
    """
    extent = _float(tf.stack(size))  # (2,): height, width
    boxes = tf.round(tf.reshape(crop[:20], (2, 10)) * tf.sqrt(tf.reduce_prod(extent)))
    fits = tf.reduce_all(boxes <= extent[:, None], axis=0)
    widest, tallest = extent[0] * ratio[1], extent[1] / ratio[0]
    central = tf.minimum(extent, tf.round(tf.stack([tallest, widest])))
    any_fits = tf.reduce_any(fits)
    box = tf.where(any_fits, boxes[:, tf.argmax(fits)], central)
    box = tf.maximum(box, 1.0)
    # From 0 to the last place inclusive; the central box lies in the middle, rounded down.
    places = tf.where(any_fits, crop[20:] * (extent - box + 1.0), (extent - box) / 2.0)
    top, left = tf.unstack(tf.cast(places, tf.int32))
    height, width = tf.unstack(tf.cast(box, tf.int32))
    return top, left, height, width


def resize(
    image: Any, flip: Any, *, image_size: tuple[int, int], interpolation: str, dtype: Any = tf.float32
) -> Any:
    """Resize and flip an image as Pillow's methods in this order, up to roundings (see the crop above).

    A pass along each axis; every pass sums products, adds a half and truncates to uint8. With `dtype` float64
    the coefficients have Pillow's 22 binary digits, the sums are exact, and so is the result.
    """
    in_size = tf.unstack(tf.shape(image)[:2])
    axes = _Axes(in_size, image_size, (0, 0), image_size, _SUPPORTS[interpolation], flip, dtype)
    return _resize(image, axes, 0, 0)


class _Axes:
    """How the outputs of a resized image are made: on both axes, `count` of them from `first` on.

    The outputs are taken in tiles of neighbours; all of a tile are products with one window of inputs. `flip`
    reverses the columns, at no cost. Vertical and horizontal axis are worked out at once, at the cost of one.
    Reference: Pillow 13, src/libImaging/Resample.c, precompute_coeffs and normalize_coeffs_8bpc.

    The inputs from `begin` to `end`, int32 (2,), are needed. `inputs`, int32 (2, tiles, window), are the
    windows, `weights`, (2, tiles, _TILE, window), those of `dtype`, in float64 rounded to Pillow's 22 digits;
    the scalar bool `rows_first` is the order of the passes.
    """

    def __init__(
        self,
        in_size: Pair,
        out_size: Pair,
        first: Pair,
        count: tuple[int, int],
        support: float,
        flip: Any = False,
        dtype: Any = tf.float64,
    ) -> None:
        self.count = count
        last_input = tf.stack(in_size)[:, None, None]
        scale = _float(tf.stack(in_size)) / _float(tf.stack(out_size))
        filter_scale = tf.maximum(scale, 1.0)[:, None, None]
        # The last tiles may be filled up with repetitions of the last output.
        tiles = -(-max(count) // _TILE)
        rows, columns = (np.minimum(np.arange(tiles * _TILE, dtype="float64"), size - 1) for size in count)
        outputs = tf.stack([rows, tf.where(flip, count[1] - 1 - columns, columns)])
        centers = (_float(tf.stack(first))[:, None] + outputs + 0.5) * scale[:, None]
        centers = tf.reshape(centers, (2, tiles, _TILE))
        reach = filter_scale * support
        begin = tf.maximum(tf.cast(centers - reach + 0.5, tf.int32), 0)
        end = tf.minimum(tf.cast(centers + reach + 0.5, tf.int32), last_input)
        tile_begin = tf.reduce_min(begin, axis=2)
        window = tf.reduce_max(tf.reduce_max(end, axis=2) - tile_begin)
        inputs = tile_begin[:, :, None] + tf.range(window)
        self.begin, self.end = tf.reduce_min(tile_begin, axis=1), tf.reduce_max(end, axis=(1, 2))
        self.inputs = tf.minimum(inputs, self.end[:, None, None] - 1)  # beyond the end the weights are 0

        inputs = inputs[:, :, None, :]
        begin, end, centers = begin[..., None], end[..., None], centers[..., None]
        distances = (_float(inputs) - centers + 0.5) * (1.0 / filter_scale)[..., None]
        weights = _filter(tf.cast(distances, dtype), support)
        weights *= tf.cast((inputs >= begin) & (inputs < end), dtype)
        weights /= tf.reduce_sum(weights, axis=-1, keepdims=True)
        if dtype == tf.float64:
            # To 22 digits, a half away from zero, as a cast truncates; the division is exact.
            weights = _float(tf.cast(weights * _ONE + tf.sign(weights) * 0.5, tf.int32)) / _ONE
        self.weights = weights

        # Pillow 13 resizes rows before columns where this holds, as seen on 1,494 random pairs of sizes; up
        # to Pillow 12 columns were always first. It matters because the first pass rounds to uint8.
        fewer = tf.stack(in_size) - tf.stack(out_size)
        self.rows_first = (fewer[0] > 0) & (fewer[0] > 2 * fewer[1]) & _PILLOW_CHOOSES_ORDER


def _float(x: Any) -> Any:
    return tf.cast(x, tf.float64)


def _filter(x: Any, support: float) -> Any:
    x = tf.abs(x)
    if support == 1.0:
        return tf.maximum(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tf.where(x < 1.0, near, tf.where(x < 2.0, far, 0.0))


def _resized_size(height: Any, width: Any, preprocessing: Preprocessing) -> Pair:
    """`preprocess.resized_size` in a graph."""
    scale_size = preprocessing.scale_size
    if preprocessing.crop_mode == "squash":
        return scale_size
    if scale_size[0] != scale_size[1]:
        ratio = tf.minimum(_float(height) / scale_size[0], _float(width) / scale_size[1])
        return tuple(tf.cast(tf.round(_float(size) / ratio), tf.int32) for size in (height, width))
    short = scale_size[0]
    shorter = tf.minimum(height, width)
    # The shorter side becomes exactly `short`: short * height / height has no remainder.
    return tuple(tf.cast(_float(short * size) / _float(shorter), tf.int32) for size in (height, width))


def _decode_and_resize(content: Any, origin: Pair, image_size: Pair, axes: _Axes) -> Any:
    """Decode what the outputs are made of, and make them; `origin` is where the axes begin in the image."""
    top, left = (origin[axis] + axes.begin[axis] for axis in (0, 1))
    bottom, right = (origin[axis] + axes.end[axis] for axis in (0, 1))
    left, right = tf.maximum(left - _MARGIN, 0), tf.minimum(right + _MARGIN, image_size[1])
    window = tf.stack([top, left, bottom - top, right - left])
    # INTEGER_ACCURATE is the transform that Pillow uses; TensorFlow's default is off by up to 18 levels.
    pixels = tf.io.decode_and_crop_jpeg(content, window, channels=3, dct_method="INTEGER_ACCURATE")
    return _resize(pixels, axes, axes.begin[0], left - origin[1])


def _resize(pixels: Any, axes: _Axes, first_row: Any, first_column: Any) -> Any:
    """Resize pixels whose first row and column have the given places on the axes."""

    def resize_rows(x: Any, axis: int, first: Any) -> Any:  # (h, n) -> (count, n)
        def products(tiles: tuple[Any, Any]) -> Any:
            inputs, weights = tiles
            return tf.matmul(weights, tf.cast(tf.gather(x, inputs - first), weights.dtype))

        tiles, dtype = (axes.inputs[axis], axes.weights[axis]), axes.weights.dtype
        x = tf.cond(
            tf.size(tiles[0]) * tf.shape(x)[1] > _LARGE_WINDOWS,
            lambda: tf.map_fn(products, tiles, fn_output_signature=dtype, parallel_iterations=1),
            lambda: products(tiles),
        )  # (tiles, _TILE, n)
        bounds = {"clip_value_min": tf.constant(0, x.dtype), "clip_value_max": tf.constant(255, x.dtype)}
        x = tf.raw_ops.ClipByValue(t=x + 0.5, **bounds)
        return tf.reshape(tf.cast(x, tf.uint8), (-1, tf.shape(x)[2]))[: axes.count[axis]]

    # Columns become rows by transposing (h, w * 3), which is faster than moving colours as wholes:
    # (w * 3, h) is (w, 3 * h) in memory, and its resized rows turn back into (h, count * 3).
    def resize_columns(x: Any) -> Any:  # (h, w * 3) -> (h, count * 3)
        height = tf.shape(x)[0]
        x = resize_rows(tf.reshape(tf.transpose(x), (-1, 3 * height)), 1, first_column)
        return tf.transpose(tf.reshape(x, (-1, height)))

    x = tf.reshape(pixels, (-1, 3 * tf.shape(pixels)[1]))
    x = tf.cond(
        axes.rows_first,
        lambda: resize_columns(resize_rows(x, 0, first_row)),
        lambda: resize_rows(resize_columns(x), 0, first_row),
    )
    return tf.reshape(x, (*axes.count, 3))
