"""benchmarks/transfer.py on a handful of digits: its parts, its steps, its table, and that it resumes."""

import csv
import pathlib

import keras
import numpy as np
import programs
import pytest

import keras_convnext
from keras_convnext.data import sources
from keras_convnext.data.preprocessing import Preprocessing

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = ROOT / "recipes" / "digits"
pytestmark = [pytest.mark.slow, pytest.mark.once]


@pytest.fixture(scope="module")
def transfer():
    return programs.load("transfer")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Stand-in weights: random ones, with a classifier of other classes."""
    keras.utils.set_random_seed(0)
    model = keras_convnext.load("test_convnext", None, classes=7, include_preprocessing=False)
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    return keras_convnext.save_weights(model, path, "timm", Preprocessing(32, crop_fraction=1.0))


def names(source):
    return {source.name(number) for number in range(len(source))}


def test_each_seed_has_its_own_split_and_small_parts_lie_in_large_ones(transfer):
    source = sources.open_source(DIGITS, "train")
    found = {}
    for seed in (0, 1):
        for fraction in transfer.FRACTIONS:
            labelled, held_out = transfer.parts(source, {"seed": str(seed), "fraction": f"{fraction:g}"})
            assert not names(labelled) & names(held_out)
            assert abs(len(held_out) - 0.2 * len(source)) < 10
            assert set(np.unique(labelled.labels)) == set(range(10))  # one of each class at least
            found[seed, fraction] = names(labelled), names(held_out)
        assert found[seed, 0.01][0] < found[seed, 0.1][0] < found[seed, 1.0][0]
        assert len(found[seed, 1.0][0]) + len(found[seed, 1.0][1]) == len(source)
    assert found[0, 0.01][0] != found[1, 0.01][0] and found[0, 1.0][1] != found[1, 1.0][1]
    few = sources.take(source, [0, *np.flatnonzero(source.labels == source.labels[-1])[:10]])
    labelled, _ = transfer.parts(few, {"seed": "0", "fraction": "0.01"})
    assert sorted(np.unique(labelled.labels)) == sorted({few.labels[0], few.labels[-1]})


def test_it_measures_resumes_and_refuses_other_settings(transfer, weights, tmp_path, capsys):
    words = [tmp_path / "out", "--weights", weights, "--data", f"digits={DIGITS}", "--limit", "80"]
    words += ["--seeds", "2", "--epochs", "1", "--least-steps", "2"]

    def run(*more):
        code = transfer.main([str(word) for word in (*words, *more)])
        return code, *capsys.readouterr()

    code, out, err = run("--rows", "2")
    assert code == 0 and "- 2 of 12 rows" in out and "1 of 2: digits, 1% of the labels, seed 0" in out
    first = (tmp_path / "out" / "transfer.csv").read_text()
    code, out, err = run("--rows", "3")
    assert code == 0 and "- 5 of 12 rows" in out
    text = (tmp_path / "out" / "transfer.csv").read_text()
    assert text.startswith(first) and len(text.splitlines()) == 6
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["start"] for row in rows[:2]] == ["fine-tuned", "from scratch"]
    for tuned, scratch in zip(rows[::2], rows[1::2], strict=False):
        for name in ("fraction", "seed", "steps", "labelled", "held_out", "data_sha256"):
            assert tuned[name] == scratch[name]
    assert [row["steps"] for row in rows] == ["2"] * 5
    assert all(0 <= float(row["top1"]) <= 100 and row["image_size"] == "32" for row in rows)
    lines = (tmp_path / "out" / "transfer.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| digits | 1% |"))
    tuned, scratch = (float(row["top1"]) for row in rows[:2])
    assert row.endswith(f"| {tuned:.1f} | {scratch:.1f} | {tuned - scratch:+.1f} | 1 |")
    assert any(line.endswith("| - | - | 1, 0 |") for line in lines)  # a row without its other side

    code, out, err = run("--epochs", "2")
    assert (code, out) == (2, "")
    assert "Expected epochs='1' as in the rows of" in err and "received '2'" in err
    words[4] = "digits"
    assert "Expected --data NAME=PATH, received 'digits'" in run()[2]


def test_the_table_has_mean_and_deviation_over_seeds(transfer):
    rows = []
    for seed, (tuned, scratch) in enumerate([(60.0, 50.0), (62.0, 49.0), (61.0, 51.0)]):
        for start, top1 in (("fine-tuned", tuned), ("from scratch", scratch)):
            rows.append(
                dict.fromkeys(transfer.COLUMNS, "x")
                | {"data": "d", "fraction": "0.1", "seed": str(seed), "start": start, "top1": str(top1)}
                | {"labelled": "30", "steps": "400", "seconds": "60"}
            )
    text = transfer.table(rows, 6, "python x")
    assert "| d | 10% | 30 | 400 | 61.0 ± 1.0 | 50.0 ± 1.0 | +11.0 ± 1.7 | 3 |" in text
    assert "- command: `python x`" in text and "- 6 minutes" in text
