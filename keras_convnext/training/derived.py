"""What a recipe takes over from weights in place of its own, so that the tag or the file alone is enough.

recipe, changes --choose_recipe--> recipe with what follows from the weights and the data, and why, in words

A key that is set wins over what would follow. No Keras backend is needed.
"""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from keras_convnext._settings import SettingsError, toml_value
from keras_convnext.data import sources
from keras_convnext.data.index import Source
from keras_convnext.training.recipe import Data, Recipe, published_row, unknown_tag
from keras_convnext.training.recipe_files import load_recipe
from keras_convnext.variants import VARIANTS
from keras_convnext.weights.resolve import existing_file, is_path, resolve

# Epochs that follow from the data are at least and at most so many times those of the recipe.
LEAST_EPOCHS, MOST_EPOCHS = 1 / 4, 15

_Derived = dict[str, tuple[Any, str]]  # full key -> (value, reason)


def choose_recipe(
    given: Recipe | str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[Recipe, list[str]]:
    """Reads a recipe and derives what follows from weights in place of its own.

    Args:
        given: a recipe, its file or its published name.
        data: path of the images in place of the recipe's.
        overrides: values in place of the recipe's, by short or full key.
        folder: of the run, to train; one that was begun there keeps what it began with. None to plan: data
            and weight files may be missing.

    Returns:
        The recipe, and a line for each derived value: "image_size = 64: of the weights".

    Raises:
        ValueError: the recipe cannot be read, or values are wrong or contradict each other, or data and
            weights are missing; all of these are listed.
    """
    changes = dict(overrides or {})
    if data is not None:
        changes["data"] = os.path.abspath(os.path.expanduser(data))

    def made(new: Mapping[str, Any]) -> Recipe:
        return given.replaced(new) if isinstance(given, Recipe) else load_recipe(given, new)

    changed, _ = Recipe.by_key(changes, texts=True)
    try:
        own = made({})
    except SettingsError:  # told with the changes below, which may mend it
        return made(changes), []
    problems = [] if folder is None else _missing(own.values() | changed)
    derived: _Derived = {}
    weights = changed.get("model.weights")
    if isinstance(weights, str) and weights not in ("", own.model.weights):
        problems += unknown_tag("weights", weights, own.model.architecture)
        try:
            derived = _from_weights(own, changed)
        except (OSError, ValueError) as error:
            problems.append(f"weights: {error}")
    try:
        chosen = made(_values(derived) | changes)
        if problems:
            raise SettingsError(Recipe, [])
    except SettingsError as error:
        raise SettingsError(Recipe, [*error.problems, *problems], error.received) from None
    if derived:
        derived |= _from_data(chosen, changed)
        begun = None if folder is None else pathlib.Path(folder).expanduser() / "recipe.toml"
        if begun is not None and begun.is_file():
            values = load_recipe(begun).values()
            derived = {key: (values[key], "as the run began") for key in derived}
        chosen = made(_values(derived) | changes)
    before = own.values()
    return chosen, [
        f"{key.rpartition('.')[2]} = {toml_value(value)}: {reason}"
        for key, (value, reason) in derived.items()
        if value != before[key]
    ]


def training_images(data: Data, seed: int) -> Source:
    """Opens the images that a run trains on, without those that are held out."""
    splits = sources.list_splits(data.source)
    training = sources.open_source(data.source, (data.train_split or "train") if splits else None)
    others = {sources.canonical_split(split) for split in splits} & {"validation", "test"}
    if data.val_split or others or not data.validation_fraction:
        return training
    return sources.hold_out(training, data.validation_fraction, seed)[0]


def _values(derived: _Derived) -> dict[str, Any]:
    return {key: value for key, (value, _) in derived.items()}


def _from_weights(own: Recipe, changed: Mapping[str, Any]) -> _Derived:
    """Returns what follows from other weights where it is not set.

    Size and preparation follow where the recipe trains at the size of its own weights: one from 224 to 384
    pixels keeps its size.
    """
    facts = _facts(changed["model.weights"], own.model.architecture)
    if facts is None:
        return {}
    architecture, images = facts
    derived: _Derived = {"model.architecture": (architecture, "of the weights")}
    variant = VARIANTS.get(changed.get("model.architecture", architecture), VARIANTS[architecture])
    if variant.version == 2:
        derived["model.layer_scale_init_value"] = 0.0, "none: ConvNeXt V2 has GRN in its place"
    elif not own.model.layer_scale_init_value and variant.layer_scale_init_value:
        derived["model.layer_scale_init_value"] = variant.layer_scale_init_value, f"of {variant.name}"
    if variant.isotropic:
        derived["optimizer.layer_decay"] = 1.0, "none is published for isotropic models"
    before = _facts(own.model.weights, own.model.architecture) if own.model.weights else None
    if images is not None and before and before[1] and before[1].image_size == own.model.image_size:
        size = changed.get("model.image_size")
        size = size if isinstance(size, int) else images.image_size
        same = changed.get("evaluation.eval_image_size", size) == images.image_size
        derived |= {
            "model.image_size": (images.image_size, "of the weights"),
            "evaluation.eval_image_size": (size, "that of training"),
            "evaluation.eval_crop": (images.crop_fraction, "of the weights"),
            "evaluation.eval_resize_mode": (images.stored()["resize_mode"], "of the weights"),
            "evaluation.eval_resize_size": (images.resize_size or 0 if same else 0, "of the weights"),
            "evaluation.eval_interpolation": (images.interpolation, "of the weights"),
        }
    return {key: value for key, value in derived.items() if key not in changed}


def _from_data(recipe: Recipe, changed: Mapping[str, Any]) -> _Derived:
    """Returns epochs and warmup that fit the number of images, see recipes/README.md.

    Fewer images than the recipe's epochs are for are seen so often that the steps are as many; of more images
    the epochs fall with the square root.
    """
    optimizer = recipe.optimizer
    if not optimizer.epochs_for_images or not recipe.data.source or "optimizer.epochs" in changed:
        return {}
    images = len(training_images(recipe.data, recipe.run.seed))
    ratio = optimizer.epochs_for_images / max(images, 1)
    factor = min(max(ratio if ratio > 1 else math.sqrt(ratio), LEAST_EPOCHS), MOST_EPOCHS)
    epochs = max(1, round(optimizer.epochs * factor))
    warmup = round(optimizer.warmup_epochs * epochs / optimizer.epochs, 3)
    about = f"{optimizer.epochs_for_images:,} images"
    derived: _Derived = {
        "optimizer.epochs": (epochs, f"for {images:,} images; {optimizer.epochs} are for about {about}"),
        "optimizer.warmup_epochs": (warmup, "the same part of the run"),
    }
    return {key: value for key, value in derived.items() if key not in changed}


def _facts(weights: str, architecture: str):
    """Returns the architecture of weights and how their images are prepared.

    The second is None for those of detectors and segmenters, whose images are no photos of one thing. None
    for names that are unknown, which the recipe's own check tells, and for files that are not there.
    """
    if is_path(weights):
        if not pathlib.Path(weights).expanduser().is_file():
            return None
        source = resolve(weights)
        return source.variant.name, source.preprocessing
    try:
        row = published_row(weights, architecture)
    except ValueError:
        return None
    return row.architecture, None if row.layout in ("mmdet", "mmseg") else row.preprocessing


def _missing(values: Mapping[str, Any]) -> list[str]:
    """Lists the data and the weight files that are not there."""
    problems = []
    source = values["data.source"]
    if not source:
        problems.append(
            'data: expected the path of the images, received "". Pass data=..., or --data on the command line'
        )
    elif isinstance(source, str):
        try:
            sources.list_splits(os.path.expanduser(source))
        except ValueError as error:
            problems.append(f"data: {error}")
    for key in ("model.weights", "distillation.teacher"):
        value = values[key]
        if isinstance(value, str) and value and is_path(value):
            try:
                existing_file(value)
            except (OSError, ValueError) as error:
                problems.append(f"{key.rpartition('.')[2]}: {error}")
    return problems
