"""A training recipe: a TOML file in which every key is written out, flat but for one table.

A published recipe is a file of the folder `recipes`; the same values as a frozen `Recipe` are what
`trainer.train` takes. Nothing here needs a Keras backend, so a recipe is checked before one starts.
"""

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_convnext.training.layer_decay import LAYER_DECAY_GROUPS
from keras_convnext.training.toml_fields import mistyped, toml_value, values_by_key
from keras_convnext.variants import VARIANTS
from keras_convnext.weights.catalog import find_checkpoint
from keras_convnext.weights.published import WEIGHT_SUFFIXES

Pair = tuple[float, float]

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
SCHEDULE_UNITS = ("step", "epoch")
POLICIES = ("none", "rand", "original", "originalr", "v0", "v0r", "imagenet", "ta_wide")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shorter_side", "squash")

# How a step is divided among devices, and the backend that does so; `distribution.choose` has the engines.
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
OF_FEATURES = {"neighbours": "knn", "selection_fraction": "probe"}


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
        title: str, one line that a reader knows the recipe by.
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
        policy: str that `augment.policies.parse_policy` reads, such as "rand-m9-mstd0.5-inc1" or "none".
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
        keep_checkpoints: int, how many of the last checkpoints are kept, at least 1, besides the best.
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
        values = values_by_key(self)
        problems = mistyped(values, Recipe) or out_of_range(values) or conflicts(values)
        if problems:
            raise ValueError(listed(None, problems))


@dataclass(frozen=True)
class _Interval:
    """The range of numbers that a key may have, and its words in messages."""

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


def out_of_range(values: Mapping[str, Any]) -> list[str]:
    """Lists the values outside the range of their key, one sentence each."""
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
            problems.append(f"{key}: expected {expected}, received {toml_value(value)}")
    return problems


def conflicts(values: Mapping[str, Any]) -> list[str]:
    """Lists the values that are right each by itself but do not go together."""
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
            f"{values['distillation_weight']!r} with teacher {toml_value(values['teacher'])}"
        )
    problems += _unknown_tag("weights", values["weights"], values["architecture"])
    problems += _unknown_tag("teacher", values["teacher"], None)
    return problems


def listed(path: str | os.PathLike[str] | None, problems: list[str]) -> str:
    """Writes the message that lists all problems of a recipe."""
    received = "one" if path is None else f"'{path}'"
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"Expected a recipe in which every key is known and fits, received {received} with {count}:{lines}"


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
