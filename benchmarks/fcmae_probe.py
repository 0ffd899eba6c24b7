"""A linear classifier on the features of a V2 encoder, before and after pre-training, on some of the labels.

    python benchmarks/fcmae_probe.py OUTPUT --data DATA --encoder RUN/final.safetensors --share 0.1

DATA is a folder with train/ and val/ of class folders. For each seed, `--share` of each class's training
images, drawn by that seed, are what the classifier is trained on, `evaluation.linear_probe` choosing its rate
on a tenth of them; all images of val/ are classified, or `--test-share` of each class. "before" is the
encoder with random weights, drawn as the run's were. Rows are added to OUTPUT, a
CSV file; a row that is there is not made again.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras_convnext
    from keras_convnext.data import sources
    from keras_convnext.data.index import Source
    from keras_convnext.evaluation.linear_probe import LinearProbe, linear_probe
    from keras_convnext.weights.resolve import resolve

    after = resolve(options.encoder)
    fields = ("weights", "share", "seed", "top1", "top5", "labels", "classified", "image_size")
    rows: list[dict[str, Any]] = []
    if os.path.exists(options.output):
        with open(options.output, newline="") as file:
            rows = list(csv.DictReader(file))
    there = {(row["weights"], int(row["seed"])) for row in rows}

    def part(split: str, share: float, seed: int) -> Source:
        source = sources.open_source(options.data, split)
        return source if share >= 1 else sources.hold_out(source, share, seed)[1]

    with tempfile.TemporaryDirectory() as folder:
        before = os.path.join(folder, "random.safetensors")
        body = getattr(keras_convnext, options.constructor)(
            weights=None, include_top=False, input_shape=(options.image_size, options.image_size, 3), seed=0
        )
        keras_convnext.save_weights(body, before, "fcmae", after.preprocessing)
        for seed in range(options.seeds):
            train, test = part("train", options.share, seed), part("val", options.test_share, 0)
            for name, path in (("before", before), ("after", options.encoder)):
                if name not in options.only or (name, seed) in there:
                    continue
                settings = LinearProbe(
                    model=path, image_size=options.image_size, crop=1.0, seed=seed, epochs=options.epochs
                )
                result = linear_probe(settings, data=(train, test), progress=False)
                values = (name, options.share, seed, result.top1, result.top5, len(train), result.n)
                rows.append(dict(zip(fields, (*values, options.image_size), strict=True)))
                print(rows[-1], flush=True)
                with open(options.output, "w", newline="") as file:
                    writer = csv.DictWriter(file, fields, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
    for name in options.only:
        scores = [float(row["top1"]) for row in rows if row["weights"] == name]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"{name}: top-1 {statistics.mean(scores):.2f} +- {spread:.2f} %")
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--constructor", default="ConvNeXtV2Atto", help="of the random encoder")
    parser.add_argument("--share", type=float, default=0.1, help="of the labels, by class and seed")
    parser.add_argument("--test-share", type=float, default=1.0, help="of val/ that is classified")
    parser.add_argument("--only", nargs="+", default=["before", "after"], choices=["before", "after"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--image-size", type=int, default=128)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
