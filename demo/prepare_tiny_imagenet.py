"""Prepares Tiny ImageNet (200 classes, 100,000 + 10,000 photos of 64x64) for recipes/tiny_imagenet.toml.

SOURCE is the unpacked archive of CS231n at Stanford (train/<class>/images, val/images, val_annotations.txt),
or a folder of packs: train_*.npz and val.npz with the JPEG bytes end to end (`data`), their ends (`offsets`),
`labels` and `names`, and classes.csv with the columns label and wnid. The photos are ImageNet's: for
non-commercial research and education.

    python demo/prepare_tiny_imagenet.py tiny-imagenet-200 prepared/tiny_imagenet
"""

import argparse
import csv
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

Photo = tuple[str, str, str, bytes]  # split, class, file name, JPEG


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("output", help="folder to write")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from keras_convnext.data import prepare

    folder = options.source
    photos = read_archive(folder) if (folder / "train").is_dir() else read_packs(folder)
    with tempfile.TemporaryDirectory() as temporary:
        for split, name, file, content in photos:
            path = pathlib.Path(temporary, split, name, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        summary = prepare.prepare(temporary, options.output)
    print(f"{options.output}: {summary.images}, {summary.num_bytes / 1e6:,.1f} MB")
    return 0


def read_archive(folder: pathlib.Path) -> Iterator[Photo]:
    for path in sorted(folder.glob("train/*/images/*.JPEG")):
        yield "train", path.parts[-3], path.name, path.read_bytes()
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        file, name = line.split("\t")[:2]
        yield "validation", name, file, (folder / "val" / "images" / file).read_bytes()


def read_packs(folder: pathlib.Path) -> Iterator[Photo]:
    with open(folder / "classes.csv", newline="", encoding="utf-8") as file:
        classes = {int(row["label"]): row["wnid"] for row in csv.DictReader(file)}
    for path in sorted(folder.glob("*.npz")):
        split = "validation" if path.name.startswith("val") else "train"
        pack = np.load(path)
        content, offsets = pack["data"].tobytes(), pack["offsets"].tolist()
        for number, label in enumerate(pack["labels"].tolist()):
            name = f"{path.stem}_{number:05d}.JPEG"
            yield split, classes[label], name, content[offsets[number] : offsets[number + 1]]


if __name__ == "__main__":
    sys.exit(main())
