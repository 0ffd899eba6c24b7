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
import itertools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":
    import keras_convnext_main  # noqa: F401, first: the package then imports no Keras into this process

import numpy as np

from benchmarks.speed import implementations, output
from benchmarks.speed.alternating_runs import Measurement, measure_entries, ratio
from benchmarks.speed.cases import Progress
from benchmarks.speed.implementations import KERAS_BACKENDS, Case, Step
from benchmarks.speed.report import Table

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
    "import keras_convnext_main; from benchmarks import segmentation; from benchmarks.speed import worker; "
    "raise SystemExit(worker.main(segmentation.prepare))"
)


def prepare(name: str, case: Case, _threads: int | None, _folder: str) -> Step:
    """Builds a model with random weights and returns one step of it."""
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 255, (case.batch, SIDE, SIDE, 3)).astype("float32")
    maps = generator.integers(0, CLASSES, images.shape[:3]).astype("int32")
    if name in KERAS_BACKENDS:
        return ours(case.mode, images, maps)
    return theirs(name, case.mode, images, maps)


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


def as_table(found: Sequence[Measurement]) -> Table:
    """Makes the table of one kind: seconds, memory, and times the speed of each peer."""
    peers = [each for each in found if each.implementation in PEERS and each.seconds]
    rows, notes = [], []
    for each in found:
        title = TITLES[each.implementation]
        if each.problem:
            notes.append(f"{title}: {each.problem}")
            continue
        is_ours = each.implementation in KERAS_BACKENDS
        rows.append(
            (
                title,
                f"{1000 * each.median:.0f}",
                f"{1000 * min(each.seconds):.0f}..{1000 * max(each.seconds):.0f}",
                f"{each.peak_bytes / 1e9:.2f}",
                f"{each.first:.1f}",
                *(f"{ratio(each, peer):.2f}" if is_ours else "" for peer in peers),
            )
        )
    case = found[0].case
    ratios = (f"x {peer.implementation}" for peer in peers)
    titles = ("implementation", "ms", "min..max", "peak GB", "first s", *ratios)
    heading = f"UPerNet, {MODEL}, {SIDE} x {SIDE} pixels: {case.mode}, batch {case.batch}"
    return Table(heading, titles, "<" + ">" * (len(titles) - 1), rows, tuple(notes))


def as_row(found: Measurement) -> dict[str, Any]:
    return {
        "kind": found.case.mode,
        "implementation": found.implementation,
        "seconds": json.dumps([round(value, 4) for value in found.seconds]),
        "first": None if math.isnan(found.first) else found.first,
        "peak_bytes": found.peak_bytes,
        "problem": found.problem,
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
        case = Case(MODEL, kind, BATCHES[kind], SIDE)
        entries = [(name, case) for name in names]
        found[kind] = measure_entries(entries, options.rounds, options.seconds, None, progress.show, COMMAND)
    speeds = list(itertools.chain(*found.values()))
    measured = [name for name in options.only if name in KERAS_BACKENDS]
    tables = [as_table(kinds) for kinds in found.values()]
    output.end(options, "segmentation", where, [*measured, "timm"], tables, [as_row(each) for each in speeds])
    return 0 if any(each.seconds and each.implementation in KERAS_BACKENDS for each in speeds) else 1


if __name__ == "__main__":
    sys.exit(main())
