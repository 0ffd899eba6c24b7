"""Writes the photos of `make demo`: 300 flowers of five kinds, 96 x 96 pixels, each with its credit.

SOURCE is TensorFlow's archive of flower photos, unpacked (flower_photos.tgz; class folders at any depth),
CREDITS its file LICENSE.txt, one line a photo: "<class>/<file> CC-BY by <photographer> - <address>". A photo
can be chosen when its line is complete, its bytes stand in the archive once and it is not in `DROPPED`. Of
these 60 a class are drawn by seed, at most 6 of a photographer in a class, none that nearly repeats another.

    python demo/make_flowers.py flower_photos flower_photos/LICENSE.txt recipes/flowers
"""

import argparse
import collections
import csv
import hashlib
import io
import pathlib
import random
import re
import sys

import numpy as np
from PIL import Image, ImageOps

CLASSES = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
PHOTOS_A_CLASS = 60
MOST_OF_A_PHOTOGRAPHER = 6
SIDE = 96  # pixels
JPEG_QUALITY = 85
SMALLEST_DIFFERENCE = 12  # of 64 bits, between the fingerprints of two photos
SEED = 0
# Looked at: another plant, a drawing, a face, next to no flower in the square.
DROPPED = {
    215798357, 265422922, 319298955, 835750256, 969913643, 1667963621, 2307673262, 2535466143, 2713683760,
    2767658405, 3072908271, 3074406590, 3102535578, 3141434519, 3145692843, 3171577977, 3196753837,
    3446285408, 3447650747, 4398771472, 4546299243, 4546316433, 4561670472, 4573886520, 4610125337,
    4724951744, 4731069260, 4745985619, 4746643626, 4933229095, 4933229561, 4933230161, 4933823300,
    4933824012, 4933824130, 5193918046, 5492906452, 5526324308, 5570018782, 5637140035, 5967283168,
    6038098425, 6231418894, 6325571510, 6495554833, 6903831250, 6948239566, 7012366081, 7082476907,
    7176729016, 7211616670, 7270375648, 8590442797, 8642943283, 8729501081, 9231555352, 9369421752,
    9491955955, 11102341464, 12562723334, 13509973805, 13510068773, 13513846963, 13542672763, 13910126337,
    14087425312, 14172324538, 14487712670, 14487762578, 14651383746, 14674067742, 14925397351, 14925397651,
    15191613243, 15255964454, 15275504998, 15760811380, 15822837396, 15949087094, 15951588433, 16258946661,
    17202535346, 17408197905, 18237156988, 19551343954, 20022771089, 20148493928, 20165867412,
}  # fmt: skip
CREDIT = re.compile(
    r"(?P<file>(?P<kind>\w+)/(?P<id>\d+)_\w+\.jpg) CC-BY by (?P<photographer>.+?)"
    r" - (?P<address>https://www\.flickr\.com/photos/(?P<account>[^/]+)/\S+)"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("credits", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path, help="folder to write")
    options = parser.parse_args(arguments)
    source, output = options.source, options.output
    paths = {f"{path.parent.name}/{path.name}": path for path in source.rglob("*.jpg")}
    digests = {file: hashlib.sha256(path.read_bytes()).digest() for file, path in paths.items()}
    copies = collections.Counter(digests.values())
    lines = map(CREDIT.fullmatch, options.credits.read_text(encoding="utf-8").splitlines())
    credited = sorted(
        (line for line in lines if line and line["file"] in paths and copies[digests[line["file"]]] == 1),
        key=lambda line: line["file"],
    )
    rows: list[tuple[str, str, str]] = []
    fingerprints: list[np.ndarray] = []
    for kind in CLASSES:
        folder = output / kind
        folder.mkdir(parents=True, exist_ok=True)
        candidates = [line for line in credited if line["kind"] == kind]
        random.Random(SEED).shuffle(candidates)
        photos_of: collections.Counter[str] = collections.Counter()
        chosen = []
        for line in candidates:
            # After the draw, so that one more dropped photo makes room for one other.
            if int(line["id"]) in DROPPED or photos_of[line["account"].lower()] == MOST_OF_A_PHOTOGRAPHER:
                continue
            picture = square(paths[line["file"]])
            if picture is None:
                continue
            bits = fingerprint(picture)
            if any((bits != other).sum() < SMALLEST_DIFFERENCE for other in fingerprints):
                continue
            picture.save(folder / f"{line['id']}.jpg", quality=JPEG_QUALITY, optimize=True)
            fingerprints.append(bits)
            photos_of[line["account"].lower()] += 1
            photographer = " ".join(line["photographer"].split())
            chosen.append((f"{kind}/{line['id']}.jpg", photographer, line["address"]))
            if len(chosen) == PHOTOS_A_CLASS:
                break
        else:
            print(
                f"Expected {PHOTOS_A_CLASS} photos of {kind} in '{source}', found {len(chosen)}.",
                file=sys.stderr,
            )
            return 1
        rows += sorted(chosen)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("file", "photographer", "address"), *rows])
    (output / "CREDITS.csv").write_text(table.getvalue(), encoding="utf-8")
    total = sum((output / file).stat().st_size for file, _, _ in rows)
    print(f"{output}: {len(rows)} photos, {total:,} bytes")
    return 0


def square(path: pathlib.Path) -> Image.Image | None:
    """The central square of an RGB photo, 96 x 96; None for other files."""
    try:
        with Image.open(path) as image:
            return (
                ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS) if image.mode == "RGB" else None
            )
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for bad files
        return None


def fingerprint(image: Image.Image) -> np.ndarray:
    """64 bits: where brightness falls from left to right."""
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), int)
    return (small[:, 1:] < small[:, :-1]).ravel()


if __name__ == "__main__":
    sys.exit(main())
