"""Segmentation divided among eight simulated devices ends where one device ends, batch statistics too."""

import csv
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_convnext.weights.torch_files import read_state_dict

TESTS = pathlib.Path(__file__).parents[1]
PROGRAM = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
import keras_convnext
from made_masks import write
from keras_convnext.training import trainer
from keras_convnext.training.recipes.files import load_recipe

folder = pathlib.Path(sys.argv[1])
data = write(folder / "data", 16)
write(data, 5, split="val")
recipe = load_recipe("camvid").replaced({
    "data": str(data), "architecture": "test_convnext2", "weights": "", "layer_scale_init_value": 1.0,
    "channels": 16, "crop_size": (64, 64), "base_size": (96, 72), "batch_size": 8, "steps": 4,
    "evaluations": 1, "warmup_steps": 1, "loss_mean": "all", "eval_image_size": 64, "ignored_values": (255,),
})
for engine in ("none", "data_parallel"):
    trainer.train(recipe.replaced({"engine": engine}), folder / engine, progress=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="an engine of JAX")
def test_eight_devices_end_where_one_ends(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), str(TESTS / "training")]
    subprocess.run(words, check=True, env=environment, timeout=900)
    one, eight = (tmp_path / engine for engine in ("none", "data_parallel"))
    rows = []
    for folder in (one, eight):
        with open(folder / "log.csv", newline="") as file:
            rows += csv.DictReader(file)
    assert float(rows[1]["loss"]) == pytest.approx(float(rows[0]["loss"]), rel=1e-5)
    assert float(rows[1]["ema_val_miou"]) == pytest.approx(float(rows[0]["ema_val_miou"]), abs=0.1)
    expected, received = (read_state_dict(max(each.glob("checkpoints/step-*"))) for each in (one, eight))
    seen = 0
    for name in expected:
        if "moving_" in name or "conv_seg" in name:
            before, after = np.array(expected[name]), np.array(received[name])
            assert np.abs(after - before).max() <= 2e-4 * max(np.abs(before).max(), 1e-3), name
            seen += "moving_" in name
    assert seen > 20
