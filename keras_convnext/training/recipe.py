"""What a training run is made of: one TOML file in which every key is present, and flat but for one table.

A published recipe is a file of the folder `recipes`; the same values as a frozen `Recipe` are what
`trainer.train` takes. Nothing here needs a Keras backend, so a recipe is read and checked before one starts.
"""

import atexit
import dataclasses
import difflib
import functools
import importlib.resources
import json
import math
import os
import re
import shutil
import tempfile
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from keras_convnext.checkpoints import WEIGHT_SUFFIXES, find_checkpoint, unknown
from keras_convnext.variants import VARIANTS

Pair = tuple[float, float]

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
SCHEDULE_UNITS = ("step", "epoch")
LAYER_DECAY_GROUPS = ("group", "single", "layer_wise", "stage_wise", "timm")
POLICIES = ("none", "rand", "original", "originalr", "v0", "v0r", "imagenet", "ta_wide")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shorter_side", "squash")

# How a step is divided among devices, and the backend that does so; `distribution.py` has the engines.
ENGINES = {
    "auto": "any backend",
    "none": "any backend",
    "data_parallel": "jax",
    "model_parallel": "jax",
    "mirrored": "tensorflow",
    "multi_worker_mirrored": "tensorflow",
    "tpu": "tensorflow",
    "ddp": "torch",
}

# Keys of the recipes in the same folder that train nothing, and the commands that take them.
_OF_FEATURES = {"neighbours": "knn", "selection_fraction": "probe"}

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


@dataclass(frozen=True)
class Distribution:
    """How a step is divided among devices: the table [distribution] of a recipe.

    It changes where things are computed, never what: batch size and learning rate stay the recipe's.

    Args:
        engine: a key of `ENGINES`. Default "auto": by the devices that are there, "none" for a single one.
        model_devices: int, devices that share the pointwise kernels in "model_parallel"; the batch is divided
            among groups of so many: 8 devices by 2 are four parts of the batch. Default 2.
    """

    engine: str = "auto"
    model_devices: int = 2


@dataclass(frozen=True)
class Recipe:
    """One training run, as plain values.

    There are no defaults: a file that lacks a key is refused, so that what is not written cannot change
    between two versions. Only the table [distribution] may be missing, as it changes no result. Values
    outside their range raise when the object is made, so a `Recipe` that exists can be run, as far as can be
    told without its data, weights and devices.

    Reference: the hyperparameters are those of Liu et al. 2022 (arXiv:2201.03545), appendix A, and of Woo et
    al. 2023 (arXiv:2301.00808), appendix A, with the field's names for them.

    Args:
        title: str, one line for people.
        reference: str, paper and table, or where else the values come from.
        architecture: str, a key of `variants.VARIANTS`.
        weights: str, what the model starts from: a tag, the path of a weight file, or "" for random weights.
        layer_scale_init_value: float, start of LayerScale, 0 for none. 0 for V2, which has GRN in its place.
        drop_path_rate: float in [0, 1), of the last block; it grows linearly from 0 at the first.
        head_init_scale: float above 0, factor of the new classifier's initial weights; 1 leaves them.
        image_size: int, side in pixels of the training crops, at least 32.
        precision: "float32", "mixed_bfloat16" or "mixed_float16" (with loss scaling).
        rematerialize: bool, compute the blocks again in the backward pass, for less memory.
        trainable: "all", "head" (frozen backbone), or "lora:RANK" (low-rank updates of the Dense kernels).
        data: str, path of the images, relative to the recipe's folder; "" when it must be given.
        train_split: str, split of the data to train on; "" for data without splits.
        val_split: str, split that is evaluated; "" for the data's own, or none.
        validation_fraction: float in [0, 1), share of the training split that is held out, by class, where
            there is no other split to evaluate.
        epochs: int, passes over the training split.
        batch_size: int, images of one optimizer step.
        accumulation_steps: int, micro-batches of one optimizer step; a divisor of `batch_size`.
        learning_rate: float, the peak, at this `batch_size`: no arithmetic follows.
        min_learning_rate: float, end of the cosine.
        warmup_epochs: float, length of the linear warmup in epochs.
        warmup_learning_rate: float, start of the warmup.
        warmup_includes_peak: bool, whether the last warmup step has the peak (V1: `linspace(start, peak,
            steps)`) or the first step after it (V2: start + (peak - start) * step / steps).
        schedule_unit: "step", or "epoch" for a rate that is constant within an epoch.
        weight_decay: float, AdamW's; not for biases, norms, scales (one axis) or GRN.
        beta_1: float in [0, 1), of AdamW.
        beta_2: float in [0, 1), of AdamW.
        epsilon: float above 0, of AdamW.
        clip_norm: float, largest norm of all gradients together, 0 for no clipping.
        layer_decay: float in (0, 1], factor of the learning rate from a layer to the one before; 1 for none.
        layer_decay_groups: which variables are one layer: "group" (V1, and V2 Base and Large), "single" (V2),
            "layer_wise" (COCO), "stage_wise" (ADE20K) or "timm".
        ema_decay: float in [0, 1), of the moving average of the weights, per step; 0 for none.
        crop_scale: (float, float), smallest and largest area of the random crop, as shares of the image.
        crop_ratio: (float, float), smallest and largest width / height of the crop.
        interpolation: "bicubic" or "bilinear", of the crop and of the policy's geometric operations.
        flip: float in [0, 1], probability of exchanging left and right.
        policy: str as `data.augment.parse_policy` reads it, such as "rand-m9-mstd0.5-inc1" or "none".
        color_jitter: float, strength of brightness, contrast and saturation jitter, 0 for none.
        erase: float in [0, 1], probability of random erasing.
        mixup: float, alpha of mixup's Beta distribution, 0 for none.
        cutmix: float, alpha of cutmix's Beta distribution, 0 for none.
        mix_probability: float in [0, 1], of mixing a batch at all.
        switch_probability: float in [0, 1], of cutmix where both are on.
        label_smoothing: float in [0, 1), share of the target that is spread over all classes.
        repeats: int, times that an image stands in succession in the order (repeated augmentation).
        eval_image_size: int, side in pixels of the evaluated images, at least 32.
        eval_crop: float in (0, 1], `eval_image_size` / size after the resize.
        eval_resize_mode: "shorter_side" or "squash".
        eval_resize_size: int, pixels after the resize; 0 for eval_image_size / eval_crop.
        eval_interpolation: "bicubic" or "bilinear".
        teacher: str, tag or path of the model whose outputs are imitated; "" for none.
        distillation_weight: float in [0, 1], share of the teacher's term in the loss.
        distillation_temperature: float above 0, that both outputs are divided by.
        seed: int from 0 up, of weights, order, augmentation and drop path.
        checkpoint_minutes: float, time between two checkpoints within an epoch; 0 for none within an epoch.
        keep_checkpoints: int, how many of the last checkpoints are kept, at least 1, beside the best.
        distribution: `Distribution`, the devices; on the command line `--set distribution.engine=...`.

    Raises:
        ValueError: a value is outside its range or two don't go together; every one of them is named, with
            what was expected and received.

    Example:
        recipe = load_recipe("smoke")
        dataclasses.replace(recipe, epochs=1)
    """

    title: str
    reference: str
    architecture: str
    weights: str
    layer_scale_init_value: float
    drop_path_rate: float
    head_init_scale: float
    image_size: int
    precision: str
    rematerialize: bool
    trainable: str
    data: str
    train_split: str
    val_split: str
    validation_fraction: float
    epochs: int
    batch_size: int
    accumulation_steps: int
    learning_rate: float
    min_learning_rate: float
    warmup_epochs: float
    warmup_learning_rate: float
    warmup_includes_peak: bool
    schedule_unit: str
    weight_decay: float
    beta_1: float
    beta_2: float
    epsilon: float
    clip_norm: float
    layer_decay: float
    layer_decay_groups: str
    ema_decay: float
    crop_scale: Pair
    crop_ratio: Pair
    interpolation: str
    flip: float
    policy: str
    color_jitter: float
    erase: float
    mixup: float
    cutmix: float
    mix_probability: float
    switch_probability: float
    label_smoothing: float
    repeats: int
    eval_image_size: int
    eval_crop: float
    eval_resize_mode: str
    eval_resize_size: int
    eval_interpolation: str
    teacher: str
    distillation_weight: float
    distillation_temperature: float
    seed: int
    checkpoint_minutes: float
    keep_checkpoints: int
    distribution: Distribution = Distribution()

    def __post_init__(self) -> None:
        if not isinstance(self.distribution, Distribution):
            raise ValueError(
                f"Expected distribution=Distribution(engine=...), received {self.distribution!r}."
            )
        values = _values(self)
        problems = _mistyped(values, Recipe) or _out_of_range(values) or _conflicts(values)
        if problems:
            raise ValueError(_listed(None, problems))


@dataclass(frozen=True)
class _Interval:
    """The numbers that a key may have, and their words in messages."""

    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        return above and (value < self.high if self.without_high else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.without_low else 'of at least'} {self.low:g}"
        left, right = "(" if self.without_low else "[", ")" if self.without_high else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


_POSITIVE = _Interval(0, without_low=True)
_NOT_NEGATIVE = _Interval(0)
_SHARE = _Interval(0, 1)
_BELOW_ONE = _Interval(0, 1, without_high=True)
_UP_TO_ONE = _Interval(0, 1, without_low=True)
_COUNT = _Interval(1)
_SIZE = _Interval(32)  # below, the last stage of a model with stride 32 has no pixel

_INTERVALS = {
    "layer_scale_init_value": _NOT_NEGATIVE,
    "drop_path_rate": _BELOW_ONE,
    "head_init_scale": _POSITIVE,
    "image_size": _SIZE,
    "validation_fraction": _BELOW_ONE,
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "accumulation_steps": _COUNT,
    "learning_rate": _POSITIVE,
    "min_learning_rate": _NOT_NEGATIVE,
    "warmup_epochs": _NOT_NEGATIVE,
    "warmup_learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "beta_1": _BELOW_ONE,
    "beta_2": _BELOW_ONE,
    "epsilon": _POSITIVE,
    "clip_norm": _NOT_NEGATIVE,
    "layer_decay": _UP_TO_ONE,
    "ema_decay": _BELOW_ONE,
    "flip": _SHARE,
    "color_jitter": _NOT_NEGATIVE,
    "erase": _SHARE,
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "mix_probability": _SHARE,
    "switch_probability": _SHARE,
    "label_smoothing": _BELOW_ONE,
    "repeats": _COUNT,
    "eval_image_size": _SIZE,
    "eval_crop": _UP_TO_ONE,
    "eval_resize_size": _NOT_NEGATIVE,
    "distillation_weight": _SHARE,
    "distillation_temperature": _POSITIVE,
    "seed": _NOT_NEGATIVE,
    "checkpoint_minutes": _NOT_NEGATIVE,
    "keep_checkpoints": _COUNT,
    "distribution.model_devices": _COUNT,
}

_CHOICES = {
    "architecture": tuple(VARIANTS),
    "precision": PRECISIONS,
    "schedule_unit": SCHEDULE_UNITS,
    "layer_decay_groups": LAYER_DECAY_GROUPS,
    "interpolation": INTERPOLATIONS,
    "eval_resize_mode": RESIZE_MODES,
    "eval_interpolation": INTERPOLATIONS,
}

_PAIR_LIMITS = {"crop_scale": 1.0, "crop_ratio": math.inf}


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
    for key, command in _OF_FEATURES.items():
        if key in _parse(path):
            raise ValueError(
                f"Expected a recipe for training, received '{path}', which evaluates frozen features. "
                f"Pass it to `keras-convnext {command}`."
            )
    values, problems = _read(path, Recipe, overrides)
    if problems:
        raise ValueError(_listed(path, problems))
    for key in ("data", "weights", "teacher"):
        folder = Path.cwd() if key in overrides else path.resolve().parent
        place = folder / os.path.expanduser(values[key])
        if values[key] and (key == "data" or place.exists()):
            values[key] = str(place)
    problems = _out_of_range(values) or _conflicts(values)
    if problems:
        raise ValueError(_listed(path, problems))
    return _made(Recipe, values)


def replaced(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values, by key; those of a table after its name and a dot.

    Raises:
        ValueError: a key is unknown, or a value outside its range.

    Example:
        replaced(load_recipe("smoke"), {"epochs": 1, "distribution.engine": "none"})
    """
    values = _values(recipe)
    changes = _flat(changes, Recipe)
    problems = [_unknown_key(key, value, list(values)) for key, value in changes.items() if key not in values]
    if problems:
        raise ValueError(_listed(None, problems))
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
    raise ValueError(_listed(path, problems))


def _read(path: Path, cls: type, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of a file and of `overrides` by key, converted, and what is wrong with keys and types."""
    types = _types(cls)
    given = _flat(_parse(path), cls)
    problems = [_unknown_key(key, value, list(types)) for key, value in given.items() if key not in types]
    for key, value in overrides.items():
        if key in types:
            given[key] = _from_text(value, types[key]) if isinstance(value, str) else value
        else:
            problems.append(f"{_unknown_key(key, value, list(types))} (it was given as an override)")
    given = _defaults(cls) | given
    problems += [f"{name}: missing, expected {_words(types[name])}" for name in types if name not in given]
    values = {name: _converted(given[name], types[name]) for name in types if name in given}
    return values, problems + _mistyped(values, cls)


def _tables(cls: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves, tables of its file."""
    types = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: types[name] for name in names if dataclasses.is_dataclass(types[name])}


def _types(cls: type) -> dict[str, Any]:
    """The type of each key; a key of a table stands after the table's name and a dot."""
    types, tables = typing.get_type_hints(cls), _tables(cls)
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in tables:
            keys |= {f"{field.name}.{key}": kind for key, kind in _types(tables[field.name]).items()}
        else:
            keys[field.name] = types[field.name]
    return keys


def _defaults(cls: type) -> dict[str, Any]:
    """The values of the tables that a file leaves out."""
    return {
        f"{name}.{key}": value
        for name, table in _tables(cls).items()
        for key, value in _values(table()).items()
    }


def _flat(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Values with those of known tables taken out of them, by "table.key"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in _tables(cls) and dataclasses.is_dataclass(value):
            value = _values(value)
        if key in _tables(cls) and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _made(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass of flat values."""
    plain = {key: value for key, value in values.items() if "." not in key}
    for name, table in _tables(cls).items():
        prefix = f"{name}."
        inner = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        plain[name] = table(**inner)
    return cls(**plain)


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
    message = unknown("recipe", path.stem, known)
    raise ValueError(
        f"{message}. Expected one of these names, or the path of a TOML file; received {text!r}."
    )


def known_recipes() -> list[str]:
    """Return the names of the published recipes, those of `recipes_folder`, in order."""
    return sorted(path.stem for path in recipes_folder().glob("*.toml"))


def recipes_folder() -> Path:
    """Return the folder of the published recipes and their small data sets, `digits` and `flowers`.

    It lies in the package where that is installed, and beside it in the repository. Of a package that is
    imported from a zip file a copy in a temporary folder is returned, which is removed when the process ends.
    """
    inside = _inside()
    if not inside.is_dir():
        return Path(__file__).resolve().parents[2] / "recipes"
    return inside if isinstance(inside, Path) else _unpacked()


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
    for key, value in _values(recipe).items():
        before, (table, _, key) = table, key.rpartition(".")
        if table != before:
            lines += ["", f"[{table}]"]
        if isinstance(recipe, Recipe) and key in _SECTIONS:
            lines += [""] * bool(lines) + [f"# {_SECTIONS[key]}"]
        lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return what decides the result of a run: all keys but titles, the keeping of checkpoints and devices.

    Two runs of the same identity may share a folder. The values are str, int, float, bool and list, so that
    they are equal after JSON.

    Returns:
        The values by key.
    """
    values = {
        key: value for key, value in _values(recipe).items() if key.partition(".")[0] not in _NOT_IDENTITY
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


def warnings_for(
    recipe: Recipe,
    *,
    has_weights: bool,
    is_self_supervised: bool = False,
    trained_size: int | None = None,
    has_new_head: bool = True,
    num_steps: int | None = None,
) -> list[str]:
    """Tell where a recipe's values don't fit the weights that it starts from.

    The bounds lie between the published values for the weights at hand and those for other weights: what
    most often goes wrong is that pretrained weights are fine-tuned with the rate of training from scratch. No
    published recipe is warned of with its own weights.

    Args:
        recipe: the recipe.
        has_weights: whether training starts from weights, not at random.
        is_self_supervised: whether these come from training without labels (FCMAE), which leaves more to
            learn and has higher published rates.
        trained_size: side in pixels of the images that the weights were trained on, or None.
        has_new_head: whether the classifier begins at random.
        num_steps: optimizer steps of the whole run, or None.

    Returns:
        Sentences for people, each with the value, the published one and what to change; [] when all fits.

    Example:
        warnings_for(load_recipe("imagenet1k_convnext_tiny"), has_weights=False)     # []
    """
    if has_weights:
        messages = _warnings_with_weights(recipe, is_self_supervised, trained_size, has_new_head)
    else:
        messages = _warnings_from_scratch(recipe)
    return messages + _warnings_always(recipe, num_steps)


def _warnings_with_weights(
    recipe: Recipe, is_self_supervised: bool, trained_size: int | None, has_new_head: bool
) -> list[str]:
    messages = []
    per_256 = recipe.learning_rate * 256 / recipe.batch_size
    if recipe.trainable == "all" and is_self_supervised and per_256 > 2.5e-3:
        messages.append(
            f"learning_rate {recipe.learning_rate:g} at batch_size {recipe.batch_size} is {per_256:.2g} "
            "per 256 images. Self-supervised weights were fine-tuned at 2e-4 to 1.25e-3 per 256 (Woo et "
            f"al. 2023, tables 9 to 12). Set learning_rate = {8e-4 * recipe.batch_size / 256:.2g}."
        )
    if (
        recipe.trainable == "all"
        and not is_self_supervised
        and (per_256 > 5e-4 or recipe.learning_rate > 1e-3)
    ):
        messages.append(
            f"learning_rate {recipe.learning_rate:g} at batch_size {recipe.batch_size} is a rate for "
            "training from scratch, which destroys what the weights have learned. They were fine-tuned "
            "at 5e-5 with batches of 512 (Liu et al. 2022, table 6). Set learning_rate to 5e-5, and for "
            f"few images at most to {min(1e-3, 4e-4 * recipe.batch_size / 256):.2g}."
        )
    if recipe.trainable == "all" and recipe.weight_decay > (0.5 if is_self_supervised else 0.1):
        published = (
            "0.05 to 0.3 (Woo et al. 2023, tables 9 to 12)"
            if is_self_supervised
            else "1e-8 (Liu et al. 2022, table 6)"
        )
        messages.append(
            f"weight_decay {recipe.weight_decay:g} pulls the weights to 0 from what they were trained to "
            f"be. Published for fine-tuning: {published}. Set weight_decay to such a value."
        )
    if recipe.trainable == "all" and has_new_head and recipe.head_init_scale > 0.1:
        messages.append(
            f"head_init_scale {recipe.head_init_scale:g} lets a random classifier send large gradients "
            "into trained weights at the first steps. Published for fine-tuning: 0.001 (Liu et al. 2022, "
            "table 6; Woo et al. 2023, tables 9 to 13). Set head_init_scale = 0.001."
        )
    if trained_size is not None and not trained_size / 2 < recipe.image_size <= 2.3 * trained_size:
        messages.append(
            f"image_size {recipe.image_size} is far from the {trained_size} pixels of the weights, whose "
            "features fit objects of that size. Published fine-tuning goes from 224 to 224, 384 and 512. "
            f"Set image_size between {trained_size // 2 + 1} and {int(2.3 * trained_size)}, or choose "
            "weights of that size."
        )
    return messages


def _warnings_from_scratch(recipe: Recipe) -> list[str]:
    messages = []
    per_256 = recipe.learning_rate * 256 / recipe.batch_size
    if recipe.trainable != "all":
        messages.append(
            f'trainable "{recipe.trainable}" leaves the rest of the model at its random weights. Set '
            'weights to a tag, or trainable = "all".'
        )
    if per_256 < 5e-5:
        messages.append(
            f"learning_rate {recipe.learning_rate:g} at batch_size {recipe.batch_size} is {per_256:.2g} "
            "per 256 images, a rate for fine-tuning. Random weights were trained at 2.5e-4 per 256, that "
            "is 4e-3 with batches of 4096 (Liu et al. 2022, table 5). Set learning_rate = "
            f"{2.5e-4 * recipe.batch_size / 256:.2g} or set weights to a tag."
        )
    if recipe.learning_rate > 1e-2:
        messages.append(
            f"learning_rate {recipe.learning_rate:g} is high for AdamW with any batch_size. The highest "
            "published one is 4e-3 (Liu et al. 2022, table 5). Set learning_rate to at most that."
        )
    if recipe.weight_decay < 1e-4:
        messages.append(
            f"weight_decay {recipe.weight_decay:g} is a value for fine-tuning; from random weights the "
            "model overfits without it. Published: 0.05 (Liu et al. 2022, table 5). Set weight_decay = "
            "0.05."
        )
    if recipe.layer_decay < 1:
        messages.append(
            f"layer_decay {recipe.layer_decay:g} slows down the first layers, which are random and have "
            "all to learn. It is published for fine-tuning only. Set layer_decay = 1.0 or set weights to "
            "a tag."
        )
    if recipe.head_init_scale < 0.1:
        messages.append(
            f"head_init_scale {recipe.head_init_scale:g} shrinks the first gradients of a model that is "
            "random throughout. It is published for fine-tuning only. Set head_init_scale = 1.0 or set "
            "weights to a tag."
        )
    return messages


def _warnings_always(recipe: Recipe, num_steps: int | None) -> list[str]:
    messages = []
    # 224 / 176 of torchvision is the widest published; 288 / 224 is where the drop was seen.
    if not 0.9 <= recipe.eval_image_size / recipe.image_size <= 1.28:
        messages.append(
            f"eval_image_size {recipe.eval_image_size} differs much from image_size {recipe.image_size}. "
            "A model can lose points away from its training size: timm's table has "
            "convnext_tiny.fb_in22k_ft_in1k at 82.90 with 224 pixels and at 78.95 with 288. Set "
            f"eval_image_size between {math.ceil(0.9 * recipe.image_size)} and "
            f"{int(1.28 * recipe.image_size)}."
        )
    if recipe.warmup_epochs > recipe.epochs / 4:
        messages.append(
            f"warmup_epochs {recipe.warmup_epochs:g} is more than a quarter of the {recipe.epochs} "
            "epochs. The longest published one is a fifth (Woo et al. 2023, table 11). Set warmup_epochs "
            f"to at most {recipe.epochs / 5:g}."
        )
    if num_steps is not None and recipe.ema_decay and num_steps * (1 - recipe.ema_decay) < 3:
        highest = max(0.0, math.floor(1000 * (1 - 3 / num_steps)) / 1000)
        messages.append(
            f"ema_decay {recipe.ema_decay:g} averages over about {1 / (1 - recipe.ema_decay):.0f} steps, "
            f"but the run has {num_steps}: its first weights would still count for "
            f"{recipe.ema_decay**num_steps:.0%} of what is saved. The papers' 0.9999 is for runs of more "
            f"than 30000 steps. Set ema_decay to {f'at most {highest:g}, or to ' if highest else ''}0."
        )
    if recipe.drop_path_rate > 0.3 and VARIANTS[recipe.architecture].parameters < 30e6:
        messages.append(
            f"drop_path_rate {recipe.drop_path_rate:g} is high for {recipe.architecture}. The highest "
            "published one at its size is 0.2 (Woo et al. 2023, table 10). Set drop_path_rate to at most "
            "0.2."
        )
    return messages


def _values(recipe: Any) -> dict[str, Any]:
    """The values by key, those of a table by "table.key"."""
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return _flat(fields, type(recipe))


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


def _listed(path: str | os.PathLike[str] | None, problems: list[str]) -> str:
    received = "one" if path is None else f"'{path}'"
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"Expected a recipe in which every key is known and fits, received {received} with {count}:{lines}"


def _unknown_key(key: str, value: Any, names: list[str]) -> str:
    if isinstance(value, dict):
        tables = sorted({name.partition(".")[0] for name in names if "." in name})
        known = f"no table but [{'], ['.join(tables)}]" if tables else "no tables"
        return f"{key}: unknown table, expected {known}: a recipe is flat. Remove the line [{key}]"
    near = difflib.get_close_matches(key, names, 1)
    return f"{key}: unknown key" + (f", did you mean {near[0]!r}?" if near else ", remove it")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _converted(value: Any, kind: Any) -> Any:
    """The value as its type has it where that loses nothing, else as it is."""
    if kind is float and _is_number(value):
        return float(value)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_converted(item, typing.get_args(kind)[0]) for item in value)
    return value


def _is_of(value: Any, kind: Any) -> bool:
    if kind is float:
        return _is_number(value) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        is_long = len(value) > 0 if Ellipsis in kinds else len(value) == len(kinds)
        return is_long and all(_is_of(item, kinds[0]) for item in value)
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    names = {str: "text in quotes", int: "an integer", float: "a number", bool: "true or false"}
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        count = "a list" if Ellipsis in kinds else f"a list of {len(kinds)}"
        return f"{count}, each {names[kinds[0]]}"
    return names[kind]


def _mistyped(values: Mapping[str, Any], cls: type) -> list[str]:
    types = _types(cls)
    return [
        f"{key}: expected {_words(types[key])}, received {_toml_value(value)}"
        for key, value in values.items()
        if not _is_of(value, types[key])
    ]


def _from_text(text: str, kind: Any) -> Any:
    """The value that a text of the command line means; the text itself where it has no such meaning."""
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


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    return repr(value)


def _out_of_range(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, value in values.items():
        expected = None
        if key in _INTERVALS and value not in _INTERVALS[key]:
            expected = f"a number {_INTERVALS[key]}"
        elif key in _PAIR_LIMITS and not 0 < value[0] <= value[1] <= _PAIR_LIMITS[key]:
            at_most = "" if math.isinf(_PAIR_LIMITS[key]) else f" and at most {_PAIR_LIMITS[key]:g}"
            expected = f"[smallest, largest], above 0{at_most}"
        elif key in _CHOICES and value not in _CHOICES[key]:
            near = difflib.get_close_matches(value, _CHOICES[key], 3)
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            expected = f"one of {', '.join(_CHOICES[key])}{hint}"
        elif key == "distribution.engine" and value not in ENGINES:
            near = difflib.get_close_matches(value, ENGINES, 3)
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            known = ", ".join(f"{name} ({backend})" for name, backend in ENGINES.items())
            expected = f"one of {known}{hint}"
        elif key == "policy" and value.split("-")[0] not in POLICIES:
            near = difflib.get_close_matches(value.split("-")[0], POLICIES, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            expected = f"a name that begins with one of {', '.join(POLICIES)}{hint}"
        elif key == "trainable" and not re.fullmatch(r"all|head|lora:[1-9]\d*", value):
            expected = '"all", "head" or "lora:RANK" with a rank from 1 up, such as "lora:8"'
        if expected is not None:
            problems.append(f"{key}: expected {expected}, received {_toml_value(value)}")
    return problems


def _conflicts(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with values that are right each by itself."""
    problems = []
    variant = VARIANTS[values["architecture"]]
    if variant.version == 2 and values["layer_scale_init_value"]:
        problems.append(
            f"layer_scale_init_value: expected 0 for {variant.name}, whose blocks have GRN in place of "
            f"LayerScale, received {values['layer_scale_init_value']!r}"
        )
    if variant.layer_scale_init_value and not values["layer_scale_init_value"]:
        problems.append(
            f"layer_scale_init_value: expected above 0 for {variant.name}, whose weight files hold "
            f"LayerScale (the papers' is {variant.layer_scale_init_value!r}), received 0.0"
        )
    if variant.isotropic and values["layer_decay"] < 1:
        problems.append(
            f"layer_decay: expected 1 for {variant.name}, as none is published for isotropic models, "
            f"received {values['layer_decay']!r}"
        )
    if values["batch_size"] % values["accumulation_steps"]:
        problems.append(
            f"accumulation_steps: expected a divisor of batch_size {values['batch_size']}, "
            f"received {values['accumulation_steps']}"
        )
    elif (values["mixup"] or values["cutmix"]) and values["batch_size"] // values["accumulation_steps"] % 2:
        problems.append(
            "batch_size: expected an even number of images in a micro-batch, as mixup and cutmix take pairs, "
            f"received {values['batch_size']} in {values['accumulation_steps']} micro-batches"
        )
    for key in ("min_learning_rate", "warmup_learning_rate"):
        if values[key] > values["learning_rate"]:
            problems.append(
                f"{key}: expected at most learning_rate {values['learning_rate']!r}, received {values[key]!r}"
            )
    if values["warmup_epochs"] > values["epochs"]:
        problems.append(
            f"warmup_epochs: expected at most epochs {values['epochs']}, received {values['warmup_epochs']!r}"
        )
    if values["val_split"] and values["validation_fraction"]:
        problems.append(
            f"validation_fraction: expected 0 beside val_split {values['val_split']!r}, which is evaluated "
            f'already, received {values["validation_fraction"]!r}. Or set val_split = ""'
        )
    if bool(values["teacher"]) != (values["distillation_weight"] > 0):
        problems.append(
            "distillation_weight: expected above 0 with a teacher and 0 without, received "
            f"{values['distillation_weight']!r} with teacher {_toml_value(values['teacher'])}"
        )
    problems += _unknown_tag("weights", values["weights"], values["architecture"])
    problems += _unknown_tag("teacher", values["teacher"], None)
    return problems


def _unknown_tag(key: str, value: str, architecture: str | None) -> list[str]:
    if (
        not value
        or "/" in value
        or os.sep in value
        or value.endswith(WEIGHT_SUFFIXES)
        or Path(value).exists()
    ):
        return []
    try:
        find_checkpoint(value, architecture)
    except ValueError as error:
        return [f'{key}: expected a tag, the path of a weight file or "", received {value!r}. {error}']
    return []
