"""mIoU, aAcc and mAcc of a segmenter on photos with label maps, and IoU by class."""

import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_convnext import segmentation
from keras_convnext._messages import listed, unknown
from keras_convnext._terminal import Progress, say
from keras_convnext.data.faults import DataError, Faults
from keras_convnext.data.preprocess import ImageError
from keras_convnext.data.preprocessing import is_positive_integer
from keras_convnext.data.segmentation import inference, sources
from keras_convnext.data.segmentation.labels import IGNORED, Labels, are_default
from keras_convnext.data.sources import canonical_split
from keras_convnext.distribution import choose
from keras_convnext.evaluation import forward, segmentation_report
from keras_convnext.evaluation.result_columns import settings_of
from keras_convnext.evaluation.results import append_result, check_complete, check_results_file
from keras_convnext.evaluation.segmentation_scores import Scores, confusion_matrix
from keras_convnext.exporting import runtimes
from keras_convnext.predictor import SegmentationPredictor, finite, open_segmenter, segmenter_of
from keras_convnext.weights.resolve import is_path, resolve

_LOGITS_BYTES = 1 << 28  # of a batch, by which its size is chosen
_LARGEST_BATCH = 16


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentationResult:
    """What a model found in n photos, counted in pixels; every score is computed from these."""

    settings: dict[str, str]  # text of the columns of `results.COLUMNS` that are not scores
    source: Any  # data.segmentation.sources.SegmentationSource
    numbers: np.ndarray  # int64 (n,), places in `source`, ascending; without the photos left out
    counts: np.ndarray  # int64 (classes, classes), pixels by class and predicted class
    pixels: np.ndarray  # int64 (n,), labelled ones of each photo
    found: np.ndarray  # int64 (n, classes), pixels of each class that were found, by photo
    union: np.ndarray  # int64 (n, classes), pixels of a class in the label map, the prediction or both
    num_images: int  # that were asked for: n and those left out
    faults: dict[str, str]  # reason by the name of each photo that could not be decoded
    num_skipped: int  # number of these
    seconds: float
    images_per_second: float  # after the first batch, in which the model is compiled

    @functools.cached_property
    def scores(self) -> Scores:
        return Scores.of(self.counts)

    @property
    def miou(self) -> float:
        """Mean over the classes of the intersection over the union, in percent."""
        return self.scores.miou

    def columns(self) -> dict[str, str]:
        """Returns the text of the scores' columns."""
        return {name: f"{value:.4f}" for name, value in self.scores.means.items()}

    def report(self) -> dict[str, Any]:
        """Returns the scores as JSON values, in percent; null for a class that is not there."""
        iou = [None if np.isnan(value) else float(value) for value in self.scores.iou]
        return {**self.scores.means, "iou": dict(zip(self.source.classes, iou, strict=True))}


def evaluate(
    model: Any,
    data: Any,
    *,
    split: str | None = None,
    mode: str | None = None,
    ignored_values: Iterable[int] | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    results: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    progress: bool = True,
) -> SegmentationResult:
    """Segments the photos of a data set and counts the pixels of each class that were found.

    Counts are int64 and of the label maps at their own size; pixels without a label count nowhere. A photo is
    resized to the shorter side that the weights were tested at, at most four times that long, and the logits
    to the label map. JAX compiles the model for each size of photo that is new to it, and so does TensorFlow
    where it compiles; photos of one size in succession share a batch. Windows have one size for all.

    Reference: mmsegmentation 1.2.2, iou_metric.py and encoder_decoder.py.

    Args:
        model: a tag, a weight file or a `.keras` file of a segmenter, what `weights.resolve.resolve` returned
            of one, a file that `export` wrote, or a `segmentation.Segmenter`.
        data: a folder, see `data.segmentation.sources.open_source`, or what that returns. `split` is by
            default its validation split, or all of it where it has no splits.
        mode: "whole", "slide" or "multi_scale", see `inference.outputs`. Default: "slide" for published
            weights, whose scores are of that, and for a model of one image size, which must be square; else
            "whole".
        ignored_values: of the label maps, in place of those that the weights were trained with.
        image_size: the shorter side in pixels, in place of the weights' own; of a model that does not say it,
            512.
        batch_size: photos or windows of equal size at a time, by default what 256 MB of logits hold.
        limit: evaluate only that many photos, at equal distances in the data.
        results: CSV file to which a row is added, see `results.append_result`.
        output: folder for the files of `segmentation_report.write_reports`.
        max_faults: share of the photos that may be damaged, 0 to 1; more raise a DataError.

    ValueError: the classes of the data are not those of the model, or its outputs not finite; SourceError:
    the data cannot be used, such as a label outside the range.

    Example:
        result = evaluate("convnext_tiny.fb_ade20k_512", "ADEChallengeData2016", results="results.csv")
        result.miou, result.scores.iou            # percent, float64 (150,)
    """
    for name, value in (("batch_size", batch_size), ("limit", limit), ("image_size", image_size)):
        if value is not None and not is_positive_integer(value):
            raise ValueError(f"Expected {name} to be a positive integer or None, received {value!r}.")
    if mode not in (None, *inference.MODES):
        raise ValueError(unknown("mode", mode or "", inference.MODES))
    if results is not None:
        check_results_file(results)
    if output is not None:
        segmentation_report.check_output(output)
    opened, labels = _open_model(model, image_size)
    classes = opened.model.output_shape[-1]
    mode = _mode_of(opened, mode)
    split = split or default_split(data)
    source = open_data(data, split, labels, ignored_values, classes)
    if progress:
        say("\n".join(sources.described(source, "data")))
    numbers = np.arange(len(source))
    if limit is not None and limit < len(source):
        numbers = np.arange(limit) * len(source) // limit
    short_side = min(opened.preprocessing.size)
    batch_size = batch_size or _fitting_batch(short_side, classes)
    predict = Predict(opened.model, batch_size)
    segment = functools.partial(
        inference.segment, predict, short_side=short_side, mode=mode, batch_size=batch_size
    )
    settings = settings_of(opened, source, split, batch_size, source.fingerprint) | {
        "crop": "", "resize_mode": "shorter_side", "resize_size": "", "interpolation": "bilinear",
        "outputs": f"all {classes}", "mode": mode,
    }  # fmt: skip
    faults = Faults(source, max_faults)
    parts = outputs_of(predict, source, numbers, short_side, mode, batch_size, faults)
    try:
        result = _counted(parts, classes, len(numbers), progress, settings, source, faults)
    except DataError:
        if output is not None:
            segmentation_report.write_faults(output, faults.report())
        raise
    check_complete(result)
    if output is not None:
        segmentation_report.write_reports(output, result, segment)
    if results is not None:
        append_result(results, result)
    return result


def _open_model(model: Any, image_size: int | None) -> tuple[SegmentationPredictor, Labels | None]:
    """Opens what `evaluate` takes as model, with its labels where it says them."""
    if isinstance(model, segmentation.Segmenter):
        return open_segmenter(model, image_size=image_size), None
    is_named = isinstance(model, str | os.PathLike)
    if is_named and is_path(model) and runtimes.is_exported(path := pathlib.Path(os.path.expanduser(model))):
        exported = runtimes.open_exported(path)
        names = exported.metadata.get("labels")
        palette = exported.metadata.get("output", {}).get("palette")
        labels = Labels(tuple(names), tuple(map(tuple, palette))) if names and palette else None
        own = runtimes.stored_preprocessing(exported.metadata)
        return segmenter_of(exported, str(path), image_size, own, labels, path), labels
    source = resolve(model)
    return open_segmenter(source, image_size=image_size), source.labels


def _mode_of(opened: SegmentationPredictor, mode: str | None) -> str:
    """Returns the mode, by default that of the model; one of a single image size takes square windows."""
    size = opened.model.input_shape[1:3]
    if None in size:
        return mode or ("slide" if opened.row else "whole")
    if mode in (None, "slide") and size[0] == size[1]:
        return "slide"
    raise ValueError(
        "Expected a segmenter of photos of any size, or a square one and mode 'slide'. Received one of "
        f"{size[0]} x {size[1]} pixels and mode {mode!r}. Evaluate the weights that it is of, or an ONNX "
        "file of them."
    )


def validate(
    model: Any,
    source: Any,
    short_side: int,
    *,
    mode: str = "whole",
    batch_size: int = 8,
    faults: Faults | None = None,
    after_batch: Callable[[], None] = lambda: None,
    gathered: Callable[[np.ndarray], list[np.ndarray]] = lambda array: [array],
    share: tuple[int, int] = (0, 1),
    fills: bool = False,
    on_map: Callable[[int, np.ndarray, np.ndarray, np.ndarray], None] = lambda *_: None,
) -> dict[str, float]:
    """Scores a segmenter as training does after each epoch: "loss", "miou", "aacc" and "macc", in percent.

    "loss" is the mean cross-entropy of the labelled pixels, at the size of the label maps. The rest is as for
    `forward.validate`; `share` is (this process, processes) where each evaluates a part of the photos.
    `fills` is as for `Predict`; `on_map` is given number, photo, truth and prediction of each.
    """
    classes = model.output_shape[-1]
    predict = Predict(model, batch_size, fills)
    numbers = np.arange(share[0], len(source), share[1])
    faults = Faults(source, 1.0) if faults is None else faults
    counts, total = np.zeros((classes, classes), np.int64), 0.0
    for number, image, truth, outputs in outputs_of(
        predict, source, numbers, short_side, mode, batch_size, faults
    ):
        after_batch()
        if mode == "multi_scale":  # a softmax, which is that of its logarithm
            outputs = np.log(np.maximum(outputs, 1e-30))
        predicted, loss = _predicted_with_loss(outputs, truth)
        counts += confusion_matrix(truth, predicted, classes)
        total += loss
        on_map(number, image, truth, predicted)
    counts = np.sum(gathered(counts.reshape(1, -1)), axis=(0, 1)).reshape(classes, classes)
    total = float(sum(map(np.sum, gathered(np.array([total])))))
    labelled = int(counts.sum())
    return {"loss": total / labelled if labelled else float("nan"), **Scores.of(counts).means}


def default_split(data: Any) -> str | None:
    """Returns the split that is evaluated where none is named: for validation, a test, or the first."""
    names = sources.list_splits(data) if isinstance(data, str | os.PathLike) else []
    wanted = (name for kind in ("validation", "test") for name in names if canonical_split(name) == kind)
    return next(wanted, names[0] if names else None)


def open_data(
    data: Any, split: str | None, labels: Labels | None, ignored_values: Iterable[int] | None, classes: int
) -> Any:
    """Opens the data of a model; ValueError where its classes are others than those of the model."""
    if not isinstance(data, str | os.PathLike):
        source = data
    else:
        ignored = None if labels is None else labels.ignored_values
        ignored = ignored if ignored_values is None else tuple(ignored_values)
        source = sources.open_source(data, split, labels=labels, ignored_values=ignored)
    names = source.labels.names
    if labels is not None and names != labels.names and not (are_default(names) or are_default(labels.names)):
        missing = [name for name in labels.names if name not in names]
        others = [name for name in names if name not in labels.names]
        what = "; ".join(
            [f"not in the data: {listed(missing, 5)}"] * bool(missing)
            + [f"not of the model: {listed(others, 5)}"] * bool(others)
        )
        raise ValueError(
            f"Expected data with the {len(labels.names)} classes of the model in their order, received "
            f"{len(names)} in '{source.path}': {what or 'the same in another order'}. Pass other data, or "
            "a model of these classes."
        )
    if len(names) != classes:
        raise ValueError(
            f"Expected data with the {classes} classes of the model, received {len(names)} in "
            f"'{source.path}': {listed(names, 5)}. Pass other data, or a model of these classes."
        )
    return source


class Predict:
    """Runs a segmenter: uint8 (n, h, w, 3) to logits float32 (n, h, w, classes), for any n.

    A size of which a whole batch was seen gets whole batches only, filled up, since JAX and TensorFlow
    compile each shape anew. `fills`: every size does, as several devices need.
    """

    def __init__(self, model: Any, batch_size: int, fills: bool = False) -> None:
        self.model, self.batch_size, self.fills = model, batch_size, fills
        self._forward = forward.forward_function(model)
        self._full: set[tuple[int, ...]] = set()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        count, size = len(images), images.shape[1:]
        if count == self.batch_size:
            self._full.add(size)
        elif self.fills or size in self._full:
            images = np.concatenate([images, np.repeat(images[-1:], self.batch_size - count, 0)])
        logits = choose.rows(self._forward(choose.divided(np.ascontiguousarray(images))))[:count]
        return finite(logits, getattr(self.model, "name", "the exported file"))


def outputs_of(
    predict: Predict,
    source: Any,
    numbers: np.ndarray,
    short_side: int,
    mode: str,
    batch_size: int,
    faults: Faults,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields number, photo, label map and what `inference.outputs` gives, of photos that can be decoded."""
    items = _loaded(source, numbers, faults)
    if mode != "whole":
        for number, image, truth in items:
            yield (
                number,
                image,
                truth,
                inference.outputs(predict, image, short_side, mode, batch_size=batch_size),
            )
        return
    resized = ((*item, inference.prepared(item[1], short_side)) for item in items)
    for _, neighbours in itertools.groupby(resized, key=lambda item: item[3].shape):
        while some := list(itertools.islice(neighbours, batch_size)):
            logits = predict(np.stack([pixels for *_, pixels in some]))
            for (number, image, truth, _), one in zip(some, logits, strict=True):
                yield number, image, truth, one


def _loaded(source: Any, numbers: np.ndarray, faults: Faults) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    def load(number: int) -> tuple[int, Any]:
        try:
            return number, source.load(number)
        except ImageError as error:
            return number, error

    for number, found in sources.ahead(load, numbers.tolist()):
        if isinstance(found, ImageError):
            faults.add(number, str(found))
            faults.check()
        else:
            yield number, *found


def _counted(parts, classes, num_images, progress, settings, source, faults) -> SegmentationResult:
    numbers, pixels, found, union = [], [], [], []
    counts = np.zeros((classes, classes), np.int64)
    begin = first_end = time.perf_counter()
    with Progress("evaluation", num_images, is_wanted=progress) as shown:
        for number, _, truth, outputs in parts:
            one = confusion_matrix(truth, inference.label_map(outputs, truth.shape), classes)
            counts += one
            numbers.append(number)
            pixels.append(one.sum())
            found.append(np.diag(one).copy())
            union.append(one.sum(0) + one.sum(1) - np.diag(one))
            first_end = time.perf_counter() if len(numbers) == 1 else first_end
            shown.show(len(numbers))
    end = time.perf_counter()
    rate = (len(numbers) - 1) / max(end - first_end, 1e-9) if len(numbers) > 1 else 1 / max(end - begin, 1e-9)
    return SegmentationResult(
        settings=settings,
        source=source,
        numbers=np.array(numbers, np.int64),
        counts=counts,
        pixels=np.array(pixels, np.int64),
        found=np.array(found, np.int64).reshape(-1, classes),
        union=np.array(union, np.int64).reshape(-1, classes),
        num_images=num_images,
        faults=faults.report(),
        num_skipped=len(faults),
        seconds=end - begin,
        images_per_second=rate,
    )


def _predicted_with_loss(logits: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the label map at the size of `truth`, and the sum of the labelled pixels' cross-entropy."""
    predicted, total = np.empty(truth.shape, np.uint8), 0.0
    for rows, strip in inference.strips(logits, truth.shape):
        predicted[rows] = np.argmax(strip, -1)
        is_labelled = truth[rows] != IGNORED
        chosen, own = strip[is_labelled], truth[rows][is_labelled][:, None].astype(np.int64)
        if len(chosen):
            largest = chosen.max(-1, keepdims=True)
            sums = np.log(np.exp(chosen - largest).sum(-1, keepdims=True)) + largest
            total += float((sums - np.take_along_axis(chosen, own, 1)).sum(dtype=np.float64))
    return predicted, total


def _fitting_batch(side: int, classes: int) -> int:
    return max(1, min(_LARGEST_BATCH, _LOGITS_BYTES // (4 * classes * side * side)))
