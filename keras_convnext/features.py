"""How good frozen features are: by their nearest neighbours, and by a linear classifier on them.

images --data.batches--> pixels --model without its classifier--> features (N, C) --> k-NN or linear probe

Both judge weights that have no classifier of their own, such as DINOv3's and FCMAE's, and compare others on
equal terms. Features are computed once, without augmentation, and can be kept in a folder.

The feature of an image is what the classifier of the architecture would see: the last map, averaged over its
positions and layer-normalised (norm first in the CLIP-trained "norm_first" variants). FCMAE files have no
final norm: theirs starts with scale 1 and offset 0, so the mean map of an image is shifted and scaled to mean
0 and variance 1 over its channels. DINOv3's files bring the norm they were trained with.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_convnext import classifiers, downloads, keras_files, models, state_dicts
from keras_convnext import evaluate as evaluating
from keras_convnext.classifiers import TrainedClassifier
from keras_convnext.data import preprocess, sources
from keras_convnext.data.sources import Source
from keras_convnext.files import replacing_file
from keras_convnext.results import percentage

_CACHE_VERSION = 1
_SPARE_NEIGHBOURS = 16  # ranked exactly beside those wanted, as the first ranking is in float32
_EXACT_BLOCK = 16  # images whose candidates are ranked exactly at a time
_QUERY_BLOCK = 1024  # images compared at a time, so that a block of similarities takes 256 MB
_TRAIN_BLOCK = 65536


# What is evaluated, and how.


@dataclasses.dataclass(frozen=True)
class NearestNeighbours:
    """The settings of a k-NN evaluation, as plain values.

    Reference: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
    (arXiv:1805.01978), section 3.4; numbers and temperature: facebookresearch/dino at 04c0ad9, eval_knn.py.

    Args:
        model: str, a tag, an architecture (its ImageNet weights), a weight file or a `.keras` file; "" where
            the function is given a Keras model.
        weights: str, a weight file in place of the model's own; "" for none.
        data: str, path of the images, see `sources.open_source`; "" where the function is given sources.
        train_split: str, split with the images that are compared with; "" for "train", or all where the data
            has no splits.
        val_split: str, split that is classified; "" for the data's validation or test split, or where there
            is none, for a part held out of the training images.
        validation_fraction: float in (0, 1), that part, by class and seed (`sources.hold_out`). Unused where
            the data has a split to classify.
        image_size: int, side in pixels; 0 for that of the weights.
        crop: float in (0, 1], as in `preprocess.preprocess_image`; 0 for that of the weights.
        resize_mode: "shorter_side" or "squash"; "" for that of the weights.
        resize_size: int, pixels; 0 for that of the weights, or where a key above is set, from the crop.
        interpolation: "bicubic" or "bilinear"; "" for that of the weights.
        neighbours: tuple of int, the numbers of neighbours that vote. Default (10, 20, 100, 200), as DINO's;
            20 is usually the best there.
        temperature: float above 0, of a neighbour's vote exp(similarity / temperature). Default 0.07.
        batch_size: int, images of one forward pass.
        seed: int, of the part held out.

    Raises:
        ValueError: a value is outside its range; the message says which are allowed.

    Example:
        NearestNeighbours(model="convnext_tiny.dinov3_lvd1689m", data="flowers", neighbours=(20,))
    """

    model: str = ""
    weights: str = ""
    data: str = ""
    train_split: str = ""
    val_split: str = ""
    validation_fraction: float = 0.2
    image_size: int = 0
    crop: float = 0.0
    resize_mode: str = ""
    resize_size: int = 0
    interpolation: str = ""
    neighbours: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _check_common(self)
        if not self.neighbours:
            raise ValueError("Expected one number of neighbours or more, received none. Pass (20,).")
        for number in self.neighbours:
            _check_at_least("neighbours", number, 1)
        _check_above_zero("temperature", self.temperature)


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """The settings of a linear probe, as plain values.

    Reference: facebookresearch/dinov2 at 05c66df, dinov2/eval/linear.py: SGD with momentum 0.9, no weight
    decay, a cosine to 0, kernels drawn with a deviation of 0.01, the best of many rates (given there per 256
    images of a batch). Three things are different here: features are those of the undistorted images (there:
    of random crops, computed anew each epoch); the rate is chosen on a part of the training images (there: on
    the images that the score is of); a run has as many epochs of the data as are asked for.

    Args:
        model, weights, data, train_split, val_split, validation_fraction, image_size, crop, resize_mode,
            resize_size, interpolation, batch_size: as in `NearestNeighbours`.
        learning_rates: tuple of float above 0, the peak rates that are tried, at this `probe_batch_size`.
            Default DINOv2's 13, 1e-5 to 0.1.
        selection_fraction: float in (0, 1), share of the training images, by class and seed, that the rate is
            chosen on. Then the classifier is trained on all of them with that rate.
        epochs: int, passes over the training features. Default 100, as in facebookresearch/dino.
        probe_batch_size: int, features of one step; all where there are fewer. Default 256.
        momentum: float in [0, 1). Default 0.9.
        weight_decay: float from 0 up, L2 penalty of the kernel. Default 0.
        seed: int, of the parts held out, the first kernel and the order of the features.

    Raises:
        ValueError: a value is outside its range; the message says which are allowed.

    Example:
        LinearProbe(model="convnextv2_tiny.fcmae", data="flowers", epochs=20)
    """

    model: str = ""
    weights: str = ""
    data: str = ""
    train_split: str = ""
    val_split: str = ""
    validation_fraction: float = 0.2
    image_size: int = 0
    crop: float = 0.0
    resize_mode: str = ""
    resize_size: int = 0
    interpolation: str = ""
    learning_rates: tuple[float, ...] = (
        1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1
    )  # fmt: skip
    selection_fraction: float = 0.1
    epochs: int = 100
    probe_batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _check_common(self)
        if not self.learning_rates:
            raise ValueError("Expected one learning rate or more, received none. Pass (0.01,).")
        for rate in self.learning_rates:
            _check_above_zero("learning_rates", rate)
        _check_share("selection_fraction", self.selection_fraction)
        _check_at_least("epochs", self.epochs, 1)
        _check_at_least("probe_batch_size", self.probe_batch_size, 1)
        if not (_is_number(self.momentum) and 0 <= self.momentum < 1):
            raise ValueError(f"Expected momentum in [0, 1), received {self.momentum!r}. Pass 0.9.")
        if not (_is_number(self.weight_decay) and 0 <= self.weight_decay < math.inf):
            raise ValueError(f"Expected weight_decay from 0 up, received {self.weight_decay!r}. Pass 0.0.")


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """The features of the images of a source that could be decoded.

    Attributes:
        features: float32 (n, C).
        labels: int32 (n,), class numbers of the source.
        numbers: int64 (n,), places of the images in the source, ascending.
        faults: reason by the name of each image that could not be decoded.
    """

    features: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray
    faults: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Score:
    """The accuracy of one number of neighbours, or one learning rate, in percent.

    Attributes:
        setting: the number of neighbours, or the learning rate.
        top1: share of the images whose label came first.
        top5: share of the images whose label was among the first five.
        selection_top1: of a learning rate, the top-1 accuracy on the part of the training images that it is
            chosen on; None for a number of neighbours.
    """

    setting: float
    top1: float
    top5: float
    selection_top1: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureResult:
    """What an evaluation by features found.

    Attributes:
        settings: the `NearestNeighbours` or `LinearProbe` that it was made by.
        environment: text by the columns of results.csv that describe model, data, preparation and machine.
        scores: one for each number of neighbours, or for each learning rate, in the order of the settings.
        top1, top5: in percent; of k-NN those of 20 neighbours, else of the first number; of a probe those of
            the classifier trained on all training images with the chosen rate.
        num_train: images that were compared with, or trained on.
        n: images that were classified.
        faults: reason by the name of each image, of either part, that could not be decoded.
        seconds: time for all.
        chosen: of a probe, the learning rate; of k-NN, the number of neighbours of `top1`.
        kernel: float32 (C, classes), of a probe's final classifier; None for k-NN.
        bias: float32 (classes,), likewise.
    """

    settings: NearestNeighbours | LinearProbe
    environment: dict[str, str]
    scores: tuple[Score, ...]
    top1: float
    top5: float
    num_train: int
    n: int
    faults: dict[str, str]
    seconds: float
    chosen: float
    kernel: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def advice(self) -> str:
        """What to try next, where the best rate is at the edge of those that were tried; "" else."""
        rates = [score.setting for score in self.scores]
        if self.kernel is None or min(rates) < self.chosen < max(rates):
            return ""
        direction = "larger" if self.chosen == max(rates) else "smaller"
        return (
            f"The best learning rate, {self.chosen:g}, is at the edge of those tried: try {direction} ones."
        )

    def report(self) -> dict[str, Any]:
        """Returns all of it but the classifier, as JSON takes it."""
        name = "neighbours" if isinstance(self.settings, NearestNeighbours) else "learning_rate"
        scores = []
        for score in self.scores:
            row = {name: score.setting, "top1": score.top1, "top5": score.top5}
            if score.selection_top1 is not None:
                row["selection_top1"] = score.selection_top1
            scores.append(row)
        return self.environment | {
            "settings": _as_json(dataclasses.asdict(self.settings)),
            name: self.chosen,
            "top1": self.top1,
            "top5": self.top5,
            "scores": scores,
            "num_train": self.num_train,
            "n": self.n,
            "skipped": len(self.faults),
            "seconds": self.seconds,
            "advice": self.advice,
            "faults": self.faults,
        }


def nearest_neighbours(
    settings: NearestNeighbours,
    *,
    model: Any = None,
    data: tuple[Source, Source] | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    progress: bool = True,
) -> FeatureResult:
    """Classifies images by the training images whose features are nearest.

    The nearest are those of largest cosine similarity; each votes for its class with the weight
    exp(similarity / temperature). An image counts for top-5 when fewer than 5 classes have more votes than
    its label, equal ones being ordered by their class number; a label without any vote never counts.

    Reference: Wu et al. 2018 (arXiv:1805.01978), section 3.4; facebookresearch/dino at 04c0ad9, eval_knn.py,
    where a label without votes may count for top-5 by the order of a sort.

    Args:
        settings: what to compare, and how.
        model: `keras.Model` of (N, H, W, 3) pixels in 0..255 to features (N, C), in place of
            `settings.model`. A classifier of this package gives the features in front of its classifier.
        data: (training source, source to classify) in place of `settings.data` and its splits. The second has
            the classes of the first.
        cache: folder in which features are kept; a second call with the same model, images and preparation
            takes them from there, and nothing else does. Default: none are kept.
        max_faults: share of the images that may be damaged, 0 to 1.
        progress: whether to show progress on stderr when that is a terminal.

    Returns:
        `FeatureResult`.

    Raises:
        ValueError: the model has no features (N, C), they are NaN, or there are fewer training images than
            neighbours are asked for.
        SourceError: the data cannot be used.
        DataError: more images are damaged than `max_faults` allows.
        ImportError: TensorFlow, which reads the images, is not installed.

    Example:
        result = nearest_neighbours(NearestNeighbours(model="convnext_tiny.fb_in1k", data="flowers"))
        result.top1, [(score.setting, score.top1) for score in result.scores]
    """
    begin = time.perf_counter()
    train, test, environment = _both_features(settings, model, data, cache, max_faults, progress)
    _, source = train
    labels = test[0].labels
    ranks = neighbour_ranks(
        train[0].features,
        train[0].labels,
        test[0].features,
        labels,
        len(source.classes),
        settings.neighbours,
        settings.temperature,
    )
    scores = tuple(
        Score(number, percentage(ranks[number] < 1), percentage(ranks[number] < 5))
        for number in settings.neighbours
    )
    headline = next((score for score in scores if score.setting == 20), scores[0])
    return FeatureResult(
        settings=settings,
        environment=environment,
        scores=scores,
        top1=headline.top1,
        top5=headline.top5,
        num_train=len(train[0].labels),
        n=len(labels),
        faults=train[0].faults | test[0].faults,
        seconds=time.perf_counter() - begin,
        chosen=headline.setting,
    )


def linear_probe(
    settings: LinearProbe,
    *,
    model: Any = None,
    data: tuple[Source, Source] | None = None,
    cache: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    progress: bool = True,
) -> FeatureResult:
    """Trains a linear classifier on frozen features and measures its accuracy.

    A part of the training images is held out; one classifier a learning rate is trained on the rest. The rate
    with the best top-1 accuracy on the part held out, the smaller of equals, is taken to train the final
    classifier on all training images. The images that the scores are of choose nothing.

    Reference: see `LinearProbe`.

    Args:
        settings: what to train, and how.
        model, data, cache, max_faults, progress: as in `nearest_neighbours`.

    Returns:
        `FeatureResult`: `top1` and `top5` are those of the final classifier, `kernel` and `bias` its weights;
        `scores` are those of the classifiers among which the rate was chosen.

    Raises:
        ValueError: the model has no features (N, C), they are NaN, or all rates lead to NaN.
        SourceError: the data cannot be used.
        DataError: more images are damaged than `max_faults` allows.
        ImportError: TensorFlow, which reads the images, is not installed.

    Example:
        result = linear_probe(LinearProbe(model="convnext_tiny.fb_in1k", data="flowers"))
        result.top1, result.chosen
    """
    begin = time.perf_counter()
    (train, source), (test, _), environment = _both_features(
        settings, model, data, cache, max_faults, progress
    )
    is_held_out = sources.held_out_mask(source, settings.selection_fraction, settings.seed)[train.numbers]
    num_classes = len(source.classes)

    def fit(rows: np.ndarray, rates: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        return fit_linear(
            train.features[rows],
            train.labels[rows],
            num_classes,
            learning_rates=rates,
            epochs=settings.epochs,
            batch_size=settings.probe_batch_size,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
        )

    def ranks(kernels: np.ndarray, biases: np.ndarray, features: np.ndarray, labels: np.ndarray) -> list:
        return [
            linear_ranks(kernel, bias, features, labels) for kernel, bias in zip(kernels, biases, strict=True)
        ]

    kernels, biases = fit(~is_held_out, settings.learning_rates)
    is_finite = np.isfinite(kernels).all(axis=(1, 2)) & np.isfinite(biases).all(axis=1)
    if not is_finite.any():
        raise ValueError(
            f"Expected a learning rate that leads to numbers, but all of {_joined(settings.learning_rates)} "
            f"lead to NaN or infinity. Pass smaller ones."
        )
    selection = ranks(kernels, biases, train.features[is_held_out], train.labels[is_held_out])
    scores = tuple(
        Score(rate, percentage(of_test < 1), percentage(of_test < 5), percentage(of_selection < 1))
        for rate, of_test, of_selection in zip(
            settings.learning_rates,
            ranks(kernels, biases, test.features, test.labels),
            selection,
            strict=True,
        )
    )
    # A rate that diverged may still be right by chance.
    candidates = [score for score, finite in zip(scores, is_finite, strict=True) if finite]
    chosen = max(candidates, key=lambda score: (score.selection_top1, -score.setting)).setting
    kernels, biases = fit(np.ones(len(train.labels), bool), [chosen])
    (final,) = ranks(kernels, biases, test.features, test.labels)
    return FeatureResult(
        settings=settings,
        environment=environment,
        scores=scores,
        top1=percentage(final < 1),
        top5=percentage(final < 5),
        num_train=len(train.labels),
        n=len(test.labels),
        faults=train.faults | test.faults,
        seconds=time.perf_counter() - begin,
        chosen=chosen,
        kernel=kernels[0],
        bias=biases[0],
    )


# Features.


def extract_features(
    model: Any,
    source: Source,
    preparation: dict[str, Any],
    *,
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    progress: bool = True,
) -> Features:
    """Computes the features of the images of a source.

    Pixels are those of Pillow, bit for bit, without augmentation. Images that cannot be decoded are left out
    and named in `faults`.

    Args:
        model: `keras.Model` of (N, H, W, 3 or 1) pixels in 0..255 to (N, C).
        source: what `sources.open_source` returns.
        preparation: arguments of `preprocess.preprocess_image`; with "image_size".
        batch_size: images of one forward pass.
        cache: folder in which features are kept, one file for each model, source and preparation. The name of
            a file says of what it is, so that those of another model, of changed images, another order or
            another backend are never taken. A damaged file is made again.
        max_faults: share of the images that may be damaged, 0 to 1.
        progress: whether to show progress on stderr when that is a terminal.

    Returns:
        `Features`.

    Raises:
        ValueError: the outputs of the model are not (N, C), or NaN.
        DataError: more images are damaged than `max_faults` allows.
        ImportError: TensorFlow, which reads the images, is not installed.

    Example:
        model = keras_convnext.load("convnext_atto.d2_in1k", include_top=False, pooling="avg")
        extract_features(model, open_source("flowers"), {"image_size": 224}).features.shape
    """
    batches = evaluating.import_batches()
    _check_outputs_shape(model)
    path = None
    if cache is not None:
        path = pathlib.Path(cache) / f"features-{_cache_key(model, source, preparation)}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _read_cache(path)
        if kept is not None:
            if len(kept.faults) > max_faults * len(source):
                path.unlink()  # the error below is that of images read now
            else:
                return kept
    faults = batches.Faults(source, max_faults)
    dataset = batches.eval_batches(source, batch_size=batch_size, faults=faults, **preparation)
    shown = evaluating.ImageProgress(len(source), progress)
    features, labels, numbers, count = [], [], [], 0
    try:
        outputs = evaluating.with_outputs(model, dataset.as_numpy_iterator())
        for index, (batch, values) in enumerate(outputs):
            mask = batch["mask"]
            kept_numbers = batch["numbers"][mask]
            evaluating.check_outputs(values[mask], index, kept_numbers, source)
            features.append(values[mask])
            labels.append(batch["labels"][mask])
            numbers.append(kept_numbers)
            count += len(kept_numbers)
            shown.show(count)
    except batches.tf.errors.OpError:
        faults.check()  # says it in its own words
        raise
    shown.close()
    result = Features(
        np.concatenate(features), np.concatenate(labels), np.concatenate(numbers), faults.report()
    )
    if path is not None:
        _write_cache(path, result)
    return result


def open_backbone(name: str, weights: str = "", *, image_size: int = 0) -> TrainedClassifier:
    """Builds the model that gives the features of a tag, an architecture or a file.

    Args:
        name: a tag, an architecture (its ImageNet weights), a weight file or a `.keras` file.
        weights: a weight file in place of the model's own; a `.keras` file is a `name`.
        image_size: side in pixels; 0 for that of the weights.

    Returns:
        `classifiers.TrainedClassifier`, whose model ends in features (N, C).

    Raises:
        ValueError: the name is unknown or the file does not fit; the message tells.
        FileNotFoundError: no such file.

    Example:
        open_backbone("convnext_tiny.fb_in1k").model.output_shape      # (None, 768)
    """
    if not weights and classifiers.names_file(name):
        name, weights = "", name
    path = models.existing_file(weights) if weights else None
    images = None if path is None else classifiers.described(path, name)
    if path is not None and path.suffix == ".keras":
        return _open_keras_backbone(path, name, image_size)
    if path is not None and not name:
        if keras_files.is_bare(path):
            raise ValueError(
                f"{path} does not say which architecture it holds. Pass that as model, the file as weights."
            )
        state = models.read_file(path)
        with models.naming(path):
            name = state_dicts.find_variant(state).name
    row = classifiers.row_for(name)
    size = image_size or (images or row).image_size
    model = models.load(
        name,
        weights=path or "default",
        include_top=False,
        pooling="avg",
        input_shape=(size, size, 3),
    )
    preparation = classifiers.preparation(images or row, size)
    if path is not None:
        return TrainedClassifier(model, preparation, None, path)
    return TrainedClassifier(model, preparation, row, downloads.find_local(**row.address))


def _open_keras_backbone(path: pathlib.Path, name: str, image_size: int) -> TrainedClassifier:
    try:
        model = without_classifier(keras.saving.load_model(path, compile=False))
    except Exception as error:  # damaged archives and unknown layers raise of many classes
        raise ValueError(f"{path} could not be opened as a Keras model: {error}") from error
    row = classifiers.described(path, name) or (classifiers.row_for(name) if name else None)
    default_size = classifiers.DEFAULT_SIZE if row is None else row.image_size
    with models.naming(path):
        _check_outputs_shape(model)
    size = classifiers.check_model(model, image_size or None, str(path), default_size)
    preparation = {"image_size": size} if row is None else classifiers.preparation(row, size)
    return TrainedClassifier(model, preparation, None, path)


def without_classifier(model: Any) -> Any:
    """Returns the part of a model of this package in front of its classifier; other models as they are.

    Args:
        model: `keras.Model`.

    Returns:
        `keras.Model` that shares the layers of `model`.
    """
    if not isinstance(model, models.ConvNeXt):
        return model
    names = {layer.name for layer in model.layers}
    first = next((name for name in ("pre_logits", "head") if name in names), None)
    if first is None:
        return model
    return keras.Model(model.input, model.get_layer(first).input, name=model.name)


def _both_features(settings, model, data, cache, max_faults, progress):
    """Returns the features and source of the training images, of those to classify, and the environment."""
    evaluating.import_batches()  # its absence is told before anything is downloaded
    train_source, test_source, split = _open_parts(settings) if data is None else (*data, "")
    if train_source.classes != test_source.classes:
        raise ValueError(
            f"Expected the same classes in both sources, received {len(train_source.classes)} and "
            f"{len(test_source.classes)}. Open the second with classes=first.classes."
        )
    if model is None:
        if not settings.model:
            raise ValueError("Expected a model, received model=''. Pass a tag, an architecture or a file.")
        backbone = open_backbone(settings.model, settings.weights, image_size=settings.image_size)
    else:
        if settings.model or settings.weights:
            raise ValueError(
                f"Expected settings without model and weights beside a Keras model, received "
                f"model={settings.model!r}, weights={settings.weights!r}."
            )
        model = without_classifier(model)
        _check_outputs_shape(model)
        size = classifiers.check_model(model, settings.image_size or None, "the model")
        backbone = TrainedClassifier(model, {"image_size": size}, None, None)
    preparation = _changed_preparation(backbone.preparation, settings)
    backbone = dataclasses.replace(backbone, preparation=preparation)
    parts = [
        (
            extract_features(
                backbone.model,
                source,
                preparation,
                batch_size=settings.batch_size,
                cache=cache,
                max_faults=max_faults,
                progress=progress,
            ),
            source,
        )
        for source in (train_source, test_source)
    ]
    environment = {
        **evaluating.model_settings(backbone),
        **evaluating.environment(),
        **evaluating.data_settings(test_source, split),
        **evaluating.preparation_settings(backbone),
        "batch_size": str(settings.batch_size),
    }
    return *parts, environment


def _open_parts(settings: NearestNeighbours | LinearProbe) -> tuple[Source, Source, str]:
    """Returns the training images, those to classify, and which these are in words."""
    if not settings.data:
        raise ValueError("Expected data, received data=''. Pass the path of the images.")
    splits = sources.list_splits(settings.data)
    train = sources.open_source(settings.data, settings.train_split or ("train" if splits else None))
    others = {sources.canonical_split(split) for split in splits} & {"validation", "test"}
    if settings.val_split or others:
        split = settings.val_split or "validation"  # which takes "test" where that is the only one
        return train, sources.open_source(settings.data, split, classes=train.classes), split
    parts = sources.hold_out(train, settings.validation_fraction, settings.seed)
    return (
        *parts,
        f"{settings.validation_fraction:g} of {settings.train_split or 'all'}, seed {settings.seed}",
    )


def _changed_preparation(preparation: dict[str, Any], settings: Any) -> dict[str, Any]:
    names = ("crop", "resize_mode", "resize_size", "interpolation")
    changes = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    if changes and "resize_size" not in changes and preparation.get("resize_size") is not None:
        changes["resize_size"] = None
    return preparation | changes


def _check_outputs_shape(model: Any) -> None:
    shape = getattr(model, "output_shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 2):
        raise ValueError(
            f"Expected a model that ends in features (N, C), received outputs {shape}. Build it with "
            "include_top=False, pooling='avg'."
        )


# Kept features.


def _cache_key(model: Any, source: Source, preparation: dict[str, Any]) -> str:
    """Returns a digest of all that features depend on."""
    chosen = {"crop": 0.875, "resize_mode": "shorter_side", "resize_size": None, "interpolation": "bicubic"}
    facts = [
        _CACHE_VERSION,
        keras.backend.backend(),
        model.dtype_policy.name,
        _architecture_text(model),
        evaluating._arrays_digest(model),
        _source_digest(source),
        chosen | preparation,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8")).hexdigest()[:32]


def _architecture_text(model: Any) -> str:
    try:
        return model.to_json()
    except (NotImplementedError, ValueError, TypeError):  # a model of the user's own class
        return f"{type(model).__name__} {model.input_shape} {model.output_shape}"


def _source_digest(source: Source) -> str:
    """Returns a digest of names, classes and order of the images, and of size and time of their files."""
    digest = hashlib.sha256()
    for number in np.unique(source.file_numbers).tolist():
        state = os.stat(source.files[number])
        digest.update(f"{number} {state.st_size} {state.st_mtime_ns}\n".encode())
    for name in ("file_numbers", "offsets", "lengths", "labels"):
        digest.update(np.ascontiguousarray(getattr(source, name)).tobytes())
    digest.update("\n".join(source.classes).encode("utf-8", "surrogateescape"))
    for number in range(len(source)):
        digest.update(f"{source.name(number)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _read_cache(path: pathlib.Path) -> Features | None:
    """Returns what a file holds; None when it is not there, or not whole."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Features(
                arrays["features"],
                arrays["labels"],
                arrays["numbers"],
                json.loads(arrays["faults"].tobytes().decode("utf-8", "surrogateescape")),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(path: pathlib.Path, features: Features) -> None:
    """Keeps features in one step; without space for them a line on stderr says so."""
    faults = json.dumps(features.faults).encode("utf-8", "surrogateescape")
    try:
        with replacing_file(path) as file:
            np.savez(
                file,
                features=features.features,
                labels=features.labels,
                numbers=features.numbers,
                faults=np.frombuffer(faults, np.uint8),
            )
    except OSError as error:
        print(
            f"The features of {len(features.labels)} images are not kept, and will be computed again: "
            f"'{path.parent}' cannot be written ({error.strerror}).",
            file=sys.stderr,
        )


# Nearest neighbours.


def neighbour_ranks(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    neighbours: Sequence[int],
    temperature: float,
) -> dict[int, np.ndarray]:
    """Ranks the labels of images among the classes that their nearest neighbours vote for.

    Args:
        train_features: float (N, C), of the images that vote.
        train_labels: int (N,), their classes, 0 to num_classes - 1.
        features: float (Q, C), of the images that are classified.
        labels: int (Q,), their classes.
        num_classes: number of classes.
        neighbours: numbers of neighbours, 1 to N each.
        temperature: float above 0.

    Returns:
        For each number of neighbours, int32 (Q,): classes with more votes than the label, or as many and a
        smaller number; `num_classes` where the label has no vote.

    Raises:
        ValueError: more neighbours are asked for than there are.
    """
    similarities, numbers = find_neighbours(train_features, features, max(neighbours))
    ranks = {number: np.empty(len(features), np.int32) for number in neighbours}
    for begin in range(0, len(features), _QUERY_BLOCK):
        rows = slice(begin, begin + _QUERY_BLOCK)
        for number, of_number in ranks.items():
            votes = count_votes(
                similarities[rows, :number], train_labels[numbers[rows, :number]], num_classes, temperature
            )
            own = np.take_along_axis(votes, labels[rows, None], axis=1)[:, 0]
            of_number[rows] = np.where(own > 0, evaluating.label_ranks(votes, labels[rows]), num_classes)
    return ranks


def find_neighbours(
    train_features: np.ndarray,
    features: np.ndarray,
    count: int,
    *,
    query_block: int = _QUERY_BLOCK,
    train_block: int = _TRAIN_BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the training images of largest cosine similarity.

    Similarities of all pairs are computed block by block on the backend's device, in float32. What comes near
    the first `count` is then compared in float64, so that neither blocks nor backend decide the order.

    Args:
        train_features: float (N, C).
        features: float (Q, C).
        count: neighbours of each image, 1 to N.
        query_block: images whose neighbours are looked for at a time.
        train_block: training images that are looked at at a time.

    Returns:
        float64 (Q, count), similarities in [-1, 1], the largest first, and int64 (Q, count), rows of
        `train_features`; of equal similarities the smaller row comes first.

    Raises:
        ValueError: `count` is not in 1 to N, or a feature is not finite.
    """
    if not 1 <= count <= len(train_features):
        raise ValueError(
            f"Expected 1 to {len(train_features)} neighbours, the number of training images, received "
            f"{count}. Pass smaller numbers of neighbours."
        )
    train, queries = _normalised(train_features), _normalised(features)
    kept = min(count + _SPARE_NEIGHBOURS, len(train))
    best_values = np.empty((len(queries), 0), np.float32)
    best_rows = np.empty((len(queries), 0), np.int64)
    with _full_precision():
        for begin in range(0, len(train), train_block):
            block = ops.transpose(ops.convert_to_tensor(train[begin : begin + train_block]))
            found = [
                ops.top_k(ops.matmul(ops.convert_to_tensor(queries[first : first + query_block]), block), k)
                for k in [min(kept, block.shape[1])]
                for first in range(0, len(queries), query_block)
            ]
            values = np.concatenate([ops.convert_to_numpy(values) for values, _ in found])
            rows = begin + np.concatenate([ops.convert_to_numpy(rows) for _, rows in found]).astype(np.int64)
            best_values = np.concatenate([best_values, values], axis=1)
            best_rows = np.concatenate([best_rows, rows], axis=1)
            order = np.argsort(-best_values, axis=1, kind="stable")[:, :kept]
            best_values = np.take_along_axis(best_values, order, axis=1)
            best_rows = np.take_along_axis(best_rows, order, axis=1)
    similarities = np.empty((len(queries), count))
    for begin in range(0, len(queries), _EXACT_BLOCK):
        part = slice(begin, begin + _EXACT_BLOCK)
        candidates = np.sort(best_rows[part], axis=1)  # equal similarities keep the order of the rows
        exact = np.einsum("qkc,qc->qk", train[candidates].astype(np.float64), queries[part])
        order = np.argsort(-exact, axis=1, kind="stable")
        best_rows[part] = np.take_along_axis(candidates, order, axis=1)
        similarities[part] = np.take_along_axis(exact, order, axis=1)[:, :count]
    return similarities, best_rows[:, :count]


def count_votes(
    similarities: np.ndarray, labels: np.ndarray, num_classes: int, temperature: float
) -> np.ndarray:
    """Adds up the votes of neighbours, exp((similarity - largest similarity) / temperature).

    The largest similarity of an image only scales its votes, and keeps them from overflowing.

    Args:
        similarities: float64 (Q, k).
        labels: int (Q, k), classes of the neighbours.
        num_classes: number of classes.
        temperature: float above 0.

    Returns:
        float64 (Q, num_classes); 0 exactly where no neighbour has the class.
    """
    weights = np.exp((similarities - similarities.max(axis=1, keepdims=True)) / temperature)
    weights = np.maximum(weights, np.finfo(np.float64).tiny)  # a vote that underflows still is one
    votes = np.zeros((len(similarities), num_classes))
    np.add.at(votes, (np.arange(len(votes))[:, None], labels), weights)
    return votes


def _normalised(features: np.ndarray) -> np.ndarray:
    """Returns features of length 1, in float32; those of length 0 stay so."""
    features = np.asarray(features, np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        row = int(np.flatnonzero(~np.isfinite(lengths[:, 0]))[0])
        raise ValueError(
            f"Expected finite features, received NaN or infinity in row {row}. Check the weights."
        )
    return (features / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Multiplies matrices in float32: accelerators round their entries to 10 bits or fewer by default."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            yield
    elif backend == "tensorflow":
        import tensorflow as tf

        before = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            tf.config.experimental.enable_tensor_float_32_execution(before)
    else:
        yield  # PyTorch's default is full precision


# Linear probe.


def fit_linear(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int = 256,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains one linear classifier a learning rate, all on the same batches from the same start.

    SGD with momentum on the cross-entropy of softmax(features @ kernel + bias), as PyTorch's:
    velocity <- momentum * velocity + gradient, weights <- weights - rate * velocity, where the rate goes from
    its peak to 0 along a cosine over all steps. The classifiers are the columns of one matrix, whose gradient
    is features^T (softmax - target) / batch size. What is left over of an epoch is dropped; each has its own
    order.

    Args:
        features: float32 (N, C).
        labels: int (N,), 0 to num_classes - 1.
        num_classes: classes K.
        learning_rates: R peak rates.
        epochs: passes over the features.
        batch_size: features of one step; all where there are fewer.
        momentum: float in [0, 1).
        weight_decay: float from 0 up, L2 penalty of the kernel.
        seed: of the first kernel, normal with a deviation of 0.01, and of the orders.

    Returns:
        kernels float32 (R, C, K) and biases float32 (R, K); not finite where a rate is too large.

    Raises:
        ValueError: there are no features.
    """
    if not len(features):
        raise ValueError("Expected features to train on, received none.")
    width, num_rates = features.shape[1], len(learning_rates)
    size = min(batch_size, len(features))
    steps_per_epoch = len(features) // size
    total = epochs * steps_per_epoch
    start = np.random.default_rng([seed, 0]).normal(0, 0.01, (width, 1, num_classes))
    start = np.broadcast_to(start, (width, num_rates, num_classes)).reshape(width, -1)
    kernel = ops.convert_to_tensor(start.astype(np.float32))  # (C, R * K)
    bias = ops.zeros((num_rates * num_classes,), "float32")
    kernel_velocity, bias_velocity = ops.zeros_like(kernel), ops.zeros_like(bias)
    rates = np.repeat(np.asarray(learning_rates, np.float32), num_classes)
    one_hot = np.eye(num_classes, dtype=np.float32)
    step = 0
    with _full_precision():
        for epoch in range(epochs):
            order = np.random.default_rng([seed, 1, epoch]).permutation(len(features))
            for first in range(0, steps_per_epoch * size, size):
                rows = order[first : first + size]
                x = ops.convert_to_tensor(features[rows])
                target = ops.convert_to_tensor(one_hot[labels[rows]][:, None])  # (B, 1, K)
                logits = ops.reshape(ops.matmul(x, kernel) + bias, (size, num_rates, num_classes))
                error = ops.reshape((ops.softmax(logits, axis=-1) - target) / size, (size, -1))
                gradient = ops.matmul(ops.transpose(x), error)
                if weight_decay:
                    gradient = gradient + weight_decay * kernel
                kernel_velocity = momentum * kernel_velocity + gradient
                bias_velocity = momentum * bias_velocity + ops.sum(error, axis=0)
                rate = ops.convert_to_tensor(rates * np.float32(0.5 * (1 + math.cos(math.pi * step / total))))
                kernel = kernel - rate * kernel_velocity
                bias = bias - rate * bias_velocity
                step += 1
    kernels = ops.convert_to_numpy(kernel).reshape(width, num_rates, num_classes).transpose(1, 0, 2)
    return np.ascontiguousarray(kernels), ops.convert_to_numpy(bias).reshape(num_rates, num_classes)


def linear_ranks(
    kernel: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Ranks the labels of images among the logits features @ kernel + bias, as `evaluate.label_ranks` does.

    Args:
        kernel: float32 (C, K).
        bias: float32 (K,).
        features: float32 (N, C).
        labels: int (N,), 0 to K - 1.

    Returns:
        int32 (N,); K where the logits are not finite.
    """
    ranks = np.full(len(labels), len(bias), np.int32)
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        return ranks
    for begin in range(0, len(labels), _TRAIN_BLOCK):
        rows = slice(begin, begin + _TRAIN_BLOCK)
        ranks[rows] = evaluating.label_ranks(features[rows] @ kernel + bias, labels[rows])
    return ranks


def draw_rates(result: FeatureResult, path: str | os.PathLike[str]) -> None:
    """Draws the accuracy of a linear probe against its learning rates, as a PNG.

    Args:
        result: what `linear_probe` returns.
        path: the file to write.

    Raises:
        ValueError: the result is not that of a probe.
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if not isinstance(result.settings, LinearProbe):
        raise ValueError(
            "Expected the result of linear_probe, received one of nearest_neighbours, which has no rates."
        )
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "The picture is drawn with matplotlib, which is not installed. Run "
            "pip install 'keras-convnext[data]'."
        ) from error
    rates = [score.setting for score in result.scores]
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    selection = [score.selection_top1 for score in result.scores]
    axes.plot(rates, np.array(selection, float), "o-", label="held out of training")
    axes.plot(rates, [score.top1 for score in result.scores], "s--", label="evaluated images")
    axes.axvline(result.chosen, color="0.6", linewidth=1, label=f"chosen: {result.chosen:g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"Linear probe of {result.environment['model']}: {result.top1:.2f} %", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with replacing_file(path) as file:
        file.write(content.getvalue())


# Checks.


def _check_common(settings: NearestNeighbours | LinearProbe) -> None:
    _check_share("validation_fraction", settings.validation_fraction)
    _check_share("crop", settings.crop, zero_for="that of the weights", up_to_one=True)
    _check_at_least("image_size", settings.image_size, 0)
    _check_at_least("resize_size", settings.resize_size, 0)
    _check_at_least("batch_size", settings.batch_size, 1)
    _check_at_least("seed", settings.seed, 0)
    _check_choice("resize_mode", settings.resize_mode, ("shorter_side", "squash"))
    _check_choice("interpolation", settings.interpolation, tuple(preprocess.INTERPOLATIONS))


def _check_at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected {name} to be a whole number from {least} up, received {value!r}.")


def _check_above_zero(name: str, value: object) -> None:
    if not (_is_number(value) and 0 < value < math.inf):  # type: ignore[operator]
        raise ValueError(f"Expected {name} above 0, received {value!r}.")


def _check_share(name: str, value: object, zero_for: str = "", up_to_one: bool = False) -> None:
    is_number = _is_number(value)
    if zero_for and is_number and value == 0:
        return
    if not (is_number and (0 < value < 1 or (up_to_one and value == 1))):  # type: ignore[operator]
        allowed = "above 0, up to 1" if up_to_one else "between 0 and 1, both excluded"
        also = f", or 0 for {zero_for}" if zero_for else ""
        raise ValueError(f"Expected {name} {allowed}{also}, received {value!r}.")


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value and value not in known:
        raise ValueError(f"Unknown {name} {value!r}. Known: {', '.join(known)}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _joined(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
