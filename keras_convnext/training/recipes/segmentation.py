"""A recipe of semantic segmentation: UPerNet on photos with label maps.

Nothing here needs a Keras backend, so a recipe is checked before one starts.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

import pydantic

from keras_convnext._settings import (
    BelowOne,
    Count,
    FromZero,
    NotNegative,
    Settings,
    SettingsError,
    key,
    one_of,
)
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation.inference import MODES
from keras_convnext.data.segmentation.labels import MEANS
from keras_convnext.data.segmentation.train_transform import SegmentationAugmentation
from keras_convnext.training.recipes.classification import (
    AdamW,
    Distribution,
    Run,
    Size,
    above,
    model_conflicts,
)
from keras_convnext.variants import VARIANTS

_STAGED = [name for name, variant in VARIANTS.items() if not variant.isotropic]


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values) or not all(0 <= value <= 65_535 for value in values):
        raise ValueError("different values from 0 to 65535")
    return values


class Model(Settings):
    """What is trained, and from where: the table [model]."""

    architecture: Annotated[str, one_of(_STAGED)] = key(
        "a name that `keras-convnext list` knows, not an isotropic one"
    )
    weights: str = key(
        'where it starts: a tag or the path of a weight file, of a segmenter too; "" for random weights'
    )
    layer_scale_init_value: NotNegative = key("start of LayerScale; 0 for V2, which has GRN in its place")
    drop_path_rate: BelowOne = key("of the last block; it grows linearly from 0 at the first")
    channels: Annotated[int, pydantic.Field(ge=2)] = key(
        "width of UPerNet's heads; weights of one have theirs"
    )
    crop_size: Annotated[tuple[Size, Size], pydantic.Strict(False)] = key(
        "height and width in pixels of the training crops"
    )
    precision: Annotated[str, one_of(("float32", "mixed_bfloat16", "mixed_float16"))] = key(
        "float32, mixed_bfloat16 or mixed_float16 (with loss scaling)"
    )
    rematerialize: bool = key("compute the blocks again in the backward pass, for less memory")


class Data(Settings):
    """The photos and label maps: the table [data]."""

    source: str = key('path of the data, relative to the recipe\'s folder; "" when it must be given')
    train_split: str = key('split to train on; "" for the data\'s own, or all')
    val_split: str = key('split that is evaluated; "" for the data\'s own, or none')
    validation_fraction: BelowOne = key(
        "share of the training photos that is held out where there is no other split to evaluate"
    )
    ignored_values: Annotated[tuple[int, ...], pydantic.Strict(False), pydantic.AfterValidator(_distinct)] = (
        key("values of the label maps that stand for no label; the others are classes, in their order")
    )


class Optimizer(AdamW):
    """AdamW with a rate that falls in a straight line: the table [optimizer]."""

    steps: Count = key("optimizer steps of the whole run")
    evaluations: Count = key(
        "times that the run is evaluated and logged, at equal distances: its epochs in log.csv; a divisor of "
        "`steps`"
    )
    warmup_steps: FromZero = key("optimizer steps of the linear warmup")


class Loss(Settings):
    """Cross-entropy of the pixels: the table [loss]."""

    loss_mean: Annotated[str, one_of(MEANS)] = key(
        "all to divide by all pixels (mmsegmentation), labelled by those with a label (transformers)"
    )
    auxiliary_weight: NotNegative = key("weight of the auxiliary head's loss; 0 to build no such head")


class Evaluation(Settings):
    """How the evaluated photos are prepared: the table [evaluation]."""

    eval_image_size: Size = key("shorter side in pixels, the longer one at most four times that")
    eval_mode: Annotated[str, one_of(MODES)] = key(
        "whole, slide (square windows of that side) or multi_scale"
    )


class SegmentationRecipe(Settings):
    """One training run of UPerNet, as plain values in tables, which are described in `recipes/README.md`.

    Reference: Liu et al. 2022 (arXiv:2201.03545), appendix A.3.

    Raises:
        ValueError: names every value that is outside its range or does not go with another.

    Example:
        recipe = load_recipe("ade20k_upernet_convnext_tiny")
        recipe.optimizer.steps, recipe.model.channels
    """

    aliases: ClassVar[Mapping[str, str]] = {"data": "data.source"}

    title: str = key("one line that a reader knows the recipe by")
    reference: str = key("paper and table, or where else the values come from")
    task: Annotated[str, one_of(("segmentation",))] = key("segmentation")
    model: Model
    data: Data
    optimizer: Optimizer
    loss: Loss
    augmentation: SegmentationAugmentation
    evaluation: Evaluation
    run: Run
    distribution: Distribution = Distribution()

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := [*_conflicts(self)]:
            raise SettingsError(SegmentationRecipe, problems)
        return self

    def preprocessing(self, trained: Any) -> Preprocessing:
        """How the evaluation prepares photos, with the normaliser of what the weights were trained on."""
        return Preprocessing(
            self.evaluation.eval_image_size,
            crop_fraction=1.0,
            interpolation="bilinear",
            mean=trained.mean,
            std=trained.std,
        )


def _conflicts(recipe: SegmentationRecipe) -> Iterator[str]:
    yield from model_conflicts(recipe)
    optimizer = recipe.optimizer
    yield from above(optimizer, "warmup_steps", "steps")
    if optimizer.steps % optimizer.evaluations:
        yield (
            f"evaluations: expected a divisor of steps {optimizer.steps}, received {optimizer.evaluations}"
        )
