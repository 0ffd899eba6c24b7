"""Writes tables and pictures that show where a segmenter is wrong."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_convnext._environment import require
from keras_convnext._files import PNG_MARK, prepare_folder, replacing_file
from keras_convnext._messages import printable, shortened
from keras_convnext.data.segmentation.labels import IGNORED, Labels
from keras_convnext.data.segmentation.pictures import as_palette_image
from keras_convnext.evaluation import report

WORST_CLASSES = 8
WORST_IMAGES = 2  # of a class
_NAMED_CLASSES = 40  # up to here the axes of the confusion matrix are named
# The files of `write_reports`, and what shows that it wrote one, which it may then replace.
_MARKS = {
    "classes.csv": b"class,name,share,iou,",
    "confusions.csv": b"label,predicted,pixels",
    "images.csv": b"name,pixels,aacc,miou",
    "faults.csv": b"name,reason",
    "confusion_matrix.png": PNG_MARK,
    "worst_classes.png": PNG_MARK,
}


def check_output(folder: str | os.PathLike[str]) -> None:
    """Makes the folder and checks that the files can be written, before hours are spent on the evaluation."""
    require("matplotlib", "The picture of the worst classes")
    prepare_folder(folder, _MARKS)


def write_reports(
    folder: str | os.PathLike[str], result: Any, segment: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Writes the tables and pictures of a `SegmentationResult`; each file appears whole or not at all.

    `segment` makes label maps again, of the photos that are shown. The files are:

    - classes.csv: share of the labelled pixels, IoU, share found, and what a class was most often taken for;
    - confusions.csv: pixels of each class that were taken for each class, without the zeros; by class, the
      most frequent first;
    - images.csv: labelled pixels, the share of them that is right and the mean IoU of each photo;
    - faults.csv: the photos that could not be decoded, and why;
    - confusion_matrix.png: for each class the shares of its pixels by predicted class;
    - worst_classes.png: the classes of least IoU, in the photos with most wrong pixels of them.
    """
    check_output(folder)
    _write_tables(folder, result)
    write_faults(folder, result.faults)
    _draw_matrix(result, pathlib.Path(folder) / "confusion_matrix.png")
    _draw_worst_classes(result, segment, pathlib.Path(folder) / "worst_classes.png")


def write_faults(folder: str | os.PathLike[str], faults: dict[str, str]) -> None:
    """Writes faults.csv: name and reason of each photo that could not be decoded."""
    report.write_csv(folder, "faults.csv", ["name", "reason"], faults.items(), _MARKS)


def draw_examples(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], labels: Labels, path: Any, title: str
) -> None:
    """Draws (text, photo, truth, prediction), a row each, with the classes that occur in a legend."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count = max(len(rows), 1)
    figure = Figure(figsize=(9.6, 2.2 * count + 1.1), layout="constrained")
    figure.suptitle(printable(title), fontsize=10, parse_math=False)
    axes = figure.subplots(count, 3, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    shown: set[int] = set()
    for line, (text, image, truth, predicted) in zip(axes, rows, strict=False):
        shown |= {int(number) for each in (truth, predicted) for number in np.unique(each)} - {IGNORED}
        maps = (np.asarray(as_palette_image(each, labels).convert("RGB")) for each in (truth, predicted))
        for axis, picture, what in zip(line, (image, *maps), (text, "truth", "prediction"), strict=True):
            step = max(1, max(picture.shape[:2]) // 480)  # what the picture can show
            axis.imshow(picture[::step, ::step], interpolation="nearest")
            axis.set_title(shortened(printable(what), 44), fontsize=7, parse_math=False)
    patches = [
        Patch(color=_colour(labels, n), label=shortened(printable(labels.names[n]), 20))
        for n in sorted(shown)[:_NAMED_CLASSES]
    ]
    if patches:
        legend = figure.legend(
            handles=patches, loc="outside lower center", ncols=7, fontsize=7, frameon=False
        )
        for entry in legend.get_texts():
            entry.set_parse_math(False)
    with replacing_file(path, PNG_MARK) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": "keras_convnext"})


def _colour(labels: Labels, number: int) -> tuple[float, float, float]:
    red, green, blue = labels.palette[number]
    return red / 255, green / 255, blue / 255


def _write_tables(folder: str | os.PathLike[str], result: Any) -> None:
    names, counts, scores = result.source.classes, result.counts, result.scores
    total = max(int(counts.sum()), 1)
    wrong = counts - np.diag(np.diag(counts))
    report.write_csv(
        folder,
        "classes.csv",
        ["class", "name", "share", "iou", "accuracy", "most_often_taken_for"],
        (
            [
                number,
                name,
                f"{100 * counts[number].sum() / total:.4f}",
                _text(scores.iou[number]),
                _text(scores.accuracy[number]),
                names[int(wrong[number].argmax())] if wrong[number].any() else "",
            ]
            for number, name in enumerate(names)
        ),
        _MARKS,
    )
    pairs = [
        (label, predicted, int(counts[label, predicted]))
        for label in range(len(names))
        for predicted in np.argsort(-counts[label], kind="stable").tolist()
        if counts[label, predicted]
    ]
    report.write_csv(
        folder,
        "confusions.csv",
        ["label", "predicted", "pixels"],
        ([names[label], names[predicted], count] for label, predicted, count in pairs),
        _MARKS,
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = 100 * result.found / result.union  # NaN for a class that is not there
    rows = zip(result.numbers.tolist(), result.pixels.tolist(), result.found.sum(1), shares, strict=True)
    report.write_csv(
        folder,
        "images.csv",
        ["name", "pixels", "aacc", "miou"],
        (
            [
                result.source.name(number),
                pixels,
                _text(100 * found / pixels if pixels else np.nan),
                _text(np.nanmean(iou) if pixels else np.nan),
            ]
            for number, pixels, found, iou in rows
        ),
        _MARKS,
    )


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


def _draw_matrix(result: Any, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    names, counts = [shortened(printable(name), 18) for name in result.source.classes], result.counts
    is_named = len(names) <= _NAMED_CLASSES
    side = 3.5 + (0.26 * len(names) if is_named else 6.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="% of the pixels of the class", shrink=0.7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    title = f"{result.settings['model']}: mIoU {result.miou:.2f} % of {len(result.numbers)} photos"
    axes.set_title(printable(title), fontsize=10, parse_math=False)
    if is_named:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    with replacing_file(path, PNG_MARK) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": "keras_convnext"})


def _draw_worst_classes(result: Any, segment: Callable, path: pathlib.Path) -> None:
    scores, labels = result.scores, result.source.labels
    there = np.flatnonzero(~np.isnan(scores.iou))
    worst = there[np.argsort(scores.iou[there], kind="stable")][:WORST_CLASSES]
    rows = []
    for number in worst.tolist():
        errors = result.union[:, number] - result.found[:, number]
        for place in np.argsort(-errors, kind="stable")[:WORST_IMAGES].tolist():
            if errors[place]:
                image, truth = result.source.load(int(result.numbers[place]))
                name = result.source.name(int(result.numbers[place])).rpartition("/")[2]
                text = f"{labels.names[number]}, IoU {scores.iou[number]:.1f} %: {name}"
                rows.append((text, image, truth, segment(image)))
    title = f"{result.settings['model']}: mIoU {result.miou:.2f} % of {len(result.numbers)} photos"
    draw_examples(rows, labels, path, title if rows else f"{title}, no pixel is wrong")
