"""Value of trained weights on a small photo set: fine-tuning from them against training from scratch.

Each seed holds out its own fifth of the photos, class by class, and labels its own 1 %, 10 % and 100 % of the
others (one photo of each class at least; the smaller part lies in the larger). On each part the same model is
trained twice: from WEIGHTS with a new classifier, and from random weights. Both make the same number of
steps: `--epochs` passes over the labelled photos, but at least `--least-steps`. Both take the augmentation
and the drop path of recipes/fine_tune.toml, a tenth of the steps as warmup, and what STARTS says. The last
weights are evaluated; nothing is chosen by the score.

    python benchmarks/transfer.py OUTPUT --weights convnextv2_atto.tiny_imagenet200 --data flowers5=PATH

Rows go to OUTPUT/transfer.csv as they are made, and the table to OUTPUT/transfer.md. The same command
resumes where it was stopped. 18 rows of one set of some 3,500 labelled photos take about 50 minutes on two
cores at 64 pixels (V2-Atto, 300 images/s); KERAS_BACKEND chooses the backend.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import pathlib
import shlex
import statistics
import sys
import time

from rows import check_settings, read, write, write_text

FRACTIONS = (0.01, 0.1, 1.0)
HELD_OUT = 0.2
BATCH_SIZE = 64
# From random weights what the warnings of `keras-convnext train` name: rate, decay, scale of the head.
STARTS = {
    "fine-tuned": {"learning_rate": 5e-4, "layer_decay": 0.8, "head_init_scale": 1e-3, "weight_decay": 1e-8},
    "from scratch": {"learning_rate": 1e-3, "layer_decay": 1.0, "head_init_scale": 1.0, "weight_decay": 0.05},
}
KEY = ("data", "seed", "fraction", "start")
# The values that must equal those of the rows that are there already.
SETTINGS = ("data_sha256", "weights_sha256", "image_size", "epochs", "least_steps", "limit")
MEASURED = ("labelled", "held_out", "steps", "loss", "top1", "seconds")
FACTS = ("weights", "architecture", "backend", "backend_version", "keras", "python", "cpu", "cores", "commit",
         "time")  # fmt: skip
COLUMNS = (*KEY, *MEASURED, *SETTINGS, *FACTS)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return measure(options, sys.argv[1:] if arguments is None else arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"transfer.py: error: {error}", file=sys.stderr)
        return 2


def parsed(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path, help="folder for transfer.csv and transfer.md")
    parser.add_argument("--weights", required=True, help="tag or file that fine-tuning starts from")
    parser.add_argument(
        "--data", required=True, action="append", metavar="NAME=PATH", help="class folders; may be repeated"
    )
    parser.add_argument("--rows", type=positive, metavar="N", help="stop after N new rows")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="default 3")
    parser.add_argument("--epochs", type=positive, default=20, metavar="N", help="default 20")
    parser.add_argument("--least-steps", type=positive, default=400, metavar="N", help="default 400")
    parser.add_argument(
        "--image-size", type=positive, metavar="N", help="pixels, default that of the weights"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="photos of a set, for a trial")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, received {text}")
    return number


def measure(options, arguments) -> int:
    from keras_convnext import _environment

    weights = opened_weights(options.weights, options.image_size)
    sets = {name: opened_data(name, path, options.limit) for name, path in map(divided, options.data)}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "transfer.csv"
    rows = read(path, COLUMNS)
    wanted = [
        {"data": name, "seed": str(seed), "fraction": f"{fraction:g}", "start": start}
        for name in sets
        for seed in range(options.seeds)
        for fraction in FRACTIONS
        for start in STARTS
    ]
    settings = {
        "weights_sha256": weights["sha256"],
        "image_size": str(weights["images"].image_size),
        "epochs": str(options.epochs),
        "least_steps": str(options.least_steps),
        "limit": str(options.limit or ""),
    }
    for row in rows:
        if row["data"] in sets:
            check_settings(row, settings | {"data_sha256": sets[row["data"]][1]}, path)
    done = {tuple(row[name] for name in KEY) for row in rows}
    missing = [key for key in wanted if tuple(key.values()) not in done]
    begin, steps_done = time.monotonic(), 0
    to_make = missing[: options.rows]
    lengths = [num_steps(sets[key["data"]][0], key, options) for key in to_make]
    for number, (key, steps) in enumerate(zip(to_make, lengths, strict=True)):
        source, digest = sets[key["data"]]
        title = (
            f"{number + 1} of {len(to_make)}: {key['data']}, {float(key['fraction']):.0%} of the labels, "
            f"seed {key['seed']}, {key['start']}"
        )
        row = key | trained(source, key, steps, weights, Line(title, steps, steps_done, sum(lengths), begin))
        steps_done += steps
        facts = {**environment(), **_environment.machine(), "weights": options.weights}
        facts |= settings | {"data_sha256": digest, "architecture": weights["architecture"]}
        rows.append({name: str((row | facts)[name]) for name in COLUMNS})
        write(rows, path, COLUMNS)
        print(f"{title}: {row['top1']} % of {row['held_out']} photos, {row['seconds']} s", flush=True)
    command = f"python benchmarks/transfer.py {shlex.join(arguments)}"
    keys = {tuple(key.values()) for key in wanted}
    chosen = [row for row in rows if tuple(row[name] for name in KEY) in keys]
    text = table(chosen, len(wanted), command)
    write_text(text, options.output / "transfer.md")
    print(text)
    return 0


# Weights and photos.


def opened_weights(name, image_size):
    """Returns what all rows use of the weights: architecture, preprocessing of images, SHA-256."""
    from keras_convnext.weights.resolve import resolve

    source = resolve(name)
    path, preprocessing = source.path, source.preprocessing.at(image_size)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    architecture = source.variant.name
    return {"path": path, "architecture": architecture, "images": preprocessing, "sha256": digest[:16]}


def divided(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise ValueError(f"Expected --data NAME=PATH, received {text!r}. Write --data flowers5=photos/.")
    return name, path


def opened_data(name, path, limit):
    """The photos of a set (of its training split, where it has one), and their digest."""
    import numpy as np

    from keras_convnext.data import sources
    from keras_convnext.evaluation.results import fingerprint

    source = sources.open_source(path, "train" if sources.list_splits(path) else None)
    if limit and limit < len(source):
        source = sources.take(source, np.linspace(0, len(source) - 1, limit).astype(int))
    return source, fingerprint(source)[:16]


def parts(source, key):
    """The labelled photos of a row, and those that are held out."""
    import numpy as np

    from keras_convnext.data import sources

    seed, fraction = int(key["seed"]), float(key["fraction"])
    training, held_out = sources.hold_out(source, HELD_OUT, seed)
    if fraction == 1:
        return training, held_out
    # A share of each class, one photo at least where it has two; here it is the share that is labelled.
    is_labelled = sources.held_out_mask(training, fraction, seed)
    is_labelled |= ~np.isin(training.labels, training.labels[is_labelled])  # the only photo of a class
    return sources.take(training, np.flatnonzero(is_labelled)), held_out


def num_steps(source, key, options) -> int:
    labelled = len(parts(source, key)[0])
    return max(math.ceil(options.epochs * labelled / BATCH_SIZE), options.least_steps)


# A row.


def trained(source, key, steps, weights, line):
    """Trains one model and evaluates it."""
    import keras
    import numpy as np

    import keras_convnext
    from keras_convnext.data import batches, sources
    from keras_convnext.evaluation.classification import evaluate
    from keras_convnext.training import finetune, optimizer, schedule
    from keras_convnext.training.recipes.files import load_recipe

    begin = time.monotonic()
    keras.utils.clear_session()
    labelled, held_out = parts(source, key)
    seed, images, changes = int(key["seed"]), weights["images"], STARTS[key["start"]]
    recipe = load_recipe("fine_tune")
    keras.utils.set_random_seed(seed)
    tuned = key["start"] == "fine-tuned"
    model = keras_convnext.load(
        weights["architecture"],
        weights["path"] if tuned else None,
        classes=len(source.classes),
        classifier_activation=None,
        input_shape=(images.image_size, images.image_size, 3),
        drop_path_rate=recipe.model.drop_path_rate,
        seed=seed,
        new_head=True if tuned else None,
    )
    finetune.scale_head(model, changes["head_init_scale"])
    rate = schedule.WarmupCosine(changes["learning_rate"], steps, warmup_steps=steps // 10)
    model.compile(
        optimizer.AdamW(rate, changes["weight_decay"], layer_decay=changes["layer_decay"]),
        keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    # Photos stand several times where they are fewer than a batch; each time they are changed in another way.
    times = math.ceil(BATCH_SIZE / len(labelled))
    repeated = sources.take(labelled, np.tile(np.arange(len(labelled)), times))
    stream = batches.train_batches(
        repeated,
        batch_size=BATCH_SIZE,
        image_size=images.image_size,
        seed=seed,
        augmentation=recipe.augmentation,
        normaliser=(images.mean, images.std),
    )
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: line.show(step + 1))
    history = model.fit(stream, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[watch])
    line.close()
    result = evaluate(model, held_out, preprocessing=images, progress=False)
    return {
        "labelled": len(labelled),
        "held_out": len(held_out),
        "steps": steps,
        "loss": f"{history.history['loss'][-1]:.4f}",
        "top1": f"{result.top1:.2f}",
        "seconds": f"{time.monotonic() - begin:.0f}",
    }


def environment():
    import importlib

    import keras

    backend = keras.backend.backend()
    version = importlib.import_module(backend).__version__
    return {"backend": backend, "backend_version": version, "keras": keras.__version__}


class Line:
    """One line on stderr, rewritten each second; nothing when nobody watches."""

    def __init__(self, title, steps, steps_before, all_steps, begin):
        self.title, self.steps, self.begin = title, steps, begin
        self.before, self.all = steps_before, all_steps
        self.shown = time.monotonic()

    def show(self, step):
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self.shown < 1:
            return
        self.shown = now
        done = self.before + step
        left = datetime.timedelta(seconds=round((now - self.begin) / done * (self.all - done)))
        text = f"\r{self.title}: step {step} of {self.steps}, {left} left for all \033[K"
        print(text, end="", file=sys.stderr, flush=True)

    def close(self):
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# The table.


def table(rows, num_wanted, command) -> str:
    """Markdown: mean and standard deviation over the seeds, and of the difference on the same split."""
    lines = [
        "Top-1 accuracy in percent on the held-out fifth, mean ± standard deviation over n seeds, each with "
        "its own split and labelled part. The difference is that of the same seed.",
        "",
        "| photos | labels | labelled | steps | fine-tuned | from scratch | difference | n |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups = {}
    for row in rows:
        by_start = groups.setdefault((row["data"], float(row["fraction"])), {})
        by_start.setdefault(row["start"], {})[row["seed"]] = row
    for (name, fraction), by_start in sorted(groups.items()):
        tuned, scratch = (by_start.get(start, {}) for start in STARTS)
        both = sorted(tuned.keys() & scratch.keys())
        any_row = next(iter((tuned or scratch).values()))
        scores = [[float(side[seed]["top1"]) for seed in sorted(side)] for side in (tuned, scratch)]
        differences = [float(tuned[seed]["top1"]) - float(scratch[seed]["top1"]) for seed in both]
        cells = [mean_text(values) for values in scores] + [mean_text(differences, "+")]
        counts = {len(tuned), len(scratch)}
        n = str(min(counts)) if len(counts) == 1 else f"{len(tuned)}, {len(scratch)}"
        first = [name, f"{fraction:.0%}", any_row["labelled"], any_row["steps"]]
        lines.append(f"| {' | '.join([*first, *cells, n])} |")
    facts = [f"- {len(rows)} of {num_wanted} rows", f"- command: `{command}`"]
    if rows:
        names = ("weights", "weights_sha256", "architecture", "image_size", "limit", *FACTS[2:-1])
        used = {name: sorted({row[name] for row in rows} - {""}) for name in names}
        facts += [f"- {name}: {', '.join(values)}" for name, values in used.items() if values]
        facts.append(
            f"- {sum(float(row['seconds']) for row in rows) / 60:.0f} minutes, batches of {BATCH_SIZE}"
        )
        facts += [f"- {start}: {json.dumps(values)}" for start, values in STARTS.items()]
    return "\n".join([*lines, "", *facts, ""])


def mean_text(values, sign="") -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
