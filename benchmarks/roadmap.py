"""Milliseconds an image at each step from ResNet-50 to ConvNeXt-T, on each backend.

    python benchmarks/roadmap.py benchmarks/runs/roadmap.csv

Each backend has a process of its own, which builds all steps with random weights and then goes through them
in rounds, forwards and backwards in turn, so that a machine that grows slower or faster does so for all. A
number is the median over rounds of the median call of a round. The last step is measured twice: from the
plain layers of the road ("plain"), which is what to compare with the steps before, and as the model of this
package ("package"), whose blocks take the fast paths of each backend. A backend whose rows are in the file is
left out. Nothing else should run meanwhile.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time

from rows import check_settings, read, write

BACKENDS = ("tensorflow", "jax", "torch")
SETTINGS = ("regime", "batch", "image_size", "rounds", "seconds")
MEASURED = ("step", "name", "layers", "milliseconds", "fastest_round", "slowest_round")
FACTS = ("backend_version", "keras", "python", "cpu", "cores", "commit", "time")
COLUMNS = ("backend", *MEASURED, *SETTINGS, *FACTS)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = parsed(words)
    try:
        if options.child:
            return measure(options)
        for backend in options.backends:
            print(f"{backend} ...", flush=True)
            command = [sys.executable, __file__, *words, "--child"]
            environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            if subprocess.run(command, env=environment).returncode:
                return 2
        print(table(read(options.output, COLUMNS)))
    except (ValueError, OSError, ImportError) as error:
        print(f"roadmap.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def parsed(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path, help="CSV file to add rows to")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--regime", choices=("tiny", "base", "atto"), default="tiny")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images of a call, default 8")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="pixels, default 224")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="X", help="of a step in a round")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(options) -> int:
    """Measures the backend of this process, and adds its rows."""
    import importlib

    from keras_convnext import _environment, roadmap

    _environment.choose_backend()
    import keras
    import numpy as np

    backend = keras.backend.backend()
    settings = {name: f"{getattr(options, name):g}" for name in SETTINGS[1:]} | {"regime": options.regime}
    rows = read(options.output, COLUMNS)
    for row in rows:
        check_settings(row, settings, options.output)
    if backend in {row["backend"] for row in rows}:
        print(f"{backend} is in '{options.output}' already")
        return 0
    shape = (options.image_size, options.image_size, 3)
    images = np.random.default_rng(0).uniform(0, 255, (options.batch, *shape)).astype("float32")
    models = {
        (step, "plain"): roadmap.connect(step, options.regime, 1000, shape, "softmax")
        for step in range(len(roadmap.STEPS))
    }
    last = len(roadmap.STEPS) - 1
    models[last, "package"] = roadmap.build(last, options.regime, input_shape=shape)
    for model in models.values():  # compiles
        model.predict_on_batch(images)
        model.predict_on_batch(images)
    found: dict = {case: [] for case in models}
    for number in range(options.rounds):
        for case in list(models)[:: 1 - 2 * (number % 2)]:
            found[case].append(1000 * timed(models[case], images, options.seconds) / options.batch)
    facts = {"backend": backend, "backend_version": importlib.import_module(backend).__version__}
    facts |= {"keras": keras.__version__, **settings, **_environment.machine()}
    for (step, layers), times in found.items():
        row = {"step": step, "name": roadmap.STEPS[step].name, "layers": layers}
        row |= {"milliseconds": f"{statistics.median(times):.3f}"}
        row |= {"fastest_round": f"{min(times):.3f}", "slowest_round": f"{max(times):.3f}"}
        rows.append({column: str((facts | row)[column]) for column in COLUMNS})
    write(rows, options.output, COLUMNS)
    return 0


def timed(model, images, seconds: float) -> float:
    """Seconds of the median call, of those that begin within `seconds`."""
    calls: list[float] = []
    begin = time.perf_counter()
    while not calls or time.perf_counter() - begin < seconds:
        before = time.perf_counter()
        model.predict_on_batch(images)
        calls.append(time.perf_counter() - before)
    return statistics.median(calls)


def table(rows) -> str:
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    lines = ["| step | " + " | ".join(backends) + " |", "|---|" + "--:|" * len(backends)]
    for step, name, layers in dict.fromkeys((row["step"], row["name"], row["layers"]) for row in rows):
        own = {
            row["backend"]: row["milliseconds"]
            for row in rows
            if (row["step"], row["layers"]) == (step, layers)
        }
        cells = " | ".join(f"{float(own[backend]):.1f}" for backend in backends)
        lines.append(f"| {step} {name}{', this package' * (layers == 'package')} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
