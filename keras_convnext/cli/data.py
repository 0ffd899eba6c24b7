"""`prepare` copies a data set into shards; `look` draws what training does to its images."""

import argparse
import dataclasses

from keras_convnext.cli.shared import import_quietly, positive_integer, print_json, print_lines

_PREPARE_EXAMPLES = """examples:
  keras-convnext prepare imagenet/ prepared/
  keras-convnext prepare imagenet/ prepared/ --split validation --shards 64 --verify
  keras-convnext prepare flowers/ prepared/

Writes shuffled TFRecord files of about 150 MB, with the encoded images as they are, and an index. The same
command resumes after an interruption and repairs damaged files."""


def prepare_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options and the examples of `prepare`."""
    parser.set_defaults(run=prepare_command)
    parser.epilog = _PREPARE_EXAMPLES
    parser.add_argument("source", metavar="SOURCE", help="what evaluate takes as --data")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write to")
    parser.add_argument("--split", metavar="NAME", help="default all")
    parser.add_argument("--labels", metavar="FILE", help="'file,label' lines for a folder without classes")
    parser.add_argument(
        "--shards", type=positive_integer, metavar="N", help="files of a split, default by size"
    )
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="threads, default one a processor"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order, default 0")
    parser.add_argument("--verify", action="store_true", help="read all back and compare")
    parser.add_argument("--json", action="store_true", help="print JSON")


def prepare_command(options: argparse.Namespace) -> int:
    """Copies a data set into shards, and says how many."""
    import_quietly("tensorflow")
    from keras_convnext.data import prepare

    summary = prepare.prepare(
        options.source,
        options.output,
        options.split,
        labels=options.labels,
        shards=options.shards,
        workers=options.workers,
        shuffle_seed=options.seed,
    )
    damaged = prepare.verify(options.output, options.workers) if options.verify else []
    if damaged:
        raise OSError(f"Damaged in {options.output}: {', '.join(damaged)}. Run the same command again.")
    if options.json:
        print_json(dataclasses.asdict(summary) | {"verified": options.verify})
        return 0
    lines: list[tuple[str, object]] = [
        (split, f"{images:,} images, shards: {summary.shards[split]:,}")
        for split, images in summary.images.items()
    ]
    lines.append(("size", f"{summary.num_bytes / 1e6:,.1f} MB, in {summary.seconds:,.1f} s"))
    if summary.num_kept:
        lines.append(("kept", f"shards: {summary.num_kept:,}"))
    if options.verify:
        lines.append(("verified", "every file has the SHA-256 of the manifest"))
    print_lines(summary.output, lines)
    return 0


_LOOK_EXAMPLES = """examples:
  keras-convnext look flowers/ sheet.png
  keras-convnext look imagenet/ sheet.png --split train --policy ta_wide --seed 3"""


def look_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options and the examples of `look`."""
    parser.set_defaults(run=look_command)
    parser.epilog = _LOOK_EXAMPLES
    parser.add_argument("data", metavar="DATA", help="what evaluate takes as --data")
    parser.add_argument("output", metavar="OUTPUT", help="the PNG to write")
    parser.add_argument("--split", metavar="NAME", help="train, validation; needed where there are several")
    parser.add_argument(
        "--policy",
        default="rand-m9-mstd0.5-inc1",
        metavar="NAME",
        help="RandAugment, AutoAugment or TrivialAugment, default rand-m9-mstd0.5-inc1",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the batch, default 0")


def look_command(options: argparse.Namespace) -> int:
    """Draws what the training pipeline does to images of a data set."""
    import_quietly("tensorflow")
    from keras_convnext.data import contact_sheet, sources
    from keras_convnext.data.train_transform import Augmentation

    augmentation = Augmentation(policy=options.policy)
    source = sources.open_source(options.data, options.split)
    contact_sheet.draw(source, options.output, augmentation=augmentation, seed=options.seed)
    print(f"{options.output}: operations and a training batch of {options.data}, {len(source):,} images")
    return 0
