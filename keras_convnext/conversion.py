"""`convert` and `save_weights`: writes weights for other projects and for Keras."""

import logging
import pathlib

import keras
import numpy as np

from keras_convnext import _messages, models
from keras_convnext._files import replacing_path
from keras_convnext.variants import VARIANTS, Variant
from keras_convnext.weights import (
    assign,
    catalog,
    layouts,
    preprocessing_metadata,
    resolve,
    safetensors_files,
    torch_files,
)
from keras_convnext.weights.preprocessing_metadata import DESCRIBED_SUFFIXES, ImageDescription
from keras_convnext.weights.published import TORCH_SUFFIXES

_logger = logging.getLogger("keras_convnext")

KERAS_SUFFIXES = (".weights.h5", ".keras")


def save_weights(
    model: keras.Model, path, layout: str = "official", images: ImageDescription | None = None
) -> pathlib.Path:
    """Writes the weights of a model so that a PyTorch project loads them with `strict=True`.

    Args:
        model: made by this package.
        path: ".safetensors", or ".pth", ".pt", ".bin" for a PyTorch file. Official files nest their weights
            under the key "model", and so does this for the layout "official" as a PyTorch file.
        layout: "official", "timm", "torchvision" or "huggingface".
        images: how the images of these weights are prepared, stored in a ".safetensors" file, where `load`,
            `keras-convnext predict` and `keras-convnext evaluate` find it; None to leave that unsaid.

    Returns:
        The path. It appears whole or not at all.

    Raises:
        ValueError: for a layout that cannot express the architecture, or another ending; for `images` that a
            PyTorch file has no place for, or whose mean and std are not those of the model's normaliser.

    Example:
        >>> save_weights(model, "tiny.safetensors", layout="timm", images=ImageDescription(image_size=64))
    """
    path = pathlib.Path(path)
    if images is not None:
        _check_images(images, model, path)
    canonical = assign.state_dict(model)
    return _write_torch(canonical, layouts.find_variant(canonical), path, layout, images)


def convert(source, target, layout: str = "official", architecture: str | None = None) -> pathlib.Path:
    """Converts a weight file to the layout and format of another project, or to Keras.

    The layout of the source is detected from its names: official V1, V2 and isotropic, timm, torchvision,
    Hugging Face (V1, V2, DINOv3), DINOv3, FCMAE (dense and sparse), open_clip's image tower, mmdetection and
    mmsegmentation backbones, mmpretrain, and `keras.applications`.

    Args:
        source: path of a ".safetensors", ".pth", ".pt", ".bin", ".h5", ".weights.h5" or ".keras" file.
        target: path to write. ".safetensors", ".pth", ".pt", ".bin": in `layout`. ".keras": a whole model,
            that `keras.saving.load_model` opens; ".weights.h5": its weights.
        layout: "official", "timm", "torchvision" or "huggingface"; has no meaning for Keras targets.
        architecture: name of an architecture, or a tag of one, checked against the file; None to take the
            architecture from the file. A tag also says how images are prepared; without one the source says
            it, if it does. That is written into ".safetensors", ".weights.h5" and ".keras" targets, and a
            ".keras" target is built so; else as for the architecture's ImageNet weights.

    Returns:
        The target's path. It appears whole or not at all.

    Raises:
        ValueError: when the file is no ConvNeXt, or not one that the target can express.
        FileNotFoundError: when there is no source.
    """
    source = resolve.existing_file(source)
    target = pathlib.Path(target)
    if not target.name.endswith((*KERAS_SUFFIXES, *TORCH_SUFFIXES)):
        raise ValueError(
            f"The target must end in {', '.join((*TORCH_SUFFIXES, *KERAS_SUFFIXES))}. Received: {target}"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"No such folder for the target: {target.parent}")
    state = read_state_dict(source)
    with resolve.naming(source):
        variant = layouts.find_variant(state)
    described_by, expected = None, architecture
    images: ImageDescription | None
    if architecture is not None and "." in architecture:
        described_by = catalog.find_checkpoint(architecture)
        expected = described_by.architecture
        images = preprocessing_metadata.describe(described_by)
    else:
        if architecture is not None and architecture not in VARIANTS:
            raise ValueError(_messages.unknown("architecture", architecture, VARIANTS))
        images = preprocessing_metadata.read_images(source)
    if expected not in (None, variant.name):
        raise ValueError(f"{source} holds a {variant.name!r}. Received: architecture={architecture!r}")
    canonical = resolve.read_canonical(state, variant, source)
    if target.name.endswith(TORCH_SUFFIXES):
        if images is not None and target.suffix not in DESCRIBED_SUFFIXES:
            _logger.warning("%s has no place for how its images are prepared; .safetensors has.", target)
            images = None
        return _write_torch(canonical, variant, target, layout, images)
    published = described_by or catalog.default_checkpoint(variant.name)
    projects = layouts.inspect(state).layout == "open_clip" or published.is_projection
    model = models.model_of(variant, canonical, images, None if projects else "softmax")
    with replacing_path(target) as temporary:
        if target.suffix == ".keras":
            model.save(temporary)
        else:
            model.save_weights(temporary)
        if images is not None:
            preprocessing_metadata.add_images(temporary, images)
    return target


def read_state_dict(path) -> layouts.StateDict:
    """{name: array} of any weight file that is there; see `resolve.read_file`."""
    return resolve.read_file(resolve.existing_file(path))


def _check_images(images, model, path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(
            "Expected a .safetensors file, which has a place for how images are prepared, beside images. "
            f"Received: {path}. Save it as .safetensors, or leave images out."
        )
    if not isinstance(images, ImageDescription):
        raise ValueError(
            f"Expected images to be an ImageDescription, received {images!r}. Pass "
            "keras_convnext.weights.preprocessing_metadata.ImageDescription(image_size)."
        )
    own = models.normaliser_of(model)
    if own is None:
        return
    stated = [models.for_channels(values, len(own[0])) for values in (images.mean, images.std)]
    if not np.allclose(stated, own, rtol=0, atol=1e-6):
        mean, std = ([round(value, 6) for value in values] for values in own)
        raise ValueError(
            f"Expected the mean and std that the model normalises with, {mean} and {std}, received "
            f"images with {list(images.mean)} and {list(images.std)}. Pass ImageDescription(..., mean=..., "
            "std=...)."
        )


def _write_torch(canonical, variant: Variant, path, layout, images) -> pathlib.Path:
    arrays = layouts.write(canonical, variant, layout)
    if path.suffix == ".safetensors":
        metadata = {"format": "pt"}
        if images is not None:
            metadata[preprocessing_metadata.KEY] = preprocessing_metadata.to_json(images)
        safetensors_files.write_safetensors(path, arrays, metadata)
    elif path.suffix in TORCH_SUFFIXES:
        torch_files.write_torch(path, arrays, key="model" if layout == "official" else None)
    else:
        raise ValueError(f"The file must end in {', '.join(TORCH_SUFFIXES)}. Received: {path}")
    return path
