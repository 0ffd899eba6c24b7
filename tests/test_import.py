"""`import keras_convnext` is light, and imports inside the package point one way."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGES = ("bench", "data", "engines", "training")
PACKAGE = pathlib.Path(__file__).parents[1] / "keras_convnext"

# module -> modules of this package that it may import (docs: CONTRIBUTING.md, "Where things are")
ALLOWED = {
    "_environment": set(),
    "variants": set(),
    "layers": set(),
    "bfloat16": {"machine"},
    "depthwise": {"bfloat16", "layers"},
    "files": set(),
    "torch_files": {"files"},
    "downloads": {"quiet"},
    "checkpoints": set(),
    "descriptions": {"checkpoints", "torch_files"},
    "parts": set(),
    "products": {"bfloat16"},
    "convnext": {"layers", "depthwise", "parts", "products"},
    "state_dicts": {"variants"},
    "keras_files": {"torch_files"},
    "models": {
        "checkpoints", "convnext", "descriptions", "downloads", "keras_files", "state_dicts", "torch_files",
        "variants",
    },
    "convert": {"checkpoints", "descriptions", "files", "models", "state_dicts", "torch_files", "variants"},
    "deployment": {"convnext", "depthwise", "layers", "models", "parts", "products"},
    "exporters": {"litert_quantization"},
    "litert_quantization": set(),
    "runtimes": {"machine", "quiet"},
    "export": {"deployment", "exporters", "runtimes", "quiet"},
    "browser": {"data.preprocess", "downloads", "files", "quiet", "runtimes"},
    "quiet": set(),
    "export_report": {"files"},
    "classifiers": {
        "checkpoints", "data.class_names", "descriptions", "downloads", "keras_files", "models",
        "state_dicts", "variants",
    },
    "results": {"data.sources", "downloads"},
    "reports": {"data.class_names", "data.preprocess", "data.sources", "files", "results"},
    "evaluate": {
        "classifiers", "distribution", "machine", "data.class_names", "data.sources", "quiet", "reports",
        "results", "runtimes",
    },
    "gradcam": set(),
    "features": {
        "classifiers", "data.preprocess", "data.sources", "downloads", "evaluate", "files", "keras_files",
        "models", "results", "state_dicts",
    },
    "training.optimizer": {"checkpoints"},
    "training.recipe": {"checkpoints", "variants"},
    "training.run_folder": {"downloads", "files", "torch_files"},
    "training.logs": {"files", "quiet"},
    "training.losses": set(),
    "training.adapt": {"layers"},
    "training.memory": {"state_dicts", "variants"},
    "training.planning": {
        "bench.work", "checkpoints", "data.sources", "training.memory", "training.recipe", "variants",
    },
    "training.trainer": {
        "checkpoints", "classifiers", "convert", "data.sources", "descriptions", "distribution", "evaluate",
        "keras_files", "models", "results", "state_dicts", "training.adapt", "training.logs",
        "training.losses", "training.optimizer", "training.recipe", "training.run_folder", "variants",
    },
    "machine": set(),
    "distribution": {"engines.base", "engines.processes"},
    "engines.base": {"engines.processes"},
    "engines.on_jax": {"engines.base", "engines.processes"},
    "engines.on_tensorflow": {"engines.base", "engines.processes", "layers"},
    "engines.on_torch": {"engines.base", "engines.processes", "layers"},
    "engines.processes": set(),
    "bench.contestants": {"machine", "checkpoints", "runtimes", "variants"},
    "bench.worker": {"bench.contestants"},
    "bench.turns": {"bench.contestants", "bench.worker"},
    "bench.report": {"bench.contestants", "bench.turns", "files"},
    "bench.present": {"bench.contestants", "machine", "bench.report", "files"},
    "bench.compare": {
        "bench.contestants", "machine", "bench.present", "bench.report", "bench.turns", "checkpoints",
        "quiet", "variants",
    },
    "bench.work": {"bench.contestants", "machine", "bench.turns", "variants"},
    "bench.stages": {
        "bench.compare", "bench.contestants", "bench.present", "bench.report", "bench.turns", "bench.work",
        "variants",
    },
    "bench.growth": {
        "bench.compare", "bench.contestants", "bench.present", "bench.report", "bench.turns", "bench.work",
        "variants",
    },
    "bench.startup": {
        "bench.compare", "bench.contestants", "bench.present", "bench.report", "bench.turns", "bench.work",
        "variants",
    },
    "bench.depthwise": {"bench.contestants", "bench.report", "bench.turns", "files", "variants"},
    "bench.standard": {
        "bench.compare", "bench.contestants", "bench.present", "bench.report", "bench.stages",
        "bench.startup", "bench.turns", "bench.work",
    },
    "data.preprocess": set(),
    "data.class_names": set(),
    "data.tfrecords": set(),
    "data.sources": {"data.class_names", "data.preprocess", "data.tfrecords", "files", "quiet"},
    "data.prepare": {"data.sources", "data.tfrecords", "downloads"},
    "data.images": set(),
    "data.augment": set(),
    "data.batches": {"data.augment", "data.images", "data.preprocess", "data.sources"},
    "data.calibration": {"data.preprocess", "data.sources"},
    "data.contact_sheet": {
        "data.augment", "data.batches", "data.preprocess", "data.sources", "files",
    },
}  # fmt: skip
KERAS_FREE = {"_environment", "variants", "files", "torch_files", "downloads", "checkpoints", "descriptions",
              "state_dicts", "results", "reports", "exporters", "litert_quantization", "runtimes",
              "export_report", "quiet", "browser", "training.recipe", "training.run_folder",
              "training.logs", "training.memory", "training.planning",
              *(module for module in ALLOWED if module.startswith(("bench.", "data.")))}  # fmt: skip
WITH_FRAMEWORK = {
    # Its graphs are what these are made of.
    **{f"data.{name}": {"tensorflow"} for name in ("images", "augment", "batches", "contact_sheet")},
    "engines.on_jax": {"jax"},
    "engines.on_tensorflow": {"tensorflow"},
    "engines.on_torch": {"torch"},
}


def imported(module):
    """(modules of this package, top-level packages) that a module imports when it is imported."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    ours, others = set(), set()
    for node in tree.body:  # not inside functions
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if source == "keras_convnext":
                ours |= {alias.name for alias in node.names}
            elif (package := source.removeprefix("keras_convnext.")) in PACKAGES:
                ours |= {f"{package}.{alias.name}" for alias in node.names}
            elif source.startswith("keras_convnext."):
                ours.add(source.removeprefix("keras_convnext."))
            else:
                others.add(source.split(".")[0])
    return ours, others


@pytest.mark.once
@pytest.mark.parametrize("module", ALLOWED)
def test_imports_point_one_way(module):
    ours, others = imported(module)
    assert ours <= ALLOWED[module]
    forbidden = {"tensorflow", "jax", "torch", "huggingface_hub", "timm", "transformers", "matplotlib"}
    assert not others & (forbidden - WITH_FRAMEWORK.get(module, set()))
    if module in KERAS_FREE:
        assert "keras" not in others


@pytest.mark.once
def test_every_module_is_in_the_table_and_nothing_imports_the_command_line():
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    modules -= {"__init__", "__main__", "cli"}
    modules -= {f"{package}.__init__" for package in PACKAGES}
    assert modules == set(ALLOWED)
    for module in modules:
        assert "cli" not in imported(module)[0]


def test_import_loads_no_second_framework():
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    others = {"tensorflow", "jax", "torch", "huggingface_hub", "tensorflow_datasets", "timm"} - {backend}
    code = f"import keras_convnext, sys; print(sorted({others!r} & set(sys.modules)))"
    command = [sys.executable, "-c", f"import keras; {code}"]
    added = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    )
    code = f"import keras, sys; print(sorted({others!r} & set(sys.modules)))"
    keras_alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert added == keras_alone.stdout.strip().splitlines()[-1]


@pytest.mark.once
@pytest.mark.parametrize("options", [["-m"], ["-W", "ignore", "-m"]])
def test_module_as_a_command_starts_no_backend(options):
    command = [sys.executable, "-X", "importtime", *options, "keras_convnext", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "weight files" in done.stdout and "| keras_convnext" in done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"keras", "tensorflow", "jax", "torch"}


def test_import_adds_less_than_three_tenths_of_a_second_to_keras():
    """The best of three runs, by Python's own account; about 0.1 s where this was written."""
    added = []
    for _ in range(3):
        command = [sys.executable, "-X", "importtime", "-c", "import keras_convnext"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
        microseconds = {}
        for line in lines:
            if line.startswith("import time:") and line.count("|") == 2:
                _, cumulative, name = line.removeprefix("import time:").split("|")
                microseconds[name.strip()] = cumulative.strip()
        added.append((int(microseconds["keras_convnext"]) - int(microseconds["keras"])) / 1e6)
        if added[-1] < 0.3:
            return
    raise AssertionError(f"import keras_convnext adds {added} seconds to import keras")
