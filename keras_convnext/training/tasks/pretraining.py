"""Pre-training without labels by FCMAE: its data, model, loss and pictures."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_convnext import fcmae, models
from keras_convnext.conversion import save_weights
from keras_convnext.data import sources, unlabelled
from keras_convnext.data.index import Source
from keras_convnext.data.preprocessing import Preprocessing
from keras_convnext.distribution import choose
from keras_convnext.distribution.engine import Engine
from keras_convnext.evaluation import forward
from keras_convnext.evaluation.results import fingerprint
from keras_convnext.model_options import ModelOptions
from keras_convnext.training import curves, schedule
from keras_convnext.training.derived import body_weights, split_names
from keras_convnext.training.recipes.pretraining import CELL, PretrainingRecipe
from keras_convnext.training.run_folder import RunFolder
from keras_convnext.training.run_state import CURVES_FILE, Plan, batches_of
from keras_convnext.training.tasks import Datasets, TaskModel, adamw
from keras_convnext.weights import preprocessing_metadata
from keras_convnext.weights.resolve import ResolvedWeights

SHOWN_IMAGES = 6  # in the picture of each epoch
# Endings of names that decay here besides kernels: timm's `add_weight_decay`, by which the official code
# pre-trains, leaves out biases and what has one axis there. GRN's weights have two, the mask token four.
DECAYED = ("grn/gamma", "grn/beta", "mask_token")
_TRAINING, _EVALUATION = 0, 1  # streams of masks


class Pretraining:
    """Images with masked cells to those cells: the `Task` of learning from images alone."""

    best = "val_loss"
    files: Sequence[str] = ("final.safetensors",)

    def __init__(self, recipe: PretrainingRecipe, workers: int | None = None) -> None:
        if not isinstance(recipe, PretrainingRecipe):
            raise ValueError(
                f"Expected a recipe of pre-training, which has no labels, received one of {recipe.task}, "
                f"{recipe.title!r}. Begin with `pretrain`; its weights are what such a recipe starts from."
            )
        self.recipe = recipe
        self.workers = workers
        self._batches = forward.import_batches()
        self._is_evaluated = False
        self._evaluated: Any = None
        self._shown: dict[int, np.ndarray] = {}

    @functools.cached_property
    def source(self) -> ResolvedWeights:
        """The weights that the encoder begins with."""
        return body_weights(self.recipe)

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """How the evaluated images are prepared, with the normaliser of the model."""
        trained = self.source.preprocessing
        return dataclasses.replace(self.recipe.evaluation.preprocessing, mean=trained.mean, std=trained.std)

    def open_data(self) -> Datasets:
        training, validation = open_data(self.recipe)
        self._is_evaluated = validation is not None
        values = self.recipe.optimizer
        steps = batches_of(training, values.batch_size)
        places = np.unique(np.linspace(0, len(training) - 1, SHOWN_IMAGES).astype(int))
        return Datasets(
            training,
            # Where nothing is held out, some training images are for the pictures.
            sources.take(training, places) if validation is None else validation,
            plan=Plan(
                micro_batch_size=values.batch_size // values.accumulation_steps,
                accumulation_steps=values.accumulation_steps,
                steps_per_epoch=steps,
                total_steps=values.epochs * steps,
                warmup_steps=round(values.warmup_epochs * steps),
            ),
            identity={
                "data": fingerprint(training),
                "validation": "" if validation is None else fingerprint(validation),
            },
            facts={"data": str(training.path), "training_images": len(training)},
        )

    def build_model(self, data: Datasets) -> TaskModel:
        model = build_model(self.recipe, self.source)
        compile_model(self.recipe, model, data.plan)
        notes = unlabelled.described(data.training, "training")
        notes += unlabelled.described(data.validation, "validation") if self._is_evaluated else []
        nothing = "No loss is evaluated: no validation split, and validation_fraction is 0."
        side, cells = self.recipe.model.image_size, self.recipe.model.image_size // CELL
        batch = (keras.KerasTensor((2, side, side, 3)), keras.KerasTensor((2, cells, cells), "bool"))
        return TaskModel(model, model, [] if self._is_evaluated else [nothing], notes, (batch,))

    def train_batches(self, data: Datasets, start: int, engine: Engine) -> Any:
        import tensorflow as tf

        values, group, size = self.recipe.model, engine.group, data.plan.micro_batch_size
        batches = self._batches.train_batches(
            data.training,
            batch_size=size,
            image_size=values.image_size,
            augmentation=self.recipe.augmentation.whole,
            seed=self.recipe.run.seed,
            part=self._batches.Part(
                start_batch=start,
                batches_per_epoch=data.plan.micro_batches_per_epoch,
                host=group.rank,
                num_hosts=len(group),
            ),
            faults=data.faults["train"],
            workers=self.workers,
        )
        rows, cells = size // len(group), values.image_size // CELL

        def draw(number: np.ndarray) -> np.ndarray:  # of all processes, so that it is no matter how many
            masks = self._masks(_TRAINING, int(number), size, cells)
            return masks[group.rank * rows : (group.rank + 1) * rows]

        def with_masks(number: Any, batch: Any) -> Any:
            visible = tf.numpy_function(draw, [number], tf.bool, stateful=False)
            return ((batch[0], tf.ensure_shape(visible, (rows, cells, cells))),)

        return tf.data.Dataset.zip(tf.data.Dataset.counter(start), batches).map(with_masks)

    def evaluate(
        self, model: Any, data: Datasets, engine: Engine, after_batch: Callable[[], None]
    ) -> dict[str, float]:
        if self._evaluated is None:
            size = min(data.plan.micro_batch_size, len(data.validation))
            batches = self._batches.eval_batches(
                data.validation,
                self.preprocessing,
                batch_size=engine.filled(size) // len(engine.group),
                host=engine.group.rank,
                num_hosts=len(engine.group),
                faults=data.faults["validation"],
                workers=self.workers,
            )
            self._evaluated = _WithLoss(model), batches
        scored, batches = self._evaluated
        run: Any = forward.forward_function(scored)
        cells = self.preprocessing.size[0] // CELL
        shown = np.linspace(0, len(data.validation) - 1, min(SHOWN_IMAGES, len(data.validation))).astype(int)
        losses = [np.zeros(0)]
        for batch in batches.as_numpy_iterator():
            after_batch()
            # One image by one, so that a mask belongs to its image.
            drawn = [self._masks(_EVALUATION, max(n, 0), 1, cells) for n in batch["numbers"].tolist()]
            visible = np.concatenate(drawn)
            inputs: Any = map(choose.divided, (batch["images"], visible))
            found = run(tuple(inputs))  # type: ignore[arg-type]
            losses.append(choose.rows(found["loss"])[batch["mask"]].astype(np.float64))
            if chosen := [row for row in np.flatnonzero(batch["mask"]) if batch["numbers"][row] in shown]:
                pictures = choose.rows(found["picture"])
                for row in chosen:
                    seen = np.repeat(np.repeat(visible[row], CELL, 0), CELL, 1)[..., None]
                    image = batch["images"][row]
                    self._shown[int(batch["numbers"][row])] = np.stack(
                        [image, np.where(seen, image, 128), np.rint(pictures[row]).astype(np.uint8)]
                    )
        loss = np.concatenate(engine.group.gathered_arrays(np.concatenate(losses)))
        return {"loss": float(loss.mean()) if len(loss) else float("nan")} if self._is_evaluated else {}

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
        curves.draw_curves(rows, folder.path / CURVES_FILE, {}, self.recipe.title)
        if self._shown:
            sheet = np.concatenate(
                [np.concatenate(list(self._shown[n]), axis=1) for n in sorted(self._shown)]
            )
            name = f"reconstructions/epoch-{int(rows[-1]['epoch']):04d}.png"
            folder.write_with(name, lambda path: keras.utils.save_img(path, sheet, scale=False))

    def save_weights(self, model: Any, path: pathlib.Path) -> None:
        model.body.save_weights(path)
        preprocessing_metadata.add_preprocessing(path, self.preprocessing)

    def save(self, model: Any, data: Datasets, folder: RunFolder) -> None:
        folder.write_with(self.files[0], lambda path: save_weights(model, path, "fcmae", self.preprocessing))

    def _masks(self, stream: int, number: int, samples: int, cells: int) -> np.ndarray:
        """Which cells are seen, bool (samples, cells, cells): a function of the seed and a number alone."""
        rng = np.random.default_rng([self.recipe.run.seed, stream, number])
        return fcmae.draw_masks(rng, samples, (cells, cells), self.recipe.model.mask_ratio)


class _WithLoss(keras.Model):
    """Images and masks to each image's loss (N,) and its picture (N, H, W, 3), 0..255."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__(autocast=False, name="with_loss")
        self.autoencoder = autoencoder
        self.built = True

    def call(self, inputs, training=None):
        images, visible = inputs
        prediction = self.autoencoder(inputs, training=False)["prediction"]
        errors, masked = self.autoencoder.errors(images, visible, prediction)
        loss = ops.sum(errors, axis=-1) / ops.sum(masked, axis=-1)
        return {"loss": loss, "picture": self.autoencoder.reconstruction(images, visible, prediction)}


def open_data(recipe: PretrainingRecipe) -> tuple[Source, Source | None]:
    """Opens the images to train on and those that the loss is evaluated on; None where there are none."""
    data = recipe.data
    train, validation = split_names(data, unlabelled.list_splits)
    training = unlabelled.open_source(data.source, train)
    if validation:
        return training, unlabelled.open_source(data.source, validation)
    if data.validation_fraction:
        return sources.hold_out(training, data.validation_fraction, recipe.run.seed)
    return training, None


def build_model(recipe: PretrainingRecipe, source: ResolvedWeights) -> fcmae.MaskedAutoencoder:
    values, side = recipe.model, recipe.model.image_size
    options = ModelOptions(
        include_top=False,
        # The pictures and the loss of the evaluation may have another size.
        input_shape=(side, side, 3) if side == recipe.evaluation.eval_image_size else (None, None, 3),
        drop_path_rate=values.drop_path_rate,
        rematerialize=values.rematerialize,
        seed=recipe.run.seed,
    )
    return fcmae.MaskedAutoencoder(
        models.build(source, options),
        mask_ratio=values.mask_ratio,
        decoder_width=values.decoder_width,
        decoder_depth=values.decoder_depth,
        encoder="tall",  # each mask that is drawn here has as many cells
        norm_pix_loss=values.norm_pix_loss,
        seed=recipe.run.seed,
        name="masked_autoencoder",  # Keras would number it, and a checkpoint names arrays by it
    )


def compile_model(recipe: PretrainingRecipe, model: Any, plan: Plan) -> None:
    values = recipe.optimizer
    rates = schedule.WarmupCosine(
        values.learning_rate,
        plan.total_steps,
        plan.warmup_steps,
        start=values.warmup_learning_rate,
        end=values.min_learning_rate,
        warmup_includes_peak=False,
    )
    model.compile(adamw(values, rates, plan, values.layer_decay, DECAYED))
    model.optimizer.build(model.trainable_variables)
