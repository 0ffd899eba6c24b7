"""Boxes and regions: RoIAlign, suppression, anchors, coder and choice against forms of their own."""

import detectors
import keras
import numpy as np
import pytest
import torch
from keras import ops

from keras_convnext.detection import boxes as box
from keras_convnext.detection import regions

SIZE = (256, 320)  # of images; maps of strides 4 to 32
IS_JAX = keras.backend.backend() == "jax"
# XLA divides by way of a reciprocal: a place in a map is off by its last digit, and the maps are noise.
TOLERANCE = 5e-5 if IS_JAX else 1e-5


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal((2, SIZE[0] // stride, SIZE[1] // stride, 8)).astype("float32")
        for stride in box.STRIDES[:4]
    ]


@pytest.fixture(scope="module")
def boxes():
    """(2, 203, 4): of all sizes and forms, some beyond the image, some without area."""
    rng = np.random.default_rng(1)
    low = rng.uniform(-20, 300, (2, 203, 2))
    high = np.minimum(low + np.exp(rng.uniform(0, 5.5, (2, 203, 2))), [340, 280])
    found = np.concatenate([np.minimum(low, high), high], -1).astype("float32")
    found[:, :4] = [[5, 5, 5, 5], [10, 10, 10, 20], [300, 200, 300.1, 200.1], [3, 0, 9, 240]]
    return found


def run(function, *arguments, **more):
    """What a function of tensors gives for arrays, as arrays."""
    arguments = keras.tree.map_structure(
        lambda each: ops.convert_to_tensor(each) if isinstance(each, np.ndarray) else each, arguments
    )
    return keras.tree.map_structure(ops.convert_to_numpy, function(*arguments, **more))


def expected_regions(maps, boxes, size, samples):
    maps = [torch.from_numpy(each.transpose(0, 3, 1, 2)) for each in maps]
    found = [
        detectors.regions([each[n : n + 1] for each in maps], torch.from_numpy(own), size, samples)
        for n, own in enumerate(boxes)
    ]
    return torch.stack(found).permute(0, 1, 3, 4, 2).numpy()


def error_of_regions(maps, boxes, size, samples):
    received = run(regions.roi_align, maps, boxes, size, samples)
    return np.abs(received - expected_regions(maps, boxes, size, samples)).max()


# JAX compiles each operation for each shape: one case in its first tier.
CASES = [
    pytest.param(size, samples, marks=[pytest.mark.slow] * (IS_JAX and (size, samples) != (7, 2)))
    for size in (7, 14)
    for samples in (0, 2)
]


@pytest.mark.parametrize(("size", "samples"), CASES)
def test_regions_equal_onnxruntime(size, samples, maps, boxes):
    assert error_of_regions(maps, boxes, size, samples) <= TOLERANCE


@pytest.mark.one_backend
def test_control_regions_without_the_half_pixel_fail(maps, boxes):
    assert error_of_regions(maps, boxes, 7, 0) <= 1e-5
    moved = boxes + np.float32(2)  # half a cell of the finest map: what aligned=False does there
    received = run(regions.roi_align, maps, moved, 7)
    assert np.abs(received - expected_regions(maps, boxes, 7, 0)).max() > 0.1


def gradient(function, values):
    """That of a scalar function of one array, by the backend in use."""
    backend = keras.backend.backend()
    if backend == "torch":
        x = torch.from_numpy(values.copy()).requires_grad_()
        function(x).backward()
        return x.grad.numpy()
    if backend == "jax":
        import jax

        return np.asarray(jax.grad(function)(values))
    import tensorflow as tf

    x = tf.convert_to_tensor(values)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return tape.gradient(y, x).numpy()


@pytest.mark.parametrize(("size", "samples"), CASES)
def test_gradient_of_regions_is_that_of_the_linear_form(size, samples, maps):
    """RoIAlign is linear in the map: its gradient is what onnxruntime gives for maps of one cell each."""
    some = np.array([[[9, 20, 140, 160], [50, 61, 180, 200], [-9, 3, 99, 203]]], "float32")
    weights = np.random.default_rng(2).standard_normal((1, 3, size, size, 8)).astype("float32")
    level = 1
    first = [each[:1] for each in maps]

    def total(map_):
        those = [ops.convert_to_tensor(each) for each in first]
        those[level] = map_
        found = regions.roi_align(those, ops.convert_to_tensor(some), size, samples)
        return ops.sum(found * ops.convert_to_tensor(weights))

    received = gradient(total, first[level])
    direction = np.random.default_rng(3).standard_normal(received.shape).astype("float32")
    zeros = [np.zeros_like(each) for each in first]
    zeros[level] = direction
    expected = (expected_regions(zeros, some, size, samples) * weights).sum(dtype="float64")
    reached = np.abs(received).sum(-1) > 0
    assert 0 < reached.mean() < 1
    assert (received * direction).sum(dtype="float64") == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.one_backend
def test_a_box_longer_than_its_window_is_cut_from_the_next_map(maps):
    long = np.array([[[3, 0, 9, 255]]] * 2, "float32")  # 64 cells of the finest map
    received = run(regions.roi_align, maps, long, 7)
    map_ = torch.from_numpy(maps[1].transpose(0, 3, 1, 2))
    own = [detectors.roi_align(map_[n : n + 1], torch.from_numpy(long[n]), 7, 1 / 8) for n in (0, 1)]
    expected = torch.stack(own).permute(0, 1, 3, 4, 2).numpy()
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5)


@pytest.mark.once
def test_windows_hold_nearly_all_boxes_of_the_published_image_size():
    """With sides up to 62 and 30 cells on its map, no box of COCO's forms is moved to a coarser one."""
    for stride, least in zip(box.STRIDES[:4], (0, 112, 224, 448), strict=True):
        area = (2 * max(least, 56)) ** 2
        for ratio in (1, 2, 4):  # sides of the largest box of that map
            long, short = np.sqrt(area * ratio), np.sqrt(area / ratio)
            assert long <= (regions.LARGE - 2) * stride and short <= (regions.SMALL - 2) * stride


# Suppression.


def clustered(count, seed, ties=False):
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 200, (30, 2))[rng.integers(0, 30, count)] + rng.normal(0, 6, (count, 2))
    sides = np.exp(rng.normal(3.4, 0.3, (count, 2)))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], 1).astype("float32")
    return np.repeat(boxes[: count // 2], 2, 0) if ties else boxes


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_suppression_is_greedy(threshold):
    sets = [clustered(300, 0), clustered(300, 1), clustered(300, 2, ties=True)]
    kept = run(regions.suppress, np.stack(sets), np.ones((3, 300), bool), threshold)
    for own, received in zip(sets, kept, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(received), detectors.greedy(own, threshold))
    assert 10 < received.sum() < 150


@pytest.mark.one_backend
def test_suppression_keeps_groups_apart_and_needs_candidates():
    boxes = clustered(200, 3)[None]
    groups = np.random.default_rng(4).integers(0, 3, (1, 200)).astype("int32")
    kept = run(regions.suppress, boxes, np.ones((1, 200), bool), 0.5, groups)[0]
    for group in range(3):
        own = np.flatnonzero(groups[0] == group)
        np.testing.assert_array_equal(own[kept[own]], own[detectors.greedy(boxes[0, own], 0.5)])
    alive = np.arange(200)[None] % 2 == 0
    kept = run(regions.suppress, boxes, alive, 0.5)[0]
    np.testing.assert_array_equal(np.flatnonzero(kept), 2 * detectors.greedy(boxes[0, ::2], 0.5))
    assert not run(regions.suppress, boxes, np.zeros((1, 200), bool), 0.5).any()


@pytest.mark.one_backend
def test_sixteen_rounds_without_a_loop_give_the_same(monkeypatch):
    boxes = np.stack([clustered(500, 5), clustered(500, 6)])
    expected = run(regions.suppress, boxes, np.ones((2, 500), bool), 0.6)
    monkeypatch.setattr(regions, "_is_without_loops", lambda: True)
    received = run(regions.suppress, boxes, np.ones((2, 500), bool), 0.6)
    np.testing.assert_array_equal(received, expected)
    monkeypatch.setattr(regions, "_ROUNDS", 1)  # control: one round is not enough
    assert (run(regions.suppress, boxes, np.ones((2, 500), bool), 0.6) != expected).any()


def test_best_of_equal_scores_is_the_first_and_the_rest_is_padding():
    scores = np.array([[0.5, 0.9, 0.5, 0.9, 0.1]], "float32")
    values, places = run(regions.best, scores, 4)
    np.testing.assert_array_equal(places, [[1, 3, 0, 2]])
    values, places = run(regions.best, scores, 7)
    np.testing.assert_array_equal(values[0, 5:], [-1, -1])
    np.testing.assert_array_equal(places[0, :5], [1, 3, 0, 2, 4])
    assert places.max() <= 4


# Anchors and deltas.


@pytest.mark.parametrize("known", [True, False])
def test_anchors_are_centred_on_corners_and_not_rounded(known):
    height, width = (3, 5) if known else map(ops.convert_to_tensor, (3, 5))
    received = ops.convert_to_numpy(box.anchors(height, width, 8))
    np.testing.assert_allclose(received, detectors.anchors(3, 5, 8), rtol=0, atol=1e-4)
    for wrong in ({"shift": 0.5}, {"rounded": True}):  # controls
        assert np.abs(received - detectors.anchors(3, 5, 8, **wrong).numpy()).max() > 0.2


def test_deltas_move_boxes_as_mmdetection_does(boxes):
    rng = np.random.default_rng(7)
    deltas = rng.normal(0, 3, boxes.shape).astype("float32")
    deltas[:, :9, 2:] = [100, -100]  # cut on both sides
    sizes = np.array([[256, 320], [200, 310]], "float32")
    received = run(box.clip, run(box.decode, boxes, deltas, detectors.STDS[0]), sizes)
    for own, moves, size, result in zip(boxes, deltas, sizes, received, strict=True):
        own, moves = torch.from_numpy(own), torch.from_numpy(moves)
        expected = detectors.decoded(own, moves, detectors.STDS[0], size.tolist())
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.one_backend
def test_overlap_of_boxes_by_hand():
    a = np.array([[0, 0, 4, 4], [1, 1, 1, 1]], "float32")
    b = np.array([[2, 0, 6, 4], [8, 8, 9, 9], [0, 0, 4, 4]], "float32")
    np.testing.assert_allclose(run(box.iou, a, b), [[1 / 3, 0, 1], [0, 0, 0]], rtol=1e-6)
