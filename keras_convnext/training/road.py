"""Trains steps of the road from ResNet-50 to ConvNeXt alike, and says what is more than noise."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_convnext import roadmap
from keras_convnext._environment import require
from keras_convnext._files import check_target, replace_file, replacing_file
from keras_convnext._messages import printable
from keras_convnext._terminal import csv_text, print_line
from keras_convnext.data import class_names
from keras_convnext.roadmap import REGIMES, STEPS
from keras_convnext.training.derived import choose_recipe
from keras_convnext.training.recipes.classification import Recipe
from keras_convnext.training.run_folder import RunFolder
from keras_convnext.training.tasks import Datasets, TaskModel, without_optimizer
from keras_convnext.training.tasks.classification import Classification, compile_model, open_data
from keras_convnext.training.trainer import train
from keras_convnext.weights import preprocessing_metadata

RECIPE = "tiny_imagenet"
# What differs from that recipe. No average of the weights on the whole road (Liu et al. 2022, appendix A.1:
# it "severely hurts models with BatchNorm"). 64 pixels leave a last map of 2x2.
CHANGES = {
    "layer_scale_init_value": 1e-6,
    "image_size": 64,
    "eval_image_size": 64,
    "epochs": 10,
    "warmup_epochs": 1,
    "train_split": "",
    "val_split": "",
    "validation_fraction": 0.2,  # of each class, where the data have no split of their own
    "ema_decay": 0.0,
}
# Of Student's t distribution, two-sided: 5 % lie beyond it with 1, 2, ... degrees of freedom.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
TABLE, PICTURE = "road.csv", "road.png"
COLUMNS = ("step", "name", "seed", "top1", "loss", "epochs", "updates")


@dataclasses.dataclass(frozen=True)
class Rung:
    """A step of the ladder: its scores by seed, in percent, of the last epoch."""

    step: int
    scores: tuple[float, ...]

    @property
    def name(self) -> str:
        return STEPS[self.step].name

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """The standard deviation over the seeds, NaN of one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan


class Road(Classification):
    """The `Task` of one step, in place of the architecture that the recipe names, where the road ends."""

    files: Sequence[str] = ("final.keras",)

    def __init__(self, step: int, recipe: Recipe, workers: int | None = None) -> None:
        super().__init__(recipe, workers)
        self.step = step

    def open_data(self) -> Datasets:
        data = super().open_data()
        return dataclasses.replace(data, identity={**data.identity, "step": STEPS[self.step].name})

    def build_model(self, data: Datasets) -> TaskModel:
        values, evaluation = self.recipe.model, self.recipe.evaluation
        side = values.image_size if values.image_size == evaluation.eval_image_size else None
        model = roadmap.build(
            self.step,
            regime_of(self.recipe),
            len(data.training.classes),
            (side, side, 3),
            classifier_activation=None,
            drop_path_rate=values.drop_path_rate,
            seed=self.recipe.run.seed,
        )
        return TaskModel(compile_model(self.recipe, model, data.plan), model)

    def save(self, model: Any, data: Datasets, folder: RunFolder) -> None:
        def write(path: pathlib.Path) -> None:
            without_optimizer(model).save(path)
            preprocessing_metadata.add_preprocessing(path, self.preprocessing)

        folder.write_with("final.keras", write)
        folder.write_text("final.labels.txt", class_names.to_lines(data.training.classes))


def train_road(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    steps: Sequence[int | str],
    *,
    seeds: int = 3,
    regime: str = "atto",
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[Rung]:
    """Trains steps of the road with one recipe and the same seeds 0, 1, ..., and draws the ladder.

    Each step and seed is a run of `training.train` in a folder of its own, such as "07-seed1", which the same
    call resumes or takes as it is. The table `road.csv` and the picture `road.png` are written after each.

    Args:
        data: images, as for `train`; without a split of their own a fifth of each class is held out, by seed.
        steps: places or names of `STEPS`, without 0, which differs from 1 by its recipe only.
        regime: "atto", or "tiny" or "base", which take ten and thirty times as long.
        overrides: values in place of those of the recipe "tiny_imagenet" and `CHANGES`.

    Returns the rungs, in the order of the road. ValueError: a step or value is wrong, or not for all steps.
    """
    require("matplotlib", "The picture of the ladder")
    numbers = sorted({roadmap.find(step) for step in steps})
    if not numbers or 0 in numbers:
        raise ValueError(
            "Expected steps from 1 to 16: step 0 is the model of step 1 with a recipe of 2015, and here one "
            f"recipe trains all. Received: {', '.join(map(str, steps)) or 'none'}"
        )
    if seeds < 1:
        raise ValueError(f"Expected one seed or more, received {seeds}.")
    roadmap.design(numbers[0], regime)  # refuses an unknown regime
    given = {Recipe.full_key(key) or key: value for key, value in (overrides or {}).items()}
    if "run.seed" in given:
        raise ValueError(
            f"Expected the number of seeds, which are 0, 1, ... for every step, received "
            f"seed={given['run.seed']!r}. Pass seeds={seeds} (--seeds {seeds}) alone."
        )
    own = {**CHANGES, "architecture": REGIMES[regime]}
    changes: dict[str, Any] = {Recipe.full_key(key) or key: value for key, value in own.items()} | given
    folder = pathlib.Path(os.path.expanduser(output)).absolute()
    recipe: Any = choose_recipe(RECIPE, data, changes, folder)[0]
    _check_recipe(recipe, regime)
    if open_data(recipe)[1] is None:
        raise ValueError(f"Expected images to evaluate on in '{data}', received none. Set val_split.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder for the runs, received the file '{folder}'. Name another path.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TABLE, PICTURE):
        check_target(folder / name)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):  # all steps of a seed, then the next: a ladder is there early
        for step in numbers:
            if progress:
                place = f"{len(rows) + 1} of {seeds * len(numbers)}"
                print_line(f"run {place}: step {step}, {STEPS[step].name}, seed {seed}", sys.stderr)
            result = train(
                recipe,
                folder / f"{step:02d}-seed{seed}",
                overrides={"seed": seed},
                workers=workers,
                progress=progress,
                task=functools.partial(Road, step),
            )
            keras.utils.clear_session(free_memory=True)
            scores = result.scores
            found = {"step": step, "name": STEPS[step].name, "seed": seed, "top1": scores["val_top1"]}
            found |= {"loss": scores["val_loss"], "epochs": scores["epoch"], "updates": scores["step"]}
            rows.append(found)
            _write(rows, folder, f"{regime_of(recipe)}: {recipe.data.source}")
    return rungs(rows)


def regime_of(recipe: Any) -> str:
    return next(name for name, end in REGIMES.items() if end == recipe.model.architecture)


def _check_recipe(recipe: Any, regime: str) -> None:
    """Refuses values of a recipe that models with batch norms, or not of this package, cannot have."""
    wanted = {
        "architecture": (REGIMES[regime],), "weights": ("",), "trainable": ("all",), "teacher": ("",),
        "rematerialize": (False,), "head_init_scale": (1.0,), "layer_decay": (1.0,), "ema_decay": (0.0,),
        "accumulation_steps": (1,), "layer_scale_init_value": (1e-6,),
    }  # fmt: skip
    values = recipe.by_short_key()
    wrong = [
        f"{key} = {' or '.join(map(repr, allowed))}, received {values[key]!r}"
        for key, allowed in wanted.items()
        if values[key] not in allowed
    ]
    if wrong:
        raise ValueError(f"Expected values that every step of the road can have: {'; '.join(wrong)}.")


def rungs(rows: Sequence[Mapping[str, Any]]) -> list[Rung]:
    steps = sorted({row["step"] for row in rows})
    return [Rung(step, tuple(row["top1"] for row in rows if row["step"] == step)) for step in steps]


def noise(found: Sequence[Rung]) -> float | None:
    """Gives the pooled standard deviation over seeds of all rungs, in points; None with one seed."""
    freedom = sum(len(rung.scores) - 1 for rung in found)
    if freedom == 0:
        return None
    return math.sqrt(sum((score - rung.mean) ** 2 for rung in found for score in rung.scores) / freedom)


def threshold(found: Sequence[Rung], one: Rung, other: Rung) -> float | None:
    """Gives the difference of two rungs beyond which chance has 5 %, by Student's t test; None without seeds.

    The deviation is that of all rungs together, since two or three seeds tell little of a rung's own.
    """
    pooled = noise(found)
    if pooled is None:
        return None
    freedom = sum(len(rung.scores) - 1 for rung in found)
    factor = T_95[min(freedom, len(T_95)) - 1]
    return factor * pooled * math.sqrt(1 / len(one.scores) + 1 / len(other.scores))


def comparisons(found: Sequence[Rung]) -> list[str]:
    """Gives a line for each rung and the one before: the difference, and whether it is within noise."""
    lines = []
    for one, other in itertools.pairwise(found):
        limit, difference = threshold(found, one, other), other.mean - one.mean
        verdict = "one seed: nothing tells it from noise"
        if limit is not None:
            is_more = abs(difference) > limit
            verdict = f"{'more than' if is_more else 'within'} noise of {limit:.2f}"
        lines.append(f"{one.name} -> {other.name}: {difference:+.2f}, {verdict}")
    return lines


def _write(rows: list[dict[str, Any]], folder: pathlib.Path, title: str) -> None:
    table = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
    replace_file(folder / TABLE, csv_text(table).encode())
    draw(rungs(rows), folder / PICTURE, title)


def draw(found: Sequence[Rung], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws the mean of each rung, its standard deviation and seeds, and the change from the one before."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 0.55 * len(found) + 1.9), layout="constrained")
    figure.suptitle(printable(title), fontsize=10, parse_math=False)
    axes = figure.subplots()
    places = range(len(found))
    errors = [0.0 if math.isnan(rung.deviation) else rung.deviation for rung in found]
    axes.barh(places, [rung.mean for rung in found], xerr=errors, capsize=3, color="#9ecae1", ecolor="#444")
    for place, rung in enumerate(found):
        axes.plot(rung.scores, [place] * len(rung.scores), ".", color="#08519c", markersize=5)
        text = f"{rung.mean:.2f}"
        if place:
            before, limit = found[place - 1], threshold(found, found[place - 1], rung)
            is_more = limit is not None and abs(rung.mean - before.mean) > limit
            text += f"  ({rung.mean - before.mean:+.2f}{'' if is_more else ', within noise'})"
        end = max((rung.mean + errors[place], *rung.scores))
        axes.annotate(text, (end, place), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [f"{rung.step}  {rung.name}" for rung in found])
    axes.invert_yaxis()
    scores = [score for rung in found for score in rung.scores]
    margin = max(0.25 * (max(scores) - min(scores)), 0.5)
    axes.set_xlim(max(0.0, min(scores) - margin), max(scores) + 3 * margin)
    seeds = max(len(rung.scores) for rung in found)
    axes.set_xlabel(f"top-1 accuracy, %: mean, standard deviation and each of {seeds} seeds (axis is cut)")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
