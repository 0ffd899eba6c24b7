"""Images a second of training from a folder of photos, decoding included, beside loops of PyTorch and timm.

    python benchmarks/training_end_to_end.py FOLDER [--rounds 2] [--seconds 6] [--output DIR]

FOLDER has a folder of JPEGs for each class. All train ConvNeXt V2-Atto at 96 pixels in float32 with AdamW:

- train: `keras-convnext train` with the published recipe of V2-Atto (rand-m9-mstd0.5-inc1, erasing 0.25,
  layer decay, drop path, EMA), mixup 0.8 and cutmix 1.0 beside it, batches of 32, random weights. timm: what
  its train.py does with the same values: create_loader with a worker for each core, Mixup,
  create_optimizer_v2 and ModelEmaV3.
- fit: `model.fit` of `batches.train_batches(...)`, the papers' augmentation, batches of 32, Keras's AdamW.
  timm: the same loader and Mixup, torch.optim.AdamW, no EMA.
- step: the steps of "fit", and of timm's loop, on one batch that is kept in memory.
- demo: the training of `make demo`, with its settings: up to 1,000 photos that are held in memory, batches of
  16, shifted and mirrored. timm: the same batches, its model, torch.optim.AdamW.

timm is eager, with channels_last. Each has a process of its own with all cores; those of a kind take turns,
in the reversed order in every second round. Not counted: the start, the first steps, in which a model is
compiled, the first steps of each turn, for which batches lie ready, and on all sides what happens between two
epochs. "waits" is the share of the time in which a step waits for its batch. As batches are made beside the
steps, on the same cores, what they cost is seen in "fit" against "step".
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":
    import keras_convnext_main  # noqa: F401, first: the package then imports no Keras into this process

from benchmarks.speed import implementations, output
from benchmarks.speed.alternating_runs import Worker, WorkerError
from benchmarks.speed.cases import Progress
from benchmarks.speed.implementations import KERAS_BACKENDS, TITLES
from benchmarks.speed.report import Table
from benchmarks.speed.training_loops import BATCH, COMMAND, DEMO_BATCH, MODEL, PEER, SIDE
from keras_convnext.data import sources

KINDS = {  # kind -> what its table is called
    "train": f"keras-convnext train, {SIDE} pixels, batch {BATCH}",
    "fit": f"model.fit from a folder, {SIDE} pixels, batch {BATCH}",
    "step": f"model.fit of one batch that is kept in memory, {SIDE} pixels, batch {BATCH}",
    "demo": f"the demo's fit, {SIDE} pixels, batch {DEMO_BATCH}",
}
LEAST_PHOTOS = 4 * BATCH  # as the first step of an epoch does not count
BAR = 1.0  # of timm's images a second, at least


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was seen of an implementation in one kind of training.

    Attributes:
        kind: see `KINDS`.
        implementation: "timm" or a backend.
        rates: images a second, of each round.
        waits: share of the time in which steps waited for their batch, of each round; empty where it cannot
            be seen, as Keras makes the batches of a generator ahead on TensorFlow.
        first: seconds from the start of the process until its first three steps were done.
        problem: why it could not run, else "".
    """

    kind: str
    implementation: str
    rates: tuple[float, ...] = ()
    waits: tuple[float, ...] = ()
    first: float = math.nan
    problem: str = ""


def measure(
    kind: str, names: Sequence[str], folder: pathlib.Path, rounds: int, seconds: float, progress: Progress
) -> list[Speed]:
    """Measures implementations of one kind of training in turns; one that cannot run has a `problem`."""
    workers: dict[str, Worker] = {}
    found = {name: Speed(kind, name) for name in names}

    def asked(name: str, **command: Any) -> dict[str, Any]:
        try:
            return workers[name].ask(**command)
        except WorkerError as error:
            found[name] = Speed(kind, name, problem=str(error))
            return {}

    with contextlib.ExitStack() as stack:
        runs = stack.enter_context(tempfile.TemporaryDirectory(prefix="keras_convnext_bench_"))
        order = [*names, *itertools.chain(*(names[:: (-1) ** number] for number in range(rounds)))]
        for place, name in enumerate(order):
            progress.show(f"{kind}, {name}", place, len(order))
            if name not in workers:
                begin = time.perf_counter()
                workers[name] = Worker(["-c", COMMAND], variables_of(name))
                stack.callback(workers[name].stop)
                asked(name, kind=kind, implementation=name, folder=str(folder), out=os.path.join(runs, name))
                if not found[name].problem:
                    found[name] = dataclasses.replace(found[name], first=time.perf_counter() - begin)
            elif not found[name].problem and (turn := asked(name, seconds=seconds)):
                rates = (*found[name].rates, turn["images"] / turn["seconds"])
                share = turn["waited"] / turn["seconds"]
                waits = (*found[name].waits, share) if turn["sees_waiting"] else ()
                found[name] = dataclasses.replace(found[name], rates=rates, waits=waits)
        progress.show("done", len(order), len(order))
    return list(found.values())


def variables_of(name: str) -> dict[str, str]:
    """Returns the variables of a process, but for those that the import of the package sets in it."""
    variables = implementations.environment(name, None)
    return {key: value for key, value in variables.items() if key not in implementations.library_settings()}


def ratio(ours: Speed, peer: Speed | None) -> float:
    """Returns how many times as fast as the peer ours is: median over rounds; NaN where one did not run."""
    if peer is None or not ours.rates or not peer.rates:
        return math.nan
    pairs = zip(ours.rates, peer.rates, strict=True)
    return statistics.median(own / theirs for own, theirs in pairs)


def peer_of(found: Sequence[Speed]) -> Speed | None:
    return next((speed for speed in found if speed.implementation == PEER), None)


def as_table(found: Sequence[Speed]) -> Table:
    """Makes the table of one kind: images a second, times timm's, the share of waiting for batches."""
    rows, notes = [], []
    for speed in found:
        title = TITLES[speed.implementation]
        if speed.problem:
            notes.append(f"{title}: {speed.problem}")
            continue
        times, waits = ratio(speed, peer_of(found)), speed.waits
        has_ratio = speed.implementation != PEER and not math.isnan(times)
        rows.append(
            (
                title,
                f"{statistics.median(speed.rates):.1f}",
                f"{min(speed.rates):.1f}..{max(speed.rates):.1f}",
                f"{statistics.median(waits):.0%}" if waits else "-",
                f"{speed.first:.1f}",
                f"{times:.2f}" if has_ratio else "",
                ("met" if times >= BAR else "MISSED") if has_ratio else "",
            )
        )
    titles = ("implementation", "images/s", "min..max", "waits", "first s", "x timm", f">= {BAR}")
    return Table(f"{MODEL}: {KINDS[found[0].kind]}", titles, "<>>>>><", rows, tuple(notes))


def cost_of_batches(fits: Sequence[Speed], steps: Sequence[Speed]) -> str:
    """Says which share of the time of `fit` goes into reading and augmenting, by round, with the median."""
    shares = []
    for fit, step in zip(fits, steps, strict=True):
        part = 1 - ratio(fit, step)
        if not math.isnan(part):
            shares.append(f"{TITLES[fit.implementation]} {part:.0%}")
    return f"Reading and augmenting take, of the time of fit: {'; '.join(shares)}." if shares else ""


def as_row(speed: Speed, times: float) -> dict[str, Any]:
    """Returns all numbers of an implementation, None for those that there are not."""
    row = dataclasses.asdict(speed) | {"times_timm": times}
    for field in ("rates", "waits"):
        values = row[field]
        row[field] = json.dumps([round(value, 4) for value in values])
        row[f"median_{field}"] = statistics.median(values) if values else None
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures as the command line says; returns 1 when no backend could run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER", help="of a folder for each class")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each, default 2")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn that count, default 6")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--backends", nargs="+", default=list(KERAS_BACKENDS), choices=KERAS_BACKENDS)
    parser.add_argument("--output", metavar="DIR", help="for training_end_to_end.csv and .md")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    options = parser.parse_args(arguments, argparse.Namespace(threads=None))
    try:
        count = len(sources.open_source(options.folder))
    except sources.SourceError as error:
        parser.error(str(error))
    if count < LEAST_PHOTOS:
        parser.error(f"expected {LEAST_PHOTOS} photos or more, received {count} in '{options.folder}'")
    if options.rounds < 1:
        parser.error(f"expected --rounds from 1 up, received {options.rounds}")
    where = output.begin(options)
    progress, names = Progress("training"), [*options.backends, PEER]
    found = {
        kind: measure(kind, names, options.folder.resolve(), options.rounds, options.seconds, progress)
        for kind in options.kinds
    }
    tables = {kind: as_table(speeds) for kind, speeds in found.items()}
    if {"fit", "step"} <= found.keys():
        note = cost_of_batches(found["fit"], found["step"])
        tables["fit"] = dataclasses.replace(tables["fit"], notes=(*tables["fit"].notes, note))
    rows = [as_row(speed, ratio(speed, peer_of(speeds))) for speeds in found.values() for speed in speeds]
    output.end(options, "training_end_to_end", where, names, list(tables.values()), rows)
    return 0 if any(row["implementation"] != PEER and not row["problem"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
