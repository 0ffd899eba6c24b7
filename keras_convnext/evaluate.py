"""Top-1, top-5 and ReaL accuracy of a classifier: the only writer of scores.

images --data.batches--> uint8 (N, H, W, 3) --model--> outputs (N, K) --columns of the data's classes-->
rank of the label, first five classes --> Result --> a row of results.csv, files for a person (`reports`)
"""

import collections
import dataclasses
import datetime
import hashlib
import importlib
import itertools
import os
import pathlib
import platform
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import PIL

import keras_convnext
from keras_convnext import classifiers, distribution, machine, reports, runtimes
from keras_convnext.classifiers import TrainedClassifier
from keras_convnext.data import class_names, sources
from keras_convnext.data.sources import Source
from keras_convnext.quiet import is_set
from keras_convnext.results import (
    Result,
    append_result,
    check_complete,
    check_results_file,
    fingerprint,
    percentage,
)

DEFAULT_BATCH_SIZE = 64
_jax_steps: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

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
    weights: str | os.PathLike[str] | None = None,
    split: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    real_labels: str | os.PathLike[str] | bool | None = None,
    preparation: str | dict[str, Any] | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    results: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    host: int = 0,
    num_hosts: int = 1,
    progress: bool = True,
) -> Result:
    """Classifies the images of a data set and counts how often the model is right.

    A tag decides everything: the weights, the size of the images, how they are resized and cropped. Pixels
    are those of Pillow, bit for bit. An image counts for top-k when fewer than k classes have a larger
    output than its label, equal outputs being ordered by their class number, so that ties do not depend on
    the backend.

    Which outputs are compared, by the classes of the data:

    - WordNet ids that the model's 1000, 11821 or 21841 classes contain: the outputs of these classes alone.
      That is all of them for ImageNet on a model of 1000 classes, and 200 for ImageNet-A and -R, as in timm.
      Of the 1000 classes ImageNet-22k lacks one and timm's 12k subset seven: their images count as wrong. (To
      have images of few classes compared with all 1000, open them by
      `open_source(path, classes=synset_ids(1000))`.)
    - the numbers 0 to 999: as ImageNet's 1000 WordNet ids (ImageNetV2 as published).
    - any others: as many as the model has outputs, class i of the data being output i. Class folders are in
      the order of their sorted names.

    Images that cannot be decoded are left out of all counts and named in `Result.faults`.

    Reference: ReaL accuracy: Beyer et al., "Are we done with ImageNet?" (arXiv 2006.07159): the share of
    images with at least one ReaL label of which the predicted class is a label.

    Args:
        model: a tag, an architecture (its ImageNet weights), a weight file, a `.keras` file, a file that
            `export` wrote, which its own runtime runs, or a Keras model of (N, H, W, 3) pixels in 0..255.
        data: a path, see `sources.open_source`, or what that returns.
        weights: a weight file in place of the tag's own.
        split: split of `data`. Default: the validation split where the data has splits, else all.
        labels: label file for a flat folder, see `sources.open_source`.
        real_labels: path of ReaL's real.json, or True where the lists are in the data (imagenet2012_real of
            TensorFlow Datasets).
        preparation: a tag whose preparation of images is used, or a dict with some of the arguments of
            `preprocess.preprocess_image` in place of the tag's. For a Keras model and a `.keras` file, which
            do not say how they were trained, the default is that function's.
        image_size: side in pixels, in place of the tag's.
        batch_size: images in a batch of this host. Default 64. The last batch is filled up.
        limit: evaluate only that many examples, spread evenly over the data.
        results: CSV file to which a row is added, see `results.append_result`. Default: none.
        output: folder for the files of `reports.write_reports`. Default: none.
        max_faults: share of the images that may be damaged, 0 to 1.
        host: number of this host, 0 to num_hosts - 1.
        num_hosts: hosts that evaluate a part of the data each; see `results.combine`.
        progress: whether to show progress on stderr when that is a terminal.

    Returns:
        `Result`.

    Raises:
        ValueError: the model has no classifier, its outputs do not fit the classes of the data, are NaN, or
            an argument is out of range.
        SourceError: the data cannot be used.
        DataError: more images are damaged than `max_faults` allows.
        ImportError: TensorFlow, which reads the images, or matplotlib, which draws for `output`, is not
            installed.

    Example:
        result = evaluate("convnext_tiny.fb_in1k", "ILSVRC2012_img_val.tar", results="results.csv")
        result.top1, len(result.numbers)          # percent, 50000
    """
    _check_arguments(batch_size, limit, results, output, num_hosts)
    if results is not None:
        check_results_file(results)
    if output is not None:
        reports.check_output(output)
    batches = import_batches()
    if isinstance(data, Source):
        if labels is not None:
            raise ValueError(f"Expected labels=None beside an open source, received {labels!r}.")
        source = data
    else:
        if split is None and sources.list_splits(data):
            split = "validation"
        source = sources.open_source(data, split, labels=labels)
    classifier = _open(model, weights, image_size, len(source.classes), preparation)
    source = _without_unused_classes(dataclasses.replace(source, classes=_synsets(source.classes)))
    columns, outputs_text = match_classes(
        source.classes, classifier.model.output_shape[-1], classifier.class_list
    )
    real = None if real_labels in (None, False) else _real_lists(source, real_labels)
    if limit is not None and limit < len(source):
        chosen = np.arange(limit) * len(source) // limit
        source = sources.take(source, chosen)
        real = real if real is None else [real[number] for number in chosen]
    batch_size = batch_size or DEFAULT_BATCH_SIZE
    faults = batches.Faults(source, max_faults)
    dataset = batches.eval_batches(
        source,
        batch_size=batch_size,
        host=host,
        num_hosts=num_hosts,
        faults=faults,
        **classifier.preparation,
    )
    settings = {
        **model_settings(classifier),
        **environment(),
        **data_settings(source, split),
        **preparation_settings(classifier),
        "outputs": outputs_text,
        "batch_size": str(batch_size),
    }
    shown = ImageProgress(-(-len(source) // num_hosts), progress)
    try:
        scores = _run(classifier.model, dataset, source, columns, shown)
    except batches.tf.errors.OpError:
        if output is not None:
            reports.write_faults(output, faults.report())
        faults.check()  # says it in its own words
        raise
    result = Result(
        settings=settings,
        source=source,
        real=None if real is None else _real_scores(source, real, scores["numbers"], scores["predictions"]),
        faults=faults.report(),
        num_skipped=len(faults),
        **scores,
    )
    if num_hosts == 1:
        check_complete(result)
    if output is not None:
        reports.write_reports(output, result)
    if results is not None:
        append_result(results, result)
    return result


def match_classes(
    classes: Sequence[str], num_outputs: int, class_list: int | str | None = None
) -> tuple[np.ndarray | None, str]:
    """Finds the output of a model for each class of a data set; see `evaluate`.

    Args:
        classes: names of the classes of the data.
        num_outputs: width of the classifier.
        class_list: which list of `class_names` its outputs follow. Default None: that of its width, if any.

    Returns:
        int64 (len(classes),), -1 for a class without output, or None when class i is output i of all; and
        that in words.

    Raises:
        ValueError: they do not fit.
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
    text = f"{np.sum(columns >= 0)} of {num_outputs}, by WordNet id"
    if _subset_digest(classes) in _SUBSETS:
        text += f" ({_SUBSETS[_subset_digest(classes)]})"
    missing = [name for name, column in zip(classes, columns, strict=True) if column < 0]
    return columns, text + (f"; none for {' '.join(missing)}" if missing else "")


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


# What is evaluated.


def _check_arguments(batch_size, limit, results, output, num_hosts) -> None:
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        is_count = isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0
        if value is not None and not is_count:
            raise ValueError(f"Expected {name} to be a positive integer or None, received {value!r}.")
    if num_hosts != 1 and (results is not None or output is not None):
        raise ValueError(
            f"Expected results=None and output=None on one of num_hosts={num_hosts} hosts, whose figures are "
            "of a part of the data. Call combine, then append_result and write_reports."
        )


def import_batches() -> Any:
    """Returns the module `data.batches`, or says what it needs.

    Raises:
        ImportError: TensorFlow is not installed.
    """
    try:
        import tensorflow  # noqa: F401

        from keras_convnext.data import batches
    except ImportError as error:
        raise ImportError(
            "Images are read with TensorFlow, whatever the Keras backend, and it is not installed. Run "
            "pip install tensorflow-cpu."
        ) from error
    return batches


def _open(model, weights, image_size, num_classes, preparation) -> TrainedClassifier:
    row = classifiers.row_for(preparation) if isinstance(preparation, str) else None
    default_size = classifiers.DEFAULT_SIZE if row is None else row.image_size
    if isinstance(model, str | os.PathLike) and weights is None and runtimes.is_exported(model):
        classifier = _open_exported(pathlib.Path(model), image_size, default_size)
    elif isinstance(model, str | os.PathLike):
        classifier = classifiers.open_classifier(
            os.fspath(model), weights, image_size=image_size, classes=num_classes, classifier_activation=None
        )
    else:
        if weights is not None:
            raise ValueError(f"Expected weights=None beside a Keras model, received {weights!r}.")
        size = classifiers.check_model(model, image_size, getattr(model, "name", repr(model)), default_size)
        classifier = TrainedClassifier(model, {"image_size": size}, None, None)
    if row is not None:
        preparation = classifiers.preparation(row, classifier.preparation["image_size"])
    changed = classifier.preparation | (preparation or {})
    classifiers.check_model(classifier.model, changed["image_size"], "the model")
    return dataclasses.replace(classifier, preparation=changed)


def _open_exported(path: pathlib.Path, image_size, default_size) -> TrainedClassifier:
    """A file that `export` wrote, with the preparation that is stored in it."""
    exported = runtimes.open_exported(path)
    prepared = exported.metadata.get("input", {}).get("preparation", {})
    size = classifiers.check_model(exported, image_size, str(path), default_size)
    return TrainedClassifier(exported, {**prepared, "image_size": size}, None, path)


def _synsets(classes: Sequence[str]) -> list[str]:
    """Returns class names with the numbers 0 to 999 taken for ImageNet's classes."""
    is_numbered = list(classes) == [str(number) for number in range(1000)]
    return class_names.synset_ids(1000) if is_numbered else list(classes)


def _subset_digest(classes: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(classes)).encode("utf-8")).hexdigest()


def _without_unused_classes(source: Source) -> Source:
    """Drops the 800 classes that ImageNet-A and -R have no images of; TensorFlow Datasets lists all 1000."""
    used = np.unique(source.labels)
    names = [source.classes[number] for number in used]
    if len(used) == len(source.classes) or _subset_digest(names) not in _SUBSETS:
        return source
    labels = np.searchsorted(used, source.labels).astype(np.int32)
    return dataclasses.replace(source, labels=labels, classes=names)


def _real_lists(source: Source, real_labels) -> list[tuple[int, ...]]:
    """Returns the ReaL labels, as class numbers of the data."""
    positions = sources.imagenet_class_numbers(source.classes, 1000)
    if positions is None or len(positions) != 1000:
        raise ValueError(
            f"Expected data with ImageNet's 1000 classes for ReaL labels, received {len(source.classes)} "
            "classes. Pass ImageNet's validation images."
        )
    lists = sources.read_real_labels(source, None if real_labels is True else real_labels)
    of_position = np.argsort(positions)
    return [tuple(of_position[list(numbers)].tolist()) if numbers else () for numbers in lists]


# Running the model.


def _run(model, dataset, source: Source, columns, progress: "ImageProgress") -> dict[str, Any]:
    """Returns the scores of every example that could be decoded, and the time it took."""
    numbers, labels, ranks, predictions = [], [], [], []
    begin = time.perf_counter()
    first_end, first_images, count = begin, 0, 0
    for index, (batch, outputs) in enumerate(with_outputs(model, dataset.as_numpy_iterator())):
        mask = batch["mask"]
        outputs = outputs[mask]
        if columns is not None:
            outputs = np.where(columns < 0, np.float32("-inf"), outputs[:, columns])
        kept = batch["numbers"][mask]
        check_outputs(outputs, index, kept, source)
        numbers.append(kept)
        labels.append(batch["labels"][mask])
        ranks.append(label_ranks(outputs, labels[-1]))
        predictions.append(best_classes(outputs, 5))
        count += len(kept)
        progress.show(count)
        if index == 0:
            first_end, first_images = time.perf_counter(), count
    progress.close()
    end = time.perf_counter()
    # The first batch is left out of the speed, as the model is compiled in it.
    images_timed, begin_timed = (count - first_images, first_end) if count > first_images else (count, begin)
    width = min(5, len(source.classes))
    return {
        "numbers": np.concatenate(numbers or [np.zeros(0, np.int64)]),
        "labels": np.concatenate(labels or [np.zeros(0, np.int32)]),
        "ranks": np.concatenate(ranks or [np.zeros(0, np.int32)]),
        "predictions": np.concatenate(predictions or [np.zeros((0, width), np.int32)]),
        "seconds": end - begin,
        "images_per_second": images_timed / max(end - begin_timed, 1e-9),
    }


def validate(
    model: Any,
    dataset: Any,
    after_batch: Callable[[], None] = lambda: None,
    gathered: Callable[[np.ndarray], list[np.ndarray]] = lambda array: [array],
) -> dict[str, float]:
    """Scores a classifier on batches that are made anew at each call, as training does after each epoch.

    Args:
        model: from (N, H, W, 3) pixels in 0..255 to logits (N, K), class i of the data being output i.
        dataset: what `batches.eval_batches` returns.
        after_batch: called after each batch; may raise to end the evaluation.
        gathered: from an array of this process's images to those of all processes.

    Returns:
        {"loss": mean cross-entropy of the labels without smoothing, "top1": percent, "top5": percent, "n":
        number of images}. NaN where the model gives NaN or the data has no image.
    """
    losses, ranks = [np.zeros(0)], [np.zeros(0, np.int32)]
    for batch, outputs in with_outputs(model, dataset.as_numpy_iterator()):
        after_batch()
        logits, labels = outputs[batch["mask"]].astype(np.float64), batch["labels"][batch["mask"]]
        largest = logits.max(axis=1, keepdims=True)
        own = np.take_along_axis(logits, labels[:, None], axis=1)
        losses.append((np.log(np.exp(logits - largest).sum(axis=1, keepdims=True)) + largest - own)[:, 0])
        ranks.append(np.where(np.isnan(logits).any(axis=1), logits.shape[1], label_ranks(logits, labels)))
    loss, rank = (np.concatenate(gathered(np.concatenate(parts))) for parts in (losses, ranks))
    mean = float(loss.mean()) if len(loss) else float("nan")
    return {"loss": mean, "top1": percentage(rank < 1), "top5": percentage(rank < 5), "n": len(rank)}


def with_outputs(model: Any, batches: Iterator[dict]) -> Iterator[tuple[dict, np.ndarray]]:
    """Yields each batch with its outputs; the next is on the device already while these are worked on."""
    forward = _forward(model)

    def begin(batch: dict) -> tuple[dict, Any]:
        return batch, forward(distribution.divided(classifiers.for_channels(batch["images"], model)))

    for batch in itertools.islice(batches, 1):  # waited for, as the model is compiled in it
        yield batch, distribution.rows(begin(batch)[1])
    begun = None
    for batch in batches:
        ended, begun = begun, begin(batch)
        if ended is not None:
            yield ended[0], distribution.rows(ended[1])
    if begun is not None:
        yield begun[0], distribution.rows(begun[1])


def _forward(model) -> Callable[[np.ndarray], Any]:
    """Returns the function from images to outputs that does not wait for an accelerator to finish."""
    if isinstance(model, runtimes.ExportedModel):
        return model
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        def forward(images):
            with torch.inference_mode():
                return model(images, training=False)

        return forward
    if backend == "jax":
        state = [[v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)]
        step = _jax_step(model)
        return lambda images: step(state, images)
    if backend == "tensorflow":
        if (step := distribution.forward(model)) is not None:
            return step
        model.make_predict_function()
        return lambda images: model.predict_function([(images,)])
    return model.predict_on_batch


def _jax_step(model: Any) -> Callable[[Any, np.ndarray], Any]:
    """Returns the compiled function from weights and images to outputs; the same one for the same model."""
    import jax

    if model not in _jax_steps:
        reference: Any = weakref.ref(model)  # the table must not keep the model

        def step(state, images):
            return reference().stateless_call(*state, images, training=False)[0]

        _jax_steps[model] = jax.jit(step, out_shardings=distribution.by_rows())
    return _jax_steps[model]


def label_ranks(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts the classes that come before the label: those with a larger output, or an equal one and a
    smaller number.

    Args:
        outputs: float32 (N, K), without NaN.
        labels: int (N,), 0 to K - 1.

    Returns:
        int32 (N,), 0 where the label is first.
    """
    own = np.take_along_axis(outputs, labels[:, None], axis=1)
    before = (outputs > own) | ((outputs == own) & (np.arange(outputs.shape[1]) < labels[:, None]))
    return before.sum(axis=1, dtype=np.int32)


def best_classes(outputs: np.ndarray, count: int) -> np.ndarray:
    """Finds the classes with the largest outputs, in the order of `label_ranks`.

    Returns:
        int32 (N, min(count, K)).
    """
    count = min(count, outputs.shape[1])
    best = np.empty((len(outputs), count), np.int32)
    # Only what can be among them is sorted: faster than all of 1000 outputs.
    bounds = np.partition(outputs, -count, axis=1)[:, -count]
    for place, (row, bound) in enumerate(zip(outputs, bounds, strict=True)):
        candidates = np.flatnonzero(row >= bound)
        best[place] = candidates[np.argsort(-row[candidates], kind="stable")[:count]]
    return best


def check_outputs(outputs: np.ndarray, index: int, numbers: np.ndarray, source: Source) -> None:
    bad = np.isnan(outputs).any(axis=1)
    if bad.any():
        raise ValueError(
            f"Expected numbers from the model, received NaN for {int(bad.sum())} of the {len(bad)} images of "
            f"batch {index}, the first of them '{source.name(int(numbers[bad][0]))}'. Check the weights; "
            "with a float16 policy try bfloat16 or float32."
        )


def _real_scores(source, real, numbers, predictions) -> np.ndarray:
    """int8 (n,): 1 where the first prediction is a ReaL label, 0 where not, -1 where the image has none."""
    scores = np.full(len(numbers), -1, np.int8)
    for place, (number, predicted) in enumerate(
        zip(numbers.tolist(), predictions[:, 0].tolist(), strict=True)
    ):
        if real[number]:
            scores[place] = predicted in real[number]
    return scores


# What a row of results says besides the scores.


def model_settings(classifier: TrainedClassifier) -> dict[str, str]:
    row, file = classifier.row, classifier.file
    if isinstance(classifier.model, runtimes.ExportedModel) and file is not None:
        metadata = classifier.model.metadata
        return {
            "model": file.name,
            "architecture": metadata.get("name", ""),
            "weights": file.name,
            "weights_sha256": _file_digest(file),
            "licence": metadata.get("licence") or "",
            "dtype_policy": metadata.get("precision", ""),
        }
    if row is not None:
        name, architecture = row.tag, row.architecture
    else:
        architecture = classifier.model.name
        name = architecture if file is None else file.name
    return {
        "model": name,
        "architecture": architecture,
        "weights": file.name if file is not None else "",
        "weights_sha256": _file_digest(file) if file is not None else _arrays_digest(classifier.model),
        "licence": row.licence if row is not None else "",
        "dtype_policy": classifier.model.dtype_policy.name,
    }


def _file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {_file_digest(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _arrays_digest(model: Any) -> str:
    digest = hashlib.sha256()
    for variable in model.weights:
        array = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        digest.update(f"{variable.path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """Returns versions, commit and hardware, as in the columns of `results.COLUMNS`."""
    import tensorflow as tf

    backend = importlib.import_module(keras.backend.backend())
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "keras_convnext": keras_convnext.__version__,
        "commit": machine.commit(),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "backend_version": str(backend.__version__),
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "cpu": machine.cpu_name(),
        "cores": str(machine.available_cores()),
        "accelerators": _accelerators(backend),
    }


def _accelerators(backend: Any) -> str:
    """Returns the devices besides the CPU, such as "8 x NVIDIA A100-SXM4-40GB"."""
    names: list[str] = []
    if backend.__name__ == "jax":
        names = [device.device_kind for device in backend.local_devices() if device.platform != "cpu"]
    elif backend.__name__ == "torch":
        names = [backend.cuda.get_device_name(number) for number in range(backend.cuda.device_count())]
    elif backend.__name__ == "tensorflow":
        devices = [device for device in backend.config.get_visible_devices() if device.device_type != "CPU"]
        details = [backend.config.experimental.get_device_details(device) for device in devices]
        names = [
            detail.get("device_name", device.name) for detail, device in zip(details, devices, strict=True)
        ]
    return "; ".join(f"{count} x {name}" for name, count in collections.Counter(names).items())


def data_settings(source: Source, split: str | None) -> dict[str, str]:
    parts = pathlib.Path(os.path.abspath(source.path)).parts
    return {
        "data_kind": source.kind,
        # The folder of TensorFlow Datasets is named after the version, in one with the name of the set.
        "data": "/".join(parts[-2:] if source.kind == "tfds" else parts[-1:]),
        "split": split or "",
        "data_sha256": fingerprint(source),
    }


def preparation_settings(classifier: TrainedClassifier) -> dict[str, str]:
    chosen = {"crop": 0.875, "resize_mode": "shorter_side", "resize_size": None, "interpolation": "bicubic"}
    chosen |= classifier.preparation
    size = chosen.pop("image_size")
    sides = size if isinstance(size, tuple) else (size, size)
    text = str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}"
    return {"image_size": text} | {
        name: "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
        for name, value in chosen.items()
    }


class ImageProgress:
    """One line on stderr, rewritten as batches are done; nothing when nobody watches."""

    def __init__(self, total: int, is_wanted: bool) -> None:
        self.total = total
        self.begin = self.shown = time.monotonic()
        self.is_watched = is_wanted and sys.stderr.isatty() and not is_set("KERAS_CONVNEXT_QUIET")

    def show(self, count: int) -> None:
        now = time.monotonic()
        if not self.is_watched or now - self.shown < 0.5:
            return
        self.shown = now
        rate = count / (now - self.begin)
        left = datetime.timedelta(seconds=round((self.total - count) / max(rate, 1e-9)))
        print(
            f"\r{count} of {self.total} images, {rate:.0f} images/s, {left} left \033[K",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self.is_watched and self.shown > self.begin:
            print(file=sys.stderr)
