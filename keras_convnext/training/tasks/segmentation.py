"""Semantic segmentation: its data, model, loss and scores."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_convnext import models, segmentation
from keras_convnext.architecture import Heads
from keras_convnext.conversion import save_weights
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.data.segmentation import sources
from keras_convnext.data.segmentation.labels import are_default
from keras_convnext.data.segmentation.sources import SegmentationSource
from keras_convnext.distribution.engine import Engine
from keras_convnext.evaluation import forward, segmentation_report
from keras_convnext.evaluation.segmentation import validate
from keras_convnext.model_options import ModelOptions
from keras_convnext.training import curves, schedule
from keras_convnext.training.derived import body_weights, split_names
from keras_convnext.training.recipes.segmentation import SegmentationRecipe
from keras_convnext.training.run_folder import RunFolder
from keras_convnext.training.run_state import CURVES_FILE, Plan, batches_of
from keras_convnext.training.segmentation_loss import SegmentationLoss
from keras_convnext.training.tasks import Datasets, TaskModel, adamw, without_optimizer
from keras_convnext.variants import VARIANTS
from keras_convnext.weights import labels_metadata, layouts, preprocessing_metadata
from keras_convnext.weights.resolve import ResolvedWeights

SHOWN_PHOTOS = 4  # of the validation split, in the picture of each epoch


class Segmentation:
    """A class for each pixel, by UPerNet: the `Task` of training on ADE20K and on masks of one's own."""

    best = "val_miou"

    def __init__(self, recipe: SegmentationRecipe, workers: int | None = None) -> None:
        self.recipe = recipe
        self.workers = workers
        # Facebook's code has no place for what some of timm's architectures are.
        is_official = layouts.is_writable(VARIANTS[recipe.model.architecture], "official", "segmentation")
        self.files: Sequence[str] = ("final.safetensors" if is_official else "final.keras",)
        forward.import_batches()  # says what is missing without TensorFlow
        from keras_convnext.data.segmentation import batches

        self._batches = batches
        self._shown: dict[int, tuple[str, np.ndarray, np.ndarray, np.ndarray]] = {}
        self._labels: Any = None

    @functools.cached_property
    def source(self) -> ResolvedWeights:
        """The weights that training begins with."""
        return body_weights(self.recipe)

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        return self.recipe.preprocessing(self.source.preprocessing)

    def open_data(self) -> Datasets:
        training, validation = open_data(self.recipe)
        values = self.recipe.optimizer
        batches_of(training, values.batch_size)
        self._labels = training.labels
        return Datasets(
            training,
            validation,
            plan=Plan(
                micro_batch_size=values.batch_size // values.accumulation_steps,
                accumulation_steps=values.accumulation_steps,
                steps_per_epoch=values.steps // values.evaluations,
                total_steps=values.steps,
                warmup_steps=values.warmup_steps,
            ),
            identity={
                "data": training.fingerprint,
                "validation": "" if validation is None else validation.fingerprint,
            },
            facts={
                "data": str(training.path),
                "training_images": len(training),
                "classes": len(training.classes),
            },
        )

    def build_model(self, data: Datasets) -> TaskModel:
        student = build_model(self.recipe, len(data.training.classes), self.source)
        notes = sources.described(data.training, "training")
        notes += sources.described(data.validation, "validation") if data.validation else []
        passes = self.recipe.optimizer.steps * self.recipe.optimizer.batch_size / len(data.training)
        notes.append(f"Each training photo is seen about {passes:.3g} times.")
        warnings = []
        if data.validation is None:
            warnings.append("Nothing is evaluated: no validation split, and validation_fraction is 0.")
        if are_default(data.training.classes):
            warnings.append(
                "The classes have no names, and the weights will say 'class 0', 'class 1' and so on. To name "
                f"them write classes.txt in '{data.training.path}', a name a line, class 0 first, and begin "
                "the run anew."
            )
        return TaskModel(compile_model(self.recipe, student, data.plan), student, warnings, notes)

    def train_batches(self, data: Datasets, start: int, engine: Engine) -> Any:
        batches = self._batches.train_batches(
            data.training,
            batch_size=data.plan.micro_batch_size,
            crop_size=self.recipe.model.crop_size,
            augmentation=self.recipe.augmentation,
            mean=self.preprocessing.mean,
            seed=self.recipe.run.seed,
            part=self._batches.Part(start_batch=start, host=engine.group.rank, num_hosts=len(engine.group)),
            faults=data.faults["train"],
            workers=self.workers,
        )
        if not self.recipe.loss.auxiliary_weight:
            return batches
        return batches.map(lambda images, maps: (images, {"logits": maps, "auxiliary": maps}))

    def evaluate(
        self, model: Any, data: Datasets, engine: Engine, after_batch: Callable[[], None]
    ) -> dict[str, float]:
        # JAX's processes run each program together, so each evaluates all photos. PyTorch's are independent.
        is_divided = keras.backend.backend() == "torch"
        share = (engine.group.rank, len(engine.group)) if is_divided else (0, 1)
        own = np.arange(share[0], len(data.validation), share[1])
        places = np.linspace(0, max(len(own) - 1, 0), min(SHOWN_PHOTOS, len(own)))
        shown = own[places.astype(int)].tolist()

        def keep(number: int, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> None:
            if number in shown:
                name = data.validation.name(number).rpartition("/")[2]
                self._shown[number] = name, image, truth, predicted

        return validate(
            model,
            data.validation,
            min(self.preprocessing.size),
            mode=self.recipe.evaluation.eval_mode,
            batch_size=engine.filled(data.plan.micro_batch_size) // (share[1] if is_divided else 1),
            faults=data.faults["validation"],
            after_batch=after_batch,
            gathered=engine.group.gathered_arrays if is_divided else lambda array: [array],
            share=share,
            fills=engine.num_parts > 1,
            on_map=keep,
        )

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
        scores = {"miou": "mIoU, %", "aacc": "Pixel accuracy, %"}
        curves.draw_curves(rows, folder.path / CURVES_FILE, scores, self.recipe.title)
        if self._shown:
            score = rows[-1].get("ema_val_miou", rows[-1]["val_miou"])
            title = f"{self.recipe.title}: epoch {rows[-1]['epoch']}, mIoU {score:.2f} %"
            shown = [self._shown[number] for number in sorted(self._shown)]
            folder.write_with(
                f"predictions/epoch-{int(rows[-1]['epoch']):04d}.png",
                lambda path: segmentation_report.draw_examples(shown, self._labels, path, title),
            )

    def save_weights(self, model: Any, path: pathlib.Path) -> None:
        without_optimizer(model).save_weights(path)
        preprocessing_metadata.add_preprocessing(path, self.preprocessing)
        labels_metadata.add_labels(path, self._labels)

    def save(self, model: Any, data: Datasets, folder: RunFolder) -> None:
        def write(path: pathlib.Path) -> None:
            if path.suffix == ".safetensors":
                save_weights(model, path, "official", self.preprocessing, self._labels)
                return
            without_optimizer(model).save(path)
            preprocessing_metadata.add_preprocessing(path, self.preprocessing)
            labels_metadata.add_labels(path, self._labels)

        folder.write_with(self.files[0], write)


def open_data(recipe: SegmentationRecipe) -> tuple[SegmentationSource, SegmentationSource | None]:
    """Opens the photos to train on and those to evaluate on; None where there are none.

    ValueError: there is one class only, or the validation photos have classes that are not trained.
    """
    data = recipe.data
    train, validation = split_names(data, sources.list_splits)
    ignored = data.ignored_values or None
    training = sources.open_source(data.source, train, ignored_values=ignored)
    if len(training.classes) < 2:
        raise ValueError(
            f"Expected label maps of two classes or more, received one, {training.classes[0]!r}, in "
            f"'{data.source}'. Give the background a number of its own."
        )
    if validation:
        return training, sources.open_source(
            data.source, validation, labels=training.labels, ignored_values=ignored
        )
    if data.validation_fraction:
        count = max(1, round(data.validation_fraction * len(training)))
        if count == len(training):
            raise ValueError(
                f"Expected more photos than are held out, received {count} in '{data.source}'. Set "
                "validation_fraction=0 to train on all."
            )
        order = np.random.default_rng(recipe.run.seed).permutation(len(training))
        return sources.take(training, np.sort(order[count:])), sources.take(training, np.sort(order[:count]))
    return training, None


def build_model(recipe: SegmentationRecipe, classes: int, source: ResolvedWeights) -> segmentation.Segmenter:
    """Builds the segmenter of a recipe on its weights, of which a segmenter's heads are kept too."""
    values, has_auxiliary = recipe.model, recipe.loss.auxiliary_weight > 0
    has_scale = VARIANTS[values.architecture].version == 1
    options = ModelOptions(
        input_shape=(None, None, 3),
        drop_path_rate=values.drop_path_rate,
        layer_scale_init_value=values.layer_scale_init_value if has_scale else None,
        rematerialize=values.rematerialize,
        seed=recipe.run.seed,
        classes=classes if source.task == "segmentation" else None,
        include_top=None if source.task == "segmentation" else False,
        pyramid_norms=source.task != "segmentation",
    )
    heads = source.heads
    if not isinstance(heads, Heads):
        backbone = models.build(source, options)
        return segmentation.UPerNet(backbone, classes, values.channels, auxiliary=has_auxiliary)
    if heads.channels != values.channels:
        raise ValueError(
            f"Expected channels = {heads.channels}, the width of the weights' heads, received "
            f"{values.channels}. Set channels to it."
        )
    model = segmentation.build(source, options)
    return model if has_auxiliary else segmentation.without_auxiliary(model)


def compile_model(recipe: SegmentationRecipe, student: Any, plan: Plan) -> Any:
    values, loss = recipe.optimizer, recipe.loss
    rates = schedule.WarmupLinear(
        values.learning_rate,
        plan.total_steps,
        plan.warmup_steps,
        start=values.warmup_learning_rate,
        end=values.min_learning_rate,
    )
    losses: Any
    model, losses, weights = student, SegmentationLoss(loss.loss_mean), None
    if loss.auxiliary_weight:
        model = segmentation.with_auxiliary(student)
        losses = {name: SegmentationLoss(loss.loss_mean) for name in ("logits", "auxiliary")}
        weights = {"logits": 1.0, "auxiliary": loss.auxiliary_weight}
    model.compile(adamw(values, rates, plan, values.layer_decay), loss=losses, loss_weights=weights)
    model.optimizer.build(model.trainable_variables)
    return model
