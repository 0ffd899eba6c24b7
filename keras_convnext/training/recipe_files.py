"""Finds, reads and writes recipes as TOML files, with overrides by key, and tells one run from another."""

import atexit
import difflib
import functools
import importlib.resources
import os
import shutil
import tempfile
import tomllib
import typing
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from keras_convnext._messages import unknown
from keras_convnext.training.recipe import OF_FEATURES, Recipe, conflicts, listed, out_of_range
from keras_convnext.training.toml_fields import (
    field_types,
    flat_fields,
    is_number,
    mistyped,
    tables_of,
    toml_value,
    type_words,
    values_by_key,
)

# What may differ between two starts of one run: none of these changes a weight by more than rounding.
_NOT_IDENTITY = ("title", "reference", "checkpoint_minutes", "keep_checkpoints", "distribution")

_SECTIONS = {
    "architecture": "model",
    "data": "data",
    "epochs": "optimizer",
    "crop_scale": "augmentation",
    "eval_image_size": "evaluation",
    "teacher": "distillation",
    "seed": "run",
}


def load_recipe(path_or_name: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path_or_name: a TOML file, or the bare name of a published recipe, such as "fine_tune".
        overrides: values in place of the file's, by key. A str is read by the type of its key, as it comes
            from a command line: "3", "true", "0.08,1". Paths among these are relative to the working
            directory.

    Returns:
        The recipe; `data` absolute, and `weights` and `teacher` too where they are files.

    Raises:
        ValueError: there is no such recipe, the file is not TOML (the message has its line), or a key is
            unknown, missing, mistyped or outside its range; all of these are listed, with near names.

    Example:
        load_recipe("smoke", {"epochs": "1"}).epochs     # 1
    """
    overrides = overrides or {}
    path = recipe_path(path_or_name)
    for key, command in OF_FEATURES.items():
        if key in _parse(path):
            raise ValueError(
                f"Expected a recipe for training, received '{path}', which evaluates frozen features. "
                f"Pass it to `keras-convnext {command}`."
            )
    values, problems = _read(path, Recipe, overrides)
    if problems:
        raise ValueError(listed(path, problems))
    for key in ("data", "weights", "teacher"):
        folder = Path.cwd() if key in overrides else path.resolve().parent
        place = folder / os.path.expanduser(values[key])
        if values[key] and (key == "data" or place.exists()):
            values[key] = str(place)
    problems = out_of_range(values) or conflicts(values)
    if problems:
        raise ValueError(listed(path, problems))
    return _made(Recipe, values)


def replaced(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values, by key; those of a table after its name and a dot.

    Raises:
        ValueError: a key is unknown, or a value outside its range.

    Example:
        replaced(load_recipe("smoke"), {"epochs": 1, "distribution.engine": "none"})
    """
    values = values_by_key(recipe)
    changes = flat_fields(changes, Recipe)
    problems = [_unknown_key(key, value, list(values)) for key, value in changes.items() if key not in values]
    if problems:
        raise ValueError(listed(None, problems))
    return _made(Recipe, values | changes)


def read_fields(path: str | os.PathLike[str], cls: type, overrides: Mapping[str, Any] | None = None) -> Any:
    """Read a TOML file as a dataclass: every field a key, every key a field.

    Args:
        path: the file.
        cls: a dataclass whose fields are of the types str, int, float, bool, tuple[float, float], or a tuple
            of any length of int, float or str; or a dataclass of these with defaults, which is a table.
        overrides: values in place of the file's, by key ("table.key"); a str is read by the type of its key.

    Returns:
        A `cls`. An integer for a float is converted; a bool is never a number.

    Raises:
        ValueError: the file is missing or not TOML (the message has its line), or a key is unknown, missing,
            mistyped or refused by `cls` itself; the message names the file and lists all of them.
    """
    values, problems = _read(Path(path), cls, overrides or {})
    if not problems:
        try:
            return _made(cls, values)
        except ValueError as error:
            problems = [str(error)]
    raise ValueError(listed(path, problems))


def recipe_path(path_or_name: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe: of a path itself, of a bare name the published one.

    Raises:
        ValueError: there is no such file; tells near names and all published ones.
    """
    path, text = Path(path_or_name), os.fspath(path_or_name)
    known = known_recipes()
    if path.suffix != ".toml" and path.name == text and text in known:
        return recipes_folder() / f"{text}.toml"
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(
            f"Expected a recipe, received the folder '{path}'. Name a file in it, such as a .toml."
        )
    if path.stem in known:
        raise ValueError(f"There is no file {text!r}. The published recipe of that name is {path.stem!r}.")
    message = unknown("recipe", path.stem, known)
    raise ValueError(
        f"{message}. Expected one of these names, or the path of a TOML file; received {text!r}."
    )


def known_recipes() -> list[str]:
    """Return the names of the published recipes, those of `recipes_folder`, in order."""
    return sorted(path.stem for path in recipes_folder().glob("*.toml"))


def recipes_folder() -> Path:
    """Return the folder of the published recipes and their small data sets, `digits` and `flowers`.

    It lies in the package where that is installed, and next to it in the repository. Of a package that is
    imported from a zip file a copy in a temporary folder is returned, which is removed when the process ends.
    """
    inside = _inside()
    if not inside.is_dir():
        return Path(__file__).resolve().parents[2] / "recipes"
    return inside if isinstance(inside, Path) else _unpacked()


def to_toml(recipe: Any) -> str:
    """Write a recipe as the text of a TOML file that `load_recipe` reads as an equal one.

    Args:
        recipe: a `Recipe`, or another dataclass that `read_fields` reads.

    Returns:
        The text, one key a line; it ends with a newline.

    Example:
        pathlib.Path("recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    """
    lines: list[str] = []
    table = ""
    for key, value in values_by_key(recipe).items():
        before, (table, _, key) = table, key.rpartition(".")
        if table != before:
            lines += ["", f"[{table}]"]
        if isinstance(recipe, Recipe) and key in _SECTIONS:
            lines += [""] * bool(lines) + [f"# {_SECTIONS[key]}"]
        lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return what decides the result of a run: all keys but titles, the keeping of checkpoints and devices.

    Two runs of the same identity may share a folder. The values are str, int, float, bool and list, so that
    they are equal after JSON.

    Returns:
        The values by key.
    """
    values = {
        key: value
        for key, value in values_by_key(recipe).items()
        if key.partition(".")[0] not in _NOT_IDENTITY
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Tell in words where two identities differ.

    Args:
        before: what `identity` returned for the first run.
        now: the same for the second.

    Returns:
        One line for each key that differs, such as "epochs: 12 before, 3 now"; [] when they are equal.
    """
    lines = []
    for key in dict.fromkeys([*before, *now]):
        if key not in now:
            lines.append(f"{key}: {before[key]!r} before, missing now")
        elif key not in before:
            lines.append(f"{key}: missing before, {now[key]!r} now")
        elif before[key] != now[key]:
            lines.append(f"{key}: {before[key]!r} before, {now[key]!r} now")
    return lines


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"Expected a TOML file, but '{path}' is not one: {error}. Correct that line."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected a TOML file in UTF-8, but byte {error.start} of '{path}' is not. Save it as UTF-8."
        ) from error
    except OSError as error:
        raise ValueError(
            f"Expected a readable recipe at '{path}': {error.strerror}. Check the path."
        ) from error


def _read(path: Path, cls: type, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of a file and of `overrides` by key, converted, and what is wrong with them."""
    types = field_types(cls)
    given = flat_fields(_parse(path), cls)
    problems = [_unknown_key(key, value, list(types)) for key, value in given.items() if key not in types]
    for key, value in overrides.items():
        if key in types:
            given[key] = _from_text(value, types[key]) if isinstance(value, str) else value
        else:
            problems.append(f"{_unknown_key(key, value, list(types))} (it was given as an override)")
    given = _defaults(cls) | given
    problems += [
        f"{name}: missing, expected {type_words(types[name])}" for name in types if name not in given
    ]
    values = {name: _converted(given[name], types[name]) for name in types if name in given}
    return values, problems + mistyped(values, cls)


def _defaults(cls: type) -> dict[str, Any]:
    """Returns the default values of tables, which a file may leave out."""
    return {
        f"{name}.{key}": value
        for name, table in tables_of(cls).items()
        for key, value in values_by_key(table()).items()
    }


def _made(cls: type, values: Mapping[str, Any]) -> Any:
    """Makes a dataclass of flat values."""
    plain = {key: value for key, value in values.items() if "." not in key}
    for name, table in tables_of(cls).items():
        prefix = f"{name}."
        inner = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        plain[name] = table(**inner)
    return cls(**plain)


def _unknown_key(key: str, value: Any, names: list[str]) -> str:
    if isinstance(value, dict):
        tables = sorted({name.partition(".")[0] for name in names if "." in name})
        known = f"no table but [{'], ['.join(tables)}]" if tables else "no tables"
        return f"{key}: unknown table, expected {known}: a recipe is flat. Remove the line [{key}]"
    near = difflib.get_close_matches(key, names, 1)
    return f"{key}: unknown key" + (f", did you mean {near[0]!r}?" if near else ", remove it")


def _converted(value: Any, kind: Any) -> Any:
    """Converts a value to its type where that loses nothing, else returns it as it is."""
    if kind is float and is_number(value):
        return float(value)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_converted(item, typing.get_args(kind)[0]) for item in value)
    return value


def _from_text(text: str, kind: Any) -> Any:
    """Reads a text of the command line as its type; returns the text where it cannot be read so."""
    stripped = text.strip()
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(stripped.lower(), text)
    if typing.get_origin(kind) is tuple:
        inner = stripped.removeprefix("[").removesuffix("]")
        return tuple(_from_text(item, typing.get_args(kind)[0]) for item in inner.split(",") if item.strip())
    try:
        return kind(stripped)
    except ValueError:
        return text


def _inside() -> Traversable:
    return importlib.resources.files("keras_convnext") / "recipes"


@functools.cache
def _unpacked() -> Path:
    temporary = tempfile.mkdtemp(prefix="keras_convnext_recipes_")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    _copy(_inside(), Path(temporary))
    return Path(temporary)


def _copy(folder: Traversable, target: Path) -> None:
    """Copies what is in a folder; `importlib.resources.as_file` takes files only before Python 3.12."""
    target.mkdir(exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir():
            _copy(entry, target / entry.name)
        else:
            (target / entry.name).write_bytes(entry.read_bytes())
