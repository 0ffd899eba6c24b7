"""Writes the data set of recipes/smoke.toml: 1,797 handwritten digits as a prepared folder.

The digits come with scikit-learn (`sklearn.datasets.load_digits`): the test part of "Optical Recognition of
Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0. Each is 8x8 grey
values, 0 to 16, stored here as a PNG of 8x8 pixels in steps of 17 up to 255. A quarter of each digit, by
seed, is the validation split.

    python demo/make_digits.py recipes/digits
"""

import argparse
import io
import os
import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VALIDATION_FRACTION = 0.25


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="folder to write")
    output = parser.parse_args(arguments).output
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from sklearn.datasets import load_digits

    from keras_convnext.data import prepare

    images, labels = load_digits(return_X_y=True)
    images = np.minimum(images.reshape(-1, 8, 8) * 17, 255).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    with tempfile.TemporaryDirectory() as folder:
        for label, name in enumerate(NAMES):
            numbers = order[labels[order] == label]
            held_out = round(VALIDATION_FRACTION * len(numbers))
            for split, chosen in (("validation", numbers[:held_out]), ("train", numbers[held_out:])):
                target = pathlib.Path(folder, split, f"{label}_{name}")
                target.mkdir(parents=True)
                for number in chosen:
                    content = io.BytesIO()
                    Image.fromarray(images[number]).save(content, "png", optimize=True)
                    (target / f"{number:04d}.png").write_bytes(content.getvalue())
        summary = prepare.prepare(folder, output, shards=1)
    print(f"{output}: {summary.images}, {summary.num_bytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
