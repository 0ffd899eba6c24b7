"""`prepare`, `look`: images on disk."""

import argparse
import dataclasses

from keras_convnext.cli.shared import import_quietly, print_json, print_lines


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


def look_command(options: argparse.Namespace) -> int:
    """Draws what the training pipeline does to images of a data set."""
    import_quietly("tensorflow")
    from keras_convnext.data import contact_sheet, sources

    source = sources.open_source(options.data, options.split)
    contact_sheet.draw(source, options.output, seed=options.seed, policy=options.policy)
    print(f"{options.output}: operations and a training batch of {options.data}, {len(source):,} images")
    return 0
