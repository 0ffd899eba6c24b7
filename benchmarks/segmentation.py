"""Speed and memory of UPerNet with ConvNeXt-T: this package on each backend, transformers and smp.

    python benchmarks/segmentation.py [--rounds 3] [--seconds 3] [--output DIR]

Both have 150 classes, a head of 512 channels and random weights, and see photos of 512 x 512 pixels.

- inference: one photo a step, logits of 512 x 512 out. This package is called as a user does:
  `predict_on_batch`, NumPy in and out. The peers get a tensor that is ready in memory, under
  `torch.inference_mode`, and leave their result where it is. torch.compile has its default mode.
- training: two photos a step: forward, cross-entropy of both heads, backward and AdamW, without drop path.

smp is segmentation-models-pytorch with timm's ConvNeXt; its UPerNet has no auxiliary head, so its training
step does less. It is not among this repository's requirements: a folder that has it can be named in
PYTHONPATH. The peers have channels-last maps.

Each has a process of its own with all cores; they take turns, in the reversed order in every second round.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":
    import keras_convnext_main  # noqa: F401, first: the package then imports no Keras into this process

import numpy as np

from benchmarks.speed import implementations, output
from benchmarks.speed.alternating_runs import Worker, WorkerError
from benchmarks.speed.cases import Progress
from benchmarks.speed.implementations import KERAS_BACKENDS, Step
from benchmarks.speed.report import Table
from benchmarks.speed.worker import timed

MODEL, SIDE, CLASSES, CHANNELS = "convnext_tiny", 512, 150, 512
BATCHES = {"inference": 1, "training": 2}
PEERS = {  # peer -> the kinds in which it takes part
    "transformers": ("inference", "training"),
    "transformers-compile": ("inference",),
    "smp": ("inference", "training"),
}
TITLES = {name: implementations.TITLES[name] for name in KERAS_BACKENDS} | {
    "transformers": "transformers, eager",
    "transformers-compile": "transformers, torch.compile",
    "smp": "smp, eager",
}
COMMAND = (
    "import keras_convnext_main; from benchmarks import segmentation; raise SystemExit(segmentation.serve())"
)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was seen of an implementation in one kind of step.

    Attributes:
        kind: "inference" or "training".
        implementation: see `TITLES`.
        seconds: of a step, one number a round: the median of the steps of that turn.
        first: seconds from the start of the process to the first result.
        peak_bytes: largest resident memory of the process.
        problem: why it could not run, else "".
    """

    kind: str
    implementation: str
    seconds: tuple[float, ...] = ()
    first: float = math.nan
    peak_bytes: int = 0
    problem: str = ""


def serve() -> int:
    """Answers as `benchmarks.speed.worker` does; first line: {"kind", "implementation"}."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # frameworks print

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    task = json.loads(sys.stdin.readline())
    try:
        step = prepare(task["implementation"], task["kind"])
        step()
        answer(ready=True)
        for line in sys.stdin:
            seconds = timed(step, json.loads(line)["seconds"])
            answer(seconds=seconds, peak_bytes=implementations.peak_bytes())
    except Exception as error:
        traceback.print_exc()
        answer(problem=f"{type(error).__name__}: {error}".splitlines()[0])
    return 0


def prepare(name: str, kind: str) -> Step:
    """Builds a model with random weights and returns one step of it."""
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 255, (BATCHES[kind], SIDE, SIDE, 3)).astype("float32")
    maps = generator.integers(0, CLASSES, images.shape[:3]).astype("int32")
    if name in KERAS_BACKENDS:
        return ours(kind, images, maps)
    return theirs(name, kind, images, maps)


def ours(kind: str, images: np.ndarray, maps: np.ndarray) -> Step:
    import keras

    import keras_convnext
    from keras_convnext import segmentation
    from keras_convnext.training.segmentation_loss import SegmentationLoss

    backbone = keras_convnext.load(
        MODEL, weights=None, include_top=False, pyramid_norms=True, input_shape=(SIDE, SIDE, 3)
    )
    model = segmentation.UPerNet(backbone, CLASSES, channels=CHANNELS)
    if kind == "inference":
        deployed = segmentation.without_auxiliary(model)
        return lambda: deployed.predict_on_batch(images)
    training = segmentation.with_auxiliary(model)
    heads = ("logits", "auxiliary")
    training.compile(
        keras.optimizers.AdamW(1e-4, weight_decay=0.05),
        loss={head: SegmentationLoss() for head in heads},
        loss_weights={"logits": 1.0, "auxiliary": 0.4},
    )
    return lambda: training.train_on_batch(images, dict.fromkeys(heads, maps))


def theirs(name: str, kind: str, images: np.ndarray, maps: np.ndarray) -> Step:
    import torch

    timm = implementations._import_timm()  # so that smp can import it
    del timm
    pixels = torch.from_numpy(images / 255).permute(0, 3, 1, 2)
    if name == "smp":
        import segmentation_models_pytorch as smp

        model = smp.UPerNet(f"tu-{MODEL}", encoder_weights=None, decoder_channels=CHANNELS, classes=CLASSES)
    else:
        import transformers

        makers: Any = transformers  # whose types do not know all arguments
        body = makers.ConvNextConfig(
            hidden_sizes=[96, 192, 384, 768],
            depths=[3, 3, 9, 3],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        config = makers.UperNetConfig(
            backbone_config=body, num_labels=CLASSES, hidden_size=CHANNELS, auxiliary_in_channels=384
        )
        model = makers.UperNetForSemanticSegmentation(config)
    model = model.to(memory_format=torch.channels_last)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    if kind == "inference":
        call = torch.compile(model.eval()) if name.endswith("-compile") else model.eval()

        def infer() -> Any:
            with torch.inference_mode():
                return call(pixels)

        return infer
    labels = torch.from_numpy(maps).long()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, weight_decay=0.05)

    def train() -> float:
        if name == "smp":
            loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        else:
            loss = model(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    return train


def measure(kind: str, names: Sequence[str], rounds: int, seconds: float, progress: Progress) -> list[Speed]:
    """Measures one kind of step in turns; an implementation that cannot run has a `problem`."""
    workers: dict[str, Worker] = {}
    found = {name: Speed(kind, name) for name in names}
    with contextlib.ExitStack() as stack:
        order = [*names, *itertools.chain(*(names[:: (-1) ** number] for number in range(rounds)))]
        for place, name in enumerate(order):
            progress.show(f"{kind}, {name}", place, len(order))
            if found[name].problem:
                continue
            command: dict[str, Any] = {"seconds": seconds}
            if is_new := name not in workers:
                begin = time.perf_counter()
                workers[name] = Worker(["-c", COMMAND], implementations.environment(name, None))
                stack.callback(workers[name].stop)
                command = {"kind": kind, "implementation": name}
            try:
                answer = workers[name].ask(**command)
            except WorkerError as error:
                answer = {"problem": str(error)}
            if "problem" in answer:
                found[name] = Speed(kind, name, problem=answer["problem"])
            elif is_new:
                found[name] = dataclasses.replace(found[name], first=time.perf_counter() - begin)
            else:
                times = (*found[name].seconds, statistics.median(answer["seconds"]))
                found[name] = dataclasses.replace(found[name], seconds=times, peak_bytes=answer["peak_bytes"])
        progress.show("done", len(order), len(order))
    return list(found.values())


def ratio(own: Speed, peer: Speed) -> float:
    """Returns how many times as fast as the peer one is: median over rounds; NaN where one did not run."""
    if not own.seconds or not peer.seconds:
        return math.nan
    pairs = zip(own.seconds, peer.seconds, strict=True)
    return statistics.median(theirs / mine for mine, theirs in pairs)


def as_table(found: Sequence[Speed]) -> Table:
    """Makes the table of one kind: seconds, memory, and times the speed of each peer."""
    peers = [speed for speed in found if speed.implementation in PEERS and speed.seconds]
    rows, notes = [], []
    for speed in found:
        title = TITLES[speed.implementation]
        if speed.problem:
            notes.append(f"{title}: {speed.problem}")
            continue
        is_ours = speed.implementation in KERAS_BACKENDS
        rows.append(
            (
                title,
                f"{1000 * statistics.median(speed.seconds):.0f}",
                f"{1000 * min(speed.seconds):.0f}..{1000 * max(speed.seconds):.0f}",
                f"{speed.peak_bytes / 1e9:.2f}",
                f"{speed.first:.1f}",
                *(f"{ratio(speed, peer):.2f}" if is_ours else "" for peer in peers),
            )
        )
    kind = found[0].kind
    ratios = (f"x {peer.implementation}" for peer in peers)
    titles = ("implementation", "ms", "min..max", "peak GB", "first s", *ratios)
    heading = f"UPerNet, {MODEL}, {SIDE} x {SIDE} pixels: {kind}, batch {BATCHES[kind]}"
    return Table(heading, titles, "<" + ">" * (len(titles) - 1), rows, tuple(notes))


def as_row(speed: Speed) -> dict[str, Any]:
    return dataclasses.asdict(speed) | {
        "seconds": json.dumps([round(value, 4) for value in speed.seconds]),
        "first": None if math.isnan(speed.first) else speed.first,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures as the command line says; returns 1 when no backend could run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each, default 3")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, default 3")
    parser.add_argument("--kinds", nargs="+", default=list(BATCHES), choices=BATCHES)
    parser.add_argument("--only", nargs="+", default=list(TITLES), choices=TITLES)
    parser.add_argument("--output", metavar="DIR", help="for segmentation.csv and .md")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    options = parser.parse_args(arguments, argparse.Namespace(threads=None))
    if options.rounds < 1:
        parser.error(f"expected --rounds from 1 up, received {options.rounds}")
    where, progress = output.begin(options), Progress("segmentation")
    found = {}
    for kind in options.kinds:
        names = [name for name in options.only if kind in PEERS.get(name, BATCHES)]
        found[kind] = measure(kind, names, options.rounds, options.seconds, progress)
    speeds = list(itertools.chain(*found.values()))
    measured = [name for name in options.only if name in KERAS_BACKENDS]
    tables = [as_table(kinds) for kinds in found.values()]
    output.end(options, "segmentation", where, [*measured, "timm"], tables, [as_row(each) for each in speeds])
    return 0 if any(each.seconds and each.implementation in KERAS_BACKENDS for each in speeds) else 1


if __name__ == "__main__":
    sys.exit(main())
