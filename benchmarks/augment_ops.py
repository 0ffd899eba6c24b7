"""Time of the augmentation operations in a tf.data map function, and of Pillow doing the same.

Microseconds of one core (processor time, so that other work on the machine counts less) for a photograph of
224 x 224 pixels, magnitudes of rand-m9-mstd0.5-inc1. The last rows are that whole policy, on average one
operation an image, and what timm needs for it.

    python benchmarks/augment_ops.py
"""

import argparse
import os
import pathlib
import random
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import tensorflow as tf
import torch
from PIL import Image, ImageOps

from keras_convnext.data.augment.policies import (
    UNIFORMS_PER_OPERATION,
    Plan,
    Policy,
    RandAugment,
    apply_augment,
    parse_policy,
    plan_augment,
)

SIZE = 224
FILL = (124, 116, 104)
PHOTOGRAPH = pathlib.Path(__file__).parents[1] / "tests" / "images" / "coffee.jpg"
POLICY = "rand-m9-mstd0.5-inc1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=300, help="images of each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements; the fastest counts")
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    policies = _timm_policies()
    photograph = Image.open(PHOTOGRAPH).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = tf.constant(np.asarray(photograph))
    whole = parse_policy(POLICY)

    def plan(policy: Policy, seed: int) -> Plan:
        columns = UNIFORMS_PER_OPERATION * policy.num_operations
        uniforms = np.random.default_rng(seed).random((options.images, columns))
        return plan_augment(policy, tf.constant(uniforms), (SIZE, SIZE))

    def ours(policy: Policy) -> float:
        rows = tf.data.Dataset.from_tensor_slices(plan(policy, 0)).repeat()
        settings = tf.data.Options()
        settings.autotune.enabled = False
        settings.threading.private_threadpool_size = 1
        settings.threading.max_intra_op_parallelism = 1

        def one(row: Plan) -> tf.Tensor:
            copied = tf.bitwise.bitwise_xor(pixels, tf.cast(row["operation"][0] % 2, tf.uint8))
            return apply_augment(copied, row, "bicubic", FILL)

        iterator = iter(rows.map(one).with_options(settings))
        return _fastest(lambda: next(iterator), options.images, options.repeats)

    none = ours(RandAugment(levels=("invert",), num_operations=1, probability=0.0))
    print(f"{'':22}{'ours':>8}{'Pillow':>8}  us an image")
    total = theirs = 0.0
    for level in whole.levels:
        policy = RandAugment((level,), 1, 9.0, 0.5, 10.0, 1.0)
        microseconds = ours(policy) - none
        other = _fastest(
            lambda level=level: policies[level](photograph), options.images // 2, options.repeats
        )
        total, theirs = total + microseconds, theirs + other
        print(f"{level:22}{microseconds:8.0f}{other:8.0f}", flush=True)
    print(f"{'mean':22}{total / len(whole.levels):8.0f}{theirs / len(whole.levels):8.0f}")
    whole_time = _fastest(lambda: policies[POLICY](photograph), options.images, options.repeats)
    print(f"{POLICY:22}{ours(whole) - none:8.0f}{whole_time:8.0f}")


def _fastest(call, images: int, repeats: int) -> float:
    for _ in range(images):
        call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(images):
            call()
        times.append((time.process_time() - start) / images * 1e6)
    return min(times)


def _timm_policies() -> dict:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from timm.data import auto_augment

    strict = ImageOps.posterize
    ImageOps.posterize = lambda image, bits: strict(image, bits) if bits else image.point([0] * 768)
    random.seed(0)
    np.random.seed(0)
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "magnitude_std": 0.5}
    transform = auto_augment.rand_augment_transform(POLICY, dict(hparams))
    policies = {POLICY: transform}
    ops = [auto_augment.AugmentOp(op.name, 1.0, 9, dict(hparams)) for op in transform.ops]
    return policies | dict(zip(parse_policy(POLICY).levels, ops, strict=True))


if __name__ == "__main__":
    main()
