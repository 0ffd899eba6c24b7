"""mIoU, aAcc and mAcc against sets of pixels, and mmsegmentation where it is installed."""

import importlib.util

import numpy as np
import pytest

from keras_convnext.evaluation.segmentation_scores import Scores, confusion_matrix

pytestmark = pytest.mark.once

CLASSES = 6


def maps(seed=0):
    """Three pairs of maps: class 4 is in the predictions alone, class 5 in none."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(3):
        truth = rng.integers(0, 4, (13, 17)).astype("uint8")
        predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 5, truth.shape))
        truth[rng.random(truth.shape) < 0.2] = 255
        pairs.append((truth, predicted.astype("uint8")))
    return pairs


def counted(pairs):
    return sum(confusion_matrix(truth, predicted, CLASSES) for truth, predicted in pairs)


def test_scores_are_those_of_sets_of_pixels():
    pairs = maps()
    pixels = {
        (n, y, x): (int(truth[y, x]), int(predicted[y, x]))
        for n, (truth, predicted) in enumerate(pairs)
        for y in range(13)
        for x in range(17)
        if truth[y, x] != 255
    }
    ious, accuracies = [], []
    for number in range(CLASSES):
        of_truth = {place for place, (truth, _) in pixels.items() if truth == number}
        of_model = {place for place, (_, predicted) in pixels.items() if predicted == number}
        both = of_truth & of_model
        ious.append(len(both) / len(of_truth | of_model) if of_truth | of_model else None)
        accuracies.append(len(both) / len(of_truth) if of_truth else None)
    scores = Scores.of(counted(pairs))
    there = [iou for iou in ious if iou is not None]
    assert ious[4] == 0 and ious[5] is None and accuracies[4] is None  # both kinds of absence are tested
    assert scores.miou == pytest.approx(100 * sum(there) / 5)
    assert scores.macc == pytest.approx(100 * sum(a for a in accuracies if a is not None) / 4)
    assert scores.aacc == pytest.approx(100 * np.mean([truth == model for truth, model in pixels.values()]))
    assert np.isnan(scores.iou[5]) and scores.iou[4] == 0 and np.isnan(scores.accuracy[4])
    as_if_absent_counted = 100 * sum(there) / 6
    assert abs(scores.miou - as_if_absent_counted) > 1


def test_a_matrix_has_the_classes_as_rows():
    truth, predicted = np.array([[0, 0, 2]], "uint8"), np.array([[1, 1, 2]], "uint8")
    np.testing.assert_array_equal(confusion_matrix(truth, predicted, 3), [[0, 2, 0], [0, 0, 0], [0, 0, 1]])


def test_counts_hold_more_pixels_than_32_bits():
    truth = np.zeros((1000, 1000), "uint8")
    counts = 5000 * confusion_matrix(truth, truth, 2)
    assert counts.dtype == np.int64 and counts[0, 0] == 5_000_000_000
    assert Scores.of(counts).miou == 100


def test_scores_of_nothing_are_nan():
    nothing = np.full((4, 4), 255, "uint8")
    scores = Scores.of(confusion_matrix(nothing, np.zeros((4, 4), "uint8"), 3))
    assert np.isnan([scores.miou, scores.aacc, scores.macc]).all()


@pytest.mark.skipif(importlib.util.find_spec("mmseg") is None, reason="mmsegmentation is not installed")
def test_scores_are_mmsegmentations():
    import torch
    from mmseg.evaluation.metrics import IoUMetric

    parts = [
        IoUMetric.intersect_and_union(torch.from_numpy(p), torch.from_numpy(t), CLASSES, 255)
        for t, p in maps()
    ]
    theirs = IoUMetric.total_area_to_metrics(*(sum(areas) for areas in zip(*parts, strict=True)))
    scores = Scores.of(counted(maps()))
    np.testing.assert_allclose(scores.iou / 100, theirs["IoU"], atol=1e-7)
    np.testing.assert_allclose(scores.accuracy / 100, theirs["Acc"], atol=1e-7)
    assert scores.aacc / 100 == pytest.approx(float(theirs["aAcc"]))
    assert scores.miou / 100 == pytest.approx(float(np.nanmean(theirs["IoU"])))
