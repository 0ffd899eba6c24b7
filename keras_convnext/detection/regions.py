"""Regions of feature maps, and the choice of boxes: RoIAlign, non-maximum suppression, proposals, detections.

All counts are constants, so that a program compiles once: lists of boxes are padded, and what is padding has
a score below 0. Reference: mmdetection 3.3.0, mmdet/models/ (dense_heads/rpn_head.py, roi_heads/,
layers/bbox_nms.py) and mmcv 2.1.0, ops/csrc/pytorch/cpu/roi_align.cpp.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_convnext.detection import boxes as box
from keras_convnext.layers.casting import cast

LARGE, SMALL = 64, 32  # cells of the window along the longer and the shorter side of a box
_CHUNK = 128  # boxes of an image that are cut at a time
_ROUNDS = 16  # of suppression where a program has no loop
_FINEST = 56  # pixels: boxes of twice that side are cut from the second map, and so on


def roi_align(maps, boxes, size: int, samples: int = 0, strides=box.STRIDES[:4]):
    """Cuts each box out of the map of its scale: (N, R, 4) boxes to (N, R, size, size, C).

    A box with sides w and h in pixels is cut from the map number floor(log2(sqrt(w h) / 56)), within those
    that there are. It is divided into size x size bins; each is the mean of values at points in it, at their
    exact places, bilinearly between the centres of cells (`aligned=True`). A point further than one cell
    outside the map counts as 0.

    As the points form a grid, the mean is `wy @ window @ wx.T`, where a window of `LARGE` x `SMALL` cells,
    the long side along that of the box, is taken out of the map. On its map a box has the area of at most
    28 x 28 cells, so nearly all fit; one longer than 62 cells is cut from a coarser map instead.
    Reference: He et al. 2017 (arXiv:1703.06870), section 3; Lin et al. 2017 (arXiv:1612.03144), equation 1.

    Args:
        maps: the finest first, (N, H, W, C).
        size: int, bins of each side.
        samples: int, points of a bin along each side; 0 for as many as it has cells, rounded up.
    """
    pieces = [
        _cut(maps, boxes[:, first : first + _CHUNK], size, samples, strides)
        for first in range(0, boxes.shape[1], _CHUNK)
    ]
    return pieces[0] if len(pieces) == 1 else ops.concatenate(pieces, axis=1)


def _cut(maps, boxes, size, samples, strides):
    channels, count = maps[0].shape[-1], boxes.shape[1]
    sides = [ops.shape(each)[1:3] for each in maps]
    areas = [height * width for height, width in sides]
    flat = [ops.reshape(each, (-1, area, channels)) for each, area in zip(maps, areas, strict=True)]
    flat = ops.concatenate(flat, axis=1)
    widths, heights = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    is_wide = widths >= heights
    short, long = ops.minimum(widths, heights), ops.maximum(widths, heights)
    pixels = ops.sqrt(ops.maximum(widths * heights, 0.0))
    level = 0  # comparisons, where a logarithm would be rounded
    for number, stride in enumerate(strides[:-1]):
        fits = (long <= (LARGE - 2) * stride) & (short <= (SMALL - 2) * stride)
        is_coarser = (pixels >= _FINEST * (2.0 ** (number + 1) - 1e-6)) | ops.logical_not(fits)
        level = level + ops.cast(is_coarser, "int32")
    chosen = ops.one_hot(level, len(maps), dtype="float32")  # (N, R, maps)

    def of_level(values):
        if all(isinstance(value, int | float) for value in values):
            table = ops.convert_to_tensor(np.asarray(values, "float32"))
        else:
            table = ops.stack([ops.cast(value, "float32") for value in values])
        return ops.sum(chosen * table, axis=-1)

    offset = of_level([0, *(sum(areas[:number]) for number in range(1, len(maps)))])
    scale = of_level([1 / stride for stride in strides])
    columns, rows = of_level([width for _, width in sides]), of_level([height for height, _ in sides])
    cells = boxes * scale[..., None] - 0.5
    across = cells[..., 0], cells[..., 2] - cells[..., 0], columns  # start, length, cells of the map
    down = cells[..., 1], cells[..., 3] - cells[..., 1], rows
    ones = ops.ones_like(columns)
    axes = [
        [ops.where(is_wide, a, b) for a, b in zip((*first, step), (*second, other), strict=True)]
        for first, step, second, other in ((across, ones, down, columns), (down, columns, across, ones))
    ]
    (*long_axis, long_step), (*short_axis, short_step) = axes
    weights, place = _weights(long_axis, LARGE, size, samples)
    others, other_place = _weights(short_axis, SMALL, size, samples)
    places = place[..., :, None] * long_step[..., None, None]
    places = places + other_place[..., None, :] * short_step[..., None, None]
    places = ops.cast(places + offset[..., None, None], "int32")  # float32 is exact below 2**24 cells
    window = _taken(flat, ops.reshape(places, (-1, count * LARGE * SMALL)))
    window = ops.reshape(window, (-1, count, LARGE, SMALL, channels))
    dtype = keras.backend.standardize_dtype(window.dtype)
    found = ops.einsum("nrpl,nrlsc->nrpsc", cast(weights, dtype), window)
    found = ops.einsum("nrqs,nrpsc->nrpqc", cast(others, dtype), found)  # rows along the long side
    turned = ops.transpose(found, (0, 1, 3, 2, 4))
    return ops.where(is_wide[..., None, None, None], turned, found)


def _weights(axis, window: int, size: int, samples: int):
    """Weight of each cell of a window in each bin, (N, R, size, window), and the cells, (N, R, window).

    `axis`: where boxes start, how long they are and how long the map is, all (N, R) and in cells.
    """
    start, length, cells = axis
    most = samples or math.ceil(window / size)
    step = length / size
    count = ops.clip(ops.ceil(step), 0.0, most) if samples == 0 else ops.full_like(step, float(samples))
    start, step, count, cells = (each[:, :, None, None] for each in (start, step, count, cells))
    first = ops.clip(ops.floor(start), 0.0, ops.maximum(cells - window, 0.0))
    bins = ops.convert_to_tensor(np.arange(size, dtype="float32")[:, None])
    points = ops.convert_to_tensor(np.arange(most, dtype="float32"))
    divisor = ops.maximum(count, 1.0)
    at = start + bins * step + (points + 0.5) * step / divisor  # (N, R, size, most)
    counts = (points < count) & (at >= -1.0) & (at <= cells)
    share = ops.cast(counts, "float32") / divisor
    at = ops.clip(at, 0.0, cells - 1) - first
    place = np.arange(window, dtype="float32")
    weights = ops.maximum(1.0 - ops.abs(at[..., None] - ops.convert_to_tensor(place)), 0.0)
    place = ops.minimum(first[:, :, 0] + ops.convert_to_tensor(place), cells[:, :, 0] - 1)
    return ops.sum(weights * share[..., None], axis=3), place


def _taken(flat, places):
    """Rows (N, P, C) of (N, cells, C) at places (N, P), each of its own image."""
    batch, cells, channels = ops.shape(flat)[0], ops.shape(flat)[1], flat.shape[-1]
    first = ops.reshape(ops.arange(batch, dtype="int32") * cells, (-1, 1))
    return ops.take(ops.reshape(flat, (-1, channels)), places + first, axis=0)


def suppress(boxes, is_candidate, threshold: float, groups=None):
    """Greedy non-maximum suppression: which boxes are kept, bool (N, K).

    The best first, a box is dropped where its IoU with one that is kept is above the threshold, and both are
    of one group. Computed as a fixed point: keep what no kept box in front suppresses, until nothing changes;
    that is right for the first box at once, and for one more in each round at least, in practice in 4 to 7
    rounds for all. A program without loops, as `torch.export` makes, has 16.
    Reference: Zheng et al. 2020 (arXiv:2005.03572), section 4.2, Cluster-NMS.

    Args:
        boxes: (N, K, 4), in the order of falling scores.
        is_candidate: bool (N, K); others neither are kept nor suppress.
        threshold: float, IoU in 0..1.
        groups: int (N, K), as classes; None for one group.
    """
    count = boxes.shape[1]
    is_later = ops.convert_to_tensor(np.triu(np.ones((count, count), bool), 1))
    suppresses = (box.iou(boxes, boxes) > threshold) & is_later  # (N, K, K)
    if groups is not None:
        suppresses = suppresses & (groups[:, :, None] == groups[:, None, :])
    suppresses = ops.cast(suppresses, "float32")

    def after(kept):
        hits = ops.matmul(ops.cast(kept, "float32")[:, None, :], suppresses)[:, 0]
        return is_candidate & (hits < 0.5)

    if _is_without_loops():
        kept = is_candidate
        for _ in range(_ROUNDS):
            kept = after(kept)
        return kept
    _, kept = ops.while_loop(
        lambda before, now: ops.any(ops.logical_xor(before, now)),
        lambda before, now: (now, after(now)),
        (is_candidate, after(is_candidate)),
    )
    return kept


def best(scores, count: int):
    """The largest scores (N, count) of (N, M), and where they are; of equal ones the first is first.

    Where there are fewer than `count`, as may be where M is not known, the rest is padding of score -1.
    """
    total = ops.shape(scores)[1]
    is_short = not isinstance(total, int) or total < count
    if is_short:
        scores = ops.concatenate([scores, ops.zeros_like(scores[:, :1]) - ops.ones((1, count))], axis=1)
    if keras.backend.backend() == "torch":
        import torch  # whose topk has equal scores in any order

        values, places = torch.sort(scores, dim=-1, descending=True, stable=True)
        values, places = values[:, :count], places[:, :count].int()
    else:
        values, places = ops.top_k(scores, count)
    return values, ops.minimum(places, total - 1) if is_short else places


def at(values, places):
    """Rows (N, K, C) of (N, M, C) at places (N, K)."""
    return ops.take_along_axis(values, places[..., None], axis=1)


def proposals(logits, deltas, sizes, count: int, before: int = 1000, threshold: float = 0.7):
    """The boxes that may hold something, the best first: (N, count, 4), and their scores (N, count).

    Of each map the `before` best anchors are moved by their deltas, cut at the borders and suppressed where
    they overlap; the best of all maps are proposed. Padding has the score -1.

    Args:
        logits: of each map, (N, H, W, 3).
        deltas: of each map, (N, H, W, 12).
        sizes: (N, 2), height and width of the images in pixels, without padding.
    """
    found, all_scores = [], []
    for each, moves, stride in zip(logits, deltas, box.STRIDES, strict=True):
        height, width = ops.shape(each)[1:3]
        total = height * width * len(box.RATIOS)
        scores = ops.reshape(ops.sigmoid(each), (-1, total))
        moves = ops.reshape(moves, (-1, total, 4))
        anchors = box.anchors(height, width, stride)
        scores, places = best(scores, min(before, total) if isinstance(total, int) else before)
        boxes = box.decode(ops.take(anchors, places, axis=0), at(moves, places), (1.0, 1.0, 1.0, 1.0))
        boxes = box.clip(boxes, sizes)
        is_box = ops.all(boxes[..., 2:] > boxes[..., :2], axis=-1) & (scores >= 0)
        kept = suppress(boxes, is_box, threshold)
        all_scores.append(ops.where(kept, scores, -1.0))
        found.append(boxes)
    scores, boxes = ops.concatenate(all_scores, axis=1), ops.concatenate(found, axis=1)
    scores, places = best(scores, count)
    boxes = at(boxes, places)
    return ops.where((scores >= 0)[..., None], boxes, 0.0), scores


def detections(
    probabilities,
    deltas,
    boxes,
    is_region,
    sizes,
    deviations,
    count=100,
    before=1000,
    least=0.05,
    threshold=0.5,
):
    """What is found: boxes (N, count, 4), scores (N, count), classes int32 (N, count) and their number (N,).

    Of all pairs of a region and a class whose probability is above `least` the `before` best are moved by
    the deltas of that class, cut at the borders, and suppressed where two of one class overlap. Padding has
    zeros for box and score, and the class -1.

    Args:
        probabilities: (N, R, classes), without that of the background.
        deltas: (N, R, classes, 4).
        boxes: (N, R, 4), the regions; bool (N, R) `is_region` says which are no padding.
        sizes: (N, 2), height and width of the images in pixels, without padding.
        deviations: four floats, the unit of the deltas.
    """
    regions, classes = probabilities.shape[1:]
    pairs = ops.where(is_region[..., None], probabilities, 0.0)
    scores, places = best(ops.reshape(pairs, (-1, regions * classes)), min(before, regions * classes))
    labels = places % classes
    moves = at(ops.reshape(deltas, (-1, regions * classes, 4)), places)
    boxes = box.clip(box.decode(at(boxes, places // classes), moves, deviations), sizes)
    kept = suppress(boxes, scores > least, threshold, labels)
    scores, places = best(ops.where(kept, scores, -1.0), count)
    is_found = scores > 0
    labels = ops.take_along_axis(labels, places, axis=1)
    return {
        "boxes": ops.where(is_found[..., None], at(boxes, places), 0.0),
        "scores": ops.where(is_found, scores, 0.0),
        "classes": ops.where(is_found, ops.cast(labels, "int32"), -1),
        "count": ops.sum(ops.cast(is_found, "int32"), axis=1),
    }


def _is_without_loops() -> bool:
    """Whether PyTorch is recording a program, which has no loop of unknown length."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    return torch.compiler.is_compiling()
