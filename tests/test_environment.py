"""Installs with one backend: which is taken, what is said, and what works without TensorFlow."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from keras_convnext import _environment, data
from keras_convnext._environment import choose_backend, is_installed

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
PHOTO = ROOT / "tests" / "images" / "coffee.jpg"
PACKAGED = "convnextv2_atto.tiny_imagenet200"
WRITTEN_BY_KERAS = {
    "floatx": "float32", "epsilon": 1e-07, "backend": "tensorflow", "image_data_format": "channels_last",
}  # fmt: skip
HIDE = """
import importlib.machinery, os
find_spec = importlib.machinery.PathFinder.find_spec

def find_others(cls, name, path=None, target=None):
    if name.partition(".")[0] not in os.environ["HIDDEN_PACKAGES"].split(","):
        return find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(find_others)
"""


@pytest.fixture
def choose(monkeypatch, tmp_path, capsys):
    """Chooses with some backends installed; returns (KERAS_BACKEND after it, what was printed on stderr)."""

    def choose(installed, asked=None, settings=None, is_imported=False):
        monkeypatch.setattr(_environment, "is_installed", lambda name: name in installed)
        monkeypatch.setenv("KERAS_HOME", str(tmp_path))
        monkeypatch.setenv("KERAS_BACKEND", asked or "")
        monkeypatch.setitem(sys.modules, "keras", None)
        if not is_imported:
            monkeypatch.delitem(sys.modules, "keras")
        (tmp_path / "keras.json").unlink(missing_ok=True)
        if settings is not None:
            (tmp_path / "keras.json").write_text(settings)
        choose_backend()
        out, err = capsys.readouterr()
        assert out == ""
        return os.environ["KERAS_BACKEND"], err

    return choose


@pytest.fixture
def without(tmp_path):
    """Runs Python where some packages are not installed, and nothing says which backend to take."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)

    def without(packages, *words, **variables):
        kept = {name: text for name, text in os.environ.items() if name != "KERAS_BACKEND"}
        paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "hide"), str(ROOT)])}
        paths["KERAS_HOME"] = str(tmp_path / "keras")
        environment = kept | paths | {"HIDDEN_PACKAGES": packages} | variables
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )

    return without


@pytest.fixture
def forget_tensorflow(monkeypatch):
    """Makes TensorFlow, and what was made of it, as if it had never been there."""

    def forget_tensorflow():
        monkeypatch.setitem(sys.modules, "tensorflow", None)
        for name in ("jpeg", "augment", "batches", "contact_sheet"):
            prefix = f"keras_convnext.data.{name}"
            for module in [key for key in sys.modules if key == prefix or key.startswith(f"{prefix}.")]:
                monkeypatch.delitem(sys.modules, module)
            monkeypatch.delattr(data, name, raising=False)

    return forget_tensorflow


@pytest.mark.parametrize(
    ("installed", "taken"), [(["jax"], "jax"), (["torch"], "torch"), (["torch", "jax"], "jax")]
)
def test_an_installed_backend_is_taken_in_place_of_tensorflow(choose, installed, taken, tmp_path):
    expected = f"Backend: {taken} (installed; choose another with KERAS_BACKEND).\n"
    assert choose(installed) == (taken, expected)
    assert choose(installed, settings="{not JSON") == (taken, expected)
    # Keras has written "tensorflow" there itself.
    assert choose(installed, settings=json.dumps(WRITTEN_BY_KERAS)) == (
        taken,
        f"Backend: {taken} (installed; tensorflow, which {tmp_path / 'keras.json'} names, is not; "
        "choose another with KERAS_BACKEND).\n",
    )


@pytest.mark.parametrize("settings", ["[]", "null", "3", "[" * 100_000])
def test_settings_at_which_the_import_of_keras_fails_are_named(choose, tmp_path, settings):
    """Exit code 70: "'list' object has no attribute 'get'"."""
    path = re.escape(str(tmp_path / "keras.json"))
    with pytest.raises(ImportError, match=f"an object in JSON, in '{path}'. Remove it: Keras writes it anew"):
        choose(["torch"], asked="torch", settings=settings)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_settings_that_are_a_pipe_are_not_waited_for(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "keras.json")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    with pytest.raises(ImportError, match="an object in JSON"):
        choose_backend()


def test_nothing_happens_where_keras_can_have_its_way(choose):
    everything = ["tensorflow", "jax", "torch"]
    assert choose(everything) == ("", "")
    assert choose(everything, settings=json.dumps(WRITTEN_BY_KERAS)) == ("", "")
    assert choose(["jax"], settings='{"backend": "jax"}') == ("", "")
    assert choose(["torch"], asked="torch", settings='{"backend": "jax"}') == ("torch", "")
    assert choose(["jax"], asked="numpy") == ("numpy", "")
    assert choose(["jax"], is_imported=True) == ("", "")
    assert choose([], asked="torch", is_imported=True) == ("torch", "")


def test_a_backend_that_a_person_chose_is_not_replaced(choose, tmp_path):
    for installed, listed, other in (
        (["jax"], "jax", ", or set KERAS_BACKEND=jax."),
        (["jax", "tensorflow"], "tensorflow, jax", ", or set KERAS_BACKEND=tensorflow."),
        ([], "none", "."),
    ):
        for asked, settings, place in (
            ("torch", None, "KERAS_BACKEND"),
            (None, '{"backend": "torch"}', str(tmp_path / "keras.json")),
        ):
            with pytest.raises(ImportError) as refused:
                choose(installed, asked, settings)
            assert str(refused.value) == (
                f"Expected an installed backend, received 'torch' from {place}. Installed: {listed}. "
                f"Run pip install torch{other}"
            )
    with pytest.raises(ImportError, match=r"'tensorflow' from KERAS_BACKEND\. Installed: jax\."):
        choose(["jax"], "tensorflow")
    with pytest.raises(ImportError, match="pip install openvino, or set KERAS_BACKEND=jax"):
        choose(["jax"], "openvino")


def test_no_backend_at_all_is_an_error_that_says_what_to_install(choose):
    with pytest.raises(ImportError) as refused:
        choose([])
    assert str(refused.value) == (
        "Expected a backend, but none of tensorflow, jax, torch is installed. "
        "Run pip install tensorflow, or the same with jax or torch."
    )


def test_the_settings_are_looked_for_where_keras_keeps_them(monkeypatch, tmp_path):
    from keras.src.backend import config

    assert _environment._settings_path() == config._config_path
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _environment._settings_path() == str(tmp_path / ".keras" / "keras.json")
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert _environment._settings_path() == "/tmp/.keras/keras.json"


@pytest.mark.parametrize(
    ("variables", "flags", "settings"),
    [
        ({}, {"avx2"}, {"GOMP_SPINCOUNT": "1000", "TF_ENABLE_ONEDNN_OPTS": "1"}),
        ({}, set(), {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "TF_ENABLE_ONEDNN_OPTS": "0"}, {"avx2"}, {}),
        ({"GOMP_SPINCOUNT": "7"}, set(), {}),
    ],
)
def test_what_makes_the_backends_fast_is_set_unless_it_is_set(monkeypatch, variables, flags, settings):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "TF_ENABLE_ONEDNN_OPTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_environment, "cpu_flags", lambda: flags)
    assert _environment.library_settings() == settings


@pytest.mark.parametrize("module", ["keras_convnext", pytest.param("demo.run", marks=pytest.mark.slow)])
def test_the_backends_are_made_fast_before_they_are_imported(module):
    program = (
        "import os, sys; from importlib import abc\n"
        "class Watch(abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'tensorflow', 'keras'): print(os.environ.get('GOMP_SPINCOUNT'))\n"
        f"sys.meta_path.insert(0, Watch()); import {module}"
    )
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"1000"}


def test_a_folder_that_an_uninstallation_left_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "left_behind" / "python").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("left_behind") and not is_installed("never_there")
    (tmp_path / "left_behind" / "__init__.py").touch()
    assert is_installed("left_behind")


def test_predict_works_with_pytorch_alone_and_says_so_once(without):
    done = without(
        "tensorflow,jax", "-m", "keras_convnext_main", "predict", PHOTO, "--model", PACKAGED, "--top", "1"
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{PHOTO}\n +\d+\.\d\d %  \w.*\n", done.stdout)
    line = "Backend: torch (installed; choose another with KERAS_BACKEND)."
    assert [text for text in done.stderr.splitlines() if "Backend" in text] == [line]


@pytest.mark.parametrize(
    ("hidden", "variables", "error"),
    [
        (
            "jax",
            {"KERAS_BACKEND": "jax"},
            "received 'jax' from KERAS_BACKEND. Installed: tensorflow, torch. ",
        ),
        ("tensorflow,jax,torch", {}, "none of tensorflow, jax, torch is installed. "),
    ],
)
def test_a_command_without_its_backend_ends_with_2(without, hidden, variables, error):
    done = without(hidden, "-m", "keras_convnext_main", "predict", PHOTO, "--model", PACKAGED, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("keras-convnext: error: Expected a") and done.stderr.count("\n") == 1
    assert error + "Run pip install " in done.stderr


@pytest.mark.parametrize("words", [["list"], ["predict", "--help"]])
def test_commands_without_a_model_need_no_backend_and_name_none(without, words):
    done = without("tensorflow,jax,torch", "-m", "keras_convnext_main", *words)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["look", "flowers", "sheet.png"],
        ["prepare", "flowers", "prepared"],
        ["evaluate", PACKAGED, "--data", "flowers"],
        ["knn", "--model", PACKAGED, "--data", "flowers"],
        ["train", "smoke", "--out", "run"],
    ],
)
def test_commands_that_need_tensorflow_say_so(refused, forget_tensorflow, words):
    forget_tensorflow()
    message = refused(*(ROOT / "recipes" / "flowers" if word == "flowers" else word for word in words))
    assert "ensorFlow" in message or "tensorflow" in message
    assert message.endswith("not installed. Run pip install tensorflow.\n")


@pytest.mark.parametrize(
    ("hidden", "words", "named"),
    [
        ("pydantic", ["plan", "smoke", "--devices", "cpu"], "This command needs pydantic, which"),
        ("numpy", ["info", "x.safetensors"], "This command needs numpy, which"),
    ],
)
def test_a_missing_package_is_one_sentence_with_its_remedy(without, hidden, words, named, tmp_path):
    (tmp_path / words[-1]).touch()
    last = tmp_path / words[-1] if words[0] == "info" else words[-1]
    done = without(hidden, "-m", "keras_convnext_main", *words[:-1], last)
    assert done.returncode == 2 and named in done.stderr, done.stderr
    assert re.search(r"not installed\. Run pip install \w+\.\n$", done.stderr)


def test_names_of_packages_are_those_of_the_registry():
    assert _environment.missing_text("This", "PIL", "onnx") == (
        "This needs pillow and onnx, which are not installed. Run pip install pillow onnx."
    )
    assert "pip install ai-edge-litert." in _environment.missing_text("This", "ai_edge_litert")


def test_no_message_names_this_package_for_pip():
    """Whoever registered its name in a public registry would be installed."""
    for path in (ROOT / "keras_convnext").rglob("*.py"):
        text = path.read_text()
        assert "pip install 'keras" not in text and "pip install keras" not in text, path
        assert "keras-convnext[" not in text and "keras_convnext[" not in text, path


def test_eval_image_gives_the_same_pixels_without_tensorflow(forget_tensorflow):
    settings = (
        {},
        {"crop_fraction": 1.0, "interpolation": "bilinear", "crop_mode": "squash"},
        {"resize_size": 236},
    )
    expected = [data.eval_image(PHOTO, 224, **setting) for setting in settings]
    forget_tensorflow()
    for setting, pixels in zip(settings, expected, strict=True):
        np.testing.assert_array_equal(data.eval_image(PHOTO, 224, **setting), pixels)
        np.testing.assert_array_equal(data.eval_image(PHOTO.read_bytes(), 224, **setting), pixels)
    with pytest.raises(data.preprocess.ImageError, match=r"'5 bytes' is not one .* with the text 'hello'"):
        data.eval_image(b"hello", 224)


def test_python_chooses_too_and_reads_images_with_pillow(without):
    code = f"""
import keras_convnext
from keras_convnext.data import Preprocessing, calibration, eval_image
from keras_convnext.evaluation.gradcam import grad_cam
image = eval_image({str(PHOTO)!r}, 64)
assert calibration.calibration_images(preprocessing=Preprocessing(64), count=2).shape == (2, 64, 64, 3)
assert calibration.calibration_images({str(PHOTO)!r}, preprocessing=Preprocessing(64)).shape == (1, 64, 64, 3)
print(grad_cam(keras_convnext.load({PACKAGED!r}), image[None]).shape)
"""
    done = without("tensorflow,jax", "-c", code)
    assert (done.returncode, done.stdout) == (0, "(1, 64, 64)\n"), done.stderr
    assert done.stderr.count("Backend: torch (installed; choose another with KERAS_BACKEND).\n") == 1


def test_a_variable_that_is_no_integer_is_named(monkeypatch):
    """For JAX's processes it was "invalid literal for int() with base 10: 'two'"."""
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="Expected an integer in JAX_NUM_PROCESSES, received 'two'"):
        _environment.integer("JAX_NUM_PROCESSES")
