"""Batches of images from a source, for evaluation and for training, as `tf.data`.

What happens to the example at a place of the order is a function of the seed and of that place alone,
whatever the number of threads or hosts and wherever the stream was entered.
"""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_convnext.data import blocks, jpeg, preprocess
from keras_convnext.data.augment.transform import TrainTransform
from keras_convnext.data.blocks import Rows
from keras_convnext.data.faults import Examples, Faults
from keras_convnext.data.index import Source
from keras_convnext.data.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    is_positive_integer,
)
from keras_convnext.data.stream import Draws, Order, Part
from keras_convnext.data.train_transform import Augmentation

_PADDING = -1  # in place of an example's number
_NEIGHBOURS = 8  # tried in place of an image that cannot be decoded
_MOST_PADDED = 65_536  # examples of a batch that is larger than the data

_PAPERS, _WHOLE = Augmentation(), Part()


def eval_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    host: int = 0,
    num_hosts: int = 1,
    faults: Faults | None = None,
    workers: int | None = None,
) -> Any:
    """Make batches for evaluation, each example exactly once.

    The pixels are those of `preprocess.preprocess_image`. The examples are divided into `num_hosts` runs of
    neighbours, of equal numbers of batches, so that a host reads its own part of the files; the last batches
    are filled up with padding.

    Args:
        source: what `sources.open_source` returns.
        preprocessing: how images are prepared.
        batch_size: examples in a batch of this host.
        host, num_hosts: number of this host, from 0 on, and of all.
        faults: collects images that cannot be decoded; the default is a new collection.
        workers: images in work at a time, the default is the number of CPU cores.

    Returns:
        `tf.data.Dataset` of dicts: "images" uint8 (batch_size, height, width, 3), "labels" int32
        (batch_size,), "numbers" int64 (batch_size,), the example's place in the source or -1 for padding,
        and "mask" bool (batch_size,), False for padding and for images that could not be decoded, whose
        pixels are 0. A loop over it raises `DataError` when `faults.check` does; what is made of it
        (`take`, `fit` on TensorFlow) a `tf.errors.OpError` with its text.

    Raises:
        ValueError: an argument is outside its range; the message gives the value received.
    """
    size = preprocessing.size
    _check_count("batch_size", batch_size)
    _check_host(host, num_hosts)
    faults = Faults(source) if faults is None else faults
    read, labels = blocks.reader(source)
    share = -(-len(source) // num_hosts)
    if batch_size > max(share, _MOST_PADDED):
        raise ValueError(
            f"Expected batch_size of at most {_MOST_PADDED:,}, as the last batch is filled up, received "
            f"{batch_size:,} for {share:,} images."
        )
    begin, end = (min(number * share, len(source)) for number in (host, host + 1))

    def plan(places: Any) -> Rows:
        places += begin
        return {"number": tf.where(places < end, places, _PADDING)}

    prepared = functools.partial(preprocess.prepared, preprocessing=preprocessing)

    def with_tensorflow(rows: Rows) -> Rows:
        pixels = jpeg.center_crop(read(rows["number"][0]), preprocessing)
        return {"images": pixels[None], "mask": tf.constant([True])}

    def with_pillow(rows: Rows) -> Rows:
        pixels, _, is_decoded = blocks.read_with_pillow(source, rows["number"][0], faults, prepared)
        pixels = tf.cond(is_decoded, lambda: pixels, lambda: tf.zeros((*size, 3), tf.uint8))
        return {"images": tf.ensure_shape(pixels, (*size, 3))[None], "mask": is_decoded[None]}

    def named(batch: Rows) -> Rows:
        is_faulty = ~batch["mask"] & (batch["number"] >= 0)
        numbers = blocks.checked(batch["number"], tf.reduce_any(is_faulty), faults)
        return {
            "images": batch["images"],
            "labels": tf.gather(labels, tf.maximum(numbers, 0)),
            "numbers": numbers,
            "mask": batch["mask"],
        }

    fast = with_tensorflow if jpeg.covers(preprocessing) else with_pillow
    num_batches = -(-share // batch_size)
    batches = blocks.make_in_blocks(num_batches, batch_size, 1, plan, fast, with_pillow, workers)
    return blocks.finished(batches.map(named), workers, faults)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int | tuple[int, int] = 224,
    augmentation: Augmentation = _PAPERS,
    normaliser: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
    num_classes: int | None = None,
    mix_group: int | None = None,
    seed: int = 0,
    part: Part = _WHOLE,
    dtype: str = "float32",
    faults: Faults | None = None,
    workers: int | None = None,
) -> Any:
    """Make batches for training, without end: random resized crop, flip, policy, erasing, mixup or cutmix.

    The steps are in timm's order. An epoch has its own permutation of the examples, and what is left over of
    its batches is dropped. As no epoch repeats another, the stream has no end: `fit` needs
    `steps_per_epoch=steps_per_epoch(source, batch_size)`, or it runs forever.

    Several hosts together make the batches of one. Rows 2k and 2k + 1 are mixed with each other, where timm
    takes a batch and its reverse; the shuffle makes that the same.

    An image that cannot be decoded is noted in `faults`, and the next example of the source that can be
    stands in for it. One of more than 16.7 million pixels is first reduced.

    Args:
        source: what `sources.open_source` returns.
        batch_size: examples in a batch of all hosts together.
        image_size: of the result in pixels, one side of a square or (height, width).
        augmentation: what is done to the images; default as for ConvNeXt's ImageNet-1k training.
        normaliser: (mean, std) that the model begins with, in 0..1; the noise of erasing is normal after it.
        num_classes: length of the targets, at least that of the source's classes, which is the default.
        mix_group: images that share one draw of mixing; default all of a batch, on whatever hosts they are.
        seed: of order and augmentation, an integer from 0 up.
        part: where the stream is entered and how it is shared among hosts; default all of it, from its start.
        dtype: "float32", or "uint8" to round and clip, for a quarter of the memory.
        faults, workers: as for `eval_batches`.

    Returns:
        `tf.data.Dataset` without end of (images, targets): `dtype` (n, height, width, 3), RGB, 0 to 255
        (noise in float32 goes beyond), and float32 (n, num_classes), each row with the sum 1; n is
        batch_size / part.num_hosts. Errors of a loop over it are as for `eval_batches`.

    Raises:
        ValueError: an argument is outside its range or a name is unknown; the message has what is allowed.
    """
    classes = len(source.classes)
    num_classes = classes if num_classes is None else num_classes
    if num_classes < classes:
        raise ValueError(
            f"Expected num_classes of at least {classes}, the classes of '{source.path}', received "
            f"{num_classes!r}."
        )
    order = order_of(source, batch_size, part, seed, augmentation.repeats)
    size = Preprocessing(image_size).size
    mix_group = batch_size if mix_group is None else mix_group
    transform = TrainTransform(
        augmentation, size, num_classes, batch_size, mix_group, normaliser, dtype, seed
    )
    if order.rows_a_batch % transform.unit:
        raise ValueError(
            f"Expected an even number of images on each host, which are mixed in pairs, received "
            f"{order.rows_a_batch} of {batch_size} on each of {part.num_hosts}. Choose another batch_size."
        )
    faults = Faults(source) if faults is None else faults
    read, labels = blocks.reader(source)

    def plan(rows: Any) -> Rows:
        places = order.places(rows)
        numbers = {"number": order.numbers(places), "place": places}
        return numbers | transform.plan(Draws(seed, places), places)

    def with_tensorflow(row: Rows) -> tuple[Any, Any]:
        return transform.crop_bytes(read(row["number"]), row), labels[row["number"]]

    def with_pillow(row: Rows) -> tuple[Any, Any]:
        decoded = blocks.read_with_pillow(source, row["number"], faults, preprocess.reduced, _NEIGHBOURS)
        pixels, number, _ = decoded
        return transform.crop_pixels(pixels, row), labels[number]

    def without_faults(batch: Rows) -> tuple[Any, Any]:
        return batch["images"], blocks.checked(batch["targets"], tf.reduce_any(batch["is_repaired"]), faults)

    fast = functools.partial(transform.make, cropped=with_tensorflow)
    slow = functools.partial(transform.make, cropped=with_pillow)
    batches = blocks.make_in_blocks(None, order.rows_a_batch, transform.unit, plan, fast, slow, workers)
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return blocks.finished(batches.map(without_faults).apply(endless), workers, faults)


def order_of(source: Examples, batch_size: int, part: Part, seed: int, repeats: int = 1) -> Order:
    """Return the order of the examples, after a check of the arguments of `train_batches` that make it."""
    _check_count("batch_size", batch_size)
    _check_host(part.host, part.num_hosts)
    most = steps_per_epoch(source, batch_size)
    batches_per_epoch = most if part.batches_per_epoch is None else part.batches_per_epoch
    _check_count("batches_per_epoch", batches_per_epoch)
    if batches_per_epoch > most:
        raise ValueError(
            f"Expected batches_per_epoch of at most {most}, which '{source.path}' has at batch_size="
            f"{batch_size}, received {batches_per_epoch}."
        )
    if batch_size % part.num_hosts:
        raise ValueError(
            f"Expected batch_size to be a multiple of num_hosts, received {batch_size} and "
            f"{part.num_hosts}. The nearest is {round(batch_size / part.num_hosts) * part.num_hosts}."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"Expected seed to be an integer from 0 up, received {seed!r}.")
    return Order(len(source), batches_per_epoch, batch_size, part, seed, repeats)


def steps_per_epoch(source: Examples, batch_size: int) -> int:
    """Return the batches of all hosts that an epoch has; ValueError where there are no examples for one."""
    if len(source) < batch_size:
        raise ValueError(
            f"Expected at least one batch of {batch_size} images, but '{source.path}' has {len(source)}. "
            "Choose a smaller batch_size."
        )
    return len(source) // batch_size


def _check_count(name: str, value: object) -> None:
    if not is_positive_integer(value):
        raise ValueError(f"Expected {name} to be a positive integer, received {value!r}.")


def _check_host(host: int, num_hosts: int) -> None:
    _check_count("num_hosts", num_hosts)
    if not 0 <= host < num_hosts:
        raise ValueError(
            f"Expected host from 0 to {num_hosts - 1}, the number of this one of {num_hosts} hosts, received "
            f"{host!r}."
        )
