"""What every test process needs before its first import, and how the tests of the command line run it."""

import contextlib
import gc
import io
import os
import pathlib
import tempfile
import typing

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_CONVNEXT_QUIET", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `library_settings`, before PyTorch and TensorFlow
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers must not look for a network
if os.environ.get("KERAS_BACKEND") == "jax":
    # The processes of a test train the same small models: what one has compiled the next ones read.
    _compiled = tempfile.TemporaryDirectory(prefix="keras_convnext_compiled_", ignore_cleanup_errors=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# TensorFlow before PyTorch: the order that was tested.
if os.environ.get("KERAS_BACKEND") == "tensorflow":
    import tensorflow  # noqa: F401

import pytest
import torch

# The published torchvision wheels are CUDA builds. With the CPU build of torch two of its operators are not
# registered, and its import fails; declaring them is all that timm and transformers need.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

RECIPES = pathlib.Path(__file__).parents[1] / "recipes"


def processor() -> str:
    """What the numbers of a test may depend on: the processor, its features and what limits them."""
    from keras_convnext import _environment

    words = []
    if "KERAS_BACKEND" in os.environ:
        backend = os.environ["KERAS_BACKEND"]
        words.append(f"{backend} has {'bfloat16' if _environment.has_bfloat16(backend) else 'no bfloat16'}")
    return ", ".join([f"processor: {_environment.processor_text()}", *words])


@pytest.fixture(autouse=True, scope="module")
def _forgotten_programs():
    """Frees what JAX compiled for a module's tests: 10 GB over all of them."""
    yield
    if os.environ.get("KERAS_BACKEND") == "jax":
        import jax

        gc.collect()
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Gives tests marked one_backend to the second tier on TensorFlow and JAX, except every_backend ones."""
    if os.environ.get("KERAS_BACKEND") != "torch":
        for item in items:
            if item.get_closest_marker("one_backend") and not item.get_closest_marker("every_backend"):
                item.add_marker("slow")


def pytest_report_header():
    return processor()


def pytest_terminal_summary(terminalreporter, config):
    if terminalreporter.stats.get("failed") and config.get_verbosity() < 0:  # -q leaves out the header
        terminalreporter.write_line(processor())


COMMAND_TAG = "test_convnext2.r160_in1k"


@pytest.fixture(scope="module")
def peer():
    """timm's model of `COMMAND_TAG`, random, with logits far enough apart for probabilities that tell."""
    import timm
    from peers import randomise

    model = randomise(timm.create_model(COMMAND_TAG, pretrained=False), seed=1)
    with torch.no_grad():
        model.head.fc.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def weights_folder(peer, tmp_path_factory):
    """The folder of files placed by hand, with one of `peer`; nothing else is found, no network is used."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    save_file(peer.state_dict(), folder / f"{COMMAND_TAG}.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(folder))
        patch.setenv("KERAS_CONVNEXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("KERAS_CONVNEXT_OFFLINE", "1")
        patch.delenv("KERAS_CONVNEXT_DEBUG", raising=False)
        yield folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command in a folder of its own and returns (exit code, stdout, stderr)."""
    from keras_convnext.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        code = main.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """Runs a command that must fail with code 2, print nothing but one error, and returns the error."""

    def refused(*words):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err.startswith("keras-convnext: error: ")
        assert "Traceback" not in err
        return err

    return refused


class SmokeRun(typing.NamedTuple):
    """What one training of recipes/smoke.toml by the command left and printed."""

    folder: pathlib.Path
    code: int
    printed: str


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """Three epochs of recipes/smoke.toml, of a smaller model, for tests that only look at what a run left."""
    from keras_convnext.cli import main

    folder, printed = tmp_path_factory.mktemp("smoke") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        words = ["--set", "epochs=3", "--set", "architecture=test_convnext2"]
        code = main.main(["train", str(RECIPES / "smoke.toml"), "--out", str(folder), "--quiet", *words])
    return SmokeRun(folder, code, printed.getvalue())


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """100 of the digits of recipes/digits to train on and 40 to validate, in the same layout."""
    from keras_convnext.data import prepare, sources

    folder = tmp_path_factory.mktemp("few_digits")
    for split, count in (("train", 10), ("validation", 4)):
        source = sources.open_source(RECIPES / "digits", split)
        for label, name in enumerate(source.classes):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in (source.labels == label).nonzero()[0][:count]:
                (folder / "images" / split / name / f"{number}.png").write_bytes(source.read(number))
    prepare.prepare(folder / "images", folder / "records", workers=1)
    return folder / "records"
