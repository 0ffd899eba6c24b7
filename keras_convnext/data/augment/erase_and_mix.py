"""Random erasing, mixup and CutMix, as timm does them: a plan for many examples, and what carries it out."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_convnext.data.augment.pixels import to_uint8
from keras_convnext.data.augment.policies import Plan, number_below

NUM_ERASE_UNIFORMS = 41


def plan_erase(
    uniforms: tf.Tensor,
    probability: float,
    image_size: tuple[int, int],
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> tf.Tensor:
    """Decide the box that is erased in each of many examples, as timm's RandomErasing.

    A box has an area drawn uniformly, as a fraction of the image's, and a ratio of height to width drawn
    uniformly in its logarithm. Of ten attempts the first that is smaller than the image in both directions
    counts; if none is, there is no box. `uniforms` are float32 or float64 (N, NUM_ERASE_UNIFORMS), in [0, 1):
    whether, then ten times area, ratio, top and left. Returns int32 (N, 4): top, left, height and width in
    pixels, all 0 where nothing is erased.

    Reference: Zhong et al., arXiv 1708.04896; timm 1.0.31, timm/data/random_erasing.py, `_erase`.
    """
    height, width = image_size
    uniforms = tf.cast(uniforms, tf.float64)
    size, ratio, top, left = tf.unstack(tf.reshape(uniforms[:, 1:], [-1, 10, 4]), axis=2)
    size = (area[0] + (area[1] - area[0]) * size) * (height * width)
    low, high = map(math.log, aspect)
    ratio = tf.exp(low + (high - low) * ratio)
    box_height = tf.cast(tf.round(tf.sqrt(size * ratio)), tf.int32)
    box_width = tf.cast(tf.round(tf.sqrt(size / ratio)), tf.int32)
    top, left = number_below(top, height - box_height + 1), number_below(left, width - box_width + 1)
    fits = (box_height < height) & (box_width < width)  # (N, 10)
    first = tf.argmax(tf.cast(fits, tf.int32), 1)
    boxes = tf.gather(tf.stack([top, left, box_height, box_width], 2), first, batch_dims=1)
    erased = tf.reduce_any(fits, 1) & (uniforms[:, 0] < probability)
    return tf.where(erased[:, None], boxes, 0)


def apply_erase(
    image: tf.Tensor, box: tf.Tensor, seed: tf.Tensor, mean: Sequence[float], std: Sequence[float]
) -> tf.Tensor:
    """Fill the box planned for one image with noise, which is a function of `seed`, int (2,), and its size.

    timm erases after it normalises, with N(0, 1) for each pixel and channel (its mode "pixel"). Before
    normalisation that is 255 * (mean + std * N(0, 1)). The image is uint8 (H, W, 3), or float32 in levels 0
    to 255: floats keep noise outside that range, as timm does; uint8 rounds and clips it.
    """
    top, left, height, width = tf.unstack(box)

    def erase() -> tf.Tensor:
        noise = tf.random.stateless_normal([height, width, 3], seed)
        patch = 255.0 * (tf.constant(mean, tf.float32) + tf.constant(std, tf.float32) * noise)
        if image.dtype == tf.uint8:
            patch = to_uint8(tf.round(patch))
        return tf.ensure_shape(_paste(image, patch, top, left), image.shape)

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

    Each group of images shares one decision: whether it is mixed, CutMix with `switch_probability` where both
    are on (an alpha of 0 switches one off), and lambda from Beta(alpha, alpha). CutMix takes a box of the
    fraction 1 - lambda of the area around a uniform centre; lambda is then what the box leaves, cut by the
    border. timm mixes a batch as one group, and on many devices that of each device.

    Returns "lam": float64 (num_groups,), the weight of an image's own label, 1 where nothing is mixed, and
    "box": int32 (num_groups, 4), top, left, height and width in pixels of what CutMix takes from the partner,
    all 0 where images are blended or nothing is mixed.

    Reference: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; timm 1.0.31, timm/data/mixup.py.
    """
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
    """Carry out the mixing planned for one batch, or none; returns images and targets.

    An image's partner is the one at the same place from the end of its group, as in timm. Images are float32
    or uint8 (N, H, W, 3); uint8 is rounded to the nearest level, as timm's `FastCollateMixup` does. Targets
    are float32 (N, num_classes) with rows that sum to 1, of 1 - s + s / num_classes and s / num_classes for
    the label smoothing s. The number of groups must divide N.
    """
    off = label_smoothing / num_classes
    targets = tf.one_hot(labels, num_classes, 1.0 - label_smoothing + off, off, dtype=tf.float32)
    if plan is None:
        return images, targets
    num_groups = plan["lam"].shape[0]
    lam = plan["lam"][:, None, None]
    grouped = tf.reshape(targets, [num_groups, -1, num_classes])
    targets = grouped * tf.cast(lam, tf.float32) + tf.reverse(grouped, [1]) * tf.cast(1.0 - lam, tf.float32)
    groups = zip(tf.split(images, num_groups), tf.unstack(plan["lam"]), tf.unstack(plan["box"]), strict=True)
    mixed = tf.concat([_mix_group(*group) for group in groups], 0)
    return tf.ensure_shape(mixed, images.shape), tf.reshape(targets, [-1, num_classes])


def _mix_group(images: tf.Tensor, lam: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    def blend() -> tf.Tensor:
        values = tf.cast(images, tf.float32)
        partners = tf.reverse(values, [0])  # ten times as fast as values[::-1]
        values = values * tf.cast(lam, tf.float32) + partners * tf.cast(1.0 - lam, tf.float32)
        return tf.cast(tf.round(values), tf.uint8) if images.dtype == tf.uint8 else values

    def cut() -> tf.Tensor:
        top, left, height, width = tf.unstack(box)
        patch = tf.reverse(images[:, top : top + height, left : left + width], [0])
        return _paste(images, patch, top, left)

    branch = tf.where(box[2] > 0, 2, tf.where(lam < 1.0, 1, 0))
    return tf.switch_case(branch, [lambda: tf.identity(images), blend, cut])


def _paste(images: tf.Tensor, patch: tf.Tensor, top: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
    """Put a patch into images (..., H, W, 3)."""
    bottom, right = top + tf.shape(patch)[-3], left + tf.shape(patch)[-2]
    rows = images[..., top:bottom, :, :]
    rows = tf.concat([rows[..., :left, :], patch, rows[..., right:, :]], -2)
    return tf.concat([images[..., :top, :, :], rows, images[..., bottom:, :, :]], -3)


def _cut(length: int, side: tf.Tensor, centre: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Where a CutMix box begins along one axis, and how long it is within the image."""
    cut = tf.cast(length * side, tf.int32)
    middle = number_below(centre, length)
    start = tf.maximum(middle - cut // 2, 0)
    return start, tf.minimum(middle + (cut + 1) // 2, length) - start
