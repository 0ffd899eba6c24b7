"""`prepare` copies a data set into shards; `look` draws what training does to its images."""

import argparse
import dataclasses
from collections.abc import Callable

from keras_convnext._messages import size_text
from keras_convnext._terminal import say
from keras_convnext.cli import shared

PREPARE_EXAMPLES = """examples:
  keras-convnext prepare imagenet/ prepared/
  keras-convnext prepare imagenet/ prepared/ --split validation --shards 64 --verify
  keras-convnext prepare flowers/ prepared/
  keras-convnext prepare ade20k/ prepared/ --ignored 0

Writes shuffled TFRecord files of about 150 MB, with the encoded images as they are, and an index. The same
command resumes after an interruption and repairs damaged files."""


def prepare_options(option: Callable) -> None:
    option("source", "SOURCE", "what evaluate takes as --data")
    option("output", "OUTPUT", "folder to write to")
    option("--split", "NAME", "default all")
    option("--labels", "FILE", "'file,label' lines for a folder without classes")
    option("--ignored", "N,N", "values of label maps that stand for not labelled", type=shared.values)
    option("--shards", "N", "files of a split, default by size", type=shared.positive)
    option("--workers", "N", "threads, default one a processor", type=shared.positive)
    option("--seed", "N", "of the order, default 0", type=int, default=0)
    option("--verify", None, "read all back and compare")
    option("--json")


def prepare_command(options: argparse.Namespace) -> int:
    shared.import_quietly("tensorflow")
    from keras_convnext.data import prepare, records

    summary = prepare.prepare(
        options.source,
        options.output,
        options.split,
        labels=options.labels,
        ignored_values=options.ignored,
        shards=options.shards,
        workers=options.workers,
        shuffle_seed=options.seed,
    )
    damaged = records.verify(options.output, options.workers) if options.verify else []
    if damaged:
        raise OSError(f"Damaged in {options.output}: {', '.join(damaged)}. Run the same command again.")
    if options.json:
        shared.print_json(dataclasses.asdict(summary) | {"verified": options.verify})
        return 0
    images = summary.images.items()
    facts = {
        **{split: f"{count:,} images, shards: {summary.shards[split]:,}" for split, count in images},
        "size": f"{size_text(summary.num_bytes)}, in {summary.seconds:,.1f} s",
        "kept": f"shards: {summary.num_kept:,}" if summary.num_kept else None,
        "verified": "every file has the SHA-256 of the manifest" if options.verify else None,
    }
    shared.print_facts(summary.output, facts.items())
    return 0


LOOK_EXAMPLES = """examples:
  keras-convnext look flowers/ sheet.png
  keras-convnext look imagenet/ sheet.png --split train --policy ta_wide --seed 3
  keras-convnext look camvid/ sheet.png --split train --ignored 11"""


def look_options(option: Callable) -> None:
    option("data", "DATA", "what evaluate takes as --data")
    option("output", "OUTPUT", "the PNG to write")
    option("--split", "NAME", "train, validation; needed where there are several")
    known = "RandAugment, AutoAugment or TrivialAugment, or keras beside ours; default %(default)s"
    option("--policy", "NAME", known, default="rand-m9-mstd0.5-inc1")
    option("--ignored", "N,N", "values of label maps that stand for not labelled", type=shared.values)
    option("--seed", "N", "of the batch, default 0", type=int, default=0)


def look_command(options: argparse.Namespace) -> int:
    shared.import_quietly("tensorflow")
    from keras_convnext.data import contact_sheet, index, sources
    from keras_convnext.data.segmentation import sources as segmentation
    from keras_convnext.data.train_transform import Augmentation

    if segmentation.is_segmentation(options.data):
        from keras_convnext.data.segmentation import contact_sheet as segmentation_sheet

        pairs = segmentation.open_source(options.data, options.split, ignored_values=options.ignored)
        say("\n".join(segmentation.described(pairs)))
        segmentation_sheet.draw(pairs, options.output, seed=options.seed)
        print(f"{options.output}: a training batch of {options.data}, {len(pairs):,} images with label maps")
        return 0
    augmentation = Augmentation(policy=options.policy)
    source = sources.open_source(options.data, options.split)
    say("\n".join(index.described(source)))
    contact_sheet.draw(source, options.output, augmentation=augmentation, seed=options.seed)
    print(f"{options.output}: operations and a training batch of {options.data}, {len(source):,} images")
    return 0
