"""What a run trains: all that the trainer knows of a task.

A task decides on data, model, loss and scores; steps, signals, checkpoints, log and best epoch are the
trainer's. So segmentation fits in with label maps for targets and `best = "val_miou"`, detection with dicts
of targets and a loss that the model adds itself, FCMAE with the images for targets and "val_loss".
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from keras_convnext.data.faults import Faults
from keras_convnext.distribution.engine import Engine
from keras_convnext.training import optimizer, schedule
from keras_convnext.training.recipes.classification import AdamW, Recipe
from keras_convnext.training.run_folder import RunFolder
from keras_convnext.training.run_state import Plan


@dataclasses.dataclass
class Datasets:
    """What is trained on and evaluated on."""

    training: Any  # what `data.faults.Faults` takes, such as a `data.index.Source`
    validation: Any  # the same, or None
    plan: Plan
    identity: dict[str, Any]  # JSON values that decide the result; a run is resumed with the same only
    facts: dict[str, Any]  # JSON values for environment.json
    faults: dict[str, Faults] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        splits = {"train": self.training, "validation": self.validation}
        # All are allowed to the pipeline, whose own error would come wrapped in TensorFlow's.
        self.faults = {name: Faults(data, max_share=1.0) for name, data in splits.items() if data is not None}


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """A model that is ready for `fit`."""

    model: Any  # compiled, its optimizer built, its layers named, as checkpoints name arrays by them
    student: Any  # what is evaluated and saved: the model, or the part that learns from a frozen teacher
    warnings: Sequence[str] = ()  # of values of the recipe that are likely a mistake
    notes: Sequence[str] = ()  # what else the user should read before the first step
    # Symbolic tensors as `fit` is given; None for images and one-hot targets of the shapes of the model.
    batch: Any = None


class Task(Protocol):
    """The process that writes calls `draw`, `save_weights` and `save`; all processes call the others."""

    # Column of the log that decides which epoch is the best, such as "val_top1"; that of the average of the
    # weights, "ema_val_top1", counts too. The largest value is the best, of a loss the smallest.
    best: str
    # What `save` writes, where an ended run is to write again those that are missing; may be left out.
    files: Sequence[str]

    def open_data(self) -> Datasets:
        """Opens what the recipe names."""

    def build_model(self, data: Datasets) -> TaskModel:
        """Builds and compiles the model, with its loss and metrics; see `recipe_optimizer`."""

    def train_batches(self, data: Datasets, start: int, engine: Engine) -> Any:
        """Returns an endless `tf.data.Dataset` of (images, targets), this process's rows of each micro-batch.

        Without targets, ((images, what else the model is given),). `start` micro-batches of the run are done.
        Each batch is a function of its number alone.
        """

    def evaluate(
        self, model: Any, data: Datasets, engine: Engine, after_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Returns the scores on the validation data, of all processes, by the names after "val_" in the log.

        `after_batch` is called after each batch; it may raise, which ends the evaluation.
        """

    def draw(self, rows: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
        """Draws the pictures of a run, after each epoch, from the rows of the log."""

    def save_weights(self, model: Any, path: pathlib.Path) -> None:
        """Writes the student's weights as they are to a .weights.h5 file."""

    def save(self, model: Any, data: Datasets, folder: RunFolder) -> None:
        """Writes what `load` and the command open when the run has ended."""


def recipe_optimizer(recipe: Recipe, plan: Plan) -> optimizer.AdamW:
    values = recipe.optimizer
    rates = schedule.WarmupCosine(
        values.learning_rate,
        plan.total_steps,
        plan.warmup_steps,
        start=values.warmup_learning_rate,
        end=values.min_learning_rate,
        warmup_includes_peak=values.warmup_includes_peak,
        hold_steps=plan.steps_per_epoch if values.schedule_unit == "epoch" else 1,
    )
    # A head by itself has one rate.
    return adamw(values, rates, plan, 1.0 if recipe.model.trainable == "head" else values.layer_decay)


def adamw(
    values: AdamW, rates: Any, plan: Plan, layer_decay: float, decayed: Sequence[str] = ()
) -> optimizer.AdamW:
    """Makes the optimizer of a recipe's values with a schedule of learning rates."""
    return optimizer.AdamW(
        rates,
        weight_decay=values.weight_decay,
        beta_1=values.beta_1,
        beta_2=values.beta_2,
        epsilon=values.epsilon,
        layer_decay=layer_decay,
        layer_decay_groups=values.layer_decay_groups,
        global_clipnorm=values.clip_norm or None,
        gradient_accumulation_steps=plan.accumulation_steps,
        use_ema=values.ema_decay > 0,
        ema_momentum=values.ema_decay,
        overwrite_after_fit=False,
        decayed=decayed,
    )


def without_optimizer(model: Any) -> Any:
    """Returns a model of the same layers; Keras saves the optimizer of a compiled one along."""
    return type(model)(model.input, model.output, name=model.name)  # lists would change the calls of a copy
