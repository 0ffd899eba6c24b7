"""Reads array_record files of tf.train.Example, as TensorFlow Datasets and Grain write them.

Their records are compressed one by one, so an image has no place of its own in the file. A `Source` gives it
the number of its record, and its first byte in that, as one number: `place`.
"""

import functools
import threading
from collections.abc import Iterator
from typing import Any

from keras_convnext._environment import require
from keras_convnext._files import reading, regular_size
from keras_convnext.data.tfrecords import Features, parse_example

_AT_ONCE = 64  # records that are read together, where all are
_REMEDY = "Prepare the set again."


def place(record: int, start: int) -> int:
    return record << 32 | start


def examples(files: list[str]) -> Iterator[tuple[int, str, bytes, Features, int]]:
    """Yields number and path of the file, a record, its features and its own place, for all records."""
    for number, path in enumerate(files):
        regular_size(path)
        reader, _ = _opened(path)
        with reading(path, "array_records", _REMEDY):
            count = reader.num_records()
        for first in range(0, count, _AT_ONCE):
            with reading(path, "array_records", _REMEDY):
                records = reader.read(first, min(first + _AT_ONCE, count))
            for index, record in enumerate(records, first):
                yield number, path, record, parse_example(record, 0, len(record), path), place(index, 0)


def read(path: str, offset: int, length: int) -> bytes:
    """Reads bytes of a record, from the place `offset` on."""
    reader, lock = _opened(path)
    with lock, reading(path, "array_records", _REMEDY):
        record = reader.read([offset >> 32])[0]
    start = offset & 0xFFFFFFFF
    return record[start : start + length]


@functools.lru_cache(maxsize=1024)  # files, of which each keeps its index in memory
def _opened(path: str) -> tuple[Any, threading.Lock]:
    require("array_record", f"Reading '{path}'")
    from array_record.python import array_record_module

    with reading(path, "array_records", _REMEDY):
        options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
        reader = array_record_module.ArrayRecordReader(path, options)
        if not reader.ok():
            raise ValueError("its list of records cannot be read")
        return reader, threading.Lock()
