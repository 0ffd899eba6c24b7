"""Batches of images from a source, for evaluation and for training, as `tf.data`.

Examples are read at random from the byte ranges of a `sources.Source`. What happens to the example at a place
of the order is a function of the seed and of that place alone, whatever the number of threads or hosts and
wherever the stream was entered.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_convnext.data import jpeg, preprocess
from keras_convnext.data.augment import erase_and_mix, policies
from keras_convnext.data.faults import Faults
from keras_convnext.data.index import Source

_PADDING = -1  # in place of an example's number
_MAX_BLOCK = 64  # examples
_NEIGHBOURS = 8  # tried in place of an image that cannot be decoded
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, SplitMix64's increment

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Rows = dict[str, Any]  # of a plan or a batch: tensors with a common first axis


def eval_batches(
    source: Source,
    *,
    image_size: int | tuple[int, int],
    batch_size: int = 64,
    crop: float = 0.875,
    resize_mode: str = "shorter_side",
    resize_size: int | None = None,
    interpolation: str = "bicubic",
    host: int = 0,
    num_hosts: int = 1,
    faults: Faults | None = None,
    workers: int | None = None,
) -> Any:
    """Make batches for evaluation, each example exactly once.

    The pixels are those of `preprocess.preprocess_image`, that is, of Pillow with timm's or torchvision's
    transform. The examples are divided into `num_hosts` runs of neighbours, of equal numbers of batches, so
    that a host reads its own part of the files; the last batches are filled up with padding.

    Args:
        source: what `sources.open_source` returns.
        image_size, crop, resize_mode, resize_size, interpolation: as in `preprocess.preprocess_image`;
            `checkpoints.find_checkpoint(tag)` has those of a published file.
        batch_size: examples in a batch of this host.
        host: number of this host, from 0 on.
        num_hosts: hosts among which the examples are divided.
        faults: collects images that cannot be decoded; the default is a new collection.
        workers: images in work at a time, the default is the number of CPU cores.

    Returns:
        `tf.data.Dataset` of dicts: "images" uint8 (batch_size, height, width, 3), "labels" int32
        (batch_size,), "numbers" int64 (batch_size,), the example's place in the source or -1 for padding,
        and "mask" bool (batch_size,), False for padding and for images that could not be decoded, whose
        pixels are 0. Iterating raises `tf.errors.OpError` with the text of `DataError` when `faults.check`
        does.

    Raises:
        ValueError: an argument is outside its range or a name is unknown; the message gives the value
            received and the ones allowed.
    """
    transform = EvalTransform(image_size, crop, resize_mode, resize_size, interpolation)
    size = transform.image_size
    _check_count("batch_size", batch_size)
    _check_host(host, num_hosts)
    _leave_accelerators()
    faults = Faults(source) if faults is None else faults
    read, labels = _reader(source), _on_host(source.labels)
    share = -(-len(source) // num_hosts)
    begin, end = (min(number * share, len(source)) for number in (host, host + 1))

    def plan(places: Any) -> Rows:
        places += begin
        return {"number": tf.where(places < end, places, _PADDING), "place": places}

    def with_tensorflow(rows: Rows) -> Rows:
        pixels = transform.with_tensorflow(read(rows["number"][0]))
        return {"images": pixels[None], "mask": tf.constant([True])}

    def with_pillow(rows: Rows) -> Rows:
        pixels, _, is_decoded = _read_with_pillow(source, rows["number"][0], faults, transform.with_pillow)
        pixels = tf.cond(is_decoded, lambda: pixels, lambda: tf.zeros((*size, 3), tf.uint8))
        return {"images": tf.ensure_shape(pixels, (*size, 3))[None], "mask": is_decoded[None]}

    def named(batch: Rows) -> Rows:
        is_faulty = ~batch["mask"] & (batch["number"] >= 0)
        numbers = _checked(batch["number"], tf.reduce_any(is_faulty), faults)
        return {
            "images": batch["images"],
            "labels": tf.gather(labels, tf.maximum(numbers, 0)),
            "numbers": numbers,
            "mask": batch["mask"],
        }

    fast = with_tensorflow if transform.is_covered else with_pillow
    batches = _make(-(-share // batch_size), batch_size, 1, plan, fast, with_pillow, workers)
    return batches.map(named).prefetch(2).with_options(_options(workers))


def eval_image(
    path_or_bytes: str | os.PathLike[str] | bytes,
    *,
    image_size: int | tuple[int, int],
    crop: float = 0.875,
    resize_mode: str = "shorter_side",
    resize_size: int | None = None,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Prepare one image as `eval_batches` does.

    Args:
        path_or_bytes: an image file, or the bytes of one.
        image_size, crop, resize_mode, resize_size, interpolation: as in `preprocess.preprocess_image`.

    Returns:
        uint8 (height, width, 3), RGB, 0 to 255.

    Raises:
        ImageError: the image is missing or cannot be decoded; the message names it.
        ValueError: an argument is outside its range or a name is unknown.
    """
    transform = EvalTransform(image_size, crop, resize_mode, resize_size, interpolation)
    if isinstance(path_or_bytes, bytes):
        content, name = path_or_bytes, f"{len(path_or_bytes)} bytes"
    else:
        content, name = preprocess.read_file(path_or_bytes), os.fspath(path_or_bytes)
    if transform.is_covered:
        try:
            return transform.with_tensorflow(tf.constant(content)).numpy()
        except tf.errors.InvalidArgumentError:
            pass  # not an image that TensorFlow reads as Pillow does
    return transform.with_pillow(preprocess.decode_image(content, name))


class EvalTransform:
    """The evaluation transform twice: as graph ops from encoded bytes, and with Pillow from pixels."""

    def __init__(
        self,
        image_size: int | tuple[int, int],
        crop: float,
        resize_mode: str,
        resize_size: int | None,
        interpolation: str,
    ) -> None:
        self.image_size = preprocess._check_image_size(image_size)
        self._scale_size = preprocess._scale_size(self.image_size, crop, resize_size)
        preprocess._resized_size((1, 1), self._scale_size, resize_mode)
        _check_choice("interpolation", interpolation, tuple(preprocess.INTERPOLATIONS))
        self._crop, self._resize_size = crop, resize_size
        self._resize_mode, self._interpolation = resize_mode, interpolation
        # A resized image that is smaller than the crop is padded, which only Pillow's path does.
        self.is_covered = all(a >= b for a, b in zip(self._scale_size, self.image_size, strict=True))

    def with_tensorflow(self, content: Any) -> Any:
        return jpeg.center_crop(
            content,
            image_size=self.image_size,
            scale_size=self._scale_size,
            resize_mode=self._resize_mode,
            interpolation=self._interpolation,
        )

    def with_pillow(self, image: np.ndarray) -> np.ndarray:
        return preprocess.preprocess_image(
            image,
            image_size=self.image_size,
            crop=self._crop,
            resize_mode=self._resize_mode,
            resize_size=self._resize_size,
            interpolation=self._interpolation,
        )


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int | tuple[int, int] = 224,
    num_classes: int | None = None,
    seed: int = 0,
    start_batch: int = 0,
    batches_per_epoch: int | None = None,
    host: int = 0,
    num_hosts: int = 1,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip: float = 0.5,
    policy: str = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.0,
    erase: float = 0.25,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    mix_probability: float = 1.0,
    switch_probability: float = 0.5,
    mix_group: int | None = None,
    label_smoothing: float = 0.1,
    repeats: int = 1,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: str = "float32",
    faults: Faults | None = None,
    workers: int | None = None,
) -> Any:
    """Make batches for training, without end: random resized crop, flip, policy, erasing, mixup or cutmix.

    The defaults are those of ConvNeXt's ImageNet-1k training (Liu et al. 2022, table 5, and the official
    main.py). The order of the steps is timm's. An epoch is `batches_per_epoch` batches; each has its own
    permutation of the examples, and what is left over is dropped. The stream has no end, so that no epoch
    repeats another: `fit` needs `steps_per_epoch=steps_per_epoch(source, batch_size)`, or it goes on forever.

    Place p of the order decides alone, with the seed, which example stands there and how it is changed. So
    the stream is the same whatever the number of `workers`, is entered anywhere by `start_batch`, and
    `num_hosts` hosts together make the batches of one host: host h has the h-th run of rows of each. Rows
    2k and 2k + 1 are mixed with each other, where timm takes a batch and its reverse; the shuffle makes that
    the same.

    An image that cannot be decoded is noted in `faults`, and the next example of the source that can be
    stands in for it.

    Args:
        source: what `sources.open_source` returns.
        batch_size: examples in a batch of all hosts together.
        image_size: of the result in pixels, one side of a square or (height, width).
        num_classes: length of the targets, at least that of the source's classes, which is the default.
        seed: of order and augmentation, an integer from 0 up.
        start_batch: batches of the stream that are left out at its beginning: all batches made so far, to go
            on after an interruption.
        batches_per_epoch: after how many batches the next permutation begins; default `steps_per_epoch`, the
            most that an epoch has. Gradient accumulation makes some fewer: whole multiples of its steps.
        host: number of this host, from 0 on.
        num_hosts: hosts that share each batch.
        scale: smallest and largest area of the crop, as fractions of the image.
        ratio: smallest and largest width / height of the crop.
        interpolation: "bicubic" or "bilinear", of the crop and of the policy's geometric operations.
        flip: probability of exchanging left and right.
        policy: RandAugment, AutoAugment or TrivialAugment as `augment.parse_policy` reads it; "none".
        color_jitter: strength of brightness, contrast and saturation jitter, 0 for none.
        erase: probability of random erasing with normal noise in each pixel.
        mixup: alpha of mixup's Beta distribution, 0 for none.
        cutmix: alpha of cutmix's Beta distribution, 0 for none.
        mix_probability: of mixing a group at all.
        switch_probability: of cutmix where both are on.
        mix_group: images that share one draw of mixing; default all of a batch, on whatever hosts they are.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        repeats: times that an example stands in succession, with different augmentation (repeated
            augmentation, Hoffer et al. 2020); the epoch keeps its length and sees fewer examples.
        mean, std: of the normaliser that the model begins with, in 0..1; the noise of erasing is normal
            behind it.
        dtype: "float32", or "uint8" to round and clip, for a quarter of the memory.
        faults: collects images that cannot be decoded; the default is a new collection.
        workers: blocks of images in work at a time; the default is the number of CPU cores.

    Returns:
        `tf.data.Dataset` without end of (images, targets): `dtype` (n, height, width, 3), RGB, 0 to 255
        (noise in float32 goes beyond), and float32 (n, num_classes), each row with the sum 1; n is
        batch_size / num_hosts. Iterating raises `tf.errors.OpError` with the text of `DataError` when
        `faults.check` does.

    Raises:
        ValueError: an argument is outside its range or a name is unknown; the message gives the value
            received and the ones allowed.
    """
    size = preprocess._check_image_size(image_size)
    _check_choice("interpolation", interpolation, tuple(preprocess.INTERPOLATIONS))
    _check_choice("dtype", dtype, ("float32", "uint8"))
    _check_count("batch_size", batch_size)
    _check_count("repeats", repeats)
    _check_host(host, num_hosts)
    most = steps_per_epoch(source, batch_size)
    batches_per_epoch = most if batches_per_epoch is None else batches_per_epoch
    _check_count("batches_per_epoch", batches_per_epoch)
    if batches_per_epoch > most:
        raise ValueError(
            f"Expected batches_per_epoch of at most {most}, which '{source.path}' has at batch_size="
            f"{batch_size}, received {batches_per_epoch}."
        )
    if batch_size % num_hosts:
        raise ValueError(
            f"Expected batch_size to be a multiple of num_hosts, received {batch_size} and {num_hosts}. "
            f"The nearest is {round(batch_size / num_hosts) * num_hosts}."
        )
    rows_a_batch = batch_size // num_hosts
    mix_group = batch_size if mix_group is None else mix_group
    is_mixed = bool(mixup or cutmix)
    unit = 2 if is_mixed else 1  # neighbours that are made together
    if not preprocess._is_positive_integer(mix_group) or batch_size % mix_group or mix_group % unit:
        raise ValueError(
            f"Expected mix_group to divide the {batch_size} rows of a batch"
            f"{' and to be even' if is_mixed else ''}, received {mix_group!r}."
        )
    if rows_a_batch % unit:
        raise ValueError(
            f"Expected an even number of images on each host, which are mixed in pairs, received "
            f"{rows_a_batch} of {batch_size} on each of {num_hosts}. Choose another batch_size."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"Expected seed to be an integer from 0 up, received {seed!r}.")
    shares = {
        "flip": flip,
        "erase": erase,
        "label_smoothing": label_smoothing,
        "mix_probability": mix_probability,
        "switch_probability": switch_probability,
    }
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"Expected {name} in [0, 1], received {value!r}.")
    for name, value in {"color_jitter": color_jitter, "mixup": mixup, "cutmix": cutmix}.items():
        if value < 0:
            raise ValueError(f"Expected {name} to be 0, for none, or more, received {value!r}.")
    for name, (low, high), limit in (("scale", scale, 1.0), ("ratio", ratio, np.inf)):
        if not 0 < low <= high <= limit:
            raise ValueError(
                f"Expected {name} to be (smallest, largest), above 0 and at most {limit}, "
                f"received {(low, high)!r}."
            )
    if num_classes is not None and num_classes < len(source.classes):
        raise ValueError(
            f"Expected num_classes of at least {len(source.classes)}, the classes of '{source.path}', "
            f"received {num_classes!r}."
        )
    classes = len(source.classes) if num_classes is None else num_classes
    chosen_policy = policies.parse_policy(policy)
    _leave_accelerators()
    faults = Faults(source) if faults is None else faults
    read, labels = _reader(source), _on_host(source.labels)
    # timm fills with the mean, torchvision with black.
    is_torchvisions = chosen_policy is not None and policy.startswith(("ta_wide", "imagenet"))
    fill = (0, 0, 0) if is_torchvisions else tuple(min(255, round(255 * value)) for value in mean)
    order = _Order(len(source), batches_per_epoch * batch_size, seed, repeats)
    first_place = start_batch * batch_size + host * rows_a_batch

    def plan(local: Any) -> Rows:
        # Local rows are numbered through; those of the other hosts lie between two batches of this one.
        places = first_place + local + local // rows_a_batch * (batch_size - rows_a_batch)
        draws = _Draws(seed, places)
        rows = {
            "number": order.numbers(places),
            "place": places,
            "crop": jpeg.plan_crop(draws.uniforms(22), scale, ratio),
            "flip": draws.uniforms(1)[:, 0] < flip,
        }
        if chosen_policy is not None:
            uniforms = draws.uniforms(policies.UNIFORMS_PER_OPERATION * chosen_policy.num_operations)
            rows["policy"] = policies.plan_augment(chosen_policy, uniforms, size)
        if color_jitter:
            uniforms = draws.uniforms(policies.NUM_JITTER_UNIFORMS)
            rows["jitter"] = policies.plan_jitter(uniforms, color_jitter)
        if erase:
            uniforms = draws.uniforms(erase_and_mix.NUM_ERASE_UNIFORMS)
            rows["erase"] = erase_and_mix.plan_erase(uniforms, erase, size)
        if is_mixed:
            # The groups of all hosts are drawn together, so that a group does not depend on whose it is.
            groups = erase_and_mix.plan_mix(
                tf.stack([tf.constant(seed, tf.int64), places[0] // batch_size]),
                batch_size // mix_group,
                size,
                mixup,
                cutmix,
                mix_probability,
                switch_probability,
            )
            group = places % batch_size // mix_group
            rows["mix"] = {name: tf.gather(values, group) for name, values in groups.items()}
        return rows

    def made(rows: Rows, pixels: Callable[[Rows], tuple[Any, Any]], is_repaired: bool) -> Rows:
        """Make neighbours, one by one and then mixed while they are in the cache."""
        made_images, made_labels = [], []
        for index in range(unit):
            row = tf.nest.map_structure(lambda values, index=index: values[index], rows)
            image, number = pixels(row)
            if chosen_policy is not None:
                image = policies.apply_augment(image, row["policy"], interpolation, fill)
            if color_jitter:
                image = policies.apply_jitter(image, row["jitter"])
            image = tf.cast(image, dtype)
            if erase:
                key = tf.stack([tf.constant(seed, tf.int64), row["place"]])
                image = erase_and_mix.apply_erase(image, row["erase"], key, mean, std)
            made_images.append(image)
            made_labels.append(labels[number])
        mixing = {name: values[:1] for name, values in rows["mix"].items()} if is_mixed else None
        mixed, targets = erase_and_mix.mix(
            tf.stack(made_images), tf.stack(made_labels), mixing, classes, label_smoothing
        )
        return {"images": mixed, "targets": targets, "is_repaired": tf.fill([unit], is_repaired)}

    def with_tensorflow(row: Rows) -> tuple[Any, Any]:
        pixels = jpeg.random_resized_crop(
            read(row["number"]),
            row["crop"],
            row["flip"],
            image_size=size,
            interpolation=interpolation,
            ratio=ratio,
        )
        return pixels, row["number"]

    def with_pillow(row: Rows) -> tuple[Any, Any]:
        pixels, number, _ = _read_with_pillow(source, row["number"], faults, neighbours=_NEIGHBOURS)
        top, left, height, width = jpeg.crop_box(tf.unstack(tf.shape(pixels)[:2]), row["crop"], ratio)
        pixels = pixels[top : top + height, left : left + width]
        pixels = jpeg.resize(pixels, row["flip"], image_size=size, interpolation=interpolation)
        return pixels, number

    def checked(batch: Rows) -> tuple[Any, Any]:
        return batch["images"], _checked(batch["targets"], tf.reduce_any(batch["is_repaired"]), faults)

    batches = _make(
        None,
        rows_a_batch,
        unit,
        plan,
        lambda rows: made(rows, with_tensorflow, False),
        lambda rows: made(rows, with_pillow, True),
        workers,
    )
    batches = batches.map(checked)
    batches = batches.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return batches.prefetch(2).with_options(_options(workers))


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Return the batches of all hosts that an epoch of `train_batches` has; the rest is dropped.

    Raises:
        ValueError: the source has fewer examples than a batch.
    """
    if len(source) < batch_size:
        raise ValueError(
            f"Expected at least one batch of {batch_size} images, but '{source.path}' has {len(source)}. "
            "Choose a smaller batch_size."
        )
    return len(source) // batch_size


class _Order:
    """Which example stands at each place of the endless stream."""

    def __init__(self, num_examples: int, epoch_length: int, seed: int, repeats: int) -> None:
        self._last = num_examples - 1
        self._epoch_length = epoch_length
        self._seed, self._repeats = seed, repeats

    def numbers(self, places: Any) -> Any:
        """Return the examples' numbers, int64 (n,), at int64 (n,) places of one epoch."""
        epoch = places[0] // self._epoch_length
        turns = (places - epoch * self._epoch_length) // self._repeats
        seed = tf.stack([tf.constant(self._seed, tf.int64), epoch])
        return tf.random.experimental.index_shuffle(turns, seed, self._last)


class _Draws:
    """Uniform random numbers that are functions of the seed, the place and the column.

    Reference: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), the mixing
    function of SplitMix64. One vectorised call serves a block of images.
    """

    def __init__(self, seed: int, places: Any) -> None:
        self._key = _mix64(
            tf.cast(places, tf.uint64) * _GOLDEN + _mix64(tf.constant(seed, tf.uint64) + _GOLDEN)
        )
        self._column = 0

    def uniforms(self, count: int) -> Any:
        """Return the next `count` columns, float64 (n, count), in [0, 1)."""
        columns = np.arange(self._column, self._column + count, dtype=np.uint64)
        self._column += count
        bits = _mix64(self._key[:, None] + tf.constant((columns + np.uint64(1)) * np.uint64(_GOLDEN)))
        return tf.cast(tf.bitwise.right_shift(bits, tf.constant(11, tf.uint64)), tf.float64) * 2.0**-53


def _mix64(z: Any) -> Any:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = tf.bitwise.bitwise_xor(z, tf.bitwise.right_shift(z, tf.constant(shift, tf.uint64)))
        z *= tf.constant(factor, tf.uint64)
    return z


def _leave_accelerators() -> None:
    """Keep TensorFlow off the GPU where another framework computes; it would reserve all of its memory."""
    keras = sys.modules.get("keras")
    if keras is not None and keras.config.backend() != "tensorflow":
        with contextlib.suppress(RuntimeError):  # TensorFlow is running and has what it takes
            tf.config.set_visible_devices([], "GPU")


def _on_host(values: Any) -> Any:
    with tf.device("CPU:0"):
        return tf.constant(values)


def _reader(source: Source) -> Callable[[Any], Any]:
    """Return a function from an example's number to its encoded bytes, for use in a graph."""
    if np.all(source.lengths < 0):
        paths = _on_host([source.files[number] for number in source.file_numbers])
        return lambda number: tf.io.read_file(paths[number])
    # TensorFlow has no operation that reads part of a file.
    return lambda number: tf.ensure_shape(
        tf.numpy_function(source.read, [number], tf.string, stateful=False), ()
    )


def _read_with_pillow(
    source: Source,
    number: Any,
    faults: Faults,
    transform: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    neighbours: int = 0,
) -> tuple[Any, Any, Any]:
    """Read an example and decode it with Pillow, or one of so many that follow; failures go to `faults`.

    Returns:
        uint8 (H, W, 3), the number of the example that it is, and whether any could be decoded; if not, the
        image is one black pixel.
    """

    def read(number: np.ndarray) -> tuple[np.ndarray, np.int64, np.bool_]:
        for candidate in range(int(number), int(number) + neighbours + 1) if number >= 0 else ():
            candidate %= len(source)
            try:
                image = preprocess.decode_image(source.read(candidate), source.name(candidate))
                return transform(image), np.int64(candidate), np.True_
            except (ValueError, OSError) as error:
                faults.add(candidate, str(error))
        return np.zeros((1, 1, 3), np.uint8), np.int64(number), np.False_

    pixels, number, is_decoded = tf.numpy_function(
        read, [number], (tf.uint8, tf.int64, tf.bool), stateful=False
    )
    return (
        tf.ensure_shape(pixels, (None, None, 3)),
        tf.ensure_shape(number, ()),
        tf.ensure_shape(is_decoded, ()),
    )


def _checked(tensor: Any, has_new: Any, faults: Faults) -> Any:
    """Return a tensor unless there are too many faults; this calls Python only where `has_new` is True."""

    def check(tensor: np.ndarray) -> np.ndarray:
        faults.check()
        return tensor

    # Through the data, since a stateful function keeps iterators from being saved and the control edges of a
    # stateless one are optimised away.
    return tf.cond(
        has_new,
        lambda: tf.ensure_shape(
            tf.numpy_function(check, [tensor], tensor.dtype, stateful=False), tensor.shape
        ),
        lambda: tf.identity(tensor),
    )


def _make(
    num_batches: int | None,
    batch_size: int,
    unit: int,
    plan: Callable[[Any], Rows],
    fast: Callable[[Rows], Rows],
    slow: Callable[[Rows], Rows],
    workers: int | None,
) -> Any:
    """Make batches out of places of an order, in parallel and in order.

    The examples are made in blocks, several blocks at a time. In a block those for which `fast` raises
    are left out by `ignore_errors`, and made by `slow`, which may call Python and does not raise. A data set
    of its own for each example would do the same, but costs 0.7 ms an image for starting it.

    Args:
        num_batches: batches to make, None for no end.
        batch_size: examples in a batch.
        unit: examples that are made together, a divisor of batch_size.
        plan: from int64 (n,) rows of the stream to a nested dict of tensors (n, ...), with "number" and
            "place", which go into the batch; padding, with number -1, must come last in a block.
        fast, slow: from `unit` rows of the plan to a dict of as many rows for the batch.
        workers: blocks in work at a time.
    """
    size = max(
        size
        for size in range(unit, batch_size + 1, unit)
        if batch_size % size == 0 and size <= max(_MAX_BLOCK, unit)
    )

    def block(first: Any) -> Any:
        rows = plan(first * size + tf.range(size, dtype=tf.int64))

        def rows_of(index: Any) -> Rows:
            chosen = index * unit + tf.range(unit, dtype=tf.int64)
            return tf.nest.map_structure(lambda values: tf.gather(values, chosen), rows)

        def example(index: Any) -> Rows:
            return {"index": index, **fast(rows_of(index))}

        def repaired(made: Rows) -> Rows:
            made = {name: values[:-1] for name, values in made.items()}  # without the sentinel
            index = made.pop("index")

            def repair() -> Rows:
                missing = tf.sets.difference(tf.range(size // unit, dtype=tf.int64)[None], index[None]).values
                remade = tf.map_fn(lambda i: slow(rows_of(i)), missing, fn_output_signature=signature)
                places = [tf.cast(index, tf.int32), tf.cast(missing, tf.int32)]
                return {name: tf.dynamic_stitch(places, [made[name], remade[name]]) for name in made}

            full = tf.cond(tf.shape(index)[0] == size // unit, lambda: made, repair)
            full = {
                name: tf.reshape(values, (size, *signature[name].shape[1:])) for name, values in full.items()
            }
            return {**full, **{name: rows[name] for name in ("number", "place")}}

        count = tf.reduce_sum(tf.cast(rows["number"] >= 0, tf.int64)) // unit
        examples = tf.data.Dataset.range(count).map(example)
        signature = {name: spec for name, spec in examples.element_spec.items() if name != "index"}
        # With one element that cannot fail there always is a batch.
        sentinel = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
        sentinel = tf.data.Dataset.from_tensors(sentinel)
        return examples.ignore_errors().concatenate(sentinel).batch(size // unit + 1).map(repaired)

    workers = _workers(workers)
    blocks_a_batch = batch_size // size

    def joined(blocks: Rows) -> Rows:
        return {name: tf.reshape(values, (batch_size, *values.shape[2:])) for name, values in blocks.items()}

    counter = tf.data.Dataset.counter()
    if num_batches is not None:
        counter = tf.data.Dataset.range(num_batches * blocks_a_batch)
    # AutoGraph would only make tracing slower and tracebacks longer.
    blocks = counter.interleave(
        tf.autograph.experimental.do_not_convert(block),
        cycle_length=workers + 1,
        num_parallel_calls=workers,
        deterministic=True,
    )
    if blocks_a_batch == 1:
        return blocks
    return blocks.batch(blocks_a_batch, drop_remainder=True).map(joined)


def _options(workers: int | None) -> Any:
    options = tf.data.Options()
    options.deterministic = True
    # One thread an image: the cores are kept busy by several images at a time.
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = _workers(workers)
    return options


def _workers(workers: int | None) -> int:
    return workers or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}. Known: {', '.join(known)}.")


def _check_count(name: str, value: object) -> None:
    if not preprocess._is_positive_integer(value):
        raise ValueError(f"Expected {name} to be a positive integer, received {value!r}.")


def _check_host(host: int, num_hosts: int) -> None:
    _check_count("num_hosts", num_hosts)
    if not 0 <= host < num_hosts:
        raise ValueError(
            f"Expected host from 0 to {num_hosts - 1}, the number of this one of {num_hosts} hosts, "
            f"received {host!r}."
        )
