"""Which resolution and which stride of the stem learn most in the same time, from random weights.

Each case trains for the same minutes on the same machine, one after another, and is then evaluated. A case is
ARCHITECTURE:SIZE/STRIDE: the side of the square crops in pixels, and how many of them a position of the first
map covers. Published models have a stride of 4; for another one the stem is STRIDE x STRIDE pixels and the
rest of the model is as it was. The steps that fit into the minutes are reckoned from the median of some steps
made before, so that the cosine of the learning rate ends with the time. All else is as in
recipes/tiny_imagenet_64.toml, but for the peak of the rate and the warmup, which are those of the first part.

    python benchmarks/resolutions.py OUTPUT --data TINY_IMAGENET --minutes 8 \\
        --cases convnextv2_atto:64/4 convnextv2_atto:48/4 convnextv2_atto:64/2 convnextv2_atto:128/4

TINY_IMAGENET is what demo/prepare_tiny_imagenet.py writes. Rows go to OUTPUT/resolutions.csv as they are
made, and the table to OUTPUT/resolutions.md. The same command resumes where it was stopped; KERAS_BACKEND
chooses the backend. Nothing else should run meanwhile.
"""

import argparse
import os
import pathlib
import re
import shlex
import statistics
import sys
import time
from typing import Any

from rows import check_settings, read, write, write_text

RECIPE = "tiny_imagenet_64"
LEARNING_RATE = 1.5e-3  # recipes/tiny_imagenet.toml
WARMUP = 0.1  # of the steps, as there
STEPS_BEFORE, STEPS_TIMED = 5, 20
SETTINGS = ("minutes", "seed", "limit", "data_sha256", "backend")
MEASURED = (
    "first_map",
    "last_map",
    "steps",
    "epochs",
    "images_per_second",
    "loss",
    "top1",
    "top5",
    "seconds",
)
FACTS = ("evaluated", "backend_version", "keras", "python", "cpu", "cores", "commit", "time")
COLUMNS = ("case", *MEASURED, *SETTINGS, *FACTS)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return measure(options, sys.argv[1:] if arguments is None else arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"resolutions.py: error: {error}", file=sys.stderr)
        return 2


def parsed(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path, help="folder for resolutions.csv and resolutions.md")
    parser.add_argument("--data", required=True, help="prepared data with a split for training and another")
    parser.add_argument("--cases", required=True, nargs="+", metavar="ARCHITECTURE:SIZE/STRIDE", type=case)
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="of each case, default 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="images to evaluate, for a trial")
    return parser.parse_args(arguments)


def case(text: str) -> tuple[str, int, int]:
    match = re.fullmatch(r"(\w+):([1-9]\d*)/([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"expected ARCHITECTURE:SIZE/STRIDE, such as convnextv2_atto:64/4, received {text!r}"
        )
    return match[1], int(match[2]), int(match[3])


def measure(options, arguments) -> int:
    import importlib

    import keras

    from keras_convnext import _environment
    from keras_convnext.data import sources
    from keras_convnext.evaluation.results import fingerprint

    training = sources.open_source(options.data, "train")
    held_out = sources.open_source(options.data, "validation")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "resolutions.csv"
    rows = read(path, COLUMNS)
    backend = keras.backend.backend()
    settings = {
        "minutes": f"{options.minutes:g}",
        "seed": str(options.seed),
        "limit": str(options.limit or ""),
        "data_sha256": fingerprint(training)[:16],
        "backend": backend,
    }
    for row in rows:
        check_settings(row, settings, path)
    names = ["{}:{}/{}".format(*chosen) for chosen in options.cases]
    for name, chosen in zip(names, options.cases, strict=True):
        if name in {row["case"] for row in rows}:
            continue
        print(f"{name}: {options.minutes:g} minutes ...", flush=True)
        row = {
            "case": name,
            **trained(training, held_out, chosen, options),
            **settings,
            **_environment.machine(),
        }
        row |= {"keras": keras.__version__, "backend_version": importlib.import_module(backend).__version__}
        rows.append({column: str(row[column]) for column in COLUMNS})
        write(rows, path, COLUMNS)
        print(f"{name}: {row['top1']} % after {row['epochs']} epochs", flush=True)
    text = table([row for row in rows if row["case"] in names], arguments)
    write_text(text, options.output / "resolutions.md")
    print(text)
    return 0


def trained(training, held_out, chosen, options):
    """Trains one case from random weights for the minutes, and evaluates it."""
    import keras

    from keras_convnext.data import batches
    from keras_convnext.evaluation.classification import evaluate
    from keras_convnext.training.recipes.files import load_recipe

    recipe: Any = load_recipe(RECIPE)
    size = chosen[1]

    def stream():
        return batches.train_batches(
            training,
            batch_size=recipe.optimizer.batch_size,
            image_size=size,
            seed=options.seed,
            augmentation=recipe.augmentation,
        )

    def fit(steps):
        """Trains a new model; returns it, its last loss, and when each step ended."""
        keras.utils.clear_session()
        keras.utils.set_random_seed(options.seed)
        model = build(chosen, recipe, len(training.classes), steps)
        ends = []
        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda step, logs: ends.append(time.monotonic())
        )
        history = model.fit(stream(), steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[watch])
        return model, history.history["loss"][-1], ends

    _, _, ends = fit(STEPS_BEFORE + STEPS_TIMED)
    seconds = [
        after - before for before, after in zip(ends[STEPS_BEFORE - 1 :], ends[STEPS_BEFORE:], strict=False)
    ]
    steps = max(2, round(60 * options.minutes / statistics.median(seconds)))
    model, loss, ends = fit(steps)
    lasted = (ends[-1] - ends[0]) * steps / (steps - 1)  # without the compilation in the first step
    preprocessing = recipe.evaluation.preprocessing.at(model.input_shape[1] or 224)
    result = evaluate(model, held_out, preprocessing=preprocessing, limit=options.limit, progress=False)
    maps = [keras.ops.shape(model.get_layer(name).output)[1] for name in ("stages_0_0", "stages_3_0")]
    return {
        "first_map": maps[0],
        "last_map": maps[1],
        "steps": steps,
        "epochs": f"{steps * recipe.optimizer.batch_size / len(training):.2f}",
        "images_per_second": f"{steps * recipe.optimizer.batch_size / lasted:.0f}",
        "loss": f"{loss:.4f}",
        "top1": f"{result.top1:.2f}",
        "top5": f"{result.top5:.2f}",
        "seconds": f"{lasted:.1f}",
        "evaluated": len(result.numbers),
    }


def build(chosen, recipe, classes, steps):
    """The model of a case, compiled; pixels in 0..255 to logits."""
    import keras

    import keras_convnext
    from keras_convnext.training import optimizer, schedule

    architecture, size, stride = chosen
    model = keras_convnext.load(
        architecture, None, classes=classes, classifier_activation=None, input_shape=(size, size, 3)
    )
    if stride != 4:
        model = with_stem_stride(model, stride)
    model.compile(
        optimizer.AdamW(
            schedule.WarmupCosine(LEARNING_RATE, steps, warmup_steps=round(WARMUP * steps)),
            recipe.optimizer.weight_decay,
        ),
        keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    return model


def with_stem_stride(model, stride):
    """A model with another stride of the stem and new random weights."""
    import keras

    name = "downsample_layers_0_0"
    if model.get_layer(name).kernel_size != (4, 4):
        raise ValueError(f"Expected a model whose stem is one 4x4 convolution, received {model.name!r}.")

    def clone(layer):
        config = layer.get_config()
        if layer.name == name:
            config |= {"kernel_size": (stride, stride), "strides": (stride, stride)}
        return type(layer).from_config(config)

    return keras.models.clone_model(model, clone_function=clone)


def table(rows, arguments) -> str:
    lines = [
        "Accuracy in percent after the same time of training from random weights; one seed.",
        "",
        "| model:pixels/stride | first map, last map | images/s | epochs | minutes | top-1 | top-5 |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: -float(row["top1"])):
        maps = f"{row['first_map']}², {row['last_map']}²"
        lines.append(
            f"| {row['case']} | {maps} | {row['images_per_second']} | {row['epochs']} | "
            f"{float(row['seconds']) / 60:.1f} | {row['top1']} | {row['top5']} |"
        )
    lines += ["", f"- command: `python benchmarks/resolutions.py {shlex.join(map(str, arguments))}`"]
    for name in ("evaluated", "seed", "backend", *FACTS[1:-1]):
        lines.append(f"- {name}: {', '.join(sorted({row[name] for row in rows}))}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
