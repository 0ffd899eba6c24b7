"""benchmarks/fcmae_probe.py on a few squares: rows for each seed, before and after, made once."""

import csv

import numpy as np
import PIL.Image
import programs
import pytest

import keras_convnext

pytestmark = [pytest.mark.slow, pytest.mark.once]


def test_rows_of_both_encoders_are_written_and_not_made_again(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for label, colour in (("dark", 40), ("light", 210)):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(colour - 20, colour + 20, (40, 40, 3)).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{number}.png")
    encoder = tmp_path / "encoder.safetensors"
    body = keras_convnext.ConvNeXtV2Atto(weights=None, include_top=False, input_shape=(64, 64, 3), seed=1)
    keras_convnext.save_weights(body, encoder, "fcmae", keras_convnext.Preprocessing(64, crop_fraction=1.0))
    program = programs.load("fcmae_probe")
    words = [tmp_path / "probe.csv", "--data", tmp_path / "data", "--encoder", encoder, "--share", "0.5"]
    words += ["--seeds", "2", "--epochs", "3", "--image-size", "64"]
    assert program.main([str(word) for word in words]) == 0
    with open(tmp_path / "probe.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["weights"], row["seed"]) for row in rows] == [
        ("before", "0"), ("after", "0"), ("before", "1"), ("after", "1"),
    ]  # fmt: skip
    assert {(row["labels"], row["classified"]) for row in rows} == {("10", "6")}
    before = (tmp_path / "probe.csv").read_bytes()
    capsys.readouterr()
    assert program.main([str(word) for word in words]) == 0
    assert (tmp_path / "probe.csv").read_bytes() == before
    assert "after: top-1 " in capsys.readouterr().out
