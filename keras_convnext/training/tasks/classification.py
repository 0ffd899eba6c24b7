"""Image classification: its data, model, loss and scores."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_convnext import models
from keras_convnext.conversion import save_weights
from keras_convnext.data import class_names, sources
from keras_convnext.data.index import Source, described
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.distribution.engine import Engine
from keras_convnext.evaluation import classification, forward
from keras_convnext.evaluation.results import fingerprint
from keras_convnext.model_options import ModelOptions
from keras_convnext.training import curves, distillation, finetune
from keras_convnext.training.advice import warnings_for
from keras_convnext.training.derived import split_names, with_contents
from keras_convnext.training.recipes.classification import Recipe
from keras_convnext.training.run_folder import RunFolder
from keras_convnext.training.run_state import CURVES_FILE, Plan
from keras_convnext.training.tasks import Datasets, TaskModel, recipe_optimizer, without_optimizer
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import preprocessing_metadata
from keras_convnext.weights.resolve import ResolvedWeights, resolve


class Classification:
    """One class for each image: the `Task` of training and fine-tuning on ImageNet and the like."""

    best = "val_top1"
    files: Sequence[str] = ("final.safetensors", "final.labels.txt")

    def __init__(self, recipe: Recipe, workers: int | None = None) -> None:
        self.recipe = recipe
        self.workers = workers
        self._batches = classification.import_batches()
        self._validation: Any = None

    @functools.cached_property
    def source(self) -> ResolvedWeights:
        """The weights that training begins with."""
        return recipe_weights(self.recipe)

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """How the recipe's evaluation prepares images, with the normaliser of its model."""
        trained = self.source.preprocessing
        return dataclasses.replace(self.recipe.evaluation.preprocessing, mean=trained.mean, std=trained.std)

    def open_data(self) -> Datasets:
        training, validation = open_data(self.recipe)
        images, classes = len(training), len(training.classes)
        return Datasets(
            training,
            validation,
            plan=Plan.of(self.recipe, training),
            identity={
                "data": fingerprint(training),
                "validation": "" if validation is None else fingerprint(validation),
            },
            facts={"data": str(training.path), "training_images": images, "classes": classes},
        )

    def build_model(self, data: Datasets) -> TaskModel:
        recipe, source = self.recipe, self.source
        num_classes = len(data.training.classes)
        student, has_new_head = build_model(recipe, num_classes, source)
        warnings = warnings_for(
            recipe,
            has_weights=bool(recipe.model.weights),
            is_self_supervised=bool(recipe.model.weights) and source.classes == 0,
            trained_size=source.preprocessing.size[0] if source.is_described else None,
            has_new_head=has_new_head,
            num_steps=data.plan.total_steps,
        )
        if data.validation is None:
            warnings.append("Nothing is evaluated: no validation split, and validation_fraction is 0.")
        notes = described(data.training, "training")
        notes += described(data.validation, "validation") if data.validation else []
        if recipe.model.weights and not has_new_head:
            notes.append(f"The classifier of the weights is kept, for {num_classes} classes.")
        return TaskModel(compile_model(recipe, student, data.plan), student, warnings, notes)

    def train_batches(self, data: Datasets, start: int, engine: Engine) -> Any:
        return self._batches.train_batches(
            data.training,
            batch_size=data.plan.micro_batch_size,
            image_size=self.recipe.model.image_size,
            augmentation=self.recipe.augmentation,
            normaliser=(self.preprocessing.mean, self.preprocessing.std),
            seed=self.recipe.run.seed,
            part=self._batches.Part(
                start_batch=start,
                batches_per_epoch=data.plan.micro_batches_per_epoch,
                host=engine.group.rank,
                num_hosts=len(engine.group),
            ),
            faults=data.faults["train"],
            workers=self.workers,
        )

    def evaluate(
        self, model: Any, data: Datasets, engine: Engine, after_batch: Callable[[], None]
    ) -> dict[str, float]:
        if self._validation is None:
            size = min(data.plan.micro_batch_size, len(data.validation))
            self._validation = self._batches.eval_batches(
                data.validation,
                self.preprocessing,
                batch_size=engine.filled(size) // len(engine.group),
                host=engine.group.rank,
                num_hosts=len(engine.group),
                faults=data.faults["validation"],
                workers=self.workers,
            )
        scores = forward.validate(model, self._validation, after_batch, engine.group.gathered_arrays)
        return {name: scores[name] for name in ("loss", "top1", "top5")}

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
        curves.draw_curves(rows, folder.path / CURVES_FILE, {"top1": "Top-1 accuracy, %"}, self.recipe.title)

    def save_weights(self, model: Any, path: pathlib.Path) -> None:
        without_optimizer(model).save_weights(path)
        preprocessing_metadata.add_preprocessing(path, self.preprocessing)

    def save(self, model: Any, data: Datasets, folder: RunFolder) -> None:
        # timm's layout has all architectures but the isotropic ones.
        layout = "official" if VARIANTS[self.recipe.model.architecture].isotropic else "timm"
        folder.write_with(
            "final.safetensors", lambda path: save_weights(model, path, layout, self.preprocessing)
        )
        folder.write_text("final.labels.txt", class_names.to_lines(data.training.classes))


def open_data(recipe: Recipe) -> tuple[Source, Source | None]:
    """Opens the images to train on and those to evaluate on; None where there are none.

    ValueError: there is one class only, or the validation images have classes that are not trained.
    """
    data = recipe.data
    train, validation = split_names(data)
    training = sources.open_source(data.source, train)
    if len(training.classes) < 2:
        raise ValueError(
            f"Expected images of two classes or more, received those of {len(training.classes)} in "
            f"'{data.source}': {', '.join(training.classes)}. Name the folder that holds the class folders."
        )
    if validation:
        return training, _with_classes_of(training, sources.open_source(data.source, validation))
    if data.validation_fraction:
        return sources.hold_out(training, data.validation_fraction, recipe.run.seed)
    return training, None


def build_model(recipe: Recipe, num_classes: int, source: ResolvedWeights | None = None) -> tuple[Any, bool]:
    """Builds the model of a recipe, pixels in 0..255 to logits, and says whether its head begins at random.

    `source` are the recipe's weights, where they are resolved already; they must fit the architecture.
    """
    values, source = recipe.model, source or recipe_weights(recipe)
    has_new_head = source.is_random or source.classes != num_classes
    side = values.image_size if values.image_size == recipe.evaluation.eval_image_size else None
    has_scale = VARIANTS[values.architecture].version == 1
    options = ModelOptions(
        classes=num_classes,
        classifier_activation=None,
        input_shape=(side, side, 3),
        drop_path_rate=0.0 if values.trainable == "head" else values.drop_path_rate,
        layer_scale_init_value=values.layer_scale_init_value if has_scale else None,
        rematerialize=values.rematerialize,
        seed=recipe.run.seed,
        new_head=True if has_new_head and not source.is_random else None,
    )
    model = models.build(source, options)
    if has_new_head and values.head_init_scale != 1:
        finetune.scale_head(model, values.head_init_scale)
    finetune.choose_trainable(model, values.trainable)
    return model, has_new_head


def compile_model(recipe: Recipe, student: Any, plan: Plan) -> Any:
    model, weight = student, recipe.distillation.distillation_weight
    if recipe.distillation.teacher:
        shape = (recipe.model.image_size, recipe.model.image_size, 3)
        options = ModelOptions(input_shape=shape, classifier_activation=None, name="teacher")
        teacher = models.build(with_contents(resolve(recipe.distillation.teacher)), options)
        temperature = recipe.distillation.distillation_temperature
        model = distillation.with_teacher(student, teacher, weight, temperature)
    model.compile(
        recipe_optimizer(recipe, plan),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        loss_weights=[1 - weight] if weight else None,
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
    )
    model.optimizer.build(model.trainable_variables)
    return model


def _with_classes_of(training: Source, validation: Source) -> Source:
    if validation.classes == training.classes:
        return validation
    if unknown := [name for name in validation.classes if name not in training.classes]:
        raise ValueError(
            f"Expected validation images of the {len(training.classes)} classes of the training images, "
            f"received {len(unknown)} others, such as {unknown[0]!r}. Choose another val_split."
        )
    numbers = np.array([training.classes.index(name) for name in validation.classes], np.int32)
    return dataclasses.replace(validation, labels=numbers[validation.labels], classes=list(training.classes))


def recipe_weights(recipe: Recipe) -> ResolvedWeights:
    """The weights that training begins with; random ones where the recipe names none."""
    return with_contents(resolve(recipe.model.architecture, recipe.model.weights or None))
