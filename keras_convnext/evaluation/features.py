"""Computes the features of a frozen model, on which `nearest_neighbours` and `linear_probe` classify.

Both measure weights that have no classifier of their own, such as DINOv3's and FCMAE's, and compare others on
equal terms. Features are computed once, without augmentation, and can be kept in a folder.

The feature of an image is what the classifier of the architecture would see: the last map, averaged over its
positions and layer-normalised (norm first in the CLIP-trained "norm_first" variants). FCMAE files have no
final norm: theirs starts with scale 1 and offset 0, so the mean map of an image is shifted and scaled to mean
0 and variance 1 over its channels. DINOv3's files bring the norm they were trained with.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import keras
import numpy as np

from keras_convnext import predictor
from keras_convnext._files import replacing_file
from keras_convnext._settings import Count, FromZero, InsideOne, Settings, Share, key, one_of
from keras_convnext._terminal import say
from keras_convnext.data import sources
from keras_convnext.data.faults import Faults
from keras_convnext.data.index import Source, described
from keras_convnext.data.preprocessing import INTERPOLATIONS, RESIZE_MODES, Preprocessing
from keras_convnext.data.segmentation import sources as segmentation_sources
from keras_convnext.evaluation import forward, result_columns

_CACHE_VERSION = 2
TRAIN_BLOCK = 65536


class FeatureSettings(Settings):
    """What an evaluation by features is of: the keys that k-NN and the linear probe share.

    In Python all have defaults; a file has every key.
    """

    model: str = key(
        'a tag, an architecture (its ImageNet weights), a weight file or a .keras file; "" where the '
        "function is given a Keras model",
        "",
    )
    weights: str = key('a weight file in place of the model\'s own; "" for none', "")
    data: str = key('path of the images, see `sources.open_source`; "" where they are given', "")
    train_split: str = key(
        'split to compare with or train on; "" for "train", or all where the data has no splits', ""
    )
    val_split: str = key(
        'split that is classified; "" for the data\'s validation or test split, or where there is none, for '
        "a part held out of the training images",
        "",
    )
    validation_fraction: InsideOne = key(
        "that part, by class and seed (`sources.hold_out`); unused where the data has a split to classify",
        0.2,
    )
    image_size: FromZero = key("side in pixels; 0 for that of the weights", 0)
    crop: Share = key("`crop_fraction` of `Preprocessing`; 0 for that of the weights", 0.0)
    resize_mode: Annotated[str, one_of((*RESIZE_MODES, ""))] = key(
        'shorter_side or squash; "" for that of the weights', ""
    )
    resize_size: FromZero = key(
        "pixels; 0 for that of the weights, or where a key above is set, from the crop", 0
    )
    interpolation: Annotated[str, one_of((*INTERPOLATIONS, ""))] = key(
        'bicubic or bilinear; "" for that of the weights', ""
    )
    batch_size: Count = key("images of one forward pass", 64)
    seed: FromZero = key("of the part held out, and of what a probe draws", 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """The features of the images of a source that could be decoded."""

    features: np.ndarray  # float32 (n, C)
    labels: np.ndarray  # int32 (n,), class numbers of the source
    numbers: np.ndarray  # int64 (n,), places of the images in the source, ascending
    faults: dict[str, str]  # reason by the name of each image that could not be decoded


@dataclasses.dataclass(frozen=True)
class Score:
    """The accuracy, in percent, of one number of neighbours or one learning rate."""

    setting: float  # the number of neighbours, or the learning rate
    top1: float
    top5: float
    selection_top1: float | None = None  # on the part of the training images that a rate is chosen on


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureResult:
    """What an evaluation by features found."""

    settings: Any  # the `NearestNeighbours` or `LinearProbe`
    environment: dict[str, str]  # columns of results.csv: of model, data, preprocessing and machine
    scores: tuple[Score, ...]  # of each number of neighbours, or learning rate, in the order of the settings
    # In percent: of k-NN those of 20 neighbours, else of the first number; of a probe those of the classifier
    # trained on all training images with the chosen rate.
    top1: float
    top5: float
    num_train: int  # images that were compared with, or trained on
    n: int  # images that were classified
    faults: dict[str, str]  # reason by the name of each image, of either part, that could not be decoded
    seconds: float
    chosen: float  # of a probe, the learning rate; of k-NN, the number of neighbours of `top1`
    kernel: np.ndarray | None = None  # float32 (C, classes), of a probe's final classifier
    bias: np.ndarray | None = None  # float32 (classes,), likewise

    @property
    def advice(self) -> str:
        """What to try next, where the best rate is at the edge of those that were tried; "" else."""
        rates = [score.setting for score in self.scores]
        if self.kernel is None or min(rates) < self.chosen < max(rates):
            return ""
        direction = "larger" if self.chosen == max(rates) else "smaller"
        return f"The best learning rate, {self.chosen:g}, is at the edge of those tried: try {direction}."

    def report(self) -> dict[str, Any]:
        """Returns all of it but the classifier, as JSON takes it."""
        name = "neighbours" if self.kernel is None else "learning_rate"
        scores = [
            {name: score.setting, "top1": score.top1, "top5": score.top5}
            | ({} if score.selection_top1 is None else {"selection_top1": score.selection_top1})
            for score in self.scores
        ]
        return self.environment | {
            "settings": self.settings.model_dump(mode="json"),
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


def extract_features(
    model: Any,
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    cache: str | os.PathLike[str] | None = None,
    max_faults: float = 0.01,
    progress: bool = True,
) -> Features:
    """Computes the features of the images of a source.

    The model takes (N, H, W, 3 or 1) pixels in 0..255 to (N, C). Pixels are those of Pillow, bit for bit,
    without augmentation. Images that cannot be decoded are left out and named in `faults`; where they are
    more than the share `max_faults`, a DataError says so. Features are kept in the folder `cache`, one file
    for each model, source and preprocessing. The name of a file says of what it is, so that those of another
    model, of changed images, another order or another backend are never taken. A damaged file is made again.

    Example:
        model = keras_convnext.load("convnext_atto.d2_in1k", include_top=False, pooling="avg")
        extract_features(model, open_source("flowers"), Preprocessing(224)).features.shape
    """
    predictor.check_outputs(model, "the model", "features")
    path = None
    if cache is not None:
        path = pathlib.Path(cache) / f"features-{_cache_key(model, source, preprocessing)}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _read_cache(path)
        if kept is not None and len(kept.faults) <= max_faults * len(source):
            return kept
    faults = Faults(source, max_faults)
    parts = forward.outputs_of(
        model,
        source,
        preprocessing,
        title="features",
        batch_size=batch_size,
        faults=faults,
        progress=progress,
    )
    numbers, labels, features = map(np.concatenate, zip(*parts, strict=True))
    result = Features(features, labels, numbers, faults.report())
    if path is not None:
        _write_cache(path, result)
    return result


def evaluate_features(settings, classify, model, data, cache, max_faults, progress) -> FeatureResult:
    """Computes the features to compare with and those to classify, and has these classified.

    Args:
        settings: `NearestNeighbours` or `LinearProbe`.
        classify: takes the settings, both `Features` and the source of the first, and returns what it finds:
            fields of `FeatureResult` by name.
        model: `keras.Model` of (N, H, W, 3) pixels in 0..255 to features (N, C), in place of
            `settings.model`. A classifier of this package gives the features in front of its classifier.
        data: (training source, source to classify), of the same classes, in place of `settings.data`.
        cache, max_faults, progress: see `extract_features`.

    Raises a ValueError where the model has no features (N, C) or they are NaN, a SourceError or DataError
    where the data cannot be used, and an ImportError without TensorFlow, which reads the images.
    """
    begin = time.perf_counter()
    forward.import_batches()  # its absence is told before anything is downloaded
    if cache is not None and settings.data:
        sources.check_outside(settings.data, cache)
    train_source, test_source, split = _open_parts(settings) if data is None else (*data, "")
    if progress:
        say("\n".join([*described(train_source, "training"), *described(test_source, "to classify")]))
    if train_source.classes != test_source.classes:
        raise ValueError(
            f"Expected the same classes in both sources, received {len(train_source.classes)} and "
            f"{len(test_source.classes)}. Open the second with classes=first.classes."
        )
    if model is None and not settings.model:
        raise ValueError("Expected a model, received model=''. Pass a tag, an architecture or a file.")
    if model is not None and (settings.model or settings.weights):
        raise ValueError(
            f"Expected settings without model and weights beside a Keras model, received "
            f"model={settings.model!r}, weights={settings.weights!r}."
        )
    backbone = predictor.open_predictor(
        settings.model if model is None else model,
        settings.weights or None,
        image_size=settings.image_size or None,
        task="features",
    )
    preprocessing = _changed_preprocessing(backbone.preprocessing, settings)
    backbone = dataclasses.replace(backbone, preprocessing=preprocessing)
    train, test = (
        extract_features(
            backbone.model,
            source,
            preprocessing,
            batch_size=settings.batch_size,
            cache=cache,
            max_faults=max_faults,
            progress=progress,
        )
        for source in (train_source, test_source)
    )
    return FeatureResult(
        settings=settings,
        environment=result_columns.settings_of(backbone, test_source, split, settings.batch_size),
        **classify(settings, train, test, train_source),
        num_train=len(train.labels),
        n=len(test.labels),
        faults=train.faults | test.faults,
        seconds=time.perf_counter() - begin,
    )


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiplies matrices in float32: accelerators round their entries to 10 bits or fewer by default."""
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            stack.enter_context(jax.default_matmul_precision("highest"))
        elif keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            before = tf.config.experimental.tensor_float_32_execution_enabled()
            stack.callback(tf.config.experimental.enable_tensor_float_32_execution, before)
            tf.config.experimental.enable_tensor_float_32_execution(False)
        yield  # PyTorch's default is full precision


def _open_parts(settings: Any) -> tuple[Source, Source, str]:
    """Returns the training images, those to classify, and which these are in words."""
    if not settings.data:
        raise ValueError("Expected data, received data=''. Pass the path of the images.")
    segmentation_sources.refuse_label_maps(settings.data)
    splits = sources.list_splits(settings.data)
    train = sources.open_source(settings.data, settings.train_split or ("train" if splits else None))
    others = {sources.canonical_split(split) for split in splits} & {"validation", "test"}
    if settings.val_split or others:
        split = settings.val_split or "validation"  # which takes "test" where that is the only one
        return train, sources.open_source(settings.data, split, classes=train.classes), split
    split = f"{settings.validation_fraction:g} of {settings.train_split or 'all'}, seed {settings.seed}"
    return *sources.hold_out(train, settings.validation_fraction, settings.seed), split


def _changed_preprocessing(preprocessing: Preprocessing, settings: Any) -> Preprocessing:
    """The preprocessing of the weights with what the settings change; `resize_size` goes with any of it."""
    names = ("crop", "resize_mode", "resize_size", "interpolation")
    changes = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    if not changes:
        return preprocessing
    return Preprocessing.from_stored(**preprocessing.stored() | {"resize_size": None} | changes)


def _cache_key(model: Any, source: Source, preprocessing: Preprocessing) -> str:
    """Returns a digest of all that features depend on: of images names, classes, order, and files' times."""
    try:
        architecture = model.to_json()
    except (NotImplementedError, ValueError, TypeError):  # a model of the user's own class
        architecture = f"{type(model).__name__} {model.input_shape} {model.output_shape}"
    facts = [
        _CACHE_VERSION,
        keras.backend.backend(),
        model.dtype_policy.name,
        architecture,
        result_columns.digest_of_arrays(model),
        preprocessing.stored(),
    ]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8"))
    for number in np.unique(source.file_numbers).tolist():
        state = os.stat(source.files[number])
        digest.update(f"{number} {state.st_size} {state.st_mtime_ns}\n".encode())
    for name in ("file_numbers", "offsets", "lengths", "labels"):
        digest.update(np.ascontiguousarray(getattr(source, name)).tobytes())
    digest.update("\n".join(source.classes).encode("utf-8", "surrogateescape"))
    for number in range(len(source)):
        digest.update(f"{source.name(number)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _read_cache(path: pathlib.Path) -> Features | None:
    """Returns what a file holds; None when it is not there, or not whole."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            faults = json.loads(arrays["faults"].tobytes().decode("utf-8", "surrogateescape"))
            return Features(arrays["features"], arrays["labels"], arrays["numbers"], faults)
    except Exception:  # whatever a damaged archive raises
        return None


def _write_cache(path: pathlib.Path, features: Features) -> None:
    """Keeps features in one step; without space for them a line on stderr says so."""
    faults = json.dumps(features.faults).encode("utf-8", "surrogateescape")
    try:
        with replacing_file(path) as file:
            np.savez(file, **vars(features) | {"faults": np.frombuffer(faults, np.uint8)})
    except OSError as error:
        print(
            f"The features of {len(features.labels)} images are not kept, and will be computed again: "
            f"'{path.parent}' cannot be written ({error.strerror or error}).",
            file=sys.stderr,
        )
