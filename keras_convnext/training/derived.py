"""What a recipe takes over from weights in place of its own, so that the tag or the file alone is enough.

A key that is set wins over what would follow. No Keras backend is needed.
"""

import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from keras_convnext._settings import SettingsError, toml_value
from keras_convnext.architecture import Heads
from keras_convnext.data import sources, unlabelled
from keras_convnext.data.index import Source
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation import sources as segmentation_sources
from keras_convnext.training.recipes.classification import Recipe, published_row, unknown_tag
from keras_convnext.training.recipes.files import AnyRecipe, load_recipe
from keras_convnext.training.recipes.pretraining import PretrainingRecipe
from keras_convnext.training.recipes.segmentation import SegmentationRecipe
from keras_convnext.training.run_folder import RECIPE_FILE, RUN_FILE
from keras_convnext.variants import VARIANTS
from keras_convnext.weights.resolve import ResolvedWeights, is_path, resolve

# Epochs that follow from the data are at least and at most so many times those of the recipe.
LEAST_EPOCHS, MOST_EPOCHS = 1 / 4, 15


def _splits_of_classes(path: str) -> list[str]:
    segmentation_sources.refuse_label_maps(path)
    return sources.list_splits(path)


# What lists the splits of a recipe's data.
_SPLITS: dict[type, Callable[[str], list[str]]] = {
    Recipe: _splits_of_classes,
    SegmentationRecipe: segmentation_sources.list_splits,
    PretrainingRecipe: unlabelled.list_splits,
}
_Derived = dict[str, tuple[Any, str]]  # full key -> (value, reason)


def choose_recipe(
    given: AnyRecipe | str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[AnyRecipe, list[str]]:
    """Reads a recipe, and derives what follows from weights in place of its own.

    `overrides` are by short or full key. A run that was begun in `folder` with these weights keeps what it
    began with; None to plan: the recipe's own data and weight files may be missing. Returns a line for each
    derived value too, such as "image_size = 64: of the weights". Its ValueError lists all that is wrong.
    """
    changes = dict(overrides or {})
    run_path = None if folder is None else pathlib.Path(os.path.expanduser(folder))
    if data is not None:
        place = os.path.expanduser(sources.located(data))
        changes["data"] = os.path.abspath(place) if place else ""  # that is not the working folder

    def made(new: Mapping[str, Any]) -> AnyRecipe:
        return given.replaced(new) if isinstance(given, AnyRecipe) else load_recipe(given, new)

    try:
        own = made({})
    except SettingsError:  # told with the changes below, which may mend it
        return made(changes), []
    changed, _ = own.by_key(changes, texts=True)
    before = own.values()
    values = before | changed
    problems = [*_file_problems(values if run_path else changed)]
    if run_path:
        problems += _data_problems(values["data.source"], run_path, _SPLITS[type(own)])
    derived: _Derived = {}
    weights, architecture = values["model.weights"], values["model.architecture"]
    if architecture not in [*VARIANTS]:  # told by the recipe's own check
        architecture = own.model.architecture
    is_own = (weights, architecture) == (own.model.weights, own.model.architecture)
    if isinstance(weights, str) and weights and not is_own:
        problems += unknown_tag("weights", weights, architecture)
        try:
            derived = _from_weights(own, changed, weights, architecture)
        except (OSError, ValueError) as error:
            problems.append(f"weights: {error}")
    if derived:
        # Epochs and warmup are checked below, when those are known that follow from the data.
        lengths = ("optimizer.epochs", "optimizer.warmup_epochs")
        other = {key: value for key, value in changes.items() if own.full_key(key) not in lengths}
        try:
            chosen = made(_values(derived) | other)
        except SettingsError:
            pass  # told with all others below
        else:
            if not problems and isinstance(chosen, Recipe):
                derived |= _lengths(chosen, changed)
            if run_path and (run_path / RECIPE_FILE).is_file():
                derived = _as_begun(derived, chosen, load_recipe(run_path / RECIPE_FILE))
    try:
        chosen = made(_values(derived) | changes)
        if problems:
            raise SettingsError(type(own), [])
    except SettingsError as error:
        raise SettingsError(type(own), [*error.problems, *problems], error.received) from None
    return chosen, [
        f"{key.rpartition('.')[2]} = {toml_value(value)}: {reason}"
        for key, (value, reason) in derived.items()
        if value != before[key] and key != "title"
    ]


def split_names(
    data: Any, list_splits: Callable[[str], list[str]] = sources.list_splits
) -> tuple[str | None, str | None]:
    """The split to train on, and the one to evaluate on (by default validation, else test); None for none."""
    splits = list_splits(data.source)
    others = {"validation", "test"} & set(map(sources.canonical_split, splits))
    train = data.train_split or "train"
    if not splits and sources.canonical_split(train) == "train":  # all are for training
        return None, data.val_split or None
    return train, data.val_split or ("validation" if others else None)


def training_images(data: Any, seed: int, opener: Any = sources) -> Source:
    """Opens the images that a run trains on, without those held out, by the functions of a module of data."""
    train, validation = split_names(data, opener.list_splits)
    training = opener.open_source(data.source, train)
    if validation or not data.validation_fraction:
        return training
    return sources.hold_out(training, data.validation_fraction, seed)[0]


def _values(derived: _Derived) -> dict[str, Any]:
    return {key: value for key, (value, _) in derived.items()}


def _as_begun(derived: _Derived, chosen: AnyRecipe, begun: AnyRecipe) -> _Derived:
    """Takes the values of the run in the folder, if it began with the same weights."""
    model = chosen.model
    if (begun.model.weights, begun.model.architecture) != (model.weights, model.architecture):
        return derived  # `run_folder` refuses the folder of another run
    return {key: (begun.values()[key], "as the run began") for key in derived}


def _from_weights(own: AnyRecipe, changed: Mapping[str, Any], weights: str, stated: str) -> _Derived:
    """Returns what follows from other weights, of images only if the recipe trains at the size of its own."""
    facts = _facts(weights, stated, is_of_it="model.architecture" in changed)
    if facts is None:
        return {}
    architecture, images = facts
    name = pathlib.Path(weights).name if is_path(weights) else weights
    derived: _Derived = {
        "title": (f"{own.title.partition(', with weights ')[0]}, with weights {name}", "of the weights"),
        "model.architecture": (architecture, "of the weights"),
    }
    variant = VARIANTS[stated if "model.architecture" in changed else architecture]
    if variant.version == 2:
        derived["model.layer_scale_init_value"] = 0.0, "none: ConvNeXt V2 has GRN in its place"
    elif not getattr(own.model, "layer_scale_init_value", 0) and variant.layer_scale_init_value:
        derived["model.layer_scale_init_value"] = variant.layer_scale_init_value, f"of {variant.name}"
    if variant.isotropic:
        derived["optimizer.layer_decay"] = 1.0, "none is published for isotropic models"
    if isinstance(own, Recipe):
        derived |= _sizes(own, changed, images)
    elif isinstance(heads := resolve(None if is_path(weights) else architecture, weights).heads, Heads):
        derived["model.channels"] = heads.channels, "of the weights"
        if not heads.auxiliary:
            derived["loss.auxiliary_weight"] = 0.0, "the weights have no auxiliary head"
    known = own.values()
    return {key: value for key, value in derived.items() if key not in changed and key in known}


def _sizes(own: Recipe, changed: Mapping[str, Any], images: Preprocessing | None) -> _Derived:
    """Returns the size of other weights' images, if the recipe trains at that of its own."""
    before = _facts(own.model.weights, own.model.architecture) if own.model.weights else None
    if images is not None and before and before[1] and before[1].image_size == own.model.image_size:
        size = changed.get("model.image_size")
        size = size if isinstance(size, int) else images.image_size
        same = changed.get("evaluation.eval_image_size", size) == images.image_size
        return {
            "model.image_size": (images.image_size, "of the weights"),
            "evaluation.eval_image_size": (size, "that of training"),
            "evaluation.eval_crop": (images.crop_fraction, "of the weights"),
            "evaluation.eval_resize_mode": (images.stored()["resize_mode"], "of the weights"),
            "evaluation.eval_resize_size": (images.resize_size or 0 if same else 0, "of the weights"),
            "evaluation.eval_interpolation": (images.interpolation, "of the weights"),
        }
    return {}


def _lengths(recipe: Recipe, changed: Mapping[str, Any]) -> _Derived:
    """Returns epochs that fit the number of images, and the warmup of these epochs, see recipes/README.md."""
    optimizer = recipe.optimizer
    derived: _Derived = {}
    epochs = changed.get("optimizer.epochs", optimizer.epochs)
    if "optimizer.epochs" not in changed and optimizer.epochs_for_images and recipe.data.source:
        images = len(training_images(recipe.data, recipe.run.seed))
        ratio = optimizer.epochs_for_images / max(images, 1)
        factor = min(max(ratio if ratio > 1 else math.sqrt(ratio), LEAST_EPOCHS), MOST_EPOCHS)
        epochs = max(1, round(optimizer.epochs * factor))
        own = f"{optimizer.epochs} are for about {optimizer.epochs_for_images:,} images"
        derived["optimizer.epochs"] = epochs, f"for {images:,} images; {own}"
    if "optimizer.warmup_epochs" not in changed and isinstance(epochs, int) and epochs != optimizer.epochs:
        warmup = round(optimizer.warmup_epochs * epochs / optimizer.epochs, 3)
        derived["optimizer.warmup_epochs"] = warmup, "the same part of the run"
    return derived


def _facts(weights: str, architecture: str, *, is_of_it: bool = True):
    """Returns the architecture of weights and how their images are prepared; None where they cannot be used.

    `is_of_it`: a file is taken to be of the architecture. Of detectors and segmenters the images are None.
    """
    try:
        if not is_path(weights):
            row = published_row(weights, architecture)
            return row.architecture, None if row.heads is not None else row.preprocessing
        source = with_contents(resolve(architecture if is_of_it else None, weights))
    except (OSError, ValueError):
        return None
    return source.variant.name, source.preprocessing


def with_contents(source: ResolvedWeights) -> ResolvedWeights:
    """Refuses a weight file that does not say which model it is of."""
    if source.file is not None and source.is_bare:
        raise ValueError(
            f"Expected weights that say what they are of, received '{source.file}'. Take the .safetensors "
            "file beside it, or a .keras file."
        )
    return source


def body_weights(recipe: Any) -> ResolvedWeights:
    """The weights that the body of a model begins with; random ones where the recipe names none."""
    return with_contents(resolve(recipe.model.architecture, recipe.model.weights or None, "features"))


def _data_problems(
    source: Any, folder: pathlib.Path, list_splits: Callable[[str], list[str]]
) -> Iterator[str]:
    if source == "":
        yield 'data: expected the path of the images, received "". Pass data=..., or --data in a shell'
    elif isinstance(source, str):
        try:
            list_splits(os.path.expanduser(source))
            if not (folder / RUN_FILE).exists():  # else the run was begun there
                sources.check_outside(os.path.expanduser(source), folder)
        except ValueError as error:
            yield f"data: {error}"


def _file_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Gives the weight files that are not there or cannot be begun with."""
    for key in ("model.weights", "distillation.teacher"):
        value = values.get(key)
        try:
            if isinstance(value, str) and is_path(value):
                with_contents(resolve(None, value))
        except (OSError, ValueError) as error:
            yield f"{key.rpartition('.')[2]}: {error}"
