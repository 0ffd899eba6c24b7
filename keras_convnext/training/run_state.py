"""What makes up a run: its files, its step counts, the identity that decides its result, its variables."""

import contextlib
import dataclasses
import hashlib
import importlib
import logging
import math
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_convnext._files import read_json
from keras_convnext.data.index import Source
from keras_convnext.training.recipes.classification import Recipe
from keras_convnext.training.recipes.files import AnyRecipe, identity
from keras_convnext.weights import resolve
from keras_convnext.weights.assign import plain_path

_logger = logging.getLogger("keras_convnext")

LOG_FILE = "log.csv"
CURVES_FILE = "curves.png"
ENVIRONMENT_FILE = "environment.json"
RESULT_FILE = "result.json"
BEST_FILE = "best.json"  # step and score of the best checkpoint
FAULTS_FILE = "faults.json"
FINAL_WEIGHTS = ("final_ema.weights.h5", "final.weights.h5")  # the first where the recipe has an average


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The files and scores of a run that has ended."""

    folder: pathlib.Path
    weights: pathlib.Path  # the final ones, those of the average (EMA) where the recipe has one
    steps: int  # optimizer steps of the whole run
    scores: dict[str, Any]  # last row of the log: "loss", "val_top1" and "ema_val_top1" in percent, ...
    seconds: float  # of this call
    process: int = 0  # rank of this process; of several, process 0 has written the files


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batch sizes and step counts that follow from a recipe and its data."""

    micro_batch_size: int  # images that go through the model at once
    accumulation_steps: int  # micro-batches of an optimizer step
    steps_per_epoch: int  # optimizer steps from one evaluation to the next; the next two count such too
    total_steps: int
    warmup_steps: int

    @property
    def epochs(self) -> int:
        return self.total_steps // self.steps_per_epoch

    @property
    def micro_batches_per_epoch(self) -> int:
        return self.steps_per_epoch * self.accumulation_steps

    @classmethod
    def of(cls, recipe: Recipe, training: Source) -> "Plan":
        """Counts the steps; ValueError where the data has fewer images than a batch."""
        optimizer = recipe.optimizer
        steps = batches_of(training, optimizer.batch_size)
        return cls(
            micro_batch_size=optimizer.batch_size // optimizer.accumulation_steps,
            accumulation_steps=optimizer.accumulation_steps,
            steps_per_epoch=steps,
            total_steps=optimizer.epochs * steps,
            warmup_steps=round(optimizer.warmup_epochs * steps),
        )


def batches_of(training: Any, batch_size: int) -> int:
    """Counts the whole batches of the data; ValueError where there is none."""
    if len(training) < batch_size:
        raise ValueError(
            f"Expected at least one batch of {batch_size} images to train on, but '{training.path}' has "
            f"{len(training)}. Choose a smaller batch_size."
        )
    return len(training) // batch_size


def shared_facts(identity: Mapping[str, Any], engine: Any, model: Any) -> dict[str, Any]:
    """Returns what all processes of a run must agree in, see `choose.check_agreement`."""
    package = pathlib.Path(__file__).parents[1]
    code, weights = hashlib.sha256(), hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    for variable in model.variables:
        weights.update(engine.read(variable).tobytes())
    backend = keras.backend.backend()
    return {
        "code of keras_convnext": code.hexdigest()[:16],
        "keras": keras.__version__,
        backend: importlib.import_module(backend).__version__,
        "recipe": dict(identity),
        "engine": engine.name,
        "initial weights": weights.hexdigest()[:16],
    }


def run_identity(recipe: AnyRecipe) -> dict[str, Any]:
    """Returns what decides the result; not the places of files, which may be moved between two starts."""
    values = {key: value for key, value in identity(recipe).items() if key != "source"}
    for key in ("weights", "teacher"):
        if values.get(key) and resolve.is_path(values[key]):
            path = resolve.existing_file(values[key])
            values[key] = f"{path.name} of {path.stat().st_size} bytes"
    return values


@contextlib.contextmanager
def settings_of(recipe: AnyRecipe) -> Iterator[None]:
    """Sets precision and the seed of initial weights; ValueError: Keras is told to end each `fit` early."""
    for name in ("max_epochs", "max_steps_per_epoch"):
        if (limit := getattr(keras.config, name)()) is not None:
            raise ValueError(  # a run would begin `fit` again for ever
                f"Expected no limit of Keras's own on training, received KERAS_{name.upper()}={limit}. Unset "
                "it; the recipe has epochs."
            )
    policy, floatx, state = keras.config.dtype_policy(), keras.config.floatx(), random.getstate()
    keras.config.set_floatx("float32")  # of metrics and rates, whatever keras.json has
    keras.config.set_dtype_policy(recipe.model.precision)
    random.seed(recipe.run.seed)  # `layers.initializers.RandomNormal` draws from it
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
        random.setstate(state)


def state_variables(model: Any, student: Any) -> dict[str, Any]:
    """Returns all variables that a step reads and writes, by names that are the same in each process."""
    weights = {id(v): v for v in student.weights}
    others = [v for v in student.variables if id(v) not in weights]  # of the random generators
    named = {f"model/{plain_path(v.path)}": v for v in weights.values()}
    named |= {f"random/{number:04d}": v for number, v in enumerate(others)}
    # The optimizer's names repeat some; its order is that of the model.
    named |= {f"optimizer/{number:05d}/{v.name}": v for number, v in enumerate(model.optimizer.variables)}
    return named


def variable_bytes(variable: Any) -> int:
    return math.prod(variable.shape) * np.dtype(keras.backend.standardize_dtype(variable.dtype)).itemsize


def non_finite_names(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Lists the arrays that hold NaN or infinity."""
    return [
        name
        for name, array in arrays.items()
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()
    ]


def ended_result(folder: pathlib.Path, names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the scores of a run that has ended; None where steps are left, or files are to be written."""
    missing = [name for name in (RESULT_FILE, *names) if not (folder / name).is_file()]
    with contextlib.suppress(ValueError):
        if not missing:
            return read_json(folder / RESULT_FILE, {"epoch": int})
    if RESULT_FILE not in missing:
        what = ", ".join(missing) or RESULT_FILE
        _logger.warning("The run in %s has ended; written again: %s", folder, what)
    return None
