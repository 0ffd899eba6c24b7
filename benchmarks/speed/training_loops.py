"""The processes of `benchmarks/training_end_to_end.py`: each trains without end, in turns.

They read JSON lines from stdin and answer each on what was stdout when they started. First line: {"kind",
"implementation", "folder": of photos, "out": of a run}, answered by {"ready": true} after the first steps.
Then {"seconds"}: a turn of at least that long -> {"images", "seconds", "waited", "sees_waiting"}. The end of
stdin ends the process.
"""

import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.speed import implementations
from keras_convnext import _environment

MODEL, RECIPE = "convnextv2_atto", "imagenet1k_fcmae_ft_convnextv2_atto"
SIDE, BATCH, DEMO_BATCH = 96, 32, 16
PEER = "timm"
FIRST_STEPS = 3  # of a process; models are compiled in them
READY_STEPS = 5  # of a turn, not counted; two workers of PyTorch make four batches ahead, ours two
LEAST_STEPS = 5  # of a turn that count
COMMAND = (
    "import keras_convnext_main; from benchmarks.speed import training_loops; "
    "raise SystemExit(training_loops.serve())"
)
CHANGES = (
    f"weights= image_size={SIDE} eval_image_size={SIDE} batch_size={BATCH} accumulation_steps=1 "
    "precision=float32 mixup=0.8 cutmix=1.0 val_split= epochs=1000000"
)


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
    clock = Clock(DEMO_BATCH if task["kind"] == "demo" else BATCH, answer, iter(sys.stdin))
    folder, kind = pathlib.Path(task["folder"]), task["kind"]
    if task["implementation"] == PEER:
        train_timm(kind, folder, clock)
    elif kind == "train":
        run_command(folder, task["out"], clock)
    elif kind == "demo":
        run_demo(folder, clock)
    else:
        run_fit(folder, clock, is_kept=kind == "step")
    return 1  # nothing of the above ends


def run_command(folder: pathlib.Path, out: str, clock: Clock) -> None:
    from keras_convnext.cli import main, shared

    shared.import_quietly("keras_convnext.training.trainer", "tensorflow")  # as the command does, first
    watch_fit(clock)
    changes = itertools.chain(*(("--set", change) for change in CHANGES.split()))
    sys.exit(main.main(["train", RECIPE, "--data", str(folder), "--out", out, "--quiet", *changes]))


def run_fit(folder: pathlib.Path, clock: Clock, is_kept: bool) -> None:
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
    if is_kept:
        data = data.take(1).cache().repeat()
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

    run.batches = noted  # type: ignore[assignment]
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
        dataset = data.create_dataset("", str(folder))
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
    if kind == "step":
        batches = itertools.repeat((False, *next(batches)[1:]))
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
        for pixels, numbers in photos.batches(images, labels, DEMO_BATCH, 0):
            normalised = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub_(mean).div_(std)
            yield False, normalised, torch.from_numpy(numbers).long()

    return len(found.classes), made()
