"""Average precision of the boxes and masks that a detector finds, by pycocotools."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_convnext._environment import missing_text
from keras_convnext._files import prepare_folder, replace_file
from keras_convnext._messages import listed
from keras_convnext._terminal import Progress
from keras_convnext.data.detection.annotations import Annotations
from keras_convnext.data.detection.categories import Categories
from keras_convnext.data.detection.results import as_result
from keras_convnext.data.faults import Faults
from keras_convnext.data.index import SourceError
from keras_convnext.data.preprocess import ImageError, read_image
from keras_convnext.predictor import open_detector

NAMES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
KINDS = {"box": "bbox", "mask": "segm"}  # as pycocotools calls them
_MARK = b'[{"image_id"'  # with which a results file begins that may be replaced


@dataclasses.dataclass(frozen=True)
class Scores:
    """Average precision in percent, NaN where there is nothing to find."""

    means: dict[str, float]  # by `NAMES`
    by_category: dict[str, float]  # AP by the name of the category


@dataclasses.dataclass(frozen=True)
class DetectionResult:
    """What a model found on n photos, and how right it is."""

    scores: dict[str, Scores]  # "box", and "mask" where model and data have masks
    found: list[dict[str, Any]]  # as COCO's results files
    num_images: int
    faults: dict[str, str]  # reason by the name of each photo that could not be decoded
    seconds: float

    def report(self) -> dict[str, Any]:
        """Returns the scores as JSON values, null for what has nothing to find."""
        values: dict[str, Any] = {
            f"{kind}_{name.lower().replace(' ', '_')}": None if np.isnan(value) else value
            for kind, scores in self.scores.items()
            for name, value in scores.means.items()
        }
        for kind, scores in self.scores.items():
            values[f"{kind}_ap_by_category"] = {
                name: None if np.isnan(value) else value for name, value in scores.by_category.items()
            }
        return values | {"n": self.num_images - len(self.faults), "seconds": self.seconds}


def evaluate(
    model: Any,
    data: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    limit: int | None = None,
    output: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    progress: bool = True,
) -> DetectionResult:
    """Finds the objects of the photos of a COCO-style JSON and scores boxes and masks.

    Average precision is over IoU 0.5 to 0.95, with at most 100 detections of a photo, at the photo's own
    size, and in the ids of the file. Classes of the model are the categories of the same name; annotations of
    other categories, and detections of other classes, count nowhere.

    Args:
        model: whatever `predictor.open_detector` takes.
        data: the JSON. Images without annotations count: what is found there is wrong.
        images: folder of its photos. Default: that of the JSON, or `images` in it.
        image_size: the shorter side in pixels, in place of the weights' own.
        limit: only so many photos, at equal distances.
        output: folder for results.json, all detections as COCO's results files have them.
        max_faults: share of the photos that may be damaged, 0 to 1; more raise a DataError.

    Raises ImportError without pycocotools; SourceError where the data cannot be used.

    Example:
        result = evaluate("convnext_tiny.fb_coco_mask_rcnn", "instances_val2017.json", "val2017")
        result.scores["box"].means["AP"]
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise ImportError(missing_text("Average precision", "pycocotools"))
    target = None if output is None else pathlib.Path(output) / "results.json"
    if target is not None:
        prepare_folder(target.parent, {target.name: _MARK})
    annotations = Annotations(data, images)
    opened = open_detector(model, image_size=image_size)
    ids = matched(opened.categories, annotations)
    faults = Faults(annotations, max_faults)
    count = len(annotations) if limit is None else min(limit, len(annotations))
    numbers = [place * len(annotations) // count for place in range(count)]
    found, begin = [], time.perf_counter()
    with Progress("evaluate", count, is_wanted=progress) as bar:
        for done, number in enumerate(numbers, 1):
            row = annotations.images[number]
            try:
                image = read_image(annotations.file(number))
                size = (row.get("height", image.shape[0]), row.get("width", image.shape[1]))
                if size != image.shape[:2]:
                    raise ImageError(f"it is {image.shape[0]} x {image.shape[1]}, and annotated as {size}")
            except ImageError as error:
                faults.add(number, str(error))
                faults.check()
                continue
            for one in opened.detect(image):
                category = ids[one["class_index"]]
                if category is not None:
                    found.append({"image_id": row["id"], **as_result(one | {"category_id": category})})
            bar.show(done)
    seconds = time.perf_counter() - begin
    damaged = faults.report()
    seen = [annotations.images[place]["id"] for place in numbers if annotations.name(place) not in damaged]
    if target is not None:
        replace_file(target, json.dumps(found).encode(), _MARK)
    kinds = [kind for kind in KINDS if kind == "box" or (annotations.has_masks and opened.draws_masks)]
    asked = [number for number in ids if number is not None]
    scores = {kind: average_precision(annotations.content, found, seen, asked, kind) for kind in kinds}
    return DetectionResult(scores, found, count, damaged, seconds)


def matched(categories: Categories, annotations: Annotations) -> list[int | None]:
    """The id in the annotations of each class of a model, by its name; None where they have none."""
    theirs = dict(zip(annotations.categories.names, annotations.categories.ids, strict=True))
    ids = [theirs.get(name) for name in categories.names]
    if not any(number is not None for number in ids):
        raise SourceError(
            f"Expected categories of '{annotations.path}' among the model's: {listed(categories.names, 5)}. "
            f"Received: {listed(theirs, 5)}."
        )
    return ids


def average_precision(
    content: dict[str, Any],
    found: list[dict[str, Any]],
    images: Sequence[int],
    categories: Sequence[int],
    kind: str,
) -> Scores:
    """Scores detections of a results file against annotations; images and categories are ids."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    categories = sorted(categories)  # as pycocotools orders its results
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        other = "segmentation" if kind == "box" else "bbox"  # by which pycocotools would measure areas
        rows = [{name: value for name, value in one.items() if name != other} for one in found]
        results = truth.loadRes(rows) if rows else COCO()
        run = COCOeval(truth, results, KINDS[kind])
        run.params.imgIds, run.params.catIds = sorted(images), categories
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = {row["id"]: str(row["name"]) for row in content["categories"]}

    def mean(values) -> float:
        there = values[values > -1]
        return 100 * float(there.mean()) if there.size else float("nan")

    precision = run.eval["precision"]  # IoU, recall, category, area, detections
    means = [100 * value if value > -1 else float("nan") for value in run.stats[:6]]
    return Scores(
        dict(zip(NAMES, map(float, means), strict=True)),
        {names[number]: mean(precision[:, :, place, 0, -1]) for place, number in enumerate(categories)},
    )
