"""Time and memory of a training step of FCMAE: both forms of its encoder, and the ordinary body.

    python benchmarks/fcmae.py benchmarks/runs/fcmae/speed.csv

Each backend has a process of its own, which goes through the models of a case in rounds, forwards and
backwards in turn, so that a machine that grows slower or faster does so for all. Each model does its whole
step, AdamW included: "tall" and "masked" are autoencoders with a decoder of 512, "dense" is the supervised
step of the same architecture with 1000 classes, which sees the whole image and has no decoder. Numbers are
medians of the steps of all rounds. "bound" is how many fewer multiply-adds the tall form has than the masked
one, decoder included; "kept" are the bytes that PyTorch keeps for the backward pass, weights left out; "peak"
is the largest memory of a step by the means of `benchmarks/memory.py`, on TensorFlow with what Keras holds
besides. A row that is in the file is left out. Nothing else should run meanwhile.
"""

import argparse
import gc
import os
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.rows import read, write, write_text

BACKENDS = ("torch", "tensorflow", "jax")
CASES = {"atto": ("convnextv2_atto", 128, 16), "tiny": ("convnextv2_tiny", 224, 4)}  # name, side, batch
FORMS = ("dense", "masked", "tall")
MASK_RATIO, DECODER = 0.6, 512
MEASURED = ("milliseconds", "fastest", "slowest", "steps", "peak_mb", "kept_mb", "bound")
FACTS = ("backend_version", "keras", "python", "cpu", "features", "cores", "commit", "time")
COLUMNS = ("backend", "architecture", "image_size", "batch", "form", *MEASURED, *FACTS)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path, help="CSV file to add rows to; its table beside it, .md")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="X", help="of a model in a round")
    parser.add_argument("--batch", type=int, metavar="N", help="default 16 for atto, 4 for tiny")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.child:
        return measure(options)
    for backend in options.backends:
        for case in options.cases:
            print(f"{backend}, {case} ...", flush=True)
            command = [sys.executable, __file__, *words, "--child", "--backends", backend, "--cases", case]
            environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            environment |= {"TF_CPU_ALLOCATOR_USE_BFC": "1"}  # it counts
            if subprocess.run(command, env=os.environ | environment).returncode:
                return 2
    text = table(read(options.output, COLUMNS))
    write_text(text, options.output.with_suffix(".md"))
    print(text)
    return 0


def measure(options) -> int:
    """Measures one case on the backend of this process, and adds its rows."""
    import importlib

    from keras_convnext import _environment

    _environment.choose_backend()
    import keras

    backend = keras.backend.backend()
    architecture, side, batch = CASES[options.cases[0]]
    batch = options.batch or batch
    rows = read(options.output, COLUMNS)
    if any((row["backend"], row["architecture"]) == (backend, architecture) for row in rows):
        print(f"{backend}, {architecture} is in '{options.output}' already")
        return 0
    bound = multiply_adds(architecture, side, "masked") / multiply_adds(architecture, side, "tall")
    steps, memory = {}, {}
    for form in FORMS:
        case = form, architecture, side, batch
        steps[form], memory[form] = step_of_jax(case) if backend == "jax" else step_of(case, backend)
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    for step in steps.values():
        step()
        step()
    for number in range(options.rounds):
        for form in FORMS[:: 1 - 2 * (number % 2)]:
            begin = time.perf_counter()
            while time.perf_counter() - begin < options.seconds:
                before = time.perf_counter()
                steps[form]()
                found[form].append(1000 * (time.perf_counter() - before))
    module = importlib.import_module(backend)
    facts = {"backend": backend, "backend_version": module.__version__, "keras": keras.__version__}
    facts |= {"architecture": architecture, "image_size": side, "batch": batch, "bound": f"{bound:.2f}"}
    facts |= {"features": _environment.processor_text(), **_environment.machine()}
    for form, times in found.items():
        row = {"form": form, "milliseconds": f"{statistics.median(times):.1f}", "steps": len(times)}
        row |= {"fastest": f"{min(times):.1f}", "slowest": f"{max(times):.1f}", **memory[form]}
        rows.append({column: str((facts | row)[column]) for column in COLUMNS})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write(rows, options.output, COLUMNS)
    return 0


def made(form, architecture, side, batch):
    """A compiled model, what it is given, and its labels or None."""
    import keras
    import numpy as np

    import keras_convnext
    from keras_convnext.fcmae import MaskedAutoencoder, draw_masks

    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (batch, side, side, 3)).astype("float32")
    shape = (side, side, 3)
    if form == "dense":
        model = keras_convnext.load(architecture, weights=None, input_shape=shape, classifier_activation=None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(1e-4), loss)
        return model, images, np.arange(batch)
    body = keras_convnext.load(architecture, weights=None, input_shape=shape, include_top=False)
    model = MaskedAutoencoder(body, MASK_RATIO, DECODER, encoder=form)
    model.compile(keras.optimizers.AdamW(1e-4))
    return model, (images, draw_masks(rng, batch, (side // 32, side // 32), MASK_RATIO)), None


def step_of(case, backend):
    """A function that does one training step, and the memory of one."""
    from benchmarks import memory

    kept = ""
    model, *data = made(*case)
    if backend == "tensorflow":
        models = []

        def build():
            models.append(made(*case)[0])
            return models[0]

        peak = memory.tensorflow_peak(build, *data)
        model = models[0]
    else:
        model.train_on_batch(*data)
        peak = memory.torch_peak(model, *data)
        kept = megabytes(kept_bytes(model, data))
    gc.collect()
    return lambda: model.train_on_batch(*data), {"peak_mb": megabytes(peak), "kept_mb": kept}


def step_of_jax(case):
    """The same of the program that Keras runs, compiled once for both."""
    import jax

    model, x, y = made(*case)
    batch = jax.tree.map(jax.numpy.asarray, (x,) if y is None else (x, y))
    model._symbolic_build(data_batch=batch)
    kinds = ("trainable_variables", "non_trainable_variables")
    state = [[variable.value for variable in getattr(model, kind)] for kind in kinds]
    state += [[v.value for v in model.optimizer.variables], [v.value for v in model.metrics_variables]]
    program = jax.jit(model.train_step, donate_argnums=0).lower(tuple(state), batch).compile()
    held = [tuple(state)]

    def step():
        _, held[0] = program(held[0], batch)
        jax.block_until_ready(held[0])

    sizes = program.memory_analysis()
    return step, {
        "peak_mb": megabytes(sizes.argument_size_in_bytes + sizes.temp_size_in_bytes),
        "kept_mb": "",
    }


def megabytes(size) -> str:
    return f"{size / 1e6:.0f}"


def multiply_adds(architecture, side, form) -> float:
    """Of a forward pass for an image, decoder included; the tall form has all of the depthwise ones."""
    from keras_convnext.architecture import layers_of
    from keras_convnext.fcmae import kept_cells
    from keras_convnext.variants import VARIANTS

    cells = side // 32
    share = kept_cells((cells, cells), MASK_RATIO) / cells**2 if form == "tall" else 1
    layers = layers_of(VARIANTS[architecture], side, classes=0)
    encoder = sum(layer.multiply_adds * (1 if layer.groups > 1 else share) for layer in layers)
    block = DECODER * (49 + 8 * DECODER)
    return encoder + cells**2 * (layers[-1].outputs * DECODER + block + DECODER * 3072)


def kept_bytes(model, data) -> int:
    """The bytes of the storages that a forward pass in training keeps, but for the weights."""
    import torch

    weights = {variable.value.untyped_storage().data_ptr() for variable in model.variables}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = data[0]
    pair = tuple(torch.from_numpy(part) for part in x) if isinstance(x, tuple) else torch.from_numpy(x)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = model(pair, training=True)
        target = None if data[1] is None else torch.from_numpy(data[1])
        loss = model.compute_loss(pair, target, result)  # holds what is kept until here
    del loss
    return sum(kept.values())


def table(rows) -> str:
    """The rows as Markdown, a line for each model and backend."""
    facts = rows[0]
    where = f"{facts['features']}, {facts['cores']} cores, Keras {facts['keras']}, Python {facts['python']}"
    lines = [
        "# A training step of FCMAE: tall, masked, and the ordinary body",
        "",
        f"`make bench-fcmae`: {where}. Milliseconds a step (median), float32; what the columns are is at the "
        "top of `benchmarks/fcmae.py`.",
        "",
        "| backend | model, side, batch | dense, supervised | masked | tall | masked / tall | bound "
        "| peak MB, dense / masked / tall | kept MB, dense / masked / tall | kept, tall / masked |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    cases = dict.fromkeys((row["backend"], row["architecture"]) for row in rows)
    for backend, architecture in cases:
        own = {
            row["form"]: row
            for row in rows
            if (row["backend"], row["architecture"]) == (backend, architecture)
        }
        one = own["tall"]
        times = [float(own[form]["milliseconds"]) for form in FORMS]
        cells = [
            f"{backend} {one['backend_version']}",
            f"{architecture}, {one['image_size']}, {one['batch']}",
            *(f"{value:.0f}" for value in times),
            f"{times[1] / times[2]:.2f}",
            one["bound"],
            *(" / ".join(own[form][column] for form in FORMS) for column in ("peak_mb", "kept_mb")),
        ]
        kept = [float(own[form]["kept_mb"] or "nan") for form in FORMS]
        cells.append(f"{kept[2] / kept[1]:.2f}" if one["kept_mb"] else "")
        if not one["kept_mb"]:
            cells[-2] = ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
