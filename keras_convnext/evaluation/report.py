"""Writes tables and a picture that show where a classifier is wrong."""

import functools
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from keras_convnext._environment import require
from keras_convnext._files import PNG_MARK, prepare_folder, replace_file, replacing_file
from keras_convnext._messages import printable, shortened
from keras_convnext._terminal import csv_text
from keras_convnext.data import class_names, preprocess
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.evaluation.results import Result, percentage

WORST_CLASSES = 10
WORST_IMAGES = 6  # of a class
_THUMBNAIL = Preprocessing(96, crop_fraction=1.0)
# The files of `write_reports`, and what shows that it wrote one, which it may then replace.
_MARKS = {
    "predictions.csv": b"name,label,rank,",
    "classes.csv": b"class,name,n,top1,",
    "confusions.csv": b"label,predicted,count",
    "faults.csv": b"name,reason",
    "worst_classes.png": PNG_MARK,
}


def check_output(folder: str | os.PathLike[str]) -> None:
    """Makes the folder and checks that the files can be written, before hours are spent on the evaluation."""
    require("matplotlib", "The picture of the worst classes")
    prepare_folder(folder, _MARKS)


def write_reports(folder: str | os.PathLike[str], result: Result) -> None:
    """Writes the tables and the picture of an evaluation; each file appears whole or not at all.

    FileExistsError: one of these names is there and another program wrote it. The files are:

    - predictions.csv: name, label, rank of the label (0 where right) and first five classes of each image;
    - classes.csv: images, top-1 and top-5 accuracy in percent and most frequent error of each class;
    - confusions.csv: number of images of each class that were taken for each class, without the zeros; by
      class, the most frequent first;
    - faults.csv: the images that could not be decoded, and why;
    - worst_classes.png: the ten classes of least accuracy, with some errors and what they were taken for.
    """
    check_output(folder)
    classes = result.source.classes
    columns = (result.numbers, result.labels, result.ranks, result.predictions)
    write_csv(
        folder,
        "predictions.csv",
        ["name", "label", "rank", *(f"predicted_{n + 1}" for n in range(result.predictions.shape[1]))],
        (
            [result.source.name(number), classes[label], rank, *(classes[n] for n in predicted)]
            for number, label, rank, predicted in zip(*(c.tolist() for c in columns), strict=True)
        ),
    )
    pairs = confusions(result)
    write_csv(
        folder,
        "confusions.csv",
        ["label", "predicted", "count"],
        ([classes[label], classes[predicted], count] for label, predicted, count in pairs),
    )
    # The most frequent pair of a class, which comes first, is the last to be put in.
    wrong = {label: predicted for label, predicted, _ in reversed(pairs) if label != predicted}
    write_csv(
        folder,
        "classes.csv",
        ["class", "name", "n", "top1", "top5", "most_often_taken_for"],
        (
            [
                classes[label],
                display_name(classes[label]),
                len(ranks),
                f"{percentage(ranks < 1):.4f}",
                f"{percentage(ranks < 5):.4f}",
                classes[wrong[label]] if label in wrong else "",
            ]
            for label, ranks in _ranks_by_class(result)
        ),
    )
    write_faults(folder, result.faults)
    _draw_worst_classes(result, pathlib.Path(folder) / "worst_classes.png")


def write_faults(folder: str | os.PathLike[str], faults: dict[str, str]) -> None:
    """Writes faults.csv: name and reason of each image that could not be decoded."""
    write_csv(folder, "faults.csv", ["name", "reason"], faults.items())


def confusions(result: Result) -> list[tuple[int, int, int]]:
    """Returns (label, predicted, count) for each pair that occurs: by label, the most frequent first."""
    pairs = np.stack([result.labels, result.predictions[:, 0]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    rows = [(*pair, count) for pair, count in zip(found.tolist(), counts.tolist(), strict=True)]
    return sorted(rows, key=lambda row: (row[0], -row[2], row[1]))


def display_name(class_name: str) -> str:
    """Returns the first word of a WordNet id's synset, and any other name as it is, but in UTF-8."""
    return printable(_synset_names().get(class_name, class_name).partition(",")[0])


@functools.cache
def _synset_names() -> dict[str, str]:
    return {
        synset: name
        for width in (21841, 11821, 1000)
        for synset, name in zip(class_names.synset_ids(width), class_names.class_names(width), strict=True)
    }


def _ranks_by_class(result: Result) -> list[tuple[int, np.ndarray]]:
    """Returns (label, ranks of its images) of each class with images."""
    return [(label, result.ranks[result.labels == label]) for label in np.unique(result.labels).tolist()]


def _draw_worst_classes(result: Result, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    source = result.source
    with_errors = [(label, ranks) for label, ranks in _ranks_by_class(result) if ranks.any()]
    worst = sorted(with_errors, key=lambda row: (percentage(row[1] < 1), -len(row[1])))[:WORST_CLASSES]
    rows = max(len(worst), 1)
    figure = Figure(figsize=(11, 1.5 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, WORST_IMAGES + 1, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    title = f"{result.settings['model']}: top-1 {result.top1:.2f} % of {len(result.numbers)} images"
    title = printable(title if worst else f"{title}, none is wrong")
    figure.suptitle(title, fontsize=10, parse_math=False)
    for row, (label, ranks) in zip(axes, worst, strict=False):
        name = shortened(display_name(source.classes[label]), 18)
        text = f"{name}\n{percentage(ranks < 1):.0f} % of {len(ranks)}"
        row[0].text(0, 0.5, text, fontsize=9, va="center", parse_math=False)
        wrong = np.flatnonzero((result.labels == label) & (result.ranks > 0))[:WORST_IMAGES]
        for axis, place in zip(row[1:], wrong.tolist(), strict=False):
            number = int(result.numbers[place])
            axis.imshow(preprocess.decode_prepared(source.read(number), source.name(number), _THUMBNAIL))
            taken_for = display_name(source.classes[result.predictions[place, 0]])
            axis.set_title(shortened(taken_for, 20), fontsize=7, parse_math=False)
    with replacing_file(path, PNG_MARK) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": "keras_convnext"})


def write_csv(
    folder: str | os.PathLike[str],
    name: str,
    columns: list[str],
    rows: Iterable[Iterable[Any]],
    marks: Mapping[str, bytes] = _MARKS,
) -> None:
    """Writes a table of a report; `marks` show that an earlier report wrote what it replaces."""
    content = csv_text([columns, *rows]).encode("utf-8", "surrogateescape")
    replace_file(pathlib.Path(folder) / name, content, marks[name])
