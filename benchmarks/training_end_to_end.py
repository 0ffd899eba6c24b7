"""Images a second of training from a folder of photos, decoding included, beside loops of PyTorch and timm.

    python benchmarks/training_end_to_end.py FOLDER [--rounds 2] [--seconds 8] [--output DIR]

FOLDER has a folder of JPEGs for each class. All train ConvNeXt V2-Atto at 96 pixels in float32 with AdamW:

- train: `keras-convnext train` with the published recipe of V2-Atto (rand-m9-mstd0.5-inc1, erasing 0.25,
  layer decay, drop path, EMA), mixup 0.8 and cutmix 1.0 beside it, batches of 32, random weights. timm: what
  its train.py does with the same values: create_loader with a worker for each core, Mixup,
  create_optimizer_v2 and ModelEmaV3.
- fit: `model.fit` of `batches.train_batches(...)`, the papers' augmentation, batches of 32, Keras's AdamW.
  timm: the same loader and Mixup, torch.optim.AdamW, no EMA.
- demo: the training of `make demo`, with its settings: up to 1,000 photos that are held in memory, batches of
  16, shifted and mirrored. timm: the same batches, its model, torch.optim.AdamW.

timm is eager, with channels_last. Each has a process of its own with all cores; those of a kind take turns,
in the reversed order in every second round. Not counted: the start, the first steps, in which a model is
compiled, the first steps of each turn, for which batches lie ready, and on all sides what happens between two
epochs. "waits" is the share of the time in which a step waits for its batch; making batches also takes cores
from the steps beside it.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

if __name__ == "__main__":
    import keras_convnext_main  # noqa: F401, first: the package then imports no Keras into this process

from benchmarks.speed import implementations, output
from benchmarks.speed.alternating_runs import Worker, WorkerError
from benchmarks.speed.cases import Progress
from benchmarks.speed.implementations import KERAS_BACKENDS, TITLES
from benchmarks.speed.report import Table
from keras_convnext import _environment

MODEL, RECIPE = "convnextv2_atto", "imagenet1k_fcmae_ft_convnextv2_atto"
SIDE, BATCH = 96, 32
KINDS = {  # kind -> what its table is called
    "train": f"keras-convnext train, {SIDE} pixels, batch {BATCH}",
    "fit": f"model.fit from a folder, {SIDE} pixels, batch {BATCH}",
    "demo": f"the demo's fit, {SIDE} pixels, batch 16",
}
PEER = "timm"
BAR = 1.0  # of timm's images a second, at least
FIRST_STEPS = 3  # of a process; models are compiled in them
READY_STEPS = 8  # of a turn; two workers of PyTorch make four batches ahead, ours two
LEAST_STEPS = 5  # of a turn that count
COMMAND = (
    "import keras_convnext_main; from benchmarks import training_end_to_end as program; "
    "raise SystemExit(program.serve())"
)
CHANGES = (
    f"weights= image_size={SIDE} eval_image_size={SIDE} batch_size={BATCH} accumulation_steps=1 "
    "precision=float32 mixup=0.8 cutmix=1.0 val_split= epochs=1000000"
)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was seen of an implementation in one kind of training.

    Attributes:
        kind: see `KINDS`.
        implementation: "timm" or a backend.
        rates: images a second, of each round.
        waits: share of the time in which steps waited for their batch, of each round; empty where it cannot
            be seen, as Keras makes the batches of a generator ahead on TensorFlow.
        first: seconds from the start of the process until `FIRST_STEPS` were done.
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
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn that count, default 8")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--backends", nargs="+", default=list(KERAS_BACKENDS), choices=KERAS_BACKENDS)
    parser.add_argument("--output", metavar="DIR", help="for training_end_to_end.csv and .md")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    options = parser.parse_args(arguments, argparse.Namespace(threads=None))
    if not options.folder.is_dir():
        parser.error(f"expected a folder of photos, received '{options.folder}'")
    where = output.begin(options)
    progress, names = Progress("training"), [*options.backends, PEER]
    tables, rows = [], []
    for kind in options.kinds:
        found = measure(kind, names, options.folder.resolve(), options.rounds, options.seconds, progress)
        tables.append(as_table(found))
        rows += [as_row(speed, ratio(speed, peer_of(found))) for speed in found]
    output.end(options, "training_end_to_end", where, names, tables, rows)
    return 0 if any(row["implementation"] != PEER and not row["problem"] for row in rows) else 1


# The process of one implementation: it trains on and on, and stands still between its turns.


class Clock:
    """Counts the steps of a turn; between turns it waits, inside a step's end, for the next line of stdin."""

    def __init__(self, batch: int, answer: Callable[..., None], commands: Iterator[str]) -> None:
        self.batch, self.answer, self.commands = batch, answer, commands
        self.sees_waiting = True
        self.received = self.ended = self.limit = self.seconds = self.waited = 0.0
        self.steps = -FIRST_STEPS

    def note_batch(self) -> None:
        """The next step has its batch."""
        self.received = time.perf_counter()

    def end_step(self, is_first: bool) -> None:
        """A step has ended; the first of an epoch is not counted, as other work came before it."""
        now = time.perf_counter()
        if not is_first:
            self.steps += 1
            if self.steps > 0:
                self.seconds += now - self.ended
                self.waited += min(max(self.received - self.ended, 0.0), now - self.ended)
        if self.limit == 0 and self.steps >= 0:
            self.answer(ready=True)
            self._next_turn()
        elif self.steps >= LEAST_STEPS and self.seconds >= self.limit:
            facts = {"seconds": self.seconds, "waited": self.waited, "sees_waiting": self.sees_waiting}
            self.answer(images=self.steps * self.batch, **facts)
            self._next_turn()
        self.ended = time.perf_counter()

    def _next_turn(self) -> None:
        line = next(self.commands, None)
        if line is None:
            os._exit(0)  # the middle of a training is no place to end otherwise
        self.limit, self.seconds, self.waited, self.steps = (
            json.loads(line)["seconds"],
            0.0,
            0.0,
            -READY_STEPS,
        )


def serve() -> int:
    """Trains without end, as the first line of stdin says; the lines after it are turns."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # frameworks print

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    task = json.loads(sys.stdin.readline())
    clock = Clock(16 if task["kind"] == "demo" else BATCH, answer, iter(sys.stdin))
    folder, kind = pathlib.Path(task["folder"]), task["kind"]
    if task["implementation"] == PEER:
        train_timm(kind, folder, clock)
    elif kind == "train":
        run_command(folder, task["out"], clock)
    elif kind == "fit":
        run_fit(folder, clock)
    else:
        run_demo(folder, clock)
    return 1  # nothing of the above ends


def run_command(folder: pathlib.Path, out: str, clock: Clock) -> None:
    from keras_convnext.cli import main, shared

    shared.import_quietly("keras_convnext.training.trainer", "tensorflow")  # as the command does, first
    watch_fit(clock)
    changes = itertools.chain(*(("--set", change) for change in CHANGES.split()))
    sys.exit(main.main(["train", RECIPE, "--data", str(folder), "--out", out, "--quiet", *changes]))


def run_fit(folder: pathlib.Path, clock: Clock) -> None:
    _environment.choose_backend()  # as the import of the package does in a program of a user
    import keras

    import keras_convnext
    from keras_convnext.data import batches, sources

    watch_fit(clock)
    source = sources.open_source(folder)
    model = keras_convnext.load(
        MODEL,
        weights=None,
        classes=len(source.classes),
        input_shape=(SIDE, SIDE, 3),
        classifier_activation=None,
    )
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.05), loss)
    steps = batches.steps_per_epoch(source, BATCH)
    data = batches.train_batches(source, batch_size=BATCH, image_size=SIDE)
    model.fit(data, steps_per_epoch=steps, epochs=10**6, verbose=0)


def run_demo(folder: pathlib.Path, clock: Clock) -> None:
    _environment.choose_backend()  # as the import of the package does in a program of a user
    import keras

    from demo import photos, run

    watch_fit(clock)
    clock.sees_waiting = keras.backend.backend() != "tensorflow"

    def noted(*arguments: Any) -> Iterator[Any]:
        for batch in photos.batches(*arguments):
            clock.note_batch()
            yield batch

    run.batches = noted
    run.train(run.open_weights(run.WEIGHTS), photos.read_photos(folder, run.LIMIT, 0), 10**6, 0)


def watch_fit(clock: Clock) -> None:
    """Lets each `fit` of this process tell a clock of its steps, and `train_batches` of its batches."""
    import keras
    import numpy as np
    import tensorflow as tf

    from keras_convnext.data import batches

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            float(logs["loss"])  # it has been computed
            clock.end_step(is_first=batch == 0)

    def note_batch() -> Any:
        clock.note_batch()
        return np.int32(0)

    def noted(images: Any, targets: Any) -> tuple[Any, Any]:
        with tf.control_dependencies([tf.numpy_function(note_batch, [], tf.int32)]):
            return tf.identity(images), tf.identity(targets)

    fit, make = keras.Model.fit, batches.train_batches

    def watched_fit(model: Any, *words: Any, callbacks: Iterable[Any] | None = None, **settings: Any) -> Any:
        return fit(model, *words, callbacks=[*(callbacks or ()), Steps()], **settings)

    keras.Model.fit = watched_fit
    batches.train_batches = lambda *words, **settings: make(*words, **settings).map(noted)


def train_timm(kind: str, folder: pathlib.Path, clock: Clock) -> None:
    """Trains as timm's train.py does, or with the demo's batches."""
    timm = implementations._import_timm()
    import torch
    from timm import data, loss, optim, utils

    torch.manual_seed(0)
    is_train = kind == "train"
    if kind == "demo":
        classes, batches = demo_batches(folder)
        criterion = torch.nn.CrossEntropyLoss()
    else:
        dataset = data.create_dataset("", folder)
        classes = len(dataset.reader.class_to_idx)
        smoothing = 0.2 if is_train else 0.1
        mix = data.Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, label_smoothing=smoothing, num_classes=classes)
        batches = timm_batches(dataset, mix)
        criterion = loss.SoftTargetCrossEntropy()
    model = timm.create_model(MODEL, num_classes=classes, drop_path_rate=0.1 if is_train else 0.0)
    model = model.to(memory_format=torch.channels_last).train()
    if is_train:
        optimizer = optim.create_optimizer_v2(model, "adamw", lr=8e-4, weight_decay=0.3, layer_decay=0.9)
        average = utils.ModelEmaV3(model, decay=0.9999)
    else:
        optimizer, average = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05), None
    for is_first, images, targets in batches:
        clock.note_batch()
        value = criterion(model(images.contiguous(memory_format=torch.channels_last)), targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if average is not None:
            average.update(model)
        clock.end_step(is_first)


def timm_batches(dataset: Any, mix: Callable) -> Iterator[tuple[bool, Any, Any]]:
    """Yields, without end, whether a batch is the first of an epoch, its images and soft targets."""
    import torch
    from PIL import ImageOps
    from timm.data import create_loader

    # timm asks for 0 bits now and then, which Pillow took for a black image until it began to raise.
    posterize, black = ImageOps.posterize, [0] * 256 * 3
    ImageOps.posterize = lambda image, bits: posterize(image, bits) if bits else image.point(black)
    loader = create_loader(
        dataset,
        (3, SIDE, SIDE),
        BATCH,
        is_training=True,
        use_prefetcher=False,  # it is for GPUs
        num_workers=_environment.available_cores(),
        interpolation="bicubic",
        color_jitter=0.0,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        device=torch.device("cpu"),
        persistent_workers=True,
    )
    while True:
        for number, (images, targets) in enumerate(loader):
            yield number == 0, *mix(images, targets)


def demo_batches(folder: pathlib.Path) -> tuple[int, Iterator[tuple[bool, Any, Any]]]:
    """Returns the number of classes and the demo's batches, without end, as timm's model takes them."""
    import torch

    from demo import photos
    from keras_convnext.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD

    found = photos.read_photos(folder, 1_000, 0)
    images, labels = found.images[found.training], found.labels[found.training]
    mean, std = (255 * torch.tensor(each).reshape(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))

    def made() -> Iterator[tuple[bool, Any, Any]]:
        for pixels, numbers in photos.batches(images, labels, 16, 0):
            normalised = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub_(mean).div_(std)
            yield False, normalised, torch.from_numpy(numbers).long()

    return len(found.classes), made()


if __name__ == "__main__":
    sys.exit(main())
