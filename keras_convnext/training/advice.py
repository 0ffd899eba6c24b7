"""Warnings about a recipe whose values are likely a mistake."""

import math

from keras_convnext.training.recipe import Recipe
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

    The bounds lie between the published values for the weights at hand and those for other weights: what most
    often goes wrong is that pretrained weights are fine-tuned with the rate of training from scratch. No
    published recipe is warned of with its own weights.

    `is_self_supervised` weights are trained without labels (FCMAE), which leaves more to learn and has higher
    published rates. `trained_size` is the side in pixels of the images of the weights; `has_new_head` says
    whether the classifier begins at random; `num_steps` are optimizer steps of the whole run.
    """
    if has_weights:
        messages = _warnings_with_weights(recipe, is_self_supervised, trained_size, has_new_head)
    else:
        messages = _warnings_from_scratch(recipe)
    return messages + _warnings_always(recipe, num_steps)


def _warnings_with_weights(
    recipe: Recipe, is_self_supervised: bool, trained_size: int | None, has_new_head: bool
) -> list[str]:
    model, optimizer = recipe.model, recipe.optimizer
    messages = []
    per_256 = optimizer.learning_rate * 256 / optimizer.batch_size
    if model.trainable == "all" and is_self_supervised and per_256 > 2.5e-3:
        messages.append(
            f"learning_rate {optimizer.learning_rate:g} at batch_size {optimizer.batch_size} is "
            f"{per_256:.2g} per 256 images. Self-supervised weights were fine-tuned at 2e-4 to 1.25e-3 "
            "per 256 (Woo et al. 2023, tables 9 to 12). Set learning_rate = "
            f"{8e-4 * optimizer.batch_size / 256:.2g}."
        )
    if (
        model.trainable == "all"
        and not is_self_supervised
        and (per_256 > 5e-4 or optimizer.learning_rate > 1e-3)
    ):
        messages.append(
            f"learning_rate {optimizer.learning_rate:g} at batch_size {optimizer.batch_size} is a rate for "
            "training from scratch, which destroys what the weights have learned. They were fine-tuned "
            "at 5e-5 with batches of 512 (Liu et al. 2022, table 6). Set learning_rate to 5e-5, and for "
            f"few images at most to {min(1e-3, 4e-4 * optimizer.batch_size / 256):.2g}."
        )
    if model.trainable == "all" and optimizer.weight_decay > (0.5 if is_self_supervised else 0.1):
        published = (
            "0.05 to 0.3 (Woo et al. 2023, tables 9 to 12)"
            if is_self_supervised
            else "1e-8 (Liu et al. 2022, table 6)"
        )
        messages.append(
            f"weight_decay {optimizer.weight_decay:g} pulls the weights to 0 from what they were trained to "
            f"be. Published for fine-tuning: {published}. Set weight_decay to such a value."
        )
    if model.trainable == "all" and has_new_head and model.head_init_scale > 0.1:
        messages.append(
            f"head_init_scale {model.head_init_scale:g} lets a random classifier send large gradients "
            "into trained weights at the first steps. Published for fine-tuning: 0.001 (Liu et al. 2022, "
            "table 6; Woo et al. 2023, tables 9 to 13). Set head_init_scale = 0.001."
        )
    if trained_size is not None and not trained_size / 2 < model.image_size <= 2.3 * trained_size:
        messages.append(
            f"image_size {model.image_size} is far from the {trained_size} pixels of the weights, whose "
            "features fit objects of that size. Published fine-tuning goes from 224 to 224, 384 and 512. "
            f"Set image_size between {trained_size // 2 + 1} and {int(2.3 * trained_size)}, or choose "
            "weights of that size."
        )
    return messages


def _warnings_from_scratch(recipe: Recipe) -> list[str]:
    model, optimizer = recipe.model, recipe.optimizer
    messages = []
    per_256 = optimizer.learning_rate * 256 / optimizer.batch_size
    if model.trainable != "all":
        messages.append(
            f'trainable "{model.trainable}" leaves the rest of the model at its random weights. Set '
            'weights to a tag, or trainable = "all".'
        )
    if per_256 < 5e-5:
        messages.append(
            f"learning_rate {optimizer.learning_rate:g} at batch_size {optimizer.batch_size} is "
            f"{per_256:.2g} per 256 images, a rate for fine-tuning. Random weights were trained at 2.5e-4 "
            "per 256, that is 4e-3 with batches of 4096 (Liu et al. 2022, table 5). Set learning_rate = "
            f"{2.5e-4 * optimizer.batch_size / 256:.2g} or set weights to a tag."
        )
    if optimizer.learning_rate > 1e-2:
        messages.append(
            f"learning_rate {optimizer.learning_rate:g} is high for AdamW with any batch_size. The highest "
            "published one is 4e-3 (Liu et al. 2022, table 5). Set learning_rate to at most that."
        )
    if optimizer.weight_decay < 1e-4:
        messages.append(
            f"weight_decay {optimizer.weight_decay:g} is a value for fine-tuning; from random weights the "
            "model overfits without it. Published: 0.05 (Liu et al. 2022, table 5). Set weight_decay = "
            "0.05."
        )
    if optimizer.layer_decay < 1:
        messages.append(
            f"layer_decay {optimizer.layer_decay:g} slows down the first layers, which are random and have "
            "all to learn. It is published for fine-tuning only. Set layer_decay = 1.0 or set weights to "
            "a tag."
        )
    if model.head_init_scale < 0.1:
        messages.append(
            f"head_init_scale {model.head_init_scale:g} shrinks the first gradients of a model that is "
            "random throughout. It is published for fine-tuning only. Set head_init_scale = 1.0 or set "
            "weights to a tag."
        )
    return messages


def _warnings_always(recipe: Recipe, num_steps: int | None) -> list[str]:
    model, optimizer = recipe.model, recipe.optimizer
    messages = []
    # 224 / 176 of torchvision is the widest published; 288 / 224 is where the drop was seen.
    eval_size = recipe.evaluation.eval_image_size
    if not 0.9 <= eval_size / model.image_size <= 1.28:
        messages.append(
            f"eval_image_size {eval_size} differs much from image_size {model.image_size}. "
            "A model can lose points away from its training size: timm's table has "
            "convnext_tiny.fb_in22k_ft_in1k at 82.90 with 224 pixels and at 78.95 with 288. Set "
            f"eval_image_size between {math.ceil(0.9 * model.image_size)} and "
            f"{int(1.28 * model.image_size)}."
        )
    if optimizer.warmup_epochs > optimizer.epochs / 4:
        messages.append(
            f"warmup_epochs {optimizer.warmup_epochs:g} is more than a quarter of the {optimizer.epochs} "
            "epochs. The longest published one is a fifth (Woo et al. 2023, table 11). Set warmup_epochs "
            f"to at most {optimizer.epochs / 5:g}."
        )
    if num_steps is not None and optimizer.ema_decay and num_steps * (1 - optimizer.ema_decay) < 3:
        highest = max(0.0, math.floor(1000 * (1 - 3 / num_steps)) / 1000)
        messages.append(
            f"ema_decay {optimizer.ema_decay:g} averages over about {1 / (1 - optimizer.ema_decay):.0f} "
            f"steps, but the run has {num_steps}: its first weights would still count for "
            f"{optimizer.ema_decay**num_steps:.0%} of what is saved. The papers' 0.9999 is for runs of more "
            f"than 30000 steps. Set ema_decay to {f'at most {highest:g}, or to ' if highest else ''}0."
        )
    if model.drop_path_rate > 0.3 and VARIANTS[model.architecture].parameters < 30e6:
        messages.append(
            f"drop_path_rate {model.drop_path_rate:g} is high for {model.architecture}. The highest "
            "published one at its size is 0.2 (Woo et al. 2023, table 10). Set drop_path_rate to at most "
            "0.2."
        )
    return messages
