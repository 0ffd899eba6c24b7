"""A recipe of pre-training without labels: FCMAE, a ConvNeXt V2 that predicts the masked cells of images.

Nothing here needs a Keras backend, so a recipe is checked before one starts.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Self

import pydantic

from keras_convnext._settings import (
    BelowOne,
    Count,
    NotNegative,
    Pair,
    Settings,
    SettingsError,
    Share,
    key,
    one_of,
)
from keras_convnext.data.train_transform import Augmentation, Interpolation, check_ordered, check_shares
from keras_convnext.training.recipes.classification import (
    AdamW,
    Data,
    Distribution,
    Evaluation,
    Run,
    Size,
    above,
    model_conflicts,
)
from keras_convnext.variants import VARIANTS

CELL = 32  # pixels: the total stride, one position of the last map

_KNOWN = [name for name, variant in VARIANTS.items() if variant.version == 2 and not variant.isotropic]


def _with_grn(value: str) -> str:
    if value in VARIANTS and value not in _KNOWN:
        raise ValueError(
            f"a ConvNeXt V2, whose response normalisation FCMAE needs: one of {', '.join(_KNOWN)}. V1 and "
            "isotropic models cannot be pre-trained here"
        )
    return value


class Model(Settings):
    """What is trained, and from where: the table [model]."""

    architecture: Annotated[str, pydantic.AfterValidator(_with_grn), one_of(_KNOWN)] = key(
        "a ConvNeXt V2 that `keras-convnext list` knows"
    )
    weights: str = key('where the encoder starts: a tag, the path of a weight file, or "" for random weights')
    drop_path_rate: BelowOne = key("of the last block; it grows linearly from 0 at the first")
    image_size: Size = key("side in pixels of the training crops, a multiple of 32")
    mask_ratio: BelowOne = key(
        "share of the cells of 32 pixels that are masked; int(cells * (1 - it)) are seen"
    )
    decoder_width: Count = key("channels of the decoder")
    decoder_depth: Count = key("blocks of the decoder")
    norm_pix_loss: bool = key(
        "whether each cell is predicted after its own mean and deviation are taken away"
    )
    precision: Annotated[str, one_of(("float32", "mixed_bfloat16", "mixed_float16"))] = key(
        "float32, mixed_bfloat16 or mixed_float16 (with loss scaling)"
    )
    rematerialize: bool = key("compute the blocks again in the backward pass, for less memory")


class Optimizer(AdamW):
    """AdamW with a half cosine after the warmup, step by step: the table [optimizer].

    Here GRN's weights and the mask token decay too, as in the official pre-training, whose fine-tuning alone
    was changed (facebookresearch/ConvNeXt-V2 at 2553895).
    """

    epochs: Count = key("passes over the training images")
    warmup_epochs: NotNegative = key("length of the linear warmup in epochs")


class PretrainingAugmentation(Settings):
    """What training does to images: the table [augmentation]."""

    crop_scale: Annotated[Pair, pydantic.AfterValidator(check_shares)] = key(
        "smallest and largest area of the random crop, as shares of the image"
    )
    crop_ratio: Annotated[Pair, pydantic.AfterValidator(check_ordered)] = key(
        "smallest and largest width / height of the crop"
    )
    interpolation: Interpolation = key("of the crop")
    flip: Share = key("probability of exchanging left and right")

    @property
    def whole(self) -> Augmentation:
        """The same for `batches.train_batches`: nothing else is done."""
        return Augmentation(
            **self.values(), policy="none", erase=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0
        )


class PretrainingRecipe(Settings):
    """One run of pre-training by FCMAE, as plain values in tables, described in `recipes/README.md`.

    Reference: Woo et al. 2023 (arXiv:2301.00808), section 3.1 and table 8; facebookresearch/ConvNeXt-V2
    main_pretrain.py at 2553895.

    Raises:
        ValueError: names every value that is outside its range or does not go with another.

    Example:
        recipe = load_recipe("pretrain")
        recipe.model.mask_ratio, recipe.optimizer.epochs
    """

    aliases: ClassVar[Mapping[str, str]] = {"data": "data.source"}

    title: str = key("one line that a reader knows the recipe by")
    reference: str = key("paper and table, or where else the values come from")
    task: Annotated[str, one_of(("pretraining",))] = key("pretraining")
    model: Model
    data: Data
    optimizer: Optimizer
    augmentation: PretrainingAugmentation
    evaluation: Evaluation
    run: Run
    distribution: Distribution = Distribution()

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := [*_conflicts(self)]:
            raise SettingsError(PretrainingRecipe, problems)
        return self


def _conflicts(recipe: PretrainingRecipe) -> Iterator[str]:
    yield from model_conflicts(recipe)
    yield from above(recipe.optimizer, "warmup_epochs", "epochs")
    sizes = {"image_size": recipe.model.image_size, "eval_image_size": recipe.evaluation.eval_image_size}
    for name, size in sizes.items():
        cells = (size // CELL) ** 2
        seen = int(cells * (1 - recipe.model.mask_ratio))
        if size % CELL:
            lower = size // CELL * CELL
            yield f"{name}: expected a multiple of the {CELL} pixels of a cell, as {lower}, received {size}"
        elif not 0 < seen < cells:
            yield (
                f"mask_ratio: expected to leave 1 to {max(cells - 1, 1)} of {cells} cells of {name} "
                f"{size}, received {recipe.model.mask_ratio!r}, which leaves {seen}. Set another, "
                "or larger images"
            )
