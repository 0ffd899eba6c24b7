"""Finds and reads recipes, and tells one run from another."""

import atexit
import functools
import importlib.resources
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_convnext._messages import short_repr, unknown
from keras_convnext._settings import is_optional, read_toml
from keras_convnext.training.recipes.classification import Recipe
from keras_convnext.training.recipes.pretraining import PretrainingRecipe
from keras_convnext.training.recipes.segmentation import SegmentationRecipe

AnyRecipe = Recipe | SegmentationRecipe | PretrainingRecipe
# By the key `task` at the top of a file; without it, it is a classification.
RECIPES: dict[str, type[AnyRecipe]] = {
    "classification": Recipe,
    "segmentation": SegmentationRecipe,
    "pretraining": PretrainingRecipe,
}

# Keys of the recipes in the same folder that train nothing, and the commands that take them.
_OF_FEATURES = {"neighbours": "knn", "selection_fraction": "probe"}

# What may differ between two starts of one run: none of these changes a weight by more than rounding.
_NOT_IDENTITY = {
    "title", "reference", "epochs_for_images", "checkpoint_minutes", "keep_checkpoints", "engine",
    "model_devices",
}  # fmt: skip


def load_recipe(
    path_or_name: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
) -> AnyRecipe:
    """Reads and checks a recipe: a TOML file, or a published one by its bare name, such as "fine_tune".

    A file may have its keys in tables or all at the top. `overrides` go by key, "epochs" or
    "optimizer.epochs". Paths among them are relative to the working directory, those of the file to its
    folder. In the recipe `data.source` is absolute, and `weights` and `teacher` are where they are files.

    Raises:
        ValueError: there is no such recipe, or the message has the line that is not TOML, or all keys that
            are unknown, missing, mistyped or outside their range.

    Example:
        load_recipe("smoke", {"epochs": "1"}).optimizer.epochs     # 1
    """
    path = recipe_path(path_or_name)
    content = read_toml(path)
    for key, command in _OF_FEATURES.items():
        if key in content:
            raise ValueError(
                f"Expected a recipe for training, received '{path}', which evaluates frozen features. "
                f"Pass it to `keras-convnext {command}`."
            )
    task = content.get("task", "classification")
    if not isinstance(task, str) or task not in RECIPES:
        raise ValueError(
            f"Expected task to be one of {', '.join(RECIPES)}, received {short_repr(task)} in '{path}'."
        )
    tables = {key for key, value in content.items() if isinstance(value, dict)}
    for name, kind in RECIPES.items():
        if tables - RECIPES[task].model_fields.keys() and tables <= kind.model_fields.keys():
            raise ValueError(
                f"Expected a recipe of {task}, as its task says, received the tables of one of {name} in "
                f"'{path}': {', '.join(sorted(tables))}. Set task = \"{name}\", or take one of {task}."
            )
    recipe = RECIPES[task].read(path, overrides)
    changed, _ = recipe.by_key(overrides or {})
    places = {}
    for key in ("data.source", "model.weights", "distillation.teacher"):
        value = recipe.values().get(key, "")
        place = (Path.cwd() if key in changed else path.resolve().parent) / os.path.expanduser(value)
        if value and not value.startswith("tfds:") and (key == "data.source" or place.exists()):
            places[key] = str(place)
    return recipe.replaced(places)


def recipe_path(path_or_name: str | os.PathLike[str]) -> Path:
    """Returns the file of a recipe; ValueError names near ones and all published ones."""
    path, text = Path(path_or_name), os.fspath(path_or_name)
    known = known_recipes()
    if text in known:
        return recipes_folder() / f"{text}.toml"
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"Expected a recipe, received the folder '{path}'. Name a TOML file in it.")
    if path.stem in known:
        raise ValueError(f"There is no file {text!r}. The published recipe of that name is {path.stem!r}.")
    message = unknown("recipe", path.stem, known)
    raise ValueError(f"{message}. Expected one of these, or the path of a TOML file; received {text!r}.")


def known_recipes() -> list[str]:
    """Returns the names of the published recipes in order."""
    return sorted(path.stem for path in recipes_folder().glob("*.toml"))


@functools.cache
def recipes_folder() -> Path:
    """Returns the folder of the published recipes and their small data sets, `digits` and `flowers`.

    It is in an installed package, next to it in the repository; of a zip file it is a temporary copy.
    """
    inside: Any = importlib.resources.files("keras_convnext") / "recipes"
    if not inside.is_dir():
        return Path(__file__).resolve().parents[3] / "recipes"
    if isinstance(inside, Path):
        return inside
    temporary = tempfile.mkdtemp(prefix="keras_convnext_recipes_")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    names = [name for name in inside.root.namelist() if name.startswith(inside.at)]  # a zipfile.Path
    inside.root.extractall(temporary, names)
    return Path(temporary) / inside.at


def identity(recipe: AnyRecipe) -> dict[str, Any]:
    """Returns what decides the result of a run, by short key, in JSON values.

    Optional ones that have their default are left out: a key of a later version stops no resumption.
    """
    fields, values = recipe.fields().values(), recipe.by_short_key()
    return {
        key: list(value) if isinstance(value, tuple) else value
        for field, (key, value) in zip(fields, values.items(), strict=True)
        if key not in _NOT_IDENTITY and not (is_optional(field) and value == field.default)
    }
