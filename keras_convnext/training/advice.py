"""Warnings about a recipe whose values are likely a mistake."""

import math
from collections.abc import Iterator

from keras_convnext.training.recipes.classification import Recipe
from keras_convnext.variants import VARIANTS


def warnings_for(
    recipe: Recipe,
    *,
    has_weights: bool,
    is_self_supervised: bool = False,
    trained_size: int | None = None,
    has_new_head: bool = True,
    num_steps: int | None = None,
) -> list[str]:
    """Tells where a recipe's values do not fit the weights that it starts from, in sentences to print.

    The bounds lie between the published values for the weights at hand and those for other weights.
    `is_self_supervised`: trained without labels (FCMAE); `trained_size`: pixels of the side of their images;
    `has_new_head`: the classifier begins at random; `num_steps`: optimizer steps of the whole run.
    """
    messages: list[str] = []
    if not has_weights:
        messages += _from_scratch(recipe)
    elif recipe.model.trainable == "all":
        messages += _of_all_weights(recipe, is_self_supervised, has_new_head)
    size = recipe.model.image_size
    if has_weights and trained_size is not None and not trained_size / 2 < size <= 2.3 * trained_size:
        messages.append(
            f"image_size {size} is far from the {trained_size} pixels of the weights. Published fine-tuning "
            f"goes from 224 to 224, 384 and 512. Set image_size between {trained_size // 2 + 1} and "
            f"{int(2.3 * trained_size)}, or choose weights of that size."
        )
    return [*messages, *_always(recipe, num_steps)]


def _of_all_weights(recipe: Recipe, is_self_supervised: bool, has_new_head: bool) -> Iterator[str]:
    optimizer, scale = recipe.optimizer, recipe.model.head_init_scale
    rate, batch_size, decay = optimizer.learning_rate, optimizer.batch_size, optimizer.weight_decay
    per_256 = rate * 256 / batch_size
    if is_self_supervised and per_256 > 2.5e-3:
        yield (
            f"learning_rate {rate:g} at batch_size {batch_size} is {per_256:.2g} per 256 images. Published "
            "for self-supervised weights: 2e-4 to 1.25e-3 (Woo et al. 2023, tables 9 to 12). Set "
            f"learning_rate = {8e-4 * batch_size / 256:.2g}."
        )
    if not is_self_supervised and (per_256 > 5e-4 or rate > 1e-3):
        yield (
            f"learning_rate {rate:g} at batch_size {batch_size} is one for training from scratch, which "
            "destroys what the weights have learned. Published: 5e-5 with batches of 512 (Liu et al. 2022, "
            "table 6). Set learning_rate to 5e-5, and for few images at most to "
            f"{min(1e-3, 4e-4 * batch_size / 256):.2g}."
        )
    highest, published = 0.1, "1e-8 (Liu et al. 2022, table 6)"
    if is_self_supervised:
        highest, published = 0.5, "0.05 to 0.3 (Woo et al. 2023, tables 9 to 12)"
    if decay > highest:
        yield (
            f"weight_decay {decay:g} pulls the weights to 0 from what they were trained to be. Published for "
            f"fine-tuning: {published}. Set weight_decay to such a value."
        )
    if has_new_head and scale > 0.1:
        yield (
            f"head_init_scale {scale:g} lets a random classifier send large gradients into trained weights. "
            "Published, and to set: 0.001 (Liu et al. 2022, table 6; Woo et al. 2023, tables 9 to 13)."
        )


def _from_scratch(recipe: Recipe) -> Iterator[str]:
    model, optimizer = recipe.model, recipe.optimizer
    rate, batch_size, decay = optimizer.learning_rate, optimizer.batch_size, optimizer.weight_decay
    per_256 = rate * 256 / batch_size
    if model.trainable != "all":
        yield (
            f'trainable "{model.trainable}" leaves the rest of the model at its random weights. Set '
            'weights to a tag, or trainable = "all".'
        )
    if per_256 < 5e-5:
        yield (
            f"learning_rate {rate:g} at batch_size {batch_size} is {per_256:.2g} per 256 images, a rate for "
            "fine-tuning. Random weights were trained at 2.5e-4 per 256, in batches of 4096 (Liu et al. "
            f"2022, table 5). Set learning_rate = {2.5e-4 * batch_size / 256:.2g} or set weights to a tag."
        )
    if rate > 1e-2:
        yield (
            f"learning_rate {rate:g} is high for AdamW with any batch_size. Set at most 4e-3, the highest "
            "published one (Liu et al. 2022, table 5)."
        )
    if decay < 1e-4:
        yield (
            f"weight_decay {decay:g} is a value for fine-tuning; from random weights the model overfits "
            "without it. Published: 0.05 (Liu et al. 2022, table 5). Set weight_decay = 0.05."
        )
    slowing = {"layer_decay": (optimizer.layer_decay, 1), "head_init_scale": (model.head_init_scale, 0.1)}
    for name, (value, least) in slowing.items():
        if value < least:
            yield (
                f"{name} {value:g} slows down layers that are random too. Such values are published for "
                f"fine-tuning only. Set {name} = 1.0 or set weights to a tag."
            )


def _always(recipe: Recipe, num_steps: int | None) -> Iterator[str]:
    model, optimizer = recipe.model, recipe.optimizer
    # 224 / 176 of torchvision is the widest published; 288 / 224 is where the drop was seen.
    eval_size = recipe.evaluation.eval_image_size
    if not 0.9 <= eval_size / model.image_size <= 1.28:
        yield (
            f"eval_image_size {eval_size} differs much from image_size {model.image_size}. A model can lose "
            "points away from its training size: timm's table has convnext_tiny.fb_in22k_ft_in1k at 82.90 "
            "with 224 pixels and at 78.95 with 288. Set eval_image_size between "
            f"{math.ceil(0.9 * model.image_size)} and {int(1.28 * model.image_size)}."
        )
    if optimizer.warmup_epochs > optimizer.epochs / 4:
        yield (
            f"warmup_epochs {optimizer.warmup_epochs:g} is more than a quarter of the epochs. Published is a "
            f"fifth (Woo et al. 2023, table 11). Set warmup_epochs to at most {optimizer.epochs / 5:g}."
        )
    decay = optimizer.ema_decay
    if num_steps is not None and decay and num_steps * (1 - decay) < 3:
        highest = max(0.0, math.floor(1000 * (1 - 3 / num_steps)) / 1000)
        yield (
            f"ema_decay {decay:g} is for runs of more than {3 / (1 - decay):.0f} steps: of the {num_steps} "
            f"here, the first weights would still be {decay**num_steps:.0%} of what is saved. Set ema_decay "
            f"to {f'at most {highest:g}, or to ' if highest else ''}0."
        )
    if model.drop_path_rate > 0.3 and VARIANTS[model.architecture].parameters < 30e6:
        yield (
            f"drop_path_rate {model.drop_path_rate:g} is high for {model.architecture}. Set at most 0.2, the "
            "highest published one at its size (Woo et al. 2023, table 10)."
        )
