"""Images per second of the input pipelines, of timm's loader and of Keras's own layers, on the same files.

    python benchmarks/pipeline.py FOLDER [--rounds 5] [--seconds 8]

FOLDER holds JPEGs, at any depth. Every pipeline runs in a process of its own with all cores; they take turns,
and the medians of the rounds are printed. Starting up and the first batches are not counted.

- train: decode, random resized crop to 224 (bicubic), flip, rand-m9-mstd0.5-inc1, erasing 0.25, mixup 0.8 and
  cutmix 1.0 with smoothing 0.1, batches of 64. timm: create_loader (without its GPU prefetcher, which would
  leave normalising to the GPU) with a worker for each core, and Mixup. Keras: the same steps of
  keras.layers (RandomCrop of the decoded image after resizing, RandAugment, RandomErasing, MixUp) in tf.data.
- eval: decode, resize to 256 (bicubic), crop 224, batches of 64.
- decode: tf.io.decode_jpeg alone, the floor for whoever decodes whole images.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import psutil

BATCH = 64
ROLES = ("timm train", "ours train", "ours train uint8", "keras train", "timm eval", "ours eval", "decode")
CORES = len(os.sched_getaffinity(0))


def timm_batches(folder: str, is_training: bool) -> Iterator[int]:
    import torch

    library = torch.library.Library("torchvision", "DEF")  # see tests/conftest.py
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from PIL import Image, ImageOps
    from timm.data import Mixup, create_dataset, create_loader

    # timm asks for 0 bits now and then, which Pillow took for a black image until it began to raise.
    posterize = ImageOps.posterize
    black = [0] * 256 * 3
    ImageOps.posterize = lambda image, bits: posterize(image, bits) if bits else image.point(black)
    Image.MAX_IMAGE_PIXELS = None
    loader = create_loader(
        create_dataset("", folder),
        (3, 224, 224),
        BATCH,
        is_training=is_training,
        use_prefetcher=False,
        num_workers=CORES,
        interpolation="bicubic",
        device=torch.device("cpu"),
        persistent_workers=True,
        **(
            {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
            if is_training
            else {}
        ),
    )
    mix = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=1000)
    while True:
        for images, labels in loader:
            if is_training:
                if len(images) % 2:
                    continue
                images, labels = mix(images, labels)
            yield len(images)


def our_batches(folder: str, is_training: bool, dtype: str = "float32") -> Iterator[int]:
    from keras_convnext.data import Preprocessing, batches, sources

    source = sources.open_source(folder)
    if is_training:
        made = batches.train_batches(source, batch_size=BATCH, num_classes=1000, dtype=dtype)
        for images, _ in made:
            yield len(images)
    made = batches.eval_batches(source, Preprocessing(224), batch_size=BATCH).repeat()
    for batch in made:
        yield len(batch["images"])


def keras_batches(folder: str) -> Iterator[int]:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow as tf

    layers = [
        keras.layers.RandomCrop(224, 224),
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandAugment(value_range=(0, 255), num_ops=2, factor=0.9),
        keras.layers.RandomErasing(factor=(0.25, 0.25), value_range=(0, 255)),
    ]
    mix = keras.layers.MixUp(alpha=0.8)

    def example(path, label):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        image = tf.image.resize(image, (256, 256), "bicubic", antialias=True)
        for layer in layers:
            image = layer(image, training=True)
        return image, tf.one_hot(label, 1000)

    files = sorted(str(path) for path in pathlib.Path(folder).glob("*/*"))
    data = tf.data.Dataset.from_tensor_slices((files, [0] * len(files))).repeat()
    data = data.map(example, num_parallel_calls=CORES).batch(BATCH, drop_remainder=True)
    data = data.map(
        lambda images, labels: mix({"images": images, "labels": labels}), num_parallel_calls=CORES
    )
    for batch in data.prefetch(2):
        yield len(batch["images"])


def decoded(folder: str) -> Iterator[int]:
    import tensorflow as tf

    files = sorted(str(path) for path in pathlib.Path(folder).glob("*/*"))

    def example(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method="INTEGER_ACCURATE")
        return tf.reshape(image, [-1])[:3]

    data = tf.data.Dataset.from_tensor_slices(files).repeat().map(example, num_parallel_calls=CORES)
    for batch in data.batch(BATCH).prefetch(2):
        yield len(batch)


MAKERS: dict[str, Callable[[str], Iterator[int]]] = {
    "timm train": lambda folder: timm_batches(folder, True),
    "ours train": lambda folder: our_batches(folder, True),
    "ours train uint8": lambda folder: our_batches(folder, True, "uint8"),
    "keras train": keras_batches,
    "timm eval": lambda folder: timm_batches(folder, False),
    "ours eval": lambda folder: our_batches(folder, False),
    "decode": decoded,
}


def used_seconds() -> float:
    """Return the CPU time of this process and its workers so far."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure(role: str, folder: str, seconds: float) -> tuple[float, float]:
    """Return images per second and CPU milliseconds an image, after a quarter of the time for warming up."""
    batches = MAKERS[role](folder)
    next(batches)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds / 4:
        next(batches)
    begin, used, count = time.perf_counter(), used_seconds(), 0
    while time.perf_counter() - begin < seconds:
        count += next(batches)
    return count / (time.perf_counter() - begin), (used_seconds() - used) / count * 1000


def link_files(source: pathlib.Path, folder: pathlib.Path, copies: int) -> int:
    """Make a tree of class folders that holds every file `copies` times, for timm to shuffle."""
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    for number in range(copies):
        (folder / f"class{number}").mkdir()
        for place, file in enumerate(files):
            (folder / f"class{number}" / f"{place}{file.suffix}").symlink_to(file.resolve())
    return len(files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--roles", nargs="*", default=list(ROLES), choices=ROLES)
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        print(json.dumps(measure(options.role, str(options.folder), options.seconds)))
        return

    with tempfile.TemporaryDirectory() as temporary:
        count = link_files(options.folder, pathlib.Path(temporary), copies=10)
        rates: dict[str, list[float]] = {role: [] for role in options.roles}
        costs: dict[str, list[float]] = {role: [] for role in options.roles}
        for number in range(options.rounds):
            for role in options.roles:
                command = [
                    sys.executable,
                    __file__,
                    temporary,
                    "--role",
                    role,
                    "--seconds",
                    str(options.seconds),
                ]
                environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
                result = subprocess.run(command, env=environment, capture_output=True, text=True)
                if result.returncode:
                    sys.exit(f"{role} failed:\n{result.stderr[-2000:]}")
                for values, value in zip(
                    (rates, costs), json.loads(result.stdout.splitlines()[-1]), strict=True
                ):
                    values[role].append(value)
                print(
                    f"round {number + 1}: {role}: {rates[role][-1]:.0f} images/s, {costs[role][-1]:.2f} ms",
                    file=sys.stderr,
                    flush=True,
                )

    medians = {role: statistics.median(values) for role, values in rates.items()}
    print(f"\n{count} JPEGs, {CORES} cores of {processor()}, medians of {options.rounds} rounds\n")
    print("| pipeline | images/s | / timm | / keras.layers | / decoding alone | CPU ms an image |")
    print("|---|--:|--:|--:|--:|--:|")
    for role, rate in medians.items():
        kind = "eval" if "eval" in role else "train"
        peers = [f"timm {kind}", "keras train" if kind == "train" else "", "decode"]
        ratios = [
            f"{rate / medians[peer]:.2f}" if peer in medians and role != "decode" else "" for peer in peers
        ]
        print(f"| {role} | {rate:.0f} | {' | '.join(ratios)} | {statistics.median(costs[role]):.2f} |")


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
