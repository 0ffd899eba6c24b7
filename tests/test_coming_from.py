"""Every line of the pages "Coming from ..." runs, each column from top to bottom."""

import ast
import importlib.util
import pathlib
import re
import shutil

import keras
import numpy as np
import peers
import pytest
import timm
import torch
from safetensors.torch import save_file

import keras_convnext
from keras_convnext.segmentation import UPerNet

pytestmark = [pytest.mark.slow, pytest.mark.one_backend]

ROOT = pathlib.Path(__file__).parents[1]
TAG = "convnext_atto.d2_in1k"


def tables(name):
    """The tables of a page: for each its rows of (call there, call here)."""
    text = (ROOT / "notebooks" / f"coming_from_{name}.md").read_text()
    found = [[]]
    for line in text.splitlines():
        row = re.fullmatch(r"\| `([^`]+)` \| `([^`]+)` \|", line)
        if row:
            found[-1].append(row.groups())
        elif line.startswith("|"):
            assert re.fullmatch(r"\|[-\w. ]+\|[-\w. ]+\|", line.replace("---", "-")), line  # no row is lost
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the lines may use, in a folder that has the files they name; weights are random ones."""
    model = peers.randomise(timm.create_model("convnext_atto", pretrained=False), seed=1)
    save_file(model.state_dict(), tmp_path / f"{TAG}.safetensors", {"format": "pt"})
    shutil.copy(ROOT / "tests" / "images" / "coffee.jpg", tmp_path)
    monkeypatch.setenv("KERAS_CONVNEXT_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def without_network(name, pretrained=False, **options):
        made = create(name, **options)
        if pretrained:
            made.load_state_dict(model.state_dict())
        return made

    monkeypatch.setattr(timm, "create_model", without_network)
    return {
        "keras": keras, "keras_convnext": keras_convnext, "np": np, "timm": timm, "torch": torch,
        "UPerNet": UPerNet, "ConvNeXtAtto": keras_convnext.ConvNeXtAtto,
        "images": np.zeros((2, 64, 64, 3), "float32"), "labels": np.eye(2, 5, dtype="float32"),
        "boxes": np.array([[10.0, 10.0, 20.0, 30.0]]),
    }  # fmt: skip


def run_column(rows, column, names):
    names = dict(names)
    for row in rows:
        exec(compile(row[column], row[column], "exec"), names)
    return names


def test_lines_of_timm(names):
    (rows,) = tables("timm")
    there, here = (run_column(rows, column, names) for column in (0, 1))
    assert len(rows) >= 15
    pixels = np.moveaxis(there["pixels"].numpy(), 0, -1)
    mean, std = (np.array(values) for values in (keras_convnext.Preprocessing(1).mean, (0.229, 0.224, 0.225)))
    np.testing.assert_allclose((pixels * std + mean) * 255, here["pixels"], atol=1e-3)
    with torch.no_grad():
        wanted = there["model"](there["pixels"][None]).numpy()
    got = np.asarray(here["model"].predict(here["pixels"][None], verbose=0))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_lines_of_keras_applications(names):
    (rows,) = tables("keras_applications")
    there, here = (run_column(rows, column, names) for column in (0, 1))
    assert there["model"].output_shape == here["model"].output_shape == (None, 5)
    np.testing.assert_array_equal(there["pixels"], here["pixels"])
    assert here["base"].count_params() == there["base"].count_params() == 27_820_128


def test_lines_of_keras_cv(names):
    core, hub = tables("keras_cv")
    for rows in (core, hub):
        for there, _ in rows:
            ast.parse(there)
            assert "keras_cv." in there or "backbone." in there or "mixup(" in there
    made = run_column(core, 1, names)
    assert made["segmenter"].output_shape[-1] == 12
    np.testing.assert_array_equal(np.asarray(made["corners"]), [[10, 10, 30, 40]])


@pytest.mark.skipif(importlib.util.find_spec("keras_hub") is None, reason="keras-hub is not installed")
def test_lines_of_keras_hub(names):
    import keras_hub

    import keras_convnext.hub

    _, rows = tables("keras_cv")
    made = run_column(rows, 1, names | {"keras_hub": keras_hub, "keras_convnext": keras_convnext})
    assert list(made["pyramid"].pyramid_outputs) == ["P3", "P4", "P5", "P6", "P7"]
