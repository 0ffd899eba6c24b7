"""`import keras_convnext`: what it loads and registers, its lazy names, and which way imports point."""

import ast
import functools
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_convnext

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "keras_convnext"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}

# Rooms and modules that import no Keras, not even by what they import.
KERAS_FREE = (
    "_environment", "_files", "_messages", "_settings", "_terminal", "variants", "analysis", "cli",
    "data", "roadmap", "weights", "evaluation.report", "evaluation.results", "exporting.litert_int8",
    "exporting.formats", "exporting.report", "exporting.runtimes", "exporting.web_page",
    "training.advice", "training.curves", "training.derived", "training.logs", "training.recipes",
    "training.run_folder",
)  # fmt: skip
WITH_KERAS = {"weights.assign", "weights.graph"}
# Its graphs are what these are made of.
WITH_FRAMEWORK = {
    **{
        f"data.{name}": {"tensorflow"}
        for name in ("augment", "batches", "blocks", "contact_sheet", "jpeg", "stream", "train_transform")
    },
    **{f"data.segmentation.{name}": {"tensorflow"} for name in ("augment", "batches")},
    "hub": {"keras_hub"},
    "distribution.jax_engine": {"jax"},
    "distribution.tensorflow_engine": {"tensorflow"},
    "distribution.torch_engine": {"torch"},
}
FRAMEWORKS = {"tensorflow", "jax", "torch"}
OPTIONAL = {"huggingface_hub", "keras_hub", "timm", "transformers", "matplotlib", "openvino", "onnxruntime"}


def run_python(*words, cwd=None):
    """Runs Python with this checkout; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def imported(module):
    """The modules that a module imports when it is imported, not inside functions or for editors only."""
    names = set()
    for node in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@functools.cache
def loaded(module):
    """All modules of the package that an import of a module loads; the package itself aside."""
    found, new = set(), {module}
    while new:
        name = new.pop()
        found.add(name)
        parents = {name.rpartition(".")[0]} - {"keras_convnext"}
        new |= {other for other in imported(name) | parents if other in MODULES} - found - {"keras_convnext"}
    return found


def is_in(module, rooms):
    """Whether a module is one of some rooms and modules, or in one of them."""
    name = module.removeprefix("keras_convnext.")
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


# Which way imports point.


def lint_imports(folder):
    command = [shutil.which("lint-imports", path=pathlib.Path(sys.executable).parent), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout


@pytest.mark.once
def test_imports_point_one_way_and_a_wrong_one_is_noticed(tmp_path):
    code, out = lint_imports(ROOT)
    assert (code, "1 kept, 0 broken" in out) == (0, True), out
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "keras_convnext", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "keras_convnext" / "variants.py", "a") as file:
        file.write("\n\ndef wrong():\n    from keras_convnext import models\n")
    code, out = lint_imports(tmp_path)
    assert (code, "0 kept, 1 broken" in out) == (1, True), out
    assert "keras_convnext.variants -> keras_convnext.models" in out


@pytest.mark.once
@pytest.mark.parametrize("module", sorted(MODULES))
def test_frameworks_are_imported_inside_functions_only(module):
    allowed = next((names for room, names in WITH_FRAMEWORK.items() if is_in(module, [room])), set())
    top = {name.partition(".")[0] for name in imported(module)}
    assert not top & ((FRAMEWORKS | OPTIONAL) - allowed)
    if is_in(module, KERAS_FREE) and not is_in(module, WITH_KERAS):
        with_keras = {
            other
            for other in loaded(module)
            if any(n.startswith("keras.") or n == "keras" for n in imported(other))
        }
        assert not with_keras


@pytest.mark.once
def test_every_room_that_must_be_free_of_keras_is_there():
    for room in (*KERAS_FREE, *WITH_KERAS, *WITH_FRAMEWORK):
        assert f"keras_convnext.{room}" in MODULES
    for room in WITH_KERAS:  # else the exception can go
        assert any("keras" in imported(other) for other in loaded(f"keras_convnext.{room}"))


@pytest.mark.once
def test_nothing_of_keras_hub_is_imported_by_the_package():
    loaded = run_python("-c", "import sys, keras_convnext; keras_convnext.load; print(*sys.modules)").split()
    assert "keras_convnext.loading" in loaded
    of_hub = ("keras_convnext.hub", "keras_hub", "keras_convnext.exporting.preset")
    assert not set(of_hub) & set(loaded)


# The public names.


@pytest.mark.once
def test_editors_and_the_table_know_the_same_names_in_the_same_places():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert all(isinstance(node, ast.ImportFrom) for node in block.body)
    for_editors = {
        node.module.removeprefix("keras_convnext."): [alias.name for alias in node.names]
        for node in block.body
    }
    assert for_editors == {place: names.split() for place, names in keras_convnext._PLACES.items()}
    assert len(keras_convnext.__all__) == sum(map(len, for_editors.values()))


@pytest.mark.once
def test_every_public_name_and_module_is_there_and_listed():
    for name in keras_convnext.__all__:
        assert getattr(keras_convnext, name).__name__ == name
    assert {*keras_convnext.__all__, *keras_convnext._MODULES, "__version__"} <= {*dir(keras_convnext)}
    for name in keras_convnext._MODULES:
        assert getattr(keras_convnext, name).__name__ == f"keras_convnext.{name}"
    with pytest.raises(AttributeError, match="module 'keras_convnext' has no attribute 'ConvNeXtTinny'"):
        keras_convnext.ConvNeXtTinny  # noqa: B018


NAMES = """
import sys
sys.argv.clear()  # as in a program that embeds Python
import keras_convnext
from keras_convnext import *
assert [name for name in keras_convnext.__all__ if name not in globals()] == []
assert load is keras_convnext.load and callable(export)
kept = keras_convnext.ConvNeXtTiny
del keras_convnext.ConvNeXtTiny
assert keras_convnext.ConvNeXtTiny is kept
del keras_convnext
import keras_convnext
assert keras_convnext.ConvNeXtTiny is kept
del sys.modules["keras_convnext"], keras_convnext
import keras_convnext
assert keras_convnext.ConvNeXtTiny is kept and keras_convnext.models.ConvNeXtTiny is kept
if not (keras_convnext.ConvNeXtTiny is kept and keras_convnext.data.eval_image):
    raise SystemExit("asserts are off with -O")
print("fine")
"""


@pytest.mark.once
@pytest.mark.parametrize("options", [[], pytest.param(["-O"], marks=pytest.mark.slow)])
def test_names_come_back_after_they_are_deleted(options):
    assert run_python(*options, "-c", NAMES) == "fine\n"


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    [
        "keras-convnext",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnext", "models", "data")),
    ],
)
def test_a_script_of_any_name_gets_the_whole_package(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(
        "import keras_convnext\n"
        "import keras\n"
        "print('keras_convnext>ConvNeXtBlock' in keras.saving.get_custom_objects())\n"
        "print(keras_convnext.load.__module__)\n"
    )
    assert run_python(f"{name}.py", cwd=tmp_path).split() == ["True", "keras_convnext.loading"]


# What Keras can open.


@pytest.mark.once
def test_every_module_that_registers_a_class_is_imported_with_the_package():
    registering = [
        name for name, path in MODULES.items() if "register_keras_serializable" in path.read_text()
    ]
    registering.remove("keras_convnext.hub")  # for those who import keras-hub
    assert len(registering) > 5
    code = f"import sys, keras_convnext; print({registering!r} - sys.modules.keys())"
    assert run_python("-c", code.replace("[", "{").replace("]", "}")) == "set()\n"


LOAD = """
import sys
import numpy as np
import keras_convnext
import keras
folder = sys.argv[1]
images = np.load(folder + "/images.npy")
for name in ("compiled", "deployed", "wrapped"):
    model = keras.models.load_model(f"{folder}/{name}.keras")
    np.save(f"{folder}/{name}.npy", model.predict(images, verbose=0))
    print(name, type(getattr(model, "optimizer", None)).__name__)
"""


@pytest.mark.one_backend
def test_keras_opens_our_models_after_the_import_alone(tmp_path):
    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    np.save(tmp_path / "images.npy", images)
    model = keras_convnext.load("test_convnext2", weights=None, classes=3, input_shape=(64, 64, 3))
    wrapped = keras.Sequential([keras.Input((64, 64, 3)), model, keras.layers.Rescaling(2.0)])
    compiled = keras_convnext.load("test_convnext3", weights=None, classes=3, input_shape=(64, 64, 3))
    schedule = keras_convnext.WarmupCosine(1e-3, warmup_steps=1, total_steps=4)
    compiled.compile(keras_convnext.AdamW(schedule), "sparse_categorical_crossentropy")
    compiled.fit(images, np.array([0, 1]), verbose=0)
    models = {"compiled": compiled, "deployed": keras_convnext.deploy(model), "wrapped": wrapped}
    for name, saved in models.items():
        saved.save(tmp_path / f"{name}.keras")
    (tmp_path / "load.py").write_text(LOAD)
    printed = run_python(tmp_path / "load.py", tmp_path).splitlines()
    assert printed == ["compiled AdamW", "deployed NoneType", "wrapped NoneType"]
    for name, saved in models.items():
        expected = saved.predict(images, verbose=0)
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_survives_pickling():
    for layer in (
        keras_convnext.LayerScale(init_value=0.5),
        keras_convnext.LayerNormalization(),
        keras_convnext.ConvNeXtBlock(8),
        keras_convnext.ConvNeXtV2Block(8),
    ):
        images = np.random.default_rng(1).normal(size=(1, 8, 8, 8)).astype("float32")
        expected = keras.ops.convert_to_numpy(layer(images))
        copy = pickle.loads(pickle.dumps(layer))
        assert type(copy) is type(layer)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(copy(images)), expected)


# What the import costs.


def test_import_loads_no_second_framework():
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    others = {"tensorflow", "jax", "torch", "huggingface_hub", "tensorflow_datasets", "timm"} - {backend}
    code = f"import keras_convnext, sys; print(sorted({others!r} & set(sys.modules)))"
    added = run_python("-c", f"import keras; {code}").strip().splitlines()[-1]
    keras_alone = run_python("-c", f"import keras, sys; print(sorted({others!r} & set(sys.modules)))")
    assert added == keras_alone.strip().splitlines()[-1]


@pytest.mark.once
@pytest.mark.parametrize("options", [["-m"], ["-W", "ignore", "-m"]])
@pytest.mark.parametrize("words", [["list"], ["train", "--list"], ["predict", "--help"], ["--help"]])
def test_the_command_starts_no_backend(options, words):
    command = [sys.executable, "-X", "importtime", *options, "keras_convnext_main", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout and "| keras_convnext" in done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"keras", "tensorflow", "jax", "torch"}


@pytest.mark.once
def test_the_package_as_a_command_answers_as_the_command_does():
    words = ("list", "test_convnext2")
    expected = run_python("-m", "keras_convnext_main", *words)
    assert "weight files" in expected and run_python("-m", "keras_convnext", *words) == expected


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
