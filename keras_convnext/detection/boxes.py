"""Boxes (x0, y0, x1, y1) in pixels, float32: anchors, what heads predict of them, overlaps.

Reference: mmdetection 3.3.0, mmdet/models/task_modules/prior_generators/anchor_generator.py and
coders/delta_xywh_bbox_coder.py; Ren et al. 2015 (arXiv:1506.01497), section 3.1.
"""

import math

import numpy as np
from keras import ops

STRIDES = (4, 8, 16, 32, 64)  # of the maps of the feature pyramid
RATIOS = (0.5, 1.0, 2.0)  # height over width of an anchor
_SCALE = 8  # side of a square anchor over the stride of its map
_MAX_LOG = -math.log(16 / 1000)  # of a side over that of the anchor, in both directions


def anchors(height, width, stride: int):
    """Three anchors around (x * stride, y * stride) for each cell of a map: float32 (height * width * 3, 4).

    Sides are not rounded, and centres are the corners of cells, not their middles. `height` and `width` are
    ints, or tensors of one.
    """
    are_known = isinstance(height, int) and isinstance(width, int)
    library = np if are_known else ops
    ratios = np.sqrt(RATIOS)
    sides = np.stack([1 / ratios, ratios], 1) * (_SCALE * stride)  # (3, 2) width and height
    base = np.concatenate([-sides, sides], 1).astype("float32") / 2
    x, y = (library.arange(side, dtype="float32") * stride for side in (width, height))
    x, y = library.meshgrid(x, y)
    corners = library.stack([x, y, x, y], axis=-1)  # (height, width, 4)
    found = library.reshape(corners[:, :, None, :] + base, (-1, 4))
    return ops.convert_to_tensor(found)


def decode(boxes, deltas, deviations):
    """Boxes (..., 4) moved by what a head predicts, (..., 4) of dx, dy, dw, dh.

    Centres move by dx and dy sides, sides grow by exp of dw and dh, which are cut at a factor of 62.5 either
    way; `deviations` are the four factors that the predictions are in units of.
    """
    deltas = deltas * ops.convert_to_tensor(np.asarray(deviations, "float32"))
    centres = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = centres + sides * deltas[..., :2]
    sides = sides * ops.exp(ops.clip(deltas[..., 2:], -_MAX_LOG, _MAX_LOG))
    return ops.concatenate([centres - sides * 0.5, centres + sides * 0.5], axis=-1)


def clip(boxes, sizes):
    """Boxes (N, R, 4) cut at the borders of their images, `sizes` (N, 2) of height and width in pixels."""
    limits = ops.stack([sizes[:, 1], sizes[:, 0], sizes[:, 1], sizes[:, 0]], axis=-1)
    return ops.minimum(ops.maximum(boxes, 0.0), limits[:, None, :])


def iou(boxes, others):
    """Intersection over union of each of (..., A, 4) with each of (..., B, 4): (..., A, B); 0 for no area."""
    a, b = boxes[..., :, None, :], others[..., None, :, :]
    low, high = ops.maximum(a[..., :2], b[..., :2]), ops.minimum(a[..., 2:], b[..., 2:])
    sides = ops.maximum(high - low, 0.0)
    common = sides[..., 0] * sides[..., 1]
    union = areas(boxes)[..., :, None] + areas(others)[..., None, :] - common
    return common / ops.maximum(union, 1e-9)


def areas(boxes):
    """Pixels of each of (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
