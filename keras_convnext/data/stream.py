"""The endless order of training: which example stands at each place, and the random numbers drawn there.

Both are functions of the seed and of the place alone, so that the stream can be entered anywhere and divided
among any number of threads and hosts.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, SplitMix64's increment


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of an endless stream of batches that is made."""

    start_batch: int = 0  # batches left out at the beginning: all made so far, to resume
    # After how many batches the next permutation begins; None for the most that an epoch has. Gradient
    # accumulation makes some fewer: whole multiples of its steps.
    batches_per_epoch: int | None = None
    host: int = 0  # number of this host, from 0 on
    num_hosts: int = 1  # that share each batch; host h has the h-th run of rows


class Order:
    """Which example stands at each place of the endless stream, and which places are those of one host.

    A place counts the rows of all hosts. Each epoch of `batches_per_epoch` has its own permutation; an
    example stands `repeats` times in succession.
    """

    def __init__(
        self, num_examples: int, batches_per_epoch: int, batch_size: int, part: Part, seed: int, repeats: int
    ) -> None:
        self.seed = seed
        self.rows_a_batch = batch_size // part.num_hosts
        self._skipped = batch_size - self.rows_a_batch
        self._first_place = part.start_batch * batch_size + part.host * self.rows_a_batch
        self._last = num_examples - 1
        self._epoch_length = batches_per_epoch * batch_size
        self._repeats = repeats

    def places(self, rows: Any) -> Any:
        """Return the places, int64 (n,), of rows of this host's stream, which are numbered through."""
        return self._first_place + rows + rows // self.rows_a_batch * self._skipped

    def numbers(self, places: Any) -> Any:
        """Return the examples' numbers, int64 (n,), at int64 (n,) places of one epoch."""
        epoch = places[0] // self._epoch_length
        turns = (places - epoch * self._epoch_length) // self._repeats
        seed = tf.stack([tf.constant(self.seed, tf.int64), epoch])
        return tf.random.experimental.index_shuffle(turns, seed, self._last)


class Draws:
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
