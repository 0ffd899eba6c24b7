"""`convert` and `save_weights`: writes weights for other projects and for Keras."""

import logging
import pathlib
import re

import keras
import numpy as np

from keras_convnext import loading, models
from keras_convnext._files import check_target, replacing_path
from keras_convnext._messages import listed
from keras_convnext.architecture import HEAD_PLACES
from keras_convnext.data.detection.categories import Categories
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation.labels import Labels
from keras_convnext.fcmae import MaskedAutoencoder
from keras_convnext.model_options import ModelOptions
from keras_convnext.variants import Variant
from keras_convnext.weights import (
    assign,
    labels_metadata,
    layouts,
    preprocessing_metadata,
    safetensors_files,
    torch_files,
)
from keras_convnext.weights.catalog import default_checkpoint
from keras_convnext.weights.published import TORCH_SUFFIXES
from keras_convnext.weights.resolve import resolve

_logger = logging.getLogger("keras_convnext")

KERAS_TARGETS = (".weights.h5", ".keras")


def save_weights(
    model: keras.Model,
    path,
    layout: str = "official",
    preprocessing: Preprocessing | None = None,
    labels: Labels | Categories | None = None,
) -> pathlib.Path:
    """Writes the weights of a model so that a PyTorch project loads them with `strict=True`.

    Args:
        model: made by this package; of a `MaskedAutoencoder` its encoder is written.
        path: ".safetensors", or ".pth", ".pt", ".bin" for a PyTorch file, which has the weights under the key
            "model" in the layout "official", as the official files do, a segmenter or detector under
            "state_dict". It appears whole or not at all.
        layout: "official", "timm", "torchvision", "huggingface", or "fcmae": the body of a V2 alone, without
            final norm and classifier; of a segmenter "official" (Facebook's names), "mmsegmentation" or
            "huggingface"; of a detector "official" or "mmdetection".
        preprocessing: of the images of these weights, stored in a ".safetensors" file, where `load`,
            `keras-convnext predict` and `keras-convnext evaluate` find it; None to leave that unsaid.
        labels: of a segmenter its classes with their colours, of a detector its `Categories`, stored there
            too.

    Such files hold logits: `load` puts a softmax behind them, unless its `classifier_activation` says else. A
    warning tells where the model has another activation, or no normaliser.

    Raises:
        ValueError: for a layout that cannot express the architecture, or another ending; for layers without
            weights that change what the model computes, such as a Rescaling or a ReLU; for a `preprocessing`
            that a PyTorch file has no place for, or whose mean and std are not the model's; likewise for
            `labels`, or other than one for each class.

    Example:
        >>> save_weights(model, "tiny.safetensors", layout="timm", preprocessing=Preprocessing(64))
    """
    path = pathlib.Path(path)
    model = model.body if isinstance(model, MaskedAutoencoder) else model
    canonical, around = assign.state_dict(model), assign.around(model)
    around.check(model.name)
    if preprocessing is not None:
        _check_preprocessing(preprocessing, around.normaliser, path)
    _warn_of_loss(model.name, around.normaliser is not None, around.activation, path)
    variant = layouts.find_variant(canonical)
    _check_settings(model, variant, model.name)
    if labels is not None:
        _check_labels(labels, canonical, path)
    return _write_torch(canonical, variant, path, layout, preprocessing, labels)


def convert(source, target, layout: str = "official", architecture: str | None = None) -> pathlib.Path:
    """Converts a weight file to the layout and format of another project, or to Keras.

    The layout of the source is detected from its names: official V1, V2 and isotropic, timm, torchvision,
    Hugging Face (V1, V2, DINOv3), DINOv3, FCMAE (dense and sparse), open_clip's image tower, mmdetection,
    mmsegmentation, mmpretrain, and `keras.applications`.

    Args:
        source: path of a ".safetensors", ".pth", ".pt", ".bin", ".h5", ".weights.h5" or ".keras" file; or a
            tag, whose file is downloaded.
        target: path to write. ".safetensors", ".pth", ".pt", ".bin": in `layout`. ".keras": a whole model,
            that `keras.saving.load_model` opens; ".weights.h5": its weights.
        layout: "official", "timm", "torchvision", "huggingface" or "fcmae"; of a segmenter "official",
            "mmsegmentation" or "huggingface"; of a detector "official" or "mmdetection". Has no meaning for
            Keras targets.
        architecture: name of an architecture, or a tag of one, checked against the file; None to take the
            architecture from the file. A tag also says how images are prepared and which classes a segmenter
            or detector has, else the source may say it. That is written into ".safetensors", ".weights.h5"
            and ".keras" targets. A ".keras" target is built so; else with the input size and the normaliser,
            or none, of the model in a ".keras" source; else as for the architecture's ImageNet weights. A
            classifier of a ".keras" source keeps its activation.

    Returns:
        The target's path. It appears whole or not at all.

    Raises:
        ValueError: when the file is no ConvNeXt, or not one that the target can express.
        FileNotFoundError: when there is no source.
    """
    target = pathlib.Path(target)
    if not target.name.endswith((*KERAS_TARGETS, *TORCH_SUFFIXES)):
        raise ValueError(
            f"The target must end in {', '.join((*TORCH_SUFFIXES, *KERAS_TARGETS))}. Received: {target}"
        )
    check_target(target)
    found = resolve(source) if architecture is None else resolve(architecture, source)
    if target.exists() and target.samefile(found.path):
        raise ValueError(f"Expected another target than the source, received '{target}' for both.")
    if found.variant != found.file_variant:
        named = architecture or found.variant.name
        raise ValueError(
            f"{found.path} holds a {found.file_variant.name!r}. Received: architecture={named!r}"
        )
    preprocessing: Preprocessing | None = found.preprocessing
    default = default_checkpoint(found.variant.name).preprocessing
    if not found.is_described and (preprocessing == default or not found.is_normalised):
        preprocessing = None
    canonical = found.canonical()
    if target.suffix != ".keras":
        _warn_of_loss(found.path, found.is_normalised, found.activation(found.classes), target)
    if target.name.endswith(TORCH_SUFFIXES):
        if preprocessing is not None and target.suffix != ".safetensors":
            _logger.warning("%s has no place for how its images are prepared; .safetensors has.", target)
            preprocessing = None
        if found.is_model and not found.is_keras_applications:
            _check_settings(found.model, found.variant, found.path)
        labels = found.labels if target.suffix == ".safetensors" else None
        return _write_torch(canonical, found.variant, target, layout, preprocessing, labels)
    pyramid_norms = found.contents.pyramid_norms and found.heads is None
    options = ModelOptions(include_preprocessing=found.is_normalised, pyramid_norms=pyramid_norms)
    model = loading.open_model(found, options)
    with replacing_path(target) as temporary:
        if target.suffix == ".keras":
            model.save(temporary)
        else:
            model.save_weights(temporary)
        if preprocessing is not None:
            preprocessing_metadata.add_preprocessing(temporary, preprocessing)
        if found.labels is not None:
            labels_metadata.add_labels(temporary, found.labels)
    return target


def _check_settings(model, variant: Variant, name) -> None:
    """Refuses a model with an epsilon, say, that readers of its weights do not build."""
    of_norm = {"epsilon": variant.epsilon}
    of_block = {**of_norm, "activation": variant.activation, "norm": variant.norm}
    of_head = {"epsilon": 1e-5, "activation": "linear"}  # batch norms and convolutions of a segmenter

    def settings(place):
        if place in HEAD_PLACES:
            return of_head
        return of_block if place.startswith(("stages_", "blocks_")) else of_norm

    wanted = {
        place: settings(place)
        for place in assign.places(model)[0]
        if not re.fullmatch(r"norm[0-3]", place)  # of a pyramid: 1e-6 in every architecture
    }
    lines = assign.other_settings(model, wanted)
    if lines:
        raise ValueError(
            f"{name}: Expected layers as the architecture has them. Received {listed(lines, 3)}. A .keras "
            "file keeps them; keras.saving.load_model opens it as it is."
        )


def _warn_of_loss(name, is_normalised: bool, activation, path) -> None:
    """Tells how to load a file of weights alone, so that they compute what the model `name` does."""
    if not is_normalised:
        _logger.warning(
            "%s has no normaliser, which %s cannot say. Load that with include_preprocessing=False.",
            name,
            path,
        )
    if activation not in (None, "softmax", keras.activations.softmax, keras.activations.linear):
        own = getattr(activation, "__name__", activation)
        _logger.warning(
            "%s cannot say its classifier's activation: load it with classifier_activation=%r.", path, own
        )


def _check_preprocessing(preprocessing, own, path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(
            "Expected a .safetensors file, which has a place for how images are prepared, beside "
            f"preprocessing. Received: {path}. Save it as .safetensors, or leave preprocessing out."
        )
    if not isinstance(preprocessing, Preprocessing):
        raise ValueError(
            f"Expected preprocessing to be a Preprocessing, received {preprocessing!r}. Pass "
            "keras_convnext.Preprocessing(image_size)."
        )
    if own is None:
        return
    stated = [models.for_channels(values, len(own[0])) for values in (preprocessing.mean, preprocessing.std)]
    if not np.allclose(stated, own, rtol=0, atol=1e-6):
        mean, std = ([round(value, 6) for value in values] for values in own)
        raise ValueError(
            f"Expected the mean and std that the model normalises with, {mean} and {std}, received "
            f"preprocessing with {list(preprocessing.mean)} and {list(preprocessing.std)}. Pass "
            "Preprocessing(..., mean=..., std=...)."
        )


def _check_labels(labels: Labels | Categories, canonical, path) -> None:
    heads = layouts.inspect(canonical).heads
    kind, task = (
        ("detector", "detection") if isinstance(labels, Categories) else ("segmenter", "segmentation")
    )
    if heads is None or heads.task != task or heads.classes != len(labels.names):
        is_one = heads is not None and heads.task == task
        received = f"one of {heads.classes}" if is_one and heads is not None else f"no {kind}"
        raise ValueError(
            f"Expected a {kind} of as many classes as labels, {len(labels.names)}. Received: {received}."
        )
    if path.suffix != ".safetensors":
        raise ValueError(
            f"Expected a .safetensors file, which has a place for labels. Received: {path}. Save it as "
            ".safetensors, or leave labels out."
        )


def _write_torch(canonical, variant: Variant, path, layout, preprocessing, labels=None) -> pathlib.Path:
    arrays = layouts.write(canonical, variant, layout)
    if path.suffix == ".safetensors":
        metadata = {"format": "pt"}
        if preprocessing is not None:
            metadata[preprocessing_metadata.KEY] = preprocessing_metadata.to_json(preprocessing)
        if labels is not None:
            metadata[labels_metadata.KEY] = labels_metadata.to_json(labels)
        safetensors_files.write_safetensors(path, arrays, metadata)
    elif path.suffix in TORCH_SUFFIXES:
        key = "model" if layout in ("official", "fcmae") else None
        if layouts.inspect(canonical).heads is not None and layout != "huggingface":
            key = "state_dict"  # where OpenMMLab's programs look
        torch_files.write_torch(path, arrays, key)
    else:
        raise ValueError(f"The file must end in {', '.join(TORCH_SUFFIXES)}. Received: {path}")
    return path
