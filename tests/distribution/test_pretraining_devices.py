"""Pre-training divided among four simulated devices ends where one device ends, with the same masks."""

import csv
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_convnext.weights.torch_files import read_state_dict

PROGRAM = """
import dataclasses, pathlib, sys
import keras_convnext
import numpy as np
from PIL import Image
from keras_convnext.training import trainer
from keras_convnext.training.recipes.files import load_recipe
from keras_convnext.variants import VARIANTS

folder = pathlib.Path(sys.argv[1])
(folder / "data").mkdir()
rng = np.random.default_rng(0)
for number in range(20):
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((64, 64)).save(folder / "data" / f"{number}.png")
VARIANTS["convnextv2_atto"] = dataclasses.replace(VARIANTS["convnextv2_atto"], depths=(1, 1, 1, 1))
recipe = load_recipe("pretrain").replaced({
    "data": str(folder / "data"), "weights": "", "image_size": 64, "eval_image_size": 64, "mask_ratio": 0.5,
    "decoder_width": 8, "batch_size": 8, "accumulation_steps": 1, "epochs": 2, "warmup_epochs": 1.0,
    "validation_fraction": 0.2,
})
for engine in ("none", *sys.argv[2:]):
    trainer.train(recipe.replaced({"engine": engine}), folder / engine, progress=False)
"""
ENGINES = {"jax": "data_parallel", "tensorflow": "mirrored"}


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() not in ENGINES, reason="PyTorch divides among processes")
def test_four_devices_end_where_one_ends(tmp_path):
    engine = ENGINES[keras.backend.backend()]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "KERAS_CONVNEXT_LOGICAL_DEVICES": "4",
    }
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), engine]
    subprocess.run(words, check=True, env=environment, timeout=900)
    one, four = (tmp_path / name for name in ("none", engine))
    rows = []
    for folder in (one, four):
        with open(folder / "log.csv", newline="") as file:
            rows.append(list(csv.DictReader(file)))
    for before, after in zip(*rows, strict=True):
        for column in ("loss", "val_loss"):
            assert float(after[column]) == pytest.approx(float(before[column]), rel=1e-4)
    expected, received = (read_state_dict(folder / "final.safetensors") for folder in (one, four))
    assert expected.keys() == received.keys()
    for name in expected:
        before, after = np.array(expected[name]), np.array(received[name])
        assert np.abs(after - before).max() <= 2e-3 * max(np.abs(before).max(), 1e-2), name
