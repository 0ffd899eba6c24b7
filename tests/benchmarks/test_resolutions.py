"""benchmarks/resolutions.py on digits for a second or two: cases, stems, table, and that it resumes."""

import csv
import pathlib

import keras
import numpy as np
import programs
import pytest

import keras_convnext
from keras_convnext.data import sources

DIGITS = pathlib.Path(__file__).parents[2] / "recipes" / "digits"
pytestmark = [pytest.mark.slow, pytest.mark.once]


@pytest.fixture(scope="module")
def resolutions():
    return programs.load("resolutions")


def test_it_measures_resumes_and_refuses_other_settings(resolutions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resolutions, "STEPS_BEFORE", 1)
    monkeypatch.setattr(resolutions, "STEPS_TIMED", 2)

    def run(*cases, minutes="0.01"):
        words = [tmp_path, "--data", DIGITS, "--minutes", minutes, "--limit", "20", "--cases", *cases]
        code = resolutions.main([str(word) for word in words])
        return code, *capsys.readouterr()

    code, out, _ = run("test_convnext:32/4")
    assert code == 0 and "| test_convnext:32/4 | 8², 1² |" in out
    first = (tmp_path / "resolutions.csv").read_text()
    code, out, _ = run("test_convnext:32/4", "test_convnext:32/2")
    assert code == 0 and "| test_convnext:32/2 | 16², 2² |" in out
    text = (tmp_path / "resolutions.csv").read_text()
    assert text.startswith(first) and len(text.splitlines()) == 3  # the first was not made again
    rows = list(csv.DictReader(text.splitlines()))
    assert all(0 <= float(row["top1"]) <= float(row["top5"]) <= 100 for row in rows)
    assert all(row["evaluated"] == "20" and int(row["steps"]) > 1 for row in rows)
    num_images = len(sources.open_source(DIGITS, "train"))
    for row in rows:
        assert float(row["epochs"]) == pytest.approx(128 * int(row["steps"]) / num_images, abs=0.01)
        assert float(row["seconds"]) > 0 and float(row["images_per_second"]) > 0
    order = [line.split("|")[6] for line in out.splitlines() if line.startswith("| test_")]
    assert order == sorted(order, key=float, reverse=True)

    code, out, err = run("test_convnext:32/4", minutes="2")
    assert (code, out) == (2, "") and "Expected minutes='0.01' as in the rows of" in err
    with pytest.raises(SystemExit, match="2"):
        run("test_convnext:32x4")
    assert "expected ARCHITECTURE:SIZE/STRIDE, such as convnextv2_atto:64/4" in capsys.readouterr().err


def test_another_stride_changes_the_stem_alone(resolutions):
    keras.utils.set_random_seed(0)
    model = keras_convnext.load("convnextv2_atto", None, classes=7, input_shape=(64, 64, 3))
    other = resolutions.with_stem_stride(model, 2)
    changed = [
        (mine.path, tuple(mine.shape), tuple(new.shape))
        for mine, new in zip(model.weights, other.weights, strict=True)
        if mine.shape != new.shape
    ]
    assert [shapes for _, *shapes in changed] == [[(4, 4, 3, 40), (2, 2, 3, 40)]]
    sides = [net.get_layer("stages_0_0").output.shape[1] for net in (model, other)]
    assert sides == [16, 32]
    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    assert np.shape(other(images)) == (2, 7)
    overlapping = keras_convnext.load("convnext_atto_ols", None, classes=7, input_shape=(64, 64, 3))
    with pytest.raises(ValueError, match="whose stem is one 4x4 convolution"):
        resolutions.with_stem_stride(overlapping, 2)
