"""The memory estimate of `keras-convnext plan` against what a training step takes, on a CPU.

Each row is a process of its own, which builds the model and its optimizer as the trainer does and measures
the memory that the arrays of a step take at once:

- JAX: of the compiled step, arguments + results - those that share memory + temporary arrays
  (`jax.stages.Compiled.memory_analysis`); the step is not run.
- PyTorch: the largest sum of all allocations and frees of a step (`torch.profiler`), with the variables.
- TensorFlow: the peak of its allocator (BFC, which counts; `TF_CPU_ALLOCATOR_USE_BFC=1`) over three steps.

"resident" is how far the peak of the process's resident memory rises above what it was after a step of a tiny
model. It has the workspaces of libraries and what the allocator does not give back, and for JAX the compiler,
so that it is left out there.

    python benchmarks/memory.py --output benchmarks/memory.md
    python benchmarks/memory.py --backends torch --variants convnext_base --batch 4 --image-size 160
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

MARK = "measured: "
COLUMNS = (
    "variant", "batch", "size", "precision", "rematerialize", "backend", "estimate", "measured", "ratio",
    "resident",
)  # fmt: skip
CLASSES = 1000
# The standard run: sizes that differ in what is large, maps or weights.
STANDARD = [
    (variant, batch, size, precision, rematerialize)
    for variant, batch, size in (
        ("convnext_atto", 16, 224),
        ("convnext_tiny", 4, 224),
        ("convnextv2_tiny", 4, 224),
    )
    for precision in ("float32", "mixed_bfloat16")
    for rematerialize in (False, True)
] + [
    ("convnext_femto_ols", 12, 160, "float32", False),
    ("convnext_zepto_rms", 8, 192, "float32", True),
    ("convnext_isotropic_small", 4, 224, "float32", False),
    ("convnextv2_nano", 6, 288, "float32", False),
    ("convnext_small", 1, 96, "float32", False),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="torch,tensorflow,jax", help="separated by commas")
    parser.add_argument("--variants", help="separated by commas; default the standard run")
    parser.add_argument("--batch", type=int, default=4, help="with --variants; default 4")
    parser.add_argument("--image-size", type=int, default=224, help="with --variants; default 224")
    parser.add_argument("--output", help="Markdown file to write; its other rows are kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(MARK + json.dumps(measure(**json.loads(options.child))))
        return 0
    cases = STANDARD
    if options.variants:
        words = ("float32", "mixed_bfloat16"), (False, True)
        cases = [
            (variant, options.batch, options.image_size, *rest)
            for variant in options.variants.split(",")
            for rest in itertools.product(*words)
        ]
    rows = []
    for backend in options.backends.split(","):
        for case in cases:
            row = measured_row(backend, *case)
            rows.append(row)
            print(" | ".join(map(str, row)), flush=True)
            if options.output:
                write(pathlib.Path(options.output), rows)
    return 0


def write(path: pathlib.Path, rows: list[tuple]) -> None:
    from keras_convnext import _environment

    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("keras", "jax", "torch", "tensorflow-cpu")
    )
    facts = _environment.machine()
    lines = [
        "# Memory of a training step: estimated and measured",
        "",
        f"`python benchmarks/memory.py --output benchmarks/memory.md`: {facts['cpu']}, {facts['cores']} "
        f"cores, {packages}, Python {facts['python']}. Megabytes; 1000 classes, AdamW with an average (EMA), "
        "one device. What is measured, and what `resident` is, stands at the top of that file. How much "
        "updates hold on TensorFlow was settled after all of its rows but those of convnext_nano. Its peaks "
        "differ by a few percent from run to run.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    own = {row[:6]: row for row in (tuple(map(str, row)) for row in rows)}
    kept = {}
    if path.exists():
        cells = [tuple(line.strip("| ").split(" | ")) for line in path.read_text().splitlines()]
        kept = {row[:6]: row for row in cells if len(row) >= len(COLUMNS) - 1 and row[:6] != COLUMNS[:6]}
    lines += [f"| {' | '.join(row)} |" for row in (kept | own).values()]
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text("\n".join([*lines, ""]))
    os.replace(temporary, path)


def measured_row(backend, variant, batch, size, precision, rematerialize) -> tuple:
    from keras_convnext.analysis import memory
    from keras_convnext.variants import VARIANTS

    step = memory.Step(
        VARIANTS[variant], batch, size, CLASSES, precision, backend, rematerialize=rematerialize
    )
    estimate = memory.estimate(step).total
    case = {
        "variant": variant, "batch": batch, "size": size, "precision": precision,
        "rematerialize": rematerialize,
    }  # fmt: skip
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_CPU_ALLOCATOR_USE_BFC": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # so that the C library gives large pieces back
        "MALLOC_TRIM_THRESHOLD_": "1000000",
    }
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(case)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
    if not found:
        raise RuntimeError(f"{backend} {case}: {child.stderr[-2000:]}")
    result = json.loads(found[0].removeprefix(MARK))
    return (
        variant, batch, size, precision, str(rematerialize).lower(), backend, f"{estimate / 1e6:.0f}",
        f"{result['measured'] / 1e6:.0f}", f"{estimate / result['measured']:.2f}",
        "-" if result["resident"] is None else f"{result['resident'] / 1e6:.0f}",
    )  # fmt: skip


# In the child process.


def measure(variant: str, batch: int, size: int, precision: str, rematerialize: bool) -> dict:
    import keras
    import numpy as np

    from benchmarks.collectives import compiled_step
    from keras_convnext.training import run_state
    from keras_convnext.training.recipes.files import load_recipe
    from keras_convnext.training.tasks import classification
    from keras_convnext.variants import VARIANTS

    backend = keras.backend.backend()
    changes = {
        "architecture": variant,
        "batch_size": batch,
        "image_size": size,
        "eval_image_size": size,
        "precision": precision,
        "rematerialize": rematerialize,
        "layer_scale_init_value": VARIANTS[variant].layer_scale_init_value or 0.0,
        "drop_path_rate": 0.1,
    }
    recipe = load_recipe("smoke").replaced(changes)

    def built(recipe):
        plan = run_state.Plan(recipe.optimizer.batch_size, 1, 100, 100, 0)
        student, _ = classification.build_model(recipe, CLASSES)
        return classification.compile_model(recipe, student, plan), student

    def arrays(recipe):
        shape = recipe.optimizer.batch_size, recipe.model.image_size, recipe.model.image_size, 3
        images = np.random.default_rng(0).uniform(0, 255, shape).astype("float32")
        return images, np.eye(CLASSES, dtype="float32")[np.arange(recipe.optimizer.batch_size)]

    with run_state.settings_of(recipe):
        if backend == "jax":
            model, _ = built(recipe)
            sizes = compiled_step(model, *arrays(recipe)).memory_analysis()
            shared = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
            return {"measured": shared + sizes.temp_size_in_bytes, "resident": None}
        tiny = {"architecture": "test_convnext2", "batch_size": 2, "image_size": 32, "eval_image_size": 32}
        small = recipe.replaced(tiny | {"layer_scale_init_value": 1e-6})
        model, _ = built(small)
        for _ in range(2):
            model.train_on_batch(*arrays(small))
        del model
        gc.collect()
        images, targets = arrays(recipe)
        before = resident("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        if backend == "tensorflow":
            return {
                "measured": tensorflow_peak(lambda: built(recipe)[0], images, targets),
                "resident": resident("VmHWM") - before,
            }
        model, student = built(recipe)
        model.train_on_batch(images, targets)
        after = resident("VmHWM") - before
        variables = run_state.state_variables(model, student).values()
        held = sum(run_state.variable_bytes(variable) for variable in variables)
        return {"measured": torch_peak(model, images, targets) + held, "resident": after}


def tensorflow_peak(build, images, targets) -> int:
    import tensorflow as tf

    memory = tf.config.experimental
    before = memory.get_memory_info("CPU:0")["current"]
    memory.reset_memory_stats("CPU:0")
    model = build()
    for _ in range(3):
        model.train_on_batch(images, targets)
    return memory.get_memory_info("CPU:0")["peak"] - before


def torch_peak(model, images, targets) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model.train_on_batch(images, targets)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def resident(kind: str) -> int:
    """ "VmRSS" or "VmHWM", its peak, of this process in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return 1024 * int(line.split()[1])
    raise OSError(f"Expected {kind} in /proc/self/status, which Linux has.")


if __name__ == "__main__":
    sys.exit(main())
