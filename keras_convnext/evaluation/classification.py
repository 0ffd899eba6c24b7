"""Top-1, top-5 and ReaL accuracy of a classifier: the only writer of scores."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from keras_convnext import predictor
from keras_convnext._files import read_text
from keras_convnext._terminal import say
from keras_convnext.data import class_names, imagenet, sources
from keras_convnext.data.faults import DataError, Faults
from keras_convnext.data.index import Source, described, with_classes
from keras_convnext.data.preprocessing import Preprocessing, is_positive_integer
from keras_convnext.evaluation import report
from keras_convnext.evaluation.forward import import_batches, outputs_of, scored
from keras_convnext.evaluation.result_columns import settings_of
from keras_convnext.evaluation.results import Result, append_result, check_complete, check_results_file
from keras_convnext.exporting import runtimes
from keras_convnext.predictor import Predictor
from keras_convnext.weights.resolve import ResolvedWeights, is_path, resolve

DEFAULT_BATCH_SIZE = 64

# SHA-256 of the sorted WordNet ids, joined by newlines, of sets that have images of 200 of the 1000 classes
# (Hendrycks et al., arXiv 1907.07174 and 2006.16241; lists as in timm 1.0.31, timm/data/_info).
_SUBSETS = {
    "f6aa4b23244554d9b864fd715ae20048f6a9686388911b2dfbf1ada01bf0f520": "ImageNet-A",
    "e19a59d84e3746fafd34d2ccf6ae604a44e9a0500a596f343c878a89e30ce624": "ImageNet-R",
}


def evaluate(
    model: Any,
    data: str | os.PathLike[str] | Source,
    *,
    split: str | None = None,
    real_labels: str | os.PathLike[str] | bool | None = None,
    preprocessing: str | int | Preprocessing | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    results: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Result:
    """Classifies the images of a data set and counts how often the model is right.

    Pixels are those of Pillow, bit for bit. An image counts for top-k when fewer than k classes have a larger
    output than its label, equal outputs being ordered by their class number, so that ties do not depend on
    the backend. Which outputs are compared follows from the classes of the data, see `match_classes`. Images
    that cannot be decoded are left out of all counts and named in `Result.faults`.

    Reference: ReaL accuracy: Beyer et al., "Are we done with ImageNet?" (arXiv 2006.07159): the share of
    images with at least one ReaL label of which the predicted class is a label.

    Args:
        model: a tag, an architecture (its ImageNet weights), a weight file, a `.keras` file, a file that
            `export` wrote, which its own runtime runs, or a Keras model of (N, H, W, 3) pixels in 0..255;
            also what `weights.resolve.resolve` returned, such as of a tag and a weight file of one's own.
        data: a path, see `sources.open_source`, or what that returns. `split` is by default its validation
            split, or all of it where it has no splits.
        real_labels: path of ReaL's real.json, or True where the data has it (TFDS's imagenet2012_real).
        preprocessing: of the images in place of the model's own, or a tag that has it, or the image size in
            pixels. The own one of a Keras model and a `.keras` file, which do not say how they were trained,
            is the default of `Preprocessing`.
        batch_size: images in a batch of this host, by default 64.
        limit: evaluate only that many examples, at equal distances in the data.
        results: CSV file to which a row is added, see `results.append_result`.
        output: folder for the files of `report.write_reports`.
        max_faults: share of the images that may be damaged, 0 to 1; more raise a DataError.
        share: (this host, from 0 up, hosts), which evaluate a part of the data each; see `results.combine`.

    Raises a ValueError where the outputs are NaN or do not fit the classes of the data, a SourceError where
    the data cannot be used, an ImportError without TensorFlow or, for `output`, matplotlib.

    Example:
        result = evaluate("convnext_tiny.fb_in1k", "ILSVRC2012_img_val.tar", results="results.csv")
        result.top1, len(result.numbers)          # percent, 50000
    """
    _check_arguments(batch_size, limit, results, output, share[1])
    if results is not None:
        check_results_file(results)
    if output is not None:
        sources.check_outside(data.path if isinstance(data, Source) else data, output)
        report.check_output(output)
    import_batches()  # its absence is told before anything is downloaded
    if split is None and not isinstance(data, Source) and sources.list_splits(data):
        split = "validation"
    source = data if isinstance(data, Source) else sources.open_source(data, split)
    if progress:
        say("\n".join(described(source)))
    classifier = _open_model(model, preprocessing)
    source = _with_classes_of(classifier.file, source, classifier.model.output_shape[-1])
    source = _without_unused_classes(dataclasses.replace(source, classes=_synsets(source.classes)))
    columns, outputs = match_classes(source.classes, classifier.model.output_shape[-1], classifier.class_list)
    real = None if real_labels in (None, False) else _real_lists(source, real_labels)
    if limit is not None and limit < len(source):
        chosen = np.arange(limit) * len(source) // limit
        source, real = sources.take(source, chosen), real and [real[number] for number in chosen]
    batch_size = batch_size or DEFAULT_BATCH_SIZE
    settings = settings_of(classifier, source, split, batch_size) | {"outputs": outputs}
    faults = Faults(source, max_faults)
    parts = outputs_of(
        classifier.model,
        source,
        classifier.preprocessing,
        title="evaluation",
        batch_size=batch_size,
        faults=faults,
        progress=progress,
        share=share,
        columns=columns,
    )
    try:
        scores = scored(parts, columns)
    except DataError:
        if output is not None:
            report.write_faults(output, faults.report())
        raise
    result = Result(
        settings=settings,
        source=source,
        real=None if real is None else _real_scores(source, real, scores["numbers"], scores["predictions"]),
        faults=faults.report(),
        num_skipped=len(faults),
        **scores,
    )
    if share[1] == 1:
        check_complete(result)
    if output is not None:
        report.write_reports(output, result)
    if results is not None:
        append_result(results, result)
    return result


def match_classes(
    classes: Sequence[str], num_outputs: int, class_list: int | str | None = None
) -> tuple[np.ndarray | None, str]:
    """Finds the output of a model for each class of a data set.

    - WordNet ids that the model's 1000, 11821 or 21841 classes contain mean the outputs of these classes
      alone: all of them for ImageNet on a model of 1000 classes, and 200 for ImageNet-A and -R, as in timm.
      Of the 1000 classes ImageNet-22k lacks one and timm's 12k subset seven: their images count as wrong. (To
      have images of few classes compared with all 1000, open them by `open_source(path,
      classes=synset_ids(1000))`.)
    - The numbers 0 to 999 mean ImageNet's 1000 WordNet ids (ImageNetV2 as published).
    - Of any others there must be as many as the model has outputs, else a ValueError; class i of the data is
      output i. Class folders are in the order of their sorted names.

    Returns int64 (len(classes),), -1 for a class without output, or None when class i is output i of all; and
    that in words. `class_list` is the list of `class_names` that the outputs follow, None by their number.
    """
    columns = _imagenet_columns(_synsets(classes), num_outputs if class_list is None else class_list)
    if columns is None and len(classes) == num_outputs:
        return None, f"all {num_outputs}, in the order of the data's classes"
    if columns is None:
        some = ", ".join(classes[:3]) + ", ..." * (len(classes) > 3)
        raise ValueError(
            f"Expected data with the {num_outputs} classes of the model, or with classes named by WordNet "
            f"ids among ImageNet's, received {len(classes)}: {some}. Pass a model trained on these classes."
        )
    if np.array_equal(columns, np.arange(num_outputs)):
        return None, f"all {num_outputs}"
    subset = f" ({name})" if (name := _subset_name(classes)) else ""
    missing = [name for name, column in zip(classes, columns, strict=True) if column < 0]
    lacking = f"; none for {' '.join(missing)}" if missing else ""
    return columns, f"{np.sum(columns >= 0)} of {num_outputs}, by WordNet id{subset}{lacking}"


def _imagenet_columns(names: Sequence[str], class_list: int | str) -> np.ndarray | None:
    """Returns the output for each WordNet id; None when the model or the names are not ImageNet's."""
    try:
        outputs = {synset: number for number, synset in enumerate(class_names.synset_ids(class_list))}
    except ValueError:
        return None
    columns = np.array([outputs.get(name, -1) for name in names], np.int64)
    # The 21841 classes lack one of the 1000, the 11821 lack seven.
    lacking = {name for name, column in zip(names, columns, strict=True) if column < 0}
    return columns if lacking <= set(class_names.synset_ids(1000)) and (columns >= 0).any() else None


def _check_arguments(batch_size, limit, results, output, num_hosts) -> None:
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and not is_positive_integer(value):
            raise ValueError(f"Expected {name} to be a positive integer or None, received {value!r}.")
    if num_hosts != 1 and (results is not None or output is not None):
        raise ValueError(
            f"Expected results=None and output=None on one of {num_hosts} hosts, whose figures are "
            "of a part of the data. Call combine, then append_result and write_reports."
        )


def _open_model(model, preprocessing) -> Predictor:
    """Returns the model with the preprocessing of its images, or what the caller passes in its place."""
    image_size = given = tagged = None
    if isinstance(preprocessing, Preprocessing):
        image_size, given = preprocessing.image_size, preprocessing
    elif not isinstance(preprocessing, str):
        image_size = preprocessing
    elif is_path(preprocessing):
        raise ValueError(
            "Expected preprocessing to be a Preprocessing, a tag or an image size, received the file "
            f"{preprocessing!r}. Pass weights.resolve.resolve(file).preprocessing for what it says."
        )
    else:
        tagged = resolve(preprocessing, None)
        given = tagged.preprocessing
    is_named = isinstance(model, str | os.PathLike)
    if is_named and is_path(model) and runtimes.is_exported(path := pathlib.Path(os.path.expanduser(model))):
        exported = runtimes.open_exported(path)
        own = runtimes.stored_preprocessing(exported.metadata)
        opened = predictor.predictor_of(exported, str(path), image_size, given or own, path)
    elif is_named or isinstance(model, ResolvedWeights):
        opened = predictor.open_predictor(model, image_size=image_size, classifier_activation=None)
    else:
        opened = predictor.predictor_of(model, getattr(model, "name", repr(model)), image_size, given)
    size = opened.preprocessing.image_size
    if tagged is not None:
        given = tagged.preprocessing_at(size)
    return opened if given is None else dataclasses.replace(opened, preprocessing=given.at(size))


def _with_classes_of(file: pathlib.Path | None, source: Source, num_outputs: int) -> Source:
    """Gives the classes of the data the numbers in the labels file beside a model's file, if there is one.

    Names of which it has none, as descriptions in place of folders, keep their order, which is said.
    """
    path = class_names.labels_beside(file)
    names = [] if path is None else class_names.from_lines(read_text(path))
    if names in ([], source.classes) or _imagenet_columns(_synsets(source.classes), num_outputs) is not None:
        return source
    if len(names) != num_outputs:
        raise ValueError(f"Expected {num_outputs} names in '{path}', one an output, received {len(names)}.")
    if not set(names) & set(source.classes):
        say(f"'{path}' names none of the data's classes, which are taken in their own order.")
        return source
    return with_classes(source, names)


def _synsets(classes: Sequence[str]) -> list[str]:
    """Returns class names with the numbers 0 to 999 taken for ImageNet's classes."""
    is_numbered = list(classes) == [str(number) for number in range(1000)]
    return class_names.synset_ids(1000) if is_numbered else list(classes)


def _subset_name(classes: Iterable[str]) -> str | None:
    text = "\n".join(sorted(classes)).encode("utf-8", "surrogateescape")
    return _SUBSETS.get(hashlib.sha256(text).hexdigest())


def _without_unused_classes(source: Source) -> Source:
    """Drops the 800 classes that ImageNet-A and -R have no images of; TensorFlow Datasets lists all 1000."""
    used = np.unique(source.labels)
    names = [source.classes[number] for number in used]
    if len(used) == len(source.classes) or _subset_name(names) is None:
        return source
    labels = np.searchsorted(used, source.labels).astype(np.int32)
    return dataclasses.replace(source, labels=labels, classes=names)


def _real_lists(source: Source, real_labels) -> list[tuple[int, ...]]:
    """Returns the ReaL labels, as class numbers of the data."""
    positions = _imagenet_columns(source.classes, 1000)
    if positions is None or len(positions) != 1000:
        raise ValueError(
            f"Expected data with ImageNet's 1000 classes for ReaL labels, received {len(source.classes)} "
            "classes. Pass ImageNet's validation images."
        )
    lists = imagenet.read_real_labels(source, None if real_labels is True else real_labels)
    of_position = np.argsort(positions)
    return [tuple(of_position[list(numbers)].tolist()) if numbers else () for numbers in lists]


def _real_scores(source, real, numbers, predictions) -> np.ndarray:
    """int8 (n,): 1 where the first prediction is a ReaL label, 0 where not, -1 where the image has none."""
    pairs = zip(numbers.tolist(), predictions[:, 0].tolist(), strict=True)
    return np.array([predicted in real[n] if real[n] else -1 for n, predicted in pairs], np.int8)
