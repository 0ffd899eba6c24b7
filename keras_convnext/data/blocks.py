"""Makes batches out of examples in blocks: in parallel, in order, and around images that are damaged."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from keras_convnext._environment import available_cores
from keras_convnext.data import preprocess
from keras_convnext.data.faults import Faults
from keras_convnext.data.index import Source

Rows = dict[str, Any]  # of a plan or a batch: tensors with a common first axis

_MAX_BLOCK = 64  # examples


def make_in_blocks(
    num_batches: int | None,
    batch_size: int,
    unit: int,
    plan: Callable[[Any], Rows],
    fast: Callable[[Rows], Rows],
    slow: Callable[[Rows], Rows],
    workers: int | None,
) -> Any:
    """Make batches out of places of an order, in parallel and in order.

    The examples are made in blocks, `workers` of them (default: one for each CPU core) at a time, as to start
    a data set for each example costs 0.7 ms. In a block those for which `fast` raises are left out by
    `ignore_errors`, and made by `slow`, which may call Python and does not raise.

    `plan` maps rows of the stream, int64 (n,), to a nested dict of tensors (n, ...), with "number"; padding,
    with number -1, must come last in a block. `fast` and `slow` map `unit` rows of the plan, a divisor of
    `batch_size`, to as many rows for the batch. The result is a `tf.data.Dataset` of dicts with these,
    "number" and "is_repaired", whether `slow` was needed in the block: tensors (batch_size, ...). It has no
    end where `num_batches` is None.
    """
    sizes = range(unit, min(batch_size, max(_MAX_BLOCK, unit)) + 1, unit)  # of a block: whole units
    size = max(size for size in sizes if batch_size % size == 0)
    blocks_a_batch = batch_size // size
    workers = workers or available_cores()

    def block(first: Any) -> Any:
        rows = plan(first * size + tf.range(size, dtype=tf.int64))
        return _block(rows, size, unit, fast, slow)

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


def finished(batches: Any, workers: int | None, faults: Faults) -> Any:
    """Return a data set that makes two batches ahead, in order, with one thread for each worker.

    Loops over it raise the DataError of `faults`, not TensorFlow's error around its text.
    """
    options = tf.data.Options()
    options.deterministic = True
    # Nothing is left to tune, and the end of an iterator can wait a minute for the thread that does.
    options.autotune.enabled = False
    # One thread an image: the cores are kept busy by several images at a time.
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = workers or available_cores()
    batches = batches.prefetch(2).with_options(options)

    def begin(self: Any) -> Any:
        iterator = kind.__iter__(self)
        base = type(iterator)

        def following(self: Any) -> Any:
            try:
                return base.__next__(self)
            except tf.errors.OpError:
                faults.check()
                raise

        iterator.__class__ = type("Iterator", (base,), {"__next__": following})
        return iterator

    # A class of its own, as a wrapper around a data set would not be one for `fit`.
    kind = type(batches)
    batches.__class__ = type("Batches", (kind,), {"__iter__": begin})
    return batches


def reader(source: Source) -> tuple[Callable[[Any], Any], Any]:
    """Return a function from an example's number to its encoded bytes, for use in a graph, and the labels."""

    # TensorFlow has no operation that reads part of a file, and its other one opens pipes and devices.
    def read(number: np.ndarray) -> bytes:
        content = source.read(int(number))
        if content[:2] == b"\xff\xd8":
            preprocess.check_scans(content, "")
            preprocess.tell_orientation(content, lambda: source.name(int(number)))
        return content

    def encoded(number: Any) -> Any:
        return tf.ensure_shape(tf.numpy_function(read, [number], tf.string, stateful=False), ())

    leave_accelerators()
    with tf.device("CPU:0"):  # in whose memory they stay, as tf.data runs there
        return encoded, tf.constant(source.labels)


def read_with_pillow(
    source: Source,
    number: Any,
    faults: Faults,
    transform: Callable[[Image.Image], np.ndarray],
    neighbours: int = 0,
) -> tuple[Any, Any, Any]:
    """Read an example and decode it with Pillow, or one of so many that follow; failures go to `faults`.

    `transform` is as for `preprocess.decode_image`. Returns uint8 (H, W, 3), the number of the example that
    it is, and whether any could be decoded; if not, the image is one black pixel.
    """

    def read(number: np.ndarray) -> tuple[np.ndarray, np.int64, np.bool_]:
        for candidate in range(int(number), int(number) + neighbours + 1) if number >= 0 else ():
            candidate %= len(source)
            try:
                content, name = source.read(candidate), source.name(candidate)
                return preprocess.decode_image(content, name, transform), np.int64(candidate), np.True_
            except (ValueError, OSError, MemoryError) as error:
                faults.add(candidate, str(error))
        return np.zeros((1, 1, 3), np.uint8), np.int64(number), np.False_

    made = tf.numpy_function(read, [number], (tf.uint8, tf.int64, tf.bool), stateful=False)
    pixels, number, is_decoded = map(tf.ensure_shape, made, ((None, None, 3), (), ()))
    return pixels, number, is_decoded


def checked(tensor: Any, has_new: Any, faults: Faults) -> Any:
    """Return a tensor unless there are too many faults; this calls Python only where `has_new` is True."""

    def check(tensor: np.ndarray) -> np.ndarray:
        faults.check()
        return tensor

    # Through the data, since a stateful function keeps iterators from being saved and the control edges of a
    # stateless one are optimised away.
    def call() -> Any:
        same = tf.numpy_function(check, [tensor], tensor.dtype, stateful=False)
        return tf.ensure_shape(same, tensor.shape)

    return tf.cond(has_new, call, lambda: tf.identity(tensor))


def leave_accelerators() -> None:
    """Keep TensorFlow off the GPU where another framework computes; it would reserve all of its memory."""
    keras = sys.modules.get("keras")
    if keras is not None and keras.config.backend() != "tensorflow":
        with contextlib.suppress(RuntimeError):  # TensorFlow is running and has what it takes
            tf.config.set_visible_devices([], "GPU")


def _block(
    rows: Rows, size: int, unit: int, fast: Callable[[Rows], Rows], slow: Callable[[Rows], Rows]
) -> Any:
    """Return a data set of one element, the `size` examples of a block, made from their plan."""
    num_units = size // unit

    def rows_of(index: Any) -> Rows:
        chosen = index * unit + tf.range(unit, dtype=tf.int64)
        return tf.nest.map_structure(lambda values: tf.gather(values, chosen), rows)

    def example(index: Any) -> Rows:
        return {"index": index, **fast(rows_of(index))}

    def repaired(made: Rows) -> Rows:
        made = {name: values[:-1] for name, values in made.items()}  # without the sentinel
        index = made.pop("index")

        def repair() -> Rows:
            missing = tf.sets.difference(tf.range(num_units, dtype=tf.int64)[None], index[None]).values
            remade = tf.map_fn(lambda i: slow(rows_of(i)), missing, fn_output_signature=signature)
            places = [tf.cast(index, tf.int32), tf.cast(missing, tf.int32)]
            return {name: tf.dynamic_stitch(places, [made[name], remade[name]]) for name in made}

        full = tf.cond(tf.shape(index)[0] == num_units, lambda: made, repair)
        full = {name: tf.reshape(values, (size, *signature[name].shape[1:])) for name, values in full.items()}
        is_repaired = tf.fill([size], tf.shape(index)[0] < num_units)
        return {**full, "number": rows["number"], "is_repaired": is_repaired}

    count = tf.reduce_sum(tf.cast(rows["number"] >= 0, tf.int64)) // unit
    examples = tf.data.Dataset.range(count).map(example)
    signature = {name: spec for name, spec in examples.element_spec.items() if name != "index"}
    # With one element that cannot fail there always is a batch.
    sentinel = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), examples.element_spec)
    sentinel = tf.data.Dataset.from_tensors(sentinel)
    return examples.ignore_errors().concatenate(sentinel).batch(num_units + 1).map(repaired)
