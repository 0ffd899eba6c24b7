"""`train` runs a recipe; `plan` says what a recipe takes before it runs."""

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Mapping

from keras_convnext.cli import shared

TRAIN_EXAMPLES = """examples:
  keras-convnext train smoke --out runs/smoke
  keras-convnext train fine_tune --data flowers/ --out runs/flowers --set epochs=10
  keras-convnext train fine_tune --data flowers/ --out runs/head --set trainable=head
  keras-convnext train fine_tune --data flowers/ --out runs/v2 --set weights=convnextv2_atto.tiny_imagenet200
  keras-convnext train fine_tune --data flowers/ --out runs/flowers --distribute data_parallel
  keras-convnext train fine_tune_segmentation --data masks/ --out runs/masks --set ignored_values=255
  keras-convnext train pretrain --data images/ --out runs/pretrained --set epochs=100
  keras-convnext train --list

RECIPE is a TOML file or the name of a published recipe. --data is a folder of class folders, ImageNet's tars,
a set of TensorFlow Datasets, TFRecord files or what `keras-convnext prepare` wrote; of a recipe of
segmentation photos with label maps, such as images/ and masks/; to pre-train, images at any depth below it.
The same command resumes
where it was stopped, by Ctrl-C, by SIGTERM, by a kill or a reboot. DIR holds log.csv, curves.png,
tensorboard/, recipe.toml, checkpoints/, the best and the final weights: `keras-convnext predict --weights
DIR/final.safetensors photo.jpg` uses them. With other weights, a tag or a file, what follows from them is
derived where it is not set, and printed. KERAS_BACKEND chooses tensorflow, jax or torch."""


def train_options(option: Callable) -> None:
    option("recipe", "RECIPE", "TOML file, or a published name", nargs="?")
    option("--out", "DIR", "folder of the run")
    for name in ("--data", "--set", "--quiet"):
        option(name)
    option("--distribute", "ENGINE", "devices of a step; short for --set distribution.engine=ENGINE")
    # Classes of a run come from folders; this option is here to say how a label file becomes some.
    option("--labels", "FILE", argparse.SUPPRESS)
    option("--workers", "N", "threads that make the batches", type=shared.positive)
    option("--list", None, "list the published recipes")


# What uses the weights of a run, by the task of its recipe.
_USES = {
    "classification": "predict PHOTO --weights {}",
    "segmentation": "segment PHOTO --model {} -o SEGMENTED",
    "pretraining": "train fine_tune --data LABELLED --out DIR --set weights={}",
}


def train_command(options: argparse.Namespace) -> int:
    from keras_convnext.training import derived
    from keras_convnext.training.recipes import files

    if options.list:
        print("\n".join(files.known_recipes()))
        return 0
    if options.recipe is None or options.out is None:
        raise ValueError("Expected RECIPE and --out DIR; keras-convnext train --list names the recipes.")
    if options.labels is not None:
        raise ValueError(
            "Expected the classes in the data, as folders or as a prepared set, received --labels. First run "
            f"keras-convnext prepare {shlex.quote(options.data or 'PHOTOS')} PREPARED --labels "
            f"{shlex.quote(options.labels)}, then train with --data PREPARED."
        )
    overrides = shared.recipe_overrides(options.set, data=options.data, engine=options.distribute)
    # All mistakes that can be found before a backend is loaded, which takes seconds.
    _register_for(overrides)
    recipe, _ = derived.choose_recipe(options.recipe, None, overrides, options.out)
    shared.import_quietly("keras_convnext.training.trainer", "tensorflow")
    from keras_convnext.training import failure, run_state, trainer

    try:
        result = trainer.train(
            options.recipe,
            options.out,
            overrides=overrides,
            workers=options.workers,
            progress=not options.quiet,
        )
    except failure.Interrupted as stopped:
        shared.complain(str(stopped))
        return 128 + stopped.signal_number
    except failure.NonFiniteError as error:
        shared.complain(f"error: {error}")
        return 3
    if result.process:
        return 0

    def score(name: str, text: str) -> str | None:
        return text.format(result.scores[name]) if name in result.scores else None

    names = (f"final{suffix}" for suffix in (".safetensors", ".keras"))
    weights = next(path for path in map(result.folder.joinpath, names) if path.exists())
    facts = {
        "steps": f"{result.steps:,}, {result.seconds:,.0f} s in this run",
        "training loss": score("loss", "{:.4f}"),
        "validation loss": score("val_loss", "{:.4f}"),
        "top-1": score("val_top1", "{:.2f} %"),
        "top-1 of the EMA": score("ema_val_top1", "{:.2f} %"),
        "mIoU": score("val_miou", "{:.2f} %"),
        "mIoU of the EMA": score("ema_val_miou", "{:.2f} %"),
        "curves": result.folder / run_state.CURVES_FILE,
        "weights": weights,
    }
    shared.print_facts(f"{options.recipe}: {result.folder}", facts.items())
    print(f"keras-convnext {_USES[recipe.task].format(shlex.quote(str(weights)))}")
    return 0


PLAN_EXAMPLES = """examples:
  keras-convnext plan imagenet1k_convnext_tiny --devices 64xh100 --set accumulation_steps=1
  keras-convnext plan imagenet22k_convnext_xlarge --devices 16xa100-40 --set precision=mixed_bfloat16
  keras-convnext plan smoke --devices 8xcpu --engine model_parallel --json

Nothing is trained or built: all is counted from the architecture. DEVICES are a number and a name: h100,
h200, a100-40, a100-80, v100, l4, rtx4090, tpu-v3, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, cpu. Memory is what a
step holds at its peak, without the framework and its libraries (measured on a CPU: benchmarks/memory.md).
Time is a rough bound from the makers' peak figures, of which --fraction is taken; it was not measured on any
of these devices. KERAS_BACKEND chooses whose program is counted."""


def plan_options(option: Callable) -> None:
    option("recipe", "RECIPE", "TOML file, or a published name")
    for name in ("--data", "--set", "--json"):
        option(name)
    option("--devices", "DEVICES", "number and name, such as 64xh100; see below", required=True)
    option("--engine", "ENGINE", "short for --set distribution.engine=ENGINE; default the recipe's")
    option("--fraction", "X", "of the peak figures, default 0.4", type=float, default=0.4)


def plan_command(options: argparse.Namespace) -> int:
    from keras_convnext.analysis import devices
    from keras_convnext.analysis.plan import describe, make_plan
    from keras_convnext.training.derived import choose_recipe

    overrides = shared.recipe_overrides(options.set, data=options.data, engine=options.engine)
    _register_for(overrides)
    recipe, derived = choose_recipe(options.recipe, None, overrides)
    plan = make_plan(recipe, options.devices, options.fraction)
    if options.json:
        facts = dataclasses.asdict(plan) | {
            "step_seconds": plan.step_seconds,
            "images_per_second": plan.images_per_second,
            "source": devices.DEVICES[plan.device].source,
        }
        facts["memory"]["total"] = plan.memory.total
        for fact, exchange in zip(facts["exchanges"], plan.exchanges, strict=True):
            fact["wire_bytes"] = exchange.wire_bytes
        shared.print_json(facts | {"derived": derived})
        return 0
    lines = [("derived", line) for line in derived] + describe(plan, options.fraction)
    shared.print_facts(f"{options.recipe} on {options.devices}", lines)
    return 0


def _register_for(overrides: Mapping[str, str]) -> None:
    """Loads the classes that a .keras file names, where one is to be opened."""
    if any(value.endswith(".keras") for value in overrides.values()):
        shared.import_quietly("keras_convnext.models")
