"""What a wheel holds, and that it works wherever it is installed."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import test_readme

from keras_convnext.training.recipes import files

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.once
# What uv says where no registry answers.
NO_REGISTRY = ("Failed to fetch", "not found in the package registry", "the network was disabled")

# As the command, so that Keras is not loaded.
READ = """
import json
import keras_convnext_main
import keras_convnext
from keras_convnext.data import sources
from keras_convnext.training.recipes import files

folder = files.recipes_folder()
digits = sources.open_source(files.load_recipe("smoke").data.source, "train")
flowers = sources.open_source(folder / "flowers")
print(json.dumps({
    "package": keras_convnext.__file__,
    "folder": str(folder),
    "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
    "recipes": {
        name: files.load_recipe(name).to_toml().replace(str(folder), "RECIPES")
        for name in files.known_recipes() if name not in ("knn", "linear_probe")
    },
    "digits": [len(digits), digits.read(7).hex()],
    "flowers": [len(flowers), flowers.read(7).hex()],
}))
"""


def read(path, cwd):
    """What a process finds that has `path` before all else."""
    done = subprocess.run(
        [sys.executable, "-c", READ],
        env=os.environ | {"PYTHONPATH": str(path)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("package").startswith(f"{path}{os.sep}keras_convnext")
    return found


def pip(*words):
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What is read in the repository, and the files of its recipes that are installed."""
    found = read(ROOT, tmp_path_factory.mktemp("elsewhere"))
    assert pathlib.Path(found.pop("folder")) == ROOT / "recipes"
    kept = ("digits/", "flowers/")
    found["files"] = [name for name in found["files"] if name.endswith(".toml") or name.startswith(kept)]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as a wheel, built without a network from a copy, which the build writes into."""
    pytest.importorskip("setuptools", "77", reason="setuptools 77 or newer builds the wheel")
    copy, output = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "keras_convnext_main.py"):
        shutil.copy(ROOT / name, copy)
    for name in ("keras_convnext", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", output, copy)
    return next(output.glob("*.whl"))


def test_the_repository_has_what_is_read(checkout):
    assert checkout["recipes"].keys() == {*files.known_recipes()} - {"knn", "linear_probe"}
    assert (checkout["digits"][0], checkout["flowers"][0]) == (1347, 300)


def test_a_wheel_holds_nothing_outside_the_package_and_no_launch_scripts(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0].partition("-")[0] for name in names}
    assert tops == {"keras_convnext", "keras_convnext_main.py"}  # the package and the entry of its command
    assert not [name for name in names if ".data/" in name or "launch" in name]


def test_a_package_in_a_folder_of_its_own_finds_all_recipes_and_data(wheel, checkout, tmp_path):
    target = tmp_path / "target"
    pip("install", "--no-deps", "--target", target, wheel)
    found = read(target, tmp_path)
    assert pathlib.Path(found.pop("folder")) == target / "keras_convnext" / "recipes"
    assert found == checkout


def test_a_package_in_a_zip_file_finds_all_recipes_and_data(wheel, checkout, tmp_path):
    found = read(wheel, tmp_path)
    folder = pathlib.Path(found.pop("folder"))
    assert found == checkout
    assert not folder.exists()  # the copy has gone with its process


def test_a_wheel_holds_recipes_weights_and_licences_and_no_programs(wheel, checkout):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.removeprefix("keras_convnext/") for name in names if name.startswith("keras_convnext/")}
    assert {name.partition("/")[0] for name in inside}.isdisjoint(
        {"bench", "benchmarks", "demo", "tests", "tools"}
    )
    assert {f"recipes/{name}" for name in checkout["files"]} <= inside
    assert {
        "data/NOTICE.txt",
        "data/photos/README.md",
        "data/photos/coffee.jpg",
        "exporting/web/onnxruntime_licence.txt",
        "weights/catalog.csv",
        "weights/packaged/convnextv2_atto.tiny_imagenet200.safetensors",
    } <= inside
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    sources = {path.relative_to(ROOT / "keras_convnext") for path in (ROOT / "keras_convnext").rglob("*.py")}
    assert {path.as_posix() for path in sources} == {name for name in inside if name.endswith(".py")}


@pytest.mark.slow
def test_a_fresh_environment_with_jax_runs_the_first_lines_of_the_readme(wheel, tmp_path):
    """As a newcomer does: no backend is chosen, no network is asked once all is installed."""
    code, printed = test_readme.first_example()
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    uv = pathlib.Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not installed")
    installed = subprocess.run(
        [uv, "pip", "install", "--python", python, "--constraint", ROOT / "constraints.txt", f"{wheel}[jax]"],
        capture_output=True,
        text=True,
    )
    if any(words in installed.stderr for words in NO_REGISTRY):
        pytest.skip(f"the registry does not answer: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR")}
    done = subprocess.run(
        [python, "-c", code],
        env=kept | {"HOME": str(tmp_path), "KERAS_CONVNEXT_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    assert "Backend: jax (installed" in done.stderr
