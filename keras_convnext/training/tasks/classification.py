"""Image classification: its data, model, loss, metrics and optimizer."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_convnext import models
from keras_convnext.data import sources
from keras_convnext.data.index import Source
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.model_options import ModelOptions
from keras_convnext.training import distillation, finetune, optimizer, schedule
from keras_convnext.training.recipe import Recipe
from keras_convnext.training.run_state import Plan
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import resolve


def open_data(recipe: Recipe) -> tuple[Source, Source | None]:
    """Opens the images to train on and those to evaluate on; None where there are none.

    Without `val_split` these are the data's validation split (validation, val or valid), else its test split,
    else the part that `validation_fraction` holds out.

    Raises:
        SourceError: the data or one of its splits cannot be used.
        ValueError: there is one class only, or the validation images have classes that are not trained.
    """
    splits = sources.list_splits(recipe.data)
    training = sources.open_source(recipe.data, (recipe.train_split or "train") if splits else None)
    if len(training.classes) < 2:
        raise ValueError(
            f"Expected images of two classes or more, received those of {len(training.classes)} in "
            f"'{recipe.data}': {', '.join(training.classes)}. Name the folder that holds the class folders."
        )
    kinds = {sources.canonical_split(split): split for split in reversed(splits)}
    name = recipe.val_split or kinds.get("validation") or kinds.get("test")
    if name:
        validation = sources.open_source(recipe.data, name)
        return training, _with_classes_of(training, validation)
    if recipe.validation_fraction:
        return sources.hold_out(training, recipe.validation_fraction, recipe.seed)
    return training, None


def build_model(recipe: Recipe, num_classes: int, available: int = 0) -> tuple[Any, bool]:
    """Builds the model of a recipe.

    Args:
        recipe: the recipe.
        num_classes: outputs of the classifier.
        available: classes of the recipe's weights; 0 where they have no classifier, or there are none.

    Returns:
        The model, pixels in 0..255 to logits; whether its classifier begins at random.

    Raises:
        ValueError: the weights do not fit the architecture.
    """
    has_new_head = available != num_classes
    variant = VARIANTS[recipe.architecture]
    side = recipe.image_size if recipe.image_size == recipe.eval_image_size else None
    model = models.load(
        recipe.architecture,
        recipe.weights or None,
        classes=num_classes,
        classifier_activation=None,
        input_shape=(side, side, 3),
        drop_path_rate=0.0 if recipe.trainable == "head" else recipe.drop_path_rate,
        layer_scale_init_value=None if variant.version == 2 else recipe.layer_scale_init_value,
        rematerialize=recipe.rematerialize,
        seed=recipe.seed,
        new_head=True if recipe.weights and has_new_head else None,
    )
    if has_new_head and recipe.head_init_scale != 1:
        finetune.scale_head(model, recipe.head_init_scale)
    finetune.choose_trainable(model, recipe.trainable)
    return model, has_new_head


def describe_weights(recipe: Recipe) -> tuple[resolve.ResolvedWeights, int]:
    """Returns the recipe's weights, and how many classes they have; 0 for random ones."""
    source = resolve.resolve(recipe.architecture, recipe.weights or None)
    _check_has_contents(source)
    return source, 0 if source.is_random else source.classes


def evaluated_images(recipe: Recipe, trained: resolve.ResolvedWeights) -> Preprocessing:
    """Returns how the recipe's evaluation prepares images, with the normaliser of its model."""
    normaliser = trained.preprocessing
    return Preprocessing.from_stored(
        image_size=recipe.eval_image_size,
        crop=recipe.eval_crop,
        resize_mode=recipe.eval_resize_mode,
        resize_size=recipe.eval_resize_size or None,
        interpolation=recipe.eval_interpolation,
        mean=normaliser.mean,
        std=normaliser.std,
    )


def compile_model(recipe: Recipe, student: Any, plan: Plan) -> Any:
    """Returns the model to fit: the student, or the student with its teacher."""
    model, share = student, 1.0
    if recipe.teacher:
        side = recipe.image_size
        source = resolve.resolve(recipe.teacher)
        _check_has_contents(source)
        options = ModelOptions(input_shape=(side, side, 3), classifier_activation=None, name="teacher")
        teacher = models.build(source, options)
        model = distillation.with_teacher(
            student, teacher, recipe.distillation_weight, recipe.distillation_temperature
        )
        share = 1 - recipe.distillation_weight
    hold = plan.steps_per_epoch if recipe.schedule_unit == "epoch" else 1
    model.compile(
        optimizer.AdamW(
            schedule.WarmupCosine(
                recipe.learning_rate,
                plan.total_steps,
                plan.warmup_steps,
                start=recipe.warmup_learning_rate,
                end=recipe.min_learning_rate,
                warmup_includes_peak=recipe.warmup_includes_peak,
                hold_steps=hold,
            ),
            weight_decay=recipe.weight_decay,
            beta_1=recipe.beta_1,
            beta_2=recipe.beta_2,
            epsilon=recipe.epsilon,
            # A head by itself has one rate.
            layer_decay=1.0 if recipe.trainable == "head" else recipe.layer_decay,
            layer_decay_groups=recipe.layer_decay_groups,
            global_clipnorm=recipe.clip_norm or None,
            gradient_accumulation_steps=plan.accumulation_steps if plan.accumulation_steps > 1 else None,
            use_ema=recipe.ema_decay > 0,
            ema_momentum=recipe.ema_decay or 0.9999,
            overwrite_after_fit=False,
        ),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        loss_weights=None if share == 1 else [share],
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
    )
    model.optimizer.build(model.trainable_variables)
    return model


def _with_classes_of(training: Source, validation: Source) -> Source:
    if validation.classes == training.classes:
        return validation
    unknown = [name for name in validation.classes if name not in training.classes]
    if unknown:
        raise ValueError(
            f"Expected validation images of the {len(training.classes)} classes of the training images, "
            f"received {len(unknown)} others, such as {unknown[0]!r}. Choose another val_split."
        )
    numbers = np.array([training.classes.index(name) for name in validation.classes], np.int32)
    return dataclasses.replace(validation, labels=numbers[validation.labels], classes=list(training.classes))


def _check_has_contents(source: resolve.ResolvedWeights) -> None:
    if source.file is not None and source.is_bare:
        raise ValueError(
            f"Expected weights that say what they are of, received '{source.file}'. Take the .safetensors "
            "file beside it, or a .keras file."
        )
