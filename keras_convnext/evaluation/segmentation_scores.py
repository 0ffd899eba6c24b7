"""Counts of pixels by class and predicted class, and the scores that follow from them."""

import dataclasses

import numpy as np

from keras_convnext.data.segmentation.labels import IGNORED


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns int64 (classes, classes): pixels by class (rows) and predicted class, without those ignored.

    Both are class numbers (H, W); `truth` has 255 where a pixel has no label. Matrices of images are summed.
    """
    is_labelled = truth != IGNORED
    pairs = classes * truth[is_labelled].astype(np.int64) + predicted[is_labelled]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a confusion matrix, in percent; a class without pixels in either map has NaN.

    Reference: intersect_and_union and total_area_to_metrics of mmsegmentation 1.2.2, iou_metric.py.
    """

    iou: np.ndarray  # float64 (classes,): intersection / union of the pixels of a class
    accuracy: np.ndarray  # float64 (classes,): share of a class's pixels that are found; NaN without pixels
    aacc: float  # share of all labelled pixels that are right
    miou: float  # mean of `iou` over the classes that are there
    macc: float  # mean of `accuracy` over the classes that are there

    @property
    def means(self) -> dict[str, float]:
        """The scores over all classes, by their columns in log.csv and results.csv."""
        return {"miou": self.miou, "aacc": self.aacc, "macc": self.macc}

    @classmethod
    def of(cls, counts: np.ndarray) -> "Scores":
        found, labelled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
        iou = _percent(found, labelled + predicted - found)
        accuracy = _percent(found, labelled)
        total = _percent(found.sum(keepdims=True), counts.sum(keepdims=True).reshape(1))
        return cls(iou, accuracy, float(total[0]), _mean(iou), _mean(accuracy))


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, 100 * part / np.maximum(whole, 1), np.nan)


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")
