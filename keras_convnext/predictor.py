"""A model by name or by file, with the preprocessing of its images and its classes.

`open_predictor` opens those that classify a photo, `open_segmenter` those that classify its pixels, and
`open_detector` those that find objects.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
from typing import Any

import keras
import numpy as np
import PIL.Image

from keras_convnext import models, segmentation
from keras_convnext._messages import unknown
from keras_convnext.data import class_names, preprocess
from keras_convnext.data.detection import inference as photos
from keras_convnext.data.detection.categories import Categories, default_categories
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation import inference
from keras_convnext.data.segmentation.labels import IGNORED, Labels
from keras_convnext.data.segmentation.pictures import default_labels
from keras_convnext.detection import rcnn
from keras_convnext.model_options import ModelOptions
from keras_convnext.weights import arrays, assign
from keras_convnext.weights.published import Checkpoint
from keras_convnext.weights.resolve import ResolvedWeights, resolve

_logger = logging.getLogger("keras_convnext")

DEFAULT_SIZE = 224  # pixels, for a model that takes images of any size
SEGMENTATION_SIZE = 512  # of a window, for a segmentation model of which no crop is known
DETECTION_SIZE = 800  # of the shorter side, as in all published detectors


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model and how its images are prepared."""

    model: Any  # (N, H, W, 3 or 1) pixels in 0..255 to (N, classes), or to features (N, C)
    preprocessing: Preprocessing  # at the size that the model is fed
    row: Checkpoint | None = None  # the published weights that it has
    file: pathlib.Path | None = None  # the weight file, where it can be told

    @property
    def class_list(self) -> int | str | None:
        """What `class_names.class_names` takes for the outputs; None when their names are not known."""
        dataset = "" if self.row is None else self.row.dataset
        return class_names.find_class_list(dataset, self.model.output_shape[-1])

    def predict(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 images (H, W, 3) of any size to the model's outputs, float32 (N, classes)."""
        batch = np.stack([preprocess.preprocess_image(image, self.preprocessing) for image in images])
        return self.outputs(batch)

    def outputs(self, batch: np.ndarray) -> np.ndarray:
        """uint8 images (N, height, width, 3), prepared, to such outputs; ValueError where not finite."""
        outputs = np.asarray(self.model.predict_on_batch(for_channels(batch, self.model)), "float32")
        return finite(outputs, str(self.file or self.model.name))


def open_predictor(
    name: Any = None,
    weights: str | os.PathLike | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    classifier_activation: str | None = "softmax",
    task: str = "classification",
) -> Predictor:
    """Builds the model that a tag, an architecture or a file means.

    A tag decides how images are prepared; without one a file that says it (`save_weights`, the files of
    training), else the tag of the architecture's ImageNet weights. For a `.keras` file that does not say it,
    without a name, and for a Keras model, the defaults of `Preprocessing` hold.

    Args:
        name: tag or architecture, the path of a weight file, what `resolve` returned of these, or a Keras
            model, which is taken as it is.
        weights: a weight file or a `.keras` file; then a tag in `name` says only how images are prepared and
            normalised. Also "imagenet" or a short tag, where `name` is an architecture. Default: the weights
            of the tag, or the architecture's ImageNet weights.
        image_size: in pixels, a side or (height, width). Default: that of the tag or the file.
        classifier_activation: "softmax", or None for logits; a model and a `.keras` file keep their own.
        task: "classification"; or "features" for the model in front of its classifier, if it has one.

    ValueError: the name is unknown, has no classifier, or the file does not fit.
    """
    if name is not None and not isinstance(name, str | os.PathLike | ResolvedWeights):
        if weights is not None:
            raise ValueError(f"Expected weights=None beside a Keras model, received {weights!r}.")
        return predictor_of(name, getattr(name, "name", repr(name)), image_size, task=task)
    source = resolve(name, "default" if weights is None else weights, task)
    if source.is_model:
        return _open_keras_model(source, image_size, task)
    preprocessing = source.preprocessing_at(image_size)
    shape = (*preprocessing.size, source.channels)
    if task == "features":
        options = ModelOptions(input_shape=shape, include_top=False, pooling="avg")
    else:
        options = ModelOptions(input_shape=shape, classifier_activation=classifier_activation)
    return Predictor(models.build(source, options), preprocessing, source.published, source.path)


@dataclasses.dataclass(frozen=True)
class SegmentationPredictor:
    """A model that classifies pixels, what its classes are, and how photos are resized for it."""

    model: Any  # (N, h, w, 3) pixels in 0..255 to logits (N, h, w, classes)
    labels: Labels
    preprocessing: Preprocessing  # whose image size is that of a window
    row: Checkpoint | None = None  # the published weights that it has
    file: pathlib.Path | None = None  # the weight file, where it can be told

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """uint8 images (N, h, w, 3) to float32 (N, h, w, classes); ValueError where not finite."""
        outputs = np.asarray(self.model.predict_on_batch(for_channels(batch, self.model)), "float32")
        return finite(outputs, str(self.file or self.model.name))

    def segment(self, image: np.ndarray, mode: str = "auto") -> np.ndarray:
        """uint8 (H, W), the number of the class of every pixel of an image, uint8 (H, W, 3) of any size.

        The image is resized so that its shorter side is that of a window, see `inference`, and the logits
        back to its own size. A model of one image size takes windows of that size, and for "whole" the image
        squeezed into it.

        Args:
            mode: "whole" for the resized image at once; "slide" for windows over it, which are one where the
                image is no longer than it is wide; "multi_scale" for the mean over six sizes, mirrored too,
                12 times the work; "auto" for what `evaluate` measures by default: windows with published
                weights, whose scores are of that, and with a model of one image size; else whole.
        """
        if mode not in ("auto", *inference.MODES):
            raise ValueError(unknown("mode", mode, ("auto", *inference.MODES)))
        is_free = None in self.model.input_shape[1:3]
        if mode == "auto":
            mode = "whole" if is_free and self.row is None else "slide"
        crop = self.preprocessing.size
        if is_free:
            return inference.segment(self.logits, image, min(crop), mode, crop)
        if mode == "multi_scale":
            raise ValueError(
                f"Expected a model of any image size for several scales, received {self.model.name} of "
                f"{crop[0]} x {crop[1]}. Take mode 'slide'."
            )
        size = image.shape[:2]
        if mode == "whole":
            return inference.label_map(self._resized_logits(image, crop), size)
        factor = max(wanted / side for wanted, side in zip(crop, size, strict=True))
        height, width = (max(w, round(side * factor)) for w, side in zip(crop, size, strict=True))
        return inference.label_map(self._resized_logits(image, (height, width)), size)

    def _resized_logits(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """float32 (*size, classes) of an image resized to a size, by windows of the model's own."""
        pixels = inference.resized_pixels(image, size)
        return inference.sliding_window(self.logits, pixels, self.preprocessing.size)


def open_segmenter(name: Any, *, image_size: int | tuple[int, int] | None = None) -> SegmentationPredictor:
    """Builds the segmentation model that a tag or a file means.

    Args:
        name: tag, the path of a weight file or `.keras` file, what `resolve` returned of these, or a Keras
            model, which is taken as it is.
        image_size: of a window in pixels, a side or (height, width). Default: that of the model, where it has
            one, else of the crops that the weights were trained with, else 512.

    ValueError: the name is unknown, means a classifier, or the file does not fit.
    """
    if not isinstance(name, str | os.PathLike | ResolvedWeights):
        return segmenter_of(name, getattr(name, "name", repr(name)), image_size)
    source = resolve(name)
    if source.task != "segmentation":
        raise ValueError(
            f"Expected weights of a segmentation model, received {name}, a model of {source.task}. "
            "`keras-convnext list --task segmentation` has published ones."
        )
    model, path = segmentation.build(source, ModelOptions()), source.path
    prepared = source.preprocessing_at(image_size) if source.is_described else None
    opened = segmenter_of(model, str(path), image_size, prepared, source.labels, path)
    return dataclasses.replace(opened, row=source.published)


def segmenter_of(
    model: Any,
    name: str,
    image_size: int | tuple[int, int] | None,
    preprocessing: Preprocessing | None = None,
    labels: Labels | None = None,
    file: pathlib.Path | None = None,
) -> SegmentationPredictor:
    """Takes a whole model of pixels in 0..255 as it is; its own image size, where it has one, counts."""
    shapes = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if not all(isinstance(shape, tuple) and len(shape) == 4 for shape in shapes):
        raise ValueError(
            f"Expected a model from (N, H, W, C) to logits (N, H, W, classes). Received {name}, inputs "
            f"{shapes[0]}, outputs {shapes[1]}. `keras-convnext predict` classifies whole images."
        )
    prepared = (preprocessing or Preprocessing(SEGMENTATION_SIZE)).at(image_size)
    own = model.input_shape[1:3]
    if None not in own and image_size is not None and own != prepared.size:
        raise ValueError(
            f"{name} takes images of {own[0]} x {own[1]}. Received: image size {image_size}. Leave it out."
        )
    if None not in own:
        prepared = prepared.at(own)
    classes = model.output_shape[-1]
    if classes > IGNORED:
        raise ValueError(
            f"Expected a model of at most {IGNORED} classes, as a label map has 8 bits, received {name} with "
            f"{classes}. model.predict gives its logits."
        )
    return SegmentationPredictor(model, labels or default_labels(classes), prepared, None, file)


@dataclasses.dataclass(frozen=True)
class DetectionPredictor:
    """A model that finds objects, what its classes are, and how photos are resized for it."""

    model: Any  # [(N, h, w, 3) pixels in 0..255, sizes (N, 2)], of `rcnn.with_sizes`
    categories: Categories
    short_side: int  # of resized photos
    mean: tuple[float, ...]  # of pixels in 0..1, which photos are padded with
    row: Checkpoint | None = None  # the published weights that it has
    file: pathlib.Path | None = None  # the weight file, where it can be told

    @property
    def draws_masks(self) -> bool:
        return "masks" in self.model.output

    def detect(self, image: np.ndarray, score: float = 0.0) -> list[dict[str, Any]]:
        """What is on an image, uint8 (H, W, 3) of any size, from a `score` up, the best first.

        Of each object "class_index", "name", "category_id", "score", "box" float32 (4,) of x0, y0, x1, y1 in
        pixels of the image, and where the model draws masks "mask", bool (H, W).

        The image is resized to a shorter side of 800 pixels and a longer one of 1333 at most, as the
        published scores are measured, and padded to multiples of 32; into the size of a model that has one.
        JAX and TensorFlow compile a program for each padded size.
        """
        size = self.model.input[0].shape[1:3]
        pixels, inner = photos.prepared(image, self.short_side, self.mean, None if None in size else size)
        inputs = [pixels[None], np.array([inner], "float32")]
        outputs = {name: np.asarray(value)[0] for name, value in self.model.predict_on_batch(inputs).items()}
        finite(outputs["scores"][None], str(self.file or self.model.name))
        found = photos.on_photo(outputs, inner, image.shape[:2])
        names, ids = self.categories.names, self.categories.ids
        return [
            one | {"name": names[one["class_index"]], "category_id": ids[one["class_index"]]}
            for one in found
            if one["score"] >= score
        ]


def open_detector(name: Any, *, image_size: int | None = None) -> DetectionPredictor:
    """Builds the detector that a tag or a file means.

    Args:
        name: tag, the path of a weight file or `.keras` file, what `resolve` returned of these, or a
            `detection.Detector`, which is taken as it is.
        image_size: of the shorter side of photos in pixels. Default: that of the published scores or of the
            training, else 800.

    ValueError: the name is unknown, means another model, or the file does not fit.
    """
    if isinstance(name, rcnn.Detector):
        categories = default_categories(name.classes)
        mean = Preprocessing(DETECTION_SIZE).mean
        return DetectionPredictor(rcnn.with_sizes(name), categories, image_size or DETECTION_SIZE, mean)
    source = resolve(name, task="detection")
    model = rcnn.build(source, ModelOptions())
    categories = source.labels or default_categories(model.classes)
    stored = min(source.preprocessing.size) if source.is_described else DETECTION_SIZE
    mean = source.preprocessing.mean if source.is_normalised else (0.0, 0.0, 0.0)
    return DetectionPredictor(
        rcnn.with_sizes(model), categories, image_size or stored, mean, source.published, source.path
    )


def predictor_of(
    model: Any,
    name: str,
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    file: pathlib.Path | None = None,
    task: str = "classification",
) -> Predictor:
    """Takes a whole model of pixels in 0..255, which errors call `name`, as it is.

    `image_size` counts where the model leaves it free, and must else be its own.
    """
    if task == "features":
        model = without_classifier(model)
    preprocessing = preprocessing or Preprocessing(DEFAULT_SIZE)
    check_outputs(model, name, task)
    free = preprocessing.at(image_size).size
    height, width = (side or wanted for side, wanted in zip(model.input_shape[1:3], free, strict=True))
    if image_size is not None and (height, width) != free:
        raise ValueError(
            f"{name} takes images of {height} x {width}. Received: image size {image_size}. Leave it out."
        )
    return Predictor(model, preprocessing.at((height, width)), None, file)


def check_outputs(model: Any, name: str, task: str) -> None:
    """Refuses a model not of one input of images, to (N, classes) or, for the task "features", to (N, C)."""
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise ValueError(f"Expected a model of one input (N, H, W, C). Received {name}, with inputs {shape}.")
    shape = getattr(model, "output_shape", None)
    if isinstance(shape, tuple) and len(shape) == 2:
        return
    if task == "features":
        raise ValueError(
            f"Expected a model that ends in features (N, C), received outputs {shape} of {name}. Build it "
            "with include_top=False, pooling='avg'."
        )
    raise ValueError(f"Expected a model that ends in (N, classes). Received {name}, with outputs {shape}.")


def finite(outputs: np.ndarray, name: str) -> np.ndarray:
    """Returns what a model gave, (N, ...); a ValueError names the model where it is NaN or infinite."""
    bad = arrays.not_finite(outputs)
    if bad.any():
        raise ValueError(
            f"Expected numbers from {name}, received infinite ones or NaN for {int(bad.sum())} of {len(bad)} "
            "images. Check the weights; with a float16 policy try bfloat16 or float32."
        )
    return outputs


def without_classifier(model: Any) -> Any:
    """The part of a model in front of its classifier; one that does not end in probabilities as it is."""
    if not isinstance(model, models.ConvNeXt):
        last: Any = model.layers[-1] if getattr(model, "layers", None) else None
        if getattr(last, "activation", None) in (keras.activations.softmax, keras.activations.sigmoid):
            return keras.Model(model.input, last.input, name=model.name)
        return model
    layers = assign.places(model)[0]
    first = layers.get("pre_logits") or layers.get("head")
    return model if first is None else keras.Model(model.input, first.input, name=model.name)


def for_channels(images: np.ndarray, model: Any) -> np.ndarray:
    """Turns uint8 images (N, H, W, 3), RGB, into gray (N, H, W, 1) for a model of one channel."""
    channels = model.input_shape[-1]
    if channels not in (1, 3, None):
        raise ValueError(
            f"Expected a model of 3 channels, or 1 for gray images, received {model.name} with {channels}, "
            "which pictures do not have. Pass arrays of your own to model.predict."
        )
    if channels != 1:
        return images
    return np.stack([np.asarray(PIL.Image.fromarray(image).convert("L")) for image in images])[..., None]


def _open_keras_model(
    source: ResolvedWeights, image_size: int | tuple[int, int] | None, task: str
) -> Predictor:
    path, model = source.path, source.model
    with contextlib.suppress(ValueError):  # of another network, or with layers of its own in front
        if source.around.normaliser is None and not source.around.lost:
            _logger.warning("%s has no normaliser: it is given pixels in 0..255 as they are.", path)
    if source.architecture is None and not source.is_described:
        return predictor_of(model, str(path), image_size, None, path, task)
    opened = predictor_of(model, str(path), image_size, source.preprocessing, path, task)
    preprocessing = source.preprocessing_at(opened.preprocessing.image_size)
    return dataclasses.replace(opened, preprocessing=preprocessing)
