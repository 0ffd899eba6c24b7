"""Pictures that decode to much, in each way that images are read: at most 1 GB more than small ones take."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = [pytest.mark.once, pytest.mark.slow]

PROGRAM = r"""
import functools, json, sys, time
import numpy as np
from keras_convnext.data import batches, calibration, preprocess, sources
from keras_convnext.data.faults import Faults
from keras_convnext.data.preprocessing import Preprocessing

small, large = map(sources.open_source, sys.argv[1:])
at_64 = Preprocessing(64)


def read(source):  # as `predict` does
    transform = functools.partial(preprocess.prepared, preprocessing=at_64)
    for file in source.files:
        try:
            preprocess.decode_image(preprocess.read_file(file), file, transform)
        except preprocess.ImageError:
            pass


def evaluate(source):
    for batch in batches.eval_batches(source, at_64, batch_size=4, faults=Faults(source, 1.0), workers=2):
        pass


def train(source):
    made = batches.train_batches(source, batch_size=4, image_size=64, faults=Faults(source, 1.0), workers=2)
    for batch in made.take(4):
        pass


def calibrate(source):
    try:
        calibration.calibration_images(source.path, preprocessing=at_64)
    except preprocess.ImageError:
        pass


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1000


ways = [read, evaluate, train, calibrate]
for way in ways:
    way(small)
found = {}
for way in ways:
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before, begin = peak(), time.monotonic()
    way(large)
    found[way.__name__] = (peak() - before, time.monotonic() - begin)
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak from Linux's /proc")
def test_no_way_of_reading_takes_a_gigabyte_more(tmp_path):
    for name, count in (("small", 8), ("large", 0)):
        (tmp_path / name / "a").mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (90, 60)).save(tmp_path / name / "a" / f"{number}.jpg")
    folder = tmp_path / "large" / "a"
    side = (13_300, 13_300)  # as many pixels as Pillow opens
    Image.new("RGB", (1, 40_000)).save(folder / "long.png")
    Image.new("RGB", (1, 65_500)).save(folder / "long.jpg")
    Image.new("RGB", (16_383, 2)).save(folder / "long.webp")
    Image.new("1", (1, 100_000_000)).save(folder / "longest.png")
    Image.new("RGB", side).save(folder / "rgb.png")
    Image.new("RGBA", side).save(folder / "rgba.png")
    Image.new("1", side).save(folder / "bits.png")
    Image.new("P", side).save(folder / "palette.gif")
    Image.new("RGB", (12_000, 9_000)).save(folder / "telephone.jpg")
    Image.new("RGB", side).save(folder / "progressive.jpg", progressive=True)
    Image.new("RGB", side).save(folder / "gray.webp", method=0)
    for number in range(3):
        Image.new("RGB", (4_000, 3_000)).save(folder / f"camera{number}.jpg")
        Image.new("RGB", (8_000, 6_000)).save(folder / f"scan{number}.png")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 16e6
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "small", tmp_path / "large"],
        capture_output=True, text=True, timeout=900, env=os.environ | {"KERAS_BACKEND": "torch"},
        cwd=pathlib.Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    print(found)
    assert all(megabytes < 1000 for megabytes, _ in found.values()), found
