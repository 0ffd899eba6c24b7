"""A training recipe: a TOML file in tables, in which every key is written out.

Nothing here needs a Keras backend, so a recipe is checked before one starts.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

import pydantic

from keras_convnext import distribution
from keras_convnext._settings import (
    BelowOne,
    Count,
    FromZero,
    NotNegative,
    Positive,
    Settings,
    SettingsError,
    Share,
    UpToOne,
    key,
    one_of,
    toml_value,
    up_to,
)
from keras_convnext.data.preprocessing import MAX_SIDE, MIN_CROP_FRACTION, RESIZE_MODES, Preprocessing
from keras_convnext.data.train_transform import Augmentation, Interpolation
from keras_convnext.training.layer_decay import LAYER_DECAY_GROUPS
from keras_convnext.variants import VARIANTS
from keras_convnext.weights.catalog import ALIASES, CHECKPOINTS, find_checkpoint
from keras_convnext.weights.published import Checkpoint
from keras_convnext.weights.resolve import is_path

# How a step is divided among devices, and the backend that does so.
ENGINES = dict.fromkeys(("auto", "none"), "any backend") | {
    engine: backend for backend, engines in distribution.ENGINES.items() for engine in engines
}

# Below, the last stage of a model with stride 32 has no pixel.
Size = Annotated[int, pydantic.Field(ge=32), up_to(MAX_SIDE)]
_Engine = one_of(ENGINES, "one of " + ", ".join(f"{name} ({backend})" for name, backend in ENGINES.items()))


def _trainable(value: str) -> str:
    prefix, _, rank = value.partition(":")
    is_lora = prefix == "lora" and rank.isdecimal() and len(rank) <= 4 and int(rank) > 0
    if value not in ("all", "head") and not is_lora:
        raise ValueError('"all", "head" or "lora:RANK" with a rank from 1 to 9999, such as "lora:8"')
    return value


class Model(Settings):
    """What is trained, and from where: the table [model]."""

    architecture: Annotated[str, one_of(VARIANTS)] = key("a name that `keras-convnext list` knows")
    weights: str = key('where it starts: a tag, the path of a weight file, or "" for random weights')
    layer_scale_init_value: NotNegative = key(
        "start of LayerScale, 0 for none; 0 for V2, which has GRN in its place"
    )
    drop_path_rate: BelowOne = key("of the last block; it grows linearly from 0 at the first")
    head_init_scale: Positive = key("factor of the new classifier's initial weights; 1 leaves them")
    image_size: Size = key("side in pixels of the training crops")
    precision: Annotated[str, one_of(("float32", "mixed_bfloat16", "mixed_float16"))] = key(
        "float32, mixed_bfloat16 or mixed_float16 (with loss scaling)"
    )
    rematerialize: bool = key("compute the blocks again in the backward pass, for less memory")
    trainable: Annotated[str, pydantic.AfterValidator(_trainable)] = key(
        'what learns: "all", "head" (frozen backbone) or "lora:RANK" (low-rank updates of the Dense kernels)'
    )


class Data(Settings):
    """The images: the table [data]."""

    source: str = key('path of the images, relative to the recipe\'s folder; "" when it must be given')
    train_split: str = key('split to train on, or a folder of class folders; "" for the data\'s own, or all')
    val_split: str = key('split that is evaluated; "" for the data\'s own, or none')
    validation_fraction: BelowOne = key(
        "share of the training split that is held out, by class, where there is no other split to evaluate"
    )


class AdamW(Settings):
    """AdamW and what is common to its schedules."""

    batch_size: Count = key("images of one optimizer step")
    accumulation_steps: Count = key("micro-batches of one optimizer step; a divisor of `batch_size`")
    learning_rate: Positive = key("the peak, at this `batch_size`: no arithmetic follows")
    min_learning_rate: NotNegative = key("end of the schedule")
    warmup_learning_rate: NotNegative = key("start of the warmup")
    weight_decay: NotNegative = key("AdamW's; not for biases, norms, scales (one axis) or GRN")
    beta_1: BelowOne = key("of AdamW")
    beta_2: BelowOne = key("of AdamW")
    epsilon: Positive = key("of AdamW")
    clip_norm: NotNegative = key("largest norm of all gradients together, 0 for no clipping")
    layer_decay: UpToOne = key("factor of the learning rate from a layer to the one before; 1 for none")
    layer_decay_groups: Annotated[str, one_of(LAYER_DECAY_GROUPS)] = key(
        "which variables are one layer: group (V1, and V2 Base and Large), single (V2), layer_wise (COCO), "
        "stage_wise (ADE20K) or timm"
    )
    ema_decay: BelowOne = key("of the moving average of the weights, per step; 0 for none")


class Optimizer(AdamW):
    """AdamW with a half cosine after the warmup: the table [optimizer]."""

    epochs: Count = key("passes over the training split")
    epochs_for_images: FromZero = key(
        "number of images that `epochs` fits: with weights in place of the recipe's, epochs follow the data "
        "from there; 0 where they stay",
        0,
        optional=True,
    )
    warmup_epochs: NotNegative = key("length of the linear warmup in epochs")
    warmup_includes_peak: bool = key(
        "whether the last warmup step has the peak (V1: `linspace(start, peak, steps)`) or the first step "
        "after it (V2: start + (peak - start) * step / steps)"
    )
    schedule_unit: Annotated[str, one_of(("step", "epoch"))] = key(
        "step, or epoch for a rate that is constant within an epoch"
    )


class Evaluation(Settings):
    """How the evaluated images are prepared: the table [evaluation]."""

    eval_image_size: Size = key("side in pixels of the evaluated images")
    eval_crop: Annotated[float, pydantic.Field(ge=MIN_CROP_FRACTION, le=1)] = key(
        "`eval_image_size` / size after the resize"
    )
    eval_resize_mode: Annotated[str, one_of(RESIZE_MODES)] = key("shorter_side or squash")
    eval_resize_size: Annotated[int, pydantic.Field(ge=0), up_to(MAX_SIDE)] = key(
        "pixels after the resize; 0 for eval_image_size / eval_crop"
    )
    eval_interpolation: Interpolation = key("bicubic or bilinear")

    @property
    def preprocessing(self) -> Preprocessing:
        """The same as a `Preprocessing`, with ImageNet's mean and standard deviation."""
        stored = {name.removeprefix("eval_"): value for name, value in self.values().items()}
        return Preprocessing.from_stored(**stored | {"resize_size": self.eval_resize_size or None})


class Distillation(Settings):
    """A teacher: the table [distillation]."""

    teacher: str = key('tag or path of the model whose outputs are imitated; "" for none')
    distillation_weight: Share = key("share of the teacher's term in the loss")
    distillation_temperature: Positive = key("what both outputs are divided by")


class Run(Settings):
    """The table [run]."""

    seed: FromZero = key("of weights, order, augmentation and drop path")
    checkpoint_minutes: NotNegative = key(
        "time between two checkpoints within an epoch; 0 for none within an epoch"
    )
    keep_checkpoints: Count = key("how many of the last checkpoints are kept, besides the best")


class Distribution(Settings):
    """How a step is divided among devices, never its result: [distribution], which a file may leave out."""

    engine: Annotated[str, _Engine] = key(
        "auto (by the devices that are there, none for a single one), none, or an engine of the backend",
        "auto",
        optional=True,
    )
    model_devices: Count = key(
        "devices that share the pointwise kernels in model_parallel; the batch is divided among groups of so "
        "many: 8 devices by 2 are four parts of the batch",
        2,
        optional=True,
    )


class Recipe(Settings):
    """One training run, as plain values in tables, which are described in `recipes/README.md`.

    A file that lacks a key is refused, so that what is not written cannot change between two versions.

    Reference: Liu et al. 2022 (arXiv:2201.03545) and Woo et al. 2023 (arXiv:2301.00808), appendix A of both.

    Raises:
        ValueError: names every value that is outside its range or does not go with another.

    Example:
        recipe = load_recipe("smoke")
        recipe.optimizer.learning_rate, recipe.replaced({"epochs": 1}).optimizer.epochs
    """

    aliases: ClassVar[Mapping[str, str]] = {"data": "data.source"}

    title: str = key("one line that a reader knows the recipe by")
    reference: str = key("paper and table, or where else the values come from")
    task: Annotated[str, one_of(("classification",))] = key(
        "what is trained; see below for the keys of segmentation and pre-training",
        "classification",
        optional=True,
    )
    model: Model
    data: Data
    optimizer: Optimizer
    augmentation: Augmentation
    evaluation: Evaluation
    distillation: Distillation
    run: Run
    distribution: Distribution = Distribution()

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := [*_conflicts(self)]:
            raise SettingsError(Recipe, problems)
        return self


def _conflicts(recipe: Recipe) -> Iterator[str]:
    """Gives the values that are right each by itself but do not go together, one sentence each."""
    optimizer, distillation = recipe.optimizer, recipe.distillation
    yield from model_conflicts(recipe)
    size, steps = optimizer.batch_size, optimizer.accumulation_steps
    mixes = recipe.augmentation.mixup or recipe.augmentation.cutmix
    if size % steps == 0 and mixes and size // steps % 2:
        yield (
            "batch_size: expected an even number of images in a micro-batch, as mixup and cutmix take pairs, "
            f"received {size} in {steps} micro-batches"
        )
    yield from above(optimizer, "warmup_epochs", "epochs")
    if bool(distillation.teacher) != (distillation.distillation_weight > 0):
        yield (
            "distillation_weight: expected above 0 with a teacher and 0 without, received "
            f"{distillation.distillation_weight!r} with teacher {toml_value(distillation.teacher)}"
        )
    yield from unknown_tag("teacher", distillation.teacher)


def model_conflicts(recipe: Any) -> Iterator[str]:
    """Gives what does not go together in a recipe of any task: architecture and weights, steps, splits."""
    model, optimizer = recipe.model, recipe.optimizer
    # A recipe for V2 alone has no such key.
    variant, scale = VARIANTS[model.architecture], getattr(model, "layer_scale_init_value", 0.0)
    if variant.version == 2 and scale:
        yield f"layer_scale_init_value: expected 0 for {variant.name}, which has GRN, received {scale!r}"
    if variant.layer_scale_init_value and not scale:
        yield (
            f"layer_scale_init_value: expected above 0 for {variant.name}, whose weight files hold "
            f"LayerScale (the papers' is {variant.layer_scale_init_value!r}), received 0.0"
        )
    if variant.isotropic and (decay := optimizer.layer_decay) < 1:
        yield f"layer_decay: expected 1, as none is published for isotropic models, received {decay!r}"
    size, steps = optimizer.batch_size, optimizer.accumulation_steps
    if size % steps:
        yield f"accumulation_steps: expected a divisor of batch_size {size}, received {steps}"
    yield from above(optimizer, "min_learning_rate", "learning_rate")
    yield from above(optimizer, "warmup_learning_rate", "learning_rate")
    if recipe.data.val_split and recipe.data.validation_fraction:
        yield (
            f"validation_fraction: expected 0 beside val_split {recipe.data.val_split!r}, which is evaluated "
            f'already, received {recipe.data.validation_fraction!r}. Or set val_split = ""'
        )
    row = CHECKPOINTS.get(ALIASES.get(model.weights, model.weights))
    if row is not None and row.architecture != model.architecture:
        yield (
            f"architecture: expected {row.architecture!r}, which weights {model.weights!r} are of, received "
            f"{model.architecture!r}. Set one of the two, or none"
        )
    else:
        yield from unknown_tag("weights", model.weights, model.architecture)


def above(table: Settings, name: str, limit: str) -> Iterator[str]:
    """Gives a value that is larger than another of its table."""
    most, value = getattr(table, limit), getattr(table, name)
    if value > most:
        yield f"{name}: expected at most {limit} {most!r}, received {value!r}"


def published_row(name: str, architecture: str | None = None) -> Checkpoint:
    """Finds published weights by a full tag, or by a short one and the architecture."""
    is_full = "." in name or name in ALIASES
    return find_checkpoint(name, None if is_full else architecture)


def unknown_tag(name: str, value: str, architecture: str | None = None) -> Iterator[str]:
    """Gives what is wrong with a value that is no tag and no path of a weight file."""
    try:
        if value and not is_path(value):
            published_row(value, architecture)
    except ValueError as error:
        yield f'{name}: expected a tag, the path of a weight file or "", received {value!r}. {error}'
